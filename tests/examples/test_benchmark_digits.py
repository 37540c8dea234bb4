"""The digits benchmark in its smallest setting: what it prints is what its models do."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_calibft import pseudo_cross_validation
from lightning_calibft.functional import average_logit_gap, best_gamma
from tests.helpers.processes import run_python

pytestmark = pytest.mark.filterwarnings("ignore:::lightning.pytorch")

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
SMALLEST = ["--seeds", "1", "--epochs", "1", "--shares", "50", "--optimizers", "sgd"]
MODELS = ["fine-tuned", "frozen classifier", "linear probing", "cosine classifier"]
MODELS += ["WiSE-FT, alpha 0.5", "WiSE-FT, alpha 0.75", "partial softmax", "LOLSGD"]
OF_FINE_TUNED = ["PCV over S", "PCV over Y", "gamma of 90 labeled samples", "oracle gamma"]
COLUMNS = ["Acc_Y/Y", "Acc_S/Y", "Acc_U/Y", "Acc_S/S", "Acc_U/U", "AUSUC", "harmonic mean", "NCM_S/Y", "NCM_U/Y"]
UNCHANGED = ["Acc_S/S", "Acc_U/U", "AUSUC", "NCM_S/Y", "NCM_U/Y"]  # by any gamma


@pytest.fixture(scope="module")
def bench():
    """The script as a module, under a name that the demo does not have."""
    pytest.importorskip("sklearn")
    pytest.importorskip("peft")
    threads = torch.get_num_threads()
    with isolate_rng(), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        spec = importlib.util.spec_from_file_location("benchmark_digits", FOLDER / "digits.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look it up
        spec.loader.exec_module(module)
        torch.set_num_threads(1)  # as the script: the order of sums is in the last bits
        yield module
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the script printed, run as a user runs it, and the folder it ran in."""
    folder = tmp_path_factory.mktemp("benchmark")
    done = run_python(FOLDER / "digits.py", *SMALLEST, cwd=folder)
    return done.stdout, folder / "outputs" / "benchmark_digits"


@pytest.fixture(scope="module")
def rows(printed):
    """The scores of all methods, with all their digits."""
    return json.loads((printed[1] / "methods_50_SGD_0.002_0.json").read_text())["rows"]


@pytest.fixture(scope="module")
def setting(bench):
    return bench.DigitSetting(0, 50, *bench.FINE_TUNING["sgd"], epochs=1)


def tables(text):
    """Read Markdown tables back: title -> columns, rows of cells."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    lines = [[line.strip("| ").split(" | ") for line in block] for block in blocks]
    return {first[0]: (first[1:], {name: cells for name, *cells in rest}) for first, _, *rest in lines}


def test_it_prints_five_tables(printed, rows):
    found = tables(printed[0])
    assert list(found) == ["50 % seen, SGD", "Acc_Y/Y", "optimizer, learning rate", "trained by AdamW", "loss"]
    columns, shown = found["50 % seen, SGD"]
    assert columns == [*COLUMNS, "gamma", "cost"]
    three = [[name, f"{name} + ALG", f"{name} + pseudo_absent"] for name in MODELS]
    expected = ["pre-trained", *three[0], *(f"fine-tuned + {name}" for name in OF_FINE_TUNED)]
    expected += ["fine-tuned, weight aligning", *chain(*three[1:]), "fine-tuned on all classes"]
    assert list(shown) == list(rows) == expected
    for name, cells in shown.items():
        for column, cell in zip(columns, cells, strict=True):
            digits = 2 if column == "gamma" else 1
            assert cell == f"{rows[name][column]:.{digits}f} ± {0:.{digits}f}"
    assert {name: cells[0] for name, cells in found["Acc_Y/Y"][1].items()} == {
        name: cells[0] for name, cells in shown.items()
    }


def test_the_small_tables_have_four_gammas_of_each_model(printed, rows):
    found = tables(printed[0])
    for title, number in (("optimizer, learning rate", 14), ("trained by AdamW", 3), ("loss", 4)):
        columns, shown = found[title]
        names = ["+ ALG", "gamma of ALG", "+ pseudo_absent", "gamma of pseudo_absent", "+ oracle", "gamma of oracle"]
        assert columns == ["AUSUC", "fine-tuned", *names]
        assert len(shown) == number
        for cells in shown.values():
            _, tuned, alg, _, pseudo, _, oracle, _ = (float(cell.split(" ± ")[0]) for cell in cells)
            assert oracle >= max(tuned, alg, pseudo)
    kinds = {name.split(",")[0] for name in found["optimizer, learning rate"][1]}
    assert kinds == {"SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adadelta", "AdaBelief"}
    same = [f"{rows[name]['Acc_Y/Y']:.1f} ± 0.0" for name in ("fine-tuned", "fine-tuned + ALG")]
    assert found["optimizer, learning rate"][1]["SGD, 0.002"][1:3] == same  # the same model in both tables


def test_gamma_changes_what_it_can_change(rows):
    for model in MODELS:
        of_model = [row for name, row in rows.items() if name == model or name.startswith(f"{model} + ")]
        assert len(of_model) == (3 + len(OF_FINE_TUNED) if model == "fine-tuned" else 3)
        assert [row["gamma"] for row in of_model].count(0.0) == 1
        for column in UNCHANGED:
            assert len({row[column] for row in of_model}) == 1
    of_tuned = [row["Acc_Y/Y"] for name, row in rows.items() if name.startswith("fine-tuned + ")]
    assert rows["fine-tuned + oracle gamma"]["Acc_Y/Y"] == max(of_tuned) > rows["fine-tuned"]["Acc_Y/Y"]


def test_the_scores_fit_together(rows, setting):
    target = setting.data.target_test.tensors[1]
    share = torch.isin(target, torch.tensor(setting.seen)).double().mean().item()
    for row in rows.values():
        seen, absent = row["Acc_S/Y"], row["Acc_U/Y"]
        assert row["Acc_Y/Y"] == pytest.approx(share * seen + (1 - share) * absent)
        assert row["harmonic mean"] == pytest.approx(2 * seen * absent / (seen + absent) if seen * absent else 0)
        assert seen <= row["Acc_S/S"]
        assert absent <= row["Acc_U/U"]


def test_costs_are_counted_in_samples(rows, setting):
    costs = {name: row["cost"] for name, row in rows.items()}
    labels = setting.data.target_train.tensors[1]
    assert costs["pre-trained"] == 0
    assert costs["fine-tuned on all classes"] == len(labels) / len(setting.seen_data)
    assert costs["fine-tuned + PCV over S"] == costs["fine-tuned + PCV over Y"]
    assert 2 < costs["fine-tuned + PCV over S"] < 4
    assert 5 < costs["LOLSGD"] == costs["LOLSGD + ALG"] < 7  # ten models on three of five classes
    other = {name: cost for name, cost in costs.items() if "PCV" not in name and "LOLSGD" not in name}
    assert [name for name, cost in other.items() if cost != 1] == ["pre-trained", "fine-tuned on all classes"]


def _reference_alg(logits, target, seen):
    gaps = []
    for row, label in zip(logits.double().tolist(), target.tolist(), strict=True):
        others = [row[c] for c in seen if c != label]
        absent = [row[c] for c in range(len(row)) if c not in seen]
        gaps.append(sum(others) / len(others) - sum(absent) / len(absent))
    return sum(gaps) / len(gaps)


@torch.no_grad()
def test_the_alg_row_is_the_average_logit_gap_of_the_model(bench, rows, setting):
    module, (images, target) = bench.fine_tuned(setting), setting.seen_data.tensors
    assert set(target.tolist()) == set(setting.seen)
    gamma, logits = rows["fine-tuned + ALG"]["gamma"], module(images)
    assert gamma == pytest.approx(_reference_alg(logits, target, setting.seen), rel=1e-9)
    assert gamma == pytest.approx(average_logit_gap(logits, target, setting.seen).gamma.item(), rel=1e-9)
    images, target = setting.data.target_test.tensors
    logits = module(images).double()
    logits[:, [c for c in range(10) if c not in setting.seen]] += gamma
    right = (logits.argmax(1) == target).double().mean().item()
    assert rows["fine-tuned + ALG"]["Acc_Y/Y"] == pytest.approx(100 * right)


@torch.no_grad()
def test_gammas_from_labels_are_best_on_their_own_samples(bench, rows, setting):
    gammas = {}
    for name, data in (("90 labeled samples", setting.data.held_out), ("oracle gamma", setting.data.target_test)):
        logits = bench.fine_tuned(setting)(data.tensors[0]).double()
        gammas[name] = best_gamma(logits, data.tensors[1], setting.seen).item()
    assert rows["fine-tuned + gamma of 90 labeled samples"]["gamma"] == pytest.approx(gammas["90 labeled samples"])
    assert rows["fine-tuned + oracle gamma"]["gamma"] == pytest.approx(gammas["oracle gamma"])
    assert abs(gammas["90 labeled samples"] - gammas["oracle gamma"]) > 1e-4


@torch.no_grad()
def test_the_nearest_mean_is_that_of_target_training_images(bench, rows, setting):
    module = bench.pretrained(0, 1)
    (images, labels), (test, target) = setting.data.target_train.tensors, setting.data.target_test.tensors
    features = F.normalize(module.backbone(images).double())
    means = torch.stack([features[labels == c].mean(0) for c in range(10)])
    right = (F.normalize(module.backbone(test).double()) @ F.normalize(means).T).argmax(1) == target
    seen = torch.isin(target, torch.tensor(setting.seen))
    for name in ("pre-trained", "linear probing"):  # the same features
        assert rows[name]["NCM_S/Y"] == pytest.approx(100 * right[seen].double().mean().item())
        assert rows[name]["NCM_U/Y"] == pytest.approx(100 * right[~seen].double().mean().item())
    assert rows["fine-tuned"]["NCM_U/Y"] == rows["fine-tuned, weight aligning"]["NCM_U/Y"]


@torch.no_grad()
def test_weight_aligning_scales_the_absent_rows(bench, rows, setting):
    module = copy.deepcopy(bench.fine_tuned(setting))
    weight, absent = module.head.weight, [c for c in range(10) if c not in setting.seen]
    norms = weight.norm(dim=1)
    weight[absent] *= norms[setting.seen].mean() / norms[absent].mean()
    expected = bench.score(bench.run(module, setting), setting)
    assert rows["fine-tuned, weight aligning"] == pytest.approx(expected)


def test_cross_validation_trains_once_for_both(bench, rows, setting):
    def train(module, subset):
        return bench.fit(module, subset, 1, seed=0)

    before = bench.start(setting)
    for name, candidates in (("S", "seen"), ("Y", "all")):
        data = setting.seen_data
        result = pseudo_cross_validation(before, data, train, setting.seen, candidates=candidates, progress=False)
        assert rows[f"fine-tuned + PCV over {name}"]["gamma"] == result.gamma


def test_a_second_run_reads_the_files(bench, printed, monkeypatch, capsys):
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", None)  # nothing is trained
    bench.main([*SMALLEST, "--output", str(printed[1])])
    again = capsys.readouterr().out
    assert again.splitlines()[:-1] == printed[0].splitlines()[:-1]


def test_from_scratch_the_numbers_are_the_same(bench, rows, setting, tmp_path):
    torch.manual_seed(123)
    assert bench.kept(tmp_path, "methods", setting, bench.method_rows) == rows


@pytest.mark.parametrize("damage", ["other settings", "cut off", "other code"])
def test_stale_files_are_done_again(bench, setting, tmp_path, monkeypatch, damage):
    calls = []

    def compute(_):
        calls.append(1)
        return {"row": {"gamma": 0.1}}

    bench.kept(tmp_path, "x", setting, compute)
    assert bench.kept(tmp_path, "x", setting, compute) == {"row": {"gamma": 0.1}}
    assert len(calls) == 1
    (file,) = tmp_path.iterdir()
    if damage == "cut off":
        file.write_text(file.read_text()[:40])
    elif damage == "other code":
        monkeypatch.setattr("compare.code", lambda sources: "other")
    else:
        setting = replace(setting, epochs=2)
    bench.kept(tmp_path, "x", setting, compute)
    bench.kept(tmp_path, "x", setting, compute)
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == [file]


def test_gamma_is_0_where_cross_validation_finds_none(bench, setting):
    gammas = sys.modules["compare"].cross_validated(replace(setting, seed=2, share=30))
    assert gammas["fine-tuned + PCV over Y"][0] == 0
    assert gammas["fine-tuned + PCV over S"][0] > 0
