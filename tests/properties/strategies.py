"""Random splits, logits and labels, small enough for the slow references."""

from __future__ import annotations

import math
from typing import NamedTuple

import hypothesis.extra.numpy as hnp
import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]

# All of them exact in each of FLOATS.
QUARTERS = st.integers(-32, 32).map(lambda n: n / 4)
ODD = st.sampled_from([0.0, 0.25, -1.0, 3.0, 2.0**14, -(2.0**15), math.inf, -math.inf, math.nan])


class Case(NamedTuple):
    """Arguments of every function on logits."""

    logits: Tensor
    target: Tensor
    seen: list[int]
    absent: list[int]

    @property
    def num_classes(self) -> int:
        return self.logits.shape[1]

    def take(self, rows: Tensor) -> Case:
        return self._replace(logits=self.logits[rows], target=self.target[rows])


@st.composite
def splits(draw, min_seen=1, max_classes=7):
    """Number of classes, the seen and the absent ones, both sorted; some may be neither."""
    num_classes = draw(st.integers(min_seen + 1, max_classes))
    order = draw(st.permutations(range(num_classes)))
    seen = draw(st.integers(min_seen, num_classes - 1))
    absent = draw(st.integers(1, num_classes - seen))
    return num_classes, sorted(order[:seen]), sorted(order[seen : seen + absent])


@st.composite
def cases(draw, values=QUARTERS, min_seen=1, min_samples=0, max_samples=10, max_classes=7):
    """Logits with many ties, labels of all classes."""
    num_classes, seen, absent = draw(splits(min_seen, max_classes))
    num_samples = draw(st.integers(min_samples, max_samples))
    logits = draw(hnp.arrays(np.float64, (num_samples, num_classes), elements=values))
    target = draw(hnp.arrays(np.int64, num_samples, elements=st.integers(0, num_classes - 1)))
    return Case(torch.from_numpy(logits).float(), torch.from_numpy(target), seen, absent)


@st.composite
def cases_without_ties(draw, **kwargs):
    """Logits of which no two in a row are equal; margins may be."""
    case = draw(cases(values=st.just(0.0), **kwargs))
    order = torch.rand(case.logits.shape, generator=generator(draw(SEEDS))).argsort(1)
    return case._replace(logits=order / 4)


SEEDS = st.integers(0, 2**32 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def parts(draw, num_samples):
    """The rows of each of some batches, in any order; batches may be empty."""
    order = torch.tensor(draw(st.permutations(range(num_samples))), dtype=torch.long)
    cuts = sorted(draw(st.lists(st.integers(0, num_samples), max_size=4)))
    return order.tensor_split(cuts)
