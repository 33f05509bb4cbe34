"""Encode a preference set once, so that training needs neither the VAE nor the text encoders.

    python toy/encode.py --model sdxl --data mine/pairs.jsonl            # makes encoded/sdxl/
    torchrun --nproc_per_node 8 toy/encode.py --model sdxl --split train --out encoded/sdxl
    python diffusion_dpo.py --model sdxl --data encoded/sdxl ...         # trains on it

The flags are those of diffusion_dpo.py. Of them --model, --data, --split, --resolution and
--precision say what is made, and --micro-batch and --workers how fast.

Images are shown as held-out pairs are: the centre of each, never flipped. So training on the folder
has no random crops and flips. Captions are dropped as before.

After a kill the same command goes on. Several splits may go into one folder, one after the other.
The files of a split "train" are described in toy/tools.md.
"""

import json
import re
import shutil
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pyarrow.parquet
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import BatchSampler
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import diffusion_dpo as dpo

SHARD = 2**28  # bytes of a file, about; what a kill can lose


@dataclass
class Config(dpo.Config):
    """The flags of diffusion_dpo.py, with another folder."""

    out: str = "encoded/MODEL"  # folder of the encoded set


# ------------------------------------------------------------------------------------- training

class EncodedPairs(dpo.ImagePairs):
    """The pairs of an encoded set: latents in place of images, and embeddings of prompts.

    Raises ValueError if the set does not fit the flags, and OSError if a file is missing.
    """

    encoded = True

    def __init__(self, cfg, split, whole):
        super().__init__(cfg, split, whole)
        self.note = json.loads((self.root / f"{dpo.base_of(split)}.json").read_text())
        self.shape = tuple(self.note["shape"])
        for name, size in self.note["files"].items():
            if (self.root / name).stat().st_size != size:
                raise ValueError(f"{name} should have {size} bytes; encode the set again")
        here = settings(cfg)
        differences = [f"{name} was {self.note[name]} and is {here[name]}"
                       for name in here if self.note[name] != here[name]]
        if differences:
            raise ValueError(f"it was encoded for another run: {'; '.join(differences)}")

    def content(self):
        return dpo.hash_of([self.table["prompt"][:], self.table["label"][:], self.note])

    def read(self, item, prompt, *_):
        """The latents (2, *shape) fp32, preferred first, and the conditions {name: (...)}."""
        latents = open_tensors(self.root / item["first"]).get_tensor(item["row"]).float()
        return {"latents": latents, "cond": self.embeddings(prompt, item["second"])}

    def blank(self):
        return {"latents": torch.zeros(2, *self.shape), "cond": self.embeddings("", "")}

    def embeddings(self, prompt, file):
        """What encode_prompts() made of one prompt. Without a prompt it is in a file of its own."""
        tensors = open_tensors(self.root / (file if prompt else self.note["no prompt"]))
        return {name: tensors.get_tensor(f"{name} of {prompt}") for name in self.note["names"]}


@cache
def open_tensors(file):
    """A file of tensors, each of which is read when it is asked for."""
    return safe_open(file, "pt")


def settings(cfg):
    """What the tensors of an encoded set depend on, apart from the data. Raises UserError."""
    files = [file for file in Path(dpo.find_model(cfg.model)).glob("*/*")
             if re.match(f"{dpo.ENCODERS}|tokenizer", file.parent.name)]
    return {"resolution": cfg.resolution, "precision": cfg.precision,
            "encoders": dpo.hash_of_files(files)}


# ------------------------------------------------------------------------------------- encoding

class Encoder:
    """The VAE and the text encoders of cfg.model, on this process's device."""

    def __init__(self, cfg, device):
        self.pipe = dpo.load_pipeline(cfg.model, without="unet|transformer")
        self.resolution, self.device = cfg.resolution, device
        # In a run in bf16 the network rounds its input more coarsely than fp16 rounds latents.
        self.dtype = torch.float32 if cfg.precision == "fp32" else torch.float16
        dpo.prepare_encoders(self.pipe, cfg, device)

    def prompts(self, prompts):
        """[{name: embedding} of each prompt]."""
        cond = dpo.encode_prompts(self.pipe, prompts, self.resolution)
        rows = zip(*(value.cpu() for value in cond.values()), strict=True)
        return [dict(zip(cond, row, strict=True)) for row in rows]

    def images(self, images):
        """The latents (B, 2, *shape) of images (B, 2, 3, H, W) uint8."""
        latents = dpo.encode_images(self.pipe, images.flatten(0, 1).to(self.device))
        return latents.unflatten(0, (-1, 2)).to("cpu", self.dtype)

    def drop_text_encoders(self):
        for name in self.pipe.components:
            if name.startswith("text_encoder"):
                setattr(self.pipe, name, None)


def shards(out, name, items, bytes_each):
    """{file: the items that go into it}, for files of about SHARD bytes."""
    n = max(1, SHARD // bytes_each)
    return {out / f"{name}-{first // n:05d}.safetensors": items[first:first + n]
            for first in range(0, len(items), n)}


def missing(files):
    """What is left for this process of {file: items}. The processes take files in turn."""
    rank, world = dpo.rank_and_world()
    own = list(files.items())[rank::world]
    return {file: items for file, items in own if not file.exists()}


def progress_bar(files, unit):
    rank, _ = dpo.rank_and_world()
    return tqdm(total=sum(map(len, files.values())), desc=unit, unit=f" {unit}", ncols=99,
                disable=rank > 0)


def write_tensors(file, tensors):
    """Write {name: tensor}. The file appears when it is whole. Raises OSError."""
    with dpo.atomic_write(file) as partial:
        save_file({name: tensor.clone(memory_format=torch.contiguous_format)
                   for name, tensor in tensors.items()}, partial)


def write_prompts(encoder, files, cfg):
    """Write the embeddings of {file: prompts}."""
    with progress_bar(files, "prompts") as bar:
        for file, prompts in files.items():
            tensors = {}
            for first in range(0, len(prompts), cfg.micro_batch):
                few = prompts[first:first + cfg.micro_batch]
                for prompt, embeddings in zip(few, encoder.prompts(few), strict=True):
                    tensors |= {f"{name} of {prompt}": embeddings[name] for name in embeddings}
                bar.update(len(few))
            write_tensors(file, tensors)


def write_latents(encoder, pairs, files, names, cfg):
    """Write the latents of {file: places in `pairs`}, under names[place].

    Unreadable pairs are left out.
    """
    keys = {file: [(dpo.HELD_OUT, place) for place in places] for file, places in files.items()}
    batches = {file: list(BatchSampler(keys[file], cfg.micro_batch, drop_last=False))
               for file in files}
    loader = iter(dpo.load_batches(pairs, sum(batches.values(), []), cfg))
    with progress_bar(files, "pairs") as bar:
        for file in files:
            tensors = {}
            for _ in batches[file]:
                batch = next(loader)
                rows = zip(batch["row"].tolist(), batch["unreadable"].tolist(),
                           encoder.images(batch["images"]), strict=True)
                tensors |= {names[place]: latents for place, unreadable, latents in rows
                            if not unreadable}
                bar.update(len(batch["row"]))
            write_tensors(file, tensors)


def write_table(file, whole, prompt_files, row_files):
    """Write the columns of dpo.FORMATS for the rows of `whole`.

    row_files {row: file} has the rows with latents. Their label is 1, as the preferred image is the
    first. The others get no label.
    """
    prompts = [prompt or "" for prompt in whole["prompt"]]
    shard_of = {prompt: shard.name for shard in prompt_files for prompt in prompt_files[shard]}
    labels = [1.0 if row in row_files else None for row in range(len(whole))]
    table = {"prompt": prompts,
             "latents": [row_files.get(row, "") for row in range(len(whole))],
             "embeddings": [shard_of.get(prompt, "") for prompt in prompts],
             "label": pyarrow.array(labels, pyarrow.float64())}
    with dpo.atomic_write(file) as partial:
        pyarrow.parquet.write_table(pyarrow.table(table), partial)


def check_folder(out, base, note):
    """Raise UserError if `out` holds other files, or the split `base` with other settings."""
    notes = list(out.glob("*.json"))
    if any(out.glob("[!.]*")) and not notes:
        raise dpo.UserError(f"--out {out}: it holds other files; name a new folder")
    if out / f"{base}.json" in notes:
        there = json.loads((out / f"{base}.json").read_text())
        differences = [f"{name} is {there.get(name)} there, {note[name]} here"
                       for name in note if there.get(name) != note[name]]
        if differences:
            raise dpo.UserError(f"--out {out}: it holds another set: {'; '.join(differences)}")


def check_disk(out, needed):
    """Say how much disk the set takes. Raises UserError if there is less."""
    out.mkdir(parents=True, exist_ok=True)
    there = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    free = shutil.disk_usage(out).free
    sizes = f"{needed / 1e9:,.3g} GB of disk; {free / 1e9:,.3g} GB are free"
    dpo.print_once(f"disk        {sizes}")
    if needed - there > free:
        raise dpo.UserError(f"--out {out}: the set needs {sizes}")


def encode(cfg, device):
    """Make the set in cfg.out, or go on with it. Raises UserError."""
    whole = dpo.load_pairs(cfg.data, cfg.split)
    pairs = dpo.open_pairs(cfg, cfg.split)
    if pairs.encoded:
        raise dpo.UserError(f"--data {cfg.data}: it is encoded already")
    out, base = Path(cfg.out), dpo.base_of(cfg.split)
    note = {"model": cfg.model, "data": cfg.data, "split": cfg.split,
            "content": pairs.content()} | settings(cfg)
    check_folder(out, base, note)

    # An example of each kind tells the sizes.
    encoder = Encoder(cfg, device)
    nothing, = encoder.prompts([""])
    black, = encoder.images(torch.zeros(1, 2, 3, cfg.resolution, cfg.resolution))
    bytes_of_prompt = sum(value.nbytes for value in nothing.values())
    prompts = ["", *sorted({prompt for prompt in pairs.table["prompt"] if prompt})]
    check_disk(out, len(prompts) * bytes_of_prompt + len(pairs) * black.nbytes)
    prompt_files = shards(out, f"{base}-prompts", prompts, bytes_of_prompt)
    pair_files = shards(out, f"{base}-latents", range(len(pairs)), black.nbytes)
    if dpo.is_main():
        dpo.write_json(out / f"{base}.json", note)
    dpo.gather(None)  # now the folder is known as ours

    # The latents are named by the row of the pair in the table that is written at the end.
    row_of = {row: place for place, row in enumerate(whole["row"])}
    names = {f"{row_of[row]} of {base}": row_of[row] for row in pairs.table["row"]}
    write_prompts(encoder, missing(prompt_files), cfg)
    encoder.drop_text_encoders()
    write_latents(encoder, pairs, missing(pair_files), list(names), cfg)
    dpo.gather(None)  # wait for all files

    row_files = {names[name]: file.name for file in pair_files
                 for name in open_tensors(file).keys()}
    unreadable = len(pairs) - len(row_files)
    if unreadable > max(1, len(pairs) / 100):
        raise dpo.UserError(f"--data {cfg.data}: {unreadable} of {len(pairs)} pairs cannot be"
                            f" read, more than 1 %. Mend them and remove {out}")
    if dpo.is_main():
        files = [*prompt_files, *pair_files]
        note |= {"pairs": len(row_files), "prompts": len(prompts), "shape": list(black.shape[1:]),
                 "names": sorted(nothing), "no prompt": files[0].name,
                 "files": {file.name: file.stat().st_size for file in files},
                 "hash": dpo.hash_of_files(files)}
        dpo.write_json(out / f"{base}.json", note)
        write_table(out / f"{base}.parquet", whole, prompt_files, row_files)  # now it is a set
    dpo.print_once(f"encoded     {len(row_files):,} pairs and {len(prompts):,} prompts, in {out};"
                   f" {unreadable} unreadable pairs left out")


def main(argv=None):
    flags = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & {*flags}:
        print(__doc__)
        return
    cfg = dpo.parse(flags, Config)
    if cfg.model == "toy":
        raise dpo.UserError("--toy: it has no images; name a --model")
    cfg.out = cfg.out.replace("MODEL", Path(cfg.model).resolve().name)
    encode(cfg, dpo.start_processes(torch.cuda.is_available(), cfg.precision))


if __name__ == "__main__":
    dpo.run_command(main)
