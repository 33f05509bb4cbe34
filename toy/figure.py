"""Pictures of a run: the toy's densities and metrics, or images of reference and policy.

diffusion_dpo.py calls draw() when a picture is due. As a command, this file plots the metrics of
one or more runs, whatever they train, into curves.png in the folder of the first:

    python toy/figure.py runs/sd15 [runs/another ...]
"""

import json
import math
import sys
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Python knows the running script as __main__, so this loads it once more. That does no harm.
import diffusion_dpo as dpo
from toy import distance


def load_pyplot():
    """matplotlib's pyplot, for files and not for a screen."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def draw(task, path, rows, *measured):
    """Make the picture of a task at `path`: images, or the toy with its metrics `rows`.

    `measured` is what distance.measure_toy(task) returns, if that is known already.
    """
    path.parent.mkdir(exist_ok=True)
    if hasattr(task, "pipe"):
        make_sheet(task, path)
    else:
        numbers, densities = measured or distance.measure_toy(task)
        plot_toy(task, path, rows, numbers, densities)


WIDTH, DPI = 10.6, 150  # on a slide of 1280 pixels, capitals are then at least 12 pixels high

# The colours of Okabe and Ito differ for the colour-blind too. Several runs also have markers.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00"]
MARKERS = "os^DvP"
BLUE, VERMILLION = COLOURS[:2]


# ----------------------------------------------------------------------------------------- images

def make_sheet(task, path):
    """Reference (left) and policy (right) from the same noise, for the first prompts of the pairs.

    There are four prompts, or twelve if images are as small as 64 pixels.
    """
    from diffusers.utils import make_image_grid
    prompts = dict.fromkeys(prompt or "" for prompt in task.pairs.table["prompt"][:200])
    jobs = [(prompt, task.cfg.seed) for prompt in prompts][:12 if task.cfg.resolution <= 64 else 4]
    images = []
    with all_parts(task):
        for first in range(0, len(jobs), task.cfg.micro_batch):
            part = jobs[first:first + task.cfg.micro_batch]
            sides = [sample_images(task, side, part) for side in ("reference", "policy")]
            images += [image for pair in zip(*sides, strict=True) for image in pair]
    make_image_grid(images, len(jobs), 2).save(path)


@contextmanager
def all_parts(task):
    """Within it, task.pipe has its VAE and text encoders, even if the data were encoded ahead."""
    before = task.pipe
    try:
        if not before.vae:
            task.pipe = dpo.load_pipeline(task.cfg.model, without="unet|transformer")
            dpo.prepare_encoders(task.pipe, task.cfg, task.weight.device)
        yield
    finally:
        task.pipe = before


def sample_images(task, side, jobs):
    """Images (PIL) of the "reference" or the "policy" for jobs (prompt, number), in one batch.

    A job has its own noise, which is the same for both sides. The number of sampling steps is the
    pipeline's own. So is the guidance, unless the run has --guidance.
    """
    if not jobs:
        return []
    # The pipeline could make this noise too, but in the type of the prompts: with bf16 in bf16.
    gens = [dpo.seeded_generator("draw", *job) for job in jobs]
    noise = torch.stack([torch.randn(task.shape, generator=gen) for gen in gens])

    task.pipe.set_progress_bar_config(disable=True)
    size, guidance = task.cfg.resolution, task.cfg.guidance
    options = {} if guidance is None else {"guidance_scale": guidance}
    with network_of(task, side):
        return task.pipe([prompt for prompt, _ in jobs], height=size, width=size, generator=gens,
                         latents=noise.to(task.weight.device), **options).images


@contextmanager
def network_of(task, side):
    """Within it, the pipeline samples with the network of the "reference" or of the "policy".

    Only the network computes in bf16. If latents were rounded between the steps, or in the VAE,
    images of two policies would differ by the rounding.
    """
    before = getattr(task.pipe, task.part)
    network = task.policy.network
    without_adapters = side == "reference" and task.cfg.lora
    if side == "reference" and not task.cfg.lora:
        network = task.reference.network
    forward = network.forward

    def forward_to_fp32(*inputs, **options):
        with dpo.autocast(task):
            return [out.float() for out in forward(*inputs, **options)]

    setattr(task.pipe, task.part, network)
    network.forward = forward_to_fp32
    if without_adapters:
        network.disable_adapters()
    try:
        yield
    finally:
        del network.forward  # the class's own one comes back
        setattr(task.pipe, task.part, before)
        if without_adapters:
            network.enable_adapters()


# ---------------------------------------------------------------------------------------- the toy

def plot_toy(toy, path, rows, numbers, densities):
    """Above and large: some pairs, and the densities. Below: how the training went."""
    pyplot = load_pyplot()
    figure = pyplot.figure(figsize=(WIDTH, 5.1), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(7, 5))

    shown = {"xlim": (-4, 4), "ylim": (-4, 4), "xticks": [], "yticks": [], "aspect": "equal"}
    pairs, *others = above.subplots(1, 5, subplot_kw=shown)
    plot_pairs(pairs, toy)
    plot_densities(others, numbers, densities)

    curves = below.subplots(1, 4)
    plot_limits(curves, toy)
    plot_metrics(curves, rows, 1 + len(rows) // POINTS)

    cfg = toy.cfg
    below.suptitle(f"the training: {cfg.method}, beta {cfg.beta:g}, gamma {cfg.gamma:g},"
                   f" {cfg.draws} draws per pair, seed {cfg.seed}")
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def plot_pairs(ax, toy):
    """200 of the pairs, and their legend in place of a title."""
    ax.scatter(*toy.pairs.x_w[:200].T, s=9, c=BLUE, label="preferred")
    ax.scatter(*toy.pairs.x_l[:200].T, s=12, c=VERMILLION, marker="x", label="rejected")
    ax.legend(title="200 of the pairs", title_fontsize="large", frameon=False,
              loc="lower center", bbox_to_anchor=(0.5, 1), labelspacing=0.2)


def plot_densities(axes, numbers, densities):
    """A panel for each density, with a line around most of p*. All share a scale of colours."""
    titles = {"reference": "reference,\nbefore training",
              "optimum": "optimum p*,\ndashed: most of it",
              "policy": "policy, sampled\nby DDPM (noise)",
              "policy_ode": "the same weights\nby ODE (no noise)"}
    box = 2 * (-distance.EXTENT, distance.EXTENT)
    optimum = densities["optimum"].T
    highest = optimum.max()
    for ax, (name, p) in zip(axes, densities.items(), strict=True):
        tv = numbers[f"tv_{name}"]
        ax.set_title(f"{titles[name]}\nTV to p* {tv:.3f}")
        if tv > numbers["tv_reference"]:
            ax.set_xlabel("worse than the reference")

        # The root shows what is faint. The line is drawn where p* is a tenth of its highest value.
        ax.imshow(p.T.sqrt(), vmax=highest.sqrt(), origin="lower", extent=box)
        ax.contour(optimum, [highest / 10], extent=box, colors="white", linestyles="--")

    axes[0].set_xlabel("colour: sqrt(density)")
    axes[2].set_xlabel(f"floor: {numbers['tv_floor']:.3f}")


def plot_limits(axes, toy):
    """Lines for one who knows nothing, and for one who knows the reward behind the labels.

    Labels are random, so not even that reward reaches loss 0 and accuracy 1. Losses of other
    methods have other limits.
    """
    true_logit = toy.reward(toy.pairs.x_w) - toy.reward(toy.pairs.x_l)
    limits = []
    if toy.cfg.method == "dpo":
        limits.append((axes[0], math.log(2), -F.logsigmoid(true_logit).mean()))
    if toy.cfg.method in ("dpo", "sft"):
        limits.append((axes[1], 0.5, (true_logit > 0).double().mean()))
    for ax, nothing, everything in limits:
        ax.axhline(nothing, c="black", ls=":", label="knows nothing")
        ax.axhline(everything, c="black", ls="--", label="the labels' reward")
    if limits:
        limits[0][0].legend()


# ---------------------------------------------------------------------------------------- metrics

PANELS = {  # title: {metric: None or what is subtracted from it}
    "loss": {"loss": None},
    "reward accuracy:\nbatch (solid), held out (dotted)": {"reward_accuracy": None},
    "error, policy - reference:\npreferred (solid), rejected (dashed)": {
        "err_policy_w": "err_ref_w",
        "err_policy_l": "err_ref_l"},
    "logit: mean (solid),\nstandard deviation (dashed)": {
        "reward_margin": None,
        "logit_std": None},
}
STYLES = ("-", "--")  # of the first and of the second metric in a panel
POINTS = 50  # a line has about so many


def plot_metrics(axes, rows, n, run=None, colour=None, marker=None):
    """The metrics `rows` in four panels. Each point is a mean over n steps, up to its own.

    A named run has a marker, and one of several has a single colour too.
    """
    steps = [row for row in rows if "loss" in row]
    n = min(n, len(steps))
    x = [row["step"] for row in steps][n - 1::n]
    for ax, (title, metrics) in zip(axes, PANELS.items(), strict=True):
        for (metric, minus), style, own in zip(metrics.items(), STYLES, COLOURS, strict=False):
            y = torch.tensor([row[metric] - row.get(minus, 0) for row in steps])
            means = y.unfold(0, n, n).mean(1)
            ax.plot(x, means, style, c=colour or own, marker=marker, markevery=10, label=run)
        ax.set_title(title, size="medium")
        ax.set_xlabel("step")

    name = "held_out_reward_accuracy"
    held_out = {row["step"]: row[name] for row in rows if name in row}
    axes[1].plot(held_out.keys(), held_out.values(), ":", c=colour or VERMILLION, marker=".")


def read_metrics(run):
    """The rows of a run's metrics.jsonl. Raises UserError."""
    try:
        lines = Path(run, "metrics.jsonl").read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be torn
    except (OSError, ValueError) as error:
        raise dpo.UserError(f"{run}: it holds no run: {dpo.one_line(error)}") from error
    if not any("loss" in row for row in rows):
        raise dpo.UserError(f"{run}: it has not taken a step yet")
    return rows


def plot_runs(runs):
    """Plot the metrics of the folders `runs`. Returns the picture's path. Raises UserError."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(1, 4, figsize=(WIDTH, 3), layout="constrained")
    tables = [read_metrics(run) for run in runs]
    n = 1 + max(map(len, tables)) // POINTS  # the same for all, or one would look noisier
    colours = COLOURS if len(runs) > 1 else [None]
    for run, rows, *look in zip(runs, tables, cycle(colours), cycle(MARKERS)):
        plot_metrics(axes, rows, n, run, *look)
    axes[0].legend()

    path = Path(runs[0], "curves.png")
    with dpo.atomic_write(path) as partial:
        figure.savefig(partial, dpi=DPI, format="png")
    pyplot.close(figure)
    return path


def main(argv=None):
    runs = sys.argv[1:] if argv is None else argv
    if not runs or any(run.startswith("-") for run in runs):
        raise dpo.UserError("usage: python toy/figure.py RUN..., the folders of one or more runs")
    print(f"figure      {plot_runs(runs)}")


if __name__ == "__main__":
    dpo.run_command(main)
