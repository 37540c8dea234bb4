"""The calibration survives what people do with models."""

import functools

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_calibft.head import attach, fold, get_gamma, set_gamma
from lightning_calibft.head.probe import probe
from lightning_calibft.head.record import record_logits

from .models import GAMMA, NUM_CLASSES, SEEN, SHIFT, Convolutional, Distilled, Plain, inputs

MODELS = [Plain, Convolutional, Distilled]


def _resnet():
    return timm.create_model("test_resnet", num_classes=NUM_CLASSES)


@pytest.fixture(autouse=True)
def _no_compiled_code():
    torch.compiler.reset()


@pytest.fixture(params=MODELS)
def calibrated(request):
    """A calibrated model, inputs, and the logits that it should give."""
    model, x = request.param().eval(), inputs()
    with torch.no_grad():
        expected = model(x) + SHIFT
    return set_gamma(model, GAMMA, SEEN), x, expected


def _check(function, x, expected):
    with torch.no_grad():
        torch.testing.assert_close(function(x), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_script(calibrated):
    model, x, expected = calibrated
    _check(torch.jit.script(model), x, expected)
    _check(torch.jit.script(model.train()).eval(), x, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_trace(calibrated):
    model, x, expected = calibrated
    _check(torch.jit.trace(model, x), x, expected)


@pytest.mark.parametrize("strict", [True, False])
def test_export(calibrated, strict):
    model, x, expected = calibrated
    _check(torch.export.export(model, (x,), strict=strict).module(), x, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(calibrated, backend):
    model, x, expected = calibrated
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    _check(compiled, x, expected)
    _check(compiled.train().eval(), x, expected)
    set_gamma(compiled, 2 * GAMMA, SEEN)
    _check(compiled, x, expected + SHIFT)
    _check(fold(compiled), x, expected + SHIFT)


def test_compile_with_inductor():
    model, x = nn.Linear(8, NUM_CLASSES).eval(), torch.randn(4, 8)
    expected = model(x) + SHIFT
    _check(torch.compile(set_gamma(model, GAMMA, SEEN)), x, expected)


@pytest.mark.parametrize(
    "compile_", [functools.partial(torch.compile, backend="eager"), None], ids=["wrapped", "in place"]
)
def test_a_model_that_was_compiled_and_run_before(compile_):
    model, x = Plain().eval(), inputs()
    if compile_ is None:
        model.compile(backend="eager")
    else:
        model = compile_(model)
    with torch.no_grad():  # As below: another mode would be compiled anew.
        expected = model(x) + SHIFT
    set_gamma(model, GAMMA, SEEN)
    _check(model, x, expected)
    probe(lambda: model(x), model)
    with record_logits(model) as recorded:
        _check(model, x, expected)
    torch.testing.assert_close(recorded, [(expected - SHIFT).detach()])


def test_a_timm_average_follows_gamma():
    model, x = attach(_resnet()).eval(), torch.randn(2, 3, 32, 32)
    average = ModelEmaV3(model, decay=0.5)
    raw = model(x)
    set_gamma(model, GAMMA, SEEN)
    average.update(model)
    # Both buffers are halfway: a quarter of gamma.
    _check(average.module.eval(), x, raw + SHIFT / 4)
    average.set(model)
    assert get_gamma(average) == GAMMA
    _check(average.module, x, raw + SHIFT)


@pytest.mark.parametrize("multi", [None, get_ema_multi_avg_fn(0.5)])
def test_a_torch_average_follows_gamma(multi):
    model, x = attach(Plain()).eval(), inputs()
    average = AveragedModel(model, multi_avg_fn=multi, use_buffers=True).eval()
    raw = model(x)
    set_gamma(model, GAMMA, SEEN)
    average.update_parameters(model)
    assert get_gamma(average) == GAMMA
    _check(average, x, raw + SHIFT)
    average.update_parameters(set_gamma(model, 3 * GAMMA, SEEN))
    assert get_gamma(average) == 2 * GAMMA


def test_an_average_that_began_with_a_calibrated_model():
    model, x = set_gamma(Plain().eval(), GAMMA, SEEN), inputs()
    average = AveragedModel(model, use_buffers=True).eval()
    for _ in range(3):
        average.update_parameters(model)
    _check(average, x, model(x))


def test_dynamo_does_not_break_the_graph():
    model = set_gamma(Plain().eval(), GAMMA, SEEN)
    explanation = torch._dynamo.explain(model)(inputs())
    assert explanation.graph_break_count == 0


def test_distributed_data_parallel_keeps_the_keys():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model, x = attach(Plain()), inputs()
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(x).sum().backward()
        state = set_gamma(Plain(), GAMMA, SEEN).state_dict()
        wrapped.load_state_dict({f"module.{key}": value for key, value in state.items()})
        assert get_gamma(wrapped) == GAMMA
        with record_logits(wrapped) as recorded:
            _check(wrapped.eval(), x, model(x).detach())
        torch.testing.assert_close(recorded[0] + SHIFT, model(x).detach())
    finally:
        torch.distributed.destroy_process_group()


def test_symbolic_tracing(calibrated):
    model, x, expected = calibrated
    _check(torch.fx.symbolic_trace(model), x, expected)


def test_weight_norm_keeps_the_head_a_head():
    head = nn.utils.parametrizations.weight_norm(nn.Linear(8, NUM_CLASSES)).eval()
    x = torch.randn(4, 8)
    expected = head(x) + SHIFT
    _check(set_gamma(head, GAMMA, SEEN), x, expected)
    _check(fold(head), x, expected)
