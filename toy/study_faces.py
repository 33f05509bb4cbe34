"""The experiments on faces: what `python toy/study.py` trains and draws besides the 2-D toy.

Each seed has a base of its own: a model by toy/faces.py, with 1,000 pairs of its samples. A run is
judged along its whole path. At every picture that is due, IMAGES images of each caption are sampled
from the same noise as the reference's. Smile and quality are those of toy/faces.py.
"""

import base64
import functools
import io
import itertools
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
    images = []
    for side in ("first", "second"):
        pil = [dpo.read_image(value, None) for value in table[side]]
        images.append(torch.stack([dpo.crop_square(each, faces.SIDE, 0.5, 0.5, False)
                                   for each in pil]))
    pixels = torch.stack(images, 1)  # (P, 2, 3, SIDE, SIDE)

    captions = [caption for caption in table["prompt"] for _ in range(2)]
    score = judge.load_scorer(str(base / "clip"), "cpu")
    clip = [score(list(some), captions[64 * i:64 * i + 64])[0]
            for i, some in enumerate(pixels.flatten(0, 1).split(64))]

    vae = dpo.load_pipeline(str(base)).vae
    both = torch.stack([pixels, pixels.flip(-1)], 2).flatten(0, 2) / 127.5 - 1
    with torch.no_grad():
        latents = torch.cat([vae.encode(some).latent_dist.mode() for some in both.split(200)])
    latents = latents.contiguous() * vae.config.scaling_factor
    save_file({"latents": latents.unflatten(0, (-1, 2, 2)),  # first, second; as it is, flipped
               "smile": faces.smile_of(pixels.flatten(0, 1)).view(-1, 2),  # (P, 2)
               "clip": torch.cat(clip).view(-1, 2).float().contiguous(),
               "label": torch.tensor(table["label"]),  # (P,), as in pairs.parquet
               "caption": torch.tensor([faces.CAPTIONS.index(each) for each in table["prompt"]])},
              encoded)


class Encoded:
    """Encoded pairs as a dataset, with the flips and the empty captions of dpo.ImagePairs."""

    def __init__(self, base, rows, labels, seed):
        found = load_file(base.with_suffix(".safetensors"))
        better = {"chance": found["label"],
                  "smile": found["smile"][:, 0] > found["smile"][:, 1],
                  "clip": found["clip"][:, 0] > found["clip"][:, 1]}[labels].bool()
        latents = torch.where(better[:, None, None, None, None, None],
                              found["latents"], found["latents"].flip(1))
        self.latents, self.caption, self.seed = latents[rows], found["caption"][rows], seed

    def __len__(self):
        return len(self.latents)

    def __getitem__(self, key):
        epoch, row = key
        gen = dpo.seeded_generator(self.seed, "augment", epoch, row)
        _, _, as_is, keep = torch.rand(4, generator=gen).tolist()  # as in dpo.ImagePairs
        if epoch == dpo.HELD_OUT:
            as_is, keep = 1, 1
        x_w, x_l = self.latents[row, :, int(as_is < 0.5)]
        caption = self.caption[row] if keep >= 0.2 else torch.tensor(len(faces.CAPTIONS))  # none
        return {"epoch": epoch, "row": row, "unreadable": 0.0, "caption": caption,
                "x_w": x_w, "x_l": x_l}

    source = None

    def content(self):
        return ""


class OfEncodedPairs:
    """A task on faces, for batches of Encoded."""

    def encode(self, batch):
        if not hasattr(self, "texts"):
            self.texts = self.encode_prompts([*faces.CAPTIONS, ""])["prompt"]
        texts = self.texts[batch["caption"]]
        return batch["x_w"], batch["x_l"], {"prompt": torch.cat([texts, texts])}


class Faces(OfEncodedPairs, dpo.StableDiffusion):
    pass


class OwnFaces(OfEncodedPairs, on_policy.OnPolicyImages):
    pass


# --------------------------------------------------------------------------------- what is measured

def jobs(images):
    return [(caption, number) for number in range(images) for caption in faces.CAPTIONS]


def captions_of(images):
    return [caption for caption, _ in jobs(images)]


def drawn(task, side, images, key="look"):
    with figure.network_of(task, side):
        return faces.sample(task.pipe, jobs(images), key)


@functools.cache
def reference_images(base):
    """What the reference of a base draws, once in a process."""
    return faces.sample(dpo.load_pipeline(str(base)), jobs(IMAGES), "look")


def judged(images):
    """Means of the truth of images, and their diversity.

    That is the mean distance of two images of one caption, as in faces.truth.
    """
    captions = len(faces.CAPTIONS)
    n = len(images) // captions
    found = faces.truth(images, captions_of(n))
    numbers = {name: values.mean().item() for name, values in found.items()}

    pixels = (images / 255).flatten(1).unflatten(0, (n, captions)).transpose(0, 1)
    distances = torch.cdist(pixels, pixels) / pixels.shape[2] ** 0.5  # (12, n, n)
    others = captions * n * (n - 1)  # a distance of an image to itself is 0
    return numbers | {"diversity": (distances.sum() / others).item()}


@functools.cache
def judged_reference(base):
    return judged(reference_images(base))


def point(task, base, step):
    """A point of the path: the policy's numbers minus the reference's, and what held-out pairs say.

    drift is the mean distance of the policy's image from the reference's of the same noise.
    """
    before, after = reference_images(base), drawn(task, "policy", IMAGES)
    task.latest = after[:len(faces.CAPTIONS)]
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
    "Euler, ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}, 25),  # is DDPM's sampler
    "DDIM, 100 steps": (diffusers.DDIMScheduler, {"clip_sample": False}, 100),
    "Euler, ancestral, 100 steps": (diffusers.EulerAncestralDiscreteScheduler, {}, 100),
}


def by_solver(task):
    """Smile and quality of reference and policy by other solvers, for the same weights."""
    own, found = task.pipe.scheduler, {}
    for name, (kind, options, steps) in SOLVERS.items():
        task.pipe.scheduler = kind.from_config(own.config, **options)
        with mock.patch.dict(faces.SAMPLING, num_inference_steps=steps):
            found[name] = {side: judged(drawn(task, side, IMAGES)) for side in judge.SIDES}
    task.pipe.scheduler = own
    return {"solvers": found}


def agreement(task):
    """The share of all pairs in which the labels, and the scorer, say what the smiles say."""
    found = load_file(Path(task.cfg.model).with_suffix(".safetensors"))
    by_smile, by_clip = (found[name][:, 0] > found[name][:, 1] for name in ("smile", "clip"))
    return {"labels_agree": (found["label"].bool() == by_smile).double().mean().item(),
            "clip_agrees": (by_clip == by_smile).double().mean().item()}


BINS = torch.linspace(-1.2, 1.2, 13)


def histogram(smiles, weight=None):
    """Shares (12,) of smiles (N,) in the BINS."""
    weight = torch.ones_like(smiles) if weight is None else weight
    bins = torch.bucketize(smiles.clamp(-1.19, 1.19), BINS) - 1
    return torch.zeros(len(BINS) - 1).index_add(0, bins, weight) / weight.sum()


def closed_form(task):
    """The histogram of the policy's smiles beside p*(m), prop. to p_ref(m) exp(R(m) / beta).

    The reference's samples are weighted for each caption by itself. "floor" is the distance of two
    such estimates from different samples.
    """
    smile = {side: faces.smile_of(drawn(task, side, MANY)) for side in judge.SIDES}
    again = faces.smile_of(drawn(task, "reference", MANY, "again"))

    def optimum(smiles):
        exponent = (faces.REWARD * smiles / task.cfg.beta).view(MANY, -1)  # (MANY, 12)
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
    measures: tuple = ()

    def but(self, flags="", **changes):
        return replace(self, flags=f"{self.flags} {flags}".strip(), **changes)


OTHER = FaceJob("--steps 300 --batch 32 --lr 3e-5 --beta 500 --sample-every 75")
OWN = FaceJob("--lora 0 --clip 0 --guidance 1 --sampling-steps 10 --batch 8 --lr 3e-5")
NOISY = FaceJob("--steps 160 --batch 16 --lr 1e-4 --beta 500 --sample-every 40")
CLEAN = NOISY.but(pairs=100, labels="smile")
BRIEF = FaceJob("--steps 150 --batch 16 --lr 3e-5 --beta 500 --sample-every 75", labels="smile")
NATS = FaceJob("--steps 300 --batch 8 --draws 16 --lr 3e-5 --beta 3 --sample-every 75",
               in_nats=True, measures=(closed_form,))
LOSSES = {"IPO": remedies.ipo, "label smoothing 0.1": remedies.label_smoothing,
          "SFT mix 0.25": remedies.sft_mix, "SFT mix 0.25 beta": remedies.strong_sft_mix,
          "DPOP, lambda 5": remedies.dpop, "clamp at 1": remedies.clamp,
          "loser by half": remedies.half_loser, "SDPO, mu 0.9": remedies.sdpo,
          "moving reference": remedies.moving_reference}


def remedies_of(job):
    """{name: job}: plain DPO at three rates, and each remedy at the highest."""
    settings = {"DPO, lr 1e-5": job.but("--lr 1e-5"), "DPO, lr 3e-5": job.but("--lr 3e-5"),
                "DPO, lr 1e-4": job}
    settings |= {name: job.but(loss=loss) for name, loss in LOSSES.items()}
    return settings | {"gamma 25": job.but("--gamma 25"), "beta 2000": job.but("--beta 2000"),
                       "4 draws of 4 pairs": job.but("--draws 4 --batch 4"),
                       "LoRA, lr 1e-3": job.but("--lora 8 --lr 1e-3")}


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
}


def make_task(job, out):
    """The task of a job, its configuration, and how it takes a step."""
    base = WORK / f"base-{job.seed}"
    argv = ["--model", str(base), "--resolution", str(faces.SIDE), "--precision", "fp32",
            "--workers", "0", "--save-every", "100000", "--micro-batch", "32", "--method",
            job.method, "--seed", str(job.seed), "--out", str(out), *job.flags.split()]
    rows = len(load_file(base.with_suffix(".safetensors"))["label"])
    device, pipe = torch.device("cpu"), dpo.load_pipeline(str(base))
    if job.method in ("d3po", "spo"):
        cfg = on_policy.parse([*argv, "--data", str(base / "prompts.txt")])
        task = OwnFaces(cfg, device, faces.CAPTIONS, by_the_smile)
        step = on_policy.on_policy_step
    else:
        cfg = dpo.parse(argv)
        pairs = Encoded(base, range(job.pairs), job.labels, job.seed)
        task = Faces(cfg, device, pipe, pairs)
        step = remedies.step_of(job.loss) if job.loss else dpo.dpo_step
    task.held_out = Encoded(base, range(rows - faces.HELD_OUT, rows), "chance", job.seed)
    if job.in_nats:
        task.weight = dpo.elbo_weight(task.alphas_cumprod)
    return task, cfg, step


def by_the_smile(images, prompts):
    """The reward as a scorer of toy/on_policy.py: of PIL images."""
    pixels = torch.stack([dpo.crop_square(image, faces.SIDE, 0.5, 0.5, False) for image in images])
    smiles = faces.smile_of(pixels)
    return faces.REWARD * smiles, smiles[:, None]


def run(job, out):
    """Train a job in the folder `out`. Returns its numbers; "path" has those of every picture.

    "sheet" is a PNG of the 12 captions by the policy in the end, in base64.
    """
    base = WORK / f"base-{job.seed}"
    task, cfg, step = make_task(job, out)
    path = []

    def add_to_path(task, file, rows):
        with mock.patch.object(task, "reference", first):
            path.append(point(task, base, int(file.stem[-8:])))

    with (remedies.prepared(task, job.loss) as first,
          mock.patch.object(dpo, "save_picture", add_to_path)):
        dpo.train(task, cfg, step)
    numbers = {"reference": judged_reference(base), "path": path}
    with io.BytesIO() as file:
        faces.to_pil(torch.cat([*task.latest], 2)).save(file, "PNG")
        numbers["sheet"] = base64.b64encode(file.getvalue()).decode()
    for measure in job.measures:
        numbers |= measure(task)
    return numbers


# ---------------------------------------------------------------------------- tables and figures

LOST = 0.005  # of quality, at which remedies are compared


def smile_at_quality(path, lost=LOST):
    """The largest gain in smile on a path whose quality has not fallen by more than `lost`.

    Between the points of a path, smile and quality are interpolated. It starts at 0, 0.
    """
    points = [(0.0, 0.0)] + [(each["smile"], each["quality"]) for each in path]
    best = 0.0
    for (smile_0, quality_0), (smile_1, quality_1) in itertools.pairwise(points):
        for share in torch.linspace(0, 1, 101).tolist():
            if quality_0 + share * (quality_1 - quality_0) >= -lost:
                best = max(best, smile_0 + share * (smile_1 - smile_0))
    return best


def spread(values):
    """The median of the seeds and their range."""
    return f"{median(values):+.3f} ({min(values):+.3f} to {max(values):+.3f})"


def print_table(title, rows):
    """rows: {setting: {column: [number of a seed, ...]}}, printed as a table of Markdown."""
    columns = list(next(iter(rows.values())))
    print(f"\n{title}\n\n| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for setting, cells in rows.items():
        print(f"| {setting} | " + " | ".join(spread(cells[name]) for name in columns) + " |")


def ends(runs):
    """The last points of the paths, and what is compared at equal quality."""
    shown = ("smile", "happy", "quality", "match", "diversity", "drift", "accuracy", "rise_w")
    cells = {name: [numbers["path"][-1][name] for numbers in runs] for name in shown}
    return {"at equal quality": [smile_at_quality(numbers["path"]) for numbers in runs]} | cells


SIGNALS = ("accuracy", "rise_w", "logit_std", "drift")  # of a path, without knowing the truth


def rank_correlation(xs, ys):
    """Spearman's: 1 if the larger x always comes with the larger y."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (xs, ys)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def print_signals(settings):
    """How well each signal tells smile and lost quality, over all points of the runs of a seed.

    And what a run of plain DPO gains if it is stopped at the point of the highest accuracy.
    """
    rows = {signal: {"with smile": [], "with quality lost": []} for signal in SIGNALS}
    for of_seed in zip(*settings.values(), strict=True):
        points = [point for numbers in of_seed for point in numbers["path"]]
        lost = [-point["quality"] for point in points]
        for signal, cells in rows.items():
            values = [point[signal] for point in points]
            smiles = [point["smile"] for point in points]
            cells["with smile"].append(rank_correlation(values, smiles))
            cells["with quality lost"].append(rank_correlation(values, lost))
    print_table("signals: rank correlation", rows)

    rows = {}
    for setting, runs in settings.items():
        if setting.startswith("DPO"):
            paths = [numbers["path"] for numbers in runs]
            stops = {"highest accuracy": [max(path, key=lambda each: each["accuracy"])
                                          for path in paths],
                     "the end": [path[-1] for path in paths]}
            for stop, points in stops.items():
                shown = ("step", "smile", "quality")
                rows[f"{setting}, {stop}"] = {
                    name: [point[name] for point in points] for name in shown}
    print_table("stopped at", rows)


def print_numbers(name, settings):
    """The tables of one experiment. settings: {setting: [numbers of a seed, ...]}."""
    print_table(name, {setting: ends(runs) for setting, runs in settings.items()})
    if name in ("faces-noisy", "faces-clean"):
        print_signals(settings)
    for runs in settings.values():
        if "solvers" in runs[0] and name == "faces-methods":
            rows = {}
            for solver in SOLVERS:
                found = [numbers["solvers"][solver] for numbers in runs]
                rows[solver] = {
                    f"{what}, {side}": [each[side][what] for each in found]
                    for what in ("smile", "quality") for side in judge.SIDES}
            print_table("solvers", rows)
        shown = ("tv_reference", "tv_policy", "tv_floor", "labels_agree", "clip_agrees")
        cells = {key: [each[key] for each in runs] for key in shown if key in runs[0]}
        if cells:
            print_table("and", {"": cells})
    base = [numbers["reference"] for numbers in runs]
    print_table("the base", {"": {key: [each[key] for each in base] for key in base[0]}})


def draw_paths(ax, settings, colours=None):
    """Smile against quality along the runs: a line for each seed, a colour for each setting."""
    for number, (setting, runs) in enumerate(settings.items()):
        colour = (colours or {}).get(setting, f"C{number % 10}")
        for seed, numbers in enumerate(runs):
            points = [(0, 0)] + [(each["smile"], each["quality"]) for each in numbers["path"]]
            label = setting if seed == 0 else None
            ax.plot(*zip(*points, strict=True), ".-", c=colour, alpha=0.7, label=label)
    ax.axhline(0, c="gray", ls=":", lw=1)
    ax.set(xlabel="smile, gained", ylabel="quality, gained")


def draw_equal_quality(ax, settings):
    """What each setting gains at equal quality: a dot for each seed."""
    for row, runs in enumerate(settings.values()):
        gained = [smile_at_quality(numbers["path"]) for numbers in runs]
        ax.plot(gained, [row] * len(gained), "o", c="tab:blue", alpha=0.6)
    ax.set(yticks=range(len(settings)), yticklabels=list(settings))
    ax.set(xlabel=f"smile gained at a quality lost of {LOST}")
    ax.invert_yaxis()
    ax.grid(axis="x", alpha=0.3)


SHOWN = ("DPO, lr 3e-5", "DPO, lr 1e-4", "IPO", "SFT mix 0.25 beta")  # on the sheet


def draw_sheet(settings, path):
    """What the reference and the policies of the first seed draw: a row for each."""
    captions = len(faces.CAPTIONS)
    images = [faces.to_pil(image) for image in reference_images(WORK / "base-0")[:captions]]
    for setting in SHOWN:
        sheet = Image.open(io.BytesIO(base64.b64decode(settings[setting][0]["sheet"])))
        images += [sheet.crop((x, 0, x + faces.SIDE, faces.SIDE))
                   for x in range(0, sheet.width, faces.SIDE)]
    faces.enlarge(images, captions).save(path)


def draw_histograms(ax, runs):
    """The smiles of reference and policy beside p*: a line for each seed."""
    middles = (BINS[1:] + BINS[:-1]) / 2
    for colour, whose in zip(("gray", "tab:blue", "black"), ("reference", "policy", "optimum"),
                             strict=True):
        for seed, numbers in enumerate(runs):
            label = {"optimum": "p*, closed form"}.get(whose, whose) if seed == 0 else None
            ax.plot(middles, numbers["histograms"][whose], ".-", c=colour, alpha=0.7, label=label)
    ax.set(xlabel="smile", ylabel="share of the faces", ylim=0)
