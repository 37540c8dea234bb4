"""Gamma stays where PEFT merges its adapters after folding."""

import pytest
import torch
from torch import nn

from lightning_calibft.head import attach, fold, set_gamma
from lightning_calibft.head.offset import attached_heads, is_folded
from lightning_calibft.head.probe import probe

from .models import GAMMA, SEEN, SHIFT, Convolutional, Plain, inputs

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("model_class", [Plain, Convolutional])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["plain", "dora", "bias"])
def test_lora_on_the_head_is_merged_after_folding(model_class, options):
    name = "fc" if model_class is Plain else "classifier"
    config = peft.LoraConfig(target_modules=[name], init_lora_weights=False, **options)
    model, x = peft.get_peft_model(model_class(), config).eval(), inputs()
    expected = model(x) + SHIFT
    attach(model)
    assert list(attached_heads(model)) == [f"base_model.model.{name}"]
    probe(lambda: model(x), model)
    set_gamma(model, GAMMA, SEEN)
    torch.testing.assert_close(model(x), expected)
    fold(model)
    torch.testing.assert_close(model(x), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-5)
    assert list(merged.state_dict()) == list(model_class().state_dict())
    assert is_folded(merged)
    with pytest.raises(ValueError, match="would count gamma twice"):
        attach(merged)


def test_lora_on_a_head_without_bias():
    config = peft.LoraConfig(target_modules=["fc"], init_lora_weights=False)
    model, x = peft.get_peft_model(Plain(bias=False), config).eval(), inputs()
    expected = model(x) + SHIFT
    set_gamma(model, GAMMA, SEEN)
    with pytest.raises(ValueError, match=r"but it has none\. Pass `add_bias=True`"):
        fold(model)
    fold(model, add_bias=True)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=0, atol=1e-5)


def test_a_head_that_peft_trains_in_full_is_merged_after_folding():
    config = peft.LoraConfig(target_modules=["body.1"], modules_to_save=["fc"], init_lora_weights=False)
    model, x = peft.get_peft_model(Plain(), config).eval(), inputs()
    nn.init.normal_(model.base_model.model.fc.modules_to_save["default"].weight)
    expected = model(x) + SHIFT
    set_gamma(model, GAMMA, SEEN)
    probe(lambda: model(x), model)
    merged = fold(model).merge_and_unload()
    torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-5)
    assert list(merged.state_dict()) == list(Plain().state_dict())
    assert is_folded(merged)


def test_an_adapter_that_scales_its_layer_does_not_fold():
    config = peft.IA3Config(target_modules=["fc"], feedforward_modules=[], init_ia3_weights=False)
    model, x = peft.get_peft_model(Plain(), config).eval(), inputs()
    expected = model(x) + SHIFT
    set_gamma(model, GAMMA, SEEN, head="base_model.model.fc")
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match=r"but it has an adapter\. Merge the adapter and calibrate again"):
        fold(model)
