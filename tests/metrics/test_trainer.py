"""Metric objects in a module that logs them, in a real Trainer."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_calibft import functional as F
from lightning_calibft.metrics import AUSUC, AverageLogitGap, SplitAccuracy, absent_class_metrics
from tests.helpers.references import _reference_at_gamma, random_case

LOGITS, TARGET, SEEN, ABSENT = random_case(0)


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(9, 9)
        self.val_ausuc = AUSUC(9, SEEN, ABSENT)
        self.val_acc_absent = SplitAccuracy(9, SEEN, ABSENT, samples="absent", candidates="absent")
        self.gap = AverageLogitGap(9, SEEN, ABSENT)
        self.collection = absent_class_metrics(9, SEEN, ABSENT, prefix="all_")
        self.epochs = []

    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def validation_step(self, batch, _):
        logits = batch[0] * (1 + self.current_epoch)  # another result in each epoch
        self.val_ausuc(logits, batch[1])
        self.val_acc_absent(logits, batch[1])
        self.gap.update(logits, batch[1])
        self.collection.update(logits, batch[1])
        self.log("val_ausuc", self.val_ausuc, on_step=True, on_epoch=True)
        self.log("val_acc_absent", self.val_acc_absent)
        self.log("gap", self.gap)
        self.log_dict(self.collection)

    def on_validation_epoch_end(self):
        self.epochs.append(self.val_ausuc.accuracies(0.25)["all"].item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _run(what, module, folder, **kwargs):
    loader = DataLoader(TensorDataset(LOGITS, TARGET), batch_size=17)
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        **kwargs,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message="The metric received no")  # in the sanity check
        trainer.fit(module, loader, loader) if what == "fit" else trainer.validate(module, loader, verbose=False)
    return trainer


def test_logged_values_are_those_of_the_last_epoch(tmp_path):
    module = Module()
    trainer = _run("fit", module, tmp_path, max_epochs=2)
    args = LOGITS * 2, TARGET, SEEN, ABSENT
    expected = {
        "val_ausuc_epoch": F.ausuc(*args),
        "val_acc_absent": F.split_accuracy(*args, samples="absent", candidates="absent"),
        "gap": F.average_logit_gap(*args).gamma,
        "all_ausuc": F.ausuc(*args),
        "all_acc_harmonic": F.harmonic_mean_accuracy(*args),
    }
    for key, value in expected.items():
        assert trainer.callback_metrics[key].item() == pytest.approx(value.item(), rel=1e-6), key
    expected = [_reference_at_gamma(LOGITS * scale, TARGET, SEEN, ABSENT, 0.25)[2] for scale in (1, 2)]
    assert module.epochs[1:] == pytest.approx(expected)  # the first is the sanity check
    again = Module.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    assert torch.equal(again.layer.weight, module.layer.weight)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_true_half_precision_does_not_reach_the_states(tmp_path, precision):
    module = Module()
    trainer = _run("validate", module, tmp_path, precision=precision)
    assert trainer.callback_metrics["gap"].item() == pytest.approx(
        F.average_logit_gap(LOGITS, TARGET, SEEN, ABSENT).gamma.item(), rel=1e-6
    )
    assert trainer.callback_metrics["val_ausuc_epoch"].item() == pytest.approx(
        F.ausuc(LOGITS, TARGET, SEEN, ABSENT).item(), rel=1e-6
    )
