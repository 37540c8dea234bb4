"""Draw the paper's pictures of one run: half of the classes seen, SGD, seed 0.

    python examples/benchmarks/pictures.py
    python examples/benchmarks/pictures.py --benchmark glyphs

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

Draw = Callable[..., Any]


def of_training(watched: Watched) -> dict[str, Draw]:
    """What the diagnostics have measured over training."""
    every = watched.diagnostics.snapshots
    steps = [each.step for each in every]
    levels = [each.levels for each in every if each.levels is not None]
    updates = [(each.step, each.updates) for each in every if each.updates is not None]
    return {
        "logits_absent": partial(analysis.plot_logit_levels, steps, [each.absent for each in levels]),
        "logits_seen": partial(analysis.plot_logit_levels, steps, [each.seen for each in levels]),
        "row_norms": partial(analysis.plot_row_norms, steps, [each.norms for each in every if each.norms]),
        "updates": partial(analysis.plot_mean_similarity, *zip(*updates, strict=True)),
    }


def of_models(setting: Setting, tuned: Any) -> dict[str, Draw]:
    """What two models make of the test images."""
    source, seen = setting.pretrained(), setting.seen
    classes, test = (DataLoader(part, 256) for part in (setting.data.target_train, setting.data.target_test))
    gain = analysis.accuracy_gain(source, tuned, classes, test, seen)
    similarity = analysis.update_similarity(source, tuned, seen)
    first, last = (analysis.collect_outputs(each, test) for each in (source, tuned))
    points = analysis.tsne_features(first.features, last.features)
    pictures: dict[str, Draw] = {
        "accuracy_gain": partial(analysis.plot_accuracy_gain, gain),
        "update_matrix": partial(analysis.plot_update_similarity, similarity),
    }
    for name, positions in zip(("tsne_before", "tsne_after"), points, strict=True):
        pictures[name] = partial(analysis.plot_embedding, positions, first.target, setting.num_classes, seen)
    return pictures


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
    return partial(analysis.plot_seen_unseen_curves, methods)


def main(arguments: Sequence[str] | None = None) -> None:
    args, rest = parser().parse_known_args(arguments)
    options = findings.parse_arguments(["--benchmark", args.benchmark, "--seeds", "1", *rest])
    prepare()
    (setting,) = next(iter(findings.settings_of(options).values()))
    with tempfile.TemporaryDirectory() as folder:
        watched = watch(setting, Path(folder, "report.html"))
    pictures = {**of_training(watched), **of_models(setting, watched.module), "curves": curves(setting, watched.module)}
    if args.benchmark == "digits":
        pictures["toy"] = partial(analysis.plot_toy_example, analysis.toy_example())
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures.items():
        figure = Figure(figsize=(6, 4), dpi=80, layout="constrained")
        draw(ax=figure.subplots())
        figure.savefig(args.folder / f"{args.benchmark}_{name}.png")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", choices=("digits", "glyphs"), default="digits")
    parser.add_argument("--folder", type=Path, default=Path(__file__).with_name("pictures"), help="to draw into")
    return parser


if __name__ == "__main__":
    main()
