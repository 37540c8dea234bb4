"""Attach, calibrate, save, load, fold and detach heads of any size, kind and dtype."""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

from lightning_calibft import attach, detach, fold, get_gamma, set_gamma
from lightning_calibft.head.attach import reset_gamma
from tests.properties.strategies import SEEDS, generator, splits

GAMMAS = st.floats(-50, 50, width=32, allow_subnormal=False)


class Head(NamedTuple):
    model: nn.Module
    inputs: Tensor
    classes: tuple[list[int], list[int]]
    shift: Tensor  # 1 at absent classes, in the shape of the logits


@st.composite
def heads(draw, dtypes=(torch.float32, torch.float64, torch.bfloat16), bias=None):
    num_classes, *classes = draw(splits())
    width, bias = draw(st.integers(1, 5)), draw(st.booleans()) if bias is None else bias
    dtype, random = draw(st.sampled_from(dtypes)), generator(draw(SEEDS))
    inputs, shift = torch.randn(2, width, generator=random), torch.zeros(num_classes)
    shift[classes[1]] = 1
    if draw(st.booleans()):
        head, inputs, shift = nn.Conv2d(width, num_classes, 1, bias=bias), inputs[..., None, None], shift[:, None, None]
    else:
        head = nn.Linear(width, num_classes, bias=bias)
    for parameter in head.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random)
    model = nn.ModuleDict({"head": head}) if draw(st.booleans()) else head
    if model is not head:
        model.forward = head.__call__
    return Head(model.to(dtype).eval(), inputs.to(dtype), tuple(classes), shift)


def layer(model):
    return model["head"] if isinstance(model, nn.ModuleDict) else model


def moved(logits, gamma, shift):
    """By the definition, in at least float32, and in the dtype of the logits."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.where(shift > 0, (logits.to(dtype) + torch.tensor(gamma)).to(logits.dtype), logits)


@given(heads(), GAMMAS, GAMMAS)
def test_absent_logits_move_by_gamma_in_eval_mode_only(head, gamma, first):
    raw = layer(head.model)(head.inputs)
    for value in (first, gamma):  # the second replaces the first
        set_gamma(layer(head.model), value, *head.classes)
    assert get_gamma(head.model) == gamma
    assert torch.equal(layer(head.model)(head.inputs), moved(raw, gamma, head.shift))
    assert torch.equal(layer(head.model.train())(head.inputs), raw)
    assert torch.equal(layer(head.model.eval())(head.inputs), moved(raw, gamma, head.shift))


@given(heads(), GAMMAS)
def test_round_trips(head, gamma):
    keys, raw = list(head.model.state_dict()), layer(head.model)(head.inputs)
    plain = copy.deepcopy(head.model.state_dict())
    attach(layer(head.model))
    assert torch.equal(layer(head.model)(head.inputs), raw)
    assert get_gamma(head.model) is None
    assert [key for key in head.model.state_dict() if "absent_class_calibration" not in key] == keys
    other = copy.deepcopy(layer(head.model))
    set_gamma(layer(head.model), gamma, *head.classes)
    calibrated = layer(head.model)(head.inputs)
    other.load_state_dict(layer(head.model).state_dict())
    assert get_gamma(other) == gamma
    assert torch.equal(other(head.inputs), calibrated)
    assert torch.equal(copy.deepcopy(layer(head.model))(head.inputs), calibrated)
    reset_gamma(other)
    assert get_gamma(other) is None
    assert torch.equal(other(head.inputs), raw)
    head.model.load_state_dict(plain)  # of a model that is not calibrated
    assert get_gamma(head.model) is None
    set_gamma(layer(head.model), gamma, *head.classes)
    detach(head.model)
    assert list(head.model.state_dict()) == keys
    assert torch.equal(layer(head.model)(head.inputs), raw)


@given(heads(dtypes=(torch.float32, torch.float64)), GAMMAS)
def test_fold(head, gamma):
    bias = layer(head.model).bias is not None
    keys = {*head.model.state_dict()}
    set_gamma(layer(head.model), gamma, *head.classes)
    calibrated = layer(head.model)(head.inputs)
    if not bias:
        with pytest.raises(ValueError, match="Pass `add_bias=True`"):
            fold(head.model)
        assert get_gamma(head.model) == gamma
    fold(head.model, add_bias=not bias)
    torch.testing.assert_close(layer(head.model)(head.inputs), calibrated, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(layer(head.model.train())(head.inputs), calibrated, rtol=1e-5, atol=2e-5)
    assert {key for key in head.model.state_dict() if bias or not key.endswith("bias")} == keys
    with pytest.raises(ValueError, match="without a folded gamma"):
        set_gamma(layer(head.model), gamma, *head.classes)


@given(
    heads(),
    st.sampled_from([None, "2", True, 1j, [1.0], np.bool_(True), float("nan"), float("inf"), -float("inf"), 1e39]),
)
def test_what_is_no_gamma(head, gamma):
    keys = list(head.model.state_dict())
    with pytest.raises((TypeError, ValueError), match=r"^Expected argument `gamma` to be (a number|finite in float32)"):
        set_gamma(layer(head.model), gamma, *head.classes)
    assert list(head.model.state_dict()) == keys


@pytest.mark.parametrize("kind", [int, np.int64, np.float32, np.float16])
def test_numbers_of_any_kind(kind):
    assert get_gamma(set_gamma(nn.Linear(2, 3), kind(2), [0])) == 2
