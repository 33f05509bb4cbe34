"""Tests of faces.py. Each docstring is one claim.

    pytest toy/test_faces.py            # a quarter of a minute
    pytest toy/test_faces.py -m slow    # trains a whole base, and sees it learn to smile
"""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import study
import torch
from PIL import Image
from safetensors.torch import load_file

import diffusion_dpo as dpo
from toy import faces, study_faces

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


def test_a_run_on_faces(base, tmp_path, capsys):
    """The printed commands train on the base, and compare policy and reference. With a rate of 0
    both draw the same images. The film has a frame of the start and one of each picture."""
    faces.main(["--out", str(base)])  # it is there already
    printed = capsys.readouterr().out.rpartition("next: ")[2].replace("\\\n", " ")
    train, look = map(shlex.split, printed.splitlines())
    for lr in "0", "1e-2":
        out = str(tmp_path / lr)
        dpo.main([*train[2:], "--steps", "2", "--batch", "4", "--workers", "0", "--eval-every", "0",
                  "--sample-every", "2", "--lr", lr, "--out", out])
        faces.main([*look[2:3], out, "--images", "1"])
        numbers = json.loads(Path(out, "look.json").read_text())
        assert (numbers["smile_reference"] == numbers["smile_policy"]) == (lr == "0")
        assert Image.open(f"{out}/look.gif").n_frames == (2 if lr == "1e-2" else 1)
    assert Image.open(f"{out}/look.png").size == (12 * 128, 2 * 128)


@pytest.fixture
def brief_study(base, tmp_path, monkeypatch):
    """The study with a brief base, in which a point of a path is judged by two images a caption."""
    (tmp_path / "base-0").symlink_to(base)
    for name, value in {"WORK": tmp_path, "IMAGES": 2, "MANY": 2}.items():
        monkeypatch.setattr(study_faces, name, value)
    two_steps = {name: (*each[:2], 2) for name, each in study_faces.SOLVERS.items()}
    monkeypatch.setattr(study_faces, "SOLVERS", two_steps)
    study_faces.make_base(0)
    yield
    study_faces.reference_images.cache_clear()
    study_faces.judged_reference.cache_clear()


def run_briefly(**changes):
    flags = "--steps 2 --batch 4 --lr 1e-2 --sample-every 1"
    return study.run(study_faces.FaceJob(flags, pairs=20).but(**changes))


def test_a_job_on_faces_is_the_run_of_the_script(brief_study, base, tmp_path):
    """Encoded pairs give the losses of a run that reads and encodes the images itself."""
    job = study_faces.FaceJob("--steps 3 --batch 8 --lr 1e-3 --sample-every 0", pairs=32)
    task, cfg, step = study_faces.make_task(job, tmp_path / "encoded")
    rows = dpo.train(task, cfg, step)
    line = f"--model {base} --data {base}/pairs.parquet --split train[:32] --resolution 32"
    line += f" {job.flags} --precision fp32 --workers 0 --micro-batch 32 --out {tmp_path}/run"
    cfg = dpo.parse(line.split())
    wanted = dpo.train(dpo.make_task(cfg, torch.device("cpu")), cfg)
    for name in ("loss", "err_policy_w"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in wanted], rel=1e-3)


@pytest.mark.parametrize("labels", ["smile", "clip"])
def test_labels_without_chance(brief_study, tmp_path, labels):
    """The face with the larger smile or score is the preferred one."""
    found = load_file(tmp_path / "base-0.safetensors")
    pairs = study_faces.Encoded(found, range(40), labels, seed=0)
    better = found[labels].argmax(1)
    assert torch.equal(pairs.latents[:, 0], found["latents"][torch.arange(40), better])


def test_the_study_of_faces(brief_study, tmp_path, monkeypatch, capsys):
    """Every table, figure and file of numbers of the chapter is made of what the jobs measure."""
    numbers = run_briefly(measures=(study_faces.by_solver, study_faces.closed_form))
    (_, last), by_pndm = numbers["path"], numbers["solvers"]["PNDM"]
    gained = by_pndm["policy"]["smile"] - by_pndm["reference"]["smile"]
    assert last["smile"] == pytest.approx(gained, abs=1e-3)
    own = run_briefly(method="d3po", flags="--sampling-steps 2 --lora 0")
    assert len(own["path"]) == 2
    job = study_faces.ROUND.but("--steps 1 --batch 4 --sample-every 1", pairs=20)
    anew, _ = study_faces.train(job.but(first=job), tmp_path / "anew")
    task, path = study_faces.train(job.but("--lr 0", first=job, onward=True), tmp_path / "onward")
    assert path[1] == pytest.approx(path[0] | {"step": 2}, abs=1e-5)  # the rate is 0
    pair = torch.cat([study_faces.drawn(task, "policy", 1, f"round 2, 0, {side}")[:1]
                      for side in (0, 1)])
    latents = dpo.encode_images(task.pipe, pair[faces.smile_of(pair).argsort(descending=True)])
    for pairs in anew.pairs.latents[20:], task.pairs.latents:
        assert torch.allclose(pairs[0, :, 0], latents, atol=1e-3)
    found = {name: dict.fromkeys(settings, [numbers] * 3)
             for name, settings in study_faces.EXPERIMENTS.items()}
    monkeypatch.setattr(study, "OUT", tmp_path / "out")
    study.OUT.mkdir()
    study.write_json(found)
    study.print_numbers(found)
    study.plot_all(found)
    assert "| DPO, lr 1e-4 | +0." in capsys.readouterr().out
    committed = {path.name for path in Path(study.HERE, "study").glob("faces*")}
    assert {path.name for path in study.OUT.iterdir()} == committed


@pytest.mark.parametrize("qualities, smile", [
    ((-0.01, -0.02), 0.1), ((0.0, -0.01), 0.3), ((-0.01, 0.01), 0.4)])
def test_smile_at_equal_quality(qualities, smile):
    """It is the largest smile on the path, up to where the quality has fallen by 0.005."""
    path = [{"smile": 0.2 * (i + 1), "quality": each} for i, each in enumerate(qualities)]
    assert study_faces.smile_at_quality(path, 0.005) == pytest.approx(smile, abs=0.01)


def test_closed_form_of_two_smiles(monkeypatch):
    """The reference draws smiles of 0.5 and 1.5 in equal shares. With R / beta = m, the share of
    1.5 in p* is sigmoid(1) = 0.731. The policy draws nothing else. It counts in the outer bin."""
    smiles = {"reference": torch.tensor([0.5, 1.5]).repeat_interleave(12),
              "policy": torch.full((24,), 1.5)}
    monkeypatch.setattr(study_faces, "MANY", 2)
    monkeypatch.setattr(study_faces, "drawn", lambda task, side, n, key="look": smiles[side])
    monkeypatch.setattr(faces, "smile_of", lambda images: images)
    task = SimpleNamespace(cfg=SimpleNamespace(beta=3.0))
    found = study_faces.closed_form(task)
    assert found["tv_reference"] == pytest.approx(0.231, abs=1e-3)
    assert found["tv_policy"] == pytest.approx(0.269, abs=1e-3)
    assert found["tv_floor"] == 0


def test_rank_correlation():
    """It looks at the order only, and equal values share a rank."""
    assert study_faces.rank_correlation([1, 2, 2], [3, 90, 90]) == pytest.approx(1)
    assert study_faces.rank_correlation([1, 2, 3], [9, 1, 0]) == pytest.approx(-1)


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
