"""What the widest heads and the largest files cost."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_calibft import set_gamma
from tests.benchmarks.samples import bytes_at_most, logits_and_target
from tests.benchmarks.test_metrics import METRICS, make
from tests.helpers.processes import run_python

WIDTH = (64, 200_000)  # ten times ImageNet-21k


@pytest.mark.parametrize("name", METRICS)
def test_update(ratio, name):
    """Update with 64 x 200,000 logits, against their maxima, which reads them once."""
    logits, target = logits_and_target(*WIDTH)
    metric, update = make(name, logits, target)

    def ours():
        update()
        metric.reset()

    ratio(ours, lambda: logits.amax(1), rounds=5, budget="30")


@pytest.mark.parametrize("name", METRICS)
def test_bytes(report, tmp_path, name):
    """Most bytes allocated at once by an update with 64 x 200,000 logits, as a share of their own 51 MB."""
    logits, target = logits_and_target(*WIDTH)
    metric, update = make(name, logits, target)
    update()
    metric.reset()
    report(f"{bytes_at_most(update, tmp_path) / logits.nbytes:.3f}", "below 0.25")


FOLD = """
import sys, threading, time
from pathlib import Path
import torch
from lightning_calibft import fold_checkpoint

def kilobytes():  # of memory that is not the page cache of a file
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

fold_checkpoint("small" + Path(sys.argv[1]).suffix, "small_" + sys.argv[2])  # imports what it needs
before, most, done = kilobytes(), [0], []

def watch():
    while not done:
        most.append(kilobytes())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
fold_checkpoint(sys.argv[1], sys.argv[2])
done.append(True)
thread.join()
print((max(most) - before) / (Path(sys.argv[1]).stat().st_size / 1024))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("source", "destination", "budget"),
    [
        (".pth", ".pth", "1.1"),
        (".pth", ".safetensors", "1.1"),
        (".safetensors", ".pth", "0.1"),
        (".safetensors", ".safetensors", "0.1"),
    ],
)
def test_folding_a_file(report, tmp_path, source, destination, budget):
    """Most memory that folding a file of 256 MB takes, as a share of its size."""

    for name, width in (("small", 8), ("large", 8000)):
        model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 10))
        state = set_gamma(model, 2.5, [0, 1], head="1").state_dict()
        (torch.save if source == ".pth" else save_file)(state, tmp_path / f"{name}{source}")
    done = run_python("-c", FOLD, f"large{source}", f"folded{destination}", cwd=tmp_path)
    report(f"{float(done.stdout):.2f}", budget)
