"""Ways to choose gamma."""

from lightning_calibft.estimators.choice import (
    ESTIMATORS as ESTIMATORS,
    Estimator as Estimator,
    check_estimator as check_estimator,
    check_estimator_width as check_estimator_width,
    check_unlabeled as check_unlabeled,
    make_estimator as make_estimator,
    needs_absent_samples as needs_absent_samples,
    needs_held_out_samples as needs_held_out_samples,
    needs_pretrained_logits as needs_pretrained_logits,
)
from lightning_calibft.estimators.fixed_gamma import FixedGamma as FixedGamma
from lightning_calibft.estimators.operating_point import OperatingPoint as OperatingPoint
from lightning_calibft.estimators.pseudo_absent import PseudoAbsent as PseudoAbsent

__all__ = ["ESTIMATORS"]
