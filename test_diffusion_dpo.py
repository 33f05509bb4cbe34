"""Proof that diffusion_dpo.py computes what it says. Each test's docstring is one claim.

    pytest                  # about two minutes on two cores, no network, no GPU
    pytest -m slow          # runs killed again and again; a minute more

The yardsticks are independent of the script: closed forms, a literal transcription of the equation,
torch.distributions, diffusers' schedulers and pipelines, and the same run done another way.
"""

import ast
import collections
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import tokenize
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]

import datasets
import diffusers
import make_tiny
import psutil
import pytest
import torch
import transformers
from peft import get_peft_model_state_dict
from PIL import Image, UnidentifiedImageError
from safetensors.torch import load_file, save_file
from torch import distributions
from tqdm import tqdm

import diffusion_dpo as dpo
from toy import distance

# tqdm's own lock is shared with forked processes. One that is killed may hold it for ever.
tqdm.set_lock(threading.RLock())
torch.set_num_threads(1)  # two processes of a test on two cores; and sums in one order
datasets.disable_progress_bars()
for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()


# -------------------------------------------------------------------------------------- helpers

def sd_schedule(prediction_type="epsilon"):
    """The noise levels of SD1.5."""
    return diffusers.DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=prediction_type)


def spy_task(prediction="epsilon", function=torch.zeros_like):
    """A task with the noise levels of SD1.5, and the list of the calls that its networks get. The
    reference is `function`, and the policy is half of it."""
    calls = []

    def network(scale, x_t, t, **cond):
        calls.append((torch.is_grad_enabled(), cond))
        return scale * function(x_t)

    task = SimpleNamespace(
        policy=partial(network, 0.5),
        reference=partial(network, 1.0),
        prediction=prediction,
        alphas_cumprod=sd_schedule().alphas_cumprod,
        weight=torch.linspace(0, 1, 1000))
    return task, calls


def draw(seed, keys, draws, T, shape):
    """t (B, K) and eps (B, K, *shape) of the pairs `keys`."""
    noise = [dpo.draw_noise(seed, *key, draws, T, shape) for key in keys]
    t, eps = zip(*noise, strict=True)
    return torch.stack(t), torch.stack(eps)


def random_batch():
    """x_w, x_l, t, eps of two pairs with three draws each, as pair_errors takes them."""
    x_w, x_l = torch.randn(2, 2, 4, 8, 8, generator=dpo.seeded_generator("batch"))
    t, eps = draw(0, [(0, 0), (0, 1)], 3, 1000, (4, 8, 8))
    return x_w, x_l, t, eps


def jpeg(colour="red", size=(32, 32), mode="RGB", form="JPEG", **save):
    """The bytes of an image file. `colour` may also be an image, or bytes, which stay as they are.
    """
    if isinstance(colour, bytes):
        return colour
    image = colour
    if not isinstance(image, Image.Image):
        image = Image.new(mode, size, colour)
    file = io.BytesIO()
    image.save(file, form, **save)
    return file.getvalue()


def parquet(path, rows):
    """Write a table of `rows` and return its path."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return str(path)


def pick(label=1.0, first="red", second="blue", caption="a picture", **image):
    """A row of Pick-a-Pic. See jpeg() for its images."""
    return {
        "caption": caption,
        "label_0": label,
        "jpg_0": jpeg(first, **image),
        "jpg_1": jpeg(second, **image)}


def image_pairs(data, **flags):
    """ImagePairs of --data, with the given flags."""
    flags = {"resolution": 32, "caption-dropout": 0} | flags
    argv = [f"--{name}={value}" for name, value in flags.items()]
    cfg = dpo.parse(["--model=sd15", f"--data={data}", *argv])
    return dpo.open_pairs(cfg, "train")


def colours(item):
    """The colour in the middle of the two images of an item, as words."""
    middles = item["images"][:, :, 16, 16].tolist()
    return ["red" if red > blue else "blue" for red, _, blue in middles]


# ------------------------------------------------------------------------------------- the loss

@pytest.mark.parametrize("err_w, err_l, gamma, loss, logit", [
    (1.0, 1.2, 0.0, 0.437488, 0.6),
    (1.0, 1.2, 1.0, 0.371101, 0.8),
    (1.1, 1.0, 1.0, 0.744397, -0.1),  # step 0: the policy is the reference
])
def test_worked_example(err_w, err_l, gamma, loss, logit):
    """The numbers of dpo_loss's docstring: reference errors 1.1 and 1.0, beta = 2."""
    four = torch.tensor([err_w, err_l, 1.1, 1.0])
    results = dpo.dpo_loss(*four, 2.0, gamma)
    assert torch.tensor(results).tolist() == pytest.approx([loss, logit], abs=1e-6)


def test_loss_is_eq_14():
    """Loss and logit are those of Eq. 14, or of SEE-DPO for gamma > 0, transcribed literally."""
    beta, gamma = 1.0, 0.3
    four = torch.rand(4, 16, generator=dpo.seeded_generator(0), dtype=torch.float64)
    e_w, e_l, r_w, r_l = four
    losses, logit = dpo.dpo_loss(*four, beta, gamma)
    inside = -((beta + gamma) * (e_w - e_l) - beta * (r_w - r_l))
    sigmoid = 1 / (1 + torch.exp(-inside))
    assert torch.allclose(losses, -torch.log(sigmoid))
    assert torch.allclose(logit, inside)


def test_loss_is_finite_at_beta_5000():
    """With errors that differ by whole units, either way, loss and gradient stay finite in fp32.
    If policy and reference differ in the last bit of an error, the logit shows it exactly."""
    err = torch.tensor([[0.0, 4.0], [4.0, 0.0]], requires_grad=True)
    losses, _ = dpo.dpo_loss(*err, torch.ones(2), torch.ones(2), 5000.0)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert err.grad.isfinite().all()

    _, logit = dpo.dpo_loss(*torch.tensor([1, 4, 1 + 2**-23, 4]), 5000.0)
    assert logit == 5000 * 2**-23


# ----------------------------------------------------------------- noise, and the errors of pairs

def literal_squares(network, prediction, x_0, t, eps):
    """||target - network(x_t)||^2 (B,) of one draw per image, with x_t and target by diffusers."""
    schedule = sd_schedule()
    x_t = schedule.add_noise(x_0, eps, t)
    target = eps
    if prediction == "v_prediction":
        target = schedule.get_velocity(x_0, eps, t)
    if prediction == "flow":  # a straight line from x_0 to eps, at the same SNR
        abar_t = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
        sigma = 1 / (1 + (abar_t / (1 - abar_t)).sqrt())
        x_t = (1 - sigma) * x_0 + sigma * eps
        target = eps - x_0
    return (target - network(x_t, t)).square().sum((1, 2, 3))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_pair_errors_are_the_literal_ones(prediction):
    """The errors are those of a loop, in which both halves of a pair share t and eps. Draws are
    averaged, so that dpo_loss takes one error per pair. Each network is called once, the reference
    first and without gradient, and each half has its own prompt."""
    task, calls = spy_task(prediction, torch.tanh)
    x_w, x_l, t, eps = random_batch()
    results = iter(dpo.pair_errors(task, x_w, x_l, t, eps, {"prompt": torch.arange(4)}))
    assert [with_grad for with_grad, _ in calls] == [False, True]
    for _, cond in calls:
        assert cond["prompt"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]

    for network in (task.policy, task.reference):
        for x_0 in (x_w, x_l):
            expected = 0
            for k in range(3):
                squares = literal_squares(network, prediction, x_0, t[:, k], eps[:, k])
                expected += task.weight[t[:, k]] * squares / 3
            assert torch.allclose(next(results), expected, rtol=1e-5)


def test_errors_are_squared_in_fp32():
    """A prediction in bf16 gives the same error as its fp32 copy."""
    half, _ = spy_task(function=torch.Tensor.bfloat16)
    copy, _ = spy_task(function=lambda x: x.bfloat16().float())
    batch = random_batch()
    err_w, *_ = dpo.pair_errors(half, *batch, {})
    expected, *_ = dpo.pair_errors(copy, *batch, {})
    assert err_w.dtype == torch.float32
    assert torch.equal(err_w, expected)


def test_noise_is_standard_and_t_uniform():
    """Each of the K draws has eps from N(0, 1) and t uniform on 0 .. T-1. Half of them have the
    other half's t and -eps, and within a half t is evenly spaced."""
    keys = [(0, row) for row in range(3000)]
    t, eps = draw(0, keys, 4, 10, (2,))
    counts = torch.nn.functional.one_hot(t, 10).sum(0)  # (K, T)
    assert (counts - 300).abs().max() < 90  # 5 standard deviations
    std, mean = torch.std_mean(eps, (0, 2))
    assert mean.abs().max() < 0.05
    assert (std - 1).abs().max() < 0.05

    assert torch.equal(eps[:, :2], -eps[:, 2:])
    assert torch.equal(t[:, :2], t[:, 2:])
    assert ((t[:, 1] - t[:, 0]) % 10 == 5).all()


def test_noise_depends_on_its_key():
    """The same seed, epoch and row give the same noise again. Another seed, epoch or row gives
    other noise. The draws of a pair differ, too."""
    keys = [(0, 7), (0, 7), (1, 7), (0, 8)]
    _, eps = draw(0, keys, 4, 10, (2,))
    _, other = draw(1, keys, 4, 10, (2,))
    noise = torch.cat([eps, other]).flatten(0, 1)
    assert len(noise.unique(dim=0)) == 24


@pytest.mark.parametrize("t", [1, 500, 999])
def test_elbo_weight_is_a_kl(t):
    """omega_t ||eps - eps_hat||^2 is the KL of two steps from x_t to x_{t-1}, with eps and eps_hat.
    diffusers makes the steps. omega_0 is omega_1."""
    scheduler = sd_schedule()
    weight = dpo.elbo_weight(scheduler.alphas_cumprod)
    x_t, eps, eps_hat = torch.randn(3, 1, 20)
    std = scheduler._get_variance(t).sqrt()
    steps = []
    for prediction in (eps, eps_hat):
        gen = dpo.seeded_generator("step")  # the same noise for both: their means differ as they do
        x = scheduler.step(prediction, t, x_t, generator=gen).prev_sample
        steps.append(distributions.Normal(x, std))
    kl = distributions.kl_divergence(*steps).sum()
    error = (eps - eps_hat).square().sum()
    assert torch.isclose(weight[t] / 1000 * error, kl, rtol=1e-3)
    assert weight[0] == weight[1]


# -------------------------------------------------------------------------------------- the toy

@pytest.fixture
def toy():
    return dpo.Toy(dpo.parse(["--toy", "--gamma=0.25"]))


def test_reference_is_the_exact_score(toy):
    """eps_ref = -s_t grad log p_t at every t, where torch.distributions builds p_t."""
    ring = toy.reference
    abar_t = ring.alphas_cumprod[:, None, None]
    std = (abar_t * ring.std**2 + 1 - abar_t).sqrt()
    modes = distributions.Normal(abar_t.sqrt() * ring.means, std)  # (100, 8, 2)

    x = torch.randn(100, 2, requires_grad=True)
    log_p = modes.log_prob(x[:, None]).sum(2).logsumexp(1)
    log_p.sum().backward()
    expected = -(1 - abar_t[:, 0]).sqrt() * x.grad
    assert torch.allclose(ring(x, torch.arange(100)), expected, atol=1e-4, rtol=1e-4)


def test_optimum_is_optimal(toy):
    """On a grid, the gradient of E[R] - beta KL + gamma H is 0 at p*. (It is concave in p.) And
    measure_toy finds the same p*."""
    axis = (torch.arange(120) + 0.5) / 12 - 5
    x = torch.cartesian_prod(axis, axis).double()
    log_ref = toy.reference.log_prob(x)
    logits = toy.log_optimum(x).requires_grad_()
    log_p = logits.log_softmax(0)
    p = log_p.exp()
    reward = dpo.toy_reward(x)
    terms = reward - toy.cfg.beta * (log_p - log_ref) - toy.cfg.gamma * log_p
    (p * terms).sum().backward()
    assert logits.grad.abs().max() < 1e-12

    numbers, densities = distance.measure_toy(toy, samples=100)
    in_squares = p.view(30, 4, 30, 4).sum((1, 3))
    assert torch.allclose(densities["optimum"], in_squares, atol=1e-4)
    assert numbers["reward_optimum"] == pytest.approx((p * reward).sum().item(), abs=1e-3)


def test_samples_have_their_density(toy, monkeypatch):
    """Samples of the reference fill the squares as its density says. measure_toy samples a policy
    with noise, and then without."""
    x, etas = toy.reference.sample(200_000, dpo.seeded_generator("test")), []
    monkeypatch.setattr(distance, "toy_sample", lambda *given, eta=1: etas.append(eta) or x)
    _, densities = distance.measure_toy(toy, samples=200_000)
    assert distance.total_variation(densities["policy"], densities["reference"]) < 0.02
    assert etas == [1, 0]


def test_total_variation_and_entropy():
    """Points in two squares have a distance of 1, and so have points on and off the grid."""
    here, there = torch.eye(2)
    assert distance.total_variation(here, there) == 1
    assert distance.total_variation(here, 0 * there) == 1
    assert distance.entropy(torch.full((30, 30), 1 / 900)) == pytest.approx(math.log(10 * 10))


@pytest.mark.parametrize("kind, eta", [
    (diffusers.DDPMScheduler, 1.0),
    (diffusers.DDIMScheduler, 0.0)])
def test_sampler_is_diffusers(toy, kind, eta):
    """With the same noise, toy_sample makes what DDPMScheduler and, for eta = 0, DDIM's make."""
    abar = toy.alphas_cumprod
    betas = 1 - abar / torch.cat([torch.ones(1), abar[:-1]])
    scheduler = kind(100, trained_betas=betas.numpy(), clip_sample=False)
    scheduler.set_timesteps(100)

    gen = dpo.seeded_generator("test")
    x = torch.randn(500, 2, generator=gen)
    for t in scheduler.timesteps:
        eps = toy.reference(x, t.repeat(500))
        x = scheduler.step(eps, t, x, generator=gen).prev_sample
    samples = distance.toy_sample(toy.reference, abar, 500, dpo.seeded_generator("test"), eta)
    assert torch.allclose(samples, x, atol=1e-3)


# ------------------------------------------------------------------------------ preference data

def test_ties_are_dropped(tmp_path):
    """Ties and missing labels go, by their label alone: here their images are not even images. Of
    the others the preferred image comes first. A split may be cut, and a caption may be missing."""
    ties = [pick(label, b"not an image") for label in (0.5, None, 0.5)]
    path = parquet(tmp_path / "pairs.parquet", [*ties, pick(1.0, caption=None), pick(0.0)])
    pairs = image_pairs(path)
    assert len(pairs) == 2
    assert colours(pairs[0, 0]) == ["red", "blue"]
    assert colours(pairs[0, 1]) == ["blue", "red"]
    assert pairs[0, 0]["prompt"] == ""

    assert dpo.load_pairs(path, "train[-3:]")["label"][:] == [0.5, 1, 0]


@pytest.mark.parametrize("data, file, first, second, folder", [
    (".", "pairs.jsonl", "preferred", "rejected", ""),
    ("train.json", "train.json", "path1", "path2", ""),  # HPDv3
    (".", "train-00000-of-00001.parquet", "chosen", "rejected", ""),  # as on the hub
    ("any.parquet", "any.parquet", "preferred", "rejected", "{}/"),
    ("link", "pairs.jsonl", "preferred", "rejected", "{}/")])
def test_the_preferred_file_comes_first(tmp_path, monkeypatch, data, file, first, second, folder):
    """preferred, chosen and path1 are the preferred images, in a list of image files that lies
    beside them. --data is the list, or its folder. The folder may be a link, and the paths in the
    list may be absolute. An image may be a link, and other lines may be empty."""
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to(tmp_path)
    for colour in ("red", "blue"):
        Path(f"{colour}.jpg").write_bytes(jpeg(colour))
    folder = folder.format(tmp_path)
    row = {"prompt": "p", second: f"{folder}blue.jpg", first: f"{folder}red.jpg"}
    if file.endswith(".parquet"):
        parquet(file, [row])
        Path("red.jpg").symlink_to(Path("red.jpg").rename("../red.jpg"))
    else:
        Path(file).write_text("\n" + json.dumps([{}, row] if file == "train.json" else row))
    assert colours(image_pairs(data)[0, -1]) == ["red", "blue"]


def test_data_is_what_has_that_very_name(tmp_path, monkeypatch):
    """A name with brackets, stars or ~ stands for itself, and so does a folder that is called
    parquet. All files of a folder are read, except those of another split."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "a"))
    names = ["set1", "set[1]", "v1", "v*", "a/~", "~/~", "parquet/more/valentine", "parquet/train",
             "parquet/test/0"]
    for n, name in enumerate(names, 1):
        parquet(tmp_path / f"{name}.parquet", [pick()] * n)
    for data, n in {"set[1].parquet": 2, "v*.parquet": 4, "~": 6, "parquet": 7 + 8}.items():
        assert len(image_pairs(data)) == n
    assert len(dpo.load_pairs("parquet", "test")) == 9


def test_a_file_that_was_replaced_is_read_anew(tmp_path, monkeypatch):
    """A file that was replaced is read again, even if the new one has the old date. This also
    holds if the library keeps tables in memory."""
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 10**9)
    path = parquet(tmp_path / "pairs.parquet", [pick(1.0)])
    before = os.stat(path)
    assert colours(image_pairs(path)[0, 0]) == ["red", "blue"]
    parquet(path, [pick(0.0)])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert colours(image_pairs(path)[0, 0]) == ["blue", "red"]


def test_rows_without_a_label_are_dropped(tmp_path):
    """Pick-a-Pic marks such a row by has_label, or by two labels that do not add up to 1."""
    marks = [(1.0, 0.0, True), (1.0, 0.0, False), (0.0, 0.0, True), (1.0, 1.0, True)]
    rows = [pick(label) | {"label_1": label_1, "has_label": has_label}
            for label, label_1, has_label in marks]
    pairs = image_pairs(parquet(tmp_path / "pairs.parquet", rows))
    assert pairs.table["row"][:] == ["0 of train"]


def white_corner(width, height):
    """A black image whose upper left quarter is white."""
    image = Image.new("RGB", (width, height), "black")
    image.paste("white", (0, 0, width // 2, height // 2))
    return jpeg(image)


def test_a_pair_is_flipped_and_cropped_as_one(tmp_path):
    """A white corner is in the same place in both images of a pair, even if their sizes differ.
    Over the epochs, all four cases of flip and crop occur. Another seed crops elsewhere."""
    row = pick(1.0, white_corner(80, 40), white_corner(160, 80))
    pairs = image_pairs(parquet(tmp_path / "pairs.parquet", [row]))
    seen = set()
    for epoch in range(60):
        preferred, rejected = pairs[epoch, 0]["images"].float()
        assert (preferred - rejected).abs().mean() < 12
        is_white = (preferred[0, 4] > 127).tolist()
        seen.add((is_white[2], is_white[29]))
    assert len(seen) == 4

    pairs.cfg.seed = 1
    assert (pairs[epoch, 0]["images"][0] != preferred).any()


def test_caption_dropout(tmp_path):
    """A caption is dropped for about the share asked for, and never for a share of 0."""
    path = parquet(tmp_path / "pairs.parquet", [pick()])
    for share, least, most in (0, 0, 0), (0.3, 60, 120):
        pairs = image_pairs(path, **{"caption-dropout": share})
        prompts = [pairs[epoch, 0]["prompt"] for epoch in range(300)]
        assert least <= prompts.count("") <= most


def test_held_out_pairs_are_shown_plainly(tmp_path):
    """A pair to be judged comes with its caption. Its centre is shown, and not flipped."""
    row = pick(first=white_corner(80, 40))
    path = parquet(tmp_path / "pairs.parquet", [row])
    for seed in range(4):
        pairs = image_pairs(path, seed=seed, **{"caption-dropout": 1})
        item = pairs[dpo.HELD_OUT, 0]
        assert item["prompt"] == "a picture"
        left, right = item["images"][0, 0, 4].chunk(2)
        assert left.min() > 127 > right.max()


def test_crop_square():
    """The short side is scaled, bilinear and antialiased. The long side is cut at v."""
    pixels = torch.randint(256, (1, 1, 96, 48), dtype=torch.uint8)
    scaled = torch.nn.functional.interpolate(
        pixels, (64, 32), mode="bilinear", antialias=True)
    expected = scaled[0, :, 8:40]  # v = 0.25: 8 of 32 rows are cut at the top
    image = Image.fromarray(pixels[0, 0].numpy()).convert("RGB")
    square = dpo.crop_square(image, 32, 0.5, 0.25, flip=False)
    difference = square.int() - expected.int()
    assert difference.abs().max() < 3


@pytest.mark.parametrize("colour, mode, form, pixel", [
    ((0, 255, 255, 0), "CMYK", "JPEG", (254, 0, 0)),
    pytest.param(
        jpeg("blue", mode="P", form="PNG", transparency=0), "", "", (255, 255, 255), id="clear P"),
    ((0, 0, 0, 0), "RGBA", "WEBP", (255, 255, 255))])
def test_images_of_all_modes_are_read(colour, mode, form, pixel):
    """CMYK, palette and transparent images are read in RGB, on white."""
    data = jpeg(colour, mode=mode, form=form)
    image = dpo.read_image({"bytes": data, "path": None}, Path())
    assert image.getpixel((5, 5)) == pytest.approx(pixel, abs=2)


def test_rotated_images_are_read_upright():
    """A photo of a camera that was held sideways is turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = jpeg(size=(40, 20), exif=exif)
    assert dpo.read_image({"bytes": data, "path": None}, Path()).size == (20, 40)


def test_unreadable_pairs_are_blank(tmp_path, capsys):
    """A pair that cannot be read is blank and counted, and named by its row in the file."""
    rows = [
        pick(0.5),
        pick(first=jpeg()[:-100]),  # truncated
        pick(),
        pick(first=b"not an image"),
        pick() | {"jpg_1": None}]
    pairs = image_pairs(parquet(tmp_path / "pairs.parquet", rows))
    items = [pairs[0, row] for row in range(4)]
    batch = torch.utils.data.default_collate(items)
    assert batch["unreadable"].tolist() == [1, 0, 1, 1]
    assert not batch["images"][0].any()
    assert re.findall(r"row (\d+)", capsys.readouterr().out) == ["1", "3", "4"]


@pytest.mark.parametrize("path, image", [
    ("bomb", {"colour": 1, "mode": "1", "size": (8200, 8200), "form": "PNG"}),
    ("dot", {"size": (1, 1)}),
    ("16 bits", {"colour": 0, "mode": "I;16", "form": "PNG"}),
    ("program", {"form": "EPS"}),  # PIL would start Ghostscript
    ("../outside", {}),
    ("{}/absolute", {})])
def test_hostile_images_are_refused(tmp_path, path, image):
    """Images that are too large or too small are not read. Nor are odd modes and formats, nor
    files outside of the data's folder."""
    root = tmp_path / "data"
    root.mkdir()
    path = path.format(tmp_path)
    (root / path).write_bytes(jpeg(**image))
    with pytest.raises((ValueError, UnidentifiedImageError)):
        dpo.read_image({"bytes": None, "path": path}, root)


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


def sd_line(tiny, model, flags=""):
    """Flags for a tiny model in the folder `tiny`, and a run of 4 steps of 4 pairs."""
    return (f"--model {tiny}/{model} --data {tiny}/pairs.parquet --resolution 64 --batch 4"
            f" --micro-batch 2 --steps 4 --workers 0 --sample-every 0 {flags}")


def sd_task(tiny, model, flags=""):
    """A tiny model as a task."""
    cfg = dpo.parse(sd_line(tiny, model, flags).split())
    return dpo.make_task(cfg, torch.device("cpu"))


def batch_of_pairs(task, *keys):
    """The batch of `keys` as the loop gets it."""
    return torch.utils.data.default_collate([task.pairs[key] for key in keys])


def errors_of(task, batch):
    """The four errors of a batch, without a graph."""
    with torch.no_grad():
        return dpo.batch_errors(task, batch, 1, 0)


def same(a, b, rtol=0, atol=0):
    """Do two dicts of tensors agree? To the last bit, if no tolerance is given."""
    return a.keys() == b.keys() and all(
        torch.allclose(a[name], b[name], rtol=rtol, atol=atol) for name in a)


@pytest.mark.parametrize("model", ["tiny-sd15", "tiny-sdxl", "tiny-sd35", "without-t5"])
def test_prompts_are_those_of_guidance(tiny, model):
    """encode_prompts gives what the pipeline's guidance takes with a prompt and without one."""
    if model == "without-t5":
        make_tiny.make_model(tiny / model, "sd35", t5=None)
    pipe = sd_task(tiny, model).pipe
    others = [None, None] if "transformer" in pipe.components else []
    for prompt in ("a red circle", "word " * 200):
        prompted, empty, *pooled = pipe.encode_prompt(
            prompt, *others, device="cpu", num_images_per_prompt=1,
            do_classifier_free_guidance=True)
        found = list(dpo.encode_prompts(pipe, [prompt, ""], 64).values())
        torch.testing.assert_close(found[0], torch.cat([prompted, empty]))
        if pooled:
            torch.testing.assert_close(found[1], torch.cat(pooled))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_step_0_is_log_2(tiny, kind, precision, dtype):
    """At step 0 every loss is log 2 to the last bit, although the policy has fp32 weights and the
    reference bf16 ones. Both halves of a pair have the same condition."""
    flags = f"--precision {precision} --checkpointing --lora 0 --lr 1e-5"
    task, dtypes = sd_task(tiny, f"tiny-{kind}", flags), []
    task.policy.register_forward_hook(lambda network, inputs, output: dtypes.append(output.dtype))
    batch = batch_of_pairs(task, (0, 4), (dpo.HELD_OUT, 4))
    sums = dpo.dpo_step(task, batch, task.cfg)
    assert sums[0] == 2 * torch.tensor(math.log(2)) and sums[2] == 0

    cond = task.encode(batch)[2]
    assert all(torch.equal(*value.chunk(2)) for value in cond.values())
    assert dtypes == [dtype] and task.policy.network.is_gradient_checkpointing
    assert all(p.dtype == torch.float32 for p in task.policy.parameters())


def sdxl_by_hand(pipe, mean, t, eps, prompt, pooled):
    """The latents, and the error of SDXL in eps."""
    latents = 0.13025 * mean
    noisy = sd_schedule().add_noise(latents, eps, t)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    return latents, pipe.unet(noisy, t, prompt, added_cond_kwargs=added).sample - eps


def sd35_by_hand(pipe, mean, t, eps, prompt, pooled):
    """The latents, and the error of SD3.5 in the velocity. Its noise levels are the quantiles of a
    logit-normal distribution that is shifted by 3."""
    latents = 1.5305 * (mean - 0.0609)
    u = 1 / (1 + math.exp(-statistics.NormalDist().inv_cdf((t.item() + 0.5) / 1000)))
    sigma = 3 * u / (1 + 2 * u)
    noisy, time = (1 - sigma) * latents + sigma * eps, torch.tensor([1000 * sigma])
    return latents, pipe.transformer(noisy, prompt, pooled, time).sample - (eps - latents)


@pytest.mark.parametrize("kind, by_hand", [("sdxl", sdxl_by_hand), ("sd35", sd35_by_hand)])
def test_errors_by_hand(tiny, kind, by_hand):
    """The error of an image is half the mean squared error of the plain network of diffusers."""
    task = sd_task(tiny, f"tiny-{kind}", "--caption-dropout 0")
    batch = batch_of_pairs(task, (0, 5))
    results = torch.cat(errors_of(task, batch)[2:])

    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny / f"tiny-{kind}")
    mean = pipe.vae.encode(batch["images"][0] / 127.5 - 1).latent_dist.mean
    prompt, _, pooled, _ = pipe.encode_prompt(
        batch["prompt"] * 2, None, None, do_classifier_free_guidance=False)
    t, eps = dpo.draw_noise(0, 0, 5, 1, 1000, task.shape)
    latents, error = by_hand(pipe, mean, t, eps, prompt, pooled)
    assert torch.allclose(latents, torch.cat(task.encode(batch)[:2]), atol=1e-5)
    assert torch.allclose(results, 0.5 * error.square().mean((1, 2, 3)), rtol=1e-4)


def test_build_and_prediction_come_from_the_folder(tiny, monkeypatch):
    """A folder called sd15 that holds an SDXL of v-prediction is trained as such. Weights that
    would be unpickled are refused."""
    folder = tiny / "looks-like-sd15"
    make_tiny.make_model(folder, "sdxl", prediction_type="v_prediction")
    task = sd_task(tiny, folder.name)
    assert task.prediction == "v_prediction" and task.cfg.beta == 5000
    monkeypatch.chdir(folder / "unet")
    assert dpo.parse(["--model", ".."]).out == "runs/looks-like-sd15"

    file = folder / "unet" / dpo.WEIGHTS_FILE
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(dpo.UserError, match="unet.*safetensors"):
        dpo.load_pipeline(str(folder))


@pytest.mark.parametrize("kind, part, old, new", [
    ("sd15", "text_encoder", "layers.1", "x"),
    ("sd15", "vae", "decoder.conv_in", "x"),
    ("sd15", "unet", "conv", "conv"),  # of another shape
    ("sd35", "transformer", "pos_embed", "x")])
def test_missing_weights_are_refused(tiny, tmp_path, kind, part, old, new):
    """A part whose file has other names for its weights would start from random numbers. One line
    refuses it, and names the part and the weights."""
    shutil.copytree(tiny / f"tiny-{kind}", tmp_path, dirs_exist_ok=True)
    file, = (tmp_path / part).glob("*.safetensors")
    weights = {re.sub(old, new, name): value[:1] if old == new else value
               for name, value in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(dpo.UserError, match=f"--model {tmp_path}: {part}: .* missing.*{old}"):
        dpo.load_pipeline(str(tmp_path))


@pytest.mark.parametrize("kind, part, other, named", [
    ("sd15", "unet", {"out_channels": 8}, "other: it is not built like"),
    ("sdxl", "vae", {"latents_mean": [1.0] * 4}, "latents_mean")])
def test_another_build_is_refused(tiny, kind, part, other, named):
    """A UNet that predicts other latents than the VAE's is found before the training begins. So is
    a VAE whose latents have a mean, which SDXL's pipeline would undo."""
    make_tiny.make_model(tiny / "other", kind, **{part: make_tiny.TINY[kind][part] | other})
    with pytest.raises(dpo.UserError, match=named):
        sd_task(tiny, "other")


def test_other_files_of_a_model(tiny, tmp_path):
    """Weights in half precision are read if there are no others. A pointer of git-lfs in place of
    weights is refused, and so is another kind of VAE."""
    shutil.copytree(tiny / "tiny-sd15", tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    model = dpo.load_pipeline(str(tmp_path))
    model.vae = diffusers.AutoencoderTiny()
    model.save_pretrained(tmp_path)
    with pytest.raises(dpo.UserError, match=f"--model {tmp_path}"):
        sd_task(tmp_path.parent, tmp_path.name, f"--data {tiny}/pairs.parquet")

    (tmp_path / "text_encoder/model.safetensors").write_text("version https://git-lfs.github.com")
    with pytest.raises(dpo.UserError, match=f"--model {tmp_path}: text_encoder"):
        dpo.load_pipeline(str(tmp_path))


@pytest.mark.parametrize("part, scheduler", [
    ("unet", diffusers.FlowMatchEulerDiscreteScheduler()),
    ("transformer", diffusers.DDPMScheduler()),
    ("transformer", diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))])
def test_other_noise_is_refused(part, scheduler):
    """Only DDPM's noise for a UNet and SD3's flow for a transformer are known."""
    pipe = SimpleNamespace(scheduler=scheduler, components={part: None})
    with pytest.raises(dpo.UserError, match="--model"):
        dpo.read_schedule(pipe)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_optimizers_by_hand(optimizer):
    """The first step of both goes lr against the gradient's sign, whatever the size of the weight,
    and 0.01 lr times the weight towards 0."""
    weight = torch.nn.Parameter(torch.tensor([2.0, -2.0]))
    weight.grad = torch.tensor([3.0, -0.5])
    cfg = dpo.parse(f"--model sd15 --lr 0.1 --optimizer {optimizer}".split())
    dpo.make_optimizer([weight], cfg).step()
    assert weight.tolist() == pytest.approx([2 * 0.999 - 0.1, -2 * 0.999 + 0.1], abs=1e-5)


def test_sft_is_the_denoising_loss_of_diffusers(tiny):
    """The loss of --method sft is mse_loss(unet(noisy), noise) on the preferred images alone, as
    the text-to-image examples of diffusers write it."""
    task, keys = sd_task(tiny, "tiny-sd15", "--method sft"), [(0, 0), (0, 1)]
    batch = batch_of_pairs(task, *keys)
    sums = dpo.dpo_step(task, batch, task.cfg)

    latents, _, cond = task.encode(batch)
    t, eps = draw(0, keys, 1, 1000, task.shape)
    noisy = sd_schedule().add_noise(latents, eps[:, 0], t[:, 0])
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny / "tiny-sd15", subfolder="unet")
    predicted = unet(noisy, t[:, 0], cond["prompt"][:2]).sample
    loss = torch.nn.functional.mse_loss(predicted, eps[:, 0])
    assert sums[0].item() / 2 == pytest.approx(loss.item(), rel=1e-5)


def train_and_resume(tiny, kind, flags, out):
    """Train in out/one, then go on in out/two from the middle, and assert that the saved weights
    are the same to the last bit. Returns the first task."""
    one, two = (sd_task(tiny, f"tiny-{kind}", f"{flags} --save-every 2 --out {out / name}")
                for name in ("one", "two"))
    dpo.train(one, one.cfg)
    shutil.copytree(out / "one", out / "two")
    for path in (one.subfolder, "checkpoint-00000004"):
        shutil.rmtree(out / "two" / path)

    rows = dpo.train(two, two.cfg)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    first, second = out.glob(f"*/{one.subfolder}/*.safetensors")
    assert same(load_file(first), load_file(second))
    return one


def adapters(task):
    """The trained parameters, by their names."""
    return {name: p for name, p in task.policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind, precision, layers", [
    ("sd15", "fp32", 32), ("sdxl", "bf16", 64), ("sd35", "fp32", 31)])
def test_lora_run(tiny, tmp_path, kind, precision, layers):
    """Only adapters are trained, in fp32: on every q, k, v and output, in SD3 also for the text.
    The reference stays what it was. What load_lora_weights loads predicts as the policy does."""
    flags = f"--lr 0.03 --checkpointing --precision {precision}"
    start = sd_task(tiny, f"tiny-{kind}", f"{flags} --lora 0")
    task = train_and_resume(tiny, kind, f"{flags} --lora 4", tmp_path)
    batch = batch_of_pairs(task, (0, 0), (0, 1))
    before, after = errors_of(start, batch), errors_of(task, batch)
    assert torch.equal(after[2], before[2])

    pattern = r"\.attn\d?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)\.lora_[AB]\."
    assert all(re.search(pattern, name) for name in adapters(task))
    assert [p.dtype for p in adapters(task).values()] == [torch.float32] * 2 * layers

    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny / f"tiny-{kind}")
    pipe.load_lora_weights(tmp_path / "one" / "lora")
    loaded = dpo.Denoiser(getattr(pipe, task.part), task.policy.times)
    x_t, t = torch.randn(1, *task.shape), torch.tensor([5])
    cond = dpo.encode_prompts(task.pipe, ["a cat"], 64)
    with torch.no_grad(), dpo.autocast(task):
        prediction, policy, reference = (
            each(x_t, t, **cond) for each in (loaded, task.policy, task.reference))
    assert torch.allclose(prediction, policy, atol=1e-6)
    assert not torch.allclose(prediction, reference, atol=1e-3)


def test_the_recipe_makes_kohyas_file(tiny, tmp_path, monkeypatch):
    """Its lines write adapters with kohya's names, which diffusers reads as the same adapters."""
    monkeypatch.chdir(tmp_path)
    task = sd_task(tiny, "tiny-sdxl", "--lora 2 --lr 1")
    task.save(Path("runs/mine/lora"))
    text = (ROOT / "toy/recipe.md").read_text()
    lines = re.findall(r"^    ((?:from diffusers.utils|from safetensors|lora =|save_file).*)", text,
                       re.M)
    exec("\n".join(lines), {})
    assert all(name.startswith("lora_unet_") for name in load_file("runs/mine/mine.safetensors"))
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny / "tiny-sdxl")
    pipe.load_lora_weights("runs/mine", weight_name="mine.safetensors")
    layers = get_peft_model_state_dict(pipe.unet, adapter_name="default_0")
    assert same(layers, get_peft_model_state_dict(task.policy.network))


def test_adapters_start_by_the_seed(tiny):
    """The same seed makes the same adapters, on every process and after a restart. An
    adapter is two matrices: A has a standard deviation of 1 / rank, and B is 0."""
    one, two, three = (adapters(sd_task(tiny, "tiny-sd15", f"--lora 2 --lr 1 --seed {seed}"))
                       for seed in (5, 5, 7))
    assert same(one, two) and not same(one, three)
    assert [p.std().item() for p in one.values()] == pytest.approx([1 / 2, 0] * 32, rel=0.3)


def test_other_adapters_are_refused(tiny, tmp_path):
    """Adapters of another rank, of another network or of few layers are not loaded. Those that fit
    are."""
    def load(kind, rank):
        task = sd_task(tiny, f"tiny-{kind}", f"--lora {rank} --lr 1 --seed 1")
        dpo.load_weights(task, tmp_path)
        return adapters(task)

    saved, file = sd_task(tiny, "tiny-sd15", "--lora 2 --lr 1"), tmp_path / dpo.LORA_FILE
    saved.save(tmp_path)
    assert same(load("sd15", 2), adapters(saved))
    for kind, rank in (("sd15", 1), ("sdxl", 2), ("sd15", 2)):
        with pytest.raises(dpo.UserError, match=f"{tmp_path}.*lora_A"):
            load(kind, rank)
        save_file(dict(list(load_file(file).items())[:-2]), file)


# ------------------------------------------------------------------------------------ whole runs

TOY = ("--toy --batch 8 --micro-batch 4 --draws 2 --steps 8 --warmup 0.25 --save-every 3"
       " --eval-every 0")
LONG = "--steps 60 --save-every 2"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


def weights(out, folder="policy"):
    return load_file(out / folder / dpo.WEIGHTS_FILE)


def toy_task(flags=""):
    return dpo.Toy(dpo.parse(f"{TOY} {flags}".split()))


def test_the_toy_starts_by_the_seed():
    """Another seed makes another policy and other pairs. It does not change the held-out pairs."""
    one, two = (toy_task(f"--seed {seed}") for seed in (5, 7))
    assert not same(adapters(one), adapters(two))
    assert not same(vars(one.pairs), vars(two.pairs))
    assert same(vars(one.held_out), vars(two.held_out))


def train_toy(out, flags=""):
    """The rows and the weights of a toy run in this process, without the report."""
    task = toy_task(f"{flags} --out {out}")
    dpo.check_out(task.cfg)
    return dpo.train(task, task.cfg), weights(out)


def metrics(out):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# The script without the report of the toy.
QUICK = ("import diffusion_dpo as dpo, toy.distance; toy.distance.report_toy = print;"
         " dpo.run_command(dpo.main)")


def torchrun(flags, restarts, where="--standalone --nproc_per_node=2"):
    """The script in 2 processes, which are started again after a failure."""
    words = [sys.executable, "-m", "torch.distributed.run", *where.split(),
             f"--max-restarts={restarts}", "--no-python", sys.executable, "-c", QUICK]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return psutil.Popen([*words, *flags.split()], env=env)


def wait_for_step(out, step):
    """Wait until metrics.jsonl has so many rows, at most for two minutes."""
    file, began = out / "metrics.jsonl", time.monotonic()
    while not file.exists() or file.read_text().count("\n") < step:
        assert time.monotonic() < began + 120
        time.sleep(0.002)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The rows and the weights of the toy run TOY, undisturbed."""
    return train_toy(tmp_path_factory.mktemp("straight") / "run")


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """The same of the longer run LONG."""
    return train_toy(tmp_path_factory.mktemp("long") / "run", LONG)


def test_metrics(straight):
    """Every step has a row with the promised numbers. Step 0 shows log 2 and 1/2. The rate rises
    over the warm-up, and falls over the decay."""
    rows, _ = straight
    assert [row["step"] for row in rows] == list(range(8))
    assert rows[0].keys() ^ dpo.METRICS == {
        "step", "logit_square", "logit_std", "grad_norm", "lr", "pairs_per_s", "peak_memory_gib"}
    assert rows[0]["loss"] == pytest.approx(math.log(2)) and rows[0]["reward_accuracy"] == 0.5
    rates = [row["lr"] / 3e-3 for row in rows]
    assert rates == pytest.approx([1 / 2, *(n / 8 for n in range(7, 0, -1))])


def metrics_by_hand(errors, beta, gamma):
    """The mean loss over all pairs at once, and the metrics."""
    losses, logit = dpo.dpo_loss(*errors, beta, gamma)
    values = torch.stack([losses, (logit > 0).float(), logit, logit**2, *errors, 0 * logit])
    expected = dict(zip(dpo.METRICS, values.mean(1).tolist(), strict=True))
    del expected["logit_square"]
    return losses.mean(), expected | {"logit_std": logit.std(correction=0).item()}


@pytest.mark.parametrize("beta", [0.05, 50])
def test_a_step_by_hand(out, monkeypatch, beta):
    """A step of two micro-batches, recomputed from all its pairs at once. The metrics are means
    over the batch. The gradient is that of the mean loss, clipped to norm 1."""
    monkeypatch.setattr(dpo, "make_optimizer", lambda p, cfg: torch.optim.SGD(p, lr=cfg.lr))
    flags = f"--steps 1 --seed 3 --beta {beta} --gamma 0.03 --out {out}"
    task, trained = toy_task(flags), toy_task(flags)
    row, = dpo.train(trained, trained.cfg)

    pairs, gen = task.pairs, dpo.seeded_generator(3, "order", 0)
    order = torch.randperm(len(pairs), generator=gen)[:8].tolist()
    t, eps = draw(3, [(0, row) for row in order], 2, 100, (2,))
    errors = dpo.pair_errors(task, pairs.x_w[order], pairs.x_l[order], t, eps, {})
    loss, expected = metrics_by_hand(errors, beta, 0.03)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in task.policy.parameters()]).norm()
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and (norm > 2) == (beta == 50)
    rate = row["lr"] / norm.clamp(min=1)
    for p, moved in zip(task.policy.parameters(), trained.policy.parameters(), strict=True):
        assert torch.allclose(p - rate * p.grad, moved, atol=1e-6)


def test_every_pair_once_an_epoch_and_each_process_its_own():
    """An epoch is a permutation. Two processes share out exactly the pairs that one would take.
    To resume is to begin at another step."""
    def keys(*start):
        return list(dpo.micro_batch_keys(20, toy_task("--steps 5").cfg, *start))

    one = keys(0, 0, 1)
    flat = [key for micro_batch in one for key in micro_batch]
    assert sorted(flat) == [(epoch, row) for epoch in (0, 1) for row in range(20)]
    rows = [row for _, row in flat]
    assert rows[:20] != list(range(20)) and rows[:20] != rows[20:]
    assert (keys(0, 0, 2), keys(0, 1, 2), keys(3, 0, 1)) == (one[::2], one[1::2], one[6:])


def test_resumed_is_straight_bit_for_bit(straight, out, monkeypatch):
    """SIGTERM comes in the middle of a step, and Ctrl-C while the run saves. The same command ends
    with the weights and metrics of the undisturbed run, and gives the handlers back."""
    calls, encode, save = [], dpo.Toy.encode, dpo.Toy.save

    def encode_and_stop(task, batch):
        calls.append("encode")
        if len(calls) == 9:  # the first half of step 4, numbered from 0
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(task, batch)

    def save_and_stop(task, folder):
        os.kill(os.getpid(), signal.SIGINT)
        save(task, folder)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(dpo.Toy, "encode", encode_and_stop)
        patch.setattr(dpo.Toy, "save", save_and_stop)
        train_toy(out, "--save-every 9")
    assert len(calls) == 9 and (out / "checkpoint-00000004").is_dir()

    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "los')  # a torn last line does no harm
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rows, result = train_toy(out)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert same(result, straight[1]) and metrics(out) == rows
    same_rows(rows, straight[0])


def test_nothing_new_is_not_saved_again(out):
    """A run that ends before its first step leaves the checkpoint that it came from alone. It ends
    if more than 1 % of its pairs, and more than one, are unreadable. Here two of 80 are, and the
    steps before the checkpoint do not make up for them."""
    train_toy(out)
    task = toy_task(f"--out {out}")
    run = dpo.Run(task, task.cfg, dpo.make_optimizer([*task.policy.parameters()], task.cfg))
    run.save, run.cfg.batch = None, 80
    row = {"step": 8, "unreadable": 1, "loss": 0.0, "grad_norm": 0.0}
    run.check(row)
    with pytest.raises(dpo.UserError, match="--data"):
        run.check(row)
    run.close()


def test_half_written_checkpoint_is_never_read(straight, out, monkeypatch):
    """The machine dies while it writes the second checkpoint: the next start takes the first.
    The two checkpoints written last are kept, and so is what a user put there. A torn one of a
    later step and all half-written ones are deleted."""
    calls, save = [], torch.save

    def dying(state, path):
        save(state, path)
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", dying)
        train_toy(out)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-00000003"]

    for name in ("checkpoint-best", ".policy.partial", ".checkpoint-00000005.partial"):
        shutil.copytree(out / "checkpoint-00000003", out / name)
    (out / "checkpoint-00000099").mkdir()
    assert same(train_toy(out)[1], straight[1])
    folders = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert folders == ["checkpoint-00000006", "checkpoint-00000008", "checkpoint-best", "policy"]


@pytest.mark.parametrize("times", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_again_and_again(long, out, times):
    """SIGKILL comes at any moment, often while a checkpoint is written, and the newest checkpoint
    may be torn. The same command ends with the weights of the run that was left alone."""
    rng = random.Random(times)
    fork = multiprocessing.get_context("fork")
    for turn in range(times + 1):
        process = fork.Process(target=train_toy, args=(out, LONG))
        process.start()
        if turn == times:
            break
        wait_for_step(out, (turn + 1) * 50 // times - rng.randrange(3))
        time.sleep(rng.random() / 50)
        process.kill()
        process.join()

        found = sorted(out.glob("checkpoint-*"))
        if turn % 2 and len(found) == 2:
            file = rng.choice([path for path in found[1].rglob("*") if path.is_file()])
            file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])

    process.join(60)
    assert process.exitcode == 0 and same(weights(out), long[1])
    assert [row["step"] for row in metrics(out)] == list(range(60))


def test_two_processes_killed_and_restarted_are_one(long, out):
    """torchrun has 2 processes, and one of them is killed: --max-restarts starts both again. The
    run is that of one process that was left alone, up to rounding."""
    process = torchrun(f"{TOY} {LONG} --micro-batch 2 --out {out}", restarts=1)
    wait_for_step(out, 50)
    process.children()[0].kill()
    assert process.wait(120) == 0
    is_nearly(long, out)


@pytest.mark.slow
def test_two_machines_are_one(long, out):
    """Two launchers, as on two machines with a shared disk, make the run of one process."""
    port = random.randint(20_000, 30_000)
    where = f"--nnodes=2 --nproc_per_node=1 --rdzv-backend=c10d --rdzv-endpoint=localhost:{port}"
    line = f"{TOY} {LONG} --micro-batch 2 --out {out}"
    launchers = [torchrun(line, 0, where) for _ in range(2)]
    assert [each.wait(120) for each in launchers] == [0, 0]
    is_nearly(long, out)


def is_nearly(run, out):
    """Assert that the run in `out` is this one, up to rounding."""
    rows, wanted = run
    assert same(weights(out), wanted, rtol=1e-2, atol=1e-4)
    same_rows(metrics(out), rows, rel=1e-2)


def same_rows(rows, others, rel=0):
    """Do the rows of two runs agree, up to rounding, or else to the last bit?"""
    for row, other in zip(rows, others, strict=True):
        for name in row.keys() - {"pairs_per_s", "peak_memory_gib"}:
            assert row[name] == pytest.approx(other[name], rel=rel, abs=rel / 100), name


class RunsCode:
    """Unpickled, it makes the folder "evil"."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_no_whole_checkpoint_is_no_new_run(tmp_path, out, monkeypatch):
    """A broken newest checkpoint, or one that would run code, is passed over. If none can be read,
    the run is refused, and they stay where they are."""
    monkeypatch.chdir(tmp_path)
    train_toy(out)
    older, newest = sorted(out.glob("checkpoint-*/optimizer.pt"))
    torch.save(RunsCode(), newest)
    assert dpo.load_checkpoint(out, toy_task(), SimpleNamespace(load_state_dict=dict)) == 6
    older.write_bytes(b"torn")
    with pytest.raises(dpo.UserError, match=f"--out {out}"):
        train_toy(out)
    assert newest.exists() and older.exists() and not Path("evil").exists()


@pytest.mark.parametrize("place", range(3))
def test_processes_that_disagree_are_refused(out, monkeypatch, place):
    """If another process has another step, other hashes, or other weights, no run starts."""
    def gather(here):
        there = [*here] if type(here) is list and len(here) == 3 else here
        if there is not here:
            there[place] = [7, here[1] | {"content of --data": 7}, [7.0]][place]
        return [here, there]

    monkeypatch.setattr(dpo, "gather", gather)
    with pytest.raises(dpo.UserError, match="--out .* --model"):
        train_toy(out)
    assert os.listdir(out) == [".lock"]


def test_the_first_process_decides(monkeypatch):
    """The others take its UserError, and check nothing themselves."""
    monkeypatch.setattr(dpo, "rank_and_world", lambda: (1, 2))
    monkeypatch.setattr(dpo, "gather", lambda mine: [dpo.UserError("there"), mine])
    with pytest.raises(dpo.UserError, match="there"):
        dpo.check_on_main(sys.exit)


def test_the_first_process_names_the_checkpoint(out, monkeypatch):
    """A shared disk may not have shown the newest one to it yet. Then all go on from the older."""
    train_toy(out)
    monkeypatch.setattr(dpo, "gather", lambda found: [found[1:], found])
    assert dpo.load_checkpoint(out, toy_task(), SimpleNamespace(load_state_dict=dict)) == 6


def test_gpus_that_are_missing_or_too_old(monkeypatch):
    """More processes than GPUs, or bf16 on a card without it, get one line."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", print)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    for number, named in ("0", "--precision bf16"), ("1", "the number of GPUs here, 1"):
        monkeypatch.setenv("LOCAL_RANK", number)
        with pytest.raises(dpo.UserError, match=named):
            dpo.start_processes(True, "bf16")


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(out, monkeypatch):
    """All of its files are flushed, and nothing else of the machine is."""
    flushed = set()
    monkeypatch.setattr(os, "fsync", lambda file: flushed.add(os.fstat(file).st_ino))
    monkeypatch.setattr(os, "sync", None)
    train_toy(out)
    assert {path.stat().st_ino for path in out.glob("checkpoint-*/**/*")} <= flushed


def test_nan_stops_before_the_weights(out):
    """A NaN in step 2 ends the run, even if only the gradient has it. The weights of before step 2
    are saved, and Ctrl-C is again what it was."""
    task, calls = toy_task(f"--out {out}"), []

    def spoil(grad):
        calls.append(grad)
        return grad * (math.nan if len(calls) == 5 else 1)

    task.policy.net[-1].bias.register_hook(spoil)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(dpo.UserError, match="--lr"):
        dpo.train(task, task.cfg)
    assert signal.getsignal(signal.SIGINT) is before
    saved = weights(out / "checkpoint-00000002")
    assert same(saved, task.policy.state_dict())  # no NaN equals itself


def test_another_configuration_is_refused(out):
    """The same --out with another beta, lr or seed is refused by name, and nothing there is
    touched. How often it is saved is not part of a run."""
    train_toy(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for name, value in (("beta", 0.7), ("lr", 0.001), ("seed", 1), ("steps", 9)):
        with pytest.raises(dpo.UserError, match=f"--out {out}.*{name} is .* {value}"):
            train_toy(out, f"--{name} {value}")
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    train_toy(out, "--save-every 5")


def test_a_run_goes_on_with_what_it_began_with(tiny, tmp_path):
    """A run is refused if rows, labels, captions or images have changed, or a model's weights,
    settings or words. Its folder may lie in the folder of its data."""
    shutil.copytree(tiny / "tiny-sd15", tmp_path / "model")
    rows = [pick(label) for label in (1.0, 0.0, 1.0)]

    def start(rows):
        parquet(tmp_path / "pairs.parquet", rows)
        task = sd_task(tmp_path, "model", f"--data {tmp_path} --resolution 16 --steps 1 --lr 1e-3"
                                          f" --lora 2 --out {tmp_path}/run")
        return dpo.train(task, task.cfg)

    assert start(rows) == start(rows)
    lime = jpeg("lime")
    for change in ({"label_0": 0.0}, {"caption": "x"}, {"jpg_0": lime}, {"jpg_1": lime}):
        with pytest.raises(dpo.UserError, match="content of --data"):
            start([*rows[:2], rows[2] | change])
    with pytest.raises(dpo.UserError, match="content of --data"):
        start(rows[1:])
    for name, old, new in (("unet/*.safetensors", b"(?s)....$", b"aaaa"),
                           ("vae/config.json", b"0.18215", b"0.2"),
                           ("tokenizer/tokenizer.json", b"q</w>", b"qq</w>")):
        file, = (tmp_path / "model").glob(name)
        content = file.read_bytes()
        file.write_bytes(re.sub(old, new, content))
        with pytest.raises(dpo.UserError, match="content of --model"):
            start(rows)
        file.write_bytes(content)


def test_two_runs_in_one_folder_are_refused(out):
    """While a run is at work, no other run starts in its folder. Once it has ended, one can, even
    if a worker outlives it."""
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=train_toy, args=(out, LONG + " --workers 1"))
    process.start()
    wait_for_step(out, 1)
    with pytest.raises(dpo.UserError, match=f"--out {out}: another run"):
        train_toy(out, LONG)
    process.kill()
    process.join()
    assert len(train_toy(out, LONG)[0]) == 60


def test_what_gets_a_warning(tiny, capsys):
    """Pairs do that are both trained on and held out."""
    task = sd_task(tiny, "tiny-sd15", "--split train[:20] --eval-split train[10:]")
    shared = {*task.pairs.table["row"]} & {*task.held_out.table["row"]}
    assert f"WARNING     {len(shared)} pairs" in capsys.readouterr().out and len(shared) > 5
    sd_task(tiny, "tiny-sd15", "--split train[:20] --eval-split train[20:]")
    assert "WARNING" not in capsys.readouterr().out


def test_toy_closes_most_of_the_gap(tmp_path):
    """After 200 steps the policy is much nearer to p* than the reference is. With the labels turned
    round it goes the other way."""
    numbers = {}
    for name in ("right", "wrong"):
        line = f"--toy --steps 200 --draws 16 --eval-every 0 --out {tmp_path}/{name}"
        task = dpo.Toy(dpo.parse(line.split()))
        if name == "wrong":
            task.pairs.x_w, task.pairs.x_l = task.pairs.x_l, task.pairs.x_w
        dpo.train(task, task.cfg)
        numbers[name], _ = distance.measure_toy(task, samples=10_000)

    right, wrong = numbers.values()
    assert right["tv_policy"] < 0.6 * right["tv_reference"] and right["tv_floor"] < 0.08
    assert abs(right["reward_policy"] - right["reward_optimum"]) < 0.5
    assert wrong["reward_policy"] < wrong["reward_reference"] - 0.2


def test_all_of_sd35(tiny, tmp_path, monkeypatch):
    """--lora 0 trains the whole transformer of SD3.5. A run goes on bit for bit, and
    from_pretrained reads what it wrote. It writes one file, even where diffusers would split it."""
    model = diffusers.ModelMixin
    split = partialmethod(model.save_pretrained, max_shard_size="100KB")
    monkeypatch.setattr(model, "save_pretrained", split)
    task = train_and_resume(tiny, "sd35", "--lora 0 --lr 1e-3 --optimizer adafactor", tmp_path)
    saved = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "one/transformer")
    assert same(saved.state_dict(), task.policy.network.state_dict())
    assert not same(saved.state_dict(), task.reference.network.state_dict(), atol=1e-4)


def test_sdxl_by_torchrun(tiny, tmp_path):
    """Tiny SDXL on 2 processes, with image workers, Adafactor and evaluations. SIGTERM to the
    second process and its workers stops both. One process goes on, and ends where one process ends
    that was never stopped."""
    flags = "--steps 8 --lr 1e-4 --eval-split train[:9] --eval-every 2 --out"
    one, two = (sd_task(tiny, "tiny-sdxl", f"{flags} {tmp_path}/{name}") for name in ("one", "two"))
    rows, out = dpo.train(one, one.cfg), tmp_path / "two"

    line = sd_line(tiny, "tiny-sdxl", f"{flags} {out} --micro-batch 1 --workers 1")
    process = torchrun(line, restarts=0)
    wait_for_step(out, 4)  # with an evaluation
    os.killpg(max(child.pid for child in process.children()), signal.SIGTERM)
    assert process.wait(120) != 0
    steps = [int(path.name[-8:]) for path in out.glob("checkpoint-*")]
    assert 3 <= max(steps) < 8

    same_rows(dpo.train(two, two.cfg), rows, rel=1e-2)
    assert same(weights(out, "unet"), weights(tmp_path / "one", "unet"), atol=1e-4)


def test_unreadable_pairs_are_counted(tiny, tmp_path):
    """Up to 1 % of unreadable pairs do no harm. They are counted in metrics.jsonl, and left out of
    the means."""
    torn = pick() | {"jpg_1": None}
    path = parquet(tmp_path / "pairs.parquet", [torn, torn] + [pick()] * 198)
    flags = "--steps 1 --batch 200 --micro-batch 50 --resolution 16"
    task = sd_task(tiny, "tiny-sd15", f"--data {path} --out {tmp_path}/run {flags}")
    row, = dpo.train(task, task.cfg)
    assert row["unreadable"] == 2 and row["reward_accuracy"] == 0.5


def test_an_unreadable_pair_has_no_gradient():
    """It counts nothing, neither in the gradient nor in the metrics. If no held-out pair can be
    read, there is no accuracy."""
    task = toy_task()
    pair = task.pairs[0, 0] | {"unreadable": 1.0}
    batch = torch.utils.data.default_collate([pair])
    assert dpo.dpo_step(task, batch, task.cfg).tolist() == [0] * 8 + [1]
    assert not any(p.grad.any() for p in task.policy.parameters())

    task.held_out = {(dpo.HELD_OUT, 0): pair}
    with pytest.raises(dpo.UserError, match="--eval-split"):
        dpo.evaluate(task)


# --------------------------------------------------------------------------- judging a policy

def test_evaluation_by_hand(straight):
    """The numbers of evaluate(), from the errors of all pairs at once, with ten draws each. The
    noise does not depend on the run's seed, nor on its batches. No batch has more x_t than a
    batch of the training, and none keeps a graph for gradients."""
    task = toy_task("--gamma 0.2 --seed 7 --batch 200 --micro-batch 200")
    task.policy.load_state_dict({name: 3 * p for name, p in straight[1].items()})
    pairs = task.held_out = dpo.ToyPairs(task.reference, 400, "held out")
    keys = [(dpo.HELD_OUT, row) for row in range(400)]
    t, eps = draw("held out", keys, 10, 100, (2,))
    with torch.no_grad():
        errors = dpo.pair_errors(task, pairs.x_w, pairs.x_l, t, eps, {})
    seen = set()
    task.policy.register_forward_hook(lambda *call: seen.add((len(call[2]), call[2].requires_grad)))
    assert dpo.evaluate(task) == pytest.approx(metrics_by_hand(errors, 0.5, 0.2)[1], rel=1e-3)
    assert seen == {(2 * 200 * 2, False)}


def test_what_is_due_when(out, monkeypatch, capsys):
    """Checkpoints, pictures and evaluations come every so many steps and at the end. The steps
    before an evaluation are saved. Pictures that fail do no harm."""
    def evaluate(task):
        print(max(path.name for path in out.glob("checkpoint-*")))
        return {"reward_accuracy": 0.5}

    monkeypatch.setattr(dpo, "evaluate", evaluate)
    quick = partial(distance.measure_toy, samples=100)
    monkeypatch.setattr(distance, "measure_toy", quick)
    monkeypatch.setattr("toy.figure.draw", None)
    dpo.main(f"{TOY} --save-every 3 --eval-every 3 --sample-every 5 --out {out}".split())
    done = re.findall(r"checkpoint-\d+|step-\d+|toy.png:", capsys.readouterr().out)
    assert done == ["checkpoint-00000003", "step-00000005", "checkpoint-00000006",
                    "step-00000008", "checkpoint-00000008", "toy.png:"]


def test_evaluate_images(tiny, out, capsys):
    """--evaluate judges what the run in --out ended with, or else the folder that it names. Its
    numbers are the held_out ones of the run."""
    flags = sd_line(tiny, "tiny-sd15", f"--lr 1e-3 --eval-split train[-6:] --out {out}")

    def evaluation(named=""):
        dpo.main(f"{flags} --split nowhere --evaluate {named}".split())
        return json.loads(re.search("^{.*", capsys.readouterr().out, re.M | re.S)[0])

    dpo.main(f"{flags} --eval-every 4".split())
    row, numbers = metrics(out)[-1], evaluation()
    assert numbers.pop("policy") == f"{out}/unet" and numbers["reward_margin"] != 0
    row.pop("step")
    assert row == pytest.approx({f"held_out_{name}": numbers[name] for name in numbers}, rel=1e-3)
    start = evaluation(f"{tiny}/tiny-sd15")
    assert start["reward_accuracy"] == 0.5 and start["err_policy_w"] == start["err_ref_w"]


# ------------------------------------------------------------------------------ the command line

PAPER = {
    "method": "dpo", "beta": 2000, "gamma": 0, "draws": 1, "lora": 0, "batch": 2048, "steps": 2000,
    "lr": 2.048e-5, "warmup": 0.25, "decay": 0, "optimizer": "adamw", "resolution": 512,
    "caption_dropout": 0.2, "out": "runs/sd15", "micro_batch": 4}
PAPER_SDXL = PAPER | {
    "beta": 5000, "lr": 8.192e-6, "optimizer": "adafactor", "resolution": 1024, "out": "runs/sdxl",
    "micro_batch": 2}
FLOW_GRPO = {
    "beta": 100, "lr": 3e-4, "batch": 24, "lora": 32,
    "resolution": 1024, "checkpointing": True, "micro_batch": 2, "steps": 1000}
TOY_DEFAULTS = {
    "beta": 0.5, "draws": 64, "batch": 32, "lr": 3e-3, "decay": 1, "out": "runs/toy"}


@pytest.mark.parametrize("line, expected", [
    ("--model sd15", PAPER),
    ("--model sdxl", PAPER_SDXL),
    ("--model sd35", FLOW_GRPO),
    ("--toy", TOY_DEFAULTS),
    ("--model sd15 --beta 4000 --batch 6", {"lr": 1.024e-5, "micro_batch": 2}),
    ("--model sdxl --method sft --no-checkpointing", {"lr": 2.048e-6, "checkpointing": False})])
def test_defaults_are_the_papers(line, expected):
    """SD1.5 and SDXL are trained as in the paper, and the rate follows beta. SD3.5 and the toy have
    settings of their own."""
    cfg = vars(dpo.parse(line.split()))
    assert {name: cfg[name] for name in expected} == pytest.approx(expected)


def test_a_batch_is_shared_out_evenly(monkeypatch):
    """--micro-batch is lowered to a divisor of a process's share of --batch, and --batch has to be
    a multiple of the processes."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert dpo.parse("--toy --batch 12 --micro-batch 4".split()).micro_batch == 2
    with pytest.raises(dpo.UserError, match="--batch 13"):
        dpo.parse("--toy --batch 13".split())


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """A folder of inputs that are wrong, named for what is wrong with them."""
    folder = tmp_path_factory.mktemp("wrong")
    for name, text in {
            "file.txt": "hello",
            "flux/model_index.json": '{"_class_name": "FluxPipeline"}',
            "broken.jsonl": '{}\n{"prompt": "a" "b"}',
            "number.jsonl": '{"prompt": 7, "preferred": "a.png", "rejected": "b.png"}',
            "null.json": "null"}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name, rows in {
            "sound": [pick()],
            "ties": [pick(0.5)],
            "shards/train-00000-of-00002": [pick()],
            "columns": [{"a": 1, "b": 2}],
            "label": [pick(1.0), pick(0.7)]}.items():
        parquet(folder / f"{name}.parquet", rows)
    return folder


SD = "--model {tiny}/tiny-sd15 --resolution 64 --steps 1 --batch 1 --data {wrong}"


@pytest.mark.parametrize("line, named", [
    # flags
    ("", "--model"),
    ("--toy --model sd15", "--model"),
    ("--toy --bet 3", "--bet"),
    ("--toy --lr nan", "--lr nan"),
    (f"--toy --seed {10**30}", "--seed"),
    ("--toy --data x", "--data"),
    ("--model sd15 --caption-dropout 20", "--caption-dropout 20"),
    ("--model sd15 --eval-every 3", "--eval-split"),
    ("--model sd15 --resolution 100", "--resolution 100"),
    ("--model sd15 --guidance 0.5", "--guidance 0.5"),
    ("--model sd35 --lora 0", "--lr"),
    ("--model sd15 --lora 4", "--lr"),
    # folders of runs, weights and models
    ("--toy --out {wrong}/file.txt", "{wrong}/file.txt"),
    ("--toy --out {wrong}", "--out {wrong}"),
    ("--toy --out {wrong}/new/..", "--out {wrong}"),
    ("--model {tiny}/tiny-sd15/../tiny-sd15 --out {tiny}/tiny-sd15/new", "sd15/new: it lies in"),
    ("--toy --evaluate {tiny}/tiny-sd15/unet", "{tiny}/tiny-sd15/unet"),
    ("--model nowhere/nothing", "--model nowhere/nothing"),
    ("--model {wrong}/flux", "--model {wrong}/flux"),
    ("--model {wrong}/file.txt", "from_single_file('{wrong}/file.txt')"),
    # data
    ("--model {tiny}/tiny-sd15 --data \x1b[2J", "--data ?[2J: there is no such file"),
    (f"{SD}/ties.parquet", "--data {wrong}/ties.parquet"),
    (f"{SD}/file.txt", ".jsonl"),
    (f"{SD}/null.json", "row 0"),
    (f"{SD}/shards", "1 of the 2"),
    (f"{SD}/sound.parquet --split test", "split test is []"),
    (f"{SD}/number.jsonl", "row 0 has the caption 7"),
    (f"{SD}/broken.jsonl", "line 2: Expecting ',' delimiter"),
    (f"{SD}/columns.parquet", "['a', 'b']"),
    (f"{SD}/label.parquet", "0.7"),
    (f"{SD}/sound.parquet --split train[", "train[")])
def test_wrong_input_gets_one_clear_line(line, named, tiny, wrong, tmp_path, monkeypatch):
    """The line names the flag or the file. Nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((dpo.UserError, OSError)) as caught:
        dpo.main(line.format(tiny=tiny, wrong=wrong).split())
    assert named.format(tiny=tiny, wrong=wrong) in dpo.one_line(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_user_error_ends_the_command_with_2():
    """One line on stderr, and no traceback."""
    script = [sys.executable, ROOT / "diffusion_dpo.py", "--toy", "--beta", "0"]
    done = subprocess.run(script, capture_output=True, text=True)
    line, = done.stderr.strip().splitlines()
    assert done.returncode == 2 and not done.stdout and "--beta 0" in line


@pytest.mark.parametrize("error, code, said", [
    (dpo.UserError("found here"), 2, "error: found here since"),
    (OSError("disk\nmore"), 2, "error: disk more since"),
    (torch.OutOfMemoryError("CUDA\nmore"), 2, "error: CUDA more since"),
    (SystemExit(143), 143, "")])
def test_how_a_second_process_ends(monkeypatch, capsys, error, code, said):
    """In one line, after the first process has had the time to say what all of them found."""
    def main():
        raise error from OSError("since")

    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match=f"^{code}$"):
        dpo.run_command(main)
    assert capsys.readouterr().err.strip() == said
    assert len(waits) == isinstance(error, dpo.UserError)


def test_help_names_every_flag_and_its_source(capsys):
    """--help has every flag. All numbers but the seed have a source."""
    with pytest.raises(SystemExit, match="0"):
        dpo.parse(["--help"])
    shown = capsys.readouterr().out
    for name in FLAGS:
        flag = "--" + name.replace("_", "-")
        entry, = re.findall(f"\n  {flag}[, ](.*?)(?=\n  -|\n\n)", shown, re.S)
        assert name == "seed" or "(" in entry or not re.search(r"\[\d", entry), name


# --------------------------------------------------------------------------------------- budgets

FLAGS = set(dpo.Config.__dataclass_fields__) - {"preset"}
def measure(path):
    """How many code tokens each line of code has, in order of size. Comments, docstrings and
    layout do not count."""
    tokens = collections.Counter()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.string.strip() and not token.string.startswith(("#", '"""')):
            tokens[token.start[0]] += 1
    return sorted(tokens.values())


def test_the_file_stays_small():
    """Lines, code tokens, density, flags and the longest function are within their budgets. The
    loss, the toy and the loop end by line 450."""
    path = ROOT / "diffusion_dpo.py"
    tokens, source = measure(path), path.read_text()
    lines = source.splitlines()
    assert len(lines) <= 1480
    assert sum(tokens) <= 10_290 and sum(tokens) / len(tokens) <= 10.8
    assert tokens[int(0.9 * len(tokens))] <= 21
    assert len(FLAGS) + 1 <= 30  # --toy
    assert max(node.end_lineno - node.lineno + 1 for node in ast.walk(ast.parse(source))
               if isinstance(node, ast.FunctionDef)) <= 60
    assert any(re.match(r"# -+ 5\. ", line) for line in lines[:451])


def test_the_tests_stay_small():
    """All tests together are within their budget."""
    toy = ROOT / "toy"
    paths = [ROOT / "test_diffusion_dpo.py", toy / "conftest.py", *toy.glob("test_*.py")]
    tokens = [count for path in paths for count in measure(path)]
    assert sum(tokens) <= 28_620 and sum(tokens) / len(tokens) <= 12.5
