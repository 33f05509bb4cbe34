"""Scorers: models that give an image and its prompt a number, trained on what people prefer.

They compare a policy with its reference (paper 5.2), or label pairs in place of people (5.4):

    python toy/judge.py compare --policy runs/sd15 --prompts prompts.txt --out runs/judged
    python toy/judge.py label --data pairs.parquet --scorer pickscore --out labelled.parquet

`compare` writes OUT/comparison.json (win rates, medians, diversity) and OUT/comparison.png (largest
wins and losses). It keeps the images in OUT/comparison/ and samples only what is missing there.

`label` writes a file that --data reads. If it is killed, it goes on where it was: the scores so far
are in a hidden folder beside OUT. Both commands run on several GPUs under torchrun.

A scorer is `pickscore`, `clip`, or the hub id or folder of any CLIPModel. With a linear head, such
as `clip+head.safetensors`, it scores the image alone, as aesthetic predictors do.
"""

import argparse
import hashlib
import json
import shutil
import sys
import textwrap
from collections import ChainMap
from pathlib import Path

import pyarrow.parquet
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import diffusion_dpo as dpo
from toy import figure

SCORERS = {  # a CLIPModel, and where its processor is
    "pickscore": ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "clip": ("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14")}
SIDES = "reference", "policy"
PIECE = 256  # pairs that are scored before their scores are written down


def load_scorer(name, device):
    """A function of N images and N prompts.

    It returns scores (N,) and image embeddings (N, D) of length 1, in fp32 on the CPU. The score is
    the model's scale times the cosine of image and prompt. With +HEAD.safetensors it is "weight"
    (1, D) times the image's embedding plus "bias" (1,). Raises UserError.
    """
    import transformers
    base, _, head = name.partition("+")
    model_id, processor_id = SCORERS.get(base, (base, base))
    try:
        model, info = transformers.CLIPModel.from_pretrained(
            model_id, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
        processor = transformers.CLIPProcessor.from_pretrained(processor_id)
        linear = nn.Linear(model.config.projection_dim, 1)
        if head:
            linear.load_state_dict(load_file(head))
        if info["missing_keys"]:  # the library leaves random numbers in their place
            raise ValueError(f"weights are missing: {sorted(info['missing_keys'])}")
    except Exception as error:  # the hub's and safetensors' errors have no common base class
        raise dpo.UserError(f"scorer {name}: {dpo.one_line(error)}") from error
    model.eval().to(device)
    linear.to(device)

    @torch.no_grad()
    def score(images, prompts):
        inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True,
                           truncation=True,
                           max_length=model.config.text_config.max_position_embeddings)
        out = model(**inputs.to(device))
        embeds = out.image_embeds
        scores = model.logit_scale.exp() * (embeds * out.text_embeds).sum(1)
        if head:
            scores = linear(embeds)[:, 0]
        return scores.cpu(), embeds.cpu()

    return score


# -------------------------------------------------------------------------------------- compare

def with_interval(name, values, of, sides):
    """The mean of values (P,) with its 95 % interval, a bootstrap over prompts, and both sides."""
    again = torch.randint(len(values), (2000, len(values)),
                          generator=dpo.seeded_generator("bootstrap"))
    ends = values[again].mean(1).quantile(torch.tensor([0.025, 0.975]))
    reference, policy = sides.tolist()
    return {name: values.mean().item(), "interval": ends.tolist(),
            f"{of}_reference": reference, f"{of}_policy": policy}


def head_to_head(names, scores, embeds):
    """Reference against policy, for n images of each of P prompts. Returns {name: numbers}.

    The scores (P, n, 2, S) are those of the scorers `names`, the embeddings (P, n, 2, D) those of
    the first. In a win the policy's image has the higher score, and a tie counts 1/2. Diversity, if
    n > 1, is the mean of 1 - cosine over the pairs of images of one prompt; its difference is that
    of the policy minus that of the reference.
    """
    n = scores.shape[1]
    wins = (scores[:, :, 1] - scores[:, :, 0]).sign().mean(1) / 2 + 0.5  # (P, S)
    medians = scores.flatten(0, 1).quantile(0.5, 0)  # (2, S)
    results = {name: with_interval("win_rate", wins[:, s], "median", medians[:, s])
               for s, name in enumerate(names)}
    if n > 1:  # the square of a sum of unit vectors is n plus all cosines
        distance = 1 - (embeds.sum(1).square().sum(-1) - n) / (n * (n - 1))  # (P, 2)
        results["diversity"] = with_interval("difference", distance[:, 1] - distance[:, 0],
                                             "mean", distance.mean(0))
    return results


def read_prompts(flag, path):
    """The lines of a file that are not empty, each once. Raises UserError, which names the flag."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise dpo.UserError(f"{flag} {path}: {error}") from None
    prompts = list(dict.fromkeys(line for line in lines if line.strip()))
    if not prompts:
        raise dpo.UserError(f"{flag} {path}: it is empty; it should hold a prompt per line")
    return prompts


def read_run(policy):
    """The settings of the run that --policy belongs to, and the rank of its adapters, 0 if none."""
    config, rank = {}, 0
    folder = Path(policy).resolve()
    try:
        for place in (folder, *folder.parents[:2]):  # RUN, RUN/unet, RUN/checkpoint-7/unet
            file = place / "config.json"
            if file.exists() and not config:  # that of a UNet has no "config"
                config = json.loads(file.read_text()).get("config", {})
        for file in sorted(folder.rglob(dpo.LORA_FILE))[:1]:
            ranks = [len(value) for name, value in load_file(file).items() if "lora_A" in name]
            rank = max(ranks, default=1)  # a file with other names is refused when it is loaded
    except Exception as error:  # of a torn file
        raise dpo.UserError(f"--policy {policy}: {dpo.one_line(error)}") from error
    return config, rank


def settings(args):
    """diffusion_dpo.py's settings for --policy. Raises UserError.

    Model and resolution are those of its run, unless `args` say otherwise. The guidance is always
    that of its run.
    """
    run, rank = read_run(args.policy)
    model = args.model or run.get("model")
    if not model:
        raise dpo.UserError(f"--policy {args.policy}: it is not the folder of a run; name --model")
    if model != run.get("model", model):
        raise dpo.UserError(f"--model {model}: --policy {args.policy} is of {run['model']}")
    if model == "toy":
        raise dpo.UserError("--model toy: it has no images to score; its run prints a table")

    flags = {"model": model, "lora": rank, "precision": args.precision,
             "resolution": args.resolution or run.get("resolution"),
             "guidance": run.get("guidance"), "lr": 0}
    cfg = dpo.parse([f"--{name}={value}" for name, value in flags.items() if value is not None])
    cfg.micro_batch = args.micro_batch or cfg.micro_batch
    return cfg


def image_path(out, side, how, job):
    """The file for the image of a job. Its name tells by what it is sampled."""
    folder, name = (hashlib.sha256(repr(key).encode()).hexdigest()[:12] for key in (how, job))
    return out / "comparison" / f"{side}-{folder}" / f"{name}.png"


def load_or_sample(task, side, jobs, paths):
    """The images of `jobs`, from their `paths`. What is missing there is sampled first."""
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    images = figure.sample_images(task, side, [jobs[i] for i in missing])
    for i, image in zip(missing, images, strict=True):
        with dpo.atomic_write(paths[i]) as partial:
            image.save(partial, format="PNG")
    return [Image.open(path) for path in paths]


def score_images(task, jobs, paths, scorers):
    """Scores (N, 2, S) and embeddings (N, 2, D) for N jobs; paths {side: N files}.

    The embeddings are those of the first scorer. Each process does its share.
    """
    rank, world = dpo.rank_and_world()
    S, size, found = len(scorers), task.cfg.micro_batch, {}
    for first in tqdm(range(rank * size, len(jobs), world * size), "compare", ncols=99,
                      disable=rank > 0):
        part = slice(first, first + size)
        prompts = [prompt for prompt, _ in jobs[part]]
        for side in SIDES:
            images = load_or_sample(task, side, jobs[part], paths[side][part])
            each = [score(images, prompts) for score in scorers]
            scores = torch.stack([numbers for numbers, _ in each], 1)  # (b, S)
            embeds = each[0][1]  # (b, D)
            found[side, first] = torch.cat([scores, embeds], 1)

    everything = ChainMap(*dpo.gather(found))
    sides = [torch.cat([everything[side, first] for first in range(0, len(jobs), size)])
             for side in SIDES]
    numbers = torch.stack(sides, 1)  # (N, 2, S + D)
    return numbers[..., :S], numbers[..., S:]


def compare(args):
    """Scorers judge what reference and policy make of the same prompts from the same noise."""
    prompts, cfg, out = read_prompts("--prompts", args.prompts), settings(args), Path(args.out)
    device = dpo.start_processes(torch.cuda.is_available(), cfg.precision)
    scorers = {name: load_scorer(name, device) for name in args.scorers.split(",")}
    task = dpo.StableDiffusion(cfg, device, dpo.load_pipeline(cfg.model))
    weights = dpo.load_weights(task, args.policy)

    # Other weights, or new ones in the same folder, get images of their own.
    how = {"model": cfg.model, "resolution": cfg.resolution, "guidance": cfg.guidance,
           "precision": cfg.precision}
    changed = max(file.stat().st_mtime_ns for file in weights.glob("*.safetensors"))
    policy = how | {str(weights.resolve()): changed}
    # Another machine may see another time, so all take that of process 0.
    made_by = {"reference": how, "policy": dpo.gather(policy)[0]}
    jobs = [(prompt, number) for prompt in prompts for number in range(args.images)]
    paths = {side: [image_path(out, side, made_by[side], job) for job in jobs] for side in SIDES}
    scores, embeds = score_images(task, jobs, paths, scorers.values())
    if dpo.rank_and_world()[0] > 0:
        return

    shape = (len(prompts), args.images, 2, -1)
    results = head_to_head(scorers, scores.view(shape), embeds.view(shape))
    make_contest_sheet(jobs, paths, scores[:, :, 0], out / "comparison.png")
    dpo.write_json(out / "comparison.json", results | how | {
        "policy": str(weights), "prompts": args.prompts, "images": args.images})
    print(f"{json.dumps(results, indent=1)}\npolicy      {weights}\n"
          f"numbers     {out}/comparison.json\nfigure      {out}/comparison.png")


def make_contest_sheet(jobs, paths, scores, path):
    """Write a sheet of pairs of images with their scores (N, 2) to `path`.

    Left are the policy's largest wins, right its largest losses: four of each, or as many as there
    are.
    """
    from diffusers.utils import make_image_grid
    order = (scores[:, 0] - scores[:, 1]).argsort().tolist()
    height = max(1, min(4, len(jobs) // 2))
    sheet = []
    for row in range(height):
        for job in order[row], order[-1 - row]:
            for side, score in zip(SIDES, scores[job], strict=True):
                image = Image.open(paths[side][job])
                text = textwrap.fill(f"{side} {score:.3f}: {jobs[job][0]}", 40)
                ImageDraw.Draw(image).text((8, 8), text, "white", font_size=image.width / 24,
                                           stroke_fill="black", stroke_width=2)
                sheet.append(image)
    make_image_grid(sheet, height, 4).save(path)


# ---------------------------------------------------------------------------------------- label

def times_of_change(place, but):
    """When the files in a folder, or a file, were changed. Those in the folder `but` are left out.
    """
    files = sorted([Path(place), *Path(place).rglob("*")])
    return [(file, file.stat().st_mtime_ns) for file in files
            if file.is_file() and but not in file.parents]


def difference(pair, root, score):
    """Score of the first image of a pair less that of the second. None if one is unreadable."""
    try:
        images = [dpo.read_image(pair[side], root) for side in ("first", "second")]
    except Exception:  # decoders raise anything
        return None
    first, second = score(images, [pair["prompt"] or ""] * 2)[0].tolist()
    return first - second


def score_pairs(table, args, device, folder):
    """The differences of all pairs, each scored once.

    PIECE pairs go to a file of `folder`. Each process does its share of the files.
    """
    from datasets.fingerprint import Hasher
    score, root = load_scorer(args.scorer, device), dpo.root_of(args.data)
    rank, world = dpo.rank_and_world()
    places = [args.data, *args.scorer.split("+")]
    changed = [times_of_change(place, folder) for place in places]  # --out may lie in --data
    # Another machine may see other times, so all take those of process 0.
    mark = dpo.gather(Hasher.hash([table._fingerprint, args.scorer, changed]))[0]
    n = len(table)
    files = [folder / f"{mark}-{first:09d}.json" for first in range(0, n, PIECE)]

    for turn in tqdm(range(0, len(files), world), "scores", ncols=99, disable=rank > 0):
        piece = turn + rank
        if piece < len(files) and not files[piece].exists():
            rows = range(n)[piece * PIECE:(piece + 1) * PIECE]
            differences = [difference(table[row], root, score) for row in rows]
            dpo.write_json(files[piece], differences)
        dpo.gather(None)  # so nobody waits for longer than a piece takes
    return [each for file in files for each in json.loads(file.read_text())]


def write_pairs(table, labels, root, path):
    """Write rows of `table`, with labels {row: 0 or 1}, with the columns of Pick-a-Pic.

    The images keep their bytes, wherever these are.
    """
    schema = pyarrow.schema({"caption": pyarrow.string(), "jpg_0": pyarrow.binary(),
                             "jpg_1": pyarrow.binary(), "label_0": pyarrow.float64()})
    rows = list(labels)
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for first in range(0, len(rows), PIECE):
            pairs = []
            for row in rows[first:first + PIECE]:
                values = table[row]
                jpgs = [dpo.image_bytes(values[side], root) for side in ("first", "second")]
                pairs.append({"caption": values["prompt"], "jpg_0": jpgs[0], "jpg_1": jpgs[1],
                              "label_0": labels[row]})
            writer.write_table(pyarrow.Table.from_pylist(pairs, schema))
            dpo.gather(None)  # so the others wait for no longer than a piece takes


def label(args):
    """A scorer labels all pairs of --data, also those that were a tie for people.

    Pairs whose scores differ by no more than --margin are left out.
    """
    out = Path(args.out)
    if out.exists() or out.suffix != ".parquet":
        raise dpo.UserError(f"--out {out}: it should be a new file whose name ends in .parquet")
    table = dpo.load_pairs(args.data, args.split)
    if table.features["first"].dtype == "string":
        raise dpo.UserError(f"--data {args.data}: it is encoded; scorers need the images")
    people = table["label"][:]
    device = dpo.start_processes(torch.cuda.is_available())
    folder = out.with_name(f".{out.name}.scores")
    differences = score_pairs(table, args, device, folder)

    unreadable = differences.count(None)
    if unreadable > max(1, len(table) / 100):
        raise dpo.UserError(f"--data {args.data}: {unreadable} of {len(table)} pairs cannot be"
                            " read, more than 1 %")
    labels = {row: float(by > 0) for row, by in enumerate(differences)
              if by is not None and abs(by) > args.margin}
    if not labels:
        raise dpo.UserError(f"--margin {args.margin:g}: no scores differ by more; lower it")
    if dpo.rank_and_world()[0] > 0:
        for _ in range(0, len(labels), PIECE):
            dpo.gather(None)  # process 0 writes
        return

    with dpo.atomic_write(out) as partial:
        write_pairs(table, labels, dpo.root_of(args.data), partial)
    shutil.rmtree(folder)
    agree = [label == people[row] for row, label in labels.items() if people[row] in (0, 1)]
    print(f"labels      by {args.scorer}; as people's for {sum(agree):,} of {len(agree):,} pairs"
          f" that both decided\n"
          f"pairs       {len(labels):,} written of {len(table):,};"
          f" {len(table) - len(labels) - unreadable:,} ties dropped, {unreadable:,} unreadable\n"
          f"out         {out}, for diffusion_dpo.py --data")


# --------------------------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    """argparse, with errors in one line."""

    def error(self, message):
        raise dpo.UserError(message)


def at_least(least, kind):
    """A type for argparse: a number that is not below `least`."""
    def read(text):
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{text}: it should be at least {least}")
        return value
    return read


def parse(argv=None):
    """The command line as a namespace. Raises UserError."""
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    count = at_least(1, int)

    one = commands.add_parser("compare", help="scorers judge policy against reference")
    one.set_defaults(run=compare)
    add = one.add_argument
    add("--policy", required=True, help="folder of a run, or of weights")
    add("--model", help="sd15, sdxl, sd35, hub id or folder [the run's]")
    add("--prompts", required=True, help="text file, a prompt per line")
    add("--scorers", default="pickscore", help="names, with commas [pickscore]")
    add("--images", type=count, default=4, help="images per prompt [4]")
    add("--resolution", help="pixels a side [the run's, or else the model's]")
    add("--micro-batch", type=count, help="images at once [sd15: 4, else 2]")
    add("--precision", help="bf16 or fp32 [bf16 on a GPU]")
    add("--out", required=True, help="folder for images and results")

    two = commands.add_parser("label", help="a scorer labels pairs")
    two.set_defaults(run=label)
    add = two.add_argument
    add("--data", required=True, help="hub id, parquet or JSON file, or folder")
    add("--split", default="train", help="pairs to label [train]")
    add("--scorer", default="pickscore", help="name [pickscore]")
    add("--margin", type=at_least(0, float), default=0.0, help="least difference of scores [0]")
    add("--out", required=True, help="parquet file to write")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    args.run(args)


if __name__ == "__main__":
    dpo.run_command(main)
