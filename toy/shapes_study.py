"""The experiments of the papers in miniature: what `python toy/shapes.py study` trains and draws.

Each seed has a base, drawings, pairs and labels of its own. All is judged by the true reward, on
images of the same prompts from the same noise. SHORT runs take 300 steps of 32 pairs, LONG ones
3,000 of 8; D3PO and SPO make as many network calls as SHORT, where a backward counts as two. On two
cores the whole takes about two hours (not timed in one go); it goes on where it was, from the
folder that --work names.

D3PO and SPO ask the true reward itself, thousands of times and without noise; DPO has seen 1,440
labels that agree with it in three of four. So they show what a perfect judge is worth, not which
loss is better. Rates, and betas but for the sweep of DPO's, were tried in one or two settings.
"""

import concurrent.futures
import functools
import io
import json
import multiprocessing
import os
import shutil
import statistics
import sys
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import diffusers
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import on_policy

import diffusion_dpo as dpo
from toy import figure, judge, shapes

OUT, SEEDS = HERE / "study", (0, 1, 2)
IMAGES = 10  # per caption
UNPROMPTED = 1000  # images without a prompt, whose shapes are counted
SHAPE_REWARD = {"circle": 0.0, "square": 1.0, "triangle": 2.0}  # nats
SHORT = "--steps 300 --batch 32 --micro-batch 32 --lr 3e-5 "
SMALL = "--batch 8 --micro-batch 8 --lr 3e-5 "  # steps of it
FEW = SMALL + "--steps 1000 --sample-every 500 --split train[:100] "
LONG = SMALL + "--steps 3000 --sample-every 1000 "
OWN = ("--data {base}/prompts.txt --lora 0 --clip 0 --guidance 1 --sampling-steps 10 "
       "--batch 8 --micro-batch 8 --lr 3e-5 ")  # of 8 prompts
FAIR = {"DPO": "--beta 100", "SEE-DPO": "--beta 100 --gamma 100",  # the third: as flat, no margin
        "DPO, beta' = beta + gamma": "--beta 200"}
SOLVERS = {"PNDM": (diffusers.PNDMScheduler, {}),  # the pipeline's own
           "DDIM": (diffusers.DDIMScheduler, {"clip_sample": False}),
           "Euler": (diffusers.EulerDiscreteScheduler, {}),
           "Euler, ancestral": (diffusers.EulerAncestralDiscreteScheduler, {})}


def experiments():
    """{experiment: {setting: (flags, whose labels)}}; equal runs are done once."""
    plain = (SHORT + "--beta 500", "true")
    return {
        "a-methods": {
            "DPO": plain,
            "SEE-DPO, gamma 25": (SHORT + "--beta 500 --gamma 25", "true"),
            "DPO, LoRA rank 8, lr 3e-4": (SHORT + "--beta 500 --lora 8 --lr 3e-4", "true"),
            "SFT on the preferred": (SHORT + "--method sft", "true"),
            "SFT on one of each pair, by chance": (SHORT + "--method sft", "chance"),
            "D3PO, by the true reward": (OWN + "--method d3po --beta 100 --steps 104", None),
            "SPO, by the true reward": (OWN + "--method spo --beta 30 --steps 118", None)},
        "c-labels": {"true reward": plain, "tiny CLIP": (SHORT + "--beta 500", "clip")},
        "d-few-pairs": {name: (FEW + flags, "true") for name, flags in FAIR.items()},
        "d-clip": {name: (LONG + flags, "clip") for name, flags in FAIR.items()},
        "e-beta": {beta: (SHORT + f"--beta {beta}", "true") for beta in (100, 500, 2000)},
        "e-draws": {1: plain} | {
            draws: (f"--steps 300 --lr 3e-5 --beta 500 --draws {draws} --batch {pairs}"
                    f" --micro-batch {pairs}", "true") for draws, pairs in ((4, 8), (16, 2))},
        "g-shares": {"beta 1": ("--steps 400 --lr 3e-5 --beta 1 --draws 4 --batch 16 --micro-batch"
                                " 16", "shape")}}


# ------------------------------------------------------------------------------------- the bases

the_judge = functools.cache(shapes.TrueReward)  # made once in a process


def by_true_reward(images, prompts):
    """The true reward as a scorer of toy/on_policy.py: of PIL images and their prompts."""
    pixels = [dpo.crop_square(image, shapes.SIDE, 0.5, 0.5, False) for image in images]
    return the_judge()(torch.stack(pixels), prompts)


def shape_of(images):
    """The numbers (N,) of the shapes, as in SHAPE_REWARD, of the drawings that are nearest."""
    nearest = the_judge().distances(images).argmin(1)
    return torch.tensor([list(SHAPE_REWARD).index(shapes.CLASSES[i][0]) for i in nearest.tolist()])


def make_base(work, seed):
    """A model and its pairs under four kinds of labels; and two numbers, in a file."""
    base, result = work / f"base-{seed}", work / f"base-{seed}.json"
    if result.exists():
        return
    if not base.exists():
        shapes.build(base, seed, shapes.SIZES)
    pairs = dpo.load_pairs(str(base / "pairs.parquet"), "train")
    captions, labels, P = pairs["prompt"][:], pairs["label"][:], len(pairs)

    def write(name, rows, labels):
        with dpo.atomic_write(base / f"pairs-{name}.parquet") as path:
            judge.write_pairs(rows, dict(enumerate(labels)), None, path)

    images = [[dpo.read_image(row[side], None) for row in pairs]
              for side in ("first", "second")]
    true_0, true_1 = (by_true_reward(side, captions)[0] for side in images)  # (P,) each
    score = judge.load_scorer(str(base / "clip"), "cpu")
    clip_0, clip_1 = (torch.cat([score(side[at:at + 64], captions[at:at + 64])[0]
                                 for at in range(0, P, 64)]) for side in images)
    gen = dpo.seeded_generator(seed, "chance")
    write("true", pairs, labels)
    write("clip", pairs, (clip_0 > clip_1).double().tolist())
    write("chance", pairs, torch.randint(2, (P,), generator=gen).double().tolist())
    samples = shapes.draw(dpo.load_pipeline(str(base)), [("", i) for i in range(P)],
                          f"shapes {seed}")
    reward = torch.tensor([*SHAPE_REWARD.values()])[shape_of(samples)]  # (P,)
    rows = [{"prompt": "", "first": {"bytes": shapes.png(samples[i])},
             "second": {"bytes": shapes.png(samples[i + 1])}} for i in range(0, P, 2)]
    write("shape", rows, shapes.bradley_terry(reward[::2], reward[1::2], seed).tolist())
    order = true_0 > true_1
    right = (order == torch.tensor(labels).bool())[P - shapes.HELD_OUT:]
    dpo.write_json(result, {"clip_agrees": (order == (clip_0 > clip_1)).double().mean().item(),
                            "accuracy_of_true_reward": right.double().mean().item()})


# -------------------------------------------------------------------------------------- the runs

def make_task(flags, labels, base, seed, out):
    """A task with its pairs, the held-out ones by the true reward, its configuration, and how it
    takes a step."""
    argv = ["--sample-every", "0", "--save-every", "100000", "--precision", "fp32", "--workers",
            "0", "--model", str(base), "--resolution", str(shapes.SIDE), "--seed", str(seed),
            "--out", str(out), *flags.format(base=base).split()]
    if labels is None:
        cfg, step = on_policy.parse(argv), on_policy.on_policy_step
        task = on_policy.make_task(cfg, torch.device("cpu"), by_true_reward)
    else:
        argv += ["--data", str(base / f"pairs-{labels}.parquet")]
        if labels != "shape" and "--split" not in argv:
            argv += ["--split", f"train[:-{shapes.HELD_OUT}]"]
        cfg, step = dpo.parse(argv), dpo.dpo_step
        task = dpo.make_task(cfg, torch.device("cpu"))
    if labels == "shape":
        task.weight = dpo.elbo_weight(task.alphas_cumprod)  # then beta is in nats
    of_true_reward = Namespace(data=str(base / "pairs.parquet"), resolution=shapes.SIDE, seed=seed,
                               caption_dropout=0)
    task.held_out = dpo.ImagePairs(of_true_reward, f"train[-{shapes.HELD_OUT}:]")
    return task, cfg, step


def jobs(images):
    return [(caption, number) for caption in shapes.CAPTIONS for number in range(images)]


def drawn(task, side, wanted, key="look"):
    """What "reference" or "policy" draws: (N, 3, 32, 32), uint8, for N jobs."""
    with figure.network_of(task, side):
        return shapes.draw(task.pipe, wanted, key)


def judged(task, side, score):
    """Of what a side draws for N jobs: the true rewards, whether they match, the tiny CLIP's
    scores, (N,) each, and its embeddings (N, D)."""
    prompts, images = [prompt for prompt, _ in jobs(IMAGES)], drawn(task, side, jobs(IMAGES))
    reward, match = the_judge()(images, prompts)
    clip, embeds = score([*images], prompts)
    return {"reward": reward, "match": match, "clip": clip, "embeds": embeds}


def compare(task, score, work, seed):
    """Numbers of the policy beside the reference. What the reference draws is the same in all runs
    of a seed, and kept in `work`."""
    kept = work / f"reference-{type(task.pipe.scheduler).__name__}-{seed}.safetensors"
    if not kept.exists():
        found = judged(task, "reference", score)
        partial = kept.with_suffix(f".{os.getpid()}")  # runs of a seed may write it at once
        save_file(found, partial)
        partial.replace(kept)
    sides = {"reference": load_file(kept), "policy": judged(task, "policy", score)}
    numbers = {f"{name}_{side}": found[name].mean().item() for side, found in sides.items()
               for name in ("reward", "match", "clip")}
    reward, embeds = (torch.stack([found[name] for found in sides.values()], 1)
                      for name in ("reward", "embeds"))  # (N, 2), (N, 2, D)
    shape = len(shapes.CAPTIONS), IMAGES, 2, -1
    found = judge.head_to_head(["reward"], reward.view(shape), embeds.view(shape))
    return numbers | {
        "win_rate": found["reward"]["win_rate"], "win_interval": found["reward"]["interval"],
        "diversity_reference": found["diversity"]["mean_reference"],
        "diversity_policy": found["diversity"]["mean_policy"]}


def by_solver(task, score, work, seed):
    """compare() by other solvers of 25 steps, for the same weights."""
    own, found = task.pipe.scheduler, {}
    for name, (kind, options) in SOLVERS.items():
        task.pipe.scheduler = kind.from_config(own.config, **options)
        found[name] = compare(task, score, work, seed)
    task.pipe.scheduler = own
    return found


def shares(task):
    """Of each shape the share in what reference and policy draw without a prompt, and in p*; and
    the total variation (TV) of reference and policy to p*."""
    reward = torch.tensor([*SHAPE_REWARD.values()])
    p = {side: shape_of(drawn(task, side, [("", i) for i in range(UNPROMPTED)], "shares"))
         .bincount(minlength=len(reward)) / UNPROMPTED for side in judge.SIDES}
    p["optimum"] = p["reference"] * torch.exp(reward / task.cfg.beta)
    p["optimum"] /= p["optimum"].sum()
    numbers = {f"tv_{side}": (p[side] - p["optimum"]).abs().sum().item() / 2
               for side in judge.SIDES}
    return numbers | {f"share_{side}_{name}": value for side in p
                      for name, value in zip(SHAPE_REWARD, p[side].tolist(), strict=True)}


def result_file(work, flags, labels, seed):
    name = "".join(c if c.isalnum() else "-" for c in f"{flags} {labels} {seed}").strip("-")
    return work / f"{name.replace('--', '-')}.json"


def read(path):
    return json.loads(path.read_text())


def run(work, flags, labels, seed):
    """One training, and its numbers in a file."""
    result = result_file(work, flags, labels, seed)
    if result.exists():
        return
    base, out = work / f"base-{seed}", result.with_suffix("")
    task, cfg, step = make_task(flags, labels, base, seed, out)
    score = judge.load_scorer(str(base / "clip"), "cpu")

    def compare_instead(task, path, rows):
        dpo.write_json(path.with_suffix(".json"),
                       {"step": int(path.stem[-8:])} | compare(task, score, work, seed))

    with mock.patch.object(dpo, "save_picture", compare_instead):
        dpo.train(task, cfg, step)
    if labels == "shape":  # it was trained without prompts: the rest would mean nothing
        return dpo.write_json(result, shares(task))
    numbers = compare(task, score, work, seed)
    held_out = dpo.evaluate(task)
    numbers["held_out_accuracy"] = held_out["reward_accuracy"]
    for side in "wl":
        rise = held_out[f"err_policy_{side}"] - held_out[f"err_ref_{side}"]
        numbers[f"held_out_rise_{side}"] = rise
    if curve := sorted(out.glob("samples/*.json")):
        numbers["curve"] = [read(file) for file in curve]
    if (flags, labels) == experiments()["a-methods"]["DPO"]:
        numbers["solvers"] = by_solver(task, score, work, seed)
        # Each colour and shape once, the grounds in turn.
        shown = [job for i, job in enumerate(jobs(1)) if i % 3 == i // 3 % 3]
        images = {side: drawn(task, side, shown) for side in judge.SIDES}
        captions = [caption for caption, _ in shown]
        shapes.draw_before_and_after(images, captions, work / f"sheet-{seed}.png")
    dpo.write_json(result, numbers)


def quietly(function, work, *inputs):
    """Calls function(work, *inputs) in a process of its own, on one core. If it ends in an error,
    what it has printed is in `work`. Raises UserError."""
    torch.set_num_threads(1)
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            function(work, *inputs)
    except BaseException as error:
        (work / "error.txt").write_text(f"{said.getvalue()}\n{inputs}: {error!r}\n")
        raise dpo.UserError(f"{inputs}: see {work}/error.txt") from error


# ---------------------------------------------------------------------------- tables and figures

def spread(runs, name):
    values = [numbers[name] for numbers in runs]
    return statistics.median(values), min(values), max(values)


def cell(runs, name):
    middle, low, high = spread(runs, name)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def table(results, columns):
    """A row for each setting: medians and ranges over the seeds."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {label} | " + " | ".join(cell(runs, name) for name in columns) + " |"
              for label, runs in results.items()]
    return "\n".join(lines) + "\n"


def with_gains(numbers):
    """Numbers of a seed, with what the policy has gained: each seed has a base of its own."""
    return numbers | {f"{name}_gain": numbers[f"{name}_policy"] - numbers[f"{name}_reference"]
                      for name in ("reward", "match", "clip", "diversity")}


GAINS = "reward_gain", "match_gain", "clip_gain", "diversity_gain"


def tables(found, bases):
    """All tables as a text."""
    plain, parts = found["a-methods"]["DPO"], [("bases", {"": bases}, list(bases[0]))]
    parts.append(("reference", {"": plain}, [gain.replace("gain", "reference") for gain in GAINS]))
    for name in "a-methods", "c-labels", "e-beta", "e-draws":
        results = {label: list(map(with_gains, runs)) for label, runs in found[name].items()}
        parts.append((name, results, (*GAINS, "win_rate", "held_out_accuracy", "held_out_rise_w",
                                      "held_out_rise_l")))
    for name in "d-few-pairs", "d-clip":
        for at in range(len(found[name]["DPO"][0]["curve"])):
            results = {label: [with_gains(numbers["curve"][at]) for numbers in runs]
                       for label, runs in found[name].items()}
            parts.append((f"{name}, {results['DPO'][0]['step']} steps", results, GAINS))
    solvers = {name: [with_gains(numbers["solvers"][name]) for numbers in plain]
               for name in SOLVERS}
    parts.append(("f-solvers", solvers, ("reward_reference", "reward_policy", *GAINS[:2],
                                         "win_rate")))
    runs = found["g-shares"]["beta 1"]
    by_shape = {shape: [{side: numbers[f"share_{side}_{shape}"]
                         for side in (*judge.SIDES, "optimum")} for numbers in runs]
                for shape in SHAPE_REWARD}
    parts += [("g-shares", by_shape, (*judge.SIDES, "optimum")),
              ("g-shares", {"": runs}, ("tv_reference", "tv_policy"))]
    return "\n".join(f"{name}\n{table(results, columns)}" for name, results, columns in parts)


def draw(found):
    """Two figures: the methods, and what many small steps do."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    shown = {"reward": "true reward", "match": "share that matches", "clip": "tiny CLIP's score",
             "diversity": "diversity"}
    chart, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained", sharey=True)
    methods = found["a-methods"]
    for ax, what in zip(axes, ("reward", "match", "diversity"), strict=True):
        for row, runs in enumerate(methods.values()):
            ax.plot([with_gains(numbers)[f"{what}_gain"] for numbers in runs], [row] * len(runs),
                    "o", c="tab:blue", alpha=0.6)
        ax.axvline(0, c="gray", ls=":")
        ax.set(yticks=range(len(methods)), yticklabels=list(methods),
               title=f"{shown[what]}: policy - reference")
    axes[0].invert_yaxis()
    chart.savefig(OUT / "shapes-methods.png", dpi=80)
    plt.close(chart)

    chart, rows = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axes, name, where in zip(rows, ("d-few-pairs", "d-clip"),
                                 ("100 pairs", "labels by the tiny CLIP"), strict=True):
        for ax, what in zip(axes, ("reward", "clip", "diversity"), strict=True):
            for label, runs in found[name].items():
                start = [{"step": 0, f"{what}_gain": 0} for _ in runs]
                points = [start, *zip(*[map(with_gains, numbers["curve"]) for numbers in runs],
                                      strict=True)]
                middle, low, high = zip(*(spread(each, f"{what}_gain") for each in points),
                                        strict=True)
                steps = [each[0]["step"] for each in points]
                ax.plot(steps, middle, marker=".", label=label)
                ax.fill_between(steps, low, high, alpha=0.15)
            ax.axhline(0, c="gray", ls=":")
            ax.set(title=f"{shown[what]}, gain; {where}", xlabel="step")
    rows[0][0].legend(fontsize=8)
    chart.savefig(OUT / "shapes-long.png", dpi=80)
    plt.close(chart)


# ------------------------------------------------------------------------------------------ all

def check_work(work):
    """Raises UserError if `work` is of a study with other settings, which no file's name tells."""
    here = {"images": IMAGES, "unprompted": UNPROMPTED, "shape_reward": SHAPE_REWARD,
            "held_out": shapes.HELD_OUT, "sampling": shapes.SAMPLING, "sizes": shapes.SIZES}
    file = work / "settings.json"
    if file.exists() and read(file) != here:
        raise dpo.UserError(f"--work {work}: holds a study with other settings; name a new folder")
    dpo.write_json(file, here)


def study(work):
    """Bases, then all runs, several at once; then tables and figures. Raises UserError."""
    check_work(work)
    plan = experiments()
    trainings = list(dict.fromkeys(job for settings in plan.values() for job in settings.values()))
    trainings.sort(key=lambda job: "--sample-every" not in job[0])  # the long ones of a seed first
    spawn = multiprocessing.get_context("spawn")
    with (concurrent.futures.ProcessPoolExecutor(os.cpu_count(), spawn) as pool,
          tqdm(total=len(SEEDS) * (1 + len(trainings)), ncols=99, unit=" runs") as bar):
        waiting = {pool.submit(quietly, make_base, work, seed): seed for seed in SEEDS}
        try:
            while waiting:
                done = next(concurrent.futures.as_completed(waiting))
                done.result()
                bar.update()
                seed = waiting.pop(done)
                if seed is not None:  # a base is there: now its runs can start
                    waiting |= {pool.submit(quietly, run, work, *job, seed): None
                                for job in trainings}
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else all others would be run first
            raise
    found = {name: {label: [read(result_file(work, *job, seed)) for seed in SEEDS]
                    for label, job in settings.items()} for name, settings in plan.items()}
    bases = [read(work / f"base-{seed}.json") for seed in SEEDS]
    dpo.write_json(OUT / "shapes.json", {"bases": bases} | {
        name: [{"setting": label, "seed": seed} | numbers for label, runs in results.items()
               for seed, numbers in zip(SEEDS, runs, strict=True)]
        for name, results in found.items()})
    print(tables(found, bases))
    draw(found)
    shutil.copy(work / "sheet-0.png", OUT / "shapes-sheet.png")
