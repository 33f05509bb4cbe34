"""Proof that the tools of toy/ compute what they say. Each test's docstring is one claim.

    pytest toy              # a minute on two cores, no network, no GPU
"""

import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import diffusers
import numpy
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]
import cost
import figure
import judge
import make_tiny
import on_policy
import rounding
import study

import diffusion_dpo as dpo
from test_diffusion_dpo import (
    TOY,
    batch_of_pairs,
    errors,
    jpeg,
    parquet,
    pick,
    run,
    same,
    sd_config,
    sd_problem,
    sd_schedule,
    spy_problem,
    weights,
)

# ------------------------------------------------------------------------ on-policy: D3PO and SPO


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_step_is_diffusers(prediction):
    """Every step of a walk of 50 equals DDIMScheduler.step at eta = 1, the last one included."""
    schedule = diffusers.DDIMScheduler.from_config(
        sd_schedule(prediction).config, timestep_spacing="trailing", set_alpha_to_one=True,
        clip_sample=False)
    schedule.set_timesteps(50)
    abars = schedule.alphas_cumprod[schedule.timesteps].tolist() + [1.0]
    gen = torch.Generator().manual_seed(0)
    for i, t in enumerate(schedule.timesteps):
        x, out, noise = torch.randn(3, 2, 4, 8, 8, generator=gen)
        abar, following = torch.tensor(abars[i]), torch.tensor(abars[i + 1])
        eps = out
        if prediction == "v_prediction":
            eps = abar.sqrt() * out + (1 - abar).sqrt() * x
        mean, std = dpo.ddim_step(x, eps, abar, following)
        wanted = schedule.step(out, t, x, eta=1.0, variance_noise=noise).prev_sample
        torch.testing.assert_close(mean + std * noise, wanted, rtol=1e-4, atol=1e-4)
    assert std == 0


def walking_problem(prediction, guidance, steps=5, method="d3po"):
    """A problem whose networks are linear in x_t, t and a condition; scores are sums over x_0."""
    def network(factor):
        return lambda x_t, t, c: factor * x_t + (c / 10 + t / 5000)[:, None, None, None]

    problem, _ = spy_problem(prediction)
    problem.policy = network(torch.tensor(0.4, requires_grad=True))
    problem.reference, problem.shape = network(torch.tensor(0.3)), (4, 8, 8)
    problem.step_unit = 1 / 256
    problem.conditions = lambda batch: [{"c": torch.full((3,), float(i))}
                                        for i in range(1 if guidance > 1 else 0, -1, -1)]
    problem.score = lambda x_0, batch: x_0.flatten(2).sum(2)
    problem.cfg = SimpleNamespace(seed=0, method=method, sampling_steps=steps, candidates=4,
                                  guidance=guidance, precision="fp32")
    return problem


def keyed(keys):
    return dict(zip(("epoch", "row"), torch.tensor(keys).T, strict=True))


def step_errors(problem, batch):
    """[(err_w, err_l, ref_err_w, ref_err_l)] of all steps."""
    walk = on_policy.Walk(problem, batch, problem.cfg)
    return [(*walk.nats(problem.policy, *step), *walk.nats(problem.reference, *step))
            for step in on_policy.steps(walk)]


@pytest.mark.parametrize("method", ["d3po", "spo"])
@pytest.mark.parametrize("prediction, guidance", [("epsilon", 1), ("v_prediction", 3)])
def test_step_errors_are_log_probabilities(method, prediction, guidance):
    """The walks of D3PO and SPO, transcribed with DDIMScheduler and torch.distributions.Normal: at
    every step the errors of policy and reference differ by what their log-probabilities of the
    step do (over d), and the preferred step is the one the scores prefer."""
    keys, n = [(0, 7), (0, 2), (1, 7)], 2 if method == "d3po" else 4
    problem = walking_problem(prediction, guidance, method=method)
    found = step_errors(problem, keyed(keys))
    schedule = diffusers.DDIMScheduler.from_config(
        sd_schedule(prediction).config, timestep_spacing="trailing", set_alpha_to_one=True,
        clip_sample=False)
    schedule.set_timesteps(5)
    assert len(found) == 4

    def out(network, x, t):
        both = [network(x, torch.full((len(x),), int(t)), torch.full((len(x),), float(c)))
                for c in (1, 0)]
        return both[1] if guidance == 1 else both[0] + guidance * (both[1] - both[0])

    def normal(network, x, t):
        step = schedule.step(out(network, x, t), t, x, eta=1.0, variance_noise=0 * x)
        previous = int(t) - 200
        std = schedule._get_variance(int(t), previous) ** 0.5
        return torch.distributions.Normal(step.prev_sample, std)

    def ratio(x, to, t):  # log p_theta - log p_ref, (d,) -> a number
        both = [normal(network, x, t).log_prob(to).flatten(1).sum(1) / 256
                for network in (problem.policy, problem.reference)]
        return both[0] - both[1]

    for number, key in enumerate(keys):
        gen, transitions = dpo.generator(0, "steps", *key), []
        x = torch.randn(2 if method == "d3po" else 1, 4, 8, 8, generator=gen)
        for i, t in enumerate(schedule.timesteps[:-1] if method == "spo" else schedule.timesteps):
            start = x.expand(n, -1, -1, -1)
            noise = torch.randn(n, 4, 8, 8, generator=gen)
            to = schedule.step(out(problem.policy, start, t), t, start, eta=1.0,
                               variance_noise=noise).prev_sample.detach()
            if method == "spo":
                following = schedule.timesteps[i + 1]
                x_0 = schedule.step(out(problem.policy, to, following), following,
                                    to).pred_original_sample
                by_score = x_0.flatten(1).sum(1).argsort()
                transitions.append((x, x, to[by_score[-1]][None], to[by_score[0]][None], t))
                x = to[torch.randint(4, (1,), generator=gen)]
            else:
                transitions.append((x[:1], x[1:], to[:1], to[1:], t))
                x = to
        for i, (x_w, x_l, to_w, to_l, t) in enumerate(transitions[:4]):
            if method == "d3po" and x[0].sum() < x[1].sum():
                x_w, x_l, to_w, to_l = x_l, x_w, to_l, to_w
            e_w, e_l, r_w, r_l = (each[number] for each in found[i])
            assert e_w.requires_grad
            torch.testing.assert_close(r_w - e_w, ratio(x_w, to_w, t)[0], rtol=2e-3, atol=2e-5)
            torch.testing.assert_close(r_l - e_l, ratio(x_l, to_l, t)[0], rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.7])
def test_clip_is_on_the_ratio_alone(gamma):
    """With a clip the loss is -log sigmoid((beta + gamma) log(clip r_w / clip r_l) + gamma log
    (p_ref of w / p_ref of l)): no gradient beyond the clip, none through the margin. D3PO's
    published setting keeps it in 0.683 to 0.703."""
    e_w, e_l, r_w, r_l = (0.2 * each for each in errors(64))
    e_w.requires_grad_()

    def loss(e_w, e_l, r_w, r_l, beta, gamma=0.0):
        return dpo.dpo_loss(on_policy.clipped(e_w, r_w, 0.1), on_policy.clipped(e_l, r_l, 0.1), r_w,
                            r_l, beta, gamma)[0]

    losses = loss(e_w, e_l, r_w, r_l, 3.0, gamma)
    ratio_w, ratio_l = (r_w - e_w).exp().clamp(0.9, 1.1), (r_l - e_l).exp().clamp(0.9, 1.1)
    wanted = -torch.log(torch.sigmoid((3.0 + gamma) * torch.log(ratio_w / ratio_l)
                                      + gamma * (r_l - r_w)))
    torch.testing.assert_close(losses, wanted)
    losses.sum().backward()
    beyond = ((r_w - e_w).exp() - 1).abs() > 0.1
    assert 0 < beyond.sum() < 64 and torch.equal(e_w.grad != 0, ~beyond)
    far, none = torch.tensor([50.0]), torch.zeros(1)
    bounds = [loss(x, -x, none, none, 0.1).item() for x in (-far, far)]
    assert bounds == [pytest.approx(0.683, abs=5e-4), pytest.approx(0.703, abs=5e-4)]


def test_defaults_by_method(capsys):
    """The settings of the released codes; flags that are given mean what they say, and --help names
    none that mean nothing."""
    for model, rank, lr, batch in ("sd15", 4, 6e-5, 40), ("sdxl", 64, 1e-5, 16):
        d3po, spo = (on_policy.parse(["--model", model, "--data", "p.txt", "--method", method])
                     for method in ("d3po", "spo"))
        assert d3po.clip == spo.clip == 0.1 and d3po.warmup == spo.decay == 0
        assert (d3po.beta, d3po.lora, d3po.lr, d3po.batch) == (0.1, 4, 3e-5, 40)
        assert (spo.beta, spo.lora, spo.lr, spo.batch) == (10, rank, lr, batch)
        assert d3po.scorer == "pickscore" and (d3po.guidance, d3po.sampling_steps) == (5, 20)
    toy = on_policy.parse(["--toy", "--method", "spo", "--beta", "3"])
    assert (toy.beta, toy.clip, toy.candidates, toy.out) == (3, 0, 4, "runs/toy-spo")
    assert on_policy.parse(["--toy"]).method == "d3po"
    with pytest.raises(SystemExit):
        on_policy.parse(["--help"])
    shown = capsys.readouterr().out
    assert "--guidance" in shown and "--draws" not in shown


def test_walk_from_zero_signal_is_finite():
    """A v-model whose abar is 0 at T - 1 has finite errors."""
    problem = walking_problem("v_prediction", 1)
    problem.alphas_cumprod = problem.alphas_cumprod.clone()
    problem.alphas_cumprod[-1] = 0
    found = step_errors(problem, keyed([(0, 1), (0, 2), (0, 3)]))
    assert torch.stack([torch.stack(four) for four in found]).isfinite().all()


@pytest.mark.parametrize("method", ["d3po", "spo"])
def test_on_policy_starts_at_the_reference_and_prefers_the_winner(method):
    """At the start every ratio is exactly 1, so every loss log 2, and with gamma only the margin is
    left; a step against the gradient makes the preferred steps more probable, the rejected less."""
    problem = on_policy.make_problem(on_policy.parse(["--toy", "--method", method]), None)
    found = step_errors(problem, keyed([(0, row) for row in range(256)]))
    assert len(found) == 19
    for e_w, e_l, r_w, r_l in found:
        assert torch.equal(e_w, r_w) and torch.equal(e_l, r_l)
        margin = dpo.dpo_loss(e_w, e_l, r_w, r_l, beta=1.0, gamma=0.5)[0]
        torch.testing.assert_close(margin, -torch.log(torch.sigmoid(0.5 * (r_l - r_w))))
    e_w, e_l, *_ = map(torch.stack, zip(*found, strict=True))
    losses = torch.stack([dpo.dpo_loss(e_w, e_l, r_w.detach(), r_l.detach(), beta=1.0)[0]
                          for e_w, e_l, r_w, r_l in found])
    parameters = list(problem.policy.parameters())[-2:]  # the last layer: the others have none yet

    def gradient(of):
        return torch.cat([g.flatten() for g in torch.autograd.grad(
            of.mean(), parameters, retain_graph=True)])

    down = -gradient(losses)
    assert gradient(e_w) @ down < 0 < gradient(e_l) @ down


ON_POLICY = ["--toy", "--sampling-steps", "4", "--batch", "8", "--steps", "6", "--warmup", "2",
             "--save-every", "3", "--pairs", "500"]


def train_on_policy(*argv):
    cfg = on_policy.parse([*ON_POLICY, *map(str, argv)])
    return dpo.train(on_policy.make_problem(cfg, None), cfg, on_policy.on_policy_step)


@pytest.mark.parametrize("micro", [8, 2])
@pytest.mark.parametrize("more", ["", "--clip 0.1 --gamma 0.5 --lr 0.03 --warmup 0"])
def test_on_policy_gradient_is_a_mean_over_steps(tmp_path, micro, more):
    """The gradient that the loop takes is that of the mean over pairs and steps, accumulated or
    not; with a clip on both ratios and with gamma, once the policy has left the reference."""
    argv = [*more.split(), "--steps", "2", "--micro-batch", str(micro), "--out", str(tmp_path)]
    rows = train_on_policy(*argv, "--save-every", "1")
    cfg = on_policy.parse([*ON_POLICY, *argv])
    for step, row in enumerate(rows):
        problem = on_policy.make_problem(cfg, None)
        if step:
            problem.policy.load(tmp_path / f"checkpoint-{step:08d}" / "policy")
        keys = sum(dpo.pair_keys(len(problem.pairs), cfg, 0, 0, 1), [])[8 * step:][:8]
        found = step_errors(problem, keyed(keys))
        losses = []
        for e_w, e_l, r_w, r_l in found:
            r_w, r_l = r_w.detach(), r_l.detach()
            ratio_w, ratio_l = r_w - e_w, r_l - e_l
            if cfg.clip:
                ratio_w, ratio_l = (each.clamp(math.log(0.9), math.log(1.1))
                                    for each in (ratio_w, ratio_l))
            logit = (cfg.beta + cfg.gamma) * (ratio_w - ratio_l) + cfg.gamma * (r_l - r_w)
            losses.append(-torch.nn.functional.logsigmoid(logit))
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in problem.policy.parameters()]).norm().item()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert row["err_policy_w"] == pytest.approx(
            torch.stack([e_w for e_w, *_ in found]).mean().item(), rel=1e-4)


@pytest.mark.parametrize("method", ["d3po", "spo"])
def test_on_policy_by_two_processes_and_resumed(tmp_path, method):
    """A stopped and resumed run is the straight one, bit for bit; 2 processes train what 1 does."""
    argv = ["--method", method, "--clip", "0.1", "--micro-batch", "4"]
    train_on_policy(*argv, "--out", tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "policy")
    shutil.rmtree(tmp_path / "again" / "checkpoint-00000006")
    train_on_policy(*argv, "--out", tmp_path / "again")
    first = weights(tmp_path / "straight")
    assert same(first, weights(tmp_path / "again"))
    if method == "spo":
        run(*ON_POLICY, *argv[:-1], "2", "--out", tmp_path / "two", processes=2,
            script="toy/on_policy.py")
        assert same(first, weights(tmp_path / "two"), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind, method", [("sd15", "d3po"), ("sdxl", "spo")])
def test_on_policy_on_images(tiny, tmp_path, capsys, monkeypatch, kind, method):
    """The real path, from a text file of prompts to a UNet that has moved: guidance, a CLIPModel
    as the judge, the range of the loss in the start line, log 2 at step 0; all under autocast."""
    precision, dtype = ("fp32", torch.float32) if kind == "sd15" else ("bf16", torch.bfloat16)
    dtypes = set()
    forward = dpo.NetworkPolicy.forward
    monkeypatch.setattr(dpo.NetworkPolicy, "forward", lambda policy, *x, **cond: (
        out := forward(policy, *x, **cond), dtypes.add(out.dtype))[0])
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n\na green ground\n")
    on_policy.main([
        "--model", str(tiny / f"tiny-{kind}"), "--data", str(tmp_path / "prompts.txt"), "--scorer",
        str(tiny / "tiny-clip"), "--method", method, "--resolution", "64", "--batch", "2",
        "--steps", "2", "--sampling-steps", "3", "--lr", "1e-3", "--workers", "0", "--lora", "0",
        "--sample-every", "0", "--precision", precision, "--out", str(tmp_path / "run")])
    assert dtypes == {dtype}
    printed = capsys.readouterr().out
    low, high = ("0.683", "0.703") if method == "d3po" else ("0.126", "2.133")
    assert f"keeps the loss in {low} to {high}" in printed and "of 3 pairs" in printed
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) != rows[1]["loss"]
    start = diffusers.UNet2DConditionModel.from_pretrained(tiny / f"tiny-{kind}", subfolder="unet")
    assert not same(weights(tmp_path / "run", "unet"), start.state_dict())


def test_conditions_and_judge_of_drawn_images(tiny, tmp_path, monkeypatch):
    """The prompts are those of the rows; with guidance the embeddings of no prompt come first; SDXL
    is told that the image is whole. The scorer is shown the decoded images, n for each prompt, and
    their order is kept."""
    seen = []

    def score(images, prompts):
        seen.extend(zip(images, prompts, strict=True))
        return torch.arange(len(images)), None

    monkeypatch.setattr(judge, "load_scorer", lambda name, device: score)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na hen\n")
    cfg = on_policy.parse(["--model", str(tiny / "tiny-sdxl"), "--resolution", "64", "--data",
                           str(tmp_path / "prompts.txt")])
    problem = on_policy.make_problem(cfg, torch.device("cpu"))
    prompts = [problem.pairs[key]["prompt"] for key in ((0, 2), (5, 0))]
    assert prompts == ["a hen", "a cat"] and len(problem.pairs) == 3
    empty, cond = problem.conditions({"prompt": prompts})
    for name in "prompt", "text_embeds":
        assert not empty[name].any() and cond[name].any() and len(cond[name]) == 2
        assert not torch.equal(cond[name][0], cond[name][1])
    for each in empty, cond:
        assert each["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    cfg.guidance = 1
    alone, = problem.conditions({"prompt": prompts})
    assert torch.equal(alone["prompt"], cond["prompt"])
    x_0 = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scores = problem.score(x_0, {"prompt": ["a", "b"]})
    assert scores.tolist() == [[0, 1, 2], [3, 4, 5]] and [p for _, p in seen] == list("aaabbb")
    vae = diffusers.AutoencoderKL.from_pretrained(tiny / "tiny-sdxl", subfolder="vae")
    with torch.no_grad():
        pixels = vae.decode(x_0[1, 0][None] / 0.13025).sample[0] / 2 + 0.5
    wanted = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    assert abs(numpy.array(seen[3][0]).astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("line, words", [
    ("--toy --method ppo", "--method"), ("--toy --clip 1", "--clip 1: it should be less than 1"),
    ("--toy --guidance 3", "--guidance means no"),
    ("--toy --draws 2", "--draws means nothing"),
    ("--toy --sampling-steps 1", "--sampling-steps"), ("--model sd15", "--data: it should be"),
    ("--model sd35 --data {tmp}/prompts.txt", "it should be SD1.5, SDXL"),
    ("--toy --sampling-steps 101", "--sampling-steps 101: it should be at most 100"),
    ("--model {tiny}/tiny-sd15 --data {tmp}/absent.txt", "absent.txt")])
def test_wrong_input_of_on_policy(line, words, tiny, tmp_path, capsys, monkeypatch):
    """Exit code 2, one line that names the flag, nothing written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        on_policy.main(line.format(tiny=tiny, tmp=tmp_path).split())
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(error) == 1 and words in error[0], error
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ judging


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


@pytest.mark.parametrize("kind, lora", [
    ("sd15", 0), ("sdxl", 0), ("sdxl", 2), ("sd35", 0), ("sd35", 2)])
@pytest.mark.parametrize("side", judge.SIDES)
def test_only_the_network_rounds_a_picture(tiny, two_steps, kind, lora, side):
    """With --precision bf16 latents stay fp32 between the steps, and are decoded in fp32; the UNet
    or transformer runs under autocast, as in training."""
    problem, seen = problem_of(tiny, kind, "--precision", "bf16", "--lora", str(lora),
                               "--lr", "1e-5"), []
    decode = problem.pipe.vae.decode

    def decode_and_look(latents, **more):
        rounded = torch.equal(latents, latents.bfloat16().float())
        seen.append((latents.dtype, rounded, torch.is_autocast_enabled("cpu")))
        return decode(latents, **more)

    problem.pipe.vae.decode, outs = decode_and_look, []
    own = side == "policy" or lora
    unet = problem.policy.network if own else problem.reference.network
    last = unet.proj_out if kind == "sd35" else unet.conv_out
    last.register_forward_hook(lambda module, args, out: outs.append(out.dtype))
    figure.draw_images(problem, side, [("a cat", 0)])
    assert seen == [(torch.float32, False, False)] and set(outs) == {torch.bfloat16}
    assert "forward" not in vars(unet)


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


@pytest.mark.parametrize("lora", ["0", "32"])  # more than the width of the tiny transformer
def test_sd35_is_compared(tiny, tmp_path, lora):
    """`compare` judges all weights of SD3.5, and adapters by the rank of their file; no image is
    that of the reference."""
    problem = problem_of(tiny, "sd35", "--lora", lora, "--lr", "1e-5")
    for p in problem.policy.parameters():
        if p.requires_grad:
            p.data.add_(0.1)
    problem.policy.save(tmp_path / problem.policy.folder)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    judge.main(["compare", "--model", str(tiny / "tiny-sd35"), "--resolution", "64",
                "--policy", str(tmp_path / problem.policy.folder), "--images", "1", "--scorers",
                str(tiny / "tiny-clip"), "--prompts", str(tmp_path / "prompts.txt"),
                "--out", str(tmp_path / "out")])
    images = [path.read_bytes() for path in (tmp_path / "out").rglob("comparison/*/*.png")]
    assert len(images) == len(set(images)) == 4


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
    kept = []

    def keep(real):
        def made(*shape, **options):
            figure, axes = real(*shape, **options)
            kept[:] = axes.values() if isinstance(axes, dict) else axes.flat
            return figure, axes
        return made

    for name in "subplots", "subplot_mosaic":
        monkeypatch.setattr(pyplot, name, keep(getattr(pyplot, name)))
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
    assert Image.open(tmp_path / "toy.png").size == (1280, 560)
    numbers, densities = toy.measure()
    for panel, (name, p) in zip(panels[1:5], densities.items(), strict=True):
        assert panel.get_title().endswith(f"TV to p* = {numbers[f'tv_{name}']:.3f}")
        assert numpy.allclose(panel.get_images()[0].get_array(), p.T)
    true = dpo.toy_reward(toy.pairs.x_w) - dpo.toy_reward(toy.pairs.x_l)
    loss, accuracy, errors, _ = map(curves, panels[5:])
    assert loss["the labels' reward"][0] == pytest.approx(true.neg().exp().log1p().mean().item())
    assert accuracy["the labels' reward"][0] == pytest.approx((true > 0).float().mean().item())
    assert accuracy["policy, held-out pairs"] == [0.6]
    assert errors == {"preferred": [1.5], "rejected": [4.5]}  # the mean over four steps


def test_curves_of_runs(tmp_path, panels, capsys):
    """`figure.py RUN...` draws each run's metrics, a torn last line apart, into the first one's
    curves.png, with names if there are several; a folder without a run gets one clear line."""
    runs = [str(tmp_path / name) for name in ("one", "two")]
    for shift, name in enumerate(runs):
        Path(name).mkdir()
        rows = [row | {"loss": row["loss"] + shift} if "loss" in row else row for row in ROWS]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        Path(name, "metrics.jsonl").write_text(lines + '{"step": 9, "lo')
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
        error, = capsys.readouterr().err.split("\n")[1:-1]
        assert words in error


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
    (POLICY + "{wrong}/odd", "--policy {wrong}/odd: not adapters of this rank for this network"),
    (POLICY + "{tiny}/tiny-sdxl", "--policy {tiny}/tiny-sdxl/unet: "),
    (POLICY + "{wrong}/toy", "--model {tiny}/tiny-sd15: --policy {wrong}/toy is of toy"),
    (POLICY + "{tiny}/tiny-sd15 --resolution 63", "--resolution 63: it should be a multiple of 16"),
    (POLICY + "{tiny}/tiny-sd15 --precision fp8", "--precision: invalid choice"),
    (POLICY + "{tiny}/tiny-sd15 --images 0", "--images: 0 is not at least 1"),
    ("compare --out out --prompts {wrong}/prompts.txt --policy {wrong}/empty", "name its --model"),
    ("compare --out out --prompts {wrong}/prompts.txt --policy {wrong}/toy", "--model toy: ")])
def test_wrong_input_of_judge(line, words, tiny, wrong, tmp_path, capsys, monkeypatch):
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


# ----------------------------------------------------------------------------- cost and tiny models


@pytest.mark.parametrize("kind, counts", [
    ("sd15", (859_520_964, 83_653_863, 123_060_480)),
    ("sdxl", (2_567_463_684, 83_653_863, 123_060_480 + 694_659_840)),
    ("sd35", (2_243_171_520, 83_819_683, 123_650_304 + 694_659_840 + 4_762_310_656))])
def test_published_sizes(kind, counts):
    """With random weights UNet or transformer, VAE and text encoders have as many parameters as on
    the hub."""
    parts = make_tiny.assemble(**make_tiny.PUBLISHED[kind], device="meta").components
    encoders = [part for name, part in parts.items() if name.startswith("text_encoder")]
    network = parts["transformer" if kind == "sd35" else "unet"]
    found = network, parts["vae"], torch.nn.ModuleList(encoders)
    assert tuple(sum(p.numel() for p in part.parameters()) for part in found) == counts


def test_make_tiny_says_what_to_run_next(tmp_path, monkeypatch, capsys):
    """The command that it prints trains on what it has written, and can be pasted; a second time it
    writes the same weights; and a folder that is not a model's stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_tiny.py", "small"])
    weights = Path("small", "tiny-sd15", "unet", dpo.WEIGHTS)
    make_tiny.main()
    before = weights.read_bytes()
    make_tiny.main()
    assert weights.read_bytes() == before
    command = capsys.readouterr().out.rpartition("next: python diffusion_dpo.py ")[2]
    monkeypatch.setattr(dpo, "draw_picture", lambda *_: None)  # half a minute
    dpo.main(shlex.split(command.replace("\\\n", "")))
    assert len(Path("runs/tiny-sdxl/metrics.jsonl").read_text().splitlines()) == 5
    Path("other").mkdir()
    Path("other", "thesis.txt").touch()
    with pytest.raises(OSError):
        make_tiny.make_model("other", "sd15")
    assert Path("other", "thesis.txt").exists()


def test_random_weights_follow_from_the_seed(tmp_path, monkeypatch):
    """`time --model sd15` needs no file and no hub (with tiny sizes in the place of the published
    ones); its weights are the same for the same seed, and others for another."""
    monkeypatch.setitem(make_tiny.PUBLISHED, "sd15", make_tiny.TINY["sd15"])
    argv = ["--model", "sd15", "--resolution", "64", "--batch", "2", "--workers", "0",
            "--timed-steps", "1", "--out", str(tmp_path)]
    a, b, c = (cost.build_pipeline(cost.parse([*argv, "--seed", seed]), "cpu").unet.conv_in.weight
               for seed in "001")
    assert torch.equal(a, b) and not torch.equal(a, c)
    cost.main(["time", *argv])
    assert [path.name for path in tmp_path.iterdir()] == ["time.json"]


def test_random_latents_stay_out_of_a_run(tiny, tmp_path, monkeypatch):
    """What random weights encode into --cache is not found by a run of the real ones."""
    monkeypatch.setitem(make_tiny.PUBLISHED, "sd15", make_tiny.TINY["sd15"])
    monkeypatch.setitem(dpo.HUB, "sd15", str(tiny / "tiny-sd15"))
    argv = ["--model", "sd15", "--data", str(tiny / "pairs.parquet"), "--resolution", "64",
            "--batch", "2", "--workers", "0", "--cache", str(tmp_path / "cache")]
    cost.main(["time", *argv, "--seed", "1", "--timed-steps", "1", "--out", str(tmp_path / "out")])
    timed = set((tmp_path / "cache").rglob("*.safetensors"))
    pairs = dpo.make_problem(dpo.parse(argv), torch.device("cpu")).pairs
    assert len(timed) == 1 and not timed & set(pairs.cache.iterdir())


def account(*argv):
    return cost.account(cost.parse(["--precision", "bf16", "--micro-batch", "1", *argv]))


def test_memory_of_the_published_models():
    """The parameters of SD1.5's UNet (859,520,964) count 4 bytes in policy and gradients, 8 in
    AdamW, 2 in the reference; those of its VAE 4, of its text encoder 2."""
    found = account("--model", "sd15")
    assert found["policy"] == found["gradients"] == 4 * 859_520_964
    assert found["optimizer"] == pytest.approx(8 * 859_520_964, rel=1e-5)
    assert 2 * 859_520_964 < found["reference"] < 2.01 * 859_520_964
    assert found["VAE, text encoders"] == 4 * 83_653_863 + 2 * 123_060_480


def test_flags_save_memory(tiny):
    """Checkpointing saves activations, a smaller micro-batch too; LoRA keeps the reference's size
    and saves the rest."""
    model = "--model", str(tiny / "tiny-sd15"), "--resolution", "64"
    plain, half, less, lora = (account(*model, *flags.split()) for flags in (
        "--micro-batch 2", "", "--checkpointing on", "--lora 1"))
    assert plain["activations"] > 1.5 * half["activations"] > 1.5 * less["activations"] > 0
    assert lora["reference"] == plain["reference"] and lora["policy"] < plain["policy"] / 50
    assert less["activations"] > 0.95 * plain["policy"] / 2  # autocast's copies stay


def test_activations_by_hand():
    """Autograd keeps of two layers, a norm, a scale and a square: the layers' inputs and the second
    weight in bf16; what is normed, as on CUDA, scaled and squared in fp32, and the norm's mean and
    deviation. A parameter itself does not count, and a tensor that is kept twice, by the ReLU and
    the second layer, counts once."""
    class Policy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(3, 5, bias=False)
            self.second = torch.nn.Linear(5, 2, bias=False)
            self.norm = torch.nn.LayerNorm(2, elementwise_affine=False)
            self.scale = torch.nn.Parameter(torch.ones(2))

        def forward(self, x_t, t, prompt):
            return self.norm(self.second(self.first(x_t).relu())) * self.scale

    found = cost.kept_by_autograd(Policy(), (3,), {"prompt": torch.zeros(7, 1)},
                                  cost.parse(["--model", "sd15", "--precision", "bf16"]))
    assert found == 2 * (7 * 3 + 7 * 5 + 5 * 2) + 4 * (7 * 2 + 7 * 2 + 7 * 2 + 7 + 7)


@pytest.mark.parametrize("kind, flags", [
    ("sdxl", ""), ("sdxl", "--lora 2"), ("sdxl", "--optimizer adamw"), ("sd35", "--lora 2"),
    ("sd35", "--lora 0 --lr 1e-5")])
def test_memory_is_that_of_a_run(tiny, monkeypatch, kind, flags):
    """What `memory` computes for any flags is what a run has after a step, its tensors counted."""
    argv = ["--model", str(tiny / f"tiny-{kind}"), "--resolution", "64", "--batch", "1",
            "--data", str(tiny / "pairs.parquet"), "--workers", "0", "--precision", "bf16",
            *flags.split()]
    rows, cfg = [], dpo.parse(argv)
    monkeypatch.setattr(cost, "print_table", rows.extend)
    cost.main(["memory", *argv])
    problem = dpo.make_problem(cfg, torch.device("cpu"))
    trained = [p for p in problem.policy.parameters() if p.requires_grad]
    optimizer = dpo.make_optimizer(trained, cfg)
    dpo.train_step(problem, optimizer, dpo.load_batches(problem, cfg, 0), cfg, 0)
    states = [value for state in optimizer.state.values() for value in state.values()]
    (row,) = rows
    buffers = cost.size(problem.policy.buffers())
    assert (buffers > 0) == (kind == "sd35")
    frozen = problem.policy if cfg.lora else problem.reference
    assert row["policy"] * 2**30 == cost.size(trained) + (0 if cfg.lora else buffers)
    assert row["reference"] * 2**30 == buffers + cost.size(
        p for p in frozen.parameters() if not p.requires_grad)
    assert row["gradients"] * 2**30 == cost.size(p.grad for p in trained)
    assert row["optimizer"] * 2**30 == cost.size(filter(torch.is_tensor, states))
    assert row["sum"] == sum(value for value in list(row.values())[1:-1])


def test_memory_table(tmp_path, monkeypatch, capsys):
    """Without flags, `memory` shows and writes a row for each of the published configurations."""
    (tmp_path / "toy").mkdir()
    monkeypatch.setattr(cost, "ROOT", tmp_path)
    monkeypatch.setattr(cost, "account", lambda cfg: {
        "policy": 2**30 * (cfg.lora or 32) // 4, "gradients": 2**30 * (cfg.precision == "bf16")})
    cost.main(["memory"])
    lines = capsys.readouterr().out.splitlines()
    assert "| sd15 --micro-batch 1 --checkpointing on --lora 16 | 4.0 | 1.0 | 5.0 |" in lines
    table = json.loads((tmp_path / "toy" / "cost_memory.json").read_text())
    assert len(table) == len(cost.MEMORY_ROWS) and table[0]["sum"] == 9


def useful_flops(unet, side, prompts):
    """2 per multiplication of every Linear, Conv2d and attention of one image's forward pass."""
    found = []

    def see(module, inputs, out):
        if isinstance(module, torch.nn.Linear):
            found.append(2 * inputs[0].numel() * out.shape[-1])
        elif isinstance(module, torch.nn.Conv2d):
            found.append(2 * out.numel() * module.weight[0].numel())

    def attend(module, inputs, options, out):
        x, context = inputs[0], options.get("encoder_hidden_states")
        context = x if context is None else context
        width = module.to_q.out_features
        found.append(2 * 2 * x.shape[1] * context.shape[1] * width)

    for module in unet.modules():
        if isinstance(module, diffusers.models.attention_processor.Attention):
            module.register_forward_hook(attend, with_kwargs=True)
        module.register_forward_hook(see)
    unet(torch.zeros(1, 4, side, side), 0, torch.zeros(1, 77, prompts))
    return sum(found)


@pytest.mark.parametrize("lora", [0, 2])
def test_time_by_a_clock_that_is_told(tiny, tmp_path, monkeypatch, lora):
    """With a clock that only moves by the seconds that each part is said to take, `time` finds
    them: part by part, per pair, the ratio to the floor, the hours of the whole run, without the
    first two steps. Its TFLOP/s are those counted by hand. It leaves no other file."""
    now = [0.0]

    def pass_by(seconds):
        now[0] += seconds

    def slow(function, seconds):
        def slower(*inputs, **more):
            out = function(*inputs, **more)
            pass_by(next(seconds) if hasattr(seconds, "__next__") else seconds)
            return out
        return slower

    def forward(policy, *inputs, **cond):
        out = forwarded(policy, *inputs, **cond)
        pass_by(5 if out.requires_grad else 3)  # policy or reference
        if out.requires_grad:
            out.register_hook(lambda grad: pass_by(7))
        return out

    forwarded = dpo.NetworkPolicy.forward
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(cost, "matmul_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(dpo, "read_image", slow(dpo.read_image, 1))
    monkeypatch.setattr(dpo.StableDiffusion, "encode", slow(dpo.StableDiffusion.encode, 2))
    monkeypatch.setattr(dpo.NetworkPolicy, "forward", forward)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", slow(
        torch.nn.utils.clip_grad_norm_, 13))
    monkeypatch.setattr(torch.optim.AdamW, "step", slow(
        torch.optim.AdamW.step, iter([100, 100, 11, 11])))
    cost.main(["time", "--model", str(tiny / "tiny-sd15"), "--resolution", "64", "--batch", "16",
               "--micro-batch", "1", "--steps", "9", "--workers", "0", "--out", str(tmp_path),
               "--timed-steps", "2", "--lora", str(lora)])
    found = json.loads((tmp_path / "time.json").read_text())
    pairs, micro, update = 4, 2 + 2 + 3 + 5 + 7, 13 + 11  # 4 micro-batches of 1 pair
    wanted = {"data wait": 4 * 2, "encode": 4 * 2, "reference": 4 * 3, "policy forward": 4 * 5,
              "backward": 4 * 7, "optimizer": 11, "rest": 13,
              "all": 4 * micro + update}
    step = 4 * micro + update
    assert found["milliseconds_per_pair"] == pytest.approx({
        part: 1000 * seconds / pairs for part, seconds in wanted.items()})
    assert found["share"] == pytest.approx({
        part: seconds / step for part, seconds in wanted.items()})
    assert found["seconds_per_pair"] == step / pairs
    assert found["ratio_to_floor"] == step / (4 * (3 + 5 + 7) + 11)
    assert found["seconds_per_step"] == 16 / 4 * (4 * micro) + 13 + 11
    assert found["projected_hours"] == pytest.approx(9 * found["seconds_per_step"] / 3600)
    monkeypatch.undo()
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny / "tiny-sd15", subfolder="unet")
    # Two images a pair, each of them: reference 1, forward 1, backward 2 (1 to adapters).
    flops = 2 * (3 if lora else 4) * useful_flops(unet, 8, 32) / found["seconds_per_pair"]
    assert found["tflops"] == pytest.approx(flops / 1e12)
    assert found["share_of_matmul"] == pytest.approx(flops / 1e9)
    assert [path.name for path in tmp_path.iterdir()] == ["time.json"]


def test_timed_steps_are_the_runs(tiny, tmp_path, monkeypatch):
    """The steps that are timed are those that training takes: the same losses, the same weights."""
    seen, real = [], dpo.train_step

    def step(problem, *more):
        seen.append((real(problem, *more)["loss"], problem.policy.network.conv_in.weight.clone()))
        return {"step": more[-2], "unreadable": 0}

    argv = ["--model", str(tiny / "tiny-sd15"), "--resolution", "64", "--batch", "4", "--workers",
            "0", "--data", str(tiny / "pairs.parquet"), "--steps", "3", "--lr", "1e-3"]
    cfg = dpo.parse(argv)
    problem = dpo.make_problem(cfg, torch.device("cpu"))
    optimizer = dpo.make_optimizer(problem.policy.parameters(), cfg)
    batches = dpo.load_batches(problem, cfg, 0)
    for number in range(3):
        step(problem, optimizer, batches, cfg, number, dpo.dpo_step)
    monkeypatch.setattr(dpo, "train_step", step)
    cost.main(["time", *argv, "--timed-steps", "1", "--out", str(tmp_path)])
    for one, other in zip(seen[:3], seen[3:], strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1])


@pytest.mark.slow
def test_time_of_two_processes(tiny, tmp_path):
    """Under torchrun it times all of them, with made-up pairs and with adapters, and ends well."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
         ROOT / "toy" / "cost.py", "time", "--model", tiny / "tiny-sdxl", "--resolution", "64",
         "--timed-steps", "1", "--lora", "2", "--batch", "4", "--micro-batch", "1", "--workers",
         "0", "--out", tmp_path], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "time.json").read_text())
    assert found["world_size"] == 2 and found["timed_batch"] == 4
    assert done.stdout.count("ratio to the floor") == 1 and "hours on 2 x" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_time_says_why_it_stops(tiny, tmp_path, capsys, monkeypatch):
    """Pairs that cannot be read, and a signal, end it with their reason; nothing is written."""
    rows = [pick(size=(64, 64)) for _ in range(4)] + [pick(1.0, b"broken") for _ in range(40)]
    argv = ["time", "--model", str(tiny / "tiny-sd15"), "--resolution", "64", "--batch", "8",
            "--micro-batch", "4", "--workers", "0", "--timed-steps", "1", "--out",
            str(tmp_path / "out"), "--data", parquet(tmp_path / "pairs.parquet", rows)]
    with pytest.raises(SystemExit) as stopped:
        cost.main(argv)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and "over 1 %" in err and "jpg_0, cannot identify" in out
    real = dpo.dpo_step
    monkeypatch.setattr(dpo, "dpo_step", lambda *inputs, **more: (
        signal.raise_signal(signal.SIGTERM), real(*inputs, **more))[1])
    with pytest.raises(SystemExit) as stopped:
        cost.main(argv)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "Nothing is timed. Stopped by signal 15.\n" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_matmul_rate():
    """It is a rate that a CPU can have."""
    assert 1e9 < cost.matmul_rate(torch.device("cpu"), torch.float32) < 1e14


def test_time_table(tmp_path, monkeypatch, capsys):
    """Without flags, `time` shows the median and the range of three seeds for every row."""
    seen = []

    def time_steps(cfg, device):
        seen.append(cfg)
        dpo.load_pairs(cfg.data, "train")
        return {"ratio_to_floor": [1.2, 1.1, 1.7][cfg.seed], "share_of_matmul": cfg.lora / 10,
                "seconds_per_pair": 1.0}

    (tmp_path / "toy").mkdir()
    monkeypatch.setattr(cost, "ROOT", tmp_path)
    monkeypatch.setattr(cost, "time_steps", time_steps)
    cost.main(["time"])
    lines = capsys.readouterr().out.splitlines()
    assert len(seen) == 3 * len(cost.TIME_ROWS) and max(map(len, lines)) <= 100
    assert ("| medium | --cache --lora 8 | 1.200 (1.100-1.700) | 0.800 (0.800-0.800) |"
            " 1.000 (1.000-1.000) |") in lines
    table = json.loads((tmp_path / "toy" / "cost_time.json").read_text())
    assert table[-1]["flags"] == "--cache --compile" and table[-1]["ratio_to_floor"][1] == 1.2


@pytest.mark.parametrize("line, words", [
    ("space", "space: it should be memory or time"),
    ("time --toy", "--toy: costs a minute"),
    ("memory --toy", "--toy: costs a minute"),
    ("memory --model sd15 --compile", "--compile: memory"),
    ("time --model sd15 --timed-steps 0", "--timed-steps"),
    ("time --model sd15 --evaluate", "--evaluate"),
    ("time --model nowhere", "--model nowhere: it should be SD1.5, SDXL"),
    ("time --model tiny-sd15 --data nowhere", "--data nowhere: no such file or folder")])
def test_wrong_input_of_cost(line, words, tiny, monkeypatch, capsys):
    """Exit code 2, one line that names the culprit, no traceback, and nothing is written."""
    monkeypatch.chdir(tiny)
    before = sorted(tiny.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        cost.main(line.split())
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and words in lines[-1]
    assert len(lines) == 1 and sorted(tiny.rglob("*")) == before


# ------------------------------------------------------------------ the script, where it is hard


@pytest.mark.parametrize("number", dpo.STOPPING)
def test_a_stop_has_the_exit_code_of_its_signal(tmp_path, number):
    """128 + its number, as an int: of anything else Python makes a 1."""
    cfg = dpo.parse([*TOY, "--out", str(tmp_path)])
    problem = dpo.Toy(cfg)
    encode = problem.encode
    problem.encode = lambda batch: os.kill(os.getpid(), number) or encode(batch)
    with pytest.raises(SystemExit) as stopped:
        dpo.train(problem, cfg)
    assert type(stopped.value.code) is int and stopped.value.code == 128 + number


def test_an_error_does_not_wait_for_image_workers(tiny, tmp_path):
    """Image workers ignore signals; a run that ends by an error must not wait for them. What one of
    them finds wrong with the data is one line, and exit code 2."""
    data, log = parquet(tmp_path / "pairs.parquet", [pick(1.0, b"broken")]), tmp_path / "log"

    def target():
        os.setsid()
        sys.stdout = sys.stderr = open(log, "w")
        dpo.main(["--model", str(tiny / "tiny-sd15"), "--data", data, "--resolution", "64",
                  "--batch", "2", "--workers", "1", "--out", str(tmp_path / "run")])

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(60)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("still waiting")
    assert process.exitcode == 2 and f"\nerror: --data {data}: unreadable" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_whole_replaces_what_is_on_the_disk(tmp_path, monkeypatch):
    """A file is replaced only once its new content is on the disk."""
    file, seen = tmp_path / "new folder" / "file", []
    dpo.write_json(file, 1)
    monkeypatch.setattr(os, "sync", lambda: seen.append(file.read_text()))
    dpo.write_json(file, 2)
    assert seen == ["1\n"] and file.read_text() == "2\n" and len([*file.parent.iterdir()]) == 1


def test_bf16_weights_would_lose_the_updates():
    """Hundred AdamW steps at the SD1.5 learning rate on weights of size 0.02: fp32 weights move by
    all of it, bf16 weights by less than half; at the rate that the paper prints, by nothing."""
    def moved(dtype, lr):
        start = torch.full((1000,), 0.02, dtype=dtype)
        weights = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([weights], lr=lr, weight_decay=0)
        for _ in range(100):
            weights.grad = torch.ones_like(weights)
            optimizer.step()
        return (start - weights).float().mean().item() / (100 * lr)

    assert moved(torch.float32, 2.048e-5) > 0.9 and moved(torch.float32, 2.048e-8) > 0.5
    assert moved(torch.bfloat16, 2.048e-5) < 0.5 and moved(torch.bfloat16, 2.048e-8) == 0


# ---------------------------------------------------------------------------------------- the study


@pytest.mark.parametrize("words", [["--method", "spo"], ["--method=spo"],
                                   ["--method", "d3po", "--method", "spo"]])
def test_method_decides_the_defaults_however_it_is_written(words):
    """The defaults are those of the method that trains; a given --out is never renamed."""
    cfg = on_policy.parse(["--toy", *words, "--out", "runs/toy"])
    assert (cfg.method, cfg.beta, cfg.out) == ("spo", 10, "runs/toy")


BRIEF = "--steps 4 --batch 4 --pairs 200 "


@pytest.fixture
def brief(monkeypatch):
    """Runs with few samples and held-out pairs and without toy.png; undoes what run() sets."""
    real, threads = dpo.toy_sample, torch.get_num_threads()
    monkeypatch.setattr(dpo, "toy_sample", lambda denoiser, abars, n, gen, eta=1.0: real(
        denoiser, abars, n // 100, gen, eta))
    monkeypatch.setattr(dpo, "HELD_OUT_PAIRS", 50)
    monkeypatch.setattr(dpo, "SAMPLES", 25_000)
    monkeypatch.setattr(dpo, "draw_picture", lambda *given: None)
    yield
    torch.set_num_threads(threads)


def built(change):
    return study.build(dpo.parse(["--toy", "--pairs", "200"]), change)


def test_experiments_change_what_they_say():
    """One mode: a Gaussian of std 1/2, no reward; linear betas: other noise levels, then another
    weight alone; coverage 0: no points off the reference; velocity: the network's word counts for
    a_t of what it does else."""
    toy, one, linear = built(None), built("one mode"), built("linear betas")
    x = one.pairs.x_w
    assert x.mean(0).norm() < 0.3 and one.reward(x).count_nonzero() == 0
    torch.testing.assert_close(one.reference.log_prob(x), -x.square().sum(1) / (2 * 0.5**2))
    betas = 1 - linear.alphas_cumprod[1:] / linear.alphas_cumprod[:-1]
    torch.testing.assert_close(betas, torch.linspace(0.001, 0.2, 100)[1:], rtol=1e-3, atol=1e-5)
    constant = built("linear betas, constant weight")
    assert torch.equal(constant.alphas_cumprod, linear.alphas_cumprod)
    torch.testing.assert_close(constant.weight, linear.weight.mean().expand(100))
    assert linear.weight.std() > 1 and toy.weight.std() < 0.1 * toy.weight.mean()
    spread = [(built(moved).pairs.x_w.norm(dim=1) - 2).std() for moved in (0.0, 0.5, 1.0)]
    assert 0.9 * 0.5 < spread[0] < spread[1] < spread[2]
    velocity, t = built("velocity"), torch.tensor([0, 50, 99])
    for problem in toy, velocity:
        torch.nn.init.ones_(problem.policy.net[-1].weight)
    said, reference = velocity.policy(x[:3], t), toy.reference(x[:3], t)
    a_t = toy.alphas_cumprod[t][:, None].sqrt()
    torch.testing.assert_close(said - reference, a_t * (toy.policy(x[:3], t) - reference))


def moved_toy(*argv):
    """A toy whose policy is not its reference, and a batch."""
    toy = dpo.Toy(dpo.parse(["--toy", "--pairs", "40", *argv]))
    torch.nn.init.normal_(toy.policy.net[-1].weight, std=0.1)
    return toy, batch_of_pairs(toy, *((0, row) for row in range(8)), draws=4)


def test_changed_losses_by_hand():
    """The exact margin is gamma (log p_ref(x_w) - log p_ref(x_l)) by the closed form, the rest as
    drawn; SFT adds 0.03 err_w; any other change leaves the loss alone."""
    toy, batch = moved_toy("--gamma", "0.3")
    plain = study.changed_step(None)(toy, batch, toy.cfg)
    e_w, e_l, r_w, r_l = dpo.pair_errors(toy, batch["x_w"], batch["x_l"], batch["t"],
                                         batch["eps"], {})
    margin = toy.ring.log_prob(batch["x_w"]) - toy.ring.log_prob(batch["x_l"])
    logit = 0.8 * ((r_w - e_w) - (r_l - e_l)) + 0.3 * margin
    exact = study.changed_step("exact margin")(toy, batch, toy.cfg)
    assert exact[2].item() == pytest.approx(logit.sum().item(), rel=1e-4)
    assert exact[0].item() == pytest.approx((1 + (-logit).exp()).log().sum().item(), rel=1e-4)
    assert abs(exact[2] - plain[2]) > 0.1
    sft = study.changed_step("SFT on the preferred")(toy, batch, toy.cfg)
    assert (sft - plain)[0].item() == pytest.approx(0.03 * e_w.sum().item(), rel=1e-3)


def test_ranks_by_chance_are_bradley_terry():
    """A score that is higher by 1 wins in sigmoid(1) of the draws."""
    x = torch.tensor([1.0, 0.0]).expand(20_000, 2)
    scores = study.by_chance(lambda x_0, batch: x_0, dpo.generator("test"))(x, None)
    assert (scores[:, 0] > scores[:, 1]).double().mean().item() == pytest.approx(0.731, abs=0.01)


def test_drift_and_judge_of_a_known_policy():
    """Without a reward p* is p_ref: the reference's distance to its denoiser is 0 at every noise
    level, and a policy that is off by a constant c is off by T omega |c|^2, all of it common; its
    log-ratios lose as many nats. One that is the reference loses none."""
    toy = dpo.Toy(dpo.parse(["--toy", "--pairs", "40"]))
    toy.reward = lambda x: 0 * x[:, 0]
    found = study.drift(toy)
    assert max(found["reference"] + found["policy"]) < 0.02
    toy.policy.net[-1].bias.data += torch.tensor([0.3, 0.0])
    found, cost_of = study.drift(toy), (0.09 * toy.weight[list(study.LEVELS)]).tolist()
    assert found["policy"] == pytest.approx(cost_of, rel=0.1)
    assert found["common"] == pytest.approx(found["policy"], rel=0.05)
    toy.reward = lambda x: x[:, 0]
    assert 0.1 < study.as_a_judge(toy, 1000)["nats_lost"] < 0.09 * toy.weight.mean()
    toy.policy.net[-1].bias.data.zero_()
    assert study.as_a_judge(toy, 1000)["nats_lost"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("gamma", ["0", "0.5"])
def test_the_denoiser_of_the_optimum(gamma):
    """That of p*, summed over a grid; it is not the reference's."""
    toy = dpo.Toy(dpo.parse(["--toy", "--pairs", "40", "--gamma", gamma]))
    x_t = torch.randn(40, 2, generator=dpo.generator("test"))
    axis = torch.linspace(-6, 6, 301)
    grid = torch.cartesian_prod(axis, axis)
    log_p = (0.5 * toy.ring.log_prob(grid) + toy.reward(grid)) / (0.5 + float(gamma))
    for level in 20, 50, 80:
        t = torch.full((40,), level)
        a_t, s_t = dpo.signal_and_noise(toy.alphas_cumprod[level], "epsilon")
        log_posterior = log_p - (x_t[:, None] - a_t * grid).square().sum(2) / (2 * s_t**2)
        by_grid = (x_t - a_t * (log_posterior.softmax(1) @ grid)) / s_t
        tolerance = 0.02 if float(gamma) else 1e-3
        assert (study.Optimum(toy).denoise(x_t, t) - by_grid).abs().max() < tolerance
        if level >= 50:
            assert (toy.ring(x_t, t) - by_grid).abs().max() > 5 * tolerance


def test_yardsticks(brief, monkeypatch):
    """p* by its own denoiser is near p*, as near as 250 samples can show, and by its log-ratios
    judges as the reward does; so is a reward model on 8,000 labels, but not if every second one is
    turned round."""
    flags = BRIEF.replace("200", "8000") + "--eval-every 0 --batch 32 --steps 250"
    as_a_judge = study.as_a_judge
    monkeypatch.setattr(study, "as_a_judge", lambda toy: as_a_judge(toy, 500))
    numbers = study.run((flags, "exact denoiser", 0))
    assert max(numbers["tv_policy"], numbers["tv_policy_ode"]) < 0.35 < numbers["tv_reference"]
    assert numbers["correlation"] > 0.95 and abs(numbers["nats_lost"]) < 0.3
    assert study.run((flags, "reward model", 0))["tv_policy"] < 0.2
    toy = dpo.Toy(dpo.parse(["--toy", *flags.split()]))
    turned = toy.pairs.x_w[::2].clone()
    toy.pairs.x_w[::2], toy.pairs.x_l[::2] = toy.pairs.x_l[::2], turned
    assert study.reward_model(toy)["tv_policy"] > 0.4


def test_distilled_is_what_the_judge_says(monkeypatch):
    """Samples of the reference, weighted by a log-ratio and learnt by plain denoising: with that of
    p* the new policy, a layer deeper, comes nearer to p*, by an ODE, too."""
    toy = dpo.Toy(dpo.parse(["--toy", "--pairs", "40"]))
    monkeypatch.setattr(dpo, "SAMPLES", 4000)
    monkeypatch.setattr(study, "log_ratios", lambda toy, x: toy.reward(x) / toy.cfg.beta)
    depth = len(toy.policy.net)
    study.distill(toy, samples=4000, steps=150, batch=256)
    assert len(toy.policy.net) == depth + 2  # with its activation
    numbers = toy.measure()[0]
    assert max(numbers["tv_policy"], numbers["tv_policy_ode"]) < 0.5 * numbers["tv_reference"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--lora", "2"], ["--precision", "bf16"]])
def test_compiled_is_the_same_network(tiny, tmp_path, more):
    """--compile changes neither the loss at step 0, nor the gradients (compiling all of the UNet
    does, with torch 2.13 on a CPU: they are 0 below the first upsampling), nor names of weights."""
    found = []
    for flags in [], ["--compile"]:
        cfg = sd_config(tiny, "sd15", *more, *flags)
        problem = sd_problem(cfg)
        sums = dpo.dpo_step(problem, batch_of_pairs(problem, (0, 0), (0, 1)), cfg)
        assert sums[0].item() == pytest.approx(2 * math.log(2), rel=1e-4)
        gradients = [p.grad.flatten() for p in problem.policy.parameters() if p.requires_grad]
        problem.policy.save(folder := tmp_path / str(len(found)))
        file = dpo.LORA_WEIGHTS if cfg.lora else dpo.WEIGHTS
        found.append((torch.cat(gradients), load_file(folder / file).keys()))
    (plain, names), (compiled, others) = found
    error = (compiled - plain).norm() / plain.norm()
    assert error < (0.1 if cfg.precision == "bf16" else 1e-3) and names == others


def test_rounding_is_measured(monkeypatch, tmp_path):
    """Weights that hardly move make no logit in fp32, and noise in bf16, the less the more numbers
    a latent has; and weights in two parts are the same network."""
    (tmp_path / "toy").mkdir()
    monkeypatch.setattr(rounding, "ROOT", tmp_path)
    monkeypatch.setattr(rounding, "CASES", [("random", 16, 5000, rounding.MOVES[:1], (4, 8))])
    monkeypatch.setattr(rounding, "sft", lambda *case: SimpleNamespace(error=1.0))
    table = rounding.table
    monkeypatch.setattr(rounding, "table", lambda rows: rows and table(rows))
    rounding.main()
    found = json.loads((tmp_path / "toy" / "rounding.json").read_text())
    small, large = found["random, width 16, beta 5000"].values()
    noise, logit = (f"{what}, 3 steps of 1e-8" for what in ("noise", "logit"))
    assert max(small[logit] + large[logit]) < 0.02 < 0.3 < min(large[noise])
    assert 1.3 < statistics.median(small[noise]) / statistics.median(large[noise]) < 2.6
    problem = rounding.moved(1, 1e-4, 16, 5000, 4, 0)
    whole = rounding.logits(problem)
    assert torch.allclose(rounding.logits(rounding.split(problem)), whole, atol=1e-2 * whole.std())


@pytest.mark.parametrize("script, flags", [
    (dpo, "--gamma 0.5 --eval-every 4"), (on_policy, "--sampling-steps 3 --method d3po"),
    (on_policy, "--sampling-steps 3 --method spo --gamma 5")])
def test_a_run_of_the_study_is_that_of_the_script(script, flags, brief, tmp_path):
    """With the same flags it ends with the very numbers of results.json; a curve ends there too."""
    flags = BRIEF + flags + " --sample-every 2"
    script.main(["--toy", "--seed", "1", *flags.split(), "--out", str(tmp_path / "run")])
    wanted = json.loads((tmp_path / "run" / "results.json").read_text())
    numbers = study.run((flags, None, 1))
    assert [row["step"] for row in numbers["curve"]] == [2, 4]
    assert ("held_out_accuracy" in numbers) == (script is dpo)
    assert all(torch.tensor(p).shape == (30, 30) for p in numbers.pop("map").values())
    first, last = (row | {"step": 4} for row in numbers.pop("curve"))
    assert numbers == pytest.approx({name: wanted[name] for name in numbers})
    assert first != last == pytest.approx({name: wanted.get(name, 4) for name in last})
    assert {name for name in wanted if name.startswith(("held_out_", "tv_"))} <= set(numbers)


def test_toy_proxy_is_hacked(monkeypatch):
    """Under the proxy's own optimum the proxy is higher and the true reward lower, the lower beta;
    and that optimum is what a run with --proxy is measured by."""
    ring = dpo.Toy(dpo.parse(["--toy"])).reference
    means = [dpo.toy_optimum(ring, beta, 0, dpo.toy_proxy)[1] for beta in (2, 0.5, 0.25)]
    true, proxy = ([mean(f) for mean in means] for f in (dpo.toy_reward, dpo.toy_proxy))
    start = dpo.toy_density(ring.log_prob)[1](dpo.toy_reward)
    assert true == sorted(true, reverse=True) and proxy == sorted(proxy)
    assert true[0] > start > true[1]
    monkeypatch.setattr(dpo, "SAMPLES", 100)
    numbers, _ = dpo.Toy(dpo.parse([*TOY, "--proxy"])).measure()
    assert numbers["reward_optimum"] == pytest.approx(true[1])


def test_one_mode_and_logits_are_measured(brief):
    """The width of the one mode, at the start that of the reference; and how sharing t and eps, or
    t alone, steadies a logit."""
    still = BRIEF + "--eval-every 0 --lr 0"
    assert study.run((still, "one mode", 0))["std"] == pytest.approx(0.5, abs=0.05)
    longer = BRIEF + "--steps 20 --eval-every 0 --warmup 0"
    moved = study.run((longer, "logits", 0))["logits"]
    assert 0 < moved["t and eps"] < moved["t"] < moved["nothing"]


def test_tables_and_figures_are_made_of_all_experiments(brief, tmp_path, monkeypatch, capsys):
    """Every figure of the notebook is drawn; every JSON file holds each setting and seed; labels
    with a command are that run."""
    numbers = study.run((BRIEF + "--eval-every 4 --sample-every 2", None, 0))
    numbers |= {"std": 0.5, "logits": {"t and eps": 1.0, "t": 2.0, "nothing": 3.0},
                "nats_lost": 0.0, "correlation": 0.5,
                "drift": dict.fromkeys(("policy", "reference", "common"), [1.0] * 8)}
    plan = study.experiments()
    found = {name: {label: [numbers] * 3 for label in labels} for name, labels in plan.items()}
    monkeypatch.setattr(study, "OUT", tmp_path)
    study.write(found)
    study.draw(found)
    shown = re.findall(r"\(study/([a-i]-\S+\.png)\)", (ROOT / "toy" / "README.md").read_text())
    assert {path.name for path in tmp_path.glob("*.png")} == {*shown, "methods.png"}
    for name, labels in plan.items():
        rows = json.loads((tmp_path / f"{name}.json").read_text())
        assert len(rows) == 3 * len(labels) and "map" not in rows[0]
    assert "| beta 2: `--toy --proxy --beta 2` | 0.636 |" in capsys.readouterr().out

    def means(flags):
        return vars(dpo.parse(flags.split())) | {"eval_every": 0}

    for label, (flags, _) in plan["readme"].items():
        assert means(label.split("`")[1]) == means("--toy " + flags)


def test_the_way_to_the_optimum(tmp_path, monkeypatch):
    """toy.gif: a frame for the reference and one per picture, the density left, p* right, x to the
    right and y up; toy.png is that of the end. What draws pictures is again what it was."""
    p = {name: torch.zeros(30, 30) for name in ("reference", "policy", "optimum")}
    p["reference"][29, 0] = p["policy"][0, 0] = p["optimum"][0, 29] = 1  # by x, y
    numbers = {"tv_reference": 1.0, "tv_policy": 0.5}
    toy = SimpleNamespace(measure=lambda: (numbers, p))

    def script(argv):
        (out := Path(argv[-1])).mkdir(parents=True)
        for step in 60, 120:
            dpo.draw_picture(toy, out / "samples" / f"step-{step:08d}.png", [])
        dpo.draw_picture(toy, out / "toy.png", [], numbers, p)

    monkeypatch.setattr(dpo, "main", script)
    monkeypatch.setattr(dpo, "draw_picture", real := lambda toy, path, *_: path.write_text("end"))
    study.draw_default_run(tmp_path)
    assert dpo.draw_picture is real and (tmp_path / "toy.png").read_text() == "end"
    gif = Image.open(tmp_path / "toy.gif")
    assert gif.n_frames == 3 and gif.size == (600, 300)
    for number, left in enumerate(((295, 295), (5, 295), (5, 295))):
        gif.seek(number)
        frame = gif.convert("RGB")
        assert frame.getpixel(left)[0] > 200 and frame.getpixel((305, 5))[0] > 200  # yellow
        assert frame.getpixel((150, 150))[0] < 100  # dark
