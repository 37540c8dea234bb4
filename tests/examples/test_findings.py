"""The findings and the figures of the paper on the digits benchmark, in its smallest setting."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.processes import run_python

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
FEW = ["--seeds", "2", "--epochs", "1"]
FIGURES = {
    "accuracy_gain",
    "curves",
    "logits_absent",
    "logits_seen",
    "row_norms",
    "toy",
    "tsne_after",
    "tsne_before",
    "update_matrix",
    "updates",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("sklearn")
    pytest.importorskip("peft")
    return tmp_path_factory.mktemp("findings")


@pytest.fixture(scope="module")
def printed(folder):
    return run_python(FOLDER / "findings.py", *FEW, cwd=folder).stdout


def test_figures_are_those_of_the_benchmark(printed, folder):
    scores = [
        json.loads((folder / f"outputs/benchmark_digits/methods_50_SGD_0.002_{seed}.json").read_text())["rows"]
        for seed in (0, 1)
    ]
    gains = [rows["fine-tuned"]["AUSUC"] - rows["pre-trained"]["AUSUC"] for rows in scores]
    first, second = (sum(rows[name]["AUSUC"] for rows in scores) / 2 for name in ("pre-trained", "fine-tuned"))
    (line,) = (line for line in printed.splitlines() if line.startswith("| AUSUC rises"))
    cell = line.split("|")[2].strip()
    assert [float(value) for value in re.findall(r"[\d.]+", cell)] == pytest.approx([first, second], abs=0.06)
    mean, error = sum(gains) / 2, abs(gains[0] - gains[1]) / 2  # of two values
    assert cell.endswith("yes" if mean > 2 * error else "no" if mean < -2 * error else "open")


def test_the_set_up_beyond_repair(printed, folder):
    assert "| 20 % seen, AdamW, learning rate 0.003 |" in printed
    assert re.search(r"The reports of \d of 2 seeds warn. Seed 0:\n\n> .*AUSUC went from", printed)
    for name in ("report_degraded_0", "report_methods_SGD_1", "report_methods_AdamW_0"):
        assert (folder / f"outputs/benchmark_digits/{name}.html").read_text().endswith("</html>\n")


JUDGE = """
from findings import Finding
from types import SimpleNamespace
runs = [SimpleNamespace(pair=pair) for pair in ([1.0, 2.0], [1.0, 2.5], [2.0, 3.0])]
mixed = [SimpleNamespace(pair=pair) for pair in ([1.0, 2.0], [1.0, 0.5])]
cells = [Finding("", lambda each: each.pair, rises).cell(of) for of in (runs, mixed) for rises in (True, False)]
assert cells == ["1.33 → 2.50, yes", "1.33 → 2.50, no", "1.00 → 1.25, open", "1.00 → 1.25, open"], cells
"""

SAME = """
import torch
import findings
from compare import prepare
from digits import DigitSetting
from methods import fine_tuned
from pathlib import Path
from watched import watch
prepare()
setting = DigitSetting(0, 50, "SGD", 2e-3, 2)
watched = watch(setting, Path("report.html"))
for a, b in zip(watched.module.parameters(), fine_tuned(setting).parameters(), strict=True):
    assert torch.equal(a, b)
assert [each.step for each in watched.diagnostics.snapshots] == [0, 8, 16]
"""


@pytest.mark.parametrize("script", [JUDGE, SAME], ids=["judgement", "same weights"])
def test_in_a_process_of_its_own(script, tmp_path):
    """There ``digits`` is the benchmark, not the demo."""
    pytest.importorskip("peft")
    path = f"import sys\nsys.path.insert(0, {str(FOLDER)!r})\nsys.path.append({str(FOLDER.parent)!r})\n"
    run_python("-c", path + script, cwd=tmp_path)


def test_figures(tmp_path):
    pytest.importorskip("peft")
    run_python(FOLDER / "figures.py", "--epochs", "1", "--folder", tmp_path / "drawn", cwd=tmp_path)
    drawn = {path.stem.removeprefix("digits_"): path for path in (tmp_path / "drawn").iterdir()}
    assert drawn.keys() == FIGURES
    for path in drawn.values():
        with Image.open(path) as image:
            assert image.size == (600, 500)
            assert len(image.convert("RGB").getcolors(2**20)) > 20
