from __future__ import annotations

from typing import Any

import torch
from torchmetrics import Metric

from lightning_calibft.metrics import (
    AUSUC,
    AverageLogitGap,
    HarmonicMeanAccuracy,
    NearestClassMeanAccuracy,
    SeenUnseenCurve,
    SplitAccuracy,
)
from tests.helpers.references import random_case

MEANS = torch.randn(9, 9, generator=torch.Generator().manual_seed(5))
METRICS: dict[str, tuple[type[Metric], dict[str, Any]]] = {
    "ausuc": (AUSUC, {}),
    "ausuc_macro": (AUSUC, {"average": "macro"}),
    "curve": (SeenUnseenCurve, {}),
    "accuracy": (SplitAccuracy, {}),
    "accuracy_seen_macro": (SplitAccuracy, {"samples": "seen", "average": "macro"}),
    "accuracy_absent_to_absent": (SplitAccuracy, {"samples": "absent", "candidates": "absent"}),
    "accuracy_top_2": (SplitAccuracy, {"top_k": 2}),
    "harmonic": (HarmonicMeanAccuracy, {}),
    "harmonic_macro": (HarmonicMeanAccuracy, {"average": "macro"}),
    "gap": (AverageLogitGap, {}),
    "nearest_mean": (NearestClassMeanAccuracy, {"class_means": MEANS, "samples": "absent"}),
}


def make(name: str, **kwargs: Any) -> Metric:
    _, _, seen, absent = random_case(0)
    cls, config = METRICS[name]
    return cls(9, seen, absent, **config, **kwargs)


def values(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def same(a: Any, b: Any) -> bool:
    return all(torch.allclose(x, y, rtol=1e-12, atol=0) for x, y in zip(values(a), values(b), strict=True))
