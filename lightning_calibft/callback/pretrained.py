"""The weights from before fine-tuning, for estimators that compare with them."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.hooks import RemovableHandle


class PretrainedWeights:
    """Keeps a copy of the weights that a fit begins with, on the CPU; of a resumed fit, those before the resumption."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] | None = None
        self._handle: RemovableHandle | None = None

    def watch(self, model: LightningModule) -> None:
        """From now on, copy the weights whenever others are about to be loaded into ``model``."""
        self.forget()
        self._handle = model.register_load_state_dict_pre_hook(lambda *_: self._copy(model))

    def start(self, model: LightningModule, resumed: bool) -> None:
        """The fit begins: the last weights to be loaded were those of the checkpoint that it resumes, if it does."""
        if not resumed or self.weights is None:
            self._copy(model)
        self._stop()

    def forget(self) -> None:
        """Free the memory."""
        self.weights = None
        self._stop()

    def _copy(self, model: LightningModule) -> None:
        self.weights = {
            key: value.detach().cpu().clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)
        }

    def _stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
