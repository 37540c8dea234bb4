"""Averages of weights, partial softmax and several labels: the scripts on digits, in their smallest settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.processes import run_python

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
SMALLEST = ["--seeds", "1", "--epochs", "1"]


def tables(text):
    """Read Markdown tables back: title -> columns, rows of numbers."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    lines = [[line.strip("| ").split(" | ") for line in block] for block in blocks]
    return {
        first[0]: (
            first[1:],
            {name: [float(cell.split(" ± ")[0].strip("*")) for cell in cells] for name, *cells in rest},
        )
        for first, _, *rest in lines
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("sklearn")
    pytest.importorskip("peft")
    return tmp_path_factory.mktemp("averages")


@pytest.fixture(scope="module")
def averages(folder):
    options = [*SMALLEST, "--shares", "50", "--only", "averages"]
    return tables(run_python(FOLDER / "weight_averages.py", *options, cwd=folder).stdout)


def test_the_ends_and_the_best_of_the_way(averages, folder):
    accuracies, alphas = averages["Acc_Y/Y"][1], averages["alpha"][1]
    (file,) = (folder / "outputs/benchmark_digits").glob("averages_digits_50_SGD*.json")
    rows = json.loads(file.read_text())["rows"]
    for gamma in ("pseudo_absent", "labeled gamma", "oracle gamma"):
        assert rows[f"alpha 1.0 + {gamma}"] == rows[f"fine-tuned + {gamma}"]  # all of the way
    best = rows["WiSE-FT, oracle alpha and gamma"]
    on_the_way = {name: row for name, row in rows.items() if name.startswith("alpha")}
    assert best["Acc_Y/Y"] >= max(row["Acc_Y/Y"] for row in on_the_way.values())
    assert accuracies["WiSE-FT, oracle alpha and gamma"][0] == pytest.approx(best["Acc_Y/Y"], abs=0.06)
    assert all(0 <= alpha <= 1 for row in alphas.values() for alpha in row)
    assert (rows["LP-FT + oracle gamma"]["cost"], rows["soup of 4 + oracle gamma"]["cost"]) == (2, 4)
    for name in ("fine-tuned", "LP-FT", "soup of 4", "greedy soup"):
        assert accuracies[f"{name} + oracle gamma"][0] >= accuracies[f"{name} + pseudo_absent"][0]


SOUP = """
import torch
from compare import prepare
from digits import DigitSetting
from methods import fine_tuned, linear_probing, start
from weight_averages import expected_accuracy, probed_first, soup
from table import run
prepare()
setting = DigitSetting(0, 50, "SGD", 2e-3, 1)
before, after = start(setting), fine_tuned(setting)
for name, value in soup([before, after], setting).state_dict().items():
    torch.testing.assert_close(value, (before.state_dict()[name] + after.state_dict()[name]) / 2)
probe, both = linear_probing(setting), probed_first(setting)
assert all(not torch.equal(a, b) for a, b in zip(probe.parameters(), both.parameters(), strict=True))
outputs = run(after, setting)
low, high = (expected_accuracy(outputs, setting, gamma) for gamma in (-99.0, 99.0))
logits, target = outputs.train, setting.seen_data.tensors[1]
seen = torch.tensor(setting.seen)
right = (seen[logits[:, seen].argmax(1)] == target).double().mean().item()
assert abs(low - right / 2) < 0.01, (low, right)
assert 0 < high < 0.5
"""


def test_soups_and_what_is_expected_of_gamma(folder):
    path = f"import sys\nsys.path.insert(0, {str(FOLDER)!r})\nsys.path.append({str(FOLDER.parent)!r})\n"
    run_python("-c", path + SOUP, cwd=folder)


def test_local_sgd_is_scored_with_each_setting(folder):
    printed = run_python(FOLDER / "weight_averages.py", *SMALLEST, "--only", "local", cwd=folder).stdout
    columns, rows = tables(printed)["LOLSGD, SGD"]
    assert len(rows) == 6
    costs = {name: cells[columns.index("cost")] for name, cells in rows.items()}
    assert costs["three quarters of the classes"] > costs["frozen classifier"] == costs["learning rate x 2"] > 2
    assert len({tuple(cells) for cells in rows.values()}) >= 5  # at one epoch, five epochs a round are one


def test_partial_softmax_is_printed_with_its_loss(folder):
    lines = run_python(FOLDER / "partial_softmax.py", *SMALLEST, cwd=folder).stdout.splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines[2:]]
    assert [line[:3] for line in cells] == [
        [rate, f"{which} classes", "0"] for rate in ("0.002", "0.001") for which in ("all", "seen")
    ]
    assert all(line[3] == line[4] for line in cells)  # the first epoch is the last
    assert float(cells[1][3]) < float(cells[0][3])  # fewer classes compete


def test_labels_that_were_never_seen_come_back(folder):
    printed = run_python(FOLDER / "multi_label.py", *SMALLEST, cwd=folder).stdout
    columns, rows = tables(printed)["four digits an image, 50 % seen"]
    of = {name: dict(zip(columns, cells, strict=True)) for name, cells in rows.items()}
    tuned = [row for name, row in of.items() if name.startswith("fine-tuned") and "all labels" not in name]
    assert len(tuned) == 7
    for column in ("macro F1 of seen", "mean precision of seen", "mean precision of absent"):
        assert len({row[column] for row in tuned}) == 1  # no threshold of absent labels changes these
    absent = "macro F1 of absent"
    assert of["fine-tuned + oracle threshold of each label"][absent] >= of["fine-tuned + oracle gamma"][absent] - 0.5
    assert of["fine-tuned + oracle gamma"][absent] == max(row[absent] for row in tuned[:-1])
