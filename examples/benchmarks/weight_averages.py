"""Average weights, and calibrate what comes out: WiSE-FT with alpha and gamma together, soups, LP-FT, local SGD.

    python examples/benchmarks/weight_averages.py
    python examples/benchmarks/weight_averages.py --benchmark glyphs --only averages
    python examples/benchmarks/weight_averages.py --only local

*WiSE-FT* goes ``alpha`` of the way from the pre-trained to the fine-tuned weights. Alpha is chosen here in steps of
0.1, each with its own gamma: by the labeled held-out samples; without any label of an absent class, by what
``pseudo_absent`` expects of its own gamma; or by the test samples (*oracle*). A *soup* is the mean of four fine-tunings
with two orders of the samples and two learning rates (Wortsman et al., ICML 2022); a *greedy* one takes only those
that help on the labeled samples. *LP-FT* is a linear probe, then ordinary fine-tuning from there
(Kumar et al., ICLR 2022). *LOLSGD* is leave-out local SGD, with each of its settings changed in turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from compare import before, gamma_rows, kept, prepare, summary
from digits import FINE_TUNING, DigitSetting, in_one_line
from findings import parse_benchmark, settings_of
from methods import (
    Classifier,
    Setting,
    fit,
    interpolated,
    leave_out_local_sgd,
    linear_probing,
    start,
    tune,
)
from protocol import average
from table import Outputs, Rows, Scores, estimate, markdown, oracle, run, score, side_by_side

from lightning_calibft import ClassSplit
from lightning_calibft.functional import best_gamma, calibrate_logits, split_accuracy
from lightning_calibft.functional._inputs import Groups
from lightning_calibft.functional.pseudo_absent_gamma import pseudo_absent_update, weigh

ALPHAS = [step / 10 for step in range(11)]
ON_THE_WAY = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Those that are printed."""
INGREDIENTS = ((0, 1.0), (1, 1.0), (0, 0.5), (1, 0.5))
"""Of a soup: what is added to the seed of the training, and what the learning rate is multiplied with."""
LOCAL_SGD: dict[str, dict[str, Any]] = {
    "4 models, half of the classes, 1 epoch a round": {},
    "three quarters of the classes": {"class_share": 0.75},
    "5 epochs a round": {"local_epochs": 5},
    "frozen classifier": {"frozen_classifier": True},
}
RATES = (0.5, 2.0)
"""What the learning rate of local SGD is multiplied with."""


def expected_accuracy(outputs: Outputs, setting: Setting, gamma: float) -> float:
    """What ``pseudo_absent`` expects of a gamma, from samples of seen classes, where half of the samples are absent."""
    groups = Groups.from_split(ClassSplit(setting.num_classes, setting.seen), outputs.train.device)
    leads, terms = pseudo_absent_update(outputs.train, setting.seen_data.tensors[1], before(setting).train, groups)
    margin, right, copy_margin, copy_right, _ = weigh(leads, terms.sum(0), setting.num_classes - len(setting.seen))
    kept_right, found = right * (margin > gamma), copy_right * (copy_margin < gamma)
    return (kept_right.mean() + found.mean()).item() / 2


def labeled_accuracy(outputs: Outputs, setting: Setting) -> float:
    """Accuracy of the labeled held-out samples with their own best gamma."""
    target = setting.data.held_out.tensors[1]
    gamma = best_gamma(outputs.held_out, target, setting.seen).item()
    return split_accuracy(calibrate_logits(outputs.held_out, gamma, setting.seen), target, setting.seen).item()


def average_rows(setting: Setting) -> Rows:
    """Score all averages but local SGD."""
    way = {alpha: run(interpolated(setting, alpha), setting) for alpha in ALPHAS}
    soups = {name: run(module, setting) for name, module in soups_of(setting).items()}
    rows = {}
    for name, outputs, cost in (
        ("fine-tuned", way[1.0], 1.0),
        ("LP-FT", run(probed_first(setting), setting), 2.0),
        *((name, outputs, float(len(INGREDIENTS))) for name, outputs in soups.items()),
        *((f"alpha {alpha}", way[alpha], 1.0) for alpha in ON_THE_WAY),
    ):
        pseudo = estimate("pseudo_absent", outputs, before(setting), setting)
        rows[f"{name} + pseudo_absent"] = score(outputs, setting, pseudo, cost)
        labeled = estimate("operating_point", outputs, before(setting), setting)
        rows[f"{name} + labeled gamma"] = score(outputs, setting, labeled, cost)
        rows[f"{name} + oracle gamma"] = score(outputs, setting, oracle(outputs, setting), cost)
    return rows | chosen_rows(way, setting)


def chosen_rows(way: dict[float, Outputs], setting: Setting) -> Rows:
    """Score the alphas that are chosen together with gamma."""
    pseudo = {alpha: estimate("pseudo_absent", each, before(setting), setting) for alpha, each in way.items()}
    expected = max(ALPHAS, key=lambda alpha: expected_accuracy(way[alpha], setting, pseudo[alpha]))
    labeled = max(ALPHAS, key=lambda alpha: labeled_accuracy(way[alpha], setting))
    best = {alpha: score(each, setting, oracle(each, setting)) for alpha, each in way.items()}
    highest = max(ALPHAS, key=lambda alpha: best[alpha]["Acc_Y/Y"])
    of_labels = estimate("operating_point", way[labeled], before(setting), setting)
    chosen = {
        "WiSE-FT, alpha as expected + pseudo_absent": (expected, score(way[expected], setting, pseudo[expected])),
        "WiSE-FT, labeled alpha and gamma": (labeled, score(way[labeled], setting, of_labels)),
        "WiSE-FT, labeled alpha + pseudo_absent": (labeled, score(way[labeled], setting, pseudo[labeled])),
        "WiSE-FT, oracle alpha and gamma": (highest, best[highest]),
    }
    return {name: {**scores, "alpha": alpha} for name, (alpha, scores) in chosen.items()}


def soups_of(setting: Setting) -> dict[str, Classifier]:
    """Average fine-tunings: all of them, and greedily those that help on the labeled samples."""
    modules = []
    for more, factor in INGREDIENTS:
        module = start(replace(setting, learning_rate=factor * setting.learning_rate))
        seed = setting.seed + 1000 * more
        modules.append(fit(module, setting.seen_data, setting.epochs, seed, accelerator=setting.accelerator))
    ranked = sorted(modules, key=lambda module: -labeled_accuracy(run(module, setting), setting))
    chosen, best = ranked[:1], labeled_accuracy(run(ranked[0], setting), setting)
    for module in ranked[1:]:
        more_of_it = labeled_accuracy(run(soup([*chosen, module], setting), setting), setting)
        if more_of_it >= best:
            chosen, best = [*chosen, module], more_of_it
    return {"soup of 4": soup(modules, setting), "greedy soup": soup(chosen, setting)}


def soup(modules: Sequence[Classifier], setting: Setting) -> Classifier:
    """Return a module with the mean of the weights."""
    module = start(setting)
    module.load_state_dict(average([each.state_dict() for each in modules], [1 / len(modules)] * len(modules)))
    return module.eval()


def probed_first(setting: Setting) -> Classifier:
    """Fine-tune all parameters from a linear probe."""
    return tune(setting, linear_probing(setting).requires_grad_(True).train())


def local_rows(options: dict[str, Any], setting: Setting) -> Rows:
    """Score leave-out local SGD."""
    module, cost = leave_out_local_sgd(setting, **{"local_models": 4, **options})
    outputs = run(module, setting)
    rows = gamma_rows("fine-tuned", outputs, setting, cost)
    return {**rows, "fine-tuned + oracle": score(outputs, setting, oracle(outputs, setting), cost)}


def averages(args: argparse.Namespace) -> Iterator[str]:
    """Print the overall accuracies, the chosen alphas, and what happens on the way to the fine-tuned weights."""
    tables = {
        title: [
            kept(args.output, f"averages_{getattr(each, 'network', 'digits')}", each, average_rows, Path(__file__))
            for each in settings
        ]
        for title, settings in settings_of(args, args.shares).items()
    }
    names = [name for name in next(iter(tables.values()))[0] if not name.startswith("alpha ")]
    yield from side_by_side("Acc_Y/Y", only(tables, names), "Acc_Y/Y")
    yield ""
    yield from side_by_side("alpha", only(tables, [name for name in names if name.startswith("WiSE")]), "alpha")
    yield ""
    for title, runs in tables.items():
        yield from markdown(f"{title}: alpha", [on_the_way(rows) for rows in runs])
        yield ""


def only(tables: dict[str, list[Rows]], names: Sequence[str]) -> dict[str, list[Rows]]:
    return {title: [{name: rows[name] for name in names} for rows in runs] for title, runs in tables.items()}


def on_the_way(rows: Rows) -> Rows:
    """Return, for some alphas, what no gamma changes and what each gamma gives."""
    return {
        str(alpha): in_one_line_of(rows, f"alpha {alpha}", ("pseudo_absent", "oracle gamma")) for alpha in ON_THE_WAY
    }


def in_one_line_of(rows: Rows, name: str, gammas: Sequence[str]) -> Scores:
    first = rows[f"{name} + {gammas[0]}"]
    fixed = {column: first[column] for column in ("Acc_S/S", "Acc_U/U", "AUSUC", "NCM_U/Y")}
    return fixed | {f"+ {gamma}": rows[f"{name} + {gamma}"]["Acc_Y/Y"] for gamma in gammas}


def local_sgd(args: argparse.Namespace) -> Iterator[str]:
    """Print what the settings of local SGD change on digits with half of the classes seen."""
    name, rate = FINE_TUNING["sgd"]
    runs: list[Rows] = [{} for _ in range(args.seeds)]
    for seed, rows in enumerate(runs):
        lines = {line: (rate, options) for line, options in LOCAL_SGD.items()}
        lines |= {f"learning rate x {factor:g}": (factor * rate, {}) for factor in RATES}
        for line, (learning_rate, options) in lines.items():
            setting = DigitSetting(seed, 50, name, learning_rate, args.epochs)
            slug = "_".join(["local", *(f"{key}_{value}" for key, value in options.items())])
            found = kept(args.output, slug, setting, partial(local_rows, options), Path(__file__))
            rows[line] = {**in_one_line(found), "cost": found["fine-tuned"]["cost"]}
    yield from markdown(f"LOLSGD, {name}", runs)
    yield ""


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    prepare()
    for part, lines in (("averages", averages), ("local", local_sgd)):
        if args.only in (None, part):
            for line in lines(args):
                print(line, flush=True)
    print(summary(args))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("averages", "local"), help="some of the tables")
    parser.add_argument("--shares", type=int, nargs="+", choices=(30, 50, 70), default=(30, 50, 70), help="%% seen")
    return parse_benchmark(parser, arguments)


if __name__ == "__main__":
    main()
