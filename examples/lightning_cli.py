"""LightningCLI takes the callback from a config file, as any other callback.

    python examples/lightning_cli.py fit --config examples/lightning_cli.yaml
    python examples/lightning_cli.py test --config examples/lightning_cli.yaml --ckpt_path outputs/cli/best.ckpt

Only ``lightning_cli.yaml`` knows of absent classes. The images and the network are those of ``digits.py``.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch.nn.functional as F
from digits_data import keep_classes, make_data
from digits_module import DigitClassifier
from lightning.pytorch.cli import LightningCLI
from torch import Tensor
from torch.utils.data import DataLoader


class Classifier(DigitClassifier):
    """The network of ``digits.py``, with a test step."""

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss."""
        images, labels = batch
        self.log("test_loss", F.cross_entropy(self(images), labels))


class Digits(pl.LightningDataModule):
    """Five of the ten digits to fine-tune on, all ten to validate and to test on.

    Args:
        seed: Decides which five, and the images.
        batch_size: Number of images in a batch.
    """

    def __init__(self, seed: int = 0, batch_size: int = 32) -> None:
        super().__init__()
        self.data = make_data(seed)
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        """The fine-tuning classes."""
        seen_only = keep_classes(self.data.target_train, self.data.seen_classes)
        return DataLoader(seen_only, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """All classes."""
        return DataLoader(self.data.held_out, self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """All classes."""
        return DataLoader(self.data.target_test, self.batch_size)


class DigitsCLI(LightningCLI):
    """Pre-trains on all ten digits, where your project loads pre-trained weights."""

    def before_fit(self) -> None:
        """Give the model weights that know all classes."""
        pretrained = Classifier()
        trainer = pl.Trainer(max_epochs=20, accelerator="cpu", limit_val_batches=0, barebones=True)
        trainer.fit(pretrained, DataLoader(self.datamodule.data.source, batch_size=64, shuffle=True))
        self.model.load_state_dict(pretrained.state_dict())


if __name__ == "__main__":
    DigitsCLI(Classifier, Digits)
