"""The paper's analyses, for any model: plain numbers that draw themselves."""

from lightning_calibft.analysis.accuracy_gain import accuracy_gain
from lightning_calibft.analysis.curves import compare_curves
from lightning_calibft.analysis.embedding import tsne_features
from lightning_calibft.analysis.history import Snapshot as Snapshot
from lightning_calibft.analysis.logit_levels import logit_levels
from lightning_calibft.analysis.outputs import collect_outputs
from lightning_calibft.analysis.report import calibration_report
from lightning_calibft.analysis.snapshot_plots import plot_snapshots
from lightning_calibft.analysis.toy_example import toy_example
from lightning_calibft.analysis.verdict import verdict
from lightning_calibft.analysis.weights import row_norms, update_similarity

__all__ = [
    "accuracy_gain",
    "calibration_report",
    "collect_outputs",
    "compare_curves",
    "logit_levels",
    "plot_snapshots",
    "row_norms",
    "toy_example",
    "tsne_features",
    "update_similarity",
    "verdict",
]
