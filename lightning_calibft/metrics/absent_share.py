"""The share of samples of absent classes in the traffic of a deployed model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.utilities import rank_zero_warn

from lightning_calibft._arguments import check_gamma, check_model, check_number, check_type
from lightning_calibft._format import CHILD_NAME, RECORD_NAME
from lightning_calibft.functional._group_logits import in_row_chunks
from lightning_calibft.functional._inputs import check_matrix, real_dtype, warn_if_probabilities
from lightning_calibft.functional.absent_share import MarginCounts, ShareEstimate, estimate_share, margin_edges
from lightning_calibft.functional.share_table import ShareTable
from lightning_calibft.metrics.absent_class_metric import AbsentClassMetric
from lightning_calibft.split import ClassIds

_HALF_LIFE = 50.0  # samples; more would follow a jump too slowly, and tell little more
_LARGEST_MISFIT = 3.0  # on the recorded runs it was at most 3.1, and in 99 of 100 cases below 2


class AbsentShare(AbsentClassMetric):
    r"""The share of samples of absent classes among unlabeled samples, such as the traffic of a deployed model.

    The margins :math:`m = \max_S z - \max_U z` of the samples, before gamma, are counted in a few bins. The table of a
    calibration says how many margins of seen and of absent samples are expected in each. The share is the proportion
    in which both mix, as the mean of its posterior distribution. This distribution allows for margins of seen samples
    that are less sure than expected, since new data may be harder, and knows that the table is a model itself: however
    many samples there are, they count as 70 at most. :func:`~lightning_calibft.calibrate` with ``unlabeled`` samples
    also asks the model from before fine-tuning, whose margins are less biased.

    The state is a count for each bin, whatever the number of samples. With a ``half_life``, the weight of a sample
    halves with every so many samples after it, and does not depend on how the samples are cut into batches. In a
    process group, each process forgets by its own samples, and their counts are added up.

    Limitations: a group of samples that is neither seen nor absent counts for the group whose margins its own are more
    like. If the margins fit no mixture of both groups, the interval becomes wide, and a warning says so. Training
    samples of the table have larger margins than new ones, and the share is then too large: calibrate on held-out
    samples.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``preds``: A float tensor of logits ``(N, C)``, not probabilities, as the model gives them: they include its
      gamma, which is taken out. Samples with NaN in their logits are left out.

    As output of ``forward`` and ``compute`` the metric returns the share, a float64 scalar in (0, 1), or NaN with a
    warning without samples.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the absent classes that can occur. ``None``: all classes that are not seen.
        share_table: The ``share_table`` of a :class:`~lightning_calibft.CalibrationResult`, of an estimator that knows
            the margins of both groups: ``"pseudo_absent"``, or ``"operating_point"`` for the best accuracy.
        gamma: The gamma that ``preds`` include, 0 for raw logits. With :meth:`from_model`, it is that of the model.
        half_life: After this many samples, the weight of a sample is one half. ``None``: all samples count alike.
        validate_args: Whether to check the shape and dtype of ``preds``, and warn about probabilities.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``share_table`` does not have the margins of both groups, or ``half_life`` is not positive.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> import torch
        >>> from lightning_calibft.estimators import PseudoAbsent
        >>> from lightning_calibft.metrics import AbsentShare
        >>> _ = torch.manual_seed(0)
        >>> held_out, target = torch.randn(200, 4), torch.randint(2, (200,))
        >>> held_out[range(200), target] += 4
        >>> estimator = PseudoAbsent(4, seen_classes=[0, 1])
        >>> estimator.update(held_out + torch.tensor([3.0, 3.0, 0.0, 0.0]), target, held_out)
        >>> metric = AbsentShare(4, seen_classes=[0, 1], share_table=estimator.share_table)
        >>> metric.update(torch.randn(100, 4) + torch.tensor([3.0, 3.0, 4.0, 0.0]))  # as samples of class 2
        >>> metric.compute()
        tensor(0.9841, dtype=torch.float64)
    """

    full_state_update: bool = True  # adding up the states of two batches would forget nothing
    higher_is_better: bool | None = None
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 1.0

    count: Tensor
    squares: Tensor

    def __init__(
        self,
        num_classes: int,
        seen_classes: ClassIds,
        absent_classes: ClassIds | None = None,
        *,
        share_table: ShareTable,
        gamma: float = 0.0,
        half_life: float | None = _HALF_LIFE,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, seen_classes, absent_classes, validate_args=validate_args, **kwargs)
        check_margins_known("share_table", share_table)
        if half_life is not None and not 0 < check_number("half_life", half_life) < math.inf:
            raise ValueError(
                f"Expected argument `half_life` to be None or a positive number of samples, but got {half_life!r}."
            )
        self.share_table = share_table
        self.gamma = check_gamma(gamma)
        self._head: _CalibratedHead | None = None
        self.half_life = None if half_life is None else float(half_life)
        edges = margin_edges(share_table)
        self._constants["edges"] = torch.tensor(edges, dtype=real_dtype(self.device), device=self.device)
        self._counted: MarginCounts | None = None
        self._estimate: ShareEstimate | None = None
        self._fits = True
        self._set_configuration(type(self).__name__, edges, self.half_life, self.gamma)
        self.add_state("count", torch.zeros(len(edges) + 1, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @classmethod
    def from_model(cls, model: nn.Module, *, half_life: float | None = _HALF_LIFE, **kwargs: Any) -> AbsentShare:
        """Return the metric for the logits of a calibrated model, in eval mode, or of a folded one.

        It follows the gamma of the model: after ``set_absent_share(model, share.compute())``, go on updating it. A copy
        of the metric follows the same model. One that is unpickled elsewhere has the gamma of then.

        Args:
            model: A model that was calibrated by an estimator that knows the margins of both groups.
            half_life: As for the class.
            kwargs: The other arguments of the class.

        Raises:
            ValueError: If the model has no table of gammas with these margins.
            TypeError: If ``model`` is not a module.
        """
        check_model("model", model)
        heads = (_CalibratedHead(module) for module in model.modules())
        head = next((head for head in heads if "share_table" in head.record), None)
        if head is None:
            raise ValueError(
                f"Expected argument `model` to be calibrated, with a table of gammas over shares, but got a"
                f" {type(model).__name__} without one. Calibrate it with the estimator 'pseudo_absent', load it with"
                " `load_calibrated`, or pass the `share_table` of a result to `AbsentShare`."
            )
        record = head.record
        classes = record["num_classes"], record["seen_classes"], record["absent_classes"]
        table = ShareTable.from_dict(record["share_table"])
        metric = cls(*classes, share_table=table, half_life=half_life, **kwargs).to(head.device)
        metric._head = head
        return metric

    def update(self, preds: Tensor) -> None:
        """Add a batch of logits ``(N, C)`` that include gamma."""
        if self.validate_args:
            check_matrix("preds", preds)
            if preds.shape[1] != self.split.num_classes:
                raise ValueError(
                    f"Expected argument `preds` to have {self.split.num_classes} columns, one per class, but got"
                    f" {preds.shape[1]}."
                )
            if len(preds) and not self._looked_for_probabilities:
                self._looked_for_probabilities = True
                warn_if_probabilities(preds)
        margin = self._margins(preds) + (self.gamma if self._head is None else self._head.gamma(preds.device))
        counted = ~margin.isnan()
        after = counted.flip(0).cumsum(0).flip(0) - counted.long()  # how many samples of this batch come later
        rate = 1.0 if self.half_life is None else 0.5 ** (1 / self.half_life)
        weight = torch.where(counted, rate ** after.to(margin), 0.0)
        left = rate ** counted.sum().to(margin)
        bins = torch.searchsorted(self._constants["edges"], margin.nan_to_num(), right=True)
        self.count = (self.count * left).index_add(0, bins, weight.to(self.count))
        self.squares = self.squares * left.square() + weight.square().sum()

    def _margins(self, preds: Tensor) -> Tensor:
        groups, dtype = self._groups, real_dtype(preds.device)

        def of_rows(preds: Tensor) -> tuple[Tensor, ...]:
            seen, absent = (
                preds.index_select(1, classes).amax(1).to(dtype) for classes in (groups.seen, groups.absent)
            )
            return (seen - absent,)

        return in_row_chunks(of_rows, preds)[0]

    def compute(self) -> Tensor:
        """Return the share for the samples so far."""
        count = self.count.to(real_dtype(self.count.device))
        # Samples of unequal weight are worth fewer than there are, but more than the sum of weights of at most 1.
        self._counted = MarginCounts(count, count.sum().square() / self.squares.to(count), self.share_table)
        self._estimate = estimate_share(self._counted)
        if self._estimate.share.isnan():
            rank_zero_warn("The estimate of the share of absent samples received no samples, so it is NaN.")
        fits = not self._estimate.misfit > _LARGEST_MISFIT
        if self._fits and not fits:
            rank_zero_warn(
                "The margins of the unlabeled samples are not those of any mixture of seen and absent samples. There"
                " may be samples that are like neither, such as images of other things or of a broken camera. The"
                " interval of the share is now wide. Look at these samples."
            )
        self._fits = fits
        return self._estimate.share

    @property
    def interval(self) -> Tensor:
        """The ends of the 90 % interval of the share, ``(2,)``."""
        return self._computed_estimate().interval

    @property
    def standard_error(self) -> Tensor:
        """The standard deviation of the posterior distribution of the share."""
        return self._computed_estimate().standard_error

    @property
    def misfit(self) -> Tensor:
        """How badly the margins fit a mixture of both groups. 1 or less is usual; above 3, they do not fit."""
        return self._computed_estimate().misfit

    @property
    def counted(self) -> MarginCounts:
        """What the share is estimated from, of all processes, for an estimate by two models.

        :meta private:
        """
        self._computed_estimate()
        assert self._counted is not None
        return self._counted

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        self._counted, self._estimate, self._fits = None, None, True

    def _computed_estimate(self) -> ShareEstimate:
        self.compute()
        assert self._estimate is not None
        return self._estimate


class _CalibratedHead:
    """What a module says of the calibration that is attached to it or folded into it.

    It is read when it is needed, so that it is that of the model. Copying it with the metric alone does not copy the
    model.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def record(self) -> Mapping[str, Any]:
        attached: Any = dict(self.module.named_children()).get(CHILD_NAME)
        record: Mapping[str, Any] = vars(self.module).get(RECORD_NAME, {}) if attached is None else attached.record
        return record

    @property
    def device(self) -> torch.device:
        tensors = (*self.module.parameters(), *self.module.buffers())
        return tensors[0].device if tensors else torch.device("cpu")

    def gamma(self, device: torch.device) -> Tensor | float:
        """Return the gamma that the logits include now. No device has to wait for it."""
        attached: Any = dict(self.module.named_children()).get(CHILD_NAME)
        if attached is None:
            return float(self.record.get("gamma", 0.0))
        return 0.0 if attached.training else attached.offset.detach().to(device)

    def __deepcopy__(self, memo: dict[int, Any]) -> _CalibratedHead:
        return _CalibratedHead(memo.get(id(self.module), self.module))


def check_margins_known(name: str, table: object) -> None:
    """Raise if an argument is not a table that has the margins of seen and absent samples."""
    check_type(name, table, ShareTable)
    if isinstance(table, ShareTable) and None in (table.seen_below, table.absent_below):
        raise ValueError(
            f"Expected argument `{name}` to hold the margins of seen and of absent samples, `seen_below` and"
            " `absent_below`, but got a table of gammas alone. Calibrate with the estimator 'pseudo_absent'."
        )
