"""Trainings with the Trainer of transformers: tiny models with random weights, on data that they can learn."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import transformers
from torch.utils.data import Dataset

from lightning_calibft import detach
from tests.helpers.references import _reference_gap

NUM_CLASSES, SEEN, ABSENT = 6, [0, 2, 3], [1, 4, 5]
TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


class Samples(Dataset):
    """Items as transformers wants them, with one column more, which the Trainer removes."""

    def __init__(self, classes, each, seed=0, listed=True):
        generator = torch.Generator().manual_seed(seed)
        target = torch.tensor(classes).repeat(each)
        self.images = torch.randn(len(target), 3, 8, 8, generator=generator)
        self.images[torch.arange(len(target)), target % 3, target] += 4
        self.target = target.tolist()
        if listed:
            self.labels = self.target

    def __len__(self):
        return len(self.target)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.target[index], "name": f"image {index}"}


class Texts(Dataset):
    """Sentences of different lengths, which the collator pads."""

    def __init__(self, classes, each, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.tensor(classes).repeat(each).tolist()
        self.texts = [
            [
                target + 3,
                *torch.randint(10, 30, (int(torch.randint(1, 6, (), generator=generator)),), generator=generator),
            ]
            for target in self.targets
        ]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return {"input_ids": torch.tensor(self.texts[index]), "label": self.targets[index]}


def pad(items):
    length = max(len(item["input_ids"]) for item in items)
    tokens = torch.zeros(len(items), length, dtype=torch.long)
    for row, item in zip(tokens, items, strict=True):
        row[: len(item["input_ids"])] = item["input_ids"]
    labels = torch.tensor([item["label"] for item in items])
    return {"input_ids": tokens, "attention_mask": (tokens > 0).long(), "labels": labels}


TRAIN, VAL = Samples(SEEN, 11), Samples(range(NUM_CLASSES), 5, seed=1)
HELD_OUT, TRAFFIC = Samples(SEEN, 20, seed=7), Samples([*SEEN, *SEEN, *SEEN, *ABSENT], 6, seed=9)


def vit(**options):
    torch.manual_seed(0)
    config = transformers.ViTConfig(**TINY, image_size=8, patch_size=4, num_labels=NUM_CLASSES, **options)
    return transformers.ViTForImageClassification(config)


def bert():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "max_position_embeddings": 16, "num_labels": NUM_CLASSES, "pad_token_id": 0}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TINY, **sizes))


def resnet():
    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, num_labels=NUM_CLASSES))


def trainer_of(folder, model, *callbacks, train=TRAIN, val=VAL, kind=None, collator=None, metrics=None, **arguments):
    """A quiet Trainer on the CPU that saves and evaluates every third step of six."""
    given = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 7,
        "learning_rate": 0.02,
        "save_steps": 3,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": False,
        **arguments,
    }
    return (kind or transformers.Trainer)(
        model,
        transformers.TrainingArguments(**given),
        train_dataset=train,
        eval_dataset=val,
        callbacks=list(callbacks),
        data_collator=collator,
        compute_metrics=metrics,
    )


class Then(transformers.TrainerCallback):
    """Does something when training ends, before the callbacks after it."""

    def __init__(self, work):
        self.work, self.done = work, False

    def on_train_end(self, args, state, control, **kwargs):
        self.work()
        self.done = True


@torch.no_grad()
def logits_of(model, data=TRAIN):
    """The logits of a copy without a calibration, in eval mode."""
    return detach(copy.deepcopy(model)).eval()(pixel_values=data.images).logits


def reference(model, data=TRAIN):
    """Gamma, its standard error and the number of samples, by the definition."""
    return _reference_gap(logits_of(model, data), torch.tensor(data.target), SEEN, ABSENT)


def folders(path):
    return sorted(Path(path).glob("checkpoint-*"), key=lambda each: int(each.name.rpartition("-")[2]))
