"""Traps of transformers and PEFT: what their files leave out, what their models compute themselves."""

import copy

import pytest
import torch
from torch import nn

from lightning_calibft.head import attach, detach, fold, get_gamma, set_gamma
from lightning_calibft.head.offset import CHILD_NAME
from lightning_calibft.head.probe import probe

from .models import GAMMA, NUM_CLASSES, SEEN, SHIFT, Plain, inputs

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
ENTRIES = {f"classifier.{CHILD_NAME}.offset", f"classifier.{CHILD_NAME}.mask"}


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def _config(transformers):
    return transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        num_labels=NUM_CLASSES,
    )


def _vit(transformers):
    return transformers.ViTForImageClassification(_config(transformers)).eval()


@torch.no_grad()
def _assert_logits(model, x, expected):
    output = model.eval()(x)
    torch.testing.assert_close(getattr(output, "logits", output), expected, rtol=0, atol=1e-5)


def test_transformers_drops_gamma_unless_it_is_folded(transformers, tmp_path):
    model = _vit(transformers)
    raw = model(IMAGES).logits.detach()
    set_gamma(model, GAMMA, SEEN).save_pretrained(tmp_path / "attached")
    read = transformers.ViTForImageClassification.from_pretrained
    dropped, report = read(tmp_path / "attached", output_loading_info=True)
    assert set(report["unexpected_keys"]) == ENTRIES
    assert get_gamma(dropped) is None
    _assert_logits(dropped, IMAGES, raw)

    fold(model).save_pretrained(tmp_path / "folded")
    kept, report = read(tmp_path / "folded", output_loading_info=True)
    assert not report["unexpected_keys"]
    _assert_logits(kept, IMAGES, raw + SHIFT)


def test_a_class_of_transformers_that_attaches_itself(transformers, tmp_path):
    class Attached(transformers.ViTForImageClassification):
        def __init__(self, config):
            super().__init__(config)
            attach(self)

    model = Attached(_config(transformers)).eval()
    raw = model(IMAGES).logits.detach()
    set_gamma(model, GAMMA, SEEN).save_pretrained(tmp_path / "calibrated")
    loaded, report = Attached.from_pretrained(tmp_path / "calibrated", output_loading_info=True)
    assert not report["missing_keys"]  # no key was renamed on the way, as some are that contain "gamma"
    _assert_logits(loaded, IMAGES, raw + SHIFT)

    # Where a key is missing, `from_pretrained` leaves memory as it finds it: attach afterwards instead.
    detach(model).save_pretrained(tmp_path / "plain")
    _, report = Attached.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert set(report["missing_keys"]) == ENTRIES
    read = transformers.ViTForImageClassification.from_pretrained
    after = attach(read(tmp_path / "plain"))
    assert get_gamma(after) is None
    _assert_logits(after, IMAGES, raw)


def test_the_loss_of_an_evaluation_sees_gamma_and_that_of_training_does_not(transformers):
    model, labels = _vit(transformers), torch.tensor([0, 2])
    raw = model(IMAGES).logits.detach()
    set_gamma(model, GAMMA, SEEN)
    output = model(IMAGES, labels=labels)
    torch.testing.assert_close(output.logits, raw + SHIFT)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(raw + SHIFT, labels))
    output = model.train()(IMAGES, labels=labels)  # this model has no dropout
    torch.testing.assert_close(output.logits, raw)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(raw, labels))


def _base():
    torch.manual_seed(0)
    return Plain().eval()


def _adapted(peft, **options):
    """Return a model with adapters and what its logits are."""
    model = peft.get_peft_model(_base(), peft.LoraConfig(init_lora_weights=False, **options)).eval()
    return model, model(inputs()).detach()


IN_FULL = {"target_modules": ["body.1"], "modules_to_save": ["fc"]}
ON_HEAD = {"target_modules": ["fc"]}


@pytest.mark.parametrize("options", [IN_FULL, ON_HEAD])
def test_gamma_in_the_file_of_an_adapter_needs_a_head_to_go_to(peft, options, tmp_path):
    model, raw = _adapted(peft, **options)
    set_gamma(model, GAMMA, SEEN).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(_base(), tmp_path)
    assert get_gamma(loaded) is None
    _assert_logits(loaded, inputs(), raw)
    # Read once more after attaching, or `set_gamma` with the number.
    peft.set_peft_model_state_dict(attach(loaded), peft.load_peft_weights(tmp_path))
    assert get_gamma(loaded) == GAMMA
    _assert_logits(loaded, inputs(), raw + SHIFT)


def test_a_folded_head_is_in_the_file_of_the_adapter_if_peft_saves_the_head(peft, tmp_path):
    model, raw = _adapted(peft, **IN_FULL)
    fold(set_gamma(model, GAMMA, SEEN)).save_pretrained(tmp_path)
    _assert_logits(peft.PeftModel.from_pretrained(_base(), tmp_path), inputs(), raw + SHIFT)


def test_a_folded_head_is_not_in_the_file_of_an_adapter_on_it(peft, tmp_path):
    model, raw = _adapted(peft, **ON_HEAD)
    fold(set_gamma(model, GAMMA, SEEN)).save_pretrained(tmp_path)
    _assert_logits(peft.PeftModel.from_pretrained(_base(), tmp_path), inputs(), raw)
    _assert_logits(model.merge_and_unload(), inputs(), raw + SHIFT)  # save this one


def test_merging_drops_gamma_on_an_adapter_unless_it_is_folded(peft):
    model, raw = _adapted(peft, **ON_HEAD)
    set_gamma(model, GAMMA, SEEN)
    merged = copy.deepcopy(model).merge_and_unload()
    assert get_gamma(merged) is None
    _assert_logits(merged, inputs(), raw)
    _assert_logits(fold(model).merge_and_unload(), inputs(), raw + SHIFT)


@pytest.mark.parametrize("options", [IN_FULL, ON_HEAD])
def test_an_adapter_on_a_head_that_was_attached_before(peft, options):
    model = peft.get_peft_model(attach(_base()), peft.LoraConfig(init_lora_weights=False, **options)).eval()
    raw = model(inputs()).detach()
    with pytest.raises(ValueError, match="to give the logits, but"):
        probe(lambda: model(inputs()), model)
    attach(detach(model))
    probe(lambda: model(inputs()), model)
    _assert_logits(set_gamma(model, GAMMA, SEEN), inputs(), raw + SHIFT)
