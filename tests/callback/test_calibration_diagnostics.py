"""CalibrationDiagnostics in real runs."""

from __future__ import annotations

import copy
import html

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import Subset, TensorDataset

from lightning_calibft import AbsentClassCalibration, CalibrationDiagnostics, find_head, get_gamma, set_gamma
from lightning_calibft.analysis import verdict
from tests.callback.diagnosing import HARD, Keep, check_evaluation, check_levels, check_weights, fit, val
from tests.helpers.runs import (
    ABSENT,
    SEEN,
    TRAIN,
    Noisy,
    Plain,
    assert_same,
    blobs,
    loader,
    no_warnings,
    pretrained,
    quiet,
    read,
    trainer_of,
)

pytestmark = quiet


@pytest.mark.parametrize(
    ("calibration", "seen"),
    [("none", SEEN), ("none", None), ("after", SEEN), ("before", None), ("of_the_steps", SEEN)],
)
def test_the_numbers_of_each_validation(tmp_path, calibration, seen):
    """Of the logits without gamma, alone and beside the other callback, whose numbers stay as they are."""
    diagnostics, keep = CalibrationDiagnostics(seen, output="sub/report.html"), Keep()
    other = AbsentClassCalibration(SEEN, source="training_steps" if calibration == "of_the_steps" else "train")
    callbacks = {"none": [diagnostics], "before": [other, diagnostics]}.get(calibration, [diagnostics, other])
    # Beginning with a gamma, which the other callback forgets.
    module = set_gamma(pretrained(), 2.0, SEEN) if calibration == "none" else pretrained()
    trainer, module = fit(tmp_path, *callbacks, keep, module=module, max_epochs=3)
    first, logits = keep.modules[0].fc.weight.detach(), {}
    assert [each.step for each in diagnostics.snapshots] == [0, 6, 12, 18] == sorted(keep.modules)
    assert [each.epoch for each in diagnostics.snapshots] == [0, 1, 2, 3]
    for each in diagnostics.snapshots:
        check_weights(each, first, keep.modules[each.step].fc.weight.detach())
        if each.step == 0:
            assert each.updates is each.levels is each.evaluation is None
        else:
            with torch.no_grad():
                logits = keep.modules[each.step](HARD.tensors[0])
            check_levels(each, logits, HARD.tensors[1])
            check_evaluation(each, logits, HARD.tensors[1])
    assert diagnostics.snapshots[1].evaluation != diagnostics.snapshots[-1].evaluation
    if calibration != "none":
        _, alone = fit(tmp_path, AbsentClassCalibration(SEEN, source=other.source), max_epochs=3)
        assert get_gamma(module) == get_gamma(alone)
        assert not module.fc.absent_class_calibration.recording
        last = diagnostics.snapshots[-1].evaluation
        if calibration != "of_the_steps":  # which logs what is calibrated
            assert trainer.callback_metrics["val_ausuc"] == pytest.approx(last.ausuc)
            assert trainer.callback_metrics["val_acc_absent"] == pytest.approx(last.groups.absent_among_all)
    text = (tmp_path / "sub" / "report.html").read_text()
    assert all(sentence in html.unescape(text) for sentence in verdict(diagnostics.snapshots))
    assert text.count("<svg ") == 7 + (calibration != "none")  # and gamma over the share
    assert not list(tmp_path.glob("**/*.tmp"))
    for part in module.modules():
        assert not [hook for hook in part._forward_hooks.values() if "LogitRecorder" in repr(hook)]


class Dropout(Plain):
    def __init__(self):
        super().__init__(dropout=0.5)


@pytest.mark.parametrize("seen", [SEEN, None])
@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2, "accumulate_grad_batches": 2}])
def test_training_is_bit_identical_and_so_are_the_checkpoints(tmp_path, options, seen):
    outcomes = []
    for name, callbacks in (("without", []), ("with", [CalibrationDiagnostics(seen, output="../report.md")])):
        (tmp_path / name).mkdir()
        checkpoints = ModelCheckpoint(tmp_path / name, save_top_k=-1, every_n_train_steps=3)
        _, module = fit(
            tmp_path / name, *callbacks, checkpoints, module=pretrained(Dropout), train=loader(Noisy(TRAIN)), **options
        )
        files = {path.name: read(path) for path in sorted((tmp_path / name).glob("*.ckpt"))}
        outcomes.append((dict(module.state_dict()), torch.get_rng_state(), files))
    for one, other in zip(*outcomes, strict=True):
        if isinstance(one, dict) and any(name.endswith(".ckpt") for name in one):
            assert len(one) >= 1
            for name in one:
                for checkpoint in (one[name], other[name]):
                    checkpoint["callbacks"] = None
                assert_same(one[name], other[name])
        else:
            assert_same(one, other)
    assert (tmp_path / "report.md").exists()


def test_a_resumed_fit_goes_on(tmp_path):
    train, last = loader(shuffle=False), tmp_path / "last.ckpt"
    whole, resumed, again = (CalibrationDiagnostics() for _ in range(3))
    fit(tmp_path, whole, train=train, max_epochs=4)
    trainer, _ = fit(tmp_path, CalibrationDiagnostics(), train=train, max_epochs=2)
    trainer.save_checkpoint(last)
    trainer = trainer_of(tmp_path, resumed, max_epochs=4)
    trainer.fit(pretrained(), train, val(), ckpt_path=last)
    assert len(resumed.snapshots) == 5
    assert resumed.snapshots == whole.snapshots
    # The classes met before count, if others come no more.
    fewer = trainer_of(tmp_path, again, max_epochs=3)
    fewer.fit(pretrained(), loader(blobs(SEEN[:2], seed=5)), val(), ckpt_path=last)
    assert again.snapshots[:-1] == whole.snapshots[:3]
    # Nothing is left to train, and the report is written all the same.
    trainer.save_checkpoint(last)
    (tmp_path / "calibration_report.md").unlink()
    trainer_of(tmp_path, again, max_epochs=4).fit(pretrained(), train, val(), ckpt_path=last)
    assert again.snapshots == whole.snapshots
    assert (tmp_path / "calibration_report.md").exists()


def test_a_validation_before_the_fit_is_the_first_point(tmp_path):
    diagnostics, module = CalibrationDiagnostics(SEEN), pretrained()
    trainer = trainer_of(tmp_path, diagnostics)
    trainer.validate(module, val(), verbose=False)
    logits = copy.deepcopy(module).eval()(HARD.tensors[0]).detach()
    trainer.fit(module, loader(), val())
    assert [each.step for each in diagnostics.snapshots] == [0, 6, 12]
    check_levels(diagnostics.snapshots[0], logits, HARD.tensors[1])
    check_evaluation(diagnostics.snapshots[0], logits, HARD.tensors[1])
    assert "before fine-tuning" in (tmp_path / "calibration_report.md").read_text()
    # Of another model it is not.
    trainer.validate(Plain(), val(), verbose=False)
    trainer_of(tmp_path, diagnostics).fit(pretrained(), loader(), val())
    assert diagnostics.snapshots[0].evaluation is None
    # Without classes there is nothing to measure yet.
    inferred = CalibrationDiagnostics()
    trainer_of(tmp_path, inferred).validate(module, val(), verbose=False)
    assert inferred.snapshots == []


def test_which_epochs_count(tmp_path):
    for options, steps in (
        ({"every_n_epochs": 3}, [0, 6, 24, 30]),
        ({"every_n_epochs": 10}, [0, 6, 30]),
    ):
        diagnostics = CalibrationDiagnostics(SEEN, **options)
        fit(tmp_path, diagnostics, max_epochs=5, num_sanity_val_steps=2)
        assert [each.step for each in diagnostics.snapshots] == steps
    often = CalibrationDiagnostics(SEEN)
    fit(tmp_path, often, max_epochs=2, val_check_interval=2)
    assert [each.step for each in often.snapshots] == [0, 2, 4, 6, 8, 10, 12]


def test_without_validation_only_weights(tmp_path):
    diagnostics = CalibrationDiagnostics()
    _, module = fit(tmp_path, diagnostics, data=[], limit_val_batches=0)
    assert [each.step for each in diagnostics.snapshots] == [0, 6, 12]
    assert all(each.levels is each.evaluation is None for each in diagnostics.snapshots)
    check_weights(diagnostics.snapshots[-1], pretrained().fc.weight.detach(), module.fc.weight.detach())
    text = (tmp_path / "calibration_report.md").read_text()
    assert "No validation had labeled samples of both" in text
    assert text.count("data:image/svg+xml") == 3


def test_validation_of_seen_classes_alone(tmp_path):
    diagnostics = CalibrationDiagnostics(SEEN)
    with no_warnings("no absent samples"):
        fit(tmp_path, diagnostics, data=val(blobs(SEEN, each=4)))
    last = diagnostics.snapshots[-1]
    assert last.evaluation is None
    assert (last.levels.seen.num_samples, last.levels.absent.num_samples) == (12, 0)
    assert "No validation had labeled samples of both" in (tmp_path / "calibration_report.md").read_text()


def test_all_loaders_are_one_set(tmp_path):
    target = HARD.tensors[1]
    parts = [
        val(Subset(HARD, torch.isin(target, torch.tensor(classes)).nonzero().flatten().tolist()))
        for classes in (SEEN, ABSENT)
    ]
    one, several = CalibrationDiagnostics(SEEN), CalibrationDiagnostics(SEEN)
    fit(tmp_path, one, train=loader(shuffle=False))  # more loaders draw more random numbers
    fit(tmp_path, several, train=loader(shuffle=False), data=parts)
    assert several.snapshots[-1].evaluation == one.snapshots[-1].evaluation


def test_classes_met_later_make_earlier_numbers_void(tmp_path):
    """The last class comes in the second epoch."""

    class Late(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 0:
                batch[1][batch[1] == SEEN[-1]] = SEEN[0]

    diagnostics = CalibrationDiagnostics()
    fit(tmp_path, Late(), diagnostics, max_epochs=3)
    assert [each.step for each in diagnostics.snapshots] == [0, 12, 18]
    assert diagnostics._history.split.seen_classes == tuple(SEEN)


def test_arguments_and_what_is_refused(tmp_path):
    for arguments, message in (
        ({"every_n_epochs": 0}, "`every_n_epochs` to be at least 1, but got 0"),
        ({"every_n_epochs": True}, "`every_n_epochs` to be an integer, but got True"),
        ({"output": "report.pdf"}, r"end in .md or .html, but got 'report.pdf'"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            CalibrationDiagnostics(**arguments)
    with pytest.raises(ValueError, match="class ids in"):
        fit(tmp_path, CalibrationDiagnostics([0, 6]))
    with pytest.raises(RuntimeError, match="CalibrationDiagnostics does not support ModelParallelStrategy"):
        fit(tmp_path, CalibrationDiagnostics(), strategy=ModelParallelStrategy())


def test_a_report_that_cannot_be_written_does_not_fail_the_fit(tmp_path):
    (tmp_path / "calibration_report.md").mkdir()
    (tmp_path / "calibration_report.md" / "file").touch()
    diagnostics = CalibrationDiagnostics(SEEN)
    with pytest.warns(UserWarning, match="could not write its report"):
        trainer, _ = fit(tmp_path, diagnostics)
    assert trainer.state.finished
    assert not list(tmp_path.glob("*.tmp"))


def test_after_an_exception_nothing_listens(tmp_path):
    class Fails(Plain):
        def validation_step(self, batch, batch_idx):
            if self.global_step:
                raise ArithmeticError

    module = Fails()
    with pytest.raises(ArithmeticError):
        fit(tmp_path, CalibrationDiagnostics(SEEN), module=module)
    assert not find_head(module)._forward_hooks
    assert not (tmp_path / "calibration_report.md").exists()


class Named(TensorDataset):
    classes = ("ant", "bee", "cat", "dog", "emu", "<fox>")


@pytest.mark.parametrize("estimator", ["alg", "pcv"])
@pytest.mark.parametrize("output", ["report.html", "report.md"])
def test_the_report_has_what_the_other_callback_found(tmp_path, output, estimator):
    """Gamma also if it is found only when the fit has ended, on the curve of the last validation."""
    diagnostics, other = CalibrationDiagnostics(output=output), AbsentClassCalibration(estimator=estimator)
    checkpoints = ModelCheckpoint(tmp_path)
    train, data = loader(Named(*TRAIN.tensors)), val(Named(*HARD.tensors))
    _, module = fit(tmp_path, checkpoints, other, diagnostics, train=train, data=data, enable_checkpointing=True)
    text = html.unescape((tmp_path / output).read_text()).replace("\\", "")
    result = other.result
    assert result.gamma == pytest.approx(get_gamma(module), rel=1e-5)
    assert f"Gamma of the model: {result.gamma:.3f} ± {result.standard_error:.3f} ({estimator}" in text
    assert "Model: Plain" in text
    logits = copy.deepcopy(module).eval()(HARD.tensors[0]).detach()  # with gamma
    target = HARD.tensors[1]
    of_groups = [(logits.argmax(1) == target)[torch.isin(target, torch.tensor(group))] for group in (SEEN, ABSENT)]
    row = ["calibrated", f"{result.gamma:.3f}", *(f"{right.double().mean():.3f}" for right in of_groups)]
    assert ("".join(f"<td>{cell}</td>" for cell in row) if output.endswith("html") else " | ".join(row)) in text
    assert "5 <fox>" in text
    if output.endswith("html"):
        assert "<!-- step 12, calibrated (gamma" in text
        assert "<!-- step 6, best (gamma" in text


def test_the_names_of_rows(tmp_path):
    """Given, or those of the dataset, by way of its class map. Without the other callback, there is no gamma."""
    order, names = [3, 0, 2, 5, 4, 1], [f"row {row}" for row in range(6)]
    train, data = (Named(inputs, torch.tensor(order).argsort()[y]) for inputs, y in (TRAIN.tensors, HARD.tensors))

    class Mapped(Plain):
        def loss(self, batch):
            return super().loss((batch[0], torch.tensor(order)[batch[1]]))

    for options, expected in (
        ({}, ["0 bee", "2 cat", "3 ant"]),
        ({"label_names": names}, ["0 row 0", "2 row 2", "3 row 3"]),
    ):
        diagnostics = CalibrationDiagnostics(SEEN, class_map=order, **options)
        fit(tmp_path, diagnostics, module=pretrained(Mapped), train=loader(train), data=val(data))
        text = (tmp_path / "calibration_report.md").read_text()
        assert f"Seen classes (3): {', '.join(expected)}\n" in text
        assert "Gamma of the model" not in text
