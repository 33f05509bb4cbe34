"""Scorers: models that give an image and its prompt a number, trained on what people prefer.

They judge a policy against its reference (paper 5.2), or label pairs in people's place (5.4):

    python toy/judge.py compare --policy runs/sd15 --prompts prompts.txt --out runs/judged
    python toy/judge.py label --data pairs.parquet --scorer pickscore --out labelled.parquet

`compare` writes OUT/comparison.json (win rates, medians, diversity) and OUT/comparison.png (largest
wins and losses), and keeps the images in OUT/comparison/: what is there is not drawn again. `label`
writes a file that --data reads; killed, it goes on where it was, by the scores in a hidden folder
beside OUT. Both run on several GPUs under torchrun.

A scorer is `pickscore`, `clip`, the hub id or folder of any CLIPModel, or one of these with a
linear head for the image alone, an aesthetic predictor: `clip+head.safetensors`.
"""

import argparse
import hashlib
import itertools
import json
import shutil
import sys
import textwrap
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
import diffusion_dpo as dpo
from toy import figure

SCORERS = {  # a CLIPModel, and where its processor is
    "pickscore": ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "clip": ("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14")}
SIDES = "reference", "policy"
PIECE = 256  # pairs that are scored before their scores are written down


def load_scorer(name, device):
    """A function of N images and N prompts: scores (N,) and image embeddings (N, D) of length 1,
    fp32 on the CPU.

    The score is the model's scale times the cosine of image and prompt; with +HEAD.safetensors it
    is "weight" (1, D) times the image's embedding plus "bias" (1,). Raises Refusal.
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
        if info["missing_keys"]:
            raise ValueError("not a CLIPModel")
    except Exception as error:  # the hub's and safetensors' errors have no common base class
        raise dpo.Refusal(f"scorer {name}: {dpo.first_line(error)}") from error
    model.eval().to(device), linear.to(device)
    longest = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def score(images, prompts):
        out = model(**processor(text=prompts, images=images, return_tensors="pt", padding=True,
                                truncation=True, max_length=longest).to(device))
        cosine = (out.image_embeds * out.text_embeds).sum(1)
        scores = linear(out.image_embeds)[:, 0] if head else model.logit_scale.exp() * cosine
        return scores.cpu(), out.image_embeds.cpu()

    return score


# -------------------------------------------------------------------------------------- compare

def head_to_head(names, scores, embeds):
    """Reference against policy for P prompts of n images each: scores (P, n, 2, S) by the scorers
    `names`, embeddings (P, n, 2, D) by the first of them. Returns {name: numbers}.

    Win rate: how often the policy's image has the higher score, a tie counts 1/2; beside it the
    median scores. Diversity, if n > 1: the mean of 1 - cosine over the pairs of images of one
    prompt, policy minus reference. The 95 % intervals are a bootstrap over prompts.
    """
    P, n = scores.shape[:2]
    again = torch.randint(P, (2000, P), generator=dpo.generator("bootstrap"))

    def row(name, values, of, reference, policy):  # values (P,)
        ends = values[again].mean(1).quantile(torch.tensor([0.025, 0.975]))
        return {name: values.mean().item(), "interval": ends.tolist(),
                f"{of}_reference": reference.item(), f"{of}_policy": policy.item()}

    wins = (scores[:, :, 1] - scores[:, :, 0]).sign().mean(1) / 2 + 0.5  # (P, S)
    medians = scores.flatten(0, 1).quantile(0.5, 0)  # (2, S)
    results = {name: row("win_rate", wins[:, s], "median", *medians[:, s])
               for s, name in enumerate(names)}
    if n > 1:  # unit vectors: the square of their sum is n plus all cosines
        distance = 1 - (embeds.sum(1).square().sum(-1) - n) / (n * (n - 1))  # (P, 2)
        change = distance[:, 1] - distance[:, 0]
        results["diversity"] = row("difference", change, "mean", *distance.mean(0))
    return results


def read_prompts(flag, path):
    """The lines of a file that are not empty, each once. Raises Refusal, which names the flag."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise dpo.Refusal(f"{flag} {path}: {error}") from error
    prompts = list(dict.fromkeys(line for line in lines if line.strip()))
    if not prompts:
        raise dpo.Refusal(f"{flag} {path}: empty; it should hold a prompt per line")
    return prompts


def settings(args):
    """diffusion_dpo.py's configuration for --policy: model and resolution from its run, the rank of
    adapters from their file, unless `args` say otherwise. Raises Refusal."""
    policy, trained, lora = Path(args.policy).resolve(), {}, 0
    try:
        for folder in (policy, *policy.parents[:2]):  # RUN, RUN/unet, RUN/checkpoint-7/unet
            if (folder / "config.json").exists() and not trained:  # that of a UNet has no "config"
                trained = json.loads((folder / "config.json").read_text()).get("config", {})
        for file in sorted(policy.rglob(dpo.LORA_WEIGHTS))[:1]:
            ranks = [len(each) for name, each in load_file(file).items() if "lora_A" in name]
            lora = max(ranks, default=1)  # a file with other names is refused when it is loaded
    except Exception as error:  # of a torn file
        raise dpo.Refusal(f"--policy {args.policy}: {dpo.first_line(error)}") from error
    model = args.model or trained.get("model")
    if not model:
        raise dpo.Refusal(f"--policy {args.policy}: not the folder of a run; name its --model")
    if model != trained.get("model", model):
        raise dpo.Refusal(f"--model {model}: --policy {args.policy} is of {trained['model']}")
    if model == "toy":
        raise dpo.Refusal("--model toy: it draws no images for a scorer; see its results.json")
    flags = {"model": model, "evaluate": args.policy, "lora": lora, "precision": args.precision,
             "resolution": args.resolution or trained.get("resolution"),
             "micro-batch": args.micro_batch}
    return dpo.parse([f"--{flag}={value}" for flag, value in flags.items() if value is not None])


def image_path(out, made_by, job):
    """Where the image of a job is kept: the name tells by what it was drawn."""
    side, *how = made_by
    folder, name = (hashlib.sha256(repr(what).encode()).hexdigest()[:12] for what in (how, job))
    return out / "comparison" / f"{side}-{folder}" / f"{name}.png"


def drawn(problem, paths, side, jobs):
    """The images of `jobs` from their `paths`, where what is missing is drawn first."""
    missing = [(path, job) for path, job in zip(paths, jobs, strict=True) if not path.exists()]
    images = figure.draw_images(problem, side, [job for _, job in missing])
    for (path, _), image in zip(missing, images, strict=True):
        with dpo.whole(path) as partial:
            image.save(partial, format="PNG")
    return [Image.open(path).convert("RGB") for path in paths]


def score_images(problem, jobs, paths, scorers):
    """Scores (jobs, 2, S) of the images of reference and policy at `paths`, two lists, and their
    embeddings (jobs, 2, D) by the first scorer; each process does its share."""
    (rank, world), size, found = dpo.rank_and_world(), problem.cfg.micro_batch, []
    for first in tqdm(range(rank * size, len(jobs), world * size), "compare", unit=" batches",
                      ncols=99, disable=rank > 0):
        part, sides = slice(first, first + size), []
        for side, files in zip(SIDES, paths, strict=True):
            images = drawn(problem, files[part], side, jobs[part])
            each = [score(images, [prompt for prompt, _ in jobs[part]]) for score in scorers]
            sides.append((torch.stack([scores for scores, _ in each], 1), each[0][1]))
        scores, embeds = (torch.stack(both, 1) for both in zip(*sides, strict=True))
        found.append((torch.arange(len(jobs))[part], scores, embeds))  # (b,), (b, 2, S), (b, 2, D)
    numbers, scores, embeds = (
        torch.cat(each) for each in zip(*sum(dpo.gather(found), []), strict=True))
    order = numbers.argsort()  # that of the jobs, whoever did them
    return scores[order], embeds[order]


def compare(args):
    """Reference and policy draw the same prompts from the same noise; scorers judge. Writes
    comparison.json and comparison.png, which shows what the first scorer found."""
    prompts, cfg, out = read_prompts("--prompts", args.prompts), settings(args), Path(args.out)
    device = dpo.start_processes(torch.cuda.is_available())
    scorers = {name: load_scorer(name, device) for name in args.scorers.split(",")}
    problem = dpo.StableDiffusion(cfg, device, dpo.load_pipeline(cfg.model))
    try:
        weights = dpo.load_policy(problem.policy, args.policy)
    except dpo.Refusal as error:
        raise dpo.Refusal(f"--policy {error}") from error
    changed = max(file.stat().st_mtime_ns for file in weights.glob("*.safetensors"))
    how = cfg.model, cfg.resolution, cfg.precision
    made_by = [("reference", *how), ("policy", *how, str(weights.resolve()), changed)]
    made_by = dpo.gather(made_by)[0]  # each machine may have its own copy of the weights
    jobs = [(prompt, number) for prompt in prompts for number in range(args.images)]
    paths = [[image_path(out, made, job) for job in jobs] for made in made_by]
    scores, embeds = score_images(problem, jobs, paths, scorers.values())
    if dpo.rank_and_world()[0] > 0:
        return
    shape = len(prompts), args.images, 2, -1
    results = head_to_head(scorers, scores.view(shape), embeds.view(shape))
    draw_contest(jobs, paths, scores[:, :, 0], out / "comparison.png")
    dpo.write_json(out / "comparison.json", results | {
        "model": cfg.model, "policy": str(weights), "prompts": args.prompts, "images": args.images,
        "resolution": cfg.resolution, "precision": cfg.precision})
    print(f"policy      {weights}\nnumbers     {out}/comparison.json\n"
          f"figure      {out}/comparison.png")
    for name, numbers in results.items():
        print(name)
        for what, value in numbers.items():
            values = value if isinstance(value, list) else [value]
            print(f"    {what:20}", *(f"{number:.4g}" for number in values))


def draw_contest(jobs, paths, scores, path):
    """Draws pairs of images, scores (jobs, 2), to `path`: left the policy's largest wins, right its
    largest losses; four of each, or as many as there are."""
    from diffusers.utils import make_image_grid
    order = (scores[:, 1] - scores[:, 0]).argsort(descending=True).tolist()
    height, sheet = max(1, min(4, len(jobs) // 2)), []
    for shown in zip(order[:height], order[:-height - 1:-1], strict=True):
        for i, (s, side) in itertools.product(shown, enumerate(SIDES)):
            image = Image.open(paths[s][i]).convert("RGB")
            text = textwrap.fill(f"{side} {scores[i, s]:.3f}: {jobs[i][0]}", 40)
            ImageDraw.Draw(image).text((8, 8), text, "white", font_size=image.width / 24,
                                       stroke_fill="black", stroke_width=2)
            sheet.append(image)
    make_image_grid(sheet, height, 4).save(path)


# ---------------------------------------------------------------------------------------- label

def modified(place, but):
    """The files in a folder, or a file, with their times of change, but for those in the folder
    `but`; nothing for a hub id."""
    files = [Path(place), *Path(place).rglob("*")]
    return [(str(file), file.stat().st_mtime_ns) for file in sorted(files)
            if file.is_file() and but not in file.parents]


def difference(pair, columns, root, score):
    """Score of the first image of a pair less that of the second; None if one is unreadable."""
    caption, *sides = columns
    try:
        images = [dpo.read_image(pair[side], root) for side in sides]
    except Exception:  # as in ImagePairs: decoders raise anything
        return None
    first, second = score(images, [pair[caption] or ""] * 2)[0].tolist()
    return first - second


def score_pairs(table, columns, args, device, folder):
    """The differences of all pairs, computed once: PIECE pairs to a file of `folder`, each process
    its share."""
    from datasets.fingerprint import Hasher
    score, (rank, world) = load_scorer(args.scorer, device), dpo.rank_and_world()
    root = dpo.root_of(args.data)
    places = args.data, *args.scorer.split("+")
    changed = [modified(place, but=folder) for place in places]  # --out may lie in --data
    mark = Hasher.hash([table._fingerprint, args.scorer, changed])
    mark = dpo.gather(mark)[0]  # another machine may see other times of change
    starts = range(0, len(table), PIECE)
    files = [folder / f"{mark}-{start // PIECE:06d}.json" for start in starts]
    for turn in tqdm(range(0, len(files), world), "scores", unit=f" x {PIECE * world} pairs",
                     ncols=99, disable=rank > 0):
        piece = turn + rank
        if piece < len(files) and not files[piece].exists():
            rows = range(len(table))[starts[piece]:][:PIECE]
            dpo.write_json(files[piece], [difference(table[row], columns, root, score)
                                          for row in rows])
        dpo.gather(None)  # nobody has to wait for longer than a piece takes
    return [by for file in files for by in json.loads(file.read_text())]


def write_pairs(table, columns, labels, root, path):
    """Writes the rows of `table` that have a label, 0 or 1, as a parquet file with the columns of
    Pick-a-Pic. The images keep their bytes, wherever these are."""
    schema = pyarrow.schema({"caption": pyarrow.string(), "jpg_0": pyarrow.binary(),
                             "jpg_1": pyarrow.binary(), "label_0": pyarrow.float64()})
    caption, *sides = columns
    rows = [row for row, label in enumerate(labels) if label is not None]
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for first in tqdm(range(0, len(rows), PIECE), "pairs", unit=f" x {PIECE}", ncols=99):
            pairs = []
            for row in rows[first:first + PIECE]:
                values = table[row]
                jpgs = [values[side]["bytes"] or (root / values[side]["path"]).read_bytes()
                        for side in sides]
                pairs.append({"caption": values[caption], "jpg_0": jpgs[0], "jpg_1": jpgs[1],
                              "label_0": labels[row]})
            writer.write_table(pyarrow.Table.from_pylist(pairs, schema))
            dpo.gather(None)  # the others wait for no longer than a piece takes


def label(args):
    """AI feedback: all pairs of --data, human ties too, with the labels of a scorer, as a parquet
    file. Pairs whose scores differ by no more than --margin are left out."""
    out = Path(args.out)
    if out.exists():
        raise dpo.Refusal(f"--out {out}: exists; name a new file")
    table, columns, people = dpo.load_pairs(args.data, args.split)
    device = dpo.start_processes(torch.cuda.is_available())
    folder = out.with_name(f".{out.name}.scores")
    differences = score_pairs(table, columns, args, device, folder)
    unreadable = differences.count(None)
    if unreadable > max(1, len(table) / 100):
        raise dpo.Refusal(f"--data {args.data}: of {len(table)} pairs, {unreadable} cannot be read,"
                          " more than 1 %")
    labels = [float(by > 0) if by is not None and abs(by) > args.margin else None
              for by in differences]
    agree = [ours == theirs for ours, theirs in zip(labels, people, strict=True)
             if ours is not None and theirs in (0, 1)]
    written = len(table) - labels.count(None)
    if not written:
        raise dpo.Refusal(f"--margin {args.margin:g}: no scores differ by more; a smaller one would"
                          " leave pairs")
    if dpo.rank_and_world()[0] > 0:
        for _ in range(0, written, PIECE):
            dpo.gather(None)
        return
    for torn in out.parent.glob(f".{out.name}.*.partial"):
        torn.unlink()  # of a run that was killed while it wrote
    with dpo.whole(out) as partial:
        write_pairs(table, columns, labels, dpo.root_of(args.data), partial)
    shutil.rmtree(folder)
    print(f"labels      by {args.scorer}; as people's for {sum(agree):,} of {len(agree):,} pairs"
          f" that both decided\n"
          f"pairs       {written:,} written of {len(table):,};"
          f" {len(table) - written - unreadable:,} ties dropped, {unreadable:,} unreadable\n"
          f"out         {out}, for diffusion_dpo.py --data")


# --------------------------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    """argparse, with errors in one line."""

    def error(self, message):
        raise dpo.Refusal(message)


def parse(argv=None):
    """The command line as a namespace. Raises Refusal."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(metavar="{compare,label}", required=True)
    one = commands.add_parser("compare", help="scorers judge policy against reference")
    one.set_defaults(run=compare)
    one.add_argument("--policy", required=True, help="folder of a run, or of weights")
    one.add_argument("--model", help="sd15, sdxl, sd35, hub id or folder [the run's]")
    one.add_argument("--prompts", required=True, help="text file, a prompt per line")
    one.add_argument("--scorers", default="pickscore", help="names, with commas [pickscore]")
    one.add_argument("--images", default=4, help="images per prompt [4]", **dpo.COUNT)
    one.add_argument("--resolution", help="pixels a side [the run's, or else the model's]")
    one.add_argument("--micro-batch", help="images at once [sd15: 4, else 2]")
    one.add_argument("--precision", help="bf16 or fp32 [bf16 on a GPU]")
    one.add_argument("--out", required=True, help="folder for images and results")
    two = commands.add_parser("label", help="a scorer labels pairs")
    two.set_defaults(run=label)
    two.add_argument("--data", required=True, help="hub id, parquet or JSON file, or folder")
    two.add_argument("--split", default="train", help="pairs to label [train]")
    two.add_argument("--scorer", default="pickscore", help="name [pickscore]")
    two.add_argument("--margin", default=0.0, help="least difference of scores [0]", **dpo.FACTOR)
    two.add_argument("--out", required=True, help="parquet file to write")
    return parser.parse_args(argv)


def main(argv=None):
    with dpo.command():
        args = parse(argv)
        args.run(args)


if __name__ == "__main__":
    main()
