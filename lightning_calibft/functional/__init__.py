"""Pure functions on logits and labels, without state or a model."""

from lightning_calibft.functional.accuracy import calibrate_logits, harmonic_mean_accuracy, split_accuracy
from lightning_calibft.functional.average_logit_gap import average_logit_gap
from lightning_calibft.functional.nearest_class_mean import (
    class_means,
    nearest_class_mean_accuracy,
    nearest_class_mean_logits,
)
from lightning_calibft.functional.pseudo_absent_gamma import pseudo_absent_gamma
from lightning_calibft.functional.seen_unseen_curve import ausuc, best_gamma, seen_unseen_curve
from lightning_calibft.functional.weight_aligning import weight_aligning

__all__ = [
    "ausuc",
    "average_logit_gap",
    "best_gamma",
    "calibrate_logits",
    "class_means",
    "harmonic_mean_accuracy",
    "nearest_class_mean_accuracy",
    "nearest_class_mean_logits",
    "pseudo_absent_gamma",
    "seen_unseen_curve",
    "split_accuracy",
    "weight_aligning",
]
