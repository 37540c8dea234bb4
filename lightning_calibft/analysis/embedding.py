"""Features before and after fine-tuning in two dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_calibft._arguments import check_integer, check_number, check_tensor, check_values
from lightning_calibft.analysis._axes import _AX_TYPE, _PLOT_OUT_TYPE, new_axis
from lightning_calibft.functional._inputs import check_matrix, check_target
from lightning_calibft.split import ClassIds, ClassSplit


def tsne_features(before: Tensor, after: Tensor, *, perplexity: float = 30.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embed the features of the same samples before and after fine-tuning in two dimensions by t-SNE.

    The second embedding begins with the first, so that what stayed where it was in the features does so in the
    pictures. Distances between far groups mean nothing in t-SNE; who is whose neighbour does.

    Args:
        before: Features of shape ``(N, D)`` before fine-tuning, as from :func:`collect_outputs`.
        after: Features of shape ``(N, E)`` of the same samples after it.
        perplexity: About how many neighbours of a sample count; less than ``N``.
        seed: Of what little is random in it. No other random state is touched.

    Returns:
        Two tensors of shape ``(N, 2)``.

    Raises:
        ModuleNotFoundError: If scikit-learn is not installed.
        ValueError: If the features are not matrices of equally many rows, more than ``perplexity``.
        TypeError: If they are no floating point tensors.
    """
    check_matrix("before", before)
    check_matrix("after", after)
    if len(before) != len(after):
        raise ValueError(
            f"Expected arguments `before` and `after` to have a row for each of the same samples, but got {len(before)}"
            f" and {len(after)} rows."
        )
    check_integer("seed", seed, least=0, most=2**32 - 1)
    perplexity = check_number("perplexity", perplexity)
    if not 0 < perplexity < len(before):
        raise ValueError(
            f"Expected argument `perplexity` to be positive and less than the number of samples, {len(before)}, but"
            f" got {perplexity}."
        )
    first = _tsne(before, None, perplexity, seed)
    return first, _tsne(after, first, perplexity, seed)


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


def plot_embedding(
    points: Tensor,
    target: Tensor,
    num_classes: int,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    ax: _AX_TYPE | None = None,
) -> _PLOT_OUT_TYPE:
    """Draw samples in two dimensions, coloured by class: seen ones as dots, absent ones as crosses.

    Args:
        points: Positions of shape ``(N, 2)``, as from :func:`tsne_features`.
        target: Class ids of shape ``(N,)``. Samples of classes that are neither seen nor absent are left out.
        num_classes: Number of classes.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all that are not seen.
        ax: A matplotlib axis to draw on. ``None``: a new figure.

    Returns:
        Figure and axis; the figure is ``None`` if ``ax`` was given.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If shapes, classes or labels do not fit.
        TypeError: If ``points`` or ``target`` has the wrong dtype.
    """
    split = ClassSplit(num_classes, seen_classes, absent_classes)
    check_matrix("points", points)
    check_tensor("target", target)
    check_values("target", target)
    points, target = points.cpu(), target.cpu()
    check_target(target, len(points), num_classes, None)
    figure, axis = new_axis(ax)
    for label, mask, marker in (("seen", split.seen_mask, "o"), ("absent", split.absent_mask, "x")):
        chosen = mask[target.long()]
        x, y = points[chosen].T.numpy()
        color = target[chosen].numpy()
        axis.scatter(x, y, c=color, vmin=0, vmax=num_classes - 1, cmap="turbo", marker=marker, s=14, label=label)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.legend(fontsize="small")
    return figure, axis
