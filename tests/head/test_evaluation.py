import random
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver

from lightning_calibft.head import attach, get_gamma, set_gamma
from lightning_calibft.head.evaluation import evaluation
from lightning_calibft.head.probe import probe

from .models import NUM_CLASSES, inputs


class Stateful(nn.Module):
    """Writes state in every forward: in place, by assignment, by name, under new names and with other shapes."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("queue", torch.zeros(8))
        self.register_buffer("center", torch.zeros(8))
        self.register_buffer("grown", torch.zeros(0))
        self.register_buffer("empty", None)
        self.number, self.average = 0, torch.zeros(8)
        self.list, self.deque, self.dict, self.set = [], deque([1], maxlen=4), {}, set()

    def forward(self, x):
        x = self.body(x.flatten(1)[:, :8]) - self.center
        self.calls += 1
        self.queue.data.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        self.center = 0.9 * self.center + 0.1 * x.detach().mean(0)
        self.grown.resize_(2).fill_(1)
        self.empty = torch.ones(2)
        self.number += 1
        self.average.add_(1)
        self.later = self.number
        if "cache" not in self._buffers:
            self.register_buffer("cache", torch.ones(3), persistent=False)
        self.list.append(len(x))
        self.deque.append(len(x))
        self.dict[self.number] = x
        self.set.add(self.number)
        return self.fc(x)


def state_of(model):
    state = {name: value.clone() for name, value in model.named_buffers()}
    state |= {name: value.clone() for name, value in model.named_parameters()}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("training", "number", "later"):
                state[f"{name}.{key}"] = value
            elif key in ("list", "deque", "dict", "set"):
                state[f"{name}.{key}"] = type(value)(value)
            elif isinstance(value, torch.Tensor):
                state[f"{name}.{key}"] = value.clone()
    return state


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(state[name], value), name
        else:
            assert state[name] == value, name


def run_and_probe(model, x):
    with evaluation(model):
        model(x)
    probe(lambda: model(x), model)


def test_what_a_forward_writes_is_put_back():
    model, x = attach(Stateful()), inputs()
    tensors = [*model.buffers(), model.average, *model.parameters()]
    lists = [model.list, model.deque, model.dict, model.set]
    expected = state_of(model)
    run_and_probe(model, x)
    assert_same(state_of(model), expected)
    assert all(a is b for a, b in zip(tensors, [*model.buffers(), model.average, *model.parameters()], strict=True))
    assert all(a is b for a, b in zip(lists, [model.list, model.deque, model.dict, model.set], strict=True))
    assert model.empty is None
    assert "cache" not in model._non_persistent_buffers_set
    assert model.deque.maxlen == 4


def test_each_forward_of_the_probe_meets_the_same_state():
    class Centered(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, NUM_CLASSES)
            self.register_buffer("center", torch.zeros(8))

        def forward(self, x):
            x = x - self.center
            self.center += x.mean(0)
            return self.fc(x)

    model, x = attach(Centered()), torch.randn(4, 8) + 3
    probe(lambda: model(x), model)
    assert not model.center.any()


def test_an_error_puts_all_back_as_well():
    model, x = Stateful(), inputs()
    expected = state_of(model)
    model.fc.register_forward_hook(lambda *_: model.no_such_attribute)
    with pytest.raises(AttributeError), evaluation(model):
        model(x)
    assert_same(state_of(model), expected)


def test_gamma_can_be_set_inside_and_afterwards():
    model = attach(Stateful())
    with evaluation(model):
        set_gamma(model, 2.0, [0, 1])
    assert get_gamma(model) == 2
    with evaluation(model):
        model(inputs())
    set_gamma(model, 3.0, [0, 1])
    assert get_gamma(model) == 3
    assert model.state_dict()["fc.absent_class_calibration.offset"] == 3


def test_only_what_has_changed_is_written():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    y = model(torch.randn(4, 8)).sum()  # its backward pass needs the buffers and weights as they are
    versions = [tensor._version for tensor in (*model.parameters(), *model.buffers())]
    with evaluation(model):
        model(torch.randn(4, 8))
    assert [tensor._version for tensor in (*model.parameters(), *model.buffers())] == versions
    y.backward()


def test_batch_norm_that_stays_in_training_mode():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.drop, self.fc = nn.BatchNorm1d(8, momentum=0.3), nn.Dropout(), nn.Linear(8, NUM_CLASSES)
            self.modes = []

        def train(self, mode=True):
            super().train(mode)
            self.bn.train(True)
            return self

        def forward(self, x):
            self.modes.append((self.training, self.bn.training, self.drop.training))
            seen.append(self.modes[-1])
            return self.fc(self.drop(self.bn(x)))

    seen = []
    model, x = attach(Kept()), torch.randn(16, 8)
    expected = state_of(model)
    run_and_probe(model, x)
    assert_same(state_of(model), expected)
    assert set(seen) == {(False, True, False)}
    assert model.modes == []


@pytest.mark.parametrize("frozen", [(), ("bn",), ("fc", "bn"), ("",)])
def test_each_module_gets_its_own_mode_back(frozen):
    model = nn.Sequential()
    for name, module in (("body", nn.Linear(8, 8)), ("bn", nn.BatchNorm1d(8)), ("fc", nn.Linear(8, NUM_CLASSES))):
        model.add_module(name, module)
    attach(model)
    for name in frozen:
        model.get_submodule(name).eval()
    modes = [module.training for module in model.modules()]
    with evaluation(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("behind_the_head", [False, True])
@pytest.mark.parametrize("observer", [MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver])
def test_observers_of_quantization(observer, behind_the_head):
    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            scheme = torch.per_tensor_affine if observer is MovingAverageMinMaxObserver else torch.per_channel_affine
            kwargs = {} if observer is MovingAverageMinMaxObserver else {"ch_axis": 1}
            self.fc = nn.Linear(8, NUM_CLASSES)
            self.quantize = FakeQuantize(observer, quant_min=0, quant_max=255, qscheme=scheme, **kwargs)

        def forward(self, x):
            return self.quantize(self.fc(x)) if behind_the_head else self.fc(self.quantize(x))

    model = attach(Quantized())
    for run in range(2):
        expected = state_of(model)
        with evaluation(model):
            model(5 * torch.randn(4, 8))
        assert_same(state_of(model), expected)
        model(torch.randn(4, 8) * (run + 1))  # the second time, the observer has seen something


class MergedInEval(nn.Linear):
    """A layer with LoRA that merges as the original implementation does."""

    def __init__(self):
        super().__init__(8, NUM_CLASSES)
        self.a, self.b = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(NUM_CLASSES, 2))
        self.merged, self.merges = False, 0

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.b.data @ self.a.data
            self.merged = not mode
            merges.append(mode)
        return self

    def forward(self, x):
        return super().forward(x) + (0 if self.merged else x @ self.a.T @ self.b.T)


merges = []


@pytest.mark.parametrize("before", ["training", "eval", "eval without merging", "training in a model in eval mode"])
@pytest.mark.parametrize("inner", [True, False], ids=["inner", "itself"])
def test_adapters_that_merge_in_eval_mode(before, inner):
    torch.manual_seed(0)
    layer = MergedInEval()
    model = attach(nn.Sequential(nn.Linear(8, 8), nn.Sequential(layer)) if inner else layer)
    if before == "eval without merging":
        for module in model.modules():
            module.training = False
    elif before != "training":
        model.eval()
    if before == "training in a model in eval mode":
        layer.train()
    expected, merged = state_of(model), layer.merged
    merges.clear()
    run_and_probe(model, torch.randn(4, 8))
    assert_same(state_of(model), expected)
    assert layer.merged == merged
    assert merges == ([] if before.startswith("eval") else [False, True] * 2)


@pytest.mark.parametrize("merged", [False, True])
def test_adapters_of_peft(merged):
    peft = pytest.importorskip("peft")
    network = nn.Sequential()
    for name, module in (("body", nn.Linear(8, 8)), ("act", nn.ReLU()), ("fc", nn.Linear(8, NUM_CLASSES))):
        network.add_module(name, module)
    model = peft.get_peft_model(network, peft.LoraConfig(target_modules=["body"], modules_to_save=["fc"]))
    nn.init.normal_(model.base_model.model.body.lora_B["default"].weight)
    attach(model)
    if merged:
        model.merge_adapter()
    expected = state_of(model)
    run_and_probe(model, torch.randn(4, 8))
    assert_same(state_of(model), expected)
    assert model.base_model.model.body.merged == merged


def test_the_random_state_is_kept():
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, NUM_CLASSES)

        def forward(self, x):
            return self.fc(x + torch.rand(()) + random.random() + np.random.rand())

    model = attach(Random())
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = torch.rand(3), random.random(), np.random.rand(3)
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    run_and_probe(model, torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    drawn = torch.rand(3), random.random(), np.random.rand(3)
    assert torch.equal(drawn[0], expected[0])
    assert drawn[1] == expected[1]
    assert (drawn[2] == expected[2]).all()


def test_a_lazy_layer_is_left_alone():
    model = nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(8, NUM_CLASSES))
    with evaluation(model):
        model(torch.randn(4, 8))


def test_gradients_and_compiled_code_are_off():
    model = nn.Linear(8, NUM_CLASSES)
    compiled = torch.compile(model, backend=lambda *_: pytest.fail("compiled"))
    with evaluation(compiled):
        assert not compiled(torch.randn(4, 8)).requires_grad
