"""Write the numbers of ``README.md`` and ``pictures.md`` anew: each block names the command that prints it.

    python examples/benchmarks/page.py            # all blocks; scores that the benchmarks have kept are read
    python examples/benchmarks/page.py digits.py  # those whose command contains this

A block begins with ``<!-- python examples/benchmarks/... -->`` and ends with ``<!-- end -->``.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

PAGES = [Path(__file__).with_name(f"{name}.md") for name in ("README", "pictures")]
ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(<!-- (python [^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, part: str = "") -> str:
    """Return a page with the output of its commands in its blocks, of those commands that contain ``part``."""

    def run(match: re.Match[str]) -> str:
        begin, command, end = match.groups()
        if part not in command:
            return match.group()
        print(command, file=sys.stderr)
        words = [sys.executable, *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        return f"{begin}\n{done.stdout.strip()}\n\n{end}"

    return BLOCK.sub(run, text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(), *sys.argv[1:]))
