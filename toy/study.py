"""Make every figure and number of the experiments that README.md and toy/*.md show.

    python toy/study.py                     # all of them; a little under four hours on two cores
    python toy/study.py a-draws faces-clean # some of them, by name

EXPERIMENTS says what is trained, by name and setting; those on faces are in study_faces.py. Each
setting is trained with seeds 0, 1, 2. Numbers and figures go into toy/study. What is trained is
kept in runs/study, so the same command goes on where it was stopped. After a change of the code,
remove that folder. (The four hours are added up from single runs, not timed in one go.)

A full run is that of `diffusion_dpo.py --toy`. A short one has a sixth of its network calls: 1000
steps of 16 pairs of 64 draws, two million calls.
"""

import contextlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import matplotlib
import numpy
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import on_policy

import diffusion_dpo as dpo
from diffusion_dpo import toy_reward
from toy import distance, remedies, study_faces

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OUT = HERE / "study"
SEEDS = (0, 1, 2)


# ------------------------------------------------------------- what can differ from the plain toy


def toy_proxy(x):
    """A flawed reward (N,): the true one, plus a hill where that is nearly 0."""
    distances = (x - torch.tensor([-2.0, 0.0])).square().sum(-1)
    return toy_reward(x) + 3 * torch.exp(-distances / (2 * 0.8**2))


def no_reward(x):
    return torch.zeros(len(x))


class OneMode(dpo.Ring):
    """A single Gaussian as the reference. Without a reward p* is a Gaussian too."""

    means = torch.zeros(1, 2)

    def sample(self, n, gen):
        return self.std * torch.randn(n, 2, generator=gen)


class VelocityPolicy(dpo.ToyPolicy):
    """Its network corrects the reference's velocity u, where eps_hat = a_t u + x_t.

    So at much noise, where a_t is small, it cannot move eps_hat far.
    """

    def forward(self, x_t, t):
        reference = self.ring(x_t, t)
        a_t = self.ring.alphas_cumprod[t][:, None].sqrt()
        return reference + a_t * (super().forward(x_t, t) - reference)


class DeeperPolicy(dpo.ToyPolicy):
    """A network of one more layer."""

    def __init__(self, ring, seed):
        super().__init__(ring, seed)
        *body, last = self.net
        width = last.in_features
        self.net = nn.Sequential(*body, nn.Linear(width, width), nn.SiLU(), last)


def anchored_loss(toy, batch, errors, anchor):
    """DPO plus anchor (1 - the mean over both halves of p_theta / p_ref).

    This ratio is estimated by exp(r - e). Averaged over samples of p_ref it is 1 for a density. A
    rise of both errors cancels in the logit, but it lowers this ratio. Errors must be in nats and
    nearly free of noise. Keep the anchor well below beta^2 / 2: above, it rewards noise.
    """
    losses, logit = remedies.plain(toy, batch, errors)
    err_w, err_l, ref_w, ref_l = errors
    ratio = ((ref_w - err_w).exp() + (ref_l - err_l).exp()) / 2
    return losses + anchor * (1 - ratio), logit


def exact_margin_loss(toy, batch, errors):
    """The log-ratios as drawn, but r = -log p_ref in closed form."""
    err_w, err_l, ref_w, ref_l = errors
    exact_w = -toy.reference.log_prob(batch["x_w"])
    exact_l = -toy.reference.log_prob(batch["x_l"])
    exact = exact_w + err_w - ref_w, exact_l + err_l - ref_l, exact_w, exact_l
    return remedies.plain(toy, batch, exact)


def sft_too_loss(toy, batch, errors):
    """DPO plus some plain denoising of the preferred points."""
    losses, logit = remedies.plain(toy, batch, errors)
    return losses + 0.03 * errors[0], logit


def with_random_labels(score, gen):
    """A scorer whose order is random, as Bradley and Terry have it.

    Of two scores the first is the higher one with probability sigmoid(first - second). Gumbel
    noise, which is minus the logarithm of exponential noise, makes it so.
    """

    def noisy_score(x_0, batch):
        scores = score(x_0, batch)
        return scores - torch.empty_like(scores).exponential_(generator=gen).log()

    return noisy_score


def distill(toy, samples=40_000, steps=2000, batch=1024):
    """A second stage: plain denoising of samples of the reference, by a new and deeper policy.

    A sample is taken as often as it is likelier by the first policy's log-ratio.
    """
    gen = dpo.seeded_generator(toy.cfg.seed, "distill")
    x = toy.reference.sample(samples, gen)
    share = log_ratios(toy, x).softmax(0)
    toy.policy = DeeperPolicy(toy.reference, toy.cfg.seed)
    optimizer = torch.optim.AdamW(toy.policy.parameters(), toy.cfg.lr, weight_decay=0.01)
    for step in range(steps):
        rate = min((step + 1) / 100, (steps - step) / steps)
        optimizer.param_groups[0]["lr"] = toy.cfg.lr * rate

        # Each sample comes with eps and with -eps, as in draw_noise: less noise in the mean.
        rows = torch.multinomial(share, batch // 2, replacement=True, generator=gen)
        x_0 = x[rows].repeat(2, 1)
        t, eps = dpo.draw_noise(f"distill {toy.cfg.seed}", 0, step, batch, len(toy.weight), (2,))
        a_t, s_t = dpo.signal_and_noise(toy.alphas_cumprod[t][:, None], "epsilon")
        squares = (toy.policy(a_t * x_0 + s_t * eps, t) - eps).square().sum(1)

        optimizer.zero_grad()
        (toy.weight[t] * squares).mean().backward()
        optimizer.step()


# ----------------------------------------------------------------------------- what is measured

LEVELS = (30, 40, 50, 60, 70, 80, 90, 99)  # noise levels of 0 .. 99
NODES = 5  # of a quadrature, per axis: eps* is off by at most 0.0005, with gamma 0.5 by 0.01


@torch.no_grad()
def log_ratios(toy, x, draws=64):
    """log p_theta - log p_ref (N,) at x (N, 2), by the ELBOs."""
    ratios = []
    for number, some in enumerate(x.split(2000)):
        rows = torch.arange(len(some))
        batch = {"x_w": some, "x_l": some, "epoch": 0 * rows, "row": rows}
        err, _, ref_err, _ = dpo.batch_errors(toy, batch, draws, f"ratio {number}")
        ratios.append(ref_err - err)
    return torch.cat(ratios)


def judgement(toy, samples=10_000):
    """What the policy's log-ratio says of samples of the reference.

    That is its correlation with the reward, and the drift: minus the logarithm of the mean of
    p_theta / p_ref, in nats. It is 0 for a density, but noise of the draws makes it too small.
    """
    x = toy.reference.sample(samples, dpo.seeded_generator("judge"))
    ratios = log_ratios(toy, x)
    correlation = torch.corrcoef(torch.stack([ratios, toy.reward(x)]))[0, 1].item()
    return {"correlation": correlation, "nats_lost": math.log(samples) - ratios.logsumexp(0).item()}


class Optimum:
    """p* as a policy: its exact denoiser, by a quadrature.

    p* is p_ref exp(f) / Z with f = (R - gamma log p_ref) / (beta + gamma). Given x_t, each mode of
    p_ref leaves a Gaussian for x_0. Over it exp(f) is summed by the rule of Gauss and Hermite.
    """

    def __init__(self, toy):
        self.toy = toy
        nodes, weight = numpy.polynomial.hermite_e.hermegauss(NODES)
        nodes, weight = torch.tensor(nodes), torch.tensor(weight)
        self.nodes = torch.cartesian_prod(nodes, nodes).float()  # (NODES^2, 2)
        self.log_weight = torch.outer(weight, weight).flatten().log().float()  # (NODES^2,)

    def __call__(self, x_t, t):
        """E[eps | x_t] (N, 2) at x_t (N, 2)."""
        toy, cfg, ring = self.toy, self.toy.cfg, self.toy.reference
        abar_t = toy.alphas_cumprod[t][:, None, None]  # (N, 1, 1)
        a_t, s_t = dpo.signal_and_noise(abar_t, "epsilon")
        std_t = ((a_t * ring.std) ** 2 + s_t**2).sqrt()  # (N, 1, 1), of a mode with its noise
        away = (x_t[:, None] - a_t * ring.means) / std_t  # (N, 8, 2)
        mean = ring.means + a_t * ring.std**2 / std_t * away  # (N, 8, 2), of x_0 given mode and x_t
        std = ring.std * s_t / std_t  # (N, 1, 1)
        x_0 = mean[:, :, None] + std[..., None] * self.nodes  # (N, 8, NODES^2, 2)

        f = toy.reward(x_0.flatten(0, 2))  # (8 N NODES^2,)
        if cfg.gamma:
            f = f - cfg.gamma * ring.log_prob(x_0.flatten(0, 2))
        log_share = f.view(x_0.shape[:-1]) / (cfg.beta + cfg.gamma) + self.log_weight
        log_share = log_share - away.square().sum(2, True) / 2  # (N, 8, NODES^2)
        share = log_share.flatten(1).softmax(1)[..., None]  # (N, 8 NODES^2, 1)
        return (x_t - a_t[..., 0] * (share * x_0.flatten(1, 2)).sum(1)) / s_t[..., 0]


@torch.no_grad()
def drift(toy, samples=500):
    """How far policy and reference are from the denoiser of p*, on samples of p*.

    For each noise level of LEVELS it is the mean of T omega_t ||eps_hat - eps*||^2. "common" is the
    part of the policy's that one and the same vector makes.
    """
    gen = dpo.seeded_generator("drift")
    axis = torch.linspace(-distance.EXTENT, distance.EXTENT, 121)
    grid = torch.cartesian_prod(axis, axis)  # (M, 2)
    p = toy.log_optimum(grid).softmax(0)
    x_0 = grid[torch.multinomial(p, samples, replacement=True, generator=gen)]
    eps = torch.randn(samples, 2, generator=gen)

    optimum = Optimum(toy)
    distances = {"policy": [], "reference": [], "common": []}
    for level in LEVELS:
        a_t, s_t = dpo.signal_and_noise(toy.alphas_cumprod[level], "epsilon")
        x_t = a_t * x_0 + s_t * eps
        t = torch.full((samples,), level)
        exact = optimum(x_t, t)  # (samples, 2)
        off = {"policy": toy.policy(x_t, t) - exact, "reference": toy.reference(x_t, t) - exact}
        off["common"] = off["policy"].mean(0, keepdim=True)
        for name, vectors in off.items():
            nats = toy.weight[level] * vectors.square().sum(1).mean()
            distances[name].append(nats.item())
    return {"drift": distances}


@torch.no_grad()
def logit_noise(toy, pairs=2000, draws=32):
    """The standard deviation of a pair's logit over single draws, by what its halves share."""

    def noise(name):
        drawn = [dpo.draw_noise(name, 0, row, 1, 100, (2,)) for row in range(pairs)]
        return torch.stack([t for t, _ in drawn]), torch.stack([eps for _, eps in drawn])

    def errors(t, eps):
        return dpo.pair_errors(toy, toy.pairs.x_w[:pairs], toy.pairs.x_l[:pairs], t, eps, {})

    logits = {"t and eps": [], "t": [], "nothing": []}
    for number in range(draws):
        t, eps = noise(f"{number} w")
        other_t, other_eps = noise(f"{number} l")
        noise_l = {"t and eps": (t, eps), "t": (t, other_eps), "nothing": (other_t, other_eps)}
        err_w, _, ref_w, _ = errors(t, eps)
        for shared in logits:
            _, err_l, _, ref_l = errors(*noise_l[shared])
            _, logit = remedies.plain(toy, None, (err_w, err_l, ref_w, ref_l))
            logits[shared].append(logit)

    std = {shared: torch.stack(each).std(0).mean().item() for shared, each in logits.items()}
    return {"logits": std}


def width(toy, samples=50_000):
    """The standard deviation of the policy's samples."""
    gen = dpo.seeded_generator(toy.cfg.seed, "one mode")
    x = distance.toy_sample(toy.policy, toy.alphas_cumprod, samples, gen)
    return {"std": x.std(0).mean().item()}


def exact_denoiser(toy):
    """A yardstick: the numbers of a policy that is p*. What is left is the measurements' own."""
    toy.policy = Optimum(toy)
    return distance.measure_toy(toy)[0] | judgement(toy)


def reward_model(toy, samples=50_000):
    """A yardstick: RLHF without diffusion.

    A reward is learnt from the policy's labels, in their order, by Bradley-Terry. Its p* is sampled
    in closed form. The network is as wide as the policy's; the rate is the better of two by TV.
    """
    cfg, pairs, points = toy.cfg, toy.pairs, distance.grid_points()
    torch.manual_seed(cfg.seed)
    first, second, last = nn.Linear(2, 128), nn.Linear(128, 128), nn.Linear(128, 1)
    net = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)
    optimizer = torch.optim.AdamW(net.parameters())
    # A micro-batch of the toy is a whole batch, so each list of keys is a step.
    for step, keys in enumerate(dpo.micro_batch_keys(len(pairs), cfg, 0, 0, 1)):
        optimizer.param_groups[0]["lr"] = 1e-3 * dpo.learning_rate(step, cfg) / cfg.lr
        rows = [row for _, row in keys]
        loss = -F.logsigmoid(net(pairs.x_w[rows]) - net(pairs.x_l[rows])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    optimum = distance.histogram(points, toy.log_optimum(points).double().softmax(0))
    toy.reward = lambda x: net(x)[:, 0]
    with torch.no_grad():
        learnt = distance.histogram(points, toy.log_optimum(points).double().softmax(0))
    gen = dpo.seeded_generator(cfg.seed, "reward model")
    chosen = torch.multinomial(learnt.flatten(), samples, replacement=True, generator=gen)
    share = chosen.bincount(minlength=learnt.numel()).view_as(learnt) / samples
    return {"tv_policy": distance.total_variation(share, optimum)}


# -------------------------------------------------------------------------------- the experiments


@dataclass(frozen=True)
class Job:
    """One training of the toy: flags of its command, and what differs from it."""

    flags: str = ""
    seed: int = 0
    method: str = "dpo"
    pairs: int = 200_000
    reward: Callable = toy_reward
    ring: type = dpo.Ring
    policy: type = dpo.ToyPolicy
    loss: Callable | None = None  # in place of that of dpo_step
    random_labels: bool = False
    distilled: bool = False
    samples: int = 25_000  # of the policy, to compare it with p*
    measures: tuple = ()  # functions of the toy that give more numbers
    yardstick: Callable | None = None  # gives the numbers in place of a training

    def but(self, flags="", **changes):
        """The same with more flags and other changes."""
        return replace(self, flags=f"{self.flags} {flags}".strip(), **changes)


FULL = Job("--eval-every 3000", samples=50_000, measures=(judgement, drift))
SHORT = Job("--steps 1000 --batch 16 --eval-every 0")
SHORT_JUDGED = SHORT.but(measures=(judgement,))
LONG = Job("--steps 6000 --batch 32 --draws 8 --eval-every 0 --sample-every 1000")
ANCHOR = partial(anchored_loss, anchor=0.05)
STRONG_ANCHOR = partial(anchored_loss, anchor=0.2)
D3PO = Job("--steps 205", method="d3po")  # as many network calls as SHORT
SPO = Job("--steps 140", method="spo")
ONE_MODE = SHORT.but(ring=OneMode, reward=no_reward, measures=(width,))
PROXY = LONG.but(reward=toy_proxy)
FEW = LONG.but(pairs=200)
SEE_FULL = FULL.but("--gamma 0.5")

DRAWS = (1, 2, 4, 8, 16, 32)
BETAS = (0.25, 0.5, 1, 2)
GAMMAS = (0, 0.1, 0.25, 0.5, 1)
RATIOS = (0, 0.5, 1, 2)  # gamma / beta of the one mode


def share_out(gamma, draws):
    """512 draws per step, as more pairs or as more draws per pair."""
    flags = f"--steps 1000 --eval-every 0 --gamma {gamma} --draws {draws} --batch {512 // draws}"
    return Job(flags, measures=(judgement, drift) if (gamma, draws) == (0, 1) else ())


def entropy_settings(job, beta):
    """SEE-DPO at gamma = beta, and what it is compared with (notebook.md, N8)."""
    see = job.but(f"--beta {beta} --gamma {beta}")
    return {
        "DPO": job.but(f"--beta {beta}"),
        "SEE-DPO": see,
        "DPO, beta' = beta + gamma": job.but(f"--beta {2 * beta}"),
        "SEE-DPO, exact margin": see.but(loss=exact_margin_loss),
    }


EXPERIMENTS = {  # {name: {setting: job}}
    "readme": {
        "DPO: `--toy`": FULL,
        "SEE-DPO: `--toy --gamma 0.5`": SEE_FULL,
        "SFT: `--toy --method sft`": FULL.but(method="sft"),
        "proxy, beta 2": FULL.but("--beta 2", reward=toy_proxy),
        "proxy, beta 0.5": FULL.but(reward=toy_proxy),
        "proxy, beta 0.25": FULL.but("--beta 0.25", reward=toy_proxy),
    },
    "a-draws": {(gamma, draws): share_out(gamma, draws) for gamma in (0, 0.5) for draws in DRAWS},
    "b-beta": {beta: SHORT.but(f"--beta {beta}") for beta in BETAS},
    "c-gamma": {gamma: SHORT.but(f"--gamma {gamma}") for gamma in GAMMAS}
    | {("one mode", ratio): ONE_MODE.but(f"--gamma {ratio / 2}") for ratio in RATIOS},
    "d-few-pairs": entropy_settings(FEW, 0.5),
    "d-proxy": entropy_settings(PROXY, 0.25),
    "e-noise": {
        gamma: SHORT.but(f"--gamma {gamma}", measures=(logit_noise,)) for gamma in (0, 0.5)
    },
    "h-methods": {
        ("d3po", 0.25): D3PO.but("--beta 0.25"),
        ("d3po", 1): D3PO.but("--beta 1"),
        ("d3po", 4): D3PO.but("--beta 4"),
        ("spo", 5): SPO.but("--beta 5"),
        ("spo", 10): SPO.but("--beta 10"),
        ("spo", 30): SPO.but("--beta 30"),
        ("d3po, gamma 0.5", 1): D3PO.but("--beta 1 --gamma 0.5"),
        ("spo, gamma 5", 10): SPO.but("--beta 10 --gamma 5"),
        ("sft", None): SHORT.but(method="sft"),
        ("d3po, chance", 1): D3PO.but("--beta 1", random_labels=True),
        ("d3po, chance, gamma 0.5", 1): D3PO.but("--beta 1 --gamma 0.5", random_labels=True),
        ("spo, chance", 10): SPO.but("--beta 10", random_labels=True),
        ("spo, chance, gamma 5", 10): SPO.but("--beta 10 --gamma 5", random_labels=True),
    },
    "i-drift": {
        "DPO": FULL,
        "anchor 0.05": FULL.but(loss=ANCHOR),
        "anchor 0.2": FULL.but(loss=STRONG_ANCHOR),
        "SFT on the preferred": FULL.but(loss=sft_too_loss),
        "velocity": FULL.but(policy=VelocityPolicy),
        "one draw": share_out(0, 1),
        "distilled": FULL.but(distilled=True),
        "anchor 0.05, distilled": FULL.but(loss=ANCHOR, distilled=True),
        "SEE-DPO, gamma 0.5": SEE_FULL,
        "SEE-DPO, gamma 0.5, anchor 0.05": SEE_FULL.but(loss=ANCHOR),
        "SEE-DPO, gamma 0.5, anchor 0.05, distilled": SEE_FULL.but(loss=ANCHOR, distilled=True),
    },
    "j-remedies": {
        "DPO, lr 3e-4": SHORT_JUDGED.but("--lr 3e-4"),
        "DPO, lr 1e-3": SHORT_JUDGED.but("--lr 1e-3"),
        "DPO, lr 3e-3": SHORT_JUDGED,
        "gamma 0.025": SHORT_JUDGED.but("--gamma 0.025"),
        "beta 2": SHORT_JUDGED.but("--beta 2"),
        "4 draws of 256 pairs": SHORT_JUDGED.but("--draws 4 --batch 256 --micro-batch 256"),
    }
    | {name: SHORT_JUDGED.but(loss=loss) for name, loss in study_faces.LOSSES.items()},
    "i-yardsticks": {
        "exact denoiser": FULL.but(yardstick=exact_denoiser),
        "reward model": FULL.but(yardstick=reward_model),
    },
} | study_faces.EXPERIMENTS


def build(job, cfg):
    """The toy of a job of DPO or SFT."""
    ring = job.ring(torch.sigmoid(torch.linspace(8, -6, 100)))
    toy = dpo.Toy(cfg, ring, job.reward)
    toy.policy = job.policy(ring, job.seed)
    toy.pairs = dpo.ToyPairs(ring, job.pairs, job.seed, job.reward)
    return toy


def measure(toy, job):
    """What distance.measure_toy gives, and the same of the proxy where that makes the labels."""
    numbers, densities = distance.measure_toy(toy, job.samples)
    if job.reward is toy_proxy:
        with mock.patch.object(dpo, "toy_reward", toy_proxy):  # what measure_toy takes means of
            by_proxy, _ = distance.measure_toy(toy, job.samples)
        for whose in densities:
            numbers[f"proxy_{whose}"] = by_proxy[f"reward_{whose}"]
    return numbers, densities


@contextlib.contextmanager
def quiet_folder():
    """A folder for a run that prints nothing. Both are gone in the end."""
    with (
        tempfile.TemporaryDirectory() as out,
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        yield out


def run(job):
    """Train a job, and return its numbers. "curve" has those of every picture that was due."""
    curve = []

    def add_to_curve(toy, path, rows):
        curve.append({"step": int(path.stem[-8:])} | measure(toy, job)[0])

    with quiet_folder() as out, mock.patch.object(dpo, "save_picture", add_to_curve):
        if isinstance(job, study_faces.FaceJob):
            return study_faces.run(job, out)
        argv = ["--toy", "--seed", str(job.seed), "--method", job.method, "--out", out]
        argv += job.flags.split()
        if job.method in ("d3po", "spo"):
            cfg = on_policy.parse(argv)
            toy = on_policy.make_task(cfg, None)
            step = on_policy.on_policy_step
        else:
            cfg = dpo.parse(argv)
            toy = build(job, cfg)
            step = remedies.step_of(job.loss) if job.loss else dpo.dpo_step
        if job.random_labels:
            toy.score = with_random_labels(toy.score, dpo.seeded_generator(job.seed, "labels"))
        if job.yardstick:
            return job.yardstick(toy)
        with remedies.prepared(toy, job.loss):
            rows = dpo.train(toy, cfg, step)
    if job.distilled:
        distill(toy)

    numbers, densities = measure(toy, job)
    for more in job.measures:
        numbers |= more(toy)
    numbers |= {name: value for name, value in rows[-1].items() if name.startswith("held_out_")}
    if curve:
        numbers["curve"] = curve
    return numbers | {"map": {name: p.tolist() for name, p in densities.items()}}


# ------------------------------------------------------------------------ the numbers on the screen


def print_numbers(found):
    """The median of every number, and its range over the seeds."""
    for name, settings in found.items():
        if name in study_faces.EXPERIMENTS:
            study_faces.print_numbers(name, settings)
            continue
        for setting, runs in settings.items():
            print(f"\n{name}: {setting}")
            for key, value in runs[0].items():
                if isinstance(value, float):
                    values = [numbers[key] for numbers in runs]
                    print(f"{key:26}{median(values):.3f} ({min(values):.3f} to {max(values):.3f})")


def write_json(found):
    """A file for each experiment, without the pictures of its runs."""
    for name, settings in found.items():
        rows = []
        for setting, runs in settings.items():
            for seed, numbers in zip(SEEDS, runs, strict=True):
                row = {"setting": setting, "seed": seed} | numbers
                row.pop("map", None)
                row.pop("sheet", None)
                rows.append(row)
        (OUT / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")


# ------------------------------------------------------------------------------------- the figures


@contextlib.contextmanager
def new_figure(name, columns=2, width=11, height=4):
    """The axes of a figure. In the end it gets its legends and is saved."""
    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained")
    yield axes
    for ax in figure.axes:
        if ax.get_legend_handles_labels()[1]:
            ax.legend(fontsize=8)
    figure.savefig(OUT / f"{name}.png", dpi=80)
    plt.close(figure)


def values_of(name, settings):
    """[[number of a seed, ...], ...] of that name."""
    return [[numbers[name] for numbers in runs] for runs in settings]


def plot_medians(ax, xs, settings, label, **style):
    """Medians at xs, with the range over the seeds. settings: [[number of a seed, ...], ...]."""
    middle = [median(values) for values in settings]
    below = [median(values) - min(values) for values in settings]
    above = [max(values) - median(values) for values in settings]
    ax.errorbar(xs, middle, [below, above], marker=".", capsize=3, label=label, **style)


def plot_ends(ax, settings, label):
    """A dot for every run: its entropy and its reward."""
    entropies = sum(values_of("entropy_policy", settings), [])
    rewards = sum(values_of("reward_policy", settings), [])
    ax.plot(entropies, rewards, ".", label=label)
    ax.set(xlabel="entropy (nats)", ylabel="mean reward")


def plot_frontier(ax, settings, **style):
    """Entropy and mean reward of p* for some (beta, gamma), in closed form."""
    points = distance.grid_points()
    log_p_ref = dpo.Ring(None).log_prob(points)
    reward = toy_reward(points)
    entropies, rewards = [], []
    for beta, gamma in settings:
        log_p = (beta * log_p_ref + reward) / (beta + gamma)
        p = log_p.double().softmax(0)
        entropies.append(distance.entropy(distance.histogram(points, p)))
        rewards.append((p * reward).sum().item())
    ax.plot(entropies, rewards, lw=1, **style)


MANY_BETAS = [(0.12 * 1.2**i, 0) for i in range(24)]


def plot_draws(found):
    with new_figure("a-draws", 1, 6) as ax:
        for gamma in (0, 0.5):
            settings = [found["a-draws"][gamma, draws] for draws in DRAWS]
            plot_medians(ax, DRAWS, values_of("tv_policy", settings), f"gamma {gamma}")
            ax.axhline(settings[0][0]["tv_floor"], c="gray", ls=":", lw=1)
        ax.set(xscale="log", xticks=DRAWS, xticklabels=DRAWS, xlabel="draws per pair, K")
        ax.set(ylim=0, ylabel="TV to p*", title="512 draws per step, shared out")


def plot_beta(found):
    settings = found["b-beta"]
    with new_figure("b-beta") as (left, right):
        plot_medians(left, BETAS, values_of("tv_policy", settings.values()), "policy")
        left.set(xscale="log", xlabel="beta", ylabel="TV to p*", ylim=0, title="distance to p*")
        plot_frontier(right, MANY_BETAS, c="black", label="p*, closed form")
        for beta, runs in settings.items():
            plot_ends(right, [runs], f"policy, beta {beta}")
        right.set(title="reward against entropy")


def plot_gamma(found):
    found = found["c-gamma"]
    with new_figure("c-gamma") as (left, right):
        rings = [found[gamma] for gamma in GAMMAS]
        plot_medians(left, GAMMAS, values_of("entropy_policy", rings), "policy")
        left.plot(GAMMAS, [runs[0]["entropy_optimum"] for runs in rings], "k--", label="p*")
        left.set(xlabel="gamma (beta 0.5)", ylabel="entropy (nats)", title="the ring")

        one_mode = [found["one mode", ratio] for ratio in RATIOS]
        plot_medians(right, RATIOS, values_of("std", one_mode), "policy")
        closed_form = [0.5 * math.sqrt(1 + ratio) for ratio in RATIOS]
        right.plot(RATIOS, closed_form, "k--", label="std of p_ref times sqrt(1 + gamma/beta)")
        right.set(xlabel="gamma / beta", ylabel="standard deviation")
        right.set(title="one Gaussian, no reward")


def plot_entropy(found, *, name, shown):
    """Two numbers over the steps of the runs of an experiment."""
    with new_figure(name) as axes:
        for ax, number in zip(axes, shown, strict=True):
            for setting, runs in found[name].items():
                points = list(zip(*[numbers["curve"] for numbers in runs], strict=True))
                steps = [point[0]["step"] for point in points]
                plot_medians(ax, steps, values_of(number, points), setting)
            if name == "d-proxy":
                reference = runs[0][number.replace("policy", "reference")]
                ax.axhline(reference, c="gray", ls=":", label="reference")
            ax.set(xlabel="step", title=number.replace("_", " of the "))


def plot_noise(found):
    with new_figure("e-noise") as axes:
        for ax, (gamma, runs) in zip(axes, found["e-noise"].items(), strict=True):
            for place, shared in enumerate(("t and eps", "t", "nothing")):
                values = [numbers["logits"][shared] for numbers in runs]
                plot_medians(ax, [place], [values], f"shared: {shared}", ls="")
            ax.set(xticks=[], ylim=0, title=f"gamma {gamma}", ylabel="std of the logit over draws")


def plot_methods(found):
    with new_figure("h-methods", 1, 7, 5) as ax:
        colours = matplotlib.colormaps["tab20"].colors  # dark and light by turns
        ax.set_prop_cycle(color=colours[::2] + colours[1::2])
        plot_frontier(ax, MANY_BETAS, c="black", label="p*, gamma 0")
        many_gammas = [(0.5, 0.05 * i) for i in range(21)]
        plot_frontier(ax, many_gammas, c="gray", label="p*, beta 0.5, gamma 0 to 1")
        plot_ends(ax, found["b-beta"].values(), "dpo")
        plot_ends(ax, [found["c-gamma"][gamma] for gamma in GAMMAS[1:]], "see-dpo, beta 0.5")

        for (name, beta), runs in found["h-methods"].items():
            plot_ends(ax, [runs], f"{name}, beta {beta}")
        ax.set(title="equal network calls, 3 seeds")


def plot_drift(found):
    with new_figure("i-drift", 1, 7) as ax:
        for label, setting, whose in (
            ("reference", "DPO", "reference"),
            ("DPO", "DPO", "policy"),
            ("DPO, the common vector's part", "DPO", "common"),
            ("one draw", "one draw", "policy"),
            ("anchor 0.05", "anchor 0.05", "policy"),
        ):
            of_seeds = [numbers["drift"][whose] for numbers in found["i-drift"][setting]]
            of_levels = list(zip(*of_seeds, strict=True))
            plot_medians(ax, LEVELS, of_levels, label)
        ax.set(yscale="log", xlabel="noise level t of 0 .. 99")
        ax.set(ylabel="T omega |eps_hat - eps*|^2")
        ax.set(title="distance to the denoiser of p*, on its samples")


def plot_maps(found, *, name, maps):
    """Densities of the first seed side by side. maps: {title: (experiment, setting, whose)}."""
    with new_figure(name, len(maps), 2.5 * len(maps), 3.2) as axes:
        for ax, (title, (experiment, setting, whose)) in zip(axes, maps.items(), strict=True):
            numbers = found[experiment][setting][0]
            p = torch.tensor(numbers["map"][whose])
            brightest = torch.tensor(numbers["map"]["optimum"]).max()
            box = (-distance.EXTENT, distance.EXTENT)
            ax.imshow(p.T, origin="lower", extent=box + box, vmax=brightest)
            ax.set(xticks=[], yticks=[])
            ax.set_title(
                f"{title}\nTV to p* {numbers['tv_' + whose]:.2f},"
                f" reward {numbers['reward_' + whose]:.2f},\n"
                f"entropy {numbers['entropy_' + whose]:.2f}",
                fontsize=9,
            )


METHODS = {
    "reference p_ref": ("b-beta", 0.5, "reference"),
    "optimum p*, beta 0.5": ("b-beta", 0.5, "optimum"),
    "DPO, beta 0.5": ("readme", "DPO: `--toy`", "policy"),
    "SEE-DPO, gamma 0.5": ("readme", "SEE-DPO: `--toy --gamma 0.5`", "policy"),
    "D3PO, beta 1": ("h-methods", ("d3po", 1), "policy"),
    "SPO, beta 10": ("h-methods", ("spo", 10), "policy"),
}
SOLVERS = {
    "optimum p*": ("i-drift", "DPO", "optimum"),
    "DPO, by DDPM": ("i-drift", "DPO", "policy"),
    "DPO, by an ODE": ("i-drift", "DPO", "policy_ode"),
    "anchor 0.05, by DDPM": ("i-drift", "anchor 0.05", "policy"),
    "anchor 0.05, by an ODE": ("i-drift", "anchor 0.05", "policy_ode"),
}


def plot_faces(found):
    """Smile against quality of methods and remedies, a sheet of faces, and the closed form."""
    with new_figure("faces-methods", 1, 8, 5) as ax:
        labels = {"DPO, labels by CLIP": found["faces-labels"]["the tiny CLIP"]}
        study_faces.draw_paths(ax, found["faces-methods"] | labels)
    with new_figure("faces-remedies", 2, 12, 5) as axes:
        titles = {"faces-noisy": "800 noisy pairs", "faces-clean": "100 clean pairs"}
        for ax, (name, title) in zip(axes, titles.items(), strict=True):
            best = {setting: found[name][setting] for setting in study_faces.BEST}
            study_faces.draw_paths(ax, best)
            ax.set(title=title)
    study_faces.draw_sheet(found, OUT / "faces-sheet.png")
    with new_figure("faces-nats", 1, 7) as ax:
        study_faces.draw_histograms(ax, found["faces-nats"]["beta 3"])


FIGURES = [  # what draws them, and of which experiments
    (plot_draws, {"a-draws"}),
    (plot_beta, {"b-beta"}),
    (plot_gamma, {"c-gamma"}),
    (partial(plot_entropy, name="d-few-pairs", shown=("tv_policy", "entropy_policy")),
     {"d-few-pairs"}),
    (partial(plot_entropy, name="d-proxy", shown=("reward_policy", "proxy_policy")), {"d-proxy"}),
    (plot_noise, {"e-noise"}),
    (plot_methods, {"b-beta", "c-gamma", "h-methods"}),
    (plot_drift, {"i-drift"}),
    (partial(plot_maps, name="methods", maps=METHODS), {"readme", "b-beta", "h-methods"}),
    (partial(plot_maps, name="i-solvers", maps=SOLVERS), {"i-drift"}),
    (plot_faces, {"faces-methods", "faces-labels", "faces-noisy", "faces-clean", "faces-nats"}),
]


def plot_all(found):
    """The figures whose experiments are in found: {experiment: {setting: [numbers, ...]}}."""
    for plot, needed in FIGURES:
        if needed <= found.keys():
            plot(found)


def draw_default_run(folder):
    """Run `--toy`. Its toy.png goes into `folder`."""
    with quiet_folder() as out:
        dpo.main(["--toy", "--out", out])
        shutil.copy(f"{out}/toy.png", folder)


def run_once(job):
    """The numbers of a job, which a file in WORK keeps."""
    name = re.sub(r" at 0x\w+", "", repr(job))  # functions have an address
    file = study_faces.WORK / f"{dpo.hash_of(name)}.json"
    if not file.exists():
        dpo.write_json(file, run(job))
    return json.loads(file.read_text())


def main(argv=None):
    names = (sys.argv[1:] if argv is None else argv) or list(EXPERIMENTS)
    for name in names:
        if name not in EXPERIMENTS:
            raise dpo.UserError(f"{name}: it should be a name of toy/study/*.json, without .json")
    jobs = {}  # a job that is in two experiments is run once
    for name in names:
        for job in EXPERIMENTS[name].values():
            jobs |= {job.but(seed=seed): None for seed in SEEDS}

    processes = min(os.cpu_count(), len(jobs))
    with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        if any(isinstance(job, study_faces.FaceJob) for job in jobs):
            list(pool.imap(study_faces.make_base, SEEDS))
        done = pool.imap(run_once, jobs)
        jobs = dict(zip(jobs, tqdm(done, total=len(jobs), ncols=99, unit=" runs"), strict=True))

    found = {}
    for name in names:
        found[name] = {setting: [jobs[job.but(seed=seed)] for seed in SEEDS]
                       for setting, job in EXPERIMENTS[name].items()}
    OUT.mkdir(exist_ok=True)
    write_json(found)
    print_numbers(found)
    plot_all(found)
    if "readme" in names:
        draw_default_run(HERE)


if __name__ == "__main__":
    dpo.run_command(main)
