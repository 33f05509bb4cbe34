"""Tests of faces.py. Each docstring is one claim.

    pytest toy/test_faces.py            # a quarter of a minute
    pytest toy/test_faces.py -m slow    # trains a whole base, and sees it learn to smile
"""

import json
import os
import shlex
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]

import pyarrow.parquet
import pytest
import torch
from PIL import Image

import diffusion_dpo as dpo
from toy import faces, judge

torch.set_num_threads(1)
BRIEF = {"drawings": 4, "vae_steps": 3, "unet_steps": 2, "clip_steps": 2, "pairs": 40}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base of few steps, in which two denoising steps make an image."""
    folder = tmp_path_factory.mktemp("faces") / "base"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faces, "SIZES", BRIEF)
        patch.setattr(faces, "HELD_OUT", 8)
        patch.setitem(faces.SAMPLING, "num_inference_steps", 2)
        faces.main(["--out", str(folder)])
        yield folder


def test_smile_and_quality_of_drawings():
    """The smile of a drawing is its curvature, up to an error of 0.06. A drawing is near to those
    of its caption, and nearest to one of them. A picture of noise is not."""
    images, smiles = faces.drawings(20, "test")
    captions = [caption for caption in faces.CAPTIONS for _ in range(20)]
    found = faces.truth(images.flatten(0, 1), captions)
    error = found["smile"] - smiles.flatten()
    assert error.square().mean().sqrt() < 0.065
    assert error.mean().abs() < 0.02
    assert found["match"].mean() > 0.97
    assert found["quality"].mean() > -0.05

    noise = torch.randint(256, (1, 3, faces.SIDE, faces.SIDE), dtype=torch.uint8)
    assert faces.truth(noise, captions[:1])["quality"] < -0.3
    assert faces.smile_of(torch.full((1, 3, faces.SIDE, faces.SIDE), 200)).isfinite()


def test_labels_follow_bradley_terry():
    """A pair of reward 1 and 0 is labelled 1 in a share sigmoid(1) of the cases."""
    labels = faces.bradley_terry(torch.ones(20_000), torch.zeros(20_000), 0)
    assert labels.mean().item() == pytest.approx(0.731, abs=0.01)


def test_pairs_are_labelled_by_the_smile(base):
    """pairs.parquet has Pick-a-Pic's columns, and two faces of each caption in turn. A label of the
    larger smile is more common, and the scorer reads faces and captions."""
    rows = pyarrow.parquet.read_table(base / "pairs.parquet").to_pylist()
    assert list(rows[0]) == ["caption", "jpg_0", "jpg_1", "label_0"]
    assert [row["caption"] for row in rows] == [*faces.CAPTIONS * 3, *faces.CAPTIONS[:4]]
    score = judge.load_scorer(str(base / "clip"), "cpu")
    images = [dpo.read_image({"bytes": rows[0][side]}, None) for side in ("jpg_0", "jpg_1")]
    assert images[0].size == (faces.SIDE, faces.SIDE)
    assert score(images, [rows[0]["caption"]] * 2)[0].isfinite().all()


def test_a_run_on_faces(base, tmp_path, capsys):
    """The printed commands train on the base, and compare policy and reference. With a rate of 0
    both draw the same images. The film has a frame of the start and one of each picture."""
    faces.main(["--out", str(base)])  # it is there already
    printed = capsys.readouterr().out.rpartition("next: ")[2].replace("\\\n", " ")
    train, look = map(shlex.split, printed.splitlines())
    for lr in "0", "1e-2":
        out = str(tmp_path / lr)
        dpo.main([*train[2:], "--steps", "2", "--batch", "4", "--workers", "0", "--eval-every", "0",
                  "--sample-every", "1", "--lr", lr, "--out", out])
        faces.main([*look[2:3], out, "--images", "1"])
        numbers = json.loads(Path(out, "look.json").read_text())
        assert (numbers["smile_reference"] == numbers["smile_policy"]) == (lr == "0")
        assert Image.open(f"{out}/look.gif").n_frames == (3 if lr == "1e-2" else 1)
    assert Image.open(f"{out}/look.png").size == (12 * 128, 2 * 128)


@pytest.mark.slow
def test_faces_learn_to_smile(tmp_path):
    """On a base that is trained in full, DPO makes more of the faces happy, by far more than the
    standard error, and the quality holds."""
    faces.main(["--out", str(tmp_path / "base")])
    command = faces.NEXT.format(out=tmp_path / "base", held_out=faces.HELD_OUT)
    train = shlex.split(command.partition("next: ")[2].replace("\\\n", " ").splitlines()[0])
    out = str(tmp_path / "run")
    dpo.main([*train[2:], "--sample-every", "0", "--out", out])
    faces.main(["look", out])
    numbers = json.loads(Path(out, "look.json").read_text())
    rise = numbers["smile_policy"] - numbers["smile_reference"]
    assert rise > 5 * numbers["smile_standard_error"]
    assert numbers["quality_policy"] > numbers["quality_reference"] - 0.01
