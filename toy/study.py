"""Make every figure and number of the toy that README.md and toy/README.md show.

    python toy/study.py        # toy/study/*, toy/toy.png, toy/toy.gif; over an hour on two cores

Each experiment trains with seeds 0, 1, 2. `full` runs are those of `diffusion_dpo.py --toy` itself;
the others, but for section i, are a sixth as long: 1000 steps of 16 pairs of 64 draws, two million
network calls.
"""

import contextlib
import io
import json
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from unittest import mock

import matplotlib
import numpy
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import on_policy

import diffusion_dpo as dpo

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OUT, SEEDS, SHORT = HERE / "study", (0, 1, 2), "--steps 1000 --batch 16 --eval-every 0 "
FULL = "--eval-every 3000 "
LEVELS = (30, 40, 50, 60, 70, 80, 90, 99)  # noise levels of 0 .. 99
NODES = 5  # of a quadrature, per axis: eps* is off by at most 0.0005, with gamma 0.5 by 0.01
DRAWS, BETAS, GAMMAS = (1, 2, 4, 8, 16, 32), (0.25, 0.5, 1, 2), (0, 0.1, 0.25, 0.5, 1)
DRAWN = "--steps 1000 --eval-every 0 --gamma {} --draws {} --batch {}"
ONE_DRAW = DRAWN.format(0, 1, 512)
RATIOS, MOVED = (0, 0.5, 1, 2), (0, 0.5, 1)
ON_POLICY = {"d3po": "--method d3po --steps 205 ",  # as many network calls as SHORT
             "spo": "--method spo --steps 140 "}
OWN_BETAS = {"d3po": (0.25, 1, 4), "spo": (5, 10, 30)}
LONG = "--eval-every 0 --sample-every 1000 --steps 6000 --batch 32 --draws 8 "
FEW, PROXY = LONG + "--pairs 200 ", LONG + "--proxy "
FAIR = {"DPO": "--beta {0}", "SEE-DPO": "--beta {0} --gamma {0}",  # the third: as flat, no margin
        "DPO, beta' = beta + gamma": "--beta {1}"}


class OneMode(dpo.Ring):
    """A single Gaussian as the reference: with labels by chance p* is a Gaussian too."""

    means = torch.zeros(1, 2)

    def sample(self, n, gen):
        return self.std * torch.randn(n, 2, generator=gen)


class Moved(dpo.Ring):
    """A ring whose samples, a share of them, have noise of standard deviation 1/2 on top."""

    def __init__(self, share):
        self.share = share

    def sample(self, n, gen):
        moved = torch.rand(n, 1, generator=gen) < self.share  # (n, 1)
        return super().sample(n, gen) + 0.5 * moved * torch.randn(n, 2, generator=gen)


class VelocityPolicy(dpo.ToyPolicy):
    """Its network corrects the reference's velocity u, not its eps_hat = a_t u + x_t: at much noise
    it cannot move eps_hat far."""

    def denoise(self, x_t, t):
        reference = self.ring(x_t, t)
        a_t = self.ring.alphas_cumprod[t][:, None].sqrt()
        return reference + a_t * (super().denoise(x_t, t) - reference)


class DeeperPolicy(dpo.ToyPolicy):
    """A network of one more layer."""

    def __init__(self, ring, seed):
        super().__init__(ring, seed)
        *body, last = self.net
        width = last.in_features
        self.net = nn.Sequential(*body, nn.Linear(width, width), nn.SiLU(), last)


def build(cfg, change):
    """The toy, or what differs from it."""
    ring = None
    if change == "one mode":
        ring = OneMode(torch.sigmoid(torch.linspace(8, -6, 100)))
    if change in ("linear betas", "linear betas, constant weight"):
        ring = dpo.Ring((1 - torch.linspace(0.001, 0.2, 100)).cumprod(0))
    toy = dpo.Toy(cfg, ring)
    if change == "one mode":
        toy.reward = lambda x: 0 * x[:, 0]
        toy.pairs = dpo.ToyPairs(toy.ring, cfg.pairs, cfg.seed, toy.reward)
    if isinstance(change, float):
        toy.pairs = dpo.ToyPairs(Moved(change), cfg.pairs, cfg.seed)
    if change == "linear betas, constant weight":
        toy.weight = toy.weight.mean().expand(len(toy.weight))
    if change == "velocity":
        toy.policy = VelocityPolicy(toy.ring, cfg.seed)
    return toy


def changed_step(change):
    """A dpo_step with another loss."""
    def step(problem, batch, cfg):
        x_w, x_l, cond = problem.encode(batch)
        err_w, err_l, ref_w, ref_l = errors = dpo.pair_errors(problem, x_w, x_l, batch["t"],
                                                              batch["eps"], cond)
        if change == "exact margin":  # the same log-ratios, r = -log p_ref without a draw
            exact_w, exact_l = -problem.ring.log_prob(x_w), -problem.ring.log_prob(x_l)
            errors = exact_w + err_w - ref_w, exact_l + err_l - ref_l, exact_w, exact_l
        losses, logit = dpo.dpo_loss(*errors, cfg.beta, cfg.gamma)
        if change == "SFT on the preferred":
            losses = losses + 0.03 * err_w
        (losses.sum() / cfg.batch).backward()
        right = (logit.sign() + 1) / 2
        return torch.stack([losses, right, logit, logit**2, *errors]).detach().sum(1)

    return step if change in ("exact margin", "SFT on the preferred") else dpo.dpo_step


def by_chance(score, gen):
    """A scorer whose ranks are drawn: of two scores the first is the higher one with probability
    sigmoid(first - second), as Gumbel's noise makes it."""
    return lambda x_0, batch: score(x_0, batch) - torch.empty(x_0.shape[:2]).exponential_(
        generator=gen).log()


@torch.no_grad()
def log_ratios(toy, x, draws=64):
    """log p_theta - log p_ref (N,) at x (N, 2), by the ELBOs."""
    found = []
    for number, some in enumerate(x.split(2000)):
        drawn = [dpo.draw_noise(f"ratio {number}", 0, row, draws, len(toy.weight), toy.shape)
                 for row in range(len(some))]
        t, eps = map(torch.stack, zip(*drawn, strict=True))
        err, _, ref_err, _ = dpo.pair_errors(toy, some, some, t, eps, {})
        found.append(ref_err - err)
    return torch.cat(found)


def distill(toy, samples=40_000, steps=2000, batch=1024):
    """A second stage: a new and deeper policy, by plain denoising of samples of the reference, each
    drawn as often as it is likelier by the policy's own log-ratio."""
    gen, T = dpo.generator(toy.cfg.seed, "distill"), len(toy.weight)
    x = toy.ring.sample(samples, gen)
    share = log_ratios(toy, x).softmax(0)
    toy.policy = DeeperPolicy(toy.ring, toy.cfg.seed)
    optimizer = torch.optim.AdamW(toy.policy.parameters(), toy.cfg.lr, weight_decay=0.01)
    for step in range(steps):
        rate = min((step + 1) / 100, (steps - step) / steps)  # risen and falling, as in train()
        optimizer.param_groups[0]["lr"] = toy.cfg.lr * rate
        # Each with eps and -eps, as draw_noise has it: less noise in the mean.
        x_0 = x[torch.multinomial(share, batch // 2, replacement=True, generator=gen)].repeat(2, 1)
        t, eps = dpo.draw_noise(f"distill {toy.cfg.seed}", 0, step, batch, T, toy.shape)
        abar_t = toy.alphas_cumprod[t][:, None]
        x_t = abar_t.sqrt() * x_0 + (1 - abar_t).sqrt() * eps
        optimizer.zero_grad()
        dpo.weighted_errors(toy.policy, toy, x_t, t, eps, {}).mean().backward()
        optimizer.step()


class Optimum:
    """p* as a policy: its denoiser, by a quadrature. p* is p_ref exp(f) / Z with
    f = (R - gamma log p_ref) / (beta + gamma). Given x_t, each mode of p_ref leaves a Gaussian for
    x_0, over which exp(f) is summed by Gauss and Hermite's rule."""

    def __init__(self, toy):
        self.toy = toy
        at, weight = map(torch.tensor, numpy.polynomial.hermite_e.hermegauss(NODES))
        self.at = torch.cartesian_prod(at, at).float()  # (NODES^2, 2)
        self.log_weight = torch.outer(weight, weight).flatten().log().float()  # (NODES^2,)

    def denoise(self, x_t, t):
        """E[eps | x_t] (N, 2) at x_t (N, 2)."""
        return torch.cat([*map(self.denoise_part, x_t.split(5000), t.split(5000))])

    __call__ = denoise

    def denoise_part(self, x_t, t):
        toy, cfg, ring = self.toy, self.toy.cfg, self.toy.ring
        abar_t = toy.alphas_cumprod[t][:, None, None]  # (N, 1, 1)
        a_t, s_t = dpo.signal_and_noise(abar_t, "epsilon")
        std_t = ((a_t * ring.std) ** 2 + s_t**2).sqrt()  # (N, 1, 1), of a mode with noise
        away = (x_t[:, None] - a_t * ring.means) / std_t  # (N, 8, 2)
        mean = ring.means + a_t * ring.std**2 / std_t * away  # (N, 8, 2)
        x_0 = mean[:, :, None] + (ring.std * s_t / std_t)[..., None] * self.at  # (N, 8, NODES^2, 2)
        f = toy.reward(x_0.flatten(0, 2))  # (8 N NODES^2,)
        if cfg.gamma:
            f = f - cfg.gamma * ring.log_prob(x_0.flatten(0, 2))
        log_share = f.view(x_0.shape[:-1]) / (cfg.beta + cfg.gamma) + self.log_weight
        log_share = log_share - away.square().sum(2, True) / 2  # (N, 8, NODES^2)
        share = log_share.flatten(1).softmax(1)[..., None]  # (N, 8 NODES^2, 1)
        return (x_t - a_t[..., 0] * (share * x_0.flatten(1, 2)).sum(1)) / s_t[..., 0]


def exact_denoiser(toy):
    """The numbers of a policy that is p*: what is left is the measurements' own."""
    toy.policy = Optimum(toy)
    return toy.measure()[0] | as_a_judge(toy)


def reward_model(toy):
    """RLHF without diffusion: a reward learnt from the labels that the policy gets, in their order,
    by Bradley-Terry, and samples of its p*. A network as wide; the better of two rates by TV."""
    cfg, pairs, gen = toy.cfg, toy.pairs, dpo.generator(toy.cfg.seed, "reward model")
    assert cfg.micro_batch == cfg.batch  # the keys of a step
    torch.manual_seed(cfg.seed)
    net = nn.Sequential(nn.Linear(2, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(),
                        nn.Linear(128, 1))
    optimizer = torch.optim.AdamW(net.parameters())
    for step, keys in enumerate(dpo.pair_keys(len(pairs), cfg, 0, 0, 1)):
        rate = min((step + 1) / cfg.warmup, (cfg.steps - step) / cfg.steps)  # as in train()
        optimizer.param_groups[0]["lr"] = 1e-3 * rate
        rows = [row for _, row in keys]
        losses = -F.logsigmoid(net(pairs.x_w[rows]) - net(pairs.x_l[rows]))
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    with torch.no_grad():
        learnt, _ = dpo.toy_optimum(toy.ring, cfg.beta, cfg.gamma, lambda x: net(x)[:, 0])
    p_star, _ = dpo.toy_optimum(toy.ring, cfg.beta, cfg.gamma)
    drawn = torch.multinomial(learnt.flatten(), dpo.SAMPLES, replacement=True, generator=gen)
    p_drawn = drawn.bincount(minlength=learnt.numel()).view_as(learnt) / dpo.SAMPLES
    return {"tv_policy": dpo.total_variation(p_drawn, p_star)}


YARDSTICKS = {"exact denoiser": exact_denoiser, "reward model": reward_model}


@torch.no_grad()
def drift(toy, samples=500):
    """How far policy and reference are from the denoiser of p*, on samples of p*: of each noise
    level in LEVELS the mean T omega_t ||eps_hat - eps*||^2, and the part of the policy's that one
    and the same vector makes."""
    cfg, gen = toy.cfg, dpo.generator("drift")
    axis = torch.linspace(-dpo.EXTENT, dpo.EXTENT, 121)
    grid = torch.cartesian_prod(axis, axis)  # (M, 2)
    log_p = (cfg.beta * toy.ring.log_prob(grid) + toy.reward(grid)) / (cfg.beta + cfg.gamma)
    chosen = torch.multinomial(log_p.softmax(0), samples, replacement=True, generator=gen)
    weight, eps = dpo.elbo_weight(toy.alphas_cumprod), torch.randn(samples, 2, generator=gen)
    found, optimum = {"policy": [], "reference": [], "common": []}, Optimum(toy)
    for level in LEVELS:
        a_t, s_t = dpo.signal_and_noise(toy.alphas_cumprod[level], "epsilon")
        x_t, t = a_t * grid[chosen] + s_t * eps, torch.full((samples,), level)
        exact = optimum.denoise(x_t, t)  # (samples, 2)
        off = {"policy": toy.policy.denoise(x_t, t) - exact, "reference": toy.ring(x_t, t) - exact}
        off["common"] = off["policy"].mean(0, keepdim=True)
        for name, vectors in off.items():
            found[name].append((weight[level] * vectors.square().sum(1).mean()).item())
    return found


def as_a_judge(toy, samples=10_000):
    """What the policy's log-ratio says of samples of the reference: how it goes with the reward,
    and minus the logarithm of the mean of p_theta / p_ref, in nats: 0 for a density, but for the
    noise of the draws, which makes it -0.14 for p* itself."""
    x = toy.ring.sample(samples, dpo.generator("judge"))
    ratio, wanted = log_ratios(toy, x), toy.reward(x) / toy.cfg.beta
    return {"correlation": torch.corrcoef(torch.stack([ratio, wanted]))[0, 1].item(),
            "nats_lost": math.log(len(x)) - ratio.logsumexp(0).item()}


def logits(toy, cfg):
    """The standard deviation of a pair's logit over its draws, by what the two halves share."""
    x_w, x_l = toy.pairs.x_w[:2000], toy.pairs.x_l[:2000]
    found = {"t and eps": [], "t": [], "nothing": []}
    for number in range(32):
        drawn = [[dpo.draw_noise(f"{number} {side}", 0, row, 1, 100, (2,))
                  for row in range(len(x_w))] for side in "wl"]
        noise = [[torch.stack(each) for each in zip(*side, strict=True)] for side in drawn]
        for shared in found:
            t = noise[0][0], noise[shared == "nothing"][0]
            eps = noise[0][1], noise[shared != "t and eps"][1]
            sides = [dpo.pair_errors(toy, x_w, x_l, t[i], eps[i], {}) for i in (0, 1)]
            four = sides[0][0], sides[1][1], sides[0][2], sides[1][3]
            found[shared].append(dpo.dpo_loss(*four, cfg.beta, cfg.gamma)[1].detach())
    return {shared: torch.stack(each).std(0).mean().item() for shared, each in found.items()}


def run(job):
    """One training: (flags, change, seed) -> the numbers of Toy.measure, and more where asked."""
    flags, change, seed = job
    torch.set_num_threads(1)
    dpo.SAMPLES = 50_000 if flags.startswith(FULL) else 25_000
    curve, argv = [], ["--toy", "--seed", str(seed), *flags.split()]
    own = any(f"--method {method}" in flags for method in ON_POLICY)  # makes its own pairs
    with (tempfile.TemporaryDirectory() as out, contextlib.redirect_stderr(io.StringIO()),
          contextlib.redirect_stdout(io.StringIO())):
        cfg = (on_policy if own else dpo).parse([*argv, "--out", f"{out}/run"])
        toy = on_policy.make_problem(cfg, None) if own else build(cfg, change)
        if change in YARDSTICKS:
            return YARDSTICKS[change](toy)
        if change == "Bradley-Terry":
            toy.score = by_chance(toy.score, dpo.generator(seed, "labels"))
        dpo.draw_picture = lambda toy, path, rows: curve.append(
            {"step": int(path.stem[-8:])} | toy.measure()[0])
        rows = dpo.train(toy, cfg, on_policy.on_policy_step if own else changed_step(change))
    if change == "distilled":
        distill(toy)
    numbers, densities = toy.measure()
    if flags.startswith(FULL) or flags == ONE_DRAW:
        numbers |= as_a_judge(toy) | {"drift": drift(toy)}
    held_out = {name: value for name, value in rows[-1].items() if name.startswith("held_out_")}
    numbers |= held_out | {"map": {name: p.tolist() for name, p in densities.items()}}
    if curve:
        numbers["curve"] = curve
    if change == "one mode":
        gen = dpo.generator(seed, "one mode")
        x = dpo.toy_sample(toy.policy.denoise, toy.alphas_cumprod, 50_000, gen)
        numbers["std"] = x.std(0).mean().item()
    if change == "logits":
        numbers["logits"] = logits(toy, cfg)
    return numbers


def experiments():
    """{experiment: {label: (flags, change)}}."""
    return {
        "readme": {label: (FULL + flags, None) for label, flags in {
            "DPO: `--toy`": "", "SEE-DPO: `--toy --gamma 0.5`": "--gamma 0.5",
            "SFT: `--toy --method sft`": "--method sft",
            "beta 2: `--toy --proxy --beta 2`": "--proxy --beta 2",
            "beta 0.5: `--toy --proxy`": "--proxy",
            "beta 0.25: `--toy --proxy --beta 0.25`":
                "--proxy --beta 0.25"}.items()},
        "a-draws": {(gamma, draws): (DRAWN.format(gamma, draws, 512 // draws), None)
                    for gamma in (0, 0.5) for draws in DRAWS},
        "b-beta": {beta: (SHORT + f"--beta {beta}", None) for beta in BETAS},
        "c-gamma": {gamma: (SHORT + f"--gamma {gamma}", None) for gamma in GAMMAS}
        | {("one mode", ratio): (SHORT + f"--gamma {ratio / 2}", "one mode") for ratio in RATIOS},
        "d-few-pairs": {name: (FEW + flags.format(0.5, 1), None) for name, flags in FAIR.items()}
        | {"SEE-DPO, exact margin": (FEW + FAIR["SEE-DPO"].format(0.5), "exact margin")},
        "d-proxy": {name: (PROXY + flags.format(0.25, 0.5), None) for name, flags in FAIR.items()}
        | {"SEE-DPO, exact margin": (PROXY + FAIR["SEE-DPO"].format(0.25), "exact margin")},
        "e-noise": {gamma: (SHORT + f"--gamma {gamma}", "logits") for gamma in (0, 0.5)},
        "f-weight": {change: (SHORT, change) for change in (
            "linear betas", "linear betas, constant weight")},
        "g-coverage": {(gamma, moved): (SHORT + f"--gamma {gamma}", float(moved))
                       for gamma in (0, 0.5) for moved in MOVED},
        "h-methods": {(method, beta): (ON_POLICY[method] + f"--beta {beta}", None)
                      for method, betas in OWN_BETAS.items() for beta in betas}
        | {("d3po, gamma 0.5", 1): (ON_POLICY["d3po"] + "--beta 1 --gamma 0.5", None),
           ("spo, gamma 5", 10): (ON_POLICY["spo"] + "--beta 10 --gamma 5", None),
           ("sft", None): (SHORT + "--method sft", None)}
        | {(f"{method}, chance{more}", beta): (ON_POLICY[method] + f"--beta {beta}{flags}",
                                              "Bradley-Terry")
           for method, beta, gamma in (("d3po", 1, 0.5), ("spo", 10, 5))
           for more, flags in (("", ""), (f", gamma {gamma}", f" --gamma {gamma}"))},
        "i-drift": {"DPO": (FULL, None), "anchor 0.05": (FULL + "--anchor 0.05", None),
                    "anchor 0.2": (FULL + "--anchor 0.2", None),
                    "SFT on the preferred": (FULL, "SFT on the preferred"),
                    "velocity": (FULL, "velocity"),
                    "one draw": (ONE_DRAW, None),
                    "distilled": (FULL, "distilled"),
                    "anchor 0.05, distilled": (FULL + "--anchor 0.05", "distilled"),
                    "SEE-DPO, gamma 0.5": (FULL + "--gamma 0.5", None),
                    "SEE-DPO, gamma 0.5, anchor 0.05": (FULL + "--gamma 0.5 --anchor 0.05",
                                                        None),
                    "SEE-DPO, gamma 0.5, anchor 0.05, distilled":
                        (FULL + "--gamma 0.5 --anchor 0.05", "distilled")},
        "i-yardsticks": {change: (FULL, change) for change in YARDSTICKS},
        "j-flow": {"epsilon": (FULL, None), "flow": (FULL + "--prediction flow", None)}}


# ------------------------------------------------------------------------------- tables and figures


def spread(runs, name):
    """Median, least and largest of a number over the seeds."""
    values = [numbers[name] for numbers in runs]
    return median(values), min(values), max(values)


def cell(runs, name):
    middle, low, high = spread(runs, name)
    return f"{middle:.3f}" + (f" ({low:.3f} to {high:.3f})" if high - low > 5e-4 else "")


def table(results, labels, columns):
    lines = ["| setting | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {label} | " + " | ".join(cell(results[label], name) for name in columns) + " |"
              for label in labels]
    return "\n".join(lines) + "\n"


def line(ax, xs, runs, name, label, **style):
    """Medians with the range over the seeds."""
    middle, low, high = zip(*(spread(each, name) for each in runs), strict=True)
    error = [[m - a for m, a in zip(middle, low, strict=True)],
             [b - m for m, b in zip(middle, high, strict=True)]]
    ax.errorbar(xs, middle, error, marker=".", capsize=3, label=label, **style)


def figure(columns=2, width=11, height=4):
    return plt.subplots(1, columns, figsize=(width, height), layout="constrained")


def finish(name, chart, *axes):
    for ax in axes:
        ax.legend(fontsize=8)
    chart.savefig(OUT / f"{name}.png", dpi=80)
    plt.close(chart)


def frontier(ax, pairs, **style):
    """Mean reward and entropy of p* for some (beta, gamma), in closed form."""
    ring, points = dpo.Ring(None), []
    for beta, gamma in pairs:
        p, mean = dpo.toy_optimum(ring, beta, gamma)
        points.append((dpo.entropy(p), mean(dpo.toy_reward)))
    ax.plot(*zip(*points, strict=True), **style)


def draw(found):
    """All figures. found: {experiment: {label: [numbers of a seed, ...]}}."""
    blue, orange, green, red = "tab:blue", "tab:orange", "tab:green", "tab:red"

    chart, ax = figure(1, 6)
    for gamma, colour in (0, blue), (0.5, orange):
        runs = [found["a-draws"][gamma, draws] for draws in DRAWS]
        line(ax, DRAWS, runs, "tv_policy", f"gamma {gamma}", c=colour)
        ax.axhline(runs[0][0]["tv_floor"], c=colour, ls=":", lw=1)
    ax.set(xscale="log", xticks=DRAWS, xticklabels=DRAWS, ylim=0, xlabel="draws per pair, K",
           ylabel="TV to p*", title="512 draws per step, shared out")
    finish("a-draws", chart, ax)

    chart, (left, right) = figure()
    line(left, BETAS, [found["b-beta"][beta] for beta in BETAS], "tv_policy", "policy")
    left.set(xscale="log", xlabel="beta", ylabel="TV to p*", ylim=0, title="distance to p*")
    betas = [(0.12 * 1.2**i, 0) for i in range(24)]
    frontier(right, betas, c="black", lw=1, label="p*, closed form")
    for beta in BETAS:
        runs = found["b-beta"][beta]
        right.plot([n["entropy_policy"] for n in runs], [n["reward_policy"] for n in runs], ".",
                   label=f"policy, beta {beta}")
    right.set(xlabel="entropy (nats)", ylabel="mean reward", title="reward against entropy")
    finish("b-beta", chart, left, right)

    chart, (left, right) = figure()
    runs = [found["c-gamma"][gamma] for gamma in GAMMAS]
    line(left, GAMMAS, runs, "entropy_policy", "policy", c=blue)
    left.plot(GAMMAS, [each[0]["entropy_optimum"] for each in runs], "k--", label="p*")
    left.set(xlabel="gamma (beta 0.5)", ylabel="entropy (nats)", title="the ring")
    runs = [found["c-gamma"]["one mode", ratio] for ratio in RATIOS]
    line(right, RATIOS, runs, "std", "policy", c=blue)
    right.plot(RATIOS, [0.5 * math.sqrt(1 + ratio) for ratio in RATIOS], "k--",
               label="std of p_ref times sqrt(1 + gamma/beta)")
    right.set(xlabel="gamma / beta", ylabel="standard deviation", title="one Gaussian, no reward")
    finish("c-gamma", chart, left, right)

    for name, shown in ("d-few-pairs", ("tv_policy", "entropy_policy")), (
            "d-proxy", ("reward_policy", "proxy_policy")):
        chart, axes = figure()
        for ax, what in zip(axes, shown, strict=True):
            for (label, runs), colour in zip(found[name].items(), (blue, orange, green, red),
                                             strict=True):
                curves = [each["curve"] for each in runs]
                points = list(zip(*curves, strict=True))
                line(ax, [point[0]["step"] for point in points], points, what, label, c=colour)
            if name == "d-proxy":
                ax.axhline(runs[0][what.replace("policy", "reference")], c="gray", ls=":",
                           label="reference")
            ax.set(xlabel="step", title=what.replace("_", " of the "))
        finish(name, chart, *axes)

    chart, axes = figure()
    for ax, gamma in zip(axes, (0, 0.5), strict=True):
        runs = [each["logits"] for each in found["e-noise"][gamma]]
        for place, shared in enumerate(runs[0]):
            line(ax, [place], [runs], shared, f"shared: {shared}", ls="")
        ax.set(xticks=[], ylim=0, ylabel="std of the logit over draws", title=f"gamma {gamma}")
    finish("e-noise", chart, *axes)

    chart, ax = figure(1, 6)
    for gamma, colour in (0, blue), (0.5, orange):
        line(ax, MOVED, [found["g-coverage"][gamma, moved] for moved in MOVED], "tv_policy",
             f"gamma {gamma}", c=colour)
    ax.set(xlabel="share of points off the reference", ylabel="TV to p*", ylim=0)
    finish("g-coverage", chart, ax)

    chart, ax = figure(1, 7, 5)
    frontier(ax, betas, c="black", lw=1, label="p*, gamma 0")
    gammas = [(0.5, 0.05 * i) for i in range(21)]
    frontier(ax, gammas, c="gray", lw=1, label="p*, beta 0.5, gamma 0 to 1")
    points = [("DPO", blue, [found["b-beta"][beta] for beta in BETAS]),
              ("SEE-DPO, beta 0.5", "tab:cyan", [found["c-gamma"][gamma] for gamma in GAMMAS[1:]])]
    points += [(name.upper(), colour, [found["h-methods"][name, beta] for beta in OWN_BETAS[name]])
               for name, colour in (("d3po", green), ("spo", red))]
    for name, colour, beta, gamma in ("d3po", "limegreen", 1, 0.5), ("spo", "salmon", 10, 5):
        settings = [name + more for more in (f", gamma {gamma}", ", chance",
                                             f", chance, gamma {gamma}")]
        points += [(setting.upper().replace("GAMMA", "gamma").replace("CHANCE", "chance"), colour,
                    [found["h-methods"][setting, beta]]) for setting in settings]
    points.append(("SFT", "tab:purple", [found["h-methods"]["sft", None]]))
    for label, colour, settings in points:
        runs = [numbers for each in settings for numbers in each]
        ax.plot([n["entropy_policy"] for n in runs], [n["reward_policy"] for n in runs], ".",
                c=colour, label=label)
    ax.set(xlabel="entropy (nats)", ylabel="mean reward", title="equal network calls, 3 seeds")
    finish("h-methods", chart, ax)

    maps = {"reference p_ref": (found["b-beta"][0.5], "reference"),
            "optimum p*, beta 0.5": (found["b-beta"][0.5], "optimum"),
            "DPO, beta 0.5": (found["readme"]["DPO: `--toy`"], "policy"),
            "SEE-DPO, gamma 0.5": (found["readme"]["SEE-DPO: `--toy --gamma 0.5`"], "policy"),
            "D3PO, beta 1": (found["h-methods"]["d3po", 1], "policy"),
            "SPO, beta 10": (found["h-methods"]["spo", 10], "policy")}
    draw_maps("methods", maps, "reward {reward:.2f}, entropy {entropy:.2f}")
    drifted, anchored = found["i-drift"]["DPO"], found["i-drift"]["anchor 0.05"]
    draw_maps("i-solvers", {"optimum p*": (drifted, "optimum"), "DPO, by DDPM": (drifted, "policy"),
                            "DPO, by an ODE": (drifted, "policy_ode"),
                            "anchor 0.05, by DDPM": (anchored, "policy"),
                            "anchor 0.05, by an ODE": (anchored, "policy_ode")},
              "TV to p* {tv:.2f}")

    chart, ax = figure(1, 7)
    for label, runs, which, style in (
            ("reference", drifted, "reference", {"c": "gray"}), ("DPO", drifted, "policy",
                                                                 {"c": blue}),
            ("DPO, the common vector's part", drifted, "common", {"c": blue, "ls": ":"}),
            ("one draw", found["i-drift"]["one draw"], "policy", {"c": orange}),
            ("anchor 0.05", anchored, "policy", {"c": green})):
        levels = [[{"nats": numbers["drift"][which][at]} for numbers in runs]
                  for at in range(len(LEVELS))]
        line(ax, LEVELS, levels, "nats", label, **style)
    ax.set(yscale="log", xlabel="noise level t of 0 .. 99", ylabel="T omega |eps_hat - eps*|^2",
           title="distance to the denoiser of p*, on its samples")
    finish("i-drift", chart, ax)


def draw_maps(name, maps, caption):
    """Densities of the first seed side by side. maps: {title: (runs, whose)}."""
    chart, axes = figure(len(maps), 2.5 * len(maps), 3)
    for ax, (label, (runs, which)) in zip(axes, maps.items(), strict=True):
        box, optimum = 2 * (-dpo.EXTENT, dpo.EXTENT), runs[0]["map"]["optimum"]
        numbers = {what: runs[0][f"{what}_{which}"] for what in ("reward", "entropy", "tv")}
        ax.imshow(torch.tensor(runs[0]["map"][which]).T, origin="lower", extent=box,
                  vmax=max(map(max, optimum)))
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"{label}\n{caption.format(**numbers)}", fontsize=10)
    chart.savefig(OUT / f"{name}.png", dpi=80)
    plt.close(chart)


def frame(title, tv, p, optimum):
    """An image: the density p beside the optimum's, on one colour scale."""
    both = torch.cat([p, optimum]).T.flip(0) / optimum.max()  # up is up
    pixels = matplotlib.colormaps["viridis"](both.clamp(max=1).numpy(), bytes=True)[..., :3]
    image = Image.fromarray(pixels).resize((600, 300), Image.Resampling.NEAREST)
    for x, text in (8, f"{title}: TV {tv:.2f}"), (308, "optimum p*, closed form"):
        ImageDraw.Draw(image).text((x, 6), text, "white", font_size=15)
    return image.quantize(64)


def draw_default_run(path):
    """What `--toy` does: its figure, toy.png in `path`, and toy.gif, the policy on its way to p*.
    """
    frames, real = [], dpo.draw_picture

    def picture(toy, file, rows, *measured):
        if measured:  # the end, which is the last frame already
            return real(toy, file, rows, *measured)
        numbers, p = toy.measure()
        if not frames:
            frames.append(frame("reference", numbers["tv_reference"], p["reference"],
                                p["optimum"]))
        title = f"policy, step {int(file.stem[-8:])}"
        frames.append(frame(title, numbers["tv_policy"], p["policy"], p["optimum"]))

    with (mock.patch.object(dpo, "draw_picture", picture), tempfile.TemporaryDirectory() as out,
          contextlib.redirect_stdout(io.StringIO())):
        dpo.main(["--toy", "--sample-every", "100", "--out", f"{out}/toy"])
        shutil.copy(Path(out, "toy", "toy.png"), path)
    frames[0].save(path / "toy.gif", save_all=True, append_images=frames[1:], loop=0,
                   duration=[100] * (len(frames) - 1) + [3000])


def write(found):
    """A JSON file per experiment, and the tables."""
    for name, labels in found.items():
        rows = [{"setting": label, "seed": seed} | {
            key: value for key, value in numbers.items() if key != "map"}
            for label, runs in labels.items() for seed, numbers in zip(SEEDS, runs, strict=True)]
        (OUT / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    readme = found["readme"]
    dpo_sft, proxy = list(readme)[:3], list(readme)[3:]
    end = ("tv_policy", "reward_policy", "entropy_policy")
    solvers = ("tv_policy", "tv_policy_ode", "tv_floor", "nats_lost", "correlation")
    print(table(readme, dpo_sft, ("tv_reference", "tv_policy", "tv_policy_ode", "tv_floor",
                                  "reward_policy", "reward_optimum", "entropy_policy",
                                  "entropy_optimum")))
    print(table(readme, dpo_sft, ["held_out_" + name for name in (
        "accuracy", "standard_error", "margin", "rise_w", "rise_l")]))
    print(table(readme, proxy, ("reward_reference", "reward_policy", "reward_optimum",
                                "proxy_reference", "proxy_policy")))
    for name, columns in (("a-draws", ("tv_policy", "tv_floor", "reward_policy")),
                          ("b-beta", (*end, "reward_optimum", "entropy_optimum")),
                          ("f-weight", end), ("g-coverage", end), ("h-methods", end),
                          ("j-flow", (*end, "tv_policy_ode")),
                          ("i-drift", solvers)):
        print(name + "\n" + table(found[name], found[name], columns))
    for change, columns in ("exact denoiser", solvers), ("reward model", ("tv_policy",)):
        print("i-yardsticks\n" + table(found["i-yardsticks"], [change], columns))
    rings = {gamma: found["c-gamma"][gamma] for gamma in GAMMAS}
    print("c-gamma\n" + table(rings, rings, (*end, "entropy_optimum", "tv_floor")))
    print(table(found["c-gamma"], [("one mode", ratio) for ratio in RATIOS], ("std",)))
    for name in "d-few-pairs", "d-proxy":
        columns = end if name == "d-few-pairs" else ("reward_policy", "proxy_policy")
        for at, when in (0, "1000 steps"), (-1, "6000 steps"):
            rows = {label: [numbers["curve"][at] for numbers in runs]
                    for label, runs in found[name].items()}
            print(f"{name}, {when}\n" + table(rows, rows, columns))
    rows = {gamma: [numbers["logits"] for numbers in found["e-noise"][gamma]] for gamma in (0, 0.5)}
    print("e-noise\n" + table(rows, rows, list(rows[0][0])))


def main():
    plan = experiments()
    jobs = list(dict.fromkeys((*job, seed) for labels in plan.values() for job in labels.values()
                              for seed in SEEDS))
    jobs.sort(key=lambda job: not job[0].startswith((FULL, LONG)))  # the long ones first
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count(), len(jobs))) as pool:
        done = dict(zip(jobs, tqdm(pool.imap(run, jobs), total=len(jobs), ncols=99, unit=" runs"),
                        strict=True))
    found = {name: {label: [done[*job, seed] for seed in SEEDS] for label, job in labels.items()}
             for name, labels in plan.items()}
    OUT.mkdir(exist_ok=True)
    write(found)
    draw(found)
    draw_default_run(HERE)


if __name__ == "__main__":
    main()
