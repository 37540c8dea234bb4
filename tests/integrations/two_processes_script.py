"""Train with the Trainer of transformers in two processes, as `torchrun` starts them, and hand over what comes out."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard

from lightning_calibft import get_gamma
from lightning_calibft.integrations import AbsentClassCalibrationCallback
from tests.helpers.processes import as_started_by_torchrun, hand_over
from tests.integrations.hugging_face import HELD_OUT, SEEN, TRAFFIC, Samples, Then, resnet, trainer_of, vit


class GoneOnSecond(Samples):
    """Data of which the second process cannot read its share, after training."""

    lost = False

    def lose(self):
        self.lost = True

    def __getitem__(self, index):
        if self.lost and os.environ["RANK"] == "1":
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def run(folder, model, *callbacks, **options):
    trainer = trainer_of(folder, model, *callbacks, dataloader_num_workers=0, **options)
    trainer.train()
    return trainer


def work() -> None:
    os.environ["RANK"] = rank = os.environ["LOCAL_RANK"]
    torch.set_num_threads(1)
    folder, found = Path(sys.argv[1]), {}
    for name, make in (("vit", vit), ("resnet", resnet)):
        plain = run(folder / f"{name}_plain", make())
        callback = AbsentClassCalibrationCallback()
        trainer = run(folder / name, make(), callback)
        state = trainer.model.state_dict()
        found[name] = {
            "processes": trainer.args.world_size,
            "result": callback.result.as_dict(),
            "folders": {Path(path).name: each.gamma for path, each in callback.checkpoint_results.items()},
            "gamma": get_gamma(trainer.model),
            "same": all(torch.equal(state[key], value) for key, value in plain.model.state_dict().items()),
            "metrics": {key: value for key, value in trainer.evaluate().items() if "acc" in key or "ausuc" in key},
        }
    callback = AbsentClassCalibrationCallback(
        estimator="pseudo_absent", calibration_dataset=HELD_OUT, unlabeled_dataset=TRAFFIC
    )
    run(folder / "unlabeled", vit(), callback, save_steps=6)
    found["unlabeled"] = callback.result.as_dict()
    data, callback = GoneOnSecond(SEEN, 11), AbsentClassCalibrationCallback(SEEN)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer = run(folder / "fails", vit(), Then(data.lose), callback, train=data, save_strategy="no")
    found["told"] = [str(each.message) for each in told if "could not calibrate" in str(each.message)]
    found["uncalibrated"] = get_gamma(trainer.model)
    loader = trainer.get_train_dataloader()
    try:
        callback.on_train_begin(trainer.args, trainer.state, None, model=fully_shard(vit()), train_dataloader=loader)
    except RuntimeError as error:
        found["sharded"] = str(error)
    hand_over(json.dumps(found), folder, int(rank))


if __name__ == "__main__":
    as_started_by_torchrun(work, 2)
