"""D3PO and SPO: the loss of diffusion_dpo.py on pairs that the policy samples itself.

    python toy/on_policy.py --method spo --toy
    python toy/on_policy.py --method d3po --model sd15 --data prompts.txt --scorer pickscore

Both methods put other errors into dpo_loss, with or without gamma. What they compare is not two
images but two denoising steps that the policy has sampled. The error of a step is minus its log
probability, up to a constant:

    e = ||x_next - mean||^2 / (2 std^2)

For images it is divided by the number of pixels of the latent, as in the released codes. Loop,
checkpoints and most flags are those of diffusion_dpo.py.

D3PO (arXiv:2311.13231) samples two images per prompt. All steps of the one with the higher score
are preferred. SPO (arXiv:2406.04314) samples several candidates for each step, and scores the x_0
that each of them predicts. The best is preferred to the worst, and the next step begins at any one.

The released codes differ from this file. In D3PO's both images start from the same noise, here from
two. Its steps begin at t = 951, 901, ..., 1, and the step from 1 is random and trained. Here they
begin at T - 1, and the last step, to x_0, is neither. SPO's scorer is trained on noisy images. It
leaves out the first 4 of 20 steps and pairs of nearly equal scores. Here nothing is left out.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import diffusion_dpo as dpo
from toy import distance


@dataclass
class OnPolicyConfig(dpo.Config):
    """The settings of diffusion_dpo.py, with other defaults, and those of these methods.

    A "pair" in the help of a flag is a prompt here.
    """

    method: Literal["d3po", "spo"] = "d3po"
    lora: int = 0
    warmup: float = 0.0
    steps: int = 1000
    micro_batch: int = 1
    clip: float = 0.0  # p_theta / p_ref is kept in 1 - X to 1 + X; 0: no clip (released codes: 0.1)
    scorer: str = ""  # who scores the images, as in toy/judge.py
    sampling_steps: int = 20  # denoising steps of a sample
    guidance: float = 1.0  # in sampling and in training; 1: none
    candidates: int = 4  # spo: samples of each step


TOY = dict(
    lr=3e-3,
    steps=300,
    batch=128,
    micro_batch=128,
    warmup=0.05,
    decay=1.0,
    precision="fp32",
    workers=0,
    save_every=500,
    sample_every=0,
)  # all of these are ours
IMAGES = dict(data="", caption_dropout=0.0, clip=0.1, scorer="pickscore", guidance=5.0)
SDXL = IMAGES | dict(resolution=1024, optimizer="adafactor", checkpointing=True)
PRESETS = {  # beta, lr, batch and lora of the images are those of the released codes
    "d3po": {
        "toy": TOY | dict(beta=1.0, out="runs/toy-d3po"),
        "sd15": IMAGES | dict(beta=0.1, lr=3e-5, batch=40, lora=4, out="runs/sd15-d3po"),
        "sdxl": SDXL | dict(beta=0.1, lr=3e-5, batch=40, lora=4, out="runs/sdxl-d3po"),
        "sd35": dict(lr=3e-5),
    },  # is refused
    "spo": {
        "toy": TOY | dict(beta=10.0, out="runs/toy-spo"),
        "sd15": IMAGES | dict(beta=10.0, lr=6e-5, batch=40, lora=4, out="runs/sd15-spo"),
        "sdxl": SDXL | dict(beta=10.0, lr=1e-5, batch=16, lora=64, out="runs/sdxl-spo"),
        "sd35": dict(lr=3e-5),
    },
}
LEAST = {"sampling_steps": 2, "candidates": 2}
NO_MEANING = ["draws", "caption_dropout", "eval_every", "eval_split", "evaluate"]
ONLY_FOR_IMAGES = ["scorer"]


def parse(argv=None):
    """The command line as an OnPolicyConfig. Raises UserError."""
    # The method decides the other defaults, so it is read first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", nargs="?")
    method = first.parse_known_args(argv)[0].method
    presets = PRESETS.get(method, PRESETS["d3po"])
    cfg = dpo.parse(argv, OnPolicyConfig, presets)

    no_meaning = NO_MEANING + ONLY_FOR_IMAGES * (cfg.model == "toy")
    defaults = vars(OnPolicyConfig()) | presets[cfg.preset]
    for name, value in vars(cfg).items():
        flag = "--" + name.replace("_", "-")
        if name in no_meaning and value != defaults[name]:
            raise dpo.UserError(f"{flag} has no meaning here")
        if name in LEAST and value < LEAST[name]:
            raise dpo.UserError(f"{flag} {value}: it should be at least {LEAST[name]}")
    if cfg.clip >= 1:
        raise dpo.UserError(f"--clip {cfg.clip:g}: it should be less than 1")
    if cfg.preset == "sd35":
        raise dpo.UserError(
            f"--model {cfg.model}: it should be SD1.5, SDXL or of their build; the"
            " steps of D3PO and SPO are DDIM's, which a flow does not have"
        )
    if cfg.model != "toy" and not cfg.data:
        raise dpo.UserError("--data: it should be a .txt, a prompt a line, or a preference set")
    return cfg


# --------------------------------------------------------------------------------------- the tasks
#
# A task of these methods has, beside what diffusion_dpo.py asks for,
#   conditions(batch)   a list of cond {name: (B, ...)}: with guidance, first that of no prompt
#   score(x_0, batch)   scores (B, n) of x_0 (B, n, *shape)
#   step_unit           what the squares of a step are multiplied by: 1, or 1 / pixels


class OnPolicyToy(dpo.Toy):
    """The toy. Its pairs are not looked at, but counted like prompts."""

    step_unit = 1.0  # so the errors are in nats

    def conditions(self, batch):
        return [{}]

    def score(self, x_0, batch):
        return self.reward(x_0.flatten(0, 1)).view(x_0.shape[:2])


class Prompts:
    """Prompts as a dataset, in place of pairs."""

    def __init__(self, prompts):
        self.table, self.source = {"prompt": prompts}, None

    def __len__(self):
        return len(self.table["prompt"])

    def content(self):
        return dpo.hash_of(self.table)

    def __getitem__(self, key):
        epoch, row = key
        return {"epoch": epoch, "row": row, "unreadable": 0.0, "prompt": self.table["prompt"][row]}


class OnPolicyImages(dpo.StableDiffusion):
    """Stable Diffusion, with prompts for pairs and a scorer(images, prompts) of toy/judge.py."""

    def __init__(self, cfg, device, prompts, scorer):
        super().__init__(cfg, device, dpo.load_pipeline(cfg.model), Prompts(prompts))
        self.scorer = scorer
        self.step_unit = 1 / math.prod(self.shape)

    def conditions(self, batch):
        prompts = [list(batch["prompt"])]
        if self.cfg.guidance > 1:
            prompts.insert(0, [""] * len(prompts[0]))
        return [dpo.encode_prompts(self.pipe, each, self.cfg.resolution) for each in prompts]

    @torch.no_grad()
    def score(self, x_0, batch):
        n = x_0.shape[1]
        vae = self.pipe.vae
        images = vae.decode(x_0.flatten(0, 1) / vae.config.scaling_factor).sample
        images = self.pipe.image_processor.postprocess(images)
        prompts = []
        for prompt in batch["prompt"]:
            prompts += [prompt] * n
        scores, _ = self.scorer(images, prompts)
        return scores.view(-1, n).to(x_0.device)


def make_task(cfg, device, scorer=None):
    """What cfg.model names, with its prompts. --scorer is loaded if no scorer is given."""
    if cfg.model == "toy":
        return OnPolicyToy(cfg)
    import judge

    if cfg.data.endswith(".txt"):
        prompts = judge.read_prompts("--data", cfg.data)
    else:
        pairs = dpo.open_pairs(cfg, cfg.split)
        prompts = [prompt or "" for prompt in pairs.table["prompt"]]
    return OnPolicyImages(cfg, device, prompts, scorer or judge.load_scorer(cfg.scorer, device))


# --------------------------------------------------------------------------------------- the steps


class Walk:
    """What both methods need to denoise a batch: noise levels, noise, predictions, steps.

    times (S,) are noise levels from T - 1 down. abars (S + 1,) are theirs, and then 1, that of x_0.
    """

    def __init__(self, task, batch, cfg):
        self.task, self.batch, self.cfg = task, batch, cfg
        device = task.weight.device
        S, T = cfg.sampling_steps, len(task.weight)
        times = (torch.arange(S, 0, -1) * T / S).round().long() - 1
        self.times = times.to(device)
        abars = torch.cat([task.alphas_cumprod[self.times], torch.ones(1, device=device)])
        self.abars = abars.clamp(min=2**-24)  # some v-models have 0 at T - 1
        self.conds = task.conditions(batch)

        self.gens = []  # one for each prompt
        for epoch, row in zip(batch["epoch"].tolist(), batch["row"].tolist(), strict=True):
            self.gens.append(dpo.seeded_generator(cfg.seed, "steps", epoch, row))

    def noise(self, n):
        """(B, n, *shape), with the generator of each prompt."""
        noise = [torch.randn(n, *self.task.shape, generator=gen) for gen in self.gens]
        return torch.stack(noise).to(self.times.device, non_blocking=True)

    def predict(self, network, x, i):
        """eps_hat, with guidance, of x at the noise level times[i]. Both are (B, n, *shape)."""
        n, copies = x.shape[1], len(self.conds)
        x_t = torch.cat([x.flatten(0, 1)] * copies)  # (copies * B * n, *shape)
        cond = {}
        for name in self.conds[0]:
            values = torch.cat([each[name] for each in self.conds])
            cond[name] = values.repeat_interleave(n, 0)

        with dpo.autocast(self.task):
            out = network(x_t, self.times[i].expand(len(x_t)), **cond).float()
        if copies == 2:
            empty, prompted = out.chunk(2)
            out = empty + self.cfg.guidance * (prompted - empty)
        out = out.view_as(x)
        if self.task.prediction == "v_prediction":
            out = self.abars[i].sqrt() * out + (1 - self.abars[i]).sqrt() * x
        return out

    def mean_and_std(self, network, x, i):
        """Of the next step from x, by a network."""
        eps = self.predict(network, x, i)
        return distance.ddim_step(x, eps, self.abars[i], self.abars[i + 1])

    @torch.no_grad()
    def sample_step(self, x, n, i):
        """n samples of the next step: all from x (B, 1, *shape), or one from each x (B, n, ...)."""
        mean, std = self.mean_and_std(self.task.policy, x, i)
        return mean + std * self.noise(n)

    @torch.no_grad()
    def predicted_x_0(self, x, i):
        """The x_0 that the policy expects at x; like x."""
        eps = self.predict(self.task.policy, x, i)
        return distance.ddim_step(x, eps, self.abars[i], self.abars[-1])[0]

    def errors(self, network, x_t, x_next, i):
        """Errors (B,) of the preferred and of the rejected step.

        They lead from x_t (B, 1 or 2, *shape) to x_next (B, 2, *shape).
        """
        mean, std = self.mean_and_std(network, x_t, i)
        squares = (x_next - mean).square().flatten(2).sum(2)  # (B, 2)
        return (self.task.step_unit * squares / (2 * std**2)).unbind(1)


def pick(x, which):
    """(B, m, *shape): of x (B, n, *shape) those numbered in which (B, m)."""
    return x[torch.arange(len(x), device=x.device)[:, None], which]


def compared_steps(walk):
    """The steps that are compared, one at a time, with preferred before rejected.

    Yields x_t (B, 1 or 2, *shape), x_next (B, 2, *shape) and the number of the noise level. The
    last step, to x_0, is not random, so it is not compared.
    """
    return {"d3po": d3po_steps, "spo": spo_steps}[walk.cfg.method](walk)


def d3po_steps(walk):
    xs = [walk.noise(2)]
    for i in range(walk.cfg.sampling_steps):
        xs.append(walk.sample_step(xs[-1], 2, i))

    order = walk.task.score(xs[-1], walk.batch).argsort(1, descending=True)  # (B, 2)
    xs = [pick(x, order) for x in xs]
    for i in range(walk.cfg.sampling_steps - 1):
        yield xs[i], xs[i + 1], i


def spo_steps(walk):
    n = walk.cfg.candidates
    x = walk.noise(1)
    for i in range(walk.cfg.sampling_steps - 1):
        candidates = walk.sample_step(x, n, i)
        scores = walk.task.score(walk.predicted_x_0(candidates, i + 1), walk.batch)
        order = scores.argsort(1, descending=True)  # (B, n)
        best_and_worst = order[:, [0, -1]]
        yield x, pick(candidates, best_and_worst), i

        anyone = torch.stack([torch.randint(n, (1,), generator=gen) for gen in walk.gens])
        x = pick(candidates, anyone.to(x.device))


def clipped(error, ref_error, clip):
    """The error for which p_theta / p_ref is kept in 1 - clip to 1 + clip.

    Beyond, it has no gradient. Only this ratio is clipped, so the margin of gamma is not.
    """
    if not clip:
        return error
    log_ratio = ref_error - error
    return ref_error - log_ratio.clamp(math.log(1 - clip), math.log(1 + clip))


def on_policy_step(task, batch, cfg):
    """dpo_step of these methods. Its loss and metrics are means over the compared steps.

    The activations of one step at a time are held.
    """
    walk, count = Walk(task, batch, cfg), cfg.sampling_steps - 1
    sums = 0
    for x_t, x_next, i in compared_steps(walk):
        with torch.no_grad():
            ref_w, ref_l = walk.errors(task.reference, x_t, x_next, i)
        err_w, err_l = walk.errors(task.policy, x_t, x_next, i)
        losses, logit = dpo.dpo_loss(
            clipped(err_w, ref_w, cfg.clip),
            clipped(err_l, ref_l, cfg.clip),
            ref_w,
            ref_l,
            cfg.beta,
            cfg.gamma,
        )
        (losses.sum() / count / cfg.batch).backward()
        errors = err_w, err_l, ref_w, ref_l
        sums = sums + dpo.metric_sums(batch, losses, logit, errors) / count
    return sums


def print_range(cfg):
    """Say between which values the clip keeps the loss."""
    largest = (cfg.beta + cfg.gamma) * math.log((1 + cfg.clip) / (1 - cfg.clip))
    low, high = math.log1p(math.exp(-largest)), math.log1p(math.exp(largest))
    margin = " plus or minus the margin of gamma" if cfg.gamma else ""
    dpo.print_once(f"clip        {cfg.clip:g} keeps the loss in {low:.3f} to {high:.3f}{margin}")


def main(argv=None):
    cfg = parse(argv)
    dpo.check_out(cfg)
    device = dpo.start_processes(
        torch.cuda.is_available() and cfg.model != "toy", cfg.precision)
    task = make_task(cfg, device)
    levels = len(task.weight)
    if cfg.sampling_steps > levels:
        raise dpo.UserError(
            f"--sampling-steps {cfg.sampling_steps}: it should be at most {levels}, the model's own"
        )
    if cfg.clip:
        print_range(cfg)
    rows = dpo.train(task, cfg, on_policy_step)
    if cfg.model == "toy" and dpo.rank_and_world()[0] == 0:
        distance.report_toy(task, rows)


if __name__ == "__main__":
    dpo.run_command(main)
