# %% [markdown]
# # Diffusion-DPO: a lab of 90 minutes
#
# **Diffusion-DPO** fine-tunes a diffusion model on pairs of images. In each pair people preferred
# one image to the other. In this lab you build the method in eight exercises. It needs a laptop and
# no GPU.
#
# You should know PyTorch, and how a diffusion model is trained: noise is added to a sample, and a
# network predicts that noise.
#
# | part | minutes |
# |---|---|
# | Start | 5 |
# | 1. Bradley-Terry: a reward explains labels | 8 |
# | 2. The loss of Diffusion-DPO | 10 |
# | 3. The weight of an error | 11 |
# | 4. Why a pair shares its noise | 10 |
# | 5. One draw or many | 9 |
# | 6. The optimum, and a training that finds it | 13 |
# | 7. What the loss does not see | 9 |
# | 8. A loss of your own | 8 |
# | Faces | 7 |
#
# Each exercise has a cell to fill. Replace the `...` where a line says `your code here`. The next
# cell checks your code: it says that it is right, or what is wrong. The cell after it draws a
# picture, and a question follows.
#
# Later cells use your functions. If you are stuck, take the code from
# `toy/lecture_solutions.ipynb`, which has the answers to the questions as well.
#
# **Before you begin.** On your own machine install Jupyter and the packages of requirements.txt.
# The code runs on Linux and macOS. On Windows use WSL or Colab.
#
# **Do this now.** The last part needs a small model of faces, which is trained in about 7 minutes
# on two free cores. Run the next cell. It prints a command that starts this training. Paste the
# command into a terminal; Colab has one, too. If none is printed, the model is there already.
#
# **For the lecturer.** On Colab the next cell downloads the repository. Write its address into
# `REPOSITORY` before you hand out this notebook.

# %%
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = ""  # the address that `git clone` takes; only needed on Colab

here = Path.cwd()
places = [here, here.parent, here / "repository"]
if REPOSITORY and not any((place / "diffusion_dpo.py").exists() for place in places):
    subprocess.run(["git", "clone", REPOSITORY, "repository"], check=True)
    # Colab has torch and matplotlib. These are what it lacks, or has in other versions.
    wanted = ("diffusers", "transformers", "datasets", "peft", "safetensors")
    lines = Path("repository/requirements.txt").read_text().splitlines()
    packages = [line.split("#")[0].strip() for line in lines if line.startswith(wanted)]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *packages], check=True)

root = next((place for place in places if (place / "diffusion_dpo.py").exists()), None)
assert root, ("diffusion_dpo.py was not found. Either open this notebook in the folder of the"
              " repository or in its folder toy/. Or write the address of the repository into"
              " REPOSITORY above, and run this cell again.")
os.chdir(root)
sys.path.insert(0, str(root))

BASE = os.environ.get("FACES", "toy/tiny-faces")  # the model of faces
MAKE_FACES = f'cd "{root}" && "{sys.executable}" toy/faces.py'
if not Path(BASE, "pairs.parquet").exists():
    print(f"Run this in a terminal now:\n\n    {MAKE_FACES}")

# %%
import contextlib
import io
import math
import tempfile
from unittest import mock

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import diffusion_dpo as dpo
from toy import distance

# Colours of Okabe and Ito, which colour-blind people can tell apart.
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#E69F00", "#009E73", "#000000"
plt.rcParams.update({"font.size": 15, "lines.linewidth": 3, "figure.dpi": 90,
                     "figure.constrained_layout.use": True})


def train(flags, loss=dpo.dpo_loss):
    """Train what the flags of diffusion_dpo.py say, from the start and in a temporary folder.

    Returns a task, which holds policy and reference, and the metrics: a row for each step.
    """
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        cfg = dpo.parse([*flags.split(), "--eval-every", "0", "--out", f"{out}/run"])
        use_gpu = torch.cuda.is_available() and cfg.model != "toy"
        task = dpo.make_task(cfg, dpo.start_processes(use_gpu))
        with mock.patch.object(dpo, "dpo_loss", loss):
            rows = dpo.train(task, cfg)
    return task, rows


def show_densities(densities):
    """A panel for each density {title: (BINS, BINS)}. All have one colour scale.

    It shows the square root of the density, so that thin parts are seen as well.
    """
    _, axes = plt.subplots(1, len(densities), figsize=(3.6 * len(densities), 4))
    brightest = max(p.max() for p in densities.values()) ** 0.5
    for ax, (title, p) in zip(axes, densities.items(), strict=True):
        ax.imshow(p.T.sqrt(), origin="lower", vmax=brightest, cmap="viridis")
        ax.set_title(title, fontsize=16)
        ax.axis("off")
    plt.show()


# %% [markdown]
# ## The toy
#
# Our samples are points in the plane instead of images. So every answer can be computed and drawn.
#
# - The **reference** is a frozen diffusion model. It samples a ring of eight Gaussians, and its
#   denoiser is known exactly.
# - The **policy** is the model that is trained. It starts as a copy of the reference.
# - A known **reward** R gives each point a number. It is a hill on the right side of the ring.
# - A **pair** is two samples of the reference. One of them, x_w (w for winner), was preferred. The
#   other one, x_l (l for loser), was rejected. This choice is the **label** of the pair.
#
# The picture shows 300 pairs. On the right most points were preferred.

# %%
toy = dpo.Toy(dpo.parse(["--toy"]))
x_w, x_l = toy.pairs.x_w, toy.pairs.x_l  # (200000, 2) each

_, ax = plt.subplots(figsize=(6, 6))
ax.scatter(*x_l[:300].T, s=30, c=ORANGE, marker="x", label="rejected")
ax.scatter(*x_w[:300].T, s=30, c=BLUE, marker="o", label="preferred")
ax.set(title="300 pairs", aspect="equal")
ax.legend(loc="center", fontsize=12, handletextpad=0)  # in the hole of the ring
plt.show()

# %% [markdown]
# ## Exercise 1. Bradley-Terry: a reward explains labels (8 minutes)
#
# People do not always agree. The model of Bradley and Terry says how likely a label is. The first
# of two points is preferred with probability sigmoid(R(first) - R(second)). For the rewards 1 and 0
# this is 1 / (1 + e^-1) = 0.73.
#
# A model of the labels is judged by its **loss**: minus the logarithm of the probability that it
# gave to the label. Write this probability and this loss.

# %%
def chance(reward_0, reward_1):
    """The probability that the first point is preferred, by Bradley and Terry."""
    # solution
    return torch.sigmoid(reward_0 - reward_1)
    # end of solution


def label_loss(reward_w, reward_l):
    """Minus the logarithm of the probability that x_w was preferred."""
    # solution
    return -F.logsigmoid(reward_w - reward_l)
    # end of solution


# %%
zero, one = torch.tensor(0.0), torch.tensor(1.0)
assert chance(zero, zero) is not None, "chance() returns nothing yet. Replace its ... by code."
assert chance(zero, zero) == 0.5, (
    "Two points of equal reward should have the chance 1/2. Take the sigmoid of a difference.")
assert chance(one, zero) > 0.5, (
    "The point of the larger reward should win more often. Turn the difference round.")
assert torch.isclose(chance(one, zero), 1 / (1 + torch.exp(-one))), (
    "The difference of the rewards should go into the sigmoid as it is, without a factor.")
assert label_loss(one, zero) is not None, "label_loss() returns nothing yet."
assert label_loss(one, zero) > 0, "A loss is minus the logarithm. Yours lacks the minus."
assert torch.isclose(label_loss(one, zero), -chance(one, zero).log()), (
    "label_loss should be minus the natural logarithm of chance(reward_w, reward_l).")
print("Exercise 1: right.")

# %%
difference = toy.reward(x_w) - toy.reward(x_l)  # (200000,)
edges = torch.linspace(0, 2, 9)
shares = []
for low, high in zip(edges[:-1], edges[1:], strict=True):
    in_bin = (difference.abs() >= low) & (difference.abs() < high)
    shares.append((difference[in_bin] > 0).double().mean())

x = torch.linspace(0, 2, 50)
plt.figure(figsize=(7, 4.5))
plt.plot(x, chance(x, 0 * x), c=BLUE, label="your chance()")
plt.plot((edges[:-1] + edges[1:]) / 2, shares, "o", ms=10, c=ORANGE, label="the labels")
plt.xlabel("difference of the two rewards")
plt.ylabel("how often the larger one wins")
plt.legend()
plt.show()

nothing = label_loss(0 * difference, 0 * difference).mean()
print(f"loss of a model that knows nothing: {nothing:.3f}")
print(f"loss of the true reward:            {label_loss(difference, 0 * difference).mean():.3f}")

# %% [markdown]
# **Question.** Why is the first number log 2? Why does even the true reward not reach 0?

# %% [markdown] tags=["solution"]
# **Answer.** A model that knows nothing gives each label the probability 1/2, and -log(1/2) is
# log 2. The labels are random, so the point of the smaller reward sometimes wins. No model can
# foresee that. On average over many labels, none has a lower loss than the true reward.

# %% [markdown]
# ## Exercise 2. The loss of Diffusion-DPO (10 minutes)
#
# Say that a policy should get a large reward, and stay near the reference p_ref. The best one is
# p_ref exp(R / beta) / Z, where the constant Z makes it a density (exercise 6). **beta** says how
# strongly the policy is held near the reference.
#
# DPO has no separate reward. It reads that formula backwards. Every policy p_theta is the best one
# for the reward
#
#     R = beta (log p_theta - log p_ref) + const
#
# The constant cancels in the difference of two rewards. A diffusion model cannot compute log p.
# Minus its **denoising error**, a weighted squared error of the predicted noise, stands in for it.
# Exercise 3 shows why. The policy has the errors err_w and err_l on the two points of a pair. The
# reference has ref_err_w and ref_err_l. So the model of exercise 1 becomes Eq. 14 of the paper
# (arXiv:2311.12908):
#
#     logit = beta [(ref_err_w - err_w) - (ref_err_l - err_l)]
#     loss  = -log sigmoid(logit)
#
# The **logit** is the reward of x_w minus that of x_l. Write the loss.

# %%
def my_dpo_loss(err_w, err_l, ref_err_w, ref_err_l, beta):
    """The losses (B,) and the logits (B,) of B pairs. Each error is a tensor (B,)."""
    # solution
    gain_w = ref_err_w - err_w
    gain_l = ref_err_l - err_l
    logit = beta * (gain_w - gain_l)
    return -F.logsigmoid(logit), logit
    # end of solution


# %%
# By hand: on x_w the policy is better by 0.1, on x_l it is worse by 0.2. So logit = 2 (0.1 + 0.2).
by_hand = torch.tensor([[1.0], [1.2], [1.1], [1.0]])  # err_w, err_l, ref_err_w, ref_err_l
returned = my_dpo_loss(*by_hand, beta=2.0)
assert returned is not None, "my_dpo_loss() returns nothing yet. Replace its ... by code."
assert isinstance(returned, tuple), "Return two things, the losses and the logits, in this order."
losses, logit = returned
assert not torch.isclose(logit, torch.tensor(-0.6)).all(), (
    "Your logit has the wrong sign. It should grow if the policy's error on x_w falls.")
assert torch.isclose(logit, torch.tensor(0.6)).all(), (
    f"For the pair by hand the logit should be 0.6, and yours is {logit.item():.3f}. Is each error"
    " of the policy subtracted from that of the reference? Is the part of x_l subtracted from that"
    " of x_w? Is beta a factor? Do you return the losses first, and then the logits?")
assert losses.shape == (1,), "Return one loss for each pair. The mean comes later."
assert torch.isclose(losses, F.softplus(-logit)).all(), (  # softplus(x) is log(1 + e^x)
    f"For the pair by hand the loss should be log(1 + e^-0.6), and yours is {losses.item():.3f}."
    " It is minus the logarithm of the sigmoid of the logit.")
swapped = by_hand[[1, 0, 3, 2]]  # the logit is now negative: -1500 for a beta of 5000
assert my_dpo_loss(*swapped, beta=5000.0)[0].isfinite().all(), (
    "Your loss is infinite for a large beta: a sigmoid is rounded to 0 before you take its"
    " logarithm, or an exponential is too large. F.logsigmoid avoids both.")
four = 3 * torch.rand(4, 100, generator=dpo.seeded_generator("exercise 2"))
for mine, ours in zip(my_dpo_loss(*four, 5.0), dpo.dpo_loss(*four, 5.0), strict=True):
    assert torch.allclose(mine, ours, atol=1e-5), "On other pairs it differs from dpo.dpo_loss."
print("Exercise 2: right.")

# %%
err_w = torch.linspace(0, 3, 100)  # the other three errors and beta as by hand
losses, logit = my_dpo_loss(err_w, 1.2, 1.1, 1.0, beta=2.0)
loss_by_hand, _ = my_dpo_loss(*by_hand, beta=2.0)
plt.figure(figsize=(7, 4.5))
plt.plot(err_w, losses, c=BLUE)
plt.plot(by_hand[0], loss_by_hand, "o", ms=12, c=ORANGE, label="the pair by hand")
plt.axhline(math.log(2), c=BLACK, ls=":", label="log 2: knows nothing")
plt.xlabel("error of the policy on x_w")
plt.ylabel("loss")
plt.legend()
plt.show()

# %% [markdown]
# **Question.** What is the loss before the first step? And what does the loss say if both errors of
# the policy rise by 1?

# %% [markdown] tags=["solution"]
# **Answer.** Before the first step the policy equals the reference. The logit is 0, and the loss
# is log 2. If both errors rise by 1, the loss does not change. It sees only their difference.
# Exercise 7 shows what follows from that.

# %% [markdown]
# ## Exercise 3. The weight of an error (11 minutes)
#
# The loss of a diffusion model comes from the **ELBO**, a lower bound of log p. Minus the ELBO is a
# sum of KL divergences, up to a constant. There is one for each step from a noise level t to t - 1.
# A KL is measured in **nats**, the unit of natural logarithms.
#
# A point x_0 with the noise eps of level t is x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps. Here
# abar_t is `alphas_cumprod[t]`. A step from x_t is a Gaussian. Take it once with the true noise,
# eps, and once with the predicted noise, eps_hat. The two Gaussians differ in their means only.
#
# Write the KL of two Gaussians, and then the KL of two such steps. The check shows that the latter
# is the squared error of eps_hat times a weight, omega_t. Two things help:
#
# - A KL is the mean of log p(x) - log q(x) over samples x of p. For a Gaussian, log p(x) is
#   -||x - mean||^2 / (2 std^2), up to a constant.
# - `distance.ddim_step(x_t, eps, abar_t, abar_next)` returns the mean and the standard deviation of
#   the step. abar_next is that of level t - 1.
#
# The picture shows T omega_t, where T is the number of levels.

# %%
def kl_of_gaussians(mean, other_mean, std):
    """KL (N,) of two Gaussians in d dimensions, with means (N, d) and the same std in each."""
    # solution
    return (mean - other_mean).square().sum(1) / (2 * std**2)
    # end of solution


def kl_of_steps(alphas_cumprod, t, x_t, eps, eps_hat):
    """KL (N,) of two steps from level t to t - 1: one with eps (N, d), one with eps_hat (N, d)."""
    # solution
    abar_t, abar_next = alphas_cumprod[t], alphas_cumprod[t - 1]
    mean, std = distance.ddim_step(x_t, eps, abar_t, abar_next)
    other_mean, _ = distance.ddim_step(x_t, eps_hat, abar_t, abar_next)
    return kl_of_gaussians(mean, other_mean, std)
    # end of solution


# %%
gen = dpo.seeded_generator("exercise 3")
x_t, eps, eps_hat = torch.randn(3, 5, 2, generator=gen, dtype=torch.float64)
std = torch.tensor(0.7, dtype=torch.float64)
kl = kl_of_gaussians(eps, eps_hat, std)
assert kl is not None, "kl_of_gaussians() returns nothing yet. Replace its ... by code."
assert kl.shape == (5,), "Return one KL for each row. Sum over the dimensions, which are dim 1."
normal, other = (torch.distributions.Normal(mean, std) for mean in (eps, eps_hat))
wanted = torch.distributions.kl_divergence(normal, other).sum(1)
assert not torch.allclose(kl, 2 * wanted), "Your KL is twice the right one. Divide by 2 std^2."
assert torch.allclose(kl, wanted), (
    "The KL should be the squared distance of the means, divided by 2 std^2.")

alphas_cumprod = toy.alphas_cumprod.double()
omega = dpo.elbo_weight(alphas_cumprod) / len(alphas_cumprod)  # (T,); it returns T omega_t
kl = kl_of_steps(alphas_cumprod, 50, x_t, eps, eps_hat)
assert kl is not None, "kl_of_steps() returns nothing yet."
error = (eps - eps_hat).square().sum(1)
assert torch.allclose(kl, omega[50] * error), (
    "The KL should be omega_t times the squared error. Does the step go from alphas_cumprod[t] to"
    " alphas_cumprod[t - 1]? Do both steps begin at the same x_t?")
print("Exercise 3: right.")

# %%
ddpm = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)  # of the paper
plt.figure(figsize=(7, 4.5))
for name, abars, colour in (("DDPM", ddpm, ORANGE), ("the toy", alphas_cumprod, BLUE)):
    T = len(abars)
    levels = range(1, T, T // 20)
    weights = [(T * kl_of_steps(abars, t, x_t, eps, eps_hat) / error).mean() for t in levels]
    plt.plot([t / T for t in levels], weights, "o", c=colour, label=f"{name}: your KL")
    plt.plot(torch.arange(T) / T, dpo.elbo_weight(abars), c=colour, label=f"{name}: elbo_weight()")
plt.yscale("log")
plt.xlabel("noise level t / T")
plt.ylabel("weight T omega_t")
plt.legend(fontsize=12)
plt.show()

# %% [markdown]
# Say that t is drawn at random, and that the squared error is multiplied by T omega_t. Then the
# mean of this product is the sum over all levels. So minus the product estimates the ELBO, up to a
# constant. From now on, *error* means this product. (The usual training of DDPM has a constant
# weight instead, and so have the faces below.)
#
# **Question.** The signal-to-noise ratio is SNR_t = abar_t / (1 - abar_t), and omega_t is
# (SNR_{t-1} / SNR_t - 1) / 2. The toy has `torch.sigmoid(torch.linspace(8, -6, 100))` as its
# alphas_cumprod. Why does it have the same weight at all levels?

# %% [markdown] tags=["solution"]
# **Answer.** If abar_t = sigmoid(s), then SNR_t = e^s. So the toy's levels are evenly spaced in log
# SNR. The ratio of the SNRs of two neighbours is the same everywhere, and with it omega_t.

# %% [markdown]
# ## Exercise 4. Why a pair shares its noise (10 minutes)
#
# A **draw** is one random level t and one random noise eps, at which errors are compared. The logit
# of a single draw is noisy. The script, diffusion_dpo.py, uses the same draw for both points of a
# pair. How much does that help?
#
# `dpo.pair_errors(task, x_w, x_l, t, eps, {})` returns err_w, err_l, ref_err_w and ref_err_l, with
# the same draw for both points. (The `{}` would hold the captions of images.) Call it twice, so
# that each point gets a draw of its own.
#
# We need a policy that has learnt something. 300 steps are enough here, and take some seconds.

# %%
young, _ = train("--toy --steps 300")


# %%
def one_draw_logit(task, x_w, x_l, draw_w, draw_l):
    """The logits (B,), where x_w has the noise draw_w = (t, eps), and x_l has draw_l.

    t is (B, 1), and eps is (B, 1, 2). The beta is task.cfg.beta.
    """
    # solution
    err_w, _, ref_err_w, _ = dpo.pair_errors(task, x_w, x_l, *draw_w, {})
    _, err_l, _, ref_err_l = dpo.pair_errors(task, x_w, x_l, *draw_l, {})
    _, logit = dpo.dpo_loss(err_w, err_l, ref_err_w, ref_err_l, task.cfg.beta)
    return logit
    # end of solution


# %%
n = 500  # pairs
some_w, other_w, some_l = x_w[:n], x_w[n:2 * n], x_l[:n]
gen = dpo.seeded_generator("exercise 4")


def draw(t=None):
    """The noise of n points: t (n, 1), unless it is given, and eps (n, 1, 2)."""
    if t is None:
        t = torch.randint(len(young.weight), (n, 1), generator=gen)
    return t, torch.randn(n, 1, 2, generator=gen)


a, b = draw(), draw()
with torch.no_grad():
    shared = one_draw_logit(young, some_w, some_l, a, a)
    assert shared is not None, "one_draw_logit() returns nothing yet. Replace its ... by code."
    assert torch.is_tensor(shared), "Return the logits only, the second result of dpo.dpo_loss."
    _, wanted = dpo.dpo_loss(*dpo.pair_errors(young, some_w, some_l, *a, {}), young.cfg.beta)
    assert torch.allclose(shared, wanted, atol=1e-3), (
        "With one draw for both points it should be the logit of dpo.dpo_loss, for the beta of the"
        " task. Do you return the second of its two results? Are the four errors in the order"
        " err_w, err_l, ref_err_w, ref_err_l?")
    change = one_draw_logit(young, some_w, some_l, a, b) - shared
    assert change.abs().max() > 0, "draw_l changes nothing. Take err_l and ref_err_l with draw_l."
    change_beside_other_w = (one_draw_logit(young, other_w, some_l, a, b)
                             - one_draw_logit(young, other_w, some_l, a, a))
    assert torch.allclose(change, change_beside_other_w, atol=1e-2), (
        "draw_l should change the part of x_l only. Take err_w and ref_err_w with draw_w, and"
        " err_l and ref_err_l with draw_l.")
print("Exercise 4: right.")

# %%
logits = {"t and eps": [], "only t": [], "nothing": []}
with torch.no_grad():
    for _ in range(64):
        t, eps = draw()
        draws_of_l = (t, eps), draw(t), draw()
        for found, draw_l in zip(logits.values(), draws_of_l, strict=True):
            found.append(one_draw_logit(young, some_w, some_l, (t, eps), draw_l))

stds = {name: torch.stack(found).std(0).mean().item() for name, found in logits.items()}
size = torch.stack(logits["t and eps"]).mean(0).std().item()
plt.figure(figsize=(7, 4.5))
bars = plt.bar(stds.keys(), stds.values(), color=[BLUE, GREEN, ORANGE])
plt.bar_label(bars, fmt="%.2f")
plt.axhline(size, c=BLACK, ls=":", label=f"mean logits, over pairs: {size:.2f}")
plt.ylim(top=1.3 * max(stds.values()))
plt.xlabel("what the two points share")
plt.ylabel("std of a logit, over draws")
plt.legend(loc="upper left")
plt.show()

# %% [markdown]
# **Question.** Why does sharing help? Is a single draw enough to tell the logit of a pair?

# %% [markdown] tags=["solution"]
# **Answer.** The errors of both points depend on the noise in a similar way. So with shared noise
# most of the dependence cancels in their difference. Still, the noise of a single draw is larger
# than the spread of the mean logits over pairs, the dotted line. So one draw says little about a
# pair.

# %% [markdown]
# ## Exercise 5. One draw or many (9 minutes)
#
# The ELBO is a mean over all draws, so the logit should contain the mean of each error over all
# draws. The paper takes a single draw. The toy takes K = 64 draws for each pair, and averages the
# errors over them. The logit is linear in the errors. So this is the mean of the logits of single
# draws.
#
# Compare the two orders: first the mean over the draws and then the loss, or the reverse.

# %%
def loss_of_mean(logits):
    """For logits (B, K) of B pairs and K draws: the loss of a mean logit, as a mean over B."""
    # solution
    return -F.logsigmoid(logits.mean(1)).mean()
    # end of solution


def mean_of_losses(logits):
    """For the same logits (B, K): the loss of a single draw, as a mean over all B K of them."""
    # solution
    return -F.logsigmoid(logits).mean()
    # end of solution


# %%
def by_hand_loss(logit):
    return math.log(1 + math.exp(-logit))


two_draws = torch.tensor([[3.0, -1.0]])  # of one pair; the mean logit is 1
two_pairs = two_draws.T  # of one draw each: there is nothing to average inside the loss
assert loss_of_mean(two_draws) is not None, "loss_of_mean() returns nothing yet."
assert mean_of_losses(two_draws) is not None, "mean_of_losses() returns nothing yet."
for mean_loss in (loss_of_mean(two_pairs), mean_of_losses(two_pairs)):
    assert torch.is_tensor(mean_loss) and mean_loss.shape == (), (
        "Both functions should return a tensor of one number: a mean over the pairs.")
assert not math.isclose(loss_of_mean(two_draws), mean_of_losses(two_draws), rel_tol=1e-3), (
    "Your two losses are equal. In loss_of_mean the mean over draws, dim 1, goes into logsigmoid.")
assert math.isclose(loss_of_mean(two_draws), by_hand_loss(1), rel_tol=1e-3), (
    "For draws of 3 and -1 loss_of_mean should be -log sigmoid(1). Average over dim 1 first.")
assert math.isclose(mean_of_losses(two_draws), (by_hand_loss(3) + by_hand_loss(-1)) / 2,
                    rel_tol=1e-3), (
    "For draws of 3 and -1 mean_of_losses should be the mean of -log sigmoid(3) and"
    " -log sigmoid(-1).")
assert math.isclose(loss_of_mean(two_pairs), mean_of_losses(two_pairs), rel_tol=1e-3), (
    "loss_of_mean mixes different pairs. Average over the draws, which are dim 1 of (B, K).")
print("Exercise 5: right.")

# %%
many = torch.stack(logits["t and eps"], 1)  # (500, 64), from exercise 4
scales = torch.linspace(0, 2, 41)
plt.figure(figsize=(7, 4.5))
for K, colour in ((1, ORANGE), (4, GREEN), (64, BLUE)):
    means = many.unflatten(1, (-1, K)).mean(2)  # (500, 64 / K): each is a mean of K draws
    losses = torch.stack([mean_of_losses(scale * means) for scale in scales])
    plt.plot(scales, losses, c=colour, label=f"K = {K}")
    best = losses.argmin()
    plt.plot(scales[best], losses[best], "o", ms=12, c=colour)
plt.ylim(0.59, 0.8)
plt.xlabel("factor on all logits")
plt.ylabel("loss (dot: the lowest)")
plt.title("K draws, averaged inside the loss")
plt.legend()
plt.show()

print(f"the loss of the mean logits {loss_of_mean(many):.3f},"
      f" the mean loss of single draws {mean_of_losses(many):.3f}")

# %% [markdown]
# **Question.** The training may choose the size of the logits. What does it choose with one draw?

# %% [markdown] tags=["solution"]
# **Answer.** -log sigmoid is convex. So the mean of the losses is larger than the loss of the mean
# (Jensen's inequality). The difference grows with the noise, and small logits have little noise.
# With one draw the training therefore keeps the logits too small. In the picture the best factor is
# about 1/4 for K = 1, and about 1 for K = 64. The policy is too cautious.

# %% [markdown]
# ## Exercise 6. The optimum, and a training that finds it (13 minutes)
#
# The toy's full training takes one or two minutes. **Start it now,** and write the function below
# while it runs.

# %%
task, rows = train("--toy")

# %% [markdown]
# DPO looks for a policy of large mean reward that stays near the reference. SEE-DPO, a variant,
# also rewards **entropy**, the width of the policy. The best policy is called the **optimum**, p\*.
# It is known in closed form:
#
#     p* = argmax over p of  E_p[R] - beta KL(p || p_ref) + gamma H(p)
#        = p_ref^(beta / (beta + gamma)) exp(R / (beta + gamma)) / Z
#
# E_p[R] is the mean reward under p, and H(p) is its entropy. **gamma** is the weight of the
# entropy, and DPO has gamma = 0. Z makes p\* a density. For a given beta, beta + gamma acts as a
# temperature. Write log p\*, without log Z.

# %%
def log_optimum(x, beta, gamma):
    """log p* + log Z (N,) at points x (N, 2).

    toy.reference.log_prob(x) is log p_ref, and toy.reward(x) is R. Both are (N,).
    """
    # solution
    return (beta * toy.reference.log_prob(x) + toy.reward(x)) / (beta + gamma)
    # end of solution


# %%
points = distance.grid_points()  # (N, 2), a fine grid


def density(beta, gamma):
    """Your p* in the squares of the grid (BINS, BINS). The softmax divides by Z."""
    return distance.histogram(points, log_optimum(points, beta, gamma).double().softmax(0))


assert log_optimum(points, 0.5, 0.0) is not None, "log_optimum() returns nothing yet."
for flags, message in (
        ("--toy", "For gamma = 0 it should be log p_ref + R / beta."),
        ("--toy --beta 2", "For another beta it is wrong. Use the function's beta."),
        ("--toy --gamma 0.5", "For gamma > 0 it is wrong. Multiply log p_ref by beta, add R, and"
                              " divide both by beta + gamma.")):
    other = dpo.Toy(dpo.parse(flags.split()))
    wanted = distance.histogram(points, other.log_optimum(points).double().softmax(0))
    found = density(other.cfg.beta, other.cfg.gamma)
    assert distance.total_variation(found, wanted) < 1e-3, message

numbers, densities = distance.measure_toy(task, samples=20_000)
assert numbers["tv_policy"] < numbers["tv_reference"] / 2, (
    "The policy is not near p*. Has the training above ended, with all of its steps?")
print("Exercise 6: right.")

# %% [markdown]
# The distance of two densities is their **total variation** (TV): 0 if they are equal, 1 if they
# do not overlap. The floor is the TV of equally many samples of p\* itself. No sampler can be
# expected to do better.

# %%
beta = task.cfg.beta
show_densities({"reference": densities["reference"],
                "your p*": density(beta, 0.0),
                "policy, trained": densities["policy"],
                "p*, gamma = beta": density(beta, beta),
                "p*, gamma = 4 beta": density(beta, 4 * beta)})
print(f"TV to p*: reference {numbers['tv_reference']:.3f}, policy {numbers['tv_policy']:.3f},"
      f" floor {numbers['tv_floor']:.3f}")
for gamma in (0.0, beta, 4 * beta):
    print(f"gamma {gamma:.1f}: entropy of p* is {distance.entropy(density(beta, gamma)):.2f} nats")

# %% [markdown]
# **Question.** What does p\* become for a very large gamma? Is it the reference? Then solve the
# formula of p\* for R, with gamma = 0. Where have you met the result?

# %% [markdown] tags=["solution"]
# **Answer.** Both exponents go to 0, so p\* becomes flat and leaves the ring. It does not become
# the reference. A large beta makes it the reference: then R / (beta + gamma) goes to 0, and the
# exponent of p_ref goes to 1.
#
# R = beta (log p\* - log p_ref) + beta log Z. This is the reward of exercise 2, with the policy in
# the place of p\*. The constant is beta log Z.

# %% [markdown]
# ## Exercise 7. What the loss does not see (9 minutes)
#
# Exercise 6 sampled the policy by DDPM, which adds fresh noise in every step. Stable Diffusion is
# often sampled by an **ODE**, without that noise. Here is its step from x_t to x_next, with the
# predicted noise eps. Solve the first equation for x_0, and put it into the second one:
#
#     x_t    = sqrt(abar_t)    x_0 + sqrt(1 - abar_t)    eps
#     x_next = sqrt(abar_next) x_0 + sqrt(1 - abar_next) eps
#
# Write this step. The next cell then samples the same policy with it.

# %%
def ode_step(x_t, eps, abar_t, abar_next):
    """x_next (N, d), from x_t (N, d) and the predicted noise eps (N, d)."""
    # solution
    x_0 = (x_t - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()
    return abar_next.sqrt() * x_0 + (1 - abar_next).sqrt() * eps
    # end of solution


# %%
x_0, eps = torch.randn(2, 5, 2, generator=dpo.seeded_generator("exercise 7"))
abar_t, abar_next = torch.tensor([0.3, 0.6])
x_t = abar_t.sqrt() * x_0 + (1 - abar_t).sqrt() * eps
x_next = ode_step(x_t, eps, abar_t, abar_next)
assert x_next is not None, "ode_step() returns nothing yet. Replace its ... by code."
clean = ode_step(x_t, eps, abar_t, torch.tensor(1.0))
assert torch.allclose(clean, x_0, atol=1e-4), (
    "A step to abar_next = 1 should end at x_0, and yours does not. Is x_0 the first equation,"
    " solved for x_0? Does eps have the factor sqrt(1 - abar_next), which is then 0?")
assert torch.allclose(x_next, abar_next.sqrt() * x_0 + (1 - abar_next).sqrt() * eps, atol=1e-4), (
    "x_next should have the factors sqrt(abar_next) on x_0 and sqrt(1 - abar_next) on eps.")
mean, std = distance.ddim_step(x_t, eps, abar_t, abar_next, eta=0)
assert std == 0 and torch.allclose(x_next, mean, atol=1e-4), (
    "It differs from distance.ddim_step with eta = 0, which adds no noise.")


def your_step(x_t, eps, abar_t, abar_next, eta):
    """Your step as distance.toy_sample() wants it: a mean, and a standard deviation of 0."""
    return ode_step(x_t, eps, abar_t, abar_next), torch.zeros(1)


n = 20_000
with mock.patch.object(distance, "ddim_step", your_step):
    by_ode = distance.toy_sample(task.policy, task.alphas_cumprod, n, dpo.seeded_generator("ODE"))
p_ode = distance.histogram(by_ode, torch.full((n,), 1 / n))
tv_ode = distance.total_variation(p_ode, densities["optimum"])
assert tv_ode > numbers["tv_policy"], (
    "By the ODE the policy of --toy should be further from p* than by DDPM. Was it trained with"
    " other flags or another loss?")
print("Exercise 7: right.")

# %%
show_densities({"p*": densities["optimum"],
                f"by DDPM: TV {numbers['tv_policy']:.3f}": densities["policy"],
                f"by your ODE: TV {tv_ode:.3f}": p_ode})

# The errors that p* itself would have: minus log p*, where p* = p_ref exp(R / beta) / Z.
log_Z = (toy.reward(torch.cat([x_w, x_l])) / beta).exp().mean().log()  # a mean over the reference
plt.figure(figsize=(10, 4.5))
for side, x, name, colour, style in (("w", x_w, "preferred", BLUE, "-"),
                                     ("l", x_l, "rejected", ORANGE, "--")):
    rise = torch.tensor([row[f"err_policy_{side}"] - row[f"err_ref_{side}"] for row in rows])
    plt.plot(rise.unfold(0, 50, 1).mean(1), c=colour, ls=style, label=name)  # means of 50 steps
    of_optimum = (log_Z - toy.reward(x) / beta).mean().item()
    plt.axhline(of_optimum, c=colour, ls=":", label=f"{name}, of p*")
plt.ylim(bottom=0)
plt.xlabel("step")
plt.ylabel("nats")
plt.title("how far the policy's errors are above the reference's")
plt.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside the axes
plt.show()

# %% [markdown]
# The dotted lines are above 0, because p\* leaves most of the ring. Most points are less likely
# under p\* than under the reference.
#
# **Question.** Both errors have risen by about 3 nats more than that. So the policy is not the
# exact denoiser of p\*, not even on preferred points. Why did the training not prevent that?

# %% [markdown] tags=["solution"]
# **Answer.** The loss sees only the difference of the two errors (exercise 2). What both have risen
# by too much, called **drift**, cancels. DDPM's fresh noise seems to repair most of it, and an ODE
# has no such noise. Chapter N7 of toy/notebook.md has the derivation, and a remedy.

# %% [markdown]
# ## Exercise 8. A loss of your own (8 minutes)
#
# The loss of DPO falls with every rise of a logit, however large it is. **IPO** (arXiv:2310.12036,
# Eq. 17) gives the logits a target instead. With gain_w = ref_err_w - err_w, and gain_l likewise,
# its loss is
#
#     loss = (gain_w - gain_l - 1 / (2 beta))^2
#
# Write it with the signature of `dpo.dpo_loss`. Then the script trains with it, and nothing else
# has to change. To save time, each of the two losses gets only 1000 steps of 16 pairs.

# %%
def ipo_loss(err_w, err_l, ref_err_w, ref_err_l, beta, gamma=0.0):
    """The losses (B,) and the logits (B,) of IPO. gamma is not used.

    The logits are those of DPO. The metrics are made from them.
    """
    # solution
    gain_w = ref_err_w - err_w
    gain_l = ref_err_l - err_l
    losses = (gain_w - gain_l - 1 / (2 * beta)).square()
    return losses, beta * (gain_w - gain_l)
    # end of solution


# %%
returned = ipo_loss(*by_hand, 2.0)  # the pair by hand of exercise 2, where the gains differ by 0.3
assert returned is not None, "ipo_loss() returns nothing yet. Replace its ... by code."
assert isinstance(returned, tuple), "Return the losses and the logits, in this order."
losses, logit = returned
assert losses.shape == (1,), "Return one loss for each pair. The mean comes later."
assert torch.isclose(losses, torch.tensor((0.3 - 1 / 4) ** 2), atol=1e-5).all(), (
    f"For the pair by hand the loss should be (0.3 - 1/4)^2 = 0.0025, and yours is"
    f" {losses.item():.4f}. With beta = 2 the target 1 / (2 beta) is 1/4. Is it subtracted from"
    " gain_w - gain_l, without a factor beta? Is each gain the reference's error minus the"
    " policy's?")
assert torch.isclose(logit, torch.tensor(0.6)).all(), (
    "The logit should be that of DPO, beta (gain_w - gain_l).")
print("Exercise 8: right.")

# %%
found = {}
for name, loss in {"DPO": dpo.dpo_loss, "IPO": ipo_loss}.items():
    short, metrics = train("--toy --steps 1000 --batch 16", loss)
    found[name] = distance.measure_toy(short, samples=20_000)
    assert found[name][0]["tv_policy"] < found[name][0]["tv_reference"], (
        f"{name} has moved the policy away from p*. Is the sign of your gains right?")
    last = metrics[-100:]
    logit = sum(row["reward_margin"] for row in last) / len(last)
    rise = sum(row["err_policy_w"] - row["err_ref_w"] for row in last) / len(last)
    print(f"{name}: at the end the mean logit is {logit:.2f}, and err_w is {rise:.2f} nats above"
          " that of the reference")

# %%
panels = {"p*": densities["optimum"]}
for name, (measured, shown) in found.items():
    for sampler, key in (("DDPM", "policy"), ("ODE", "policy_ode")):
        panels[f"{name} by {sampler}: TV {measured[f'tv_{key}']:.3f}"] = shown[key]
show_densities(panels)

# %% [markdown]
# **Question.** Which of the two comes nearer to p\*, by which sampler? What may be the reason?

# %% [markdown] tags=["solution"]
# **Answer.** By DDPM it is DPO. IPO's target for every logit is beta / (2 beta) = 1/2. Say that one
# point of a pair is preferred with probability P. Then IPO pulls its logit to 1/2 with probability
# P, and else to -1/2. The best logit is their mean, P - 1/2. DPO's best logit is log(P / (1 - P)),
# which is at least four times as large. So IPO's policy stays nearer to the reference, and p\* is
# not its optimum.
#
# But with IPO the errors hardly rise, as the numbers above show. This may be the reason why by the
# ODE it comes nearer to p\* than DPO.

# %% [markdown]
# ## Faces (7 minutes)
#
# Now you do the same with images. A tiny Stable Diffusion draws faces of 32 x 32 pixels. You write
# a rule that says which of two faces is preferred. Then DPO trains on pairs that your rule has
# labelled.

# %%
import diffusers
import transformers

from toy import faces, figure

for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()

def have_faces():
    """True if the model of faces is there. If not, say how to make it."""
    found = Path(BASE, "pairs.parquet").exists()
    if not found:
        print(f"{BASE} is not there yet. If you have not started its training, run this in a"
              f" terminal:\n\n    {MAKE_FACES}\n\nRun this cell again when it has ended.")
    return found


def show_faces(rows, titles):
    """Rows of images (N, 3, 32, 32), each with a title."""
    _, axes = plt.subplots(len(rows), 1, figsize=(14, 1.6 * len(rows)))
    for ax, images, title in zip(axes, rows, titles, strict=True):
        ax.imshow(torch.cat(list(images), 2).permute(1, 2, 0))  # side by side
        ax.set_title(title, loc="left")
        ax.axis("off")
    plt.show()


# %% [markdown]
# The rule gives each face a number, and of two faces the one with the larger number is preferred.
# It may be any function of the pixels. Examples are the brightness, or the number of dark pixels.
# (Both faces of a pair have the same caption, and so the same colours.)
# `faces.smile_of(images)` measures the smile, from about -1 (sad) to 1 (happy).

# %%
def rule(images):
    """A number (N,) for each of the images (N, 3, 32, 32) uint8. Channels: red, green, blue."""
    # solution
    return faces.smile_of(images)
    # end of solution


# %%
drawn, _ = faces.drawings(10, "rule")  # (12, 10, 3, 32, 32): ten drawings of each caption
values = rule(drawn.flatten(0, 1))
assert values is not None, "rule() returns nothing yet. Replace its ... by code."
assert values.shape == (120,), (
    f"rule() should return one number for each image, so (120,) here, not {tuple(values.shape)}."
    " For a mean over the pixels use images.float().mean((1, 2, 3)).")
assert values.float().std() > 0, "Your rule gives all faces the same number, so it prefers none."
print("Faces: your rule can be used.")

# %%
if have_faces():
    table = dpo.load_pairs(f"{BASE}/pairs.parquet", "train")
    captions = table["prompt"]
    pairs = torch.stack([  # (P, 2, 3, 32, 32)
        torch.stack([dpo.crop_square(dpo.read_image(image, None), faces.SIDE, 0.5, 0.5, False)
                     for image in table[side]])
        for side in ("first", "second")], 1)

    values = rule(pairs.flatten(0, 1)).float().view(-1, 2)  # (P, 2)
    labels = (values[:, 0] > values[:, 1]).float()  # 1 if the first one is preferred
    some = range(12)
    show_faces([torch.stack([pairs[i, 1 - int(labels[i])] for i in some]),
                torch.stack([pairs[i, int(labels[i])] for i in some])],
               ["preferred by your rule", "rejected"])

# %% [markdown]
# The training takes 100 steps of 32 pairs, about a minute. beta is larger here, because the errors
# of images are means over all numbers of a latent, and not sums in nats.

# %%
if have_faces():
    with tempfile.TemporaryDirectory() as folder:
        faces.write_pairs(Path(folder, "pairs.parquet"), captions, pairs, labels)
        painter, _ = train(
            f"--model {BASE} --data {folder}/pairs.parquet --resolution 32 --precision fp32"
            " --beta 500 --lr 3e-5 --steps 100 --batch 32 --micro-batch 32 --workers 0"
            " --sample-every 0 --guidance 1")

# %%
if have_faces():
    jobs = [(caption, number) for number in range(4) for caption in faces.CAPTIONS]
    drawn = {}
    for side in ("reference", "policy"):
        with figure.network_of(painter, side):
            drawn[side] = faces.sample(painter.pipe, jobs, "lecture")  # the same noise for both

    show_faces([images[:12] for images in drawn.values()], ["before", "after, from the same noise"])
    print(f"mean of your rule over {len(jobs)} faces:")
    for side, images in drawn.items():
        print(f"    {side:10} {rule(images).float().mean():.3f}")

# %% [markdown]
# **Go on.** `python toy/label.py --model toy/tiny-faces --out my-taste` opens a local web page, on
# which you choose between two faces with two keys.
#
# - README.md says how to train Stable Diffusion on pairs of your own.
# - toy/notebook.md has the experiments on the toy, and toy/faces.md those on faces.
# - diffusion_dpo.py derives the loss in its docstring. Its parts 1 to 4 are the method.
