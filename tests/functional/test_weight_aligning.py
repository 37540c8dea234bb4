from __future__ import annotations

import pytest
import torch

from lightning_calibft.functional import weight_aligning


def _reference(weight, seen, absent):
    norms = [sum(value**2 for value in row) ** 0.5 for row in weight.tolist()]
    scale = (sum(norms[c] for c in seen) / len(seen)) / (sum(norms[c] for c in absent) / len(absent))
    return [[scale * value for value in row] if c in absent else row for c, row in enumerate(weight.tolist())]


@pytest.mark.parametrize(("seen", "absent"), [([0, 3], [1, 2, 4, 5]), ([0, 3], [5]), ([1], None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_definition(seen, absent, dtype):
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    aligned = weight_aligning(weight, seen, absent)
    expected = torch.tensor(_reference(weight, seen, absent or [0, 2, 3, 4, 5]), dtype=dtype)
    torch.testing.assert_close(aligned, expected)
    assert not aligned.requires_grad
    absent = absent or [0, 2, 3, 4, 5]
    assert aligned[absent].norm(dim=1).mean().item() == pytest.approx(weight[seen].norm(dim=1).mean().item(), rel=1e-5)


def test_half_precision_stays():
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    aligned = weight_aligning(weight.bfloat16(), [0, 1])
    assert aligned.dtype == torch.bfloat16
    torch.testing.assert_close(aligned.float(), weight_aligning(weight, [0, 1]), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("weight", "seen", "error", "message"),
    [
        (torch.ones(6), [0], ValueError, "`weight` to be two-dimensional, but got shape .6,."),
        (torch.ones(6, 2, dtype=torch.long), [0], TypeError, "`weight` to be a floating point tensor"),
        (torch.ones(6, 2), [6], ValueError, "6"),
    ],
)
def test_wrong_input(weight, seen, error, message):
    with pytest.raises(error, match=message):
        weight_aligning(weight, seen)
