"""Folding changes what it says and nothing else, in a model and in its files alike."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from torch.nn.utils import prune

from lightning_calibft import fold, fold_checkpoint, set_gamma

from .models import ABSENT, GAMMA, NUM_CLASSES, SEEN, SHIFT, Distilled, Plain, inputs

SUFFIXES = [".ckpt", ".pth", ".safetensors"]


def pruned():
    model = Plain().eval()
    nn.init.normal_(model.fc.bias)
    prune.random_unstructured(model.fc, "weight", 0.3)
    prune.custom_from_mask(model.fc, "bias", (torch.arange(NUM_CLASSES) % 2).float())
    return model


def save(model, path):
    if path.suffix == ".safetensors":
        save_file(copy_of(model.state_dict()), path)
    else:
        torch.save({"state_dict": model.state_dict()} if path.suffix == ".ckpt" else model.state_dict(), path)


def copy_of(state):
    return {key: value.clone() for key, value in state.items()}


def read(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    state = torch.load(path, weights_only=True)
    return state.get("state_dict", state)


def test_a_pruned_head():
    model, x = pruned(), inputs()
    calibrated = set_gamma(model, GAMMA, SEEN)(x)
    kept = model.fc.bias_orig[SEEN].clone()
    fold(model)
    torch.testing.assert_close(model(x), calibrated)
    assert torch.equal(model.fc.bias_orig[SEEN], kept)
    prune.remove(model.fc, "weight")
    prune.remove(model.fc, "bias")
    torch.testing.assert_close(model(x), calibrated)


@pytest.mark.parametrize("add_bias", [False, True])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_a_pruned_head(suffix, add_bias, tmp_path):
    model, x = set_gamma(pruned(), GAMMA, SEEN), inputs()
    save(model, tmp_path / f"model{suffix}")
    fold_checkpoint(tmp_path / f"model{suffix}", tmp_path / f"folded{suffix}", add_bias=add_bias)
    plain = pruned()
    plain.load_state_dict(read(tmp_path / f"folded{suffix}"))
    torch.testing.assert_close(plain(x), model(x))


def shared_with_another_layer():
    model = Plain()
    model.other = nn.Linear(8, NUM_CLASSES)
    model.other.bias = model.fc.bias
    return set_gamma(model, GAMMA, SEEN, head="fc")


def test_a_bias_shared_with_another_layer():
    model = shared_with_another_layer()
    before = copy_of(model.state_dict())
    with pytest.raises(ValueError, match=r"but 'other\.bias' is the same tensor, which gamma would change too"):
        fold(model)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_a_bias_shared_with_another_layer(suffix, tmp_path):
    model, path = shared_with_another_layer(), tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_model(model, path)  # which keeps one of the two names
    else:
        save(model, path)
    with pytest.raises(ValueError, match=r"the head 'fc' in .* is the same tensor, which gamma would change too"):
        fold_checkpoint(path, tmp_path / "folded.pth")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def averaged():
    model = Distilled().eval()
    model.head_dist.bias = model.head.bias
    return model


def test_averaged_heads_that_share_their_bias():
    model, x = set_gamma(averaged(), GAMMA, SEEN), inputs()
    calibrated = model(x)
    fold(model)
    torch.testing.assert_close(model(x), calibrated)
    assert model.head.bias is model.head_dist.bias


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_averaged_heads_that_share_their_bias(suffix, tmp_path):
    model, x = set_gamma(averaged(), GAMMA, SEEN), inputs()
    save(model, tmp_path / f"model{suffix}")
    fold_checkpoint(tmp_path / f"model{suffix}", tmp_path / f"folded{suffix}")
    plain = averaged()
    plain.load_state_dict(read(tmp_path / f"folded{suffix}"))
    torch.testing.assert_close(plain(x), model(x))


def test_heads_that_share_their_bias_and_not_their_gamma():
    model = set_gamma(averaged(), GAMMA, SEEN)
    set_gamma(model.head_dist, 2 * GAMMA, SEEN)
    before = model.head.bias.clone()
    with pytest.raises(ValueError, match=r"shares the bias with the head 'head(_dist)?', which has another gamma"):
        fold(model)
    assert torch.equal(model.head.bias, before)


@pytest.mark.parametrize("suffix", [None, *SUFFIXES])
def test_a_float64_bias_keeps_its_precision(suffix, tmp_path):
    model = Plain().double()
    nn.init.constant_(model.fc.bias, 1 / 3)
    set_gamma(model, GAMMA, SEEN)
    if suffix is None:
        bias = fold(copy.deepcopy(model)).fc.bias
    else:
        save(model, tmp_path / f"model{suffix}")
        fold_checkpoint(tmp_path / f"model{suffix}", tmp_path / f"folded{suffix}")
        bias = read(tmp_path / f"folded{suffix}")["fc.bias"]
    gamma = torch.tensor(GAMMA).double()  # the offset is in float32
    expected = torch.full((NUM_CLASSES,), 1 / 3, dtype=torch.float64) + gamma * (torch.as_tensor(SHIFT) != 0)
    assert torch.equal(bias.detach(), expected)
    assert (bias[SEEN] == 1 / 3).all()
    assert (bias[ABSENT] != 1 / 3).all()


def test_a_reparametrized_bias():
    class Same(nn.Module):
        def forward(self, bias):
            return bias

    model = Plain()
    nn.utils.parametrize.register_parametrization(model.fc, "bias", Same())
    set_gamma(model, GAMMA, SEEN, head="fc")
    with pytest.raises(ValueError, match=r"but it holds .*parametrizations\.bias\.original"):
        fold(model)


def sharing_memory_with_another_layer():
    model = Plain()
    model.other = nn.Linear(8, NUM_CLASSES + 2)
    model.fc.bias = nn.Parameter(model.other.bias[1:-1].detach())  # a view of a part of it
    return set_gamma(model, GAMMA, SEEN, head="fc")


def test_a_bias_that_is_a_part_of_another_one(tmp_path):
    model = sharing_memory_with_another_layer()
    before = copy_of(model.state_dict())
    torch.save(model.state_dict(), tmp_path / "model.pth")
    text = "but 'other.bias' shares its memory, which gamma would change too"
    with pytest.raises(ValueError, match=text):
        fold(model)
    with pytest.raises(ValueError, match=text):
        fold_checkpoint(tmp_path / "model.pth", tmp_path / "folded.pth")
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_biases_that_lie_beside_each_other():
    """As after flattening all parameters into one: the memory is one, but each entry has its own."""
    model, x = Distilled().eval(), inputs()
    biases = nn.Parameter(torch.randn(2 * NUM_CLASSES))
    model.head.bias = nn.Parameter(biases[:NUM_CLASSES].detach())
    model.head_dist.bias = nn.Parameter(biases[NUM_CLASSES:].detach())
    set_gamma(model, GAMMA, SEEN)
    calibrated = model(x)
    fold(model)
    torch.testing.assert_close(model(x), calibrated)


def test_a_pruned_head_that_shares_its_mask():
    model = pruned()
    model.other = nn.Linear(8, NUM_CLASSES)
    prune.identity(model.other, "bias")
    model.other.bias_mask = model.fc.bias_mask
    set_gamma(model, GAMMA, SEEN, head="fc")
    with pytest.raises(ValueError, match=r"but 'other\.bias_mask' is the same tensor"):
        fold(model)


@pytest.mark.parametrize("suffix", [None, *SUFFIXES])
def test_gamma_that_a_half_precision_bias_cannot_hold(suffix, tmp_path):
    model = set_gamma(Plain().half(), 1e5, SEEN)
    text = r"but its torch\.float16 cannot hold a gamma of 100000\. Convert the head to float32 first"
    if suffix is None:
        with pytest.raises(ValueError, match=text):
            fold(model)
    else:
        save(model, tmp_path / f"model{suffix}")
        with pytest.raises(ValueError, match=text):
            fold_checkpoint(tmp_path / f"model{suffix}", tmp_path / f"folded{suffix}")
        assert [each.name for each in tmp_path.iterdir()] == [f"model{suffix}"]
    assert model.fc.bias.isfinite().all()


def test_a_quantized_head():
    model = set_gamma(Plain().eval(), GAMMA, SEEN)
    model.fc = torch.ao.nn.quantized.dynamic.Linear(8, NUM_CLASSES)
    with pytest.raises(ValueError, match="Expected argument `model` to be calibrated"):
        fold(model)
    set_gamma(model, GAMMA, SEEN, head="fc")
    with pytest.raises(ValueError, match=r"the head 'fc' to be a Linear or Conv2d .* Keep the calibration attached"):
        fold(model)


def test_a_normalized_weight():
    model, x = Plain().eval(), inputs()
    nn.utils.parametrizations.weight_norm(model.fc)
    set_gamma(model, GAMMA, SEEN, head="fc")
    calibrated = model(x)
    fold(model)
    torch.testing.assert_close(model(x), calibrated)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        torch.optim.swa_utils.AveragedModel,
    ],
)
def test_a_wrapped_model(wrap):
    model, x = Plain().eval(), inputs()
    wrapped = wrap(model)
    wrapped.eval()
    calibrated = set_gamma(wrapped, GAMMA, SEEN)(x)
    assert fold(wrapped) is wrapped
    torch.testing.assert_close(wrapped(x), calibrated)
