"""The experiments on faces: what `python toy/study.py` trains and draws besides the 2-D toy.

Each seed has a base of its own: a model by toy/faces.py, with 1,000 pairs of its samples. A run is
judged at several steps, the points of its path. They are the steps at which it would draw a picture
(--sample-every). There IMAGES images of each caption are sampled, from the same noise as the
reference's. Smile and quality are those of toy/faces.py.
"""

import base64
import functools
import io
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from unittest import mock

import diffusers
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import on_policy

import diffusion_dpo as dpo
from toy import faces, figure, judge, remedies

WORK = Path("runs/study")  # of the bases, and of the numbers of each job
IMAGES = 8  # of each caption, at every point of a path
MANY = 40  # of each caption, for a histogram
DRAWS = 2  # of a held-out pair, at every point of a path


# ------------------------------------------------------------------------------ a base, once a seed

def make_base(seed):
    """Make a model and its pairs, unless they are there, and encode the pairs."""
    base = WORK / f"base-{seed}"
    if not base.exists():
        faces.build(base, seed, faces.SIZES)
    encoded = base.with_suffix(".safetensors")
    if encoded.exists():
        return
    table = dpo.load_pairs(str(base / "pairs.parquet"), "train")
    sides = [pixels_of([dpo.read_image(value, None) for value in table[side]])
             for side in ("first", "second")]
    images = torch.stack(sides, 1).flatten(0, 1)  # (2 P, 3, SIDE, SIDE): both of a pair, in turn

    captions = [caption for caption in table["prompt"] for _ in range(2)]
    score = judge.load_scorer(str(base / "clip"), "cpu")
    scores = []
    for first in range(0, len(images), 64):
        part = slice(first, first + 64)
        scores.append(score(list(images[part]), captions[part])[0])

    found = encode_pairs(dpo.load_pipeline(str(base)), images, table["prompt"])
    with dpo.atomic_write(encoded) as path:
        save_file(found | {"clip": torch.cat(scores).view(-1, 2),  # (P, 2)
                           "label": torch.tensor(table["label"])}, path)  # (P,), as in the table


def encode_pairs(pipe, images, captions):
    """What Encoded needs of P pairs. images (2 P, 3, SIDE, SIDE) has both of a pair in turn."""
    flips = torch.stack([images, images.flip(-1)], 1).flatten(0, 1)  # each as it is, and flipped
    with torch.no_grad():
        latents = torch.cat([dpo.encode_images(pipe, part) for part in flips.split(200)])
    caption = [faces.CAPTIONS.index(each) for each in captions]
    return {"latents": latents.contiguous().unflatten(0, (-1, 2, 2)),  # (P, 2, 2, 4, ...)
            "smile": faces.smile_of(images).view(-1, 2),  # (P, 2)
            "caption": torch.tensor(caption)}  # (P,)


def pixels_of(images):
    """Pixels (N, 3, SIDE, SIDE) uint8 of N images (PIL)."""
    return torch.stack([dpo.crop_square(image, faces.SIDE, 0.5, 0.5, False) for image in images])


class Encoded:
    """Encoded pairs as a dataset, with the flips and the empty captions of dpo.ImagePairs.

    `found` is what encode_pairs or the file of make_base gives. labels tells who prefers, as in
    FaceJob.
    """

    source = None  # a run tells its data by this and content(); here it has no need to

    def __init__(self, found, rows, labels, seed):
        if labels == "chance":
            first_is_better = found["label"].bool()  # (P,)
        else:
            first_is_better = found[labels][:, 0] > found[labels][:, 1]
        latents = found["latents"]
        preferred_first = torch.where(
            first_is_better.view(-1, 1, 1, 1, 1, 1), latents, latents.flip(1))
        self.latents = preferred_first[rows]
        self.caption = found["caption"][rows]
        self.smile = found["smile"][rows]
        self.seed = seed

    def content(self):
        return ""

    def __len__(self):
        return len(self.latents)

    def __getitem__(self, key):
        epoch, row = key
        gen = dpo.seeded_generator(self.seed, "augment", epoch, row)
        _, _, as_is, keep = torch.rand(4, generator=gen).tolist()  # the order of dpo.ImagePairs
        if epoch == dpo.HELD_OUT:
            as_is, keep = 1, 1
        x_w, x_l = self.latents[row, :, int(as_is < 0.5)]
        empty = torch.tensor(len(faces.CAPTIONS))  # its place in the list of encode(), below
        caption = self.caption[row] if keep >= 0.2 else empty  # as by --caption-dropout 0.2
        return {"epoch": epoch, "row": row, "unreadable": 0.0, "caption": caption,
                "x_w": x_w, "x_l": x_l}


class OfEncodedPairs:
    """Makes a task take batches of Encoded."""

    def encode(self, batch):
        if not hasattr(self, "texts"):  # each text is encoded once
            texts = [*faces.CAPTIONS, ""]
            self.texts = dpo.encode_prompts(self.pipe, texts, faces.SIDE)["prompt"]
        texts = self.texts[batch["caption"]]
        return batch["x_w"], batch["x_l"], {"prompt": torch.cat([texts, texts])}


class Faces(OfEncodedPairs, dpo.StableDiffusion):
    """Trains on encoded pairs."""


class OwnFaces(OfEncodedPairs, on_policy.OnPolicyImages):
    """Trains on samples of its own. Only the held-out pairs are encoded ones."""


# --------------------------------------------------------------------------------- what is measured

def jobs(n):
    """The jobs of faces.sample for n images of each caption. The captions come in turn."""
    return [(caption, number) for number in range(n) for caption in faces.CAPTIONS]


def drawn(task, side, n, key="look"):
    """What the "reference" or the "policy" draws, n images of each caption."""
    with figure.network_of(task, side):
        return faces.sample(task.pipe, jobs(n), key)


@functools.cache
def reference_images(base):
    """What the reference of a base draws. A process samples it once."""
    return faces.sample(dpo.load_pipeline(str(base)), jobs(IMAGES), "look")


def judged(images):
    """The means of faces.truth over images of jobs(n), and their diversity.

    Diversity is the mean distance of two images of one caption, the distance being that of truth.
    """
    n = len(images) // len(faces.CAPTIONS)
    found = faces.truth(images, faces.CAPTIONS * n)
    numbers = {name: values.mean().item() for name, values in found.items()}

    pixels = (images / 255).flatten(1).unflatten(0, (n, -1)).transpose(0, 1)  # (12, n, ...)
    distances = torch.cdist(pixels, pixels) / pixels.shape[2] ** 0.5  # (12, n, n)
    others = len(distances) * n * (n - 1)  # the distance of an image to itself is 0
    return numbers | {"diversity": (distances.sum() / others).item()}


@functools.cache
def judged_reference(base):
    return judged(reference_images(base))


def point(task, base, step):
    """A point of the path: the policy's numbers minus the reference's, and what held-out pairs say.

    "drift" is the mean distance of the policy's image from the reference's of the same noise.
    "rise_w" and "rise_l" are the policy's errors minus the reference's.
    """
    before = reference_images(base)
    after = drawn(task, "policy", IMAGES)
    task.latest = after[:len(faces.CAPTIONS)]  # for the sheet of run()
    reference, policy = judged_reference(base), judged(after)
    gains = {name: policy[name] - reference[name] for name in policy}
    distance = ((after.float() - before) / 255).flatten(1).square().mean(1).sqrt()
    with mock.patch.object(dpo, "EVAL_DRAWS", DRAWS):
        held_out = dpo.evaluate(task)
    return {"step": step} | gains | {
        "drift": distance.mean().item(),
        "accuracy": held_out["reward_accuracy"],
        "rise_w": held_out["err_policy_w"] - held_out["err_ref_w"],
        "rise_l": held_out["err_policy_l"] - held_out["err_ref_l"],
        "logit_std": held_out["logit_std"]}


SOLVERS = {  # {name: (scheduler, its options, steps)}
    "PNDM": (diffusers.PNDMScheduler, {}, 25),  # the pipeline's own
    "DDIM": (diffusers.DDIMScheduler, {"clip_sample": False}, 25),
    "Euler": (diffusers.EulerDiscreteScheduler, {}, 25),
    "Euler, ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}, 25),  # this is DDPM's step
    "DDIM, 100 steps": (diffusers.DDIMScheduler, {"clip_sample": False}, 100),
    "Euler, ancestral, 100 steps": (diffusers.EulerAncestralDiscreteScheduler, {}, 100),
}


def by_solver(task):
    """The numbers of reference and policy if the same weights are sampled by other solvers."""
    own = task.pipe.scheduler
    found = {}
    for name, (kind, options, steps) in SOLVERS.items():
        task.pipe.scheduler = kind.from_config(own.config, **options)
        with mock.patch.dict(faces.SAMPLING, num_inference_steps=steps):
            found[name] = {side: judged(drawn(task, side, IMAGES)) for side in judge.SIDES}
    task.pipe.scheduler = own
    return {"solvers": found}


def agreement(task):
    """The shares of all pairs in which labels or scorer prefer the larger smile."""
    found = load_file(Path(task.cfg.model).with_suffix(".safetensors"))
    by_smile, by_clip = (found[name][:, 0] > found[name][:, 1] for name in ("smile", "clip"))
    return {"labels_agree": (found["label"].bool() == by_smile).double().mean().item(),
            "clip_agrees": (by_clip == by_smile).double().mean().item()}


def apart(task):
    """How far apart the two smiles of a pair are, in the mean over the pairs trained on last."""
    first, second = task.pairs.smile.T
    return {"apart": (first - second).abs().mean().item()}


BINS = torch.linspace(-1.2, 1.2, 13)  # the borders of 12 bins


def histogram(smiles, weight=None):
    """Shares (12,) of smiles (N,) in the BINS. Smiles beyond them count in the outer ones."""
    counts, _ = torch.histogram(smiles.clamp(-1.19, 1.19), BINS, weight=weight)
    return counts / counts.sum()


def closed_form(task):
    """Compare the policy's smiles with those of p* = p_ref exp(R / beta) / Z.

    The smiles of p* are those of the reference's samples, weighted by exp(R / beta) / Z, where each
    caption has its own Z. A "tv" is the total variation between a histogram and that of p*, and
    "tv_floor" that of another estimate of p*, from other samples.
    """
    smile = {side: faces.smile_of(drawn(task, side, MANY)) for side in judge.SIDES}
    again = faces.smile_of(drawn(task, "reference", MANY, "again"))

    def optimum(smiles):
        exponent = (faces.REWARD * smiles / task.cfg.beta).view(MANY, -1)  # (MANY, 12 captions)
        return histogram(smiles, exponent.softmax(0).flatten())

    p = {side: histogram(smile[side]) for side in smile}
    p |= {"optimum": optimum(smile["reference"]), "again": optimum(again)}
    tv = {side: ((p[side] - p["optimum"]).abs().sum() / 2).item() for side in p}
    return {"tv_reference": tv["reference"], "tv_policy": tv["policy"], "tv_floor": tv["again"],
            "histograms": {name: each.tolist() for name, each in p.items()}}


# --------------------------------------------------------------------------------- the experiments

@dataclass(frozen=True)
class FaceJob:
    """One training on faces: flags of its command, and what differs from it."""

    flags: str = ""
    seed: int = 0
    method: str = "dpo"
    labels: str = "chance"  # by chance from the smile (Bradley-Terry), or by smile or clip alone
    pairs: int = 800
    loss: Callable | None = None  # of toy/remedies.py
    in_nats: bool = False  # errors with the ELBO's weights
    first: "FaceJob | None" = None  # the first round, if this is the second one
    drawn_by: str = "policy"  # who draws the new pairs: the policy of the first, or its "reference"
    onward: bool = False  # begins at that policy, with the new pairs alone; else at the base
    measures: tuple = ()

    def but(self, flags="", **changes):
        """The same with more flags and other changes."""
        return replace(self, flags=f"{self.flags} {flags}".strip(), **changes)


# D3PO and SPO, of OWN, take as many network passes as OTHER. A backward pass counts as two.
OTHER = FaceJob("--steps 300 --batch 32 --lr 3e-5 --beta 500 --sample-every 75")
OWN = FaceJob("--lora 0 --clip 0 --guidance 1 --sampling-steps 10 --batch 8 --lr 3e-5")
NOISY = FaceJob("--steps 160 --batch 16 --lr 1e-4 --beta 500 --sample-every 40")
CLEAN = NOISY.but(pairs=100, labels="smile")
BRIEF = FaceJob("--steps 150 --batch 16 --lr 3e-5 --beta 500 --sample-every 75", labels="smile")
ROUND = BRIEF.but(pairs=100, measures=(apart,))
NATS = FaceJob("--steps 300 --batch 8 --draws 16 --lr 3e-5 --beta 3 --sample-every 75",
               in_nats=True, measures=(closed_form,))
LOSSES = {"IPO": remedies.ipo, "label smoothing 0.1": remedies.label_smoothing,
          "SFT mix 0.25": remedies.sft_mix, "SFT mix 0.25 beta": remedies.strong_sft_mix,
          "DPOP, lambda 5": remedies.dpop, "clamp at 1": remedies.clamp,
          "loser by half": remedies.half_loser, "SDPO, mu 0.9": remedies.sdpo,
          "moving reference": remedies.moving_reference}


def remedies_of(job):
    """{name: job}: plain DPO at three rates, and each remedy at the highest (LoRA at its own).

    The moving reference is also tried at a lower rate.
    """
    settings = {"DPO, lr 1e-5": job.but("--lr 1e-5"), "DPO, lr 3e-5": job.but("--lr 3e-5"),
                "DPO, lr 1e-4": job}
    settings |= {name: job.but(loss=loss) for name, loss in LOSSES.items()}
    return settings | {"gamma 25": job.but("--gamma 25"), "beta 2000": job.but("--beta 2000"),
                       "4 draws of 4 pairs": job.but("--draws 4 --batch 4"),
                       "LoRA, lr 1e-3": job.but("--lora 8 --lr 1e-3"),
                       "moving reference, lr 3e-5": job.but("--lr 3e-5",
                                                            loss=remedies.moving_reference)}


PLAIN = OTHER.but(measures=(by_solver,))
EXPERIMENTS = {
    "faces-methods": {
        "DPO": PLAIN,
        "SEE-DPO, gamma 25": OTHER.but("--gamma 25"),
        "SFT": OTHER.but(method="sft"),
        "LoRA, lr 3e-4": OTHER.but("--lora 8 --lr 3e-4"),
        "D3PO": OWN.but("--beta 100 --steps 104 --sample-every 26", method="d3po"),
        "SPO": OWN.but("--beta 30 --steps 118 --sample-every 30", method="spo"),
    },
    "faces-labels": {
        "the smile": PLAIN,
        "the tiny CLIP": OTHER.but(labels="clip", measures=(agreement,)),
    },
    "faces-noisy": remedies_of(NOISY),
    "faces-clean": remedies_of(CLEAN),
    "faces-pairs": {n: BRIEF.but(pairs=n) for n in (25, 50, 100, 200, 400, 800)},
    "faces-beta": {100: OTHER.but("--beta 100"), 500: PLAIN, 2000: OTHER.but("--beta 2000")},
    "faces-nats": {"beta 3": NATS},
    "faces-rounds": {
        "one round": ROUND,
        "one round, 200 pairs": ROUND.but("--steps 300", pairs=200),
        "two rounds, anew": ROUND.but("--steps 300", first=ROUND),
        "two rounds, onward": ROUND.but(first=ROUND, onward=True),
        "onward, pairs of the base": ROUND.but(first=ROUND, onward=True, drawn_by="reference"),
    },
}


def make_task(job, out):
    """The task of a job, its configuration, and how it takes a step."""
    base = WORK / f"base-{job.seed}"
    found = load_file(base.with_suffix(".safetensors"))
    argv = ["--model", str(base), "--resolution", str(faces.SIDE), "--precision", "fp32",
            "--workers", "0", "--save-every", "100000", "--micro-batch", "32", "--method",
            job.method, "--seed", str(job.seed), "--out", str(out), *job.flags.split()]
    device = torch.device("cpu")
    if job.method in ("d3po", "spo"):
        cfg = on_policy.parse([*argv, "--data", str(base / "prompts.txt")])
        task = OwnFaces(cfg, device, faces.CAPTIONS, by_the_smile)
        step = on_policy.on_policy_step
    else:
        cfg = dpo.parse(argv)
        pairs = Encoded(found, range(job.pairs), job.labels, job.seed)
        task = Faces(cfg, device, dpo.load_pipeline(str(base)), pairs)
        step = remedies.step_of(job.loss) if job.loss else dpo.dpo_step

    n = len(found["label"])
    held_out = range(n - faces.HELD_OUT, n)
    task.held_out = Encoded(found, held_out, "chance", job.seed)  # whatever labels are trained on
    if job.in_nats:
        task.weight = dpo.elbo_weight(task.alphas_cumprod)
    return task, cfg, step


def by_the_smile(images, prompts):
    """The reward as a scorer for toy/on_policy.py: scores (N,) of N images (PIL), no embeddings."""
    return faces.REWARD * faces.smile_of(pixels_of(images)), None


def add_round(task, job, out):
    """Train the first round of a job, draw as many pairs again, and prepare the task for them.

    Returns the path up to there. It is empty if the task begins at the base.
    """
    first, path = train(replace(job.first, seed=job.seed), out)
    n = math.ceil(job.pairs / len(faces.CAPTIONS))
    sides = [drawn(first, job.drawn_by, n, f"round 2, {job.seed}, {side}") for side in (0, 1)]
    images = torch.stack(sides, 1)[:job.pairs].flatten(0, 1)
    found = encode_pairs(task.pipe, images, (faces.CAPTIONS * n)[:job.pairs])
    new, old = Encoded(found, range(job.pairs), job.labels, job.seed), task.pairs
    task.pairs = new
    if job.onward:
        task.policy.load_state_dict(first.policy.state_dict())
        task.reference = first.policy.requires_grad_(False)
        return path

    for name in ("latents", "caption", "smile"):
        setattr(new, name, torch.cat([getattr(old, name), getattr(new, name)]))
    return []


def train(job, out):
    """Train a job in the folder `out`. Returns its task and its path, a point for every picture."""
    base = WORK / f"base-{job.seed}"
    task, cfg, step = make_task(job, f"{out}/run")
    reference = task.reference
    path = add_round(task, job, f"{out}/first") if job.first else []
    done = path[-1]["step"] if path else 0

    def add_to_path(task, file, rows):
        with mock.patch.object(task, "reference", reference):  # remedies and rounds may move it
            path.append(point(task, base, done + int(file.stem[-8:])))

    with (remedies.prepared(task, job.loss),
          mock.patch.object(dpo, "save_picture", add_to_path)):
        dpo.train(task, cfg, step)
    return task, path


def run(job, out):
    """The numbers of a job, trained in the folder `out`. "path" is that of train().

    "sheet" is a PNG, in base64: the last policy's face for each of the 12 captions, in a row.
    """
    base = WORK / f"base-{job.seed}"
    task, path = train(job, out)
    row = faces.to_png(torch.cat([*task.latest], 2))
    numbers = {"reference": judged_reference(base), "path": path,
               "sheet": base64.b64encode(row).decode()}
    for measure in job.measures:
        numbers |= measure(task)
    return numbers


# ---------------------------------------------------------------------------- tables and figures

LOST = 0.005  # of quality, at which remedies are compared


def smile_at_quality(path, lost=LOST):
    """The largest gain in smile on a path, where the quality has not fallen by more than `lost`.

    The path starts at the reference, with gains of 0. Between its points, both are interpolated.
    """
    points = [(0.0, 0.0)] + [(each["smile"], each["quality"]) for each in path]
    best = 0.0
    for (smile_0, quality_0), (smile_1, quality_1) in itertools.pairwise(points):
        for share in torch.linspace(0, 1, 101).tolist():
            if quality_0 + share * (quality_1 - quality_0) >= -lost:
                best = max(best, smile_0 + share * (smile_1 - smile_0))
    return best


def spread(values):
    """The median of the seeds' values, and their range."""
    return f"{median(values):+.3f} ({min(values):+.3f} to {max(values):+.3f})"


def print_table(title, rows):
    """Print rows {setting: {column: [number of a seed, ...]}} as a table of Markdown."""
    columns = list(next(iter(rows.values())))
    print(f"\n{title}\n")
    print("| | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for setting, cells in rows.items():
        print(f"| {setting} | " + " | ".join(spread(cells[name]) for name in columns) + " |")


def cells_of(seeds, names):
    """The cells {name: [number of a seed, ...]} of a row, from a dict of numbers for each seed."""
    return {name: [numbers[name] for numbers in seeds] for name in names}


def ends(runs):
    """The last points of the paths, and what is compared at equal quality."""
    shown = ("smile", "happy", "quality", "match", "diversity", "drift", "accuracy", "rise_w")
    cells = cells_of([numbers["path"][-1] for numbers in runs], shown)
    paths = [numbers["path"] for numbers in runs]
    return {"at equal quality": [smile_at_quality(path) for path in paths],
            "at twice the loss": [smile_at_quality(path, 2 * LOST) for path in paths]} | cells


SIGNALS = ("accuracy", "rise_w", "logit_std", "drift")  # of a point, without knowing the truth


def rank_correlation(xs, ys):
    """Spearman's: 1 if the larger x always comes with the larger y. Equal values share a rank."""
    values = torch.tensor([xs, ys], dtype=torch.float64)  # (2, N)
    # How many of the N are smaller, less how many are larger: a rank, but for a factor and a shift.
    ranks = (values[:, :, None] - values[:, None]).sign().sum(2)
    return torch.corrcoef(ranks)[0, 1].item()


def print_signals(settings):
    """How well each signal tells smile and lost quality, over all points of the runs of a seed."""
    rows = {signal: {"with smile": [], "with quality lost": []} for signal in SIGNALS}
    for of_seed in zip(*settings.values(), strict=True):
        points = [each for numbers in of_seed for each in numbers["path"]]
        smiles = [each["smile"] for each in points]
        lost = [-each["quality"] for each in points]
        for signal, cells in rows.items():
            values = [each[signal] for each in points]
            cells["with smile"].append(rank_correlation(values, smiles))
            cells["with quality lost"].append(rank_correlation(values, lost))
    print_table("signals: rank correlation", rows)


def print_stops(settings):
    """What plain DPO gains if it is stopped at its highest accuracy, and what in the end."""
    rows = {}
    for setting, runs in settings.items():
        if setting.startswith("DPO,"):
            paths = [numbers["path"] for numbers in runs]
            best = [max(path, key=lambda each: each["accuracy"]) for path in paths]
            last = [path[-1] for path in paths]
            shown = ("step", "smile", "quality")
            rows[f"{setting}, highest accuracy"] = cells_of(best, shown)
            rows[f"{setting}, the end"] = cells_of(last, shown)
    print_table("stopped at", rows)


def print_wins(settings):
    """In how many seeds each setting gains more than DPO at 1e-4 that is stopped earlier."""
    for column in ("at equal quality", "at twice the loss"):
        print(f"\nseeds ahead of DPO at 1e-4, {column}")
        plain = ends(settings["DPO, lr 1e-4"])[column]
        for setting, runs in settings.items():
            gained = ends(runs)[column]
            wins = sum(mine > its for mine, its in zip(gained, plain, strict=True))
            print(f"{setting}: {wins} of {len(plain)}")


def print_solvers(runs):
    """What by_solver() has measured in the runs of a setting."""
    rows = {}
    for solver in SOLVERS:
        found = [numbers["solvers"][solver] for numbers in runs]
        rows[solver] = {}
        for what in ("smile", "quality"):
            before = [each["reference"][what] for each in found]
            gained = [each["policy"][what] - each["reference"][what] for each in found]
            rows[solver] |= {f"{what} of the reference": before, f"{what}, gained": gained}
    print_table("solvers", rows)


def print_numbers(name, settings):
    """The tables of one experiment. settings: {setting: [numbers of a seed, ...]}."""
    print_table(name, {setting: ends(runs) for setting, runs in settings.items()})
    if name in ("faces-noisy", "faces-clean"):
        print_wins(settings)
        print_signals(settings)
        print_stops(settings)
    for setting, runs in settings.items():
        if name == "faces-methods" and "solvers" in runs[0]:  # other experiments have it, too
            print_solvers(runs)
        shown = ("tv_reference", "tv_policy", "tv_floor", "labels_agree", "clip_agrees",
                 "apart")
        measured = [key for key in shown if key in runs[0]]
        if measured:
            print_table(f"{setting}: more", {"": cells_of(runs, measured)})

    first, *_ = settings.values()  # all settings have the same references
    references = [numbers["reference"] for numbers in first]
    print_table("the base", {"": cells_of(references, references[0])})


def draw_paths(ax, settings):
    """Smile against quality along the runs: a line for each seed, a colour for each setting."""
    for number, (setting, runs) in enumerate(settings.items()):
        for seed, numbers in enumerate(runs):
            points = [(0, 0)] + [(each["smile"], each["quality"]) for each in numbers["path"]]
            smiles, qualities = zip(*points, strict=True)
            label = setting if seed == 0 else None
            ax.plot(smiles, qualities, ".-", c=f"C{number}", alpha=0.7, label=label)
    ax.axhline(0, c="gray", ls=":", lw=1)
    ax.set(xlabel="smile, gained", ylabel="quality, gained")


BEST = ("DPO, lr 3e-5", "DPO, lr 1e-4", "SFT mix 0.25", "clamp at 1", "moving reference",
        "moving reference, lr 3e-5")  # whose paths are shown
SHOWN = [("faces-methods", "DPO"), ("faces-clean", "DPO, lr 1e-4"), ("faces-clean", "IPO"),
         ("faces-noisy", "4 draws of 4 pairs"), ("faces-methods", "SPO")]  # on the sheet


def draw_sheet(found, path):
    """What the reference and some policies of the first seed draw: a row for each."""
    captions = len(faces.CAPTIONS)
    images = [faces.to_pil(image) for image in reference_images(WORK / "base-0")[:captions]]
    for experiment, setting in SHOWN:
        png = base64.b64decode(found[experiment][setting][0]["sheet"])
        sheet = Image.open(io.BytesIO(png))
        images += [sheet.crop((x, 0, x + faces.SIDE, faces.SIDE))
                   for x in range(0, sheet.width, faces.SIDE)]
    faces.enlarge(images, captions).quantize(128).save(path)  # a smaller file


def draw_histograms(ax, runs):
    """The smiles of reference and policy beside p*: a line for each seed."""
    middles = (BINS[1:] + BINS[:-1]) / 2
    lines = {"reference": ("reference", "gray"), "policy": ("policy", "tab:blue"),
             "optimum": ("p*, closed form", "black")}
    for whose, (name, colour) in lines.items():
        for seed, numbers in enumerate(runs):
            label = name if seed == 0 else None
            ax.plot(middles, numbers["histograms"][whose], ".-", c=colour, alpha=0.7, label=label)
    ax.set(xlabel="smile", ylabel="share of the faces", ylim=0)
