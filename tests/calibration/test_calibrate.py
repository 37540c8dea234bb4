"""``calibrate()``: the pass without Lightning."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_calibft import CalibrationResult, ClassSplit, attach, calibrate, detach, get_gamma, set_gamma
from lightning_calibft.metrics import AverageLogitGap
from tests.references import _reference_gap
from tests.runs import ABSENT, NUM_CLASSES, SEEN, TRAIN, Plain, assert_same, blobs, loader

X, Y = TRAIN.tensors
ALL = list(range(NUM_CLASSES))


class Net(nn.Module):
    def __init__(self, dropout=0.5):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout))
        self.fc = nn.Linear(16, NUM_CLASSES)

    def forward(self, x):
        return self.fc(self.body(x))


def net(make=Net):
    torch.manual_seed(0)
    return make()


def raw(model, x=X):
    """The logits of a copy that has no calibration."""
    with torch.no_grad():
        return detach(copy.deepcopy(model)).eval()(x)


def reference(model, x=X, y=Y, seen=SEEN, absent=ABSENT):
    return _reference_gap(raw(model, x), y, seen, absent)


def batches(data=TRAIN, size=8):
    return list(DataLoader(data, size))


def assert_calibrated(model, result, **kwargs):
    gamma, error, count = reference(model, **kwargs)
    assert result.gamma == pytest.approx(gamma, rel=1e-5)
    assert result.standard_error == pytest.approx(error, rel=1e-4)
    assert result.num_samples == count
    assert get_gamma(model) == pytest.approx(result.gamma, rel=1e-6)


@pytest.mark.parametrize("seen", [lambda: None, lambda: torch.tensor(SEEN), lambda: iter(SEEN)])
@pytest.mark.parametrize(
    "data",
    [
        DataLoader(TRAIN, 8),
        loader(batch_size=7, drop_last=True),
        loader(batch_size=1),
        loader(num_workers=1),
        batches(),
        tuple(batches()),
        [{"image": x, "label": y} for x, y in batches()],
        DataLoader([{"target": y, "x": x, "id": "a"} for x, y in TRAIN], 8),
        [loader(TensorDataset(X[:20], Y[:20])), loader(TensorDataset(X[20:], Y[20:]))],
        {"a": loader(TensorDataset(X[:20], Y[:20])), "b": loader(TensorDataset(X[20:], Y[20:]))},
        [(X, Y)],
    ],
    ids=["loader", "shuffled", "single", "workers", "list", "tuple", "mappings", "named", "loaders", "dict", "one"],
)
def test_gamma_is_the_average_logit_gap(data, seen):
    model = net()
    result = calibrate(model, data, seen(), progress=False)
    assert_calibrated(model, result)
    assert result.split == ClassSplit(NUM_CLASSES, SEEN)
    assert result.estimator == "alg"
    shift = result.gamma * torch.isin(torch.arange(NUM_CLASSES), torch.tensor(ABSENT))
    torch.testing.assert_close(model.eval()(X), raw(model) + shift)


def test_a_generator_is_read_once():
    model = net()
    result = calibrate(model, (batch for batch in batches()), SEEN, progress=False)
    assert_calibrated(model, result)
    for data in ((batch for batch in batches()), iter(DataLoader(TRAIN, 8)), zip(X.split(8), Y.split(8), strict=True)):
        keys = list((model := net()).state_dict())
        with pytest.raises(ValueError, match=r"`seen_classes` to name .* can be read only once, but got None and a"):
            calibrate(model, data, progress=False)
        assert list(model.state_dict()) == keys


def test_absent_classes_can_be_named():
    model = net()
    result = calibrate(model, loader(), SEEN, absent_classes=[4], progress=False)
    assert_calibrated(model, result, absent=[4])
    assert result.split == ClassSplit(NUM_CLASSES, SEEN, [4])
    inferred = calibrate(net(), loader(), absent_classes=[4], progress=False)
    assert inferred == result


def test_labels_beside_the_seen_ones():
    data = blobs(ALL)
    model = net()
    with pytest.warns(UserWarning, match="45 of 90 samples .* not of the `seen_classes` and were left out"):
        result = calibrate(model, loader(data), SEEN, progress=False)
    assert_calibrated(model, result, x=data.tensors[0], y=data.tensors[1])


def test_ignored_labels():
    model, keep = net(), torch.arange(len(Y)) % 4 > 0
    data = TensorDataset(X, torch.where(keep, Y, -100))
    for seen in (None, SEEN):
        result = calibrate(model, loader(data), seen, progress=False)
        assert_calibrated(model, result, x=X[keep], y=Y[keep])


def test_a_second_calibration_replaces_the_first():
    model = net()
    first = calibrate(model, loader(), progress=False)
    with torch.no_grad():
        model.fc.bias[ABSENT] -= 1.0
    second = calibrate(model, loader(), progress=False)
    assert second.gamma == pytest.approx(first.gamma + 1, rel=1e-5)
    assert_calibrated(model, second)


def test_modes_buffers_and_random_streams_are_left_alone():
    class Noisy(Dataset):
        def __len__(self):
            return len(TRAIN)

        def __getitem__(self, index):
            x, y = TRAIN[index]
            return x + torch.randn(5) + np.random.randn() + random.random(), y

    model = net().train()
    model.body[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    streams = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for data in (DataLoader(Noisy(), 8, shuffle=True), DataLoader(Noisy(), 8, num_workers=1)):
        calibrate(model, data, progress=False)
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == streams[1:]
    assert {name: module.training for name, module in model.named_modules() if "absent" not in name} == modes
    assert_same({key: model.state_dict()[key] for key in state}, dict(state))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())

    class Batch(nn.BatchNorm1d):
        def forward(self, x):
            assert not self.training
            assert not torch.is_grad_enabled()
            return super().forward(x)

    model.body[1] = Batch(16)
    calibrate(model.train(), loader(), progress=False)


def test_max_samples():
    def run(data, **kwargs):
        model = net()
        return calibrate(model, data, progress=False, **kwargs)

    first = run(loader(), max_samples=20)
    assert first.num_samples == 20
    torch.manual_seed(9)
    assert run(loader(batch_size=20), max_samples=20).gamma == pytest.approx(first.gamma, rel=1e-6)  # the same twenty
    assert first.gamma != pytest.approx(run(loader()).gamma, rel=1e-4)
    assert run(batches(), max_samples=20).num_samples == 24  # whole batches
    assert run(loader(), max_samples=999).num_samples == len(TRAIN)
    with pytest.raises(ValueError, match="`max_samples` to be at least 1, but got 0"):
        run(loader(), max_samples=0)


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


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"seen_classes": [0, 6]}, ValueError, r"`seen_classes` to hold class ids in \[0, 6\), but got 6"),
        ({"seen_classes": [0, 0]}, ValueError, "each class once"),
        ({"seen_classes": [True]}, TypeError, "to hold integers, but got True"),
        ({"seen_classes": range(6)}, ValueError, "to leave out at least one of the 6 classes"),
        ({"seen_classes": [0]}, ValueError, "at least 2 classes, but got 1"),
        ({"seen_classes": SEEN, "absent_classes": SEEN}, ValueError, "share no class, but both hold 0, 2, 3"),
        ({"estimator": "beta"}, ValueError, "`estimator` to be one of 'alg' or a metric, but got 'beta'"),
        ({"estimator": AverageLogitGap(7, SEEN)}, ValueError, "made for the 6 classes of the head, but got one for 7"),
        ({"estimator": AverageLogitGap(6, SEEN), "seen_classes": SEEN}, ValueError, "beside an `estimator`"),
        ({"head": "body.0.x"}, ValueError, "`head` to name a module of Net, but got 'body.0.x'"),
        ({"unpack_batch": "a.b"}, ValueError, "`unpack_batch` to be the import path"),
        ({"loader": []}, ValueError, "to hold samples of the seen classes, but got none. Check the loader"),
        ({"loader": [], "seen_classes": SEEN}, ValueError, "to hold samples of the seen classes, but got none"),
        ({"loader": loader(), "seen_classes": ABSENT}, ValueError, "to hold samples of the seen classes, but got none"),
        ({"loader": [(X, torch.full_like(Y, -100))]}, ValueError, "to hold samples of the seen classes, but got none"),
        ({"loader": [(X, Y + 4)]}, ValueError, r"class ids in \[0, 6\), rows of the classification head, but got"),
        ({"loader": [(X, Y - 1)]}, ValueError, r"class ids in \[0, 6\), rows of the classification head, but got -1"),
        ({"loader": [(X, Y + 4)], "seen_classes": SEEN}, ValueError, "but 30 of 45 samples have others"),
        ({"loader": [(X, nn.functional.one_hot(Y, 6).float())]}, TypeError, "soft and multi-label .* no single class"),
        ({"loader": [(X, nn.functional.one_hot(Y, 6))]}, ValueError, r"shape \(N,\), one class id a sample"),
        ({"loader": [(X, Y, Y)]}, ValueError, "got a tuple of 3 items. Pass `unpack_batch`"),
        ({"loader": [X]}, ValueError, "got a Tensor. Pass `unpack_batch`"),
        ({"loader": [{"x": X, "z": Y}]}, ValueError, "one of the keys label, .* got the keys x, z"),
        ({"loader": [(X[:9], Y)]}, ValueError, r"logits of shape \(45, 6\) for a batch of 45 .* got \[\(9, 6\)\]"),
        ({"loader": blobs(ALL)}, ValueError, r"shape \(N,\), one class id a sample, but got \(\)"),
        ({"loader": loader(blobs(ALL))}, ValueError, "to leave out at least one of the 6 classes"),
        ({"loader": loader(blobs([3]))}, ValueError, "at least 2 classes, but got 1"),
    ],
)
def test_errors_leave_the_model_as_it_was(change, error, text, attached):
    model = net()
    if attached:
        set_gamma(model, 2.5, [0, 1])
    before = copy.deepcopy(model.state_dict())
    hooks = len(model.fc._forward_hooks)
    with pytest.raises(error, match=text):
        calibrate(model, **{"loader": loader(), "progress": False, **change})
    assert_same(dict(model.state_dict()), dict(before))
    assert len(model.fc._forward_hooks) == hooks
    assert get_gamma(model) == (2.5 if attached else None)
    assert model.training
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("index", [0, 17, 44])
def test_logits_that_are_not_finite(index, value):
    x = X.clone()
    x[index] = value
    model = net()
    keys = list(model.state_dict())
    text = f"finite logits in the calibration pass, but batch {index // 8} has NaN or infinite ones. Gamma stays unset"
    with pytest.raises(ValueError, match=text):
        calibrate(model, DataLoader(TensorDataset(x, Y), 8), progress=False)
    assert list(model.state_dict()) == keys


def test_an_error_of_the_user_leaves_the_model_as_it_was():
    def broken():
        yield X, Y
        raise KeyboardInterrupt

    model = net().train()
    keys = list(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, broken(), SEEN, progress=False)
    assert list(model.state_dict()) == keys
    assert model.training


def test_a_head_that_gives_probabilities():
    class Softmax(nn.Linear):
        def forward(self, x):
            return super().forward(x).softmax(1)

    model = net(lambda: nn.Sequential(nn.Linear(5, 16), Softmax(16, NUM_CLASSES)))
    with pytest.raises(ValueError, match=r"probabilities|moves them by"):
        calibrate(model, loader(), progress=False)


def test_an_estimator_object():
    model, estimator = net(), AverageLogitGap(NUM_CLASSES, SEEN)
    result = calibrate(model, loader(), estimator=estimator, progress=False)
    assert_calibrated(model, result)
    assert result.estimator == "AverageLogitGap"
    again = calibrate(model, loader(), estimator=estimator, progress=False)
    assert again == result


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


def test_the_progress_bar(capsys):
    calibrate(net(), loader())
    told = capsys.readouterr().err
    assert "Reading labels" in told
    assert "Calibrating" in told
    assert "/6" in told
    calibrate(net(), loader(), progress=False)
    assert capsys.readouterr().err == ""


def test_the_result():
    result = calibrate(net(), loader(), progress=False)
    assert isinstance(result, CalibrationResult)
    plain = result.as_dict()
    assert plain["seen_classes"] == SEEN
    assert plain["absent_classes"] == ABSENT
    assert {key: type(value) for key, value in plain.items()} == {
        "gamma": float,
        "standard_error": float,
        "num_samples": int,
        "estimator": str,
        "num_classes": int,
        "seen_classes": list,
        "absent_classes": list,
    }


def test_a_model_that_was_attached_before():
    model = attach(net())
    assert_calibrated(model, calibrate(model, loader(), progress=False))
