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

COLUMNS = ["Acc_Y/Y", "Acc_S/Y", "Acc_U/Y", "AUSUC", "NCM_S/Y", "NCM_U/Y", "gamma"]
MODELS = ["pre-trained", "fine-tuned", "+ ALG", "+ pseudo_absent", "+ oracle gamma"]
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
    seen, absent = sorted(CLASSES.index(name) for name in SEEN), [1, 3, 4]
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
    gammas = [0.0, 0.0, miniature.reference_alg(*train), estimator.compute().item()]
    return [
        miniature.reference_row(of, file, target, seen, absent, gamma)
        for file, gamma in zip([source] + 3 * [tuned], gammas, strict=True)
    ]


def test_the_table_is_what_the_kept_weights_do(results, reference):
    rows = json.loads(results.read_text())["rows"]
    assert list(rows) == MODELS
    for name, expected in zip(MODELS[:4], reference, strict=True):
        assert list(rows[name]) == COLUMNS
        assert list(rows[name].values()) == pytest.approx(expected, abs=1e-3), name
    assert len({row["Acc_Y/Y"] for row in rows.values()}) > 2  # not all at chance


def test_the_oracle_is_the_best_gamma(results):
    rows = json.loads(results.read_text())["rows"]
    assert rows["+ oracle gamma"]["Acc_Y/Y"] >= max(rows[name]["Acc_Y/Y"] for name in MODELS[1:])


def test_the_callback_has_put_gamma_into_the_kept_weights(results):
    facts = inspect_checkpoint(results.with_name("fine_tuned.ckpt"))
    gamma = json.loads(results.read_text())["rows"]["+ pseudo_absent"]["gamma"]
    assert (facts["gamma"], facts["estimator"]) == (pytest.approx(gamma, abs=1e-6), "pseudo_absent")
    assert facts["seen_classes"] == [0, 2, 5]
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
    assert titles[::5] == ["Art → Clipart", "Art → Product", "Art → Real World", "mean of 3"]
    first = [float(line.split(" | ")[2]) for line in lines[2:][::5]]
    assert first[3] == pytest.approx(sum(first[:3]) / 3, abs=0.1)


def folder_of(arguments):
    args = script("office_home").parse_arguments([str(word) for word in arguments])
    return script("protocol").folder_of("x", script("paper_data").settings(args), args)


@pytest.mark.parametrize("other", [["--epochs", "2"], ["--seed", "1"], ["--learning-rate", "0.3"]])
def test_other_settings_have_another_folder(photos, other):
    first, second, same = map(folder_of, (options(photos), options(photos, *other), options(photos, "--workers", "3")))
    assert first == same != second
