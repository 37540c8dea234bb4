"""Fine-tune with Fabric in two processes, and hand over what `calibrate` finds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric

from tests.helpers.processes import hand_over
from tests.integrations.fabric import KINDS, fine_tune


def main() -> None:
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    folder = Path(sys.argv[1])
    found = {}
    for name, options in KINDS.items():
        run = fine_tune(fabric, **options)
        found[name] = {"gamma": run.result.gamma, "num_samples": run.result.num_samples}
        fabric.save(folder / f"{name}.ckpt", {"model": run.model})
    hand_over(json.dumps(found), folder, fabric.global_rank)


if __name__ == "__main__":
    main()
