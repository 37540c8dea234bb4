"""A plain LightningModule, as a project has it before it hears of absent classes: no word of lightning_calibft."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DigitClassifier(pl.LightningModule):
    """Three convolution blocks, average pooling and a linear head; ordinary cross-entropy over all classes.

    Args:
        optimizer: ``"adamw"`` or ``"sgd"``, with a cosine schedule.
        learning_rate: The learning rate at the start.
        num_classes: Number of classes.
    """

    def __init__(self, optimizer: str = "adamw", learning_rate: float = 3e-3, num_classes: int = 10) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(
            *_block(1, 16),
            nn.MaxPool2d(2),
            *_block(16, 32),
            nn.MaxPool2d(2),
            *_block(32, 64),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, 1, H, W)`` to logits ``(N, C)``."""
        return self.head(self.backbone(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy over all classes, whichever of them the batch holds."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss."""
        images, labels = batch
        self.log("val_loss", F.cross_entropy(self(images), labels))

    def configure_optimizers(self) -> dict[str, Any]:
        """Build the optimizer and a cosine schedule over all steps."""
        rate = self.hparams["learning_rate"]
        if self.hparams["optimizer"] == "sgd":
            optimizer = torch.optim.SGD(self.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _block(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.GroupNorm(4, channels_out), nn.ReLU()
