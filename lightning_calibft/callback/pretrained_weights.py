"""Keep the weights before fine-tuning, for estimators that need them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class PretrainedWeights:
    """Keeps a copy of the weights that a fit begins with, on the CPU.

    If the fit resumes, these are the weights from before the checkpoint was loaded.

    Attributes:
        weights: The tensors of the model's state dict. ``None`` before and after the fit.
    """

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] | None = None
        self._handle: RemovableHandle | None = None

    def watch(self, model: nn.Module) -> None:
        """From now on, copy the weights of ``model`` before other weights are loaded into it."""
        self.forget()
        self._handle = model.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            lambda *_: self._copy(model)
        )

    def start(self, model: nn.Module, resumed: bool) -> None:
        """Copy the weights as the fit begins. If it resumes, keep the copy from before the checkpoint was loaded."""
        if not resumed or self.weights is None:
            self._copy(model)
        self._stop()

    def forget(self) -> None:
        """Free the memory."""
        self.weights = None
        self._stop()

    def _copy(self, model: nn.Module) -> None:
        self.weights = {
            key: value.detach().cpu().clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)
        }

    def _stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
