"""Tests of on_policy.py, figure.py and study.py. Each docstring is one claim.

pytest toy/test_toy.py        # half a minute, no network, no GPU
"""

import math
import shutil
from functools import partial, partialmethod
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import figure
import numpy
import on_policy
import pytest
import study
import torch
from PIL import Image
from test_tools import in_two_processes
from torch.distributions import Normal
from torch.nn.functional import logsigmoid

import diffusion_dpo as dpo
from test_diffusion_dpo import metrics, same, sd_task, weights
from toy import distance, remedies, study_faces


def parse(script, flags=""):
    return script.parse(["--toy", *flags.split()])


def change_weights(task, by=0.1):
    for p in task.policy.parameters():
        if p.requires_grad:
            p.data.add_(by)


# ----------------------------------------------------------------------- on_policy.py: D3PO and SPO


def linear_network(factor):
    """Linear in x_t, t and a condition c."""

    def network(x_t, t, c):
        samples_last = factor * x_t.transpose(0, -1) + c / 10 + t / 500
        return samples_last.transpose(0, -1)

    return network


POLICY, REFERENCE = 0.4, 0.3


def linear_task(kind, method):
    """Linear networks on the toy, or on what looks like images.

    Those have guidance 3, and the noise levels of a v-model whose abar is 0 at T - 1.
    """
    cfg = parse(on_policy, f"--method {method} --sampling-steps 5")
    task = on_policy.OnPolicyToy(cfg)
    task.policy = linear_network(POLICY)
    task.reference = linear_network(REFERENCE)
    conditions = [{"c": torch.ones(2)}]
    task.conditions = lambda batch: conditions
    if kind == "images":
        conditions.insert(0, {"c": torch.zeros(2)})
        cfg.guidance = 3
        task.prediction = "v_prediction"
        task.shape = (4, 8, 8)
        task.step_unit = 1 / 256
        task.alphas_cumprod[-1] = 0
        task.score = lambda x_0, batch: x_0.flatten(2).sum(2)
    return task


def walk_of(task):
    """A walk from two prompts, and its compared steps. D3PO has to turn one of the pairs round."""
    batch = {"epoch": torch.tensor([0, 1]), "row": torch.tensor([1, 2])}
    walk = on_policy.Walk(task, batch, task.cfg)
    return walk, list(on_policy.compared_steps(walk))


def next_step(task, factor, x, i):
    """The distribution of the step after x, and the x_0 that is expected there."""
    times = [99, 79, 59, 39, 19]
    abars = torch.cat([task.alphas_cumprod[times], torch.ones(1)]).clamp(min=2**-24)
    out = factor * x + task.cfg.guidance / 10 + times[i] / 500
    if task.prediction == "v_prediction":
        out = abars[i].sqrt() * out + (1 - abars[i]).sqrt() * x
    mean, std = distance.ddim_step(x, out, abars[i], abars[i + 1])
    x_0, _ = distance.ddim_step(x, out, abars[i], abars[5])
    return Normal(mean, std, validate_args=False), x_0


@pytest.mark.parametrize("method", ["d3po", "spo"])
@pytest.mark.parametrize("kind, mean_or_sum", [("toy", torch.sum), ("images", torch.mean)])
def test_errors_of_steps_are_log_probabilities(kind, mean_or_sum, method):
    """Errors of reference and policy differ by log p_theta - log p_ref of the step that the policy
    has sampled. For images it is the mean over the latent."""
    task = linear_task(kind, method)
    walk, steps = walk_of(task)
    noise = []
    for x, x_next, i in steps:
        policy, _ = next_step(task, POLICY, x, i)
        reference, _ = next_step(task, REFERENCE, x, i)
        log_ratio = policy.log_prob(x_next) - reference.log_prob(x_next)
        wanted = mean_or_sum(log_ratio.flatten(2), 2)
        errors = torch.stack(walk.errors(task.policy, x, x_next, i), 1)
        ref_errors = torch.stack(walk.errors(task.reference, x, x_next, i), 1)
        torch.testing.assert_close(ref_errors - errors, wanted, rtol=1e-3, atol=1e-4)
        noise.append((x_next - policy.mean) / policy.stddev)
    assert [i for *_, i in steps] == [0, 1, 2, 3]
    if kind == "images":
        assert torch.stack(noise).std().item() == pytest.approx(1, abs=0.05)


def test_d3po_compares_two_whole_walks():
    """Each step begins where the last one ended. The walk whose end is scored higher is first."""
    task = linear_task("images", "d3po")
    _, steps = walk_of(task)
    for before, after in pairwise(steps):
        assert torch.equal(before[1], after[0])
    _, x_0 = next_step(task, POLICY, steps[-1][1], 4)
    preferred, rejected = task.score(x_0, None).T
    assert (preferred > rejected).all()


def test_spo_compares_the_best_and_the_worst():
    """Candidates are judged by the x_0 that is expected at them. Any of them goes on."""
    task = linear_task("images", "spo")
    with mock.patch.object(on_policy, "pick", wraps=on_policy.pick) as pick:
        walk_of(task)
    picked = [call.args for call in pick.call_args_list]
    ranks = []
    steps = zip(picked[::2], picked[1::2], strict=True)
    for i, ((candidates, compared), (_, goes_on)) in enumerate(steps):
        _, x_0 = next_step(task, POLICY, candidates, i + 1)
        order = task.score(x_0, None).argsort(1)
        assert torch.equal(compared, order[:, [3, 0]])
        ranks += (order == goes_on).nonzero()[:, 1].tolist()
    assert len(set(ranks)) > 2


def test_gradient_is_that_of_the_mean_over_steps():
    """A micro-batch has its share of the batch. The clip is on both ratios p_theta / p_ref, and not
    on the margin of gamma."""
    cfg = parse(on_policy, "--sampling-steps 4 --batch 16 --clip 0.1 --gamma 0.5")
    task = on_policy.OnPolicyToy(cfg)
    change_weights(task, 0.01)
    batch = {"epoch": torch.zeros(8).long(), "row": torch.arange(8), "unreadable": torch.zeros(8)}
    walk = on_policy.Walk(task, batch, cfg)
    losses = []
    for step in on_policy.compared_steps(walk):
        ref_w, ref_l = walk.errors(task.reference, *step)
        err_w, err_l = walk.errors(task.policy, *step)
        gain_w = (ref_w - err_w).exp().clamp(0.9, 1.1).log()
        gain_l = (ref_l - err_l).exp().clamp(0.9, 1.1).log()
        losses.append(-logsigmoid(1.5 * (gain_w - gain_l) + 0.5 * (ref_l - ref_w)))
    loss = torch.stack(losses).mean()
    weight = task.policy.net[-1].weight
    (gradient,) = torch.autograd.grad(loss, weight)

    sums = on_policy.on_policy_step(task, batch, cfg)
    assert sums[0].item() == pytest.approx(8 * loss.item())
    torch.testing.assert_close(weight.grad, gradient / 2)


@pytest.mark.parametrize("method", ["d3po", "spo"])
def test_on_policy_resumed_and_by_two_processes(tmp_path, monkeypatch, method):
    """A resumed run is the straight one, bit for bit. Two processes train what one does."""
    monkeypatch.setattr(distance, "report_toy", print)
    line = f"--toy --method {method} --sampling-steps 4 --batch 8 --steps 2 --save-every 1 --out "

    def train(name):
        on_policy.main(f"{line} {tmp_path / name}".split())
        return weights(tmp_path / name)

    straight = train("straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "again")
    for name in ("policy", "checkpoint-00000002"):
        shutil.rmtree(tmp_path / "again" / name)
    assert same(train("again"), straight)
    in_two_processes(on_policy, f"{line} {tmp_path / 'two'}")
    assert same(weights(tmp_path / "two"), straight, rtol=1e-3, atol=1e-5)


def test_on_policy_on_images(tiny, tmp_path):
    """The whole path, from a file of prompts to a UNet that has moved, starts at log 2."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n\na green ground\n")
    flags = (
        f"--model {tiny}/tiny-sdxl --data {tmp_path}/prompts.txt --scorer {tiny}/tiny-clip"
        " --method spo --resolution 64 --batch 2 --steps 2 --sampling-steps 3 --lr 1e-3"
        f" --workers 0 --lora 0 --sample-every 0 --precision bf16 --out {tmp_path}/run"
    )
    on_policy.main(flags.split())
    first, second = metrics(tmp_path / "run")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert second["loss"] != first["loss"]
    assert not same(weights(tmp_path / "run", "unet"), weights(tiny / "tiny-sdxl", "unet"))


def test_conditions_and_scores_of_images(tiny):
    """With guidance the condition of no prompt comes first. The scorer is shown the decoded images,
    n for each prompt, and their order is kept."""
    scorer = mock.Mock(return_value=(torch.arange(6), None))
    line = f"--model {tiny}/tiny-sdxl --data {tiny}/pairs.parquet --resolution 64"
    task = on_policy.make_task(on_policy.parse(line.split()), torch.device("cpu"), scorer)
    batch = {"prompt": ["a hen", task.pairs[5, 2]["prompt"]]}
    empty, cond = task.conditions(batch)
    assert same(empty, dpo.encode_prompts(task.pipe, ["", ""], 64))
    assert same(cond, dpo.encode_prompts(task.pipe, batch["prompt"], 64))

    x_0 = torch.randn(2, 3, *task.shape, generator=dpo.seeded_generator("test"))
    assert task.score(x_0, batch).tolist() == [[0, 1, 2], [3, 4, 5]]
    images, prompts = scorer.call_args.args
    assert prompts[2:4] == batch["prompt"]
    with torch.no_grad():
        pixels = task.pipe.vae.decode(x_0[1, :1] / task.pipe.vae.config.scaling_factor).sample
    wanted = task.pipe.image_processor.postprocess(pixels)[0]
    assert numpy.allclose(images[3], wanted, atol=1)
    assert task.step_unit == 1 / 256


@pytest.mark.parametrize(
    "line, expected",
    [
        ("--toy --method d3po --method spo", {"beta": 10, "clip": 0}),
        ("--model sdxl --data p.txt --method=spo", {"beta": 10, "lora": 64}),
    ],
)
def test_defaults_by_method(line, expected):
    """Defaults are those of the released codes and of the method, however that is written."""
    found = vars(on_policy.parse(line.split()))
    assert found | expected == found


@pytest.mark.parametrize(
    "line",
    [
        "--draws 2 --toy",
        "--sampling-steps 101 --toy --out absent",
        "--model sd35 --data p.txt",
    ],
)
def test_wrong_input_of_on_policy(line):
    """It is refused by the name of its flag."""
    with pytest.raises(dpo.UserError, match=line.split()[0]):
        on_policy.main(line.split())


# ------------------------------------------------------------------------------ figure.py: pictures


def image_task(tiny, monkeypatch, kind, flags):
    """A task whose pipeline samples in two steps."""
    task = sd_task(tiny, f"tiny-{kind}", flags)
    pipeline = type(task.pipe)
    in_two_steps = partialmethod(pipeline.__call__, num_inference_steps=2)
    monkeypatch.setattr(pipeline, "__call__", in_two_steps)
    return task


@pytest.mark.parametrize("lora", [0, 2])
def test_sheet_shows_reference_and_policy(tiny, tmp_path, monkeypatch, lora):
    """The left column is the reference and the right one the policy, from the same noise. They are
    equal before training, and then only the right one changes. A picture that failed does not turn
    the policy into the reference."""
    task = image_task(tiny, monkeypatch, "sd15", f"--lora {lora} --lr 1")
    sheets = []
    for name in ("before.png", "after.png"):
        figure.draw(task, tmp_path / name, [])
        sheets.append(numpy.array(Image.open(tmp_path / name)))
        change_weights(task)
    before, after = sheets
    reference = before[:, :64]
    assert reference.shape == (12 * 64, 64, 3)
    assert (before[:, 64:] == reference).all()
    assert (after[:, :64] == reference).all()
    assert (after[:, 64:] != reference).any()

    drawn = figure.sample_images(task, "policy", [("a cat", 0)])
    with pytest.raises(KeyError), figure.network_of(task, "reference"):
        raise KeyError
    assert figure.sample_images(task, "policy", [("a cat", 0)]) == drawn


@pytest.mark.parametrize("flags, rows", [("", 2), ("--guidance 1", 1)])
def test_how_an_image_is_sampled(tiny, monkeypatch, flags, rows):
    """The network is called with and without the prompt, unless --guidance is 1. With --precision
    bf16 the latents stay in fp32 to the end."""
    task = image_task(tiny, monkeypatch, "sdxl", f"--precision bf16 --lora 2 --lr 1 {flags}")
    sizes, vae = [], task.pipe.vae
    task.policy.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    with mock.patch.object(vae, "decode", wraps=vae.decode) as decode:
        figure.sample_images(task, "policy", [("a cat", 0)])
    assert set(sizes) == {rows}
    latents = decode.call_args.args[0]
    assert latents.dtype == torch.float32
    assert not torch.equal(latents, latents.bfloat16().float())


def means_of(ax):
    """The mean height of each line."""
    return [float(numpy.mean(line.get_ydata())) for line in ax.get_lines()]


def test_figures_of_a_run(tmp_path, monkeypatch):
    """toy.png shows the densities with their distances to p*, the metrics, and the limits that
    follow from the labels' reward. `figure.py RUN...` shows each run's metrics by its name, and
    passes over a torn last line."""
    pyplot = figure.load_pyplot()
    monkeypatch.setattr(pyplot, "close", print)
    run = str(tmp_path / "run")
    toy = dpo.Toy(parse(dpo, f"--steps 4 --eval-every 4 --draws 10 --out {run}"))
    *rows, held_out = dpo.train(toy, toy.cfg)
    numbers, densities = distance.measure_toy(toy, 1000)
    figure.draw(toy, tmp_path / "toy.png", [*rows, held_out], numbers, densities)
    axes = pyplot.gcf().axes
    for ax, (name, p) in zip(axes[1:5], densities.items(), strict=True):
        assert f"{numbers[f'tv_{name}']:.3f}" in ax.get_title()
        assert numpy.allclose(ax.get_images()[0].get_array(), p.T.sqrt())
    loss, accuracy, errors, _ = map(means_of, axes[5:])
    true = dpo.toy_reward(toy.pairs.x_w) - dpo.toy_reward(toy.pairs.x_l)
    nothing, everything, policy = loss
    assert nothing == pytest.approx(math.log(2))
    assert everything == pytest.approx(-logsigmoid(true).mean().item())
    assert policy == pytest.approx(numpy.mean([row["loss"] for row in rows]), rel=1e-5)
    assert accuracy[-1] == held_out["held_out_reward_accuracy"]
    rises = [row["err_policy_l"] - row["err_ref_l"] for row in rows]
    assert errors[1] == pytest.approx(numpy.mean(rises), abs=1e-5)

    with open(f"{run}/metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    figure.main([run, run])
    loss = pyplot.gcf().axes[0]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == [run, run]
    assert means_of(loss) == [policy, policy]


# ----------------------------------------------------------------------------------------- study.py


@pytest.fixture
def few_samples(monkeypatch):
    """The policy is compared with p* by a few hundred samples."""
    measure_toy = distance.measure_toy
    monkeypatch.setattr(distance, "measure_toy", lambda toy, samples=0: measure_toy(toy, 500))


def build(flags="", **changes):
    return study.build(study.Job(**changes), parse(dpo, flags))


def set_last_layer(toy, *bias):
    toy.policy.net[-1].bias.data = torch.tensor(bias)


PAIR = (1.0, 1.2, 1.1, 1.0)


@pytest.mark.parametrize(
    "remedy, errors, factors",
    [
        # errors e_w, e_l, r_w, r_l; minus the gradient of the loss by e_w and by e_l
        (remedies.ipo, PAIR, (-0.3, 0.3)),
        (remedies.label_smoothing, PAIR, (-0.452, 0.452)),
        (remedies.sft_mix, PAIR, (-1.102, 0.602)),
        (remedies.strong_sft_mix, PAIR, (-0.852, 0.602)),
        (remedies.dpop, PAIR, (-0.602, 0.602)),
        (remedies.dpop, (1.2, 1.0, 1.1, 1.2), (-4.621, 1.066)),
        (remedies.clamp, (0.5, 1.2, 1.1, 1.0), (0, 0)),
        (remedies.half_loser, PAIR, (-0.602, 0.301)),
        (study.sft_too_loss, PAIR, (-0.632, 0.602)),
        (partial(study.anchored_loss, anchor=0.5), PAIR, (-0.878, 0.397)),
        (study.exact_margin_loss, PAIR, (-0.531, 0.531)),
    ],
)
def test_remedies_by_hand(remedy, errors, factors):
    """How the loss of one pair at beta 1 and gamma 0.5 falls with the two errors of the policy.
    log p_ref is -0.2 and -0.5."""
    errors = torch.tensor(errors)[:, None].requires_grad_()
    cfg = SimpleNamespace(beta=1.0, gamma=0.5)
    task = SimpleNamespace(cfg=cfg, reference=SimpleNamespace(log_prob=torch.neg))
    batch = {"x_w": torch.tensor([0.2]), "x_l": torch.tensor([0.5])}
    losses, _ = remedy(task, batch, errors.unbind())
    losses.sum().backward()
    assert (-errors.grad[:2, 0]).tolist() == pytest.approx(factors, abs=1e-3)


def test_sdpo_keeps_the_preferred_error_falling():
    """A rejected gradient along the preferred one is scaled down to a tenth of that. One that
    points away from it is left as it is."""
    task = SimpleNamespace(cfg=SimpleNamespace(beta=2.0, gamma=0.0))
    for rejected, scale in ((4.0, 0.025), (-4.0, 1), (0.05, 1)):
        task.output = torch.tensor([[1.0], [rejected]], requires_grad=True)
        err_w, err_l = task.output.square().unbind()  # their gradients are 2 and 2 * rejected
        losses, _ = remedies.sdpo(task, None, (err_w, err_l, err_w.detach(), err_l.detach()))
        losses.sum().backward()
        preferred, other = task.output.grad[:, 0].tolist()
        assert other / preferred == pytest.approx(-rejected * scale)


def test_moving_reference_follows():
    """It goes a hundredth of the way to the policy. In the end the first reference is back."""
    toy = build()
    first = toy.reference
    with remedies.prepared(toy, remedies.moving_reference):
        change_weights(toy, by=1.0)
        remedies.moving_reference(toy, None, torch.ones(4, 1))
        gap = toy.policy.net[0].bias - toy.reference.net[0].bias
        assert gap.tolist() == pytest.approx([0.99] * len(gap))
    assert toy.reference is first


def test_drift_of_a_known_policy():
    """Without a reward p* is p_ref. A policy off by a constant c is off by T omega |c|^2 at every
    noise level, all of it common, and its log-ratios lose nats."""
    toy = build(reward=study.no_reward)
    set_last_layer(toy, 0.3, 0.0)
    found = study.drift(toy)["drift"]
    assert found["policy"] == pytest.approx((0.09 * toy.weight[[*study.LEVELS]]).tolist(), rel=0.1)
    assert found["common"] == pytest.approx(found["policy"], rel=0.05)
    assert max(found["reference"]) < 0.02
    assert 0.1 < study.judgement(toy, 1000)["nats_lost"] < 0.09 * toy.weight.mean()
    toy.reward = dpo.toy_reward
    found = study.drift(toy)["drift"]
    assert found["common"][0] < 0.9 * found["policy"][0]  # p* has other corrections elsewhere


@pytest.mark.parametrize("gamma, tolerance", [(0, 1e-3), (0.5, 0.02)])
def test_denoiser_of_the_optimum(gamma, tolerance):
    """It is E[eps | x_t] under p*, summed over a grid."""
    toy = build(f"--gamma {gamma}")
    grid = distance.grid_points()
    x_t = torch.randn(40, 2, generator=dpo.seeded_generator("test"))
    a_t, s_t = dpo.signal_and_noise(toy.alphas_cumprod[50], "epsilon")
    squares = (x_t[:, None] - a_t * grid).square().sum(2)
    log_p = toy.log_optimum(grid) - squares / (2 * s_t**2)
    by_grid = (x_t - a_t * (log_p.softmax(1) @ grid)) / s_t
    found = study.Optimum(toy)(x_t, torch.full((40,), 50))
    assert (found - by_grid).abs().max() < tolerance


def test_a_reward_model():
    """The p* of a reward that is learnt from 8000 labels is near p*."""
    assert study.reward_model(build("--steps 250 --batch 32"))["tv_policy"] < 0.2


def test_a_distilled_job(monkeypatch):
    """With the log-ratios of p*, a new policy comes near p*. A job is measured after that."""
    monkeypatch.setattr(study, "log_ratios", lambda toy, x: toy.reward(x) / toy.cfg.beta)
    short = partial(study.distill, samples=4000, steps=150, batch=256)
    monkeypatch.setattr(study, "distill", short)
    job = study.Job("--steps 1 --batch 4 --eval-every 0", distilled=True, samples=4000)
    numbers = study.run(job)
    assert numbers["tv_policy"] < 0.5 * numbers["tv_reference"]


@pytest.mark.parametrize(
    "script, method, flags, loss",
    [
        (dpo, "dpo", "--gamma 0.5 --eval-every 4", None),
        (dpo, "dpo", "--gamma 0.5 --eval-every 0", mock.Mock(wraps=remedies.plain)),
        (dpo, "sft", "--eval-every 0", None),
        (on_policy, "spo", "--sampling-steps 3 --gamma 5", None),
    ],
)
def test_a_job_is_the_run_of_the_script(script, method, flags, loss, few_samples, tmp_path):
    """With the same flags it ends with the weights of the script, and so does its curve."""
    flags = f"--steps 4 --batch 4 --sample-every 2 {flags}"
    numbers = study.run(study.Job(flags, seed=1, method=method, loss=loss))
    line = f"--method {method} --seed 1 {flags} --out {tmp_path}"
    with mock.patch.object(dpo, "save_picture"):
        script.main(["--toy", *line.split()])
    toy = dpo.Toy(parse(script, line))
    toy.load(tmp_path / "policy")
    wanted, _ = distance.measure_toy(toy)
    assert numbers | wanted == numbers
    assert numbers["curve"][1] == wanted | {"step": 4}
    assert loss is None or loss.called


def test_proxy_is_hacked(few_samples):
    """A proxy makes the labels. At its p* a smaller beta has more of the proxy and less of the true
    reward, of which it ends with less than the reference."""
    job = study.Job(reward=study.toy_proxy)
    toys = [study.build(job, parse(dpo, f"--beta {beta}")) for beta in (2, 0.25)]
    difference = study.toy_proxy(toys[0].pairs.x_w) - study.toy_proxy(toys[0].pairs.x_l)
    assert difference.mean() > 0.3  # by the true reward it would be 0.14
    mild, hacked = (study.measure(toy, job)[0] for toy in toys)
    assert mild["proxy_optimum"] < hacked["proxy_optimum"]
    assert mild["reward_optimum"] > mild["reward_reference"] > hacked["reward_optimum"]


def test_the_whole_study(few_samples, tmp_path, monkeypatch):
    """Every figure and file of numbers of the notebook is made of what the jobs measure. A job that
    is in two experiments is run once, and its numbers are kept: a second call trains nothing."""
    job = study.Job(
        "--steps 4 --batch 4 --sample-every 2 --eval-every 0",
        reward=study.toy_proxy,
        measures=(
            study.drift,
            partial(study.logit_noise, pairs=10),
            partial(study.width, samples=100),
        ),
    )
    names = [name for name in study.EXPERIMENTS if name not in study_faces.EXPERIMENTS]
    for name in names:
        settings = dict.fromkeys(study.EXPERIMENTS[name], job)
        monkeypatch.setitem(study.EXPERIMENTS, name, settings)
    for name, value in {"SEEDS": (0,), "OUT": tmp_path / "out", "draw_default_run": print}.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study_faces, "WORK", tmp_path / "work")
    context = mock.MagicMock()
    context.Pool().__enter__().imap = map  # in this process
    monkeypatch.setattr(study.multiprocessing, "get_context", lambda _: context)
    with mock.patch.object(study, "run", wraps=study.run) as run:
        study.main(names)
        study.main(["b-beta"])
    assert run.call_count == 1

    committed = {path.name for path in Path(study.HERE, "study").iterdir()}
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {name for name in committed if not name.startswith("faces")}
