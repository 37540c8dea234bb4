"""The page of the estimators holds what its script prints."""

import runpy
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"


def test_the_page_is_what_the_script_prints():
    printed = runpy.run_path(str(FOLDER / "estimators.py"))["page"]()
    page = (FOLDER / "estimators.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("|")]
    numbers = {line.split("|")[1].strip(): line for line in printed.splitlines()}
    assert len(table) == len(numbers) == 11
    assert [line.split("|")[1].strip() for line in table] == list(numbers)
    for line in table[2:]:
        for shown, computed in zip(_values(line), _values(numbers[line.split("|")[1].strip()]), strict=True):
            assert abs(shown - computed) <= 0.11  # the last digit may round otherwise elsewhere


def _values(line):
    return [float(value) for cell in line.split("|")[2:-1] for value in cell.replace("±", " ").split()]
