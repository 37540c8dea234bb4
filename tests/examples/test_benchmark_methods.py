"""The ways to fine-tune do what they say: on the images of the digits benchmark."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.seed import isolate_rng

pytestmark = pytest.mark.filterwarnings("ignore:::lightning.pytorch")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def bench():
    """The digits benchmark, under a name that the demo does not have."""
    pytest.importorskip("sklearn")
    pytest.importorskip("peft")
    with isolate_rng(), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.syspath_prepend(str(EXAMPLES / "benchmarks"))
        spec = importlib.util.spec_from_file_location("benchmark_digits", EXAMPLES / "benchmarks" / "digits.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look it up
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def methods(bench):
    return importlib.import_module("methods")


@pytest.fixture(scope="module")
def setting(bench):
    return bench.DigitSetting(0, 50, "SGD", 2e-3, epochs=1)


def test_shares_are_nested_and_half_is_that_of_the_demo(setting):
    for seed in range(3):
        thirty, fifty, seventy = (replace(setting, seed=seed, share=share) for share in (30, 50, 70))
        assert fifty.seen == fifty.data.seen_classes
        assert set(thirty.seen) < set(fifty.seen) < set(seventy.seen)
        assert (len(thirty.seen), len(seventy.seen)) == (3, 7)


def changed(setting, module):
    """Names of the pre-trained parameters that training changed."""
    before = setting.pretrained().state_dict()
    after = {name.replace(".base_layer", ""): value for name, value in module.state_dict().items()}
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def test_what_is_frozen_stays(bench, methods, setting):
    names = set(dict(setting.pretrained().named_parameters()))
    head = {"head.weight", "head.bias"}
    for method, expected in {
        methods.fine_tuned: names,
        methods.frozen_classifier: names - head,
        methods.linear_probing: head,
        bench.bias_only: {name for name in names if name.endswith("bias")},
        bench.low_rank: set(),
    }.items():
        assert changed(setting, method(setting)) == expected


@torch.no_grad()
def test_low_rank_adapters_change_all_layers(bench, setting):
    module = bench.low_rank(replace(setting, optimizer="AdamW"))
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    layers = {name.split(".lora_")[0] for name in trained}
    assert layers == {"backbone.0", "backbone.4", "backbone.8", "head"}
    assert all(value.abs().sum() > 0 for value in trained.values())  # B starts at zero


def test_interpolation_is_a_line_between_the_weights(methods, setting):
    ends = setting.pretrained().state_dict(), methods.fine_tuned(setting).state_dict()
    for alpha in (0.0, 0.75, 1.0):
        state = methods.interpolated(setting, alpha).state_dict()
        for name, value in state.items():
            torch.testing.assert_close(value, torch.lerp(ends[0][name], ends[1][name], alpha))


def test_the_partial_softmax_leaves_absent_rows_alone(methods, setting):
    module = methods.start(setting, setting.seen)
    images, target = (part[:16] for part in setting.seen_data.tensors)
    loss = module.training_step((images, target), 0)
    loss.backward()
    seen = torch.tensor(setting.seen)
    expected = F.cross_entropy(module(images)[:, seen], torch.searchsorted(seen, target))
    torch.testing.assert_close(loss, expected)
    touched = module.head.weight.grad.abs().sum(1) > 0
    assert touched.nonzero().flatten().tolist() == setting.seen
    everything = methods.start(setting)
    assert everything.training_step((images, target), 0) == F.cross_entropy(everything(images), target)


@torch.no_grad()
def test_the_cosine_head_starts_from_the_pretrained_rows(methods, setting):
    module, before = methods.with_cosine_head(setting), setting.pretrained()
    images = setting.seen_data.tensors[0]
    features, weight = before.backbone(images), before.head.weight
    norms = features.norm(dim=1, keepdim=True) * weight.norm(dim=1)
    expected = (features @ weight.T) / norms * norms.mean()
    torch.testing.assert_close(module(images), expected)
    assert module.head.weight.requires_grad
    tuned = methods.cosine_classifier(setting)
    assert tuned.head.scale != module.head.scale
    assert not torch.equal(tuned.head.weight, module.head.weight)


def test_leave_out_local_sgd_averages_models_of_half_of_the_classes(methods, setting, monkeypatch):
    fit, trained = methods.fit, []
    before = setting.pretrained().state_dict()

    def recording(module, data, *args, **options):
        for name, value in before.items():
            assert torch.equal(module.state_dict()[name], value)
        trained.append((fit(module, data, *args, **options), data.tensors[1]))
        return trained[-1][0]

    monkeypatch.setattr(methods, "fit", recording)
    module, cost = methods.leave_out_local_sgd(setting)
    subsets = [frozenset(labels.tolist()) for _, labels in trained]
    assert all(len(subset) == math.ceil(5 / 2) and subset < set(setting.seen) for subset in subsets)
    assert len(subsets) == 10
    assert len(set(subsets)) > 3
    assert cost == sum(len(labels) for _, labels in trained) / len(setting.seen_data)
    for name, value in module.state_dict().items():
        mean = torch.stack([model.state_dict()[name] for model, _ in trained]).mean(0)
        torch.testing.assert_close(value, mean)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adadelta", "AdaBelief"])
def test_each_optimizer_is_the_one_of_its_name(methods, setting, name):
    used = []

    class Recording(methods.Classifier):
        def on_train_end(self):
            used.append(self.optimizers().optimizer)

    module = Recording(setting.pretrained(), name, 0.01)
    methods.fit(module, setting.data.held_out, 1, 0)
    assert [type(optimizer).__name__ for optimizer in used] == [name]
    assert used[0].defaults["lr"] == 0.01
    assert used[0].param_groups[0]["lr"] < 1e-6  # the end of the cosine
