"""Proof that diffusion_dpo.py computes what it says. Each test's docstring is one claim.

    pytest                  # under two minutes on two cores, no network, no GPU
    pytest -m slow          # runs killed again and again, torch.compile; three minutes more

The yardsticks are independent of the script: closed forms, a literal transcription of the equation,
torch.distributions, diffusers' schedulers and pipelines, and the same run done another way.
"""

import ast
import io
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
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
from safetensors.torch import load_file

import diffusion_dpo as dpo

torch.set_num_threads(1)  # two processes of a test on two cores; and sums in one order
datasets.disable_progress_bars()
for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()

# ------------------------------------------------------------------------------------- the loss


def errors(n=16, seed=0, dtype=torch.float32):
    """Four random (n,) weighted errors."""
    gen = torch.Generator().manual_seed(seed)
    return [torch.rand(n, generator=gen, dtype=dtype) for _ in range(4)]


def test_worked_example():
    """The pair of dpo_loss's docstring: errors 1.0, 1.2, reference 1.1, 1.0, beta 2.

    gamma 0: logit 2 ((1.1 - 1.0) - (1.0 - 1.2)) = 0.6, loss log(1 + e^-0.6) = 0.437488.
    gamma 1: logit 0.6 - 1 (1.0 - 1.2) = 0.8, loss log(1 + e^-0.8) = 0.371101.
    """
    four = [torch.tensor([value]) for value in (1.0, 1.2, 1.1, 1.0)]
    for gamma, expected in (0.0, (0.437488, 0.6)), (1.0, (0.371101, 0.8)):
        results = [value.item() for value in dpo.dpo_loss(*four, 2.0, gamma)]
        assert results == pytest.approx(expected, abs=1e-6)


def literal_loss(e_w, e_l, r_w, r_l, beta, gamma):
    """Eq. 14, and SEE-DPO's logit, with Python floats, one pair at a time."""
    out = []
    for a, b, c, d in zip(*(x.tolist() for x in (e_w, e_l, r_w, r_l)), strict=True):
        inside = -((beta + gamma) * (a - b) - beta * (c - d))
        out.append(-math.log(1 / (1 + math.exp(-inside))))
    return out


@pytest.mark.parametrize("beta, gamma", [(1.0, 0.0), (7.0, 0.0), (1.0, 0.3), (2.0, 5.0)])
def test_loss_is_eq_14(beta, gamma):
    """The loss is Eq. 14 for gamma = 0 and SEE-DPO's for gamma > 0, pair by pair."""
    four = errors(dtype=torch.float64)
    losses, logit = dpo.dpo_loss(*four, beta, gamma)
    assert losses.tolist() == pytest.approx(literal_loss(*four, beta, gamma), rel=1e-9)
    assert torch.allclose(losses, -torch.nn.functional.logsigmoid(logit))


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_signs_of_the_gradient(gamma):
    """The loss falls when the error on x_w falls or that on x_l rises, for the policy; the other
    way round for the reference (at gamma = 0); and autograd agrees with finite differences."""
    four = [e.requires_grad_() for e in errors(dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *f: dpo.dpo_loss(*f, 2.0, gamma)[0], four)
    dpo.dpo_loss(*four, 2.0, gamma)[0].sum().backward()
    assert (four[0].grad > 0).all() and (four[1].grad < 0).all()
    assert (four[2].grad < 0).all() and (four[3].grad > 0).all()


def test_loss_at_step_0():
    """policy = reference: loss log 2, logit 0 to the last bit, and a gradient that is not 0."""
    err_w, err_l = (e.requires_grad_() for e in errors()[:2])
    losses, logit = dpo.dpo_loss(err_w, err_l, err_w.detach(), err_l.detach(), 5000.0)
    losses.sum().backward()
    assert torch.equal(losses, torch.full_like(losses, math.log(2))) and not logit.any()
    assert torch.allclose(err_w.grad, torch.full_like(losses, 2500.0))  # beta / 2


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


def errors_of(problem, x_w, x_l, t, eps, cond):
    return dpo.pair_errors(problem, problem.policy, x_w, x_l, t, eps, cond)


def batch_of(B=3, K=2, shape=(4, 8, 8), seed=0):
    gen = torch.Generator().manual_seed(seed)
    x_w, x_l = torch.randn(2, B, *shape, generator=gen)
    t, eps = draw(seed, [(0, row) for row in range(B)], K, 1000, shape)
    return x_w, x_l, t, eps


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_pair_errors_are_the_literal_ones(prediction):
    """One forward per denoiser; its errors are those of a loop over halves, pairs and draws."""
    problem, calls = spy_problem(prediction, denoiser=torch.tanh, weight=0.25)
    x_w, x_l, t, eps = batch_of()
    results = errors_of(problem, x_w, x_l, t, eps, {})
    schedule, literal = sd_schedule(), {"w": [], "l": []}
    for half, x in (("w", x_w), ("l", x_l)):
        for i in range(3):
            total = 0.0
            for k in range(2):
                one, noise, at = x[i:i + 1], eps[i, k][None], t[i, k][None]
                goal = noise if prediction == "epsilon" else schedule.get_velocity(one, noise, at)
                prediction_ = torch.tanh(schedule.add_noise(one, noise, at))
                total += 0.25 * ((prediction_ - goal) ** 2).sum().item() / 2
            literal[half].append(total)
    for got, half in zip(results, ("w", "l", "w", "l"), strict=True):
        assert got.tolist() == pytest.approx(literal[half], rel=1e-5)
    assert len(calls) == 2


def test_a_pair_shares_t_and_noise():
    """Both halves of a pair meet the same t and eps, also when the pair is twice the same image;
    prompts and sizes go with their own half; and K draws of one pair differ."""
    problem, calls = spy_problem()
    x_w, _, t, eps = batch_of(B=2, K=3)
    cond = {"prompt": torch.arange(4.0)[:, None]}
    err_w, err_l, ref_w, ref_l = errors_of(problem, x_w, x_w, t, eps, cond)
    assert torch.equal(err_w, err_l) and torch.equal(ref_w, ref_l)
    _, x_t, at, got, _ = calls[0]
    assert torch.equal(x_t[:6], x_t[6:]) and torch.equal(at[:6], at[6:])
    assert got["prompt"].flatten().tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert len({tuple(row.flatten().tolist()) for row in x_t[:6]}) == 6


def test_reference_goes_first_and_leaves_no_graph():
    """The reference runs before the policy and without grad; nothing of it is left to train."""
    problem, calls = spy_problem()
    results = errors_of(problem, *batch_of(), {})
    assert [(name, grad) for name, *_, grad in calls] == [("reference", False), ("policy", True)]
    assert [e.requires_grad for e in results] == [True, True, False, False]
    dpo.dpo_loss(*results, 1.0)[0].sum().backward()
    assert problem.reference.scale.grad is None and problem.policy.scale.grad is not None


def test_errors_are_squared_in_fp32():
    """A bf16 prediction is cast before eps is subtracted: its error equals that of an fp32 copy."""
    half, _ = spy_problem(denoiser=lambda x: torch.tanh(x).bfloat16())
    full, _ = spy_problem(denoiser=lambda x: torch.tanh(x).bfloat16().float())
    for a, b in zip(errors_of(half, *batch_of(), {}), errors_of(full, *batch_of(), {}),
                    strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_noise_is_standard_and_t_uniform():
    """eps is N(0, 1), t is uniform on 0 .. T-1, for every one of the K draws; pairs differ."""
    keys = [(0, row) for row in range(3000)]
    t, eps = draw(0, keys, 4, 10, (2,))
    for k in range(4):
        counts = torch.bincount(t[:, k], minlength=10)
        assert len(counts) == 10 and (counts - 300).abs().max() < 5 * 300**0.5
        assert eps[:, k].mean().abs() < 0.05 and (eps[:, k].std() - 1).abs() < 0.05
    assert torch.equal(eps[:, :2], -eps[:, 2:]) and torch.equal(t[:, :2], t[:, 2:])
    assert len(eps[:, 0, 0].unique()) == 3000


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
    toy = dpo.elbo_weight(torch.sigmoid(torch.linspace(8, -6, 100)))  # linear in log SNR: constant
    assert torch.allclose(toy, torch.tensor(50 * (math.exp(14 / 99) - 1)), rtol=1e-3)


# -------------------------------------------------------------------------------------- the toy


@pytest.fixture(scope="module")
def ring():
    return dpo.Ring(torch.sigmoid(torch.linspace(8, -6, 100)))


def test_reference_score_is_the_gradient(ring):
    """eps_ref = -sqrt(1 - abar_t) grad log p_t, p_t built by torch.distributions."""
    x = (2 * torch.randn(64, 2)).requires_grad_()
    for t in (0, 30, 60, 99):
        a = ring.alphas_cumprod[t]
        std = (a * ring.std**2 + 1 - a).sqrt()
        components = torch.distributions.Independent(
            torch.distributions.Normal(a.sqrt() * ring.means, std.expand(8, 2)), 1)
        mixture = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(torch.ones(8)), components)
        score, = torch.autograd.grad(mixture.log_prob(x).sum(), x)
        assert torch.allclose(ring(x, torch.full((64,), t)), -(1 - a).sqrt() * score, atol=1e-4)


def test_optimum_is_optimal(ring):
    """p* sums to 1, is p_ref at zero reward, and maximises E[R] - beta KL + gamma H on a grid that
    knows nothing of the script's: the gradient is 0 there, and any other density does worse."""
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
    assert objective(best) > objective(best + 0.1 * torch.randn_like(best))
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
    flat = torch.full((30, 30), 1 / 900)
    assert dpo.entropy(flat) == pytest.approx(math.log(100))  # uniform on 10 x 10


def test_sampler_is_diffusers(ring):
    """toy_sample with the toy's schedule equals a DDPMScheduler fed with the same noise."""
    abar = ring.alphas_cumprod
    alphas = abar / torch.cat([torch.ones(1), abar[:-1]])
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100, trained_betas=(1 - alphas).numpy(),
                                        clip_sample=False)
    gen = dpo.generator("test")
    x = torch.randn(500, 2, generator=gen)
    for t in reversed(range(100)):
        x = scheduler.step(ring(x, torch.full((500,), t)), t, x, generator=gen).prev_sample
    assert torch.allclose(dpo.toy_sample(ring, abar, 500, dpo.generator("test")), x, atol=1e-3)


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
    names = {(255, 0, 0): "red", (0, 0, 255): "blue", (255,) * 3: "white", (0, 0, 0): "black"}
    middle = item["images"][:, :, 16, 16].float()
    return [names.get(tuple((pixel / 51).round().mul(51).int().tolist()), "other")
            for pixel in middle]


def test_ties_are_dropped_without_decoding(tmp_path, capsys):
    """Ties (and missing labels) go, by their label alone: their images are not even images."""
    rows = [pick(), *(pick(label, b"not an image") for label in (0.5, None, 0.5))]
    pairs = image_pairs(parquet(tmp_path / "pairs.parquet", rows))
    assert len(pairs) == 1 and "3 ties" in capsys.readouterr().out
    assert colours(pairs[0, 0]) == ["red", "blue"]


def test_preferred_comes_first(tmp_path):
    """label_0 = 1 prefers jpg_0, label_0 = 0 prefers jpg_1; chosen and preferred are what they say,
    whether images lie in a table or as files beside pairs.jsonl."""
    pairs = image_pairs(parquet(tmp_path / "pick.parquet", [pick(1.0), pick(0.0)]))
    assert colours(pairs[0, 0]) == ["red", "blue"] == colours(pairs[0, 1])[::-1]
    red, blue = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
    table = datasets.Dataset.from_list(
        [{"prompt": "p", "chosen": red, "rejected": blue}],
        features=datasets.Features(prompt=datasets.Value("string"), chosen=datasets.Image(),
                                   rejected=datasets.Image()))
    (tmp_path / "hub").mkdir()
    table.to_parquet(str(tmp_path / "hub" / "train-00000-of-00001.parquet"))
    assert colours(image_pairs(tmp_path / "hub")[0, 0]) == ["red", "blue"]
    (tmp_path / "own").mkdir()
    for name in ("red", "blue"):
        (tmp_path / "own" / f"{name}.jpg").write_bytes(jpeg(name))
    line = {"prompt": "p", "preferred": "blue.jpg", "rejected": "red.jpg"}
    (tmp_path / "own" / "pairs.jsonl").write_text(json.dumps(line) + "\n")
    assert colours(image_pairs(tmp_path / "own")[0, 0]) == ["blue", "red"]


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


def test_square_is_scaled_and_cut(tmp_path):
    """The short side is scaled, and cut where it should be, as diffusers' image processor does."""
    gradient = Image.linear_gradient("L").resize((96, 48)).convert("RGB").rotate(90, expand=True)
    processor = diffusers.image_processor.VaeImageProcessor()
    whole = (processor.preprocess(gradient, height=64, width=32)[0] + 1) * 127.5
    pixels = dpo.square(gradient, 32, 0.5, 0.25, flip=False)
    assert pixels.dtype == torch.uint8 and (pixels - whole[:, 8:40]).abs().max() < 3
    assert torch.equal(dpo.square(gradient, 32, 0.5, 0.25, flip=True), pixels.flip(2))
    crop = (processor.preprocess(gradient, height=32, width=32, resize_mode="crop")[0] + 1) * 127.5
    assert (dpo.square(gradient, 32, 0.5, 0.5, flip=False) - crop).abs().max() < 3


def test_every_readable_image_is_read_right():
    """CMYK, grey, palette, transparent, 16-bit and EXIF-rotated images come out upright in RGB."""
    read = lambda data: dpo.read_image({"bytes": data, "path": None}, Path())  # noqa: E731
    assert read(jpeg("red", mode="RGB")).getpixel((5, 5))[0] > 250
    assert read(jpeg((0, 255, 255, 0), mode="CMYK")).getpixel((5, 5))[0] > 240
    assert read(jpeg(128, mode="L")).getpixel((5, 5)) == (128,) * 3
    palette = Image.new("RGB", (32, 32), "blue").convert("P", palette=Image.Palette.ADAPTIVE)
    assert read(jpeg(palette, form="PNG")).getpixel((5, 5)) == (0, 0, 255)
    assert read(jpeg((0, 0, 0, 0), mode="RGBA", form="PNG")).getpixel((5, 5)) == (255,) * 3
    assert read(jpeg(0x8080, mode="I;16", form="PNG")).getpixel((5, 5)) == (128,) * 3
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    assert read(jpeg("red", size=(40, 20), exif=exif)).size == (20, 40)


def test_unreadable_pairs_are_skipped_the_same_way_every_time(tmp_path):
    """Truncated, not an image, empty, 1 x 1, null: the next readable pair steps in, whether after
    it or from the start again, and the item says which rows could not be read, and why."""
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    broken = [jpeg(noise)[:900], b"GIF, honestly", b"", jpeg(size=(1, 1))]
    rows = [pick(1.0, data, caption=str(i)) for i, data in enumerate(broken)]
    rows = [*rows[:2], pick(caption="sound"), *rows[2:], pick(caption="last") | {"jpg_1": None}]
    pairs = image_pairs(parquet(tmp_path / "pairs.parquet", rows))
    for _ in range(2):
        items = [pairs[epoch, row] for epoch, row in ((0, 1), (0, 2), (3, 4), (0, 0))]
        assert [item["prompt"] for item in items] == ["sound"] * 4
        assert [item["unreadable"].count("row ") for item in items] == [1, 0, 4, 2]
    assert "1 x 1" in items[2]["unreadable"] and "jpg_0" in items[2]["unreadable"]
    assert "truncated" in items[3]["unreadable"].lower()
    nothing = image_pairs(parquet(tmp_path / "none.parquet", rows[:2]))
    with pytest.raises(dpo.Refusal, match="unreadable, pair after pair; the last: row 1: "):
        nothing[0, 0]


# ------------------------------------------------------------------------------ Stable Diffusion


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with tiny-sd15, tiny-sdxl, tiny-clip and pairs.parquet."""
    folder = tmp_path_factory.mktemp("tiny")
    for kind in ("sd15", "sdxl"):
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
        return errors_of(problem, x_w, x_l, batch["t"], batch["eps"], cond)


def sd_config(tiny, kind, *argv):
    return dpo.parse(["--model", str(tiny / f"tiny-{kind}"), "--data", str(tiny / "pairs.parquet"),
                      "--resolution", "64", "--batch", "4", "--micro-batch", "2", "--steps", "4",
                      "--workers", "0", *argv])


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_prompt_embeddings_by_hand(tiny, kind):
    """encode_prompts equals tokenizers and text encoders called by hand, prompts too long included;
    no prompt is "" for SD1.5 and zeros for SDXL."""
    problem = sd_problem(sd_config(tiny, kind))
    prompts, pipe = ["a red circle", "word " * 200, ""], problem.pipe
    cond = problem.encode_prompts(prompts)

    def by_hand(tokenizer, encoder):
        ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True,
                        return_tensors="pt").input_ids
        return encoder(ids, output_hidden_states=True)

    if kind == "sd15":
        assert set(cond) == {"prompt"}
        assert torch.equal(cond["prompt"], by_hand(pipe.tokenizer, pipe.text_encoder)[0])
    else:
        first = by_hand(pipe.tokenizer, pipe.text_encoder)
        second = by_hand(pipe.tokenizer_2, pipe.text_encoder_2)
        both = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], 2)
        for got, expected in (cond["prompt"], both), (cond["text_embeds"], second[0]):
            assert torch.equal(got[:2], expected[:2]) and not got[2].any()
        assert cond["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 3


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stable_diffusion_starts_at_log_2(tiny, kind, precision):
    """Before the first step policy = reference, to the last bit, also when one has fp32 weights
    under autocast and the other bf16 weights; beta is on half the mean squared error; and both
    halves of a pair have the same condition, of whatever size their images are."""
    cfg = sd_config(tiny, kind, "--precision", precision, "--checkpointing", "on")
    problem = sd_problem(cfg)
    batch = batch_of_pairs(problem, (0, 0), (0, 1))
    x_w, x_l, cond = problem.encode(batch)
    assert x_w.shape == (2, 4, 8, 8) and problem.weight[0].item() == 1 / (2 * 4 * 8 * 8)
    assert set(cond) == ({"prompt", "text_embeds", "time_ids"} if kind == "sdxl" else {"prompt"})
    assert all(torch.equal(*value.chunk(2)) for value in cond.values())
    err_w, err_l, ref_w, ref_l = errors_on(problem, batch)
    assert torch.equal(err_w, ref_w) and torch.equal(err_l, ref_l)
    assert all(p.dtype == torch.float32 for p in problem.policy.parameters())
    assert not any(p.requires_grad for p in problem.reference.parameters())
    assert problem.policy.unet.is_gradient_checkpointing


def test_stable_diffusion_errors_by_hand(tiny):
    """The SDXL error of a pair is half the mean squared error of the plain diffusers UNet."""
    problem = sd_problem(sd_config(tiny, "sdxl"))
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
        if batch["prompt"] == [""]:
            embeds, pooled = embeds * 0, pooled * 0
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
        hat = pipe.unet(noisy, t, embeds, added_cond_kwargs=added).sample
        assert result.item() == pytest.approx(0.5 * (hat - eps).square().mean().item(), rel=1e-4)


def test_v_prediction_and_folder_not_name(tiny, tmp_path):
    """Architecture and prediction type come from the folder, whatever it is called."""
    make_tiny.make_model(tmp_path / "my-sd15-lookalike", "sdxl", prediction_type="v_prediction")
    argv = ["--model", str(tmp_path / "my-sd15-lookalike"), "--data", str(tiny / "pairs.parquet"),
            "--resolution", "64"]
    cfg = dpo.parse(argv)
    assert (cfg.preset, cfg.beta, cfg.optimizer) == ("sdxl", 5000.0, "adafactor")
    assert sd_problem(cfg).prediction == "v_prediction"


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


def test_optimizers_are_the_released_ones():
    """A step of AdamW by hand: lr against the gradient's sign, and a decay of 0.01 lr times the
    weight. Adafactor at lr 1e-3 moves a weight by about that, not by that times its size."""
    weight = torch.nn.Parameter(torch.tensor([2.0, -2.0]))
    weight.grad = torch.tensor([3.0, -0.5])
    dpo.make_optimizer([weight], dpo.parse(["--model", "sd15", "--lr", "0.1"])).step()
    assert weight.tolist() == pytest.approx([2 * 0.999 - 0.1, -2 * 0.999 + 0.1], abs=1e-5)
    weight = torch.nn.Parameter(torch.full((8, 8), 0.01))
    weight.grad = torch.randn(8, 8)
    dpo.make_optimizer([weight], dpo.parse(["--model", "sdxl", "--lr", "1e-3"])).step()
    assert 3e-4 < (weight - 0.01).abs().mean().item() < 3e-3


def test_sft_is_the_denoising_loss_of_diffusers(tiny, tmp_path):
    """--method sft: loss and gradient norm are those of mse_loss(unet(noisy), noise) on the
    preferred images alone, as diffusers' examples write it, at a rate of 2.048e-6."""
    cfg = sd_config(tiny, "sd15", "--method", "sft", "--steps", "1", "--warmup", "0", "--batch",
                    "2", "--sample-every", "0", "--out", str(tmp_path / "run"))
    problem = sd_problem(cfg)
    batch = batch_of_pairs(problem, *next(dpo.pair_keys(len(problem.pairs), cfg, 0, 0, 1)))
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny / "tiny-sd15")
    with torch.no_grad():
        pixels = batch["images"][:, 0] / 127.5 - 1
        latents = pipe.vae.encode(pixels).latent_dist.mode() * 0.18215
        ids = pipe.tokenizer(batch["prompt"], padding="max_length", max_length=77,
                             return_tensors="pt").input_ids
        hidden = pipe.text_encoder(ids)[0]
    t, eps = batch["t"][:, 0], batch["eps"][:, 0]
    noisy = sd_schedule().add_noise(latents, eps, t)
    loss = torch.nn.functional.mse_loss(pipe.unet(noisy, t, hidden).sample, eps)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in pipe.unet.parameters()]).norm()
    row, = dpo.train(problem, cfg)
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5) and row["lr"] == 2.048e-6
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert row["reward_accuracy"] == 0.5


@pytest.mark.parametrize("kind, precision", [("sd15", "fp32"), ("sdxl", "fp32"), ("sdxl", "bf16")])
def test_lora(tiny, tmp_path, kind, precision):
    """--lora: adapters on every q, k, v and output; policy = reference to the last bit before
    training, the reference stays what it was while only the adapters move, in fp32; a run that was
    stopped ends with the same adapters; and pipe.load_lora_weights gives the policy's noise."""
    argv = ["--lora", "4", "--precision", precision, "--lr", "0.03", "--checkpointing", "on",
            "--save-every", "2", "--sample-every", "0"]
    cfg = sd_config(tiny, kind, *argv, "--out", str(tmp_path / "one"))
    problem = sd_problem(cfg)
    attentions = [m for m in problem.policy.unet.modules() if type(m).__name__ == "Attention"]
    assert len(problem.policy.adapters) == 2 * 4 * len(attentions) > 0
    batch = batch_of_pairs(problem, (0, 0), (0, 1))
    before = errors_on(problem, batch)
    assert torch.equal(before[0], before[2]) and torch.equal(before[1], before[3])
    trained = [p for p in problem.policy.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert len(trained) == len(problem.policy.adapters)
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
    assert same(one, two) and all(name.startswith("unet.") for name in one)
    if precision == "fp32":
        x = torch.randn(1, 4, 8, 8), torch.tensor([5]), problem.encode_prompts(["a cat"])
        pipe = diffusers.DiffusionPipeline.from_pretrained(tiny / f"tiny-{kind}")
        pipe.load_lora_weights(tmp_path / "one" / "lora")
        drawn = dpo.UNetPolicy(pipe.unet)(*x[:2], **x[2])
        assert torch.allclose(drawn, problem.policy(*x[:2], **x[2]), atol=1e-6)
        assert not torch.allclose(drawn, problem.reference(*x[:2], **x[2]), atol=1e-3)


def test_adapters_start_by_the_seed(tiny):
    """The same seed, the same adapters, on every process and after a restart; those of another
    rank or of another UNet are not loaded."""
    one, two, three = (sd_problem(sd_config(tiny, "sd15", "--lora", "2", "--seed", seed)).policy
                       for seed in "557")
    assert same(one.adapters, two.adapters) and not same(one.adapters, three.adapters)
    one.save(tiny / "adapters" / "rank-2")
    for kind, rank in ("sd15", "1"), ("sdxl", "2"):
        other = sd_problem(sd_config(tiny, kind, "--lora", rank)).policy
        with pytest.raises(dpo.Refusal, match="not adapters of this rank"):
            dpo.load_policy(other, tiny / "adapters" / "rank-2")


# ------------------------------------------------------------------------------------- whole runs

TOY = ["--toy", "--pairs", "500", "--batch", "8", "--micro-batch", "4", "--draws", "2", "--steps",
       "8", "--warmup", "2", "--save-every", "3", "--eval-every", "0"]


def command(*argv, processes=0, script="diffusion_dpo.py"):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(torchrun if processes else []), str(ROOT / script),
            *map(str, argv)]


def run(*argv, **how):
    """The command line in a process of its own; returns what it printed."""
    done = subprocess.run(command(*argv, **how), capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def train(*argv):
    """A toy run in this process, without the report."""
    cfg = dpo.parse([str(word) for word in argv])
    dpo.check_out(cfg)
    rows = dpo.train(dpo.Toy(cfg), cfg)
    return rows, weights(cfg.out)


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
    rows, _ = straight
    assert set(rows[0]) == set("""step loss reward_accuracy reward_margin err_policy_w err_policy_l
        err_ref_w err_ref_l logit_std grad_norm lr unreadable pairs_per_s
        peak_memory_gib""".split())
    first = rows[0]
    assert first["loss"] == pytest.approx(math.log(2)) and first["reward_accuracy"] == 0.5
    assert first["err_policy_w"] == first["err_ref_w"] and first["logit_std"] == 0
    lrs = [row["lr"] / 3e-3 for row in rows]
    assert lrs == pytest.approx([1 / 2, *(n / 8 for n in range(7, 0, -1))])  # warm-up 2, decay 8


def test_metrics_are_means_over_the_whole_batch(tmp_path):
    """The first row after an update, recomputed without the loop from all its pairs at once."""
    argv = [*TOY, "--steps", "1", "--gamma", "0.3", "--out", tmp_path / "run"]
    rows, _ = train(*argv)
    problem = dpo.Toy(dpo.parse([str(word) for word in argv]))
    order = torch.randperm(500, generator=dpo.generator(0, "order", 0))[:8].tolist()
    t, eps = draw(0, [(0, row) for row in order], 2, 100, (2,))
    four = errors_of(problem, problem.pairs.x_w[order], problem.pairs.x_l[order], t, eps, {})
    losses, logit = dpo.dpo_loss(*four, 0.5, 0.3)
    expected = {"loss": losses.mean(), "reward_accuracy": (logit > 0).float().mean(),
                "reward_margin": logit.mean(), "logit_std": logit.std(correction=0),
                "err_policy_w": four[0].mean(), "err_policy_l": four[1].mean(),
                "err_ref_w": four[2].mean(), "err_ref_l": four[3].mean()}
    for name, value in expected.items():
        assert rows[0][name] == pytest.approx(value.item(), rel=1e-4), name
    losses.mean().backward()
    norm = torch.stack([p.grad.norm() for p in problem.policy.parameters()]).norm().item()
    assert rows[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


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


def test_resumed_is_straight_bit_for_bit(straight, tmp_path):
    """Stopped by SIGTERM in the middle of a step, then started again: weights and metrics are those
    of the undisturbed run, a torn last line of metrics.jsonl does no harm, and Ctrl-C is again what
    it was."""
    out, calls = tmp_path / "run", []
    cfg = dpo.parse([*TOY, "--out", str(out)])
    problem, before = dpo.Toy(cfg), signal.getsignal(signal.SIGINT)
    encode = problem.encode

    def encode_and_stop(batch):
        calls.append(None)
        if len(calls) == 9:  # the first half of step 4, numbered from 0
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(batch)

    problem.encode = encode_and_stop
    with pytest.raises(SystemExit) as stopped:
        dpo.train(problem, cfg)
    assert stopped.value.code == 128 + signal.SIGTERM and len(calls) == 9
    assert (out / "checkpoint-00000004").is_dir()
    open(out / "metrics.jsonl", "a").write('{"step": 5, "los')
    rows, result = train(*TOY, "--out", out)
    assert same(result, straight[1]) and signal.getsignal(signal.SIGINT) is before
    for row, other in zip(rows, straight[0], strict=True):
        clock = {name: other[name] for name in ("pairs_per_s", "peak_memory_gib")}
        assert row | clock == other


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
    assert same(train(*TOY, "--out", out)[1], straight[1])
    left = sorted(path.name for path in out.iterdir() if "checkpoint" in path.name)
    assert left == ["checkpoint-00000006", "checkpoint-00000008"]
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


def child(out, file_size=None):
    """LONG in a process of its own, which may write no larger files: a disk that is full."""
    def target():
        sys.stderr = open(out.with_name("log"), "w")
        if file_size:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        dpo.main([*LONG, "--out", str(out)])

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def wait_for_step(running, out, step):
    metrics = out / "metrics.jsonl"
    while running() and (not metrics.exists() or metrics.read_text().count("\n") < step):
        time.sleep(0.002)


@pytest.mark.parametrize("times", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_again_and_again(undisturbed, tmp_path, times):
    """SIGKILL at any moment, while a checkpoint is written more often than not; a disk that is
    full; a newest checkpoint that is torn: the same command ends with the weights of the run that
    was left alone, bit for bit. A full disk is one clear line."""
    out, rng = tmp_path / "run", random.Random(times)
    for turn in range(times):
        kind = ("kill", "torn", "full disk")[turn % 3]
        process = child(out, 50_000 if kind == "full disk" else None)
        if kind == "full disk":
            process.join(60)
            error = out.with_name("log").read_text()
            assert process.exitcode == 2 and f"error: {out}/checkpoint-" in error, error
            assert "Traceback" not in error
            continue
        wait_for_step(process.is_alive, out, (turn + 1) * 50 // times - rng.randrange(3))
        time.sleep(rng.random() / 50)
        process.kill()
        process.join()
        found = sorted(out.glob("checkpoint-*"))
        if kind == "torn" and len(found) == 2:
            file = rng.choice([path for path in found[1].rglob("*") if path.is_file()])
            file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])
    process = child(out)
    process.join(60)
    assert process.exitcode == 0 and same(weights(out), undisturbed[1])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(60))


@pytest.mark.parametrize("times", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_two_processes_killed_and_restarted_are_one(undisturbed, tmp_path, times):
    """torchrun with 2 processes, gradients accumulated, one of which is killed: --max-restarts
    starts both again, and the run is that of one process that was left alone, up to rounding."""
    out, rng = tmp_path / "run", random.Random(times)
    line = command(*LONG, "--micro-batch", "2", "--out", out, processes=2)
    line.insert(line.index("--nproc_per_node"), f"--max-restarts={times}")
    process = subprocess.Popen(line, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for turn in range(times):
        wait_for_step(lambda: process.poll() is None, out, (turn + 1) * 50 // times)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        os.kill(int(rng.choice(children.stdout.split())), signal.SIGKILL)
        time.sleep(1)  # until torchrun has noticed
    assert process.wait(120) == 0
    assert same(weights(out), undisturbed[1], rtol=1e-2, atol=1e-4)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    for row, other in zip(map(json.loads, lines), undisturbed[0], strict=True):
        for name in ("loss", "reward_margin", "logit_std", "err_policy_l", "grad_norm"):
            assert row[name] == pytest.approx(other[name], rel=1e-2, abs=1e-4)


def test_no_whole_checkpoint_is_no_new_run(tmp_path, capsys):
    """A broken newest checkpoint, or one that would run code, is passed over with a word. If none
    can be read, the run is refused, and they stay where they are."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    out = tmp_path / "run"
    train(*TOY, "--out", out)
    torch.save(Evil(), out / "checkpoint-00000008" / "optimizer.pt")
    assert dpo.load_checkpoint(out, dpo.Toy(dpo.parse(TOY)).policy, SimpleNamespace(
        load_state_dict=dict)) == (6, 0)
    assert "passed over: {'checkpoint-00000008'" in capsys.readouterr().out
    (out / "checkpoint-00000006" / "optimizer.pt").write_bytes(b"torn")
    with pytest.raises(dpo.Refusal, match="no checkpoint can be read .*0008.*0006"):
        train(*TOY, "--out", out)
    assert len([*out.glob("checkpoint-*")]) == 2 and not (tmp_path / "evil").exists()


def test_non_finite_loss_stops_before_the_weights(tmp_path):
    """A NaN in step 2 ends the run with the weights of before step 2, saved, and says so."""
    out = tmp_path / "run"
    cfg = dpo.parse([*TOY, "--out", str(out)])
    problem, calls = dpo.Toy(cfg), []

    def encode(batch):
        calls.append({k: v.clone() for k, v in problem.policy.state_dict().items()})
        return batch["x_w"] * (math.nan if len(calls) == 5 else 1), batch["x_l"], {}

    problem.encode = encode
    with pytest.raises(SystemExit) as stopped:
        dpo.train(problem, cfg)
    assert stopped.value.code == 1
    saved = weights(out / "checkpoint-00000002")
    assert same(saved, calls[4]) and all(value.isfinite().all() for value in saved.values())


def test_gradient_is_clipped_to_norm_1(tmp_path, monkeypatch):
    """With plain gradient descent the weights move by lr exactly when the gradient is larger than
    1; the metrics keep its true norm."""
    monkeypatch.setattr(dpo, "make_optimizer", lambda p, cfg: torch.optim.SGD(p, lr=cfg.lr))
    cfg = dpo.parse([*TOY, "--steps", "1", "--beta", "50", "--out", str(tmp_path / "run")])
    problem = dpo.Toy(cfg)
    before = torch.cat([p.detach().flatten() for p in problem.policy.parameters()])
    row, = dpo.train(problem, cfg)
    moved = torch.cat([p.detach().flatten() for p in problem.policy.parameters()]) - before
    assert row["grad_norm"] > 2 and moved.norm().item() == pytest.approx(row["lr"], rel=1e-3)


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
    assert abs(results["reward_policy"] - results["reward_optimum"]) < 0.5
    assert "0.6931 (for dpo, gamma 0: log 2)" in capsys.readouterr().out
    cfg = dpo.parse([*argv, str(tmp_path / "b")])
    problem = dpo.Toy(cfg)
    problem.pairs.x_w, problem.pairs.x_l = problem.pairs.x_l, problem.pairs.x_w
    dpo.train(problem, cfg)
    assert problem.measure()[0]["reward_policy"] < results["reward_reference"] - 0.2
    dpo.draw_picture(None, tmp_path / "none.png", [])
    assert "no figure" in capsys.readouterr().out


def test_sdxl_by_torchrun(tiny, tmp_path):
    """The real path: tiny SDXL, 2 processes that fill one cache, image workers, checkpointing,
    Adafactor, evaluation in training. SIGTERM to the second process and its workers makes the first
    one save, and both leave; the same command goes on; the UNet then loads by from_pretrained, has
    moved, and equals that of one process that was never stopped, as do --evaluate's numbers."""
    argv = ["--model", tiny / "tiny-sdxl", "--data", tiny / "pairs.parquet", "--resolution", "64",
            "--batch", "4", "--steps", "4", "--lr", "1e-3", "--sample-every", "0", "--eval-split",
            "train[:9]", "--eval-every", "2"]
    two = [*argv, "--micro-batch", "1", "--workers", "1", "--cache", tmp_path / "cache", "--out",
           tmp_path / "two"]
    process = subprocess.Popen(command(*two, processes=2), start_new_session=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_for_step(lambda: process.poll() is None, tmp_path / "two", 1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.killpg(max(map(int, children.stdout.split())), signal.SIGTERM)
    assert process.wait(60) != 0
    stopped = [int(path.name[-8:]) for path in (tmp_path / "two").glob("checkpoint-*")]
    assert stopped and 0 < max(stopped) < 4

    printed = run(*two, processes=2)
    assert "8 ties dropped" in printed and f"from step {max(stopped)}" in printed
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "two", subfolder="unet")
    start = diffusers.UNet2DConditionModel.from_pretrained(tiny / "tiny-sdxl", subfolder="unet")
    assert not same(unet.state_dict(), start.state_dict(), atol=1e-4)
    cfg = dpo.parse([*map(str, argv), "--workers", "0", "--cache", str(tmp_path / "cache"),
                     "--out", str(tmp_path / "one")])
    rows = dpo.train(sd_problem(cfg), cfg)
    assert same(weights(tmp_path / "one", "unet"), weights(tmp_path / "two", "unet"), atol=5e-4)
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    for row, other in zip(map(json.loads, lines), rows, strict=True):
        for name in ({"loss", "err_policy_l", "held_out_margin", "held_out_rise_w"} & row.keys()):
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5)
    run(*two, "--evaluate", processes=2)
    numbers = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    for name in "accuracy", "margin", "rise_l", "pairs":
        assert numbers[name] == pytest.approx(rows[-1][f"held_out_{name}"], rel=1e-3, abs=1e-5)


def test_training_in_bf16_starts_at_log_2(tiny, tmp_path):
    """--precision bf16 reaches the forward pass, in training and when it is judged; the weights
    stay fp32, and step 0 is log 2 still."""
    cfg = sd_config(tiny, "sd15", "--precision", "bf16", "--steps", "1", "--sample-every", "0",
                    "--eval-split", "train[:3]", "--out", str(tmp_path / "run"))
    problem, seen = sd_problem(cfg), []
    problem.policy.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    rows = dpo.train(problem, cfg)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-7) and rows[0]["logit_std"] == 0
    trained = len(seen)
    dpo.evaluate(problem, cfg)
    assert len(seen) > trained > 0 and set(seen) == {torch.bfloat16}
    assert {value.dtype for value in weights(cfg.out, "unet").values()} == {torch.float32}


def test_too_many_unreadable_pairs_stop_the_run(tiny, tmp_path, capsys):
    """An unreadable pair is named once and counted, also after a restart. More than 1 %, and more
    than one: exit code 2."""
    rows = [pick(1.0, caption="fine", size=(64, 64)) for _ in range(8)]
    rows[1]["jpg_1"] = b"broken"
    path = parquet(tmp_path / "pairs.parquet", rows)
    argv = ["--model", str(tiny / "tiny-sd15"), "--resolution", "64", "--batch", "8", "--workers",
            "0", "--save-every", "1", "--steps", "3", "--sample-every", "0", "--data", path,
            "--out", str(tmp_path / "run")]
    cfg = dpo.parse(argv)
    for _ in range(2):  # the second start reads the count, and stops at once
        with pytest.raises(SystemExit) as stopped:
            dpo.train(sd_problem(cfg), cfg)
        assert stopped.value.code == 2
        printed = capsys.readouterr().out
        assert f"--data {path}: 2 pairs, over 1 %, are unreadable" in printed
        assert "the policy after 2 steps" in printed
    steps = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["unreadable"] for line in steps] == [1, 1]
    assert not (tmp_path / "run" / "unet").exists()


# ------------------------------------------------------------------------------ judging a policy


def judge(change=lambda problem: None, **settings):
    """evaluate() of the toy's policy, after `change` has been at the problem."""
    cfg = dpo.parse([*TOY, "--micro-batch", "500", "--batch", "500"])
    for name, value in settings.items():
        setattr(cfg, name, value)
    problem = dpo.Toy(cfg)
    change(problem)
    return dpo.evaluate(problem, cfg)


def test_the_reference_scores_half(trained):
    """A tie is half right: the reference itself has accuracy 1/2 and margin 0. A trained policy is
    judged the same whatever the seed of the run, and the batch that pairs come in."""
    results = judge()
    assert results["accuracy"] == 0.5 and results["margin"] == 0 and results["pairs"] == 5000
    assert results["standard_error"] == pytest.approx(0.5 / 5000**0.5)
    one = judge(trained)
    assert judge(trained, seed=7) == one != results
    assert judge(trained, micro_batch=300) == pytest.approx(one, rel=1e-4)


@pytest.fixture(scope="module")
def trained(straight):
    """A change of the problem: its policy is that of `straight`, further from the reference."""
    return lambda problem: problem.policy.load_state_dict(
        {name: 3 * value for name, value in straight[1].items()})


def test_evaluation_by_hand(trained, monkeypatch):
    """Every number of evaluate(), from a loop over pairs."""
    monkeypatch.setattr(dpo, "HELD_OUT_PAIRS", 400)
    results = judge(trained, gamma=0.2)
    problem = dpo.Toy(dpo.parse(TOY))
    trained(problem)
    pairs, right, margins, agree, rises = problem.held_out, 0, [], 0, torch.zeros(2).double()
    for row in range(400):
        t, eps = dpo.draw_noise("held out", dpo.HELD_OUT, row, 10, 100, (2,))
        x = torch.stack([pairs.x_w[row], pairs.x_l[row]])
        abar = problem.alphas_cumprod[t][:, None, None]
        x_t = abar.sqrt() * x + (1 - abar).sqrt() * eps[:, None]  # (10, 2, 2)
        with torch.no_grad():
            e_w, e_l, r_w, r_l = torch.cat([(
                net(x_t.flatten(0, 1), t.repeat_interleave(2)).view(10, 2, 2) - eps[:, None]
                ).square().sum(2) * problem.weight[t][:, None]
                for net in (problem.policy, problem.reference)], 1).mean(0).tolist()
        margins.append(0.7 * (e_l - e_w) - 0.5 * (r_l - r_w))
        right += margins[-1] > 0
        rises += torch.tensor([e_w - r_w, e_l - r_l])
        truth = dpo.toy_reward(x)
        agree += (margins[-1] > 0) == (truth[0] > truth[1]).item()
    share = right / 400
    assert results["accuracy"] == pytest.approx(share, abs=2e-3)
    assert results["standard_error"] == pytest.approx((share * (1 - share) / 400) ** 0.5, rel=1e-2)
    assert results["margin"] == pytest.approx(sum(margins) / 400, rel=1e-3)
    assert [results["rise_w"], results["rise_l"]] == pytest.approx(rises / 400, rel=1e-3)
    assert results["kendall_tau"] == pytest.approx(2 * agree / 400 - 1, abs=4e-3)
    assert results["accuracy_of_true_reward"] == pytest.approx(
        (pairs.true > 0).float().mean().item())


def test_toy_proxy_is_hacked(ring):
    """Under the proxy's own optimum the proxy is higher and the true reward lower, the lower beta;
    --proxy labels the training pairs by it, and the held-out ones by the true reward. Labels are
    those of Bradley-Terry: as sure as the sigmoid of the rewards' difference, no more, no less."""
    means = [dpo.toy_optimum(ring, beta, 0, dpo.toy_proxy)[1] for beta in (2, 0.5, 0.25)]
    true, proxy = ([mean(f) for mean in means] for f in (dpo.toy_reward, dpo.toy_proxy))
    start = dpo.toy_density(ring.log_prob)[1](dpo.toy_reward)
    assert true == sorted(true, reverse=True) and proxy == sorted(proxy)
    assert true[0] > start > true[1]
    hacked, plain = (dpo.Toy(dpo.parse(["--toy", "--pairs", "50000", *flag]))
                     for flag in (["--proxy"], []))
    assert torch.equal(hacked.held_out.x_w, plain.held_out.x_w)
    for pairs, reward, other in ((hacked.pairs, dpo.toy_proxy, dpo.toy_reward),
                                 (plain.pairs, dpo.toy_reward, dpo.toy_proxy)):
        sure, wrong = (f(pairs.x_w) - f(pairs.x_l) for f in (reward, other))
        assert ((sure > 0).float().mean() - sure.abs().sigmoid().mean()).abs() < 0.01
        assert (wrong > 0).float().mean() < wrong.abs().sigmoid().mean() - 0.02


def test_a_stop_waits_for_no_evaluation(tmp_path, monkeypatch):
    """The machine dies in an evaluation: all steps before it are in a checkpoint. Started again,
    it is made up for, and it changes nothing about the run."""
    monkeypatch.setattr(dpo, "HELD_OUT_PAIRS", 100)
    argv = [*TOY, "--save-every", "100", "--eval-every", "5", "--out", tmp_path / "run"]

    def die(problem, cfg):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dpo, "evaluate", die)
        train(*argv)
    assert [path.name for path in (tmp_path / "run").glob("check*")] == ["checkpoint-00000005"]
    rows, result = train(*argv)
    assert same(result, train(*TOY, "--out", tmp_path / "plain")[1])
    judged = [(row["step"], row["held_out_accuracy"]) for row in rows if "loss" not in row]
    assert [step for step, _ in judged] == [5, 8]
    dpo.main([*map(str, argv), "--evaluate"])
    numbers = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert numbers["accuracy"] == judged[-1][1]


def test_evaluate_images(tiny, tmp_path, capsys):
    """--evaluate of a tiny SD1.5: what --out ended with, its newest checkpoint if it has not ended,
    or a folder that is named; an unreadable pair is left out, and none steps in for it."""
    rows = [pick(1.0, caption=str(i), size=(64, 64)) for i in range(5)]
    sound = parquet(tmp_path / "sound.parquet", rows)
    broken = parquet(tmp_path / "broken.parquet", [*rows, pick(1.0, b"broken")])
    out = tmp_path / "run"
    argv = ["--model", str(tiny / "tiny-sd15"), "--resolution", "64", "--workers", "0", "--beta",
            "300", "--out", str(out)]
    dpo.main([*argv, "--data", sound, "--batch", "2", "--steps", "2", "--lr", "1e-3",
              "--save-every", "1", "--eval-every", "2", "--eval-split", "train[-2:]"])
    line = (out / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(line)["held_out_pairs"] == 2

    def evaluation(data, *folder):
        dpo.main([*argv, "--data", data, "--evaluate", *folder])
        return json.loads((out / "evaluation.json").read_text())

    one, two = evaluation(sound), evaluation(broken)
    assert one["beta"] == 300 and 0 < abs(one["margin"]) and one["policy"].endswith("run/unet")
    assert (two["pairs"], two["unreadable"]) == (5, 1)
    for name in ("accuracy", "margin", "rise_w", "rise_l"):
        assert two[name] == pytest.approx(one[name], rel=1e-3)
    shutil.rmtree(out / "unet")
    newest, first = evaluation(sound), evaluation(sound, str(out / "checkpoint-00000001"))
    assert newest["policy"].endswith("checkpoint-00000002/unet")
    assert newest["margin"] == one["margin"] != first["margin"]
    start = evaluation(sound, str(tiny / "tiny-sd15"))
    assert start["accuracy"] == 0.5 and start["rise_w"] == 0
    assert f"policy      {tiny}/tiny-sd15/unet" in capsys.readouterr().out


def test_too_little_memory_is_one_line(monkeypatch, tmp_path, capsys):
    """It says what would take less."""
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nmore")

    monkeypatch.setattr(dpo, "train", full)
    with pytest.raises(SystemExit) as stopped:
        dpo.main(["--toy", "--out", str(tmp_path / "run")])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and "3 GiB" in lines[0]
    assert "--micro-batch 1" in lines[0] and "--lora 16" in lines[0]


def cached(tiny, tmp_path, *argv, kind="sdxl"):
    return sd_problem(sd_config(tiny, kind, "--cache", str(tmp_path / "cache"), *argv))


def latents(problem, *rows, epoch=dpo.HELD_OUT):
    """x_w and x_l (B, 4, 8, 8) of these rows."""
    items = [{"prompt": "", "unreadable": ""} | problem.pairs[epoch, row] for row in rows]
    return problem.encode(torch.utils.data.default_collate(items))[:2]


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_cached_is_encoded_bit_for_bit(tiny, tmp_path, kind):
    """With --cache a pair has the latents that encoding it alone gives, to the last bit; every
    epoch sees the middle of the picture, not flipped, and loses captions as before. In bf16 the
    latents are rounded to 11 bits."""
    plain, quick = sd_problem(sd_config(tiny, kind)), cached(tiny, tmp_path, kind=kind)
    for row in range(6):
        alone, kept = latents(plain, row), latents(quick, row)
        assert torch.equal(alone[0], kept[0]) and torch.equal(alone[1], kept[1])
        assert torch.equal(latents(quick, row, epoch=3)[1], kept[1])
    prompts = [quick.pairs[3, row]["prompt"] for row in range(56)]
    assert prompts == [plain.pairs[3, row]["prompt"] for row in range(56)]
    assert 3 < prompts.count("") < 25
    rounded, kept = latents(cached(tiny, tmp_path, "--precision", "bf16", kind=kind), 5), kept
    assert not torch.equal(rounded[0], kept[0])
    torch.testing.assert_close(rounded[0], kept[0], rtol=2**-11, atol=1e-6)


def test_cache_is_made_once_and_goes_on(tiny, tmp_path, monkeypatch):
    """What lies in --cache is not made again, a missing piece is, and nothing else; another model,
    resolution, judge or changed pictures have a cache of their own."""
    monkeypatch.setattr(dpo, "CHUNK", 20)
    made, real = [], dpo.StableDiffusion.encode_images
    monkeypatch.setattr(dpo.StableDiffusion, "encode_images",
                        lambda problem, images: made.append(0) or real(problem, images))

    def pairs_encoded(*argv, **more):
        made.clear()
        return cached(tiny, tmp_path, *argv, **more), len(made)

    first, count = pairs_encoded()
    assert count == 56
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 3 and pairs_encoded()[1] == 0
    before = latents(first, 30)
    files[1].unlink()
    again, count = pairs_encoded()
    assert count == 20 and all(map(torch.equal, latents(again, 30), before))
    assert pairs_encoded("--resolution", "72")[1] == pairs_encoded(kind="sd15")[1] == 56
    load = dpo.load_pairs  # labels of another judge: preferred and rejected change places
    monkeypatch.setattr(dpo, "load_pairs", lambda *args: (
        *load(*args)[:2], [1 - label for label in load(*args)[2]]))
    turned, count = pairs_encoded()
    assert count == 56 and all(map(torch.equal, latents(turned, 30), before[::-1]))


def test_cache_notices_changed_pictures(tiny, tmp_path):
    """A picture beside pairs.jsonl that was painted over is encoded again; a null in the place of a
    picture is one unreadable pair, with the cache as without."""
    data = tmp_path / "data"
    data.mkdir()
    for name, colour in ("a.png", "red"), ("b.png", "blue"):
        Image.new("RGB", (64, 64), colour).save(data / name)
    lines = [{"prompt": "a", "preferred": "a.png", "rejected": other} for other in ("b.png", None)]
    (data / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    one = cached(tiny, tmp_path, "--data", str(data))
    Image.new("RGB", (64, 64), "green").save(data / "a.png")
    two = cached(tiny, tmp_path, "--data", str(data))
    (x_w, x_l), (y_w, y_l) = latents(one, 0), latents(two, 0)
    assert torch.equal(x_l, y_l) and not torch.equal(x_w, y_w)
    item = one.pairs[0, 1]
    assert item["unreadable"] == "row 1: could not be read when --cache was filled"
    assert torch.equal(item["latents"], one.pairs[0, 0]["latents"])
    assert sd_problem(sd_config(tiny, "sd15", "--data", str(data))).pairs[0, 1]["unreadable"]


# ------------------------------------------------------------------------------------- bad input


def wrong_inputs():
    """(command line, words of the one line that it gets). {tiny} and {tmp} are folders."""
    sd = "--model {tiny}/tiny-sd15 --resolution 64 --data "
    return [
        ("", "required"), ("--toy --model sd15", "not allowed with"),
        ("--toy --bet 3", "arguments: --bet"), ("--toy --gamma -1", "--gamma"),
        ("--toy --beta 0", "--beta: 0 is not at least"), ("--toy --beta inf", "--beta"),
        ("--toy --beta x", "--beta: invalid number value: 'x'"), ("--toy --beta nan", "--beta"),
        ("--toy --steps 1.5", "--steps"), ("--toy --precision fp16", "--precision"),
        ("--toy --data x", "--data means nothing to --model toy"),
        ("--model sd15 --pairs 3", "--pairs means nothing to --model sd15"),
        ("--toy --batch 30 --micro-batch 4", "should be a multiple of 1 processes x --micro-batch"),
        ("--model nowhere/nothing", "--model nowhere/nothing"), ("--model {tmp}", "--model"),
        ("--toy --out {tmp}/file.txt", "Not a directory: '{tmp}/file.txt'"),
        ("--toy --out /proc/run", "/proc/run"), ("--toy --out {tmp}", "holds no run"),
        ("--toy --lora 4", "--lora means nothing"), ("--toy --method ppo", "--method"),
        (sd + "{tiny}/pairs.parquet --cache {tmp}/file.txt", "file.txt"),
        (sd + "{tmp}/absent.parquet", "no such file"), (sd + "{tmp}/file.txt", "--data"),
        (sd + "{tmp}/empty", "--data"), (sd + "{tmp}/ties.parquet", "all 1 pairs of split train"),
        (sd + "{tmp}/columns.parquet", "has the columns ['a', 'b']"),
        (sd + "{tmp}/label.parquet", "label_0 holds 7.0"), (sd + "{tmp}/nan.parquet", "holds nan"),
        (sd + "{tiny}/pairs.parquet --split test", 'split "test"'),
        (sd + "{tmp}/numbers.parquet", "--data {tmp}/numbers.parquet"),
        (sd + "{tmp}/none.parquet", "no data"),
        ("--toy --out {tmp}/strange", "holds no run; name a new folder"),
        ("--toy --evaluate --out {tmp}/empty", "{tmp}/empty: no policy in it"),
        ("--toy --evaluate {tmp}/torn --out {tmp}/empty", "{tmp}/torn"),
        ("--toy --evaluate {tiny}/tiny-sd15/unet --out {tmp}/empty", "it should fit --model"),
        (sd + "{tiny}/pairs.parquet --eval-every 3", "it needs --eval-split"),
        (sd + "{tiny}/pairs.parquet --resolution 100", "--resolution 100"),
    ]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "file.txt").write_text("hello")
    for name in "empty", "strange", "torn":
        (folder / name).mkdir()
    (folder / "strange" / "config.json").write_text('{"config": 7}')
    (folder / "torn" / dpo.WEIGHTS).write_bytes(b"torn")
    parquet(folder / "ties.parquet", [pick(0.5)])
    parquet(folder / "columns.parquet", [{"a": 1, "b": 2}])
    parquet(folder / "label.parquet", [pick(1.0), pick(7.0)])
    parquet(folder / "nan.parquet", [pick(1.0), pick(math.nan)])
    parquet(folder / "numbers.parquet", [{"caption": "", "jpg_0": 1, "jpg_1": 2, "label_0": 1.0}])
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
    words = words.format(tiny=tiny, tmp=wrong)
    assert len(error) == 1 and words in error[0] and error[0].startswith("error: ")


def test_help_fits_a_screen(capsys):
    """--help: at most 100 columns, at most 60 lines, every flag with its meaning."""
    with pytest.raises(SystemExit):
        dpo.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 100
    assert all(f"--{flag}" in "\n".join(lines) for flag in dpo.FLAGS)


def test_defaults():
    """The settings of the paper and its launchers: beta, batch, steps, rate, warm-up, optimizer; a
    rate that is constant for images and falls for the toy."""
    toy, sd15, sdxl, sft = (dpo.parse(argv.split()) for argv in (
        "--toy", "--model sd15", "--model sdxl", "--model sd15 --method sft"))
    for cfg, *expected in ((toy, 0.5, 32, 3000, 3e-3, 150, "adamw", 64, 3000, 32),
                           (sd15, 2000, 2048, 2000, 2.048e-5, 500, "adamw", 1, 0, 4),
                           (sdxl, 5000, 2048, 2000, 8.192e-6, 500, "adafactor", 1, 0, 2),
                           (sft, 2000, 2048, 2000, 2.048e-6, 500, "adamw", 1, 0, 4)):
        found = [getattr(cfg, name) for name in "beta batch steps lr warmup optimizer draws decay "
                 "micro_batch".split()]
        assert all(a == b or a == pytest.approx(b) for a, b in zip(found, expected, strict=True))
    assert (sd15.resolution, sdxl.resolution, sd15.caption_dropout) == (512, 1024, 0.2)
    assert (sd15.checkpointing, sdxl.checkpointing, sd15.lora, sd15.gamma) == ("off", "on", 0, 0)
    assert dpo.parse("--model sd15 --beta 4000".split()).lr == pytest.approx(1.024e-5)
    assert dpo.parse("--toy --batch 12".split()).micro_batch == 4  # a divisor of both


def test_budgets():
    """The script stays small: lines, code tokens (without comments, docstrings and layout), flags,
    long and nested functions; and its first four parts, a lecture, end by line 500."""
    source = (ROOT / "diffusion_dpo.py").read_text()
    tree, lines = ast.parse(source), source.splitlines()
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    nested = [node for outer in functions for node in ast.walk(outer)
              if node is not outer and isinstance(node, ast.FunctionDef)]
    documented = [tree, *functions, *(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef))]
    docstrings = {node.body[0].lineno for node in documented if ast.get_docstring(node)}
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
              tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline)
              if token.type not in layout
              and not (token.type == tokenize.STRING and token.start[0] in docstrings)]
    assert len(lines) <= 1250 and len(tokens) <= 10_500 and len(dpo.FLAGS) + 2 <= 34
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 80
    assert len(nested) <= 12
    assert next(i for i, line in enumerate(lines) if "5. Preference data" in line) <= 500
