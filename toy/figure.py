"""Pictures of a run: the toy's densities and curves, or images of reference and policy.

diffusion_dpo.py imports this when a picture is due. By itself it draws the metrics of runs, one or
several, whatever they train, to curves.png in the first:

    python toy/figure.py runs/sd15 [runs/another ...]
"""

import json
import math
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

SMOOTH = 20  # steps that a thick line is the mean of
TITLES = "loss", "reward accuracy", "error of policy - error of reference", "logit"
CURVES = (  # panel; metric, less another one; label and colour of a single run; style among several
    (0, "loss", None, "policy", "tab:blue", "-"),
    (1, "reward_accuracy", None, "policy", "tab:blue", "-"),
    (2, "err_policy_w", "err_ref_w", "preferred", "tab:green", "-"),
    (2, "err_policy_l", "err_ref_l", "rejected", "tab:red", "--"),
    (3, "reward_margin", None, "mean (reward margin)", "tab:blue", "-"),
    (3, "logit_std", None, "standard deviation", "tab:orange", "--"))
STYLES = "", " (dotted: held-out pairs)", " (dashed: rejected)", " (dashed: standard deviation)"


def module_of(problem):
    """diffusion_dpo, which has made the problem. Not by an import: as a script its name is
    __main__, and an import would run it once more."""
    return sys.modules[type(problem).__module__]


def draw(problem, path, rows, *measured):
    """Draws a problem of diffusion_dpo.py to `path`: images, or the toy with its metrics `rows` and
    what its measure() gives, if that is known already."""
    path.parent.mkdir(exist_ok=True)
    if hasattr(problem, "pipe"):
        draw_sheet(problem, path)
    else:
        draw_toy(problem, path, rows, *(measured or problem.measure()))


# ---------------------------------------------------------------------------------------- images

def draw_sheet(problem, path):
    """Reference beside policy, from the same noise: a row for each of the first four prompts."""
    from diffusers.utils import make_image_grid
    prompts = problem.pairs.prompts[:4]
    sheet = [draw_images(problem, side, [(prompt, problem.cfg.seed)])[0]
             for prompt in prompts for side in ("reference", "policy")]
    make_image_grid(sheet, len(prompts), 2).save(path)


def draw_images(problem, side, jobs):
    """Images (PIL) of "reference" or "policy" for jobs (prompt, number), in one batch. A job has
    its own noise, the same for both sides; steps and guidance are the pipeline's own."""
    if not jobs:
        return []
    pipe, size = problem.pipe, problem.cfg.resolution
    gens = [module_of(problem).generator("draw", *job) for job in jobs]
    # Not the pipeline's: that takes the type of the prompts, which is bf16 with --precision bf16
    # (SD3's rounds this noise to it, once and for both sides alike).
    noise = torch.stack([torch.randn(problem.shape, generator=gen) for gen in gens])
    pipe.set_progress_bar_config(disable=True)
    with network_of(problem, side):
        return pipe([prompt for prompt, _ in jobs], height=size, width=size, generator=gens,
                    latents=noise.to(problem.weight.device)).images


@contextmanager
def network_of(problem, side):
    """Within it, the pipeline draws with the network of "reference" or "policy". Only that runs
    under autocast: rounded between the steps or in the VAE, images of two policies would differ by
    the rounding."""
    pipe, policy, part = problem.pipe, problem.policy, problem.policy.part
    before, network = getattr(pipe, part), policy.network
    adapters_off = side == "reference" and problem.cfg.lora
    if side == "reference" and not adapters_off:
        network = problem.reference.network
    forward = network.forward

    def in_fp32(*inputs, **more):
        with module_of(problem).autocast(problem):
            return [out.float() for out in forward(*inputs, **more)]

    setattr(pipe, part, network)
    network.forward = in_fp32
    if adapters_off:
        network.disable_adapters()
    try:
        yield
    finally:
        del network.forward
        setattr(pipe, part, before)
        if adapters_off:
            network.enable_adapters()


# --------------------------------------------------------------------------------------- the toy

def draw_toy(problem, path, rows, numbers, densities):
    """Above: pairs, and p_ref, p*, p_theta on one colour scale. Below: how training went."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    cfg, pairs, extent = problem.cfg, problem.pairs, module_of(problem).EXTENT
    above, below = ("".join(name * width for name in names)  # five of four columns, four of five
                    for names, width in (("01234", 4), ("5678", 5)))
    figure, axes = plt.subplot_mosaic(f"{above}\n{below}", figsize=(16, 7), layout="constrained")
    maps, panels = ([axes[name] for name in names] for names in ("01234", "5678"))
    for x, colour, label in (
            (pairs.x_l, "tab:red", "rejected"), (pairs.x_w, "tab:green", "preferred")):
        maps[0].scatter(*x[:400].T, s=5, c=colour, label=label)
    box = -extent, extent
    maps[0].set(xlim=box, ylim=box, aspect="equal", title="400 of the pairs")
    maps[0].legend()
    titles = {"reference": "reference p_ref, closed form", "optimum": "optimum p*, closed form",
              "policy": "policy p_theta, by DDPM", "policy_ode": "the same, by an ODE"}
    for ax, (name, p) in zip(maps[1:], densities.items(), strict=True):
        ax.imshow(p.T, origin="lower", extent=2 * box, vmax=densities["optimum"].max())
        ax.set_title(f"{titles[name]}\nTV to p* = {numbers[f'tv_{name}']:.3f}")
    # The labels are random, so not even the reward behind them reaches loss 0 and accuracy 1.
    true_logit = problem.reward(pairs.x_w) - problem.reward(pairs.x_l)
    limits = {0: (math.log(2), -F.logsigmoid(true_logit).mean()),
              1: (0.5, (true_logit > 0).double().mean())}
    for panel in {"dpo": (0, 1), "sft": (1,)}.get(cfg.method, ()):  # other losses, other limits
        knows_nothing, knows_all = limits[panel]
        panels[panel].axhline(knows_nothing, c="gray", ls=":", label="knows nothing")
        panels[panel].axhline(knows_all, c="black", ls="--", label="the labels' reward")
    draw_curves(panels, rows)
    figure.suptitle(f"{cfg.method} on the toy: beta {cfg.beta:g}, gamma {cfg.gamma:g}, {cfg.draws}"
                    f" draws per pair, seed {cfg.seed}")
    figure.savefig(path, dpi=80)
    plt.close(figure)


# -------------------------------------------------------------------------------------- metrics

def draw_curves(panels, rows, run=None, colour=None):
    """Draws the metrics `rows` of a run into four panels: each step faintly, and their mean over
    SMOOTH steps. Among several runs only the mean, in its `colour`, with its name in the legend."""
    steps = [row for row in rows if "loss" in row]
    x, n = torch.tensor([row["step"] for row in steps]), min(SMOOTH, len(steps))
    for panel, metric, less, label, own_colour, style in CURVES:
        values = torch.tensor([row[metric] - (row[less] if less else 0) for row in steps])
        look = {"c": colour or own_colour, "ls": style if run else "-"}
        if run:
            label = run if panel == 0 else None
        else:
            panels[panel].plot(x, values, alpha=0.2, **look)
        panels[panel].plot(x[n - 1:], values.unfold(0, n, 1).mean(1), label=label, **look)
    held_out = [row for row in rows if "held_out_accuracy" in row]
    panels[1].plot([row["step"] for row in held_out],
                   [row["held_out_accuracy"] for row in held_out], marker=".",
                   c=colour or "black", ls=":" if run else "-",
                   label="policy, held-out pairs" if held_out and not run else None)
    for ax, title, styles in zip(panels, TITLES, STYLES, strict=True):
        ax.set(title=title + styles if run else title, xlabel="step")
        if ax.get_legend_handles_labels()[1]:
            ax.legend()


def draw_runs(runs):
    """Draws the metrics of the folders `runs` to curves.png in the first. Returns its path. Raises
    Refusal."""
    import matplotlib

    import diffusion_dpo as dpo
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, panels = plt.subplots(1, 4, figsize=(20, 5), layout="constrained")
    for number, run in enumerate(runs):
        try:
            lines = Path(run, "metrics.jsonl").read_text().splitlines(keepends=True)
            rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last: torn
        except (OSError, ValueError) as error:
            raise dpo.Refusal(f"{run}: holds no run: {dpo.first_line(error)}") from error
        if not any("loss" in row for row in rows):
            raise dpo.Refusal(f"{run}: has not taken a step yet")
        among_several = {"run": run, "colour": f"C{number}"} if len(runs) > 1 else {}
        draw_curves(panels, rows, **among_several)
    path = Path(runs[0], "curves.png")
    with dpo.whole(path) as partial:
        figure.savefig(partial, dpi=80, format="png")
    plt.close(figure)
    return path


def main(argv=None):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import diffusion_dpo as dpo
    with dpo.command():
        runs = sys.argv[1:] if argv is None else argv
        if not runs or any(run.startswith("-") for run in runs):
            raise dpo.Refusal("usage: python toy/figure.py RUN..., the folders of one or more runs")
        print(f"figure      {draw_runs(runs)}")


if __name__ == "__main__":
    main()
