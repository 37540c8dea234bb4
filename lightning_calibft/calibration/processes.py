"""The processes that read together: what one meets ends the pass of all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_calibft.calibration.loaders import all_reduce

OUT_OF_MEMORY = (
    "Out of memory in the calibration pass. Gamma stays unset. Give it smaller batches, from a `calibration_dataloader`"
    " or as the `loader` of `calibrate`; an estimator that keeps all samples can do with fewer: `max_samples`."
)


class Processes:
    """The processes that read together: none waits for one that has failed.

    Args:
        device: That of their communication.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._failed = 0

    def meet(self, failed: Exception | None = None) -> None:
        """Wait for the other processes; they must not wait for one that has ``failed``.

        Raises:
            ValueError: If another has failed with one, which a caller may go on after: then all of them do.
            RuntimeError: If another has failed with any other error.
        """
        if not self._failed:  # after that, no process waits for another
            code = 0 if failed is None else 1 if isinstance(failed, ValueError) else 2
            self._failed = int(all_reduce(torch.tensor(code, device=self._device), maximum=True))
        if self._failed and failed is None:
            kind = ValueError if self._failed == 1 else RuntimeError
            raise kind("The calibration pass has failed on another process, which says why. Gamma stays unset.")

    @contextmanager
    def told_to_others(self) -> Iterator[None]:
        """Let the other processes know of an error in this one.

        Raises:
            torch.OutOfMemoryError: If that was the error, now with a remedy.
        """
        try:
            yield
        except Exception as error:
            self.meet(error)
            if isinstance(error, torch.OutOfMemoryError):
                raise torch.OutOfMemoryError(f"{OUT_OF_MEMORY} The error was: {error}") from error
            raise
