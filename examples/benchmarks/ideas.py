"""Ways to find gamma that were tried on the recorded runs and are not in the package."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from recorded import Run
from torch import Tensor

from lightning_calibft.estimators import ConfusionMatched, Midpoint
from lightning_calibft.functional import pseudo_absent_gamma, weight_aligning


def root(function: Callable[[float], float], low: float = -300.0, high: float = 300.0) -> float:
    """Where a rising function is zero."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return (low + high) / 2


def pseudo_absent(run: Run) -> float:
    return pseudo_absent_gamma(run.logits, run.target, run.pretrained_logits, run.seen).gamma.item()


def soft_mass(run: Run) -> float:
    """The mean softmax probability of an absent class is that of a wrong seen class."""

    def surplus(gamma: float) -> float:
        absent = run.logits[:, run.absent] + gamma
        probability = torch.cat([run.own.unsqueeze(1), run.others, absent], 1).softmax(1)
        wrong = run.others.shape[1]
        return (probability[:, 1 + wrong :].mean() - probability[:, 1 : 1 + wrong].mean()).item()

    return root(surplus)


def threshold(run: Run, seen: Tensor, pseudo: Tensor, slope: float, weights: Tensor | None = None) -> float:
    """Where as many seen samples fall to the absent classes as pseudo-absent copies to the seen ones, softly."""
    weights = torch.full_like(pseudo, 1 / len(pseudo)) if weights is None else weights

    def surplus(gamma: float) -> float:
        falling = torch.sigmoid(slope * (gamma - seen)).mean()
        staying = (weights * torch.sigmoid(slope * (pseudo - gamma))).sum()
        return (len(run.seen) * falling - len(run.absent) * staying).item()

    return root(surplus)


def slope(value: float) -> Callable[[Run], float]:
    return lambda run: threshold(run, *run.margins, value)


def free_slope(run: Run) -> float:
    """A logistic regression of "seen or absent" on the margin, slope and all."""
    margins = torch.cat(run.margins)
    centre, scale = margins.mean(), margins.std()
    seen, pseudo = ((part - centre) / scale for part in run.margins)
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        lost = len(run.seen) * torch.nn.functional.softplus(-weights[0] * seen - weights[1]).mean()
        lost = lost + len(run.absent) * torch.nn.functional.softplus(weights[0] * pseudo + weights[1]).mean()
        lost.backward()
        return lost

    optimizer.step(loss)
    return (centre - weights[1].detach() / weights[0].detach() * scale).item()


def best_of_grid(run: Run, seen: Tensor, pseudo: Tensor, seen_width: Tensor, pseudo_width: Tensor) -> float:
    """The gamma with the best expected accuracy of samples and copies, each blurred by a normal distribution."""
    grid = torch.linspace(torch.cat(run.margins).min(), torch.cat(run.margins).max(), 800, dtype=torch.float64)
    kept = torch.special.ndtr((seen - grid.unsqueeze(1)) / seen_width).sum(1) / len(run.target)
    found = torch.special.ndtr((grid.unsqueeze(1) - pseudo) / pseudo_width).sum(1) / len(run.target)
    return grid[(len(run.seen) * kept + len(run.absent) * found).argmax()].item()


def kernels(run: Run) -> float:
    seen, pseudo = run.margins
    width = len(seen) ** -0.2
    return best_of_grid(run, seen, pseudo, width * seen.std(), width * pseudo.std())


def right_kernels(run: Run) -> float:
    """Only samples and copies count that are right within their own group."""
    seen, pseudo = run.margins
    width = len(seen) ** -0.2
    right = run.own > run.others.amax(1)
    carried = carried_over(run)[0] > run.logits[:, run.absent].amax(1)
    return best_of_grid(run, seen[right], pseudo[carried], width * seen.std(), width * pseudo.std())


def normals(run: Run) -> float:
    """Both margins have normal distributions."""
    seen, pseudo = run.margins
    count = len(run.target)
    means = seen.mean().expand(count), pseudo.mean().expand(count)
    return best_of_grid(run, *means, seen.std(), pseudo.std())


def log_sum_exp_margins(run: Run) -> float:
    absent, carried = run.logits[:, run.absent], carried_over(run)[0].unsqueeze(1)
    seen = run.logits[:, run.seen].logsumexp(1) - absent.logsumexp(1)
    pseudo = run.others.logsumexp(1) - torch.cat([carried, absent], 1).logsumexp(1)
    return threshold(run, seen, pseudo, 1.0)


def carried_over(run: Run, how: str = "scale") -> tuple[Tensor, float]:
    """The true class's logit of before, on the absent classes' scale of now; and the spread about it."""
    now, before = run.logits[:, run.absent], run.pretrained_logits[:, run.absent]
    own = run.pretrained_logits.gather(1, run.target.unsqueeze(1)).squeeze(1) - before.mean(1)
    now_centred, before_centred = (part - part.mean(1, keepdim=True) for part in (now, before))
    if how == "scale":
        return now.mean(1) + now.std(1, correction=0) / before.std(1, correction=0) * own, 0.0
    if how == "shift":
        return now.mean(1) + own, 0.0
    if how == "pooled":
        return now.mean(1) + (now_centred.square().mean() / before_centred.square().mean()).sqrt() * own, 0.0
    coefficient = (now_centred * before_centred).sum() / before_centred.square().sum()
    return now.mean(1) + coefficient * own, (now_centred - coefficient * before_centred).std().item()


def carried(how: str, noise: bool = False) -> Callable[[Run], float]:
    """The pseudo-absent estimator with another way to carry the true class over."""

    def gamma(run: Run) -> float:
        own, spread = carried_over(run, how)
        absent, others = run.logits[:, run.absent].amax(1), run.others.amax(1)
        nodes = torch.linspace(-3, 3, 25, dtype=torch.float64) if noise else torch.zeros(1, dtype=torch.float64)
        density = (-nodes.square() / 2).exp()
        copies = [others - torch.maximum(own + spread * node, absent) for node in nodes]
        weights = (density / density.sum()).repeat_interleave(len(own)) / len(own)
        return threshold(run, run.margins[0], torch.cat(copies), 1.0, weights)

    return gamma


def fewer_rivals(run: Run, extrapolate: bool = False) -> float:
    """An absent sample has |U| - 1 absent rivals, and |S| seen ones: a copy has one more, and one fewer."""
    own, count = carried_over(run)[0], len(run.absent)
    first, second = run.logits[:, run.absent].topk(2, 1).values.unbind(1)
    others = run.others.topk(2, 1).values
    rival = others[:, 0] + (others[:, 0] - others[:, 1]) / len(run.seen) if extrapolate else others[:, 0]
    pseudo = torch.cat([rival - torch.maximum(own, first), rival - torch.maximum(own, second)])
    weights = torch.cat([torch.full_like(own, 1 - 1 / count), torch.full_like(own, 1 / count)]) / len(own)
    return threshold(run, run.margins[0], pseudo, 1.0, weights)


def confusion_matched(run: Run) -> float:
    metric = ConfusionMatched(run.split.num_classes, run.seen)
    metric.update(run.logits, run.target)
    return metric.compute().item()


def midpoint(run: Run) -> float:
    metric = Midpoint(run.split.num_classes, run.seen)
    metric.update(run.logits, run.target, run.pretrained_logits)
    return metric.compute().item()


def mean_of_two(run: Run) -> float:
    return (confusion_matched(run) + pseudo_absent(run)) / 2


def median_of_three(run: Run) -> float:
    return sorted([confusion_matched(run), pseudo_absent(run), midpoint(run)])[1]


IDEAS: dict[str, Callable[[Run], float]] = {
    "softmax mass per class, absent = wrong seen": soft_mass,
    "pseudo-absent, slope 1/2": slope(0.5),
    "pseudo-absent, slope 2": slope(2.0),
    "pseudo-absent, slope 4": slope(4.0),
    "pseudo-absent, slope fitted as well": free_slope,
    "pseudo-absent, accuracy with kernels": kernels,
    "pseudo-absent, accuracy, only where right": right_kernels,
    "pseudo-absent, two normal distributions": normals,
    "pseudo-absent, log-sum-exp for maxima": log_sum_exp_margins,
    "pseudo-absent, true class shifted, not scaled": carried("shift"),
    "pseudo-absent, one scale for all samples": carried("pooled"),
    "pseudo-absent, true class by regression": carried("regression"),
    "pseudo-absent, by regression with its noise": carried("regression", noise=True),
    "pseudo-absent, one absent rival fewer": fewer_rivals,
    "pseudo-absent, and one seen rival more": lambda run: fewer_rivals(run, extrapolate=True),
    "mean with confusion-matched": mean_of_two,
    "median with confusion-matched and midpoint": median_of_three,
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
    logits[:, run.absent] += pseudo_absent(run) + share * offsets
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
    gamma = pseudo_absent(Run(run.name, {**run.arrays, **scaled}, run.part))
    scaled["test_logits"][:, run.absent] += gamma
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
