"""Compare the ways to keep the absent classes on one setting of a benchmark, and keep what was computed.

A row of a plain name is the model as it is; ``+ x`` is the same model with gamma by estimator ``x``. Costs are counted
in training samples: 1.0 is one ordinary fine-tuning, whatever a step costs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import methods
import torch
import torch.nn.functional as F
from methods import Classifier, Setting, fine_tuned, fit, interpolated, start
from table import Outputs, Rows, estimate, markdown, oracle, run, score, side_by_side
from torch.utils.data import Subset

from lightning_calibft import pseudo_cross_validation
from lightning_calibft.functional import weight_aligning

OF_EVERY_MODEL = ("alg", "pseudo_absent")
SHARED = [Path(__file__).with_name(f"{name}.py") for name in ("compare", "methods", "table")]


@cache
def before(setting: Setting) -> Outputs:
    """What the pre-trained model makes of the images."""
    return run(setting.pretrained(), setting)


def method_rows(setting: Setting) -> Rows:
    """Score every method on one setting."""
    local_sgd, local_cost = methods.leave_out_local_sgd(setting)
    models = {
        "frozen classifier": methods.frozen_classifier(setting),
        "linear probing": methods.linear_probing(setting),
        "cosine classifier": methods.cosine_classifier(setting),
        "WiSE-FT, alpha 0.5": interpolated(setting, 0.5),
        "WiSE-FT, alpha 0.75": interpolated(setting, 0.75),
        "partial softmax": methods.partial_softmax(setting),
        "LOLSGD": local_sgd,
    }
    rows = {"pre-trained": score(before(setting), setting, cost=0.0), **fine_tuned_rows(setting)}
    for name, module in models.items():
        rows |= gamma_rows(name, run(module, setting), setting, local_cost if name == "LOLSGD" else 1.0)
    on_all = methods.tuned_on_all_classes(setting)
    cost = len(setting.data.target_train) / len(setting.seen_data)
    return {**rows, "fine-tuned on all classes": score(run(on_all, setting), setting, cost=cost)}


def gamma_rows(name: str, outputs: Outputs, setting: Setting, cost: float = 1.0) -> Rows:
    """Score a model as it is, and with the gammas that every model gets."""
    gammas = {label(name, each): estimate(each, outputs, before(setting), setting) for each in OF_EVERY_MODEL}
    return {row: score(outputs, setting, gamma, cost) for row, gamma in {name: 0.0, **gammas}.items()}


def fine_tuned_rows(setting: Setting) -> Rows:
    """Score ordinary fine-tuning, with all that can be done to its logits."""
    module = fine_tuned(setting)
    outputs = run(module, setting)
    rows = gamma_rows("fine-tuned", outputs, setting)
    for row, (gamma, cost) in cross_validated(setting).items():
        rows[row] = score(outputs, setting, gamma, cost)
    number = len(setting.data.held_out)
    labeled = estimate("operating_point", outputs, before(setting), setting)
    rows[f"fine-tuned + gamma of {number} labeled samples"] = score(outputs, setting, labeled)
    rows["fine-tuned + oracle gamma"] = score(outputs, setting, oracle(outputs, setting))
    weight = weight_aligning(module.head.weight, setting.seen).double()
    aligned = F.linear(outputs.features, weight, module.head.bias.detach().double())
    return {**rows, "fine-tuned, weight aligning": score(replace(outputs, test=aligned), setting)}


def label(model: str, estimator: str) -> str:
    return f"{model} + {'ALG' if estimator == 'alg' else estimator}"


def cross_validated(setting: Setting) -> dict[str, tuple[float, float]]:
    """Gamma and cost of pseudo cross-validation over S and over Y, which share their trainings.

    Gamma is 0 where no split has one.
    """
    trained: list[tuple[Classifier, int]] = []

    def train(module: Classifier, subset: Subset) -> Classifier:
        trained.append(
            (fit(module, subset, setting.epochs, setting.seed, accelerator=setting.accelerator), len(subset))
        )
        return trained[-1][0]

    def gamma(candidates: str, fit_fn: Callable[[Classifier, Subset], Classifier]) -> float:
        options: dict[str, Any] = {"candidates": candidates, "seed": setting.seed, "progress": False}
        try:
            module, data = start(setting), setting.seen_data
            return pseudo_cross_validation(module, data, fit_fn, setting.seen, **options).gamma
        except ValueError as error:
            if "no gamma in any of" not in str(error):
                raise
            return 0.0

    over_seen = gamma("seen", train)
    again = iter([*trained])
    over_all = gamma("all", lambda module, subset: next(again)[0])
    cost = 1 + sum(samples for _, samples in trained) / len(setting.seen_data)
    return {"fine-tuned + PCV over S": (over_seen, cost), "fine-tuned + PCV over Y": (over_all, cost)}


@cache
def code(sources: tuple[Path, ...]) -> str:
    """Hash the code of a benchmark, and what all of them share."""
    return hashlib.sha256(b"".join(source.read_bytes() for source in [*sources, *SHARED])).hexdigest()[:16]


def kept(folder: Path, name: str, setting: Setting, compute: Callable[[Setting], Rows], *sources: Path) -> Rows:
    """Read the rows of a setting, or compute and write them if there are none, or others than asked for.

    Args:
        folder: Where rows are kept.
        name: Of the file, with what the setting adds.
        setting: What the rows are of.
        compute: What makes the rows.
        sources: Files of code that they depend on besides those of the setting.
    """
    file = folder / f"{name}_{setting.share}_{setting.optimizer}_{setting.learning_rate:g}_{setting.seed}.json"
    versions = {package: version(package) for package in ("torch", "lightning-calibft")}
    facts = {**setting.facts(), **versions, "code": code((*setting.sources, *sources))}
    try:
        stored = json.loads(file.read_text())
        if stored["facts"] == facts:
            return stored["rows"]
    except (FileNotFoundError, ValueError):  # none, or cut off
        pass
    start = time.perf_counter()
    rows = compute(setting)
    seconds = time.perf_counter() - start
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"facts": facts, "seconds": seconds, "rows": rows}, indent=1))
    print(f"{file.name}: {seconds:.0f} s", file=sys.stderr)
    return rows


def method_tables(tables: Iterable[tuple[str, list[Rows]]], only: str | None) -> Iterator[str]:
    """Print every method: a table of all scores for each title, and the overall accuracies of all tables."""
    done = {}
    for title, runs in tables:
        done[title] = runs
        if only != "overall":
            yield from markdown(title, runs)
            yield ""
    if only != "scores":
        yield from side_by_side("Acc_Y/Y", done, "Acc_Y/Y")
        yield ""


def summary(args: argparse.Namespace) -> str:
    """Tell what the tables are of, and how long all that is kept has taken."""
    seconds = sum(json.loads(file.read_text())["seconds"] for file in args.output.glob("*.json"))
    text = f"mean ± sd of {args.seeds} seeds; %, gamma in logits; epochs of a training: {args.epochs};"
    return f"{text} all trainings together took {seconds / 60:.0f} minutes of a core"


def prepare() -> None:
    """Silence what each of the many trainings would say again, and use one thread."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.pytorch")
    warnings.filterwarnings("ignore", message="Pseudo cross-validation leaves out")
    torch.set_num_threads(1)
