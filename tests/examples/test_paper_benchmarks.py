"""The Office-Home benchmark on miniature images: what it prints is what the weights that it keeps do."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
import miniature
import pytest
import torch
from miniature import CLASSES, SEEN, options, run, script

from lightning_calibft import ClassSplit, inspect_checkpoint
from lightning_calibft.estimators import make_estimator

pytestmark = [
    pytest.mark.filterwarnings("ignore:::lightning.pytorch"),
    pytest.mark.usefixtures("paper_environment"),
]

COLUMNS = ["Acc_Y/Y", "Acc_S/Y", "Acc_U/Y", "Acc_S/S", "Acc_U/U", "AUSUC", "macro F1", "NCM_S/Y", "NCM_U/Y"]
COLUMNS += ["gamma", "cost"]
GAMMAS = ["+ ALG", "+ pseudo_absent", "+ ALG of the scored images", "+ oracle gamma"]
MODELS = ["pre-trained", "fine-tuned", *(f"fine-tuned {name}" for name in GAMMAS)]
PAIR = ["--source", "Art", "--target", "Real_World"]


@pytest.fixture(scope="module")
def lists(photos):
    return "--image-lists", photos / "lists"


@pytest.fixture(scope="module")
def table(photos, lists):
    return run("office_home", options(photos, *PAIR, *lists))


@pytest.fixture(scope="module")
def results(table, photos):
    (file,) = (photos / "outputs").glob("Art_Real_World-*/results.json")
    return file


@pytest.fixture
def fits(monkeypatch):
    """The files that trainings write from now on."""
    written, fit = [], pl.Trainer.fit

    def recorded(trainer, *args, **kwargs):
        fit(trainer, *args, **kwargs)
        written.append(Path(trainer.checkpoint_callback.best_model_path).name)

    monkeypatch.setattr(pl.Trainer, "fit", recorded)
    return written


@pytest.fixture(scope="module")
def reference(photos, results):
    """The rows of the table, computed anew."""
    seen = sorted(CLASSES.index(name) for name in SEEN)
    absent = sorted(set(range(6)).difference(seen))
    (source,) = (photos / "outputs").glob("Art-*/source.ckpt")
    paths, target = {}, {}
    for part, positions in (("train", range(3)), ("test", range(3, 6))):
        paths[part] = [photos / "data/Real World" / name / f"{p:05d}.png" for name in CLASSES for p in positions]
        target[part] = [row for row in range(len(CLASSES)) for _ in positions]
    tuned = results.with_name("fine_tuned.ckpt")
    of = {
        (file, part): miniature.outputs_of(file, paths[part], len(CLASSES))
        for file in (source, tuned)
        for part in paths
    }

    train = of[tuned, "train"][1], target["train"], seen, absent
    estimator = make_estimator("pseudo_absent", ClassSplit(len(CLASSES), seen))
    estimator.update(train[0], torch.tensor(target["train"]), of[source, "train"][1])
    test = of[tuned, "test"][1], target["test"], seen, absent
    gammas = [0.0, 0.0, miniature.reference_alg(*train), estimator.compute().item()]
    gammas.append(miniature.reference_alg(*test, of=range(6)))
    return [
        miniature.reference_row(of, file, target, seen, absent, gamma)
        for file, gamma in zip([source] + 4 * [tuned], gammas, strict=True)
    ]


def test_the_table_is_what_the_kept_weights_do(results, reference):
    rows = json.loads(results.read_text())["rows"]
    assert list(rows) == MODELS
    for name, expected in zip(MODELS[:5], reference, strict=True):
        assert list(rows[name]) == COLUMNS
        cost = 0 if name == "pre-trained" else 1
        assert list(rows[name].values()) == pytest.approx([*expected, cost], abs=1e-3), name
    assert len({row["Acc_Y/Y"] for row in rows.values()}) > 2  # not all at chance


def test_the_oracle_is_the_best_gamma(results):
    rows = json.loads(results.read_text())["rows"]
    assert rows[MODELS[-1]]["Acc_Y/Y"] >= max(rows[name]["Acc_Y/Y"] for name in MODELS[1:])


def test_the_callback_has_put_gamma_into_the_kept_weights(results):
    facts = inspect_checkpoint(results.with_name("fine_tuned.ckpt"))
    gamma = json.loads(results.read_text())["rows"]["fine-tuned + pseudo_absent"]["gamma"]
    assert (facts["gamma"], facts["estimator"]) == (pytest.approx(gamma, abs=1e-6), "pseudo_absent")
    assert facts["seen_classes"] == [0, 4, 5]
    assert facts["num_samples"] == 3 * 3  # clean images once, not the augmented iterations


def test_one_markdown_table_is_printed(table, results):
    rows = json.loads(results.read_text())["rows"]
    head, ruler, *lines = [line.strip("| ").split(" | ") for line in table]
    assert head == ["%; gamma in logits", "model", *COLUMNS]
    assert len(ruler) == len(head)
    assert [line[:2] for line in lines] == [["Art → Real World", name] for name in MODELS]
    for line in lines:
        expected = [f"{rows[line[1]][key]:.{2 if key == 'gamma' else 1}f}" for key in COLUMNS]
        assert line[2:] == expected


# --- other ways to fine-tune ---

OTHERS = ["frozen classifier", "linear probing", "cosine classifier", "WiSE-FT, alpha 0.5", "WiSE-FT, alpha 0.75"]
OTHERS += ["partial softmax", "LOLSGD"]
COSTS = {"fine-tuned + PCV over S": 4, "fine-tuned + PCV over Y": 4, "fine-tuned, weight aligning": 1}
COSTS |= {
    f"{name}{gamma}": 2 if name == "LOLSGD" else 1 for name in OTHERS for gamma in ("", " + ALG", " + pseudo_absent")
}
COSTS |= {"fine-tuned on all classes": 1}


@pytest.fixture(scope="module")
def all_rows(table, photos, lists):
    """The rows of all methods."""
    lines = run("office_home", options(photos, *PAIR, *lists, "--methods", "all", "--local-models", "2"))
    assert lines[: len(table)] == table
    return {name: cells for _, name, *cells in (line.strip("| ").split(" | ") for line in lines[2:])}


def state_of(file):
    state = torch.load(file, weights_only=True)
    return {key.removeprefix("net."): value for key, value in state.get("state_dict", state).items()}


def test_all_methods_of_the_comparison_are_scored(all_rows):
    assert list(all_rows) == [*MODELS, *COSTS]
    assert {name: float(cells[-1]) for name, cells in all_rows.items() if name in COSTS} == COSTS
    for name in OTHERS:  # no gamma changes these
        assert all_rows[name][3:6] == all_rows[f"{name} + ALG"][3:6] == all_rows[f"{name} + pseudo_absent"][3:6]
    assert all_rows["linear probing"][7:9] == all_rows["pre-trained"][7:9]  # the same features
    assert all_rows["fine-tuned, weight aligning"][7:9] == all_rows["fine-tuned"][7:9]


def test_what_is_frozen_stays(all_rows, results, photos):
    (source,) = (photos / "outputs").glob("Art-*/source.ckpt")
    before, head = state_of(source), {"fc.weight", "fc.bias"}
    for name, stays in {"frozen_classifier": head, "linear_probing": set(before) - head, "all_classes": set()}.items():
        after = state_of(results.with_name(f"{name}.ckpt"))
        assert {key for key in before if torch.equal(before[key], after[key])} == stays
    absent = [row for row, name in enumerate(CLASSES) if name not in SEEN]
    for name, moved in {"partial_softmax": False, "all_classes": True, "part_0": True}.items():
        shift = state_of(results.with_name(f"{name}.ckpt"))["fc.bias"] - before["fc.bias"]
        assert (shift[absent].abs().max() > 1e-3) == moved  # else weight decay alone


def test_parts_are_halves_of_the_seen_classes_as_the_authors_shuffle_them(all_rows, results, photos):
    (source,) = (photos / "outputs").glob("Art-*/source.ckpt")
    before, order = state_of(source), [CLASSES.index(name) for name in SEEN]
    for seed in range(3):
        kept = {order[position] for position in torch.randperm(3, generator=torch.Generator().manual_seed(seed))[:2]}
        shift = state_of(results.with_name(f"part_{seed}.ckpt"))["fc.bias"] - before["fc.bias"]
        assert set(shift.argsort(descending=True)[:2].tolist()) == kept  # their biases rise


def test_several_seeds_are_printed_with_their_spread():
    protocol = script("protocol")
    runs = [{"x": dict.fromkeys(protocol.COLUMNS, value)} for value in (1.0, 2.0)]
    first, second, mean = list(protocol.markdown({"a": runs, "b": runs[::-1]}))[2:]
    assert first == "| a | x | " + " | ".join(["1.5 ± 0.7"] * 9 + ["1.50 ± 0.71", "1.5 ± 0.7"]) + " |"
    assert second == first.replace("| a", "| b")
    assert mean.startswith("| mean of 2 | x | 1.5 ± 0.0 |")


# --- published checkpoints ---


def published(file, target):
    """Write weights as the authors do: `backbone.*` with a head of ImageNet, and `head.*`."""
    state = {key: value for key, value in state_of(file).items() if "absent_class" not in key}
    head = {key.replace("fc.", "head."): value for key, value in state.items() if key.startswith("fc.")}
    rest = {f"backbone.{key}": value for key, value in state.items() if not key.startswith("fc.")}
    torch.save({**rest, **head, "backbone.fc.weight": torch.zeros(7, 3), "backbone.fc.bias": torch.zeros(7)}, target)
    return target


def test_a_published_checkpoint_is_scored(table, photos, lists, results, tmp_path, fits):
    (source,) = (photos / "outputs").glob("Art-*/source.ckpt")
    files = ["--eval", published(results.with_name("fine_tuned.ckpt"), tmp_path / "tuned.pth")]
    lines = run("office_home", options(photos, *PAIR, *lists, *files))
    rows = {line.split(" | ")[1]: line.split(" | ")[2:-1] for line in table[2:]}
    names = ["", " + ALG", " + ALG of the scored images", " + oracle gamma"]
    found = {line.split(" | ")[1]: line.split(" | ")[2:-1] for line in lines[2:]}
    assert found == {f"checkpoint{name}": rows[f"fine-tuned{name}"] for name in names}

    files += ["--source-weights", published(source, tmp_path / "source.pth")]
    lines = run("office_home", options(photos, *PAIR, *lists, *files))
    found = {line.split(" | ")[1]: line.split(" | ")[2:-1] for line in lines[2:]}
    assert found["pre-trained"] == rows["pre-trained"]
    assert found["checkpoint + pseudo_absent"] == rows["fine-tuned + pseudo_absent"]
    assert fits == []


def test_a_checkpoint_of_another_model_is_refused(photos, lists, tmp_path):
    torch.save({"backbone.conv1.weight": torch.zeros(1), "head.bias": torch.zeros(3)}, tmp_path / "x.pth")
    with pytest.raises(SystemExit, match=r"Cannot read .*x\.pth as a checkpoint of the authors' .* with 6 rows"):
        run("office_home", options(photos, *PAIR, *lists, "--eval", tmp_path / "x.pth"))


# --- stopping and going on ---


def test_a_finished_run_is_read(table, photos, lists, results, fits):
    tuned, away = results.with_name("fine_tuned.ckpt"), results.with_name("away.ckpt")
    tuned.rename(away)  # not even the weights are needed
    assert run("office_home", options(photos, *PAIR, *lists)) == table
    assert fits == []
    away.rename(tuned)


def test_finished_weights_are_scored_again(table, photos, lists, results, fits):
    results.unlink()
    assert run("office_home", options(photos, *PAIR, *lists)) == table
    assert fits == []


def test_weights_without_gamma_are_trained_again(table, photos, lists, results, fits):
    tuned = results.with_name("fine_tuned.ckpt")
    (source,) = (photos / "outputs").glob("Art-*/source.ckpt")
    results.unlink()
    tuned.write_bytes(source.read_bytes())
    assert run("office_home", options(photos, *PAIR, *lists)) == table
    assert fits == ["fine_tuned.ckpt"]


def test_pairs_share_their_source_model_and_get_a_mean(table, photos, fits, tmp_path):
    lines = run("office_home", options(photos, "--source", "Art", "--output", tmp_path))
    assert fits == ["source.ckpt", *(3 * ["fine_tuned.ckpt"])]
    titles = [line.split(" | ")[0].strip("| ") for line in lines[2:]]
    assert titles[::6] == ["Art → Clipart", "Art → Product", "Art → Real World", "mean of 3"]
    first = [float(line.split(" | ")[2]) for line in lines[2:][::6]]
    assert first[3] == pytest.approx(sum(first[:3]) / 3, abs=0.1)


def folder_of(arguments):
    args = script("office_home").parse_arguments([str(word) for word in arguments])
    return script("protocol").folder_of("x", script("paper_data").settings(args), args)


@pytest.mark.parametrize("other", [["--epochs", "2"], ["--seed", "1"], ["--learning-rate", "0.3"]])
def test_other_settings_have_another_folder(photos, other):
    first, second, same = map(folder_of, (options(photos), options(photos, *other), options(photos, "--workers", "3")))
    assert first == same != second
