"""Ways to fine-tune a classifier when target images of some classes are missing.

Each takes a ``Setting``, starts from its pre-trained weights, and is determined by the setting alone.
"""

from __future__ import annotations

import copy
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from digits_data import keep_classes
from protocol import CosineHead, average
from timm.loss import BinaryCrossEntropy
from timm.optim import AdaBelief
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": torch.optim.RMSprop,
    "Adadelta": torch.optim.Adadelta,
    "AdaBelief": AdaBelief,
}


class TargetData(Protocol):
    """Images of the domain to fine-tune for. Each part holds all classes."""

    target_train: TensorDataset
    held_out: TensorDataset
    target_test: TensorDataset


@dataclass(frozen=True)
class Setting(ABC):
    """What a fine-tuning run depends on.

    Args:
        seed: Of the data, the order of the classes, and the training.
        share: How many percent of the classes are seen.
        optimizer: A name in ``OPTIMIZERS``.
        learning_rate: At the start; it falls as a cosine.
        epochs: Of each training.
        accelerator: As the Trainer takes it.
    """

    sources: ClassVar[tuple[Path, ...]]
    """The files of code that make the data and the network."""
    local_models: ClassVar[int]
    """Of leave-out local SGD."""

    seed: int
    share: int
    optimizer: str
    learning_rate: float
    epochs: int
    accelerator: str = "cpu"

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of all classes."""

    @property
    @abstractmethod
    def data(self) -> TargetData:
        """All images of this seed."""

    @abstractmethod
    def pretrained(self) -> Any:
        """Return the module to start from, with ``head(backbone(images))`` as its logits, in eval mode."""

    def facts(self) -> dict[str, Any]:
        """Return all that the scores depend on, besides the code."""
        return asdict(self)

    @cached_property
    def seen(self) -> list[int]:
        """The seen classes; a larger share adds to a smaller one."""
        order = torch.randperm(self.num_classes, generator=torch.Generator().manual_seed(self.seed))
        return sorted(order[: round(self.num_classes * self.share / 100)].tolist())

    @cached_property
    def seen_data(self) -> TensorDataset:
        """The images to fine-tune on."""
        return keep_classes(self.data.target_train, self.seen)


class Classifier(pl.LightningModule):
    """A copy of the pre-trained module to train; with ``classes``, its loss is over these alone."""

    def __init__(
        self,
        before: Any,
        optimizer: str,
        learning_rate: float,
        classes: list[int] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.backbone, self.head = copy.deepcopy(before.backbone), copy.deepcopy(before.head)
        self.optimizer, self.learning_rate = optimizer, learning_rate
        rows = range(self.head.out_features)
        others = torch.tensor([row not in (rows if classes is None else classes) for row in rows])
        self.register_buffer("others", others, persistent=False)
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, ...)`` to logits ``(N, C)``."""
        return self.head(self.backbone(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss, by default cross-entropy, over its classes."""
        images, labels = batch
        return self.loss(self(images).masked_fill(self.others, -torch.inf), labels)

    def configure_optimizers(self) -> dict[str, Any]:
        """Build the optimizer and a cosine schedule over all steps."""
        optimizer = OPTIMIZERS[self.optimizer](self.parameters(), lr=self.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(
    module: Any,
    data: Dataset,
    epochs: int,
    seed: int,
    batch_size: int = 32,
    accelerator: str = "cpu",
    callbacks: Sequence[pl.Callback] = (),
) -> Any:
    """Train in place with an ordinary Trainer and return the module in eval mode."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"accelerator": accelerator, "devices": 1, "barebones": True}
    trainer = pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), **options)
    trainer.fit(module, DataLoader(data, batch_size, shuffle=True))
    return module.eval()


def start(setting: Setting, classes: list[int] | None = None) -> Classifier:
    """Return a new module with the pre-trained weights; with ``classes``, its loss is over these alone."""
    return Classifier(setting.pretrained(), setting.optimizer, setting.learning_rate, classes)


def tune(setting: Setting, module: Classifier) -> Classifier:
    """Fine-tune a module on the seen classes."""
    return fit(module, setting.seen_data, setting.epochs, setting.seed, accelerator=setting.accelerator)


@cache
def fine_tuned(setting: Setting) -> Classifier:
    """Ordinary fine-tuning: all parameters, cross-entropy over all classes."""
    return tune(setting, start(setting))


def tuned_on_all_classes(setting: Setting) -> Classifier:
    """Fine-tuning with target images of all classes: what no method has."""
    return fine_tuned(replace(setting, share=100))


def frozen_classifier(setting: Setting) -> Classifier:
    """Fine-tune the backbone; the head keeps its pre-trained weights."""
    module = start(setting)
    module.head.requires_grad_(False)
    return tune(setting, module)


def linear_probing(setting: Setting) -> Classifier:
    """Fine-tune the head; the backbone stays in eval mode, so that running statistics stay as well."""
    module = start(setting)
    module.backbone.requires_grad_(False).eval()
    return tune(setting, module)


@torch.no_grad()
def with_cosine_head(setting: Setting) -> Classifier:
    """Return the pre-trained module with a cosine head, whose scale is the mean product of the norms it leaves out."""
    module = start(setting).eval()
    features = module.backbone(setting.seen_data.tensors[0])
    module.head = CosineHead(module.head, (features.norm(dim=1).mean() * module.head.weight.norm(dim=1).mean()).item())
    return module.train()


def cosine_classifier(setting: Setting) -> Classifier:
    """Fine-tune with normalized features and rows, from the pre-trained head."""
    return tune(setting, with_cosine_head(setting))


def add_low_rank(module: Classifier, seed: int) -> Classifier:
    """Add LoRA of rank 4 to the head and to all convolutions but depthwise ones; all else is frozen.

    LoRA: Hu et al., ICLR 2022.
    """
    import peft  # which only some of the benchmarks need

    layers = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    ]
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=4, target_modules=layers), module)
    return module


def partial_softmax(setting: Setting) -> Classifier:
    """Fine-tune with the cross-entropy over the seen classes alone: nothing pushes the absent logits down."""
    return tune(setting, start(setting, setting.seen))


def sigmoids(setting: Setting) -> Classifier:
    """Fine-tune with a sigmoid for each class, as timm's ``--bce-loss --bce-sum`` does; a label is still one class."""
    loss = BinaryCrossEntropy(smoothing=0.0, sum_classes=True)
    return tune(setting, Classifier(setting.pretrained(), setting.optimizer, setting.learning_rate, loss=loss))


def interpolated(setting: Setting, alpha: float) -> Classifier:
    """Return the pre-trained weights, and ``alpha`` of the way to the fine-tuned ones.

    WiSE-FT: Wortsman et al., "Robust Fine-Tuning of Zero-Shot Models", CVPR 2022.
    """
    module = start(setting)
    states = [module.state_dict(), fine_tuned(setting).state_dict()]
    module.load_state_dict(average(states, [1 - alpha, alpha]))
    return module.eval()


def leave_out_local_sgd(
    setting: Setting,
    local_models: int | None = None,
    local_epochs: int = 1,
    class_share: float = 0.5,
    frozen_classifier: bool = False,
) -> tuple[Classifier, float]:
    """Train on random parts of the seen classes, average the weights, and go on from there, round after round.

    LOLSGD: Tu et al., "Holistic Transfer: Towards Non-Disruptive Fine-Tuning with Partial Target Data", NeurIPS 2023.
    What the local models share is the new domain; what each of them forgets differs, and less of it is in the average.
    Simplified here: each local training is an ordinary one, with a fresh optimizer and a cosine schedule of its own;
    what it can be combined with, such as distillation, is left out; and these numbers are ours, not the paper's.

    Args:
        setting: With the epochs of all rounds together.
        local_models: Of a round. ``None``: those of the benchmark.
        local_epochs: Of a round.
        class_share: The share of the seen classes that each local model sees, rounded up.
        frozen_classifier: Whether the head keeps its pre-trained weights.

    Returns:
        The module, and its cost in ordinary fine-tunings.
    """
    draws, module, samples = random.Random(setting.seed), start(setting), 0
    module.head.requires_grad_(not frozen_classifier)
    number, count = local_models or setting.local_models, math.ceil(len(setting.seen) * class_share)
    local_epochs = min(local_epochs, setting.epochs)
    for _ in range(setting.epochs // local_epochs):
        trained = []
        for _ in range(number):
            subset = keep_classes(setting.seen_data, draws.sample(setting.seen, count))
            local, seed = copy.deepcopy(module).train(), draws.randrange(2**31)
            trained.append(fit(local, subset, local_epochs, seed, accelerator=setting.accelerator))
            samples += local_epochs * len(subset)
        module.load_state_dict(average([each.state_dict() for each in trained], [1 / number] * number))
    return module.eval(), samples / (setting.epochs * len(setting.seen_data))
