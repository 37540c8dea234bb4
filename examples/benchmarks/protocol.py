"""How Mai et al., "Fine-Tuning is Fine, if Calibrated" (NeurIPS 2024), fine-tune, and what they score.

The settings are those of their code (https://github.com/OSU-MLB/Fine-Tuning-Is-Fine-If-Calibrated): SGD with Nesterov
momentum 0.9, the head at the learning rate and the backbone at a tenth of it, a cosine over all iterations without
warm-up, batches of 64, 500 iterations an epoch, cross-entropy over all rows of the head, BatchNorm in training mode.

ALG is scored in two ways. Gamma from the fine-tuning images, as the paper describes it, needs no image of an absent
class. The authors' evaluation script takes the mean gap over the images that are scored instead, those of absent
classes included: that needs their labels, and is a row of its own (``ALG of the scored images``).

Pseudo cross-validation trains on three parts of 15 of the 30 seen classes (half of them in the other benchmarks). As
the authors' configurations name them, these are the first half of the seen classes, shuffled with the seeds 0, 1 and 2,
provided that reading the images draws no random number there. The curve of each model is read here on fine-tuning
images of the seen classes alone. As far as its published part shows, their script reads it on target training images
of all classes, so that it needs labels of absent ones.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import pickle
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset
from torchmetrics.functional.classification import multiclass_f1_score

from lightning_calibft import (
    AbsentClassCalibration,
    ClassSplit,
    find_head,
    inspect_checkpoint,
    load_calibrated,
)
from lightning_calibft.analysis.outputs import Outputs, collect_outputs
from lightning_calibft.estimators import OperatingPoint, make_estimator
from lightning_calibft.functional import (
    ausuc,
    average_logit_gap,
    best_gamma,
    calibrate_logits,
    class_means,
    nearest_class_mean_accuracy,
    split_accuracy,
    weight_aligning,
)
from lightning_calibft.functional.seen_unseen_curve import UnreachableAccuracyError
from lightning_calibft.metrics import SeenUnseenCurve

COLUMNS = ("Acc_Y/Y", "Acc_S/Y", "Acc_U/Y", "Acc_S/S", "Acc_U/U", "AUSUC", "macro F1", "NCM_S/Y", "NCM_U/Y")
COLUMNS += ("gamma", "cost")
Rows = dict[str, dict[str, float]]


class FineTuning(pl.LightningModule):
    """Any classifier with the paper's optimizer, schedule and loss.

    Args:
        net: The classifier. It is trained in place.
        learning_rate: Of the head; the backbone has a tenth of it.
        weight_decay: Of all parameters.
        classes: The rows of the head that the loss is over. ``None``: all.
        frozen: ``"classifier"``, ``"backbone"``, which stays in eval mode, or nothing.
    """

    def __init__(
        self,
        net: nn.Module,
        learning_rate: float,
        weight_decay: float,
        classes: Sequence[int] | None = None,
        frozen: str | None = None,
    ) -> None:
        super().__init__()
        self.net, self.learning_rate, self.weight_decay = net, learning_rate, weight_decay
        self.classes, self.frozen = classes, frozen

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, 3, H, W)`` to logits ``(N, C)``."""
        return self.net(images)

    def train(self, mode: bool = True) -> FineTuning:
        """Set the mode of all that is trained."""
        super().train(mode)
        if self.frozen == "backbone":
            self.net.eval()
        return self

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy over the rows of its classes."""
        images, rows = batch
        logits = self(images)
        if self.classes is not None:
            others = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
            others[list(self.classes)] = False
            logits = logits.masked_fill(others, -torch.inf)
        return F.cross_entropy(logits, rows)

    def configure_optimizers(self) -> dict[str, Any]:
        """Build SGD, with the backbone at a tenth of the head's learning rate, and a cosine over all steps."""
        head = list(find_head(self.net).parameters())
        in_head = set(map(id, head))
        backbone = [parameter for parameter in self.net.parameters() if id(parameter) not in in_head]
        groups = []
        for name, parameters, factor in (("backbone", backbone, 0.1), ("classifier", head, 1.0)):
            if name != self.frozen:
                groups.append({"params": parameters, "lr": factor * self.learning_rate})
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=self.weight_decay, nesterov=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class CosineHead(nn.Linear):
    """Scaled cosine similarity of the features to the rows of a linear head; its bias is dropped.

    Args:
        head: The head to start from.
        scale: The scale to start from. It is learned.
    """

    def __init__(self, head: nn.Linear, scale: float) -> None:
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")  # draws no random weights
        self.weight = nn.Parameter(head.weight.detach().clone())
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``(N, D)`` to logits ``(N, C)``."""
        return self.scale * F.linear(F.normalize(features), F.normalize(self.weight))


@dataclass(eq=False)
class TargetData(pl.LightningDataModule):
    """What a model is fine-tuned and scored on. Labels are rows of the head.

    Args:
        split: Seen and absent classes.
        order: The seen classes in the authors' order, which pseudo cross-validation shuffles.
        augmented: The training images of all classes, as they are trained on.
        clean: The same images without augmentation: what gamma and the class means of NCM are found on.
        rows: Their labels.
        test: Images of all classes.
        args: The options of ``add_options``.
    """

    split: ClassSplit
    order: Sequence[int]
    augmented: Dataset
    clean: Dataset
    rows: list[int]
    test: Dataset
    args: argparse.Namespace

    def __post_init__(self) -> None:
        super().__init__()

    def of_classes(self, images: Dataset, classes: Sequence[int]) -> Subset:
        """Return those training images that are of some classes."""
        return Subset(images, [position for position, row in enumerate(self.rows) if row in set(classes)])

    def loader(self, classes: Sequence[int]) -> DataLoader:
        """So many iterations an epoch, however many images there are."""
        return training_loader(self.of_classes(self.augmented, classes), self.args)

    def train_dataloader(self) -> DataLoader:
        """The images to fine-tune on."""
        return self.loader(self.split.seen_classes)

    def calibration_dataloader(self) -> DataLoader:
        """Where the callback finds gamma."""
        images = self.of_classes(self.clean, self.split.seen_classes)
        return DataLoader(images, self.args.batch_size, num_workers=self.args.workers)


def training_loader(data: Dataset, args: argparse.Namespace) -> DataLoader:
    """Whole batches of shuffled images; an epoch ends after ``--iterations``, not with the images."""
    sampler = RandomSampler(data, num_samples=args.iterations * args.batch_size)
    return DataLoader(data, args.batch_size, sampler=sampler, num_workers=args.workers)


def train(module: FineTuning, data: Any, path: Path, args: argparse.Namespace, *callbacks: pl.Callback) -> None:
    """Train and write the last weights to ``path``."""
    module.train()  # Lightning keeps the mode that modules come in
    pl.seed_everything(args.seed, workers=True, verbose=False)
    checkpoint = ModelCheckpoint(
        path.parent, path.stem, every_n_epochs=args.epochs, save_weights_only=True, enable_version_counter=False
    )
    trainer = make_trainer(args, max_epochs=args.epochs, callbacks=[*callbacks, checkpoint])
    trainer.fit(module, data)


def make_trainer(args: argparse.Namespace, **options: Any) -> pl.Trainer:
    chosen = {"accelerator": args.accelerator, "precision": args.precision, "default_root_dir": args.output}
    return pl.Trainer(devices=1, logger=False, enable_model_summary=False, **chosen, **options)


def fine_tune(net: nn.Module, data: TargetData, path: Path, args: argparse.Namespace) -> FineTuning:
    """Return ``net`` fine-tuned and calibrated by the package's callback; what an earlier run has finished is read."""
    options = {"net": copy.deepcopy(net), "learning_rate": args.learning_rate, "weight_decay": args.weight_decay}
    if not (path.exists() and inspect_checkpoint(path)["calibrated"]):
        split = data.split
        calibration = AbsentClassCalibration(
            list(split.seen_classes), list(split.absent_classes), estimator="pseudo_absent", source="train"
        )
        train(FineTuning(**options), data, path, args, calibration)
    return load_calibrated(FineTuning, path, map_location="cpu", **options)


def trained(net: nn.Module, loader: DataLoader, path: Path, args: argparse.Namespace, **options: Any) -> nn.Module:
    """Return ``net`` trained without the callback; what an earlier run has finished is read."""
    options |= {"net": copy.deepcopy(net), "learning_rate": args.learning_rate, "weight_decay": args.weight_decay}
    if not path.exists():
        train(FineTuning(**options), loader, path, args)
    return FineTuning.load_from_checkpoint(path, map_location="cpu", **options).net.eval()


@dataclass(frozen=True)
class Comparison:
    """Ways to fine-tune one pre-trained classifier, and their scores.

    Args:
        net: The classifier.
        data: What to fine-tune it on.
        folder: Where weights are kept.
        args: The options of ``add_options``.
    """

    net: nn.Module
    data: TargetData
    folder: Path
    args: argparse.Namespace

    def collect(self, net: nn.Module) -> tuple[Outputs, Outputs]:
        """Run a model over the test images and over all clean training images."""
        net.to(make_trainer(self.args).strategy.root_device)
        options = {"batch_size": self.args.batch_size, "num_workers": self.args.workers}
        parts = [collect_outputs(net, DataLoader(part, **options)) for part in (self.data.test, self.data.clean)]
        net.cpu()
        return parts[0], parts[1]

    @cached_property
    def before(self) -> tuple[Outputs, Outputs]:
        """What the pre-trained classifier makes of the images."""
        return self.collect(self.net)

    @cached_property
    def tuned(self) -> FineTuning:
        """Ordinary fine-tuning."""
        return fine_tune(self.net, self.data, self.folder / "fine_tuned.ckpt", self.args)

    @cached_property
    def after(self) -> tuple[Outputs, Outputs]:
        """What it makes of the images, without gamma."""
        return self.collect(self.tuned.net)

    def rows(self) -> Rows:
        """Score the pre-trained and the fine-tuned classifier."""
        test, train = self.after
        groups = self.data.split.seen_classes, self.data.split.absent_classes
        gammas = {
            **self.gammas("fine-tuned", self.after),
            "fine-tuned + ALG of the scored images": gap_of_all(test.logits, test.target, self.data.split),
            "fine-tuned + oracle gamma": best_gamma(test.logits, test.target, *groups).item(),
        }
        rows = {name: score(test, train, self.data.split, gamma) for name, gamma in gammas.items()}
        return {"pre-trained": score(*self.before, self.data.split, 0.0, cost=0.0), **rows}

    def gammas(self, name: str, outputs: tuple[Outputs, Outputs], pretrained: bool = True) -> dict[str, float]:
        """Return gamma 0, and those that are found on clean fine-tuning images."""
        train, split = outputs[1], self.data.split
        seen = torch.isin(train.target, torch.tensor(split.seen_classes))
        samples = train.logits[seen], train.target[seen]
        groups = split.seen_classes, split.absent_classes
        gammas = {name: 0.0, f"{name} + ALG": average_logit_gap(*samples, *groups).gamma.item()}
        if pretrained:
            estimator = make_estimator("pseudo_absent", split)
            estimator.update(*samples, self.before[1].logits[seen])
            gammas[f"{name} + pseudo_absent"] = estimator.compute().item()
        return gammas

    def scored(self, name: str, net: nn.Module, cost: float = 1.0) -> Rows:
        """Score another model as it is and with both gammas."""
        outputs = self.collect(net)
        found = self.gammas(name, outputs).items()
        return {row: score(*outputs, self.data.split, gamma, cost) for row, gamma in found}

    def train(self, name: str, net: nn.Module | None = None, **options: Any) -> nn.Module:
        """Fine-tune the pre-trained classifier in another way."""
        path = self.folder / f"{name}.ckpt"
        return trained(net or self.net, self.data.train_dataloader(), path, self.args, **options)

    def frozen_classifier(self, name: str) -> Rows:
        """The head keeps its pre-trained weights."""
        return self.scored(name, self.train("frozen_classifier", frozen="classifier"))

    def linear_probing(self, name: str) -> Rows:
        """The backbone keeps its pre-trained weights."""
        return self.scored(name, self.train("linear_probing", frozen="backbone"))

    def cosine_classifier(self, name: str) -> Rows:
        """Features and rows are normalized. The scale starts at the mean product of the norms that are left out."""
        net = copy.deepcopy(self.net)
        head, features = find_head(net), self.before[1].features
        scale = (features.norm(dim=1).mean() * head.weight.norm(dim=1).mean()).item()  # type: ignore[operator,union-attr]
        parent, _, last = head_name(net).rpartition(".")
        setattr(net.get_submodule(parent), last, CosineHead(head, scale))  # type: ignore[arg-type]
        return self.scored(name, self.train("cosine_classifier", net))

    def wise(self, name: str) -> Rows:
        """WiSE-FT: between the pre-trained and the fine-tuned weights."""
        rows = {}
        for alpha in (0.5, 0.75):
            net = copy.deepcopy(self.net)  # its keys: the tuned one has gamma as well
            net.load_state_dict(average([self.tuned.net.state_dict(), net.state_dict()], [alpha, 1 - alpha]))
            rows |= self.scored(f"{name}, alpha {alpha}", net)
        return rows

    def partial_softmax(self, name: str) -> Rows:
        """The loss is over the seen classes alone."""
        return self.scored(name, self.train("partial_softmax", classes=self.data.split.seen_classes))

    def local_sgd(self, name: str) -> Rows:
        """LOLSGD: each epoch averages models that were trained on random halves of the seen classes."""
        path, net, draws = self.folder / "local_sgd.pt", copy.deepcopy(self.net), random.Random(self.args.seed)
        seen, number = self.data.split.seen_classes, self.args.local_models
        if path.exists():
            net.load_state_dict(torch.load(path, weights_only=True))
            return self.scored(name, net, cost=number)
        for _ in range(self.args.epochs):
            states = []
            for _ in range(number):
                loader = self.data.loader(draws.sample(seen, math.ceil(len(seen) / 2)))
                args = argparse.Namespace(**{**vars(self.args), "epochs": 1, "seed": draws.randrange(2**31)})
                module = FineTuning(copy.deepcopy(net), args.learning_rate, args.weight_decay)
                train(module, loader, self.folder / "local.ckpt", args)
                states.append(module.net.cpu().state_dict())
            net.load_state_dict(average(states, [1 / number] * number))
        torch.save(net.state_dict(), path)
        return self.scored(name, net.eval(), cost=number)

    def cross_validation(self, name: str) -> Rows:
        """Pseudo cross-validation over S and over Y, with three trainings on half of the seen classes."""
        split, (test, train) = self.data.split, self.after
        in_seen = torch.isin(train.target, torch.tensor(split.seen_classes))
        target, found = train.target[in_seen], {"S": [], "Y": []}  # type: ignore[var-annotated]
        for seed in range(3):
            shuffled = torch.randperm(len(self.data.order), generator=torch.Generator().manual_seed(seed)).tolist()
            kept = [self.data.order[position] for position in shuffled[: math.ceil(len(shuffled) / 2)]]
            path = self.folder / f"part_{seed}.ckpt"
            args = argparse.Namespace(**{**vars(self.args), "seed": seed})
            outputs = self.collect(trained(self.net, self.data.loader(kept), path, args))[1]
            for candidates, rest in (("S", ()), ("Y", split.absent_classes)):
                groups = split.num_classes, kept, sorted({*split.seen_classes, *rest}.difference(kept))
                old, new = OperatingPoint(*groups), SeenUnseenCurve(*groups)
                old.update(self.before[1].logits[in_seen], target)
                new.update(outputs.logits[in_seen], target)
                with contextlib.suppress(UnreachableAccuracyError):  # no gamma brings these classes back
                    least = float(old.accuracies(0.0)["absent"])
                    found[candidates].append(float(new.best_gamma(min_absent_accuracy=least)))
        return {
            f"fine-tuned + {name} over {key}": score(test, train, split, statistics.mean(gammas or [0.0]), cost=4.0)
            for key, gammas in found.items()
        }

    def weight_aligning(self, name: str) -> Rows:
        """Rows of absent classes get the mean norm of those of seen ones."""
        head, (test, train) = find_head(self.tuned.net), self.after
        weight = weight_aligning(head.weight, self.data.split.seen_classes)  # type: ignore[arg-type]
        bias = head.bias.detach()  # type: ignore[operator,union-attr]
        logits = F.linear(test.features.double(), weight.double(), bias.double())
        return {f"fine-tuned, {name}": score(replace(test, logits=logits), train, self.data.split, 0.0)}

    def on_all_classes(self, name: str) -> Rows:
        """Fine-tuning on target images of all classes: what no method has."""
        split = self.data.split
        loader = self.data.loader([*split.seen_classes, *split.absent_classes])
        outputs = self.collect(trained(self.net, loader, self.folder / "all_classes.ckpt", self.args))
        return {f"fine-tuned on {name}": score(*outputs, split, 0.0)}


METHODS: dict[str, Callable[[Comparison, str], Rows]] = {
    "PCV": Comparison.cross_validation,
    "weight aligning": Comparison.weight_aligning,
    "frozen classifier": Comparison.frozen_classifier,
    "linear probing": Comparison.linear_probing,
    "cosine classifier": Comparison.cosine_classifier,
    "WiSE-FT": Comparison.wise,
    "partial softmax": Comparison.partial_softmax,
    "LOLSGD": Comparison.local_sgd,
    "all classes": Comparison.on_all_classes,
}


def paper_rows(
    open_all: Callable[[], tuple[nn.Module, TargetData]], folder: Path, facts: dict[str, Any], args: argparse.Namespace
) -> Rows:
    """Fine-tune a pre-trained classifier and score both, the gammas, and the other ways of ``--methods``."""

    @cache
    def comparison() -> Comparison:
        return Comparison(*open_all(), folder, args)

    rows = kept(folder / "results.json", facts, lambda: comparison().rows())
    for name in METHODS:
        if name in args.methods:
            file = folder / f"results_{name.replace(' ', '_')}.json"
            rows |= kept(file, facts, lambda name=name: METHODS[name](comparison(), name))  # type: ignore[misc]
    return rows


def published_rows(net: nn.Module, data: TargetData, before: nn.Module | None, args: argparse.Namespace) -> Rows:
    """Score a checkpoint that the authors publish; ``pseudo_absent`` needs the model from before fine-tuning, too."""
    comparison = Comparison(before or net, data, args.output, args)
    test, train = comparison.collect(net)
    groups = data.split.seen_classes, data.split.absent_classes
    gammas = {
        **comparison.gammas("checkpoint", (test, train), pretrained=before is not None),
        "checkpoint + ALG of the scored images": gap_of_all(test.logits, test.target, data.split),
        "checkpoint + oracle gamma": best_gamma(test.logits, test.target, *groups).item(),
    }
    rows = {name: score(test, train, data.split, gamma, cost=0.0) for name, gamma in gammas.items()}
    return rows if before is None else {"pre-trained": score(*comparison.before, data.split, 0.0, cost=0.0), **rows}


def published_weights(net: nn.Module, file: Path) -> nn.Module:
    """Load a checkpoint of the authors, which calls the head ``head`` and all else ``backbone``, into a timm model."""
    name = head_name(net)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        old = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
        head = {f"{name}.{key}": state[f"head.{key}"] for key in ("weight", "bias")}
        net.load_state_dict({**old, **head})  # in place of the head of ImageNet, which is still in the backbone
    except (OSError, RuntimeError, KeyError, AttributeError, pickle.UnpicklingError) as error:
        raise SystemExit(
            f"Cannot read {file} as a checkpoint of the authors' for this model: expected a state dict of `backbone.*`"
            f" and `head.*`, with {net.num_classes} rows: {error}"
        ) from error
    return net.eval()


def head_name(net: nn.Module) -> str:
    head = find_head(net)
    return next(name for name, module in net.named_modules() if module is head)


@torch.no_grad()
def average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted sum of state dicts; what is counted in whole numbers is that of the last one."""
    return {
        key: sum(weight * state[key] for weight, state in zip(weights, states, strict=True))
        if last.is_floating_point()
        else last
        for key, last in states[-1].items()
    }


def gap_of_all(logits: Tensor, target: Tensor, split: ClassSplit) -> float:
    """Mean gap of samples of all classes, as the authors' evaluation script computes ALG: it needs all their labels."""
    of_seen = logits[:, list(split.seen_classes)].double()
    is_seen = torch.isin(target, torch.tensor(split.seen_classes))
    own = torch.where(is_seen, logits.gather(1, target.unsqueeze(1)).squeeze(1).double(), 0.0)
    others = (of_seen.sum(1) - own) / (of_seen.shape[1] - is_seen.double())
    return (others - logits[:, list(split.absent_classes)].double().mean(1)).mean().item()


def score(test: Outputs, train: Outputs, split: ClassSplit, gamma: float, cost: float = 1.0) -> dict[str, float]:
    """Score the test images with one gamma. ``S/Y``: samples of seen classes, predicted among seen and absent ones."""
    groups = split.seen_classes, split.absent_classes
    logits = calibrate_logits(test.logits.double(), gamma, *groups)
    nearest = test.features, test.target, class_means(train.features, train.target, split.num_classes), *groups
    values = (
        split_accuracy(logits, test.target, *groups),
        split_accuracy(logits, test.target, *groups, samples="seen"),
        split_accuracy(logits, test.target, *groups, samples="absent"),
        split_accuracy(logits, test.target, *groups, samples="seen", candidates="seen"),
        split_accuracy(logits, test.target, *groups, samples="absent", candidates="absent"),
        ausuc(test.logits, test.target, *groups),
        macro_f1(logits, test.target, split),
        nearest_class_mean_accuracy(*nearest, samples="seen"),
        nearest_class_mean_accuracy(*nearest, samples="absent"),
    )
    return dict(zip(COLUMNS, [*(100 * value.item() for value in values), gamma, cost], strict=True))


def macro_f1(logits: Tensor, target: Tensor, split: ClassSplit) -> Tensor:
    """Mean F1 of the classes that occur; rows that are neither seen nor absent never compete."""
    candidates = torch.tensor([*split.seen_classes, *split.absent_classes])
    predicted = candidates[logits[:, candidates].argmax(1)]
    scores = multiclass_f1_score(predicted, target, split.num_classes, average="none")
    return scores[target.unique()].mean()


def kept(file: Path, facts: dict[str, Any], compute: Callable[[], Rows]) -> Rows:
    """Read the scores of a finished run, or compute and write them."""
    if not file.exists():
        rows = compute()
        scratch = file.with_suffix(".tmp")
        scratch.write_text(json.dumps({"settings": facts, "rows": rows}, indent=1))
        os.replace(scratch, file)
    return json.loads(file.read_text())["rows"]


def folder_of(name: str, facts: dict[str, Any], args: argparse.Namespace) -> Path:
    """Make the folder of a run: another one for each setting, so that none goes on with the weights of another."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    folder = args.output / f"{name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def markdown(tables: dict[str, list[Rows]]) -> Iterator[str]:
    """One line for each pair and model, the mean over seeds with its standard deviation; and the mean over pairs."""
    yield f"| %; gamma in logits | model | {' | '.join(COLUMNS)} |"
    yield "| :-- | :-- |" + " --: |" * len(COLUMNS)
    if len(tables) > 1:
        of_seeds = zip(*tables.values(), strict=True)
        tables = {**tables, f"mean of {len(tables)}": [mean_of(pairs) for pairs in of_seeds]}
    for title, runs in tables.items():
        for name in runs[0]:
            cells = [cell([rows[name][column] for rows in runs], column) for column in COLUMNS]
            yield f"| {title} | {name} | {' | '.join(cells)} |"


def mean_of(tables: Sequence[Rows]) -> Rows:
    """Return the mean of the same rows."""
    return {
        name: {column: statistics.mean(rows[name][column] for rows in tables) for column in COLUMNS}
        for name in tables[0]
    }


def cell(values: Sequence[float], column: str) -> str:
    """Format a mean, and with several values their standard deviation."""
    digits = 2 if column == "gamma" else 1
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text
