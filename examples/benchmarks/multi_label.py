"""A prototype for several labels an image: what fine-tuning does to labels that it never sees, and what helps.

    python examples/benchmarks/multi_label.py

An image has four digits of ``examples/digits.py``, two by two, and a label for each class that is among them. The
network has a sigmoid for each class. It is trained on source images with digits of all classes, single ones first. Then
it is fine-tuned on target images whose digits are all of seen classes: the labels of absent classes are all 0 there.
Test images have digits of all classes.

A label is predicted if its logit is above 0, and gamma is added to all absent logits; so it is a threshold of -gamma
for all of them. Tried are gammas that need no label of an absent class (the drift of the absent logits on fine-tuning
images, against the model before; a told frequency of absent labels, with unlabeled images), labeled images, and test
labels (*oracle*): one gamma, or a threshold for each label.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from compare import prepare
from digits_data import NUM_CLASSES, keep_classes, make_data
from digits_module import DigitClassifier
from methods import Classifier, fit
from table import Rows, Scores, markdown
from torch import Tensor
from torch.utils.data import TensorDataset
from torchmetrics.functional.classification import multilabel_average_precision

PRETRAINING, FINE_TUNING = ("AdamW", 3e-3), ("AdamW", 2e-3)
IMAGES = {"source": 1500, "target_train": 500, "held_out": 100, "target_test": 1000}


def compose(digits: TensorDataset, number: int, generator: torch.Generator) -> TensorDataset:
    """Put four random digits into each image; its labels are a row of 0 and 1."""
    images, labels = digits.tensors
    index = torch.randint(len(labels), (number, 4), generator=generator)
    upper, lower = (torch.cat([images[index[:, left]], images[index[:, left + 1]]], 3) for left in (0, 2))
    return TensorDataset(torch.cat([upper, lower], 2), F.one_hot(labels[index], NUM_CLASSES).amax(1).float())


@dataclass(frozen=True)
class Logits:
    """What a model makes of the images: of the fine-tuning, the held-out and the test images."""

    train: Tensor
    held_out: Tensor
    test: Tensor


def best_gamma(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the gamma with the best macro F1 of some labels, ``(N, L)``."""
    grid = torch.linspace(-5, 15, 401)
    return grid[torch.stack([macro_f1(logits + gamma, labels) for gamma in grid]).argmax()]


def macro_f1(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean F1 of some labels, predicted if their logits are above 0."""
    found = (logits > 0).float()
    hits = (found * labels).sum(0)
    return (2 * hits / (found.sum(0) + labels.sum(0)).clamp(min=1)).mean()


def gammas_of(tuned: Logits, before: Logits, absent: list[int], held_out: Tensor, test: Tensor) -> dict[str, Tensor]:
    """Return what is added to the absent logits: a number, or one for each label."""
    frequency = test[:, absent].mean()
    of_labels = [best_gamma(tuned.test[:, [row]], test[:, [row]]) for row in absent]
    return {
        "fine-tuned": torch.tensor(0.0),
        "fine-tuned + drift": (before.train - tuned.train)[:, absent].mean(),
        "fine-tuned + drift of each label": (before.train - tuned.train)[:, absent].mean(0),
        "fine-tuned + told frequency, unlabeled images": -tuned.test[:, absent].quantile(1 - frequency),
        f"fine-tuned + gamma of {len(held_out)} labeled images": best_gamma(
            tuned.held_out[:, absent], held_out[:, absent]
        ),
        "fine-tuned + oracle gamma": best_gamma(tuned.test[:, absent], test[:, absent]),
        "fine-tuned + oracle threshold of each label": torch.stack(of_labels),
    }


def score(logits: Tensor, labels: Tensor, seen: list[int], absent: list[int], gamma: Tensor) -> Scores:
    """Score the test images."""
    shifted = logits.clone()
    shifted[:, absent] += gamma
    groups = {"seen": seen, "absent": absent}
    f1 = {name: macro_f1(shifted[:, rows], labels[:, rows]) for name, rows in groups.items()}
    precision = {
        name: multilabel_average_precision(logits[:, rows], labels[:, rows].long(), len(rows))
        for name, rows in groups.items()
    }
    percents = {
        "macro F1": macro_f1(shifted, labels),
        **{f"macro F1 of {name}": value for name, value in f1.items()},
        **{f"mean precision of {name}": value for name, value in precision.items()},
    }
    return {**{name: 100 * value.item() for name, value in percents.items()}, "gamma": gamma.mean().item()}


def rows_of(seed: int, epochs: int) -> Rows:
    """Pre-train, fine-tune and score."""
    data, generator = make_data(seed), torch.Generator().manual_seed(seed)
    seen = data.seen_classes
    absent = [row for row in range(NUM_CLASSES) if row not in seen]
    parts = {name: compose(getattr(data, name), number, generator) for name, number in IMAGES.items()}
    train = compose(keep_classes(data.target_train, seen), IMAGES["target_train"], generator)
    torch.manual_seed(seed)
    loss = F.binary_cross_entropy_with_logits
    images, labels = data.source.tensors
    single = TensorDataset(images, F.one_hot(labels, NUM_CLASSES).float())
    before = fit(Classifier(DigitClassifier(), *PRETRAINING, loss=loss), single, epochs, seed)
    before = fit(Classifier(before, *PRETRAINING, loss=loss), parts["source"], epochs, seed)
    tuned = fit(Classifier(before, *FINE_TUNING, loss=loss), train, epochs, seed)
    old, new = (logits_of(model, train, parts) for model in (before, tuned))
    labels = parts["target_test"].tensors[1]
    rows = {"pre-trained": score(old.test, labels, seen, absent, torch.tensor(0.0))}
    gammas = gammas_of(new, old, absent, parts["held_out"].tensors[1], labels)
    rows |= {name: score(new.test, labels, seen, absent, gamma) for name, gamma in gammas.items()}
    on_all = fit(Classifier(before, *FINE_TUNING, loss=loss), parts["target_train"], epochs, seed)
    of_all = logits_of(on_all, train, parts).test
    return {**rows, "fine-tuned on all labels": score(of_all, labels, seen, absent, torch.tensor(0.0))}


@torch.no_grad()
def logits_of(model: Classifier, train: TensorDataset, parts: dict[str, TensorDataset]) -> Logits:
    """Run a model, which is in eval mode, over the images."""
    chosen = (train, parts["held_out"], parts["target_test"])
    return Logits(*(torch.cat([model(images) for images in part.tensors[0].split(500)]) for part in chosen))


def lines(args: argparse.Namespace) -> Iterator[str]:
    """Print one table."""
    yield from markdown("four digits an image, 50 % seen", [rows_of(seed, args.epochs) for seed in range(args.seeds)])
    yield ""
    yield f"mean ± sd of {args.seeds} seeds; %, gamma in logits; epochs of a training: {args.epochs}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of runs (default: 3)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of each training (default: 20)")
    prepare()
    for line in lines(parser.parse_args(arguments)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
