"""t-SNE of features before and after."""

from __future__ import annotations

import sys

import pytest
import torch

from lightning_calibft.analysis import plot_embedding, tsne_features

TARGET = torch.arange(4).repeat_interleave(15)


def features(dim, spread=0.3):
    return 4 * torch.randn(4, dim)[TARGET] + spread * torch.randn(60, dim)


def _reference_neighbours_agree(points) -> float:
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


def test_neighbours_stay_neighbours_and_the_second_begins_with_the_first():
    before, after = features(8), features(5)
    streams = torch.get_rng_state()
    first, second = tsne_features(before, after, perplexity=10)
    assert torch.equal(torch.get_rng_state(), streams)
    assert first.shape == second.shape == (60, 2)
    assert _reference_neighbours_agree(first) == _reference_neighbours_agree(second) == 1
    again = tsne_features(before, after, perplexity=10)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    # Distances are the same, so no group changes its place; by itself t-SNE would begin with the mirror image.
    unchanged = tsne_features(before, -before, perplexity=10)
    centres = [points.unflatten(0, (4, 15)).mean(1) for points in unchanged]
    assert torch.cdist(centres[1], centres[0]).argmin(1).tolist() == [0, 1, 2, 3]


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match="60 and 59 rows"):
        tsne_features(features(3), features(3)[:59])
    with pytest.raises(ValueError, match="less than the number of samples, 60, but got 60"):
        tsne_features(features(3), features(3), perplexity=60)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ModuleNotFoundError, match="extra `examples`"):
        tsne_features(features(3), features(3))


def test_picture():
    points, target = torch.randn(60, 2), TARGET.clone()
    _, ax = plot_embedding(points, target, 5, seen_classes=[0, 1], absent_classes=[2])
    seen, absent = ax.collections
    assert torch.equal(torch.from_numpy(seen.get_offsets().data).float(), points[:30])
    assert torch.equal(torch.from_numpy(absent.get_offsets().data).float(), points[30:45])
    assert seen.get_array().tolist() == target[:30].tolist()
    assert len(seen.get_paths()[0]) != len(absent.get_paths()[0])  # other markers
    with pytest.raises(ValueError, match="class ids in"):
        plot_embedding(points, target, 3, seen_classes=[0, 1])


def test_matplotlib_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="extra `plot`"):
        plot_embedding(torch.randn(60, 2), TARGET, 4, seen_classes=[0, 1])
