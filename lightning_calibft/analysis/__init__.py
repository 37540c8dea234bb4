"""The paper's analyses, for any model: plain numbers, and a function that draws them."""

from lightning_calibft.analysis.accuracy import (
    AccuracyGain,
    GroupAccuracies,
    accuracy_gain,
    group_accuracies,
    plot_accuracy_gain,
)
from lightning_calibft.analysis.curves import CurvePoint, MethodCurve, compare_curves, plot_seen_unseen_curves
from lightning_calibft.analysis.embedding import plot_embedding, tsne_features
from lightning_calibft.analysis.history import Evaluation, Snapshot
from lightning_calibft.analysis.logits import (
    GroupLevels,
    LogitLevels,
    LogitLevelsMetric,
    logit_levels,
    plot_logit_levels,
)
from lightning_calibft.analysis.outputs import Outputs, collect_outputs
from lightning_calibft.analysis.report import calibration_report
from lightning_calibft.analysis.toy import ToyTrajectory, plot_toy_example, toy_example
from lightning_calibft.analysis.verdict import verdict
from lightning_calibft.analysis.weight_pictures import plot_mean_similarity, plot_row_norms, plot_update_similarity
from lightning_calibft.analysis.weights import (
    MeanSimilarity,
    RowNorms,
    UpdateSimilarity,
    head_weight,
    row_norms,
    update_similarity,
)

__all__ = [
    "AccuracyGain",
    "CurvePoint",
    "Evaluation",
    "GroupAccuracies",
    "GroupLevels",
    "LogitLevels",
    "LogitLevelsMetric",
    "MeanSimilarity",
    "MethodCurve",
    "Outputs",
    "RowNorms",
    "Snapshot",
    "ToyTrajectory",
    "UpdateSimilarity",
    "accuracy_gain",
    "calibration_report",
    "collect_outputs",
    "compare_curves",
    "group_accuracies",
    "head_weight",
    "logit_levels",
    "plot_accuracy_gain",
    "plot_embedding",
    "plot_logit_levels",
    "plot_mean_similarity",
    "plot_row_norms",
    "plot_seen_unseen_curves",
    "plot_toy_example",
    "plot_update_similarity",
    "row_norms",
    "toy_example",
    "tsne_features",
    "update_similarity",
    "verdict",
]
