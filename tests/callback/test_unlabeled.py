"""Gamma for the share of absent samples in unlabeled data, at the end of a fit."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_calibft import AbsentClassCalibration, get_gamma, inspect_checkpoint
from lightning_calibft.estimators import PseudoAbsent
from lightning_calibft.functional.absent_share import estimate_share
from lightning_calibft.metrics import AbsentShare
from tests.helpers.runs import (
    ABSENT,
    NUM_CLASSES,
    SEEN,
    TRAIN,
    Plain,
    Unlisted,
    assert_same,
    blobs,
    build,
    loader,
    no_warnings,
    pretrained,
    quiet,
    raw_logits,
    trainer_of,
)

pytestmark = quiet

HELD_OUT = blobs(SEEN, each=20, seed=7)
TRAFFIC = torch.cat([blobs(SEEN, each=20, seed=8).tensors[0], blobs(ABSENT, each=5, seed=8).tensors[0]])


class WithTraffic(Plain):
    def unlabeled_dataloader(self):
        return DataLoader(TRAFFIC, 8)


def fitted(folder, make=Plain, callbacks=(), **options):
    module = pretrained(make)
    callback = AbsentClassCalibration(**{"estimator": "pseudo_absent", **options})
    torch.manual_seed(0)
    trainer_of(folder, callback, *callbacks, logger=False).fit(module, loader(), loader(HELD_OUT, 8, False))
    return module, callback.result


def assert_for_traffic(state, result, labeled=HELD_OUT):
    """The share is that of both models, of these weights and of those before the fit."""
    first, before, (x, y) = pretrained().eval(), PseudoAbsent(NUM_CLASSES, SEEN), labeled.tensors
    with torch.no_grad():
        logits, of_traffic = first(x), first(TRAFFIC)
    before.update(logits, y, logits)
    counted = []
    for rows, table in ((raw_logits(state, TRAFFIC), result.share_table), (of_traffic, before.share_table)):
        metric = AbsentShare(NUM_CLASSES, SEEN, share_table=table, half_life=None)
        metric.update(rows)
        counted.append(metric.counted)
    estimate = estimate_share(*counted)
    assert result.absent_share == pytest.approx(estimate.share.item(), rel=1e-5)
    assert result.absent_share_interval == pytest.approx(estimate.interval.tolist())
    assert result.gamma == pytest.approx(result.share_table.at(result.absent_share)["gamma"])


@pytest.mark.parametrize("way", ["loader", "list of tensors", "method"])
def test_the_share_of_the_data(tmp_path, way, caplog):
    given = {"loader": DataLoader(TensorDataset(TRAFFIC), 8), "list of tensors": list(TRAFFIC.split(16))}
    options = {"unlabeled": given[way]} if way in given else {}
    with caplog.at_level(logging.INFO):
        module, result = fitted(tmp_path, WithTraffic if way == "method" else Plain, **options)
    assert_for_traffic(module.state_dict(), result)
    low, high = result.absent_share_interval
    assert f"estimated from unlabeled samples; 90 % interval {low:.1%} to {high:.1%}" in caplog.text
    assert get_gamma(module) == pytest.approx(result.gamma, rel=1e-6)


def test_each_file_has_the_share_of_its_own_weights(tmp_path):
    files = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1)
    module = pretrained()
    callback = AbsentClassCalibration(estimator="pseudo_absent", unlabeled=DataLoader(TRAFFIC, 8))
    trainer = trainer_of(tmp_path, callback, files, max_epochs=2, enable_checkpointing=True, logger=False)
    trainer.fit(module, loader(), loader(HELD_OUT, 8, False))
    assert len(callback.checkpoint_results) == 2
    shares = set()
    for path, result in callback.checkpoint_results.items():
        state = torch.load(path, weights_only=True)["state_dict"]
        assert_for_traffic(state, result)
        told = inspect_checkpoint(path)
        assert told["absent_share"] == result.absent_share
        assert told["absent_share_interval"] == list(result.absent_share_interval)
        shares.add(result.absent_share)
    assert len(shares) == 2


def test_the_training_data_in_place_of_validation_data_that_does_not_do(tmp_path):
    """Both models are then read on the same samples."""
    few = DataLoader(Unlisted(blobs([SEEN[0], *(6 * ABSENT)], each=3, seed=7)), 8)
    module = pretrained()
    callback = AbsentClassCalibration(estimator="pseudo_absent", unlabeled=DataLoader(TRAFFIC, 8))
    with pytest.warns(UserWarning, match="since the validation data has 3 samples of seen classes"):
        trainer_of(tmp_path, callback, logger=False).fit(module, loader(), few)
    assert callback.result.num_samples == len(TRAIN)
    assert_for_traffic(module.state_dict(), callback.result, TRAIN)


def test_training_is_the_same_without_it(tmp_path):
    without, _ = fitted(tmp_path)
    with_it, _ = fitted(tmp_path, unlabeled=DataLoader(TRAFFIC, 8, shuffle=True))
    plain = [{k: v for k, v in each.state_dict().items() if "absent_class" not in k} for each in (without, with_it)]
    assert_same(*plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "alg"}, "`estimator` to know the margins .* but got 'alg'"),
        ({"estimator": "pcv"}, "but got 'pcv'"),
        ({"absent_share": 0.2}, "`absent_share` to be None with `unlabeled`"),
        ({"unlabeled": iter([TRAFFIC])}, "can be read only once. Pass a list or a DataLoader"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        AbsentClassCalibration(**{"estimator": "pseudo_absent", "unlabeled": [TRAFFIC], **options})


class OnlySteps(Plain):
    """Prepares the inputs in its steps, so that `forward` alone gives other logits."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0] * 2, batch[1]), batch_idx)

    def validation_step(self, batch, batch_idx):
        return super().validation_step((batch[0] * 2, batch[1]), batch_idx)


@pytest.mark.parametrize(
    ("unlabeled", "message"), [([TRAFFIC[:, :2]], "Could not read the logits"), ([], "at least one batch")]
)
def test_what_cannot_be_read_is_told_before_the_first_step(tmp_path, unlabeled, message):
    module = pretrained()
    before = copy.deepcopy(module.state_dict())
    callback = AbsentClassCalibration(estimator="pseudo_absent", unlabeled=unlabeled)
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, callback, logger=False).fit(module, loader(), loader(HELD_OUT, 8, False))
    assert all(torch.equal(module.state_dict()[key], before[key]) for key in before)


def test_a_module_whose_steps_prepare_the_inputs(tmp_path):
    """What the steps do is known only after the first one. The run of the user is complete when it is told."""
    callback = AbsentClassCalibration(estimator="pseudo_absent", unlabeled=[TRAFFIC])
    trainer = trainer_of(tmp_path, callback, logger=False)
    with pytest.raises(ValueError, match="`unlabeled` to be None for a OnlySteps, whose `forward`"):
        trainer.fit(pretrained(OnlySteps), loader(), loader(HELD_OUT, 8, False))
    assert trainer.global_step > 0


def test_a_method_that_is_there_for_other_uses(tmp_path):
    module = build(WithTraffic)
    callback = AbsentClassCalibration()
    with pytest.warns(UserWarning, match=r"`unlabeled_dataloader\(\)` is not read for gamma"):
        trainer_of(tmp_path, callback, logger=False).fit(module, loader())
    assert callback.result.absent_share is None
    with no_warnings("unlabeled_dataloader"):
        fitted(tmp_path, WithTraffic)
