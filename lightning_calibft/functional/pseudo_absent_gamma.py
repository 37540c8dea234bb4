"""The gamma that best separates seen samples from pseudo-absent copies of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from lightning_calibft.functional._group_logits import in_row_chunks, other_seen_logits
from lightning_calibft.functional._inputs import (
    _SEEN,
    Groups,
    check_inputs,
    prepare,
    real_dtype,
    warn_if_probabilities,
)
from lightning_calibft.functional.average_logit_gap import GammaEstimate, check_seen_classes
from lightning_calibft.split import ClassIds

_STEPS = 80  # bisection steps: enough to reach the last bit of float64 from any range of logits


def pseudo_absent_gamma(
    preds: Tensor,
    target: Tensor,
    pretrained_preds: Tensor,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> GammaEstimate:
    r"""Estimate the gamma that best separates seen samples from pseudo-absent copies of them.

    A sample :math:`(x, y)` is assigned to the seen classes with the margin :math:`m = \max_S z - \max_U z`. Its
    pseudo-absent copy is the same sample treated as if :math:`y` had been absent: the class moves from :math:`S` to the
    absent classes. Its logit :math:`t` there is the one from before fine-tuning, rescaled to match the absent logits of
    the fine-tuned model:

    .. math::
        t = \operatorname{mean}_U z + \frac{\operatorname{std}_U z}{\operatorname{std}_U z^0}
        \big(z^0_y - \operatorname{mean}_U z^0\big), \qquad
        m' = \max_{S \setminus y} z - \max(t, \textstyle\max_U z)

    At this gamma, the expected number of seen samples assigned to absent classes equals the expected number of
    pseudo-absent copies assigned to seen classes. Probabilities come from the softmax of the two best logits, and every
    class is weighted as if it had the same number of samples:

    .. math:: |S| \, \operatorname{mean} \sigma(\gamma - m) = |U| \, \operatorname{mean} \sigma(m' - \gamma)

    This is the maximum likelihood estimate of the threshold in a logistic regression of "seen or absent" on the margin,
    with the slope fixed at 1, as in the softmax. It trains no model and has no tuned constants.

    Limitations: it assumes that a class that is not fine-tuned keeps its position among the other absent classes, and
    that samples of absent classes are as frequent as samples of seen ones.

    Args:
        preds: Logits of shape ``(N, C)`` from the fine-tuned model in eval mode.
        target: Class ids of shape ``(N,)``. Samples whose label is not a seen class are left out.
        pretrained_preds: Logits of the same samples, ``(N, C)``, from the model before fine-tuning.
        seen_classes: Ids of the classes in the fine-tuning data, at least two.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
        ignore_index: Samples with this label are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronization.

    Returns:
        Gamma and its standard error, the sandwich estimate for an M-estimator. Both are float64 scalars (float32 on
        devices without float64). Gamma is NaN with a warning if no sample counts.

    Raises:
        ValueError: If there are fewer than two seen classes, or shapes or labels do not match.
        TypeError: If ``preds``, ``pretrained_preds`` or ``target`` has the wrong dtype.

    Example:
        >>> import torch
        >>> from lightning_calibft.functional import pseudo_absent_gamma
        >>> pretrained = torch.tensor([[2.0, 0.0, 0.0, -1.0], [0.0, 2.0, 0.0, -1.0]])
        >>> logits = torch.tensor([[6.0, 0.0, -3.0, -4.0], [0.0, 6.0, -3.0, -4.0]])
        >>> pseudo_absent_gamma(logits, torch.tensor([0, 1]), pretrained, seen_classes=[0, 1]).gamma
        tensor(5., dtype=torch.float64)
    """
    groups = prepare(preds, target, seen_classes, absent_classes, ignore_index, validate_args)
    check_seen_classes(len(groups.seen))
    if validate_args:
        check_inputs(pretrained_preds, target, preds.shape[1], ignore_index, "pretrained_preds")
        warn_if_probabilities(preds)
        warn_if_probabilities(pretrained_preds)
    margins = pseudo_absent_margins(preds, target, pretrained_preds, groups)
    margins = margins[groups.of_samples(target, ignore_index) == _SEEN]
    if not len(margins):
        rank_zero_warn("The estimate of gamma received no samples of seen classes, so gamma is NaN.")
    return pseudo_absent_compute(margins, len(groups.seen), len(groups.absent))


def pseudo_absent_margins(preds: Tensor, target: Tensor, pretrained_preds: Tensor, groups: Groups) -> Tensor:
    """Return the margins of samples and of their pseudo-absent copies, ``(N, 2)``; arbitrary for unseen classes."""
    dtype = real_dtype(preds.device)

    def margins(preds: Tensor, target: Tensor, before: Tensor) -> tuple[Tensor]:
        target = target.long().clamp(0, preds.shape[1] - 1).unsqueeze(1)
        without_own = other_seen_logits(preds, target.squeeze(1), groups, -torch.inf).amax(1)
        best = torch.maximum(without_own, preds.gather(1, target).squeeze(1))
        largest, mean, std = _moments(preds.index_select(1, groups.absent).to(dtype))
        _, mean_before, std_before = _moments(before.index_select(1, groups.absent).to(dtype))
        # A single absent class, or equal logits, have no spread to rescale by.
        scale = torch.where((std > 0) & (std_before > 0), std / std_before, 1.0)
        own = mean + scale * (before.gather(1, target).squeeze(1).to(dtype) - mean_before)
        return (torch.stack([best.to(dtype) - largest, without_own.to(dtype) - torch.maximum(own, largest)], 1),)

    return in_row_chunks(margins, preds, target, pretrained_preds)[0]


def pseudo_absent_compute(margins: Tensor, num_seen: int, num_absent: int) -> GammaEstimate:
    """Compute gamma and its standard error from margins ``(N, 2)``; NaN if there are none or any is not finite."""
    seen, pseudo = margins.unbind(1)
    if not len(margins) or not margins.isfinite().all():
        return GammaEstimate(margins.new_tensor(torch.nan), margins.new_tensor(torch.nan))

    def surplus(gamma: Tensor) -> Tensor:
        return num_seen * torch.sigmoid(gamma - seen) - num_absent * torch.sigmoid(pseudo - gamma)

    reach = abs(math.log(num_seen / num_absent)) + 1  # this far beyond all margins, the sign of the surplus is certain
    low, high = torch.minimum(seen, pseudo).min() - reach, torch.maximum(seen, pseudo).max() + reach
    for _ in range(_STEPS):
        middle = (low + high) / 2
        above = surplus(middle).mean() > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    gamma = (low + high) / 2
    slope = num_seen * _slope(gamma - seen) + num_absent * _slope(pseudo - gamma)
    error = surplus(gamma).std() / slope.mean() / math.sqrt(len(seen)) if len(seen) > 1 else gamma * torch.nan
    return GammaEstimate(gamma, error)


def _slope(value: Tensor) -> Tensor:
    """Return the derivative of the sigmoid."""
    return torch.sigmoid(value) * torch.sigmoid(-value)


def _moments(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the maximum, mean and population standard deviation of each row; ``values`` is overwritten."""
    largest, mean = values.amax(1), values.mean(1)
    return largest, mean, values.sub_(mean.unsqueeze(1)).square_().mean(1).sqrt()
