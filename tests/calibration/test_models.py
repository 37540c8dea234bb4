"""``calibrate()`` on models of many kinds."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_calibft import attach, calibrate, detach, get_gamma
from tests.calibration.nets import Net, X, Y, assert_calibrated, net, raw, reference
from tests.helpers.references import _reference_gap
from tests.helpers.runs import ABSENT, NUM_CLASSES, SEEN, Plain, blobs, loader, quiet

pytestmark = quiet


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3)
        self.head = nn.Conv2d(8, NUM_CLASSES, 1)

    def forward(self, x):
        assert x.is_contiguous(memory_format=torch.channels_last)
        return self.head(self.body(x).mean((2, 3), keepdim=True)).flatten(1)


def test_a_convolution_in_channels_last():
    data = blobs(SEEN, (3, 6, 6))
    model = net(Convolutional).to(memory_format=torch.channels_last)
    x = data.tensors[0].to(memory_format=torch.channels_last)
    result = calibrate(model, [(x, data.tensors[1])], progress=False)
    assert_calibrated(model, result, x=x, y=data.tensors[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    model = net().to(dtype)
    result = calibrate(model, [(X.to(dtype), Y)], progress=False)
    gamma = reference(model, X.to(dtype))[0]
    assert result.gamma == pytest.approx(gamma, rel=1e-5)
    assert get_gamma(model) == pytest.approx(gamma, rel=1e-5)  # not rounded to half precision


def test_autocast():
    model = net()
    with torch.autocast("cpu", torch.bfloat16):
        result = calibrate(model, [(X, Y)], progress=False)
        logits = raw(model)
    assert logits.dtype == torch.bfloat16
    assert result.gamma == pytest.approx(_reference_gap(logits, Y, SEEN, ABSENT)[0], rel=1e-5)


class Outputs(Net):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        logits = super().forward(x)
        return {
            "tuple": (logits, x),
            "mapping": {"loss": x.sum(), "logits": logits},
            "attribute": SimpleNamespace(logits=logits),
            "softmax": logits.softmax(1),
            "log_softmax": logits.log_softmax(1),
        }[self.kind]


@pytest.mark.parametrize("kind", ["tuple", "mapping", "attribute", "softmax", "log_softmax"])
def test_what_the_forward_returns(kind):
    model = net(lambda: Outputs(kind))
    result = calibrate(model, loader(), progress=False)
    plain = Net()
    plain.load_state_dict(detach(copy.deepcopy(model)).state_dict())
    assert result.gamma == pytest.approx(reference(plain)[0], rel=1e-5)


class Doubled(Net):
    def forward(self, x, scale):
        return super().forward(x * scale)


def test_several_inputs():
    model = net(Doubled)
    expected = _reference_gap(raw(net(), 2 * X), Y, SEEN, ABSENT)[0]
    scale = torch.full((len(X), 1), 2.0)
    for data in ([((X, scale), Y)], [{"scale": scale, "x": X, "id": Y, "label": Y}]):
        assert calibrate(model, data, progress=False).gamma == pytest.approx(expected, rel=1e-5)

    def unpack(batch):
        return {"scale": batch[2], "x": batch[0]}, batch[1]

    assert calibrate(model, [(X, Y, scale)], unpack_batch=unpack, progress=False).gamma == pytest.approx(
        expected, rel=1e-5
    )


def test_the_head_can_be_named():
    class TwoHeads(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(16, NUM_CLASSES)

        def forward(self, x):
            return self.head(self.body(x))

    for head in ("head", None):
        model = net(TwoHeads)
        keys = list(model.state_dict())
        if head is None:
            with pytest.raises(ValueError, match="several modules that could be"):
                calibrate(model, loader(), head=head, progress=False)
            with pytest.raises(ValueError, match=r'The head is .head.: pass `head="head"`'):
                calibrate(model, loader(), head="fc", progress=False)
            assert list(model.state_dict()) == keys
        else:
            assert_calibrated(model, calibrate(model, loader(), head=head, progress=False))
    model = net(TwoHeads)
    assert_calibrated(model, calibrate(model, loader(), head=model.head, progress=False))


class Table(nn.Module):
    """A head without parameters, as for the text features of CLIP."""

    def __init__(self):
        super().__init__()
        self.out_features = NUM_CLASSES
        self.register_buffer("features", torch.randn(NUM_CLASSES, 5), persistent=False)

    def forward(self, x):
        return x @ self.features.T


def test_a_head_without_parameters():
    model = net(lambda: nn.Sequential(nn.Linear(5, 5), Table()))
    assert_calibrated(model, calibrate(model, loader(), head="1", progress=False))


def test_a_head_that_gives_probabilities():
    class Softmax(nn.Linear):
        def forward(self, x):
            return super().forward(x).softmax(1)

    model = net(lambda: nn.Sequential(nn.Linear(5, 16), Softmax(16, NUM_CLASSES)))
    with pytest.raises(ValueError, match=r"probabilities|moves them by"):
        calibrate(model, loader(), progress=False)


def test_a_lightning_module_outside_of_a_trainer():
    model = net(Plain)
    assert_calibrated(model, calibrate(model, loader(), progress=False))

    class NoForward(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Net()

    module = net(NoForward)
    result = calibrate(module, loader(), progress=False)
    assert_calibrated(module.model, result)


def test_a_compiled_model():
    model = net()
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    result = calibrate(compiled, loader(), progress=False)
    assert_calibrated(model, result)
    shift = result.gamma * torch.isin(torch.arange(NUM_CLASSES), torch.tensor(ABSENT))
    compiled.eval()
    torch.testing.assert_close(compiled(X), raw(model) + shift)


def test_a_model_that_was_attached_before():
    model = attach(net())
    assert_calibrated(model, calibrate(model, loader(), progress=False))
