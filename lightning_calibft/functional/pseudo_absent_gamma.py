"""The gamma that best separates seen samples from pseudo-absent copies of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torchmetrics.utilities import rank_zero_warn

from lightning_calibft._arguments import check_absent_share
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
from lightning_calibft.functional.share_table import ABSENT_SHARES, ShareTable
from lightning_calibft.split import ClassIds

DEFAULT_ABSENT_SHARE = 0.5  # of the recorded runs, the least mean loss over shares from 5 to 90 %
_SEEN_SLOPE = 2.5  # per standard deviation of the seen margins
_COPY_SLOPE = 0.5  # per logit
_DENSITY_SLOPE = 5.0  # times the seen slope: how sharply margins of new samples are expected to fall on those of these
_STEPS = 80  # enough for bisection to reach the last bit of float64 from any range of logits; mostly, 5 are taken
_PRECISION = 1e-9  # of the last step, after which the next one would be many times smaller


def pseudo_absent_gamma(
    preds: Tensor,
    target: Tensor,
    pretrained_preds: Tensor,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    absent_share: float | None = None,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> GammaEstimate:
    r"""Estimate the gamma that best separates seen samples from pseudo-absent copies of them.

    A sample :math:`(x, y)` is assigned to the seen classes with the margin :math:`m = \max_S z - \max_U z`. Its
    pseudo-absent copy is the same sample treated as if :math:`y` had been absent: the class moves from :math:`S` to the
    absent classes. Its logit :math:`t` there stands as far above the absent classes as, before fine-tuning, it stood
    above the other seen ones:

    .. math::
        t = \operatorname{mean}_U z + \frac{\operatorname{std}_U z}{\operatorname{std}_U z^0}
        \big(z^0_y - \operatorname{mean}_{S \setminus y} z^0\big), \qquad
        m' = \max_{S \setminus y} z - \max(t, \textstyle\max_U z)

    At this gamma, as much accuracy is expected to be lost on seen samples as on copies. With the share :math:`p` of
    samples of absent classes:

    .. math::
        (1 - p) \operatorname{mean} a \, \sigma\Big(2.5 \, \frac{\gamma - m}{\operatorname{std} m}\Big)
        = p \operatorname{mean} a' \, \sigma\Big(\frac{m' - \gamma}{2}\Big)

    :math:`a` is 1 if the sample is right among the seen classes, and :math:`a'` is the probability that the copy is
    right among the absent ones. Other samples have nothing to lose. :math:`a'` is the softmax of :math:`t` among the
    absent logits, in log-odds, plus :math:`1 - \rho` times what fine-tuning has gained in accuracy among the seen
    classes, also in log-odds. :math:`\rho` is the correlation of the absent logits before and after: the more the
    features have changed, the more absent classes have gained too. The two slopes allow for margins of new samples that
    differ from these. They were chosen on recorded runs of small networks and of an ImageNet network.

    Limitations: it takes the samples as they are. Margins of samples that were trained on are too large, and so is
    gamma: pass held-out samples of the seen classes. It also assumes that the model before fine-tuning knew the
    classes. The standard error is the sampling error alone; it says nothing about these assumptions.

    Args:
        preds: Logits of shape ``(N, C)`` from the fine-tuned model in eval mode.
        target: Class ids of shape ``(N,)``. Samples whose label is not a seen class are left out.
        pretrained_preds: Logits of the same samples, ``(N, C)``, from the model before fine-tuning.
        seen_classes: Ids of the classes in the fine-tuning data, at least two.
        absent_classes: Ids of the absent classes that can occur. ``None``: all classes that are not seen.
        absent_share: The share of samples of absent classes that the model will meet, in (0, 1). ``None``: 0.5.
        ignore_index: Samples with this label are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronization.

    Returns:
        Gamma and its standard error, the sandwich estimate for an M-estimator. Both are float64 scalars (float32 on
        devices without float64). Gamma is NaN with a warning if no sample counts.

    Raises:
        ValueError: If there are fewer than two seen classes, ``absent_share`` is not in (0, 1), or shapes or labels do
            not match.
        TypeError: If ``preds``, ``pretrained_preds`` or ``target`` has the wrong dtype, or ``absent_share`` is not a
            number.

    Example:
        >>> import torch
        >>> from lightning_calibft.functional import pseudo_absent_gamma
        >>> pretrained = torch.tensor([[2.0, 0.0, 0.0, -1.0], [0.0, 2.0, 0.0, -1.0]])
        >>> logits = torch.tensor([[6.0, 0.0, -3.0, -4.0], [0.0, 6.0, -3.0, -4.0]])
        >>> pseudo_absent_gamma(logits, torch.tensor([0, 1]), pretrained, seen_classes=[0, 1]).gamma
        tensor(6.5291, dtype=torch.float64)
        >>> pseudo_absent_gamma(logits, torch.tensor([0, 1]), pretrained, seen_classes=[0, 1], absent_share=0.05).gamma
        tensor(4.4323, dtype=torch.float64)
    """
    share = check_absent_share(absent_share)
    groups = prepare(preds, target, seen_classes, absent_classes, ignore_index, validate_args)
    check_seen_classes(len(groups.seen))
    if validate_args:
        check_inputs(pretrained_preds, target, preds.shape[1], ignore_index, "pretrained_preds")
        warn_if_probabilities(preds)
        warn_if_probabilities(pretrained_preds)
    leads, terms = pseudo_absent_update(preds, target, pretrained_preds, groups)
    counted = groups.of_samples(target, ignore_index) == _SEEN
    leads, terms = leads[counted], terms[counted]
    if not len(leads):
        rank_zero_warn("The estimate of gamma received no samples of seen classes, so gamma is NaN.")
    return pseudo_absent_compute(weigh(leads, terms.sum(0), len(groups.absent)), share)


def pseudo_absent_update(
    preds: Tensor, target: Tensor, pretrained_preds: Tensor, groups: Groups
) -> tuple[Tensor, Tensor]:
    """Reduce a batch to the leads ``(N, 3)`` and terms ``(N, 5)`` of each sample; arbitrary for unseen classes.

    The leads are those over the largest absent logit: of the true class, of the best other seen class, and of the true
    class in the copy. The terms are summed over samples: the log-sum-exp of the absent logits above their maximum;
    their variance, their covariance with those before, and the variance before; and whether the sample was right among
    the seen classes before.
    """
    dtype = real_dtype(preds.device)

    def reduce(preds: Tensor, target: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        target = target.long().clamp(0, preds.shape[1] - 1)
        rival = other_seen_logits(preds, target, groups, -torch.inf).amax(1).to(dtype)
        others_before = other_seen_logits(before, target, groups, torch.nan).to(dtype)
        own, own_before = (part.gather(1, target.unsqueeze(1)).squeeze(1).to(dtype) for part in (preds, before))
        absent, absent_before = (part.index_select(1, groups.absent).to(dtype) for part in (preds, before))
        top, mean = absent.amax(1), absent.mean(1)
        excess = absent.logsumexp(1) - top
        absent -= mean.unsqueeze(1)
        absent_before -= absent_before.mean(1, keepdim=True)
        variance, covariance, variance_before = (
            (one * other).mean(1)
            for one, other in ((absent, absent), (absent, absent_before), (absent_before, absent_before))
        )
        # A single absent class, or equal logits, have no spread to rescale by.
        spread = (variance > 0) & (variance_before > 0)
        scale = torch.where(spread, variance / variance_before, 1.0).sqrt()
        mean_before = (others_before.nansum(1)) / (len(groups.seen) - 1)
        right_before = (own_before > others_before.nan_to_num(nan=-torch.inf).amax(1)).to(dtype)
        leads = torch.stack([own, rival, mean + scale * (own_before - mean_before)], 1) - top.unsqueeze(1)
        return leads, torch.stack([excess, variance, covariance, variance_before, right_before], 1)

    leads, terms = in_row_chunks(reduce, preds, target, pretrained_preds)
    return leads, terms


class WeighedSamples(NamedTuple):
    """Margins of samples and of their copies ``(N,)``, how likely each is right in its group, and the seen slope."""

    margin: Tensor
    right: Tensor
    copy_margin: Tensor
    copy_right: Tensor
    slope: Tensor


def weigh(leads: Tensor, sums: Tensor, num_absent: int) -> WeighedSamples:
    """Return the margins and weights of samples with ``leads (N, 3)`` and the ``sums (5,)`` of their terms."""
    own, rival, copy = leads.unbind(1)
    count, margin, right = len(leads), torch.maximum(own, rival), (own > rival).to(leads)
    excess, variance, covariance, variance_before, right_before = sums
    spread = (variance * variance_before).sqrt()
    changed = torch.where(spread > 0, 1 - covariance / spread, 0.0).clamp(0, 1)
    # Half a sample more on either side, so that no accuracy is 0 or 1.
    accuracy, accuracy_before = ((number + 0.5) / (count + 1) for number in (right.sum(), right_before))
    gained = changed * (accuracy.logit() - accuracy_before.logit()).clamp(min=0)
    # A copy competes with all absent classes, a sample of one of them with one class fewer.
    fewer = math.inf if num_absent == 1 else -math.log1p(-1 / num_absent)
    copy_right = torch.sigmoid(copy - excess / count + gained + fewer)
    deviation = (margin - margin.mean()).square().mean().sqrt()
    slope = torch.where(deviation > 0, _SEEN_SLOPE / deviation, 1.0)
    return WeighedSamples(margin, (right * count + 0.5) / (count + 1), rival - copy.clamp(min=0), copy_right, slope)


def pseudo_absent_compute(samples: WeighedSamples, absent_share: float | None) -> GammaEstimate:
    """Compute gamma and its standard error; NaN if there are no samples or any is not finite."""
    margin, right, copy_margin, copy_right, slope = samples
    if not len(margin) or not (margin + copy_margin + copy_right).isfinite().all():
        return GammaEstimate(margin.new_tensor(torch.nan), margin.new_tensor(torch.nan))
    share = DEFAULT_ABSENT_SHARE if absent_share is None else absent_share
    gamma = margin.new_tensor(_balanced(samples, share, *_bounds(samples, share)))
    lost, missed = torch.sigmoid(slope * (gamma - margin)), torch.sigmoid(_COPY_SLOPE * (copy_margin - gamma))
    rise = (1 - share) * right * slope * lost * (1 - lost) + share * copy_right * _COPY_SLOPE * missed * (1 - missed)
    surplus = (1 - share) * right * lost - share * copy_right * missed
    error = surplus.std() / rise.mean() / math.sqrt(len(margin)) if len(margin) > 1 else gamma * torch.nan
    return GammaEstimate(gamma, error)


def _bounds(samples: WeighedSamples, share: float) -> tuple[float, float]:
    """Return two gammas that are so far beyond all margins that the one for the share is certainly between them."""
    margin, right, copy_margin, copy_right, slope = samples
    odds = share * copy_right.mean() / ((1 - share) * right.mean())
    reach = (odds.log().abs() + 1) * (1 / slope).clamp(min=1 / _COPY_SLOPE)
    low, high = torch.minimum(margin, copy_margin).min() - reach, torch.maximum(margin, copy_margin).max() + reach
    return low.item(), high.item()


def _balanced(samples: WeighedSamples, share: float, low: float, high: float) -> float:
    """Return the gamma between two others at which both sides of the equation are equal.

    It is Newton's method on their ratio, whose logarithm is nearly a line. A step beyond the bounds bisects them.
    """
    margin, right, copy_margin, copy_right, slope = samples
    gamma = low
    for _ in range(_STEPS):
        lost, missed = torch.sigmoid(slope * (gamma - margin)), torch.sigmoid(_COPY_SLOPE * (copy_margin - gamma))
        cost, gain = right * lost, copy_right * missed
        excess = ((1 - share) * cost.mean()).log() - (share * gain.mean()).log()
        rise = slope * (1 - cost.inner(lost) / cost.sum()) + _COPY_SLOPE * (1 - gain.inner(missed) / gain.sum())
        low, high = (low, gamma) if excess > 0 else (gamma, high)
        step = gamma - (excess / rise).item()
        gamma, before = step if low <= step <= high else (low + high) / 2, gamma
        if abs(gamma - before) <= _PRECISION * max(1, abs(gamma)):
            break
    return gamma


def pseudo_absent_table(samples: WeighedSamples) -> ShareTable:
    """Compute gamma, and what it is expected to do, for each share of absent samples.

    Linear interpolation between the shares is within 0.01 logits of :func:`pseudo_absent_compute` in the recorded runs.
    """
    margin, right, copy_margin, copy_right, slope = samples
    smooth = _DENSITY_SLOPE * slope
    low, high = _bounds(samples, ABSENT_SHARES[0])[0], _bounds(samples, ABSENT_SHARES[-1])[1]

    def row(share: float) -> dict[str, float]:
        nonlocal low  # gamma rises with the share
        low = gamma = _balanced(samples, share, low, high)
        found, pays = (copy_margin < gamma).to(right), break_even_share(samples, margin.new_tensor(gamma)).item()
        return {
            "gamma": gamma,
            "seen_accuracy": (right * (margin > gamma).to(right)).mean().item(),
            "absent_accuracy": (copy_right * found).mean().item(),
            "seen_below": torch.sigmoid(smooth * (gamma - margin)).mean().item(),
            "absent_below": torch.sigmoid(smooth * (gamma - copy_margin)).mean().item(),
            "break_even_share": share if math.isnan(pays) else pays,  # far from all margins, nothing is at stake
        }

    without = (right * (margin > 0).to(right)).mean(), (copy_right * (copy_margin < 0).to(right)).mean()
    return ShareTable.of(row, *map(float, without))


def accuracy_change(samples: WeighedSamples, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Return the change of accuracy that gamma is expected to bring on samples of seen and of absent classes."""
    margin, right, copy_margin, copy_right, _ = samples
    seen = right * ((margin > gamma).to(right) - (margin > 0).to(right))
    return seen.mean(), (copy_right * ((copy_margin < gamma).to(right) - (copy_margin < 0).to(right))).mean()


def break_even_share(samples: WeighedSamples, gamma: Tensor) -> Tensor:
    """Return the share of absent samples at which both sides of the equation, integrated from 0 to gamma, are equal."""
    margin, right, copy_margin, copy_right, slope = samples
    if gamma == 0:
        lost = (right * torch.sigmoid(-slope * margin)).mean()
        won = (copy_right * torch.sigmoid(_COPY_SLOPE * copy_margin)).mean()
    else:
        lost = (right * (softplus(slope * (gamma - margin)) - softplus(-slope * margin))).mean() / slope
        at_zero, at_gamma = softplus(_COPY_SLOPE * copy_margin), softplus(_COPY_SLOPE * (copy_margin - gamma))
        won = (copy_right * (at_zero - at_gamma)).mean() / _COPY_SLOPE
    return lost / (lost + won)
