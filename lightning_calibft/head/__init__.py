"""Find the classification head; attach, read, detach, fold and check its calibration."""

from lightning_calibft.head.attach import attach, detach, get_gamma, reset_gamma, set_gamma
from lightning_calibft.head.evaluation import evaluation
from lightning_calibft.head.find import HeadNotFoundError, find_head
from lightning_calibft.head.fold import fold
from lightning_calibft.head.layers import head_names, is_layer, num_classes
from lightning_calibft.head.offset import CHILD_NAME, attached_heads, is_folded
from lightning_calibft.head.probe import probe
from lightning_calibft.head.record import record_logits
from lightning_calibft.head.zero_shot import ZeroShotHead

__all__ = [
    "CHILD_NAME",
    "HeadNotFoundError",
    "ZeroShotHead",
    "attach",
    "attached_heads",
    "detach",
    "evaluation",
    "find_head",
    "fold",
    "get_gamma",
    "head_names",
    "is_folded",
    "is_layer",
    "num_classes",
    "probe",
    "record_logits",
    "reset_gamma",
    "set_gamma",
]
