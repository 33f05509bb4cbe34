"""D3PO and SPO: the loss of diffusion_dpo.py on pairs that the policy makes itself.

    python toy/on_policy.py --method spo --toy
    python toy/on_policy.py --method d3po --model sd15 --data prompts.txt --scorer pickscore

Both put other errors into dpo_loss, with or without gamma: for a denoising step that the policy has
sampled, e = ||x_next - mean||^2 / (2 std^2) = -log p(x_next | x_t) + const, for images the mean
over the latent, as in the released codes. All else, loop, checkpoints and flags, is the script's.

D3PO (arXiv:2311.13231) draws two images per prompt; all steps of the one with the higher score are
preferred. SPO (arXiv:2406.04314) draws --candidates for each step; by the score of the x_0 that
they predict the best is preferred to the worst, and the walk goes on from any of them.

In the released codes D3PO's images start from one x_T, ours from two; its times are 951, 901, ... 1
and the step from 1 is random and trained, ours begin at T - 1 and the last, to x_0, is neither.
SPO's judge is trained on noisy images, it skips the first 4 of 20 steps and pairs that score alike;
ours does not.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import diffusion_dpo as dpo

NO = dpo.NO
DEFAULTS = {  # beta, lr, batch, lora for toy, sd15, sdxl: of the released codes; for the toy ours
    "d3po": ((1.0, 0.1, 0.1), (3e-3, 3e-5, 3e-5), (128, 40, 40), (NO, 4, 4)),
    "spo": ((10.0, 10.0, 10.0), (3e-3, 6e-5, 1e-5), (128, 40, 16), (NO, 4, 64))}
DEAD = ("anchor", "draws", "cache", "caption-dropout", "eval-every", "eval-split", "evaluate")


def flags_of(method):
    """diffusion_dpo.py's FLAGS, with those of these methods and their defaults."""
    beta, lr, batch, lora = DEFAULTS[method]
    outs = [f"runs/{preset}-{method}" for preset in dpo.PRESETS]
    hidden = {"help": argparse.SUPPRESS}, NO, ""
    return dpo.FLAGS | dict.fromkeys(DEAD, hidden) | {
        "method": ({"choices": tuple(DEFAULTS)}, method, method, method, "whose pairs"),
        "beta": (dpo.at_least(1e-9, float), *beta, "weight of the KL (released codes; toy: ours)"),
        "prediction": (hidden[0] | {"choices": ("epsilon",)}, "epsilon", NO, ""),
        "clip": (dpo.FACTOR, 0.0, 0.1, "p_theta / p_ref is kept in 1 +- X (likewise)"),
        "lora": (dpo.SIZE, *lora, "rank of adapters (released codes); 0: train all weights"),
        "lr": (dpo.FACTOR, *lr, "peak rate (released codes; toy: ours, falling)"),
        "warmup": (dpo.SIZE, None, 0, "steps of rising rate [toy: 1/20; else 0]"),
        "steps": (dpo.COUNT, 300, 1000, "optimizer steps (ours)"),
        "batch": (dpo.COUNT, *batch, "prompts per step, all processes (released codes; toy: ours)"),
        "micro-batch": (dpo.COUNT, 128, 1, "prompts per forward and process (ours)"),
        "data": (dpo.TEXT, NO, None, "prompts: a .txt, a line each, or those of pairs"),
        "scorer": (dpo.TEXT, NO, "pickscore", "the judge, as in toy/judge.py"),
        "sampling-steps": (dpo.at_least(2, int), 20, "denoising steps of a sample"),
        "guidance": (dpo.at_least(1, float), NO, 5.0, "in sampling and in training"),
        "candidates": (dpo.at_least(2, int), 4, "spo: steps drawn from one x_t"),
        "out": (dpo.TEXT, *outs, "folder; the same command goes on from there")}


def parse(argv=None):
    """The command line as a namespace. Raises Refusal."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # it decides the defaults
    first.add_argument("--method", nargs="?")
    method = first.parse_known_args(argv)[0].method
    cfg = dpo.parse(argv, flags_of(method if method in DEFAULTS else "d3po"))
    if cfg.clip >= 1:
        raise dpo.Refusal(f"--clip {cfg.clip:g}: it should be less than 1")
    if cfg.preset == "sd35":
        raise dpo.Refusal(f"--model {cfg.model}: it should be SD1.5, SDXL or of their build; the"
                          " steps of D3PO and SPO are DDIM's, which a flow has not")
    if cfg.preset != "toy" and not cfg.data:
        raise dpo.Refusal("--data: it should be a .txt, a prompt a line, or a preference set")
    cfg.draws, cfg.caption_dropout = 1, 0  # as the loop and ImagePairs want them
    cfg.guidance = cfg.guidance or 1.0
    return cfg


class Prompts:
    """Prompts as a dataset by (epoch, row)."""

    def __init__(self, prompts):
        self.prompts = prompts

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, key):
        return {"prompt": self.prompts[key[1]]}


def make_problem(cfg, device, scorer=None):
    """The script's problem with prompts for pairs, and two more methods: conditions(batch) -> [cond
    {name: (B, ...)}], before it that of no prompt where there is guidance, and score(x_0 (B, n,
    *shape), batch) -> (B, n), by `scorer`, else by --scorer. `step_unit` is that of a step's
    log-probability."""
    if cfg.preset == "toy":
        problem = dpo.Toy(cfg)
        problem.step_unit = 1.0  # nats; its pairs are not looked at, but counted like prompts
        problem.conditions = lambda batch: [{}]
        problem.score = lambda x_0, batch: problem.reward(x_0.flatten(0, 1)).view(x_0.shape[:2])
        return problem
    import judge
    if cfg.data.endswith(".txt"):
        prompts = judge.read_prompts("--data", cfg.data)
    else:
        prompts = dpo.ImagePairs(cfg, cfg.split).prompts
    scorer = scorer or judge.load_scorer(cfg.scorer, device)
    problem = dpo.StableDiffusion(cfg, device, dpo.load_pipeline(cfg.model), Prompts(prompts))
    problem.step_unit = 1 / math.prod(problem.shape)  # a mean over the latent

    def conditions(batch):
        sides = [[""] * len(batch["prompt"])] * (cfg.guidance > 1) + [list(batch["prompt"])]
        return [problem.encode_prompts(prompts) for prompts in sides]

    @torch.no_grad()
    def score(x_0, batch):
        pipe = problem.pipe
        images = pipe.vae.decode(x_0.flatten(0, 1) / pipe.vae.config.scaling_factor).sample
        images = pipe.image_processor.postprocess(images)
        prompts = [prompt for prompt in batch["prompt"] for _ in range(x_0.shape[1])]
        return scorer(images, prompts)[0].view(x_0.shape[:2]).to(device)

    problem.conditions, problem.score = conditions, score
    return problem


class Walk:
    """What both methods need to denoise a batch: noise levels, noise, predictions, steps.

    times (S,), noise levels from T - 1 down; abars (S + 1,), theirs and 1, that of x_0."""

    def __init__(self, problem, batch, cfg):
        S, T, device = cfg.sampling_steps, len(problem.weight), problem.weight.device
        self.problem, self.cfg, self.batch = problem, cfg, batch
        self.times = ((torch.arange(S, 0, -1) * T / S).round().long() - 1).to(device)
        abars = torch.cat([problem.alphas_cumprod[self.times], torch.ones(1, device=device)])
        self.abars = abars.clamp(min=2**-24)  # some v-models have 0 at T - 1
        keys = zip(batch["epoch"].tolist(), batch["row"].tolist(), strict=True)
        self.gens = [dpo.generator(cfg.seed, "steps", *key) for key in keys]
        self.conds = problem.conditions(batch)  # no prompt first

    def noise(self, n):
        """(B, n, *shape), of each pair's own generator."""
        drawn = [torch.randn(n, *self.problem.shape, generator=gen) for gen in self.gens]
        return torch.stack(drawn).to(self.times.device, non_blocking=True)

    def predict(self, network, x, i):
        """eps_hat (B, n, *shape) at x (B, n, *shape), noised to times[i], with guidance."""
        x_t = x.flatten(0, 1).repeat(len(self.conds), *[1] * len(self.problem.shape))
        n = x.shape[1]
        cond = {name: torch.cat([each[name].repeat_interleave(n, 0) for each in self.conds])
                for name in self.conds[0]}
        with dpo.autocast(self.problem):
            out = network(x_t, self.times[i].expand(len(x_t)), **cond).float()
        *empty, out = out.chunk(len(self.conds))
        if empty:
            out = empty[0] + self.cfg.guidance * (out - empty[0])
        if self.problem.prediction == "v_prediction":
            out = self.abars[i].sqrt() * out + (1 - self.abars[i]).sqrt() * x_t[:len(out)]
        return out.view_as(x)

    @torch.no_grad()
    def step(self, x, n, i):
        """Samples of n next steps: all from x (B, 1, *shape), or one from each of x (B, n, ...)."""
        eps = self.predict(self.problem.policy, x, i)
        mean, std = dpo.ddim_step(x, eps, self.abars[i], self.abars[i + 1])
        return mean + std * self.noise(n)

    @torch.no_grad()
    def predicted(self, x, i):
        """The x_0 that the policy expects at x, noised to times[i]; like x."""
        eps = self.predict(self.problem.policy, x, i)
        return dpo.ddim_step(x, eps, self.abars[i], self.abars[-1])[0]

    def nats(self, network, x_t, x_next, i):
        """Errors (B,) of the preferred and of the rejected step, x_t (B, 1 or 2, *shape) to x_next
        (B, 2, *shape)."""
        eps = self.predict(network, x_t, i)
        mean, std = dpo.ddim_step(x_t, eps, self.abars[i], self.abars[i + 1])
        squares = (x_next - mean).square().flatten(2).sum(2)  # (B, 2)
        return (self.problem.step_unit * squares / (2 * std**2)).unbind(1)


def pick(x, which):
    """x (B, n, *shape) at which (B, m): (B, m, *shape)."""
    return x[torch.arange(len(x), device=x.device)[:, None], which]


def steps(walk):
    """The steps that are compared, one at a time: x_t (B, 1 or 2, *shape), x_next (B, 2, *shape),
    preferred first, and the number of its noise level. The last is not random, so it is none."""
    cfg, score = walk.cfg, walk.problem.score
    if cfg.method == "spo":
        x = walk.noise(1)
        for i in range(cfg.sampling_steps - 1):
            candidates = walk.step(x, cfg.candidates, i)
            scores = score(walk.predicted(candidates, i + 1), walk.batch)
            order = scores.argsort(1, descending=True)  # (B, candidates)
            yield x, pick(candidates, order[:, [0, -1]]), i
            anyone = [torch.randint(cfg.candidates, (1,), generator=gen) for gen in walk.gens]
            x = pick(candidates, torch.stack(anyone).to(x.device))
    else:
        xs = [walk.noise(2)]
        for i in range(cfg.sampling_steps):
            xs.append(walk.step(xs[-1], 2, i))
        order = score(xs[-1], walk.batch).argsort(1, descending=True)  # (B, 2)
        xs = [pick(x, order) for x in xs]
        for i in range(cfg.sampling_steps - 1):
            yield xs[i], xs[i + 1], i


def clipped(error, reference, clip):
    """The error whose ratio p_theta / p_ref is kept in 1 +- clip, with no gradient beyond: then the
    margin of gamma stays outside the clip."""
    if not clip:
        return error
    return reference - (reference - error).clamp(math.log(1 - clip), math.log(1 + clip))


def on_policy_step(problem, batch, cfg):
    """dpo_step of these methods: the loss is a mean over pairs and steps, the activations of one
    step are held at a time. Returns the sums (8,) of METRICS over the pairs, means over steps."""
    walk, sums, count = Walk(problem, batch, cfg), 0, cfg.sampling_steps - 1
    for x_t, x_next, i in steps(walk):
        with torch.no_grad():
            ref_w, ref_l = walk.nats(problem.reference, x_t, x_next, i)
        err_w, err_l = walk.nats(problem.policy, x_t, x_next, i)
        losses, logit = dpo.dpo_loss(clipped(err_w, ref_w, cfg.clip),
                                     clipped(err_l, ref_l, cfg.clip), ref_w, ref_l,
                                     cfg.beta, cfg.gamma)
        (losses.sum() / count / cfg.batch).backward()
        right = (logit.sign() + 1) / 2
        values = torch.stack([losses, right, logit, logit**2, err_w, err_l, ref_w, ref_l])
        sums = sums + values.detach().sum(1) / count
    return sums


def main(argv=None):
    with dpo.command():
        cfg = parse(argv)
        dpo.check_out(cfg)
        device = dpo.start_processes(torch.cuda.is_available() and cfg.preset != "toy")
        problem = make_problem(cfg, device)
        if cfg.sampling_steps > len(problem.weight):
            raise dpo.Refusal(f"--sampling-steps {cfg.sampling_steps}: it should be at most"
                              f" {len(problem.weight)}, the model's own")
        if cfg.clip and dpo.rank_and_world()[0] == 0:
            logit = (cfg.beta + cfg.gamma) * math.log((1 + cfg.clip) / (1 - cfg.clip))
            low, high = (math.log1p(math.exp(-each)) for each in (logit, -logit))
            print(f"clip        {cfg.clip:g} keeps the loss in {low:.3f} to {high:.3f}"
                  + (" plus or minus the margin of gamma" if cfg.gamma else ""))
        rows = dpo.train(problem, cfg, on_policy_step)
        if dpo.rank_and_world()[0] == 0 and cfg.preset == "toy":
            dpo.report_toy(problem, rows)


if __name__ == "__main__":
    main()
