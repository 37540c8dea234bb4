"""Weight aligning: an alternative to gamma that scales the head's rows."""

from __future__ import annotations

from torch import Tensor

from lightning_calibft.functional._inputs import Groups, check_matrix
from lightning_calibft.split import ClassIds, ClassSplit


def weight_aligning(weight: Tensor, seen_classes: ClassIds, absent_classes: ClassIds | None = None) -> Tensor:
    r"""Scale the rows of the absent classes so that their mean norm equals that of the seen classes.

    .. math:: w'_c = w_c \, \frac{\operatorname{mean}_{k \in S} \lVert w_k \rVert}
        {\operatorname{mean}_{k \in U} \lVert w_k \rVert} \quad (c \in U)

    The rows of the seen classes and all biases stay the same. Zhao et al., "Maintaining Discrimination and Fairness in
    Class Incremental Learning", CVPR 2020, section 4.2, use it to balance classes learned early and late.

    It is an alternative to gamma, not an estimator of it: adding one number to the logits cannot have the same effect.
    It uses no data. Limitations: it corrects a bias only if training has changed the norms. Fine-tuning lowers the
    absent logits but hardly changes the norms, so weight aligning has little effect.

    Args:
        weight: Weight of the head, one row per class, of shape ``(C, D)``.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.

    Returns:
        The new weight, of the same shape and dtype.

    Raises:
        ValueError: If ``weight`` is not two-dimensional, the classes do not match it, or its absent rows are all zero.
        TypeError: If ``weight`` is not a floating point tensor.

    Example:
        >>> import torch
        >>> from lightning_calibft.functional import weight_aligning
        >>> weight_aligning(torch.tensor([[3.0, 4.0], [0.0, 5.0], [2.0, 0.0]]), seen_classes=[0, 1])
        tensor([[3., 4.],
                [0., 5.],
                [5., 0.]])
    """
    check_matrix("weight", weight)
    groups = Groups.from_split(ClassSplit(len(weight), seen_classes, absent_classes), weight.device)
    norms: Tensor = weight.detach().float().norm(dim=1)
    if not norms[groups.absent].any():
        raise ValueError(
            "Expected argument `weight` to have nonzero rows for absent classes, but got only zeros. Rows of zeros"
            " cannot be scaled to another norm."
        )
    scale = norms.new_ones(len(weight), 1)
    scale[groups.absent] = norms[groups.seen].mean() / norms[groups.absent].mean()
    return (weight.detach() * scale).to(weight.dtype)
