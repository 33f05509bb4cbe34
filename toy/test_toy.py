"""Proof that the tools of toy/ compute what they say. Each test's docstring is one claim.

    pytest toy              # a minute on two cores, no network, no GPU
"""

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]
import judge
import on_policy

import diffusion_dpo as dpo
from test_diffusion_dpo import errors, run, same, sd_schedule, spy_problem, weights

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


def test_defaults_by_method():
    """The settings of the released codes; flags that are given mean what they say."""
    for model, rank, lr, batch in ("sd15", 4, 6e-5, 40), ("sdxl", 64, 1e-5, 16):
        d3po, spo = (on_policy.parse(["--model", model, "--data", "p.txt", "--method", method])
                     for method in ("d3po", "spo"))
        assert d3po.clip == spo.clip == 0.1 and d3po.warmup == spo.decay == 0
        assert (d3po.beta, d3po.lora, d3po.lr, d3po.batch) == (0.1, 4, 3e-5, 40)
        assert (spo.beta, spo.lora, spo.lr, spo.batch) == (10, rank, lr, batch)
        assert d3po.scorer == "pickscore" and (d3po.guidance, d3po.sampling_steps) == (5, 20)
    toy = on_policy.parse(["--toy", "--method", "spo", "--beta", "3"])
    assert (toy.beta, toy.clip, toy.candidates, toy.out) == (3, 0, 4, "runs/toy-spo")


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


def test_on_policy_gradient_is_a_mean_over_steps(tmp_path):
    """The gradient that the loop takes is that of the mean over pairs and steps, accumulated or
    not."""
    for micro in 8, 2:
        argv = ["--steps", "1", "--micro-batch", str(micro), "--out", str(tmp_path / f"{micro}")]
        cfg = on_policy.parse([*ON_POLICY, *argv])
        problem = on_policy.make_problem(cfg, None)
        keys = sum(dpo.pair_keys(len(problem.pairs), cfg, 0, 0, 1), [])
        found = step_errors(problem, keyed(keys))
        torch.stack([dpo.dpo_loss(e_w, e_l, r_w.detach(), r_l.detach(), cfg.beta)[0]
                     for e_w, e_l, r_w, r_l in found]).mean().backward()
        norm = torch.cat([p.grad.flatten() for p in problem.policy.parameters()]).norm().item()
        row, = train_on_policy(*argv)
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
def test_on_policy_on_images(tiny, tmp_path, capsys, kind, method):
    """The real path, from a text file of prompts to a UNet that has moved: guidance, a CLIPModel
    as the judge, the range of the loss in the start line, log 2 at step 0, a picture."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n\na green ground\n")
    on_policy.main([
        "--model", str(tiny / f"tiny-{kind}"), "--data", str(tmp_path / "prompts.txt"), "--scorer",
        str(tiny / "tiny-clip"), "--method", method, "--resolution", "64", "--batch", "2",
        "--steps", "2", "--sampling-steps", "3", "--lr", "1e-3", "--workers", "0", "--lora", "0",
        "--sample-every", "0", "--out", str(tmp_path / "run")])
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
