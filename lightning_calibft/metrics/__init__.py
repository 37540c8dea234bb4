"""Metrics of seen and absent classes, for torchmetrics and Lightning."""

from lightning_calibft.metrics.accuracy import HarmonicMeanAccuracy, SplitAccuracy
from lightning_calibft.metrics.collection import absent_class_metrics
from lightning_calibft.metrics.curve import AUSUC, SeenUnseenCurve
from lightning_calibft.metrics.logit_gap import AverageLogitGap
from lightning_calibft.metrics.nearest_mean import NearestClassMeanAccuracy

__all__ = [
    "AUSUC",
    "AverageLogitGap",
    "HarmonicMeanAccuracy",
    "NearestClassMeanAccuracy",
    "SeenUnseenCurve",
    "SplitAccuracy",
    "absent_class_metrics",
]
