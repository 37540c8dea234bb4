"""Pseudo cross-validation: gamma by fine-tuning on halves of the seen classes."""

from lightning_calibft.cross_validation.pseudo_cross_validation import cost, of_classes, pseudo_cross_validation
from lightning_calibft.cross_validation.splits import Candidates, CrossValidationPlan, cross_validate

__all__ = ["Candidates", "CrossValidationPlan", "cost", "cross_validate", "of_classes", "pseudo_cross_validation"]
