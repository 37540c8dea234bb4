from __future__ import annotations

import inspect
import re
import runpy
from pathlib import Path

import pytest
import torch

from lightning_calibft import AbsentClassCalibration, inspect_checkpoint
from tests.helpers.processes import run_python

pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")
yaml = pytest.importorskip("yaml")

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT, CONFIG = EXAMPLES / "lightning_cli.py", EXAMPLES / "lightning_cli.yaml"
CALLBACK = "lightning_calibft.AbsentClassCalibration"
BEST = Path("outputs") / "cli" / "best.ckpt"

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore:.*does not have many workers",
    "ignore:.*deprecated in v4",
    "ignore:.*`isinstance.treespec, LeafSpec.` is deprecated",
    "ignore:.*of the `seen_classes` and were left out",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
)


def run(folder: Path, *words: str) -> str:
    done = run_python(SCRIPT, *words, cwd=folder, COLUMNS="100")
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Fit as the README says; return what was printed and the folder that it ran in."""
    folder = tmp_path_factory.mktemp("cli")
    return run(folder, "fit", "--config", str(CONFIG)), folder


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the script in this process, where nothing has to be imported anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run_main(*words: str) -> None:
        monkeypatch.setattr("sys.argv", [str(SCRIPT), *words])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return run_main


def logits_and_target(file: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits without gamma, by a network that knows nothing of the calibration."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from digits_data import make_data
    from digits_module import DigitClassifier

    state = torch.load(file, weights_only=True)["state_dict"]
    module = DigitClassifier()
    module.load_state_dict({key: value for key, value in state.items() if "absent_class" not in key})
    images, target = getattr(make_data(seed=0), part).tensors
    with torch.no_grad():
        return module.eval()(images), target


def _reference_gamma(logits: torch.Tensor, target: torch.Tensor, seen: list[int]) -> float:
    gaps = []
    for row, label in zip(logits.double().tolist(), target.tolist(), strict=True):
        if label in seen:
            others = [row[c] for c in seen if c != label]
            absent = [z for c, z in enumerate(row) if c not in seen]
            gaps.append(sum(others) / len(others) - sum(absent) / len(absent))
    return sum(gaps) / len(gaps)


def test_fit_ends_with_the_table_and_a_calibrated_checkpoint(
    fitted: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed, folder = fitted
    info = inspect_checkpoint(folder / BEST)
    assert (info["calibrated"], info["estimator"], info["num_samples"]) == (True, "alg", 231)
    logits, target = logits_and_target(folder / BEST, "target_train", monkeypatch)
    gamma = _reference_gamma(logits, target, info["seen_classes"])
    assert info["gamma"] == pytest.approx(gamma, rel=1e-4)
    assert gamma > 0.5
    assert re.search(r"Absent-class calibration \(alg\): gamma = .* from 231 samples; 5 classes seen, 5 abs", printed)
    before, after = map(float, re.search(r"val_acc_absent +([\d.]+) +([\d.]+)", printed).groups())
    assert after > before
    assert f"best.ckpt: gamma = {gamma:.3f}" in printed
    assert {path.name for path in folder.iterdir()} == {"outputs"}


def test_test_is_calibrated(fitted: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    printed = run(fitted[1], "test", "--config", str(CONFIG), "--ckpt_path", str(BEST), "--trainer.logger=false")
    info = inspect_checkpoint(fitted[1] / BEST)
    logits, target = logits_and_target(fitted[1] / BEST, "target_test", monkeypatch)
    absent = torch.isin(target, torch.tensor(info["absent_classes"]))

    def accuracy(gamma: float) -> float:
        moved = logits + gamma * torch.isin(torch.arange(10), torch.tensor(info["absent_classes"]))
        return (moved.argmax(1) == target)[absent].double().mean().item()

    assert float(re.search(r"test_acc_absent\D+([\d.]+)", printed)[1]) == pytest.approx(accuracy(info["gamma"]))
    assert accuracy(info["gamma"]) > accuracy(0.0)


def callback_of(config: Path | str) -> dict:
    """What a config holds of the callback."""
    text = config.read_text() if isinstance(config, Path) else config
    (entry,) = [one for one in yaml.safe_load(text)["trainer"]["callbacks"] if one["class_path"] == CALLBACK]
    return entry["init_args"]


def defaults() -> dict:
    parameters = inspect.signature(AbsentClassCalibration).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def test_the_saved_config_has_all_arguments(fitted: tuple[str, Path]) -> None:
    assert callback_of(fitted[1] / "outputs" / "lightning_logs" / "version_0" / "config.yaml") == defaults()


def test_print_config_has_all_arguments(main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main("fit", f"--trainer.callbacks+={CALLBACK}", "--trainer.callbacks.seen_classes=[0,1]", "--print_config")
    assert stopped.value.code == 0
    assert callback_of(capsys.readouterr().out) == {**defaults(), "seen_classes": [0, 1]}


TINY = ("--trainer.max_epochs=1", "--trainer.logger=false", "--trainer.accelerator=cpu", "--seed_everything=false")


def test_the_callback_from_the_command_line_alone(
    main, fitted: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = inspect_checkpoint(fitted[1] / BEST)["seen_classes"][:2]
    arguments = [f"seen_classes={seen}", "log_metrics=false", "unpack_batch=unpacking.unpack"]
    words = [f"--trainer.callbacks.{argument}" for argument in arguments]
    (tmp_path / "unpacking.py").write_text("def unpack(batch):\n    return batch[0], batch[1]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    main("fit", *TINY, f"--trainer.callbacks+={CALLBACK}", *words)
    (file,) = tmp_path.glob("checkpoints/*.ckpt")
    assert inspect_checkpoint(file)["seen_classes"] == seen
    assert callback_of(tmp_path / "config.yaml") == {
        **defaults(),
        "seen_classes": seen,
        "log_metrics": False,
        "unpack_batch": "unpacking.unpack",
    }


def test_an_estimator_object(main, fitted: tuple[str, Path], tmp_path: Path) -> None:
    seen = inspect_checkpoint(fitted[1] / BEST)["seen_classes"]
    metric = {
        "class_path": "lightning_calibft.metrics.AverageLogitGap",
        "init_args": {"num_classes": 10, "seen_classes": seen},
    }
    callback = {"class_path": CALLBACK, "init_args": {"estimator": metric}}
    Path("run.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    main("fit", *TINY, "--config=run.yaml")
    (file,) = tmp_path.glob("checkpoints/*.ckpt")
    info = inspect_checkpoint(file)
    assert (info["estimator"], info["seen_classes"]) == ("AverageLogitGap", seen)


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("estimator=nonsense", "`estimator` to be one of 'alg', 'pseudo_absent', .* or a metric, but got 'nonsense'"),
        ("max_samples=0", "`max_samples` to be an integer of at least 1, but got 0"),
        ("max_samples=many", "'max_samples', val='many'"),
        ("seen_classes=[a]", "class 'int'>. Got value: a"),
        ("absent_share=2", r"`absent_share` to be None or a number in \(0, 1\), but got 2"),
        ("unpack_batch=no.such", "`unpack_batch` to be the import path of a function, such as .* but got 'no.such'"),
        ("class_map=imagenet-z", "`class_map` to be one of 'imagenet-a', .* but got 'imagenet-z'"),
        ("log_metrics=maybe", "class 'bool'>. Got value: maybe"),
        ("gamma=1", "'gamma', val='1'"),
    ],
)
def test_wrong_values_are_refused_before_training(
    argument: str, text: str, main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)) as refused:
        main("fit", *TINY, f"--trainer.callbacks+={CALLBACK}", f"--trainer.callbacks.{argument}")
    error = refused.value
    assert re.search(text, capsys.readouterr().err if isinstance(error, SystemExit) else str(error))
    assert not isinstance(error, SystemExit) or error.code == 2
    assert not list(tmp_path.iterdir())
