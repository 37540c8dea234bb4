"""Estimate the share of absent samples from unlabeled ones, on recorded runs, and print the tables of ``traffic.md``.

    python examples/benchmarks/traffic.py

Half of the test samples of a run are the traffic: unlabeled, drawn with replacement, so many of them of absent classes
as the share says. On the other half, gamma is scored: the best accuracy of any gamma at this share, less that of this
one, in points. The table of gammas comes from held-out samples of the seen classes.
"""

from __future__ import annotations

import math
import statistics
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from estimators import KINDS, MANY_SHARES, cell, mean_of_rows
from ideas import alg, pseudo_absent_samples
from recorded import GROUPS, Run, read_picture_runs, read_small_runs
from torch import Tensor

from lightning_calibft.functional.pseudo_absent_gamma import pseudo_absent_table
from lightning_calibft.metrics import AbsentShare
from lightning_calibft.plotting import COLORS, CURVE_COLORS

SIZES, SPLITS, DRAWS = (50, 200, 500, 2000), 2, 4
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
    seen: Tensor  # margins of the traffic
    absent: Tensor

    @cached_property
    def table(self):  # type: ignore[no-untyped-def]
        """Gamma, and what is expected, for each share."""
        return pseudo_absent_table(pseudo_absent_samples(self.run))

    def gamma(self, share: float) -> float:
        """Gamma for a share."""
        return self.table.at(min(max(share, 0.001), 0.999))["gamma"]

    def metric(self, half_life: float | None) -> AbsentShare:
        """The metric, for two classes: a seen one, whose logit is the margin, and an absent one."""
        return AbsentShare(2, [0], [1], share_table=self.table, half_life=half_life, validate_args=False)

    def traffic(self, shares: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Margins of samples of which each is of an absent class with its own probability."""
        absent = torch.from_numpy(rng.random(len(shares)) < shares)
        drawn = [pool[torch.from_numpy(rng.integers(len(pool), size=len(shares)))] for pool in (self.seen, self.absent)]
        return torch.where(absent, drawn[1], drawn[0])


def deployed(runs: list[Run], splits: int = SPLITS) -> list[list[Deployed]]:
    """Split the test samples of each run several times."""
    found = []
    for run in runs:
        rng, parts = np.random.default_rng(zlib.crc32(run.name.encode())), []
        for _ in range(splits):
            halves = [np.array_split(rng.permutation(side.nonzero().flatten().numpy()), 2) for side in _sides(run)]
            kept = torch.from_numpy(np.concatenate([half[1] for half in halves]))
            scored = replace(run, margin=run.margin[kept], right=run.right[kept], is_seen=run.is_seen[kept])
            parts.append(Deployed(scored, *(run.margin[torch.from_numpy(half[0])] for half in halves)))
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


class Tried(NamedTuple):
    """What became of the estimates at a share: mean loss and, of the intervals, how often they hold it and widths."""

    loss: float
    held: float
    width: float


def tried(parts: list[Deployed], share: float, size: int, draws: int = DRAWS) -> Tried:
    """Estimate a share from so many samples, several times."""
    results = []
    for number, part in enumerate(parts):
        rng = np.random.default_rng([zlib.crc32(part.run.name.encode()), number, size, int(1000 * share)])
        for _ in range(draws):
            found = estimated(part, part.traffic(np.full(size, share), rng))
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

    def __call__(self, part: Deployed, margin: Tensor) -> float:
        """The share of absent samples."""
        table, samples = part.table, pseudo_absent_samples(part.run)
        edges = np.array(table.gamma[:: self.step])
        below = [np.array(column[:: self.step]) for column in (table.seen_below, table.absent_below)]
        if self.hard:
            pools = (samples.margin.numpy(), samples.copy_margin.numpy())
            below = [(pool[:, None] < edges).mean(0) for pool in pools]
        seen = np.stack([self._fractions(1 - (1 - below[0]) ** number) for number in self.exponents])
        absent = np.stack([self._fractions(below[1] ** number) for number in self.absent_exponents])
        share = np.array(table.absent_share)
        mixed = share[:, None, None, None] * absent[:, None] + (1 - share)[:, None, None, None] * seen
        count = np.bincount(np.searchsorted(edges, margin.numpy(), side="right"), minlength=len(edges) + 1)
        told = count / (1 + count.sum() / self.most)
        log = np.log(mixed) @ told
        weight = np.exp(log - log.max()).sum((1, 2)) * (share * (1 - share)) ** self.prior
        return float(weight @ share / weight.sum())

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
    "a prior for extreme shares": Mixture(prior=0.1),
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
    yield f"| {IDEA_SIZE} samples | " + " | ".join(GROUPS) + " | mean of three kinds | worst share |"
    yield "| :-- |" + " --: |" * (len(GROUPS) + 2)
    for name, columns in loss_of_ideas(parts, {**IDEAS, **GAMMA_IDEAS}).items():
        values = {run.name: statistics.mean(column[run.name] for column in columns) for run in runs}
        cells = [cell(values, [run for run in runs if run.group == group]) for group in GROUPS]
        means = [_of_kinds(column, runs) for column in columns]
        yield f"| {name} | {' | '.join(cells)} | **{statistics.mean(means):.2f}** | {max(means):.2f} |"


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


def main() -> None:
    import warnings

    warnings.simplefilter("ignore")  # of traffic that fits neither group
    parts = deployed([run.on("heldout") for run in read_small_runs() + read_picture_runs()])
    for lines in (by_share, ideas, leave_one_row_out, stream_losses, half_lives):
        print("\n".join(lines(parts)), end="\n\n", flush=True)
    draw(next(each[0] for each in parts if each[0].run.name.endswith("full_0, A, near")), PICTURE)


if __name__ == "__main__":
    main()
