"""Norms of the head's rows, and the similarity of what fine-tuning added to them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_calibft import attach
from lightning_calibft.analysis.weights import head_weight, row_norms, update_similarity
from lightning_calibft.split import ClassSplit
from tests.helpers.analysis_references import _reference_cosine, _reference_norms, _reference_similarity

SEEN, ABSENT = [1, 4, 5], [0, 2, 7]  # 3 and 6 are neither


def weights(dtype=torch.float32):
    common = torch.randn(11)
    before = torch.randn(8, 11)
    return before.to(dtype), (before + 0.3 * torch.randn(8, 11) + 0.2 * common).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norms(dtype):
    weight, _ = weights(dtype)
    norms = row_norms(weight, SEEN, ABSENT)
    assert (norms.seen_mean, norms.seen_std) == pytest.approx(_reference_norms(weight, SEEN), rel=1e-12)
    assert (norms.absent_mean, norms.absent_std) == pytest.approx(_reference_norms(weight, ABSENT), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_similarity(dtype):
    before, after = weights(dtype)
    after[4] = before[4]  # a row that stayed has no direction
    similarity = update_similarity(before, after, SEEN, ABSENT)
    expected = [[_reference_cosine(before, after, a, b) for b in range(8)] for a in range(8)]
    torch.testing.assert_close(
        similarity.matrix, torch.tensor(expected, dtype=torch.float64), equal_nan=True, rtol=0, atol=1e-12
    )
    assert similarity.matrix[4].isnan().all()
    found = (similarity.means.within_seen, similarity.means.within_absent, similarity.means.between)
    assert found == pytest.approx(_reference_similarity(before, after, SEEN, ABSENT), abs=1e-12)
    assert similarity.split == ClassSplit(8, SEEN, ABSENT)


def test_groups_without_two_rows_that_changed_are_nan():
    before, after = weights()
    after[[1, 4, 5, 0, 2]] = before[[1, 4, 5, 0, 2]]
    means = update_similarity(before, after, SEEN, ABSENT).means
    assert all(math.isnan(value) for value in (means.within_seen, means.within_absent, means.between))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.head_dist = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x, y):
        return (self.head(x) + self.head_dist(y)) / 2


def test_weights_of_heads():
    linear = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    weight = head_weight(attach(linear))
    assert torch.equal(weight, linear[2].weight)
    weight.zero_()  # a copy
    assert linear[2].weight.abs().sum() > 0
    assert torch.equal(head_weight(nn.Sequential(linear[0], linear[2]), "0"), linear[0].weight)
    conv = nn.Sequential(nn.Conv2d(4, 3, 1))
    assert torch.equal(head_weight(conv, "0"), conv[0].weight.flatten(1))
    pair = Pair()
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    bias = (pair.head.bias + pair.head_dist.bias) / 2
    torch.testing.assert_close(torch.cat([x, y], 1) @ head_weight(pair).T + bias, pair(x, y))
    with pytest.raises(ValueError, match="Linear or a 1x1 Conv2d"):
        head_weight(nn.Bilinear(2, 2, 5))


def test_models_and_their_weights_give_the_same():
    before, after = nn.Linear(11, 8), nn.Linear(11, 8)
    assert row_norms(after, SEEN) == row_norms(after.weight, SEEN)
    of_models, of_weights = update_similarity(before, after, SEEN), update_similarity(before.weight, after.weight, SEEN)
    assert of_models.means == of_weights.means
    with pytest.raises(ValueError, match="the same shape"):
        update_similarity(before, nn.Linear(10, 8), SEEN)
    with pytest.raises(ValueError, match="8"):
        row_norms(after, [8])


def test_picture():
    before, after = weights()
    similarity = update_similarity(before, after, SEEN, ABSENT)
    figure, ax = similarity.plot()
    assert figure is ax.figure
    image = torch.from_numpy(ax.images[0].get_array().data)
    assert image[0, 4] == similarity.matrix[SEEN[0], ABSENT[1]]
    assert image.shape == (6, 6)
    assert similarity.plot(ax) == (None, ax)
