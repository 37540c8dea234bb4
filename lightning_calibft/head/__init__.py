"""The classification head: find it, prove that it gives the logits, attach a calibration, read, record and fold it."""

from lightning_calibft.head.attach import attach, detach, get_gamma, set_gamma
from lightning_calibft.head.find import find_head
from lightning_calibft.head.fold import fold
from lightning_calibft.head.zero_shot import ZeroShotHead

__all__ = ["ZeroShotHead", "attach", "detach", "find_head", "fold", "get_gamma", "set_gamma"]
