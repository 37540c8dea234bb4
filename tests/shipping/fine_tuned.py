"""A timm model that was fine-tuned on some of its classes, with the callback."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_calibft import AbsentClassCalibration
from tests.shipping.consumer import Classifier

SEEN = [1, 4, 7]


def train(folder):
    """Fine-tune a timm model on three of ten classes, with the callback, in a real Trainer."""
    pl.seed_everything(0)
    target = torch.tensor(SEEN).repeat(16)
    images = torch.randn(48, 3, 32, 32) + target[:, None, None, None] / 5
    loader = DataLoader(TensorDataset(images, target), 16)
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[AbsentClassCalibration(), ModelCheckpoint(folder, "best")],
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), loader)
    return folder / "best.ckpt"
