"""Proof that toy/shapes.py makes what it says. Each test's docstring is one claim.

    pytest toy/test_shapes.py             # under half a minute
    pytest -m slow toy/test_shapes.py     # a base that can draw, and DPO: a quarter of an hour
"""

import concurrent.futures
import contextlib
import io
import json
import math
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]
import make_tiny

import diffusion_dpo as dpo
from toy import judge, shapes, shapes_study

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


def pairs_of(folder, split, name="pairs.parquet"):
    """What diffusion_dpo.py reads: captions, images (P, 2, 3, 32, 32), labels."""
    table, columns, labels = dpo.load_pairs(str(folder / name), split)
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


def test_a_word_is_a_token(made):
    """A caption is as many tokens as it has words, and two more; a saved pipeline keeps that."""
    tokenizer = dpo.load_pipeline(str(made[0])).tokenizer
    ids = tokenizer(shapes.CAPTIONS).input_ids
    assert {len(each) for each in ids} == {9} and len({tuple(each) for each in ids}) == 36
    assert max(map(max, ids)) < shapes.TEXT["vocab_size"] and tokenizer.model_max_length == 12


@pytest.mark.slow
def test_dpo_makes_better_pictures(tmp_path, capsys):
    """On a base that can draw, a short run by the printed command raises the true reward and the
    held-out accuracy by more than three standard errors."""
    folder, run = tmp_path / "base", tmp_path / "run"
    shapes.build(folder, 0, shapes.SIZES | {"pairs": 1000})
    shapes.main(["--out", str(folder)])
    (_, *flags), _ = printed_commands(capsys.readouterr().out)
    dpo.main([*flags, "--steps", "300", "--sample-every", "0", "--eval-every", "300",
              "--out", str(run)])
    shapes.main(["look", str(run)])
    numbers = json.loads((run / "look.json").read_text())
    gain = numbers["reward_policy"] - numbers["reward_reference"]
    assert gain > 3 * numbers["reward_standard_error"], numbers
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["held_out_accuracy"] - 0.5 > 3 * rows[-1]["held_out_standard_error"], rows[-1]


# ------------------------------------------------------------------------------------ the study

@pytest.fixture
def small(brief, monkeypatch):
    """A study of few images."""
    for name, value in {"SEEDS": (3,), "IMAGES": 2, "UNPROMPTED": 40}.items():
        monkeypatch.setattr(shapes_study, name, value)
    monkeypatch.setattr(shapes, "HELD_OUT", 8)
    shapes_study.the_judge.cache_clear()
    yield
    shapes_study.the_judge.cache_clear()


@pytest.fixture
def base(made, small, tmp_path):
    """The folder of a study that has a base."""
    shutil.copytree(made[0], folder := tmp_path / "base-3")
    shapes_study.make_base(tmp_path, 3)
    return folder


def flags_of(name, label, **changed):
    """The flags of an experiment, some of them changed; and whose labels."""
    flags, labels = shapes_study.experiments()[name][label]
    words = flags.split()
    for flag, value in changed.items():
        words[words.index(f"--{flag.replace('_', '-')}") + 1] = value
    return " ".join(words), labels


BRIEF = {"batch": "2", "micro_batch": "2", "steps": "1"}


def test_labels_of_the_study(base):
    """Four files of pairs. Three are the same 40 pairs, with the labels of the true reward, of the
    tiny CLIP, by chance; the fourth are images without a prompt, labelled by their shape alone."""
    tables = {name: pairs_of(base, "train", f"pairs-{name}.parquet")
              for name in ("true", "clip", "chance", "shape")}
    captions, images, labels = pairs_of(base, "train")
    for name in "true", "clip", "chance":
        assert tables[name][0] == captions and torch.equal(tables[name][1], images)
    assert tables["true"][2] == labels
    score = judge.load_scorer(str(base / "clip"), "cpu")
    first, second = (score([*images[:, side]], captions)[0] for side in (0, 1))
    assert tables["clip"][2] == (first > second).double().tolist()
    assert labels != tables["chance"][2] != tables["clip"][2]
    numbers = json.loads((base.parent / "base-3.json").read_text())
    true = [shapes.TrueReward()(images[:, side], captions)[0] for side in (0, 1)]
    order = true[0] > true[1]
    assert numbers["clip_agrees"] == (order == (first > second)).double().mean().item()
    assert numbers["accuracy_of_true_reward"] == (
        order == torch.tensor(labels).bool())[-8:].double().mean().item()
    captions, images, labels = tables["shape"]
    assert set(captions) == {""} and len(labels) == 20
    reward = torch.tensor([0.0, 1.0, 2.0])[shapes_study.shape_of(images.flatten(0, 1))].view(-1, 2)
    assert labels == shapes.bradley_terry(*reward.T, seed=3).tolist()
    drawn = shapes.drawings(1, 0)[:, 0]  # of 36 captions, in the order of the classes
    names = [list(shapes_study.SHAPE_REWARD)[i] for i in shapes_study.shape_of(drawn)]
    right = [name == shape for name, (shape, *_) in zip(names, shapes.CLASSES, strict=True)]
    assert sum(right) > 20  # of 36, with three drawings of each to go by; by chance 12


def test_no_run_is_trained_on_held_out_pairs(base, tmp_path):
    """Whoever labels; and the held-out ones have the labels of the true reward. D3PO asks the true
    reward. Only the run on shapes has the ELBO's weights."""
    experiments = shapes_study.experiments()
    for name, label in ("a-methods", "DPO"), ("c-labels", "tiny CLIP"), ("d-clip", "DPO"):
        job = experiments[name][label]
        problem, *_ = shapes_study.make_problem(*job, base, 3, tmp_path / "x")
        trained, held_out = ({row["jpg_0"]["bytes"] for row in pairs.table}
                             for pairs in (problem.pairs, problem.held_out))
        assert len(trained) == 32 and len(held_out) == 8 and not trained & held_out
        assert problem.held_out.labels == pairs_of(base, "train")[2][32:]
        assert len(set(problem.weight.tolist())) == 1
    problem, *_ = shapes_study.make_problem(*experiments["g-shares"]["beta 1"], base, 3,
                                            tmp_path / "x")
    assert torch.equal(problem.weight, dpo.elbo_weight(problem.alphas_cumprod))
    job = experiments["a-methods"]["D3PO, by the true reward"]
    problem, cfg, _ = shapes_study.make_problem(*job, base, 3, tmp_path / "x")
    x_0, prompt = torch.randn(1, 2, 4, 8, 8, generator=dpo.generator(0)), shapes.CAPTIONS[4]
    with torch.no_grad():
        images = problem.pipe.vae.decode(x_0[0] / problem.pipe.vae.config.scaling_factor).sample
    images = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    wanted = shapes.TrueReward()(images, [prompt] * 2)[0]
    torch.testing.assert_close(problem.score(x_0, {"prompt": [prompt]}), wanted[None])


def test_a_run_of_the_study(base, tmp_path, monkeypatch):
    """With a rate of 0 DPO ends where it began: win rate 1/2, held-out accuracy 1/2, the same
    images by each of four solvers. D3PO with another rate does not. A run that dies between its
    end and its numbers has the same numbers in the end. What is done is not done again."""
    monkeypatch.setattr(shapes, "CAPTIONS", shapes.CAPTIONS[:6])
    (base / "prompts.txt").write_text("\n".join(shapes.CAPTIONS))
    job, drawing = flags_of("a-methods", "DPO", **BRIEF, lr="0"), dpo.draw_picture
    with monkeypatch.context() as patch:
        patch.setattr(shapes_study, "experiments", lambda: {"a-methods": {"DPO": job}})
        shapes_study.run(tmp_path, *job, 3)
    assert dpo.draw_picture is drawing  # it is again what it was
    numbers = shapes_study.read(shapes_study.result_file(tmp_path, *job, 3))
    assert numbers["win_rate"] == numbers["held_out_accuracy"] == 0.5
    for each in numbers, *numbers["solvers"].values():
        assert each["reward_policy"] == each["reward_reference"]
    assert len({each["reward_policy"] for each in numbers["solvers"].values()}) == 4

    job = flags_of("a-methods", "D3PO, by the true reward", **BRIEF, sampling_steps="3", lr="1e-2")
    shapes_study.run(tmp_path, *job, 3)
    numbers = shapes_study.read(shapes_study.result_file(tmp_path, *job, 3))
    assert numbers["reward_policy"] != numbers["reward_reference"]

    job = flags_of("d-few-pairs", "DPO", **BRIEF | {"steps": "2"}, sample_every="1")
    file = shapes_study.result_file(tmp_path, *job, 3)
    shapes_study.run(tmp_path, *job, 3)
    before = file.read_text()
    assert [each["step"] for each in json.loads(before)["curve"]] == [1, 2]
    file.unlink()
    shapes_study.run(tmp_path, *job, 3)
    assert file.read_text() == before
    shutil.rmtree(base)
    shapes_study.run(tmp_path, *job, 3)  # or this would fail


def test_an_error_in_a_process_of_the_study_is_one_line(tmp_path):
    """It names the job and the file that holds what the job has printed."""
    def fails(work, *job):
        print("what it said")
        raise ValueError("why")

    threads = torch.get_num_threads()
    with pytest.raises(dpo.Refusal, match="--beta 1.*error.txt"):
        shapes_study.quietly(fails, tmp_path, "--beta 1", 0)
    torch.set_num_threads(threads)
    text = (tmp_path / "error.txt").read_text()
    assert "what it said" in text and "ValueError('why')" in text


def test_the_shares_of_shapes(monkeypatch):
    """p* is p_ref e^(reward / beta), by hand: shares of 1/2, 1/4, 1/4, rewards 0, 1, 2, beta 2."""
    drawn = {"reference": [0] * 20 + [1] * 10 + [2] * 10, "policy": [0] * 8 + [1] * 8 + [2] * 24}
    monkeypatch.setattr(shapes_study, "UNPROMPTED", 40)
    monkeypatch.setattr(shapes_study, "drawn", lambda problem, side, jobs, key: drawn[side])
    monkeypatch.setattr(shapes_study, "shape_of", torch.tensor)
    numbers = shapes_study.shares(SimpleNamespace(cfg=SimpleNamespace(beta=2.0)))
    Z = 0.5 + 0.25 * math.exp(0.5) + 0.25 * math.exp(1)
    p = {"circle": 0.5 / Z, "square": 0.25 * math.exp(0.5) / Z, "triangle": 0.25 * math.exp(1) / Z}
    assert {name: numbers[f"share_optimum_{name}"] for name in p} == pytest.approx(p)
    assert numbers["share_policy_triangle"] == pytest.approx(0.6)
    assert numbers["tv_policy"] == pytest.approx(0.6 - p["triangle"])
    assert numbers["tv_reference"] == pytest.approx(0.5 - p["circle"])


def test_tables_and_figures_of_the_study(small, tmp_path, capsys, monkeypatch):
    """From runs that are done it makes shapes.json, three figures and tables, in which every number
    stands where its names say, as median and range over the seeds. A folder of a study with other
    settings is refused."""
    monkeypatch.setattr(shapes_study, "SEEDS", (0, 1, 2))
    monkeypatch.setattr(shapes_study, "OUT", tmp_path / "study")
    work, pool = tmp_path / "work", SimpleNamespace()

    def submit(*job):
        (done := concurrent.futures.Future()).set_result(None)
        return done

    pool.submit = submit
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor",
                        lambda *inputs: contextlib.nullcontext(pool))
    value = {}  # of a job and a name: each another one; plus a tenth per seed

    def number(job, name, seed):
        return value.setdefault((job, name), float(len(value))) + seed / 10

    names = [f"{name}_{side}" for name in ("reward", "match", "clip", "diversity")
             for side in judge.SIDES] + ["win_rate", "held_out_accuracy", "held_out_rise_w",
                                         "held_out_rise_l", "tv_reference", "tv_policy"]
    names += [f"share_{side}_{shape}" for side in (*judge.SIDES, "optimum")
              for shape in shapes_study.SHAPE_REWARD]
    plan = shapes_study.experiments()
    for seed in shapes_study.SEEDS:
        dpo.write_json(work / f"base-{seed}.json", {"clip_agrees": 0.7})
        for job in {job for jobs in plan.values() for job in jobs.values()}:
            numbers = {name: number(job, name, seed) for name in names}
            numbers["solvers"] = {solver: {name: number(job, solver + name, seed) for name in names}
                                  for solver in shapes_study.SOLVERS}
            numbers["curve"] = [{"step": step} | {name: number(job, name + str(step), seed)
                                                  for name in names} for step in (500, 1000)]
            dpo.write_json(shapes_study.result_file(work, *job, seed), numbers)
    Image.new("RGB", (9, 9)).save(work / "sheet-0.png")
    shapes.main(["study", "--work", str(work)])
    text = capsys.readouterr().out

    def cell(title, row, column):
        lines = text.split(f"{title}\n")[1].split("\n\n")[0].splitlines()
        header, *rows = ([cell.strip() for cell in line.split("|")] for line in lines)
        return next(cells for cells in rows if cells[1] == str(row))[header.index(column)]

    def shown(*terms):
        middle = value[terms[0]] - sum(value[term] for term in terms[1:])
        low, high = (middle, middle) if len(terms) > 1 else (middle, middle + 0.2)
        middle += 0 if len(terms) > 1 else 0.1
        return f"{middle:.3f} ({low:.3f} to {high:.3f})"

    for name, row in ("a-methods", "SFT on the preferred"), ("e-beta", 2000), ("e-draws", 16):
        job = plan[name][row]
        assert cell(name, row, "win_rate") == shown((job, "win_rate"))
        assert cell(name, row, "match_gain") == shown((job, "match_policy"),
                                                      (job, "match_reference"))
    job = plan["d-clip"]["SEE-DPO"]
    assert cell("d-clip, 500 steps", "SEE-DPO", "clip_gain") == shown(
        (job, "clip_policy500"), (job, "clip_reference500"))
    plain = plan["a-methods"]["DPO"]
    assert cell("f-solvers", "Euler", "win_rate") == shown((plain, "Eulerwin_rate"))
    assert cell("g-shares", "circle", "optimum") == shown(
        (plan["g-shares"]["beta 1"], "share_optimum_circle"))
    saved = json.loads((tmp_path / "study" / "shapes.json").read_text())
    assert len(saved["a-methods"]) == 3 * 7 and len(saved["bases"]) == 3
    assert {path.name for path in (tmp_path / "study").glob("*.png")} == {
        "shapes-methods.png", "shapes-long.png", "shapes-sheet.png"}
    monkeypatch.setattr(shapes_study, "IMAGES", 3)
    with pytest.raises(SystemExit, match="2"):
        shapes.main(["study", "--work", str(work)])
    assert "other settings" in capsys.readouterr().err
