"""Metrics of seen and absent classes, for torchmetrics and Lightning."""

from lightning_calibft.metrics.absent_share import AbsentShare
from lightning_calibft.metrics.accuracy import HarmonicMeanAccuracy, SplitAccuracy
from lightning_calibft.metrics.average_logit_gap import AverageLogitGap
from lightning_calibft.metrics.collection import absent_class_metrics
from lightning_calibft.metrics.nearest_class_mean import NearestClassMeanAccuracy
from lightning_calibft.metrics.seen_unseen_curve import AUSUC, SeenUnseenCurve

__all__ = [
    "AUSUC",
    "AbsentShare",
    "AverageLogitGap",
    "HarmonicMeanAccuracy",
    "NearestClassMeanAccuracy",
    "SeenUnseenCurve",
    "SplitAccuracy",
    "absent_class_metrics",
]
