"""Heads that are no layer of torch: cosine heads and others with `out_features`."""

import pytest
import torch
from torch import nn

from lightning_calibft.head import attach, find_head, set_gamma
from lightning_calibft.head.layers import head_names, num_classes
from lightning_calibft.head.probe import probe
from lightning_calibft.head.record import record_logits

from .models import (
    GAMMA,
    NUM_CLASSES,
    SEEN,
    SHIFT,
    CosineLinear,
    Projected,
    SplitCosineLinear,
    Wrapper,
    encoder_of_width,
    inputs,
)


@pytest.mark.parametrize("make", [CosineLinear, lambda d, c: SplitCosineLinear(d, 2, c - 2), Projected])
def test_custom_heads_are_found_without_help(make):
    for model in (
        nn.Sequential(nn.Conv2d(3, 8, 3), make(8, NUM_CLASSES)),
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), make(8, NUM_CLASSES)),
        nn.Sequential(encoder_of_width(8), nn.Linear(8, 8), make(8, NUM_CLASSES)),
    ):
        for wrapped in (model, Wrapper(model), Wrapper(torch.compile(model, backend="eager"))):
            assert find_head(wrapped) is model[-1]
    for name in ("fc", "classifier", "head"):
        model = Wrapper(nn.ModuleDict({name: make(8, NUM_CLASSES), "last": nn.Linear(8, 16)}))
        assert head_names(model, find_head(model)) == (f"model.{name}",)
    assert num_classes(find_head(nn.Sequential(make(8, NUM_CLASSES)))) == NUM_CLASSES


def test_a_custom_head_is_ambiguous_like_any_other():
    with pytest.raises(ValueError, match=r"several.*'0' \(CosineLinear, width 8\), '1' \(Linear, width 8\)\. Name one"):
        find_head(nn.Sequential(CosineLinear(8, 8), nn.Linear(8, 8)))


class _Pieces(nn.Module):
    """Custom heads: one gives the logits, the others do not."""

    def __init__(self):
        super().__init__()
        self.auxiliary = nn.Linear(12, NUM_CLASSES)
        self.right = SplitCosineLinear(12, 2, NUM_CLASSES - 2)
        self.head = CosineLinear(12, NUM_CLASSES)

    def forward(self, x):
        x = x.flatten(1)
        return self.right(x) + 0 * self.auxiliary(x) + 0 * self.head(x)


def _attach_and_probe(model):
    attach(model)
    probe(lambda: model(inputs()), model)


@pytest.mark.parametrize("head", [CosineLinear(12, NUM_CLASSES), SplitCosineLinear(12, 2, NUM_CLASSES - 2)])
def test_custom_heads_pass(head):
    model = nn.Sequential(nn.Flatten(), head).eval()
    raw = model(inputs())
    _attach_and_probe(model)
    with record_logits(model) as recorded:
        torch.testing.assert_close(set_gamma(model, GAMMA, SEEN)(inputs()), raw + SHIFT)
    torch.testing.assert_close(recorded, [raw.detach()])


def test_a_custom_head_is_offered():
    with pytest.raises(
        ValueError, match=r"'head' of _Pieces .* \(0 times\).*The head is 'right': pass `head=\"right\"`"
    ):
        _attach_and_probe(_Pieces())


def test_a_custom_head_that_gives_probabilities_is_refused():
    class Softmax(CosineLinear):
        def forward(self, x):
            return super().forward(x).softmax(-1)

    words = (
        r"'1' of Sequential .* is probabilities.*before the softmax\. Other.*: none\. If no layer gives them, let the"
    )
    with pytest.raises(ValueError, match=words):
        _attach_and_probe(nn.Sequential(nn.Flatten(), Softmax(12, NUM_CLASSES)))
