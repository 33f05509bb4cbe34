"""Tests of judge.py and figure.py. Each test's docstring is one claim."""

import io
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]

import datasets
import diffusers
import figure
import judge
import make_tiny
import numpy
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import diffusion_dpo as dpo

torch.set_num_threads(1)
datasets.disable_progress_bars()
for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()


def jpeg(colour="red", size=(32, 32), mode="RGB", form="JPEG", **save):
    image = colour if isinstance(colour, Image.Image) else Image.new(mode, size, colour)
    image.save(file := io.BytesIO(), form, **save)
    return file.getvalue()


def parquet(path, rows):
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return str(path)


def pick(label=1.0, first="red", second="blue", caption="a picture", **image):
    """A row of Pick-a-Pic."""
    return {"caption": caption, "label_0": label,
            "jpg_0": first if isinstance(first, bytes) else jpeg(first, **image),
            "jpg_1": second if isinstance(second, bytes) else jpeg(second, **image)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with tiny-sd15, tiny-sdxl, tiny-clip and pairs.parquet."""
    folder = tmp_path_factory.mktemp("tiny")
    for kind in ("sd15", "sdxl"):
        make_tiny.make_model(folder / f"tiny-{kind}", kind)
    make_tiny.make_scorer(folder / "tiny-clip")
    make_tiny.make_pairs(folder / "pairs.parquet")
    return folder


def problem_of(tiny, kind, *argv):
    cfg = dpo.parse(["--model", str(tiny / f"tiny-{kind}"), "--data", str(tiny / "pairs.parquet"),
                     "--resolution", "64", "--batch", "4", "--micro-batch", "2", *argv])
    return dpo.make_problem(cfg, torch.device("cpu"))


@pytest.fixture
def two_steps(monkeypatch):
    """Pipelines draw in two sampling steps; the sizes of the batches they have drawn."""
    drawn, real = [], diffusers.StableDiffusionPipeline.__call__

    def call(pipe, prompts, **given):
        drawn.append(len(prompts))
        return real(pipe, prompts, num_inference_steps=2, **given)

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "__call__", call)
    return drawn


# ---------------------------------------------------------------------------------------- pictures

@pytest.mark.parametrize("precision, lora", [("fp32", 0), ("bf16", 0), ("fp32", 2)])
def test_samples_show_reference_and_policy(tiny, tmp_path, two_steps, precision, lora):
    """Left the reference, right the policy, from the same noise: equal before training; when the
    policy changes only the right column does; and the pipeline keeps the UNet that it had."""
    problem = problem_of(tiny, "sd15", "--precision", precision, "--lora", str(lora))
    unet = problem.pipe.unet
    figure.draw(problem, tmp_path / "before.png", [])
    for p in problem.policy.parameters():
        if p.requires_grad:
            p.data.mul_(1.5) if not lora else p.data.add_(0.1)
    figure.draw(problem, tmp_path / "after.png", [])
    before, after = (Image.open(tmp_path / f"{name}.png") for name in ("before", "after"))
    rows = len(problem.pairs.prompts[:4])
    left, right = (0, 0, 64, 64 * rows), (64, 0, 128, 64 * rows)
    assert before.size == (128, 64 * rows) and problem.pipe.unet is unet
    assert before.crop(left).tobytes() == before.crop(right).tobytes()
    assert after.crop(left).tobytes() == before.crop(left).tobytes()
    assert after.crop(right).tobytes() != before.crop(right).tobytes()


@pytest.mark.parametrize("lora", [0, 2])
def test_a_failed_picture_leaves_everything_in_place(tiny, monkeypatch, lora):
    """An exception while the reference draws turns neither the policy nor the pipeline into it."""
    problem = problem_of(tiny, "sd15", "--lora", str(lora))
    for p in problem.policy.parameters():
        if p.requires_grad:
            p.data.add_(0.1)
    x, t, prompt = torch.ones(1, 4, 8, 8), torch.tensor([5]), torch.ones(1, 77, 32)
    before, unet = problem.policy(x, t, prompt), problem.pipe.unet
    assert not torch.equal(before, problem.reference(x, t, prompt=prompt))
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "__call__", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        figure.draw_images(problem, "reference", [("a cat", 0)])
    assert torch.equal(problem.policy(x, t, prompt), before) and problem.pipe.unet is unet


def test_lora_draws_what_its_file_draws_in_a_pipeline(tiny, tmp_path):
    """SDXL with pipe.load_lora_weights of the saved adapters draws the policy's image, without
    them the reference's."""
    problem = problem_of(tiny, "sdxl", "--lora", "2")
    for p in problem.policy.adapters.values():
        p.data.add_(0.05)
    problem.policy.save(tmp_path / "lora")
    pipe, drawn = dpo.load_pipeline(str(tiny / "tiny-sdxl")), []
    pipe.set_progress_bar_config(disable=True)
    for _ in range(2):
        drawn.append(pipe("a cat", generator=dpo.generator("draw", "a cat", 0), height=64,
                          width=64).images[0])
        pipe.load_lora_weights(tmp_path / "lora")
    ours = [figure.draw_images(problem, side, [("a cat", 0)])[0] for side in judge.SIDES]
    assert [image.tobytes() for image in drawn] == [image.tobytes() for image in ours]
    assert ours[0].tobytes() != ours[1].tobytes()


ROWS = [{"step": step, "loss": 0.7 - step / 100, "reward_accuracy": 0.5 + step / 50,
         "err_policy_w": 1.0 + step, "err_ref_w": 1.0, "err_policy_l": 2.0 + 3 * step,
         "err_ref_l": 2.0, "reward_margin": step / 10, "logit_std": step / 20}
        for step in range(4)] + [{"step": 4, "held_out_accuracy": 0.6}]


@pytest.fixture
def panels(monkeypatch):
    """The panels of the last figure, as matplotlib leaves them."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    real, kept = pyplot.subplots, []

    def subplots(*shape, **options):
        made = real(*shape, **options)
        kept[:] = made[1].flat
        return made

    monkeypatch.setattr(pyplot, "subplots", subplots)
    return kept


def curves(panel):
    """{label: y} of the lines of a panel that have one."""
    return {line.get_label(): [float(y) for y in line.get_ydata()] for line in panel.get_lines()
            if not line.get_label().startswith("_")}


def test_the_toy_is_drawn(tmp_path, panels, monkeypatch):
    """toy.png: p_ref, p* and p_theta with their distances to p*, limits known from the labels'
    reward, errors of the policy relative to the reference's."""
    monkeypatch.setattr(dpo, "SAMPLES", 1000)
    toy = dpo.Toy(dpo.parse(["--toy", "--pairs", "2000"]))
    figure.draw(toy, tmp_path / "toy.png", ROWS)
    assert Image.open(tmp_path / "toy.png").size == (1280, 624)
    numbers, densities = toy.measure()
    for panel, (name, p) in zip(panels[1:4], densities.items(), strict=True):
        assert panel.get_title().endswith(f"TV to p* = {numbers[f'tv_{name}']:.3f}")
        assert numpy.allclose(panel.get_images()[0].get_array(), p.T)
    true = dpo.toy_reward(toy.pairs.x_w) - dpo.toy_reward(toy.pairs.x_l)
    loss, accuracy, errors, _ = map(curves, panels[4:])
    assert loss["the labels' reward"][0] == pytest.approx(true.neg().exp().log1p().mean().item())
    assert accuracy["the labels' reward"][0] == pytest.approx((true > 0).float().mean().item())
    assert accuracy["policy, held-out pairs"] == [0.6]
    assert errors == {"preferred": [1.5], "rejected": [4.5]}  # the mean over four steps


def test_curves_of_runs(tmp_path, panels, capsys):
    """`figure.py RUN...` draws each run's metrics, a torn last line apart, into the first one's
    curves.png, with names if there are several; a folder without a run gets one clear line."""
    runs = [str(tmp_path / name) for name in ("one", "two")]
    for shift, run in enumerate(runs):
        Path(run).mkdir()
        rows = [row | {"loss": row["loss"] + shift} if "loss" in row else row for row in ROWS]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        Path(run, "metrics.jsonl").write_text(lines + '{"step": 9, "lo')
    figure.main(runs[:1])
    mean = 0.7 - 0.015
    assert curves(panels[0]) == {"policy": [pytest.approx(mean)]}
    assert set(curves(panels[1])) == {"policy", "policy, held-out pairs"}
    figure.main(runs)
    assert curves(panels[0]) == {runs[0]: [pytest.approx(mean)], runs[1]: [pytest.approx(mean + 1)]}
    assert capsys.readouterr().out.count(f"{runs[0]}/curves.png\n") == 2
    assert Image.open(tmp_path / "one" / "curves.png").size == (1600, 400)
    (tmp_path / "two" / "metrics.jsonl").write_text("")
    for argv, words in (([], "usage"), ([runs[1]], "has not taken a step"),
                        ([str(tmp_path)], "holds no run"), (["--help"], "usage")):
        with pytest.raises(SystemExit):
            figure.main(argv)
        error, = capsys.readouterr().err.splitlines()
        assert words in error


# ----------------------------------------------------------------------------------------- scorers

@pytest.mark.parametrize("head", [False, True])
def test_scorer_by_hand(tiny, tmp_path, head):
    """load_scorer: the logit scale times the cosine of the features of a CLIPModel, or a linear
    head on the image's; prompts too long are cut; batches change nothing."""
    name = tiny / "tiny-clip"
    weight, bias = torch.randn(1, 16), torch.tensor([0.5])
    if head:
        save_file({"weight": weight, "bias": bias}, tmp_path / "head.safetensors")
        name = f"{name}+{tmp_path}/head.safetensors"
    score = judge.load_scorer(str(name), torch.device("cpu"))
    images = [Image.effect_noise((80, 50), 90).convert("RGB"), Image.new("RGB", (40, 90), "red")]
    prompts = ["a red circle", "word " * 200]
    model = transformers.CLIPModel.from_pretrained(tiny / "tiny-clip")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tiny / "tiny-clip")
    scores, embeds = score(images, prompts)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        pixels = diffusers.image_processor.VaeImageProcessor(resample="bicubic").preprocess(
            image, height=32, width=32, resize_mode="crop") / 2 + 0.5
        mean, std = (torch.tensor(x)[:, None, None] for x in (
            transformers.image_utils.OPENAI_CLIP_MEAN, transformers.image_utils.OPENAI_CLIP_STD))
        ids = tokenizer(prompt, truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            seen = model.visual_projection(
                model.vision_model((pixels - mean) / std).pooler_output)[0]
            said = model.text_projection(model.text_model(ids).pooler_output)[0]
        cosine = torch.nn.functional.cosine_similarity(seen, said, 0)
        by_hand = model.logit_scale.exp() * cosine
        if head:
            by_hand = weight[0] @ (seen / seen.norm()) + bias[0]
        assert scores[i].item() == pytest.approx(by_hand.item(), abs=0.05)
        assert torch.allclose(embeds[i], seen / seen.norm(), atol=0.02)
    assert torch.allclose(score(images[1:], prompts[1:])[0], scores[1:], atol=1e-4)


# ------------------------------------------------------------------------------------------- label

@pytest.fixture
def redness(monkeypatch):
    """A scorer that likes red stands in for load_scorer; the captions of the pairs it was shown."""
    calls = []

    def score(images, prompts):
        calls.append(prompts[0])
        if prompts[0] == "poison":
            raise KeyboardInterrupt
        return torch.tensor([float(image.getpixel((9, 9))[0]) for image in images]), None

    monkeypatch.setattr(judge, "load_scorer", lambda name, device: score)
    monkeypatch.setattr(judge, "PIECE", 2)
    return calls


def be_process(monkeypatch, rank, world):
    monkeypatch.setattr(dpo, "rank_and_world", lambda: (rank, world))
    monkeypatch.setattr(dpo, "gather", lambda value: [value] * world)


def label(data, out, *more):
    judge.main(["label", "--data", str(data), "--scorer", "red", "--out", str(out), *more])
    return datasets.Dataset.from_parquet(str(out)).to_list()


MIXED = [pick(1.0, "red", "blue"), pick(0.0, "red", "blue"), pick(0.5, "blue", "red"),
         pick(1.0, "blue", "blue"), pick(1.0, b"broken", "red"), pick(0.0, "blue", "red"),
         pick(1.0, (90, 0, 0), "red")]
MIXED = [row | {"caption": str(i)} for i, row in enumerate(MIXED)]


@pytest.mark.parametrize("processes", [1, 2])
def test_labels_by_hand(tmp_path, monkeypatch, capsys, redness, processes):
    """`label` turns round exactly the pairs that the scorer sees otherwise, labels human ties,
    drops its own ties and what cannot be read, and says how far it agrees; of two processes each
    scores its half. The file is one for --data, the images as they were, byte for byte."""
    data, out = parquet(tmp_path / "pairs.parquet", MIXED), tmp_path / "out" / "labelled.parquet"
    if processes == 2:  # the second process first, which then misses what the first one finds
        be_process(monkeypatch, 1, 2)
        with pytest.raises(SystemExit):
            label(data, out)
        assert redness == ["2", "3", "6"] and not out.exists()
        be_process(monkeypatch, 0, 2)
    made = label(data, out)
    assert sorted(redness) == ["0", "1", "2", "3", "5", "6"]
    assert [(row["caption"], row["label_0"]) for row in made] == [
        ("0", 1), ("1", 1), ("2", 0), ("5", 0), ("6", 0)]
    assert all(row[jpg] == MIXED[int(row["caption"])][jpg] for row in made
               for jpg in ("jpg_0", "jpg_1"))
    printed = capsys.readouterr().out
    assert "as people's for 2 of 4 pairs" in printed
    assert "5 written of 7; 1 ties dropped, 1 unreadable" in printed
    assert [path.name for path in out.parent.iterdir()] == [out.name]

    pairs = dpo.ImagePairs(dpo.parse(["--model", "sd15", "--data", str(out), "--resolution", "32",
                                      "--caption-dropout", "0"]), "train")
    for row in range(5):  # red is preferred
        red, _, blue = pairs[(dpo.HELD_OUT, row)]["images"][0, :, 16, 16].tolist()
        assert red > 200 and blue < 50


def test_labelling_margin(tmp_path, redness):
    """Pairs whose scores differ by no more than --margin are dropped."""
    data = parquet(tmp_path / "pairs.parquet", MIXED)
    made = label(data, tmp_path / "labelled.parquet", "--margin", "200")
    assert [row["caption"] for row in made] == ["0", "1", "2", "5"]  # 6: 254 - 90 and no more


def test_labelling_goes_on_after_a_kill(tmp_path, redness):
    """Killed and started again, pieces that were scored are not scored again; a file that is there
    is never overwritten."""
    rows, out = [row | {} for row in MIXED], tmp_path / "labelled.parquet"
    rows[3]["caption"] = "poison"
    data = parquet(tmp_path / "pairs.parquet", rows)
    with pytest.raises(SystemExit) as stopped:
        label(data, out)
    assert stopped.value.code == 130 and redness == ["0", "1", "2", "poison"] and not out.exists()
    (tmp_path / ".labelled.parquet.0.partial").write_text("of a kill in the writing")
    redness.clear()
    judge.load_scorer = lambda name, device: lambda images, prompts: (
        redness.append(prompts[0]) or torch.tensor([1.0, 0.0]), None)
    assert len(label(data, out)) == 6 and redness == ["2", "poison", "5", "6"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, "pairs.parquet"]
    with pytest.raises(SystemExit):
        label(data, out)


def test_labelling_images_that_lie_as_files(tmp_path, redness, capsys):
    """Images beside pairs.jsonl end up as bytes in the parquet file; what has changed after a kill
    is scored again; where more than 1 % (and more than one) cannot be read, it is refused."""
    folder, out = tmp_path / "data", tmp_path / "labelled.parquet"
    folder.mkdir()
    lines = [{"prompt": str(i), "preferred": f"{i}.png", "rejected": "blue.png"} for i in range(3)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, colour in (("0", "red"), ("1", "blue"), ("blue", "blue")):
        (folder / f"{name}.png").write_bytes(jpeg(colour, form="PNG"))
    (folder / "2.png").write_bytes(b"broken")
    (folder / "0.png").write_bytes(b"broken")
    with pytest.raises(SystemExit):
        label(folder, out)
    assert "of 3 pairs, 2 cannot be read, more than 1 %" in capsys.readouterr().err
    (folder / "0.png").write_bytes(jpeg("red", form="PNG"))
    made, = label(folder, out)
    assert made == {"caption": "0", "label_0": 1, "jpg_0": (folder / "0.png").read_bytes(),
                    "jpg_1": (folder / "blue.png").read_bytes()}
    assert redness == ["1", "0", "1"]


def test_labelling_into_the_folder_of_the_pairs(tmp_path, redness):
    """Where --out lies in the folder --data, a killed labelling goes on all the same."""
    lines = [{"prompt": prompt, "preferred": "red.png", "rejected": "blue.png"}
             for prompt in ("0", "1", "poison")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for colour in ("red", "blue"):
        (tmp_path / f"{colour}.png").write_bytes(jpeg(colour, form="PNG"))
    for _ in range(2):
        with pytest.raises(SystemExit):
            label(tmp_path, tmp_path / "labelled.parquet")
    assert redness == ["0", "1", "poison", "poison"]


def test_a_policy_trains_by_the_labels_of_a_scorer(tiny, tmp_path):
    """`label` with a CLIPModel; a tiny SD1.5 trains on what it writes. The scorer turned round
    turns every label."""
    scorer, made = tmp_path / "clip", []
    shutil.copytree(tiny / "tiny-clip", scorer)
    for name in ("one", "two"):
        out = tmp_path / f"{name}.parquet"
        judge.main(["label", "--data", str(tiny / "pairs.parquet"), "--scorer", str(scorer),
                    "--split", "train[:8]", "--out", str(out)])
        made.append(datasets.Dataset.from_parquet(str(out))["label_0"][:])
        weights = load_file(scorer / "model.safetensors")
        weights["visual_projection.weight"] *= -1
        save_file(weights, scorer / "model.safetensors", metadata={"format": "pt"})
    assert len(made[0]) == 8 and made[1] == [1 - each for each in made[0]]
    dpo.main(["--model", str(tiny / "tiny-sd15"), "--data", str(tmp_path / "one.parquet"),
              "--resolution", "64", "--workers", "0", "--batch", "2", "--steps", "1",
              "--sample-every", "0", "--out", str(tmp_path / "run")])
    assert (tmp_path / "run" / "unet" / dpo.WEIGHTS).exists()


# ----------------------------------------------------------------------------------------- compare

def test_head_to_head_by_hand():
    """Win rate with ties at 1/2, medians, the distance between all pairs of images of a prompt;
    the interval covers what it should: that of a fair coin, about +- 1.96 / (2 sqrt P)."""
    gen = torch.Generator().manual_seed(0)
    scores = torch.rand(7, 3, 2, 2, generator=gen)
    scores[0, 1, 1] = scores[0, 1, 0]  # a tie
    embeds = torch.nn.functional.normalize(torch.randn(7, 3, 2, 5, generator=gen), dim=-1)
    results = judge.head_to_head(["a", "b"], scores, embeds)
    for s, name in enumerate(["a", "b"]):
        flat = scores[..., s].flatten(0, 1).tolist()
        wins = sum((policy > reference) + 0.5 * (policy == reference) for reference, policy in flat)
        assert results[name]["win_rate"] == pytest.approx(wins / 21)
        for side, values in zip(judge.SIDES, zip(*flat, strict=True), strict=True):
            assert results[name][f"median_{side}"] == pytest.approx(statistics.median(values))
    far = [statistics.mean(1 - (embeds[p, i, side] @ embeds[p, k, side]).item() for p in range(7)
                           for i in range(3) for k in range(3) if i != k) for side in (0, 1)]
    means = [results["diversity"][f"mean_{side}"] for side in judge.SIDES]
    assert means == pytest.approx(far)
    assert results["diversity"]["difference"] == pytest.approx(far[1] - far[0], abs=1e-6)
    assert "diversity" not in judge.head_to_head(["a", "b"], scores[:, :1], embeds[:, :1])

    coin = torch.stack([torch.zeros(400), torch.randn(400, generator=gen)], 1).view(400, 1, 2, 1)
    low, high = judge.head_to_head(["a"], coin, None)["a"]["interval"]
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)


@pytest.fixture
def contest(tiny, tmp_path):
    """argv of a comparison of the tiny SD1.5 with another random one."""
    for name in ("base", "policy"):
        shutil.copytree(tiny / "tiny-sd15", tmp_path / name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        config = diffusers.UNet2DConditionModel.load_config(tmp_path / "policy" / "unet")
        unet = diffusers.UNet2DConditionModel.from_config(config)
    unet.conv_out.bias.data += 1  # no two images alike
    unet.save_pretrained(tmp_path / "policy" / "unet")
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\na cat\na very long prompt\n")
    words = ["compare", "--model", tmp_path / "base", "--policy", tmp_path / "policy",
             "--resolution", "64", "--prompts", tmp_path / "prompts.txt", "--images", "2",
             "--scorers", tiny / "tiny-clip", "--out", tmp_path / "out"]
    return [str(word) for word in words]


def test_compare(contest, tiny, tmp_path, monkeypatch, capsys, two_steps):
    """Policy and reference from the same noise, 2 images for each of 3 prompts, nothing drawn
    twice; a scorer that always prefers the policy's images gives win rate 1, the other way round
    0, itself as the policy 1/2; the policy's weights changed, its images are drawn anew."""
    out, name = tmp_path / "out", str(tiny / "tiny-clip")

    def compared(*more):
        two_steps.clear()
        judge.main([*contest, *more])
        return json.loads((out / "comparison.json").read_text())

    first = compared()
    assert sum(two_steps) == 12 and set(first) >= {name, "diversity"}
    assert Image.open(out / "comparison.png").size == (4 * 64, 3 * 64)
    output = capsys.readouterr().out
    assert f"win_rate             {first[name]['win_rate']:.4g}\n" in output
    folders = {path.name.split("-")[0]: path for path in (out / "comparison").iterdir()}
    images = {side: sorted(folder.iterdir()) for side, folder in folders.items()}
    assert [path.name for path in images["policy"]] == [path.name for path in images["reference"]]
    assert len(images["policy"]) == 6

    def likes(side):
        liked = [numpy.array(Image.open(path)).astype(int) for path in images[side]]

        def score(pictures, prompts):  # drawn alone or in a batch a pixel may differ by 1
            scores = [float(any(abs(numpy.array(picture) - like).max() <= 1 for like in liked))
                      for picture in pictures]
            return torch.tensor(scores), torch.ones(len(scores), 1)

        return lambda name, device: score

    with monkeypatch.context() as patch:
        for side, rate in ("policy", 1), ("reference", 0):
            patch.setattr(judge, "load_scorer", likes(side))
            images["policy"][2].unlink()
            results = compared("--scorers", "a,b")
            assert results["a"]["win_rate"] == results["b"]["win_rate"] == rate
            assert results["a"]["interval"] == [rate, rate] and two_steps == [1]
    results = compared("--policy", str(tmp_path / "base"))
    assert results[name]["win_rate"] == 0.5 and results["diversity"]["difference"] == 0
    assert sum(two_steps) == 6
    weights = load_file(tmp_path / "policy" / "unet" / dpo.WEIGHTS)
    save_file(weights, tmp_path / "policy" / "unet" / dpo.WEIGHTS)
    compared()
    assert sum(two_steps) == 6


def test_compare_on_two_processes(contest, tmp_path, tiny):
    """2 processes score half of the images each, and draw what is missing; the results are those
    of 1."""
    outs, results = [tmp_path / "out-1", tmp_path / "out-2"], []
    judge.main([*contest, "--out", str(outs[0])])
    shutil.copytree(*outs)
    for path in sorted(outs[1].rglob("policy-*/*.png"))[::2]:
        path.unlink()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*torchrun, str(ROOT / "toy" / "judge.py"), *contest, "--micro-batch", "1",
                    "--out", str(outs[1])], check=True, capture_output=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    for out in outs:
        assert len([*out.rglob("*-*/*.png")]) == 12
        results.append(json.loads((out / "comparison.json").read_text()))
    for name in (str(tiny / "tiny-clip"), "diversity"):
        one, two = (result.pop(name) for result in results)
        assert one.pop("interval") == pytest.approx(two.pop("interval"), rel=1e-3)
        assert one == pytest.approx(two, rel=1e-3)
    assert results[0] == results[1]


def test_compare_judges_a_run_as_it_was_trained(tiny, tmp_path, contest, two_steps):
    """Of a LoRA run --policy alone gives model, resolution and rank: the run's folder, one of its
    checkpoints, or its adapters; another model is refused."""
    model, run = str(tiny / "tiny-sd15"), tmp_path / "run"
    dpo.main(["--model", model, "--data", str(tiny / "pairs.parquet"), "--resolution", "64",
              "--workers", "0", "--lora", "2", "--batch", "4", "--steps", "2", "--lr", "0.5",
              "--warmup", "0", "--save-every", "1", "--sample-every", "0", "--out", str(run)])
    rest = ["compare", "--prompts", str(tmp_path / "prompts.txt"), "--images", "1", "--scorers",
            str(tiny / "tiny-clip"), "--out", str(tmp_path / "judged")]
    for number, folder in enumerate((run, run / "checkpoint-00000002", run / "lora")):
        judge.main([*rest, "--policy", str(folder)])
        results = json.loads((tmp_path / "judged" / "comparison.json").read_text())
        assert results["model"] == model and results["resolution"] == 64
        assert results["policy"].endswith("lora")
        assert results[str(tiny / "tiny-clip")]["win_rate"] != 0.5
        assert sum(two_steps) == 6 + 3 * number - (3 if number == 2 else 0)
    with pytest.raises(SystemExit):
        judge.main([*rest, "--policy", str(run), "--model", "sd15"])


# --------------------------------------------------------------------------------------- bad input

@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "prompts.txt").write_text("a cat")
    (folder / "blank.txt").write_text("\n \n")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "empty").mkdir()
    make_tiny.make_scorer(folder / "half")
    found = load_file(folder / "half" / "model.safetensors")
    save_file({name: value for name, value in found.items() if "visual_proj" not in name},
              folder / "half" / "model.safetensors", {"format": "pt"})
    (folder / "torn").mkdir()
    (folder / "torn" / dpo.LORA_WEIGHTS).write_bytes(b"torn")
    (folder / "odd").mkdir()
    save_file({"unet.of.another.lora_A.weight": torch.ones(2, 3)},
              folder / "odd" / dpo.LORA_WEIGHTS)
    (folder / "toy").mkdir()
    (folder / "toy" / "config.json").write_text('{"config": {"model": "toy"}}')
    parquet(folder / "same.parquet", [pick(1.0, "red", "red")] * 2)
    parquet(folder / "there.parquet", [pick()])
    return folder


COMPARE = "compare --model {tiny}/tiny-sd15 --out out --prompts "
POLICY = COMPARE + "{wrong}/prompts.txt --scorers {tiny}/tiny-clip --policy "
LABEL = "label --scorer {tiny}/tiny-clip --out out.parquet --data "


@pytest.mark.parametrize("line, words", [
    ("", "arguments are required"), ("judge", "invalid choice: 'judge'"),
    ("label --data x", "required: --out"), ("label --data x --out y --margin -1", "--margin"),
    (LABEL + "{wrong}/none", "--data {wrong}/none: no such file"),
    (LABEL + "{wrong}/same.parquet", "--margin 0: no scores differ by more"),
    (LABEL + "{tiny}/pairs.parquet --out {wrong}/there.parquet", "there.parquet: exists"),
    (LABEL + "{tiny}/pairs.parquet --scorer {wrong}/half", "scorer {wrong}/half: not a CLIPModel"),
    (LABEL + "{tiny}/pairs.parquet --scorer {wrong}/empty", "scorer {wrong}/empty: "),
    (COMPARE + "{wrong}/none --policy x", "--prompts {wrong}/none: "),
    (COMPARE + "{wrong}/blank.txt --policy x", "blank.txt: empty; it should hold a prompt"),
    (COMPARE + "{wrong}/latin.txt --policy x", "latin.txt: 'utf-8' codec"),
    (POLICY + "{wrong}/none", "--policy {wrong}/none: no policy in it"),
    (POLICY + "{wrong}/empty", "--policy {wrong}/empty: no policy in it"),
    (POLICY + "{wrong}/torn", "--policy {wrong}/torn: "),
    (POLICY + "{wrong}/odd", "--policy {wrong}/odd: not adapters of this rank for this UNet"),
    (POLICY + "{tiny}/tiny-sdxl", "--policy {tiny}/tiny-sdxl/unet: "),
    (POLICY + "{wrong}/toy", "--model {tiny}/tiny-sd15: --policy {wrong}/toy is of toy"),
    (POLICY + "{tiny}/tiny-sd15 --resolution 63", "--resolution 63: it should be a multiple of 8"),
    (POLICY + "{tiny}/tiny-sd15 --precision fp8", "--precision: invalid choice"),
    (POLICY + "{tiny}/tiny-sd15 --images 0", "--images: 0 is not at least 1"),
    ("compare --out out --prompts {wrong}/prompts.txt --policy {wrong}/empty", "name its --model"),
    ("compare --out out --prompts {wrong}/prompts.txt --policy {wrong}/toy", "--model toy: ")])
def test_wrong_input_gets_one_clear_line(line, words, tiny, wrong, tmp_path, capsys, monkeypatch):
    """Exit code 2, one line that names the flag, no traceback, nothing written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        judge.main(line.format(tiny=tiny, wrong=wrong).split())
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stopped.value.code == 2 and not (tmp_path / "out").exists()
    assert not (tmp_path / "out.parquet").exists()
    assert len(error) == 1 and words.format(tiny=tiny, wrong=wrong) in error[0]


def test_help_fits_the_screen(capsys):
    """--help of both commands: at most 100 columns."""
    for argv in (["--help"], ["compare", "--help"], ["label", "--help"]):
        with pytest.raises(SystemExit):
            judge.main(argv)
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
