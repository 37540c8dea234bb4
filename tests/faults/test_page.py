"""The page on faults names tests that exist, and all of this folder."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def names_in(path: Path) -> set[str]:
    body = ast.parse(path.read_text()).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_the_page_names_these_tests():
    page = (ROOT / "docs" / "faults.md").read_text()
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page))
    assert named
    rows = [line for line in page.splitlines() if line.startswith("|") and not line.startswith(("| Fault |", "| ---"))]
    assert all("`tests/" in row for row in rows)
    for path, name in named:
        assert name in names_in(ROOT / path), (path, name)
    here = [path for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__)]
    assert {(str(path.relative_to(ROOT)), name) for path in here for name in names_in(path)} <= named
