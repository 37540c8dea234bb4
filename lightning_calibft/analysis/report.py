"""A one-page report about a fit, as Markdown or HTML, with its pictures embedded."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

from jinja2 import Environment, PackageLoader
from torch import Tensor

from lightning_calibft._arguments import check_choice, check_items, check_type
from lightning_calibft._format import expectations
from lightning_calibft.analysis.curves import CurvePoint, MethodCurve
from lightning_calibft.analysis.history import Snapshot
from lightning_calibft.analysis.snapshot_plots import Quantity, measured_steps, plot_snapshots
from lightning_calibft.analysis.verdict import verdict
from lightning_calibft.analysis.weights import update_similarity
from lightning_calibft.calibration.result import CalibrationResult
from lightning_calibft.checkpoint.state import versions
from lightning_calibft.functional.seen_unseen_curve import point_at
from lightning_calibft.split import ClassSplit

Format = Literal["markdown", "html"]

# The largest number of classes of each group in the picture of the matrix, and in the list of names.
_MAX_ROWS = 200
_PICTURES: tuple[tuple[Quantity, str, str], ...] = (
    (
        "accuracies",
        "Accuracies over training",
        "Gamma can close the gap between the solid and the dashed gray line. It can raise Acc_U/Y to Acc_U/U at most."
        " Where Acc_U/U or AUSUC falls, the features of absent classes get worse, and calibration cannot help.",
    ),
    (
        "absent_logits",
        "Logits of absent samples",
        "Gamma has to make up for the distance of the true class (solid) below the largest seen class (blue). Its"
        " distance above the largest other absent class (orange, dashed) is what the features are worth.",
    ),
    ("seen_logits", "Logits of seen samples", "The same for samples of seen classes, which the model was trained on."),
    (
        "row_norms",
        "Norms of the head's rows",
        "Mean and one standard deviation over classes. If the two groups stay together, the bias towards seen classes"
        " does not come from the norms.",
    ),
    (
        "updates",
        "Similarity of the updates of the head's rows",
        "Mean cosines between the changes of the rows since the start of training. If that of absent classes is near 1,"
        " all of them were pushed in the same direction: their order is preserved, and a single number can undo it.",
    ),
)


@dataclass
class _Section:
    """A part of the page. What is empty is left out."""

    title: str
    text: str = ""
    items: Sequence[str] = ()
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    picture: str = ""  # SVG
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def calibration_report(
    snapshots: Sequence[Snapshot],
    split: ClassSplit,
    weights: tuple[Tensor, Tensor] | None = None,
    *,
    curves: Sequence[MethodCurve] | None = None,
    result: CalibrationResult | None = None,
    class_names: Mapping[int, str] | None = None,
    model: str = "",
    format: Format = "markdown",
) -> str:
    """Return a one-page report about a fit: gamma, what the measurements mean, tables, and pictures.

    Args:
        snapshots: The snapshots of a fit in order, at least one.
        split: The seen and the absent classes.
        weights: Weight of the head, of shape ``(C, D)``, before and after fine-tuning.
        curves: Seen-unseen curves, as from :func:`compare_curves`, that of the final weights first.
        result: The calibration of the model. Its gamma is marked on the first curve.
        class_names: Names of the head's rows, as far as they are known.
        model: Name of the model.
        format: ``"markdown"`` or ``"html"``.

    Returns:
        The text of the page. Pictures are embedded as SVG, so the page needs no other file and no network. Names are
        escaped. The HTML page follows the color scheme of the reader, light or dark.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        TypeError: If an argument is of the wrong type.
        ValueError: If ``format`` is unknown.

    Example:
        >>> from lightning_calibft import ClassSplit
        >>> from lightning_calibft.analysis import Snapshot, calibration_report
        >>> print(calibration_report([Snapshot(epoch=0, step=0)], ClassSplit(3, [0, 1]), model="ResNet"))
        # Calibration report
        <BLANKLINE>
        2 seen and 1 absent of 3 classes...
        <BLANKLINE>
        - Model: ResNet
        ...
    """
    check_items("snapshots", snapshots, Snapshot)
    check_type("split", split, ClassSplit)
    check_choice("format", format, get_args(Format))
    if weights is not None:
        check_items("weights", weights, Tensor)
    if curves is not None:
        check_items("curves", curves, MethodCurve)
    if result is not None:
        check_type("result", result, CalibrationResult)
    if class_names is not None:
        check_type("class_names", class_names, Mapping, " Pass a dict with the names of the head's rows.")
    check_type("model", model, str)
    sections = [_Section("What it means", items=[*verdict(snapshots), *_expected(result)])]
    sections += [_curve_section(curves, result)] if curves else []
    sections += _validations(snapshots)
    for quantity, title, text in _PICTURES:
        if measured_steps(snapshots, quantity):
            sections.append(_Section(title, text, picture=_svg(partial(plot_snapshots, snapshots, quantity))))
    if weights is not None:
        sections.append(_similarity_section(split, *weights))
    if class_names:
        sections.append(_Section("Classes", classes=_named(split, class_names)))
    seen, absent = len(split.seen_classes), len(split.absent_classes)
    summary = (
        f"{seen} seen and {absent} absent of {split.num_classes} classes; epoch {snapshots[-1].epoch}, step"
        f" {snapshots[-1].step}. Seen classes are those in the fine-tuning data. All numbers are for logits without"
        " gamma, unless they say otherwise."
    )
    environment = _environment(format)
    template = environment.get_template("report.html.jinja" if format == "html" else "report.md.jinja")
    return template.render(summary=summary, facts=_facts(model, result), sections=sections)


def _environment(format: Format) -> Environment:
    """Return the environment of the templates, which escape what they are given, as their format needs it."""
    environment = Environment(
        loader=PackageLoader("lightning_calibft.analysis"),
        autoescape=format == "html",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"literal": _literal, "data_uri": _data_uri, "inline": _inline}
    return environment


def _literal(text: str) -> str:
    """Escape what Markdown and the HTML in it would not take literally."""
    escaped = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", " ".join(text.split()))
    return html.escape(escaped, quote=False)


def _data_uri(svg: str) -> str:
    """Return the address of a picture for Markdown, on white, since nobody knows the page that it will be on."""
    on_white = svg.replace("<defs>", '<rect width="100%" height="100%" fill="#ffffff"/><defs>', 1)
    return f"data:image/svg+xml;base64,{base64.b64encode(on_white.encode()).decode()}"


def _inline(svg: str, number: int) -> str:
    """Return a picture as an element of an HTML page, in the page's colors, and with ids of its own."""
    element = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    element = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>picture-{number}-", element)
    return element.replace("#000000", "currentColor").replace("#ffffff", "var(--page)")


def _svg(draw: Callable[..., object]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    # Not pyplot, whose figures and backend are the user's, and not the user's style, since the page has its own. The
    # letters become paths, since a reader may not have the font.
    style = {"svg.fonttype": "path", "svg.hashsalt": "lightning_calibft"}  # the same picture gives the same file
    with matplotlib.style.context(["default", style]):
        figure = Figure(figsize=(4.4, 4.6), layout="constrained")  # as wide as a phone
        draw(ax=figure.subplots())
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return buffer.getvalue()


def _facts(model: str, result: CalibrationResult | None) -> list[tuple[str, str]]:
    facts = [("Model", model)] if model else []
    if result is not None:
        share = "" if result.absent_share is None else f", for a share of {result.absent_share:.1%} of absent samples"
        found = f"{result.gamma:.3f} ± {result.standard_error:.3f} ({result.estimator}, {result.num_samples:,} samples"
        facts.append(("Gamma of the model", f"{found}{share})"))
    known = versions()
    return [*facts, ("Written by", f"lightning-calibft {known['version']}, torch {known['torch_version']}")]


def _expected(result: CalibrationResult | None) -> list[str]:
    return [] if result is None else [f"{text[0].upper()}{text[1:]}." for text in expectations(result.as_dict())]


def _curve_section(curves: Sequence[MethodCurve], result: CalibrationResult | None) -> _Section:
    first = curves[0]
    if result is not None:
        seen, absent = (value.item() for value in point_at(*first.curve, result.gamma))
        first = replace(first, points={**first.points, "calibrated": CurvePoint(result.gamma, seen, absent)})

    def draw(ax: Any) -> None:
        for curve in (first, *curves[1:]):
            curve.plot(ax)

    return _Section(
        "Seen-unseen curve",
        "Each gamma gives one point: more accuracy on absent classes for less on seen ones. The area under the curve is"
        " AUSUC, which does not depend on gamma.",
        picture=_svg(draw),
        header=["", "gamma", "Acc_S/Y", "Acc_U/Y"],
        rows=[
            [name, *(f"{value:.3f}" for value in (point.gamma, point.seen_accuracy, point.absent_accuracy))]
            for name, point in first.points.items()
        ],
    )


def _validations(snapshots: Sequence[Snapshot]) -> list[_Section]:
    header = ["epoch", "step", "Acc_Y/Y", "Acc_S/Y", "Acc_U/Y", "Acc_S/S", "Acc_U/U", "AUSUC"]
    header += ["best gamma", "Acc_Y/Y", "Acc_S/Y", "Acc_U/Y"]
    rows = []
    for snapshot in snapshots:
        if (now := snapshot.evaluation) is None:
            continue
        of = now.groups
        values = [now.overall, of.seen_among_all, of.absent_among_all, of.seen_among_seen, of.absent_among_absent]
        values += [now.ausuc, now.best_gamma, now.best_overall, now.best_seen, now.best_absent]
        rows.append([str(snapshot.epoch), str(snapshot.step), *(f"{value:.3f}" for value in values)])
    text = (
        "Acc_A/B is the accuracy on samples of A among the classes of B (S: seen, U: absent, Y: all). The last three"
        " columns are with the best gamma of each validation. AUSUC is the area under the curve of Acc_S/Y and Acc_U/Y"
        " over all gammas."
    )
    return [_Section("Validations", text, header=header, rows=rows)] if rows else []


def _similarity_section(split: ClassSplit, before: Tensor, after: Tensor) -> _Section:
    seen, absent = (_evenly_spaced(classes) for classes in (split.seen_classes, split.absent_classes))
    rows = [*seen, *absent]
    return _Section(
        "Similarity of the updates, class by class",
        f"Between the first and the last weights, for {len(seen)} seen and {len(absent)} absent classes.",
        picture=_svg(update_similarity(before[rows], after[rows], range(len(seen))).plot),
    )


def _evenly_spaced(classes: tuple[int, ...]) -> list[int]:
    """Return at most as many classes as a picture can show."""
    return list(classes[:: -(-len(classes) // _MAX_ROWS)])


def _named(split: ClassSplit, names: Mapping[int, str]) -> dict[str, list[str]]:
    """Return the rows and names of the classes of each group, as many as a page can hold."""
    named = {}
    for group, classes in (("Seen", split.seen_classes), ("Absent", split.absent_classes)):
        shown = [f"{row} {names.get(row, '')}".strip() for row in classes[:_MAX_ROWS]]
        more = [f"and {len(classes) - _MAX_ROWS} more"] if len(classes) > _MAX_ROWS else []
        named[f"{group} classes ({len(classes)})"] = shown + more
    return named
