"""What bf16 does to the logit: how much noise, from where, and what removes it.

    python toy/rounding.py    # Markdown tables and toy/rounding.json; about 18 minutes on one core

A tiny SD1.5's policy takes steps: three of 1e-8, which teach nothing, or some at the script's rate,
on pairs whose preferred latents have the larger mean. The logit of 64 other pairs is then computed
twice from the same weights, under autocast and in fp32: the difference is the noise. "Trained"
UNets have learnt to denoise such latents, 16 wide (by --method sft), "random" ones nothing.
"""

import argparse
import copy
import functools
import itertools
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]
import make_tiny

import diffusion_dpo as dpo

BF16 = torch.bfloat16
MOVES = ("3 steps of 1e-8", 3, 1e-8), ("1 step", 1, None), ("20 steps", 20, None)  # None: default
CASES = (("random", 16, 5000, MOVES[:1], (4, 8, 16, 32, 64)),  # width, beta, moves, sides
         ("trained", 16, 5000, MOVES, (4, 8, 16, 32, 64)),
         ("trained", 16, 2000, MOVES, (4, 8, 16, 32)), ("trained", 32, 5000, MOVES, (4, 8, 16, 32)))
UNET = make_tiny.TINY_UNET | {"attention_head_dim": 4, "cross_attention_dim": 32,
                              "down_block_types": (*2 * ["DownBlock2D"], "CrossAttnDownBlock2D"),
                              "up_block_types": ("CrossAttnUpBlock2D", *2 * ["UpBlock2D"])}


def batches(problem, n, draws, name):
    """Batches of n pairs of blurred noise, of about unit variance; preferred: the larger mean."""
    for i in itertools.count():
        key, side = (problem.cfg.seed, name), problem.shape[1]
        x = torch.randn(2 * n, 4, side // 4, side // 4, generator=dpo.generator(*key, i)) * 1.4
        x = nn.functional.interpolate(x, size=(side, side), mode="bilinear").unflatten(0, (n, 2))
        order = x[:, :, 0].mean((2, 3)).argsort(1, descending=True)  # (n, 2)
        noise = [dpo.draw_noise(key, i, row, draws, 1000, problem.shape) for row in range(n)]
        t, eps = map(torch.stack, zip(*noise, strict=True))
        yield {"latents": x[torch.arange(n)[:, None], order], "prompt": n * [""], "t": t,
               "eps": eps, "unreadable": n * [False]}


def moved(steps, lr, width, beta, side, seed, weights=None, flags=""):
    """A problem of the script, in fp32, whose policy has taken some steps of 8 pairs each."""
    cfg = dpo.parse(f"--model sd15 --precision fp32 --beta {beta} --resolution {8 * side} --warmup"
                    f" 0 --batch 8 --micro-batch 8 --seed {seed} {flags}".split())
    cfg.lr = lr or cfg.lr
    torch.manual_seed(seed)
    pipe = make_tiny.assemble(**make_tiny.TINY["sd15"] | {
        "unet": UNET | {"block_out_channels": (width, 2 * width, 2 * width)}})
    pipe.unet.load_state_dict(weights or pipe.unet.state_dict())
    problem = dpo.StableDiffusion(cfg, torch.device("cpu"), pipe)
    optimizer = dpo.make_optimizer([p for p in problem.policy.parameters() if p.requires_grad], cfg)
    read = batches(problem, 8, 1, "learnt" + flags)
    rows = [dpo.train_step(problem, optimizer, read, cfg, step) for step in range(steps)]
    problem.error = statistics.mean(row["loss"] for row in rows[-50:])  # of sft: of eps, squared
    return problem


sft = functools.cache(lambda *case: moved(600, 2e-3, *case, flags="--method sft"))


@torch.no_grad()
def logits(problem, dtype=None, draws=1):
    """The logit (64,) of as many pairs, under autocast to dtype or in fp32."""
    batch = next(batches(problem, 64, draws, "measured"))
    x_w, x_l, cond = problem.encode(batch)
    with torch.autocast("cpu", dtype or BF16, dtype is not None):
        errors = dpo.pair_errors(problem, x_w, x_l, batch["t"], batch["eps"], cond)
    return dpo.dpo_loss(*errors, problem.cfg.beta)[1]


def split(problem):
    """The policy's layers as bf16(W_ref) x + bf16(W - W_ref) x from now on."""
    for layer, old in zip(problem.policy.modules(), problem.reference.modules(), strict=True):
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            rest = copy.deepcopy(layer)
            for p, q in zip(rest.parameters(), old.parameters(), strict=True):
                p.data -= q
            layer.forward = lambda x, old=old, rest=rest: old(x) + rest(x)
    return problem


def rounded(problem):
    """The weights rounded once, what is computed with them not."""
    problem.policy.bfloat16().float(), problem.reference.bfloat16().float()
    return problem


def table(rows):
    """{first cell: {column: a number per seed}} as Markdown: the median and the range."""
    columns = next(iter(rows.values()))
    print("\n| |", " | ".join(columns), "|\n|" + "---|" * (len(columns) + 1))
    for name, row in rows.items():
        cells = (f"{statistics.median(x):.3f} ({min(x):.3f} to {max(x):.3f})" for x in row.values())
        print(f"| {name} |", " | ".join(cells), "|", flush=True)


def main():
    torch.set_num_threads(1)  # sums in one order
    found, remedies = {}, defaultdict(lambda: defaultdict(list))
    for kind, width, beta, moves, sides in CASES:
        rows = found[f"{kind}, width {width}, beta {beta}"] = defaultdict(lambda: defaultdict(list))
        runs = [*itertools.product(sides, range(3), moves)]
        for side, seed, (name, steps, lr) in tqdm(runs, f"{kind}, {width} wide", ncols=99):
            start = sft(width, 5000, 16, seed) if kind == "trained" else None
            case = width, beta, side, seed, start and start.policy.network.state_dict()
            problem = moved(steps, lr, *case)
            row, exact = rows[4 * side**2], logits(problem)
            row[f"noise, {name}"].append((logits(problem, BF16) - exact).std().item())
            row[f"logit, {name}"].append(exact.std().item())
            row[f"mean, {name}"].append(exact.mean().item())
            if (kind, width, beta, side) == ("trained", 16, 5000, 16):
                lora = moved(steps, lr or 1e-4, *case, "--lora 16")
                for remedy, noisy, clean in (
                        ("none", logits(problem, BF16), exact),
                        ("--draws 4", logits(problem, BF16, 4), logits(problem, None, 4)),
                        ("--draws 16", logits(problem, BF16, 16), logits(problem, None, 16)),
                        ("--lora 16, rate 1e-4", logits(lora, BF16), logits(lora)),
                        ("fp16", logits(problem, torch.float16), exact),
                        ("split weights", logits(split(copy.deepcopy(problem)), BF16), exact),
                        ("fp32, weights rounded", logits(rounded(problem)), exact)):
                    remedies[remedy][f"noise, {name}"].append((noisy - clean).std().item())
                    remedies[remedy][f"logit, {name}"].append(clean.std().item())
        table(rows)
        noise = [statistics.median(row["noise, 3 steps of 1e-8"]) for row in rows.values()]
        slope = statistics.linear_regression(*([*map(math.log, x)] for x in (rows, noise))).slope
        print(f"{[*found][-1]}: log noise over log d has slope {slope:.2f}", flush=True)
    table(remedies)
    errors = {width: [sft(width, 5000, 16, seed).error for seed in range(3)] for width in (16, 32)}
    print("\nsquared error of eps, by width (zero: 1):", errors)
    dpo.write_json(ROOT / "toy" / "rounding.json", found | {"remedies": remedies, "error": errors})


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # --help
    main()
