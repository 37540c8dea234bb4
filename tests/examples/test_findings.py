"""The findings and the figures of the paper on the digits benchmark, in its smallest setting."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
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
    assert "| one camera, long tail, 50 % seen, AdamW |" in printed
    said = r"The report of seed 0, (20 % seen, AdamW, learning rate 0.003|one camera, .*):\n\n> .*AUSUC went from"
    assert len(re.findall(said, printed)) == 2
    of_reports = printed.split("| reports of 2 seeds | warn | AUSUC fell | Acc_U/U fell |\n")[1].splitlines()[1:5]
    for line in of_reports:
        warn, ausuc, among_absent = (int(cell) for cell in line.strip("| ").split(" | ")[1:])
        assert max(ausuc, among_absent) <= warn <= min(2, ausuc + among_absent)
    for name in (
        "report_digit_20_AdamW_0",
        "report_digit_50_SGD_1",
        "report_digit_50_AdamW_0",
        "report_camera_50_AdamW_1",
    ):
        assert (folder / f"outputs/benchmark_digits/{name}.html").read_text().endswith("</html>\n")


def test_recorded_runs_of_pictures_tell_what_alg_wins(tmp_path):
    pytest.importorskip("peft")
    lines = run_python(FOLDER / "findings.py", "--benchmark", "pictures", cwd=tmp_path).stdout.splitlines()
    titles = lines[0].strip("| ").split(" | ")
    (cells,) = (line.strip("| ").split(" | ") for line in lines if line.startswith("| ALG brings them back"))
    gains = []
    for file in (*(FOLDER / "runs/pictures").glob("full_*"), FOLDER / "runs/drawings/full_AdamW_0.npz"):
        with np.load(file) as run:
            seen, absent, target = (run[key] for key in ("seen_classes", "absent_classes", "train_target"))
            logits, of_absent = run["train_logits"].astype(float), 1 / (1 + len(seen) / len(absent))
            others = [row[seen[seen != label]].mean() for row, label in zip(logits, target, strict=True)]
            margin, right, is_seen = (run[f"test_{key}"] for key in ("A_margin", "A_right", "seen"))
            gamma = np.mean(others - logits[:, absent].mean(1))
            gains.append(
                [
                    100 * (1 - of_absent) * (right & (margin > g))[is_seen].mean()
                    + 100 * of_absent * (right & (margin < g))[~is_seen].mean()
                    for g in (0, gamma)
                ]
            )
    assert cells[titles.index("full, 3 runs")] == "{:.1f} → {:.1f}, yes".format(*np.mean(gains, 0))
    assert "- AUSUC rises" in lines


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

CAMERA = """
import torch
from findings import CAMERA, LONGEST, REPEATED, CameraSetting
setting = CameraSetting(0, *CAMERA, epochs=1)
images, labels = setting.seen_data.tensors
counts = sorted(torch.bincount(labels, minlength=10).tolist())
assert counts == [0] * 5 + [REPEATED * (LONGEST >> rank) for rank in (4, 3, 2, 1, 0)], counts
corners = setting.data.target_test.tensors[0][:, 0, :2, :2].flatten(1)
assert corners.std(0).max() < 0.07  # one background and 5 % of noise
assert setting.data.target_train.tensors[1].unique().tolist() == list(range(10))
"""


@pytest.mark.parametrize("script", [JUDGE, SAME, CAMERA], ids=["judgement", "same weights", "camera"])
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
