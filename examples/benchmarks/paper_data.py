"""Options, pre-trained models and images of the paper's benchmarks.

The authors' transforms are not published. Here images are cropped at random and flipped; for tests they are resized to
256/224 of the size and cropped in the middle.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from protocol import METHODS, TargetData
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder

from lightning_calibft import ClassSplit
from lightning_calibft.checkpoint.timm_model import load_raw

EVALUATION_CROP = 224 / 256


def add_options(parser: argparse.ArgumentParser, epochs: int, weight_decay: float) -> None:
    """Add what all of the paper's benchmarks can be told."""
    parser.add_argument("--data", type=Path, required=True, help="folder of the images")
    parser.add_argument("--image-lists", type=Path, help="folder of the authors' lists of training and testing images")
    parser.add_argument(
        "--weights", type=existing_file, help="file of pre-trained weights; none: timm downloads its own"
    )
    parser.add_argument("--image-size", type=int, default=224, help="(%(default)s)")
    parser.add_argument("--epochs", type=int, default=epochs, help="(%(default)s)")
    parser.add_argument("--iterations", type=int, default=500, help="of an epoch (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the head (%(default)s)")
    parser.add_argument("--weight-decay", type=float, default=weight_decay, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of splits and training (%(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="number of runs, from --seed on (%(default)s)")
    parser.add_argument(
        "--methods", nargs="*", choices=[*METHODS, "all"], default=[], help="ways besides ordinary fine-tuning"
    )
    parser.add_argument("--local-models", type=int, default=4, help="of each epoch of LOLSGD (%(default)s)")
    parser.add_argument("--eval", type=existing_file, help="only score this checkpoint that the authors publish")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="(%(default)s)")
    parser.add_argument("--accelerator", default="auto", help="as of Lightning's Trainer (%(default)s)")
    parser.add_argument("--precision", default="32-true", help="likewise (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="what is finished is kept there")


def existing_file(name: str) -> Path:
    if not Path(name).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {name}")
    return Path(name)


def settings(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Return all that the weights and scores of a run depend on."""
    elsewhere = {"workers", "accelerator", "output", "weights", "source", "target", "seen_classes", "seeds"}
    elsewhere |= {"methods", "local_models", "eval", "source_weights", "traps", "stream"}
    facts = {name: str(value) for name, value in vars(args).items() if name not in elsewhere}
    digest = args.weights and hashlib.sha256(args.weights.read_bytes()).hexdigest()
    return {**facts, "weights": digest, **more}


def of_each_seed(args: argparse.Namespace) -> list[argparse.Namespace]:
    """Return the options of each run."""
    methods = list(METHODS) if "all" in args.methods else args.methods
    seeds = range(args.seed, args.seed + args.seeds)
    return [argparse.Namespace(**{**vars(args), "seed": seed, "methods": methods}) for seed in seeds]


def load_net(args: argparse.Namespace) -> nn.Module:
    """Build the timm model ``--model`` with the weights of a file, or with those that timm downloads."""
    try:
        if args.weights is None:
            return timm.create_model(args.model, pretrained=True).eval()
        net, *_ = load_raw(args.model, args.weights)
        return net
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"Cannot load --model {args.model} --weights {args.weights}: {error}") from error


def transforms_of(net: nn.Module, image_size: int) -> tuple[Any, Any]:
    """Return transforms for training (random crop and flip) and for tests, normalized as timm knows for the model."""
    config = resolve_model_data_config(net, {"img_size": image_size, "crop_pct": EVALUATION_CROP})
    return make_transforms(config)


def make_transforms(config: Mapping[str, Any]) -> tuple[Any, Any]:
    return create_transform(**config, is_training=True, color_jitter=None), create_transform(**config)


def open_folder(root: Path, rows_of: Callable[[list[str]], Mapping[int, int]], transform: Any = None) -> ImageFolder:
    """Open a folder with one folder of images a class, whose labels are rows of the head."""
    try:
        folder = ImageFolder(str(root), transform=transform)
    except FileNotFoundError as error:
        raise SystemExit(f"--data: expected {root} to hold one folder of images a class: {error}") from error
    try:
        rows = rows_of(folder.classes)
    except ValueError as error:  # a folder is no class
        raise SystemExit(f"--data: {root}: {error}") from error
    folder.samples = [(path, rows[number]) for path, number in folder.samples]
    folder.targets = [row for _, row in folder.samples]
    return folder


def check_names(root: Path, names: Iterable[str], needed: Iterable[str], remedy: str) -> None:
    """Leave the program if classes that are needed have no folder."""
    if missing := sorted(set(needed) - set(names)):
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise SystemExit(f"--data: {root} has no folder of {shown}. {remedy}")


def random_split(rows: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Divide each class at random: positions of ``share`` of its images, and of the others; at least one each."""
    generator = torch.Generator().manual_seed(seed)
    labels, train, test = torch.tensor(rows), [], []
    for row in labels.unique():
        positions = (labels == row).nonzero().flatten()
        positions = positions[torch.randperm(len(positions), generator=generator)].tolist()
        number = min(max(1, round(share * len(positions))), len(positions) - 1)
        train += positions[:number]
        test += positions[number:]
    return sorted(train), sorted(test)


def listed_split(folder: ImageFolder, lists: Path, name: str) -> tuple[list[int], list[int]]:
    """Read the division from the authors' files ``name_training.txt`` and ``name_testing.txt``."""
    known = {Path(path).parts[-2:]: position for position, (path, _) in enumerate(folder.samples)}
    parts = []
    for part in ("training", "testing"):
        try:
            lines = (lists / f"{name}_{part}.txt").read_text().splitlines()
        except OSError as error:
            raise SystemExit(f"--image-lists: {error}") from error
        files = [Path(line.rsplit(" ", 1)[0]).parts[-2:] for line in lines if line.strip()]
        if missing := [file for file in files if file not in known]:
            raise SystemExit(
                f"--image-lists: {folder.root} lacks {'/'.join(missing[0])}, which {name}_{part}.txt lists."
            )
        parts.append([known[file] for file in files])
    return parts[0], parts[1]


def target_data(
    split: ClassSplit,
    order: Sequence[int],
    folders: tuple[Dataset, Dataset],
    rows: Sequence[int],
    train: Sequence[int],
    test: Dataset,
    args: argparse.Namespace,
) -> TargetData:
    """Take the training images out of all.

    Args:
        split: Seen and absent classes.
        order: The seen classes in the authors' order.
        folders: The images as they are trained on, and the same images as they are tested on.
        rows: The class of each.
        train: Positions of the images to train on.
        test: The test images.
        args: The options of the script.
    """
    augmented, clean = (Subset(folder, train) for folder in folders)
    return TargetData(split, order, augmented, clean, [rows[position] for position in train], test, args)
