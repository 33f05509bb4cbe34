"""Diffusion-DPO in one file: the loss, a toy whose answer is known, and training up to SD3.5.

    python diffusion_dpo.py --toy                                 # a laptop, about a minute
    torchrun --nproc_per_node 8 diffusion_dpo.py --model sdxl     # nearly the paper's (README)

Diffusion-DPO (Wallace et al., CVPR 2024, arXiv:2311.12908) fine-tunes a diffusion model on pairs of
images. Both images of a pair were made for the same prompt c; people preferred x_w and rejected
x_l. The model that is trained is called the policy. The reference is a frozen copy of its starting
point. The loss compares four denoising errors, two of the policy (e) and two of the reference (r):

    loss  = -log sigmoid(logit)
    logit = beta [(r_w - e_w) - (r_l - e_l)] - gamma (e_w - e_l)      gamma = 0: the paper's Eq. 14

    e   = T omega_t ||eps - eps_policy(x_t, t, c)||^2                 r: the same of the reference
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                     eps ~ N(0, 1)

T is the number of noise levels, t is one of them, and omega_t is its weight. In words: compared
with the reference, the error on x_w should fall more, or rise less, than the error on x_l.
Five steps lead there.

 1. Bradley-Terry: people prefer x_w with probability sigmoid(R(x_w) - R(x_l)), for some reward R.
 2. RLHF would fit R to the labels, and then train a policy for R. The best policy is
        p* = argmax_p  E_p[R] - beta KL(p || p_ref) + gamma H(p)
           = p_ref^(beta / (beta + gamma)) exp(R / (beta + gamma)) / Z(c)
    (set the derivative to 0). H is the entropy. DPO has gamma = 0. SEE-DPO (Shekhar et al., TMLR
    2025, arXiv:2411.04712) has gamma > 0, which flattens p_ref, as a remedy against overfitting.
 3. DPO reads this equation backwards. Every policy p_theta is the best one for the reward
        R = (beta + gamma) log p_theta - beta log p_ref + const(c),
    which is called its implicit reward. So the policy itself can be fitted to the labels, with this
    R in step 1. The constant cancels in R(x_w) - R(x_l).
 4. A diffusion model cannot compute log p. The ELBO, its training objective, is a lower bound:
        log p(x_0) >= const - E over t and eps of [T omega_t ||eps - eps_theta(x_t, t, c)||^2].
    We use the bound in place of log p, for the policy and for the reference. This is an
    approximation, since the gaps of the two bounds need not cancel.
 5. One draw of (t, eps) estimates the expectation: -e stands for log p_theta and -r for log p_ref.
    Put into R(x_w) - R(x_l) of step 3, they give the logit above. As -log sigmoid is convex, noise
    in the logit makes the mean loss too large (Jensen's inequality). The mean of several draws has
    less noise. Their number, --draws, is 1 in the paper and 64 in the toy.

    paper            here                     shape
    x_0^w, x_0^l     x_w, x_l                 (B, *shape)   preferred, rejected (SD: latents)
    t, eps           t, eps                   (B, K, ...)   K draws per pair, t in 0 .. T-1
    abar_t           alphas_cumprod[t]        (T,)          signal-to-noise: abar_t / (1 - abar_t)
    T omega_t        weight[t]                (T,)          toy: the ELBO's; images: 1 / (2d)
    e_w, r_w, ...    err_w, ref_err_w, ...    (B,)          weighted errors

In comments, the "released code" is the one that the paper's authors published (Salesforce's).
"""

import argparse
import fcntl
import functools
import glob
import hashlib
import importlib
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Literal, get_args

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, default_collate
from tqdm import tqdm

# diffusers, transformers, peft and datasets are imported where they are used: the toy starts fast.
PRECISION = "bf16" if torch.cuda.is_available() else "fp32"
WEIGHTS_FILE, LORA_FILE = "diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"


class UserError(Exception):
    """Something that the user can fix. The command prints it in one line and exits with code 2."""


# ------------------------------------------------------------------------------- 1. The loss

def dpo_loss(err_w, err_l, ref_err_w, ref_err_l, beta, gamma=0.0):
    """The loss of Diffusion-DPO (gamma = 0: Eq. 14) and of SEE-DPO (gamma > 0).

    The four errors are (B,) fp32 tensors; minus an error estimates log p + const. beta > 0 is the
    weight of the KL, gamma >= 0 that of the entropy. Returns the losses (B,) and the logits (B,).
    A logit is the implicit reward of x_w minus that of x_l.

    One pair by hand: errors 1.0 and 1.2, reference errors 1.1 and 1.0, beta = 2. On x_w the policy
    is better than the reference by 0.1, on x_l it is worse by 0.2. The logit is 2 (0.1 + 0.2) = 0.6
    and the loss is log(1 + e^-0.6) = 0.437. With gamma = 1 the logit is 0.6 - 1 (1.0 - 1.2) = 0.8.

    At step 0 the policy equals the reference. With gamma = 0 every logit is then 0 and every loss
    log 2 = 0.693. With gamma > 0 a margin gamma (r_l - r_w) is left, whatever the policy. For the
    pair above it is -0.1, so the loss at step 0 is log(1 + e^0.1) = 0.744.

    A loss of your own goes here, and nothing else has to change. IPO (arXiv:2310.12036, Eq. 17),
    with beta as its tau, would be: losses = (gain_w - gain_l - 1 / (2 * beta)) ** 2.
    Return the logits as well, because the metrics are made from them.
    """
    # Subtract these first: policy and reference nearly cancel, and beta can be in the thousands.
    gain_w = ref_err_w - err_w  # (B,)  estimates log p_theta(x_w) - log p_ref(x_w)
    gain_l = ref_err_l - err_l  # (B,)
    logit = beta * (gain_w - gain_l) - gamma * (err_w - err_l)

    # One loss per pair. The mean over the batch comes after the log-sigmoid, as in Eq. 14.
    return -F.logsigmoid(logit), logit


# --------------------------------------------------------------- 2. Noise, and the four errors
#
# train() takes a "task": Toy in part 3 or StableDiffusion in part 8. A task has
#   policy, reference        called as (x_t (N, *shape), t (N,), **cond) -> (N, *shape)
#   prediction               what they predict: "epsilon", "v_prediction", or "flow" (eps - x_0)
#   alphas_cumprod, weight, shape     (T,), (T,), and the shape of one x_0
#   pairs, held_out          pairs[epoch, row]: crop, flip and noise of a pair depend on both
#   encode(batch)            returns x_w, x_l (B, *shape), and cond, a dict of tensors (2B, ...)
#   content()                a dict with hashes; a run is resumed only if they have not changed
#   cfg, subfolder, save(folder), load(folder)   for part 5, which writes checkpoints

def elbo_weight(alphas_cumprod):
    """T omega_t (T,). With this weight, the error of one draw estimates minus the ELBO, in nats.

    The ELBO is a sum of KLs between Gaussians (DDPM, arXiv:2006.11239, Eq. 5). With the variance of
    Eq. 7, each is omega_t ||eps - eps_hat||^2, and omega_t = (SNR_{t-1} / SNR_t - 1) / 2.
    The term of t = 0 is a decoder. We choose its variance such that omega_0 = omega_1.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)  # (T,)
    omega = (snr[:-1] / snr[1:] - 1) / 2  # (T - 1,)
    return len(snr) * torch.cat([omega[:1], omega])

def seeded_generator(*key):
    """A random generator that depends only on `key`. (hash() would differ between processes.)"""
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(63))

def draw_noise(seed, epoch, row, draws, T, shape):
    """The noise of one pair in one epoch: t (K,) int64 and eps (K, *shape) fp32, with K = draws.

    Each t is uniform and each eps is normal. The K draws are not independent, so that their mean
    varies less: the t are evenly spaced from a random start, and each comes with eps and with -eps.
    """
    gen = seeded_generator(seed, "noise", epoch, row)
    half = (draws + 1) // 2
    start = torch.randint(T, (1,), generator=gen)
    t = (start + torch.arange(half) * T // half) % T  # (half,)
    eps = torch.randn(half, *shape, generator=gen)  # (half, *shape)
    return torch.cat([t, t])[:draws], torch.cat([eps, -eps])[:draws]

def signal_and_noise(abar_t, prediction):
    """a_t and s_t of x_t = a_t x_0 + s_t eps, fp32. A flow keeps the SNR, but has a_t + s_t = 1."""
    a_t, s_t = abar_t.sqrt(), (1 - abar_t).sqrt()
    total = a_t + s_t if prediction == "flow" else 1
    return (a_t / total).float(), (s_t / total).float()

def pair_errors(task, x_w, x_l, t, eps, cond):
    """err_w, err_l, ref_err_w, ref_err_l, (B,) fp32 each: what dpo_loss takes.

    x_w, x_l (B, *shape); t (B, K); eps (B, K, *shape); cond {name: (2B, ...)}, preferred first.
    """
    # Both images and all draws are one batch. The images of a pair share t and eps, as in the
    # released code (Eq. 14 has an eps for each). This takes noise out of the logit: in the toy its
    # standard deviation over draws is 1.32 like this, 2.44 if only t is shared, and 4.11 if nothing
    # is. The gamma term has no reference to cancel the size of errors at level t. As t is shared,
    # the other image does.
    B, K = t.shape
    x_0 = torch.cat([x_w, x_l]).repeat_interleave(K, 0)  # (2BK, *shape)
    cond = {name: value.repeat_interleave(K, 0) for name, value in cond.items()}  # (2BK, ...)
    t = t.flatten().repeat(2)  # (2BK,)
    eps = torch.cat([eps.flatten(0, 1)] * 2)  # (2BK, *shape)

    abar_t = task.alphas_cumprod[t].view(-1, *[1] * (x_0.dim() - 1))  # (2BK, 1, ...): a number each
    a_t, s_t = signal_and_noise(abar_t, task.prediction)
    x_t = a_t * x_0 + s_t * eps  # (2BK, *shape)

    # At a given x_t, an error in v (arXiv:2202.00512, App. D) or in a flow (arXiv:2403.03206) is
    # the error in eps divided by a_t. So one loss serves all three, up to the weight of a level t.
    targets = {"epsilon": eps, "v_prediction": a_t * eps - s_t * x_0, "flow": eps - x_0}
    target = targets[task.prediction]

    def errors(network):
        output = network(x_t, t, **cond)  # bf16 or fp32; target is fp32
        squared = (output - target).square().flatten(1).sum(1)  # fp32; in bf16 a logit errs by 0.6
        return (task.weight[t] * squared).view(2, B, K).mean(2)  # the mean over draws: (2, B)

    with torch.no_grad():  # the reference goes first, while no activations are held
        ref_err_w, ref_err_l = errors(task.reference)
    err_w, err_l = errors(task.policy)
    return err_w, err_l, ref_err_w, ref_err_l

def autocast(task):
    """Inside it, --precision bf16 computes in bf16. Trained weights stay fp32."""
    return torch.autocast(task.weight.device.type, torch.bfloat16, task.cfg.precision == "bf16")

def batch_errors(task, batch, draws, seed):
    """The four errors (B,) of a batch from the DataLoader, each pair with noise of its own.

    If there are more draws than in training, they take several forward passes. So evaluate() needs
    no more memory than training.
    """
    x_w, x_l, cond = task.encode(batch)
    keys = zip(batch["epoch"].tolist(), batch["row"].tolist(), strict=True)
    noise = [draw_noise(seed, epoch, row, draws, len(task.weight), task.shape)
             for epoch, row in keys]  # B tuples: t (K,), eps (K, *shape)
    t, eps = (each.to(x_w.device, non_blocking=True) for each in default_collate(noise))
    at_once = math.gcd(draws, task.cfg.draws)  # so that the parts are equal
    parts = zip(t.split(at_once, 1), eps.split(at_once, 1), strict=True)
    with autocast(task):
        errors = [pair_errors(task, x_w, x_l, *part, cond) for part in parts]
    return [torch.stack(means).mean(0) for means in zip(*errors, strict=True)]


# ---------------------------------------------------------- 3. The toy, whose answer is known
#
# The reference is a ring of eight Gaussians. With noise it is still eight Gaussians, so its best
# denoiser is known exactly. The reward is known too, and so is p*. The toy is not in the papers.

class Ring:
    """Eight Gaussians on a circle, and their exact denoiser."""

    angles = torch.arange(8) * math.pi / 4
    means = 2 * torch.stack([angles.cos(), angles.sin()], 1)  # (8, 2)
    std = 0.5

    def __init__(self, alphas_cumprod):
        self.alphas_cumprod = alphas_cumprod

    def log_prob(self, x):
        """log p_ref (N,) at x (N, 2), up to a constant."""
        distances = (x[:, None] - self.means).square().sum(-1)  # (N, 8)
        return (-distances / (2 * self.std**2)).logsumexp(1)

    def sample(self, n, gen):
        modes = torch.randint(8, (n,), generator=gen)
        return self.means[modes] + self.std * torch.randn(n, 2, generator=gen)

    def __call__(self, x_t, t):
        """E[eps | x_t] (N, 2). It is minus the gradient of log p_t(x_t), times sqrt(1 - abar_t)."""
        abar_t = self.alphas_cumprod[t][:, None]  # (N, 1)
        variance = abar_t * self.std**2 + 1 - abar_t  # (N, 1), of each mode with its noise
        away = x_t[:, None] - abar_t[..., None].sqrt() * self.means  # (N, 8, 2)
        share = (-away.square().sum(-1) / (2 * variance)).softmax(1)  # (N, 8)
        return (1 - abar_t).sqrt() * (share[..., None] * away).sum(1) / variance


class ToyPolicy(nn.Module):
    """The reference plus a small network, which starts at zero."""

    def __init__(self, ring, seed, width=128):
        super().__init__()
        self.ring = ring
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Linear(3, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x_t, t):
        log_snr = self.ring.alphas_cumprod[t][:, None].logit()  # torch's logit: log(a / (1 - a))
        correction = self.net(torch.cat([x_t, log_snr / 4], 1))  # / 4: about the size of x_t
        return self.ring(x_t, t) + correction

def toy_reward(x):
    """The true reward (N,) at x (N, 2): a hill of height 2 on the right side of the ring."""
    distances = (x - torch.tensor([2.0, 0.0])).square().sum(-1)
    return 2 * torch.exp(-distances / (2 * 1.5**2))


class ToyPairs:
    """n pairs of samples from the reference, labelled by Bradley-Terry."""

    def __init__(self, ring, n, seed, reward=toy_reward):
        gen = seeded_generator(seed, "toy pairs")
        x_0, x_1 = ring.sample(2 * n, gen).chunk(2)  # (n, 2) each
        prefers_0 = torch.rand(n, generator=gen) < torch.sigmoid(reward(x_0) - reward(x_1))
        self.x_w = torch.where(prefers_0[:, None], x_0, x_1)
        self.x_l = torch.where(prefers_0[:, None], x_1, x_0)

    def __len__(self):
        return len(self.x_w)

    def __getitem__(self, key):
        epoch, row = key
        return {"epoch": epoch, "row": row, "unreadable": 0.0,  # only images can be (part 7)
                "x_w": self.x_w[row], "x_l": self.x_l[row]}


class Toy:
    """The toy as a task, with T = 100 levels, linear in log SNR. toy/study.py has other rings."""

    subfolder = "policy"  # of --out, for the weights
    prediction, shape = "epsilon", (2,)

    def __init__(self, cfg, ring=None, reward=toy_reward):
        self.cfg, self.reward = cfg, reward
        self.reference = ring or Ring(torch.sigmoid(torch.linspace(8, -6, 100)))
        self.policy = ToyPolicy(self.reference, cfg.seed)
        self.alphas_cumprod = self.reference.alphas_cumprod
        self.weight = elbo_weight(self.alphas_cumprod)  # so the errors are in nats
        self.pairs = ToyPairs(self.reference, 200_000, cfg.seed, reward)
        self.held_out = ToyPairs(self.reference, 5000, "held out")  # always by the true reward

    def log_optimum(self, x):
        """log p* (N,) at x (N, 2), in closed form and up to a constant."""
        beta, gamma = self.cfg.beta, self.cfg.gamma
        return (beta * self.reference.log_prob(x) + self.reward(x)) / (beta + gamma)

    def content(self):
        return {}  # data and weights follow from the settings

    def encode(self, batch):
        return batch["x_w"], batch["x_l"], {}

    def save(self, folder):
        folder.mkdir(parents=True)
        save_file(self.policy.state_dict(), folder / WEIGHTS_FILE)

    def load(self, folder):
        self.policy.load_state_dict(load_file(folder / WEIGHTS_FILE))


# --------------------------------------------------------------------------- 4. The training loop

METRICS = ("loss", "reward_accuracy", "reward_margin", "logit_square",
           "err_policy_w", "err_policy_l", "err_ref_w", "err_ref_l", "unreadable")

def metric_sums(batch, losses, logit, errors):
    """The sums (9,) over the pairs of a micro-batch, in the order of METRICS."""
    unreadable = batch["unreadable"].to(logit)  # (B,): 1 for a blank pair, else 0
    correct = (logit.sign() + 1) / 2  # a tie is half correct: 1/2 at step 0, not 0
    values = torch.stack([losses, correct, logit, logit**2, *errors]) * (1 - unreadable)
    return torch.cat([values, unreadable[None]]).detach().sum(1)

def mean_metrics(sums, n):
    """The sums of METRICS over n pairs as a row of metrics.jsonl: means, and a count."""
    *sums, unreadable = sums.tolist()  # here the CPU waits for the GPU
    readable = max(1, n - unreadable)
    row = {name: total / readable for name, total in zip(METRICS[:-1], sums, strict=True)}
    variance = row.pop("logit_square") - row["reward_margin"] ** 2
    return row | {"logit_std": max(0.0, variance) ** 0.5, "unreadable": unreadable}

def dpo_step(task, batch, cfg):
    """Errors, loss and backward of one micro-batch. Returns its metric_sums."""
    errors = batch_errors(task, batch, cfg.draws, cfg.seed)
    losses, logit = dpo_loss(*errors, cfg.beta, cfg.gamma)
    if cfg.method == "sft":  # the baseline: denoise x_w; all else is for the metrics
        losses = 2 * errors[0]  # for images, the 2 cancels the 1/2 in the weight (part 8)

    losses = losses * (1 - batch["unreadable"].to(losses))  # a blank pair teaches nothing
    # Divided by the whole batch, the gradients add up to that of the batch's mean loss.
    (losses.sum() / cfg.batch).backward()
    return metric_sums(batch, losses, logit, errors)

def micro_batch_keys(n, cfg, first_step, rank, world):
    """The (epoch, row) of the pairs in each micro-batch of one process.

    In one endless sequence, pair number i is in epoch i // n, at place i % n of its shuffle. Step s
    takes the `batch` numbers from s * batch on. So it has the same data on any number of processes
    and after any restart.
    """
    @functools.lru_cache(maxsize=4)
    def order(epoch):
        return torch.randperm(n, generator=seeded_generator(cfg.seed, "order", epoch)).tolist()
    for step in range(first_step, cfg.steps):
        for offset in range(rank * cfg.micro_batch, cfg.batch, world * cfg.micro_batch):
            first = step * cfg.batch + offset  # the processes take micro-batches in turn
            numbers = range(first, first + cfg.micro_batch)
            yield [(i // n, order(i // n)[i % n]) for i in numbers]

def learning_rate(step, cfg):
    """Rises over the share cfg.warmup of the steps, falls over the share cfg.decay at the end."""
    rising = (step + 1) / max(1, round(cfg.warmup * cfg.steps))
    falling = (cfg.steps - step) / max(1, round(cfg.decay * cfg.steps))
    return cfg.lr * min(1, rising, falling)

def train(task, cfg, micro_step=dpo_step):
    """Train task.policy, or go on with the run in cfg.out. Returns the rows of metrics.jsonl.

    Another method is another micro_step. Raises UserError, and SystemExit after Ctrl-C or SIGTERM.
    """
    rank, world = rank_and_world()
    parameters = [p for p in task.policy.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, cfg)
    run = Run(task, cfg, optimizer)  # part 5: resumes, saves, evaluates, logs
    keys = micro_batch_keys(len(task.pairs), cfg, run.first_step, rank, world)
    batches = iter(load_batches(task.pairs, keys, cfg))
    try:
        for step in range(run.first_step, cfg.steps):
            run.save_and_evaluate(step)  # if it is due
            began = time.perf_counter()

            # Add up the gradient of a batch: over micro-batches, then over processes.
            optimizer.zero_grad()
            sums = torch.zeros(len(METRICS), device=task.weight.device)
            for _ in range(cfg.batch // (cfg.micro_batch * world)):
                sums += micro_step(task, next(batches), cfg)
                run.stop_if_asked(step)
            for tensor in [sums] + [p.grad for p in parameters if p.grad is not None]:
                all_reduce(tensor)

            # Update the policy.
            lr = optimizer.param_groups[0]["lr"] = learning_rate(step, cfg)
            grad_norm = nn.utils.clip_grad_norm_(parameters, 1.0).item()  # 1.0: released code
            row = {"step": step, "grad_norm": grad_norm, "lr": lr} | mean_metrics(sums, cfg.batch)
            run.check(row)  # no update with a NaN
            optimizer.step()
            row["pairs_per_s"] = cfg.batch / (time.perf_counter() - began)
            run.log(row)
        run.save_and_evaluate(cfg.steps)
    finally:
        run.close()
    return run.rows


# ------------------------------------------ 5. Around the loop: processes, checkpoints, metrics

def rank_and_world():
    """The number of this process, and how many processes there are."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1

def is_main():
    """True on process 0, which writes the files and speaks for all."""
    return rank_and_world()[0] == 0

def print_once(message):
    if is_main():
        print(message)

def all_reduce(tensor):
    """Sum a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)

def gather(value):
    """[value of process 0, value of process 1, ...]. It goes over the CPU, so no GPU waits."""
    values = [value] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values

def check_on_main(check, *inputs):
    """Let process 0 alone call check(*inputs). If it raises a UserError, all processes raise it."""
    error = None
    if is_main():
        try:
            check(*inputs)
        except UserError as found:
            error = found
    error = gather(error)[0]
    if error:
        raise error

def start_processes(use_gpu, precision="fp32"):
    """Join the other processes if torchrun started this one. Returns the device of this process.

    Raises UserError if there are fewer GPUs than processes, or if they lack the precision.
    """
    number = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(f"cuda:{number}" if use_gpu else "cpu")
    if use_gpu:
        if number >= torch.cuda.device_count():
            raise UserError("--nproc_per_node: it should be at most the number of GPUs here,"
                            f" {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
        if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError("--precision bf16: this GPU cannot do it; use --precision fp32")
    if "RANK" in os.environ:
        # After a restart torchrun's store still lists the ended processes. A prefix hides them.
        store, rank, world = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpu else "gloo", store=store,
                                rank=rank, world_size=world,
                                timeout=timedelta(hours=1))  # process 0 may draw pictures for long
    return device

def ignore_signals(worker):
    """For worker processes: the processes that train decide when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def load_batches(pairs, keys, cfg):
    """Batches of pairs, one for each list in `keys`, read ahead by worker processes."""
    return DataLoader(pairs, batch_sampler=keys, num_workers=min(cfg.workers, os.cpu_count()),
                      worker_init_fn=ignore_signals, pin_memory=torch.cuda.is_available())

def make_optimizer(parameters, cfg):
    """AdamW or Adafactor, with the settings of the released launchers."""
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=0.01, fused=True)
    # torch has an Adafactor too, but that one scales the learning rate by the size of the weights.
    from transformers.optimization import Adafactor
    return Adafactor(parameters, lr=cfg.lr, weight_decay=0.01, clip_threshold=1.0,
                     scale_parameter=False, relative_step=False)

def one_line(error):
    """The messages of an error and of its cause in one line, or its type if it has no message."""
    words = " ".join(f"{error} {error.__cause__ or ''}".split())  # datasets has it in the cause
    shown = [c if c.isprintable() else "?" for c in words]  # a path may have a terminal's codes
    return "".join(shown)[:400] or type(error).__name__

@contextmanager
def blame(what):
    """Turn any error of a with-block into a UserError that begins with `what`, such as a flag."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):  # these are clear as they are
        raise
    except Exception as error:  # the errors of the libraries have no common base class
        raise UserError(f"{what}: {one_line(error)}") from None

def hash_of(value):
    """16 hex digits, which change if any part of the value changes."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]

def hash_of_files(files):
    """A hash of the names and contents of files, whatever their folder and their order."""
    found = []
    for file in sorted(filter(Path.is_file, files)):
        with open(file, "rb") as opened:
            found.append((file.name, hashlib.file_digest(opened, "sha256").hexdigest()))
    return hash_of(found)

@contextmanager
def atomic_write(path):
    """Yield a path to write a file or folder at, and rename it in the end. Raises UserError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # if an earlier process died while it wrote
    with blame(f"{path}"):  # torch and safetensors have errors of their own for a full disk
        yield partial
        for file in [partial, *partial.rglob("*")]:  # onto the disk, before the name changes
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        shutil.rmtree(path, ignore_errors=True)  # a folder must go first; a file is replaced
        partial.replace(path)

def write_json(path, content):
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")

def lock_folder(out):
    """Raise UserError if another process is at work in `out`. The lock ends with this process."""
    out.mkdir(parents=True, exist_ok=True)
    lock_folder.file = open(out / ".lock", "w")  # it stays open: closing it unlocks it
    try:
        fcntl.lockf(lock_folder.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--out {out}: another run is at work in it") from None

def save_checkpoint(out, task, optimizer, step):
    """Write out/checkpoint-STEP, and keep only the two that were written last."""
    if is_main():
        with atomic_write(out / f"checkpoint-{step:08d}") as folder:
            task.save(folder / task.subfolder)
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        # Sort by time, not by step: a torn checkpoint may have a higher step.
        outdated = sorted(out.glob("checkpoint-[0-9]*"), key=os.path.getmtime)[:-2]
        for old in [*outdated, *out.glob(".checkpoint-*.partial")]:
            shutil.rmtree(old)
    gather(None)  # the others wait here

def load_checkpoint(out, task, optimizer):
    """Load the whole checkpoint of the highest step, and return that step.

    Without any checkpoint it returns 0. Raises UserError if none can be read.
    """
    found = sorted(out.glob("checkpoint-[0-9]*"), reverse=True)
    folders = gather(found)[0]  # a shared disk may show them late to other processes
    for folder in folders:
        try:
            saved = torch.load(folder / "optimizer.pt", "cpu", weights_only=True, mmap=True)
            task.load(folder / task.subfolder)
            optimizer.load_state_dict(saved)
            return int(folder.name.removeprefix("checkpoint-"))
        except Exception as error:  # a torn file raises anything
            print_once(f"WARNING     {folder} is passed over: {one_line(error)}")
    if folders:
        raise UserError(f"--out {out}: none of its checkpoints can be read")
    return 0


class Run:
    """Resumes, logs, saves, evaluates and stops a run. Only process 0 writes files."""

    def __init__(self, task, cfg, optimizer):
        self.task, self.cfg, self.out = task, cfg, Path(cfg.out)
        self.content = task.content()  # hashes of the data and the weights
        check_on_main(check_out, cfg, self.content)  # part 9: refuses the folder of another run
        check_on_main(lock_folder, self.out)
        self.save = functools.partial(save_checkpoint, self.out, task, optimizer)
        self.first_step = load_checkpoint(self.out, task, optimizer)
        self.check_processes()
        self.unreadable, self.rows = 0, []
        if is_main():
            self.announce()
            self.read_rows()
        self.bar = tqdm(initial=self.first_step, total=cfg.steps, unit=" steps", ncols=99,
                        disable=not is_main())

        # From now on Ctrl-C and SIGTERM are only noted. The loop stops at the next micro-batch.
        self.signals = []
        self.old_handlers = {
            number: signal.signal(number, lambda got, frame: self.signals.append(got))
            for number in (signal.SIGINT, signal.SIGTERM)}

    def announce(self):
        """Say what will be done, on the screen and in config.json."""
        cfg = self.cfg
        epochs = cfg.steps * cfg.batch / len(self.task.pairs)
        print(f"run         {cfg.method} of {cfg.model}, in {cfg.out} from step {self.first_step}\n"
              f"steps       {cfg.steps:,} of {cfg.batch} pairs ({cfg.micro_batch} at a time),"
              f" {epochs:.3g} epochs; {cfg.optimizer} at {cfg.lr:.4g}, {cfg.precision}")
        if epochs > 20:
            print(f"WARNING     {epochs:.0f} epochs; the paper's run has 4.8. Lower --steps?")
        write_json(self.out / "config.json", {"config": asdict(cfg) | self.content})

    def check_processes(self):
        """Raise UserError unless all processes have the same step, data, model and weights."""
        hashes = self.content | {"sources": None}  # machines may have the files in other places
        weights = [p.flatten()[0].item() for p in self.task.policy.parameters()]  # a number of each
        here = [self.first_step, hashes, weights]
        if any(there != here for there in gather(here)):
            raise UserError(f"--out {self.out}: all processes should share it, as one folder on one"
                            " disk, and have the same --model and --data")

    def read_rows(self):
        """Keep the rows of metrics.jsonl for the steps done before. Later ones are redone."""
        path = self.out / "metrics.jsonl"
        path.touch()
        lines = path.read_text().splitlines()
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be torn
        self.rows = [row for row in rows if row["step"] < self.first_step]
        with atomic_write(path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def is_due(self, every, step):
        """True every `every` steps and at the end; never if `every` is 0."""
        return every > 0 and step > 0 and (step % every == 0 or step == self.cfg.steps)

    def save_and_evaluate(self, step):
        """Save, plot and evaluate the policy after `step` steps, if it is due."""
        cfg = self.cfg
        if self.is_due(cfg.save_every, step) and step > self.first_step:
            self.save(step)
        if self.is_due(cfg.sample_every, step) and is_main():
            save_picture(self.task, self.out / "samples" / f"step-{step:08d}.png", self.rows)
        if self.is_due(cfg.eval_every, step):
            numbers = evaluate(self.task)
            self.log({"step": step} | {f"held_out_{name}": numbers[name] for name in numbers})
        if step == cfg.steps and is_main():
            with atomic_write(self.out / self.task.subfolder) as folder:
                self.task.save(folder)

    def leave(self, step, error):
        """End the run before its time, with its steps saved."""
        if step > self.first_step:
            self.save(step)
        raise error

    def stop_if_asked(self, step):
        """Leave after Ctrl-C or SIGTERM, on all processes if one of them got it."""
        number = max(gather(max(self.signals, default=0)))  # of any process; 0 if there was none
        if number:
            print_once(f"\nSignal {number}: saving step {step}. The same command resumes there.")
            self.leave(step, SystemExit(128 + number))

    def check(self, row):
        """Leave if this step should not be taken: after a NaN, or too many unreadable pairs."""
        step = row["step"]
        self.unreadable += row["unreadable"]
        if self.unreadable > max(1, (step + 1 - self.first_step) * self.cfg.batch / 100):
            self.leave(step, UserError(f"--data {self.cfg.data}: over 1% of it is unreadable"))
        if not math.isfinite(row["loss"] + row["grad_norm"]):
            self.leave(step, UserError(f"--lr {self.cfg.lr:g}: too high? Step {step} has {row}"))

    def log(self, row):
        """Add a row, of a step or of an evaluation, to metrics.jsonl and to the screen."""
        if not is_main():
            return
        if "loss" in row:
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30  # 0 on a CPU
            self.bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
            self.bar.update()
        else:
            self.bar.write(f"step {row['step']}: accuracy {row['held_out_reward_accuracy']:.3f}")
        self.rows.append(row)
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def close(self):
        """Let Ctrl-C and SIGTERM do again what they did before."""
        self.bar.close()
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)


def report_toy(task, rows):
    """Let toy/distance.py print how near the policy is to p*."""
    try:
        from toy import distance
        distance.report_toy(task, rows)
    except ImportError as error:  # this file is used without toy/
        print(f"WARNING     no table of the toy: {error}")

def save_picture(task, path, rows, *measured):
    """Let toy/figure.py plot reference and policy. `measured` is from distance.measure_toy()."""
    try:
        from toy import figure
        figure.draw(task, path, rows, *measured)
    except Exception as error:
        print(f"\nWARNING     no figure {path}: {one_line(error)}")


# ------------------------------------------------------------------- 6. How good is the policy?

HELD_OUT = -1  # stands in for the epoch of pairs that are never trained on
EVAL_DRAWS = 10  # draws of (t, eps) per held-out pair (paper, section 5.5)

@torch.no_grad()
def evaluate(task):
    """The metrics of the loop on task.held_out. The noise is the same for every policy.

    reward_accuracy is how good a judge the policy is (paper, section 5.5 and Tab. 2).
    """
    cfg, n = task.cfg, len(task.held_out)
    rank, world = rank_and_world()
    keys = [(HELD_OUT, row) for row in range(rank, n, world)]
    size = cfg.micro_batch * max(1, cfg.draws // EVAL_DRAWS)  # no more x_t than in training
    batches = load_batches(task.held_out, BatchSampler(keys, size, drop_last=False), cfg)

    sums = torch.zeros(len(METRICS), dtype=torch.float64)
    for batch in tqdm(batches, "evaluate", ncols=99, leave=False, disable=rank > 0):
        errors = batch_errors(task, batch, EVAL_DRAWS, "held out")
        losses, logit = dpo_loss(*errors, cfg.beta, cfg.gamma)
        sums += metric_sums(batch, losses, logit, errors).double().cpu()
    all_reduce(sums)
    if sums[-1] == n:
        raise UserError(f"--eval-split {cfg.eval_split}: none of its pairs can be read")
    return mean_metrics(sums, n)

def load_weights(task, named):
    """Load the weights of a folder, a checkpoint, or an ended run. Raises UserError."""
    folder = Path(named, task.subfolder)
    folder = folder if folder.exists() else Path(named)
    with blame(f"{folder}: it cannot be loaded into --model"):
        task.load(folder)
    return folder


# ------------------------------------------------------------------------- 7. Preference data

DEFAULT_DATA = "data-is-better-together/open-image-preferences-v1-binarized"  # Apache-2.0

# Known columns: prompt, two images, label of the first one (None: the first one is preferred).
FORMATS = [
    ("caption", "jpg_0", "jpg_1", "label_0"),   # Pick-a-Pic
    ("prompt", "chosen", "rejected", None),     # open-image-preferences-v1-binarized
    ("prompt", "path1", "path2", None),         # HPDv3
    ("prompt", "preferred", "rejected", None),  # your own pairs.jsonl
    ("prompt", "latents", "embeddings", "label"),  # encoded ahead, by toy/encode.py
]

def root_of(data):
    """The folder where the image paths in --data begin."""
    return Path(data).parent if Path(data).is_file() else Path(data)

def find_files(data, split):
    """The files of one split of a local --data. Raises ValueError.

    A single file is "train". In a folder, "test" is the files whose names, or whose folders' names,
    begin with "test". "train" is all files except those that are named for another split.
    """
    if Path(data).is_file() and split == "train":
        return [Path(data)]

    def is_named(file, names):
        return re.match(rf"(.*/)?({names})[-_./]", file.relative_to(data).as_posix())

    found = sorted(Path(data).rglob("*.parquet"))
    found += Path(data).glob("pairs.jsonl")
    others = "test|val|valid|validation|dev|eval"
    files = [file for file in found
             if is_named(file, split) or split == "train" and not is_named(file, others)]

    # Files such as train-00000-of-00003.parquet form a set. Count the files of each set.
    names = "\n".join(str(file) for file in files)
    for (name, of), there in Counter(re.findall(r"(.+)-\d+-of-(\d+)\.", names)).items():
        if there < int(of):
            raise ValueError(f"only {there} of the {int(of)} files {name}-*-of-{of} are there")
    return files

def read_json(file):
    """Read a JSON list of objects, or one object per line: {column: values}. Raises ValueError."""
    content = file.read_bytes()
    if content.lstrip().startswith(b"["):
        rows = json.loads(content)
    else:
        rows = []
        for number, line in enumerate(content.split(b"\n"), 1):
            with blame(f"{file}, line {number}"):
                rows += [json.loads(line)] if line.strip() else []
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is {row!r}; it should be an object, in braces")
    return {name: [row.get(name) for row in rows] for name in set().union(*rows)}

def load_table(data, split):
    """Read a whole split: {column: values} from JSON files, a datasets.Dataset from all others.

    Raises ValueError, and errors of datasets.
    """
    import datasets
    if not Path(data).exists():
        if data.count("/") != 1:
            raise ValueError("there is no such file or folder, and a hub id has one /")
        # In memory, a table would not tell where it comes from.
        return datasets.load_dataset(data, split=split, keep_in_memory=False)
    files = find_files(data, split)
    kinds = [file.suffix for file in files]
    if kinds in ([".json"], [".jsonl"]):
        return read_json(files[0])
    if set(kinds) != {".parquet"}:
        raise ValueError(f"split {split} is {kinds}; it should be .parquet, or one .json or .jsonl")

    # datasets copies the files once, and later finds its copy by their paths and dates. A program
    # can set dates. So we name the copy by the sizes and by the ctimes, which no program can set.
    state = [(file.stat().st_size, file.stat().st_ctime_ns) for file in files]
    names = [glob.escape(os.path.abspath(file)) for file in files]  # else [1] is a pattern
    return datasets.load_dataset("parquet", hash_of(state), data_files=names, split="train")

def base_of(split):
    """The name of a split without its slice: "train" of "train[:-100]"."""
    return re.match(r"\w*", split)[0]

def load_pairs(data, split):
    """A split of --data as a table with the columns prompt, first, second, label and row.

    first and second are images, as image_bytes takes them. A label is 1 if the first is preferred,
    0 if the second is, and 0.5 or None if neither is. row is the place in the whole split, such as
    "7 of train". In a set encoded ahead, first and second name the files of the pair's latents and
    of the prompt's embeddings. Raises UserError.
    """
    import datasets
    with blame(f"--data {data}"):
        base = base_of(split)
        table = load_table(data, base)
        names = list(getattr(table, "column_names", table))  # of a dict: its keys
        fitting = [each for each in FORMATS if set(each) - {None} <= set(names)]
        if not fitting:
            raise ValueError(f"columns {names}; they should hold one of {FORMATS}")
        *columns, label = fitting[0]
        captions = table[columns[0]][:]
        for row, caption in enumerate(captions):
            if not isinstance(caption, str | None):
                raise ValueError(f"row {row} has the caption {caption!r}; it should be text")

        labels = table[label][:] if label else [1] * len(captions)
        for value in set(labels) - {0, 0.5, 1, None}:
            raise ValueError(f"{label} holds {value!r}; it should be 0, 0.5 or 1")
        if label and {"label_1", "has_label"} <= set(names):  # one label is 1, the other 0
            marks = zip(labels, table["label_1"], table["has_label"], strict=True)
            labels = [a if has_label and {a, b} == {0, 1} else None for a, b, has_label in marks]

        if isinstance(table, dict):
            table = datasets.Dataset.from_dict({name: table[name] for name in columns})
        for column in columns[1:]:
            if column not in ("latents", "embeddings"):  # these are names of files
                table = table.cast_column(column, datasets.Image(decode=False))
        new_names = dict(zip(columns, ["prompt", "first", "second"], strict=True))
        table = table.select_columns(columns).rename_columns(new_names)
        rows = [f"{row} of {base}" for row in range(len(labels))]
        table = table.add_column("label", labels).add_column("row", rows)
        # The rows have their numbers before a part is taken, so parts can be compared.
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({base: len(labels)})
        return table.select([row for part in parts for row in range(part.from_, part.to)])

def image_bytes(value, root):
    """The bytes of an image from {"bytes": ..., "path": ...}, where a path begins in `root`.

    Raises OSError, and ValueError for a file outside of `root`.
    """
    if value["bytes"]:
        return value["bytes"]
    # The list may be a stranger's, so its paths should not leave `root`. A link in `root` may.
    file = Path(os.path.abspath(root / value["path"]))  # this removes .. but follows no link
    if not (file.is_relative_to(os.path.abspath(root))
            or file.resolve().is_relative_to(root.resolve())):  # `root` may be reached by a link
        raise ValueError(f"{file} is not in the folder of the data")
    return file.read_bytes()

def read_image(value, root):
    """An upright RGB image of image_bytes(value, root).

    The data may come from a stranger. Raises PIL's errors for an image that cannot be read, and
    ValueError for one that is refused: outside of `root`, too small or large, or of an odd mode.
    """
    file = BytesIO(image_bytes(value, root))
    image = Image.open(file, formats=("JPEG", "PNG", "WEBP"))  # some other formats start programs
    short, long = sorted(image.size)
    if short < 8 or short * long > 2**25 or image.mode[0] in "IF":  # PIL would clip I and F
        raise ValueError(f"{image.width} x {image.height} pixels of mode {image.mode}")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")

def crop_square(image, size, u, v, flip):
    """Pixels (3, size, size) uint8. The short side becomes `size`; u, v in 0..1 place the crop."""
    image = ImageOps.mirror(image) if flip else image
    image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR, centering=(u, v))
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)


class ImagePairs:
    """The pairs in a split of --data, without its ties. Images are decoded when asked for."""

    encoded = False  # True for EncodedPairs of toy/encode.py

    def __init__(self, cfg, split, whole):
        decided = [row for row, label in enumerate(whole["label"]) if label in (0, 1)]
        if not decided:
            raise UserError(f"--data {cfg.data}: no pair of split {split} has a preference")
        self.cfg, self.root, self.table = cfg, root_of(cfg.data), whole.select(decided)
        self.source = whole.cache_files  # if it is from the hub, their paths name the revision
        print_once(f"data        {cfg.data}, {split}: {len(self):,} pairs;"
                   f" {len(whole) - len(self):,} ties or unlabelled ones dropped")

    def content(self):
        """A hash of all captions and labels, and of the images of at most 1,000 pairs."""
        found = [self.table["prompt"][:], self.table["label"][:]]
        for row in range(0, len(self), math.ceil(len(self) / 1000)):
            for side in ("first", "second"):
                with suppress(Exception):  # training reports an unreadable image
                    found.append(hash_of(image_bytes(self.table[row][side], self.root)))
        return hash_of(found)

    def __len__(self):
        return len(self.table)

    def read(self, item, prompt, u, v, flip):
        """The images of a pair, preferred first. u, v and flip are those of crop_square()."""
        sides = ["first", "second"] if item["label"] else ["second", "first"]
        images = [read_image(item[side], self.root) for side in sides]
        images = [crop_square(image, self.cfg.resolution, u, v, flip) for image in images]
        return {"images": torch.stack(images), "prompt": prompt}  # (2, 3, H, W) uint8

    def blank(self):
        """Black images without a prompt, in place of a pair that cannot be read."""
        size = self.cfg.resolution
        return {"images": torch.zeros(2, 3, size, size, dtype=torch.uint8), "prompt": ""}

    def __getitem__(self, key):
        """What read() returns, with epoch and row. An unreadable pair is reported and is blank().

        "unreadable" is then 1, and training leaves the pair out.
        """
        epoch, row = key
        item = self.table[row]

        # Crop, flip and dropped caption are the same for both images, as their noise is. (The
        # released code flips each image alone, and its launchers crop the centre.)
        gen = seeded_generator(self.cfg.seed, "augment", epoch, row)
        u, v, as_is, keep = torch.rand(4, generator=gen).tolist()
        if epoch == HELD_OUT:  # the centre, not flipped, with its caption
            u, v, as_is, keep = 0.5, 0.5, 1, 1
        prompt = "" if keep < self.cfg.caption_dropout else (item["prompt"] or "")

        unreadable = 0.0
        try:
            shown = self.read(item, prompt, u, v, as_is < 0.5)
        except Exception as error:  # decoders raise anything; it all means the same
            print(f"\nunreadable  row {item['row']}, {self.cfg.data}: {one_line(error)}")
            shown, unreadable = self.blank(), 1.0
        return shown | {"epoch": epoch, "row": row, "unreadable": unreadable}


def open_pairs(cfg, split):
    """A split of --data: images, or what toy/encode.py made of them. Raises UserError."""
    whole = load_pairs(cfg.data, split)
    if whole.features["first"].dtype != "string":  # not the name of a file
        return ImagePairs(cfg, split, whole)
    with blame(f"--data {cfg.data}"):
        from toy.encode import EncodedPairs
        return EncodedPairs(cfg, split, whole)


# ------------------------------------------------------------------------ 8. Stable Diffusion

HUB = {"sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
       "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
       "sd35": "stabilityai/stable-diffusion-3.5-medium"}
ENCODERS = "vae|text_encoder"
LORA_LAYERS = r".*\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"  # add: SD3's, for the text

def load_part(folder, name, library, kind):
    """Load part `name`, a library.kind, on the CPU. Raises ValueError and the libraries' errors."""
    # Files in half precision are read if there are no others.
    files = [file.name for file in Path(folder, name).glob("*.safetensors")]
    variant = "fp16" if files and all(".fp16" in file for file in files) else None
    # With ignore_mismatched_sizes, info names what does not fit. transformers' own error does not.
    part, info = getattr(importlib.import_module(library), kind).from_pretrained(
        folder, subfolder=name, variant=variant, use_safetensors=True, output_loading_info=True,
        ignore_mismatched_sizes=True)
    wrong = [*info["missing_keys"], *info["mismatched_keys"]]
    if wrong:  # the libraries leave random numbers in their place
        raise ValueError(f"weights are missing or of another shape: {wrong}")
    return part

def find_model(model):
    """The folder of --model. A hub id is downloaded, if it was not before. Raises UserError."""
    import diffusers
    if model in HUB and Path(model).exists():
        print_once(f"WARNING     --model {model} is {HUB[model]}. For the folder write ./{model}")
    folder = HUB.get(model, model)
    with blame(f"--model {model}"):
        if Path(folder).is_dir():
            return folder
        return diffusers.DiffusionPipeline.download(folder, use_safetensors=True,
                                                    safety_checker=None)

def load_pipeline(model, without=None):
    """The diffusers pipeline of --model, on the CPU. Raises UserError.

    `without` is a pattern for the names of parts that are left out, such as ENCODERS.
    """
    import diffusers
    import transformers
    for library in diffusers, transformers:
        library.utils.logging.set_verbosity_error()
    folder, parts = find_model(model), {"safety_checker": None}
    with blame(f"--model {model}"):
        for name, kind in diffusers.DiffusionPipeline.load_config(folder).items():
            if kind == [None, None] or without and re.match(without, name):
                parts[name] = None  # a folder may have no T5
            elif re.match(f"unet|transformer|{ENCODERS}", name):
                with blame(f"--model {model}: {name}"):  # the line names the part that is wrong
                    parts[name] = load_part(folder, name, *kind)
        return diffusers.DiffusionPipeline.from_pretrained(folder, **parts)

def read_schedule(pipe):
    """alphas_cumprod (T,) and what the network predicts. Raises UserError."""
    from diffusers import DDPMScheduler
    config = pipe.scheduler.config
    is_sd3 = "transformer" in pipe.components
    if is_sd3 and "shift" in config and not config.get("use_dynamic_shifting"):
        # SD3 takes the logit of s_t from a normal distribution (arXiv:2403.03206, section 3.1),
        # moved by log(shift). Our T levels are its quantiles, so a uniform t samples from it.
        T = config.num_train_timesteps
        quantiles = (torch.arange(T).double() + 0.5) / T
        logit_s_t = torch.special.ndtri(quantiles) + math.log(config.shift)
        return torch.sigmoid(-2 * logit_s_t), "flow"  # abar_t / (1 - abar_t) = ((1 - s_t) / s_t)^2
    schedule = DDPMScheduler.from_config(config)
    prediction = schedule.config.prediction_type
    if is_sd3 or "beta_start" not in config or prediction not in ("epsilon", "v_prediction"):
        raise UserError("--model: it should predict epsilon or v with DDPM's noise, or SD3's flow")
    return schedule.alphas_cumprod, prediction


def prepare_encoders(pipe, cfg, device):
    """Freeze the VAE and the text encoders of a pipeline, as far as it has them, and move them.

    Raises UserError for a VAE whose latents are not only scaled.
    """
    if pipe.vae and "XL" in type(pipe).__name__ and pipe.vae.config.latents_mean:
        raise UserError("--model: its VAE has latents_mean; this script knows SDXL's own VAE only")
    for name, part in pipe.components.items():
        if re.match(ENCODERS, name) and part:
            # Only the VAE stays in fp32: SDXL's overflows in fp16, and bf16 would round latents.
            half = cfg.precision == "bf16" and name != "vae"
            part.to(device, torch.bfloat16 if half else torch.float32).requires_grad_(False)
    if pipe.vae and cfg.resolution >= 512:
        pipe.vae.enable_slicing()  # image by image: one of this size keeps a GPU busy

def encode_images(pipe, images):
    """The latents (N, *shape) fp32 of images (N, 3, H, W) uint8."""
    vae = pipe.vae
    latents = vae.encode(images / 127.5 - 1).latent_dist.mode()  # the released code samples
    shift = vae.config.shift_factor or 0.0  # SD3's
    return (latents - shift) * vae.config.scaling_factor  # the pipelines undo this

def encode_prompts(pipe, prompts, resolution):
    """What the network takes besides x_t and t, for B prompts: {name: (B, ...)}."""
    device = pipe.text_encoder.device
    is_sd3 = "transformer" in pipe.components
    others = [None, None] if is_sd3 else []  # SD3's other two encoders get the same prompts
    prompt, _, *rest = pipe.encode_prompt(
        prompts, *others, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    if is_sd3:
        return {"prompt": prompt, "pooled_projections": rest[0]}
    if not rest:  # SD1.5 has no pooled embedding
        return {"prompt": prompt}
    pooled = rest[0]  # SDXL
    if pipe.config.force_zeros_for_empty_prompt:
        # Without a prompt, SDXL samples with zeros. (The released code trains with "".)
        for number, text in enumerate(prompts):
            if text == "":
                prompt[number], pooled[number] = 0, 0

    # Every image is declared to be whole and of this size, as in the released code. True sizes and
    # crops might give the label away.
    time_ids = torch.full((len(prompts), 6), float(resolution), device=device)
    time_ids[:, 2:4] = 0  # the upper left corner of the crop
    return {"prompt": prompt, "text_embeds": pooled, "time_ids": time_ids}


class Denoiser(nn.Module):
    """A network of diffusers, called like the toy's policy. times (T,) is what it calls level t."""

    def __init__(self, network, times):
        super().__init__()
        self.network, self.times = network, times

    def forward(self, x_t, t, prompt, **added):
        if self.times.dtype == torch.long:  # whole numbers: a UNet, which wants a dict
            added = {"added_cond_kwargs": added}
        times = self.times[t]
        return self.network(x_t, timestep=times, encoder_hidden_states=prompt, **added).sample


class StableDiffusion:
    """SD1.5, SDXL or SD3.5, or another pipeline of their build, as a task. Raises UserError."""

    def __init__(self, cfg, device, pipe, pairs=None, held_out=None):
        self.cfg, self.pipe, self.pairs, self.held_out = cfg, pipe, pairs, held_out
        alphas_cumprod, self.prediction = read_schedule(pipe)
        self.alphas_cumprod = alphas_cumprod.to(device)  # (T,)

        self.part = "transformer" if self.prediction == "flow" else "unet"
        network = getattr(pipe, self.part).float()
        self.subfolder = "lora" if cfg.lora else self.part
        side = cfg.resolution // pipe.vae_scale_factor
        self.shape = network.config.in_channels, side, side
        if not pipe.vae:  # then vae_scale_factor is only a guess, and the data tell the shape
            self.shape = (pairs or held_out).shape

        # Not the ELBO's weight: the released code takes half the MEAN squared error, and its betas
        # of 2000 and 5000 refer to it. So T omega_t is 1 / (2d), for latents of d numbers. On the
        # SUM of squares, as in the equation, beta is 2000 / (2d) = 0.061 for SD1.5 (d = 16,384) and
        # 0.038 for SDXL (5000, d = 65,536). On SD1.5 5000 is 0.153. Without the half take beta / 2.
        T, d = len(alphas_cumprod), math.prod(self.shape)
        self.weight = torch.full((T,), 1 / (2 * d), device=device)

        # The policy and the reference.
        times = torch.arange(T, device=device)
        if self.prediction == "flow":
            times = 1000 * signal_and_noise(self.alphas_cumprod, "flow")[1]  # what SD3 takes for t
        self.policy = Denoiser(network, times)
        if cfg.lora:
            self.add_adapters(network)
            frozen, self.reference = network, self.without_adapters
        else:
            frozen = deepcopy(network).requires_grad_(False)
            self.reference = Denoiser(frozen, times)
        if cfg.checkpointing:
            network.enable_gradient_checkpointing()

        # Frozen weights are rounded to bf16 once, instead of at every use. Trained weights stay in
        # fp32: near 0.02, neighbours in bf16 are 1.2e-4 apart, so a step of 2e-5 would be lost.
        if cfg.precision == "bf16":
            for module in frozen.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)) and not module.weight.requires_grad:
                    module.bfloat16()
        prepare_encoders(pipe, cfg, device)
        network.to(device)
        frozen.to(device)

    def add_adapters(self, network):
        """Freeze a network and add LoRA adapters to it. They start at 0 and are trained in fp32."""
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer
        network.requires_grad_(False)
        torch.manual_seed(self.cfg.seed)
        network.add_adapter(LoraConfig(
            r=self.cfg.lora, lora_alpha=self.cfg.lora, target_modules=LORA_LAYERS,
            init_lora_weights="gaussian"))  # as in diffusers' examples
        self.adapters = [part for part in network.modules() if isinstance(part, BaseTunerLayer)]
        for adapter in self.adapters:
            adapter.cast_input_dtype_enabled = False  # to fp32: autocast would only cast it back

    def content(self):
        """A part of config.json: where model and data come from, and hashes of what they hold."""
        folder = Path(self.policy.network.config["_name_or_path"])
        files = [folder / "model_index.json", *folder.glob("*/*")]
        return {"sources": [str(folder), self.pairs.source],
                "content of --model": hash_of_files(files),
                "content of --data": self.pairs.content()}

    def without_adapters(self, x_t, t, **cond):
        """The reference of a LoRA run."""
        for adapter in self.adapters:  # diffusers would look for them in all of the network
            adapter.enable_adapters(False)
        prediction = self.policy(x_t, t, **cond)
        for adapter in self.adapters:
            adapter.enable_adapters(True)
        return prediction

    @torch.no_grad()
    def encode(self, batch):
        """x_w, x_l (B, *shape) fp32, and cond {name: (2B, ...)}, of a batch of open_pairs()."""
        device = self.weight.device
        if "latents" in batch:  # encoded ahead
            latents, cond = batch["latents"].to(device, non_blocking=True), batch["cond"]
        else:
            images = batch["images"].flatten(0, 1)  # (2B, 3, H, W)
            latents = encode_images(self.pipe, images.to(device, non_blocking=True))
            latents = latents.unflatten(0, (-1, 2))
            cond = encode_prompts(self.pipe, batch["prompt"], self.cfg.resolution)
        x_w, x_l = latents.unbind(1)  # of (B, 2, *shape)
        return x_w, x_l, {name: torch.cat([value.to(device, non_blocking=True)] * 2)
                          for name, value in cond.items()}

    def save(self, folder):
        """Write what from_pretrained reads, or with --lora what load_lora_weights reads."""
        if self.cfg.lora:
            from peft import get_peft_model_state_dict
            layers = get_peft_model_state_dict(self.policy.network)
            self.pipe.save_lora_weights(folder, **{f"{self.part}_lora_layers": layers})
        else:
            self.policy.network.save_pretrained(folder, max_shard_size="1TB")  # in one file

    def load(self, folder):
        """Read what save() wrote. Raises an error if it does not fit."""
        network = self.policy.network
        if not self.cfg.lora:
            network.load_state_dict(load_file(folder / WEIGHTS_FILE))
            return
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        saved = load_file(folder / LORA_FILE)
        layers = {name.removeprefix(f"{self.part}."): value for name, value in saved.items()}
        wrong = layers.keys() ^ get_peft_model_state_dict(network).keys()
        if wrong:
            raise ValueError(f"adapters that only one of the two has: {sorted(wrong)}")
        set_peft_model_state_dict(network, layers)


# ----------------------------------------------------------------------- 9. The command line

@dataclass
class Config:
    """All settings. parse() makes a flag of each field with a comment, which is its --help."""
    model: str = "sd15"
    preset: str = "sd15"
    method: Literal["dpo", "sft"] = "dpo"  # dpo, or sft: the baseline of paper 5.5
    beta: float = 2000.0  # weight of the KL to the reference (paper 5.1)
    gamma: float = 0.0  # weight of the entropy; for images 0.01 to 0.05 beta (ours)
    draws: int = 1  # draws of (t, eps) per pair (paper)
    lora: int = 0  # rank of adapters on the attention layers; 0 trains all weights (paper)
    data: str = DEFAULT_DATA  # hub id, parquet or JSON file, or folder
    split: str = "train"  # pairs to train on; a part: 'train[:-500]'
    eval_split: str = None  # held-out pairs, such as 'train[-500:]'
    resolution: int = 512  # pixels a side (the model's own)
    caption_dropout: float = 0.2  # share of pairs that lose their caption (released code)
    workers: int = 4  # processes that read images, per GPU (ours)
    steps: int = 2000  # optimizer steps (released launchers)
    batch: int = 2048  # pairs per step, over all processes (paper 5.1)
    micro_batch: int = 4  # pairs per forward pass, at most; it should divide --batch (ours)
    lr: float = None  # peak learning rate; None: 2.048e-5 * 2000 / beta, SD3.5 3e-4; LoRA: needed
    warmup: float = 0.25  # share of the steps in which the rate rises (paper 5.1)
    decay: float = 0.0  # share of the steps in which it falls to 0, at the end (paper)
    optimizer: Literal["adamw", "adafactor"] = "adamw"  # adamw or adafactor (paper 5.1)
    precision: Literal["bf16", "fp32"] = PRECISION  # bf16 on a GPU, fp32 on a CPU (ours)
    checkpointing: bool = False  # less memory for a quarter more time (released launchers)
    seed: int = 0  # the same seed and --batch give the same run
    out: str = None  # run folder; the same command resumes from it; None: runs/MODEL
    save_every: int = 100  # steps between checkpoints; two are kept (ours)
    eval_every: int = 0  # steps between evaluations on --eval-split; 0: none (ours)
    sample_every: int = 250  # steps between pictures of reference and policy; 0: none (ours)
    guidance: float = None  # of the pictures only; 1: no guidance; None: the pipeline's own
    evaluate: str = None  # only judge a policy on --eval-split: that of --out, or of folder X


PRESETS = {
    "toy": dict(beta=0.5, draws=64, steps=3000, batch=32, micro_batch=32, lr=3e-3, warmup=0.05,
                decay=1.0, precision="fp32", workers=0, eval_every=300, sample_every=0),  # all ours
    "sd15": {},
    "sdxl": dict(beta=5000.0, resolution=1024, micro_batch=2, optimizer="adafactor",
                 checkpointing=True),
    # SD3.5: beta, lora and the learning rate are flow_grpo's; steps and batch are ours.
    "sd35": dict(beta=100.0, lora=32, steps=1000, batch=24, micro_batch=2, resolution=1024,
                 checkpointing=True),
}
PIPELINES = {"StableDiffusionPipeline": "sd15", "StableDiffusionXLPipeline": "sdxl",
             "StableDiffusion3Pipeline": "sd35"}
ONLY_FOR_IMAGES = {"lora", "data", "split", "eval_split", "resolution", "caption_dropout",
                   "checkpointing", "guidance"}
# A run may be resumed with other values of these.
MAY_CHANGE = {"out", "save_every", "sample_every", "eval_every", "eval_split", "workers",
              "micro_batch", "sources"}
POSITIVE = {"beta", "draws", "steps", "batch", "micro_batch", "save_every", "resolution"}
SHARES = {"caption_dropout", "warmup", "decay"}

def default_rate(cfg):
    """The default learning rate (SD1.5, SDXL: for a batch of 2048 pairs). Raises UserError.

    The paper prints 2.048e-8 * 2000 / beta. Its launchers used 2.048e-5, at beta 5000, as did all
    who reproduced it. Ours is the paper's rule with their number: 8.2e-6 at 5000, 0.4 of theirs.
    How it should fall with the batch was not measured for DPO. For Adam in general, theory says
    with the square root of the batch (arXiv:2205.10287).
    """
    if (cfg.preset == "sd35") != bool(cfg.lora) and cfg.evaluate is None:
        raise UserError(f"--lr is missing: --lora {cfg.lora} has no default here")
    if cfg.lora:
        return 3e-4  # of SD3.5
    return 2.048e-6 if cfg.method == "sft" else 2.048e-5 * 2000 / cfg.beta  # sft: 1e-9 x 2048

def find_preset(model):
    """Which of PRESETS fits `model`. A folder or hub id tells it by the class of its pipeline."""
    if model in PRESETS:
        return model
    if Path(model).is_file():
        raise UserError(f"--model {model}: it should be a folder. A single file is made into"
                        " one by python -c \"import diffusers; diffusers.StableDiffusionXLPipeline"
                        f".from_single_file('{model}').save_pretrained('FOLDER')\" (or without XL)")
    from diffusers import DiffusionPipeline
    with blame(f"--model {model}: not SD1.5, SDXL or SD3"):
        return PIPELINES[DiffusionPipeline.load_config(model)["_class_name"]]

def parse(argv=None, config=Config, presets=PRESETS):
    """The command line as a `config`, which toy/ subclasses for more flags. Raises UserError."""
    def refuse(message):  # in one line, where argparse would print its usage too
        raise UserError(message)
    parser = argparse.ArgumentParser(
        usage="%(prog)s (--toy | --model X) [flags]", description=__doc__.splitlines()[0],
        epilog="Parentheses name a default's source: a section of the paper (arXiv:2311.12908),"
               f" its released code, or ours. The models' own defaults: {presets}",
        allow_abbrev=False)
    parser.error = refuse
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument("--toy", action="store_const", const="toy", dest="model",
                        help="the toy in 2-D")
    models.add_argument("--model", help="sd15, sdxl, sd35, or a hub id or folder")

    # Each line `name: type = default  # meaning` of the classes is a flag. A subclass's line wins.
    source = "".join(inspect.getsource(each) for each in reversed(config.__mro__[:-1]))
    for name, meaning in dict(re.findall(r"^    (\w+): .*  # (.+)$", source, re.M)).items():
        kind, default = config.__dataclass_fields__[name].type, getattr(config, name)
        options = {"default": default, "help": f"{meaning} [{default}]"}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            choices = get_args(kind) or None  # of a Literal
            options |= {"type": str if choices else kind, "choices": choices}
        if name == "evaluate":
            options |= {"nargs": "?", "const": ""}
        parser.add_argument("--" + name.replace("_", "-"), **options)

    preset = find_preset(parser.parse_args(argv).model)  # then parse again, with its defaults
    parser.set_defaults(**presets[preset])
    cfg = config(preset=preset, **vars(parser.parse_args(argv)))
    check_flags(cfg)
    if cfg.lr is None:
        cfg.lr = default_rate(cfg)
    if cfg.out is None:
        cfg.out = f"runs/{Path(cfg.model).resolve().name}"
    cfg.out = os.path.normpath(cfg.out)  # new/../mine is mine, whether or not there is a new
    return cfg

def check_flags(cfg):
    """Raise UserError for a flag that means nothing or does not fit others. Sets micro_batch."""
    for name, value in asdict(cfg).items():
        flag = f"--{name.replace('_', '-')} {value}"
        least = 1e-9 if name in POSITIVE else 0
        if name == "guidance":
            least = 1  # the pipelines would take less for 1
        most = 1 if name in SHARES else 1e18
        if isinstance(value, (int, float)) and not least <= value <= most:
            raise UserError(f"{flag}: it should be {least:g} to {most:g}")
        if cfg.model == "toy" and name in ONLY_FOR_IMAGES and value != getattr(type(cfg), name):
            raise UserError(f"{flag} has no meaning for the toy")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch % world and cfg.evaluate is None:
        raise UserError(f"--batch {cfg.batch}: it should be a multiple of the {world} processes")
    cfg.micro_batch = math.gcd(cfg.batch // world, cfg.micro_batch)  # so that it divides the batch
    if cfg.resolution % 16:
        raise UserError(f"--resolution {cfg.resolution}: it should be a multiple of 16")
    if cfg.model != "toy" and not cfg.eval_split and (cfg.eval_every or cfg.evaluate is not None):
        raise UserError("--eval-split is missing; it names the held-out pairs to evaluate on")

def check_out(cfg, content=()):
    """Raise UserError unless --out is new or empty, or holds this run. content: task.content()."""
    out = Path(cfg.out)
    model = Path(cfg.model).resolve()
    if out.resolve().is_relative_to(model) and (model / "model_index.json").exists():
        raise UserError(f"--out {out}: it lies in --model; name another folder")
    if not any(out.glob("[!.]*")):  # hidden files, such as .lock, do not count
        return
    with blame(f"--out {out}: it holds files but no run; name a new folder"):
        there = dict(json.loads((out / "config.json").read_text())["config"])
    here = asdict(cfg) | dict(content)
    differences = [f"{name} is {there.get(name)} there, {here[name]} here"
                   for name in sorted(here.keys() - MAY_CHANGE) if there.get(name) != here[name]]
    if differences:
        steps_differ = there.get("steps") != cfg.steps
        why = " (--warmup and --decay are shares of --steps)" if steps_differ else ""
        raise UserError(f"--out {out}: it holds another run, where {'; '.join(differences)}{why}")

def make_task(cfg, device):
    """What cfg.model names, with its data. Raises UserError."""
    if cfg.model == "toy":
        return Toy(cfg)
    pairs = open_pairs(cfg, cfg.split) if cfg.evaluate is None else None
    held_out = open_pairs(cfg, cfg.eval_split) if cfg.eval_split else None
    if pairs and held_out:
        shared = len({*pairs.table["row"]} & {*held_out.table["row"]})
        if shared:
            print_once(f"WARNING     {shared} pairs of --eval-split are in --split, too")

    some = pairs or held_out
    pipe = load_pipeline(cfg.model, ENCODERS if some.encoded else None)
    with blame(f"--model {cfg.model}: it is not built like SD1.5, SDXL or SD3.5"):
        task = StableDiffusion(cfg, device, pipe, pairs, held_out)
        with torch.no_grad():  # a first pass shows whether all parts fit together
            blank = some.blank() | {"epoch": 0, "row": 0}
            batch_errors(task, default_collate([blank]), 1, 0)
    return task

def main(argv=None):
    cfg = parse(argv)
    device = start_processes(torch.cuda.is_available() and cfg.model != "toy", cfg.precision)
    if cfg.evaluate is None:
        check_on_main(check_out, cfg)  # before a model is loaded; Run checks its content, too
    task = make_task(cfg, device)
    if cfg.evaluate is None:
        rows = train(task, cfg)
        if cfg.model == "toy" and is_main():
            report_toy(task, rows)
    else:
        policy = load_weights(task, cfg.evaluate or cfg.out)
        print_once(json.dumps({"policy": str(policy)} | evaluate(task), indent=1))

def run_command(main):
    """Call main() and leave the process. What the user can fix gives one line and exit code 2."""
    code = 0
    try:
        main()
        gather(None)  # wait: gloo aborts if one process leaves while another is still at work
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        code = 2
        if os.environ.get("LOCAL_RANK", "0") != "0" and isinstance(error, UserError):
            time.sleep(3)  # most are found by all; then process 0 says it, and torchrun ends this
        print(f"\nerror: {one_line(error)}", file=sys.stderr)
    except (KeyboardInterrupt, SystemExit) as stopped:
        code = getattr(stopped, "code", 130) or 0
    except Exception:
        sys.excepthook(*sys.exc_info())  # prints the traceback
        code = 1

    # Leave at once. Workers ignore signals, so an ordinary exit could wait for them for ever. Also,
    # in 1 of 20 ordinary exits torch's threads aborted.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run_command(main)
