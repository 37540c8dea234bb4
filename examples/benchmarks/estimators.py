"""Compare the ways to find gamma on recorded fine-tuning runs, and print the tables of ``estimators.md``.

    python examples/benchmarks/estimators.py

The loss of a gamma at a share of absent samples is the best accuracy that any gamma has at this share, less that of
this one, in points. The labels of the samples that gamma is scored on serve for nothing else, except where "labeled" is
said.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial

import torch
from ideas import (
    BEYOND_A_NUMBER,
    FORMER,
    IDEAS,
    Method,
    Variant,
    alg,
    balance,
    mean_of_both,
    pseudo_absent,
    pseudo_absent_samples,
    shifted,
)
from recorded import GROUPS, Run, read_picture_runs, read_small_runs
from scipy.stats import spearmanr
from torch import Tensor

from lightning_calibft._format import VERDICTS, verdict
from lightning_calibft.estimators import Estimator, make_estimator, needs_pretrained_logits
from lightning_calibft.functional import best_gamma, split_accuracy
from lightning_calibft.functional._inputs import Groups
from lightning_calibft.functional.pseudo_absent_gamma import (
    accuracy_change,
    break_even_share,
    pseudo_absent_update,
    weigh,
)

Losses = dict[str, float]  # by the name of the run
NATURAL = None  # the share of absent classes among those that occur
SHARES = (NATURAL, 0.05, 0.1, 0.25, 0.5)
MANY_SHARES = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
KINDS = {
    "digits and glyphs": ("digits", "glyphs"),
    "pictures, near": ("pictures A, near", "pictures B, near"),
    "pictures, test": ("pictures A, test", "pictures B, test"),
}
SIZES, DRAWS = (50, 200, 1000), 20
SIGNS = ("distance to the nearest", "mean", "spread")

METHODS: dict[str, Method] = {
    "gamma 0": lambda run, share: 0.0,
    "`alg`": lambda run, share: alg(run),
    "`alg`, share told": shifted(alg),
    "`pseudo_absent`": lambda run, share: pseudo_absent(run, 0.5),
    "`pseudo_absent`, share told": pseudo_absent,
}


def losses(method: Method, runs: Iterable[Run], shares: Sequence[float | None] = SHARES, factor: float = 1) -> Losses:
    """The loss on each run, averaged over shares. The share that is told is odds of ``factor`` times the true ones."""
    found = {}
    for run in runs:
        lost = []
        for share in shares:
            true = run.natural if share is NATURAL else share
            told = factor * true / (1 - true + factor * true)
            lost.append(run.loss(gamma_of(method, run, told), true))
        found[run.name] = statistics.mean(lost)
    return found


@cache
def gamma_of(method: Method, run: Run, share: float) -> float:
    """The gamma of a method, which several tables show."""
    return method(run, share)


def mean_of_rows(values: Losses, runs: Iterable[Run]) -> dict[str, float]:
    """The mean of each kind of run."""
    rows: dict[str, list[float]] = {}
    for run in runs:
        rows.setdefault(run.row, []).append(values[run.name])
    return {row: statistics.mean(found) for row, found in rows.items()}


def cell(values: Losses, runs: Sequence[Run]) -> str:
    """Mean, in which each kind of run has the same weight, and its standard error over runs."""
    mean = statistics.mean(mean_of_rows(values, runs).values())
    of_runs = [values[run.name] for run in runs]
    return f"{mean:.1f} ± {statistics.stdev(of_runs) / len(of_runs) ** 0.5:.1f}"


def table(title: str, methods: dict[str, Method], runs: list[Run]) -> Iterator[str]:
    """One line a method: its mean loss over five shares in each group of runs, and the worst kinds of run."""
    groups = [group for group in GROUPS if any(run.group == group for run in runs)]
    yield f"| {title} | " + " | ".join(groups) + " | mean | worst row | worst against gamma 0 |"
    yield "| :-- |" + " --: |" * (len(groups) + 3)
    zero = {share: mean_of_rows(losses(METHODS["gamma 0"], runs, [share]), runs) for share in SHARES}
    for name, method in methods.items():
        by_share = {share: losses(method, runs, [share]) for share in SHARES}
        values = {run.name: statistics.mean(found[run.name] for found in by_share.values()) for run in runs}
        cells = [cell(values, [run for run in runs if run.group == group]) for group in groups]
        of_kinds = [_of_kind(values, runs, of_kind) for of_kind in kinds(runs).values()]
        rows = {share: mean_of_rows(found, runs) for share, found in by_share.items()}
        worst = max(value for found in rows.values() for value in found.values())
        harm = max(value - zero[share][row] for share, found in rows.items() for row, value in found.items())
        yield f"| {name} | {' | '.join(cells)} | **{statistics.mean(of_kinds):.2f}** | {worst:.1f} | {harm:+.1f} |"


def kinds(runs: Iterable[Run]) -> dict[str, tuple[str, ...]]:
    """The kinds of data that there are runs of, and their groups."""
    met = {run.group for run in runs}
    return {kind: groups for kind, groups in KINDS.items() if not met.isdisjoint(groups)}


def _of_kind(values: Losses, runs: Iterable[Run], groups: Sequence[str]) -> float:
    return statistics.mean(mean_of_rows(values, [run for run in runs if run.group in groups]).values())


def by_share(methods: dict[str, Method], runs: list[Run]) -> Iterator[str]:
    """One line a method and kind of data, one column a share."""
    shares = (NATURAL, *MANY_SHARES)
    yield "| held-out samples | runs | natural | " + " | ".join(f"{100 * share:.0f} %" for share in MANY_SHARES) + " |"
    yield "| :-- | :-- |" + " --: |" * len(shares)
    for name, method in methods.items():
        for kind, groups in kinds(runs).items():
            of_kind = [run for run in runs if run.group in groups]
            cells = [cell(losses(method, of_kind, [share]), of_kind) for share in shares]
            yield f"| {name} | {kind} | {' | '.join(cells)} |"


def told_wrongly(runs: list[Run]) -> Iterator[str]:
    """Losses where the odds that are told are a multiple of the true ones."""
    yield "| odds told, times the true ones | runs | 1/4 | 1/2 | 1 | 2 | 4 |"
    yield "| :-- | :-- |" + " --: |" * 5
    for name in ("`alg`, share told", "`pseudo_absent`, share told"):
        for kind, groups in kinds(runs).items():
            of_kind = [run for run in runs if run.group in groups]
            cells = [cell(losses(METHODS[name], of_kind, factor=factor), of_kind) for factor in (0.25, 0.5, 1, 2, 4)]
            yield f"| {name} | {kind} | {' | '.join(cells)} |"


def not_told(runs: list[Run]) -> Iterator[str]:
    """Losses over shares from 5 to 90 % of the gamma of one share: means over shares, and of each run's worst share."""
    columns = [f"{kind}, mean | worst share" for kind in kinds(runs)]
    yield f"| gamma for a share of | {' | '.join(columns)} | mean |"
    yield "| :-- |" + " --: |" * (2 * len(columns) + 1)
    shares = MANY_SHARES[1:]
    methods: dict[str, Method] = {"(gamma 0)": METHODS["gamma 0"]}
    for assumed in (0.2, 0.3, 0.4, 0.5, 0.6):
        methods[f"{100 * assumed:.0f} %"] = lambda run, share, assumed=assumed: pseudo_absent(run, assumed)  # type: ignore[misc]
    methods["that of the classes"] = lambda run, _: pseudo_absent(run, len(run.absent) / (len(run.seen + run.absent)))
    for name, method in methods.items():
        cells, means = [], []
        for groups in kinds(runs).values():
            of_kind = [run for run in runs if run.group in groups]
            found = [losses(method, of_kind, [share]) for share in shares]
            worst = {run.name: max(each[run.name] for each in found) for run in of_kind}
            means.append(statistics.mean(_of_kind(each, of_kind, groups) for each in found))
            cells += [f"{means[-1]:.1f}", f"{_of_kind(worst, of_kind, groups):.1f}"]
        yield f"| {name} | {' | '.join(cells)} | **{statistics.mean(means):.2f}** |"


def expectations(runs: list[Run]) -> Iterator[str]:
    """How good the changes and the break-even shares are that the estimator expects, of gamma for a share of a half."""
    yield (
        "| runs | seen change: error, mean | root mean square | absent change: error, mean | root mean square |"
        " break-even share within a factor of 2 | right about whether gamma pays |"
    )
    yield "| :-- |" + " --: |" * 6
    for kind, groups in kinds(runs).items():
        errors, within, right = [], [], []
        for run in (run for run in runs if run.group in groups):
            samples, gamma = pseudo_absent_samples(run), pseudo_absent(run, 0.5)
            expected = accuracy_change(samples, torch.tensor(gamma))
            after, before = run.accuracies(gamma), run.accuracies(0.0)
            true = [(one - other).item() for one, other in zip(after, before, strict=True)]
            errors.append([100 * value.item() - change for value, change in zip(expected, true, strict=True)])
            share = break_even_share(samples, torch.tensor(gamma)).item()
            if true[0] * true[1] < 0 and abs(gamma) > 0.5:
                ratio = share / (true[0] / (true[0] - true[1]))
                within.append(0.5 <= ratio <= 2)
            for met in MANY_SHARES:
                change = run.accuracy(gamma, met) - run.accuracy(0.0, met)
                if abs(change) > 0.3:
                    right.append(((met > share) == (gamma > 0)) == (change > 0))
        cells = []
        for column in zip(*errors, strict=True):
            cells += [f"{statistics.mean(column):+.1f}", f"{statistics.mean(e * e for e in column) ** 0.5:.1f}"]
        cells += [f"{100 * statistics.mean(each):.0f} % of {len(each)}" if each else "" for each in (within, right)]
        yield f"| {kind} | {' | '.join(cells)} |"


def verdicts(runs: list[Run]) -> Iterator[str]:
    """The verdict on gamma before it is used, against its true change in accuracy at the share that is met.

    Right is "helps" if that is above half a point, "hurts" if it is below minus half a point, and "does not matter" in
    between.
    """
    named = VERDICTS[:-1]
    yield "| verdict, shares from 2 to 90 % | cannot be told | right, of all others | " + " | ".join(named) + " |"
    yield "| :-- | --: | --: |" + " --: |" * len(named)
    for part, source in (("heldout", "held-out samples"), ("train", "training samples")):
        for kind, groups in KINDS.items():
            for assumed, of_share in ((None, "the share that is met"), (0.5, "50 %")):
                found: dict[str, list[bool]] = {name: [] for name in VERDICTS}
                for run in (run.on(part) for run in runs if run.group in groups):
                    for share in MANY_SHARES:
                        said, right = _judged(run, assumed or share, share)
                        found[said].append(right)
                unknown, told = len(found[VERDICTS[-1]]), [right for name in named for right in found[name]]
                cells = [f"{100 * unknown / (unknown + len(told)):.0f} %", f"{100 * statistics.mean(told):.0f} %"]
                cells += [f"{sum(found[name])} of {len(found[name])}" for name in named]
                yield f"| {source}, {kind}, gamma for {of_share} | {' | '.join(cells)} |"


def _judged(run: Run, assumed: float, met: float) -> tuple[str, bool]:
    """The verdict on gamma for one share where another one is met, and whether it is right."""
    samples, gamma = pseudo_absent_samples(run), pseudo_absent(run, assumed)
    seen, absent = (change.item() for change in accuracy_change(samples, torch.tensor(gamma)))
    known = {"gamma": gamma, "absent_share": met, "seen_change": seen, "absent_change": absent}
    known["break_even_share"] = break_even_share(samples, torch.tensor(gamma)).item()
    known["seen_accuracy"] = (samples.right > 0.5).double().mean().item()
    said, change = verdict(known)[0], run.accuracy(gamma, met) - run.accuracy(0.0, met)
    return said, said == ("helps" if change > 0.5 else "hurts" if change < -0.5 else "does not matter")


def leave_one_row_out(runs: list[Run]) -> Iterator[str]:
    """Choose slopes, and how much absent classes gain, by all other groups of runs."""
    grid = itertools.product((2.0, 2.5, 3.0), (0.25, 0.5, 1.0), (0.5, 1.0))
    values = {choice: losses(Variant(choice[0], choice[1], gained=choice[2]), runs) for choice in grid}
    yield "| left out | seen slope, copy slope and gain chosen by the others | its loss | that of 2.5, 1/2 and 1 |"
    yield "| :-- | :-- | --: | --: |"
    left_out = ["digits", "glyphs", *dict.fromkeys(run.row.split(", ")[2] for run in runs if "pictures" in run.group)]
    for name in left_out:
        inside = [run for run in runs if run.group == name or run.row.endswith(f", {name}")]
        others = [run for run in runs if run not in inside]
        means = {
            choice: statistics.mean(
                _of_kind(found, others, groups)
                for groups in KINDS.values()
                if any(run.group in groups for run in others)
            )
            for choice, found in values.items()
        }
        best = min(means, key=means.__getitem__)
        lost = [statistics.mean(mean_of_rows(values[choice], inside).values()) for choice in (best, (2.5, 0.5, 1.0))]
        yield f"| {name} | {', '.join(f'{value:g}' for value in best)} | {lost[0]:.2f} | {lost[1]:.2f} |"


# Which runs to take how many of their seen and of their absent classes from.
SOME_CLASSES = [
    *(("glyphs_resnet", "50", pair) for pair in ((78, 40), (78, 20), (78, 8), (10, 79))),
    *(("glyphs_resnet", "20", pair) for pair in ((31, 31), (31, 8), (10, 40))),
    *(("digits_gn", "70", pair) for pair in ((7, 1), (5, 3), (3, 3))),
    *(("digits_gn", "50", pair) for pair in ((5, 2), (2, 5))),
    *(("digits_gn", "30", pair) for pair in ((3, 2), (2, 7))),
]


def some_classes(runs: list[Run]) -> Iterator[str]:
    """Losses where classes are taken out of the head and of the test data: other shares of seen classes."""
    methods = {name: METHODS[name] for name in ("`alg`, share told", "`pseudo_absent`, share told")}
    methods["mean of weighted and unweighted, slope 1"] = mean_of_both
    yield "| runs | seen : absent | " + " | ".join(methods) + " |"
    yield "| :-- | --: |" + " --: |" * len(methods)
    means = []
    for kind, percent, (seen, absent) in SOME_CLASSES:
        chosen = [run for run in runs if run.name.startswith(kind) and f"_{percent}_" in run.name]
        parts = [run.of_some_classes(seen, absent, seed) for run in chosen for seed in range(2)]
        rows = [list(losses(method, parts).values()) for method in methods.values()]
        means.append([statistics.mean(row) for row in rows])
        cells = [f"{statistics.mean(row):.1f} ± {statistics.stdev(row) / len(row) ** 0.5:.1f}" for row in rows]
        yield f"| {chosen[0].row} | {seen} : {absent} | {' | '.join(cells)} |"
    columns = list(zip(*means, strict=True))
    yield "| mean | | " + " | ".join(f"**{statistics.mean(column):.2f}**" for column in columns) + " |"
    yield "| worst row | | " + " | ".join(f"{max(column):.1f}" for column in columns) + " |"


def cross_validated(run: Run, share: float | None, candidates: str) -> float:
    """Gamma of pseudo cross-validation, from the recorded models that were fine-tuned on half of the seen classes."""
    seen, gammas = torch.tensor(run.seen), []
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
            gammas.append(best_gamma(logits, target, *classes, min_absent_accuracy=reached, absent_share=share).item())
        except ValueError:  # no gamma reaches the accuracy that the pre-trained model has
            continue
    return statistics.mean(gammas) if gammas else 0.0  # no split is left in one run


def small(runs: list[Run]) -> Iterator[str]:
    """Losses of what needs more than logits of one model, on digits and glyphs, over the five shares."""
    methods: dict[str, Callable[[Run], Losses]] = {
        name: lambda run, method=METHODS[name]: losses(method, [run])  # type: ignore[misc]
        for name in ("`alg`", "`pseudo_absent`, share told")
    }
    for candidates, over in (("seen", "S"), ("all", "Y")):
        for told in (False, True):

            def of(run: Run, share: float, candidates: str = candidates, told: bool = told) -> float:
                return cross_validated(run, share if told else None, candidates)

            name = f"pseudo cross-validation over {over}{', share told' if told else ''}"
            methods[name] = lambda run, of=of: losses(of, [run])  # type: ignore[misc]
    rows = list(dict.fromkeys(run.row for run in runs))
    yield "| training samples, digits and glyphs | " + " | ".join(rows) + " | mean |"
    yield "| :-- |" + " --: |" * (len(rows) + 1)
    for name, method in methods.items():
        values = {key: value for run in runs for key, value in method(run).items()}
        cells = [cell(values, [run for run in runs if run.row == row]) for row in rows]
        yield f"| {name} | {' | '.join(cells)} | **{statistics.mean(mean_of_rows(values, runs).values()):.2f}** |"


def natural(title: str, methods: dict[str, Callable[[Run], float]], runs: list[Run]) -> Iterator[str]:
    """Losses at the natural share, on digits and glyphs."""
    rows = list(dict.fromkeys(run.row for run in runs))
    yield f"| {title} | " + " | ".join(rows) + " | mean | worst row |"
    yield "| :-- |" + " --: |" * (len(rows) + 2)
    for name, lost in methods.items():
        values = {run.name: lost(run) for run in runs}
        cells = [cell(values, [run for run in runs if run.row == row]) for row in rows]
        means = mean_of_rows(values, runs).values()
        yield f"| {name} | {' | '.join(cells)} | **{statistics.mean(means):.2f}** | {max(means):.1f} |"


def labeled(run: Run, size: int | None, method: Method | None = None) -> float:
    """Mean loss on the test samples that are left when ``size`` of them (half) are taken to choose gamma with.

    With a ``method``, gamma is that of it, and the samples only leave.
    """
    logits, target, found = run.arrays["test_logits"], run.arrays["test_target"], []
    generator = torch.Generator().manual_seed(0)
    gamma = None if method is None else method(run, run.natural)
    for _ in range(DRAWS):
        order = torch.randperm(len(target), generator=generator)
        size = size or len(target) // 2
        taken, left = order[:size], order[size:]
        rest = replace(run, margin=run.margin[left], right=run.right[left], is_seen=run.is_seen[left])
        chosen = gamma
        if chosen is None:
            chosen = best_gamma(logits[taken], target[taken], run.seen, absent_share=run.natural).item()
        found.append(rest.loss(chosen))
    return statistics.mean(found)


LABELED: dict[str, Callable[[Run], float]] = {
    "best gamma of 50 labeled samples of all classes": partial(labeled, size=50),
    "best gamma of 100 labeled samples": partial(labeled, size=100),
    "best gamma of 200 labeled samples": partial(labeled, size=200),
    "best gamma of half of the test samples": partial(labeled, size=None),
    "`pseudo_absent`, share told, on the other half": partial(labeled, size=None, method=pseudo_absent),
}


def of_last_epoch(run: Run) -> float:
    """Gamma of the logits that the steps of the last epoch saw, in train mode."""
    arrays = {"train_logits": run.arrays["last_epoch_logits"], "train_target": run.arrays["last_epoch_target"]}
    return alg(replace(run, arrays={**run.arrays, **arrays}))


def sample_sizes(runs: list[Run]) -> Iterator[str]:
    """Gamma of bootstrap samples: its error against that of all samples, and how often the interval holds that."""
    yield "| estimator | samples | standard error told | root mean square error | 95 % interval holds gamma | loss |"
    yield "| :-- | --: | --: | --: | --: | --: |"
    for name in ("alg", "pseudo_absent"):
        for size in SIZES:
            drawn = [result for run in runs for result in _draws(name, run, size)]
            errors, squares, held, lost = (statistics.mean(column) for column in zip(*drawn, strict=True))
            yield f"| `{name}` | {size:,} | {errors:.2f} | {squares**0.5:.2f} | {100 * held:.0f} % | {lost:.1f} |"
        results = [_metric(name, run, slice(None)) for run in runs]
        errors = statistics.mean(metric.standard_error.item() for metric in results)
        lost = statistics.mean(run.loss(metric.compute().item()) for run, metric in zip(runs, results, strict=True))
        yield f"| `{name}` | all | {errors:.2f} | | | {lost:.1f} |"


def held_out_sizes(runs: list[Run]) -> Iterator[str]:
    """Losses from some of the held-out samples, from all of them, and from the training samples, the share told."""
    sizes = (10, 20, 50, 100, None)
    yield "| runs | " + " | ".join("all" if size is None else str(size) for size in sizes) + " | training samples |"
    yield "| :-- |" + " --: |" * (len(sizes) + 1)
    for kind in ("digits", "glyphs", "pictures A", "pictures B"):
        of_kind = [run for run in runs if run.group.startswith(kind)]
        values = [{run.name: _loss_of_some(run.on("heldout"), size) for run in of_kind} for size in sizes]
        values.append({run.name: _loss_of_some(run.on("train"), None) for run in of_kind})
        yield f"| {kind} | {' | '.join(cell(found, of_kind) for found in values)} |"


def classes_found(runs: list[Run]) -> Iterator[str]:
    """How well absent classes can be ranked by their accuracy within the group, without their samples.

    The signs are what logits of held-out samples, less their mean over absent classes, say of a class: how far it is
    from the nearest other absent class (root mean square), its mean, and its standard deviation.
    """
    yield "| rank correlation with Acc_U/U of the class | " + " | ".join(SIGNS) + " |"
    yield "| :-- |" + " --: |" * len(SIGNS)
    for group, when in itertools.product(("digits", "glyphs"), ("before", "after")):
        found: dict[str, list[float]] = {sign: [] for sign in SIGNS}
        for run in (run for run in runs if run.group == group):
            target, right = run.arrays["test_target"], run.right & ~run.is_seen
            counts, hits = (target[of].bincount(minlength=len(run.seen + run.absent)) for of in (~run.is_seen, right))
            met = counts[run.absent] > 0
            accuracy = (hits / counts)[run.absent][met]
            logits = (run.pretrained_logits if when == "before" else run.logits)[:, run.absent]
            logits = logits - logits.mean(1, keepdim=True)
            distance = (logits.unsqueeze(2) - logits.unsqueeze(1)).square().mean(0).sqrt().fill_diagonal_(torch.inf)
            for sign, value in zip(SIGNS, (distance.amin(1), logits.mean(0), logits.std(0)), strict=True):
                found[sign].append(spearmanr(value[met], accuracy).statistic)
        cells = [
            f"{statistics.mean(each):+.2f} ± {statistics.stdev(each) / len(each) ** 0.5:.2f}" for each in found.values()
        ]
        yield f"| {group}, the model {when} fine-tuning | {' | '.join(cells)} |"


def _loss_of_some(run: Run, size: int | None) -> float:
    """Mean loss over five shares of gamma from some samples of a run."""
    groups, generator, found = Groups.from_split(run.split, run.logits.device), torch.Generator().manual_seed(0), []
    leads, terms = pseudo_absent_update(run.logits, run.target, run.pretrained_logits, groups)
    for _ in range(1 if size is None else DRAWS // 4):
        drawn = torch.randperm(len(leads), generator=generator)[:size]
        samples = weigh(leads[drawn], terms[drawn].sum(0), len(run.absent))
        for share in (run.natural if share is NATURAL else share for share in SHARES):
            gamma = balance(samples, share, Variant.copy_slope)  # that of `pseudo_absent`, found with fewer steps
            found.append(run.loss(gamma, share))
    return statistics.mean(found)


@cache
def _estimator(name: str, run: Run) -> Estimator:
    return make_estimator(name, run.split, {"absent_share": run.natural})


def _metric(name: str, run: Run, index: Tensor | slice) -> Estimator:
    """An estimator that was fed with some samples of a run, until the next ones are asked for."""
    metric = _estimator(name, run)
    metric.reset()
    before = (run.pretrained_logits[index],) if needs_pretrained_logits(name) else ()
    metric.update(run.logits[index], run.target[index], *before)
    return metric


def _draws(name: str, run: Run, size: int) -> Iterator[tuple[float, float, bool, float]]:
    everything = _metric(name, run, slice(None)).compute().item()
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        index = torch.randint(len(run.target), (size,), generator=generator)
        metric = _metric(name, run, index)
        gamma, error = metric.compute().item(), metric.standard_error.item()
        yield error, (gamma - everything) ** 2, abs(gamma - everything) <= 1.96 * error, run.loss(gamma)


def tables() -> dict[str, list[str]]:
    """Return each table as the lines of Markdown."""
    of_small, of_pictures = read_small_runs(), read_picture_runs()
    trained = of_small + of_pictures
    held_out = [run.on("heldout") for run in trained]
    small_held_out = [run for run in held_out if run.group in KINDS["digits and glyphs"]]
    beyond = {name: lambda run, of=of: run.loss_of_logits(of(run)) for name, of in BEYOND_A_NUMBER.items()}
    steps: dict[str, Callable[[Run], float]] = {
        "`alg`, a pass in eval mode": lambda run: run.loss(alg(run)),
        "`alg`, training steps": lambda run: run.loss(of_last_epoch(run)),
    }
    return {
        "methods": list(table("held-out samples", {**METHODS, **FORMER}, held_out)),
        "methods, training": list(table("training samples", {**METHODS, **FORMER}, trained)),
        "held-out sizes": list(held_out_sizes(trained)),
        "by share": list(by_share(METHODS, held_out)),
        "told wrongly": list(told_wrongly(held_out)),
        "not told": list(not_told(held_out)),
        "expectations": list(expectations(held_out)),
        "verdicts": list(verdicts(trained)),
        "ideas": list(table("idea, share told, held-out samples", IDEAS, held_out)),
        "leave one row out": list(leave_one_row_out(held_out)),
        "some classes": list(some_classes(small_held_out)),
        "small": list(small(of_small)),
        "labeled": list(natural("natural share", LABELED, small_held_out)),
        "more than a number": list(natural("natural share", beyond, small_held_out)),
        "steps": list(natural("natural share", steps, of_small)),
        "sizes": list(sample_sizes(small_held_out)),
        "classes found": list(classes_found(small_held_out)),
    }


def main() -> None:
    for lines in tables().values():
        print("\n".join(lines), end="\n\n")


if __name__ == "__main__":
    main()
