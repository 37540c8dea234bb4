"""The page of the benchmarks: its numbers come from commands that exist, its figures are there."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
ROOT = FOLDER.parents[1]
TEXT = (FOLDER / "README.md").read_text()


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("benchmark_page", FOLDER / "page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_table_is_in_a_block_of_a_command(page):
    commands = [shlex.split(match.group(2)) for match in page.BLOCK.finditer(TEXT)]
    assert len(commands) == TEXT.count("<!-- end -->") == 9
    for python, script, *_ in commands:
        assert python == "python"
        assert (ROOT / script).is_file()
    assert all("| --: |" in match.group() for match in page.BLOCK.finditer(TEXT))
    outside = page.BLOCK.sub("", TEXT)
    assert not re.search(r"\d ± \d", outside)  # all numbers with a spread are printed


def test_blocks_are_filled(page):
    command = """python -c "print('| 1 |')" """.strip()
    text = f"a\n<!-- {command} -->\nold\n<!-- end -->\nb\n<!-- python other.py -->\n2\n<!-- end -->\n"
    new = page.filled(text, "print")
    assert new == text.replace("old", "\n| 1 |\n")
    assert page.filled(new, "print") == new


def test_figures():
    shown = set(re.findall(r"\((figures/[a-z_]+\.(?:png|jpg))\)", TEXT))
    assert shown == {f"figures/{path.name}" for path in (FOLDER / "figures").iterdir()}


def test_links():
    for link in re.findall(r"\]\(([^)#h][^)#]*)", TEXT):
        assert (FOLDER / link).exists(), link
