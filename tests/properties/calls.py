"""A valid call of each public function and class, and values that are wrong for most of its arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lightning_calibft as top
from lightning_calibft import analysis, cross_validation, estimators, functional, head, metrics
from lightning_calibft.analysis.outputs import Outputs
from lightning_calibft.head.attach import reset_gamma
from lightning_calibft.head.offset import is_folded
from lightning_calibft.head.record import record_logits
from tests.helpers.runs import Plain, pretrained, trainer_of

torch.manual_seed(0)
LOGITS, TARGET = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
SEEN = [0, 1]
SPLIT = top.ClassSplit(3, SEEN)


MODULES = (top, functional, metrics, estimators, head, analysis, cross_validation)


def names_of(module: Any) -> list[str]:
    """What users import from a module; of the estimators all, though most are chosen by name."""
    if module is estimators:
        return [name for name, value in vars(estimators).items() if callable(value) or name == "ESTIMATORS"]
    return module.__all__


class Call(NamedTuple):
    """A function and arguments that it takes, made anew each time."""

    function: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]


def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3, 3))


def calibrated() -> nn.Module:
    return top.set_gamma(model(), 1.5, SEEN)


def shared() -> nn.Module:
    """A model that knows gamma for other shares of absent samples."""
    network = model()
    top.calibrate(network, batches(), SEEN, progress=False)
    return network


def batches() -> list[Any]:
    return [(LOGITS.clone(), torch.tensor([0, 1, 1, 0]))]


def checkpoint(folder: Path) -> Path:
    """A file that holds the calibrated weights of ``Plain``."""
    path = folder / "calibrated.ckpt"
    if not path.exists():
        module = top.set_gamma(pretrained(), 1.5, [0, 2, 3])
        torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": "2.6.0"}, path)
    return path


def given(**arguments: Any) -> Callable[[], dict[str, Any]]:
    """Arguments; what is a function is called for a new one each time."""
    return lambda: {name: value() if callable(value) else value for name, value in arguments.items()}


def on_logits(**more: Any) -> Callable[[], dict[str, Any]]:
    return given(preds=LOGITS.clone, target=TARGET.clone, seen_classes=SEEN, **more)


def on_features(**more: Any) -> Callable[[], dict[str, Any]]:
    return given(features=LOGITS.clone, target=TARGET.clone, **more)


def updated(kind: type, **options: Any) -> Callable[..., Any]:
    """Feed a metric, so that what it takes only then is checked too."""

    def call(preds: Any = LOGITS, target: Any = TARGET, pretrained_preds: Any = LOGITS, **arguments: Any) -> None:
        metric = kind(**{**options, **arguments})
        parts = (pretrained_preds,) if getattr(kind, "needs_pretrained_logits", False) else ()
        metric.update(preds, target, *parts)

    return call


def on_traffic(preds: Any = LOGITS, **arguments: Any) -> None:
    metrics.AbsentShare(**arguments).update(preds)


def of_callback(kind: type, folder: Path) -> Callable[..., Any]:
    def call(**arguments: Any) -> None:
        callback = kind(**arguments)
        trainer, module = trainer_of(folder, callback), Plain()
        callback.setup(trainer, module, "fit")
        callback.on_fit_start(trainer, module)

    return call


def entered(manager: Callable[..., Any]) -> Callable[..., Any]:
    def call(**arguments: Any) -> None:
        with manager(**arguments):
            pass

    return call


def _metrics(module: Any) -> dict[str, Call]:
    """Classes of metrics, by their names, with what all of them take."""
    calls = {}
    for name in names_of(module):
        kind = getattr(module, name)
        if name == "AbsentShare":  # takes no labels
            table = functional.share_table.ShareTable((0.1, 0.9), (0.0, 1.0), seen_below=(0, 0), absent_below=(1, 1))
            calls[name] = Call(
                on_traffic, given(preds=LOGITS.clone, num_classes=3, seen_classes=SEEN, share_table=table)
            )
        elif isinstance(kind, type) and issubclass(kind, metrics.SeenUnseenCurve.__mro__[1]):
            special = {"class_means": lambda: torch.eye(3)} if name == "NearestClassMeanAccuracy" else {}
            special |= {"gamma": 1.0} if name == "FixedGamma" else {}
            shared = {"ignore_index": None, "validate_args": True, "class_map": None, "label_names": None}
            calls[name] = Call(updated(kind), on_logits(num_classes=3, **shared, **special))
    return calls


def calls(folder: Path) -> dict[str, Call]:
    """A call of each public name that takes arguments of the user."""
    path = checkpoint(folder)
    return {
        **_metrics(metrics),
        **_metrics(estimators),
        "absent_class_metrics": Call(metrics.absent_class_metrics, given(num_classes=3, seen_classes=SEEN)),
        **{
            name: Call(getattr(functional, name), on_logits())
            for name in (
                "ausuc",
                "average_logit_gap",
                "best_gamma",
                "harmonic_mean_accuracy",
                "seen_unseen_curve",
                "split_accuracy",
            )
        },
        "calibrate_logits": Call(functional.calibrate_logits, given(logits=LOGITS.clone, gamma=1.0, seen_classes=SEEN)),
        "class_means": Call(functional.class_means, on_features(num_classes=3)),
        "nearest_class_mean_accuracy": Call(
            functional.nearest_class_mean_accuracy, on_features(class_means=lambda: torch.eye(3), seen_classes=SEEN)
        ),
        "nearest_class_mean_logits": Call(
            functional.nearest_class_mean_logits, given(features=LOGITS.clone, class_means=lambda: torch.eye(3))
        ),
        "pseudo_absent_gamma": Call(functional.pseudo_absent_gamma, on_logits(pretrained_preds=LOGITS.clone)),
        "weight_aligning": Call(functional.weight_aligning, given(weight=LOGITS[:3].clone, seen_classes=SEEN)),
        "AbsentClassCalibration": Call(of_callback(top.AbsentClassCalibration, folder), dict),
        "CalibrationDiagnostics": Call(of_callback(top.CalibrationDiagnostics, folder), dict),
        "ClassSplit": Call(top.ClassSplit, given(num_classes=3, seen_classes=SEEN)),
        "ZeroShotHead": Call(top.ZeroShotHead, given(text_features=LOGITS.clone)),
        "attach": Call(top.attach, given(model=model)),
        "calibrate": Call(top.calibrate, given(model=model, loader=batches, progress=False)),
        "detach": Call(top.detach, given(model=calibrated)),
        "export": Call(
            top.export, given(model=calibrated, destination=str(folder / "out.pt2"), inputs=lambda: torch.randn(2, 3))
        ),
        "find_head": Call(top.find_head, given(model=model)),
        "fold": Call(top.fold, given(model=calibrated)),
        "fold_checkpoint": Call(top.fold_checkpoint, given(source=path.__str__, destination=str(folder / "out.pth"))),
        "get_gamma": Call(top.get_gamma, given(model=calibrated)),
        "inspect_checkpoint": Call(top.inspect_checkpoint, given(path=path.__str__)),
        "load_calibrated": Call(top.load_calibrated, lambda: {"module_class": Plain, "path": str(path)}),
        "pseudo_cross_validation": Call(
            top.pseudo_cross_validation,
            lambda: {
                "model": nn.Linear(3, 5),
                "dataset": TensorDataset(torch.randn(12, 3), torch.arange(3).repeat(4)),
                "fit_fn": lambda model, data: model,
                "num_splits": 1,
                "progress": False,
            },
        ),
        "resolve_class_map": Call(top.resolve_class_map, given(class_map=[2, 0])),
        "set_absent_share": Call(top.set_absent_share, given(model_or_path=shared, absent_share=0.2)),
        "set_gamma": Call(top.set_gamma, given(model=model, gamma=1.0, seen_classes=SEEN)),
        "reset_gamma": Call(reset_gamma, given(model=calibrated)),
        "is_folded": Call(is_folded, given(model=model)),
        "record_logits": Call(entered(record_logits), given(model=calibrated)),
        "check_estimator": Call(estimators.check_estimator, given(estimator="alg")),
        **_analyses(),
    }


def _analyses() -> dict[str, Call]:
    snapshot = analysis.Snapshot(epoch=0, step=0, norms=analysis.row_norms(LOGITS[:3], SEEN))
    outputs = Outputs(features=LOGITS, logits=LOGITS, target=TARGET)
    of_models = {"seen_classes": SEEN, "class_data": batches, "test_data": batches}
    arguments: dict[str, Callable[[], dict[str, Any]]] = {
        "accuracy_gain": given(before=model, after=model, **of_models),
        "calibration_report": given(snapshots=[snapshot], split=SPLIT),
        "collect_outputs": given(model=model, loader=batches),
        "compare_curves": given(preds=lambda: {"a": LOGITS}, target=TARGET.clone, seen_classes=SEEN),
        "logit_levels": on_logits(),
        "plot_snapshots": given(snapshots=[snapshot], quantity="row_norms"),
        "row_norms": given(weight=LOGITS[:3].clone, seen_classes=SEEN),
        "toy_example": given(steps=2),
        "tsne_features": given(before=outputs, after=outputs, seen_classes=SEEN, perplexity=2.0),
        "update_similarity": given(before=LOGITS[:3].clone, after=LOGITS[1:].clone, seen_classes=SEEN),
        "verdict": given(snapshots=[snapshot]),
    }
    return {name: Call(getattr(analysis, name), make) for name, make in arguments.items()}


WRONG: Mapping[str, Any] = {
    "None": None,
    "True": True,
    "3": 3,
    "-1": -1,
    "2.5": 2.5,
    "nan": math.nan,
    "inf": math.inf,
    "10**400": 10**400,
    "2**70": 2**70,
    "word": "no such word",
    "bytes": b"x",
    "[]": [],
    "[2.5]": [2.5],
    "[2**70]": [2**70],
    "['a', 3]": ["a", 3],
    "{}": {},
    "{'a': 1.0}": {"a": 1.0},
    "object": object(),
    "array": np.zeros((2, 2)),
    "0-d": torch.tensor(1.0),
    "matrix": torch.zeros(2, 2),
    "empty": torch.empty(0),
    "type": int,
    "function": lambda: None,
}
