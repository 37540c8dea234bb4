"""Estimate the share of absent samples from unlabeled ones, on recorded runs, and print the tables of ``traffic.md``.

    python examples/benchmarks/traffic.py
    python examples/benchmarks/traffic.py --only both_models
    python examples/benchmarks/traffic.py --record digits    # or glyphs: train the runs of `runs/both` again

Half of the test samples of a run are the traffic: unlabeled, drawn with replacement, so many of them of absent classes
as the share says. On the other half, gamma is scored: the best accuracy of any gamma at this share, less that of this
one, in points. The table of gammas comes from held-out samples of the seen classes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from estimators import KINDS, MANY_SHARES, cell, mean_of_rows
from ideas import alg, pseudo_absent_samples
from recorded import GROUPS, RUNS, Run, read_picture_runs, read_small_runs, score_margins
from torch import Tensor

from lightning_calibft import ClassSplit
from lightning_calibft.functional._inputs import Groups
from lightning_calibft.functional.absent_share import estimate_share
from lightning_calibft.functional.pseudo_absent_gamma import pseudo_absent_table, pseudo_absent_update, weigh
from lightning_calibft.functional.share_table import ShareTable
from lightning_calibft.metrics import AbsentShare
from lightning_calibft.plotting import COLORS, CURVE_COLORS

if TYPE_CHECKING:
    from methods import Setting

SIZES, SPLITS, DRAWS = (50, 200, 500, 2000), 2, 4
BOTH = RUNS / "both"  # of which the model before is known as well
LENGTH, EVERY = 2400, 50  # of a stream, in samples
PICTURE = Path(__file__).with_name("figures") / "traffic.png"


class Estimate(NamedTuple):
    """The share, the ends of its interval, and the misfit of the margins."""

    share: float
    low: float
    high: float
    misfit: float


@dataclass(frozen=True)
class Deployed:
    """A run whose test samples are split into traffic and samples to score gamma on."""

    run: Run  # with the samples to score on
    seen: Tensor  # margins of the traffic, ``(N,)``, or also a second sign of each, ``(N, 2)``
    absent: Tensor

    @cached_property
    def table(self) -> ShareTable:
        """Gamma, and what is expected, for each share."""
        return pseudo_absent_table(pseudo_absent_samples(self.run))

    @cached_property
    def table_before(self) -> ShareTable:
        """The same of the model before fine-tuning, as if it were its own fine-tuned one."""
        run, groups = self.run, Groups.from_split(self.run.split, torch.device("cpu"))
        leads, terms = pseudo_absent_update(run.pretrained_logits, run.target, run.pretrained_logits, groups)
        return pseudo_absent_table(weigh(leads, terms.sum(0), len(run.absent)))

    def gamma(self, share: float) -> float:
        """Gamma for a share."""
        return self.table.at(min(max(share, 0.001), 0.999))["gamma"]

    def metric(self, half_life: float | None, table: ShareTable | None = None) -> AbsentShare:
        """The metric, for two classes: a seen one, whose logit is the margin, and an absent one."""
        table = self.table if table is None else table
        return AbsentShare(2, [0], [1], share_table=table, half_life=half_life, validate_args=False)

    def traffic(self, shares: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Margins of samples of which each is of an absent class with its own probability."""
        absent = torch.from_numpy(rng.random(len(shares)) < shares)
        drawn = [pool[torch.from_numpy(rng.integers(len(pool), size=len(shares)))] for pool in (self.seen, self.absent)]
        return torch.where(absent.view(-1, *[1] * (drawn[0].ndim - 1)), drawn[1], drawn[0])


def deployed(runs: list[Run], splits: int = SPLITS) -> list[list[Deployed]]:
    """Split the test samples of each run several times."""
    found = []
    for run in runs:
        rng, parts = np.random.default_rng(zlib.crc32(run.name.encode())), []
        second = run.arrays.get("second")
        margins = run.margin if second is None else torch.stack([run.margin, second], 1)
        for _ in range(splits):
            halves = [np.array_split(rng.permutation(side.nonzero().flatten().numpy()), 2) for side in _sides(run)]
            kept = torch.from_numpy(np.concatenate([half[1] for half in halves]))
            scored = replace(run, margin=run.margin[kept], right=run.right[kept], is_seen=run.is_seen[kept])
            parts.append(Deployed(scored, *(margins[torch.from_numpy(half[0])] for half in halves)))
        found.append(parts)
    return found


def _sides(run: Run) -> tuple[Tensor, Tensor]:
    return run.is_seen, ~run.is_seen


def as_logits(margin: Tensor) -> Tensor:
    """Logits of a seen and an absent class with these margins."""
    return torch.stack([margin, torch.zeros_like(margin)], 1)


def read(metric: AbsentShare) -> Estimate:
    """What a metric says now."""
    share = metric.compute().item()
    return Estimate(share, *metric.interval.tolist(), metric.misfit.item())


def estimated(part: Deployed, margin: Tensor) -> Estimate:
    """The share of all samples of a part of the traffic."""
    metric = part.metric(None)
    metric.update(as_logits(margin))
    return read(metric)


def estimated_by_both(part: Deployed, margins: Tensor) -> Estimate:
    """The same from the margins ``(N, 2)`` of the fine-tuned model and of the one before, as `calibrate` does it."""
    metrics = part.metric(None), part.metric(None, part.table_before)
    for metric, margin in zip(metrics, margins.unbind(1), strict=True):
        metric.update(as_logits(margin))
    found = estimate_share(*(metric.counted for metric in metrics))
    return Estimate(found.share.item(), *found.interval.tolist(), found.misfit.item())


class Tried(NamedTuple):
    """What became of the estimates at a share: mean loss and, of the intervals, how often they hold it and widths."""

    loss: float
    held: float
    width: float


def tried(
    parts: list[Deployed],
    share: float,
    size: int,
    draws: int = DRAWS,
    way: Callable[[Deployed, Tensor], Estimate] = estimated,
) -> Tried:
    """Estimate a share from so many samples, several times."""
    results = []
    for number, part in enumerate(parts):
        rng = np.random.default_rng([zlib.crc32(part.run.name.encode()), number, size, int(1000 * share)])
        for _ in range(draws):
            found = way(part, part.traffic(np.full(size, share), rng))
            loss = part.run.loss(part.gamma(found.share), share)
            results.append(Tried(loss, found.low <= share <= found.high, found.high - found.low))
    return Tried(*(statistics.mean(column) for column in zip(*results, strict=True)))


def losses(parts: list[list[Deployed]], loss: Callable[[list[Deployed]], float]) -> dict[str, float]:
    """The loss of each run."""
    return {each[0].run.name: loss(each) for each in parts}


def fixed(gamma: Callable[[Deployed], float], share: float) -> Callable[[list[Deployed]], float]:
    """The mean loss of a gamma that does not look at the traffic."""
    return lambda parts: statistics.mean(part.run.loss(gamma(part), share) for part in parts)


def by_share(parts: list[list[Deployed]]) -> Iterator[str]:
    """One line a way to find gamma and kind of data, one column a share; then all kinds, and the intervals."""
    runs = [each[0].run for each in parts]
    groups = {"digits": ("digits",), "glyphs": ("glyphs",), **{k: v for k, v in KINDS.items() if "pictures" in k}}
    found: dict[str, list[dict[str, float]]] = {"not calibrating": [], "`alg`": [], "the default (50 %)": []}
    found["a told share"] = []
    held: dict[int, list[dict[str, Tried]]] = {size: [] for size in SIZES}
    for share in MANY_SHARES:
        ways: dict[str, Callable[[Deployed], float]] = {
            "not calibrating": lambda part: 0.0,
            "`alg`": lambda part: alg(part.run),
            "the default (50 %)": lambda part: part.gamma(0.5),
            "a told share": lambda part, share=share: part.gamma(share),  # type: ignore[misc]
        }
        for name, gamma in ways.items():
            found[name].append(losses(parts, fixed(gamma, share)))
        for size in SIZES:
            held[size].append({each[0].run.name: tried(each, share, size) for each in parts})
            column = {name: each.loss for name, each in held[size][-1].items()}
            found.setdefault(f"estimated from {size:,}", []).append(column)
    yield "| gamma | runs | " + " | ".join(f"{100 * share:.0f} %" for share in MANY_SHARES) + " | mean |"
    yield "| :-- | :-- |" + " --: |" * (len(MANY_SHARES) + 1)
    for name, columns in found.items():
        for kind, members in groups.items():
            of_kind = [run for run in runs if run.group in members]
            mean = {run.name: statistics.mean(column[run.name] for column in columns) for run in of_kind}
            cells = [cell(column, of_kind) for column in (*columns, mean)]
            yield f"| {name} | {kind} | {' | '.join(cells)} |"
    yield ""
    yield (
        "| gamma | mean of three kinds | worst share | mean over all runs | against the default at 50 % |"
        " interval holds | its width |"
    )
    yield "| :-- |" + " --: |" * 6
    at_half = MANY_SHARES.index(0.5)
    for name, columns in found.items():
        means = [_of_kinds(column, runs) for column in columns]
        every = statistics.mean(value for column in columns for value in column.values())
        harm = means[at_half] - _of_kinds(found["the default (50 %)"][at_half], runs)
        size = int(name.rsplit(" ", 1)[1].replace(",", "")) if "estimated" in name else None
        tries = [] if size is None else [each for column in held[size] for each in column.values()]
        told = [f"{100 * statistics.mean(each.held for each in tries):.0f} %"] if tries else [""]
        told += [f"{100 * statistics.mean(each.width for each in tries):.0f}"] if tries else [""]
        cells = [f"**{statistics.mean(means):.2f}**", f"{max(means):.2f}", f"{every:.2f}", f"{harm:+.2f}", *told]
        yield f"| {name} | {' | '.join(cells)} |"


def _of_kinds(column: dict[str, float], runs: Sequence[Run]) -> float:
    """Mean of the three kinds of runs."""
    of_kinds = []
    for members in KINDS.values():
        of_kind = [run for run in runs if run.group in members]
        of_kinds.append(statistics.mean(mean_of_rows(column, of_kind).values()))
    return statistics.mean(of_kinds)


@dataclass(frozen=True)
class Mixture:
    """The estimate with one thing or another changed: from counts of margins in bins, for many draws at once."""

    step: int = 3  # rows of the table to a bin
    exponents: tuple[float, ...] = (1.0, 2.0)  # how unsure seen samples can be
    absent_exponents: tuple[float, ...] = (1.0,)  # the same of absent ones
    most: float = 70.0  # as many samples as the table is worth
    anywhere: float = 0.03
    prior: float = 0.5
    hard: bool = False  # whether margins of the table are counted as they are
    pools: tuple[Tensor, Tensor] | None = None  # margins of both groups to count instead
    before: bool = False  # whether the table is that of the model before

    def __call__(self, part: Deployed, margin: Tensor) -> float:
        """The share of absent samples."""
        weight, share = self.posterior(part, margin)
        return float(weight.sum((1, 2)) @ share)

    def posterior(self, part: Deployed, margin: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The weight of each share and way in which absent and seen samples can be, ``(R, A, S)``, and the shares."""
        log, share = self.log_likelihood(part, margin)
        weight = np.exp(log - log.max()) * ((share * (1 - share)) ** self.prior)[:, None, None]
        return weight / weight.sum(), share

    def log_likelihood(self, part: Deployed, margin: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The same before the prior, without its constant."""
        table, samples = part.table_before if self.before else part.table, pseudo_absent_samples(part.run)
        edges = np.array(table.gamma[:: self.step])
        below = [np.array(column[:: self.step]) for column in (table.seen_below, table.absent_below)]
        if self.hard or self.pools is not None:
            pools = (samples.margin, samples.copy_margin) if self.pools is None else self.pools
            below = [(pool.numpy()[:, None] < edges).mean(0) for pool in pools]
        seen = np.stack([self._fractions(1 - (1 - below[0]) ** number) for number in self.exponents])
        absent = np.stack([self._fractions(below[1] ** number) for number in self.absent_exponents])
        share = np.array(table.absent_share)
        mixed = share[:, None, None, None] * absent[:, None] + (1 - share)[:, None, None, None] * seen
        count = np.bincount(np.searchsorted(edges, margin.numpy(), side="right"), minlength=len(edges) + 1)
        told = count / (1 + count.sum() / self.most)
        return np.log(mixed) @ told, share

    def _fractions(self, below: np.ndarray) -> np.ndarray:
        inside = np.diff(np.concatenate([[0.0], below, [1.0]])).clip(0)
        return (1 - self.anywhere) * inside + self.anywhere / len(inside)


def expectation_maximization(part: Deployed, margin: Tensor) -> float:
    """The share of the largest likelihood, if the table is true (Saerens et al., 2002, on margins)."""
    return Mixture(exponents=(1.0,), most=math.inf, prior=0.0)(part, margin)


def adjusted_count(part: Deployed, margin: Tensor, at: float = 0.5) -> float:
    """The fraction of margins below the gamma of a share, adjusted for those of either group (Forman, 2008)."""
    row = part.table.at(at)
    found = (margin < row["gamma"]).double().mean().item()
    return min(max((found - row["seen_below"]) / (row["absent_below"] - row["seen_below"]), 0.001), 0.999)


def median_sweep(part: Deployed, margin: Tensor) -> float:
    """The median of adjusted counts at several gammas (Forman, 2008)."""
    return statistics.median(adjusted_count(part, margin, at) for at in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9))


def own_margins(part: Deployed, margin: Tensor) -> float:
    """The share if the margins of both groups were known: those of the traffic itself, with labels."""
    return Mixture(exponents=(1.0,), most=math.inf, pools=(part.seen, part.absent))(part, margin)


def shrunk(part: Deployed, margin: Tensor) -> float:
    """The estimate, a fifth nearer to the default in log-odds."""
    share = Mixture()(part, margin)
    odds = (share / (1 - share)) ** 0.8
    return odds / (1 + odds)


def own_tables(part: Deployed, margin: Tensor) -> float:
    """The share whose gamma is best on average over shares and over how unsure seen samples are.

    If the margin of a seen sample is the smallest of k, its density below gamma is k (1 - F)^(k - 1) times as high.
    """
    mixture, table = Mixture(), part.table
    weight, share = mixture.posterior(part, margin)[0][:, 0], np.array(table.absent_share)
    kept = 1 - np.array(table.seen_below)
    denser = sum((weight[:, place] @ (1 - share)) * k * kept ** (k - 1) for place, k in enumerate(mixture.exponents))
    surplus = np.log(share / (1 - share)) - np.log((weight.sum(1) @ share) / denser)
    return float(np.interp(0, surplus, share))


def quantile_matched(part: Deployed, margin: Tensor) -> float:
    """As gamma: halfway to the quantile of the traffic's own margins at the estimated share."""
    share = Mixture()(part, margin)
    return (part.gamma(share) + margin.quantile(share).item()) / 2


Way = Callable[[Deployed, Tensor], float]
IDEAS: dict[str, Way] = {
    "`AbsentShare`": Mixture(),
    "plain EM on margins": expectation_maximization,
    "adjusted count at the gamma of 50 %": adjusted_count,
    "median of adjusted counts at nine gammas": median_sweep,
    "seen samples are as expected": Mixture(exponents=(1.0,)),
    "seen samples can be even less sure": Mixture(exponents=(1.0, 2.0, 3.0)),
    "absent samples can be more like seen ones": Mixture(absent_exponents=(1.0, 1.5)),
    "the table is true": Mixture(most=math.inf),
    "the table is worth 200 samples": Mixture(most=200),
    "the table is worth 35 samples": Mixture(most=35),
    "margins of held-out samples not smoothed": Mixture(hard=True),
    "not smoothed, bins of six rows": Mixture(hard=True, step=6),
    "bins of one row": Mixture(step=1),
    "no sample is anywhere": Mixture(anywhere=0.001),
    "a flat prior": Mixture(prior=1.0),
    "a prior for the default": Mixture(prior=2.0),
    "a prior for extreme shares": Mixture(prior=0.1),
    "a fifth nearer to the default": shrunk,
    "gamma best on average over how unsure seen samples are": own_tables,
    "the margins of both groups were known": own_margins,
}
GAMMA_IDEAS: dict[str, Way] = {"halfway to the quantile of the traffic's margins": quantile_matched}
IDEA_SIZE = 500


def loss_of_ideas(parts: list[list[Deployed]], ways: dict[str, Way]) -> dict[str, list[dict[str, float]]]:
    """The loss of each way on each run, at each share."""
    found: dict[str, list[dict[str, float]]] = {name: [{} for _ in MANY_SHARES] for name in ways}
    for each in parts:
        for row, share in enumerate(MANY_SHARES):
            lost: dict[str, list[float]] = {name: [] for name in ways}
            for number, part in enumerate(each):
                rng = np.random.default_rng([zlib.crc32(part.run.name.encode()), number, row])
                for _ in range(DRAWS):
                    margin = part.traffic(np.full(IDEA_SIZE, share), rng)
                    for name, way in ways.items():
                        value = way(part, margin)
                        gamma = value if name in GAMMA_IDEAS else part.gamma(value)
                        lost[name].append(part.run.loss(gamma, share))
            for name, values in lost.items():
                found[name][row][each[0].run.name] = statistics.mean(values)
    return found


def ideas(parts: list[list[Deployed]]) -> Iterator[str]:
    """One line an idea: mean loss over shares for each kind of data, with 500 samples."""
    runs = [each[0].run for each in parts]
    yield f"| {IDEA_SIZE} samples | " + " | ".join(GROUPS) + " | mean of three kinds | worst share | at 50 % |"
    yield "| :-- |" + " --: |" * (len(GROUPS) + 3)
    for name, columns in loss_of_ideas(parts, {**IDEAS, **GAMMA_IDEAS}).items():
        values = {run.name: statistics.mean(column[run.name] for column in columns) for run in runs}
        cells = [cell(values, [run for run in runs if run.group == group]) for group in GROUPS]
        means = [_of_kinds(column, runs) for column in columns]
        cells += [f"**{statistics.mean(means):.2f}**", f"{max(means):.2f}", f"{means[MANY_SHARES.index(0.5)]:.2f}"]
        yield f"| {name} | {' | '.join(cells)} |"


def leave_one_row_out(parts: list[list[Deployed]]) -> Iterator[str]:
    """Choose how unsure seen samples can be, and what the table is worth, by the other kinds of runs."""
    ways: dict[str, Way] = {
        f"{', '.join(map('{:g}'.format, exponents))}; {most:g}": Mixture(exponents=exponents, most=most)
        for exponents in ((1.0,), (1.0, 2.0), (1.0, 2.0, 3.0))
        for most in (35.0, 70.0, 200.0)
    }
    runs = [each[0].run for each in parts]
    found = loss_of_ideas(parts, ways)
    values = {
        name: {run.name: statistics.mean(column[run.name] for column in columns) for run in runs}
        for name, columns in found.items()
    }
    yield "| left out | exponents and worth chosen by the others | its loss | that of 1, 2; 70 |"
    yield "| :-- | :-- | --: | --: |"
    names = ["digits", "glyphs", *dict.fromkeys(run.row.split(", ")[2] for run in runs if "pictures" in run.group)]
    for name in names:
        inside = [run for run in runs if run.group == name or run.row.endswith(f", {name}")]
        others = [run for run in runs if run not in inside]

        def of_others(way: str, others: list[Run] = others) -> float:
            kinds = [[run for run in others if run.group in members] for members in KINDS.values()]
            return statistics.mean(statistics.mean(mean_of_rows(values[way], kind).values()) for kind in kinds if kind)

        best = min(ways, key=of_others)
        lost = [statistics.mean(mean_of_rows(values[way], inside).values()) for way in (best, "1, 2; 70")]
        yield f"| {name} | {best} | {lost[0]:.2f} | {lost[1]:.2f} |"


def streams() -> dict[str, np.ndarray]:
    """The share of absent samples over time."""
    time = np.arange(LENGTH)
    return {
        "a jump": np.select([time < 800, time < 1600], [0.05, 0.6], 0.2),
        "a season": 0.325 - 0.275 * np.cos(2 * np.pi * time / 1600),
        "a rare burst": np.where((time >= 1000) & (time < 1200), 0.6, 0.03),
        "an unseen third group": np.full(LENGTH, 0.1),
    }


THIRD = slice(1000, 1600)  # when six of ten samples are of the third group: their logits are a tenth of those of others


def followed(part: Deployed, name: str, shares: np.ndarray, half_life: float | None = 50) -> list[Estimate]:
    """What the metric says along a stream."""
    rng = np.random.default_rng(zlib.crc32(f"{part.run.name} {name}".encode()))
    margin = part.traffic(shares, rng)
    if "third" in name:
        of_third = torch.zeros(LENGTH, dtype=torch.bool)
        of_third[THIRD] = torch.from_numpy(rng.random(THIRD.stop - THIRD.start) < 0.6)
        margin = torch.where(of_third, part.traffic(np.full(LENGTH, 0.5), rng) / 10, margin)
    metric, found = part.metric(half_life), []
    for batch in margin.split(EVERY):
        metric.update(as_logits(batch))
        found.append(read(metric))
    return found


def stream_losses(parts: list[list[Deployed]]) -> Iterator[str]:
    """One line a stream: what following it loses against knowing the share, and against the best fixed gamma."""
    yield (
        "| stream | default, against knowing | best fixed gamma in hindsight | followed | at worst, of six kinds |"
        " 200 samples after a jump | share in the interval | misfit above 3 | width of the interval |"
    )
    yield "| :-- |" + " --: |" * 8
    ends = np.arange(EVERY, LENGTH + 1, EVERY)
    for name, shares in streams().items():
        ahead = shares[np.minimum(ends, LENGTH - 1)]  # the next samples are those that gamma is for
        rows: dict[str, dict[str, float]] = {}
        for part in (each[0] for each in parts):
            found = followed(part, name, shares)
            known = np.array([part.run.accuracy(part.gamma(share), share) for share in ahead])
            got = [part.run.accuracy(part.gamma(each.share), share) for each, share in zip(found, ahead, strict=True)]
            lost = known - np.array(got)
            candidates = [part.gamma(share) for share in (0.001, *np.arange(0.02, 1, 0.04))]
            accuracies = [[part.run.accuracy(gamma, share) for share in ahead] for gamma in candidates]
            default = [part.run.accuracy(part.gamma(0.5), share) for share in ahead]
            after = [lost[np.flatnonzero(ends >= jump + 200)[0]] for jump in (800, 1600)]
            inside = [float(each.low <= share <= each.high) for each, share in zip(found, ahead, strict=True)]
            told = found
            if "third" in name:
                told = [each for each, end in zip(found, ends, strict=True) if THIRD.start + 200 <= end <= THIRD.stop]
            of_run = {
                "default": (known - default).mean(),
                "fixed": known.mean() - max(map(np.mean, accuracies)),
                "followed": lost.mean(),
                "after": statistics.mean(after),
                "inside": 100 * statistics.mean(inside),
                "misfit": 100 * statistics.mean(float(each.misfit > 3) for each in told),
                "width": 100 * statistics.mean(each.high - each.low for each in told),
            }
            for key, value in of_run.items():
                rows.setdefault(key, {})[part.run.name] = float(value)
        runs = [each[0].run for each in parts]
        mean = {key: _of_kinds(column, runs) for key, column in rows.items()}
        groups = [mean_of_rows(rows["followed"], [run for run in runs if run.group == group]) for group in GROUPS]
        worst = max(statistics.mean(group.values()) for group in groups)
        jump = f"{mean['after']:.2f}" if name == "a jump" else ""
        yield (
            f"| {name} | {mean['default']:.2f} | {mean['fixed']:.2f} | **{mean['followed']:.2f}** | {worst:.2f} |"
            f" {jump} | {mean['inside']:.0f} % | {mean['misfit']:.0f} % | {mean['width']:.0f} |"
        )


def half_lives(parts: list[list[Deployed]]) -> Iterator[str]:
    """What following loses against knowing the share, for several half-lives, on every sixth run."""
    names = list(streams())[:3]
    yield "| half-life | " + " | ".join(names) + " | 200 samples after a jump |"
    yield "| :-- |" + " --: |" * (len(names) + 1)
    ends, some = np.arange(EVERY, LENGTH + 1, EVERY), [each[0] for each in parts[::6]]
    for half_life in (25, 50, 100, 200, 400):
        cells, after = [], []
        for name in names:
            shares = streams()[name]
            ahead, means = shares[np.minimum(ends, LENGTH - 1)], []
            for part in some:
                found = followed(part, name, shares, half_life)
                lost = [
                    part.run.accuracy(part.gamma(share), share) - part.run.accuracy(part.gamma(each.share), share)
                    for each, share in zip(found, ahead, strict=True)
                ]
                means.append(statistics.mean(lost))
                after += [lost[(jump + 200) // EVERY] for jump in (800, 1600) if name == "a jump"]
            cells.append(f"{statistics.mean(means):.2f}")
        yield f"| {half_life} | {' | '.join(cells)} | {statistics.mean(after):.2f} |"


def draw(part: Deployed, path: Path) -> None:
    """Draw the streams as the metric sees them in one run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 5.5), sharex=True, sharey=True, layout="constrained")
    ends = np.arange(EVERY, LENGTH + 1, EVERY)
    for axis, (name, shares) in zip(axes.flat, streams().items(), strict=True):
        found = followed(part, name, shares)
        low, high = [each.low for each in found], [each.high for each in found]
        axis.fill_between(ends, low, high, color=COLORS["absent"], alpha=0.2, linewidth=0, label="90 % interval")
        axis.plot(ends, [each.share for each in found], color=COLORS["absent"], label="estimated share")
        axis.plot(np.arange(LENGTH), shares, color=CURVE_COLORS[0], linestyle="--", linewidth=1, label="true share")
        warned = [end for end, each in zip(ends, found, strict=True) if each.misfit > 3]
        axis.plot(warned, [1.02] * len(warned), "|", color=COLORS["all"], label="misfit above 3")
        axis.set_title(name)
        axis.set_ylim(0, 1.05)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1]:
        axis.set_xlabel("unlabeled samples")
    figure.supylabel("share of samples of absent classes")
    handles, labels = axes[1, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def read_runs_of_both(folder: Path = BOTH) -> list[Run]:
    """Runs whose test samples went through the model before as well: its margins are their second sign."""
    runs = []
    for file in sorted(folder.glob("*.npz")):
        with np.load(file) as stored:
            arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
        arrays = {name: value.double() if value.is_floating_point() else value for name, value in arrays.items()}
        arrays["heldout_target"] = arrays["heldout_target"].long()
        split = ClassSplit(arrays["heldout_logits"].shape[1], arrays["seen_classes"])
        data, _, percent, _ = file.stem.split("_")
        natural = len(split.absent_classes) / split.num_classes
        scored = arrays["margin"], arrays["right"], arrays["is_seen"]
        runs.append(Run(file.stem, data, f"{data}, {percent} %", arrays, split, natural, *scored, "heldout"))
    for run in read_picture_runs(RUNS / "drawings"):
        mode, part = run.name.split(", ")[1:]
        second = run.arrays[f"{part}_{mode}_pretrained_margin"]
        runs.append(replace(run, arrays={**run.arrays, "second": second}, part="heldout"))
    return runs


@dataclass(frozen=True)
class Both:
    """The estimate from the margins of both models, with one thing or another changed."""

    now: Mixture = Mixture(most=35.0)
    before: Mixture = Mixture(exponents=(1.0,), most=35.0, before=True)

    def __call__(self, part: Deployed, margins: Tensor) -> float:
        """The share of absent samples."""
        now, share = self.now.log_likelihood(part, margins[:, 0])
        before, _ = self.before.log_likelihood(part, margins[:, 1])
        return _mean(np.logaddexp.reduce(now, (1, 2)) + np.logaddexp.reduce(before, (1, 2)), share)


def _mean(log: np.ndarray, share: np.ndarray) -> float:
    weight = np.exp(log - log.max()) * (share * (1 - share)) ** 0.5
    return float(weight @ share / weight.sum())


def _known(part: Deployed, margins: Tensor) -> float:
    return own_margins(replace(part, seen=part.seen[:, 0], absent=part.absent[:, 0]), margins[:, 0])


BOTH_IDEAS: dict[str, Way] = {
    "both, each worth 70 samples": Both(Mixture(), Mixture(exponents=(1.0,), before=True)),
    "both, seen samples can be less sure before as well": Both(before=Mixture(most=35.0, before=True)),
    "both, absent samples can be more like seen ones": Both(Mixture(absent_exponents=(1.0, 2.0), most=35.0)),
    "the model before alone": lambda part, margins: Mixture(exponents=(1.0,), before=True)(part, margins[:, 1]),
    "the margins of both groups were known": _known,
}


def both_models(parts: list[list[Deployed]]) -> Iterator[str]:
    """One line a way to find the share: what is lost if the model before is asked as well, or alone."""
    runs, found = [each[0].run for each in parts], {}
    for share in MANY_SHARES:
        ways: dict[str, tuple[int, Callable[[Deployed, Tensor], Estimate]]] = {
            "the default (50 %)": (1, _as_estimate(lambda part, margins: 0.5)),
            "a told share": (1, _as_estimate(lambda part, margins, share=share: share)),  # type: ignore[misc]
        }
        for size in SIZES[:-1]:
            ways[f"the fine-tuned model, {size} samples"] = size, lambda part, margins: estimated(part, margins[:, 0])
            ways[f"both models, {size} samples"] = size, estimated_by_both
        ways |= {name: (IDEA_SIZE, _as_estimate(way)) for name, way in BOTH_IDEAS.items()}
        for name, (size, way) in ways.items():
            column = {each[0].run.name: tried(each, share, size, way=way) for each in parts}
            found.setdefault(name, []).append(column)
    yield (
        "| share from | " + " | ".join(GROUPS) + " | mean of three kinds | worst share | against the default at 50 % |"
    )
    yield "| :-- |" + " --: |" * (len(GROUPS) + 3)
    lost = {name: [{run: each.loss for run, each in column.items()} for column in of] for name, of in found.items()}
    at_half = MANY_SHARES.index(0.5)
    default = _of_kinds(lost["the default (50 %)"][at_half], runs)
    for name, columns in lost.items():
        values = {run.name: statistics.mean(column[run.name] for column in columns) for run in runs}
        cells = [cell(values, [run for run in runs if run.group == group]) for group in GROUPS]
        means = [_of_kinds(column, runs) for column in columns]
        cells += [f"**{statistics.mean(means):.2f}**", f"{max(means):.2f}", f"{means[at_half] - default:+.2f}"]
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    yield "| share from | interval holds | its width |"
    yield "| :-- |" + " --: |" * 2
    for name in (name for name in found if name.endswith("samples") and "70" not in name):
        tries = [each for column in found[name] for each in column.values()]
        held, width = (100 * statistics.mean(getattr(each, key) for each in tries) for key in ("held", "width"))
        yield f"| {name} | {held:.0f} % | {width:.0f} |"


def _as_estimate(way: Way) -> Callable[[Deployed, Tensor], Estimate]:
    return lambda part, margins: Estimate(way(part, margins), 0.0, 1.0, 0.0)


def signs(run: Run) -> dict[str, tuple[Tensor, ...]]:
    """Signs besides the margin: of test samples, of held-out ones, and of the pseudo-absent copies of these."""
    top = run.logits[:, run.absent].amax(1)
    copy = run.leads[0][:, 2:] + top.unsqueeze(1)  # its class is one of the absent ones
    test = run.arrays["test_logits"]
    groups = (
        (test[:, run.seen], test[:, run.absent]),
        (run.logits[:, run.seen], run.logits[:, run.absent]),
        (run.others, torch.cat([run.logits[:, run.absent], copy], 1)),
    )
    return {
        "largest absent logit over the second": tuple(_lead(absent) for _, absent in groups),
        "largest absent logit over their mean": tuple(absent.amax(1) - absent.mean(1) for _, absent in groups),
        "largest seen logit over the second": tuple(_lead(seen) for seen, _ in groups),
    }


def _lead(logits: Tensor) -> Tensor:
    first, second = logits.topk(2).values.unbind(1)
    return first - second


def second_signs(runs: list[Run], bins: int = 5) -> Iterator[str]:
    """One line a sign that is counted besides the margins, on runs with logits of all test samples."""
    found: dict[str, list[dict[str, float]]] = {}
    for sign in signs(runs[0]):
        for run in runs:
            test, *of_groups = signs(run)[sign]
            (parts,) = deployed([replace(run, arrays={**run.arrays, "second": test})])
            edges = torch.cat(of_groups).quantile(torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1])
            seen, absent = (
                0.97 * torch.bincount(torch.bucketize(each, edges, right=True), minlength=bins) / len(each)
                + 0.03 / bins
                for each in of_groups
            )

            def with_sign(
                part: Deployed, margins: Tensor, edges: Tensor = edges, groups: tuple[Tensor, Tensor] = (seen, absent)
            ) -> float:
                now, share = Mixture(most=35.0).log_likelihood(part, margins[:, 0])
                count = torch.bincount(torch.bucketize(margins[:, 1], edges, right=True), minlength=bins)
                mixed = share[:, None] * groups[1].numpy() + (1 - share)[:, None] * groups[0].numpy()
                of_sign = np.log(mixed) @ (count.numpy() / (1 + len(margins) / 35))
                return _mean(np.logaddexp.reduce(now, (1, 2)) + of_sign, share)

            ways: dict[str, Way] = {
                "`AbsentShare`": lambda part, margins: Mixture()(part, margins[:, 0]),
                f"and the {sign}": with_sign,
            }
            for name, columns in loss_of_ideas([parts], ways).items():
                found.setdefault(name, [{} for _ in columns])
                for column, of_run in zip(found[name], columns, strict=True):
                    column.update(of_run)
    groups = list(dict.fromkeys(run.group for run in runs))
    yield f"| margins | {' | '.join(groups)} | worst share |"
    yield "| :-- |" + " --: |" * (len(groups) + 1)
    for name, columns in found.items():
        values = {run.name: statistics.mean(column[run.name] for column in columns) for run in runs}
        cells = [cell(values, [run for run in runs if run.group == group]) for group in groups]
        worst = max(statistics.mean(mean_of_rows(column, runs).values()) for column in columns)
        yield f"| {name} | {' | '.join(cells)} | {worst:.2f} |"


def record(settings: Iterable[tuple[str, Setting]], folder: Path = BOTH) -> None:
    """Fine-tune small networks, and keep what both models make of their samples."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the data of the demo are
    from digits_data import keep_classes
    from methods import fine_tuned
    from pictures import write
    from torch.utils.data import TensorDataset

    folder.mkdir(exist_ok=True)
    for name, setting in settings:
        before, after = setting.pretrained(), fine_tuned(setting)
        images, target = (
            torch.cat(both)
            for both in zip(setting.data.held_out.tensors, setting.data.target_test.tensors, strict=True)
        )
        of_test = torch.arange(len(target)) >= len(setting.data.held_out)
        order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
        test = order[of_test[order]]
        held_out = torch.cat([order[~of_test[order]], test[: len(test) // 3]])
        held = keep_classes(TensorDataset(images[held_out], target[held_out]), setting.seen).tensors
        test = test[len(test) // 3 :][:1000]
        with torch.no_grad():
            of_held, of_test = (
                [
                    torch.cat([module.head(module.backbone(part)) for part in some.split(256)])
                    for module in (after, before)
                ]
                for some in (held[0], images[test])
            )
        seen = torch.tensor(setting.seen)
        absent = torch.tensor(ClassSplit(setting.num_classes, seen).absent_classes)
        margin, right, is_seen = score_margins(of_test[0], target[test], seen, absent)
        second, *_ = score_margins(of_test[1], target[test], seen, absent)
        arrays = {"seen_classes": seen, "margin": margin, "right": right, "is_seen": is_seen, "second": second}
        arrays |= {"heldout_target": held[1], "heldout_logits": of_held[0], "pretrained_heldout_logits": of_held[1]}
        write(folder / f"{name}.npz", arrays)
        print(name, file=sys.stderr)


def settings_of(data: str) -> Iterator[tuple[str, Setting]]:
    """The fine-tunings of digits or glyphs, by name."""
    if data == "digits":
        from digits import FINE_TUNING, DigitSetting

        for seed, share, (short, how) in product(range(3), (30, 50, 70), FINE_TUNING.items()):
            yield f"digits_{short}_{share}_{seed}", DigitSetting(seed, share, *how, epochs=20)
    else:
        import glyphs

        args = glyphs.parse_arguments(["--networks", "resnet", "--seeds", "1", "--epochs", "8"])
        for settings in glyphs.settings_of(args).values():
            for each, share in product(settings, (20, 50)):
                if each.share == 50:
                    yield f"glyphs_{each.optimizer.lower()}_{share}_{each.seed}", replace(each, share=share)


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    **{
        lines.__name__: partial(lambda lines: lines(recorded_parts()), lines)
        for lines in (by_share, ideas, leave_one_row_out, stream_losses, half_lives)
    },
    "both_models": lambda: both_models(deployed(read_runs_of_both())),
    "second_signs": lambda: second_signs([run.on("heldout") for run in read_small_runs()]),
}


@cache
def recorded_parts() -> list[list[Deployed]]:
    """The runs that all choices were made on."""
    return deployed([run.on("heldout") for run in read_small_runs() + read_picture_runs()])


def main(arguments: Sequence[str] | None = None) -> None:
    import warnings

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(TABLES), help="one table")
    parser.add_argument("--record", choices=("digits", "glyphs"), help="train the runs in `runs/both` again")
    args = parser.parse_args(arguments)
    if args.record:
        record(settings_of(args.record))
        return
    warnings.simplefilter("ignore")  # of traffic that fits neither group
    for name in [args.only] if args.only else TABLES:
        print("\n".join(TABLES[name]()), end="\n\n", flush=True)
    if not args.only:
        draw(next(each[0] for each in recorded_parts() if each[0].run.name.endswith("full_0, A, near")), PICTURE)


if __name__ == "__main__":
    main()
