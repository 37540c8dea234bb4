"""Features before and after fine-tuning in two dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_calibft._arguments import check_integer, check_number, check_type
from lightning_calibft.analysis.outputs import Outputs
from lightning_calibft.functional._inputs import check_matrix
from lightning_calibft.plotting import _AX_TYPE, _PLOT_OUT_TYPE, COLORS, MARKERS, add_legend, new_axis
from lightning_calibft.split import ClassIds, ClassSplit


@dataclass(frozen=True)
class Embedding:
    """Samples in two dimensions.

    Attributes:
        points: Positions of the samples, of shape ``(N, 2)``.
        target: Class ids of the samples, of shape ``(N,)``.
        split: The seen and the absent classes.
    """

    points: Tensor
    target: Tensor
    split: ClassSplit

    def plot(self, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
        """Draw the samples of seen classes as blue dots and those of absent classes as orange triangles.

        The shade tells the class. Samples of classes that are neither seen nor absent are left out. Returns a new
        figure and its axis, or ``None`` and ``ax`` if it was given.
        """
        figure, axis = new_axis(ax)
        from matplotlib.colors import LinearSegmentedColormap

        for group, classes in (("seen", self.split.seen_classes), ("absent", self.split.absent_classes)):
            rank = torch.full((self.split.num_classes,), -1)
            rank[list(classes)] = torch.arange(len(classes))
            shade = rank[self.target.long()]
            x, y = self.points[shade >= 0].T.numpy()
            shades = LinearSegmentedColormap.from_list(group, ["white", COLORS[group], "black"])
            limits = {"vmin": -len(classes) / 2, "vmax": 3 * len(classes) / 2}  # neither too pale nor too dark
            color = shade[shade >= 0].numpy()
            axis.scatter(x, y, c=color, cmap=shades, marker=MARKERS[group], s=14, label=f"{group} classes", **limits)
        axis.set_xticks([])
        axis.set_yticks([])
        add_legend(axis, pad=1)
        return figure, axis


def tsne_features(
    before: Outputs,
    after: Outputs,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    perplexity: float = 30.0,
    seed: int = 0,
) -> tuple[Embedding, Embedding]:
    """Embed the features of the same samples before and after fine-tuning in two dimensions by t-SNE.

    The second embedding starts from the first, so that features that did not move stay in place in the pictures.
    Distances between far groups mean nothing in t-SNE; only neighborhoods do.

    Args:
        before: Outputs of the model before fine-tuning, from :func:`collect_outputs`.
        after: Outputs of the model after fine-tuning, for the same samples in the same order.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all classes that are not seen.
        perplexity: Roughly the number of neighbors that each sample attends to; less than the number of samples.
        seed: Seed of t-SNE. The global random state does not change.

    Returns:
        The embedding before and the one after fine-tuning. Each has a method :meth:`~Embedding.plot`.

    Raises:
        ModuleNotFoundError: If scikit-learn is not installed.
        ValueError: If the outputs belong to different samples, the classes do not fit them, or ``perplexity`` is not
            less than the number of samples.
        TypeError: If ``before`` or ``after`` does not come from :func:`collect_outputs`.

    Example:
        >>> import torch
        >>> from lightning_calibft.analysis import collect_outputs, tsne_features
        >>> samples = [(torch.randn(12, 8), torch.arange(12) % 3)]
        >>> models = torch.nn.Linear(8, 3), torch.nn.Linear(8, 3)
        >>> first, last = (collect_outputs(model, samples) for model in models)
        >>> before, after = tsne_features(first, last, seen_classes=[0, 1], perplexity=3)
        >>> before.points.shape
        torch.Size([12, 2])
    """
    for name, outputs in (("before", before), ("after", after)):
        check_type(name, outputs, Outputs, " Get it from `collect_outputs`.")
        check_matrix(name, outputs.features)
    if not torch.equal(before.target, after.target):
        raise ValueError(
            "Expected arguments `before` and `after` to be outputs for the same samples in the same order, but got"
            f" {len(before.target)} and {len(after.target)} samples with different targets."
        )
    split = ClassSplit(before.logits.shape[1], seen_classes, absent_classes)
    check_integer("seed", seed, least=0, most=2**32 - 1)
    perplexity = check_number("perplexity", perplexity)
    num_samples = len(before.target)
    if not 0 < perplexity < num_samples:
        raise ValueError(
            f"Expected argument `perplexity` to be positive and less than the number of samples, {num_samples}, but"
            f" got {perplexity}."
        )
    first = _tsne(before.features, None, perplexity, seed)
    last = _tsne(after.features, first, perplexity, seed)
    return Embedding(first, before.target, split), Embedding(last, after.target, split)


def _tsne(features: Tensor, start: Tensor | None, perplexity: float, seed: int) -> Tensor:
    try:
        from sklearn.manifold import TSNE
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Expected scikit-learn to be installed for t-SNE. Install it, or this package with its extra `examples`."
        ) from error
    init = "pca" if start is None else start.numpy()
    embedding = TSNE(2, perplexity=perplexity, init=init, random_state=seed)
    return torch.from_numpy(embedding.fit_transform(features.detach().cpu().float().numpy()))
