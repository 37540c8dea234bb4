"""No public name takes a wrong value: each argument of each is refused by its name, or not at all."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_calibft import functional
from lightning_calibft.head.attach import reset_gamma
from lightning_calibft.head.offset import is_folded
from lightning_calibft.head.record import record_logits
from tests.properties.calls import MODULES, WRONG, calls, names_of

PUBLIC = {name: getattr(module, name) for module in MODULES for name in names_of(module)}
PUBLIC |= {each.__name__: each for each in (is_folded, record_logits, reset_gamma)}
# Made by the package alone: what functions return, constants, protocols and errors.
RESULTS = {
    *("CalibrationResult", "ESTIMATORS", "Estimator"),
}
# What the rooms of the package call in each other, with arguments that are checked by then.
INSIDE = {
    *("check_estimator_width", "check_unlabeled", "make_estimator"),
    *("needs_absent_samples", "needs_held_out_samples", "needs_pretrained_logits"),
}

NUMBERS = {"3", "-1", "2.5", "2**70", "0-d"}
FUNCTIONS = {"type", "function"}  # the user's own errors are theirs

# What is right for an argument, of any function that has it.
RIGHT = {
    "absent_classes class_map label_names weights result head pretrained unlabeled": {"None"},
    "curves": {"None"},
    "class_names metrics": {"None", "{}", "{'a': 1.0}"},
    "half_life": {"None", *NUMBERS} - {"-1"},
    "min_seen_accuracy min_absent_accuracy": {"None"},
    "num_classes top_k num_splits batch_size num_workers every_n_epochs samples_per_class": {"3"},
    "gamma logit_bias": NUMBERS,
    "logit_scale temperature": NUMBERS - {"-1"},
    "learning_rate squeeze": NUMBERS | {"nan", "inf"},
    "prefix postfix folder": {"None", "word"},
    "path source destination output metric_prefix": {"word"},
    "estimator_kwargs gammas": {"None", "{}"},
    "unpack_batch collate_fn": {"None", *FUNCTIONS},
    "fit_fn": FUNCTIONS,
    "ignore_index": {"None", "3", "-1"},
    "max_samples": {"None", "3"},
    "tolerance": {"None", "3", "2.5", "2**70", "10**400"},
    "absent_share": {"None"},
    "use_ema": {"None"},
    "perplexity": {"3", "2.5", "0-d"},
    "seed": {"3", "-1"},
    "steps": {"3", "[2**70]"},
    # Of a tensor, the shape decides; some other argument may be called wrong then.
    "preds logits target pretrained_preds features class_means points weight before after text_features inputs": {
        "matrix"
    },
}
RIGHT = {name: right for names, right in RIGHT.items() for name in names.split()}
SPECIAL = {
    ("AbsentClassCalibration", "source"): set(),
    ("AbsentClassCalibration", "seen_classes"): {"None"},
    ("CalibrationDiagnostics", "seen_classes"): {"None"},
    ("calibrate", "seen_classes"): {"None"},
    ("calibration_report", "model"): {"word"},
    ("pseudo_cross_validation", "seen_classes"): {"None"},
    ("resolve_class_map", "num_classes"): {"None", "3"},
    ("set_absent_share", "absent_share"): set(),
    ("set_absent_share", "destination"): {"None"},
    ("set_absent_share", "model_or_path"): {"word"},
    ("resolve_class_map", "label_names"): {"None", "[]"},
    ("calibrate_logits", "gamma"): NUMBERS | {"inf"},
    ("compare_curves", "preds"): {"{}"},
    ("tsne_features", "seed"): {"3"},
    ("pseudo_cross_validation", "seed"): {"3"},
}
# By their truth, as flags are everywhere; an axis is matplotlib's affair.
FLAGS = {"validate_args", "progress", "add_bias", "weights_only", "log_metrics"}
FLAGS |= {"calibrate_checkpoints", "refresh_on_validation", "held_out", "ax"}
UNUSED = {("row_norms", "head"), ("update_similarity", "head"), ("check_estimator", "seen_classes")}
UNUSED |= {("check_estimator", "absent_classes")}
# Here a list of anything may be data: it is a batch or a sample of it that is wrong.
DATA = {"loader", "class_data", "test_data", "dataset"}
OTHER_NAMES = {("NearestClassMeanAccuracy", "preds"): "features"}


def arguments(call, name):
    """The arguments that a call can be made with: what the function names, and what it is given besides."""
    parameters = inspect.signature(PUBLIC[name]).parameters.values()
    named = [each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    return [each for each in dict.fromkeys([*named, *call.arguments()]) if each not in FLAGS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("arguments")


@pytest.fixture(autouse=True)
def _elsewhere(folder, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(folder)


def test_every_public_name_has_a_case(folder):
    assert set(PUBLIC) == {*calls(folder), *RESULTS, *INSIDE}


NAMES = sorted(set(PUBLIC) - {*RESULTS, *INSIDE})


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments(name, folder):
    call = calls(folder)[name]
    call.function(**call.arguments())
    for argument in arguments(call, name):
        if (name, argument) in UNUSED:
            continue
        right = SPECIAL.get((name, argument), RIGHT.get(argument, set()))
        for label, value in WRONG.items():
            if label not in right:
                assert_refused(name, argument, label, {**call.arguments(), argument: value}, call.function)


def assert_refused(name, argument, label, given, function):
    what, said = f"{name}({argument}={label})", OTHER_NAMES.get((name, argument), argument)
    try:
        function(**given)
    except (TypeError, ValueError) as error:
        text = str(error)
        if argument not in DATA:
            assert f"`{said}`" in text, (what, text)
            assert text.startswith("Expected "), (what, text)
    except (KeyError, RuntimeError):
        assert argument in DATA, what  # a dict of samples, which has no such sample, or one that fits into no tensor
    else:
        raise AssertionError(f"{what} is taken")


def kinds(tensor: Tensor):
    """What looks like a tensor and is none that has such numbers."""
    return {
        "list": tensor.tolist(),
        "array": tensor.numpy(),
        "complex": tensor.to(torch.complex64),
        "bool": tensor.bool(),
        "sparse": tensor.to_sparse(),
        "meta": tensor.to("meta"),
        "more axes": tensor[None],
        "0-d": tensor.flatten()[0],
    }


# Logits of any number of axes, and whatever a model takes.
TENSORS = [name for name in NAMES if name not in ("calibrate_logits", "export")]


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_kinds_of_tensors(name, folder):
    call = calls(folder)[name]
    for argument, valid in call.arguments().items():
        if not isinstance(valid, Tensor):
            continue
        others = {
            **kinds(valid),
            **({"integers": valid.long()} if valid.is_floating_point() else {"floats": valid / 2}),
        }
        for label, value in others.items():
            assert_refused(name, argument, label, {**call.arguments(), argument: value}, call.function)
        if argument == "target":
            given = {**call.arguments(), argument: valid[:, None]}
            assert_refused(name, argument, "column", given, call.function)


def same(one, other, tolerance):
    if isinstance(one, Tensor):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
    elif isinstance(one, tuple) and not hasattr(one, "_fields"):
        for a, b in zip(one, other, strict=True):
            same(a, b, tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", functional.__all__)
def test_other_dtypes_and_layouts_give_the_same(name, dtype, folder):
    """Of numbers that each dtype holds exactly, and of tensors with gradients and in another order in memory."""
    call = calls(folder)[name]
    given = {key: _exact(value) for key, value in call.arguments().items()}
    expected = call.function(**given)

    def other(value):
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value.to(torch.int16) if isinstance(value, Tensor) else value
        moved = value.to(dtype).flip(0).flip(0)
        return (moved.T.contiguous().T if moved.ndim == 2 else moved).requires_grad_()

    tolerance = {torch.float64: 1e-6}.get(dtype, 1e-2)
    same(expected, call.function(**{key: other(value) for key, value in given.items()}), tolerance)


def _exact(value):
    return (4 * value).round() / 4 if isinstance(value, Tensor) and value.is_floating_point() else value


def test_classes_as_arrays_in_reverse():
    split = PUBLIC["ClassSplit"](6, np.arange(6)[4::-2], np.array([1, 5])[::-1])
    assert (split.seen_classes, split.absent_classes) == ((0, 2, 4), (1, 5))


def test_labels_beyond_what_a_class_map_can_tell():
    """Moved so far as a target without a row is, they would have been rows."""
    rows = {0: 2, 1: 0}
    metric = PUBLIC["AUSUC"](3, [0, 1], class_map=rows)
    for label in (2**40, 2**40 + 1, 2**62, -(2**63)):
        with pytest.raises(ValueError, match=r"^Expected argument `class_map` to give the row of every target"):
            metric.update(torch.randn(1, 3), torch.tensor([label]))
