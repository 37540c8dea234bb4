"""One page about a fit, as Markdown or HTML, with its pictures inside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from lightning_calibft._arguments import check_choice, check_items, check_type
from lightning_calibft.analysis._axes import COLORS, draw_lines
from lightning_calibft.analysis.history import History, Snapshot
from lightning_calibft.analysis.logits import plot_logit_levels
from lightning_calibft.analysis.verdict import verdict
from lightning_calibft.analysis.weight_pictures import plot_mean_similarity, plot_row_norms, plot_update_similarity
from lightning_calibft.analysis.weights import update_similarity
from lightning_calibft.checkpoint.files import replace_atomically
from lightning_calibft.split import ClassSplit

Format = Literal["markdown", "html"]

FORMATS: dict[str, Format] = {".md": "markdown", ".html": "html"}

# Rows of the matrix that a picture can still show, of each group.
_MAX_ROWS = 200
_STYLE = (
    "body{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0 1em;line-height:1.4}"
    "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right}img{max-width:100%}"
)


@dataclass
class _Page:
    """Collects the parts of a page."""

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
        """Add a picture with a heading and a sentence on how to read it."""
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
    # Not pyplot: its figures and backend are the user's.
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
    """Write one page about a fit that needs no other file: what the numbers mean, a table and pictures.

    Args:
        snapshots: The fit in order, at least one.
        split: The seen and the absent classes.
        weights: The weight of the head, of shape ``(C, D)``, before fine-tuning and after it.
        format: ``"markdown"`` or ``"html"``.

    Returns:
        The page; pictures are in it as data URIs.

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
        f" {snapshots[-1].step}. Seen are the classes of the fine-tuning data. Everything here is about the logits as"
        " they are without gamma."
    )
    page.heading("What it means")
    page.items(verdict(snapshots))
    _add_evaluations(page, [each for each in snapshots if each.evaluation is not None])
    _add_levels(page, [each for each in snapshots if each.levels is not None])
    _add_weights(page, snapshots, split, weights)
    return page.text()


def _add_evaluations(page: _Page, snapshots: Sequence[Snapshot]) -> None:
    evaluated = [(each, each.evaluation) for each in snapshots if each.evaluation is not None]
    if not evaluated:
        return
    page.heading("Validations")
    page.paragraph(
        "Acc_A/B is the accuracy on samples of A among the classes of B: S seen, U absent, Y all; the last three with"
        " the best gamma of each validation. AUSUC is the area under the curve of Acc_S/Y and Acc_U/Y over all gammas."
    )
    header = ["epoch", "step", "Acc_Y/Y", "Acc_S/Y", "Acc_U/Y", "Acc_S/S", "Acc_U/U", "AUSUC"]
    header += ["best gamma", "Acc_Y/Y", "Acc_S/Y", "Acc_U/Y"]
    rows = []
    for snapshot, now in evaluated:
        of = now.groups
        values = [now.overall, of.seen_among_all, of.absent_among_all, of.seen_among_seen, of.absent_among_absent]
        values += [now.ausuc, now.best_gamma, now.best_overall, now.best_seen, now.best_absent]
        rows.append([str(snapshot.epoch), str(snapshot.step), *(f"{value:.3f}" for value in values)])
    page.table(header, rows)
    lines = {
        "Acc_S/Y": ([now.groups.seen_among_all for _, now in evaluated], COLORS["seen"], "-"),
        "Acc_U/Y": ([now.groups.absent_among_all for _, now in evaluated], COLORS["absent"], "-"),
        "Acc_U/U": ([now.groups.absent_among_absent for _, now in evaluated], COLORS["absent"], "--"),
        "Acc_Y/Y": ([now.overall for _, now in evaluated], COLORS["both"], "-"),
        "Acc_Y/Y with the best gamma": ([now.best_overall for _, now in evaluated], COLORS["both"], "--"),
        "AUSUC": ([now.ausuc for _, now in evaluated], "tab:green", "-"),
    }
    page.picture(
        "Accuracies over training",
        "Gamma can close the gap between the grey lines. It can lift Acc_U/Y up to Acc_U/U at most: where Acc_U/U or"
        " AUSUC falls, the features of absent classes get worse, and calibration cannot help.",
        lambda ax: draw_lines(ax, [each.step for each, _ in evaluated], lines, "Accuracy"),
    )


def _add_levels(page: _Page, snapshots: Sequence[Snapshot]) -> None:
    for title, text, group in (
        (
            "Logits of absent samples",
            "How far the true class (black) lies below the largest seen class (blue) is what gamma has to make up for."
            " How far it lies above the largest other absent class (orange) is what the features are worth.",
            "absent",
        ),
        ("Logits of seen samples", "The same for samples of seen classes, which training has looked at.", "seen"),
    ):
        pairs = [(each.step, getattr(each.levels, group)) for each in snapshots]
        if pairs := [(step, levels) for step, levels in pairs if levels.num_samples]:
            steps, levels = zip(*pairs, strict=True)
            page.picture(title, text, partial(plot_logit_levels, steps, levels))


def _add_weights(
    page: _Page, snapshots: Sequence[Snapshot], split: ClassSplit, weights: tuple[Tensor, Tensor] | None
) -> None:
    if norms := [(each.step, each.norms) for each in snapshots if each.norms is not None]:
        page.picture(
            "Norms of the head's rows",
            "Mean and one standard deviation over classes. If the two groups stay together, the bias towards seen"
            " classes is not one of norms.",
            partial(plot_row_norms, *zip(*norms, strict=True)),
        )
    if updates := [(each.step, each.updates) for each in snapshots if each.updates is not None]:
        page.picture(
            "Similarity of the updates of the head's rows",
            "Cosines between what the rows have gained since training began. Absent classes near 1 were all pushed the"
            " same way: their order among each other is kept, and one number brings them back.",
            partial(plot_mean_similarity, *zip(*updates, strict=True)),
        )
    if weights is not None:
        seen, absent = (_some(classes) for classes in (split.seen_classes, split.absent_classes))
        rows = [*seen, *absent]
        similarity = update_similarity(weights[0][rows], weights[1][rows], range(len(seen)))
        page.picture(
            "Similarity of the updates, class by class",
            f"From the first weights to the last, of {len(seen)} seen and {len(absent)} absent classes.",
            partial(plot_update_similarity, similarity),
        )


def _some(classes: tuple[int, ...]) -> list[int]:
    """At most so many classes as a picture can show, evenly spaced."""
    return list(classes[:: -(-len(classes) // _MAX_ROWS)])


def write_report(path: Path, history: History, last: Tensor | None) -> None:
    """Write the report of a fit into a file, whole or not at all.

    Args:
        path: The file, whose suffix tells the format.
        history: The fit, with at least one snapshot.
        last: The weight of the head at its end.
    """
    assert history.split is not None
    weights = None if history.weight is None or last is None else (history.weight, last)
    text = calibration_report(history.snapshots, history.split, weights, format=FORMATS[path.suffix])
    replace_atomically(path, lambda file: file.write(text.encode()))
