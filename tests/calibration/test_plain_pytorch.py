"""``calibrate()`` at the end of a training loop of one's own: a convolutional network, a loader and no Lightning."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.models.resnet import BasicBlock, ResNet

from lightning_calibft import calibrate, detach, get_gamma
from tests.calibration.nets import net
from tests.helpers.references import _reference_gap
from tests.helpers.runs import ABSENT, NUM_CLASSES, SEEN, TRAIN, assert_same, blobs, quiet

DATA = blobs(SEEN, (3, 32, 32), each=8)
X, Y = DATA.tensors
SHIFT = torch.isin(torch.arange(NUM_CLASSES), torch.tensor(ABSENT)).float()

pytestmark = quiet
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def loader(**kwargs):
    return DataLoader(DATA, 10, shuffle=True, **kwargs)


def resnet():
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=NUM_CLASSES)
    with torch.no_grad():
        model.fc.bias.copy_(torch.linspace(1, -1, NUM_CLASSES))
    return model


def raw(model, x=X):
    """The logits of a copy that has no calibration."""
    with torch.no_grad():
        return detach(copy.deepcopy(model)).eval()(x)


def gap(logits, target=Y):
    value, *_ = _reference_gap(logits, target, SEEN, ABSENT)
    assert abs(value) > 0.1
    return value


def train(model, batches, calibrated=False):
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for _ in range(2):
        model.train()
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(F.dropout(model(x), 0.1), y).backward()
            optimizer.step()
        if calibrated:
            result = calibrate(model, batches, progress=False)
            assert result.gamma == pytest.approx(gap(raw(model)), rel=1e-4)


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "persistent_workers": True}])
def test_a_calibration_after_each_epoch_leaves_the_training_as_it_is(workers):
    one, other = resnet(), resnet()
    torch.manual_seed(1)
    train(one, loader(**workers))
    torch.manual_seed(1)
    train(other, loader(**workers), calibrated=True)
    assert get_gamma(other) is not None
    assert_same(dict(detach(other).state_dict()), dict(one.state_dict()))


def test_autocast_entered_by_the_user():
    model = resnet()
    with torch.autocast("cpu", torch.bfloat16):
        result = calibrate(model, loader(), progress=False)
        logits = torch.cat([raw(model, x) for x in X.split(10)])
        assert torch.is_autocast_enabled("cpu")
    assert logits.dtype == torch.bfloat16
    assert result.gamma == pytest.approx(gap(logits), rel=1e-6)
    assert result.gamma != pytest.approx(gap(raw(model)), rel=1e-5)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_model(dtype):
    model = resnet().to(dtype)
    keys = list(model.state_dict())
    with pytest.raises(
        ValueError, match=r"`forward\(batch\[0\]\)` raised RuntimeError .*resnet.py.*should be the same"
    ):
        calibrate(model, loader(), progress=False)
    assert list(model.state_dict()) == keys
    assert model.training

    def unpack(batch):
        return batch[0].to(dtype), batch[1]

    result = calibrate(model, loader(), unpack_batch=unpack, progress=False)
    logits = torch.cat([raw(model, x.to(dtype)) for x in X.split(10)])
    assert logits.dtype == model(X[:2].to(dtype)).dtype == dtype
    assert result.gamma == pytest.approx(gap(logits), rel=1e-6)
    assert get_gamma(model) == pytest.approx(result.gamma, rel=1e-6)  # float32 beside weights of any precision


def test_channels_last():
    expected = calibrate(resnet(), loader(), progress=False).gamma
    model = resnet().to(memory_format=torch.channels_last)
    batches = [(x.to(memory_format=torch.channels_last), y) for x, y in loader()]
    assert calibrate(model, batches, progress=False).gamma == pytest.approx(expected, rel=1e-5)
    assert calibrate(model, loader(), progress=False).gamma == pytest.approx(expected, rel=1e-5)
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert expected == pytest.approx(gap(raw(resnet())), rel=1e-5)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_that_was_compiled_and_trained(in_place):
    torch.compiler.reset()
    model = net()
    if in_place:
        model.compile(backend="aot_eager")
    compiled = model if in_place else torch.compile(model, backend="aot_eager")
    x, y = TRAIN.tensors
    train(compiled, [(x, y)])
    result = calibrate(compiled, [(x, y)], progress=False)
    plain = net()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "absent_class" not in key})
    logits = plain.eval()(x)
    assert result.gamma == pytest.approx(gap(logits, y), rel=1e-5)
    torch.testing.assert_close(compiled.eval()(x), logits + result.gamma * SHIFT)
    torch.manual_seed(0)
    expected = plain.train()(x)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled.train()(x), expected)


def test_inference_mode_entered_by_the_user():
    model = resnet()
    with torch.inference_mode():
        result = calibrate(model, loader(), progress=False)
        assert torch.is_inference_mode_enabled()
    assert result.gamma == pytest.approx(gap(raw(model)), rel=1e-5)
    assert calibrate(model, loader(), progress=False) == result  # outside too: what it has attached can be changed
    model.eval()(X[:2]).sum().backward()


def screen(printed):
    """What a terminal shows in the end: each carriage return begins the line anew."""
    lines = []
    for line in printed.split("\n"):
        cells = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        lines.append("".join(cells).rstrip())
    return "\n".join(lines)


def test_the_progress_bar_goes_away(capsys):
    calibrate(resnet(), loader())
    printed = capsys.readouterr()
    assert all(text in printed.err for text in ("Reading labels", "Calibrating", "/3"))
    assert screen(printed.err) == printed.out == ""
    calibrate(resnet(), loader(), progress=False)
    assert tuple(capsys.readouterr()) == ("", "")


@cuda
@pytest.mark.parametrize("pin_memory", [False, True])
def test_a_model_on_a_gpu(pin_memory):
    model = resnet().cuda()
    result = calibrate(model, loader(pin_memory=pin_memory), progress=False)
    assert result.gamma == pytest.approx(calibrate(resnet(), loader(), progress=False).gamma, rel=1e-2)
    assert {value.device.type for value in model.state_dict().values()} == {"cuda"}
    logits = raw(model, X.cuda())
    torch.testing.assert_close(model.eval()(X.cuda()), logits + result.gamma * SHIFT.cuda(), rtol=1e-3, atol=1e-3)


@cuda
def test_autocast_on_a_gpu():
    model = resnet().cuda()
    with torch.autocast("cuda", torch.float16):
        result = calibrate(model, loader(), progress=False)
        logits = torch.cat([raw(model, x.cuda()) for x in X.split(10)])
    assert logits.dtype == torch.float16
    assert result.gamma == pytest.approx(gap(logits.cpu()), rel=1e-2)
