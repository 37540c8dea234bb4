import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn

from lightning_calibft.head import attach, detach, get_gamma, set_gamma
from lightning_calibft.head.offset import CHILD_NAME

from .models import ABSENT, GAMMA, NUM_CLASSES, SEEN, SHIFT, Convolutional, Distilled, Plain, inputs

# Not a number that half precision holds.
FINE_GAMMA = torch.tensor(1 / 3).item()


@pytest.mark.parametrize("model_class", [Plain, Convolutional, Distilled])
def test_only_the_absent_logits_move_and_only_in_eval_mode(model_class):
    model, x = model_class().eval(), inputs()
    raw = model(x)
    set_gamma(model, GAMMA, SEEN)
    torch.testing.assert_close(model(x), raw + SHIFT)
    for module in model.modules():
        # The body stays in eval mode, so that its batch norm and dropout do not count.
        if module is not model and isinstance(module, (nn.Linear, nn.Conv2d)):
            module.train()
    torch.testing.assert_close(model(x), raw, rtol=0, atol=0)


def test_a_convolution_with_positions_moves_along_its_channels():
    head, x = nn.Conv2d(3, NUM_CLASSES, 1).eval(), torch.randn(2, 3, 5, 5)
    raw = head(x)
    torch.testing.assert_close(set_gamma(head, GAMMA, SEEN)(x), raw + SHIFT.reshape(1, -1, 1, 1))
    torch.testing.assert_close(head(x[0]), raw[0] + SHIFT.reshape(-1, 1, 1))


@pytest.mark.parametrize("training", [True, False])
def test_a_new_child_has_the_mode_of_its_head(training):
    head = attach(nn.Linear(8, NUM_CLASSES).train(training))
    assert head.get_submodule(CHILD_NAME).training is training


def test_the_buffers_are_ordinary_float32_tensors_whatever_the_context():
    with torch.inference_mode():
        head = nn.Linear(8, NUM_CLASSES)
        torch.set_default_dtype(torch.float16)
        try:
            attach(head)
        finally:
            torch.set_default_dtype(torch.float32)
    for buffer in head.get_submodule(CHILD_NAME).buffers():
        assert buffer.dtype == torch.float32
        assert not buffer.is_inference()
        assert not buffer.any()


@pytest.mark.parametrize(
    "cast",
    [
        nn.Module.half,
        nn.Module.bfloat16,
        nn.Module.double,
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.type(torch.float16),
        lambda m: m.half().float(),
    ],
)
def test_a_cast_leaves_gamma_exact_and_the_logits_in_their_dtype(cast):
    model = cast(set_gamma(Plain().eval(), FINE_GAMMA, SEEN))
    child = model.fc.get_submodule(CHILD_NAME)
    assert (child.offset.dtype, child.mask.dtype) == (torch.float32, torch.float32)
    assert get_gamma(model) == FINE_GAMMA
    dtype = model.fc.weight.dtype
    x = inputs().to(dtype)
    calibrated = model(x)
    assert calibrated.dtype == dtype
    raw = detach(model)(x)
    expected = (raw.to(torch.promote_types(dtype, torch.float32)) + FINE_GAMMA * (SHIFT > 0)).to(dtype)
    torch.testing.assert_close(calibrated, expected, rtol=0, atol=0)


def test_autocast_keeps_its_dtype():
    model = set_gamma(Plain().eval(), FINE_GAMMA, SEEN)
    with torch.autocast("cpu", torch.bfloat16):
        calibrated = model(inputs())
        raw = detach(model)(inputs())
    assert calibrated.dtype == torch.bfloat16
    torch.testing.assert_close(calibrated, (raw.float() + FINE_GAMMA * (SHIFT > 0)).bfloat16(), rtol=0, atol=0)


def test_the_buffers_follow_the_device():
    model = set_gamma(Plain(), GAMMA, SEEN)
    state = model.state_dict()
    child = model.fc.get_submodule(CHILD_NAME)
    model.half().to("meta")
    assert {buffer.device.type for buffer in child.buffers()} == {"meta"}
    model.to_empty(device="cpu").load_state_dict(state)
    assert {buffer.device.type for buffer in child.buffers()} == {"cpu"}
    assert get_gamma(model) == GAMMA


def test_a_head_on_the_meta_device_is_attached_there():
    with torch.device("meta"):
        model = Plain()
    attach(model)
    assert model.fc.get_submodule(CHILD_NAME).mask.is_meta
    model.load_state_dict(Plain().state_dict(), assign=True)
    assert get_gamma(model) is None
    assert model.eval()(inputs()).shape == (4, NUM_CLASSES)


def test_the_state_dict_only_gains_keys():
    model = Plain()
    before = list(model.state_dict())
    attach(model)
    added = [f"fc.{CHILD_NAME}.offset", f"fc.{CHILD_NAME}.mask"]
    assert list(model.state_dict()) == before + added
    detach(model)
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_without_the_calibration_loads_strictly_and_is_not_calibrated(assign):
    state = Plain().state_dict()
    before = list(state)
    model = set_gamma(Plain(), GAMMA, SEEN)
    model.load_state_dict(state, assign=assign)
    assert get_gamma(model) is None
    assert list(state) == before
    torch.testing.assert_close(model.fc.weight, state["fc.weight"])


def test_a_state_dict_with_the_calibration_loads_strictly():
    model = attach(Plain())
    model.load_state_dict(set_gamma(Plain(), GAMMA, SEEN, [1, 3]).state_dict())
    assert get_gamma(model) == GAMMA
    assert model.state_dict()[f"fc.{CHILD_NAME}.mask"].tolist() == [0, 1, 0, 1, 0]


def test_a_partial_load_without_the_head_keeps_gamma():
    model = set_gamma(Plain(), GAMMA, SEEN)
    body = OrderedDict((key, value) for key, value in Plain().state_dict().items() if key.startswith("body"))
    missing, unexpected = model.load_state_dict(body, strict=False)
    assert (sorted(missing), unexpected) == (["fc.bias", "fc.weight"], [])
    assert get_gamma(model) == GAMMA


def test_half_a_calibration_does_not_load():
    state = set_gamma(Plain(), GAMMA, SEEN).state_dict()
    del state[f"fc.{CHILD_NAME}.mask"]
    with pytest.raises(RuntimeError, match=r"Missing key.*fc\.absent_class_calibration\.mask"):
        attach(Plain()).load_state_dict(state)


def test_a_head_of_its_own_loads_strictly():
    head = set_gamma(nn.Linear(8, NUM_CLASSES), GAMMA, SEEN)
    head.load_state_dict(nn.Linear(8, NUM_CLASSES).state_dict())
    assert get_gamma(head) is None


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("model_class", [Plain, Convolutional, Distilled])
def test_a_copy_is_calibrated_and_independent(model_class, copy_of):
    model, x = model_class().eval(), inputs()
    before, raw = list(model.state_dict()), model(x)
    copied = copy_of(set_gamma(model, GAMMA, SEEN))
    torch.testing.assert_close(copied(x), raw + SHIFT)
    # The hooks of the copy are its own: a state dict still loads, and detaching leaves the original alone.
    copied.load_state_dict(model_class().state_dict())
    assert get_gamma(copied) is None
    detach(copied)
    assert list(copied.state_dict()) == before
    copied(x)
    copied.load_state_dict(model_class().state_dict())
    torch.testing.assert_close(model(x), raw + SHIFT)


def test_saved_files_hold_the_calibration(tmp_path):
    model, x = set_gamma(Plain().eval(), GAMMA, SEEN), inputs()
    torch.save(model, tmp_path / "model.pt")
    torch.testing.assert_close(torch.load(tmp_path / "model.pt", weights_only=False)(x), model(x))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = attach(Plain().eval())
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.testing.assert_close(loaded(x), model(x))


def test_gradients_are_those_of_the_plain_model():
    model = Plain().eval()
    reference = copy.deepcopy(model)
    set_gamma(model, GAMMA, SEEN, ABSENT)
    model(inputs()).square().sum().backward()
    (reference(inputs()) + SHIFT).square().sum().backward()
    torch.testing.assert_close(model.fc.weight.grad, reference.fc.weight.grad)
