"""What the command prints in a terminal: tables where rich can draw them, and else the plain text of a pipe."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from lightning_calibft import set_gamma

pty = pytest.importorskip("pty")  # not on Windows
CLI = "from lightning_calibft.cli import main; main()"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "[bold]net.safetensors"  # nothing that rich should read as a style
    save_file(set_gamma(torch.nn.Linear(3, 5), 2.5, [0, 1]).state_dict(), path)
    return path


def in_terminal(*words, code=CLI, **variables):
    """Return what the command prints in a terminal of 70 columns."""
    terminal, end = pty.openpty()
    variables = {"TERM": "xterm", "COLUMNS": "70", "NO_COLOR": "", **variables}
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=end, env={**os.environ, **variables})
    os.close(end)
    text = b""
    try:
        while part := os.read(terminal, 4096):
            text += part
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(terminal)
    assert process.wait(60) == 0
    return text.decode().replace("\r\n", "\n")


def test_tables(file, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.chdir(file.parent)
    name, *lines = in_terminal("inspect", file.name).splitlines()
    assert name == "[bold]net.safetensors: calibrated"
    (row,) = [line for line in lines if line.startswith("│ classes")]
    assert [cell.strip() for cell in row.split("│")] == ["", "classes", "5: unknown seen, 3 absent", ""]
    assert set(lines[0]) == set("┌─┬┐")
    assert max(map(len, lines)) <= 70
    told = [line.strip() for line in lines if line.startswith("  ")]  # which goes on below where it begins
    assert " ".join(told).startswith("whether gamma helps cannot be told: its estimator does not say what it changes")


def test_plain_text(file):
    """In a pipe, where the user wants it, in a terminal that cannot, and where rich is not installed."""
    piped = subprocess.run([sys.executable, "-c", CLI, "inspect", file], capture_output=True, text=True, check=True)
    assert piped.stdout.startswith(f"{file}: calibrated\n  gamma      2.5000\n  classes    5: unknown seen, 3 absent\n")
    assert in_terminal("inspect", file, NO_COLOR="1") == piped.stdout
    assert in_terminal("inspect", file, TERM="dumb") == piped.stdout
    without = f"import sys; sys.modules['rich'] = None; {CLI}"
    assert in_terminal("inspect", file, code=without) == piped.stdout
    assert in_terminal("inspect", file, "--json").startswith('{"calibrated": true, ')
