"""Find the classification head; attach, read, detach, fold and check its calibration."""

from lightning_calibft.head.attach import attach, detach, fold, get_gamma, reset_gamma, set_gamma
from lightning_calibft.head.find import HeadNotFoundError, find_head, head_names, num_classes
from lightning_calibft.head.modes import eval_mode
from lightning_calibft.head.offset import CHILD_NAME, attached_heads
from lightning_calibft.head.probe import probe
from lightning_calibft.head.record import record_logits

__all__ = [
    "CHILD_NAME",
    "HeadNotFoundError",
    "attach",
    "attached_heads",
    "detach",
    "eval_mode",
    "find_head",
    "fold",
    "get_gamma",
    "head_names",
    "num_classes",
    "probe",
    "record_logits",
    "reset_gamma",
    "set_gamma",
]
