import pytest
import timm
from torch import nn

from lightning_calibft.head import find_head
from lightning_calibft.head.layers import base_layer, head_candidates, head_names, is_layer, num_classes

from .models import NUM_CLASSES, CosineLinear, Projected, Prototypes, SplitCosineLinear, encoder_of_width


def _names(model, head=None):
    return head_names(model, find_head(model, head))


def test_what_is_no_head_is_no_candidate():
    model = nn.Sequential(encoder_of_width(8), nn.Flatten(), nn.Linear(8, NUM_CLASSES), nn.Conv2d(3, 4, 3))
    assert list(head_candidates(model)) == ["2"]
    assert list(head_candidates(nn.Sequential(SplitCosineLinear(8, 2, 3), Projected(8, 5)))) == ["0", "1"]
    assert list(head_candidates(nn.utils.parametrizations.weight_norm(CosineLinear(8, 5)))) == [""]
    # timm has an encoder with a child of the name under which PEFT keeps what it adapts.
    dla = timm.create_model("dla34")
    assert base_layer(dla) is dla


def test_a_whole_model_is_no_layer():
    assert all(map(is_layer, (nn.Linear(2, 3), nn.Conv2d(2, 3, 1), CosineLinear(2, 3), Projected(2, 3))))
    assert not any(map(is_layer, (nn.Conv2d(2, 3, 3), nn.Sequential(), encoder_of_width(8), Prototypes())))


class _Unnamed(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.hidden = nn.Linear(8, 16)
        self.output = head

    def forward(self, x):
        return self.output(self.hidden(x))


@pytest.mark.parametrize(
    "head", [nn.Linear(16, NUM_CLASSES), nn.Sequential(nn.Unflatten(1, (16, 1, 1)), nn.Conv2d(16, NUM_CLASSES, 1))]
)
def test_adapters_of_peft_are_one_with_their_layer(head):
    peft = pytest.importorskip("peft")
    name = "output" if isinstance(head, nn.Linear) else "output.1"
    model = peft.get_peft_model(_Unnamed(head), peft.LoraConfig(target_modules=["hidden", name]))
    assert list(head_candidates(model)) == ["base_model.model.hidden", f"base_model.model.{name}"]
    if isinstance(head, nn.Linear):
        assert _names(model) == ("base_model.model.output",)
    assert _names(model, f"base_model.model.{name}") == (f"base_model.model.{name}",)
    assert num_classes(find_head(model, "base_model.model.output")) == NUM_CLASSES


def test_the_original_of_a_layer_that_peft_trains_in_full_is_no_candidate():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["hidden"], modules_to_save=["output"])
    model = peft.get_peft_model(_Unnamed(nn.Linear(16, NUM_CLASSES)), config)
    assert _names(model) == ("base_model.model.output.modules_to_save.default",)
