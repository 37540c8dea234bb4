"""Compare ways to keep the absent classes, all trained here from scratch on the images of ``examples/digits.py``.

    python examples/benchmarks/digits.py

It prints a table for each share of seen classes and each optimizer, the overall accuracies of all of them side by side,
and two more tables: what the optimizer and its learning rate do, and what parameter-efficient fine-tuning does. Every
model is trained once, and all its gammas are read from it. The scores of a finished run are kept in the folder
``--output``: a benchmark that was stopped goes on from there.

A row of a plain name is the model as it is; ``+ x`` is the same model with gamma by estimator ``x``. Costs are counted
in training samples: 1.0 is one ordinary fine-tuning, whatever a step costs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import chain
from pathlib import Path
from typing import ClassVar

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # behind this folder, for the demo has a `digits` as well

import digits_data
import digits_module
from compare import gamma_rows, kept, method_rows, method_tables, prepare, summary
from digits_data import NUM_CLASSES, DigitData, make_data
from digits_module import DigitClassifier
from methods import Classifier, Setting, add_low_rank, fine_tuned, fit, sigmoids, start, tune
from table import Rows, Scores, markdown, oracle, run, score

FINE_TUNING = {"sgd": ("SGD", 2e-3), "adamw": ("AdamW", 5e-4)}
LEARNING_RATES = {
    "SGD": (5e-4, 2e-3),
    "Adam": (5e-4, 2e-3),
    "AdamW": (5e-4, 2e-3),
    "Adagrad": (2e-3, 1e-2),
    "RMSprop": (2e-4, 1e-3),
    "Adadelta": (0.1, 0.5),
    "AdaBelief": (5e-4, 2e-3),
}


@dataclass(frozen=True)
class DigitSetting(Setting):
    """A setting on the images and with the network of the demo; half of the classes are those of the demo."""

    sources: ClassVar[tuple[Path, ...]] = (Path(__file__), Path(digits_data.__file__), Path(digits_module.__file__))
    local_models: ClassVar[int] = 10

    @property
    def num_classes(self) -> int:
        """Ten."""
        return NUM_CLASSES

    @cached_property
    def data(self) -> DigitData:
        """All images of this seed."""
        return make_data(self.seed)

    def pretrained(self) -> DigitClassifier:
        """Train on source images of all classes."""
        return pretrained(self.seed, self.epochs)


@cache
def pretrained(seed: int, epochs: int) -> DigitClassifier:
    """Train on source images of all classes."""
    torch.manual_seed(seed)
    return fit(DigitClassifier(), make_data(seed).source, epochs, seed, batch_size=64)


def low_rank(setting: Setting) -> Classifier:
    """Fine-tune low-rank changes of all convolutions and of the head."""
    return tune(setting, add_low_rank(start(setting), setting.seed))


def bias_only(setting: Setting) -> Classifier:
    """BitFit: fine-tune all biases and nothing else (Ben Zaken et al., ACL 2022)."""
    module = start(setting)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return tune(setting, module)


SMALL_TABLES = {
    "optimizer, learning rate": [
        (f"{optimizer}, {rate:g}", fine_tuned, optimizer, rate)
        for optimizer, rates in LEARNING_RATES.items()
        for rate in rates
    ],
    "trained by AdamW": [
        ("all parameters", fine_tuned, "AdamW", 5e-4),
        ("LoRA", low_rank, "AdamW", 5e-3),
        ("biases", bias_only, "AdamW", 5e-3),
    ],
    "loss": [
        (f"{loss}, {optimizer}", train, optimizer, rate)
        for optimizer, rate in FINE_TUNING.values()
        for loss, train in (("softmax", fine_tuned), ("sigmoids", sigmoids))
    ],
}


def few_rows(train: Callable[[Setting], Classifier], setting: Setting) -> Rows:
    """Score a fine-tuned model with the gammas of the smaller tables."""
    outputs = run(train(setting), setting)
    best = score(outputs, setting, oracle(outputs, setting))
    return {**gamma_rows("fine-tuned", outputs, setting), "fine-tuned + oracle": best}


def of_methods(args: argparse.Namespace) -> Iterator[tuple[str, list[Rows]]]:
    """Score every method for each share and optimizer."""
    for share in args.shares:
        for optimizer in args.optimizers:
            name, rate = FINE_TUNING[optimizer]
            settings = [DigitSetting(seed, share, name, rate, args.epochs) for seed in range(args.seeds)]
            yield f"{share} % seen, {name}", [kept(args.output, "methods", each, method_rows) for each in settings]


def small_tables(args: argparse.Namespace) -> Iterator[str]:
    """Print what other optimizers, and fewer trained parameters, do with half of the classes seen."""
    for title, lines in SMALL_TABLES.items():
        runs: list[Rows] = [{} for _ in range(args.seeds)]
        for seed, rows in enumerate(runs):
            for line, train, optimizer, rate in lines:
                setting = DigitSetting(seed, 50, optimizer, rate, args.epochs)
                rows[line] = in_one_line(kept(args.output, train.__name__, setting, partial(few_rows, train)))
        yield from markdown(title, runs)
        yield ""


def in_one_line(rows: Rows) -> Scores:
    """Return the overall accuracy of each row, and its gamma."""
    tuned = rows["fine-tuned"]
    line = {"AUSUC": tuned["AUSUC"], "fine-tuned": tuned["Acc_Y/Y"]}
    for name, scores in list(rows.items())[1:]:
        short = name.removeprefix("fine-tuned + ")
        line |= {f"+ {short}": scores["Acc_Y/Y"], f"gamma of {short}": scores["gamma"]}
    return line


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    prepare()
    of_all = () if args.only == "training" else method_tables(of_methods(args), args.only)
    of_training = small_tables(args) if args.only in (None, "training") else ()
    for line in chain(of_all, of_training):
        print(line, flush=True)
    print(summary(args))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of runs (default: 5)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of each training (default: 20)")
    parser.add_argument("--shares", type=int, nargs="+", choices=(30, 50, 70), default=(30, 50, 70), help="%% seen")
    parser.add_argument("--optimizers", nargs="+", choices=list(FINE_TUNING), default=list(FINE_TUNING))
    parser.add_argument("--only", choices=("scores", "overall", "training"), help="some of the tables")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_digits"), help="where scores are kept")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
