"""Recorded fine-tuning runs, and what a gamma loses on them.

``runs`` holds the logits of 32 fine-tuned classifiers of digits and glyphs, each ``{data}_{network}_{optimizer}_{% of
classes seen}_{seed}.npz``: of their fine-tuning samples (``train``) and of held-out samples of the same classes
(``heldout``), before and after fine-tuning, and of test samples of all classes. ``runs/training`` holds the logits that
the steps of the last epoch saw, the head's bias and the norms of its rows, and three models fine-tuned on half of the
seen classes each: their logits of the seen classes and, as a last column, the largest of the absent ones.

``runs/pictures`` holds seven runs of EfficientNet-Lite0 with its ImageNet weights, fine-tuned on drawings of some of
252 ImageNet classes, ``{how}_{seed}.npz``: fully, lightly, or the head alone with 20, 50 or 80 % of the classes seen.
Logits are rounded to quarters. Of the samples that gamma is scored on there are only margins, and whether each is right
within its group: other pictures in the styles of training (``near``), and styles that training never saw (``test``). In
A, the absent classes are the other ones that occur; in B, all other rows of the head. ``runs/drawings`` holds six more
such runs, of other styles, which ``pictures.py`` has made and which played no part in any choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_calibft import ClassSplit
from lightning_calibft.functional import split_accuracy
from lightning_calibft.functional._inputs import Groups
from lightning_calibft.functional.pseudo_absent_gamma import pseudo_absent_update

RUNS = Path(__file__).with_name("runs")
DATA = {"digits": "digits", "glyphs": "157 glyphs"}
NETWORKS = {"gn": "GroupNorm", "bn": "BatchNorm", "resnet": "ResNet"}
GROUPS = ("digits", "glyphs", "pictures A, near", "pictures A, test", "pictures B, near", "pictures B, test")


@dataclass(frozen=True, eq=False)  # hashed by its identity, so that what is found of it can be cached
class Run:
    """A fine-tuned classifier, seen through ``part`` of its data: ``"train"`` or ``"heldout"``.

    Attributes:
        name: Name of the file, and for pictures what it is scored on.
        group: One of ``GROUPS``.
        row: The kind of run: data, network, share of seen classes and the like.
        arrays: Logits and targets by name.
        split: The seen and the absent classes.
        natural: The share of absent samples if all classes that occur are equally frequent.
        margin: Of the samples to score on, ``(N,)``.
        right: Whether each of these is right among the classes of its own group, ``(N,)``.
        is_seen: Whether each of these is of a seen class, ``(N,)``.
        part: The part of the data that gamma is found on.
    """

    name: str
    group: str
    row: str
    arrays: dict[str, Tensor]
    split: ClassSplit
    natural: float
    margin: Tensor
    right: Tensor
    is_seen: Tensor
    part: str = "train"

    def on(self, part: str) -> Run:
        """Return the same run, seen through another part of its data."""
        return replace(self, part=part)

    @property
    def logits(self) -> Tensor:
        """After fine-tuning, ``(N, C)``."""
        return self.arrays[f"{self.part}_logits"]

    @property
    def target(self) -> Tensor:
        """Class ids, ``(N,)``."""
        return self.arrays[f"{self.part}_target"]

    @property
    def pretrained_logits(self) -> Tensor:
        """Before fine-tuning, ``(N, C)``."""
        return self.arrays[f"pretrained_{self.part}_logits"]

    @property
    def seen(self) -> list[int]:
        """Ids of the seen classes."""
        return list(self.split.seen_classes)

    @property
    def absent(self) -> list[int]:
        """Ids of the absent classes."""
        return list(self.split.absent_classes)

    @property
    def leads(self) -> tuple[Tensor, Tensor]:
        """The leads of each sample and the sums of their terms, of ``pseudo_absent_update``."""
        groups = Groups.from_split(self.split, self.logits.device)
        leads, terms = pseudo_absent_update(self.logits, self.target, self.pretrained_logits, groups)
        return leads, terms.sum(0)

    @property
    def others(self) -> Tensor:
        """Logits of the seen classes other than the true one, ``(N, |S| - 1)``."""
        others = torch.tensor(self.seen) != self.target.unsqueeze(1)
        return self.logits[:, self.seen][others].view(len(self.target), -1)

    @property
    def own(self) -> Tensor:
        """Logit of the true class, ``(N,)``."""
        return self.logits.gather(1, self.target.unsqueeze(1)).squeeze(1)

    def accuracies(self, gamma: float | Tensor) -> tuple[Tensor, Tensor]:
        """Accuracy on seen and on absent samples at one gamma or at several, in points."""
        at = torch.as_tensor(gamma, dtype=torch.float64)
        seen, absent = self._sides
        kept = len(seen) - torch.searchsorted(seen, at, right=True)
        found = torch.searchsorted(absent, at)
        return 100 * kept / self.is_seen.sum(), 100 * found / (~self.is_seen).sum()

    @cached_property
    def _sides(self) -> tuple[Tensor, Tensor]:
        return self.margin[self.right & self.is_seen].sort().values, self.margin[
            self.right & ~self.is_seen
        ].sort().values

    @cached_property
    def _of_all_gammas(self) -> tuple[Tensor, Tensor]:
        steps = self.margin.unique()
        return self.accuracies(torch.cat([steps[:1] - 1, (steps[1:] + steps[:-1]) / 2, steps[-1:] + 1]))

    def best(self, share: float) -> float:
        """The best accuracy that any gamma has at a share of absent samples, in points."""
        seen, absent = self._of_all_gammas
        return ((1 - share) * seen + share * absent).max().item()

    def accuracy(self, gamma: float, share: float) -> float:
        """Accuracy at one gamma and a share of absent samples, in points."""
        seen, absent = self.accuracies(gamma)
        return ((1 - share) * seen + share * absent).item()

    def loss(self, gamma: float, share: float | None = None) -> float:
        """Points of accuracy lost against the best gamma, at the natural share if none is given."""
        share = self.natural if share is None else share
        return self.best(share) - self.accuracy(gamma, share)

    def loss_of_logits(self, logits: Tensor) -> float:
        """The same of test logits that were changed by more than one number; can be negative."""
        seen, absent = (
            100 * split_accuracy(logits, self.arrays["test_target"], self.seen, self.absent, samples=samples).item()
            for samples in ("seen", "absent")
        )
        return self.best(self.natural) - ((1 - self.natural) * seen + self.natural * absent)

    def of_some_classes(self, num_seen: int, num_absent: int, seed: int) -> Run:
        """The run as if its head, and its test data, had some of the seen and of the absent classes alone."""
        generator = torch.Generator().manual_seed(seed)
        seen, absent = (
            torch.tensor(classes)[torch.randperm(len(classes), generator=generator)[:number]].sort().values
            for classes, number in ((self.seen, num_seen), (self.absent, num_absent))
        )
        both, arrays = torch.cat([seen, absent]).sort().values, {}
        for part, kept in ((self.part, seen), ("test", both)):
            samples = torch.isin(self.arrays[f"{part}_target"], kept)
            arrays[f"{part}_target"] = torch.searchsorted(both, self.arrays[f"{part}_target"][samples])
            for name in (f"{part}_logits", f"pretrained_{part}_logits"):
                if name in self.arrays:
                    arrays[name] = self.arrays[name][samples][:, both]
        split = ClassSplit(len(both), torch.searchsorted(both, seen), torch.searchsorted(both, absent))
        return _scored_on_test(
            f"{self.name}, {num_seen} : {num_absent}, {seed}", self.group, self.row, arrays, split, self.part
        )


def score_margins(logits: Tensor, target: Tensor, seen: Tensor, absent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The margin of each sample, whether it is right among the classes of its own group, and whether it is seen."""
    is_seen = torch.isin(target, seen)
    winners = [classes[logits[:, classes].argmax(1)] for classes in (seen, absent)]
    margin = logits[:, seen].amax(1) - logits[:, absent].amax(1)
    return margin, torch.where(is_seen, *winners) == target, is_seen


def _scored_on_test(
    name: str, group: str, row: str, arrays: dict[str, Tensor], split: ClassSplit, part: str = "train"
) -> Run:
    seen, absent = (torch.tensor(classes) for classes in (split.seen_classes, split.absent_classes))
    scored = score_margins(arrays["test_logits"], arrays["test_target"], seen, absent)
    return Run(name, group, row, arrays, split, len(absent) / (len(seen) + len(absent)), *scored, part)


def _read(*files: Path) -> dict[str, Tensor]:
    """Read files into one dictionary, real numbers as float64."""
    arrays = {}
    for file in files:
        with np.load(file) as stored:
            arrays.update({key: torch.from_numpy(stored[key]) for key in stored.files})
    return {
        key: value.double() if value.is_floating_point() else value if value.dtype == torch.bool else value.long()
        for key, value in arrays.items()
    }


def read_small_runs() -> list[Run]:
    """Return the runs of digits and glyphs."""
    runs = []
    for file in sorted(RUNS.glob("*.npz")):
        arrays = _read(file, RUNS / "training" / file.name)
        data, network, _, percent, _ = file.stem.split("_")
        split = ClassSplit(arrays["train_logits"].shape[1], arrays["seen_classes"], arrays["absent_classes"])
        row = f"{DATA[data]}, {NETWORKS[network]}, {percent} %"
        runs.append(_scored_on_test(file.stem, data, row, arrays, split))
    return runs


def read_picture_runs(folder: Path = RUNS / "pictures") -> list[Run]:
    """Return the runs of pictures, four for each file: A and B, near and test."""
    return [run for file in sorted(folder.glob("*.npz")) for run in _of_pictures(file)]


def _of_pictures(file: Path) -> Iterable[Run]:
    arrays, how = _read(file), file.stem.rsplit("_", 1)[0]
    classes, occur = arrays["seen_classes"], arrays["absent_classes"]
    natural = len(occur) / (len(classes) + len(occur))
    for mode, absent in (("A", occur), ("B", None)):
        split = ClassSplit(arrays["heldout_logits"].shape[1], classes, absent)
        for scored in ("near", "test"):
            if f"{scored}_seen" not in arrays:
                continue
            group = f"pictures {mode}, {scored}"
            margin, right = (arrays[f"{scored}_{mode}_{key}"] for key in ("margin", "right"))
            yield Run(
                f"{file.parent.name}/{file.stem}, {mode}, {scored}",
                group,
                f"{group}, {how}",
                _with_halves(arrays, mode),
                split,
                natural,
                margin,
                right,
                arrays[f"{scored}_seen"],
            )


def _with_halves(arrays: dict[str, Tensor], mode: str) -> dict[str, Tensor]:
    """Add the logits of the models that were fine-tuned on halves, if there are any, as those of the other runs are."""
    halves = {
        f"pseudo{k}_train_logits": torch.cat([arrays[f"pseudo{k}_seen_logits"], arrays[f"pseudo{k}_{mode}_largest"]], 1)
        for k in range(3)
        if f"pseudo{k}_seen_logits" in arrays
    }
    return {**arrays, **halves}
