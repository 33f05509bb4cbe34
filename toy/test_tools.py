"""Tests of cost.py, judge.py and make_tiny.py. Each docstring is one claim.

    pytest toy/test_tools.py        # half a minute, no network, no GPU
"""

import itertools
import json
import os
import random
import re
import shutil
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]

import cost
import datasets
import diffusers
import encode
import judge
import make_tiny
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate

import diffusion_dpo as dpo
from test_diffusion_dpo import colours, jpeg, parquet, pick, sd_line


def call(tool, line):
    tool.main(line.split())


def refused(match, tool, line):
    """The tool ends with an error that run_command prints in one line."""
    with pytest.raises(dpo.UserError, match=match):
        call(tool, line)


def in_two_processes(tool, line):
    """Call a tool as torchrun does, in two processes. They are forks, so nothing is imported."""
    port = str(random.randint(20_000, 30_000))

    def target(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                       "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        dpo.run_command(lambda: call(tool, line))

    torch.multiprocessing.start_processes(target, nprocs=2, start_method="fork")


def read_json(path):
    return json.loads(path.read_text())


# ------------------------------------------------------------------------------------ make_tiny

def test_what_make_tiny_says_to_run_next(tiny, tmp_path, monkeypatch, capsys):
    """The printed command trains on what was written. A second call writes the same weights."""
    monkeypatch.chdir(tmp_path)
    call(make_tiny, "small")
    weights = Path("tiny-sdxl", "unet", dpo.WEIGHTS_FILE)
    assert (tiny / weights).read_bytes() == Path("small", weights).read_bytes()
    command = capsys.readouterr().out.rpartition("next: python diffusion_dpo.py ")[2]
    call(dpo, command.replace("\\\n", "") + " --sample-every 0 --workers 0 --steps 1")
    assert Path("runs", weights).exists()


def test_make_tiny_spares_other_folders(tmp_path):
    """A folder that holds no pipeline stays as it is."""
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(OSError):
        make_tiny.make_model(tmp_path, "sd15")
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("kind, parameters", [
    ("sd15", 859_520_964 + 83_653_863 + 123_060_480),
    ("sdxl", 2_567_463_684 + 83_653_863 + 123_060_480 + 694_659_840),
    ("sd35", 2_243_171_520 + 83_819_683 + 123_650_304 + 694_659_840 + 4_762_310_656)])
def test_published_sizes(kind, parameters):
    """Network, VAE and text encoders have as many parameters as on the hub."""
    parts = make_tiny.assemble(**make_tiny.PUBLISHED[kind], device="meta").components.values()
    modules = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
    assert sum(p.numel() for p in modules.parameters()) == parameters


# --------------------------------------------------------------------------------- cost: memory

def bytes_of(*holders):
    """The bytes of all tensors in modules and lists. What several share counts once."""
    modules = [each for each in holders if isinstance(each, nn.Module)]
    tensors = [each for module in modules for each in (*module.parameters(), *module.buffers())]
    tensors += filter(torch.is_tensor, tree_leaves(holders))
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def encoders_of(pipe):
    return [part for name, part in pipe.components.items() if re.match("vae|text_encoder", name)]


def most_allocated(function):
    """The most bytes that a call allocates at a time, as torch's profiler sees it on a CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events
                     if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


@pytest.mark.parametrize("kind, more", [
    ("sd15", "--micro-batch 2"), ("sd15", "--micro-batch 1 --lora 2"),
    ("sdxl", "--micro-batch 2 --batch 2 --no-checkpointing --precision bf16"),
    ("sd35", "--micro-batch 1"), ("sd35", "--micro-batch 2 --lora 0 --optimizer adafactor")])
def test_memory_is_that_of_a_run(tiny, kind, more):
    """Weights and states are those of a run, its tensors counted. The peaks of a second step and of
    an evaluation are what the profiler sees: the CPU's kernels may need some more."""
    line = sd_line(tiny, f"tiny-{kind}", f"--precision fp32 --draws 10 --lr 1e-5 {more}")
    flags = line.split()
    found, cfg = cost.account(cost.parse(flags)), dpo.parse(flags)
    cfg.eval_split = "train[:4]"
    task = dpo.make_task(cfg, torch.device("cpu"))
    trained = [p for p in task.policy.parameters() if p.requires_grad]
    optimizer = dpo.make_optimizer(trained, cfg)
    batch = default_collate([task.pairs[0, row] for row in range(cfg.micro_batch)])
    accumulates = cfg.batch > cfg.micro_batch

    with cost.as_on_cuda(F.group_norm), cost.as_on_cuda(F.layer_norm):
        dpo.dpo_step(task, batch, cfg)
        optimizer.step()
        gradients = bytes_of([p.grad for p in trained])
        states = gradients + bytes_of(optimizer.state_dict()["state"])
        if not accumulates:
            optimizer.zero_grad()
        peak = most_allocated(lambda: dpo.dpo_step(task, batch, cfg))
        evaluation = most_allocated(lambda: dpo.evaluate(task))

    networks = [task.policy] if cfg.lora else [task.policy, task.reference]
    constants = [*vars(task).values(), task.policy.times, *vars(task.pipe.scheduler).values()]
    weights = bytes_of(*networks, *encoders_of(task.pipe), constants)
    assert (found["weights"], found["states"]) == (weights, states)
    before = weights + states
    # A CPU without bf16 of its own computes in fp32 copies.
    most = 1.2 if cfg.precision == "bf16" else 1.02
    assert 0.95 < (before + evaluation) / found["evaluation"] < most
    peak += before - (not accumulates) * gradients
    assert 0.98 < peak / found["peak"] < most


def test_memory_of_data_encoded_ahead(tiny):
    """A run needs less by the VAE and the text encoders, on the GPU and while it is loaded. A
    picture needs them again. On the host all is in fp32, and the network is there twice."""
    flags = sd_line(tiny, "tiny-sd35", "--precision bf16 --lora 0 --draws 20").split()
    images = cost.account(cost.parse(flags))
    ahead = cost.account(cost.parse([*flags, "--encoded"]))
    pipe = dpo.load_pipeline(f"{tiny}/tiny-sd35")
    assert ahead["host"] == pytest.approx(2 * bytes_of(pipe.transformer), rel=0.1)
    assert images["host"] - ahead["host"] == pytest.approx(bytes_of(*encoders_of(pipe)), rel=0.1)

    dpo.prepare_encoders(pipe, dpo.parse(["--model=sd35", "--precision=bf16"]), "cpu")
    dropped = bytes_of(*encoders_of(pipe))
    assert images["weights"] - ahead["weights"] == dropped
    assert images["peak"] - ahead["peak"] == pytest.approx(dropped, rel=0.01)
    assert images["picture"] == pytest.approx(ahead["picture"], rel=0.01)


def test_the_table_of_memory(capsys):
    """cost_memory.json has its rows, computed as now."""
    table = read_json(ROOT / "toy" / "cost_memory.json")
    rows = cost.MEMORY_ROWS.splitlines()
    assert [row[cost.MEMORY_FLAGS] for row in table] == rows
    cost.print_table(table[4:5])
    wanted = capsys.readouterr().out.splitlines()[-1].removeprefix(f"| {rows[4]}")
    call(cost, f"memory {cost.MEMORY_FLAGS} {rows[4]}")
    assert capsys.readouterr().out.strip().endswith(wanted)


# ----------------------------------------------------------------------------------- cost: time

@pytest.mark.parametrize("lora", [0, 2])
def test_time_by_a_clock_that_is_told(tiny, tmp_path, monkeypatch, lora):
    """`time` finds what each part takes, the floor, the FLOP/s and how long a whole step takes.

    The clock moves only by what the parts of a step are said to take. The first two steps do not
    count. Nothing is saved but time.json.
    """
    now = [0.0]

    def slow(place, name, seconds_of):
        real = getattr(place, name)

        def slower(*inputs, **options):
            out = real(*inputs, **options)
            now[0] += seconds_of(out)
            return out

        monkeypatch.setattr(place, name, slower)

    optimizer_seconds = iter([100, 100, 11, 11])
    slow(dpo, "read_image", lambda out: 1)
    slow(dpo.StableDiffusion, "encode", lambda out: 2)
    slow(dpo.Denoiser, "forward", lambda out: 5 if out.requires_grad else 3)  # or the reference
    slow(torch.Tensor, "backward", lambda out: 7)
    slow(nn.utils, "clip_grad_norm_", lambda out: 13)
    slow(torch.optim.AdamW, "step", lambda out: next(optimizer_seconds))
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(cost, "matmul_rate", lambda *given: 100)
    monkeypatch.setattr(dpo.StableDiffusion, "save", None)
    flags = f"--batch 16 --micro-batch 1 --timed-steps 2 --lora {lora} --lr 1e-5 --out {tmp_path}"
    call(cost, "time " + sd_line(tiny, "tiny-sd15", flags))
    found = read_json(tmp_path / "time.json")
    pairs = 4  # 4 micro-batches of 1 pair
    parts = {"data wait": pairs * 2, "encode": pairs * 2, "reference": pairs * 3,
             "policy forward": pairs * 5, "backward": pairs * 7, "optimizer": 11, "rest": 13}
    parts["all"] = step = sum(parts.values())
    assert found["milliseconds_per_pair"] == {
        part: 1000 * seconds / pairs for part, seconds in parts.items()}
    assert found["ratio_to_floor"] == step / (pairs * (3 + 5 + 7) + 11)
    assert found["seconds_per_step"] == 16 / pairs * (step - 13 - 11) + 13 + 11
    passes = 3 if lora else 4  # reference 1, forward 1, backward 2 (1 to adapters)
    flops = passes * pairs * (22_081_536 + 3_846_144)  # torch's count, and attention by hand
    assert found["share_of_matmul"] == pytest.approx(flops / step / 100)
    assert [path.name for path in tmp_path.iterdir()] == ["time.json"]


def test_timed_steps_are_those_of_a_run(tiny, tmp_path, monkeypatch):
    """Clock and floor do not change the training: the losses are those of the same run. If the data
    are encoded ahead, neither VAE nor text encoders are there."""
    losses, train = [], dpo.train

    def train_and_look(task, *given):
        losses.append([row["loss"] for row in train(task, *given)])
        assert not any(encoders_of(task.pipe))

    flags = sd_line(tiny, "tiny-sdxl", f"--steps 3 --lr 1e-2 --out {tmp_path}/")
    call(encode, flags + "set")
    monkeypatch.setattr(dpo, "train", train_and_look)
    call(dpo, f"{flags}run --data {tmp_path}/set")
    call(cost, f"time {flags}cost --data {tmp_path}/set --timed-steps 1")
    assert losses[0] == losses[1] and len({*losses[0]}) == 3


def test_a_published_model_needs_no_download(tmp_path, monkeypatch):
    """--model sd15 gets random weights, here of tiny size, and pairs. Two processes time it."""
    monkeypatch.setitem(make_tiny.PUBLISHED, "sd15", make_tiny.TINY["sd15"])
    in_two_processes(cost, "time --model sd15 --resolution 64 --batch 2 --workers 0"
                           f" --timed-steps 1 --out {tmp_path}")
    found = read_json(tmp_path / "time.json")
    assert found["world_size"] == found["timed_batch"] == 2


@pytest.mark.parametrize("line, match", [
    ("time --toy", "--toy"), ("memory --model sd15 --evaluate x", "--evaluate"),
    ("time --model sd15 --encoded", "--encoded"),
    ("time --model sd15 --timed-steps 0", "--timed-steps")])
def test_wrong_input_of_cost(line, match):
    """It is refused by the name of the culprit."""
    refused(match, cost, line)


# ------------------------------------------------------------------------- judge: scorers, label

def test_scorers_are_clips_own(tiny, tmp_path):
    """A score is the logit of a CLIPModel, or a linear head on its embedding of the image.

    Prompts that are too long are cut.
    """
    name, image = str(tiny / "tiny-clip"), Image.effect_noise((80, 50), 90).convert("RGB")
    head = nn.Linear(16, 1).requires_grad_(False)
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    inputs = transformers.CLIPProcessor.from_pretrained(name)(
        images=image, text="o " * 75, return_tensors="pt")
    with torch.no_grad():
        out = transformers.CLIPModel.from_pretrained(name)(**inputs)

    both = [Image.new("RGB", (40, 90), "red"), image], ["a red circle", "o " * 200]
    scores, embeds = judge.load_scorer(name, "cpu")(*both)
    torch.testing.assert_close(embeds[1:], out.image_embeds)
    torch.testing.assert_close(scores[1:], out.logits_per_image[0])
    scores, _ = judge.load_scorer(f"{name}+{tmp_path}/head.safetensors", "cpu")(*both)
    torch.testing.assert_close(scores[1:], head(out.image_embeds)[0])


@pytest.fixture
def redness(monkeypatch):
    """A scorer that likes red, in place of load_scorer. It lists the captions that it is shown."""
    captions = []

    def score(images, prompts):
        captions.append(prompts[0])
        if prompts[0] == "poison":
            raise KeyboardInterrupt
        return torch.tensor([float(image.getpixel((9, 9))[0]) for image in images]), None

    monkeypatch.setattr(judge, "load_scorer", lambda name, device: score)
    monkeypatch.setattr(judge, "PIECE", 2)
    return captions


def label(data, out, by=call):
    by(judge, f"label --data {data} --scorer red --margin 165 --out {out}")
    return datasets.Dataset.from_parquet(str(out)).to_list()


MIXED = [(1.0, "red", "blue"), (0.0, "red", "blue"), (0.5, "blue", "red"), (1.0, "blue", "blue"),
         (1.0, b"broken", "red"), (0.0, "blue", "red"), (1.0, (90, 0, 0), "red")]


@pytest.mark.parametrize("by", [call, in_two_processes])
def test_labels_are_the_scorers(tmp_path, capfd, redness, by):
    """They replace people's, ties too. Left out is what cannot be read, and pairs whose scores
    differ by no more than --margin, as in the last one, 255 - 90.

    --data reads the file, and two processes write the same one.
    """
    rows = [pick(*pair, str(i), form="PNG") for i, pair in enumerate(MIXED)]
    data, out = parquet(tmp_path / "pairs.parquet", rows), tmp_path / "new/labels.parquet"
    made = label(data, out, by)
    assert [(row["caption"], row["label_0"]) for row in made] == [
        ("0", 1), ("1", 1), ("2", 0), ("5", 0)]
    assert "2 of 3" in capfd.readouterr().out  # pairs that people and scorer decided
    assert [*out.parent.iterdir()] == [out]
    pairs = dpo.open_pairs(dpo.parse(f"--model sd15 --data {out}".split()), "train")
    assert [colours(pairs[dpo.HELD_OUT, row]) for row in range(4)] == [["red", "blue"]] * 4


def test_labelling_goes_on_after_a_kill(tmp_path, redness):
    """What was scored is not scored again unless an image changed, also with --out in --data.

    Images that are files become bytes. More than 1 % that cannot be read is refused.
    """
    out, names = tmp_path / "labels.parquet", ["0", "1", "poison"]
    lines = [{"prompt": name, "preferred": f"{name}.png", "rejected": "blue.png"} for name in names]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in [*names, "blue"]:
        (tmp_path / f"{name}.png").write_bytes(jpeg("blue" if name == "blue" else "red"))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            label(tmp_path, out)
    assert redness == ["0", "1", "poison", "poison"]

    (tmp_path / "poison.png").write_bytes(b"broken")
    assert [row["jpg_0"] for row in label(tmp_path, out)] == [jpeg("red")] * 2
    assert redness[4:] == ["0", "1"]
    out.unlink()
    (tmp_path / "1.png").write_bytes(b"broken")
    refused("--data", judge, f"label --data {tmp_path} --out {out}")


# ------------------------------------------------------------------------------- judge: compare

def test_head_to_head_by_hand():
    """Win rate with ties at 1/2, medians, and the mean distance of the images of a prompt."""
    scores = torch.tensor([[1.0, 5.0], [2.0, 2.0], [9.0, 1.0]])  # a win, a tie, a loss
    embeds = torch.eye(2)[torch.tensor([[0, 0], [0, 1], [0, 1]])]
    found = judge.head_to_head(["a"], scores.view(1, 3, 2, 1), embeds[None])
    assert list(found["a"].values()) == [0.5, [0.5, 0.5], 2, 2]
    # Of the policy's images, two of three pairs are at right angles.
    numbers = [found["diversity"][name] for name in ("difference", "mean_policy")]
    assert numbers == pytest.approx([2 / 3, 2 / 3])


def test_interval_of_a_fair_coin():
    """It is 2 * 1.96 / (2 sqrt P) wide. The bootstrap is over prompts, not over images."""
    coin = torch.randn(400, 1, 2, 1, generator=torch.Generator().manual_seed(0))
    coin = coin.expand(400, 9, 2, 1)  # nine equal images tell no more than one
    low, high = judge.head_to_head(["a"], coin, coin)["a"]["interval"]
    assert high - low == pytest.approx(1.96 / 20, rel=0.1)


@pytest.fixture
def sampled(monkeypatch):
    """Pipelines take one sampling step, and list the sizes of the batches that they sample."""
    sizes, real = [], diffusers.StableDiffusionPipeline.__call__

    def short(pipe, prompts, **given):
        sizes.append(len(prompts))
        return real(pipe, prompts, num_inference_steps=1, **given)

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "__call__", short)
    return sizes


@pytest.fixture
def contest(tiny, tmp_path, sampled):
    """Compares tiny SD1.5 with a copy of its weights. Returns comparison.json."""
    shutil.copytree(tiny / "tiny-sd15" / "unet", tmp_path / "policy")
    (tmp_path / "prompts.txt").write_text("a cat\na cat\n\na dog\na long prompt\n")

    def compare(more="", run=f"{tmp_path}/policy --model {tiny}/tiny-sd15 --resolution 64",
                by=call):
        sampled.clear()
        by(judge, f"compare --policy {run} --prompts {tmp_path}/prompts.txt --images 2"
                  f" --scorers {tiny}/tiny-clip --out {tmp_path}/out {more}")
        return read_json(tmp_path / "out" / "comparison.json")

    return compare


def test_compare_samples_what_is_missing(contest, tmp_path, sampled):
    """Both sides get 2 images for each of 3 prompts, and none is sampled twice.

    When the policy's weights have changed, its images are sampled anew.
    """
    contest()
    assert sum(sampled) == 12 and (tmp_path / "out" / "comparison.png").exists()
    image, *_ = (tmp_path / "out" / "comparison").rglob("*.png")
    image.unlink()
    contest()
    assert sampled == [1]
    os.utime(tmp_path / "policy" / dpo.WEIGHTS_FILE, (0, 0))
    contest()
    assert sum(sampled) == 6


def test_compare_counts_wins(contest, tiny, monkeypatch):
    """With equal weights and the same noise, half of the images win. If all scorers like the
    policy's, they always win."""
    found = contest()
    assert found[str(tiny / "tiny-clip")]["win_rate"] == 0.5
    assert found["diversity"]["difference"] == 0

    def likes_policy(images, prompts):
        scores = [float("/policy-" in image.filename) for image in images]
        return torch.tensor(scores), torch.ones(len(scores), 1)

    monkeypatch.setattr(judge, "load_scorer", lambda *given: likes_policy)
    found = contest("--scorers a,b")
    assert found["a"]["win_rate"] == found["b"]["win_rate"] == 1


def test_compare_in_two_processes(contest, tmp_path):
    """They share the work, and the results are those of one process."""
    one = contest("--micro-batch 1")
    for path in sorted(tmp_path.rglob("policy-*/*.png"))[::2]:
        path.unlink()
    assert contest("--micro-batch 1", by=in_two_processes) == one


def test_compare_judges_a_run_as_it_was_trained(tiny, tmp_path, contest):
    """The folder of a LoRA run, or of its adapters, tells model, resolution, guidance and rank."""
    run, flags = tmp_path / "run", "--lora 2 --steps 1 --lr 0.5 --guidance 1"
    call(dpo, sd_line(tiny, "tiny-sd15", f"{flags} --out {run}"))
    for folder in run, run / "lora":
        found = contest(run=folder)
        assert found["resolution"] == 64 and found["diversity"]["difference"] != 0
        assert found["guidance"] == 1
    with pytest.raises(dpo.UserError, match="--model sd15"):
        contest(run=f"{run} --model sd15")


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """A folder of things that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "prompts.txt").write_text("a cat")
    make_tiny.make_scorer(folder / "half")
    weights = load_file(folder / "half" / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "half" / "model.safetensors", {"format": "pt"})
    return folder


COMPARE = "compare --scorers {tiny}/tiny-clip --out out --prompts {wrong}/prompts.txt --policy "


@pytest.mark.parametrize("line, match", [
    ("label --data {tiny}/pairs.parquet --out {wrong}/prompts.txt", "--out"),
    ("label --data {tiny}/pairs.parquet --out out.parquet --scorer {wrong}/half", "half"),
    (COMPARE + "x --images 0", "--images"), (COMPARE + "{tiny}", "--model"),
    (COMPARE + "{tiny} --model {tiny}/tiny-sd15", "safetensors")])
def test_wrong_input_of_judge(line, match, tiny, wrong, tmp_path, monkeypatch):
    """It is refused by the name of the culprit, and no result is written."""
    monkeypatch.chdir(tmp_path)
    refused(match, judge, line.format(tiny=tiny, wrong=wrong))
    assert not [*tmp_path.glob("out*")]
