"""Tests of shapes.py and shapes_study.py. Each docstring is one claim.

    pytest toy/test_shapes.py       # a quarter of a minute
"""

import json
import os
import shlex
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]

import pytest
import torch

import diffusion_dpo as dpo
from toy import shapes, shapes_study

torch.set_num_threads(1)
SIZES = {"drawings": 4, "vae_steps": 3, "unet_steps": 2, "clip_steps": 2, "pairs": 40}


@pytest.fixture(scope="module", autouse=True)
def brief():
    """Two denoising steps in place of 25, and few drawings, pairs and images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "DRAWINGS", 3)
        patch.setattr(shapes, "HELD_OUT", 8)
        patch.setattr(shapes, "SIZES", SIZES)
        patch.setattr(shapes_study, "IMAGES", 2)
        patch.setitem(shapes.SAMPLING, "num_inference_steps", 2)
        yield


@pytest.fixture(scope="module")
def base(brief, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "base-0"
    shapes.main(["--out", str(folder)])
    return folder


def test_true_reward_by_hand():
    """It is minus SCALE times the least root mean square difference to a drawing of the caption.

    An image matches if the nearest of all drawings is one of its caption.
    """
    reward = shapes.TrueReward()
    pixels = reward.drawings[5, 1] * 255
    image = (pixels.round() + 20).clamp(max=255).byte().view(1, 3, 32, 32)
    distances = (reward.drawings - image.flatten() / 255).square().mean(2).sqrt()  # (36, 3)
    for row, matches in (5, 1), (6, 0):
        found, match = reward(image, [shapes.CAPTIONS[row]])
        wanted = -shapes.SCALE * distances[row].min().item()
        assert found.item() == pytest.approx(wanted, rel=1e-3) and match.item() == matches


def test_a_run_on_shapes(base, tmp_path, capsys):
    """The printed commands train on the base, and compare policy and reference.

    With a rate of 0 both sample the same images.
    """
    shapes.main(["--out", str(base)])  # it is there already
    printed = capsys.readouterr().out.rpartition("next: ")[2].replace("\\\n", " ")
    flags, look = map(shlex.split, printed.splitlines())
    for lr in "0", "1e-2":
        out = str(tmp_path / lr)
        dpo.main([*flags[2:], "--steps", "1", "--batch", "4", "--workers", "0",
                  "--sample-every", "0", "--lr", lr, "--out", out])
        shapes.main([look[2], out, "--images", "1"])
        numbers = json.loads(Path(out, "look.json").read_text())
        assert (numbers["reward_reference"] == numbers["reward_policy"]) == (lr == "0")


@pytest.mark.parametrize("setting", ["DPO", "SPO, by the true reward"])
def test_a_run_of_the_study(base, setting):
    """A run on pairs and an on-policy run both end in a file of numbers."""
    flags, labels = shapes_study.experiments()["a-methods"][setting]
    job = base.parent, flags + " --steps 1 --batch 2 --micro-batch 2", labels, 0
    shapes_study.make_base(base.parent, 0)
    shapes_study.run(*job)
    numbers = json.loads(shapes_study.result_file(*job).read_text())
    assert {"reward_policy", "win_rate", "held_out_accuracy"} <= numbers.keys()
