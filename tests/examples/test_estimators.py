"""The page of the estimators holds what its script prints."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def tables():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return runpy.run_path(str(FOLDER / "estimators.py"))["tables"]()


def test_the_page_is_what_the_script_prints(tables):
    shown = [line for line in (FOLDER / "estimators.md").read_text().splitlines() if line.startswith("|")]
    computed = [line for lines in tables.values() for line in lines]
    assert len(shown) == len(computed) > 100
    for one, other in zip(shown, computed, strict=True):
        assert _words(one) == _words(other)
        for value, expected in zip(_numbers(one), _numbers(other), strict=True):
            assert abs(value - expected) <= max(0.11, 0.03 * abs(expected))  # elsewhere the last digit may be another


def test_what_the_page_says_of_the_estimators(tables):
    """The recommended one is near the best gamma in every row, and better than the paper's in all but noise."""
    for name in ("methods", "methods, held-out"):
        rows = {line.split("|")[1].strip(): _numbers(line) for line in tables[name][2:]}
        alg, pseudo_absent = rows["`alg`"], rows["`pseudo_absent`"]
        *of_kinds, mean, error, worst_row, worst_run = pseudo_absent
        assert mean + error < 0.8
        assert (worst_row, worst_run) < (1.0, 2.0)
        for k in range(0, len(of_kinds), 2):  # means and standard errors in turn
            assert pseudo_absent[k] <= alg[k] + alg[k + 1] + pseudo_absent[k + 1]
        assert mean < min(row[-4] for other, row in rows.items() if other != "`pseudo_absent`")


def _words(line):
    return re.sub(r"-?\d[\d,.]*", "#", line)


def _numbers(line):
    cells = line.split("|")[2:-1]
    return [float(number.replace(",", "")) for cell in cells for number in re.findall(r"-?\d[\d,]*\.?\d*", cell)]


def test_the_readme_says_the_same(tables):
    readme = (FOLDER.parents[1] / "README.md").read_text()
    shown = dict(re.findall(r'^\| `"(\w+)"` \|.*\| (\d+\.\d\d) \|$', readme, re.MULTILINE))
    rows = {line.split("|")[1].strip(): _numbers(line)[-4] for line in tables["methods"][2:]}
    rows["`pcv`"] = rows["pseudo cross-validation over S"]
    rows["`quantile_gap`"] = rows["`quantile_gap`, 0.9"]
    rows["`operating_point`"] = next(_numbers(line)[-4] for line in tables["labelled"] if "100 labelled" in line)
    assert len(shown) == 9
    for name, value in shown.items():
        assert abs(float(value) - rows[f"`{name}`"]) < 0.03
