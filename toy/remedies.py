"""Remedies for drift and overfitting, each as a loss of a few lines. toy/study.py compares them.

The loss of Diffusion-DPO sees a difference of errors. So both errors may rise together (drift), and
a long training may fit the labels at the cost of the images. Trainers of 2025 and 2026 offer the
remedies below. Each is a function

    loss(task, batch, errors) -> losses (B,), logit (B,)

where errors are err_w, err_l, ref_err_w, ref_err_l, (B,) each. dpo.train takes step_of(loss). The
other remedies of the study are flags: a smaller --lr, a larger --beta, --gamma, --draws and --lora.
"""

from contextlib import contextmanager
from copy import deepcopy

import torch
import torch.nn.functional as F

import diffusion_dpo as dpo


def step_of(loss):
    """A step for dpo.train with another loss. All pairs must be readable: it masks none."""

    def step(task, batch, cfg):
        errors = dpo.batch_errors(task, batch, cfg.draws, cfg.seed)
        losses, logit = loss(task, batch, errors)
        (losses.sum() / cfg.batch).backward()
        return dpo.metric_sums(batch, losses, logit, errors)

    return step


def plain(task, batch, errors):
    """The loss of Diffusion-DPO, or with --gamma of SEE-DPO."""
    return dpo.dpo_loss(*errors, task.cfg.beta, task.cfg.gamma)


def ipo(task, batch, errors):
    """IPO (arXiv:2310.12036, Eq. 17) with tau = beta, and multiplied by beta^2.

    It draws the logit to 1/2 and not beyond. OneTrainer has it for images.
    """
    _, logit = plain(task, batch, errors)
    return (logit - 0.5).square(), logit


def label_smoothing(task, batch, errors):
    """Conservative DPO (Mitchell 2023): a label is taken to be wrong with probability 0.1."""
    losses, logit = plain(task, batch, errors)
    losses_if_wrong = -F.logsigmoid(-logit)
    return 0.9 * losses + 0.1 * losses_if_wrong, logit


def sft_mix(task, batch, errors):
    """DPO plus 0.25 of the plain denoising loss on the preferred images, as in OneTrainer."""
    err_w, *_ = errors
    losses, logit = plain(task, batch, errors)
    return losses + 0.25 * 2 * err_w, logit  # for images 2 e_w is the mean squared error


def strong_sft_mix(task, batch, errors):
    """DPO plus 0.25 beta e_w. In the logit e_w has the factor beta, too."""
    err_w, *_ = errors
    losses, logit = plain(task, batch, errors)
    return losses + 0.25 * task.cfg.beta * err_w, logit


def dpop(task, batch, errors):
    """DPO-Positive (arXiv:2402.13228, Eq. 3): a preferred error above the reference's is punished.

    The logit falls by lambda beta times what it is above. Lambda is 5 here (ours).
    """
    err_w, _, ref_err_w, _ = errors
    _, logit = plain(task, batch, errors)
    rise = (err_w - ref_err_w).clamp(min=0)
    logit = logit - 5 * task.cfg.beta * rise
    return -F.logsigmoid(logit), logit


def clamp(task, batch, errors):
    """A pair whose logit is over 1 has no gradient, as in SimpleTuner."""
    _, logit = plain(task, batch, errors)
    return -F.logsigmoid(logit.clamp(max=1)), logit


def scale_gradient(x, scale):
    """x itself, with a gradient that is multiplied by `scale`."""
    return x.detach() + scale * (x - x.detach())


def half_loser(task, batch, errors):
    """The gradient of the rejected image counts by half."""
    err_w, err_l, *ref_errors = errors
    return plain(task, batch, (err_w, scale_gradient(err_l, 0.5), *ref_errors))


def sdpo(task, batch, errors):
    """Diffusion-SDPO (arXiv:2511.03317): the rejected image's gradient is scaled, mu = 0.9.

    g_w and g_l are the gradients of the two errors by the network's outputs. SDPO supposes that a
    step moves both outputs alike, along -g_w + scale g_l. The scale is the largest, up to 1, with
    which the preferred error falls at least mu times as fast as along -g_w alone. There is one
    scale for a batch, as in the released code of SDPO.
    """
    err_w, err_l, *ref_errors = errors
    (g_w,) = torch.autograd.grad(err_w.sum(), task.output, retain_graph=True)
    (g_l,) = torch.autograd.grad(err_l.sum(), task.output, retain_graph=True)
    g_w, _ = g_w.chunk(2)  # the first half of the outputs is for the preferred images
    _, g_l = g_l.chunk(2)

    dot = (g_w * g_l).sum()
    scale = (0.1 * g_w.square().sum() / dot).clamp(max=1) if dot > 0 else 1  # 0.1 is 1 - mu
    return plain(task, batch, (err_w, scale_gradient(err_l, scale), *ref_errors))


def moving_reference(task, batch, errors):
    """The reference follows the policy, as in Linear-DPO (arXiv:2605.21123); 1 % a step is ours."""
    weights = zip(task.reference.parameters(), task.policy.parameters(), strict=True)
    with torch.no_grad():
        for follower, leader in weights:
            follower.lerp_(leader, 0.01)
    return plain(task, batch, errors)


@contextmanager
def prepared(task, loss):
    """Within it, a task has what the loss needs beside the errors.

    For sdpo task.output is the policy's last output. For moving_reference task.reference is a copy
    of the policy that can move.
    """
    first = task.reference
    if loss is sdpo:
        def keep_output(policy, inputs, output):
            task.output = output

        task.policy.register_forward_hook(keep_output)
    if loss is moving_reference:
        task.reference = deepcopy(task.policy).requires_grad_(False)
    try:
        yield
    finally:
        task.reference = first
