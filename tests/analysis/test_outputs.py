"""Features and raw logits of a model."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_calibft import get_gamma, set_gamma
from lightning_calibft.analysis import collect_outputs
from lightning_calibft.head.offset import attached_heads
from tests.calibration.nets import Net
from tests.helpers.runs import SEEN, VAL, Noisy, quiet

pytestmark = quiet
X, Y = VAL.tensors


class Draws(Noisy):
    """Draws random numbers, but does nothing with them."""

    def __getitem__(self, index):
        super().__getitem__(index)
        return self.dataset[index]


def expected(model):
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        features = model.body(X)
        return features, nn.functional.linear(features, model.fc.weight, model.fc.bias)


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_rows_are_those_of_the_dataset_in_order_and_without_gamma(gamma):
    model = Net()
    features, logits = expected(model)
    if gamma is not None:
        set_gamma(model, gamma, SEEN)
    state, streams = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    outputs = collect_outputs(model, DataLoader(Draws(VAL), 7, shuffle=True))
    torch.testing.assert_close(outputs.features, features)
    torch.testing.assert_close(outputs.logits, logits)
    assert torch.equal(outputs.target, Y)
    # Nothing is left behind.
    assert model.training
    assert get_gamma(model) == gamma
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), streams)
    assert not model.fc._forward_pre_hooks


def test_labels_are_mapped_to_rows():
    outputs = collect_outputs(Net(), [(X, torch.zeros_like(Y))], class_map=[4])
    assert outputs.target.unique().tolist() == [4]


def test_a_module_without_forward():
    class Wrapper(LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

    net = Net()
    assert torch.equal(collect_outputs(Wrapper(net), [(X, Y)]).logits, collect_outputs(net, [(X, Y)]).logits)


def test_a_convolution_as_head():
    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Conv2d(5, 6, 1)

        def forward(self, x):
            return self.fc(x[:, :, None, None]).flatten(1)

    outputs = collect_outputs(Conv(), [(X, Y)])
    assert torch.equal(outputs.features, X)
    assert outputs.logits.shape == (48, 6)


def test_errors_leave_nothing_behind():
    class Twice(Net):
        def forward(self, x):
            return super().forward(x) + 0 * super().forward(x)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_classes = 6

        def forward(self, x):
            return x.sum(2)

    for model, data, message, head in (
        (Net(), [], "yield batches, but got none", None),
        (Net(), [(X, Y[:3])], "of 3 labels", None),
        (Whole(), [(torch.randn(4, 6, 2), Y[:4])], "features of shape", "forward"),
    ):
        with pytest.raises(ValueError, match=message):
            collect_outputs(model, data, head=head)
        assert not attached_heads(model)
    with pytest.raises(ValueError, match=r"head|forward"):
        collect_outputs(Twice(), [(X, Y)])
