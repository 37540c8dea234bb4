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

`make bench` measures these costs, and `python tests/benchmarks/page.py outputs/benchmarks.json` writes this page. A
value without a unit is a ratio of two times, both measured in turns in one run on one thread: the median of several
rounds, with their quartiles. The floor for a metric is one plain maximum over the logits of each group, as if the
columns of a group were already next to each other. Just reading the logits costs about as much. Here, every other class
is seen.{before}

How to read it:

- A batch of 256 x 10 logits is so small that its ratio shows the fixed cost of calling a metric, about 0.1 ms, and not
  its arithmetic. In the same way, the time of AUSUC for many samples of 10 classes is in large part the sort, which the
  floor does not have.
- The steps of small networks are so short that microseconds show, and Lightning alone takes more than one percent of a
  step to call a callback that does nothing. So our own share is measured there: the microseconds beyond such a
  callback.
- The pass begins with two forwards of four samples, which probe the head. They are about 3 % of 20 batches as small as
  here, and close to nothing of a thousand.
- Wide quartiles mean that other work shared the processor's caches. A difference within them means nothing.
- A loop over thresholds that would take hours is extrapolated from a few of them, and marked as such.
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


def page(now: dict[str, Any], before: dict[str, Any] | None) -> str:
    """Return the page as Markdown."""
    rows, earlier = rows_of(now), {} if before is None else rows_of(before)
    text = INTRODUCTION.format(before=BEFORE if earlier else "")
    over = [
        f"- {section} {what}: {row['value']} ({row['budget']})" for (section, what), row in rows.items() if is_over(row)
    ]
    text += "\n" + ("Over the budget:\n\n" + "\n".join(over) if over else "Nothing is over its budget.") + "\n"
    for section in dict.fromkeys(section for section, _ in rows):
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
