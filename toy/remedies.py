"""Remedies for drift and overfitting, each as a loss of a few lines. toy/study.py compares them.

The loss of Diffusion-DPO looks at a difference of errors. So both errors may rise together, and a
long training may serve the labels at the cost of the images. Trainers of 2025 and 2026 offer the
remedies below. Each is a function

    loss(task, batch, errors) -> losses (B,), logit (B,)

of the errors err_w, err_l, ref_err_w, ref_err_l, (B,) each. step_of() makes a step for dpo.train of
it. The other remedies of the study are flags: a smaller --lr, a larger --beta, --gamma, --draws and
--lora.
"""

from contextlib import contextmanager
from copy import deepcopy

import torch
import torch.nn.functional as F

import diffusion_dpo as dpo


def step_of(loss):
    """A step for dpo.train with another loss. It looks at batches without unreadable pairs."""

    def step(task, batch, cfg):
        errors = dpo.batch_errors(task, batch, cfg.draws, cfg.seed)
        losses, logit = loss(task, batch, errors)
        (losses.sum() / cfg.batch).backward()
        return dpo.metric_sums(batch, losses, logit, errors)

    return step


def plain(task, batch, errors):
    """The loss of Diffusion-DPO or SEE-DPO."""
    return dpo.dpo_loss(*errors, task.cfg.beta, task.cfg.gamma)


def ipo(task, batch, errors):
    """IPO (arXiv:2310.12036, Eq. 17) with tau = beta, and multiplied by beta^2.

    It draws the logit to 1/2 and not beyond. OneTrainer has it for images.
    """
    _, logit = plain(task, batch, errors)
    return (logit - 0.5).square(), logit


def label_smoothing(task, batch, errors):
    """One label in ten is thought to be wrong (conservative DPO, Mitchell 2023)."""
    losses, logit = plain(task, batch, errors)
    return 0.9 * losses - 0.1 * F.logsigmoid(-logit), logit


def sft_mix(task, batch, errors):
    """DPO plus 0.25 of the plain denoising loss on the preferred images, as in OneTrainer."""
    losses, logit = plain(task, batch, errors)
    return losses + 0.25 * 2 * errors[0], logit  # for images 2 e_w is the mean squared error


def strong_sft_mix(task, batch, errors):
    """The same in units of the logit: plus 0.25 beta e_w."""
    losses, logit = plain(task, batch, errors)
    return losses + 0.25 * task.cfg.beta * errors[0], logit


def dpop(task, batch, errors):
    """DPO-Positive (arXiv:2402.13228, Eq. 3): a rise of the preferred error lowers the logit.

    Its lambda, the weight of this penalty, is 5 here (ours).
    """
    err_w, _, ref_err_w, _ = errors
    _, logit = plain(task, batch, errors)
    logit = logit - 5 * task.cfg.beta * (err_w - ref_err_w).clamp(min=0)
    return -F.logsigmoid(logit), logit


def clamp(task, batch, errors):
    """A logit over 1 has no gradient, as in SimpleTuner."""
    _, logit = plain(task, batch, errors)
    return -F.logsigmoid(logit.clamp(max=1)), logit


def half_loser(task, batch, errors):
    """The gradient of the rejected image counts by half."""
    err_w, err_l, ref_err_w, ref_err_l = errors
    err_l = err_l.detach() + 0.5 * (err_l - err_l.detach())
    return plain(task, batch, (err_w, err_l, ref_err_w, ref_err_l))


def sdpo(task, batch, errors):
    """Diffusion-SDPO (arXiv:2511.03317), mu = 0.9: a scale for the rejected image's gradient.

    With it, a small step on the network's output makes the preferred error fall. g_w and g_l are
    the gradients by this output. There is one scale for a batch, as in the released code.
    """
    err_w, err_l, ref_err_w, ref_err_l = errors
    out = task.output  # see prepared()
    g_w, g_l = (torch.autograd.grad(err.sum(), out, retain_graph=True)[0] for err in errors[:2])
    g_w, g_l = g_w.chunk(2)[0], g_l.chunk(2)[1]  # each error depends on its half of the output
    dot = (g_w * g_l).sum()
    scale = (0.1 * g_w.square().sum() / dot).clamp(max=1) if dot > 0 else 1
    err_l = err_l.detach() + scale * (err_l - err_l.detach())
    return plain(task, batch, (err_w, err_l, ref_err_w, ref_err_l))


def moving_reference(task, batch, errors):
    """The reference follows the policy, as in Linear-DPO (arXiv:2605.21123); 1 % a step is ours."""
    with torch.no_grad():
        for follower, leader in zip(task.reference.parameters(), task.policy.parameters(),
                                    strict=True):
            follower.lerp_(leader, 0.01)
    return plain(task, batch, errors)


@contextmanager
def prepared(task, loss):
    """Within it, a task has what a loss of this file needs beside it."""
    first = task.reference
    if loss is sdpo:  # task.output is what the policy has predicted last
        task.policy.register_forward_hook(lambda policy, x, out: setattr(task, "output", out))
    if loss is moving_reference:
        task.reference = deepcopy(task.policy).requires_grad_(False)
    yield first
    task.reference = first
