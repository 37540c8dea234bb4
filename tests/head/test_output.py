import pytest
import torch

from lightning_calibft.head.output import get_logits, replace_logits

from .models import NUM_CLASSES, OUTPUTS, logits_by_hand, tensors_of


@pytest.mark.parametrize("kind", OUTPUTS)
def test_logits_are_read_and_replaced_and_all_else_is_kept(kind):
    z, h = torch.randn(2, NUM_CLASSES), torch.randn(2, 8)
    output, new = OUTPUTS[kind](z, h), torch.randn(2, NUM_CLASSES)
    assert get_logits(output) is z
    replaced = replace_logits(output, new)
    assert type(replaced) is type(output)
    assert logits_by_hand(kind, replaced) is new
    assert logits_by_hand(kind, output) is z
    assert [part is new or part is old for part, old in zip(tensors_of(replaced), tensors_of(output), strict=True)]
    assert sum(part is new for part in tensors_of(replaced)) == 1
    assert sum(part is not old for part, old in zip(tensors_of(replaced), tensors_of(output), strict=True)) == 1


@pytest.mark.parametrize("output", [None, 3, {}, (), [torch.tensor(1.0)], {"features": torch.ones(2, 3)}, "text"])
def test_an_output_without_logits_is_refused(output):
    with pytest.raises(ValueError, match="to hold logits, but got <class"):
        get_logits(output)
