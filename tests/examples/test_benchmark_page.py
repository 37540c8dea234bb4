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
PAGES = {"README.md": 15, "pictures.md": 12}  # and their tables


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("benchmark_page", FOLDER / "page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", PAGES)
def test_each_table_is_in_a_block_of_a_command(page, name):
    text = (FOLDER / name).read_text()
    commands = [shlex.split(match.group(2)) for match in page.BLOCK.finditer(text)]
    assert len(commands) == text.count("<!-- end -->") == PAGES[name]
    for python, script, *_ in commands:
        assert python == "python"
        assert (ROOT / script).is_file()
    assert all("| --: |" in match.group() for match in page.BLOCK.finditer(text))
    outside = page.BLOCK.sub("", text)
    assert not re.search(r"\d ± \d", outside)  # all numbers with a spread are printed


def test_blocks_are_filled(page):
    command = """python -c "print('| 1 |')" """.strip()
    text = f"a\n<!-- {command} -->\nold\n<!-- end -->\nb\n<!-- python other.py -->\n2\n<!-- end -->\n"
    new = page.filled(text, "print")
    assert new == text.replace("old", "\n| 1 |\n")
    assert page.filled(new, "print") == new


def test_figures():
    shown = set(re.findall(r"\((figures/[a-z_]+\.(?:png|jpg))\)", TEXT))
    on_the_page_of_traffic = {"figures/traffic.png"}
    assert shown | on_the_page_of_traffic == {f"figures/{path.name}" for path in (FOLDER / "figures").iterdir()}


@pytest.mark.parametrize("name", PAGES)
def test_links(name):
    for link in re.findall(r"\]\(([^)#h][^)#]*)", (FOLDER / name).read_text()):
        assert (FOLDER / link).exists(), link
