"""The table at the end of a run of --toy: how near is the policy to p*, the optimum?

The policy is sampled, and its samples are counted in the squares of a grid. The densities of the
reference and of p* are known, so their probability of each square is computed.
"""

from pathlib import Path

import torch

# Python knows the running script as __main__, so this loads it once more. That does no harm.
import diffusion_dpo as dpo


def ddim_step(x_t, eps, abar_t, abar_next, eta=1.0):
    """Mean and standard deviation of a step from abar_t to abar_next (arXiv:2010.02502, Eq. 12).

    From t to t - 1, eta = 1 is DDPM's step, with noise (arXiv:2006.11239, Eq. 7). eta = 0 is a step
    of an ODE, without noise, as Stable Diffusion is sampled by default.
    """
    x_0 = (x_t - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()
    variance = eta**2 * (1 - abar_next) / (1 - abar_t) * (1 - abar_t / abar_next)
    direction = (1 - abar_next - variance).clamp(min=0).sqrt()  # rounding may give -1e-8
    return abar_next.sqrt() * x_0 + direction * eps, variance.sqrt()

@torch.no_grad()
def toy_sample(denoiser, alphas_cumprod, n, gen, eta=1.0):
    """n samples (n, 2) of a denoiser, in one step per noise level. See ddim_step for eta."""
    x = torch.randn(n, 2, generator=gen)
    abars = torch.cat([torch.ones(1), alphas_cumprod])  # (T + 1,): level t is abars[t + 1]
    for t in reversed(range(len(alphas_cumprod))):
        eps = denoiser(x, torch.full((n,), t))
        mean, std = ddim_step(x, eps, abars[t + 1], abars[t], eta)
        x = mean + std * torch.randn(n, 2, generator=gen)
    return x


# Half the width of the grid, its squares per side, and the points per side of a square.
EXTENT, BINS, FINE = 5.0, 30, 8


def grid_points():
    """Points (N, 2) of a fine grid. measure_toy() gives them weights (N,), of sum 1."""
    n = BINS * FINE
    axis = EXTENT * ((2 * torch.arange(n) + 1) / n - 1)  # midpoints
    return torch.cartesian_prod(axis, axis)


def histogram(x, weight):
    """The probability of each square (BINS, BINS), for points x (N, 2) that have a weight (N,)."""
    box = [-EXTENT, EXTENT, -EXTENT, EXTENT]
    return torch.histogramdd(x.double(), BINS, range=box, weight=weight.double()).hist


def total_variation(p, q):
    """Half the sum of |p - q|: 0 if they are equal, 1 if disjoint. Mass off the grid counts."""
    return ((p - q).abs().sum() + (p.sum() - q.sum()).abs()).item() / 2


def entropy(p):
    """Differential entropy in nats. The density in a square is p over the square's area."""
    area = (2 * EXTENT / BINS) ** 2
    return -torch.special.xlogy(p, p / area).sum().item()


def measure_toy(toy, samples=50_000):
    """Compare reference, optimum and policy: numbers, and densities {name: (BINS, BINS)}.

    The policy is sampled by DDPM and by an ODE. TV is the total variation to p*, and tv_floor is
    that of samples of p* itself.
    """
    gen = dpo.seeded_generator(toy.cfg.seed, "toy report")
    points = grid_points()
    p_ref = toy.reference.log_prob(points).double().softmax(0)
    p_star = toy.log_optimum(points).double().softmax(0)
    equal = torch.full((samples,), 1 / samples)
    by_ddpm = toy_sample(toy.policy, toy.alphas_cumprod, samples, gen)
    by_ode = toy_sample(toy.policy, toy.alphas_cumprod, samples, gen, eta=0)

    numbers, densities, optimum = {}, {}, histogram(points, p_star)
    for name, x, weight in (("reference", points, p_ref), ("optimum", points, p_star),
                            ("policy", by_ddpm, equal), ("policy_ode", by_ode, equal)):
        p = densities[name] = histogram(x, weight)
        numbers[f"reward_{name}"] = (weight * dpo.toy_reward(x)).sum().item()
        numbers[f"entropy_{name}"] = entropy(p)
        numbers[f"tv_{name}"] = total_variation(p, optimum)
    rows = torch.multinomial(p_star, samples, replacement=True, generator=gen)
    numbers["tv_floor"] = total_variation(histogram(points[rows], equal), optimum)
    return numbers, densities


def report_toy(toy, rows):
    """The end of a toy run: a table, and toy.png in --out."""
    numbers, densities = measure_toy(toy)
    print(f"\n{'':12}{'mean reward':>14}{'entropy (nats)':>17}{'TV to p*':>12}")
    for name in densities:
        print(f"{name:12}{numbers[f'reward_{name}']:14.3f}{numbers[f'entropy_{name}']:17.3f}"
              f"{numbers[f'tv_{name}']:12.3f}")
    print(f"{'floor':43}{numbers['tv_floor']:12.3f}\n"
          "TV is the total variation. policy is sampled by DDPM, policy_ode by an ODE, and floor\n"
          f"from p* itself. The picture is {toy.cfg.out}/toy.png")
    dpo.save_picture(toy, Path(toy.cfg.out, "toy.png"), rows, numbers, densities)
