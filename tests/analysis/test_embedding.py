"""t-SNE of features before and after."""

from __future__ import annotations

import sys

import pytest
import torch

from lightning_calibft.analysis.embedding import Embedding, tsne_features
from lightning_calibft.analysis.outputs import Outputs
from lightning_calibft.split import ClassSplit

TARGET = torch.arange(4).repeat_interleave(15)


def features(dim, spread=0.3):
    return 4 * torch.randn(4, dim)[TARGET] + spread * torch.randn(60, dim)


def outputs(features):
    return Outputs(features, torch.zeros(len(features), 4), TARGET[: len(features)])


def _reference_neighbors_agree(points) -> float:
    """How often the nearest other sample is of the same class."""
    agreed = 0
    for i, point in enumerate(points.tolist()):
        distances = [
            (sum((a - b) ** 2 for a, b in zip(point, other, strict=True)), TARGET[j].item())
            for j, other in enumerate(points.tolist())
            if j != i
        ]
        agreed += min(distances)[1] == TARGET[i].item()
    return agreed / len(points)


def test_neighbors_stay_neighbors_and_the_second_begins_with_the_first():
    before, after = features(8), features(5)
    streams = torch.get_rng_state()
    first, second = tsne_features(outputs(before), outputs(after), [0, 1], perplexity=10)
    assert torch.equal(torch.get_rng_state(), streams)
    assert first.points.shape == second.points.shape == (60, 2)
    assert first.split == second.split == ClassSplit(4, [0, 1])
    assert torch.equal(first.target, TARGET)
    assert _reference_neighbors_agree(first.points) == _reference_neighbors_agree(second.points) == 1
    again = tsne_features(outputs(before), outputs(after), [0, 1], perplexity=10)
    assert torch.equal(first.points, again[0].points)
    assert torch.equal(second.points, again[1].points)
    # Distances are the same, so no group changes its place; by itself t-SNE would begin with the mirror image.
    unchanged = tsne_features(outputs(before), outputs(-before), [0, 1], perplexity=10)
    centers = [each.points.unflatten(0, (4, 15)).mean(1) for each in unchanged]
    assert torch.cdist(centers[1], centers[0]).argmin(1).tolist() == [0, 1, 2, 3]


def test_errors(monkeypatch):
    whole = outputs(features(3))
    with pytest.raises(ValueError, match="the same order, but got 60 and 59 samples"):
        tsne_features(whole, outputs(features(3)[:59]), [0])
    with pytest.raises(ValueError, match="the same order, but got 60 and 60 samples with different targets"):
        tsne_features(whole, Outputs(whole.features, whole.logits, TARGET.flip(0)), [0])
    with pytest.raises(ValueError, match="less than the number of samples, 60, but got 60"):
        tsne_features(whole, whole, [0], perplexity=60)
    with pytest.raises(ValueError, match="class ids in"):
        tsne_features(whole, whole, [4])
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ModuleNotFoundError, match="extra `examples`"):
        tsne_features(whole, whole, [0])


def test_picture():
    points = torch.randn(60, 2)
    figure, ax = Embedding(points, TARGET, ClassSplit(5, [1, 0], [2])).plot()
    assert figure is ax.figure
    seen, absent = ax.collections
    assert torch.equal(torch.from_numpy(seen.get_offsets().data).float(), points[:30])
    assert torch.equal(torch.from_numpy(absent.get_offsets().data).float(), points[30:45])
    shades = seen.get_array()  # one for each class
    assert len(set(shades[:15])) == len(set(shades[15:])) == 1
    assert shades[0] != shades[15]
    assert len(seen.get_paths()[0]) != len(absent.get_paths()[0])  # other markers


def test_matplotlib_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="extra `plot`"):
        Embedding(torch.randn(60, 2), TARGET, ClassSplit(4, [0, 1])).plot()
