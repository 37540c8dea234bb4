"""How much fine-tuning improves the features, and how much of that shows in the predictions."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

from torch import Tensor, nn

from lightning_calibft._arguments import check_model
from lightning_calibft.analysis.outputs import Outputs, collect_outputs
from lightning_calibft.calibration.batch_reader import UnpackBatch
from lightning_calibft.functional import class_means, nearest_class_mean_logits, split_accuracy
from lightning_calibft.labels.class_map import ClassMap
from lightning_calibft.labels.label_names import LabelNames
from lightning_calibft.plotting import _AX_TYPE, _PLOT_OUT_TYPE, COLORS, add_legend, new_axis
from lightning_calibft.split import ClassIds


@dataclass(frozen=True)
class GroupAccuracies:
    """Accuracies in [0, 1] of the samples of seen and of absent classes, NaN where there are none.

    Gamma does not change the last two.

    Attributes:
        seen_among_all: Accuracy on seen samples among all classes, the paper's Acc_{S/Y}.
        absent_among_all: Accuracy on absent samples among all classes, Acc_{U/Y}.
        seen_among_seen: Accuracy on seen samples among the seen classes alone, Acc_{S/S}.
        absent_among_absent: Accuracy on absent samples among the absent classes alone, Acc_{U/U}.
    """

    seen_among_all: float
    absent_among_all: float
    seen_among_seen: float
    absent_among_absent: float

    def __sub__(self, other: GroupAccuracies) -> GroupAccuracies:
        """Return the differences of the accuracies."""
        return GroupAccuracies(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class AccuracyGain:
    """Accuracies before and after fine-tuning, of the network and of the nearest class mean (NCM) of its features."""

    network_before: GroupAccuracies
    network_after: GroupAccuracies
    ncm_before: GroupAccuracies
    ncm_after: GroupAccuracies

    @property
    def network(self) -> GroupAccuracies:
        """How much the predictions of the network gained."""
        return self.network_after - self.network_before

    @property
    def ncm(self) -> GroupAccuracies:
        """How much the features gained, measured without the head."""
        return self.ncm_after - self.ncm_before

    def plot(self, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
        """Draw the gains of the network and of the nearest class mean side by side, in points of accuracy.

        Returns a new figure and its axis, or ``None`` and ``ax`` if it was given.
        """
        figure, axis = new_axis(ax)
        from matplotlib.patches import Patch

        colors = [COLORS["seen"], COLORS["absent"]] * 2
        handles = []
        for shift, label, gain, hatch in (
            (-0.2, "network", self.network, ""),
            (0.2, "nearest class mean\nof the features", self.ncm, "///"),
        ):
            places, heights = [place + shift for place in range(4)], [100 * value for value in astuple(gain)]
            axis.bar(places, heights, width=0.4, color=colors, hatch=hatch, edgecolor="white")
            handles.append(Patch(facecolor=COLORS["all"], hatch=hatch, edgecolor="white", label=label))
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(
            range(4), ["seen\namong\nall", "absent\namong\nall", "seen\namong\nseen", "absent\namong\nabsent"]
        )
        axis.set(ylabel="Gain by fine-tuning (points of accuracy)")
        add_legend(axis, pad=6, handles=handles)
        return figure, axis


def group_accuracies(
    preds: Tensor, target: Tensor, seen_classes: ClassIds, absent_classes: ClassIds | None = None
) -> GroupAccuracies:
    """Return the accuracies of seen and absent samples, among all classes and among those of their own group.

    Args:
        preds: Logits, or similarities to class means, of shape ``(N, C)``.
        target: Class ids of shape ``(N,)``.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all classes that are not seen.

    Example:
        >>> import torch
        >>> from lightning_calibft.analysis.accuracy_gain import group_accuracies
        >>> logits = torch.tensor([[3.0, 0.0, 1.0, 0.0], [0.0, 4.0, 1.0, 0.0], [2.0, 0.0, 1.0, 0.0]])
        >>> group_accuracies(logits, torch.tensor([0, 1, 2]), seen_classes=[0, 1])
        GroupAccuracies(seen_among_all=1.0, absent_among_all=0.0, seen_among_seen=1.0, absent_among_absent=1.0)
    """
    split = (seen_classes, absent_classes)
    return GroupAccuracies(
        split_accuracy(preds, target, *split, samples="seen").item(),
        split_accuracy(preds, target, *split, samples="absent").item(),
        split_accuracy(preds, target, *split, samples="seen", candidates="seen").item(),
        split_accuracy(preds, target, *split, samples="absent", candidates="absent").item(),
    )


def accuracy_gain(
    before: nn.Module,
    after: nn.Module,
    class_data: Any,
    test_data: Any,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    head: str | None = None,
    unpack_batch: UnpackBatch | str | None = None,
    class_map: ClassMap | None = None,
    label_names: LabelNames | None = None,
) -> AccuracyGain:
    """Compare how much fine-tuning improved the predictions with how much it improved the features.

    If the features of absent classes improved but the predictions did not, only the head stands in the way, and gamma
    can help. If the features got worse as well, it cannot. See Mai et al., "Fine-Tuning is Fine, if Calibrated",
    NeurIPS 2024, section 4.

    Args:
        before: The model before fine-tuning. Its gamma, if any, is ignored.
        after: The model after fine-tuning. Its gamma, if any, is ignored.
        class_data: Loader of labeled samples of all classes, from which the class means are computed.
        test_data: Loader of other labeled samples, on which the accuracies are measured.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all classes that are not seen.
        head: Dotted name of the head in both models, as in :func:`~lightning_calibft.find_head`.
        unpack_batch: As in :func:`~lightning_calibft.calibrate`.
        class_map: As in :func:`~lightning_calibft.calibrate`.
        label_names: As in :func:`~lightning_calibft.calibrate`.

    Raises:
        ValueError: As in :func:`collect_outputs`.
        TypeError: As in :func:`collect_outputs`.

    Example:
        >>> import torch
        >>> from lightning_calibft.analysis import accuracy_gain
        >>> before, after = torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(2, 3, bias=False)
        >>> with torch.no_grad():
        ...     _ = before.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        ...     _ = after.weight.copy_(torch.tensor([[5.0, 0.0], [0.0, 5.0], [1.0, 1.0]]))
        >>> data = [(torch.tensor([[2.0, 0.1], [0.1, 2.0], [1.0, 1.0]]), torch.tensor([0, 1, 2]))]
        >>> gain = accuracy_gain(before, after, data, data, seen_classes=[0, 1])
        >>> gain.network.absent_among_all, gain.ncm.absent_among_all
        (-1.0, 0.0)
    """
    check_model("before", before)
    check_model("after", after)
    parts = []
    for model in (before, after):
        means, test = (
            collect_outputs(
                model, data, head=head, unpack_batch=unpack_batch, class_map=class_map, label_names=label_names
            )
            for data in (class_data, test_data)
        )
        parts.append(
            (
                group_accuracies(test.logits, test.target, seen_classes, absent_classes),
                group_accuracies(_ncm_logits(means, test), test.target, seen_classes, absent_classes),
            )
        )
    (network_before, ncm_before), (network_after, ncm_after) = parts
    return AccuracyGain(network_before, network_after, ncm_before, ncm_after)


def _ncm_logits(means: Outputs, test: Outputs) -> Tensor:
    return nearest_class_mean_logits(
        test.features, class_means(means.features, means.target, num_classes=test.logits.shape[1])
    )
