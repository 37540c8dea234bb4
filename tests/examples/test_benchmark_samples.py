"""How gamma moves with the number of samples, on a small part of the benchmark."""

from __future__ import annotations

import contextlib
import io
import re

import pytest
from miniature import environment, script


@pytest.fixture(scope="module")
def printed():
    with environment(), contextlib.redirect_stdout(io.StringIO()) as lines:
        script("samples").main(["--samples", "3000", "--seeds", "2", "--draws", "2", "--epochs", "3"])
    return lines.getvalue()


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_way_to_read_is_shown(printed):
    header, _, *rows = (cells(line) for line in printed.splitlines() if line.startswith("|"))
    read = [(row[0], row[1]) for row in rows]
    counts = [f"`max_samples={number}`" for number in (100, 300, 1000, 3000)]
    errors = [f"`tolerance={error}`" for error in (0.1, 0.05, 0.02, 0.01)]
    assert read == [(name, how) for name in ("`alg`", "`pseudo_absent`") for how in [*counts, *errors, "all"]]
    rows = [dict(zip(header, row, strict=True)) for row in rows]
    for row, (_, how) in zip(rows, read, strict=True):
        samples, error = int(row["samples"].replace(",", "")), float(row["standard error told"])
        if how.startswith("`max_samples"):
            assert f"`max_samples={samples}`" == how
        elif how.startswith("`tolerance") and samples < 3000:
            assert error <= float(re.findall(r"[\d.]+", how)[0])
        if samples == 3000:  # each is of all samples, but for the order of summation
            assert float(row["distance from gamma of all"]) < 1e-3
            assert abs(float(row["against all"])) < 0.1
        else:
            assert 0 < float(row["distance from gamma of all"]) < 5 * error


def test_more_samples_are_nearer(printed):
    rows = [cells(line) for line in printed.splitlines() if line.startswith("| `alg`")]
    far = [float(row[4]) for row in rows if "max_samples" in row[1]]
    assert far[0] > far[2] > far[3]
