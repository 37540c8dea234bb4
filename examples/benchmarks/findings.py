"""Tell which findings of the paper hold on a benchmark, with the figures, and show a set-up that gamma cannot repair.

    python examples/benchmarks/findings.py
    python examples/benchmarks/findings.py --benchmark glyphs
    python examples/benchmarks/findings.py --benchmark pictures

A finding holds (yes) if its figure went the way that the paper says, by more than two standard errors of the mean
difference over the seeds; if it went the other way by as much, it does not (no); anything else is open. Half of the
classes are seen. Scores are those of ``digits.py`` and ``glyphs.py``: what these have computed is read from their
folder. Of pictures there are only recorded runs (``recorded.py``), and from them some of the findings.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

sys.path.append(str(Path(__file__).resolve().parents[1]))

import digits
import glyphs
import recorded
import torch
import torch.nn.functional as F
from compare import before, gamma_rows, kept, method_rows, prepare
from digits import FINE_TUNING, DigitSetting
from digits_data import IMAGE_SIZE, DigitData, add_noise, make_data, move
from ideas import alg
from methods import Setting
from table import Rows, markdown, oracle, run, score
from torch import Generator, Tensor
from torch.utils.data import TensorDataset
from watched import watch

from lightning_calibft.analysis import verdict
from lightning_calibft.analysis.history import Snapshot
from lightning_calibft.analysis.logit_levels import GroupLevels
from lightning_calibft.analysis.verdict import degraded as falls
from lightning_calibft.functional import average_logit_gap, split_accuracy

DEGRADED = (20, "AdamW", 3e-3)
"""Two classes, and six times the learning rate of the benchmark."""
CAMERA = (50, "AdamW", 4e-3)
LONGEST, REPEATED = 32, 3
"""Of the camera: how many images the most frequent class has, and how often each is in an epoch."""


@dataclass(frozen=True)
class CameraSetting(DigitSetting):
    """Digits as a camera trap sees animals: one background, and few images, most of them of one or two classes.

    The most frequent seen class has ``LONGEST`` images, and each next one half as many. The camera is less far from the
    source domain than the images of the benchmark, so that the model before fine-tuning is good, and each image is
    trained on ``REPEATED`` times as often, as the paper's fixed number of steps does with few images.
    """

    sources: ClassVar[tuple[Path, ...]] = (*DigitSetting.sources, Path(__file__))

    @cached_property
    def data(self) -> DigitData:
        """All images of this seed; those of the absent classes make class means only."""
        generator = torch.Generator().manual_seed(self.seed)
        coarse = torch.rand((1, 1, 6, 6), generator=generator)
        background = F.interpolate(coarse, size=IMAGE_SIZE, mode="bicubic", align_corners=False).clamp(0, 1)

        def see(images: Tensor, generator: Generator) -> Tensor:
            moved = move(images, generator, degrees=10.0, shift=(0.05, -0.03), scale=0.95)
            return add_noise(0.75 * moved + 0.25 * background, generator)

        data = make_data(self.seed, see)
        images, labels = data.target_train.tensors
        kept = [torch.isin(labels, torch.tensor(self.seen)).logical_not().nonzero().flatten()]
        for rank, position in enumerate(torch.randperm(len(self.seen), generator=generator).tolist()):
            of_class = (labels == self.seen[position]).nonzero().flatten()
            kept.append(of_class[: LONGEST >> rank].repeat(REPEATED))
        rows = torch.cat(kept)
        return replace(data, target_train=TensorDataset(images[rows], labels[rows]))


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
    figures: Callable[[Any], tuple[float, float]]
    rises: bool = True

    def cell(self, runs: Sequence[Any]) -> str:
        """Return the means of both figures, and whether the finding holds."""
        pairs = [self.figures(each) for each in runs]
        first, second = (statistics.mean(column) for column in zip(*pairs, strict=True))
        gains = [b - a if self.rises else a - b for a, b in pairs]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else math.inf
        mean = statistics.mean(gains)
        holds = "yes" if mean > 2 * error else "no" if mean < -2 * error else "open"
        digits = 2 if max(abs(first), abs(second)) < 10 else 1
        return f"{first:.{digits}f} → {second:.{digits}f}, {holds}"


def moved(column: str, after: str = "fine-tuned", start: str = "pre-trained") -> Callable[[Run], tuple[float, float]]:
    """Return the same score of two rows."""
    return lambda each: (each.score(start, column), each.score(after, column))


ALG_GAINS = "ALG brings them back: Acc_Y/Y, fine-tuned → + ALG"
NEAR_THE_BEST = "... near the best gamma: share of its gain, more than 80 %"
PROBING = "Calibrated fine-tuning beats calibrated linear probing: Acc_Y/Y"
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
    Finding(ALG_GAINS, moved("Acc_Y/Y", "fine-tuned + ALG", "fine-tuned")),
    Finding("... above the pre-trained model: Acc_Y/Y, pre-trained → + ALG", moved("Acc_Y/Y", "fine-tuned + ALG")),
    Finding(NEAR_THE_BEST, lambda each: (80.0, each.won())),
    Finding("So does PCV: Acc_Y/Y, fine-tuned → + PCV", moved("Acc_Y/Y", "fine-tuned + PCV over S", "fine-tuned")),
    Finding(
        PROBING,
        moved("Acc_Y/Y", "fine-tuned + ALG", "linear probing + ALG"),
    ),
]


def logit_gaps(of: recorded.Run) -> tuple[float, float]:
    """Mean gap between other seen and absent logits of held-out samples of seen classes, before and after."""
    groups = of.target, of.seen, of.absent
    logits = of.pretrained_logits, of.logits
    return tuple(average_logit_gap(each, *groups).gamma.item() for each in logits)


def among_seen(of: recorded.Run) -> tuple[float, float]:
    """Accuracy of held-out samples of seen classes among these, before and after."""
    logits = of.pretrained_logits, of.logits
    options = {"seen_classes": of.seen, "samples": "seen", "candidates": "seen"}
    return tuple(100 * split_accuracy(each, of.target, **options).item() for each in logits)


def alg_gain(of: recorded.Run) -> tuple[float, float]:
    """Overall accuracy without gamma and with that of ALG from training samples."""
    return tuple(of.accuracy(gamma, of.natural) for gamma in (0.0, alg(of.on("train"))))


def alg_won(of: recorded.Run) -> tuple[float, float]:
    """How much of what the best gamma wins ALG wins, in %."""
    without, with_alg = alg_gain(of)
    return 80.0, 100 * (with_alg - without) / (of.best(of.natural) - without)


OF_PICTURES = [
    Finding("Seen classes are told apart better: Acc_S/S of held-out samples", among_seen),
    Finding("On seen samples, absent logits sink below the other seen ones: the mean gap grows", logit_gaps),
    Finding(ALG_GAINS, alg_gain),
    Finding(NEAR_THE_BEST, alg_won),
]


def findings_of_pictures() -> Iterator[str]:
    """Print the findings that the recorded runs of pictures can tell, in styles that training never saw."""
    runs = [run for name in ("pictures", "drawings") for run in recorded.read_picture_runs(recorded.RUNS / name)]
    columns: dict[str, list[recorded.Run]] = {}
    for each in runs:
        if each.group == "pictures A, test":
            how = each.row.removeprefix(f"{each.group}, ").removesuffix("_AdamW")
            columns.setdefault(how, []).append(each.on("heldout"))
    titles = [f"{how}, {len(of)} run{'s'[: len(of) != 1]}" for how, of in columns.items()]
    yield "| the paper's finding | " + " | ".join(titles) + " |"
    yield "| :-- |" + " --: |" * len(columns)
    for finding in OF_PICTURES:
        yield f"| {finding.text} | " + " | ".join(finding.cell(of) for of in columns.values()) + " |"
    probes = {each.name.replace("head50", "full"): alg_gain(each)[1] for each in columns["head50"]}
    pairs = [each for each in columns["full"] if each.name in probes]
    compared = Finding(PROBING, lambda each: (probes[each.name], alg_gain(each)[1]))
    yield f"| {PROBING} | {compared.cell(pairs)} (2 runs)" + " | -" * (len(columns) - 1) + " |"
    yield ""
    known = {PROBING, *(finding.text for finding in OF_PICTURES)}
    yield "The runs have no features, no weights, and no test logits from before fine-tuning, so they cannot tell:"
    yield ""
    yield from (f"- {finding.text}" for finding in FINDINGS if finding.text not in known)


def settings_of(args: argparse.Namespace, shares: Sequence[int] = (50,)) -> dict[str, list[Setting]]:
    """Return the settings of each column, one for each seed."""
    if args.benchmark == "digits":
        return {
            f"{share} % seen, {name}": [
                DigitSetting(seed, share, name, rate, args.epochs) for seed in range(args.seeds)
            ]
            for share in shares
            for name, rate in FINE_TUNING.values()
        }
    options = ["--shares", *map(str, shares), "--seeds", str(args.seeds), "--epochs", str(args.epochs)]
    found = glyphs.settings_of(glyphs.parse_arguments([*options, "--output", str(args.output)]))
    return {title: [*settings] for title, settings in found.items()}


def observe(setting: Setting, args: argparse.Namespace) -> Run:
    """Read or compute the scores, and fine-tune once more under the callback."""
    name = setting.network if isinstance(setting, glyphs.GlyphSetting) else "methods"
    rows = kept(args.output, name, setting, method_rows)
    snapshots = watch(setting, report_of(setting, args)).diagnostics.snapshots
    return Run(rows, snapshots[0], snapshots[-1])


def lines(args: argparse.Namespace) -> Iterator[str]:
    """Print the findings, and on digits the set-ups that gamma cannot repair."""
    if args.benchmark == "pictures":
        yield from findings_of_pictures()
        return
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
    """Fine-tune so that the features of absent classes suffer, and print what the diagnostics say, of all fits."""
    set_ups: dict[str, list[Setting]] = {
        f"{DEGRADED[0]} % seen, {DEGRADED[1]}, learning rate {DEGRADED[2]:g}": [
            DigitSetting(seed, *DEGRADED, args.epochs) for seed in range(args.seeds)
        ],
        f"one camera, long tail, {CAMERA[0]} % seen, {CAMERA[1]}": [
            CameraSetting(seed, *CAMERA, args.epochs) for seed in range(args.seeds)
        ],
    }
    words = {}
    for title, settings in set_ups.items():
        runs, words[title] = [], [watch(each, report_of(each, args)) for each in settings]
        for setting, watched in zip(settings, words[title], strict=True):
            outputs = run(watched.module, setting)
            rows = {
                "pre-trained": score(before(setting), setting, cost=0.0),
                **gamma_rows("fine-tuned", outputs, setting),
            }
            runs.append({**rows, "fine-tuned + oracle gamma": score(outputs, setting, oracle(outputs, setting))})
        yield from markdown(title, runs)
        yield ""
    ordinary = {title: [watch(each, report_of(each, args)) for each in of] for title, of in settings_of(args).items()}
    yield f"| reports of {args.seeds} seeds | warn | AUSUC fell | Acc_U/U fell |"
    yield "| :-- | --: | --: | --: |"
    for title, reports in {**ordinary, **words}.items():
        snapshots = [each.diagnostics.snapshots for each in reports]
        warned = sum("CALIBRATION CANNOT HELP" in verdict(each)[0] for each in snapshots)
        fallen = [falls(each[0], each[-1]) for each in snapshots]
        cells = [warned, *(sum(name in each for each in fallen) for name in ("AUSUC", "Acc_U/U"))]
        yield f"| {title} | {' | '.join(map(str, cells))} |"
    for title, reports in words.items():
        yield ""
        yield f"The report of seed 0, {title}:"
        yield ""
        yield f"> {verdict(reports[0].diagnostics.snapshots)[0]}"


def report_of(setting: Setting, args: argparse.Namespace) -> Path:
    kind = getattr(setting, "network", type(setting).__name__.removesuffix("Setting").lower())
    return args.output / f"report_{kind}_{setting.share}_{setting.optimizer}_{setting.seed}.html"


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    prepare()
    for line in lines(args):
        print(line, flush=True)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("findings", "degraded"), help="some of it")
    return parse_benchmark(parser, arguments, "pictures")


def parse_benchmark(parser: argparse.ArgumentParser, arguments: Sequence[str] | None, *more: str) -> argparse.Namespace:
    """Add the options of a script that works on either benchmark, with the defaults of each, and parse."""
    parser.add_argument("--benchmark", choices=("digits", "glyphs", *more), default="digits")
    parser.add_argument("--seeds", type=int, help="number of runs (default: that of the benchmark)")
    parser.add_argument("--epochs", type=int, help="epochs of each training (default: those of the benchmark)")
    parser.add_argument("--output", type=Path, help="where scores and reports are kept (default: as the benchmark)")
    args = parser.parse_args(arguments)
    defaults = (glyphs if args.benchmark == "glyphs" else digits).parse_arguments([])
    for name in ("seeds", "epochs", "output"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(defaults, name))
    return args


if __name__ == "__main__":
    main()
