"""Pseudo cross-validation: gamma by fine-tuning on halves of the seen classes."""

from lightning_calibft.cross_validation.pseudo_cross_validation import pseudo_cross_validation

__all__ = ["pseudo_cross_validation"]
