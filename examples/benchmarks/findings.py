"""Tell which findings of the paper hold on a benchmark, with the figures, and show a set-up that gamma cannot repair.

    python examples/benchmarks/findings.py
    python examples/benchmarks/findings.py --benchmark glyphs

A finding holds (yes) if its figure went the way that the paper says, by more than two standard errors of the mean
difference over the seeds; if it went the other way by as much, it does not (no); anything else is open. Half of the
classes are seen. Scores are those of ``digits.py`` and ``glyphs.py``: what these have computed is read from their
folder.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import digits
import glyphs
from compare import before, gamma_rows, kept, method_rows, prepare
from digits import FINE_TUNING, DigitSetting
from methods import Setting
from table import Rows, markdown, oracle, run, score
from watched import watch

from lightning_calibft.analysis import verdict
from lightning_calibft.analysis.history import Snapshot
from lightning_calibft.analysis.logit_levels import GroupLevels

DEGRADED = (20, "AdamW", 3e-3)
"""Two classes, and six times the learning rate of the benchmark."""


@dataclass(frozen=True)
class Run:
    """One seed: the scores of all methods, and the fine-tuned model before and after."""

    rows: Rows
    first: Snapshot
    last: Snapshot

    def score(self, row: str, column: str = "Acc_Y/Y") -> float:
        """Return one score in %."""
        return self.rows[row][column]

    def won(self) -> float:
        """Return how much of what the best gamma wins ALG wins, in %."""
        tuned, best = self.score("fine-tuned"), self.score("fine-tuned + oracle gamma")
        return 100 * (self.score("fine-tuned + ALG") - tuned) / (best - tuned)

    def absent(self) -> tuple[GroupLevels, GroupLevels]:
        """Return the mean logits of absent samples, before and after."""
        assert self.first.levels is not None
        assert self.last.levels is not None
        return self.first.levels.absent, self.last.levels.absent

    def cosines(self) -> tuple[float, float]:
        """Return the mean cosines between updates of rows: of two seen classes, and of two absent ones."""
        assert self.last.updates is not None
        return self.last.updates.within_seen, self.last.updates.within_absent


@dataclass(frozen=True)
class Finding:
    """What the paper found, as two figures of a run.

    Args:
        text: The finding.
        figures: The two figures.
        rises: Whether the paper finds the second larger.
    """

    text: str
    figures: Callable[[Run], tuple[float, float]]
    rises: bool = True

    def cell(self, runs: Sequence[Run]) -> str:
        """Return the means of both figures, and whether the finding holds."""
        pairs = [self.figures(each) for each in runs]
        first, second = (statistics.mean(column) for column in zip(*pairs, strict=True))
        gains = [b - a if self.rises else a - b for a, b in pairs]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        mean = statistics.mean(gains)
        holds = "yes" if mean > 2 * error else "no" if mean < -2 * error else "open"
        digits = 2 if max(abs(first), abs(second)) < 10 else 1
        return f"{first:.{digits}f} → {second:.{digits}f}, {holds}"


def moved(column: str, after: str = "fine-tuned", start: str = "pre-trained") -> Callable[[Run], tuple[float, float]]:
    """Return the same score of two rows."""
    return lambda each: (each.score(start, column), each.score(after, column))


FINDINGS = [
    Finding("Fine-tuning loses the absent classes: Acc_U/Y falls", moved("Acc_U/Y"), rises=False),
    Finding("... and does so with a frozen classifier as well", moved("Acc_U/Y", "frozen classifier"), rises=False),
    Finding("Yet absent classes are told apart better: Acc_U/U rises", moved("Acc_U/U")),
    Finding("The features of absent classes get better: NCM_U/Y rises", moved("NCM_U/Y")),
    Finding("The features of seen classes get better: NCM_S/Y rises", moved("NCM_S/Y")),
    Finding("AUSUC rises", moved("AUSUC")),
    Finding(
        "On absent samples the true logit falls below the largest seen one: their difference falls",
        lambda each: tuple(of.true - of.other_seen for of in each.absent()),
        rises=False,
    ),
    Finding(
        "... but its lead over the largest other absent one grows",
        lambda each: tuple(of.true - of.other_absent for of in each.absent()),
    ),
    Finding(
        "Rows of absent classes are pushed the same way: mean cosine of updates, between seen → between absent classes",
        lambda each: each.cosines(),
    ),
    Finding(
        "The bias is not one of norms: Acc_Y/Y, fine-tuned with aligned norms → with ALG",
        moved("Acc_Y/Y", "fine-tuned + ALG", "fine-tuned, weight aligning"),
    ),
    Finding("ALG brings them back: Acc_Y/Y, fine-tuned → + ALG", moved("Acc_Y/Y", "fine-tuned + ALG", "fine-tuned")),
    Finding("... above the pre-trained model: Acc_Y/Y, pre-trained → + ALG", moved("Acc_Y/Y", "fine-tuned + ALG")),
    Finding("... near the best gamma: share of its gain, more than 80 %", lambda each: (80.0, each.won())),
    Finding("So does PCV: Acc_Y/Y, fine-tuned → + PCV", moved("Acc_Y/Y", "fine-tuned + PCV over S", "fine-tuned")),
    Finding(
        "Calibrated fine-tuning beats calibrated linear probing: Acc_Y/Y",
        moved("Acc_Y/Y", "fine-tuned + ALG", "linear probing + ALG"),
    ),
]


def settings_of(args: argparse.Namespace) -> dict[str, list[Setting]]:
    """Return the settings of each column, one for each seed."""
    if args.benchmark == "digits":
        return {
            f"digits, {name}": [DigitSetting(seed, 50, name, rate, args.epochs) for seed in range(args.seeds)]
            for name, rate in FINE_TUNING.values()
        }
    options = ["--shares", "50", "--seeds", str(args.seeds), "--epochs", str(args.epochs), "--output", str(args.output)]
    return {title: [*settings] for title, settings in glyphs.settings_of(glyphs.parse_arguments(options)).items()}


def observe(setting: Setting, args: argparse.Namespace) -> Run:
    """Read or compute the scores, and fine-tune once more under the callback."""
    name = setting.network if isinstance(setting, glyphs.GlyphSetting) else "methods"
    rows = kept(args.output, name, setting, method_rows)
    report = args.output / f"report_{name}_{setting.optimizer}_{setting.seed}.html"
    snapshots = watch(setting, report).diagnostics.snapshots
    return Run(rows, snapshots[0], snapshots[-1])


def lines(args: argparse.Namespace) -> Iterator[str]:
    """Print the findings, and on digits the set-up that gamma cannot repair."""
    if args.only != "degraded":
        yield from findings(args)
    if args.benchmark == "digits" and args.only != "findings":
        yield ""
        yield from degraded(args)


def findings(args: argparse.Namespace) -> Iterator[str]:
    """Print the figures of each finding, and whether it holds."""
    columns = {title: [observe(each, args) for each in settings] for title, settings in settings_of(args).items()}
    yield "| the paper's finding | " + " | ".join(columns) + " |"
    yield "| :-- |" + " --: |" * len(columns)
    for finding in FINDINGS:
        yield f"| {finding.text} | " + " | ".join(finding.cell(runs) for runs in columns.values()) + " |"


def degraded(args: argparse.Namespace) -> Iterator[str]:
    """Fine-tune so hard that the features of absent classes suffer, and print what the diagnostics say."""
    share, optimizer, rate = DEGRADED
    settings = [DigitSetting(seed, share, optimizer, rate, args.epochs) for seed in range(args.seeds)]
    runs, words = [], []
    for setting in settings:
        watched = watch(setting, args.output / f"report_degraded_{setting.seed}.html")
        outputs = run(watched.module, setting)
        rows = {"pre-trained": score(before(setting), setting, cost=0.0), **gamma_rows("fine-tuned", outputs, setting)}
        runs.append({**rows, "fine-tuned + oracle gamma": score(outputs, setting, oracle(outputs, setting))})
        words.append(verdict(watched.diagnostics.snapshots)[0])
    yield from markdown(f"{share} % seen, {optimizer}, learning rate {rate:g}", runs)
    yield ""
    warned = sum("CALIBRATION CANNOT HELP" in text for text in words)
    yield f"The reports of {warned} of {len(words)} seeds warn. Seed 0:"
    yield ""
    yield f"> {words[0]}"


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    prepare()
    for line in lines(args):
        print(line, flush=True)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", choices=("digits", "glyphs"), default="digits")
    parser.add_argument("--only", choices=("findings", "degraded"), help="some of it")
    parser.add_argument("--seeds", type=int, help="number of runs (default: that of the benchmark)")
    parser.add_argument("--epochs", type=int, help="epochs of each training (default: those of the benchmark)")
    parser.add_argument("--output", type=Path, help="where scores and reports are kept (default: as the benchmark)")
    args = parser.parse_args(arguments)
    defaults = {"digits": digits, "glyphs": glyphs}[args.benchmark].parse_arguments([])
    for name in ("seeds", "epochs", "output"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(defaults, name))
    return args


if __name__ == "__main__":
    main()
