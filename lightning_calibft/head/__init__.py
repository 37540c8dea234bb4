"""The classification head: find it, prove that it gives the logits, attach a calibration, read, record and fold it."""

from lightning_calibft.head.attach import attach, detach, get_gamma, reset_gamma as reset_gamma, set_gamma
from lightning_calibft.head.evaluation import evaluation as evaluation
from lightning_calibft.head.find import HeadNotFoundError as HeadNotFoundError, find_head
from lightning_calibft.head.fold import fold
from lightning_calibft.head.layers import head_names as head_names, is_layer as is_layer, num_classes as num_classes
from lightning_calibft.head.offset import (
    CHILD_NAME as CHILD_NAME,
    attached_heads as attached_heads,
    is_folded as is_folded,
)
from lightning_calibft.head.probe import gives_output as gives_output, is_proved as is_proved, probe as probe
from lightning_calibft.head.record import (
    LogitRecorder as LogitRecorder,
    one_forward as one_forward,
    record_logits as record_logits,
)
from lightning_calibft.head.zero_shot import ZeroShotHead

__all__ = ["ZeroShotHead", "attach", "detach", "find_head", "fold", "get_gamma", "set_gamma"]
