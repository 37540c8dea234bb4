"""One pass over the logits of a batch, against a search for whose each maximum is."""

from __future__ import annotations

import pytest
import torch

from lightning_calibft.functional import _group_logits
from lightning_calibft.functional._group_logits import reduce_batch
from lightning_calibft.functional._inputs import Groups
from lightning_calibft.split import ClassSplit

SPLITS = [([0, 1, 2], [3, 4, 5]), ([4, 0, 2], [1, 5, 3]), ([5], [0, 1, 2]), ([1, 3], [4])]


def wins(row: torch.Tensor, label: int, classes: list[int]) -> bool:
    """Whether the label's logit is a number, and the largest or the first of the largest."""
    values = [row[each].item() for each in sorted(classes)]
    own = row[label].item()
    if any(value != value for value in values) or own == -torch.inf:
        return False
    return label in classes and label == sorted(classes)[values.index(max(values))]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(a == b) or bool(a.isnan() and b.isnan())


@pytest.mark.parametrize(("seen", "absent"), SPLITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_against_a_search(seen, absent, dtype, odd, layout):
    draw = torch.Generator().manual_seed(len(seen))
    preds = torch.randint(-2, 3, (400, 6), generator=draw).to(dtype)  # full of ties
    if odd:
        strange = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
        mask = torch.rand(preds.shape, generator=draw) < 0.2
        preds = torch.where(mask, strange[torch.randint(3, preds.shape, generator=draw)], preds)
    preds = preds.T.contiguous().T if layout == "columns" else preds
    target = torch.randint(-1, 7, (400,), generator=draw)
    before = preds.clone()
    groups = Groups.from_split(ClassSplit(6, seen, absent), preds.device)
    found = reduce_batch(preds, target, groups, 2, torch.float64)
    assert torch.equal(preds.nan_to_num(), before.nan_to_num())
    for index, (row, label) in enumerate(zip(preds, target.tolist(), strict=True)):
        group = -1 if label == 2 else 0 if label in seen else 1 if label in absent else -1
        assert (groups.codes[found.place[index]] >= 0) == (group >= 0)
        if group < 0:
            continue
        assert found.right[index] == wins(row, label, absent if group else seen)
        assert found.best[index] == wins(row, label, seen + absent)
        assert same(found.margin[index], row[seen].double().amax() - row[absent].double().amax())


WIDE = {
    "ranges": (range(70), range(70, 300)),
    "ranges of a few": (range(5), range(5, 140)),
    "ranges among others": (range(200, 280), range(3, 190)),
    "copies": (range(0, 300, 2), range(1, 299, 2)),
    "gathered": ([9, 3, 140, 77], [*range(8, 140, 11), 4]),
}


@pytest.mark.parametrize("split", WIDE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["rows", "columns", "every other column"])
def test_wide_rows_in_chunks(split, dtype, layout, monkeypatch):
    """Each way to the columns of a wide head, in chunks of a few rows, with ties and with what is not finite."""
    monkeypatch.setattr(_group_logits, "rows_at_a_time", lambda preds, elements: 7)
    seen, absent = map(list, WIDE[split])
    draw = torch.Generator().manual_seed(1)
    preds = (torch.randn(60, 600, generator=draw) * 2).round().to(dtype)
    layouts = {"rows": preds[:, :300].clone(), "columns": preds[:, :300].T.contiguous().T}
    preds = layouts.get(layout, preds[:, ::2])
    preds[::9, 20] = torch.inf
    preds[4::9, 21] = torch.nan
    preds[6::9] = -torch.inf
    target = torch.tensor(seen + absent)[torch.randint(len(seen + absent), (60,), generator=draw)]
    preds[torch.arange(0, 60, 2), target[::2]] += 4
    groups = Groups.from_split(ClassSplit(300, seen, absent), preds.device)
    assert (groups.order is not None, groups.lowered is not None) == (split == "gathered", split == "copies")
    found = reduce_batch(preds, target, groups, None, torch.float64, checked=True)
    for index, (row, label) in enumerate(zip(preds, target.tolist(), strict=True)):
        assert found.right[index] == wins(row, label, seen if label in seen else absent)
        assert found.best[index] == wins(row, label, seen + absent)
        assert same(found.margin[index], row[seen].double().amax() - row[absent].double().amax())


@pytest.mark.parametrize("split", WIDE)
def test_wide_rows_never_wait_for_the_device(split):
    """On the device without values whatever reads one fails; code is that of a GPU."""
    groups = Groups.from_split(ClassSplit(300, *WIDE[split]), torch.device("meta"))
    preds, target = torch.empty(60, 300, device="meta"), torch.empty(60, dtype=torch.long, device="meta")
    found = reduce_batch(preds, target, groups, None, torch.float32)
    assert [value.shape for value in found] == [(60,)] * 4
