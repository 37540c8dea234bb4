import copy

import pytest
import torch
from torch import nn

from lightning_calibft.head import attach, set_gamma
from lightning_calibft.head.probe import NotFiniteError, _random_offset, probe
from lightning_calibft.head.record import record_logits

from .models import (
    GAMMA,
    NUM_CLASSES,
    SEEN,
    After,
    Convolutional,
    Distilled,
    Plain,
    Wrapper,
    inputs,
)


class _Weighted(nn.Module):
    """Heads that the model weighs, as EfficientViM does."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights
        self.heads = nn.ModuleList([nn.Linear(12, NUM_CLASSES) for _ in weights])

    def forward(self, x):
        x = x.flatten(1)
        return sum(weight * head(x) for weight, head in zip(self.weights, self.heads, strict=True))


class _Scales(nn.Module):
    def __init__(self, scales):
        super().__init__()
        self.scales = scales

    def forward(self, x):
        return self.scales * x


def _probe(model, head=None, x=None):
    x = inputs() if x is None else x
    attach(model, head)
    probe(lambda: model(x), model)


@pytest.mark.parametrize(
    "kind", ["nothing", "log_softmax", "softmax", "tuple", "list", "mapping", "attribute", "float32"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_right_head_passes(kind, dtype):
    torch.manual_seed(0)
    _probe(After(kind).to(dtype), x=inputs().to(dtype))


@pytest.mark.parametrize("model_class", [Plain, Convolutional, Distilled, lambda: _Weighted([0.5, 0.3, 0.2])])
def test_every_kind_of_head_passes(model_class):
    _probe(Wrapper(model_class()))


def test_the_message_shows_the_candidates_and_what_else_to_do():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="scales, clips or replaces") as error:
        _probe(After("temperature"), head="classifier")
    assert str(error.value).endswith(
        " Something after it scales, clips or replaces its output. Other candidates of that width: 'real' (0 times)."
        ' If no layer gives the logits, pass `head="forward"`, which stands for the output of the whole.'
        " Set `num_classes = 5` on that After first."
    )


def test_a_head_under_autocast_passes():
    model = attach(After("softmax"))

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return model(inputs())

    probe(forward, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("auxiliary", r"does not reach them \(0 times\).*The head is 'real': pass `head=\"real\"`"),
        ("temperature", r"moves them by 0\.[45]\d* times .* scales, clips or replaces .*'real' \(0 times\).*head="),
        ("relu", "scales, clips or replaces"),
        ("sigmoid", "scales, clips or replaces"),
        ("softcap", "scales, clips or replaces"),
        ("functional", r"the forward never calls it.*`F\.linear`"),
        ("twice", "one forward calls it 2 times"),
        ("narrowed", r"another number of classes: its shape is \(4, 3\)"),
        ("added", "the logits of the model differ from its output by up to.*cannot be measured"),
        ("pooled", r"its output has the shape \(4, 2, 5\) and the output of the model \(4, 5\)"),
        ("nan", "to be numbers, but got NaN"),
        ("none", "to hold logits or a loss, but it holds no tensor of either kind"),
    ],
)
def test_a_wrong_head_is_refused(kind, words, dtype):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=words):
        _probe(After(kind).to(dtype), head="classifier", x=inputs().to(dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_of_a_model_that_has_diverged_nothing_is_said(value):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, NUM_CLASSES))
    model[1].bias.data[1] = value
    with pytest.raises(NotFiniteError, match=r"Expected the head of Sequential to give finite logits"):
        _probe(model)


def test_a_class_with_a_scale_of_its_own_is_refused():
    # The scales are such that on average over the classes the offset comes through once.
    offset = _random_offset(NUM_CLASSES)
    squares = (offset - offset.mean()) * offset
    scales = torch.ones(NUM_CLASSES)
    scales[:2] += torch.tensor([0.2, -0.2 * squares[0] / squares[1]])
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, NUM_CLASSES), _Scales(scales))
    with pytest.raises(ValueError, match=r"moves them by 1 times that offset instead of once, with a residual of 0"):
        _probe(model)


def test_weights_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ValueError, match=r"'heads.0' and 'heads.1' .* moves them by 0\.5 \+ 0\.25 times"):
        _probe(_Weighted([0.5, 0.25]))


def test_one_head_of_a_pair_is_refused():
    with pytest.raises(ValueError, match=r"moves them by 0\.5 times"):
        _probe(Distilled(), head="head_dist")


def test_a_model_without_calibration_is_refused():
    with pytest.raises(ValueError, match=r"Call `attach\(model\)` first"):
        probe(lambda: None, Plain())


@pytest.mark.parametrize("kind", ["log_softmax", "relu"])
def test_the_model_is_left_as_it_was(kind):
    model = nn.Sequential(Plain(), nn.LogSoftmax(-1) if kind == "log_softmax" else nn.ReLU()).train()
    model[0].body[2].eval()  # A frozen batch norm.
    set_gamma(model, GAMMA, SEEN)
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    grads = []

    def forward():
        torch.rand(3)
        output = model(inputs())
        grads.append(output.requires_grad)
        return output

    if kind == "relu":
        with pytest.raises(ValueError, match="clips"):
            probe(forward, model)
    else:
        probe(forward, model)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(grads)


def test_an_error_in_the_forward_leaves_the_model_as_it_was():
    model = attach(Plain())

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe(fail, model)
    assert all(module.training for module in model.modules())


def test_a_forward_that_is_random_in_eval_mode_passes():
    model = attach(Plain())
    probe(lambda: model(inputs() + torch.rand(4, 3, 2, 2)), model)


def test_a_calibrated_model_passes():
    model = set_gamma(Plain(), 100.0, SEEN)
    probe(lambda: model(inputs()), model)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("nothing", None), ("temperature", r"0\.5 times"), ("auxiliary", r"The head is '_orig_mod.real'")],
)
def test_a_compiled_model_that_has_already_run_is_probed(kind, words):
    model = torch.compile(attach(After(kind).eval(), head="classifier"), backend="eager")
    with torch.no_grad():  # As the probe does: another mode would be compiled anew.
        model(inputs())
    if words is None:
        probe(lambda: model(inputs()), model)
    else:
        with pytest.raises(ValueError, match=words):
            probe(lambda: model(inputs()), model)


def test_the_recorded_logits_are_weighed_as_the_model_weighs_them():
    model = _Weighted([0.5, 0.3, 0.2]).eval()
    _probe(model)
    expected = model(inputs())
    set_gamma(model, GAMMA, SEEN)
    with record_logits(model) as recorded:
        model(inputs())
    torch.testing.assert_close(recorded, [expected.detach()])
