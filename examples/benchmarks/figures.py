"""Draw the figures of the paper for one run: half of the classes seen, SGD, seed 0.

    python examples/benchmarks/figures.py
    python examples/benchmarks/figures.py --benchmark glyphs

What happens to logits and rows over training is measured by ``CalibrationDiagnostics``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import findings
from compare import OF_EVERY_MODEL, before, estimate, prepare
from matplotlib.figure import Figure
from methods import Setting, interpolated, linear_probing
from table import oracle, run
from torch.utils.data import DataLoader
from watched import Watched, watch

from lightning_calibft import analysis
from lightning_calibft.plotting import CURVE_COLORS

Draw = Callable[..., Any]


def of_training(watched: Watched) -> dict[str, Draw]:
    """What the diagnostics have measured over training."""
    draw = partial(partial, analysis.plot_snapshots, watched.diagnostics.snapshots)
    return {
        "logits_absent": draw("absent_logits"),
        "logits_seen": draw("seen_logits"),
        "row_norms": draw("row_norms"),
        "updates": draw("updates"),
    }


def of_models(setting: Setting, tuned: Any) -> dict[str, Draw]:
    """What two models make of the test images."""
    source, seen = setting.pretrained(), setting.seen
    classes, test = (DataLoader(part, 256) for part in (setting.data.target_train, setting.data.target_test))
    outputs = (analysis.collect_outputs(each, test) for each in (source, tuned))
    first, last = analysis.tsne_features(*outputs, seen)
    return {
        "accuracy_gain": analysis.accuracy_gain(source, tuned, classes, test, seen).plot,
        "update_matrix": analysis.update_similarity(source, tuned, seen).plot,
        "tsne_before": first.plot,
        "tsne_after": last.plot,
    }


def curves(setting: Setting, tuned: Any) -> Draw:
    """Seen-unseen curves of several methods, with the gammas of some."""
    outputs = {
        "pre-trained": before(setting),
        "fine-tuned": run(tuned, setting),
        "linear probing": run(linear_probing(setting), setting),
        "WiSE-FT": run(interpolated(setting, 0.75), setting),
    }
    of_tuned = {"as it is": 0.0, "best": oracle(outputs["fine-tuned"], setting)}
    for name in OF_EVERY_MODEL:
        of_tuned[name] = estimate(name, outputs["fine-tuned"], before(setting), setting)
    logits = {name: each.test for name, each in outputs.items()}
    target = setting.data.target_test.tensors[1]
    gammas = {name: of_tuned if name == "fine-tuned" else {} for name in logits}
    methods = analysis.compare_curves(logits, target, setting.seen, gammas=gammas)

    def draw(ax: Any) -> None:
        ax.set_prop_cycle(color=CURVE_COLORS)
        for method in methods.values():
            method.plot(ax)

    return draw


def main(arguments: Sequence[str] | None = None) -> None:
    args, rest = parser().parse_known_args(arguments)
    options = findings.parse_arguments(["--benchmark", args.benchmark, "--seeds", "1", *rest])
    prepare()
    (setting,) = next(iter(findings.settings_of(options).values()))
    with tempfile.TemporaryDirectory() as folder:
        watched = watch(setting, Path(folder, "report.html"))
    figures = {**of_training(watched), **of_models(setting, watched.module), "curves": curves(setting, watched.module)}
    if args.benchmark == "digits":
        figures["toy"] = analysis.toy_example().plot
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, draw in figures.items():
        figure = Figure(figsize=(6, 5), dpi=100, layout="constrained")
        draw(ax=figure.subplots())
        figure.savefig(args.folder / f"{args.benchmark}_{name}.png")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", choices=("digits", "glyphs"), default="digits")
    parser.add_argument("--folder", type=Path, default=Path(__file__).with_name("figures"), help="to draw into")
    return parser


if __name__ == "__main__":
    main()
