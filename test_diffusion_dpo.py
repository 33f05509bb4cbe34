"""Proof that diffusion_dpo.py computes what it says. Each test's docstring is one claim.

    pytest                  # under two minutes on two cores, no network, no GPU
    pytest -m slow          # runs killed again and again; a minute more

The yardsticks are independent of the script: closed forms, a literal transcription of the equation,
torch.distributions, diffusers' schedulers and pipelines, and the same run done another way.
"""

import ast
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import tokenize
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]

import datasets
import diffusers
import make_tiny
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import diffusion_dpo as dpo

torch.set_num_threads(1)  # two processes of a test on two cores; and sums in one order
datasets.disable_progress_bars()
for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def handlers():
    """A run that was stopped leaves its handlers of signals: a process does not outlive it."""
    before = [signal.getsignal(number) for number in dpo.STOPPING]
    yield
    for number, handler in zip(dpo.STOPPING, before, strict=True):
        signal.signal(number, handler)


# ------------------------------------------------------------------------------------- the loss

def errors(n=16, seed=0, dtype=torch.float32):
    """Four random (n,) weighted errors."""
    gen = torch.Generator().manual_seed(seed)
    return [torch.rand(n, generator=gen, dtype=dtype) for _ in range(4)]


def test_worked_example():
    """The pair of dpo_loss's docstring: errors 1.0, 1.2, reference 1.1, 1.0, beta 2. For gamma 0
    logit 2 ((1.1 - 1.0) - (1.0 - 1.2)) = 0.6, loss log(1 + e^-0.6) = 0.437488; for gamma 1 logit
    0.6 - 1 (1.0 - 1.2) = 0.8, loss 0.371101, and at step 0 the margin: logit -0.1, 0.744397."""
    for four, gamma, *expected in (
            ((1.0, 1.2, 1.1, 1.0), 0, 0.437488, 0.6), ((1.0, 1.2, 1.1, 1.0), 1, 0.371101, 0.8),
            ((1.1, 1.0, 1.1, 1.0), 1, 0.744397, -0.1)):
        results = dpo.dpo_loss(*(torch.tensor([value]) for value in four), 2.0, gamma)
        assert [value.item() for value in results] == pytest.approx(expected, abs=1e-6)


def literal_loss(e_w, e_l, r_w, r_l, beta, gamma):
    """Eq. 14, and SEE-DPO's logit, with Python floats, one pair at a time."""
    out = []
    for a, b, c, d in zip(*(x.tolist() for x in (e_w, e_l, r_w, r_l)), strict=True):
        inside = -((beta + gamma) * (a - b) - beta * (c - d))
        out.append(-math.log(1 / (1 + math.exp(-inside))))
    return out


@pytest.mark.parametrize("beta, gamma", [(1.0, 0.0), (7.0, 0.0), (1.0, 0.3), (2.0, 5.0)])
def test_loss_is_eq_14(beta, gamma):
    """The loss is Eq. 14 for gamma = 0 and SEE-DPO's for gamma > 0, pair by pair; that is DPO at
    beta + gamma with gamma (log ref_w - log ref_l) added to the logit."""
    _, _, ref_w, ref_l = four = errors(dtype=torch.float64)
    losses, logit = dpo.dpo_loss(*four, beta, gamma)
    assert losses.tolist() == pytest.approx(literal_loss(*four, beta, gamma), rel=1e-9)
    assert torch.allclose(losses, -torch.nn.functional.logsigmoid(logit))
    _, plain = dpo.dpo_loss(*four, beta + gamma)
    assert torch.allclose(logit, plain + gamma * (ref_l - ref_w), atol=1e-13)


def test_loss_at_step_0():
    """policy = reference: loss log 2, logit 0 to the last bit, and a gradient of beta / 2: the loss
    falls when the error on x_w falls, and when that on x_l rises."""
    err_w, err_l = (e.requires_grad_() for e in errors()[:2])
    losses, logit = dpo.dpo_loss(err_w, err_l, err_w.detach(), err_l.detach(), 5000.0)
    losses.sum().backward()
    assert torch.equal(losses, torch.full_like(losses, math.log(2))) and not logit.any()
    assert torch.allclose(err_w.grad, torch.full_like(losses, 2500.0))
    assert torch.equal(err_l.grad, -err_w.grad)


def test_anchor_by_hand():
    """It adds anchor (1 - the mean of p_theta / p_ref over the halves), log-ratios 0.1 and -0.2;
    nothing at step 0, where the ratios are 1; and the logit does not know it."""
    four = [torch.tensor([value]) for value in (1.0, 1.2, 1.1, 1.0)]
    losses, logit = dpo.dpo_loss(*four, 2.0, 0.0, 0.5)
    expected = 0.437488 + 0.5 * (1 - (math.exp(0.1) + math.exp(-0.2)) / 2)
    assert losses.item() == pytest.approx(expected, abs=1e-6) and logit.item() == pytest.approx(0.6)
    assert torch.equal(dpo.dpo_loss(*four[2:], *four[2:], 2.0, 0.0, 0.5)[0],
                       dpo.dpo_loss(*four[2:], *four[2:], 2.0)[0])


def test_loss_is_finite_at_beta_5000():
    """Errors that differ by whole units, either way: loss and gradient stay finite in fp32."""
    four = [torch.tensor([value, 4.0 - value], requires_grad=True) for value in (0.0, 4, 2, 0)]
    (losses := dpo.dpo_loss(*four, 5000.0)[0]).sum().backward()
    assert losses.isfinite().all() and all(e.grad.isfinite().all() for e in four)


# --------------------------------------------------- the forward process, and the pair's errors

def sd_schedule(prediction_type="epsilon"):
    return diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012,
                                   beta_schedule="scaled_linear", prediction_type=prediction_type)


def spy_problem(prediction="epsilon", denoiser=None, weight=1.0):
    """A problem with Stable Diffusion's schedule, and the list of calls its two networks get."""
    calls = []

    class Spy(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name, self.scale = name, torch.nn.Parameter(torch.ones(()))

        def forward(self, x_t, t, **cond):
            calls.append((self.name, x_t.detach(), t, cond, torch.is_grad_enabled()))
            return (denoiser or torch.zeros_like)(x_t) * self.scale

    return SimpleNamespace(
        policy=Spy("policy"), reference=Spy("reference"), prediction=prediction,
        alphas_cumprod=sd_schedule().alphas_cumprod, weight=torch.full((1000,), weight)), calls


def draw(seed, keys, draws, T, shape):
    """t (B, K) and eps (B, K, *shape) of the pairs `keys`."""
    return map(torch.stack, zip(*(dpo.draw_noise(seed, *key, draws, T, shape) for key in keys),
                                strict=True))


def batch_of(B=3, K=2, shape=(4, 8, 8), seed=0):
    gen = torch.Generator().manual_seed(seed)
    x_w, x_l = torch.randn(2, B, *shape, generator=gen)
    t, eps = draw(seed, [(0, row) for row in range(B)], K, 1000, shape)
    return x_w, x_l, t, eps


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_pair_errors_are_the_literal_ones(prediction):
    """One forward per denoiser; its errors are those of a loop over halves, pairs and draws, which
    are averaged: before the log-sigmoid, as dpo_loss takes one error per pair."""
    problem, calls = spy_problem(prediction, denoiser=torch.tanh, weight=0.25)
    x_w, x_l, t, eps = batch_of()
    results = dpo.pair_errors(problem, x_w, x_l, t, eps, {})
    schedule, literal = sd_schedule(), {"w": [], "l": []}
    for half, x in (("w", x_w), ("l", x_l)):
        for i in range(3):
            total = 0.0
            for k in range(2):
                one, noise, at = x[i:i + 1], eps[i, k][None], t[i, k][None]
                x_t, goal = schedule.add_noise(one, noise, at), noise
                if prediction == "v_prediction":
                    goal = schedule.get_velocity(one, noise, at)
                if prediction == "flow":  # the straight line from x_0 to eps, at the same SNR
                    sigma = 1 / (1 + (schedule.alphas_cumprod[at] ** -1 - 1).rsqrt())
                    x_t, goal = (1 - sigma) * one + sigma * noise, noise - one
                total += 0.25 * ((torch.tanh(x_t) - goal) ** 2).sum().item() / 2
            literal[half].append(total)
    for got, half in zip(results, ("w", "l", "w", "l"), strict=True):
        assert got.tolist() == pytest.approx(literal[half], rel=1e-5)
    assert len(calls) == 2


def test_a_flow_is_diffusers():
    """At the SNR of FlowMatchEulerDiscreteScheduler's sigmas, shifted or not, a_t is 1 - sigma, s_t
    is sigma, and x_t is what it makes of the same noise."""
    for shift in 1.0, 3.0:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        sigma = scheduler.sigmas.double()  # near 0 fp32 has not enough digits of 1 - abar
        abar = (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)
        a, s = (each.double() for each in dpo.signal_and_noise(abar, "flow"))
        assert torch.allclose(a, 1 - sigma, atol=1e-6) and torch.allclose(s, sigma, atol=1e-6)
        x_0, eps = torch.randn(2, 1000, 4)
        x_t = scheduler.scale_noise(x_0, scheduler.timesteps, eps).double()
        assert torch.allclose(a[:, None] * x_0 + s[:, None] * eps, x_t, atol=1e-5)


def test_a_pair_shares_t_and_noise():
    """Both halves of a pair meet the same t and eps; prompts go with their own half; K draws of one
    pair differ. The reference runs first and without grad: nothing of it is left to train."""
    problem, calls = spy_problem()
    x_w, _, t, eps = batch_of(B=2, K=3)
    four = dpo.pair_errors(problem, x_w, x_w, t, eps, {"prompt": torch.arange(4.0)[:, None]})
    assert torch.equal(four[0], four[1]) and torch.equal(four[2], four[3])
    assert [(name, grad) for name, *_, grad in calls] == [("reference", False), ("policy", True)]
    for _, x_t, at, got, _ in calls:
        assert torch.equal(x_t[:6], x_t[6:]) and torch.equal(at[:6], at[6:])
        assert got["prompt"].flatten().tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
        assert len(x_t[:6].flatten(1).unique(dim=0)) == 6
    dpo.dpo_loss(*four, 1.0)[0].sum().backward()
    assert problem.reference.scale.grad is None and problem.policy.scale.grad is not None


def test_errors_are_squared_in_fp32():
    """A bf16 prediction is cast before eps is subtracted: its error equals that of an fp32 copy."""
    half, _ = spy_problem(denoiser=lambda x: torch.tanh(x).bfloat16())
    full, _ = spy_problem(denoiser=lambda x: torch.tanh(x).bfloat16().float())
    both = (dpo.pair_errors(problem, *batch_of(), {}) for problem in (half, full))
    for a, b in zip(*both, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_noise_is_standard_and_t_uniform():
    """eps is N(0, 1), t is uniform on 0 .. T-1, for every one of the K draws. The same seed, epoch
    and row give the same again; another one of them, another."""
    t, eps = draw(0, [(0, row) for row in range(3000)], 4, 10, (2,))
    for k in range(4):
        counts = torch.bincount(t[:, k], minlength=10)
        assert len(counts) == 10 and (counts - 300).abs().max() < 5 * 300**0.5
        assert eps[:, k].mean().abs() < 0.05 and (eps[:, k].std() - 1).abs() < 0.05
    assert torch.equal(eps[:, :2], -eps[:, 2:]) and torch.equal(t[:, :2], t[:, 2:])
    assert torch.equal(dpo.draw_noise(0, 0, 7, 4, 10, (2,))[1], eps[7])
    for other in (1, 0, 7), (0, 1, 7), (0, 0, 8):
        assert not torch.equal(dpo.draw_noise(*other, 4, 10, (2,))[1], eps[7])


def test_weight_is_a_kl_of_gaussians():
    """omega_t ||eps - eps_hat||^2 = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), t > 1."""
    abar = torch.linspace(0.99, 0.01, 7, dtype=torch.float64)
    weight = dpo.elbo_weight(abar)
    x_0, eps, eps_hat = torch.randn(3, 5, dtype=torch.float64)
    for t in range(1, 7):
        a, prev = abar[t], abar[t - 1]
        alpha = a / prev
        x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps

        def posterior(x, x_t=x_t, a=a, prev=prev, alpha=alpha):  # DDPM, Eq. 7
            mean = prev.sqrt() * (1 - alpha) * x + alpha.sqrt() * (1 - prev) * x_t
            std = ((1 - prev) / (1 - a) * (1 - alpha)).sqrt()
            return torch.distributions.Normal(mean / (1 - a), std)

        guess = (x_t - (1 - a).sqrt() * eps_hat) / a.sqrt()
        kl = torch.distributions.kl_divergence(posterior(x_0), posterior(guess)).sum()
        assert torch.isclose(weight[t] / 7 * (eps - eps_hat).square().sum(), kl)
    assert weight[0] == weight[1]
    linear = dpo.elbo_weight(torch.sigmoid(torch.linspace(8, -6, 100)))  # the toy's: T omega_t is
    assert torch.allclose(linear, torch.tensor(50 * (math.exp(14 / 99) - 1)), rtol=1e-3)  # 7.595


# -------------------------------------------------------------------------------------- the toy

@pytest.fixture(scope="module")
def ring():
    return dpo.Ring(torch.sigmoid(torch.linspace(8, -6, 100)))


def test_reference_score_is_the_gradient(ring):
    """eps_ref = -s_t grad log p_t, p_t built by torch.distributions; and as a flow eps_ref - x_ref,
    where x_t = a_t x_ref + s_t eps_ref and a_t = 1 - s_t."""
    x = (2 * torch.randn(64, 2)).requires_grad_()
    for t, prediction in itertools.product((0, 30, 60, 99), ("epsilon", "flow")):
        a, s = dpo.signal_and_noise(ring.alphas_cumprod[t], prediction)
        components = torch.distributions.Independent(torch.distributions.Normal(
            a * ring.means, (a**2 * ring.std**2 + s**2).sqrt().expand(8, 2)), 1)
        mixture = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(torch.ones(8)), components)
        score, = torch.autograd.grad(mixture.log_prob(x).sum(), x)
        at, wanted = torch.full((64,), t), -s * score
        if prediction == "epsilon":
            got = ring(x, at)
        else:
            got = dpo.velocity(ring, ring.alphas_cumprod, x, at)
            wanted = wanted - (x - s * wanted) / a
        assert torch.allclose(got, wanted, atol=1e-4, rtol=1e-4)


def test_optimum_is_optimal(ring):
    """p* sums to 1, is p_ref at zero reward, and maximises E[R] - beta KL + gamma H on a grid that
    knows nothing of the script's: the gradient is 0 there (and the objective is concave)."""
    beta, gamma = 0.5, 0.25
    p_star, mean_star = dpo.toy_optimum(ring, beta, gamma)
    assert p_star.sum().item() == pytest.approx(1) and p_star.min() >= 0
    axis = (torch.arange(120) + 0.5) / 12 - 5
    x = torch.cartesian_prod(axis, axis).double()
    log_ref, reward = ring.log_prob(x).log_softmax(0), dpo.toy_reward(x)
    def objective(log_p):
        log_p = log_p.log_softmax(0)
        return (log_p.exp() * (reward - beta * (log_p - log_ref) - gamma * log_p)).sum()

    best = ((beta * log_ref + reward) / (beta + gamma)).requires_grad_()
    gradient, = torch.autograd.grad(objective(best), best)
    assert gradient.abs().max() < 1e-12
    p = best.softmax(0).detach()
    assert torch.allclose(p.view(30, 4, 30, 4).sum((1, 3)), p_star, atol=1e-4)
    assert (p * reward).sum().item() == pytest.approx(mean_star(dpo.toy_reward), abs=1e-3)
    nothing = dpo.toy_optimum(ring, beta, 0.0, lambda x: 0 * x[:, 0])[0]
    assert torch.allclose(nothing, dpo.toy_density(ring.log_prob)[0])


def test_histogram_and_density_agree(ring):
    """Samples of p_ref fill the squares as its density says; TV and entropy have known values."""
    p, mean = dpo.toy_density(ring.log_prob)
    x = ring.sample(200_000, dpo.generator("test"))
    assert dpo.total_variation(dpo.toy_histogram(x), p) < 0.02
    assert dpo.toy_reward(x).mean().item() == pytest.approx(mean(dpo.toy_reward), abs=0.01)
    left, right, far = (dpo.toy_histogram(torch.tensor([[at, -4.9]])) for at in (-4.9, 4.9, 9.0))
    assert left[0, 0] == 1 and right[-1, 0] == 1 and not far.any()
    assert dpo.total_variation(left, left) == 0 and dpo.total_variation(left, right) == 1
    assert dpo.total_variation(left, far) == 1  # what left the plot counts
    assert dpo.entropy(torch.full((30, 30), 1 / 900)) == pytest.approx(math.log(100))  # 10 x 10


@pytest.mark.parametrize("kind, eta", [("DDPMScheduler", 1), ("DDIMScheduler", 0)])
def test_sampler_is_diffusers(ring, kind, eta):
    """toy_sample with the toy's schedule equals a DDPMScheduler fed with the same noise, and at eta
    = 0 a DDIMScheduler."""
    abar = ring.alphas_cumprod
    alphas = abar / torch.cat([torch.ones(1), abar[:-1]])
    scheduler = getattr(diffusers, kind)(
        num_train_timesteps=100, trained_betas=(1 - alphas).numpy(), clip_sample=False)
    scheduler.set_timesteps(100)
    gen = dpo.generator("test")
    x = torch.randn(500, 2, generator=gen)
    for t in reversed(range(100)):
        x = scheduler.step(ring(x, torch.full((500,), t)), t, x, generator=gen).prev_sample
    drawn = dpo.toy_sample(ring, abar, 500, dpo.generator("test"), eta)
    assert torch.allclose(drawn, x, atol=1e-3)


def test_what_anchor_measures(ring):
    """The mean of exp(r - e) over samples of p_ref is 1 if the policy is the denoiser of a density,
    here of the ring with other shares of its modes; and less if all its predictions are shifted by
    a constant, although what that costs cancels between the halves of a pair."""
    shares = torch.linspace(-1, 1, 8).softmax(0)

    class Other(dpo.Ring):
        def __call__(self, x_t, t):
            abar_t = self.alphas_cumprod[t][:, None]
            variance = abar_t * self.std**2 + 1 - abar_t
            away = x_t[:, None] - abar_t[..., None].sqrt() * self.means
            near = (shares.log() - away.square().sum(-1) / (2 * variance)).softmax(1)
            return (1 - abar_t).sqrt() * (near[..., None] * away).sum(1) / variance

    x, other = ring.sample(1000, dpo.generator("anchor")), Other(ring.alphas_cumprod)
    t, eps = draw("anchor", [(0, row) for row in range(1000)], 400, 100, (2,))
    for shift, low, high in (0.0, 0.93, 1.07), (0.3, 0.4, 0.7):
        problem = SimpleNamespace(
            policy=lambda x_t, t, shift=shift: other(x_t, t) + shift, reference=ring,
            alphas_cumprod=ring.alphas_cumprod, weight=dpo.elbo_weight(ring.alphas_cumprod),
            prediction="epsilon")
        err, _, ref_err, _ = dpo.pair_errors(problem, x, x, t, eps, {})
        assert low < (ref_err - err).exp().mean().item() < high


# ------------------------------------------------------------------------------ preference data

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


def image_pairs(data, **flags):
    words = {"resolution": 32, "caption-dropout": 0} | flags
    argv = ["--model", "sd15", "--data", str(data)]
    return dpo.ImagePairs(dpo.parse(argv + [f"--{k}={v}" for k, v in words.items()]), "train")


def colours(item):
    """The colour in the middle of the two images of an item, as words."""
    return ["red" if r > b else "blue" for r, _, b in item["images"][:, :, 16, 16].tolist()]


def test_ties_are_dropped_without_decoding(tmp_path, capsys):
    """Ties (and missing labels) go, by their label alone: their images are not even images. Missing
    captions are counted. --split can cut, also a single file, whose only split is train."""
    rows = [pick(caption=None), *(pick(label, b"not an image") for label in (0.5, None, 0.5))]
    pairs = image_pairs(path := parquet(tmp_path / "pairs.parquet", rows))
    assert len(pairs) == 1 and "1 pairs; 3 ties" in capsys.readouterr().out
    assert colours(pairs[0, 0]) == ["red", "blue"]
    assert [dpo.load_pairs(path, f"train[{cut}]")[2] for cut in (":2", "-1:")] == [[1, 0.5], [0.5]]


def test_preferred_comes_first(tmp_path):
    """label_0 = 1 prefers jpg_0, label_0 = 0 jpg_1; chosen, preferred and path1 are preferred, in
    tables of images and in lists of files beside pairs.jsonl or HPDv3's train.json."""
    pairs = image_pairs(parquet(tmp_path / "pick.parquet", [pick(1.0), pick(0.0)]))
    assert colours(pairs[0, 0]) == ["red", "blue"] == colours(pairs[0, 1])[::-1]
    (tmp_path / "hub").mkdir()
    parquet(tmp_path / "hub" / "train-00000-of-00001.parquet", [
        {"prompt": "p", "rejected": {"bytes": jpeg("blue"), "path": None},
         "chosen": {"bytes": jpeg("red"), "path": None}}])
    assert colours(image_pairs(tmp_path / "hub")[0, 0]) == ["red", "blue"]
    (tmp_path / "own").mkdir()
    for name in ("red", "blue"):
        (tmp_path / "own" / f"{name}.jpg").write_bytes(jpeg(name))
    line = {"prompt": "p", "preferred": "blue.jpg", "rejected": "red.jpg"}
    (tmp_path / "own" / "pairs.jsonl").write_text(json.dumps(line) + "\n")
    assert colours(image_pairs(tmp_path / "own")[0, 0]) == ["blue", "red"]
    line = {"prompt": "p", "path1": "own/red.jpg", "path2": "own/blue.jpg", "confidence": 0.9}
    (tmp_path / "train.json").write_text(json.dumps([line]))
    assert colours(image_pairs(tmp_path / "train.json")[0, 0]) == ["red", "blue"]


def test_a_pair_is_flipped_and_cut_as_one(tmp_path):
    """A corner painted white stays the same corner in both halves, in every epoch; all four cases
    of flip and cut occur, and two images of different size keep the same place in the frame."""
    def corner(size):
        image = Image.new("RGB", size, "black")
        image.paste("white", (0, 0, size[0] // 2, size[1] // 2))
        return jpeg(image, quality=95)

    pair = pick(1.0, corner((80, 40)), corner((160, 80)))
    pairs = image_pairs(parquet(tmp_path / "pairs.parquet", [pair]))
    seen = set()
    for epoch in range(60):
        left, right = pairs[epoch, 0]["images"].float()
        assert (left - right).abs().mean() < 12
        seen.add(tuple((left[0, 4, [2, 29]] > 127).tolist()))
    assert seen == {(True, True), (True, False), (False, True), (False, False)}


def test_a_pair_loses_its_caption_as_one(tmp_path):
    """A pair has one prompt; it is dropped for about the share asked for, and never otherwise."""
    path = parquet(tmp_path / "pairs.parquet", [pick(caption="a cat"), pick(caption=None)])
    pairs = image_pairs(path, **{"caption-dropout": 0.3})
    dropped = [pairs[epoch, 0]["prompt"] == "" for epoch in range(300)]
    assert 60 < sum(dropped) < 120
    assert [image_pairs(path)[0, row]["prompt"] for row in (0, 1)] == ["a cat", ""]


def test_held_out_pairs_are_shown_plainly(tmp_path):
    """A pair to be judged comes with its caption, its middle, not flipped, whatever the seed."""
    ramp = jpeg(Image.linear_gradient("L").rotate(90).resize((128, 64)), quality=95)
    path = parquet(tmp_path / "pairs.parquet", [pick(1.0, ramp, ramp, caption="a ramp")])
    for seed in range(4):
        item = image_pairs(path, **{"caption-dropout": 1, "seed": seed})[dpo.HELD_OUT, 0]
        assert item["prompt"] == "a ramp"
        assert item["images"][0, 0, 16, 2] < 90 and item["images"][0, 0, 16, 29] > 165


def test_square_is_scaled_and_cut():
    """The short side is scaled, bilinear and antialiased, and cut where it should be."""
    noise = torch.randint(256, (1, 3, 96, 48), dtype=torch.uint8, generator=dpo.generator("test"))
    whole = torch.nn.functional.interpolate(noise, (64, 32), mode="bilinear", antialias=True)[0]
    pixels = dpo.square(Image.fromarray(noise[0].permute(1, 2, 0).numpy()), 32, 0.5, 0.25, False)
    assert (pixels.int() - whole[:, 8:40].int()).abs().max() < 3
    flipped = Image.fromarray(noise[0].flip(2).permute(1, 2, 0).numpy())
    assert torch.equal(dpo.square(flipped, 32, 0.5, 0.25, flip=True), pixels)


def test_every_readable_image_is_read_right():
    """CMYK, grey, palette, transparent and EXIF-rotated images come out upright in RGB."""
    read = lambda data: dpo.read_image({"bytes": data, "path": None}, Path())  # noqa: E731
    assert read(jpeg((0, 255, 255, 0), mode="CMYK")).getpixel((5, 5))[0] > 240
    assert read(jpeg(128, mode="L")).getpixel((5, 5)) == (128,) * 3
    palette = Image.new("RGB", (32, 32), "blue").convert("P", palette=Image.Palette.ADAPTIVE)
    assert read(jpeg(palette, form="PNG")).getpixel((5, 5)) == (0, 0, 255)
    assert read(jpeg((0, 0, 0, 0), mode="RGBA", form="PNG")).getpixel((5, 5)) == (255,) * 3
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    assert read(jpeg("red", size=(40, 20), exif=exif)).size == (20, 40)


def test_unreadable_pairs_are_skipped_the_same_way_every_time(tmp_path):
    """Truncated, not an image, empty, 1 x 1, null: the next readable pair steps in, whether after
    it or from the start again, and the item says which rows of the file could not be read, and why.
    So does what may do harm: bombs, files elsewhere, formats for which PIL starts programs."""
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    broken = [jpeg(noise)[:900], b"GIF, honestly", b"", jpeg(size=(1, 1))]
    a, b, c, d = broken = [pick(1.0, data) for data in broken]
    rows = [pick(0.5), a, pick(caption="first"), b, pick(caption="sound"), c, d]
    pairs = image_pairs(parquet(tmp_path / "pairs.parquet", [*rows, pick() | {"jpg_1": None}]))
    for _ in range(2):
        items = [pairs[epoch, row] for epoch, row in ((0, 0), (0, 2), (0, 3), (3, 5))]
        assert [item["prompt"] for item in items] == ["first", "sound", "sound", "first"]
        assert [item["unreadable"].count("row ") for item in items] == [1, 1, 0, 3]
    assert "row 6: jpg_0, 1 x 1" in items[3]["unreadable"]
    assert "truncated" in items[0]["unreadable"]
    (root := tmp_path / "own").mkdir()
    for place, data in {
            "bomb": jpeg(size=(8200, 8200), form="PNG"), "eps": jpeg(form="EPS"), "../up": jpeg(),
            "grey": jpeg(0x8080, mode="I;16", form="PNG"), f"/{tmp_path}/up": jpeg(),
            "strip": jpeg(size=(8, 512))}.items():
        (root / place).write_bytes(data)
        with pytest.raises((ValueError, OSError), match="8200 x|8 x|cannot identify|I;16|not in "):
            dpo.read_image({"path": place, "bytes": None}, root)
    nothing = image_pairs(parquet(tmp_path / "none.parquet", broken[:2]))
    with pytest.raises(dpo.Refusal, match="pair after pair; the last: row 1: jpg_0, can"):
        nothing[0, 0]


# ------------------------------------------------------------------------------ Stable Diffusion

KINDS = ("sd15", "sdxl", "sd35")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with tiny-sd15, tiny-sdxl, tiny-sd35, tiny-clip and pairs.parquet."""
    folder = tmp_path_factory.mktemp("tiny")
    for kind in KINDS:
        make_tiny.make_model(folder / f"tiny-{kind}", kind)
    make_tiny.make_scorer(folder / "tiny-clip")
    make_tiny.make_pairs(folder / "pairs.parquet")
    return folder


def sd_problem(cfg):
    return dpo.make_problem(cfg, torch.device("cpu"))


def batch_of_pairs(problem, *keys, draws=1):
    """The batch of `keys` as the loop gets it."""
    noised = dpo.Noised(problem.pairs, problem, problem.cfg.seed, draws)
    return torch.utils.data.default_collate([noised[key] for key in keys])


def errors_on(problem, batch):
    with torch.no_grad(), dpo.autocast(problem):
        x_w, x_l, cond = problem.encode(batch)
        return dpo.pair_errors(problem, x_w, x_l, batch["t"], batch["eps"], cond)


def sd_config(tiny, kind, *argv):
    return dpo.parse(["--model", str(tiny / f"tiny-{kind}"), "--data", str(tiny / "pairs.parquet"),
                      "--resolution", "64", "--batch", "4", "--micro-batch", "2", "--steps", "4",
                      "--workers", "0", *argv])


@pytest.mark.parametrize("kind", [*KINDS, "sd35 without T5"])
def test_prompt_embeddings_by_hand(tiny, tmp_path, kind):
    """encode_prompts equals tokenizers and text encoders called by hand, prompts too long included;
    no prompt is "" for SD1.5 and SD3 and zeros for SDXL; without T5 its part is zeros."""
    folder, kind, *without = tiny, *kind.split(maxsplit=1)
    if without:
        folder = tmp_path
        make_tiny.make_model(folder / "tiny-sd35", "sd35", t5=None)
    cfg = sd_config(folder, kind, "--data", str(tiny / "pairs.parquet"))
    problem = sd_problem(cfg)
    prompts, pipe = ["a red circle", "word " * 200, ""], problem.pipe
    cond = problem.encode_prompts(prompts)
    def by_hand(tokenizer, encoder, length=77):
        ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True,
                        return_tensors="pt").input_ids
        return encoder(ids, output_hidden_states=True)

    first = by_hand(pipe.tokenizer, pipe.text_encoder)
    if kind == "sd15":
        assert torch.equal(cond["prompt"], first[0])
        return
    second = by_hand(pipe.tokenizer_2, pipe.text_encoder_2)
    both = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], 2)
    if kind == "sd35":
        t5 = torch.zeros(3, 256, 64)
        if not without:
            t5 = by_hand(pipe.tokenizer_3, pipe.text_encoder_3, 256)[0]
            assert t5.std() > 0
        both = torch.nn.functional.pad(both, (0, 64 - both.shape[2]))
        assert torch.equal(cond["prompt"], torch.cat([both, t5], 1))
        assert torch.equal(cond["pooled_projections"], torch.cat([first[0], second[0]], 1))
    else:
        for got, expected in (cond["prompt"], both), (cond["text_embeds"], second[0]):
            assert torch.equal(got[:2], expected[:2]) and not got[2].any()
        assert cond["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stable_diffusion_starts_at_log_2(tiny, kind, precision):
    """Before the first step policy = reference, to the last bit, also when one has fp32 weights
    under autocast and the other bf16 weights; beta is on half the mean squared error; and both
    halves of a pair have the same condition, though their images differ in size, in training and
    when they are judged."""
    problem = sd_problem(sd_config(tiny, kind, "--precision", precision, "--checkpointing", "on",
                                   "--lora", "0", "--lr", "1e-5"))
    sizes = [{Image.open(io.BytesIO(row[side]["bytes"])).size for side in ("jpg_0", "jpg_1")}
             for row in problem.pairs.table]
    row = list(map(len, sizes)).index(2)
    batch = batch_of_pairs(problem, (0, row), (dpo.HELD_OUT, row))
    x_w, x_l, cond = problem.encode(batch)
    shape = (16 if kind == "sd35" else 4), 8, 8
    assert x_w.shape == (2, *shape) and problem.weight[0].item() == 1 / (2 * math.prod(shape))
    assert set(cond) == {"prompt", *{"sd15": (), "sdxl": ("text_embeds", "time_ids"),
                                     "sd35": ("pooled_projections",)}[kind]}
    assert all(torch.equal(*value.chunk(2)) for value in cond.values())
    err_w, err_l, ref_w, ref_l = errors_on(problem, batch)
    assert torch.equal(err_w, ref_w) and torch.equal(err_l, ref_l)
    assert all(p.dtype == torch.float32 for p in problem.policy.parameters())
    assert not any(p.requires_grad for p in problem.reference.parameters())
    assert problem.policy.network.is_gradient_checkpointing


def test_stable_diffusion_errors_by_hand(tiny):
    """The SDXL error of a pair is half the mean squared error of the plain diffusers UNet."""
    problem = sd_problem(sd_config(tiny, "sdxl", "--caption-dropout", "0"))
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny / "tiny-sdxl")
    batch = batch_of_pairs(problem, (0, 5))
    x_w, x_l, _ = problem.encode(batch)
    results, t, eps = errors_on(problem, batch), batch["t"][0], batch["eps"][0]
    for half, result in zip((0, 1), results[2:], strict=True):
        pixels = batch["images"][:, half] / 127.5 - 1
        latent = pipe.vae.encode(pixels).latent_dist.mean * 0.13025
        assert torch.allclose(latent, (x_w, x_l)[half], atol=1e-5)
        noisy = sd_schedule().add_noise(latent, eps, t)
        embeds, _, pooled, _ = pipe.encode_prompt(batch["prompt"],
                                                  do_classifier_free_guidance=False)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
        hat = pipe.unet(noisy, t, embeds, added_cond_kwargs=added).sample
        assert result.item() == pytest.approx(0.5 * (hat - eps).square().mean().item(), rel=1e-4)


def test_sd35_errors_by_hand(tiny):
    """The error of SD3.5 is half the mean squared error of the plain diffusers transformer's
    velocity, at a noise level of the logit-normal distribution, shifted by 3, that SD3 has; and as
    t is uniform, levels are drawn as diffusers' trainers draw them."""
    problem = sd_problem(sd_config(tiny, "sd35", "--caption-dropout", "0"))
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny / "tiny-sd35")
    batch = batch_of_pairs(problem, (0, 5))
    x_w, x_l, _ = problem.encode(batch)
    results, t, eps = errors_on(problem, batch), batch["t"][0].item(), batch["eps"][0]
    u = 1 / (1 + math.exp(-statistics.NormalDist().inv_cdf((t + 0.5) / 1000)))
    sigma = 3 * u / (1 + 2 * u)
    for half, result in zip((0, 1), results[2:], strict=True):
        pixels = batch["images"][:, half] / 127.5 - 1
        latent = (pipe.vae.encode(pixels).latent_dist.mean - 0.0609) * 1.5305
        assert torch.allclose(latent, (x_w, x_l)[half], atol=1e-5)
        prompt, _, pooled, _ = pipe.encode_prompt(batch["prompt"], None, None,
                                                  do_classifier_free_guidance=False)
        u_hat = pipe.transformer((1 - sigma) * latent + sigma * eps, prompt, pooled,
                                 torch.tensor([1000 * sigma])).sample
        wanted = 0.5 * (u_hat - (eps - latent)).square().mean()
        assert result.item() == pytest.approx(wanted.item(), rel=1e-4)
    ours = dpo.signal_and_noise(problem.alphas_cumprod, "flow")[1]
    torch.testing.assert_close(problem.policy.times, 1000 * ours)
    drawn = diffusers.training_utils.compute_density_for_timestep_sampling(
        "logit_normal", 100_000, 0.0, 1.0, generator=dpo.generator("sigma"))
    theirs = pipe.scheduler.sigmas[(1000 * drawn).long()]
    parts = torch.linspace(0.01, 0.99, 50)
    assert torch.allclose(ours.quantile(parts), theirs.quantile(parts), atol=0.01)


def test_v_prediction_and_folder_not_name(tiny, tmp_path):
    """Architecture and prediction type come from the folder, whatever it is called; a model whose
    noise is another (EDM, a flow whose shift depends on the resolution, a UNet with a flow) is
    refused, and weights that would be unpickled."""
    make_tiny.make_model(tmp_path / "tiny-sd15", "sdxl", prediction_type="v_prediction")
    cfg = sd_config(tmp_path, "sd15", "--data", str(tiny / "pairs.parquet"))
    assert (cfg.preset, cfg.beta, cfg.optimizer) == ("sdxl", 5000.0, "adafactor")
    assert sd_problem(cfg).prediction == "v_prediction"
    pipe = dpo.load_pipeline(cfg.model)
    pipe.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(dpo.Refusal, match="should predict epsilon or v"):
        dpo.StableDiffusion(cfg, "cpu", pipe)
    unet = tmp_path / "tiny-sd15" / "unet" / dpo.WEIGHTS
    torch.save(load_file(unet), unet.with_suffix(".bin"))
    unet.unlink()
    with pytest.raises(OSError, match="safetensors"):
        dpo.load_pipeline(cfg.model)
    sd35 = sd_config(tiny, "sd35")
    for build, scheduler in (("sd35", diffusers.DDPMScheduler()), (
            "sdxl", diffusers.FlowMatchEulerDiscreteScheduler()), (
            "sd35", diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))):
        pipe = dpo.load_pipeline(str(tiny / f"tiny-{build}"))
        pipe.scheduler = scheduler
        with pytest.raises(dpo.Refusal, match="should predict epsilon or v"):
            dpo.StableDiffusion(sd35, "cpu", pipe)


def test_optimizers_are_the_released_ones():
    """A step of AdamW by hand: lr against the gradient's sign, and a decay of 0.01 lr times the
    weight. Adafactor moves a weight by about lr, not by lr times its size, and decays alike."""
    weight = torch.nn.Parameter(torch.tensor([2.0, -2.0]))
    weight.grad = torch.tensor([3.0, -0.5])
    dpo.make_optimizer([weight], dpo.parse(["--model", "sd15", "--lr", "0.1"])).step()
    assert weight.tolist() == pytest.approx([2 * 0.999 - 0.1, -2 * 0.999 + 0.1], abs=1e-5)
    weight = torch.nn.Parameter(torch.full((8, 8), 0.01))
    weight.grad = torch.randn(8, 8)
    optimizer = dpo.make_optimizer([weight], dpo.parse(["--model", "sdxl", "--lr", "1e-3"]))
    optimizer.step()
    assert 3e-4 < (weight - 0.01).abs().mean().item() < 3e-3
    assert optimizer.param_groups[0]["weight_decay"] == 0.01


def test_sft_is_the_denoising_loss_of_diffusers(tiny):
    """--method sft: the gradient is that of mse_loss(unet(noisy), noise) on the preferred images
    alone, as diffusers' text-to-image examples write it."""
    cfg = sd_config(tiny, "sd15", "--method", "sft", "--batch", "2")
    problem = sd_problem(cfg)
    batch = batch_of_pairs(problem, (0, 0), (0, 1))
    sums = dpo.dpo_step(problem, batch, cfg)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny / "tiny-sd15")
    with torch.no_grad():
        latents = pipe.vae.encode(batch["images"][:, 0] / 127.5 - 1).latent_dist.mode() * 0.18215
        hidden, _ = pipe.encode_prompt(batch["prompt"], "cpu", 1, False)
    t, eps = batch["t"][:, 0], batch["eps"][:, 0]
    predicted = pipe.unet(sd_schedule().add_noise(latents, eps, t), t, hidden).sample
    loss = torch.nn.functional.mse_loss(predicted, eps)
    loss.backward()
    assert sums[0].item() / 2 == pytest.approx(loss.item(), rel=1e-5) and sums[1] == 1
    gradients = [{name: p.grad for name, p in unet.named_parameters()}
                 for unet in (problem.policy.network, pipe.unet)]
    assert same(*gradients, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind, precision", [
    ("sd15", "fp32"), ("sdxl", "fp32"), ("sd35", "fp32"), ("sdxl", "bf16"), ("sd35", "bf16")])
def test_lora(tiny, tmp_path, kind, precision):
    """--lora: adapters on every q, k, v and output, of SD3 those for the text, too; policy =
    reference to the last bit before training, the reference stays what it was while only the
    adapters move, in fp32; a run that was stopped ends with the same adapters; what
    pipe.load_lora_weights loads predicts as the policy does; and the file for ComfyUI has kohya's
    names, alpha = rank, and merges into the same weights (SD3's is the one for diffusers)."""
    argv = ["--lora", "4", "--precision", precision, "--lr", "0.03", "--checkpointing", "on",
            "--save-every", "2", "--sample-every", "0"]
    cfg = sd_config(tiny, kind, *argv, "--out", str(tmp_path / "one"))
    problem = sd_problem(cfg)
    part = "transformer" if kind == "sd35" else "unet"
    names = {name for name, module in problem.policy.network.named_modules()
             if re.search(r"\.attn\d?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$", name)}
    assert set(problem.policy.adapters) == {
        f"{part}.{name}.lora_{matrix}.weight" for name in names for matrix in "AB"}
    assert len(names) == {"sd15": 32, "sdxl": 64, "sd35": 3 * 8 - 1 + 2 * 4}[kind]
    batch = batch_of_pairs(problem, (0, 0), (0, 1))
    before = errors_on(problem, batch)
    assert torch.equal(before[0], before[2]) and torch.equal(before[1], before[3])
    trained = [p.dtype for p in problem.policy.parameters() if p.requires_grad]
    assert trained == [torch.float32] * len(problem.policy.adapters)
    plain = sd_problem(sd_config(tiny, kind, "--precision", precision))
    assert torch.equal(errors_on(plain, batch)[2], before[2])
    rows = dpo.train(problem, cfg)
    after = errors_on(problem, batch)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert torch.equal(after[2], before[2]) and not torch.equal(after[0], before[0])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for path in ("lora", "checkpoint-00000004"):
        shutil.rmtree(tmp_path / "two" / path)
    cfg.out = str(tmp_path / "two")
    assert len(dpo.train(sd_problem(cfg), cfg)) == 4  # two of them read, two of them run
    one, two = (load_file(tmp_path / run / "lora" / dpo.LORA_WEIGHTS) for run in ("one", "two"))
    assert same(one, two)
    if precision == "fp32":
        x, merged = (torch.randn(1, *problem.shape), torch.tensor([5])), []
        cond = problem.encode_prompts(["a cat"])
        for file in (None, "kohya.safetensors")[:1 if kind == "sd35" else 2]:
            pipe = diffusers.DiffusionPipeline.from_pretrained(tiny / f"tiny-{kind}")
            pipe.load_lora_weights(tmp_path / "one" / "lora", weight_name=file)
            network = getattr(pipe, part)
            drawn = dpo.NetworkPolicy(network, problem.policy.times)(*x, **cond)
            assert torch.allclose(drawn, problem.policy(*x, **cond), atol=1e-6)
            assert not torch.allclose(drawn, problem.reference(*x, **cond), atol=1e-3)
            pipe.fuse_lora()
            merged.append(network.state_dict())
        file = tmp_path / "one" / "lora" / "kohya.safetensors"
        assert same(merged[0], merged[-1]) and file.exists() == (kind != "sd35")
        kohya = load_file(file) if file.exists() else {}
        assert {name: value for name, value in kohya.items() if value.dim() == 0} == {
            f"lora_unet_{name.replace('.', '_')}.alpha": 4 for name in names if kohya}
        assert len(kohya) in (0, len(one) * 3 / 2)


def test_adapters_start_by_the_seed(tiny):
    """The same seed, the same adapters, on every process and after a restart; those of another
    rank, alpha or network are not loaded."""
    one, two, three = (sd_problem(sd_config(tiny, "sd15", "--lora", "2", "--seed", seed)).policy
                       for seed in "557")
    assert same(one.adapters, two.adapters) and not same(one.adapters, three.adapters)
    one.save(tiny / "adapters" / "rank-2")
    other = {name: p + 1 for name, p in one.adapters.items()}
    save_file(other, tiny / "adapters" / dpo.LORA_WEIGHTS)
    dpo.load_policy(two, tiny / "adapters")
    assert same(two.adapters, other)
    for kind, rank in ("sd15", "1"), ("sdxl", "2"):
        policy = sd_problem(sd_config(tiny, kind, "--lora", rank)).policy
        with pytest.raises(dpo.Refusal, match="not adapters of this rank"):
            dpo.load_policy(policy, tiny / "adapters" / "rank-2")
    save_file(other, tiny / "adapters" / dpo.LORA_WEIGHTS, {  # as diffusers writes it
        "lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 8}'})
    with pytest.raises(dpo.Refusal, match="alpha"):
        dpo.load_policy(one, tiny / "adapters")


# ------------------------------------------------------------------------------------- whole runs

TOY = ["--toy", "--pairs", "500", "--batch", "8", "--micro-batch", "4", "--draws", "2", "--steps",
       "8", "--warmup", "2", "--save-every", "3", "--eval-every", "0"]


def command(*argv, processes=0, script="diffusion_dpo.py"):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(torchrun if processes else []), str(ROOT / script),
            *map(str, argv)]


QUIET = os.environ | {"OMP_NUM_THREADS": "1"}  # no warning of torchrun's


def run(*argv, **how):
    """The command line in a process of its own; returns what it printed."""
    done = subprocess.run(command(*argv, **how), capture_output=True, text=True, env=QUIET,
                          timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def train(*argv):
    """A toy run in this process, without the report."""
    cfg = dpo.parse([str(word) for word in argv])
    dpo.check_out(cfg)
    rows = dpo.train(dpo.Toy(cfg), cfg)
    return rows, weights(cfg.out)


def metrics(out):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def weights(out, folder="policy"):
    return load_file(Path(out) / folder / dpo.WEIGHTS)


def same(a, b, **tolerance):
    close = (lambda x, y: torch.allclose(x, y, **tolerance)) if tolerance else torch.equal
    return a.keys() == b.keys() and all(close(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(rows, weights) of the toy run TOY, undisturbed."""
    return train(*TOY, "--out", tmp_path_factory.mktemp("runs") / "straight")


def test_metrics(straight):
    """A line per step with the promised numbers; step 0 shows log 2, 1/2 and equal errors."""
    first = (rows := straight[0])[0]
    assert [row["step"] for row in rows] == list(range(8))
    assert set(first) == {"step", *dpo.METRICS, "logit_std", "grad_norm", "lr", "unreadable",
                          "pairs_per_s", "peak_memory_gib"} - {"logit_square"}
    assert first["loss"] == pytest.approx(math.log(2)) and first["reward_accuracy"] == 0.5
    assert first["err_policy_w"] == first["err_ref_w"] and first["logit_std"] == 0
    lrs = [row["lr"] / 3e-3 for row in rows]
    assert lrs == pytest.approx([1 / 2, *(n / 8 for n in range(7, 0, -1))])  # warm-up 2, decay 8


def test_a_flow_is_the_same_run(straight, tmp_path, monkeypatch):
    """--prediction flow with the ELBO's weight is the run by epsilon, up to rounding: the same
    errors, the same weights, and the same samples."""
    argv = [*TOY, "--prediction", "flow"]
    rows, result = train(*argv, "--out", tmp_path / "run")
    for row, other in zip(rows, straight[0], strict=True):
        for name in ("loss", "err_policy_w", "err_ref_l", "grad_norm"):
            assert row[name] == pytest.approx(other[name], rel=1e-3), name
    assert same(result, straight[1], atol=1e-4)
    one, two = (dpo.Toy(dpo.parse(words)) for words in (TOY, argv))
    assert not same(result, one.policy.state_dict(), atol=1e-2)
    one.policy.load_state_dict(straight[1]), two.policy.load_state_dict(result)
    monkeypatch.setattr(dpo, "SAMPLES", 2000)
    assert two.measure()[0] == pytest.approx(one.measure()[0], abs=2e-3)


@pytest.mark.parametrize("beta", [0.05, 50])
def test_a_step_by_hand(tmp_path, monkeypatch, beta):
    """A step of accumulated micro-batches, recomputed from all its pairs at once: the metrics are
    means over the batch, and the gradient is that of the mean loss, clipped to norm 1 (plain
    gradient descent shows it; the metrics keep the true norm)."""
    monkeypatch.setattr(dpo, "make_optimizer", lambda p, cfg: torch.optim.SGD(p, lr=cfg.lr))
    cfg = dpo.parse([*TOY, "--steps", "1", "--beta", str(beta), "--gamma", "0.03", "--out",
                     str(tmp_path / "run")])
    problem, trained = dpo.Toy(cfg), dpo.Toy(cfg)
    row, = dpo.train(trained, cfg)
    order = torch.randperm(500, generator=dpo.generator(0, "order", 0))[:8].tolist()
    t, eps = draw(0, [(0, row) for row in order], 2, 100, (2,))
    four = dpo.pair_errors(problem, problem.pairs.x_w[order], problem.pairs.x_l[order], t, eps, {})
    losses, logit = dpo.dpo_loss(*four, beta, 0.03)
    losses.mean().backward()
    norm = torch.stack([p.grad.norm() for p in problem.policy.parameters()]).norm()
    expected = {"loss": losses.mean(), "reward_accuracy": (logit > 0).float().mean(),
                "reward_margin": logit.mean(), "logit_std": logit.std(correction=0),
                "err_policy_w": four[0].mean(), "err_policy_l": four[1].mean(),
                "err_ref_w": four[2].mean(), "err_ref_l": four[3].mean(), "grad_norm": norm}
    for name, value in expected.items():
        assert row[name] == pytest.approx(value.item(), rel=1e-4), name
    assert (norm > 2) == (beta == 50)
    for p, moved in zip(problem.policy.parameters(), trained.policy.parameters(), strict=True):
        assert torch.allclose(p - row["lr"] * p.grad / norm.clamp(min=1), moved, atol=1e-6)


def test_every_pair_once_an_epoch_and_each_process_its_own():
    """Two processes share out exactly the pairs that one would take; an epoch is a permutation."""
    cfg = dpo.parse([*TOY, "--pairs", "20", "--steps", "5"])
    one = [keys for keys in dpo.pair_keys(20, cfg, 0, 0, 1)]
    two = [dpo.pair_keys(20, cfg, 0, rank, 2) for rank in (0, 1)]
    assert one == [keys for both in zip(*two, strict=True) for keys in both]
    flat = [key for keys in one for key in keys]
    assert sorted(flat) == [(epoch, row) for epoch in (0, 1) for row in range(20)]
    assert flat[:20] != sorted(flat[:20]) and flat[:20] != [(0, row) for _, row in flat[20:]]
    assert list(dpo.pair_keys(20, cfg, 3, 0, 1)) == one[6:]


def test_resumed_is_straight_bit_for_bit(straight, tmp_path, monkeypatch):
    """Stopped by SIGTERM in the middle of a step, then by Ctrl-C while it saves, and started again:
    weights and metrics are those of the undisturbed run, a torn last line of metrics.jsonl does no
    harm, and Ctrl-C is again what it was."""
    out, calls, encode, save = tmp_path / "run", [], dpo.Toy.encode, dpo.ToyPolicy.save

    def encode_and_stop(problem, batch):
        calls.append(None)
        if len(calls) == 9:  # the first half of step 4, numbered from 0
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(problem, batch)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(dpo.Toy, "encode", encode_and_stop)
        patch.setattr(dpo.ToyPolicy, "save", lambda policy, folder: (
            len(calls) == 9 and os.kill(os.getpid(), signal.SIGINT), save(policy, folder)))
        train(*TOY, "--out", out)
    signal.signal(signal.SIGINT, usual := signal.default_int_handler)
    assert stopped.value.code == 128 + signal.SIGTERM and len(calls) == 9
    assert (out / "checkpoint-00000004").is_dir()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "los')
    rows, result = train(*TOY, "--out", out)
    assert same(result, straight[1]) and signal.getsignal(signal.SIGINT) is usual
    clock = {"pairs_per_s": 0, "peak_memory_gib": 0}
    assert [row | clock for row in rows] == [row | clock for row in straight[0]]
    assert metrics(out) == rows


def test_half_written_checkpoint_is_never_read(straight, tmp_path, monkeypatch):
    """The machine dies while a checkpoint is written: the next start takes the one before it. Two
    are kept at the end, and nothing half-written. A file or folder is replaced whole or not at
    all."""
    out, calls, real = tmp_path / "run", [], torch.save

    def dying(state, path):
        real(state, path)
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", dying)
        train(*TOY, "--out", out)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-00000003"]
    for name in "checkpoint-best", ".policy.1.partial":  # a user's copy, a killed last save
        shutil.copytree(out / "checkpoint-00000003", out / name)
    assert same(train(*TOY, "--out", out)[1], straight[1])
    left = sorted(path.name for path in out.iterdir() if path.is_dir() and path.name != "policy")
    assert left == ["checkpoint-00000006", "checkpoint-00000008", "checkpoint-best"]
    for place in out / "config.json", out / "policy":
        before = place.stat()
        with pytest.raises(OSError, match=f"{place}: why"), dpo.whole(place) as partial:
            partial.write_text("half")
            raise RuntimeError("why")
        assert place.stat() == before
        partial.unlink()


LONG = [*TOY, "--steps", "60", "--save-every", "2"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(rows, weights) of the run LONG, left alone."""
    return train(*LONG, "--out", tmp_path_factory.mktemp("long") / "run")


def child(out):
    """LONG in a process of its own."""
    process = multiprocessing.get_context("fork").Process(
        target=dpo.main, args=([*LONG, "--out", str(out)],))
    process.start()
    return process


def children(process):
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(number) for number in found.stdout.split()]


def wait_for_step(running, out, step):
    file = out / "metrics.jsonl"
    while running() and (not file.exists() or file.read_text().count("\n") < step):
        time.sleep(0.002)


@pytest.mark.parametrize("times", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_again_and_again(undisturbed, tmp_path, times):
    """SIGKILL at any moment, while a checkpoint is written more often than not, and a newest
    checkpoint that is torn: the same command ends with the weights of the run that was left alone,
    bit for bit."""
    out, rng = tmp_path / "run", random.Random(times)
    for turn in range(times):
        process = child(out)
        wait_for_step(process.is_alive, out, (turn + 1) * 50 // times - rng.randrange(3))
        time.sleep(rng.random() / 50)
        process.kill()
        process.join()
        found = sorted(out.glob("checkpoint-*"))
        if turn % 2 and len(found) == 2:
            file = rng.choice([path for path in found[1].rglob("*") if path.is_file()])
            file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])
    process = child(out)
    process.join(60)
    assert process.exitcode == 0 and same(weights(out), undisturbed[1])
    assert [row["step"] for row in metrics(out)] == list(range(60))


@pytest.mark.parametrize("times", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_two_processes_killed_and_restarted_are_one(undisturbed, tmp_path, times):
    """torchrun with 2 processes, gradients accumulated, one of which is killed: --max-restarts
    starts both again, and the run is that of one process that was left alone, up to rounding."""
    out, rng = tmp_path / "run", random.Random(times)
    line = command(*LONG, "--micro-batch", "2", "--out", out, processes=2)
    line.insert(line.index("--nproc_per_node"), f"--max-restarts={times}")
    process = subprocess.Popen(line, env=QUIET)
    for turn in range(times):
        wait_for_step(lambda: process.poll() is None, out, (turn + 1) * 50 // times)
        os.kill(rng.choice(children(process)), signal.SIGKILL)
        time.sleep(1)  # until torchrun has noticed
    assert process.wait(120) == 0
    assert same(weights(out), undisturbed[1], rtol=1e-2, atol=1e-4)
    for row, other in zip(metrics(out), undisturbed[0], strict=True):
        for name in ("loss", "reward_margin", "logit_std", "err_policy_l", "grad_norm"):
            assert row[name] == pytest.approx(other[name], rel=1e-2, abs=1e-4)


def test_no_whole_checkpoint_is_no_new_run(tmp_path, capsys, monkeypatch):
    """A broken newest checkpoint, or one that would run code, is passed over with a word. If none
    can be read, the run is refused, and they stay where they are. So it is if another process has
    other weights."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    out = tmp_path / "run"
    train(*TOY, "--out", out)
    shutil.copytree(out / "checkpoint-00000006", out / "checkpoint-best")  # a user's copy
    found = out, dpo.Toy(dpo.parse(TOY)).policy, SimpleNamespace(load_state_dict=dict)
    assert dpo.load_checkpoint(*found) == (8, 0)
    torch.save(Evil(), out / "checkpoint-00000008" / "optimizer.pt")
    assert dpo.load_checkpoint(*found) == (6, 0)
    assert "passed over: {'checkpoint-00000008'" in capsys.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(dpo.Refusal, match="--model the same"):
        patch.setattr(dpo, "gather", lambda mine: [mine, (mine[0], [0.0])])
        train(*TOY, "--out", out)
    (out / "checkpoint-00000006" / "optimizer.pt").write_bytes(b"torn")
    with pytest.raises(dpo.Refusal, match="no checkpoint can be read .*0008.*0006"):
        train(*TOY, "--out", out)
    assert len([*out.glob("checkpoint-*")]) == 3 and not (tmp_path / "evil").exists()


def test_non_finite_loss_stops_before_the_weights(tmp_path):
    """A NaN in step 2 ends the run with the weights of before step 2, saved, and says so."""
    cfg = dpo.parse([*TOY, "--out", str(tmp_path / "run")])
    problem, seen = dpo.Toy(cfg), []

    def encode(batch):
        seen.append({name: value.clone() for name, value in problem.policy.state_dict().items()})
        return batch["x_w"] * (math.nan if len(seen) == 5 else 1), batch["x_l"], {}

    problem.encode = encode
    with pytest.raises(SystemExit) as stopped:
        dpo.train(problem, cfg)
    saved = weights(tmp_path / "run" / "checkpoint-00000002")
    assert stopped.value.code == 1 and same(saved, seen[4])
    assert all(value.isfinite().all() for value in saved.values())


def test_another_configuration_is_refused(tmp_path):
    """The same --out with another beta, lr or seed: refused by name, and nothing there is touched;
    nor is a run judged by another beta. How often it is saved is not part of the run."""
    out = tmp_path / "run"
    train(*TOY, "--out", out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for flags, words in ((["--beta", "0.7"], "beta is 0.5 there, 0.7 here"),
                         (["--lr", "1e-3"], "lr is 0.003 there, 0.001 here"),
                         (["--seed", "1"], "seed is 0 there, 1 here"),
                         (["--evaluate", "--gamma", "1"], "gamma is 0.0 there, 1.0 here")):
        with pytest.raises(dpo.Refusal, match=words):
            train(*TOY, *flags, "--out", out)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    train(*TOY, "--save-every", "5", "--out", out)
    dpo.check_out(dpo.parse([*TOY, "--seed", "1", "--evaluate", "--out", str(out)]))


def test_toy_closes_most_of_the_gap(tmp_path, capsys, monkeypatch):
    """200 steps: the policy has come half of the way to p* that the reference is away; with the
    labels turned round it goes the other way. A figure that fails does not end the run."""
    monkeypatch.setattr(dpo, "SAMPLES", 10_000)
    argv = ["--toy", "--steps", "200", "--draws", "16", "--eval-every", "0", "--out"]
    dpo.main([*argv, str(tmp_path / "a")])
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["tv_policy"] < 0.6 * results["tv_reference"] and results["tv_floor"] < 0.08
    assert results["tv_policy"] < results["tv_policy_ode"] < 1  # the drift, toy/README.md
    assert abs(results["reward_policy"] - results["reward_optimum"]) < 0.5
    assert "0.6931 (for dpo, gamma 0: log 2)" in capsys.readouterr().out
    assert Image.open(tmp_path / "a" / "toy.png").width == 1280
    cfg = dpo.parse([*argv, str(tmp_path / "b")])
    problem = dpo.Toy(cfg)
    problem.pairs.x_w, problem.pairs.x_l = problem.pairs.x_l, problem.pairs.x_w
    dpo.train(problem, cfg)
    assert problem.measure()[0]["reward_policy"] < results["reward_reference"] - 0.2
    dpo.draw_picture(None, tmp_path / "none.png", [])
    assert "no figure" in capsys.readouterr().out


def test_all_of_sd35(tiny, tmp_path):
    """--lora 0: a run of SD3.5 that was stopped ends with the same transformer, which
    from_pretrained reads, as --evaluate does."""
    argv = ["--lora", "0", "--lr", "1e-3", "--optimizer", "adafactor", "--save-every", "2",
            "--sample-every", "0", "--eval-split", "train[:6]", "--eval-every", "4"]
    cfg = sd_config(tiny, "sd35", *argv, "--out", str(tmp_path / "one"))
    rows = dpo.train(sd_problem(cfg), cfg)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for path in ("transformer", "checkpoint-00000004"):
        shutil.rmtree(tmp_path / "two" / path)
    cfg.out = str(tmp_path / "two")
    dpo.train(problem := sd_problem(cfg), cfg)
    one, two = (diffusers.SD3Transformer2DModel.from_pretrained(
        tmp_path / run, subfolder="transformer") for run in ("one", "two"))
    assert same(one.state_dict(), two.state_dict())
    assert same(one.state_dict(), problem.policy.network.state_dict())
    cfg.out, cfg.evaluate = str(tmp_path / "one"), ""
    dpo.report_evaluation(sd_problem(cfg), cfg)
    found = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    assert found["policy"].endswith("/transformer") and found["margin"] != 0
    assert found["margin"] == pytest.approx(rows[-1]["held_out_margin"], rel=1e-4)


def test_sdxl_by_torchrun(tiny, tmp_path):
    """The real path: tiny SDXL, 2 processes that fill one cache, image workers, checkpointing,
    Adafactor, evaluation in training. SIGTERM to the second process and its workers makes the first
    one save, and both leave; the same command goes on; the UNet then loads by from_pretrained, has
    moved, and equals that of one process that was never stopped, as do the numbers of evaluations.
    The rate of images is constant after the warm-up."""
    argv = ["--model", tiny / "tiny-sdxl", "--data", tiny / "pairs.parquet", "--resolution", "64",
            "--batch", "4", "--steps", "4", "--lr", "1e-3", "--sample-every", "0", "--eval-split",
            "train[:9]", "--eval-every", "2", "--cache", tmp_path / "cache", "--warmup", "2"]
    two = [*argv, "--micro-batch", "1", "--workers", "1", "--out", tmp_path / "two"]
    process = subprocess.Popen(command(*two, processes=2), env=QUIET)
    wait_for_step(lambda: process.poll() is None, tmp_path / "two", 1)
    os.killpg(max(children(process)), signal.SIGTERM)
    assert process.wait(60) != 0
    stopped = [int(path.name[-8:]) for path in (tmp_path / "two").glob("checkpoint-*")]
    assert stopped and 0 < max(stopped) < 4
    printed = run(*two, processes=2)
    assert "8 ties dropped" in printed and f"from step {max(stopped)}" in printed
    unet, start = (diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
                   for folder in (tmp_path / "two", tiny / "tiny-sdxl"))
    assert not same(unet.state_dict(), start.state_dict(), atol=1e-4)
    cfg = dpo.parse([*map(str, argv), "--workers", "0", "--out", str(tmp_path / "one")])
    rows = dpo.train(sd_problem(cfg), cfg)
    assert [row["lr"] for row in rows if "lr" in row] == [5e-4, 1e-3, 1e-3, 1e-3]
    assert same(weights(tmp_path / "one", "unet"), weights(tmp_path / "two", "unet"), atol=5e-4)
    for row, other in zip(metrics(tmp_path / "two"), rows, strict=True):
        for name in {"loss", "err_policy_l", "held_out_rise_w", "held_out_rise_l"} & row.keys():
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5)


def test_training_in_bf16_starts_at_log_2(tiny, tmp_path):
    """--precision bf16 reaches the forward pass, in training and when it is judged; the weights
    stay fp32, and step 0 is log 2 still."""
    cfg = sd_config(tiny, "sd15", "--precision", "bf16", "--steps", "1", "--sample-every", "0",
                    "--eval-split", "train[:3]", "--out", str(tmp_path / "run"))
    problem, seen = sd_problem(cfg), []
    problem.policy.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    row, = dpo.train(problem, cfg)
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-7) and row["logit_std"] == 0
    trained = len(seen)
    dpo.evaluate(problem, cfg)
    assert len(seen) > trained > 0 and set(seen) == {torch.bfloat16}
    saved = weights(tmp_path / "run", "unet").values()
    assert {value.dtype for value in saved} == {torch.float32}


def test_too_many_unreadable_pairs_stop_the_run(tiny, tmp_path, capsys):
    """An unreadable pair is named once and counted, also after a restart. More than 1 %, and more
    than one: exit code 2."""
    rows = [pick(1.0, caption="fine", size=(64, 64)) for _ in range(8)]
    rows[1]["jpg_1"] = b"broken"
    path = parquet(tmp_path / "pairs.parquet", rows)
    cfg = sd_config(tiny, "sd15", "--batch", "8", "--save-every", "1", "--sample-every", "0",
                    "--data", path, "--out", str(tmp_path / "run"))
    for named in 1, 0:  # the second start reads the count, and stops at once
        with pytest.raises(SystemExit) as stopped:
            dpo.train(sd_problem(cfg), cfg)
        assert stopped.value.code == 2
        printed = capsys.readouterr().out
        assert f"--data {path}: 2 pairs, over 1 %, are unreadable" in printed
        assert "Ended after 2 steps" in printed
        assert printed.count("unreadable  row 1: jpg_1, cannot identify image file") == named
    assert [row["unreadable"] for row in metrics(tmp_path / "run")] == [1, 1]
    assert not (tmp_path / "run" / "unet").exists()


# ------------------------------------------------------------------------------ judging a policy

def judge(change=lambda problem: None, **settings):
    """evaluate() of the toy's policy, after `change` has been at the problem."""
    cfg = dpo.parse([*TOY, "--micro-batch", "500", "--batch", "500"])
    vars(cfg).update(settings)
    problem = dpo.Toy(cfg)
    change(problem)
    return dpo.evaluate(problem, cfg)


@pytest.fixture(scope="module")
def trained(straight):
    """A change of the problem: its policy is that of `straight`, further from the reference."""
    return lambda problem: problem.policy.load_state_dict(
        {name: 3 * value for name, value in straight[1].items()})


def test_evaluation_by_hand(trained, monkeypatch):
    """Every number of evaluate(), from the errors of all pairs at once, with ten draws each."""
    monkeypatch.setattr(dpo, "HELD_OUT_PAIRS", 400)
    results, problem = judge(trained, gamma=0.2), dpo.Toy(dpo.parse(TOY))
    trained(problem)
    pairs = problem.held_out
    t, eps = draw("held out", [(dpo.HELD_OUT, row) for row in range(400)], 10, 100, (2,))
    with torch.no_grad():
        e_w, e_l, r_w, r_l = dpo.pair_errors(problem, pairs.x_w, pairs.x_l, t, eps, {})
    logit = 0.7 * (e_l - e_w) - 0.5 * (r_l - r_w)
    share = (logit > 0).float().mean()
    expected = {"accuracy": share, "standard_error": (share * (1 - share) / 400) ** 0.5,
                "margin": logit.mean(), "rise_w": (e_w - r_w).mean(), "rise_l": (e_l - r_l).mean(),
                "pairs": 400, "unreadable": 0}
    assert results == pytest.approx({name: float(expected[name]) for name in expected}, rel=1e-3)


def test_all_policies_meet_the_same_noise(trained):
    """The evaluation does not depend on the run's seed, nor on the batch that pairs come in. The
    reference itself meets ties, each half right: accuracy 1/2, margin 0."""
    one = judge(trained)
    assert judge(trained, seed=7) == one
    assert judge(trained, micro_batch=300) == pytest.approx(one, rel=1e-4)
    reference = judge()
    assert (reference["accuracy"], reference["margin"]) == (0.5, 0)
    assert reference["standard_error"] == pytest.approx(0.5 / 5000**0.5)


@pytest.mark.parametrize("flags, reward", [([], dpo.toy_reward), (["--proxy"], dpo.toy_proxy)])
def test_labels_are_bradley_terry(flags, reward):
    """The point of the larger reward is the preferred one as often as sigmoid of the difference
    says, for small differences and for large; and with --proxy it is the proxy's. Held-out pairs
    are labelled by the true reward always."""
    problem = dpo.Toy(dpo.parse(["--toy", *flags]))
    for pairs, judged_by in (problem.pairs, reward), (problem.held_out, dpo.toy_reward):
        difference = judged_by(pairs.x_w) - judged_by(pairs.x_l)
        size, order = difference.abs().sort()
        surprise = (difference[order] > 0).float() - torch.sigmoid(size)  # of mean 0
        for part in surprise.chunk(8):
            assert part.mean().abs() < 4 * 0.5 / len(part) ** 0.5


def test_what_is_due_when(tmp_path, monkeypatch):
    """Pictures and evaluations come every so many steps and at the end. All steps are saved before
    an evaluation: the machine may die in it. What was lost comes again, and the report, too."""
    drawn, judged = [], []

    def evaluate(problem, cfg):
        judged.append(sorted(path.name[-2:] for path in out.glob("checkpoint-*")))
        if len(judged) == 2:
            raise KeyboardInterrupt
        return {"accuracy": 0.5}

    out = tmp_path / "run"
    argv = [*TOY, "--save-every", "100", "--eval-every", "3", "--sample-every", "5", "--out", out]
    monkeypatch.setattr(dpo, "draw_picture", lambda problem, path, *_: drawn.append(path.name))
    monkeypatch.setattr(dpo, "evaluate", evaluate)
    monkeypatch.setattr(dpo, "SAMPLES", 100)
    with pytest.raises(KeyboardInterrupt):
        train(*argv)
    dpo.main(list(map(str, argv)))
    assert judged == [["03"], ["03", "06"], ["03", "06"], ["06", "08"]]
    assert drawn == ["step-00000005.png", "step-00000008.png", "toy.png"]
    assert [row["step"] for row in metrics(out) if "held_out_accuracy" in row] == [3, 6, 8]
    assert json.loads((out / "results.json").read_text())["held_out_accuracy"] == 0.5


def test_evaluate_images(tiny, tmp_path, capsys):
    """--evaluate of a tiny SD1.5 judges what the run in --out ended with, or else its newest
    checkpoint, or the folder that it names, on --eval-split or else --split; an unreadable
    pair is left out, none steps in. Another model's policy is refused, or a run of another beta."""
    rows = [pick(1.0, caption=str(i), size=(64, 64)) for i in range(5)]
    sound = parquet(tmp_path / "sound.parquet", rows)
    broken = parquet(tmp_path / "broken.parquet", [*rows, pick(1.0, b"broken")])
    argv = ["--resolution", "64", "--workers", "0", "--beta", "300", "--data", sound, "--model",
            str(tiny / "tiny-sd15"), "--out", str(tmp_path / "run")]
    dpo.main([*argv, "--batch", "2", "--steps", "2", "--lr", "1e-3", "--eval-every", "2",
              "--eval-split", "train[-2:]", "--sample-every", "0", "--save-every", "1"])
    row = metrics(tmp_path / "run")[-1]
    model, data = json.loads((tmp_path / "run" / "config.json").read_text())["read_from"]
    assert model == f"{tiny}/tiny-sd15/unet" and Path(data).exists()

    def evaluation(*more, out="run"):
        dpo.main([*argv, "--evaluate", *more])
        return json.loads((tmp_path / out / "evaluation.json").read_text())

    held_out = evaluation("--eval-split", "train[-2:]")
    one, two = evaluation(), evaluation("--data", broken)
    for name in "accuracy", "margin", "rise_w", "rise_l":
        assert held_out[name] == pytest.approx(row[f"held_out_{name}"], rel=1e-3)
        assert two[name] == pytest.approx(one[name], rel=1e-3)
    assert (held_out["pairs"], one["pairs"], two["pairs"], two["unreadable"]) == (2, 5, 5, 1)
    assert one["policy"] == f"{tmp_path}/run/unet" and one["margin"] != 0
    start, again = (evaluation(f"{tiny}/tiny-sd15", "--out", f"{tmp_path}/new", out="new")
                    for _ in range(2))
    assert start == again and start["accuracy"] == 0.5 and start["rise_w"] == 0
    for flags, words in ((["--model", f"{tiny}/tiny-sdxl"], "model is"),
                         (["--beta", "301"], "beta is 300.0 there, 301.0 here"),
                         ([f"{tiny}/tiny-sdxl"], f"{tiny}/tiny-sdxl/unet: ")):
        with pytest.raises(SystemExit):
            evaluation(*flags)
        assert words in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "unet")
    shutil.copytree(tmp_path / "run" / "checkpoint-00000001", tmp_path / "run" / "checkpoint-best")
    assert evaluation()["policy"].endswith("checkpoint-00000002/unet")


# ------------------------------------------------------------------------- the cache of latents

def cached(tiny, tmp_path, *argv, kind="sdxl"):
    return sd_problem(sd_config(tiny, kind, "--cache", str(tmp_path / "cache"), *argv))


@pytest.mark.parametrize("kind", KINDS)
def test_cached_is_encoded_bit_for_bit(tiny, tmp_path, kind):
    """With --cache a pair has the latents that encoding it on the fly gives, to the last bit, and
    the same prompt; every epoch sees the middle of the picture, not flipped. Held-out pairs are
    cached, too. In bf16 the latents are rounded to 11 bits."""
    plain = sd_problem(sd_config(tiny, kind))
    quick = cached(tiny, tmp_path, "--eval-split", "train[:6]", kind=kind)
    batch = batch_of_pairs(quick, *((3, row) for row in range(56)))
    x_w, x_l, cond = quick.encode(batch)
    prompts = [plain.pairs[3, row]["prompt"] for row in range(56)]
    assert batch["prompt"] == prompts and 3 < prompts.count("") < 25
    torch.testing.assert_close(cond, {name: torch.cat([value, value])
                                      for name, value in plain.encode_prompts(prompts).items()})
    for row in range(6):
        alone = torch.cat(plain.encode(batch_of_pairs(plain, (dpo.HELD_OUT, row)))[:2])
        assert torch.equal(torch.stack([x_w[row], x_l[row]]), alone)
        assert torch.equal(quick.held_out[dpo.HELD_OUT, row]["latents"], alone)
    less = cached(tiny, tmp_path, "--precision", "bf16", kind=kind).pairs[0, 0]["latents"]
    assert less.dtype == torch.float16
    torch.testing.assert_close(less.float(), torch.stack([x_w[0], x_l[0]]), rtol=2**-11, atol=1e-6)


def test_cache_is_made_once_and_goes_on(tiny, tmp_path, monkeypatch):
    """What lies in --cache is not made again, a missing piece is, and nothing else. Other labels,
    another resolution, other pairs, another model and the same one changed have latents of their
    own; another seed has not. Image workers that are started afresh (macOS) can read it."""
    monkeypatch.setattr(dpo, "CHUNK", 20)

    def count(*argv, kind="sdxl"):
        before = {file: file.stat() for file in (tmp_path / "cache").rglob("*.safetensors")}
        problem = cached(tiny, tmp_path, *argv, kind=kind)
        return problem.pairs, sorted(file for file in (tmp_path / "cache").rglob("*.safetensors")
                                     if before.get(file) != file.stat())

    first, files = count()
    latents = first[0, 30]["latents"]
    assert [file.name for file in files] == [f"{i:06d}.safetensors" for i in range(3)]
    assert count("--seed", "1")[1] == []
    inside = ["--cache", str(tiny / "tiny-sdxl" / "cache")]
    assert len({cached(tiny, tmp_path, *inside).pairs.cache for _ in range(2)}) == 1
    shutil.rmtree(inside[1])
    files[1].unlink()
    again, found = count()
    assert found == files[1:2] and torch.equal(again[0, 30]["latents"], latents)
    assert torch.equal(pickle.loads(pickle.dumps(again))[0, 30]["latents"], latents)
    for argv in ["--resolution", "80"], ["--split", "train[-50:]"], ["--precision", "bf16"]:
        assert len(count(*argv)[1]) == 3, argv
    other, found = count(kind="sd15")
    assert len(found) == 3 and not torch.equal(other[0, 30]["latents"], latents)
    os.utime(tiny / "tiny-sdxl" / "model_index.json")
    assert len(count()[1]) == 3
    load = dpo.load_pairs  # labels of another judge: preferred and rejected change places
    monkeypatch.setattr(dpo, "load_pairs", lambda *args: (
        *load(*args)[:2], [1 - label for label in load(*args)[2]]))
    turned, found = count()
    assert len(found) == 3 and torch.equal(turned[0, 30]["latents"], latents.flip(0))


def test_cache_of_changed_and_unreadable_pictures(tiny, tmp_path):
    """A picture beside pairs.jsonl that was painted over is encoded again. A pair that cannot be
    read, or that lacks an image, is remembered, and replaced as without a cache."""
    (data := tmp_path / "data").mkdir()
    for name, colour in ("a", "red"), ("b", "blue"):
        (data / name).write_bytes(jpeg(colour, size=(64, 64)))
    (data / "broken").write_bytes(b"broken")
    lines = [{"prompt": other or "", "preferred": "a", "rejected": other}
             for other in ("b", "broken", None, "a")]
    (data / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain = sd_problem(sd_config(tiny, "sdxl", "--data", str(data))).pairs
    one = cached(tiny, tmp_path, "--data", str(data)).pairs
    for row, replaced in (0, ""), (1, "row 1: .*; row 2: .*"), (2, "row 2: .*"), (3, ""):
        for pairs in plain, one:
            assert re.fullmatch(replaced, pairs[0, row]["unreadable"]), pairs[0, row]
        assert one[0, row]["prompt"] == plain[0, row]["prompt"]
    assert torch.equal(one[0, 1]["latents"], one[0, 3]["latents"])
    (data / "a").write_bytes(jpeg("green", size=(64, 64)))
    two = cached(tiny, tmp_path, "--data", str(data)).pairs
    assert torch.equal(one[0, 0]["latents"][1], two[0, 0]["latents"][1])
    assert not torch.equal(one[0, 0]["latents"][0], two[0, 0]["latents"][0])


# ------------------------------------------------------------------------------ the command line

def test_defaults_are_the_papers():
    """SD1.5 and SDXL as the paper trains them; the rate follows beta, the warm-up --steps; SD3.5 by
    beta, rate and rank of flow_grpo; and the toy's own settings."""
    paper = dict(method="dpo", gamma=0, draws=1, batch=2048, warmup=500, steps=2000, decay=0,
                 caption_dropout=0.2, lora=0, seed=0, evaluate=None)
    sd15, sdxl = dict(beta=2000, lr=2.048e-5, optimizer="adamw", resolution=512, out="runs/sd15"), {
        "beta": 5000, "lr": 8.192e-6, "optimizer": "adafactor", "resolution": 1024}
    for argv, expected in (
            ("--model sd15", paper | sd15), ("--model sdxl", paper | sdxl),
            ("--model sd15 --beta 4000 --steps 100 --batch 6", dict(
                beta=4000, lr=1.024e-5, warmup=25, steps=100, batch=6, micro_batch=2)),
            ("--model sdxl --method sft", dict(method="sft", lr=2.048e-6)),
            ("--model sd35", dict(beta=100, lr=3e-4, batch=24, lora=32, optimizer="adamw", draws=1,
                                  resolution=1024, checkpointing="on", micro_batch=2, steps=1000)),
            ("--toy", dict(beta=0.5, gamma=0, draws=64, batch=32, lr=3e-3, warmup=150, steps=3000,
                           decay=3000, proxy=False, out="runs/toy", precision="fp32"))):
        cfg = vars(dpo.parse(argv.split()))
        for name, value in expected.items():
            assert cfg[name] == pytest.approx(value), (argv, name)


def wrong_inputs():
    """(command line, words of the one line that it gets). {tiny} and {tmp} are folders."""
    toy = [
        ("--model sd15", "not allowed with"), ("--bta 3", "arguments: --bta"),
        ("--bet 3", "arguments: --bet"), ("--beta 0", "--beta"), ("--beta inf", "--beta"),
        (f"--seed {10**30}", "--seed"), ("--steps 1.5", "--steps"), ("--draws 0", "--draws"),
        ("--method ppo", "--method"), ("--data x", "--data means nothing to --model toy"),
        ("--batch 30 --micro-batch 4", "should be a multiple of 4"),
        ("--out {tmp}/file.txt", "file.txt"), ("--out {tmp}/file.txt/run", "file.txt"),
        ("--out /proc/run", "/proc/run"), ("--out {tmp}", "holds no run"),
        ("--out {tmp}/strange", "holds no run"), ("--out {tmp}/other", "another run"),
        ("--evaluate --out {tmp}/empty", "no policy in it"),
        ("--evaluate --out {tmp}/other", "another run"),
        ("--evaluate {tmp}/torn --out {tmp}/empty", "{tmp}/torn: "),
        ("--evaluate {tiny}/tiny-sd15/unet --out {tmp}/empty", "it should fit --model"),
        ("--evaluate no/where --out {tmp}/empty", "no/where: no policy in it")]
    images = [
        ("absent.parquet", "no such file"), ("file.txt", "--data"), ("empty", "--data"),
        ("ties.parquet", "all 1 pairs of split train are ties"),
        ("columns.parquet", "the columns ['a', 'b']"), ("label.parquet", "label_0 holds 7.0"),
        ("nan.parquet", "holds nan"), ("numbers.parquet", "numbers.parquet"),
        ("none.parquet", "none.parquet"), ("sound.parquet --split test", 'split "test"'),
        ("sound.parquet --split train[", "train["), ("sound.parquet --lora -1", "--lora"),
        ("sound.parquet --pairs 3", "--pairs means nothing"),
        ("sound.parquet --eval-every 3", "it needs --eval-split"),
        ("sound.parquet --resolution 100", "--resolution"),
        ("sound.parquet --cache {tmp}/file.txt", "file.txt")]
    sd = "--model {tiny}/tiny-sd15 --resolution 64 --data {tmp}/"
    return [("", "required"), ("--model nowhere/nothing", "--model nowhere/nothing"),
            ("--model {tmp}", "--model"), ("--model {tmp}/flux", "SD3 or of their build"),
            ("--model sd35 --compile", "--compile means nothing"),
            ("--model sd35 --lora 0", "--lora 0: it needs --lr"),
            ("--model {tiny}/tiny-sd35 --data {tmp}/sound.parquet", "it should be at most 192"),
            ("--model sd15 --anchor 1", "--anchor means nothing"),
            *((f"--toy {line}", words) for line, words in toy),
            *((sd + line, words) for line, words in images)]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "file.txt").write_text("hello")
    for name in "empty", "strange", "other", "torn", "flux":
        (folder / name).mkdir()
    (folder / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (folder / "strange" / "config.json").write_text('{"config": 7}')
    (folder / "other" / "config.json").write_text('{"config": {"model": "other"}}')
    (folder / "torn" / dpo.WEIGHTS).write_bytes(b"torn")
    for name, rows in {
            "sound": [pick()], "ties": [pick(0.5)], "columns": [{"a": 1, "b": 2}],
            "label": [pick(1.0), pick(7.0)], "nan": [pick(1.0), pick(math.nan)],
            "numbers": [{"caption": "", "jpg_0": 1, "jpg_1": 2, "label_0": 1.0}]}.items():
        parquet(folder / f"{name}.parquet", rows)
    datasets.Dataset.from_list([pick()]).select([]).to_parquet(str(folder / "none.parquet"))
    return folder


@pytest.mark.parametrize("line, words", wrong_inputs())
def test_wrong_input_gets_one_clear_line(line, words, tiny, wrong, tmp_path, capsys, monkeypatch):
    """Exit code 2, one line that names the flag, no traceback, nothing written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        dpo.main(line.format(tiny=tiny, tmp=wrong).split())
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and not any(tmp_path.iterdir())
    assert len(error) == 1 and error[0].startswith("error: "), error
    assert words.format(tiny=tiny, tmp=wrong) in error[0], error


def test_a_refusal_is_said_once_on_each_machine(monkeypatch, capsys):
    """What all processes find, by the first of a machine; what one alone finds, by that one."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    for error in dpo.Refusal("all"), OSError("disk"), dpo.Refusal("Caught\nRefusal: worker"):
        with pytest.raises(SystemExit, match="2"), dpo.command():
            raise error
    assert capsys.readouterr().err.split() == ["error:", "disk", "error:", "worker"]


def test_too_little_memory_is_one_line(monkeypatch, tmp_path, capsys):
    """It says what would take less."""
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nmore")

    monkeypatch.setattr(dpo, "train", full)
    with pytest.raises(SystemExit, match="2"):
        dpo.main([*TOY, "--out", str(tmp_path / "run")])
    line, = capsys.readouterr().err.strip().splitlines()
    assert "3 GiB" in line and "--micro-batch 1" in line and "--lora 16" in line


def test_help_fits_two_screens(capsys):
    """--help: at most 100 columns, at most 100 lines, every flag."""
    with pytest.raises(SystemExit):
        dpo.main(["--help"])
    shown = capsys.readouterr().out
    assert shown.count("\n") <= 100 and max(map(len, shown.splitlines())) <= 100
    assert all(f"--{flag} " in shown for flag in dpo.FLAGS)


def test_the_file_stays_small():
    """Lines, code tokens (without comments, docstrings and layout), flags, the longest function and
    nested ones are within their budgets; equation, toy and loop end by line 500."""
    source = (ROOT / "diffusion_dpo.py").read_text()
    nodes = list(ast.walk(ast.parse(source)))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    docstrings = {node.body[0].lineno for node in nodes
                  if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
                  and ast.get_docstring(node) is not None}
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
              tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline)
              if token.type not in layout
              and not (token.type == tokenize.STRING and token.start[0] in docstrings)]
    nested = {inner for outer in functions for inner in ast.walk(outer)
              if inner is not outer and isinstance(inner, ast.FunctionDef)}
    headers = [(number, line) for number, line in enumerate(source.splitlines(), 1)
               if line.startswith("# ----")]
    assert len(source.splitlines()) <= 1300 and len(tokens) <= 11_000
    assert len(dpo.FLAGS) <= 34 and len(nested) <= 12
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 80
    assert headers[3][1].endswith("The loop") and headers[4][0] <= 501
