"""Proof that toy/shapes.py makes what it says. Each test's docstring is one claim.

    pytest toy/test_shapes.py             # seconds
"""

import io
import json
import math
import shlex
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]
import make_tiny

import diffusion_dpo as dpo
from toy import judge, shapes

TINY = {"drawings": 4, "vae_steps": 3, "unet_steps": 2, "clip_steps": 2, "pairs": 40}


def shorten(patch):
    """Two denoising steps in place of 25, and three right drawings per caption."""
    patch.setattr(shapes, "DRAWINGS", 3)
    patch.setitem(shapes.SAMPLING, "num_inference_steps", 2)


@pytest.fixture
def brief(monkeypatch):
    shorten(monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder as shapes.py makes it, hardly trained, and the numbers that build() gives."""
    folder = tmp_path_factory.mktemp("shapes") / "tiny-shapes"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        return folder, shapes.build(folder, 3, TINY)


def test_drawings_show_their_captions():
    """In the middle of most drawings is the colour of the shape, in a corner that of the ground;
    and the captions are 36, each once."""
    images = shapes.drawings(9, 0).float()  # (36, 9, 3, 32, 32)
    assert len(set(shapes.CAPTIONS)) == len(images) == 36
    for (_, colour, ground), caption, drawn in zip(
            shapes.CLASSES, shapes.CAPTIONS, images, strict=True):
        assert caption.startswith(f"a {colour} ") and caption.endswith(f" on a {ground} ground")
        for name, pixels in (colour, drawn[:, :, 15, 15]), (ground, drawn[:, :, 0, 0]):
            wanted = torch.tensor(make_tiny.COLOURS[name]).float()
            assert (pixels.median(0).values - wanted).abs().max() < 16, (caption, name)


def test_true_reward_by_hand(brief):
    """Minus SCALE times the least root mean square difference to a drawing of the caption: 0 for
    that drawing, and what a loop finds for noise. What matches is the nearest of all."""
    true_reward = shapes.TrueReward()
    drawn = (true_reward.drawings * 255).round().view(36, 3, 3, 32, 32).to(torch.uint8)
    own, other = shapes.CAPTIONS[5], shapes.CAPTIONS[6]
    reward, match = true_reward(drawn[5, :2], [own, other])
    assert abs(reward[0]) < 0.05 and reward[1] < -1 and match.tolist() == [1, 0]

    noise = torch.randint(256, (2, 3, 32, 32), generator=dpo.generator(0)).to(torch.uint8)
    noise[1] = (drawn[7, 1].float() + 20).clamp(max=255)
    rows = [[min(((a.double() - b.double()) / 255).square().mean().sqrt().item() for b in right)
             for right in drawn] for a in noise]
    reward, match = true_reward(noise, [own, shapes.CAPTIONS[7]])
    wanted = torch.tensor([-shapes.SCALE * rows[0][5], -shapes.SCALE * rows[1][7]])
    torch.testing.assert_close(reward, wanted, rtol=1e-3, atol=1e-3)
    nearest = [min(range(36), key=row.__getitem__) for row in rows]
    assert match.tolist() == [float(nearest[0] == 5), float(nearest[1] == 7)] and match[1] == 1


def test_labels_are_bradley_terry():
    """The first of a pair is preferred with probability sigmoid of the rewards' difference: 3/4 if
    its odds are 3 to 1, 1/4 the other way round; and another seed draws other labels."""
    n, by = 20_000, math.log(3)
    for first, share in (by, 0.75), (-by, 0.25), (0.0, 0.5):
        labels = shapes.bradley_terry(torch.full((n,), first), torch.zeros(n), 0)
        assert labels.mean().item() == pytest.approx(share, abs=0.015)
    zeros = torch.zeros(n)
    labels, others = (shapes.bradley_terry(zeros, zeros, seed) for seed in (0, 1))
    assert set(labels.tolist()) == {0, 1} and 0.4 < (labels == others).float().mean() < 0.6


def pairs_of(folder, split):
    """What diffusion_dpo.py reads: captions, images (P, 2, 3, 32, 32), labels."""
    table, columns, labels = dpo.load_pairs(str(folder / "pairs.parquet"), split)
    assert columns == ["caption", "jpg_0", "jpg_1"]
    images = [[dpo.square(Image.open(io.BytesIO(row[side]["bytes"])), 32, 0, 0, False)
               for side in columns[1:]] for row in table]
    return table["caption"][:], torch.stack([torch.stack(both) for both in images]), labels


def test_pairs_are_the_models_own_labelled_by_the_true_reward(made, brief):
    """The pairs are what the saved pipeline draws for their captions; their labels are drawn by
    chance from the true reward of these very images; every caption has its share."""
    folder, numbers = made
    captions, images, labels = pairs_of(folder, "train")
    assert len(labels) == 40 and set(captions) == set(shapes.CAPTIONS)
    reward, match = (both.view(-1, 2) for both in shapes.TrueReward()(
        images.flatten(0, 1), [caption for caption in captions for _ in range(2)]))
    assert labels == shapes.bradley_terry(*reward.T, seed=3).tolist()
    assert numbers["reward"] == pytest.approx(reward.mean().item())
    assert numbers["match"] == pytest.approx(match.mean().item())
    pipe = dpo.load_pipeline(str(folder))
    drawn = shapes.draw(pipe, [(captions[4], 8), (captions[4], 9)], "pairs 3")
    assert (drawn.int() - images[4].int()).abs().max() <= 1 and not torch.equal(*images[4])


def test_held_out_pairs_are_no_training_pairs(made):
    """The splits that are printed share no image, and together they are all pairs."""
    folder, _ = made
    parts = [pairs_of(folder, split)[1] for split in ("train[:-10]", "train[-10:]")]
    assert [len(part) for part in parts] == [30, 10]
    assert torch.equal(torch.cat(parts), pairs_of(folder, "train")[1])
    assert len(torch.cat(parts).flatten(0, 1).flatten(1).unique(dim=0)) == 80


def test_the_folder_is_stable_diffusions(made):
    """It is a pipeline of diffusers' SD1.5 whose latents have variance 1, and beside it lie a
    scorer that toy/judge.py loads, and the prompts."""
    folder, _ = made
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is diffusers.StableDiffusionPipeline and dpo.find_preset(folder) == "sd15"
    x = shapes.drawings(TINY["drawings"], 3).flatten(0, 1) / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(x).latent_dist.mode() * pipe.vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, rel=1e-3)
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    scores, embeds = judge.load_scorer(str(folder / "clip"), "cpu")(images, shapes.CAPTIONS[:2])
    assert scores.shape == (2,) and embeds.shape == (2, 16)
    assert judge.read_prompts("--prompts", folder / "prompts.txt") == shapes.CAPTIONS


def printed_commands(text):
    """The two command lines after "next:", as lists of words."""
    lines = text.split("next: ")[1].replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines]


def test_what_it_says_to_run_next(made, brief, tmp_path, capsys, monkeypatch):
    """A second call makes nothing, and its two commands work: with a rate of 0 the policy draws
    what the reference draws, to the last bit; with another it does not."""
    folder, _ = made
    monkeypatch.setattr(shapes, "build", None)
    monkeypatch.setattr(shapes, "HELD_OUT", 8)
    shapes.main(["--out", str(folder)])
    text = capsys.readouterr().out
    assert "is there already" in text
    (script, *flags), (tool, verb, run) = printed_commands(text)
    assert (script, tool, verb, run) == ("diffusion_dpo.py", "toy/shapes.py", "look", "runs/shapes")
    for lr in "0", "1e-2":
        out = tmp_path / lr
        dpo.main([*flags, "--steps", "2", "--batch", "4", "--micro-batch", "4", "--workers", "0",
                  "--sample-every", "0", "--lr", lr, "--warmup", "1", "--out", str(out)])
        shapes.main([verb, str(out), "--images", "1"])
        numbers = json.loads((out / "look.json").read_text())
        assert numbers["images"] == 36 and Image.open(out / "look.png").width > 900
        same = numbers["reward_reference"] == numbers["reward_policy"]
        assert same == (lr == "0"), numbers


def test_look_at_another_models_run_is_refused(tiny, tmp_path, capsys):
    """It is one line, not an error of shapes."""
    config = {"config": {"model": str(tiny / "tiny-sd15"), "resolution": 64}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="2"):
        shapes.main(["look", str(tmp_path)])
    assert "should be a run of toy/tiny-shapes" in capsys.readouterr().err


def test_killed_it_leaves_no_half_made_model(brief, tmp_path, capsys, monkeypatch):
    """While it is written the folder is not there; what a killed call has left goes with the next;
    and a folder of something else stays as it is."""
    out, real = tmp_path / "new", judge.write_pairs

    def killed(*inputs):
        assert not out.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "SIZES", dict.fromkeys(TINY, 1))
    monkeypatch.setattr(judge, "write_pairs", killed)
    with pytest.raises(SystemExit):
        shapes.main(["--out", str(out)])
    assert not out.exists() and len([*tmp_path.iterdir()]) == 1
    monkeypatch.setattr(judge, "write_pairs", real)
    shapes.main(["--out", str(out)])
    assert [*tmp_path.iterdir()] == [out] and len(printed_commands(capsys.readouterr().out)) == 2
    (tmp_path / "mine").mkdir()
    for line, words in (["--out", "mine"], "mine: exists"), (["look", "mine"], "not the folder of"):
        with pytest.raises(SystemExit):
            shapes.main([*line[:-1], str(tmp_path / line[-1])])
        assert words in capsys.readouterr().err
