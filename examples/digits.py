"""Fine-tune on five of the ten digits, and keep the other five.

    python examples/digits.py

A small network is pre-trained on all ten digits. Then the images change (rotated, shifted, textured), and labeled
images of the new kind exist for five digits only. After ordinary fine-tuning the network hardly ever predicts the other
five, the *absent* classes. One callback brings them back: see ``fine_tune``. The network and its training
(``digits_module.py``) and the images (``digits_data.py``) know nothing of it.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import torch
from digits_data import NUM_CLASSES, DigitData, keep_classes, make_data
from digits_module import DigitClassifier
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_calibft import AbsentClassCalibration, calibrate, fold_checkpoint, get_gamma, set_gamma
from lightning_calibft.functional import (
    ausuc,
    best_gamma,
    class_means,
    harmonic_mean_accuracy,
    nearest_class_mean_accuracy,
    seen_unseen_curve,
    split_accuracy,
)
from lightning_calibft.plotting import plot_seen_unseen_curve

LEARNING_RATES = {"sgd": 2e-3, "adamw": 5e-4}
Scores = dict[str, float]


@dataclass(frozen=True)
class Run:
    """What one seed gives: the rows of the table, and what the picture needs."""

    rows: dict[str, Scores]
    logits: dict[str, Tensor]
    data: DigitData


def main() -> None:
    args = parse_arguments()
    be_quiet()
    start = time.perf_counter()
    runs = [run(seed, args) for seed in range(args.seeds)]
    print_table([each.rows for each in runs])
    seconds = time.perf_counter() - start
    print(f"\nseeds: {args.seeds}, epochs: {args.epochs}, optimizer: {args.optimizer}, seconds: {seconds:.0f}")
    draw_curve(runs[0], args.output / "curve.png")
    use_in_fresh_processes(args.output / "seed0" / "best.ckpt")


def run(seed: int, args: argparse.Namespace) -> Run:
    """Pre-train, fine-tune and score with one seed."""
    print(f"seed {seed} ...", file=sys.stderr)
    pl.seed_everything(seed, verbose=False)
    data = make_data(seed)
    seen = data.seen_classes
    pretrained = DigitClassifier()
    fit(pretrained, data.source, data.held_out, epochs=args.epochs, batch_size=64)
    tuned = fine_tune(pretrained, data, args, folder=args.output / f"seed{seed}")
    tuned_on_all = copy_of(pretrained, args.optimizer)
    fit(tuned_on_all, data.target_train, data.held_out, epochs=args.epochs)

    calibrated = score(tuned, data)  # as the callback left it
    seen_only = DataLoader(keep_classes(data.target_train, seen), 64)
    calibrate(tuned, seen_only, estimator="pseudo_absent", pretrained=pretrained, progress=False)
    pseudo_absent = score(tuned, data)
    logits = {"pre-trained": predict(pretrained, data), "fine-tuned": predict(set_gamma(tuned, 0.0, seen), data)}
    oracle = best_gamma(logits["fine-tuned"], data.target_test.tensors[1], seen).item()
    rows = {
        "pre-trained": score(pretrained, data),
        "fine-tuned": score(set_gamma(tuned, 0.0, seen), data),
        "fine-tuned + ALG": calibrated,
        "fine-tuned + pseudo-absent": pseudo_absent,
        "oracle gamma": score(set_gamma(tuned, oracle, seen), data),
        "all-class fine-tuning": score(tuned_on_all, data),
    }
    return Run(rows, logits, data)


def fine_tune(pretrained: DigitClassifier, data: DigitData, args: argparse.Namespace, folder: Path) -> DigitClassifier:
    """Fine-tune on the seen classes only, and leave the best checkpoint in ``folder``."""
    module = copy_of(pretrained, args.optimizer)
    callbacks = [
        AbsentClassCalibration(),  # <- the only change to ordinary fine-tuning
        ModelCheckpoint(folder, filename="best", monitor="val_ausuc", mode="max", enable_version_counter=False),
    ]
    seen_only = keep_classes(data.target_train, data.seen_classes)
    fit(module, seen_only, data.held_out, epochs=args.epochs, callbacks=callbacks)
    return module


def copy_of(pretrained: DigitClassifier, optimizer: str) -> DigitClassifier:
    """Start from the pre-trained weights, with the optimizer for fine-tuning."""
    module = DigitClassifier(optimizer, LEARNING_RATES[optimizer])
    module.load_state_dict(pretrained.state_dict())
    return module


def fit(
    module: DigitClassifier,
    train: TensorDataset,
    val: TensorDataset,
    *,
    epochs: int,
    batch_size: int = 32,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Train with an ordinary Trainer, silently."""
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(train, batch_size, shuffle=True), DataLoader(val, batch_size))


@torch.no_grad()
def predict(module: DigitClassifier, data: DigitData) -> Tensor:
    """Return the logits of the test images."""
    images, _ = data.target_test.tensors
    return module.eval()(images)


@torch.no_grad()
def score(module: DigitClassifier, data: DigitData) -> Scores:
    """Score the test images, once by the head and once by the nearest class mean (NCM) of the features."""
    logits, (images, target), seen = predict(module, data), data.target_test.tensors, data.seen_classes
    train_images, train_target = data.target_train.tensors
    means = class_means(module.backbone(train_images), train_target, num_classes=NUM_CLASSES)
    features = module.backbone(images)
    scores = {
        "Acc_Y/Y": split_accuracy(logits, target, seen),
        "Acc_S/Y": split_accuracy(logits, target, seen, samples="seen"),
        "Acc_U/Y": split_accuracy(logits, target, seen, samples="absent"),
        "harmonic mean": harmonic_mean_accuracy(logits, target, seen),
        "AUSUC": ausuc(logits, target, seen),
        "NCM_S/Y": nearest_class_mean_accuracy(features, target, means, seen, samples="seen"),
        "NCM_U/Y": nearest_class_mean_accuracy(features, target, means, seen, samples="absent"),
    }
    return {**{name: 100 * value.item() for name, value in scores.items()}, "gamma": get_gamma(module) or 0.0}


def print_table(runs: Sequence[dict[str, Scores]]) -> None:
    """Print a Markdown table: mean ± standard deviation over the seeds, in percent."""
    columns = list(runs[0]["pre-trained"])
    print("| " + " | ".join(["mean ± sd, %; gamma in logits", *columns]) + " |")
    print("| :-- |" + " --: |" * len(columns))
    for name in runs[0]:
        cells = [
            spread([rows[name][column] for rows in runs], digits=2 if column == "gamma" else 1) for column in columns
        ]
        print("| " + " | ".join([name, *cells]) + " |")


def spread(values: list[float], digits: int) -> str:
    """Format the mean and the standard deviation (0 for a single value)."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def draw_curve(run: Run, file: Path) -> None:
    """Draw what every gamma would give, before and after fine-tuning, and mark the one that the callback found."""
    figure, ax = plt.subplots(figsize=(6, 6.4), layout="constrained")
    seen, target = run.data.seen_classes, run.data.target_test.tensors[1]
    names = ("fine-tuned", "fine-tuned + ALG", "fine-tuned + pseudo-absent", "oracle gamma")
    points = {"pre-trained": {"pre-trained": 0.0}, "fine-tuned": {name: run.rows[name]["gamma"] for name in names}}
    for name, gammas in points.items():
        logits = run.logits[name]
        curve, area = seen_unseen_curve(logits, target, seen), ausuc(logits, target, seen)
        plot_seen_unseen_curve(curve, gammas=gammas, score=area, label=f"{name},", ax=ax)
    ax.set(title="Digits, fine-tuned on five of ten classes", xlim=(0, 1), ylim=(0, 1))
    ax.grid(alpha=0.4)
    figure.savefig(file, dpi=150)
    print(f"\nSeen-unseen curve: {file}")


FRESH_PROCESS = """
import sys, torch
from digits_data import make_data
from digits_module import DigitClassifier
path = sys.argv[1]
{statement}
data = make_data(seed=0)
images, labels = data.target_test.tensors
absent = ~torch.isin(labels, torch.tensor(data.seen_classes))
with torch.no_grad():
    predicted = model.eval()(images[absent]).argmax(dim=1)
right = (predicted == labels[absent]).sum().item()
imported = "imported" if "lightning_calibft" in sys.modules else "never imported"
print(f"{{right}} of {{len(labels[absent])}} images of absent classes right; lightning_calibft was {{imported}}")
"""


def use_in_fresh_processes(checkpoint: Path) -> None:
    """Load the best checkpoint, strictly, in two new processes: as it is, and folded, without this package."""
    folded = checkpoint.with_name("best-folded.ckpt")
    fold_checkpoint(checkpoint, folded)
    with_package = "from lightning_calibft import load_calibrated; model = load_calibrated(DigitClassifier, path)"
    without_package = "model = DigitClassifier.load_from_checkpoint(path)"
    for path, statement in ((checkpoint, with_package), (folded, without_package)):
        command = [sys.executable, "-c", FRESH_PROCESS.format(statement=statement), str(path.resolve())]
        done = subprocess.run(command, cwd=Path(__file__).parent, check=True, stdout=subprocess.PIPE, text=True)
        print(f"\nFresh process, {path}: {statement}\n  {done.stdout.strip()}")


def be_quiet() -> None:
    """Silence what Lightning tells about each of the many Trainers, and use one thread: the network is tiny."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.pytorch")
    torch.set_num_threads(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of runs (default: 5)")
    parser.add_argument("--optimizer", choices=sorted(LEARNING_RATES), default="sgd", help="for fine-tuning")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of each training (default: 20)")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder for checkpoints and the picture")
    return parser.parse_args()


if __name__ == "__main__":
    main()
