"""The calibration of a whole model survives what people do with models."""

import copy
import pickle

import pytest
import torch

from lightning_calibft.head import attach, detach, get_gamma, set_gamma
from lightning_calibft.head.probe import probe

from .models import ABSENT, GAMMA, NUM_CLASSES, SEEN, SHIFT, Scaled, inputs, logits_by_hand

KEYS = ["absent_class_calibration.offset", "absent_class_calibration.mask"]


@pytest.fixture(autouse=True)
def _no_compiled_code():
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("kind", "backend"),
    [(kind, "eager") for kind in ("tuple", "list", "named logits", "named tuple", "dict")]
    + [("tensor", "aot_eager"), ("dict", "aot_eager")],
)
def test_compile(kind, backend):
    model, x = Scaled(kind).eval(), inputs()
    expected = logits_by_hand(kind, model(x)) + SHIFT
    set_gamma(model, GAMMA, SEEN, head="forward")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(logits_by_hand(kind, compiled(x)), expected)
        torch.testing.assert_close(logits_by_hand(kind, compiled.train().eval()(x)), expected)
        set_gamma(compiled, 2 * GAMMA, SEEN)
        torch.testing.assert_close(logits_by_hand(kind, compiled(x)), expected + SHIFT)


def test_a_model_that_was_compiled_and_run_before():
    model, x = torch.compile(Scaled().eval(), backend="eager"), inputs()
    with torch.no_grad():
        expected = model(x) + SHIFT
        set_gamma(model, GAMMA, SEEN, head="forward")
        torch.testing.assert_close(model(x), expected)
        probe(lambda: model(x), model)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ["tensor", "dict"])
def test_export(kind, strict):
    if strict and torch.__version__ < (2, 7):
        pytest.skip("this torch cannot export hooks on the outermost module")
    model, x = Scaled(kind).eval(), inputs()
    expected = logits_by_hand(kind, model(x)) + SHIFT
    set_gamma(model, GAMMA, SEEN, head="forward")
    exported = torch.export.export(model, (x,), strict=strict).module()
    torch.testing.assert_close(logits_by_hand(kind, exported(x)), expected)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_calibrated_and_independent(copy_of):
    model, x = Scaled("dict").eval(), inputs()
    expected = model(x)["logits"] + SHIFT
    copied = copy_of(set_gamma(model, GAMMA, SEEN, head="forward"))
    torch.testing.assert_close(copied(x)["logits"], expected)
    detach(copied)
    torch.testing.assert_close(copied(x)["logits"], expected - SHIFT)
    torch.testing.assert_close(model(x)["logits"], expected)


def test_state_dicts_load_strictly():
    plain = Scaled()
    model = attach(Scaled(), head="forward")
    assert list(model.state_dict()) == [*plain.state_dict(), *KEYS]
    model.load_state_dict(set_gamma(Scaled(), GAMMA, SEEN, ABSENT, head="forward").state_dict())
    assert get_gamma(model) == GAMMA
    model.load_state_dict(plain.state_dict())
    assert get_gamma(model) is None
    torch.testing.assert_close(model.model.fc.weight, plain.model.fc.weight)


def test_the_output_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    config.num_labels = NUM_CLASSES
    model, x = transformers.ViTForImageClassification(config).eval(), torch.randn(2, 3, 8, 8)
    expected = model(x, labels=torch.tensor([0, 1]))
    attach(model, head="forward")
    probe(lambda: model(x), model)
    set_gamma(model, GAMMA, SEEN)
    output = model(x, labels=torch.tensor([0, 1]))
    assert type(output) is type(expected)
    torch.testing.assert_close(output.logits, expected.logits + SHIFT)
    torch.testing.assert_close(output["logits"], output.logits)
    torch.testing.assert_close(output[1], output.logits)
    # The loss is that of the raw logits, as the model has computed it.
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(model(x, return_dict=False)[0], output.logits)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x).logits, output.logits)
