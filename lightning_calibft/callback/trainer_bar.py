"""The Trainer's own progress bar, for what runs outside of its loops."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from lightning_calibft.calibration.evaluation_pass import MakeBar, plain_bar
from lightning_calibft.callback.lightning_package import lightning_of


def bar_of(trainer: Any) -> MakeBar | None:
    """Return what makes a bar with the look and in the place of the Trainer's own bars.

    ``None`` if the user has disabled them, or if this is not the first process. A bar of another kind than Lightning's
    two can only be seen in its own loops. What is returned then makes a plain one.
    """
    own, callbacks = trainer.progress_bar_callback, lightning_of(trainer).callbacks
    # Bars of other kinds need not have `is_enabled`.
    if own is None or not trainer.is_global_zero or not getattr(own, "is_enabled", True):
        return None
    if isinstance(own, callbacks.TQDMProgressBar):
        return partial(_tqdm_bar, own)
    # Where no loop has run, it is not on the screen.
    if isinstance(own, callbacks.RichProgressBar) and own.progress is not None and own.progress.live.is_started:
        return partial(_RichBar, own)
    return plain_bar


def _tqdm_bar(own: Any, what: str, total: int | None) -> Any:
    bar = own.init_validation_tqdm()  # which users override for a look of their own
    bar.set_description(what)
    bar.reset(total)
    bar.miniters, bar.dynamic_miniters, bar.leave = own.refresh_rate, False, False
    return bar


class _RichBar:
    """A row in the display of a ``RichProgressBar``, with what is used of a bar of tqdm.

    Args:
        own: The callback.
        what: What is going on.
        total: How many steps it takes, if that is known. May be set later.

    Attributes:
        n: How many steps are done.
    """

    def __init__(self, own: Any, what: str, total: int | None) -> None:
        self.n = 0
        self.total = total
        self._own = own
        self._row = own.progress.add_task(what, total=math.inf if total is None else total)

    def update(self) -> None:
        """Count a step."""
        self.n += 1
        self.refresh()

    def refresh(self) -> None:
        """Show how many steps are done, and how many there are."""
        total = math.inf if self.total is None else self.total
        self._own.progress.update(self._row, completed=self.n, total=total)
        self._own.refresh()

    def __enter__(self) -> _RichBar:
        return self

    def __exit__(self, *_: object) -> None:
        # Not removed, since the callback takes the number of a row for its place.
        self._own.progress.update(self._row, visible=False)
        self._own.refresh()
