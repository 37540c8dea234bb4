"""The head of a zero-shot classifier: a linear layer that holds text features."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_calibft._arguments import check_number, check_tensor, check_values


class ZeroShotHead(nn.Linear):
    r"""Classifies images by the texts with the closest features, as CLIP and SigLIP do.

    The logits of an image with the features :math:`x` are

    .. math:: z_c = s \frac{t_c^\top x}{\lVert t_c \rVert \lVert x \rVert} + b.

    The rows of ``weight`` are the normalized text features times the scale, so that the head can be calibrated, folded
    and exported like any ``Linear``. Put it after the image encoder:
    ``nn.Sequential(clip.visual, ZeroShotHead(text_features, clip.logit_scale.exp()))`` with open_clip,
    ``nn.Sequential(vision_model, ZeroShotHead(...))`` with the ``CLIPVisionModelWithProjection`` of transformers.

    Its parameters are frozen: fine-tuning trains the encoder, and the absent classes keep their texts. Call
    ``requires_grad_()`` to train the head too.

    Args:
        text_features: One row of features for each class, ``(C, D)``, normalized or not. The head gets
            their dtype and device.
        logit_scale: Positive factor of the cosines. Models store its logarithm, so pass ``model.logit_scale.exp()``.
        logit_bias: A number that is added to all logits, as in SigLIP. It changes no prediction.

    Raises:
        TypeError: If ``text_features`` is not a floating point tensor.
        ValueError: If an argument has the wrong shape or is not finite, or if a row of features is zero.

    Example:
        >>> head = ZeroShotHead(torch.eye(3)[:2], logit_scale=10.0)
        >>> head(torch.tensor([[0.0, 5.0, 0.0]]))
        tensor([[ 0., 10.]])
    """

    def __init__(self, text_features: Tensor, logit_scale: float | Tensor = 100.0, logit_bias: float | Tensor = 0.0):
        _check_features(text_features)
        scale, bias = check_number("logit_scale", logit_scale), check_number("logit_bias", logit_bias)
        if not 0 < scale < math.inf:
            raise ValueError(
                f"Expected argument `logit_scale` to be positive and finite, but got {scale}. Pass the multiplier, not"
                " its logarithm: `model.logit_scale.exp()`."
            )
        if not math.isfinite(bias):
            raise ValueError(f"Expected argument `logit_bias` to be finite, but got {bias}.")
        # The meta device draws no random weights.
        super().__init__(text_features.shape[1], text_features.shape[0], device="meta")
        dtype = text_features.dtype
        # Parameters made in inference mode would refuse to take part in training.
        with torch.inference_mode(False), torch.no_grad():
            rows = F.normalize(text_features.to(torch.promote_types(dtype, torch.float32)), dim=-1) * scale
            self.weight = nn.Parameter(rows.to(dtype), requires_grad=False)
            self.bias = nn.Parameter(torch.full_like(rows[:, 0], bias, dtype=dtype), requires_grad=False)

    def forward(self, input: Any) -> Tensor:
        """Return the logits ``(N, C)``.

        Args:
            input: Image features ``(N, D)``, or an output of transformers that has them as ``image_embeds`` or
                ``pooler_output``.
        """
        return super().forward(F.normalize(_image_features(input), dim=-1))


def _check_features(features: object) -> None:
    if not isinstance(features, Tensor) or not features.is_floating_point():
        got = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(
            f"Expected argument `text_features` to be a floating point tensor, but got {got}. Of an output of"
            " transformers, pass its `text_embeds` or `pooler_output`."
        )
    check_tensor("text_features", features)
    check_values("text_features", features)
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(
            f"Expected argument `text_features` to have the shape (C, D), but got {tuple(features.shape)}. Give each"
            " class one row: the mean of its texts."
        )
    norms = features.detach().float().norm(dim=-1)
    if not bool(((norms > 0) & norms.isfinite()).all()):
        raise ValueError("Expected argument `text_features` to hold finite rows that are not zero, but some are not.")


def _image_features(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    for name in ("image_embeds", "pooler_output"):
        if isinstance(features := getattr(output, name, None), Tensor):
            return features
    raise TypeError(
        "Expected the input of ZeroShotHead to be a tensor, or to have one as `image_embeds` or `pooler_output`, but"
        f" got {type(output)}."
    )
