"""How many samples gamma needs where there are very many, on digits.

    python examples/benchmarks/samples.py

The target images of the seen digits are drawn anew many times over, each with a small turn, shift, scale and noise of
its own, and the network of ``examples/digits.py`` is fine-tuned on all of them. Then gamma is found from all of them,
from random samples (``max_samples``), and from as many as a standard error takes (``tolerance``), each several times
with other samples.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # behind this folder, for the demo has a `digits` as well

from compare import prepare
from digits import FINE_TUNING, DigitSetting
from digits_data import source_domain
from methods import Classifier, fit, start
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_calibft import calibrate, set_gamma
from lightning_calibft.functional import best_gamma, calibrate_logits, split_accuracy

ESTIMATORS = ("alg", "pseudo_absent")
HOW: dict[str, dict[str, Any]] = {
    **{f"`max_samples={number}`": {"max_samples": number} for number in (100, 300, 1000, 3000, 10000)},
    **{f"`tolerance={error}`": {"tolerance": error} for error in (0.1, 0.05, 0.02, 0.01)},
}


@dataclass(frozen=True)
class Found:
    """A gamma, and what it took and gave."""

    gamma: float
    error: float
    samples: int
    seconds: float
    accuracy: float


class Tuned:
    """A classifier, fine-tuned on many images of the seen digits."""

    def __init__(self, seed: int, args: argparse.Namespace) -> None:
        self.setting = DigitSetting(seed, 50, *FINE_TUNING[args.optimizer], args.epochs)
        images, labels = self.setting.seen_data.tensors
        index = torch.arange(args.samples) % len(labels)
        jittered = source_domain(images[index], torch.Generator().manual_seed(seed))
        self.data = TensorDataset(jittered, labels[index])
        self.before = start(self.setting).eval()
        self.module: Classifier = fit(start(self.setting), self.data, 1, seed)
        test_images, self.test_target = self.setting.data.target_test.tensors
        with torch.no_grad():
            self.test_logits: Tensor = self.module(test_images)

    def accuracy(self, gamma: float) -> float:
        """Overall accuracy of the test images, in percent."""
        logits = calibrate_logits(self.test_logits, gamma, self.setting.seen)
        return 100 * split_accuracy(logits, self.test_target, self.setting.seen).item()

    def oracle(self) -> float:
        """Return the gamma that is best on the test images."""
        return best_gamma(self.test_logits, self.test_target, self.setting.seen).item()

    def find(self, estimator: str, draw: int, **how: Any) -> Found:
        """Find gamma; each draw has the images in an order of its own."""
        set_gamma(self.module, 0.0, self.setting.seen)
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(draw)).tolist()
        loader = DataLoader(Subset(self.data, order), 64)
        pretrained = self.before if estimator == "pseudo_absent" else None
        begin = time.process_time()
        result = calibrate(
            self.module,
            loader,
            self.setting.seen,
            estimator=estimator,
            pretrained=pretrained,
            progress=False,
            **how,
        )
        seconds = time.process_time() - begin
        return Found(result.gamma, result.standard_error, result.num_samples, seconds, self.accuracy(result.gamma))


def table(models: Sequence[Tuned], draws: int) -> Iterator[str]:
    """One line for each way to read the data: means over models and draws."""
    columns = "samples | standard error told | distance from gamma of all | accuracy | against all | worst draw | time"
    yield f"| estimator | read | {columns} |"
    yield "| :-- | :-- |" + " --: |" * 7
    for estimator in ESTIMATORS:
        whole = [model.find(estimator, 0) for model in models]
        for name, how in HOW.items():
            if how.get("max_samples", 0) <= len(models[0].data):
                found = [[model.find(estimator, draw, **how) for draw in range(draws)] for model in models]
                yield line(f"| `{estimator}` | {name} |", found, whole)
        yield line(f"| `{estimator}` | all |", [[each] for each in whole], whole)


def line(start_of_line: str, found: Sequence[Sequence[Found]], whole: Sequence[Found]) -> str:
    """Compare the gammas of each model with that of all samples."""
    mean = statistics.mean
    pairs = [(each, of_all) for draws, of_all in zip(found, whole, strict=True) for each in draws]
    accuracies = [mean(each.accuracy for each in draws) for draws in found]
    gains = [each.accuracy - of_all.accuracy for each, of_all in pairs]
    cells = [
        f"{mean(each.samples for each, _ in pairs):,.0f}",
        f"{mean(each.error for each, _ in pairs):.3f}",
        f"{mean((each.gamma - of_all.gamma) ** 2 for each, of_all in pairs) ** 0.5:.3f}",
        f"{mean(accuracies):.1f} ± {statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0:.1f}",
        f"{mean(gains):+.2f}",
        f"{min(gains):+.1f}",
        f"{100 * mean(each.seconds / of_all.seconds for each, of_all in pairs):.1f} %",
    ]
    return f"{start_of_line} {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    prepare()
    models = [Tuned(seed, args) for seed in range(args.seeds)]
    before, best = ([model.accuracy(gamma(model)) for model in models] for gamma in (lambda _: 0.0, Tuned.oracle))
    print(
        f"{args.samples:,} images for each of {args.seeds} models, {args.draws} draws each. Accuracy without gamma:"
        f" {statistics.mean(before):.1f}, with the best one: {statistics.mean(best):.1f}.\n"
    )
    print("\n".join(table(models, args.draws)))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000, help="images to fine-tune on (default: 100000)")
    parser.add_argument("--seeds", type=int, default=5, help="number of models (default: 5)")
    parser.add_argument("--draws", type=int, default=10, help="number of gammas of each (default: 10)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of the pre-training (default: 20)")
    parser.add_argument("--optimizer", choices=list(FINE_TUNING), default="sgd", help="of the fine-tuning")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
