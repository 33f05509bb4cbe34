"""Tests of encode.py. Each docstring is one claim.

    pytest toy/test_encode.py        # a quarter of a minute, no network, no GPU
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import diffusers
import make_tiny
import pytest
import torch
from safetensors.torch import load_file
from test_tools import in_two_processes

import diffusion_dpo as dpo
from test_diffusion_dpo import (
    KINDS,
    batch_of_pairs,
    errors_of,
    image_pairs,
    metrics,
    parquet,
    pick,
    same,
    sd_line,
    weights,
)
from toy import encode


def make(tiny, kind, out, flags=""):
    """Encode the tiny pairs, and return the flags that train on them."""
    line = sd_line(tiny, f"tiny-{kind}", flags)
    encode.main([*line.split(), "--out", str(out)])
    return f"{line} --data {out}"


def task_of(line):
    return dpo.make_task(dpo.parse(line.split()), torch.device("cpu"))


@pytest.fixture(scope="module")
def encoded(tiny, tmp_path_factory):
    """The tiny pairs encoded by tiny SD1.5, and the flags that train on them."""
    folder = tmp_path_factory.mktemp("encoded") / "sd15"
    return folder, make(tiny, "sd15", folder)


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(encode, "SHARD", 40_000)  # about four prompts or twenty pairs


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("kind", [*KINDS, "four"])
def test_losses_are_those_without_crop_and_flip(tiny, tmp_path, kind):
    """To the last bit in fp32, with the captions dropped from the same pairs. No VAE and no text
    encoder is loaded. A latent of "four" has a quarter of the image's side, and not an eighth."""
    vae = {"block_out_channels": (8, 8, 16), "down_block_types": ("DownEncoderBlock2D",) * 3,
           "up_block_types": ("UpDecoderBlock2D",) * 3}
    make_tiny.make_model(tiny / "tiny-four", "sd15", vae=make_tiny.TINY["sd15"]["vae"] | vae)
    flags = f"--caption-dropout 0.5 --lora 2 --lr 1e-3 --out {tmp_path}/run"
    ahead = task_of(make(tiny, kind, tmp_path / "set", flags))
    assert not any(part for name, part in ahead.pipe.components.items()
                   if re.match(dpo.ENCODERS, name))

    # The crop is at the centre, and there is no flip, for training pairs too.
    as_shown = task_of(sd_line(tiny, f"tiny-{kind}", flags))
    real = dpo.ImagePairs.read
    with mock.patch.object(dpo.ImagePairs, "read", lambda pairs, item, prompt, *view:
                           real(pairs, item, prompt, 0.5, 0.5, False)):
        for keys in [(0, 0), (0, 1)], [(3, 17), (7, 9)], [(dpo.HELD_OUT, 30), (dpo.HELD_OUT, 2)]:
            batches = [batch_of_pairs(task, *keys) for task in (ahead, as_shown)]
            expected = errors_of(as_shown, batches[1])
            assert torch.equal(torch.stack(errors_of(ahead, batches[0])), torch.stack(expected))


def test_latents_in_half_precision(tiny, tmp_path):
    """With bf16 the latents are rounded to fp16, and the embeddings are as the encoder made them:
    in bf16."""
    line = make(tiny, "sd15", tmp_path / "set", "--precision bf16")
    ahead, on_the_fly = task_of(line), task_of(sd_line(tiny, "tiny-sd15", "--precision bf16"))
    keys = (dpo.HELD_OUT, 0), (dpo.HELD_OUT, 9)
    x_w, _, cond = ahead.encode(batch_of_pairs(ahead, *keys))
    expected_w, _, expected = on_the_fly.encode(batch_of_pairs(on_the_fly, *keys))
    assert torch.equal(x_w, expected_w.half().float())
    assert cond["prompt"].dtype == torch.bfloat16 and same(cond, expected)


def test_files_are_read_without_our_code(tiny, encoded):
    """safetensors reads what the note names: latents by row, embeddings by prompt."""
    folder, _ = encoded
    note = json.loads((folder / "train.json").read_text())
    tensors = {}
    for name in note["files"]:
        tensors |= load_file(folder / name)
    pairs = image_pairs(tiny / "pairs.parquet")
    assert {*pairs.table["row"]} | {f"prompt of {text}" for text in [*pairs.table["prompt"], ""]} \
        == tensors.keys()


def test_a_run_and_its_pictures(tiny, encoded, tmp_path):
    """A run on an encoded set saves, resumes and evaluates. For a picture the VAE and the text
    encoders come back for a while."""
    line = f"{encoded[1]} --split train[:40] --eval-split train[40:] --eval-every 2 --lr 1e-3"
    flags = f"{line} --sample-every 4 --resolution 64"
    dpo.main(f"{flags} --out {tmp_path}/one".split())
    assert (tmp_path / "one/samples/step-00000004.png").exists()
    assert "held_out_loss" in metrics(tmp_path / "one")[-1]

    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two/unet")
    dpo.main(f"{flags} --out {tmp_path}/two".split())
    assert same(weights(tmp_path / "two", "unet"), weights(tmp_path / "one", "unet"))


def test_encoding_goes_on_after_a_kill(tiny, tmp_path, small_files):
    """What was encoded is not encoded again, and the set is the same to the last byte."""
    make(tiny, "sdxl", tmp_path / "whole")
    real, seen = dpo.encode_images, []

    def killed(pipe, images):
        seen.append(len(images))
        if len(seen) == 20:
            raise KeyboardInterrupt
        return real(pipe, images)

    with mock.patch.object(dpo, "encode_images", killed):
        with pytest.raises(KeyboardInterrupt):
            make(tiny, "sdxl", tmp_path / "torn")
        with pytest.raises(dpo.UserError, match=f"--data {tmp_path}/torn"):  # not yet a set
            task_of(f"{sd_line(tiny, 'tiny-sdxl')} --data {tmp_path}/torn")
        seen[:] = [0] * 20
        make(tiny, "sdxl", tmp_path / "torn")
    assert 0 < sum(seen[20:]) < 2 * 56
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")


def test_two_processes_make_the_same_set(tiny, tmp_path, small_files):
    """Each makes a part of the files."""
    make(tiny, "sd15", tmp_path / "one")
    line = sd_line(tiny, "tiny-sd15", f"--out {tmp_path}/two")
    in_two_processes(encode, line)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_rows_keep_their_places(tiny, tmp_path):
    """Ties and unreadable pairs stay as rows without a label, so slices mean the same pairs."""
    rows = [pick(1.0, caption="a", size=(64, 64)), pick(0.5, caption="tie"),
            pick(caption="torn") | {"jpg_1": None}, pick(0.0, caption="b", size=(64, 64))]
    path = parquet(tmp_path / "pairs.parquet", rows)
    line = make(tiny, "sd15", tmp_path / "set", f"--data {path}")
    pairs = dpo.open_pairs(dpo.parse(f"{line} --data {tmp_path}/set".split()), "train")
    assert pairs.table["row"][:] == ["0 of train", "3 of train"]
    assert pairs.table["prompt"][:] == ["a", "b"]

    path = parquet(tmp_path / "pairs.parquet", rows + rows)
    with pytest.raises(dpo.UserError, match="2 of 6 pairs cannot be read"):
        make(tiny, "sd15", tmp_path / "more", f"--data {path}")


@pytest.mark.parametrize("flags, named", [
    ("--resolution 32", "resolution was 64 and is 32"),
    ("--precision bf16", "precision was fp32 and is bf16"),
    ("--model {tiny}/tiny-other", "tiny-other has others"),
    ("--split test", "split test is")])
def test_a_set_for_another_run_is_refused(tiny, encoded, flags, named):
    """The line names what differs, be it the last number of a VAE."""
    folder, line = encoded
    other = shutil.copytree(tiny / "tiny-sd15", tiny / "tiny-other", dirs_exist_ok=True)
    file, = other.glob("vae/*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(dpo.UserError, match=f"--data {folder}.*{named}"):
        task_of(f"{line} {flags.format(tiny=tiny)}")


def test_a_torn_set_is_refused_and_mended(tiny, encoded, tmp_path):
    """So is one with a file missing, or with that of another set. Encoding again makes it whole."""
    folder = shutil.copytree(encoded[0], tmp_path / "set")
    file, = folder.glob("*latents*")
    whole = file.read_bytes()
    make(tiny, "sd15", tmp_path / "other", "--split train[:-1]")
    other = (tmp_path / "other" / file.name).read_bytes()
    for content in (whole[:-1], other, b"x" * len(whole), None):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(dpo.UserError, match=file.name):
            task_of(f"{encoded[1]} --data {folder}")
        make(tiny, "sd15", folder)
        assert file.read_bytes() == whole


def test_splits_whose_names_begin_alike(encoded, tmp_path):
    """They would be taken for one, so they are refused."""
    folder = shutil.copytree(encoded[0], tmp_path / "set")
    for name in ("test.parquet", "test_unique.parquet"):
        shutil.copy(folder / "train.parquet", folder / name)
    with pytest.raises(dpo.UserError, match="'test.parquet', 'test_unique.parquet'"):
        task_of(f"{encoded[1]} --data {folder} --split test")


def test_what_is_not_encoded(tiny, encoded, tmp_path):
    """A folder of other files, or of another set, is left alone. A set is made from images."""
    folder, line = encoded
    before = contents(folder)
    images = sd_line(tiny, "tiny-sd15")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/train.json").write_text("[]")
    for flags, named in [
            (f"{images} --out {tiny}", "it holds other files"),
            (f"{images} --out {tmp_path}/mine", "it holds other files, such as train.json"),
            (f"{images} --out {tiny}/tiny-sd15/new", "it lies in --model"),
            (f"{images} --out {folder} --split train[:5]", "split was train and is train[:5]"),
            (f"{line} --out {tmp_path}/new", "encoded already")]:
        with pytest.raises(dpo.UserError, match=re.escape(named)):
            encode.main(flags.split())
    with mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=1000)), \
            pytest.raises(dpo.UserError, match="GB of disk"):
        make(tiny, "sd15", tmp_path / "new")
    assert contents(folder) == before and not any((tmp_path / "new").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind, flags", [
    ("sdxl", "--lora 4 --lr 1e-4"),
    ("sd15", "--optimizer adafactor --lr 1e-6")])
def test_full_size(tmp_path, kind, flags):
    """The real architectures with random weights, at 256 pixels: they encode, train, save, and load
    into a pipeline that draws. Needs 30 GB of disk and 20 GiB of memory."""
    make_tiny.assemble(**make_tiny.PUBLISHED[kind]).save_pretrained(tmp_path / "model")
    make_tiny.make_pairs(tmp_path / "pairs.parquet")
    line = (f"--model {tmp_path}/model --resolution 256 --split train[:2] --batch 1 --micro-batch 1"
            f" --workers 0 --steps 2 --sample-every 0 {flags}")
    encode.main(f"{line} --data {tmp_path}/pairs.parquet --out {tmp_path}/set".split())
    line = f"{line} --data {tmp_path}/set --out {tmp_path}/run"
    dpo.main(line.split())
    folder = tmp_path / "run" / ("lora" if "--lora" in flags else "unet")
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[1] != losses[0]

    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    if folder.name == "lora":
        pipe.load_lora_weights(folder)
    else:
        pipe.unet = pipe.unet.from_pretrained(folder)
    image, = pipe("a circle", height=256, width=256, num_inference_steps=2).images
    assert image.size == (256, 256)
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_the_recipe_runs_as_written(tmp_path):
    """Every indented block of recipe.md runs in a copy of the project, but for those that make the
    environment or need a real checkpoint."""
    root = Path(__file__).parents[1]
    names = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=root)
    for name in names.decode().split():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(root / name, tmp_path / name)
    text = re.sub(".*venv.*|.*.ci/python.*", "", (root / "toy/recipe.md").read_text())
    blocks = map(textwrap.dedent, re.findall(r"(?m)(?:^    .*\n|^\n(?=    ))+", text))
    run = [block for block in blocks if not re.search(r"from_single_file|^\s*\{", block)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for block in run:
        subprocess.run(["bash", "-ec", block], cwd=tmp_path, check=True,
                       env=os.environ | {"PATH": path})
    assert len(run) == 8 and (tmp_path / "runs/mine/mine.safetensors").exists()
