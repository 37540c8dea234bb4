"""Ways to find gamma that were tried on the recorded runs and are not in the package."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from recorded import Run
from scipy.optimize import brentq
from scipy.stats import nbinom
from torch import Tensor

from lightning_calibft.functional import average_logit_gap, weight_aligning
from lightning_calibft.functional.average_logit_gap import prior_shift
from lightning_calibft.functional.pseudo_absent_gamma import WeighedSamples, pseudo_absent_compute, weigh

Method = Callable[[Run, float], float]  # gamma for a run at a share of absent samples


@cache
def pseudo_absent_samples(run: Run) -> WeighedSamples:
    """The samples and copies of the package's estimator."""
    leads, sums = _leads(run)
    return weigh(leads, sums, len(run.absent))


@cache
def pseudo_absent(run: Run, share: float) -> float:
    return pseudo_absent_compute(pseudo_absent_samples(run), share).gamma.item()


def shifted(gap: Callable[[Run], float]) -> Method:
    """A gamma that knows no share, shifted by the log-odds of the classes."""
    return lambda run, share: gap(run) + prior_shift(share, len(run.seen), len(run.absent))


@cache
def alg(run: Run) -> float:
    return average_logit_gap(run.logits, run.target, run.seen, run.absent).gamma.item()


def balance(samples: WeighedSamples, share: float, copy_slope: float) -> float:
    """Where as much is lost on either side; slopes may differ from those of the package."""
    margin, right, copy_margin, copy_right, slope = samples

    def surplus(gamma: float) -> float:
        lost = (right * torch.sigmoid(slope * (gamma - margin))).mean()
        missed = (copy_right * torch.sigmoid(copy_slope * (copy_margin - gamma))).mean()
        return ((1 - share) * lost - share * missed).item()

    return brentq(surplus, -300, 300)


@dataclass(frozen=True)
class Variant:
    """The pseudo-absent estimator with one thing or another changed."""

    seen_slope: float | None = 2.5  # per standard deviation of the margins; None: 1 per logit
    copy_slope: float = 0.5  # per logit
    reference: str = "other seen classes"  # what the copy's logit of before is compared with
    gained: float = 1.0  # how much of what the seen classes have gained the absent ones gain, if all features changed
    follows_features: bool = True  # whether that depends on how much the features have changed
    weighs: bool = True  # whether samples count by how likely they are right in their group
    power: float = 1.0  # of the weights of copies
    objective: bool = False  # the best softened accuracy instead of equal losses

    def __call__(self, run: Run, share: float) -> float:
        """Gamma for a run at a share of absent samples."""
        margin, right, copy_margin, copy_right = _variant_samples(self, run)
        slope = torch.tensor(1.0) if self.seen_slope is None else self.seen_slope / margin.std(correction=0)
        if not self.weighs:
            right, copy_right = torch.ones_like(right), torch.ones_like(copy_right)
        if not self.objective:
            samples = WeighedSamples(margin, right, copy_margin, copy_right**self.power, slope)
            return balance(samples, share, self.copy_slope)
        grid = torch.linspace(-20, 30, 501, dtype=torch.float64)
        kept = (right * torch.sigmoid(slope * (margin - grid.unsqueeze(1)))).mean(1)
        found = (copy_right * torch.sigmoid(self.copy_slope * (grid.unsqueeze(1) - copy_margin))).mean(1)
        return grid[((1 - share) * kept + share * found).argmax()].item()


def _variant_samples(variant: Variant, run: Run) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    leads, sums = _leads(run)
    if variant.reference == "absent classes":  # the group's own bias before fine-tuning is carried over, too
        leads = leads + _of_reference(run)
    count = len(leads)
    own, rival, copy = leads.unbind(1)
    right = (own > rival).double()
    accuracy, accuracy_before = ((number + 0.5) / (count + 1) for number in (right.sum(), sums[4]))
    spread = (sums[1] * sums[3]).sqrt()
    changed = torch.where(spread > 0, 1 - sums[2] / spread, 0.0).clamp(0, 1) if variant.follows_features else 1.0
    gain = variant.gained * changed * (accuracy.logit() - accuracy_before.logit()).clamp(min=0)
    fewer = math.inf if len(run.absent) == 1 else -math.log1p(-1 / len(run.absent))
    copy_right = torch.sigmoid(copy - sums[0] / count + gain + fewer)
    return torch.maximum(own, rival), (right * count + 0.5) / (count + 1), rival - copy.clamp(min=0), copy_right


@cache
def _leads(run: Run) -> tuple[Tensor, Tensor]:
    return run.leads


@cache
def _of_reference(run: Run) -> Tensor:
    """What the leads change by if copies stand above the absent classes as before, ``(N, 3)``."""
    now, before = run.logits[:, run.absent], run.pretrained_logits[:, run.absent]
    change = _scale(now, before) * (_other_mean(run) - before.mean(1))
    return torch.stack([torch.zeros_like(change), torch.zeros_like(change), change], 1)


def _scale(now: Tensor, before: Tensor) -> Tensor:
    now, before = now.std(1, correction=0), before.std(1, correction=0)
    return torch.where((now > 0) & (before > 0), now / before, 1.0)


def _other_mean(run: Run) -> Tensor:
    others = torch.tensor(run.seen) != run.target.unsqueeze(1)
    return run.pretrained_logits[:, run.seen][others].view(len(run.target), -1).mean(1)


def of_classes(run: Run, _: float) -> float:
    """The estimator of version 0.1: unweighted, and the share is that of the classes."""
    share = len(run.absent) / (len(run.seen) + len(run.absent))
    return Variant(None, 1.0, "absent classes", weighs=False)(run, share)


def mean_of_both(run: Run, share: float) -> float:
    weighted = Variant(None, 1.0, "absent classes", gained=0.0)
    return (weighted(run, share) + Variant(None, 1.0, "absent classes", weighs=False)(run, share)) / 2


def confusion_matched(run: Run) -> float:
    """Absent classes outrank the true class of a seen sample as often as the same number of seen classes would."""
    above = (run.others > run.own.unsqueeze(1)).sum(1).double()
    lead = run.own - run.logits[:, run.absent].amax(1)
    mean, none = above.mean().item(), (above == 0).double().mean().item()
    factor = len(run.absent) / (len(run.seen) - 1)
    if mean == 0:
        rate = 0.0
    elif math.exp(-mean) >= none:  # they spread less than a Poisson distribution's
        rate = 1 - math.exp(-factor * mean)
    else:
        shape = math.exp(brentq(lambda s: nbinom.pmf(0, math.exp(s), 1 / (1 + mean / math.exp(s))) - none, -14, 14))
        rate = 1 - nbinom.pmf(0, shape, 1 / (1 + factor * mean / shape))
    return float(np.quantile(lead, rate))


def midpoint(run: Run) -> float:
    """Halfway between the margins of samples and of copies."""
    margin, _, copy_margin, _ = _variant_samples(Variant(reference="absent classes"), run)
    return ((margin + copy_margin).mean() / 2).item()


def matched_maxima(run: Run) -> float:
    """The gap between the expected maxima of equally many seen and absent logits."""
    size = min(len(run.seen) - 1, len(run.absent))
    return (_expected_maximum(run.others, size) - _expected_maximum(run.logits[:, run.absent], size)).mean().item()


def _expected_maximum(values: Tensor, size: int) -> Tensor:
    return values.sort(1).values[:, size - 1 :] @ _shares_of_subsets(values.shape[1], size)


@cache
def _shares_of_subsets(count: int, size: int) -> Tensor:
    """The share of subsets of ``size`` whose largest rank is ``size - 1``, ..., ``count - 1``."""
    shares = [size / count]
    for rank in range(count - 1, size - 1, -1):
        shares.append(shares[-1] * (rank - size + 1) / rank)
    return torch.tensor(shares[::-1], dtype=torch.float64)


def log_sum_exp_gap(run: Run) -> float:
    """The gap between the soft maximum of the seen logits and that of the absent ones, both per class."""
    others, absent = run.others, run.logits[:, run.absent]
    gap = others.logsumexp(1) - absent.logsumexp(1) - math.log(others.shape[1] / absent.shape[1])
    return gap.mean().item()


def quantile_gap(run: Run) -> float:
    """The gap between the 0.9 quantiles of the seen and of the absent logits."""
    return (run.others.quantile(0.9, 1) - run.logits[:, run.absent].quantile(0.9, 1)).mean().item()


FORMER: dict[str, Method] = {
    "`pseudo_absent` of 0.1, share of the classes": of_classes,
    "`confusion_matched`": lambda run, _: confusion_matched(run),
    "`confusion_matched`, shifted": shifted(confusion_matched),
    "`midpoint`": lambda run, _: midpoint(run),
    "`midpoint`, shifted": shifted(midpoint),
    "`matched_maxima`": lambda run, _: matched_maxima(run),
    "`matched_maxima`, shifted": shifted(matched_maxima),
    "`log_sum_exp_gap`": lambda run, _: log_sum_exp_gap(run),
    "`log_sum_exp_gap`, shifted": shifted(log_sum_exp_gap),
    "`quantile_gap`, 0.9": lambda run, _: quantile_gap(run),
    "`quantile_gap`, 0.9, shifted": shifted(quantile_gap),
}

IDEAS: dict[str, Method] = {
    "`pseudo_absent`": Variant(),
    "copies stand above the absent classes as before": Variant(reference="absent classes"),
    "absent classes gain nothing": Variant(gained=0.0),
    "absent classes gain half as much": Variant(gained=0.5),
    "absent classes gain as the seen ones, whatever the features": Variant(follows_features=False),
    "absent classes gain half of that, whatever the features": Variant(gained=0.5, follows_features=False),
    "no gain, square roots of the weights": Variant(gained=0.0, power=0.5),
    "all samples and copies count alike": Variant(weighs=False),
    "slope 1 per logit on both sides": Variant(seen_slope=None, copy_slope=1.0),
    "seen slope 1 per logit": Variant(seen_slope=None),
    "seen slope 2 per deviation": Variant(seen_slope=2.0),
    "seen slope 3 per deviation": Variant(seen_slope=3.0),
    "seen slope 4 per deviation": Variant(seen_slope=4.0),
    "copy slope 1/4 per logit": Variant(copy_slope=0.25),
    "copy slope 1 per logit": Variant(copy_slope=1.0),
    "copy slope 2 per logit": Variant(copy_slope=2.0),
    "best softened accuracy": Variant(objective=True),
    "best softened accuracy, slopes twice as steep": Variant(5.0, 1.0, objective=True),
    "slopes 1, weights, no gain, absent classes as reference": Variant(None, 1.0, "absent classes", gained=0.0),
    "slopes 1, no weights, absent classes as reference": Variant(None, 1.0, "absent classes", weighs=False),
    "mean of these two": mean_of_both,
}


def aligned(run: Run) -> Tensor:
    """Weight aligning, which scales the absent logits less their bias."""
    logits, bias, norms = (run.arrays[key] for key in ("test_logits", "bias", "row_norms"))
    scale = weight_aligning(norms.unsqueeze(1), run.seen).squeeze(1) / norms
    return (logits - bias) * scale + bias


def class_offsets(run: Run, share: float, to_pretrained: bool) -> Tensor:
    """A gamma for each absent class: ``share`` of the way to equal mean logits, or to the means of before."""
    drift = run.logits[:, run.absent].mean(0)
    wanted = run.pretrained_logits[:, run.absent].mean(0) if to_pretrained else torch.zeros_like(drift)
    offsets = (wanted - wanted.mean()) - (drift - drift.mean())
    logits = run.arrays["test_logits"].clone()
    logits[:, run.absent] += pseudo_absent(run, run.natural) + share * offsets
    return logits


def spread(run: Run, to_pretrained: bool) -> Tensor:
    """The absent logits get the spread of the other seen ones, or of before, about their mean; then gamma."""
    now = run.logits[:, run.absent]
    if to_pretrained:
        wanted = run.pretrained_logits[:, run.absent].var(1, correction=0).mean()
        scale = math.sqrt(wanted / now.var(1, correction=0).mean())
    else:
        scale = (run.others.std(1, correction=0).mean() / now.std(1, correction=0).mean()).item()
    scaled = {}
    for key in (f"{run.part}_logits", "test_logits"):
        logits = run.arrays[key].clone()
        absent = logits[:, run.absent]
        logits[:, run.absent] = absent.mean(1, keepdim=True) + scale * (absent - absent.mean(1, keepdim=True))
        scaled[key] = logits
    changed = replace(run, name=f"{run.name}, {to_pretrained}", arrays={**run.arrays, **scaled})
    scaled["test_logits"][:, run.absent] += pseudo_absent(changed, run.natural)
    return scaled["test_logits"]


def moments(run: Run) -> Tensor:
    """Mean and spread of all absent logits become those of the other seen ones."""
    logits, now = run.arrays["test_logits"].clone(), run.logits[:, run.absent]
    scale = run.others.std(correction=0) / now.std(correction=0)
    logits[:, run.absent] = run.others.mean() + scale * (logits[:, run.absent] - now.mean())
    return logits


BEYOND_A_NUMBER: dict[str, Callable[[Run], Tensor]] = {
    "weight aligning (norms of the head's rows)": aligned,
    "mean and spread of absent logits as of other seen ones": moments,
    "pseudo-absent, spread of the other seen logits": lambda run: spread(run, to_pretrained=False),
    "pseudo-absent, spread of before": lambda run: spread(run, to_pretrained=True),
    "pseudo-absent, class offsets 1/4 to equal means": lambda run: class_offsets(run, 0.25, to_pretrained=False),
    "pseudo-absent, class offsets 1/2 to equal means": lambda run: class_offsets(run, 0.5, to_pretrained=False),
    "pseudo-absent, class offsets to equal means": lambda run: class_offsets(run, 1.0, to_pretrained=False),
    "pseudo-absent, class offsets 1/4 to those of before": lambda run: class_offsets(run, 0.25, to_pretrained=True),
    "pseudo-absent, class offsets to those of before": lambda run: class_offsets(run, 1.0, to_pretrained=True),
}
