"""Fine-tune a timm model on folders of images that cover only some of its classes, and keep the others.

    python examples/timm_finetune.py resnet50 photos/train --classes names.txt --pretrained --val photos/val

``photos/train`` holds one folder per fine-tuning class; ``names.txt`` names the class of each row of the head, one a
line. The folded weights that come out load with timm alone:

    timm.create_model("resnet50", num_classes=1000, checkpoint_path="outputs/weights.pt")
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from lightning_calibft import AbsentClassCalibration, fold, get_gamma, load_calibrated


class TimmClassifier(pl.LightningModule):
    """A plain module around a timm model: SGD, cosine schedule, cross-entropy over all classes."""

    def __init__(
        self, model_name: str, num_classes: int, lr: float, weights: str | None = None, pretrained: bool = False
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["weights", "pretrained"])  # a checkpoint brings its own weights
        self.lr = lr
        self.model = timm.create_model(
            model_name, pretrained=pretrained, num_classes=num_classes, checkpoint_path=weights or ""
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, 3, H, W)`` to logits ``(N, C)``."""
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy over all classes, whichever of them the batch holds."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss."""
        images, labels = batch
        self.log("val_loss", F.cross_entropy(self(images), labels), prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """SGD with momentum and a cosine schedule over all steps."""
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class FolderData(pl.LightningDataModule):
    """Image folders whose names are matched to rows of the head, with the transforms that timm knows for the model."""

    def __init__(
        self,
        train: Path,
        val: Path | None,
        class_names: list[str],
        config: dict[str, Any],
        batch_size: int,
        workers: int,
    ) -> None:
        super().__init__()
        augmented, clean = create_transform(**config, is_training=True), create_transform(**config)
        self.train = open_folder(train, class_names, augmented)
        self.calibration = open_folder(train, class_names, clean)
        self.val = open_folder(val, class_names, clean) if val else None
        self.loading = {"batch_size": batch_size, "num_workers": workers}

    def train_dataloader(self) -> DataLoader:
        """The fine-tuning classes, augmented."""
        return DataLoader(self.train, shuffle=True, **self.loading)

    def calibration_dataloader(self) -> DataLoader:
        """The same images without augmentation: the callback measures gamma on these if a data module has them."""
        return DataLoader(self.calibration, **self.loading)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """All classes, if there is such a folder."""
        return DataLoader(self.val, **self.loading) if self.val else []


def open_folder(root: Path, class_names: list[str], transform: Any) -> ImageFolder:
    """Open an image folder whose labels are rows of the head, not positions in the alphabet."""
    folder = ImageFolder(str(root), transform=transform)
    if unknown := sorted(set(folder.classes) - set(class_names)):
        raise SystemExit(f"{root} has folders that `--classes` does not name: {', '.join(unknown)}.")
    folder.target_transform = [class_names.index(name) for name in folder.classes].__getitem__
    return folder


def main() -> None:
    args = parse_arguments()
    class_names = args.classes.read_text().splitlines()
    module = TimmClassifier(args.model, len(class_names), args.lr, args.weights, args.pretrained)
    config = resolve_model_data_config(module.model)
    data = FolderData(args.data, args.val, class_names, config, args.batch_size, args.workers)

    # The callback is the only thing that differs from ordinary fine-tuning.
    calibration = AbsentClassCalibration()
    checkpoint = ModelCheckpoint(args.output, "best", monitor="val_ausuc" if args.val else None, mode="max")
    trainer = pl.Trainer(
        max_epochs=args.epochs, callbacks=[calibration, checkpoint], logger=False, default_root_dir=args.output
    )
    trainer.fit(module, data)

    best = load_calibrated(TimmClassifier, checkpoint.best_model_path)
    print(f"gamma of {checkpoint.best_model_path}: {get_gamma(best):.4f}")
    fold(best)
    weights = args.output / "weights.pt"
    torch.save(best.model.state_dict(), weights)
    print(f"folded weights, which timm loads without this package: {weights}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name of a timm model")
    parser.add_argument("data", type=Path, help="folder with one folder of images per fine-tuning class")
    parser.add_argument("--classes", type=Path, required=True, help="text file: the class of each row of the head")
    parser.add_argument("--val", type=Path, help="folder with one folder of images per class, absent ones included")
    parser.add_argument("--weights", help="file with the pre-trained weights")
    parser.add_argument("--pretrained", action="store_true", help="let timm download its pre-trained weights")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
