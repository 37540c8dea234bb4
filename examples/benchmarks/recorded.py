"""Recorded fine-tuning runs, and what a gamma loses on them.

``runs`` holds the logits of 32 fine-tuned classifiers, each ``{data}_{network}_{optimizer}_{% of classes
seen}_{seed}.npz``: of their fine-tuning samples (``train``) and of held-out samples of the same classes (``heldout``),
before and after fine-tuning, and of test samples of all classes. ``runs/training`` holds the logits that the steps of
the last epoch saw, the head's bias and the norms of its rows, and three models fine-tuned on half of the seen classes
each: their logits of the seen classes and, as a last column, the largest of the absent ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_calibft import ClassSplit
from lightning_calibft.functional import best_gamma, calibrate_logits, split_accuracy
from lightning_calibft.functional._inputs import Groups
from lightning_calibft.functional.pseudo_absent_gamma import pseudo_absent_margins

RUNS = Path(__file__).with_name("runs")
DATA = {"digits": "digits", "glyphs": "157 glyphs"}
NETWORKS = {"gn": "GroupNorm", "bn": "BatchNorm", "resnet": "ResNet"}


@dataclass(frozen=True)
class Run:
    """A fine-tuned classifier, seen through ``part`` of its data: ``"train"`` or ``"heldout"``."""

    name: str
    arrays: dict[str, Tensor]
    part: str = "train"

    @classmethod
    def read(cls, file: Path) -> Run:
        """Read both files of a run, in float64."""
        arrays = {}
        for path in (file, file.parent / "training" / file.name):
            with np.load(path) as stored:
                arrays.update({key: torch.from_numpy(stored[key]) for key in stored.files})
        real = {key: value.double() if value.is_floating_point() else value.long() for key, value in arrays.items()}
        return cls(file.stem, real)

    def on(self, part: str) -> Run:
        """Return the same run, seen through another part of its data."""
        return Run(self.name, self.arrays, part)

    @property
    def row(self) -> str:
        """The kind of run: data, network and share of seen classes."""
        data, network, _, percent, _ = self.name.split("_")
        return f"{DATA[data]}, {NETWORKS[network]}, {percent} %"

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

    @cached_property
    def split(self) -> ClassSplit:
        """Which classes were fine-tuned on."""
        return ClassSplit(self.logits.shape[1], self.arrays["seen_classes"], self.arrays["absent_classes"])

    @property
    def seen(self) -> list[int]:
        """Ids of the seen classes."""
        return list(self.split.seen_classes)

    @property
    def absent(self) -> list[int]:
        """Ids of the absent classes."""
        return list(self.split.absent_classes)

    @cached_property
    def margins(self) -> tuple[Tensor, Tensor]:
        """Of the samples and of their pseudo-absent copies."""
        groups = Groups.from_split(self.split, self.logits.device)
        seen, pseudo = pseudo_absent_margins(self.logits, self.target, self.pretrained_logits, groups).unbind(1)
        return seen, pseudo

    @cached_property
    def others(self) -> Tensor:
        """Logits of the seen classes other than the true one, ``(N, |S| - 1)``."""
        others = torch.tensor(self.seen) != self.target.unsqueeze(1)
        return self.logits[:, self.seen][others].view(len(self.target), -1)

    @cached_property
    def own(self) -> Tensor:
        """Logit of the true class, ``(N,)``."""
        return self.logits.gather(1, self.target.unsqueeze(1)).squeeze(1)

    @cached_property
    def best(self) -> float:
        """The best accuracy that any gamma has on the test samples, in points."""
        return self.accuracy(best_gamma(self.arrays["test_logits"], self.arrays["test_target"], self.seen).item())

    def accuracy(self, gamma: float) -> float:
        """Overall test accuracy at one gamma, in points."""
        logits = calibrate_logits(self.arrays["test_logits"], gamma, self.seen)
        return 100 * split_accuracy(logits, self.arrays["test_target"], self.seen).item()

    def loss(self, gamma: float) -> float:
        """Points of overall test accuracy lost against the best gamma."""
        return self.best - self.accuracy(gamma)

    def loss_of_logits(self, logits: Tensor) -> float:
        """The same of test logits that were changed by more than one number; can be negative."""
        return self.best - 100 * split_accuracy(logits, self.arrays["test_target"], self.seen).item()

    def of_some_classes(self, num_seen: int, num_absent: int, seed: int) -> Run:
        """The run as if its head, and its test data, had some of the seen and of the absent classes alone."""
        generator = torch.Generator().manual_seed(seed)
        seen, absent = (
            torch.tensor(classes)[torch.randperm(len(classes), generator=generator)[:number]].sort().values
            for classes, number in ((self.seen, num_seen), (self.absent, num_absent))
        )
        both = torch.cat([seen, absent]).sort().values
        arrays = {
            name: torch.searchsorted(both, ids) for name, ids in (("seen_classes", seen), ("absent_classes", absent))
        }
        for part, kept in ((self.part, seen), ("test", both)):
            samples = torch.isin(self.arrays[f"{part}_target"], kept)
            arrays[f"{part}_target"] = torch.searchsorted(both, self.arrays[f"{part}_target"][samples])
            for name in (f"{part}_logits", f"pretrained_{part}_logits"):
                if name in self.arrays:
                    arrays[name] = self.arrays[name][samples][:, both]
        return Run(self.name, arrays, self.part)


def read_runs() -> list[Run]:
    return [Run.read(file) for file in sorted(RUNS.glob("*.npz"))]
