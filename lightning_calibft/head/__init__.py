"""The classification head: find it, prove that it gives the logits, attach a calibration, read, record and fold it."""

from lightning_calibft.head.attach import attach, detach, get_gamma, set_gamma
from lightning_calibft.head.attach import reset_gamma as reset_gamma
from lightning_calibft.head.evaluation import evaluation as evaluation
from lightning_calibft.head.find import HeadNotFoundError as HeadNotFoundError
from lightning_calibft.head.find import find_head
from lightning_calibft.head.fold import fold
from lightning_calibft.head.layers import head_names as head_names
from lightning_calibft.head.layers import is_layer as is_layer
from lightning_calibft.head.layers import num_classes as num_classes
from lightning_calibft.head.offset import CHILD_NAME as CHILD_NAME
from lightning_calibft.head.offset import attached_heads as attached_heads
from lightning_calibft.head.offset import is_folded as is_folded
from lightning_calibft.head.probe import gives_output as gives_output
from lightning_calibft.head.probe import is_proved as is_proved
from lightning_calibft.head.probe import probe as probe
from lightning_calibft.head.record import LogitRecorder as LogitRecorder
from lightning_calibft.head.record import one_forward as one_forward
from lightning_calibft.head.record import record_logits as record_logits
from lightning_calibft.head.zero_shot import ZeroShotHead

__all__ = ["ZeroShotHead", "attach", "detach", "find_head", "fold", "get_gamma", "set_gamma"]
