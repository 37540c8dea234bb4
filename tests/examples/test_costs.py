"""The page of costs, from a JSON file of benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.processes import run_python

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "tests" / "benchmarks" / "page.py"


def entry(*rows):
    keys = ("section", "what", "value", "quartiles", "budget")
    return {"name": "test", "extra_info": {"rows": [dict(zip(keys, row, strict=True)) for row in rows]}}


NOW = [
    entry(("Update.", "alg, cpu", "2.500", "2.400 to 2.600", "2")),
    entry(("Bytes.", "alg", "0.010", "", "below 1"), ("Bytes.", "AUSUC", "0.020", "", "below 1")),
    entry(("Growth.", "from margins, N = 1,000", "90 ns a sample", "", "none")),
    entry(("Growth.", "from margins, exponent", "1.10", "", "1 to 1.2")),
]


def run(*words):
    return run_python(PAGE, *words).stdout


@pytest.fixture
def now(tmp_path):
    path = tmp_path / "now.json"
    path.write_text(json.dumps({"benchmarks": NOW}))
    return path


def test_each_section_is_a_table_and_what_is_over_its_budget_is_said(now):
    text = run(now)
    assert "Over the budget:\n\n- Update. alg: 2.500 (2)\n\n## Update" in text
    assert "| alg | 2.500 | 2.400 to 2.600 | 2 |" in text
    assert "## Bytes\n\n| What | Measured | Quartiles | Budget |\n" in text
    assert text.index("| alg | 0.010 |  | below 1 |") < text.index("| AUSUC | 0.020 |")
    assert "Before" not in text
    assert text.count("\n## ") == 3


def test_an_earlier_measurement_stands_beside_it(now, tmp_path):
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps({"benchmarks": [entry(("Update.", "alg, cpu", "9.000", "", "2"))]}))
    text = run(now, "--before", earlier)
    assert "| What | Before | Measured | Quartiles | Budget |" in text
    assert "| alg | 9.000 | 2.500 |" in text
    assert "| AUSUC |  | 0.020 |" in text


def test_nothing_over_the_budget(tmp_path):
    path = tmp_path / "now.json"
    path.write_text(json.dumps({"benchmarks": NOW[1:]}))
    assert "Nothing is over its budget." in run(path)


def test_updates_with_default_arguments_are_one_table(tmp_path):
    section = "Update with default arguments, in microseconds."
    rows = [
        (section, f"64 x 10, 1 thread, {name}", "1100", "90 to 1300", "none") for name in ("`amax`", "AUSUC, block")
    ]
    path = tmp_path / "now.json"
    path.write_text(json.dumps({"benchmarks": [entry(*rows)]}))
    text = run(path)
    assert "| 64 x 10 | 0.1.0, 1 thread | 10 | 15 | 149 | 475 | 549 | 1,170 |\n" in text
    assert "| 64 x 10 | block, 1 thread | 1,100 (90 to 1300) |  |  |  | 1,100 (90 to 1300) |  |\n" in text
    assert "2 threads" not in text
