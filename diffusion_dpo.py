"""Diffusion-DPO in one file: the loss, a toy whose answer is known, and training up to SD3.5.

    python diffusion_dpo.py --toy                                 # a laptop, about a minute
    torchrun --nproc_per_node 8 diffusion_dpo.py --model sdxl     # the paper's settings, but lr

Given pairs of images (x_w, x_l) for a prompt c, of which people preferred x_w and rejected x_l,
Diffusion-DPO (Wallace et al., CVPR 2024, arXiv:2311.12908) fine-tunes the policy p_theta against
p_ref, a frozen copy of where it started. Its loss (Eq. 14) compares four denoising errors:

    loss  = -log sigmoid(logit)
    logit = beta [(r_w - e_w) - (r_l - e_l)] - gamma (e_w - e_l)          (gamma = 0: Eq. 14)

    e = T omega_t || eps - eps_theta(x_t, t, c) ||^2    r = the same of p_ref    _w, _l: of x_w, x_l
    x_t = a_t x_0 + s_t eps, eps ~ N(0, 1), a_t^2 = abar_t = 1 - s_t^2 (in a flow a_t + s_t = 1)

Five steps lead to it:
 1. Bradley-Terry: x_w is preferred with probability sigmoid(R(x_w) - R(x_l)), for some reward R.
 2. RLHF would fit R and then train a policy for it, towards
        p* = argmax_p  E_p[R] - beta KL(p || p_ref) + gamma H(p)
           = p_ref^(beta / (beta + gamma)) exp(R / (beta + gamma)) / Z(c).
    gamma = 0 is DPO. gamma > 0 is SEE-DPO (Shekhar et al., TMLR 2025, arXiv:2411.04712), meant
    against overfitting and reward hacking: its exponent flattens p_ref.
 3. DPO reads this backwards: every policy is optimal for the reward that it implies,
        R = (beta + gamma) log p_theta - beta log p_ref + const(c),
    and that reward is fitted to the labels by 1. In R(x_w) - R(x_l) the constant cancels.
 4. log p is not known for a diffusion model, but its lower bound is (the first inequality):
        log p(x_0) >= ELBO = const - E over t, eps of [T omega_t ||eps - eps_theta(x_t, t, c)||^2].
    It takes the place of log p_theta, the reference's that of log p_ref: an approximation.
 5. The expectation is drawn. One (t, eps) gives -e + const for log p_theta, -r + const for log
    p_ref: the logit above. (The second inequality, Jensen's: -log sigmoid is convex, so the mean of
    the losses of single draws is above the loss of the mean logit. More draws (--draws; the paper's
    is one), averaged inside, narrow the gap.)

    paper            here                     shape
    x_0^w, x_0^l     x_w, x_l                 (B, *shape)  preferred, rejected sample (SD: latents)
    t, eps           t, eps                   (B, K, ...)  K draws per pair; t = 0 .. T-1 here
    abar_t           alphas_cumprod[t]        (T,)         SNR_t = abar_t / (1 - abar_t)
    T omega_t        weight[t]                (T,)         weight of a squared error
    e_w, r_w, ...    err_w, ref_err_w, ...    (B,)         weighted errors

Where the paper, its released code and this file differ:
 1. beta. T omega_t is a constant in the paper; its code takes half the MEAN squared error, that is
    T omega_t = 1/(2d) for latents of d numbers. So do we for images: beta = 2000 and 5000 refer to
    it (trainers without the half need half the beta). On the SUM of squares that is beta/(2d), and
    the smaller, the weaker the pull to p_ref: 0.061 for 2000 on SD1.5 (d = 16,384), 0.153 for 5000
    there, 0.038 on SDXL (d = 65,536). In the toy T omega_t is the ELBO's: errors are in nats.
 2. Learning rate: the paper prints (2000 / beta) 2.048e-8; its launchers run 2.048e-5 (1e-8 times
    2048 pairs, at beta 5000), as all who reproduced it did. Ours is (2000 / beta) 2.048e-5,
    at 5000 8.2e-6. It rises for a quarter of the steps, as in the paper (SDXL launcher: a tenth).
 3. t and eps. Eq. 14 has eps^w and eps^l; the code shares both t and eps in a pair, and so do we.
    Sharing eps is for the variance: in the toy the logit's standard deviation over draws is 1.32
    with both shared, 2.44 with t alone, 4.11 with neither. At gamma = 0 what an error owes to t
    cancels between policy and reference; in gamma (e_w - e_l) only if the halves share t.
 4. Crop, flip and caption dropout are drawn once per pair; the code draws the flip per image (and
    its launchers crop the centre). A dropped caption is what the pipeline means by no prompt: ""
    for SD1.5 and SD3, zeros for SDXL (code: ""). A latent is the VAE's mean (code: a sample).
"""

import argparse
import functools
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from copy import deepcopy
from importlib import metadata
from io import BytesIO
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

# diffusers, transformers and datasets are imported where they are used: a toy starts at once.
WEIGHTS, LORA_WEIGHTS = "diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"
HELD_OUT = -1  # the "epoch" of pairs that are looked at, not trained on
EVAL_DRAWS = 10  # of (t, eps) per held-out pair (paper 5.5)
CHUNK = 256  # pairs in a file of the cache
STOPPING = (signal.SIGINT, signal.SIGTERM)
METRICS = ("loss", "reward_accuracy", "reward_margin", "logit_square", "err_policy_w",
           "err_policy_l", "err_ref_w", "err_ref_l")


class Refusal(Exception):
    """Bad input: main() prints the one line and exits with code 2."""


class Stop(Exception):
    """Ends a run early, its steps saved, on all processes alike. Arguments: why, exit code."""


# ----------------------------------------------------------------------------------- 1. The loss

def dpo_loss(err_w, err_l, ref_err_w, ref_err_l, beta, gamma=0.0, anchor=0.0):
    """The loss of Diffusion-DPO (gamma = 0: Eq. 14) and of SEE-DPO (gamma > 0).

    Takes four (B,) fp32 tensors of weighted errors, each standing for -log p + const; beta > 0, the
    weight of the KL; gamma >= 0, that of the entropy. Returns the losses (B,), one per pair, and
    the logits (B,): the implicit reward of x_w minus that of x_l.

    One pair, by hand: errors 1.0 and 1.2, the reference's 1.1 and 1.0. The policy has moved
    towards x_w by 1.1 - 1.0 = 0.1 and away from x_l by 0.2. At beta = 2 the logit is
    2 (0.1 - -0.2) = 0.6 and the loss log(1 + e^-0.6) = 0.437. gamma = 1 adds 1 (1.2 - 1.0) = 0.2,
    the policy's own log p(x_w) - log p(x_l): logit 0.8, loss 0.371. Collect the terms with
    theta, and SEE-DPO is DPO at beta + gamma plus a margin without theta, gamma (r_l - r_w):
    3 (0.1 - -0.2) + 1 (1.0 - 1.1) = 0.8 again.

    At step 0 policy = reference. With gamma = 0 the logit is 0 and the loss log 2 = 0.693, whatever
    the pair; with gamma > 0 the margin is left, here -0.1: the loss is log(1 + e^0.1) = 0.744.

    What raises both errors alike cancels in the logit. anchor (ours, toy only; toy/README.md, i)
    penalises it, if pairs are samples of p_ref and errors in nats: the mean of p_theta / p_ref, of
    exp(r - e), is 1 for a density, less if e is too large. Well below beta^2 / 2: it rewards noise.
    """
    # The differences first: policy and reference nearly cancel, and beta is in the thousands.
    log_ratio_w = ref_err_w - err_w  # (B,)  log p_theta(x_w) - log p_ref(x_w)
    log_ratio_l = ref_err_l - err_l  # (B,)
    logit = beta * (log_ratio_w - log_ratio_l) - gamma * (err_w - err_l)  # (B,)
    # Per pair: each is a label of its own, and a saturated one must not speak for the others.
    losses = -F.logsigmoid(logit)
    if anchor:
        losses = losses + anchor * (1 - (log_ratio_w.exp() + log_ratio_l.exp()) / 2)
    return losses, logit


# -------------------------------------------------------------- 2. Noise, and the four errors
# A problem, Toy or StableDiffusion, has: policy and reference, called (x_t (N, *shape), t (N,),
# **cond) -> (N, *shape); alphas_cumprod, weight (T,); prediction, what the networks output:
# "epsilon", "v_prediction" or, for flow matching, "flow".

def elbo_weight(alphas_cumprod):
    """T omega_t (T,): with it, one draw of (t, eps) estimates minus the ELBO, up to a constant.

    The ELBO is a sum of KLs between Gaussians that share the variance of the forward posterior
    (DDPM, arXiv:2006.11239, Eq. 5, 8 and 12); each is omega_t ||eps - eps_hat||^2 with
    omega_t = (SNR_{t-1} / SNR_t - 1) / 2. At t = 0 stands a decoder, of a variance that is free:
    we give it the omega of t = 1. With log SNR linear in t omega_t is constant.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)  # (T,)
    omega = (snr[:-1] / snr[1:] - 1) / 2  # (T - 1,)
    return len(snr) * torch.cat([omega[:1], omega])


def generator(*key):
    """A random generator (on the CPU) that is a function of `key`, on every machine."""
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(63))


def draw_noise(seed, epoch, row, draws, T, shape):
    """t (K,) int64 and eps (K, *shape) fp32, K = draws: the noise of one pair in one epoch, on any
    process and after any restart. Each t is uniform, each eps normal; so that means vary less, they
    are not independent: evenly spaced t, each with eps and with -eps."""
    gen, half = generator(seed, "noise", epoch, row), (draws + 1) // 2
    t = (torch.randint(T, (1,), generator=gen) + torch.arange(half) * T // half) % T  # (half,)
    eps = torch.randn(half, *shape, generator=gen)  # (half, *shape)
    return t.repeat(2)[:draws], torch.cat([eps, -eps])[:draws]


def signal_and_noise(abar_t, prediction):
    """a_t and s_t, shaped like abar_t; for flow matching scaled to a_t + s_t = 1."""
    a_t, s_t = abar_t.sqrt(), (1 - abar_t).sqrt()
    total = a_t + s_t if prediction == "flow" else 1
    return (a_t / total).float(), (s_t / total).float()


def weighted_errors(network, problem, x_t, t, target, cond):
    """weight[t] ||prediction - target||^2 (N,) fp32, for x_t and target (N, *shape), t (N,)."""
    # To fp32 before the difference: squared in bf16, the logit at beta 5000 is off by up to 0.6.
    squares = (network(x_t, t, **cond).float() - target).square()  # (N, *shape)
    return problem.weight[t] * squares.flatten(1).sum(1)


def pair_errors(problem, x_w, x_l, t, eps, cond):
    """The four errors that dpo_loss takes: err_w, err_l, ref_err_w, ref_err_l, (B,) fp32 each.

    x_w, x_l (B, *shape); t (B, K); eps (B, K, *shape); cond {name: (2B, ...)}, preferred first.
    """
    B, K = t.shape
    x_0 = torch.cat([x_w, x_l]).repeat_interleave(K, 0)  # (2BK, *shape): both in one forward
    cond = {name: value.repeat_interleave(K, 0) for name, value in cond.items()}  # (2BK, ...)
    t = t.flatten().repeat(2)  # (2BK,): the halves of a pair share t
    eps = torch.cat([eps.flatten(0, 1)] * 2)  # (2BK, *shape): and eps
    abar_t = problem.alphas_cumprod[t].view(-1, *[1] * (x_0.dim() - 1))  # (2BK, 1, ...)
    a_t, s_t = signal_and_noise(abar_t, problem.prediction)
    x_t = a_t * x_0 + s_t * eps  # (2BK, *shape)
    # Given x_t, v = (eps - s_t x_t) / a_t (arXiv:2202.00512, App. D) and flow = (eps - x_t) / a_t
    # (arXiv:2403.03206) have eps's error over a_t. Image models keep their units, as elsewhere.
    target = {"epsilon": eps, "v_prediction": a_t * eps - s_t * x_0, "flow": eps - x_0}
    target = target[problem.prediction]
    with torch.no_grad():  # the reference goes first, while no activations of the policy are held
        ref_errors = weighted_errors(problem.reference, problem, x_t, t, target, cond)  # (2BK,)
    errors = weighted_errors(problem.policy, problem, x_t, t, target, cond)  # (2BK,)
    # The mean over draws comes before the log-sigmoid: noise teaches caution (toy/README.md, a).
    err_w, err_l = errors.view(2, B, K).mean(2)  # (B,) each
    ref_err_w, ref_err_l = ref_errors.view(2, B, K).mean(2)
    return err_w, err_l, ref_err_w, ref_err_l


# ------------------------------------------------------- 3. The toy: a laboratory with an answer
# Its numbers (eight modes, a hill of height 2, the sizes of network and schedule) are ours.

class Ring:
    """The toy's reference: eight Gaussians on a circle. With noise added they still are eight
    Gaussians, so the best prediction, E[eps | x_t], is known exactly."""

    angles = torch.arange(8) * math.pi / 4
    means = 2 * torch.stack([angles.cos(), angles.sin()], 1)  # (8, 2)
    std = 0.5

    def __init__(self, alphas_cumprod):
        self.alphas_cumprod = alphas_cumprod

    def log_prob(self, x):
        """log p_ref (N,) at x (N, 2), up to a constant."""
        return (-(x[:, None] - self.means).square().sum(-1) / (2 * self.std**2)).logsumexp(1)

    def sample(self, n, gen):
        which = torch.randint(8, (n,), generator=gen)
        return self.means[which] + self.std * torch.randn(n, 2, generator=gen)

    def __call__(self, x_t, t):
        """E[eps | x_t] (N, 2) at x_t (N, 2): -sqrt(1 - abar_t) times the score (Tweedie)."""
        abar_t = self.alphas_cumprod[t][:, None]  # (N, 1)
        variance = abar_t * self.std**2 + 1 - abar_t  # (N, 1)
        away = x_t[:, None] - abar_t[..., None].sqrt() * self.means  # (N, 8, 2)
        share = (-away.square().sum(-1) / (2 * variance)).softmax(1)  # (N, 8)
        return (1 - abar_t).sqrt() * (share[..., None] * away).sum(1) / variance


def velocity(denoiser, alphas_cumprod, x_t, t):
    """A denoiser as a flow: eps - x_0 (N, 2) at x_t (N, 2), where a_t + s_t = 1."""
    a_t, s_t = signal_and_noise(alphas_cumprod[t][:, None], "flow")  # (N, 1)
    eps = denoiser(x_t / (a_t**2 + s_t**2).sqrt(), t)  # it expects a_t^2 + s_t^2 = 1
    return (eps - x_t) / a_t  # as x_0 = (x_t - s_t eps) / a_t


class ToyPolicy(nn.Module):
    """The reference plus a network that corrects eps_hat and starts at 0."""

    folder = "policy"  # its place in --out

    def __init__(self, ring, seed, prediction="epsilon", width=128):
        super().__init__()
        self.ring, self.prediction = ring, prediction
        torch.manual_seed(seed)
        first, second, last = nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 2)
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        self.net = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)

    def denoise(self, x_t, t):
        """eps_hat (N, 2) at x_t (N, 2), where a_t^2 + s_t^2 = 1."""
        level = self.ring.alphas_cumprod[t][:, None].logit() / 4  # log SNR, scaled like x_t
        return self.ring(x_t, t) + self.net(torch.cat([x_t, level], 1))

    def forward(self, x_t, t):
        if self.prediction == "epsilon":
            return self.denoise(x_t, t)
        return velocity(self.denoise, self.ring.alphas_cumprod, x_t, t)

    def save(self, folder):
        folder.mkdir(parents=True)
        save_file(self.state_dict(), folder / WEIGHTS)

    def load(self, folder):
        self.load_state_dict(load_file(folder / WEIGHTS))


def toy_reward(x):
    """The true reward (N,) at x (N, 2): a hill of height 2 over the right side of the ring."""
    return 2 * torch.exp(-(x - torch.tensor([2.0, 0.0])).square().sum(-1) / (2 * 1.5**2))


def toy_proxy(x):
    """A reward (N,) that errs (--proxy): the true one, plus a hill where it is nearly 0."""
    hill = torch.exp(-(x - torch.tensor([-2.0, 0.0])).square().sum(-1) / (2 * 0.8**2))
    return toy_reward(x) + 3 * hill


class ToyPairs:
    """n pairs of samples of the reference, labelled by the Bradley-Terry model of `reward`."""

    def __init__(self, ring, n, seed, reward=toy_reward):
        gen = generator(seed, "toy pairs")
        x_0, x_1 = ring.sample(2 * n, gen).chunk(2)  # (n, 2) each
        prefers_0 = torch.rand(n, generator=gen) < torch.sigmoid(reward(x_0) - reward(x_1))
        self.x_w = torch.where(prefers_0[:, None], x_0, x_1)
        self.x_l = torch.where(prefers_0[:, None], x_1, x_0)

    def __len__(self):
        return len(self.x_w)

    def __getitem__(self, key):
        return {"x_w": self.x_w[key[1]], "x_l": self.x_l[key[1]]}


EXTENT, BINS, FINE = 5.0, 30, 8  # densities are compared on 30 x 30 squares of [-5, 5]^2
SAMPLES, HELD_OUT_PAIRS = 50_000, 5000


def toy_density(log_p):
    """The probabilities (BINS, BINS) of the squares under exp(log_p), which is normalised here, and
    a function that gives the mean of a reward: sums over FINE x FINE points in every square."""
    axis = EXTENT * ((2 * torch.arange(BINS * FINE) + 1) / (BINS * FINE) - 1)  # midpoints
    points = torch.cartesian_prod(axis, axis)  # (BINS^2 FINE^2, 2)
    p = log_p(points).double().softmax(0)
    return p.view(BINS, FINE, BINS, FINE).sum((1, 3)), lambda f: (p * f(points)).sum().item()


def toy_optimum(ring, beta, gamma, reward=toy_reward):
    """p* of a reward in closed form: what toy_density gives."""
    return toy_density(lambda x: (beta * ring.log_prob(x) + reward(x)) / (beta + gamma))


def toy_histogram(x):
    """The shares (BINS, BINS) of samples x (N, 2) in the squares; those outside are in none."""
    return torch.histogramdd(x, BINS, range=2 * [-EXTENT, EXTENT]).hist.double() / len(x)


def total_variation(p, q):
    """Half the sum of |p - q|, what is outside the squares included: 0 if equal, 1 if disjoint."""
    return ((p - q).abs().sum() + (p.sum() - q.sum()).abs()).item() / 2


def entropy(p):
    """Differential entropy in nats: the density is p over the area of a square."""
    return -torch.special.xlogy(p, p / (2 * EXTENT / BINS) ** 2).sum().item()


def ddim_step(x_t, eps, abar_t, abar_next, eta=1.0):
    """Mean and standard deviation of a step from abar_t to abar_next, scalars (arXiv:2010.02502,
    Eq. 12, 16). From t to t - 1 eta = 1 is DDPM; eta = 0 an ODE, as Stable Diffusion is drawn."""
    x_0 = (x_t - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()
    variance = eta**2 * (1 - abar_next) / (1 - abar_t) * (1 - abar_t / abar_next)  # at the end 0
    direction = (1 - abar_next - variance).clamp(min=0).sqrt() * eps  # rounding may give -1e-8
    return abar_next.sqrt() * x_0 + direction, variance.sqrt()


@torch.no_grad()
def toy_sample(denoiser, alphas_cumprod, n, gen, eta=1.0):
    """Samples (n, 2) of a denoiser in all T steps; eta = 1 is DDPM (arXiv:2006.11239, Eq. 7)."""
    x = torch.randn(n, 2, generator=gen)
    abars = torch.cat([torch.ones(1), alphas_cumprod])  # (T + 1,), with that of x_0
    for t in reversed(range(len(alphas_cumprod))):
        mean, std = ddim_step(x, denoiser(x, torch.full((n,), t)), abars[t + 1], abars[t], eta)
        x = mean + std * torch.randn(n, 2, generator=gen)
    return x


class Toy:
    """The toy as a problem. T = 100 noise levels, linear in log SNR, unless `ring` has others."""

    shape, sources = (2,), ()

    def __init__(self, cfg, ring=None):
        self.cfg, self.prediction = cfg, cfg.prediction
        self.reward = toy_proxy if cfg.proxy else toy_reward
        ring = self.ring = ring or Ring(torch.sigmoid(torch.linspace(8, -6, 100)))
        self.policy, self.reference = ToyPolicy(ring, cfg.seed, cfg.prediction), ring
        self.alphas_cumprod, self.weight = ring.alphas_cumprod, elbo_weight(ring.alphas_cumprod)
        if self.prediction == "flow":  # an error of eps is a_t times the flow's, see pair_errors
            self.reference = functools.partial(velocity, ring, ring.alphas_cumprod)
            self.weight = self.weight * signal_and_noise(ring.alphas_cumprod, "flow")[0] ** 2
        self.pairs = ToyPairs(ring, cfg.pairs, cfg.seed, self.reward)
        self.held_out = ToyPairs(ring, HELD_OUT_PAIRS, "held out")  # by the true reward

    def encode(self, batch):
        """x_w, x_l (B, 2), and what else the networks take: nothing."""
        return batch["x_w"], batch["x_l"], {}

    def measure(self):
        """Reference, optimum and policy, compared: numbers, and {name: densities (BINS, BINS)}."""
        cfg, ring, gen = self.cfg, self.ring, generator(self.cfg.seed, "toy report")
        compared = {"reference": toy_density(ring.log_prob),
                    "optimum": toy_optimum(ring, cfg.beta, cfg.gamma, self.reward)}
        for name, eta in ("policy", 1.0), ("policy_ode", 0.0):
            x = toy_sample(self.policy.denoise, self.alphas_cumprod, SAMPLES, gen, eta)
            compared[name] = toy_histogram(x), lambda f, x=x: f(x).mean().item()
        p_star, numbers = compared["optimum"][0], {}
        for name, (p, mean) in compared.items():
            numbers |= {f"reward_{name}": mean(toy_reward), f"proxy_{name}": mean(toy_proxy),
                        f"entropy_{name}": entropy(p), f"tv_{name}": total_variation(p, p_star)}
        # What a perfect policy would score: as many samples of p* itself.
        drawn = torch.multinomial(p_star.flatten(), SAMPLES, replacement=True, generator=gen)
        p_drawn = drawn.bincount(minlength=BINS**2).view(BINS, BINS) / SAMPLES
        numbers["tv_floor"] = total_variation(p_drawn, p_star)
        return numbers, {name: p for name, (p, _) in compared.items()}


# ----------------------------------------------------------------------------------- 4. The loop

def pair_keys(n, cfg, start, rank, world):
    """The (epoch, row) of the pairs of one process, a list per micro-batch, from step `start` on.
    Pair i of step s is number s * batch + i in an endless sequence of shuffled epochs: the run does
    not depend on the number of processes, and after a restart there is nothing to replay."""
    @functools.lru_cache(maxsize=2)
    def order(epoch):
        return torch.randperm(n, generator=generator(cfg.seed, "order", epoch))
    for step in range(start, cfg.steps):
        for first in range(rank * cfg.micro_batch, cfg.batch, world * cfg.micro_batch):
            begin = step * cfg.batch + first
            numbers = range(begin, begin + cfg.micro_batch)
            yield [(i // n, order(i // n)[i % n].item()) for i in numbers]


def dpo_step(problem, batch, cfg):
    """Forward, loss and backward of one micro-batch: adds its share of the whole batch's mean loss
    to the policy's gradients. Returns the sums (8,) of METRICS over its pairs."""
    x_w, x_l, cond = problem.encode(batch)
    t, eps = (batch[name].to(problem.weight.device, non_blocking=True) for name in ("t", "eps"))
    with autocast(problem):
        errors = pair_errors(problem, x_w, x_l, t, eps, cond)  # four of (B,)
    losses, logit = dpo_loss(*errors, cfg.beta, cfg.gamma, cfg.anchor)  # (B,)
    if cfg.method == "sft":  # the rejected half is then measured only
        losses = 2 * errors[0]  # for images the mean squared error
    (losses.sum() / cfg.batch).backward()
    right = (logit.sign() + 1) / 2  # a tie is half right: 1/2 at step 0, not 0
    return torch.stack([losses, right, logit, logit**2, *errors]).detach().sum(1)


def train_step(problem, optimizer, batches, cfg, step, micro_step=dpo_step):
    """One optimizer step: gradients of cfg.batch pairs, accumulated, and an update. Returns the
    metrics from before it. At a signal or a NaN raises Stop, with the weights unchanged."""
    began, parameters = time.perf_counter(), optimizer.param_groups[0]["params"]
    rising, falling = (step + 1) / max(1, cfg.warmup), (cfg.steps - step) / max(1, cfg.decay)
    lr = optimizer.param_groups[0]["lr"] = cfg.lr * min(1, rising, falling)
    optimizer.zero_grad()
    totals = torch.zeros(len(METRICS) + 1, device=problem.weight.device)  # the last: unreadable
    for _ in range(cfg.batch // (cfg.micro_batch * rank_and_world()[1])):
        batch = next(batches)
        totals[:-1] += micro_step(problem, batch, cfg)
        totals[-1] += sum(map(bool, batch["unreadable"]))
    if dist.is_initialized():
        # Once a step: DDP would overlap it with the last of its 128 backwards: not worth it.
        for tensor in (totals, *[p.grad for p in parameters if p.grad is not None]):
            dist.all_reduce(tensor)
    *sums, unreadable = totals.tolist()  # only here the CPU waits for the GPU
    row = {"step": step} | {name: x / cfg.batch for name, x in zip(METRICS, sums, strict=True)}
    row["logit_std"] = max(0.0, row.pop("logit_square") - row["reward_margin"] ** 2) ** 0.5
    grad_norm = nn.utils.clip_grad_norm_(parameters, 1.0).item()  # released code: 1
    row |= {"grad_norm": grad_norm, "lr": lr, "unreadable": int(unreadable)}
    if not all(map(math.isfinite, row.values())):
        raise Stop(f"Step {step} is not finite and not taken: {row}. Lower --lr, new --out.", 1)
    optimizer.step()
    row["pairs_per_s"] = cfg.batch / (time.perf_counter() - began)
    return row


def train(problem, cfg, micro_step=dpo_step):
    """Trains problem.policy on one process or, under torchrun, on many; goes on from the newest
    checkpoint in cfg.out, as if nothing had happened. Returns the rows of metrics.jsonl."""
    rank, out, policy = rank_and_world()[0], Path(cfg.out), problem.policy
    optimizer = make_optimizer([p for p in policy.parameters() if p.requires_grad], cfg)
    start, unreadable = load_checkpoint(out, policy, optimizer)
    log, batches = Log(problem, cfg, start), load_batches(problem, cfg, start)

    def due(every):  # every so many steps, and at the end
        return every and step and (step % every == 0 or step == cfg.steps)
    try:
        for step in range(start, cfg.steps + 1):  # `step` of them have been taken
            if unreadable > max(1, step * cfg.batch / 100):
                raise Stop(f"--data {cfg.data}: {unreadable} pairs, over 1 %, are unreadable.", 2)
            if rank == 0 and step > start and (due(cfg.save_every) or due(cfg.eval_every)):
                save_checkpoint(out, step, policy, optimizer, unreadable)
            if rank == 0 and due(cfg.sample_every):
                draw_picture(problem, out / "samples" / f"step-{step:08d}.png", log.rows)
            if due(cfg.eval_every):
                numbers = evaluate(problem, cfg)
                log.add({"step": step} | {f"held_out_{name}": numbers[name] for name in numbers})
            if step < cfg.steps:
                row = train_step(problem, optimizer, batches, cfg, step, micro_step)
                unreadable += row["unreadable"]
                log.add(row)
    except Stop as stop:
        if rank == 0:
            if step > start:
                save_checkpoint(out, step, policy, optimizer, unreadable)
            log.bar.close()
            print(f"{stop.args[0]}\nEnded after {step} steps; {out} goes on from there.")
        gather(None)  # torchrun ends the others as soon as one is gone: wait for process 0
        sys.exit(stop.args[1])
    if rank == 0:
        with whole(out / policy.folder) as folder:
            policy.save(folder)
    return log.rows


# ---------------------------------------------------------------------------- 5. Preference data

DEFAULT_DATA = "data-is-better-together/open-image-preferences-v1-binarized"  # Apache-2.0
COLUMNS = (  # caption, two images, label of the first image (None: it is the preferred one)
    ("caption", "jpg_0", "jpg_1", "label_0"),  # Pick-a-Pic
    ("prompt", "chosen", "rejected", None),  # open-image-preferences-v1-binarized
    ("prompt", "path1", "path2", None),  # HPDv3
    ("prompt", "preferred", "rejected", None))  # pairs.jsonl
JSON = (".json", ".jsonl")


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def root_of(data):
    """Where the paths in --data begin: the folder that it names, or in which a JSON file lies."""
    path = Path(data)
    return path.parent if path.is_file() and path.suffix in JSON else path


def load_pairs(data, split):
    """--data as a datasets.Dataset, its columns (caption, first, second image), and a label a row:
    1 or 0, first or second preferred; 0.5 or None, a tie. No image is decoded. Raises Refusal."""
    import datasets
    path, files = data, None
    if Path(data, "pairs.jsonl").is_file():
        path, files = "json", f"{data}/pairs.jsonl"
    elif Path(data).is_file():
        path, files = "json" if Path(data).suffix in JSON else "parquet", data
    try:  # else a folder of parquet files, or a hub id
        table = datasets.load_dataset(path, data_files=files, split=split)
        have = table.column_names
        fitting = [each for each in COLUMNS if set(each) - {None} <= set(have)]
        if not fitting:
            raise ValueError(f"has the columns {have}; they should be those of one of {COLUMNS}")
        *columns, label = fitting[0]
        labels = table[label][:] if label else [1] * len(table)
        if odd := set(labels) - {0, 0.5, 1, None}:
            raise ValueError(f"{label} holds {odd.pop()!r}; it should be 0, 0.5 or 1")
        for column in columns[1:]:
            table = table.cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # what can go wrong in datasets has no common base class
        absent = "" if Path(data).exists() else "no such file or folder, and as a hub id: "
        raise Refusal(f"--data {data}: {absent}{first_line(error)}") from error
    return table, columns, labels


def read_image(value, root):
    """An upright RGB image from {"bytes": ..., "path": ...}, however it was stored. The data may be
    a stranger's. Raises whatever PIL raises if it cannot, and ValueError if it should not."""
    file = BytesIO(value["bytes"]) if value["bytes"] else root / value["path"]
    if not value["bytes"] and ".." in file.relative_to(root).parts:  # ValueError if elsewhere
        raise ValueError(f"{value['path']} is not in the folder of the data")
    image = Image.open(file, formats=("JPEG", "PNG", "WEBP"))  # others may start programs
    short, long = sorted(image.size)  # a failed download, a bomb, 16 bits (PIL would clip them)
    if short < 8 or short * long > 2**25 or long > 32 * short or image.mode[0] in "IF":
        raise ValueError(f"{image.width} x {image.height} pixels of mode {image.mode}")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def square(image, size, u, v, flip):
    """Pixels (3, size, size), uint8: the shorter side scaled to `size`; u, v in 0..1 is the cut."""
    image = ImageOps.mirror(image) if flip else image
    image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR, centering=(u, v))
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)


class ImagePairs:
    """The preference pairs in a split of --data, by (epoch, row); decoded as they are asked for."""

    def __init__(self, cfg, split):
        table, self.columns, labels = load_pairs(cfg.data, split)
        untied = [row for row, label in enumerate(labels) if label in (0, 1)]
        if not untied:
            raise Refusal(f"--data {cfg.data}: all {len(labels)} pairs of split {split} are ties")
        self.table, self.labels = table.select(untied), [labels[row] for row in untied]
        self.source = table.cache_files[0]["filename"]
        self.cfg, self.root, self.rows = cfg, root_of(cfg.data), untied  # rows: the user's numbers
        self.captions = self.table.select_columns(self.columns[0])  # without copies of the images
        self.prompts = [prompt or "" for prompt in self.captions.unique(self.columns[0])]
        self.cache = None  # see cache_latents
        if rank_and_world()[0] == 0:
            print(f"data        {cfg.data}, {split}: {len(self):,} pairs;"
                  f" {len(labels) - len(self):,} ties dropped")

    def __len__(self):
        return len(self.table)

    def read(self, epoch, row):
        """One pair: its "prompt" and its "images" (2, 3, H, W) uint8, preferred first, or "latents"
        (2, *shape) from the cache. Raises ValueError if it is unreadable."""
        caption, *sides = self.columns
        if self.labels[row] == 0:
            sides.reverse()  # preferred first
        # Once for both images: the pair shares its noise, so let it share its geometry.
        gen = generator(self.cfg.seed, "augment", epoch, row)
        u, v, flip, drop = torch.rand(4, generator=gen).tolist()
        if epoch == HELD_OUT:  # the middle of the image, not flipped, with its caption
            u, v, flip, drop = 0.5, 0.5, 1, 1
        prompt = "" if drop < self.cfg.caption_dropout else self.captions[row][caption] or ""
        if self.cache:
            with safe_open(cache_file(self.cache, row), "pt") as tensors:
                if str(row) not in tensors.keys():
                    raise ValueError("could not be read when --cache was filled")
                return {"prompt": prompt, "latents": tensors.get_tensor(str(row))}
        values, images = self.table[row], []
        try:
            for side in sides:
                image = read_image(values[side], self.root)
                images.append(square(image, self.cfg.resolution, u, v, flip < 0.5))
        except Exception as error:  # decoders raise anything; it all means the same
            raise ValueError(f"{side}, {first_line(error).split(' <')[0]}") from error  # no address
        return {"prompt": prompt, "images": torch.stack(images)}

    def __getitem__(self, key):
        """What read() gives, and "unreadable": "", or why the next pair has stepped in."""
        epoch, row, why = *key, []
        for _ in range(min(100, len(self))):
            try:
                return self.read(epoch, row) | {"unreadable": "; ".join(why)}
            except ValueError as error:
                why.append(f"row {self.rows[row]}: {error}")
                row = (row + 1) % len(self)
        raise Refusal(f"--data {self.cfg.data}: unreadable, pair after pair; the last: {why[-1]}")


# ---------------------------------------------------------------------------- 6. Stable Diffusion

HUB = {"sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
       "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
       "sd35": "stabilityai/stable-diffusion-3.5-medium"}
BUILDS = {"StableDiffusionPipeline": "sd15", "StableDiffusionXLPipeline": "sdxl",
          "StableDiffusion3Pipeline": "sd35"}


class NetworkPolicy(nn.Module):
    """diffusers' UNet or transformer, called like the toy. times (T,): a transformer's own t."""

    def __init__(self, network, times=None):
        super().__init__()
        self.network, self.times = network, times
        self.folder = self.part = "unet" if times is None else "transformer"  # in a pipeline

    def forward(self, x_t, t, prompt, **added):
        if self.part == "unet":
            return self.network(x_t, t, prompt, added_cond_kwargs=added, return_dict=False)[0]
        return self.network(x_t, prompt, timestep=self.times[t], return_dict=False, **added)[0]

    def save(self, folder):
        self.network.save_pretrained(folder, max_shard_size="1TB")  # one file, as on the hub

    def load(self, folder):
        self.network.load_state_dict(load_file(folder / WEIGHTS))


class LoraPolicy(NetworkPolicy):
    """A frozen network and adapters that start at 0, in fp32; without them, the reference."""

    def __init__(self, network, times, rank, seed):
        import peft
        super().__init__(network.requires_grad_(False), times)
        self.folder = "lora"
        torch.manual_seed(seed)
        network.add_adapter(peft.LoraConfig(
            r=rank, lora_alpha=rank, init_lora_weights="gaussian",  # as diffusers' examples do
            target_modules=["to_q", "to_k", "to_v", "to_out.0",  # the rest: SD3, for the text
                            "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]))
        self.adapters = {f"{self.part}.{name.replace('.default', '')}": p  # as diffusers does
                         for name, p in network.named_parameters() if p.requires_grad}
        for p in self.adapters.values():
            p.data = p.data.float()

    def reference(self, x_t, t, **cond):
        self.network.disable_adapters()
        prediction = self(x_t, t, **cond)
        self.network.enable_adapters()
        return prediction

    def save(self, folder):  # diffusers' own save_lora_adapter writes names that pipelines miss
        from diffusers.utils import convert_state_dict_to_kohya
        folder.mkdir(parents=True)
        save_file(self.adapters, folder / LORA_WEIGHTS)
        if self.part == "unet":  # of SD3 ComfyUI loads the other file
            save_file(convert_state_dict_to_kohya(self.adapters), folder / "kohya.safetensors")

    def load(self, folder):
        saved = load_file(folder / LORA_WEIGHTS)
        shapes = [{name: p.shape for name, p in each.items()} for each in (saved, self.adapters)]
        with safe_open(folder / LORA_WEIGHTS, "pt") as file:  # diffusers notes rank and alpha there
            noted = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        rank, alpha = (noted.get(f"{self.part}.{name}") for name in ("r", "lora_alpha"))
        if shapes[0] != shapes[1] or alpha != rank:
            raise ValueError("not adapters of this rank for this network, with alpha = rank")
        for name, p in self.adapters.items():
            p.data.copy_(saved[name])


def load_pipeline(model):
    """The diffusers pipeline of --model, on the CPU. Raises OSError."""
    import diffusers
    import transformers
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    kind, model = diffusers.DiffusionPipeline, HUB.get(model, model)
    left_out = [name for name, of in kind.load_config(model).items() if of == [None, None]]  # a T5
    return kind.from_pretrained(model, use_safetensors=True,
                                **dict.fromkeys(["safety_checker", *left_out]))


def read_schedule(pipe):
    """alphas_cumprod (T,) and what the network predicts, by the scheduler. Raises Refusal."""
    config, sd3 = pipe.scheduler.config, "transformer" in pipe.components
    if sd3 and "shift" in config and not config.get("use_dynamic_shifting"):
        # SD3 draws logit(s_t) from a normal distribution (arXiv:2403.03206, 3.1), which `shift`
        # moves. Our T levels are the quantiles of that: so t is uniform here, too.
        T = config.num_train_timesteps
        quantiles = (torch.arange(T).double() + 0.5) / T
        logit = torch.special.ndtri(quantiles) + math.log(config.shift)
        return torch.sigmoid(-2 * logit), "flow"  # a_t / s_t = (1 - s_t) / s_t = e^-logit
    from diffusers import DDPMScheduler
    schedule = DDPMScheduler.from_config(config)
    prediction = schedule.config.prediction_type
    if sd3 or "beta_start" not in config or prediction not in ("epsilon", "v_prediction"):
        raise Refusal("--model: it should predict epsilon or v with DDPM's noise, or SD3's flow")
    return schedule.alphas_cumprod, prediction


class StableDiffusion:
    """SD1.5, SDXL, SD3, or a pipeline of their build, as a problem."""

    def __init__(self, cfg, device, pipe, pairs=None, held_out=None):
        self.cfg, self.pipe, self.pairs, self.held_out = cfg, pipe, pairs, held_out
        alphas_cumprod, self.prediction = read_schedule(pipe)
        flow, bf16 = self.prediction == "flow", cfg.precision == "bf16"
        network = (pipe.transformer if flow else pipe.unet).float()
        self.alphas_cumprod = alphas_cumprod.to(device)  # (T,)
        times = 1000 * signal_and_noise(self.alphas_cumprod, "flow")[1] if flow else None
        self.sources = network.config.get("_name_or_path"), getattr(pairs, "source", None)
        pipe.vae.float().enable_slicing()  # SDXL's overflows in fp16 (launcher: another)
        encoders = [part for key, part in pipe.components.items()
                    if key.startswith("text_encoder") and part]  # SD3's third may be left out
        nn.ModuleList(encoders).to(torch.bfloat16 if bf16 else torch.float32)
        base = network if cfg.lora else deepcopy(network)
        nn.ModuleList([base, pipe.vae, *encoders]).requires_grad_(False)
        if bf16:
            # Autocast rounds weights at every use; for the reference's once is enough. The trained
            # ones stay fp32: near 0.02 bf16 has a spacing of 1.2e-4, a step of 2e-5 would be lost.
            for module in base.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    module.to(torch.bfloat16)
        if cfg.lora:
            self.policy = LoraPolicy(network, times, cfg.lora, cfg.seed)
            self.reference = self.policy.reference
        else:
            self.policy, self.reference = NetworkPolicy(network, times), NetworkPolicy(base, times)
        if cfg.checkpointing == "on":
            network.enable_gradient_checkpointing()
        pipe.to(device), base.to(device)
        side = cfg.resolution // pipe.vae_scale_factor
        self.shape = network.config.in_channels, side, side
        if flow and side > (most := network.config.patch_size * network.config.pos_embed_max_size):
            raise Refusal(f"--resolution {cfg.resolution}: it should be at most {8 * most}")
        self.weight = torch.full_like(times if flow else self.alphas_cumprod,
                                      1 / (2 * math.prod(self.shape)))  # (T,) fp32
        for each in filter(None, (pairs, held_out) if cfg.cache else ()):
            cache_latents(each, self)
        if cfg.compile:  # the blocks alone: of a whole UNet torch 2.13 on CPUs gets wrong gradients
            import torch._inductor.config as inductor
            inductor.emulate_precision_casts = True  # or bf16 rounds policy and reference apart
            torch._dynamo.config.recompile_limit = 64  # shapes times modes; more would run eagerly
            for each in {network, base}:
                each.compile_repeated_blocks()

    @torch.no_grad()
    def encode_images(self, images):
        """Latents (N, *shape) fp32 of images (N, 3, H, W) uint8."""
        images, vae = images.to(self.weight.device, non_blocking=True) / 127.5 - 1, self.pipe.vae
        latents = vae.encode(images).latent_dist.mode() - (vae.config.shift_factor or 0)
        return latents * vae.config.scaling_factor

    @torch.no_grad()
    def encode(self, batch):
        """x_w, x_l (B, *shape) and cond {name: (2B, ...)} of a batch of ImagePairs."""
        if "latents" in batch:  # (B, 2, *shape)
            x_w, x_l = batch["latents"].to(self.weight.device, torch.float32).unbind(1)
        else:
            images = batch["images"].transpose(0, 1).flatten(0, 1)  # (2B, 3, H, W)
            x_w, x_l = self.encode_images(images).chunk(2)
        cond = self.encode_prompts(batch["prompt"])
        return x_w, x_l, {name: torch.cat([value, value]) for name, value in cond.items()}

    @torch.no_grad()
    def encode_prompts(self, prompts):
        """What the network takes beside x_t and t, for B prompts: {name: (B, ...)}."""
        flow = self.prediction == "flow"
        prompt, _, *pooled = self.pipe.encode_prompt(
            prompts, *[None] * 2 * flow, device=self.weight.device, num_images_per_prompt=1,
            do_classifier_free_guidance=False)  # None: SD3's other encoders get the same prompts
        if flow:
            return {"prompt": prompt, "pooled_projections": pooled[0]}
        if not pooled:
            return {"prompt": prompt}
        cond = {"prompt": prompt, "text_embeds": pooled[0]}
        if self.pipe.config.force_zeros_for_empty_prompt:  # as when it samples without a prompt
            given = torch.tensor([[text != ""] for text in prompts]).to(prompt, non_blocking=True)
            cond = {"prompt": prompt * given[:, None], "text_embeds": pooled[0] * given}
        # Sizes and crop as if all were whole, as in the released code: true ones may betray labels.
        sizes = torch.tensor([1, 1, 0, 0, 1, 1], device=prompt.device) * float(self.cfg.resolution)
        return cond | {"time_ids": sizes.repeat(len(prompts), 1)}


def cache_file(folder, row):
    return folder / f"{row // CHUNK:06d}.safetensors"


def cache_latents(pairs, problem):
    """--cache: `pairs` give latents from the disk, computed once, each process its share of files;
    without random crop and flip, which would need an encoding each."""
    from datasets.fingerprint import Hasher
    cfg, (rank, world) = problem.cfg, rank_and_world()
    changed = [(str(file), file.stat().st_mtime_ns) for place in (cfg.data, cfg.model)
               for file in sorted(Path(place).rglob("*"))  # images may change without the table
               if not {Path(cfg.cache), Path(cfg.out)} & {file, *file.parents}]
    mark = Hasher.hash([pairs.table._fingerprint, pairs.labels, changed, cfg.model, cfg.resolution,
                        cfg.precision])
    folder = gather(Path(cfg.cache) / mark)[0]  # another machine may see other times of change
    folder.mkdir(parents=True, exist_ok=True)
    dtype = torch.float16 if cfg.precision == "bf16" else torch.float32  # bf16 has 3 bits less
    for turn in tqdm(range(0, len(pairs), CHUNK * world), "cache", ncols=99, disable=rank > 0):
        rows = range(len(pairs))[turn + rank * CHUNK:][:CHUNK]
        file = cache_file(folder, turn + rank * CHUNK)
        if rows and not file.exists():
            batches, tensors = loader(pairs, [[(HELD_OUT, row)] for row in rows], cfg), {}
            for row, batch in zip(rows, batches, strict=True):
                if not batch["unreadable"][0]:  # (2, *shape)
                    tensors[str(row)] = problem.encode_images(batch["images"][0]).to("cpu", dtype)
            with whole(file) as path:
                save_file(tensors, path)
        gather(None)  # nobody has to wait for longer than a file takes
    pairs.cache = folder


# ----------------------------------------------------- 7. The implicit reward on held-out pairs

@torch.no_grad()
def evaluate(problem, cfg):
    """The policy as a judge of problem.held_out (paper 5.5, Tab. 2): does the preferred half get
    the larger implicit reward? Returns numbers by name, the same ones on every process. All
    policies meet the same noise, for each pair its own. Unreadable pairs are left out."""
    rank, world = rank_and_world()
    n, size = len(problem.held_out), max(1, cfg.micro_batch * cfg.draws // EVAL_DRAWS)
    keys = [[(HELD_OUT, row) for row in range(first, min(first + size, n))]
            for first in range(rank * size, n, world * size)]
    found = []  # of each batch: rows (B,) and four errors (B, 4)
    noised = Noised(problem.held_out, problem, "held out", EVAL_DRAWS)
    for batch in tqdm(loader(noised, keys, cfg), "evaluate", len(keys), ncols=99,
                      disable=rank > 0 or cfg.evaluate is None):
        x_w, x_l, cond = problem.encode(batch)
        t, eps = batch["t"].to(x_w.device), batch["eps"].to(x_w.device)
        with autocast(problem):
            errors = pair_errors(problem, x_w, x_l, t, eps, cond)
        read = torch.tensor([not why for why in batch["unreadable"]])
        found.append((batch["row"][read], torch.stack(errors, 1).cpu()[read]))
    rows, numbers = (torch.cat(column) for column in zip(*sum(gather(found), []), strict=True))
    errors = numbers[rows.argsort()].T  # (4, n), in an order that no process changes
    logit = dpo_loss(*errors, cfg.beta, cfg.gamma)[1]  # (n,)
    right = logit.sign().double() / 2 + 0.5  # a tie is half right
    return {"accuracy": right.mean().item(), "margin": logit.mean().item(),
            "standard_error": (right.mean() * (1 - right.mean()) / len(right)).sqrt().item(),
            "rise_w": (errors[0] - errors[2]).mean().item(),
            "rise_l": (errors[1] - errors[3]).mean().item(),
            "pairs": len(logit), "unreadable": n - len(logit)}


def load_policy(policy, named):
    """Loads the weights of a folder, or a run's last ones. Returns their folder. Raises Refusal."""
    places = [Path(named), Path(named, policy.folder),
              *sorted(Path(named).glob(f"checkpoint-[0-9]*/{policy.folder}"), reverse=True)]
    places = [place for place in places if any(place.glob("*.safetensors"))]
    if not places:
        raise Refusal(f"{named}: no policy in it, that is no {policy.folder}/*.safetensors")
    try:
        policy.load(places[0])
    except Exception as error:  # a torn file, weights of another model
        raise Refusal(f"{places[0]}: {first_line(error)}; it should fit --model") from error
    return places[0]


def report_evaluation(problem, cfg):
    """--evaluate: prints what evaluate() finds and writes it to OUT/evaluation.json."""
    folder = load_policy(problem.policy, cfg.evaluate or cfg.out)
    numbers = evaluate(problem, cfg)
    if rank_and_world()[0] > 0:
        return
    print(f"policy      {folder}")
    for name, value in numbers.items():
        print(f"    {name:26}{value}")
    write_json(Path(cfg.out, "evaluation.json"), vars(cfg) | numbers | {"policy": str(folder)})


# ------------------------------------------------------------- 8. Processes, batches, checkpoints

def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value):
    """[value on process 0, on process 1, ...], by way of the CPU: no device has to wait."""
    values = [value] * rank_and_world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def autocast(problem):
    return torch.autocast(problem.weight.device.type, torch.bfloat16,
                          problem.cfg.precision == "bf16")


def make_optimizer(parameters, cfg):
    """AdamW or Adafactor as the launchers run them; torch's own Adafactor scales lr by weights."""
    if cfg.optimizer == "adafactor":
        from transformers.optimization import Adafactor
        released = {"scale_parameter": False, "relative_step": False, "clip_threshold": 1.0}
        return Adafactor(parameters, lr=cfg.lr, weight_decay=0.01, **released)
    return torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=0.01, fused=True)


def ignore_signals(worker):
    """For the processes that read images: when to stop is decided by those that train."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def loader(pairs, keys, cfg):
    """Batches of `pairs`, one for each list in `keys`, made ahead by worker processes."""
    return torch.utils.data.DataLoader(
        pairs, batch_sampler=keys, num_workers=min(cfg.workers, os.cpu_count()),
        worker_init_fn=ignore_signals, pin_memory=torch.cuda.is_available())


def load_batches(problem, cfg, start):
    """This process's micro-batches from step `start` on. A signal raises Stop, on all alike."""
    rank, world = rank_and_world()
    keys = pair_keys(len(problem.pairs), cfg, start, rank, world)
    signals, named = [], set()
    before = [signal.signal(s, lambda number, frame: signals.append(number)) for s in STOPPING]
    try:
        for batch in loader(Noised(problem.pairs, problem, cfg.seed, cfg.draws), keys, cfg):
            number = torch.tensor(max(signals, default=0))
            if world > 1:
                dist.all_reduce(number, dist.ReduceOp.MAX)  # on the CPU: no GPU waits
            if got := number.item():
                raise Stop(f"Stopped by signal {got}. The same command goes on.", 128 + got)
            for why in set(batch["unreadable"]) - named - {""}:
                named.add(why)
                print(f"\nunreadable  {why}")
            yield batch
    except GeneratorExit:  # after Stop they stay: a second Ctrl-C must not end the saving
        for number, handler in zip(STOPPING, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def whole(path):
    """A place to write to that becomes `path`, file or folder, once it is on the disk: whenever the
    machine dies, `path` is whole, or as it was before, or (a folder) absent. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")
    try:
        yield partial
    except Exception as error:  # torch and safetensors have their own for a disk that is full
        raise OSError(f"{path}: {first_line(error)}") from error
    os.sync()
    if path.is_dir():
        shutil.rmtree(path)
    partial.replace(path)


def write_json(path, content):
    with whole(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def save_checkpoint(out, step, policy, optimizer, unreadable):
    """Writes OUT/checkpoint-STEP, all that a restart needs. Two are kept. Raises OSError."""
    torn = [path for path in out.glob(".*.partial") if path.is_dir()]
    with whole(out / f"checkpoint-{step:08d}") as partial:
        policy.save(partial / policy.folder)
        torch.save(optimizer.state_dict(), partial / "optimizer.pt")
        write_json(partial / "state.json", {"step": step, "unreadable": unreadable})
    for old in (*torn, *sorted(out.glob("checkpoint-[0-9]*"), key=os.path.getmtime)[:-2]):
        shutil.rmtree(old)


def load_checkpoint(out, policy, optimizer):
    """Reads the newest whole checkpoint: its step, unreadable pairs. Refusal if none is whole."""
    wrong, found = {}, (0, 0)
    for folder in sorted(out.glob("checkpoint-[0-9]*"), reverse=True):
        try:
            state = json.loads((folder / "state.json").read_text())
            saved = torch.load(folder / "optimizer.pt", "cpu", weights_only=True, mmap=True)
            policy.load(folder / policy.folder)
            optimizer.load_state_dict(saved)
            found = state["step"], state["unreadable"]
            break
        except Exception as error:  # torn files raise anything
            wrong[folder.name] = first_line(error)
    if wrong and not found[0]:
        raise Refusal(f"--out {out}: no checkpoint can be read ({wrong})")
    mine = found, [p.flatten()[0].item() for p in policy.parameters()]  # no weights are sent
    if any(each != mine for each in gather(mine)):
        raise Refusal(f"--out {out}: it should be on a disk that all share, and --model the same")
    if wrong and rank_and_world()[0] == 0:
        print(f"WARNING     broken checkpoints are passed over: {wrong}")
    return found


class Log:
    """What a run says: on the screen, in OUT/config.json and OUT/metrics.jsonl. By process 0."""

    def __init__(self, problem, cfg, start):
        (rank, world), n = rank_and_world(), len(problem.pairs)
        self.cfg, self.file, self.rows = cfg, Path(cfg.out, "metrics.jsonl"), []
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.bar = tqdm(initial=start * cfg.batch, total=cfg.steps * cfg.batch, unit=" pairs",
                        unit_scale=True, ncols=99, mininterval=0.5, disable=rank > 0)
        if rank > 0:
            return
        trained = sum(p.numel() for p in problem.policy.parameters() if p.requires_grad)
        print(f"model       {cfg.model}: {trained:,} trained parameters in fp32, forward in"
              f" {cfg.precision} on {problem.weight.device}\n"
              f"loss        {cfg.method}, beta {cfg.beta:g}, gamma {cfg.gamma:g}, anchor"
              f" {cfg.anchor or 0:g}; beta T omega up to {cfg.beta * problem.weight.max():.3g}\n"
              f"steps       {cfg.steps:,} of {cfg.batch} pairs by {cfg.optimizer} at {cfg.lr:.4g};"
              f" {cfg.micro_batch} at a time on {world} processes, {cfg.draws} draws each\n"
              f"epochs      {self.bar.total / n:.3g} of {n:,} pairs\n"
              f"out         {cfg.out}, from step {start}")
        versions = {name: metadata.version(name) for name in ("torch", "diffusers", "transformers")}
        write_json(self.file.with_name("config.json"), {
            "config": vars(cfg), "world_size": world, "python": sys.version, "versions": versions,
            "read_from": problem.sources})  # where they were cached: a hub's with their commit
        lines = self.file.read_text().splitlines(keepends=True) if self.file.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be torn
        self.rows = [row for row in rows if row["step"] < start]  # the others will come again
        with whole(self.file) as path:
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, row):
        """A row of metrics, of a step or (`held_out_...`) of an evaluation."""
        if rank_and_world()[0] > 0:
            return
        if "loss" in row:
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            self.bar.update(self.cfg.batch)
            self.bar.set_postfix_str(f"loss {row['loss']:.3f}", refresh=False)
            if row["step"] == 0:
                self.bar.write(f"step 0      loss {row['loss']:.4f} (for dpo, gamma 0: log 2)")
        else:
            self.bar.write(f"step {row['step']:<6}held-out accuracy {row['held_out_accuracy']:.3f}")
        self.rows.append(row)
        with open(self.file, "a") as file:
            file.write(json.dumps(row) + "\n")


class Noised:
    """A dataset of `pairs`, by (epoch, row), each with its t and eps."""

    def __init__(self, pairs, problem, seed, draws):
        self.pairs, self.seed, self.draws = pairs, seed, draws
        self.T, self.shape = len(problem.alphas_cumprod), problem.shape

    def __getitem__(self, key):
        t, eps = draw_noise(self.seed, *key, self.draws, self.T, self.shape)
        noise = {"t": t, "eps": eps, "epoch": key[0], "row": key[1]}
        return {"unreadable": ""} | self.pairs[key] | noise


def draw_picture(problem, path, rows, *measured):
    """Draws policy and reference by toy/figure.py, or says why not: it is not worth a run."""
    try:
        from toy import figure
        figure.draw(problem, path, rows, *measured)
        print(f"\nfigure      {path}")
    except Exception as error:
        print(f"\nno figure   {path}: {first_line(error)}")


def report_toy(toy, rows):
    """The end of a toy run: a table, a figure, and results.json."""
    cfg, out, (numbers, densities) = toy.cfg, Path(toy.cfg.out), toy.measure()
    print(f"\n\n{'mean reward':>27}{'entropy (nats)':>17}{'TV to p*':>12}")
    for name in densities:
        print(f"{name:12}{numbers[f'reward_{name}']:15.3f}{numbers[f'entropy_{name}']:17.3f}"
              f"{numbers[f'tv_{name}']:12.3f}")
    print(f"{'floor':44}{numbers['tv_floor']:12.3f}   (samples of p*; _ode: drawn by an ODE)")
    draw_picture(toy, out / "toy.png", rows, numbers, densities)
    held_out = {name: rows[-1][name] for name in rows[-1] if name.startswith("held_out_")}
    write_json(out / "results.json", numbers | held_out | vars(cfg))


# --------------------------------------------------------------------------- 9. The command line

def at_least(least, kind):
    """argparse's options for an int or a float of at least `least`."""
    def number(text):
        if not least <= (value := kind(text)) < 2**63:
            raise argparse.ArgumentTypeError(f"{text} is not at least {least:g}")
        return value
    return {"type": number, "metavar": "X"}


COUNT, SIZE, FACTOR = at_least(1, int), at_least(0, int), at_least(0, float)
TEXT, ON, NO = {"metavar": "X"}, {"action": "store_true"}, object()
PRESETS = ("toy", *HUB)
# argparse's options; defaults for PRESETS, the last one for the rest (NO: none); meaning (source)
FLAGS = {
    "method": ({"choices": ("dpo", "sft")}, "dpo", "sft: the baseline of paper 5.5"),
    "beta": (at_least(1e-9, float), 0.5, 2000.0, 5000.0, 100.0, "weight of the KL (paper 5.1)"),
    "gamma": (FACTOR, 0.0, "weight of the entropy; images: 0.01 to 0.05 beta (ours)"),
    "anchor": (FACTOR, 0.0, NO, "weight of what keeps both errors down, say 0.05"),
    "draws": (COUNT, 64, 1, "draws of (t, eps) per pair (paper)"),
    "data": (TEXT, NO, DEFAULT_DATA, "hub id, parquet or JSON file, or folder"),
    "split": (TEXT, NO, "train", "the pairs to train on; a part: train[:-500]"),
    "resolution": (at_least(8, int), NO, 512, 1024, "pixels a side (the models' own)"),
    "caption-dropout": (FACTOR, NO, 0.2, "share of pairs without caption (released code)"),
    "cache": (TEXT, NO, None, "folder for latents, computed once; no random crop and flip"),
    "workers": (SIZE, 0, 4, "processes that read images, per GPU (ours)"),
    "pairs": (COUNT, 200_000, NO, "how many pairs are made"),
    "prediction": ({"choices": ("epsilon", "flow")}, "epsilon", NO, "what networks output"),
    "proxy": (ON, False, NO, "label the pairs by a reward that errs, to see it hacked"),
    "seed": (SIZE, 0, "same seed, same --batch: same run"),
    "steps": (COUNT, 3000, 2000, 2000, 1000, "optimizer steps (released launchers)"),
    "batch": (COUNT, 32, 2048, 2048, 24, "pairs per step, all processes (paper 5.1)"),
    "micro-batch": (COUNT, 32, 4, 2, "pairs per forward and process (ours; or a divisor)"),
    "lr": (FACTOR, 3e-3, None, None, 3e-4, "peak rate [3e-3, falling; images: 2000/beta * 2.048e-5,"
           " sft: 2.048e-6 (paper's rule, code's scale); sd35: 3e-4, for adapters]"),
    "warmup": (SIZE, None, "steps of rising rate [1/4 (paper); toy: 1/20]"),
    "optimizer": ({"choices": ("adamw", "adafactor")}, *2 * ["adamw"], "adafactor", "adamw",
                  "(paper 5.1)"),
    "precision": ({"choices": ("bf16", "fp32")}, "fp32", None, "bf16 on a GPU (ours)"),
    "lora": (SIZE, NO, 0, 0, 32, "rank of adapters on the attention; 0: train all weights (paper)"),
    "checkpointing": ({"choices": ("on", "off")}, NO, "off", "on", "save memory (launchers)"),
    "compile": (ON, NO, False, False, NO, "torch.compile the transformer blocks"),
    "out": (TEXT, None, "folder; the same command goes on from there [runs/MODEL]"),
    "save-every": (COUNT, 500, 100, "steps between checkpoints; two are kept (ours)"),
    "sample-every": (SIZE, 0, 250, "steps between pictures of reference and policy (ours)"),
    "eval-every": (SIZE, 300, 0, "steps between evaluations; 0: none (ours)"),
    "eval-split": (TEXT, NO, None, "held-out pairs for these, such as train[-500:]"),
    "evaluate": (TEXT | {"nargs": "?", "const": ""}, None, "only judge, by policy X or --out's")}
FREE = "out save_every sample_every workers micro_batch evaluate eval_every eval_split".split()


def parse(argv=None, flags=FLAGS):
    """The command line as a namespace with every default settled. Raises Refusal."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s (--toy | --model MODEL) [flags]", description=__doc__.splitlines()[0],
        epilog="[defaults: toy, sd15, sdxl, sd35; the last one is for the rest, too] (their source:"
        " section of arXiv:2311.12908, or ours; toy: ours; sd35: ours, beta, lr, lora flow_grpo's)",
        allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=22, width=100))
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--toy", action="store_const", const="toy", dest="model", help="--model toy")
    group.add_argument("--model", metavar="X", help="sd15, sdxl, sd35, hub id or folder of such")
    for flag, (options, *defaults, meaning) in flags.items():
        shown = ", ".join("-" if default is NO else str(default) for default in defaults)
        meaning += f" [{shown}]" if not {"None", "False"} & set(shown.split(", ")) else ""
        parser.add_argument(f"--{flag}", **{"help": meaning} | options)

    def refuse(message):  # in one line, without argparse's usage
        raise Refusal(message)
    parser.error = refuse
    given = vars(parser.parse_args(argv))
    cfg = argparse.Namespace(preset=find_preset(given["model"]), **given)
    for flag, (_, *defaults, _) in flags.items():
        default = defaults[min(PRESETS.index(cfg.preset), len(defaults) - 1)]
        name = flag.replace("-", "_")
        if name in given and default is NO:
            raise Refusal(f"--{flag} means nothing to --model {cfg.model}")
        setattr(cfg, name, given.get(name, None if default is NO else default))
    world, toy = int(os.environ.get("WORLD_SIZE", 1)), cfg.preset == "toy"
    rate = 2.048e-6 if cfg.method == "sft" else 2000 / cfg.beta * 2.048e-5
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    for name, default in (("out", f"runs/{Path(cfg.model).name}"), ("lr", rate),
                          ("warmup", cfg.steps // (20 if toy else 4)), ("precision", precision)):
        if getattr(cfg, name) is None:
            setattr(cfg, name, default)
    cfg.decay = cfg.steps if toy else 0  # last steps, of falling rate
    if "micro_batch" not in given:
        cfg.micro_batch = math.gcd(cfg.batch // world, cfg.micro_batch)
    if cfg.batch % (world * cfg.micro_batch) and cfg.evaluate is None:
        raise Refusal(f"--batch {cfg.batch}: it should be a multiple of {world * cfg.micro_batch}")
    if not toy and cfg.resolution % 16:
        raise Refusal(f"--resolution {cfg.resolution}: it should be a multiple of 16")
    if cfg.preset == "sd35" and not cfg.lora and "lr" not in given and cfg.evaluate is None:
        raise Refusal("--lora 0: it needs --lr, as 3e-4 is for adapters")
    if not toy and cfg.eval_every and not cfg.eval_split:
        raise Refusal("--eval-every: it needs --eval-split, pairs that are not trained on")
    return cfg


def find_preset(model):
    """Which of PRESETS fits `model`: its pipeline says what it is, not its name."""
    if model in PRESETS:
        return model
    from diffusers import DiffusionPipeline
    try:
        return BUILDS[DiffusionPipeline.load_config(model)["_class_name"]]
    except Exception as error:  # the hub's errors have no common base class
        raise Refusal(f"--model {model}: it should be SD1.5, SDXL, SD3 or of their build, as"
                      f" diffusers stores it: {first_line(error)}") from error


def check_out(cfg):
    """Raises Refusal unless --out is new, empty, or this very run; to be judged, of this model."""
    out, names, no_run = Path(cfg.out), vars(cfg).keys() - FREE, (".partial", "evaluation.json")
    if not out.exists() or all(path.name.endswith(no_run) for path in out.iterdir()):
        return
    try:
        there = dict(json.loads((out / "config.json").read_text())["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refusal(f"--out {out}: holds no run; name a new folder") from error
    if cfg.evaluate is not None:
        names &= {"model", "beta", "gamma", "resolution", "lora"}
    differ = [f"{name} is {there.get(name)} there, {getattr(cfg, name)} here"
              for name in sorted(names) if there.get(name) != getattr(cfg, name)]
    if differ:
        raise Refusal(f"--out {out}: another run ({'; '.join(differ)}); name a new folder")


def make_problem(cfg, device):
    """The problem that cfg.model names, with its data."""
    if cfg.preset == "toy":
        return Toy(cfg)
    judging = cfg.evaluate is not None
    pairs = None if judging else ImagePairs(cfg, cfg.split)
    split = cfg.eval_split or (cfg.split if judging else None)
    held_out = ImagePairs(cfg, split) if split else None
    return StableDiffusion(cfg, device, load_pipeline(cfg.model), pairs, held_out)


def start_processes(gpu):
    """Under torchrun, joins the other processes. Returns the device of this one."""
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpu else "cpu")
    if gpu:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        # torchrun --max-restarts keeps its store: the prefix hides the addresses of dead processes.
        store, rank, world = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", store=store, rank=rank,
                                world_size=world)
    return device


@contextmanager
def command():
    """Around a command: what a user can mend is one line, exit code 2, and no traceback."""
    try:
        yield
    except (Refusal, OSError) as error:  # OSError: a folder not writable, a disk that is full
        # An image worker's Refusal comes with its story before it, perhaps to this process alone.
        _, alone, text = str(error).rpartition("Refusal: ")
        if alone or isinstance(error, OSError) or os.environ.get("LOCAL_RANK", "0") == "0":
            print("\nerror:", first_line(text), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # the training handles it by itself
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        print(f"\nerror: {first_line(error)} Less memory: --micro-batch 1, --checkpointing on,"
              " --optimizer adafactor, --lora 16.", file=sys.stderr)
        sys.exit(2)
    finally:  # image workers ignore signals: an exit after an error would wait for them for ever
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or the DataLoader complains of their end
        for worker in torch.multiprocessing.active_children():
            worker.kill()
    if dist.is_initialized():  # not after an error: it would wait for processes that are gone
        gather(None)  # gloo aborts if one process leaves while another is still at work
        dist.destroy_process_group()
        print(end="", flush=True)
        os._exit(0)  # without destructors: in 1 of 20 exits torch aborted in that of a thread


def main(argv=None):
    with command():
        cfg = parse(argv)
        check_out(cfg)
        device = start_processes(torch.cuda.is_available() and cfg.preset != "toy")
        problem = make_problem(cfg, device)
        if cfg.evaluate is not None:
            return report_evaluation(problem, cfg)
        rows = train(problem, cfg)
        if rank_and_world()[0] == 0 and cfg.preset == "toy":
            report_toy(problem, rows)


if __name__ == "__main__":
    main()
