"""Write the page of costs from the JSON of `make bench`, on standard output.

python tests/benchmarks/page.py outputs/benchmarks.json [--before earlier.json]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

INTRODUCTION = """\
# What it costs

This page says what the metrics, the callback and the pass cost, and what is over its budget. `make costs` measures it
and writes this page. A value without a unit is a ratio of two times, both measured in turns in one run on one thread:
the median of several rounds, with their quartiles. The floor for a metric is one plain maximum over the logits of each
group, as if the columns of a group were already next to each other. Just reading the logits costs about as much. Here,
every other class is seen.{before}

How to read it:

- A batch of 256 x 10 logits is so small that its ratio shows the fixed cost of calling a metric, about 0.1 ms, and not
  its arithmetic. In the same way, the time of AUSUC for many samples of 10 classes is in large part the sort, which the
  floor does not have.
- The steps of small networks are so short that microseconds show, and Lightning alone takes more than one percent of a
  step to call a callback that does nothing. So our own share is measured there: the microseconds beyond such a
  callback, between the fastest rounds of both. Their quartiles are those of all rounds. Where the classes are not
  given, counting the labels of each step takes most of it: pass `seen_classes` if your steps take less than a
  millisecond.
- The pass begins with two forwards of four samples, which probe the head. They are about 3 % of 20 batches as small as
  here, and close to nothing of a thousand.
- Wide quartiles mean that other work shared the processor's caches. A difference within them means nothing.
- A loop over thresholds that would take hours is extrapolated from a few of them, and marked as such.

What limits an update:

- With up to 32 classes, it is the number of operations. AUSUC takes 17, at one to five microseconds each.
  absent_class_metrics takes seven more, to count right samples, which is a third to a half of AUSUC.
- With more classes, AUSUC takes 47 operations if each group is a range of columns, of which two read most logits.
  Otherwise it writes a copy for each group and reads it, which alone takes as long as five to six times `amax`.
- The average logit gap is summed in float64. To convert the logits and to sum them takes as long as three to four times
  `amax`.
- Metrics that are updated separately reduce the batch separately. A cache that they share would have to know whether
  somebody has changed the logits in place, which tensors made in inference mode do not tell. absent_class_metrics and
  the callback reduce a batch once for all their values.
"""
BEFORE = """
*Before* is the same measurement of an earlier version of the package."""


def rows_of(benchmarks: dict[str, Any]) -> dict[tuple[str, str], dict[str, str]]:
    """Rows by section and by what was measured, in order."""
    rows = [row for entry in benchmarks["benchmarks"] for row in entry["extra_info"].get("rows", [])]
    return {(row["section"], row["what"].removesuffix("cpu").rstrip(", ")): row for row in rows}


def is_over(row: dict[str, str]) -> bool:
    """Return whether a row misses its budget: a number, ``below`` one, or the end of a range."""
    words = row["budget"].replace("below", "").replace(" to ", " ").split()
    return words != ["none"] and round(float(row["value"].split()[0]), 2) > float(words[-1])


# Of each batch, in the order of the columns below: microseconds of version 0.1.0 and of what it was compared with.
UPDATES = "Update with default arguments, in microseconds"
COLUMNS = ("`amax`", "`max`", "MulticlassAccuracy", "alg", "AUSUC", "absent_class_metrics")
FIRST_VERSION = {
    "64 x 10": ("10", "15", "149", "475", "549", "1,170"),
    "64 x 1,000": ("17", "187", "281", "660", "975", "1,759"),
    "512 x 1,000": ("91", "1,214", "1,141", "2,110", "3,232", "5,647"),
    "64 x 21,841": ("219", "3,207", "2,850", "7,499", "7,790", "12,334"),
}
ABOUT_UPDATES = """
The median of 15 rounds, with quartiles. The seen classes are a block of columns, or every other one. Version 0.1.0 was
measured on another, quiet machine, with one thread. `max` also gives the index. MulticlassAccuracy is the faster one,
`average="micro"`.
"""


def table_of_updates(rows: dict[str, dict[str, str]]) -> str:
    """Return a table with a line for each batch, number of threads and form of the groups."""
    text = f"{ABOUT_UPDATES}\n| Batch | Seen | {' | '.join(COLUMNS)} |\n| ---- | ---- |{' ----: |' * len(COLUMNS)}\n"
    for batch, first in FIRST_VERSION.items():
        text += "| " + " | ".join([batch, "0.1.0, 1 thread", *first]) + " |\n"
        for threads in ("1 thread", "2 threads"):
            for classes in ("block", "every other"):
                each = [rows.get(f"{batch}, {threads}, {name}") for name in COLUMNS[:3]]
                each += [rows.get(f"{batch}, {threads}, {name}, {classes}") for name in COLUMNS[3:]]
                cells = [f"{int(row['value']):,} ({row['quartiles']})" if row else "" for row in each]
                if any(cells):
                    text += "| " + " | ".join([batch, f"{classes}, {threads}", *cells]) + " |\n"
    return text


def page(now: dict[str, Any], before: dict[str, Any] | None) -> str:
    """Return the page as Markdown."""
    rows, earlier = rows_of(now), {} if before is None else rows_of(before)
    text = INTRODUCTION.format(before=BEFORE if earlier else "")
    over = [
        f"- {section} {what}: {row['value']} ({row['budget']})" for (section, what), row in rows.items() if is_over(row)
    ]
    text += "\n" + ("Over the budget:\n\n" + "\n".join(over) if over else "Nothing is over its budget.") + "\n"
    for section in dict.fromkeys(section for section, _ in rows):
        if section.startswith(UPDATES):
            found = {what: row for (each, what), row in rows.items() if each == section}
            text += f"\n## {UPDATES}\n{table_of_updates(found)}"
            continue
        text += f"\n## {section.rstrip('.')}\n\n| What |{' Before |' * bool(earlier)} Measured | Quartiles | Budget |\n"
        text += f"| ---- |{' -----: |' * bool(earlier)} -------: | :-------: | :----: |\n"
        for key, row in rows.items():
            if key[0] == section:
                cells = [key[1], *([earlier.get(key, {}).get("value", "")] if earlier else [])]
                text += "| " + " | ".join([*cells, row["value"], row["quartiles"], row["budget"]]) + " |\n"
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("now", type=Path)
    parser.add_argument("--before", type=Path)
    arguments = parser.parse_args()
    before = arguments.before and json.loads(arguments.before.read_text())
    sys.stdout.write(page(json.loads(arguments.now.read_text()), before))
