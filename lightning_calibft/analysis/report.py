"""A one-page report about a fit, as Markdown or HTML, with its pictures embedded."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

from torch import Tensor

from lightning_calibft._arguments import check_choice, check_items, check_type
from lightning_calibft.analysis.history import Snapshot
from lightning_calibft.analysis.snapshot_plots import Quantity, measured_steps, plot_snapshots
from lightning_calibft.analysis.verdict import verdict
from lightning_calibft.analysis.weights import update_similarity
from lightning_calibft.split import ClassSplit

Format = Literal["markdown", "html"]

# The largest number of classes of each group in the picture of the matrix.
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
_STYLE = (
    "body{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0 1em;line-height:1.4}"
    "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right}img{max-width:100%}"
)


@dataclass
class _Page:
    """The parts of a page."""

    format: Format
    parts: list[str] = field(default_factory=list)

    def heading(self, text: str, level: int = 2) -> None:
        self._add(f"{'#' * level} {text}", f"<h{level}>{html.escape(text)}</h{level}>")

    def paragraph(self, text: str) -> None:
        self._add(text, f"<p>{html.escape(text)}</p>")

    def items(self, texts: Sequence[str]) -> None:
        entries = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
        self._add("\n".join(f"- {text}" for text in texts), f"<ul>{entries}</ul>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        lines = [header, ["--:"] * len(header), *rows]
        cells = [(header, "th"), *((row, "td") for row in rows)]
        entries = "".join(
            "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>" for row, tag in cells
        )
        self._add("\n".join(f"| {' | '.join(line)} |" for line in lines), f"<table>{entries}</table>")

    def picture(self, title: str, text: str, draw: Callable[..., object]) -> None:
        """Add a picture with a heading and an explanation."""
        self.heading(title)
        self.paragraph(text)
        uri = f"data:image/png;base64,{base64.b64encode(_png(draw)).decode()}"
        self._add(f"![{title}]({uri})", f'<img alt="{html.escape(title)}" src="{uri}">')

    def text(self) -> str:
        """Return the whole page."""
        if self.format == "markdown":
            return "\n\n".join(self.parts) + "\n"
        body = "\n".join(self.parts)
        head = f'<meta charset="utf-8"><title>Calibration report</title><style>{_STYLE}</style>'
        return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'

    def _add(self, markdown: str, markup: str) -> None:
        self.parts.append(markdown if self.format == "markdown" else markup)


def _png(draw: Callable[..., object]) -> bytes:
    # Not pyplot, whose figures and backend are the user's.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=90, layout="constrained")
    draw(ax=figure.subplots())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def calibration_report(
    snapshots: Sequence[Snapshot],
    split: ClassSplit,
    weights: tuple[Tensor, Tensor] | None = None,
    *,
    format: Format = "markdown",
) -> str:
    """Return a one-page report about a fit: what the measurements mean, a table, and pictures.

    Args:
        snapshots: The snapshots of a fit in order, at least one.
        split: The seen and the absent classes.
        weights: Weight of the head, of shape ``(C, D)``, before and after fine-tuning.
        format: ``"markdown"`` or ``"html"``.

    Returns:
        The text of the page. Pictures are embedded as data URIs, so the page needs no other file.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.

    Example:
        >>> from lightning_calibft import ClassSplit
        >>> from lightning_calibft.analysis import Snapshot, calibration_report
        >>> print(calibration_report([Snapshot(epoch=0, step=0)], ClassSplit(3, [0, 1])))
        # Calibration report
        <BLANKLINE>
        2 seen and 1 absent of 3 classes...
    """
    check_items("snapshots", snapshots, Snapshot)
    check_type("split", split, ClassSplit)
    check_choice("format", format, get_args(Format))
    if weights is not None:
        check_items("weights", weights, Tensor)
    page = _Page(format)
    page.heading("Calibration report", 1)
    seen, absent = len(split.seen_classes), len(split.absent_classes)
    page.paragraph(
        f"{seen} seen and {absent} absent of {split.num_classes} classes; epoch {snapshots[-1].epoch}, step"
        f" {snapshots[-1].step}. Seen classes are those in the fine-tuning data. All numbers are for logits without"
        " gamma."
    )
    page.heading("What it means")
    page.items(verdict(snapshots))
    _add_validations(page, snapshots)
    for quantity, title, text in _PICTURES:
        if measured_steps(snapshots, quantity):
            page.picture(title, text, partial(plot_snapshots, snapshots, quantity))
    if weights is not None:
        _add_similarity(page, split, *weights)
    return page.text()


def _add_validations(page: _Page, snapshots: Sequence[Snapshot]) -> None:
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
    if rows:
        page.heading("Validations")
        page.paragraph(
            "Acc_A/B is the accuracy on samples of A among the classes of B (S: seen, U: absent, Y: all). The last"
            " three columns are with the best gamma of each validation. AUSUC is the area under the curve of Acc_S/Y"
            " and Acc_U/Y over all gammas."
        )
        page.table(header, rows)


def _add_similarity(page: _Page, split: ClassSplit, before: Tensor, after: Tensor) -> None:
    seen, absent = (_evenly_spaced(classes) for classes in (split.seen_classes, split.absent_classes))
    rows = [*seen, *absent]
    page.picture(
        "Similarity of the updates, class by class",
        f"Between the first and the last weights, for {len(seen)} seen and {len(absent)} absent classes.",
        update_similarity(before[rows], after[rows], range(len(seen))).plot,
    )


def _evenly_spaced(classes: tuple[int, ...]) -> list[int]:
    """Return at most as many classes as a picture can show."""
    return list(classes[:: -(-len(classes) // _MAX_ROWS)])
