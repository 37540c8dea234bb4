"""The callback in real trainings with the Trainer of transformers."""

from __future__ import annotations

import importlib
import json
import random
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import IterableDataset

from lightning_calibft import attach, export, get_gamma, inspect_checkpoint, load_calibrated, set_gamma
from lightning_calibft.checkpoint.state import MASK, OFFSET
from lightning_calibft.estimators import PseudoAbsent
from lightning_calibft.functional import ausuc, split_accuracy
from lightning_calibft.functional.absent_share import estimate_share
from lightning_calibft.metrics import AbsentShare

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from lightning_calibft.integrations import AbsentClassCalibrationCallback  # noqa: E402
from tests.integrations.hugging_face import (  # noqa: E402
    ABSENT,
    HELD_OUT,
    NUM_CLASSES,
    SEEN,
    TRAIN,
    VAL,
    Samples,
    Texts,
    Then,
    bert,
    folders,
    logits_of,
    pad,
    reference,
    trainer_of,
    vit,
)

# Once per run, torch says that it has nothing to pin memory for, and transformers that a model has no tokenizer.
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")
SECONDS = ("runtime", "per_second", "preparation_time")
METRICS = {f"eval_{name}" for name in ("ausuc", "acc_all", "acc_seen", "acc_absent", "acc_harmonic")}


def without_seconds(logs):
    return [{key: value for key, value in log.items() if not key.endswith(SECONDS)} for log in logs]


def mean_of_first(prediction):
    return {"mean": float(prediction.predictions[:, 0].mean())}


def streams():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def assert_calibrated(result, model, data=TRAIN):
    gamma, error, count = reference(model, data)
    assert result.gamma == pytest.approx(gamma, rel=1e-5)
    assert result.standard_error == pytest.approx(error, rel=1e-3)
    assert result.num_samples == count
    assert result.split.seen_classes == tuple(SEEN)


class Run:
    """A training with dropout that saves two folders, and what it leaves."""

    def __init__(self, folder, *callbacks, **arguments):
        model = vit(hidden_dropout_prob=0.2)
        self.folder = folder
        self.trainer = trainer_of(folder, model, *callbacks, metrics=mean_of_first, **arguments)
        self.trainer.train()
        self.model = self.trainer.model
        self.weights = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.streams = streams()
        self.log = without_seconds(self.trainer.state.log_history)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    callback = AbsentClassCalibrationCallback()
    run = Run(tmp_path_factory.mktemp("calibrated"), callback)
    run.callback = callback
    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("plain"))


def test_gamma_at_the_end(calibrated):
    assert_calibrated(calibrated.callback.result, calibrated.model)
    assert get_gamma(calibrated.model) == pytest.approx(calibrated.callback.result.gamma)
    raw = logits_of(calibrated.model, VAL)
    with torch.no_grad():
        logits = calibrated.model.eval()(pixel_values=VAL.images).logits
    expected = raw + get_gamma(calibrated.model) * torch.tensor([row in ABSENT for row in range(NUM_CLASSES)])
    torch.testing.assert_close(logits, expected)


def test_gamma_in_each_folder(calibrated):
    found = {}
    for folder in folders(calibrated.folder):
        plain_model = transformers.AutoModelForImageClassification.from_pretrained(folder)
        result = calibrated.callback.checkpoint_results[str(folder)]
        assert_calibrated(result, plain_model)
        assert get_gamma(plain_model) is None
        loaded = load_calibrated(transformers.AutoModelForImageClassification, folder)
        assert get_gamma(loaded) == pytest.approx(result.gamma)
        assert not loaded.training
        told = inspect_checkpoint(folder)
        assert told["calibrated"]
        assert told["seen_classes"] == SEEN
        assert told["absent_classes"] == ABSENT
        assert told["num_samples"] == len(TRAIN)
        found[folder.name] = result.gamma
    assert list(found) == ["checkpoint-3", "checkpoint-6"]
    assert abs(found["checkpoint-3"] - found["checkpoint-6"]) > 0.01
    assert found["checkpoint-6"] == calibrated.callback.result.gamma


def test_the_run_is_the_same(calibrated, plain):
    """Weights, random states, what is logged, and all files, up to the calibration's two entries."""
    assert calibrated.streams == plain.streams
    assert calibrated.log == plain.log
    own = {key for key in calibrated.weights if key.endswith((OFFSET, MASK))}
    assert own == {f"classifier.{OFFSET}", f"classifier.{MASK}"}
    assert calibrated.weights.keys() - own == plain.weights.keys()
    assert all(torch.equal(calibrated.weights[key], value) for key, value in plain.weights.items())
    for folder in folders(plain.folder):
        other = calibrated.folder / folder.name
        assert {path.name for path in other.iterdir()} == {path.name for path in folder.iterdir()}
        state = load_file(other / "model.safetensors")
        assert {state.pop(f"classifier.{each}").shape for each in (OFFSET, MASK)} == {(), (NUM_CLASSES,)}
        expected = load_file(folder / "model.safetensors")
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], value) for key, value in expected.items())
        for name in ("config.json", "rng_state.pth", "scheduler.pt", "optimizer.pt"):
            assert (other / name).read_bytes() == (folder / name).read_bytes(), name
        logs = [json.loads((each / "trainer_state.json").read_text())["log_history"] for each in (other, folder)]
        assert without_seconds(logs[0]) == without_seconds(logs[1])


def test_metrics_of_an_evaluation(calibrated, plain):
    raw, target = logits_of(calibrated.model, VAL), torch.tensor(VAL.target)
    logits = raw + get_gamma(calibrated.model) * torch.tensor([row in ABSENT for row in range(NUM_CLASSES)])
    after = []
    for each in (plain, calibrated):
        torch.manual_seed(0)
        metrics = each.trainer.evaluate()
        after.append(streams())
    assert after[0] == after[1]
    assert metrics.keys() >= METRICS
    assert metrics["eval_ausuc"] == pytest.approx(float(ausuc(raw, target, SEEN)), abs=1e-6)
    for samples in ("all", "seen", "absent"):
        expected = float(split_accuracy(logits, target, SEEN, samples=samples))
        assert metrics[f"eval_acc_{samples}"] == pytest.approx(expected, abs=1e-6)
    # What the user measures is of the calibrated model, as it is used.
    assert metrics["eval_mean"] == pytest.approx(float(logits[:, 0].mean()), abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, target)), abs=1e-5)
    assert calibrated.trainer.state.log_history[-1]["eval_ausuc"] == metrics["eval_ausuc"]
    of_test = calibrated.trainer.predict(VAL, metric_key_prefix="held_out").metrics
    assert of_test["held_out_acc_absent"] == metrics["eval_acc_absent"]


def test_names_of_the_user_and_data_without_labels(tmp_path):
    def own(prediction):
        return {"acc_all": 7.0}

    model = set_gamma(vit(), 1.5, SEEN)
    trainer = trainer_of(tmp_path, model, AbsentClassCalibrationCallback(), metrics=own)
    with pytest.warns(UserWarning, match="leaves eval_acc_all as `compute_metrics` returns it"):
        metrics = trainer.evaluate()
    assert metrics["eval_acc_all"] == 7.0
    assert "eval_acc_seen" in metrics
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert "test_ausuc" not in trainer.predict(Unlabeled(SEEN, 2)).metrics


def test_the_best_model_by_a_metric_of_ours(tmp_path):
    """Gamma is that of the weights that are loaded at the end, and metrics during training are those without it."""
    callback = AbsentClassCalibrationCallback(SEEN, log_metrics="always")
    options = {"load_best_model_at_end": True, "metric_for_best_model": "ausuc", "greater_is_better": True}
    texts = {"train": Texts(SEEN, 8), "val": Texts(range(NUM_CLASSES), 4, seed=1), "collator": pad}
    options |= {"save_total_limit": 1, "max_steps": 9, "learning_rate": 0.1}
    trainer = trainer_of(tmp_path, bert(), callback, **texts, **options)
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert all(log.keys() >= METRICS for log in evaluations)
    best = max(evaluations, key=lambda log: log["eval_ausuc"])
    (kept,) = folders(tmp_path)
    assert kept.name == f"checkpoint-{best['step']}"
    loaded = transformers.BertForSequenceClassification.from_pretrained(kept)
    state = trainer.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in loaded.state_dict().items())
    assert callback.result == callback.checkpoint_results[str(kept)]
    assert inspect_checkpoint(kept)["gamma"] == pytest.approx(get_gamma(trainer.model))
    metrics = trainer.evaluate()
    assert metrics["eval_ausuc"] == pytest.approx(best["eval_ausuc"])
    with torch.no_grad():
        batch = pad([texts["train"][row] for row in range(len(texts["train"]))])
        target = batch.pop("labels")
        logits = loaded.eval()(**batch).logits
    others = logits[:, SEEN].sum(1) - logits.gather(1, target[:, None])[:, 0]
    gap = others / (len(SEEN) - 1) - logits[:, ABSENT].mean(1)
    assert callback.result.gamma == pytest.approx(float(gap.mean()), rel=1e-4)


def test_the_training_goes_on_from_a_calibrated_folder(tmp_path):
    """As from one without gamma: training does not see it. All folders of both parts get theirs."""
    whole = trainer_of(tmp_path / "whole", bert(), AbsentClassCalibrationCallback(), **TEXTS)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "part" / "checkpoint-3")
    callback = AbsentClassCalibrationCallback()
    resumed = trainer_of(tmp_path / "part", bert(), callback, **TEXTS)
    resumed.train(resume_from_checkpoint=True)
    assert without_seconds(resumed.state.log_history)[:-1] == without_seconds(whole.state.log_history)[:-1]
    state = whole.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in resumed.model.state_dict().items())
    assert [Path(folder).name for folder in callback.checkpoint_results] == ["checkpoint-3", "checkpoint-6"]
    for name in ("checkpoint-3", "checkpoint-6"):
        gammas = {inspect_checkpoint(tmp_path / part / name)["gamma"] for part in ("whole", "part")}
        assert len(gammas) == 1


TEXTS = {"train": Texts(SEEN, 8), "val": None, "collator": pad, "eval_strategy": "no", "logging_steps": 1}


class InParts(transformers.Trainer):
    """Saves weights in files of a few kilobytes."""

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        Path(output_dir, "model.safetensors").unlink()
        self.model.save_pretrained(output_dir, max_shard_size="1KB")


def test_weights_in_several_files(tmp_path):
    callback = AbsentClassCalibrationCallback()
    trainer_of(tmp_path, vit(), callback, kind=InParts, save_steps=6).train()
    (folder,) = folders(tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert index["weight_map"][f"classifier.{OFFSET}"] == index["weight_map"]["classifier.weight"]
    states = {name: load_file(folder / name) for name in files}
    assert all(key in states[name] for key, name in index["weight_map"].items())
    sizes = [value.nbytes for state in states.values() for value in state.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    loaded = load_calibrated(transformers.ViTForImageClassification, folder)
    assert get_gamma(loaded) == pytest.approx(callback.checkpoint_results[str(folder)].gamma)
    assert_calibrated(callback.result, loaded)


def test_export_for_from_pretrained(calibrated, tmp_path):
    metrics = calibrated.trainer.evaluate()
    export(calibrated.model, tmp_path / "shipped", result=calibrated.callback.result, metrics=metrics)
    card = ModelCard.load(tmp_path / "shipped" / "README.md")
    assert card.data.library_name == "transformers"
    measured = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert measured["eval_acc_absent"] == metrics["eval_acc_absent"]
    assert "- seen classes (3): LABEL_0, LABEL_2, LABEL_3" in card.text
    assert f"- gamma: {calibrated.callback.result.gamma:.3f} ±" in card.text
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "shipped").eval()
    with torch.no_grad():
        expected = calibrated.model.eval()(pixel_values=VAL.images).logits
        torch.testing.assert_close(loaded(pixel_values=VAL.images).logits, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="holds no gamma that is not folded into the bias"):
        load_calibrated(transformers.AutoModelForImageClassification, tmp_path / "shipped")


@pytest.mark.parametrize("on_head", [{"modules_to_save": ["classifier"]}, {"target_modules": ["query", "classifier"]}])
def test_adapters_of_peft(tmp_path, on_head):
    peft = pytest.importorskip("peft")
    bert().save_pretrained(tmp_path / "base")
    base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, task_type="SEQ_CLS", **{"target_modules": ["query"], **on_head})
    callback = AbsentClassCalibrationCallback()
    trainer = trainer_of(tmp_path / "run", peft.get_peft_model(base, config), callback, **TEXTS)
    trainer.train()
    first, last = folders(tmp_path / "run")
    results = [callback.checkpoint_results[str(folder)] for folder in (first, last)]
    assert results[1] == callback.result
    assert abs(results[0].gamma - results[1].gamma) > 1e-3
    batch = pad([TEXTS["train"][row] for row in range(len(TEXTS["train"]))])
    target = batch.pop("labels")
    for folder, result in zip((first, last), results, strict=True):
        plain_model = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=NUM_CLASSES).eval()
        with torch.no_grad():
            logits = plain_model(**batch).logits
        others = logits[:, SEEN].sum(1) - logits.gather(1, target[:, None])[:, 0]
        gap = others / (len(SEEN) - 1) - logits[:, ABSENT].mean(1)
        assert result.gamma == pytest.approx(float(gap.mean()), rel=1e-4)
        loaded = load_calibrated(peft.AutoPeftModelForSequenceClassification, folder, num_labels=NUM_CLASSES)
        assert get_gamma(loaded) == pytest.approx(result.gamma)
        with torch.no_grad():
            shift = result.gamma * torch.tensor([row in ABSENT for row in range(NUM_CLASSES)])
            torch.testing.assert_close(loaded(**batch).logits, logits + shift)


def test_half_precision(tmp_path):
    callback = AbsentClassCalibrationCallback()
    trainer = trainer_of(tmp_path, vit(), callback, bf16=True, save_steps=6)
    trainer.train()
    with torch.autocast("cpu", torch.bfloat16):
        gamma, *_ = reference(trainer.model)
    assert callback.result.gamma == pytest.approx(gamma, rel=1e-2)
    assert trainer.model.classifier.absent_class_calibration.offset.dtype == torch.float32
    assert "eval_acc_absent" in trainer.evaluate()
    (folder,) = folders(tmp_path)
    assert inspect_checkpoint(folder)["gamma"] == pytest.approx(callback.result.gamma)


def test_losses_that_take_the_labels_away(tmp_path):
    """With label smoothing, the Trainer does not pass them to the model."""
    callback = AbsentClassCalibrationCallback()
    trainer = trainer_of(tmp_path, vit(), callback, label_smoothing_factor=0.1, save_strategy="no")
    trainer.train()
    assert_calibrated(callback.result, trainer.model)
    assert trainer.evaluate().keys() >= METRICS


class Stream(IterableDataset):
    """A stream that never ends."""

    def __iter__(self):
        while True:
            yield from (TRAIN[row] for row in range(len(TRAIN)))


def test_an_endless_stream(tmp_path):
    """It is read for as many batches as training has read: 6 of 8 samples, which are all and the first 15 again."""
    callback = AbsentClassCalibrationCallback()
    trainer = trainer_of(tmp_path, vit(), callback, train=Stream(), save_strategy="no")
    trainer.train()
    twice = Samples(SEEN, 11)
    rows = [*range(33), *range(15)]
    twice.images, twice.target = twice.images[rows], [twice.target[row] for row in rows]
    assert_calibrated(callback.result, trainer.model, twice)


class OneTime(IterableDataset):
    def __init__(self):
        self.rows = iter(TRAIN[row % len(TRAIN)] for row in range(1000))

    def __iter__(self):
        return self.rows


def test_other_data_for_gamma(tmp_path):
    clean = Samples(SEEN, 4, seed=5)
    with pytest.warns(UserWarning, match="its dataset holds an iterator"):
        trainer_of(tmp_path, vit(), AbsentClassCalibrationCallback(), train=OneTime(), save_strategy="no").train()
    callback = AbsentClassCalibrationCallback(calibration_dataset=clean)
    trainer = trainer_of(tmp_path, vit(), callback, train=OneTime(), save_strategy="no")
    trainer.train()
    assert_calibrated(callback.result, trainer.model, clean)


def test_samples_of_all_classes(tmp_path):
    with pytest.raises(ValueError, match="`calibration_dataset` to be a dataset with samples of absent classes"):
        AbsentClassCalibrationCallback(estimator="operating_point")
    callback = AbsentClassCalibrationCallback(SEEN, estimator="operating_point", calibration_dataset=VAL)
    trainer = trainer_of(tmp_path, vit(), callback, save_strategy="no")
    trainer.train()
    assert callback.result.num_samples == len(VAL)


class Unlabeled(Samples):
    def __getitem__(self, index):
        return {"pixel_values": self.images[index]}


@pytest.mark.parametrize("kind", [Unlabeled, Samples])
def test_the_share_of_unlabeled_samples(tmp_path, plain, kind):
    """Each folder has the share that its own weights see, and training is that without them."""
    traffic = kind([*SEEN, *SEEN, *SEEN, *ABSENT], 6, seed=9)
    callback = AbsentClassCalibrationCallback(
        estimator="pseudo_absent", calibration_dataset=HELD_OUT, unlabeled_dataset=traffic
    )
    run = Run(tmp_path, callback)
    assert run.streams == plain.streams
    assert all(torch.equal(run.weights[key], value) for key, value in plain.weights.items())

    def counted(model, table):
        share = AbsentShare(NUM_CLASSES, SEEN, share_table=table, half_life=None)
        share.update(logits_of(model, traffic))
        return share.counted

    first, before = vit(hidden_dropout_prob=0.2), PseudoAbsent(NUM_CLASSES, SEEN)
    logits = logits_of(first, HELD_OUT)
    before.update(logits, torch.tensor(HELD_OUT.target), logits)
    results = [callback.result, *callback.checkpoint_results.values()]
    models = [run.model, *map(transformers.ViTForImageClassification.from_pretrained, callback.checkpoint_results)]
    assert len(results) == 3
    for result, model in zip(results, models, strict=True):
        estimate = estimate_share(counted(model, result.share_table), counted(first, before.share_table))
        assert result.absent_share == pytest.approx(float(estimate.share), rel=1e-4)
        assert result.gamma == pytest.approx(result.share_table.at(result.absent_share)["gamma"])
    assert get_gamma(run.model) == pytest.approx(callback.result.gamma)
    assert len({result.absent_share for result in results}) == 2
    (told, *_) = map(inspect_checkpoint, callback.checkpoint_results)
    assert told["absent_share_interval"] == list(results[1].absent_share_interval)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"estimator": "alg"}, "`estimator` to know the margins"),
        ({"absent_share": 0.2}, "`absent_share` to be None with `unlabeled`"),
        ({"unlabeled_dataset": []}, "`unlabeled_dataset` to hold at least one sample, but got none"),
        ({"unlabeled_dataset": OneTime()}, "`unlabeled_dataset` to be data that can be read again"),
        ({"unlabeled_dataset": [{"name": "image"}]}, "Expected an unlabeled batch to hold a tensor"),
    ],
)
def test_unlabeled_samples_that_are_refused_before_training(tmp_path, options, match):
    given = {"estimator": "pseudo_absent", "calibration_dataset": VAL, "unlabeled_dataset": Unlabeled(SEEN, 1)}
    model = vit()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        trainer_of(tmp_path, model, AbsentClassCalibrationCallback(SEEN, **{**given, **options})).train()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()


def test_the_weights_before_fine_tuning(tmp_path):
    """They are those that training begins with, also if it resumes, unless the model already has others then."""
    path = str(tmp_path / "checkpoint-3")
    first, resumed, unknown, given = (
        AbsentClassCalibrationCallback(
            estimator="pseudo_absent", calibration_dataset=Texts(SEEN, 20, 3), pretrained=pretrained
        )
        for pretrained in (None, None, None, bert())
    )
    trainer_of(tmp_path, bert(), first, **TEXTS).train()
    trainer_of(tmp_path, bert(), resumed, **TEXTS).train(resume_from_checkpoint=path)
    tuned = transformers.BertForSequenceClassification.from_pretrained(path)
    with pytest.raises(ValueError, match="`pretrained` to be the model before fine-tuning"):
        trainer_of(tmp_path, tuned, unknown, **TEXTS).train(resume_from_checkpoint=path)
    trainer_of(tmp_path, tuned, given, **TEXTS).train(resume_from_checkpoint=path)
    for callback in (resumed, given):
        assert callback.result.gamma == pytest.approx(first.result.gamma, rel=1e-5)
    on_training_data = AbsentClassCalibrationCallback(estimator="pseudo_absent")
    with pytest.warns(UserWarning, match="learned it by heart"):
        trainer_of(tmp_path, bert(), on_training_data, **TEXTS).train()


class Floats(Samples):
    def __getitem__(self, index):
        labels = nn.functional.one_hot(torch.tensor(self.target[index]), NUM_CLASSES).float()
        return {"pixel_values": self.images[index], "labels": labels}


class Broken(Samples):
    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.target[index] + 9}


REFUSED = {
    "regression": (vit, {}, {"problem_type": "regression"}, "`config.problem_type` is 'regression'"),
    "several labels": (vit, {}, {"problem_type": "multi_label_classification"}, "'multi_label_classification'"),
    "labels as floats": (vit, {"train": Floats(SEEN, 4, listed=False)}, {}, "Expected integers as labels"),
    "no absent class": (vit, {"train": VAL}, {}, "absent"),
    "one output": (lambda: _one_output(), {}, {}, "binary classifier or a regression"),
    "labels outside": (vit, {"train": Broken(SEEN, 4, listed=False)}, {}, "rows of the classification head"),
}


def _one_output():
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    config.image_size, config.patch_size, config.num_labels = 8, 4, 1
    return transformers.ViTForImageClassification(config)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_first_step(tmp_path, case):
    make, data, config, match = REFUSED[case]
    model = make()
    for name, value in config.items():
        setattr(model.config, name, value)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = trainer_of(tmp_path, model, AbsentClassCalibrationCallback(), **data)
    with pytest.raises(ValueError, match=match):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not folders(tmp_path)
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], value) for key, value in before.items())


def test_a_model_of_the_user_that_is_attached(tmp_path):
    """A gamma from before is taken out while training and evaluating, and the entries stay."""
    model = set_gamma(attach(vit()), 9.0, SEEN)
    callback = AbsentClassCalibrationCallback()
    trainer = trainer_of(tmp_path, model, callback, save_strategy="no")
    trainer.train()
    assert_calibrated(callback.result, trainer.model)
    trainer.save_model(tmp_path / "saved")
    saved = load_calibrated(transformers.ViTForImageClassification, tmp_path / "saved")
    assert get_gamma(saved) == pytest.approx(callback.result.gamma)
    without = trainer_of(tmp_path, attach(vit()), save_strategy="no")
    without.train()
    assert without_seconds(trainer.state.log_history) == without_seconds(without.state.log_history)


class Fails(Samples):
    """Data that cannot be read any more after training."""

    gone = False

    def __getitem__(self, index):
        if self.gone:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def test_an_error_in_the_pass_does_not_end_the_run(tmp_path):
    data = Fails(SEEN, 11)
    callback, after = AbsentClassCalibrationCallback(), Then(lambda: None)
    trainer = trainer_of(tmp_path, vit(), Then(lambda: setattr(data, "gone", True)), callback, after, train=data)
    with pytest.warns(UserWarning, match="could not calibrate the model. the disk is gone"):
        trainer.train()
    assert after.done
    assert callback.result is None
    assert get_gamma(trainer.model) is None
    trainer.save_model(tmp_path / "saved")
    assert len(folders(tmp_path)) == 2


def test_a_folder_that_cannot_be_read(tmp_path):
    def damage():
        path = tmp_path / "checkpoint-3" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:100])
        shutil.rmtree(tmp_path / "checkpoint-6")

    callback = AbsentClassCalibrationCallback()
    trainer = trainer_of(tmp_path, vit(), Then(damage), callback)
    with pytest.warns(UserWarning, match="could not calibrate the checkpoints '.*checkpoint-3'"):
        trainer.train()
    assert_calibrated(callback.result, trainer.model)
    assert callback.checkpoint_results == {}


def test_datasets_of_hugging_face(tmp_path):
    """Their columns list the labels, and the columns that the model does not take are removed, as in training."""
    datasets = pytest.importorskip("datasets")

    def table(data):
        columns = {"pixel_values": data.images.tolist(), "label": data.target, "name": [""] * len(data)}
        return datasets.Dataset.from_dict(columns)

    clean = Samples(SEEN, 4, seed=5)
    callback = AbsentClassCalibrationCallback(calibration_dataset=table(clean), log_metrics="always")
    trainer = trainer_of(tmp_path, vit(), callback, train=table(TRAIN), val=table(VAL), save_strategy="no")
    trainer.train()
    assert_calibrated(callback.result, trainer.model, clean)
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert all(log.keys() >= METRICS for log in evaluations)


def test_classes_that_the_dataset_does_not_list(tmp_path):
    train = Samples(SEEN, 11, listed=False)
    callback = AbsentClassCalibrationCallback(log_metrics="always")
    trainer = trainer_of(tmp_path, vit(), callback, train=train, save_strategy="no")
    with pytest.warns(UserWarning, match="cannot read from the dataset which classes"):
        trainer.train()
    assert_calibrated(callback.result, trainer.model)
    assert not any("eval_ausuc" in log for log in trainer.state.log_history)
    assert "eval_ausuc" in trainer.evaluate()


def test_transformers_is_missing(monkeypatch):
    name = "lightning_calibft.integrations.hugging_face"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers.trainer_callback", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-calibft\[transformers\]'"):
        importlib.import_module(name)
