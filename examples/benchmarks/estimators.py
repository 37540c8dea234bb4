"""Compare the ways to find gamma on recorded fine-tuning runs, and print the tables of ``estimators.md``.

    python examples/benchmarks/estimators.py

The loss of a gamma is the best overall test accuracy that any gamma has, less that of this one, in points. Test labels
serve for nothing else, but where "labelled" is said.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from ideas import BEYOND_A_NUMBER, IDEAS, slope
from recorded import Run, read_runs
from torch import Tensor

from lightning_calibft.estimators import Estimator, make_estimator, needs_pretrained_logits
from lightning_calibft.functional import best_gamma, split_accuracy

Losses = dict[str, dict[str, float]]  # of each method on each run
SLOPES, SIZES, DRAWS = (0.5, 1.0, 2.0, 4.0), (50, 200, 1000), 20
# Which runs to take how many of their seen and of their absent classes from.
SOME_CLASSES = [
    *(("glyphs_resnet", "50", pair) for pair in ((78, 40), (78, 20), (78, 8), (10, 79))),
    *(("glyphs_resnet", "20", pair) for pair in ((31, 31), (31, 8), (10, 40))),
    *(("digits_gn", "70", pair) for pair in ((7, 1), (5, 3), (3, 3))),
    *(("digits_gn", "50", pair) for pair in ((5, 2), (2, 5))),
    *(("digits_gn", "30", pair) for pair in ((3, 2), (2, 7))),
]


def estimate(name: str, run: Run, **options: object) -> float:
    """Gamma by one of the package's estimators."""
    return _metric(name, run, slice(None), **options).compute().item()


def _metric(name: str, run: Run, index: Tensor | slice, **options: object) -> Estimator:
    """An estimator that was fed with some samples of a run."""
    metric = make_estimator(name, run.split, options)
    before = (run.pretrained_logits[index],) if needs_pretrained_logits(name) else ()
    metric.update(run.logits[index], run.target[index], *before)
    return metric


ESTIMATORS: dict[str, Callable[[Run], float]] = {
    "gamma 0": lambda run: 0.0,
    "`alg`": partial(estimate, "alg"),
    "`pseudo_absent`": partial(estimate, "pseudo_absent"),
    "`confusion_matched`": partial(estimate, "confusion_matched"),
    "`midpoint`": partial(estimate, "midpoint"),
    "`matched_maxima`": partial(estimate, "matched_maxima"),
    "`log_sum_exp_gap`": partial(estimate, "log_sum_exp_gap"),
    "`log_sum_exp_gap`, temperature 2": partial(estimate, "log_sum_exp_gap", temperature=2.0),
    "`quantile_gap`, 0.75": partial(estimate, "quantile_gap", quantile=0.75),
    "`quantile_gap`, 0.9": partial(estimate, "quantile_gap", quantile=0.9),
    "`quantile_gap`, 1 (maxima)": partial(estimate, "quantile_gap", quantile=1.0),
}


def cross_validated(run: Run, candidates: str) -> float:
    """Gamma of pseudo cross-validation, from the recorded models that were fine-tuned on half of the seen classes."""
    seen, gammas = run.arrays["seen_classes"], []
    target = torch.searchsorted(seen, run.target)  # the columns: seen classes, then the largest absent logit
    before = run.pretrained_logits
    before = torch.cat([before[:, run.seen], before[:, run.absent].amax(1, keepdim=True)], 1)
    for k in range(3):
        kept = torch.searchsorted(seen, run.arrays[f"pseudo{k}_seen_classes"])
        left_out = [c for c in range(len(seen)) if c not in kept.tolist()] + [len(seen)] * (candidates == "all")
        classes = kept.tolist(), left_out
        reached = split_accuracy(before, target, *classes, samples="absent").item()
        logits = run.arrays[f"pseudo{k}_{run.part}_logits"]
        try:
            gammas.append(best_gamma(logits, target, *classes, min_absent_accuracy=reached).item())
        except ValueError:  # no gamma reaches the accuracy that the pre-trained model has
            continue
    return statistics.mean(gammas) if gammas else 0.0  # no split is left in one run


RETRAINING: dict[str, Callable[[Run], float]] = {
    "pseudo cross-validation over S": partial(cross_validated, candidates="seen"),
    "pseudo cross-validation over Y": partial(cross_validated, candidates="all"),
}


def labelled(run: Run, size: int | None, name: str | None = None) -> float:
    """Mean loss on the test samples that are left when ``size`` of them (half) are taken to choose gamma with.

    With a ``name``, gamma is that of an estimator, and the samples only leave.
    """
    logits, target, losses = run.arrays["test_logits"], run.arrays["test_target"], []
    generator = torch.Generator().manual_seed(0)
    gamma = None if name is None else estimate(name, run)
    for _ in range(DRAWS):
        order = torch.randperm(len(target), generator=generator)
        size = size or len(target) // 2
        taken, left = order[:size], order[size:]
        rest = Run(run.name, {**run.arrays, "test_logits": logits[left], "test_target": target[left]})
        chosen = best_gamma(logits[taken], target[taken], run.seen).item() if gamma is None else gamma
        losses.append(rest.loss(chosen))
    return statistics.mean(losses)


LABELLED: dict[str, Callable[[Run], float]] = {
    "best gamma of 50 labelled samples of all classes": partial(labelled, size=50),
    "best gamma of 100 labelled samples": partial(labelled, size=100),
    "best gamma of 200 labelled samples": partial(labelled, size=200),
    "best gamma of half of the test samples": partial(labelled, size=None),
    "`pseudo_absent`, on the other half": partial(labelled, size=None, name="pseudo_absent"),
}


def of_last_epoch(name: str, run: Run) -> float:
    """Gamma of the logits that the steps of the last epoch saw, in train mode."""
    arrays = {"train_logits": run.arrays["last_epoch_logits"], "train_target": run.arrays["last_epoch_target"]}
    return estimate(name, Run(run.name, {**run.arrays, **arrays}))


def losses(methods: dict[str, Callable[[Run], float]], runs: Iterable[Run]) -> Losses:
    """The loss of each method's gamma on each run."""
    runs = list(runs)
    return {name: {run.name: run.loss(gamma(run)) for run in runs} for name, gamma in methods.items()}


def table(title: str, values: Losses, runs: list[Run]) -> Iterator[str]:
    """One line a method: its mean loss with standard error on each kind of run, their mean, and the worst."""
    kinds = list(dict.fromkeys(run.row for run in runs))
    yield f"| {title} | " + " | ".join(kinds) + " | mean | worst row | worst run |"
    yield "| :-- |" + " --: |" * (len(kinds) + 3)
    for name, of_runs in values.items():
        rows = [[of_runs[run.name] for run in runs if run.row == kind] for kind in kinds]
        means = [statistics.mean(row) for row in rows]
        cells = [f"{statistics.mean(row):.1f} ± {statistics.stdev(row) / len(row) ** 0.5:.1f}" for row in rows]
        # The rows weigh the same, so their standard errors add up as squares.
        error = sum(statistics.variance(row) / len(row) for row in rows) ** 0.5 / len(rows)
        cells += [
            f"**{statistics.mean(means):.2f}** ± {error:.2f}",
            f"{max(means):.1f}",
            f"{max(of_runs.values()):.1f}",
        ]
        yield f"| {name} | " + " | ".join(cells) + " |"


def leave_one_row_out(runs: list[Run]) -> Iterator[str]:
    """Choose the slope of the logistic curve by all other rows, and the method among all of the package likewise."""
    slopes = losses({f"slope {value:g}": slope(value) for value in SLOPES}, runs)
    methods = losses({name: gamma for name, gamma in ESTIMATORS.items() if name != "gamma 0"}, runs)
    kinds = list(dict.fromkeys(run.row for run in runs))
    yield "| left out | slope chosen by the others | its loss | that of slope 1 | method chosen by them | its loss |"
    yield "| :-- | --: | --: | --: | :-- | --: |"
    for kind in kinds:
        means = [
            {
                name: (
                    _mean_of_rows(values, runs, [kind]),
                    _mean_of_rows(values, runs, [k for k in kinds if k != kind]),
                )
                for name, values in candidates.items()
            }
            for candidates in (slopes, methods)
        ]
        best, method = (min(of, key=lambda name, of=of: of[name][1]) for of in means)
        yield (
            f"| {kind} | {best.removeprefix('slope ')} | {means[0][best][0]:.2f} | {means[0]['slope 1'][0]:.2f} |"
            f" {method} | {means[1][method][0]:.2f} |"
        )


def _mean_of_rows(values: dict[str, float], runs: list[Run], kinds: list[str]) -> float:
    rows = [[values[run.name] for run in runs if run.row == kind] for kind in kinds]
    return statistics.mean(statistics.mean(row) for row in rows)


def some_classes(runs: list[Run]) -> Iterator[str]:
    """Losses where classes are taken out of the head and of the test data: other shares of seen classes."""
    methods = {"`alg`": ESTIMATORS["`alg`"], "`pseudo_absent`": ESTIMATORS["`pseudo_absent`"]}
    methods |= {f"with slope {value:g}": slope(value) for value in (2.0, 4.0)}
    yield "| runs | seen : absent | " + " | ".join(methods) + " |"
    yield "| :-- | --: |" + " --: |" * len(methods)
    means = []
    for kind, percent, (seen, absent) in SOME_CLASSES:
        chosen = [run for run in runs if run.name.startswith(kind) and f"_{percent}_" in run.name]
        parts = [run.of_some_classes(seen, absent, seed) for run in chosen for seed in range(4)]
        rows = [[part.loss(gamma(part)) for part in parts] for gamma in methods.values()]
        means.append([statistics.mean(row) for row in rows])
        cells = [f"{statistics.mean(row):.1f} ± {statistics.stdev(row) / len(row) ** 0.5:.1f}" for row in rows]
        yield f"| {chosen[0].row} | {seen} : {absent} | {' | '.join(cells)} |"
    columns = list(zip(*means, strict=True))
    yield "| mean | | " + " | ".join(f"**{statistics.mean(column):.2f}**" for column in columns) + " |"
    yield "| worst row | | " + " | ".join(f"{max(column):.1f}" for column in columns) + " |"


def sample_sizes(runs: list[Run]) -> Iterator[str]:
    """Gamma of bootstrap samples: its error against that of all samples, and how often the interval holds that."""
    yield "| estimator | samples | standard error told | root mean square error | 95 % interval holds gamma | loss |"
    yield "| :-- | --: | --: | --: | --: | --: |"
    for name in ("alg", "pseudo_absent", "matched_maxima", "midpoint"):
        for size in SIZES:
            drawn = [result for run in runs for result in _draws(name, run, size)]
            errors, squares, held, lost = (statistics.mean(column) for column in zip(*drawn, strict=True))
            yield f"| `{name}` | {size:,} | {errors:.2f} | {squares**0.5:.2f} | {100 * held:.0f} % | {lost:.1f} |"
        results = [_metric(name, run, slice(None)) for run in runs]
        errors = statistics.mean(metric.standard_error.item() for metric in results)
        lost = statistics.mean(run.loss(metric.compute().item()) for run, metric in zip(runs, results, strict=True))
        yield f"| `{name}` | all | {errors:.2f} | | | {lost:.1f} |"


def _draws(name: str, run: Run, size: int) -> Iterator[tuple[float, float, bool, float]]:
    everything, generator = estimate(name, run), torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        index = torch.randint(len(run.target), (size,), generator=generator)
        metric = _metric(name, run, index)
        gamma, error = metric.compute().item(), metric.standard_error.item()
        yield error, (gamma - everything) ** 2, abs(gamma - everything) <= 1.96 * error, run.loss(gamma)


def tables() -> dict[str, list[str]]:
    """Return each table as the lines of Markdown."""
    runs = read_runs()
    held_out = [run.on("heldout") for run in runs]
    methods = {**ESTIMATORS, **RETRAINING}
    with_labels = {name: {run.name: lost(run) for run in runs} for name, lost in LABELLED.items()}
    changed = {name: {run.name: run.loss_of_logits(of(run)) for run in runs} for name, of in BEYOND_A_NUMBER.items()}
    steps: dict[str, Callable[[Run], float]] = {}
    for name in ("alg", "matched_maxima", "confusion_matched"):
        steps[f"`{name}`, a pass in eval mode"] = partial(estimate, name)
        steps[f"`{name}`, training steps"] = partial(of_last_epoch, name)
    return {
        "methods": list(table("training samples", losses(methods, runs), runs)),
        "methods, held-out": list(table("held-out samples", losses(methods, held_out), runs)),
        "labelled": list(table("labelled samples", with_labels, runs)),
        "leave one row out": list(leave_one_row_out(runs)),
        "some classes": list(some_classes(runs)),
        "ideas": list(table("idea, training samples", losses(IDEAS, runs), runs)),
        "ideas, held-out": list(table("idea, held-out samples", losses(IDEAS, held_out), runs)),
        "more than a number": list(table("more than a number", changed, runs)),
        "steps": list(table("training samples", losses(steps, runs), runs)),
        "sizes": list(sample_sizes(runs)),
    }


def main() -> None:
    for lines in tables().values():
        print("\n".join(lines), end="\n\n")


if __name__ == "__main__":
    main()
