"""Encode a preference set once, so that training needs neither the VAE nor the text encoders.

    python toy/encode.py --model sdxl --data mine/pairs.jsonl --out encoded/mine
    python diffusion_dpo.py --model sdxl --data encoded/mine ...    # trains on it
    torchrun --nproc_per_node 8 toy/encode.py --model sdxl          # the default data

The flags are those of diffusion_dpo.py. Of them --model, --data, --split, --resolution and
--precision say what is made, and --micro-batch and --workers how fast.

Images are cropped to the centre and never flipped, like those of held-out pairs. So a run on the
set has no random crops and flips. It drops captions like any other run (--caption-dropout).

After a kill the same command goes on. Several splits may go into one folder, one after the other.
The files of a split "train" are described in toy/tools.md.
"""

import json
import math
import re
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pyarrow.parquet
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import BatchSampler
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import diffusion_dpo as dpo

SHARD = 2**28  # bytes in a file, about. A kill loses at most one file of each process.


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
        base = dpo.base_of(split)
        names = [file.name for file in dpo.find_files(cfg.data, base)]
        if len(names) > 1:  # such as test and test_unique
            raise ValueError(f"{names} would all be split {base}; move other sets elsewhere")
        note_file = self.root / f"{base}.json"
        self.note = read_note(note_file)
        if "hash" not in self.note:
            raise ValueError(f"{note_file} is not of a whole set; finish encoding it first")
        self.shape = tuple(self.note["shape"])
        for name, size in self.note["files"].items():
            file = self.root / name
            if file.stat().st_size != size or not is_whole(file, self.note):
                raise ValueError(f"{name} should have {size} bytes, of this set; encode it again")
        here = settings(cfg)
        if here.pop("encoders") != self.note["encoders"]:
            raise ValueError(f"it was encoded by the VAE or text encoders of {self.note['model']},"
                             f" and {cfg.model} has others")
        changed = differences(self.note, here)
        if changed:
            raise ValueError(f"it was encoded with other flags: {changed}. Give the same ones here")

    def content(self):
        return dpo.hash_of([self.table["prompt"][:], self.table["label"][:], self.note])

    def read(self, item, prompt, *_):
        """The latents (2, *shape) fp32, preferred first, and the conditions {name: (...)}."""
        latents = open_tensors(self.root / item["first"]).get_tensor(item["row"]).float()
        return {"latents": latents, "cond": self.embeddings(prompt, item["second"])}

    def blank(self):
        return {"latents": torch.zeros(2, *self.shape), "cond": self.embeddings("", "")}

    def embeddings(self, prompt, file):
        """What encode_prompts() made of one prompt. The note names the file of the empty prompt."""
        tensors = open_tensors(self.root / (file if prompt else self.note["no prompt"]))
        return {name: tensors.get_tensor(f"{name} of {prompt}") for name in self.note["names"]}


@cache
def open_tensors(file):
    """A file of tensors, each of which is read when it is asked for."""
    return safe_open(file, "pt")


def read_note(file):
    """What encode() wrote into `file`, or {} if that holds something else. Raises OSError."""
    with suppress(ValueError):
        note = json.loads(file.read_text())
        if isinstance(note, dict) and "encoders" in note:
            return note
    return {}


def mark(file, note):
    """The metadata of a file of tensors: from its name and from the set that it belongs to."""
    own = "model", "data", "split", "content", "resolution", "precision", "encoders"
    return {"set": dpo.hash_of([file.name, *(note.get(name) for name in own)])}


def is_whole(file, note):
    """Whether `file` is there, is not torn, and belongs to the set of this note."""
    with suppress(OSError, SafetensorError), safe_open(file, "pt") as tensors:
        return tensors.metadata() == mark(file, note)
    return False


def settings(cfg):
    """What the tensors of an encoded set depend on, apart from the data. Raises UserError."""
    folder = Path(dpo.find_model(cfg.model))
    files = [file for file in folder.glob("*/*")
             if re.match(f"{dpo.ENCODERS}|tokenizer", file.parent.name)]
    files.append(folder / "model_index.json")  # tells what SDXL makes of an empty prompt
    return {"resolution": cfg.resolution, "precision": cfg.precision,
            "encoders": dpo.hash_of_files(files)}


def differences(note, here):
    """In words, how `here` differs from the note of a set. "" if it does not."""
    return "; ".join(f"{name} was {note.get(name)} and is {here[name]}"
                     for name in here if note.get(name) != here[name])


# ------------------------------------------------------------------------------------- encoding

class Encoder:
    """The VAE and the text encoders of cfg.model, on this process's device."""

    def __init__(self, cfg, device):
        self.pipe = dpo.load_pipeline(cfg.model, without="unet|transformer")
        self.resolution, self.device = cfg.resolution, device
        # In a run in bf16 the network rounds its input more coarsely than fp16 rounds latents.
        self.dtype = torch.float32 if cfg.precision == "fp32" else torch.float16
        side = cfg.resolution // self.pipe.vae_scale_factor
        self.shape = self.pipe.vae.config.latent_channels, side, side
        dpo.prepare_encoders(self.pipe, cfg, device)

    def prompts(self, prompts):
        """[{name: embedding} of each prompt]."""
        cond = dpo.encode_prompts(self.pipe, prompts, self.resolution)
        rows = zip(*(value.cpu() for value in cond.values()), strict=True)
        return [dict(zip(cond, row, strict=True)) for row in rows]

    def images(self, images):
        """The latents (B, 2, *self.shape) of images (B, 2, 3, H, W) uint8."""
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


def missing(files, note):
    """What is left for this process of {file: items}. The processes take files in turn."""
    rank, world = dpo.rank_and_world()
    own = list(files.items())[rank::world]
    return {file: items for file, items in own if not is_whole(file, note)}


def progress_bar(files, unit):
    rank, _ = dpo.rank_and_world()
    return tqdm(total=sum(map(len, files.values())), desc=unit, unit=f" {unit}", ncols=99,
                disable=rank > 0)


def write_tensors(file, tensors, note):
    """Write {name: tensor}. The file appears when it is whole. Raises UserError."""
    with dpo.atomic_write(file) as partial:  # save_file() wants the numbers in the usual order
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial,
                  mark(file, note))


def write_prompts(encoder, files, note, cfg):
    """Write the embeddings of {file: prompts}."""
    with progress_bar(files, "prompts") as bar:
        for file, prompts in files.items():
            tensors = {}
            for first in range(0, len(prompts), cfg.micro_batch):
                few = prompts[first:first + cfg.micro_batch]
                for prompt, embeddings in zip(few, encoder.prompts(few), strict=True):
                    tensors |= {f"{name} of {prompt}": embeddings[name] for name in embeddings}
                bar.update(len(few))
            write_tensors(file, tensors, note)


def write_latents(encoder, pairs, files, names, note, cfg):
    """Write the latents of {file: places in `pairs`}, under names[place].

    Unreadable pairs are left out.
    """
    with progress_bar(files, "pairs") as bar:
        for file, places in files.items():
            keys = BatchSampler([(dpo.HELD_OUT, place) for place in places], cfg.micro_batch,
                                drop_last=False)
            tensors = {}
            for batch in dpo.load_batches(pairs, keys, cfg):
                rows = zip(batch["row"].tolist(), batch["unreadable"].tolist(),
                           encoder.images(batch["images"]), strict=True)
                tensors |= {names[place]: latents for place, unreadable, latents in rows
                            if not unreadable}
                bar.update(len(batch["row"]))
            write_tensors(file, tensors, note)


def write_table(file, prompts, names, prompt_files, file_of):
    """Write the columns of dpo.FORMATS, a row for each of `prompts` and `names`.

    file_of {name: file} has the latents. The preferred image is the first, so their label is 1.
    Rows without latents get no label.
    """
    prompts = [prompt or "" for prompt in prompts]
    shard_of = {prompt: shard.name for shard in prompt_files for prompt in prompt_files[shard]}
    labels = [1.0 if name in file_of else None for name in names]
    table = {"prompt": prompts,
             "latents": [file_of.get(name, "") for name in names],
             "embeddings": [shard_of.get(prompt, "") for prompt in prompts],
             "label": pyarrow.array(labels, pyarrow.float64())}
    with dpo.atomic_write(file) as partial:
        pyarrow.parquet.write_table(pyarrow.table(table), partial)


def check_folder(out, note_file, note):
    """Raise UserError if `out` has files that are of no set, or if note_file is of another set."""
    bases = "|".join(re.escape(file.stem) for file in out.glob("*.json") if read_note(file))
    ours = re.compile(rf"({bases})(\.json|\.parquet|-(prompts|latents)-\d+\.safetensors)")
    for file in sorted(out.glob("[!.]*")):
        if not ours.fullmatch(file.name) and not (bases and file.is_dir()):
            raise dpo.UserError(f"--out {out}: it holds other files, such as {file.name}; name a"
                                " new folder")
    changed = differences(read_note(note_file), note) if note_file.exists() else ""
    if changed:
        raise dpo.UserError(f"--out {out}: it holds another set: {changed}")


def check_disk(out, base, needed):
    """Say how much disk the set takes. Raises UserError if what is missing does not fit."""
    out.mkdir(parents=True, exist_ok=True)
    there = sum(file.stat().st_size for file in out.glob(f"{base}-*.safetensors"))
    free = shutil.disk_usage(out).free
    sizes = f"{needed / 1e9:,.3g} GB of disk; {free / 1e9:,.3g} GB are free"
    dpo.print_once(f"disk        {sizes}")
    if needed - there > free:
        raise dpo.UserError(f"--out {out}: the set needs {sizes}")


def encode(cfg, device):
    """Make the set in cfg.out, or go on with it. Raises UserError."""
    whole = dpo.load_pairs(cfg.data, cfg.split)  # with the ties, which `pairs` leaves out
    if whole.features["first"].dtype == "string":
        raise dpo.UserError(f"--data {cfg.data}: it is encoded already")
    pairs = dpo.ImagePairs(cfg, cfg.split, whole)
    out, base = Path(cfg.out), dpo.base_of(cfg.split)
    for flag, folder in ("data", cfg.data), ("model", cfg.model):
        if Path(folder).is_dir() and out.resolve().is_relative_to(Path(folder).resolve()):
            raise dpo.UserError(f"--out {out}: it lies in --{flag}; name another folder")
    note_file = out / f"{base}.json"
    note = {"model": cfg.model, "data": cfg.data, "split": cfg.split,
            "content": pairs.content()} | settings(cfg)
    check_folder(out, note_file, note)

    # No images before the text encoders are gone: SD3.5's nearly fill a card of 12 GB.
    encoder = Encoder(cfg, device)
    nothing, = encoder.prompts([""])
    bytes_of_prompt = sum(value.nbytes for value in nothing.values())
    bytes_of_pair = 2 * math.prod(encoder.shape) * encoder.dtype.itemsize
    prompts = ["", *sorted({prompt for prompt in pairs.table["prompt"] if prompt})]
    check_disk(out, base, len(prompts) * bytes_of_prompt + len(pairs) * bytes_of_pair)
    dpo.check_on_main(dpo.lock_folder, out)
    dpo.check_on_main(check_folder, out, note_file, note)  # another start may have been faster
    prompt_files = shards(out, f"{base}-prompts", prompts, bytes_of_prompt)
    pair_files = shards(out, f"{base}-latents", range(len(pairs)), bytes_of_pair)
    if dpo.is_main() and not note_file.exists():
        dpo.write_json(note_file, note)
    dpo.gather(None)  # from now on the note tells that the folder is ours, also after a kill

    # Latents get the name that their row will have in a run. It is new if --split is a part.
    names = {row: f"{place} of {base}" for place, row in enumerate(whole["row"])}
    write_prompts(encoder, missing(prompt_files, note), note, cfg)
    encoder.drop_text_encoders()
    names_of_pairs = [names[row] for row in pairs.table["row"]]
    write_latents(encoder, pairs, missing(pair_files, note), names_of_pairs, note, cfg)
    dpo.gather(None)  # wait for all files

    file_of = {name: file.name for file in pair_files for name in open_tensors(file).keys()}
    unreadable = len(pairs) - len(file_of)
    if unreadable > max(1, len(pairs) / 100) or not file_of:
        raise dpo.UserError(f"--data {cfg.data}: {unreadable} of {len(pairs)} pairs cannot be"
                            f" read, more than 1 %. Mend them, and remove {base}* in {out}")
    if dpo.is_main():
        files = [*prompt_files, *pair_files]
        note |= {"pairs": len(file_of), "prompts": len(prompts), "shape": encoder.shape,
                 "names": sorted(nothing), "no prompt": files[0].name,
                 "files": {file.name: file.stat().st_size for file in files},
                 "hash": dpo.hash_of_files(files)}
        dpo.write_json(note_file, note)
        write_table(out / f"{base}.parquet", whole["prompt"], names.values(), prompt_files, file_of)
    dpo.print_once(f"encoded     {len(file_of):,} pairs and {len(prompts):,} prompts, in {out};"
                   f" {unreadable} unreadable pairs left out")


def main(argv=None):
    flags = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & {*flags}:
        print(__doc__)
        return
    cfg = dpo.parse(flags, Config)
    if cfg.model == "toy":
        raise dpo.UserError("--toy: it has no images; name a --model")
    if cfg.out == Config.out:
        cfg.out = f"encoded/{Path(cfg.model).resolve().name}"
    encode(cfg, dpo.start_processes(torch.cuda.is_available(), cfg.precision))


if __name__ == "__main__":
    dpo.run_command(main)
