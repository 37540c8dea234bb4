"""A one-page report about a fit, as Markdown or HTML, with its figures embedded."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, get_args

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

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Format = Literal["markdown", "html"]

# The largest number of classes of each group in the figure of the matrix, and in the list of names.
_MAX_ROWS = 200
# The letters of an SVG become paths, since a reader may not have the font. The same figure gives the same file.
_STYLE = {"svg.fonttype": "path", "svg.hashsalt": "lightning_calibft"}
_OVER_TRAINING: tuple[tuple[Quantity, str, str], ...] = (
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
    figure: str = ""  # its name
    draw: Callable[..., object] | None = None  # on the axis `ax`
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
    return Report(snapshots, split, weights, curves or (), result, class_names or {}, model).text(format)


@dataclass(frozen=True)
class Report:
    """What a report is made of; see :func:`calibration_report`."""

    snapshots: Sequence[Snapshot]
    split: ClassSplit
    weights: tuple[Tensor, Tensor] | None
    curves: Sequence[MethodCurve]
    result: CalibrationResult | None
    class_names: Mapping[int, str]
    model: str

    def text(self, format: Format, figures: bool = True) -> str:
        """Return the text of the page, with or without its figures."""
        split, last = self.split, self.snapshots[-1]
        seen, absent = len(split.seen_classes), len(split.absent_classes)
        summary = (
            f"{seen} seen and {absent} absent of {split.num_classes} classes; epoch {last.epoch}, step {last.step}."
            " Seen classes are those in the fine-tuning data. All numbers are for logits without gamma, unless they say"
            " otherwise."
        )
        template = _environment(format).get_template(f"report.{'html' if format == 'html' else 'md'}.jinja")
        facts = _facts(self.model, self.result)
        return template.render(summary=summary, facts=facts, sections=self._sections, figures=figures)

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Yield the name of each figure, and the figure, of as many pixels as a screen shows well."""
        for section in self._sections:
            if section.draw is not None:
                yield section.figure, _drawn(section.draw, dpi=200)

    @cached_property
    def _sections(self) -> list[_Section]:
        snapshots, result = self.snapshots, self.result
        sections = [_Section("What it means", items=[*verdict(snapshots), *_expected(result)])]
        sections += [_curve_section(self.curves, result)] if self.curves else []
        sections += [_share_section(result)] if result is not None and result.share_table is not None else []
        sections += _validations(snapshots)
        for quantity, title, text in _OVER_TRAINING:
            if measured_steps(snapshots, quantity):
                draw = partial(plot_snapshots, snapshots, quantity)
                sections.append(_Section(title, text, figure=quantity, draw=draw))
        if self.weights is not None:
            sections.append(_similarity_section(self.split, *self.weights))
        if self.class_names:
            sections.append(_Section("Classes", classes=_named(self.split, self.class_names)))
        return sections


def _environment(format: Format) -> Environment:
    """Return the environment of the templates, which escape what they are given, as their format needs it."""
    environment = Environment(
        loader=PackageLoader("lightning_calibft.analysis"),
        autoescape=format == "html",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"literal": _literal, "svg": _svg, "data_uri": _data_uri, "inline": _inline}
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

    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.style.context(["default", _STYLE]):
        _drawn(draw).savefig(buffer := io.StringIO(), format="svg", transparent=True, metadata=metadata)
    return buffer.getvalue()


def _drawn(draw: Callable[..., object], dpi: int | None = None) -> Figure:
    import matplotlib
    from matplotlib.figure import Figure

    # Not pyplot, whose figures and backend are the user's, and not the user's style, since the page has its own.
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(4.4, 4.6), dpi=dpi, layout="constrained")  # as wide as a phone
        draw(ax=figure.subplots())
    return figure


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
        figure="seen_unseen_curve",
        draw=draw,
        header=["", "gamma", "Acc_S/Y", "Acc_U/Y"],
        rows=[
            [name, *(f"{value:.3f}" for value in (point.gamma, point.seen_accuracy, point.absent_accuracy))]
            for name, point in first.points.items()
        ],
    )


def _share_section(result: CalibrationResult) -> _Section:
    return _Section(
        "Gamma for other shares",
        "Gamma for each share of samples of absent classes, and the accuracies expected with it as far as the estimator"
        " knows them. `set_absent_share` puts another gamma into the model, without data.",
        figure="accuracies_over_share",
        draw=result.plot,
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
        figure="update_similarity",
        draw=update_similarity(before[rows], after[rows], range(len(seen))).plot,
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
