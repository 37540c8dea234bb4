"""Log values under names that nobody else logs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric


class MetricLog:
    """Logs values of evaluations in such a way that what others log is never touched.

    A name that the module or another callback logs in the same fit or evaluation is theirs, in whatever hook and order
    they log it. The value of this log is then left out, with a warning.

    Lightning calls the ``on_validation_epoch_end`` of callbacks before that of the module, which may only then log a
    name for the first time. So each name is announced when the evaluation starts, with a metric that knows its value
    later, and that has none if somebody else has logged the name by then.
    """

    def __init__(self) -> None:
        self._announced: dict[str, _LateValue] = {}
        self._own: set[str] = set()  # all names that were announced
        self._left_out: set[str] = set()

    def announce(self, trainer: Any, model: Any, names: Iterable[str]) -> None:
        """Call this when an evaluation starts, with the names that :meth:`fill` will have values for."""
        self._announced = {}
        if trainer.barebones:
            return
        names, taken, collections = list(names), self.taken(trainer), _collections(trainer)
        self._leave_out(name for name in names if name in taken)
        trainer._results.dataloader_idx = None  # an evaluation that failed leaves the number of its loader
        for name in names:
            if name not in taken:
                self._announced[name] = late = _LateValue(name, collections)
                # Lightning asks for the attribute of the module that a metric is, but does not use its name.
                model.log(name, late, add_dataloader_idx=False, metric_attribute=name)
        self._own.update(self._announced)

    def taken(self, trainer: Any) -> set[str]:
        """Return the names that others are known to log."""
        return _names_of_others(_collections(trainer)) | (set(trainer.callback_metrics) - self._own)

    def fill(self, values: Mapping[str, Any]) -> None:
        """Give the values of the evaluation, on all processes the same. Names without a value are not logged."""
        for name, value in values.items():
            if name in self._announced:
                self._announced[name].value = value

    def end(self) -> None:
        """Call this when the evaluation has ended, to warn about names that turned out to be taken."""
        self._leave_out(name for name, late in self._announced.items() if late.is_taken())
        self._announced = {}

    def free(self, trainer: Any, values: Mapping[str, float]) -> dict[str, float]:
        """Return those of ``values``, for the loggers, whose names nobody else has logged."""
        taken = trainer.logged_metrics.keys() | trainer.callback_metrics.keys()
        self._leave_out(name for name in values if name in taken)
        return {name: value for name, value in values.items() if name not in taken}

    def _leave_out(self, names: Iterable[str]) -> None:
        if new := [name for name in names if name not in self._left_out]:
            self._left_out.update(new)
            rank_zero_warn(
                f"AbsentClassCalibration does not log {', '.join(map(repr, new))}, because the module or another"
                ' callback logs the same. To log both, pass a prefix, such as `metric_prefix="calibft_"`.'
            )


class _LateValue(Metric):
    """A metric with a value that is set from outside.

    Args:
        name: The name that it is logged under.
        collections: Lightning's collections of what is logged.
    """

    full_state_update = False

    def __init__(self, name: str, collections: tuple[Any, ...]) -> None:
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        self.value: Any = None
        self._name = name
        self._collections = collections
        self.update()  # else torchmetrics warns

    def update(self) -> None:
        """Do nothing."""

    def compute(self) -> Tensor | None:
        """Return the value, or ``None``, which Lightning leaves out."""
        return None if self.is_taken() else self.value

    def is_taken(self) -> bool:
        """Return whether somebody else has logged the name."""
        return self._name in _names_of_others(self._collections)


def _collections(trainer: Any) -> tuple[Any, ...]:
    """Return Lightning's collections of what is logged: of the loop that runs, of training and of its validation.

    They are private, but Lightning has no public list of what is being logged. Names stay in them when a loop ends.
    """
    training = trainer.fit_loop.epoch_loop
    return tuple(each for each in (trainer._results, training._results, training.val_loop._results) if each is not None)


def _names_of_others(collections: tuple[Any, ...]) -> set[str]:
    """Return the full names in Lightning's collections of what is logged, less those of a :class:`MetricLog`."""
    names = set()
    for result in (result for collection in collections for result in collection.values()):
        if not isinstance(result.value, _LateValue):
            meta = result.meta
            has_suffix = meta.add_dataloader_idx and meta.dataloader_idx is not None
            names.add(f"{meta.name}/dataloader_idx_{meta.dataloader_idx}" if has_suffix else meta.name)
    return names
