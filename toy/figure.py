"""Pictures of a run: the toy's densities and metrics, or images of reference and policy.

diffusion_dpo.py calls draw() when a picture is due. As a command, this file plots the metrics of
one or more runs, whatever they train, into curves.png in the folder of the first:

    python toy/figure.py runs/sd15 [runs/another ...]
"""

import json
import math
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

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
    """Above: some pairs, and the densities on one colour scale. Below: how the training went."""
    pyplot = load_pyplot()
    figure = pyplot.figure(figsize=(16, 7), layout="constrained")
    above, below = figure.subfigures(2, 1)
    plot_pairs_and_densities(above.subplots(1, 5), toy, numbers, densities)
    axes = below.subplots(1, 4)
    plot_limits(axes, toy)
    plot_metrics(axes, rows)

    cfg = toy.cfg
    above.suptitle(f"{cfg.method} on the toy: beta {cfg.beta:g}, gamma {cfg.gamma:g},"
                   f" {cfg.draws} draws per pair, seed {cfg.seed}")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def plot_pairs_and_densities(axes, toy, numbers, densities):
    """A panel with 400 of the pairs, and then one for each density."""
    box = (-distance.EXTENT, distance.EXTENT)
    first, *others = axes
    first.scatter(*toy.pairs.x_l[:400].T, s=5, c="tab:red", label="rejected")
    first.scatter(*toy.pairs.x_w[:400].T, s=5, c="tab:green", label="preferred")
    first.set(xlim=box, ylim=box, aspect="equal", title="400 of the pairs")
    first.legend()

    titles = {"reference": "reference p_ref, closed form", "optimum": "optimum p*, closed form",
              "policy": "policy p_theta, by DDPM", "policy_ode": "the same, by an ODE"}
    brightest = densities["optimum"].max()
    for ax, name in zip(others, densities, strict=True):
        ax.imshow(densities[name].T, origin="lower", extent=box + box, vmax=brightest)
        ax.set_title(f"{titles[name]}\nTV to p* = {numbers[f'tv_{name}']:.3f}")


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
        ax.axhline(nothing, c="gray", ls=":", label="knows nothing")
        ax.axhline(everything, c="black", ls="--", label="the labels' reward")


# ---------------------------------------------------------------------------------------- metrics

class Curve(NamedTuple):
    """A metric in one of the panels. `minus` names a metric to subtract from it."""

    metric: str
    label: str
    colour: str
    minus: str | None = None
    style: str = "-"  # this one and the next are for several runs, which have a colour each
    legend: str = ""


PANELS = {
    "loss": [Curve("loss", "policy", "tab:blue")],
    "reward accuracy": [
        Curve("reward_accuracy", "policy", "tab:blue", legend=" (dotted: held-out pairs)")],
    "error of policy - error of reference": [
        Curve("err_policy_w", "preferred", "tab:green", "err_ref_w"),
        Curve("err_policy_l", "rejected", "tab:red", "err_ref_l", "--", " (dashed: rejected)")],
    "logit": [
        Curve("reward_margin", "mean (reward margin)", "tab:blue"),
        Curve("logit_std", "standard deviation", "tab:orange", None, "--", " (dashed: std)")],
}
SMOOTH = 20  # a thick line is the mean of so many steps


def plot_metrics(axes, rows, run=None, colour=None):
    """The metrics `rows` in four panels: each step faintly, and the mean over SMOOTH steps.

    Of several runs, which are named, only the mean is plotted, in one colour per run.
    """
    steps = [row for row in rows if "loss" in row]
    x = torch.tensor([row["step"] for row in steps])
    n = min(SMOOTH, len(steps))
    for ax, (title, curves) in zip(axes, PANELS.items(), strict=True):
        for curve in curves:
            y = torch.tensor([row[curve.metric] - row.get(curve.minus, 0) for row in steps])
            mean = y.unfold(0, n, 1).mean(1)
            if run:
                ax.plot(x[n - 1:], mean, c=colour, ls=curve.style, label=run)
                title += curve.legend
            else:
                ax.plot(x, y, c=curve.colour, alpha=0.2)
                ax.plot(x[n - 1:], mean, c=curve.colour, label=curve.label)
        ax.set(title=title, xlabel="step")

    name = "held_out_reward_accuracy"
    held_out = {row["step"]: row[name] for row in rows if name in row}
    if held_out:
        axes[1].plot(held_out.keys(), held_out.values(), marker=".", c=colour or "black",
                     ls=":" if run else "-", label="held-out pairs")

    for ax in axes[:1] if run else axes:  # one legend tells the colours of several runs
        ax.legend()


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
    figure, axes = pyplot.subplots(1, 4, figsize=(20, 5), layout="constrained")
    for number, run in enumerate(runs):
        rows = read_metrics(run)
        if len(runs) == 1:
            plot_metrics(axes, rows)
        else:
            plot_metrics(axes, rows, run, colour=f"C{number}")

    path = Path(runs[0], "curves.png")
    with dpo.atomic_write(path) as partial:
        figure.savefig(partial, dpi=80, format="png")
    pyplot.close(figure)
    return path


def main(argv=None):
    runs = sys.argv[1:] if argv is None else argv
    if not runs or any(run.startswith("-") for run in runs):
        raise dpo.UserError("usage: python toy/figure.py RUN..., the folders of one or more runs")
    print(f"figure      {plot_runs(runs)}")


if __name__ == "__main__":
    dpo.run_command(main)
