"""How Mai et al., "Fine-Tuning is Fine, if Calibrated" (NeurIPS 2024), fine-tune, and what they score.

The settings are those of their code (https://github.com/OSU-MLB/Fine-Tuning-Is-Fine-If-Calibrated): SGD with Nesterov
momentum 0.9, the head at the learning rate and the backbone at a tenth of it, a cosine over all iterations without
warm-up, batches of 64, 500 iterations an epoch, cross-entropy over all rows of the head, BatchNorm in training mode.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from lightning_calibft import (
    AbsentClassCalibration,
    ClassSplit,
    find_head,
    get_gamma,
    inspect_checkpoint,
    load_calibrated,
)
from lightning_calibft.analysis.outputs import Outputs, collect_outputs
from lightning_calibft.functional import (
    ausuc,
    average_logit_gap,
    best_gamma,
    calibrate_logits,
    class_means,
    nearest_class_mean_accuracy,
    split_accuracy,
)

COLUMNS = ("Acc_Y/Y", "Acc_S/Y", "Acc_U/Y", "AUSUC", "NCM_S/Y", "NCM_U/Y", "gamma")
Rows = dict[str, dict[str, float]]


class FineTuning(pl.LightningModule):
    """Any classifier with the paper's optimizer, schedule and loss."""

    def __init__(self, net: nn.Module, learning_rate: float, weight_decay: float) -> None:
        super().__init__()
        self.net, self.learning_rate, self.weight_decay = net, learning_rate, weight_decay

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, 3, H, W)`` to logits ``(N, C)``."""
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy over all rows of the head."""
        images, rows = batch
        return F.cross_entropy(self(images), rows)

    def configure_optimizers(self) -> dict[str, Any]:
        """Build SGD, with the backbone at a tenth of the head's learning rate, and a cosine over all steps."""
        head = list(find_head(self.net).parameters())
        in_head = set(map(id, head))
        backbone = [parameter for parameter in self.net.parameters() if id(parameter) not in in_head]
        groups = [{"params": backbone, "lr": 0.1 * self.learning_rate}, {"params": head, "lr": self.learning_rate}]
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=self.weight_decay, nesterov=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(eq=False)
class TargetData(pl.LightningDataModule):
    """What a model is fine-tuned and scored on. Labels are rows of the head.

    Args:
        split: Seen and absent classes.
        augmented: The fine-tuning images, of seen classes.
        clean: The same images without augmentation: what gamma is found on.
        reference: Training images of all classes without augmentation, for the class means of NCM.
        test: Images of all classes.
        args: The options of ``add_options``.
    """

    split: ClassSplit
    augmented: Dataset
    clean: Dataset
    reference: Dataset
    test: Dataset
    args: argparse.Namespace

    def __post_init__(self) -> None:
        super().__init__()

    def train_dataloader(self) -> DataLoader:
        """So many iterations an epoch, however many images there are."""
        return training_loader(self.augmented, self.args)

    def calibration_dataloader(self) -> DataLoader:
        """Where the callback finds gamma."""
        return DataLoader(self.clean, self.args.batch_size, num_workers=self.args.workers)


def training_loader(data: Dataset, args: argparse.Namespace) -> DataLoader:
    """Whole batches of shuffled images; an epoch ends after ``--iterations``, not with the images."""
    sampler = RandomSampler(data, num_samples=args.iterations * args.batch_size)
    return DataLoader(data, args.batch_size, sampler=sampler, num_workers=args.workers)


def train(module: FineTuning, data: Any, path: Path, args: argparse.Namespace, *callbacks: pl.Callback) -> None:
    """Train and write the last weights to ``path``."""
    module.train()  # Lightning keeps the mode that modules come in
    pl.seed_everything(args.seed, workers=True, verbose=False)
    checkpoint = ModelCheckpoint(
        path.parent, path.stem, every_n_epochs=args.epochs, save_weights_only=True, enable_version_counter=False
    )
    trainer = make_trainer(args, max_epochs=args.epochs, callbacks=[*callbacks, checkpoint])
    trainer.fit(module, data)


def make_trainer(args: argparse.Namespace, **options: Any) -> pl.Trainer:
    chosen = {"accelerator": args.accelerator, "precision": args.precision, "default_root_dir": args.output}
    return pl.Trainer(devices=1, logger=False, enable_model_summary=False, **chosen, **options)


def fine_tune(net: nn.Module, data: TargetData, path: Path, args: argparse.Namespace) -> FineTuning:
    """Return ``net`` fine-tuned and calibrated by the package's callback; what an earlier run has finished is read."""
    options = {"net": copy.deepcopy(net), "learning_rate": args.learning_rate, "weight_decay": args.weight_decay}
    if not (path.exists() and inspect_checkpoint(path)["calibrated"]):
        split = data.split
        calibration = AbsentClassCalibration(
            list(split.seen_classes), list(split.absent_classes), estimator="pseudo_absent", source="train"
        )
        train(FineTuning(**options), data, path, args, calibration)
    return load_calibrated(FineTuning, path, map_location="cpu", **options)


def paper_rows(net: nn.Module, data: TargetData, folder: Path, args: argparse.Namespace) -> Rows:
    """Fine-tune a pre-trained classifier and score both, and the gammas."""
    tuned = fine_tune(net, data, folder / "fine_tuned.ckpt", args)
    device = make_trainer(args).strategy.root_device
    (old_test, old_train), (test, train) = (_collect(model, data, device) for model in (net, tuned))
    seen = torch.isin(train.target, torch.tensor(data.split.seen_classes))
    groups = data.split.seen_classes, data.split.absent_classes
    gammas = {
        "fine-tuned": 0.0,
        "+ ALG": average_logit_gap(train.logits[seen], train.target[seen], *groups).gamma.item(),
        "+ pseudo_absent": get_gamma(tuned),
        "+ oracle gamma": best_gamma(test.logits, test.target, *groups).item(),
    }
    rows = {name: score(test, train, data.split, gamma) for name, gamma in gammas.items()}
    return {"pre-trained": score(old_test, old_train, data.split, 0.0), **rows}


def _collect(model: nn.Module, data: TargetData, device: torch.device) -> tuple[Outputs, ...]:
    model.to(device)
    options = {"num_workers": data.args.workers}
    parts = [
        collect_outputs(model, DataLoader(part, data.args.batch_size, **options))
        for part in (data.test, data.reference)
    ]
    model.cpu()
    return tuple(parts)


def score(test: Outputs, train: Outputs, split: ClassSplit, gamma: float) -> dict[str, float]:
    """Score the test images with one gamma. ``S/Y``: samples of seen classes, predicted among seen and absent ones."""
    groups = split.seen_classes, split.absent_classes
    logits = calibrate_logits(test.logits.double(), gamma, *groups)
    nearest = test.features, test.target, class_means(train.features, train.target, split.num_classes), *groups
    values = (
        split_accuracy(logits, test.target, *groups),
        split_accuracy(logits, test.target, *groups, samples="seen"),
        split_accuracy(logits, test.target, *groups, samples="absent"),
        ausuc(test.logits, test.target, *groups),
        nearest_class_mean_accuracy(*nearest, samples="seen"),
        nearest_class_mean_accuracy(*nearest, samples="absent"),
    )
    return dict(zip(COLUMNS, [*(100 * value.item() for value in values), gamma], strict=True))


def kept(folder: Path, facts: dict[str, Any], compute: Callable[[], Rows]) -> Rows:
    """Read the scores of a finished run, or compute and write them."""
    file = folder / "results.json"
    if not file.exists():
        rows = compute()
        scratch = file.with_suffix(".tmp")
        scratch.write_text(json.dumps({"settings": facts, "rows": rows}, indent=1))
        os.replace(scratch, file)
    return json.loads(file.read_text())["rows"]


def folder_of(name: str, facts: dict[str, Any], args: argparse.Namespace) -> Path:
    """Make the folder of a run: another one for each setting, so that none goes on with the weights of another."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    folder = args.output / f"{name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def markdown(tables: dict[str, Rows]) -> Iterator[str]:
    """One line for each run and model, and of several runs their mean."""
    if len(tables) > 1:
        names = next(iter(tables.values()))
        mean = {
            name: {key: statistics.mean(rows[name][key] for rows in tables.values()) for key in COLUMNS}
            for name in names
        }
        tables = {**tables, f"mean of {len(tables)}": mean}
    yield f"| %; gamma in logits | model | {' | '.join(COLUMNS)} |"
    yield "| :-- | :-- |" + " --: |" * len(COLUMNS)
    for title, rows in tables.items():
        for name, scores in rows.items():
            cells = [f"{scores[key]:.{2 if key == 'gamma' else 1}f}" for key in COLUMNS]
            yield f"| {title} | {name} | {' | '.join(cells)} |"
