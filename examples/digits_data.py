"""Scikit-learn's digits in two domains: clean images to pre-train on, rotated and textured ones to fine-tune on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Generator, Tensor
from torch.utils.data import TensorDataset

NUM_CLASSES = 10
IMAGE_SIZE = 16
SHARES = {"source": 0.45, "target_train": 0.25, "held_out": 0.05, "target_test": 0.25}


@dataclass(frozen=True)
class DigitData:
    """The parts of the data; no base image is in two of them. Each part holds all ten classes."""

    seen_classes: list[int]
    """The half of the classes to fine-tune on. The other half is absent."""
    source: TensorDataset
    target_train: TensorDataset
    held_out: TensorDataset
    target_test: TensorDataset


def make_data(seed: int, target: Callable[[Tensor, Generator], Tensor] | None = None) -> DigitData:
    """Draw the parts, the seen classes and the distortions, all determined by ``seed``.

    Args:
        seed: Of all random numbers.
        target: What makes images of the domain to fine-tune for. ``None``: ``target_domain``.
    """
    generator = torch.Generator().manual_seed(seed)
    digits = load_digits()
    small = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    images = F.interpolate(small, size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    labels = torch.from_numpy(digits.target).long()
    seen_classes = sorted(torch.randperm(NUM_CLASSES, generator=generator)[: NUM_CLASSES // 2].tolist())
    parts = {
        name: TensorDataset(
            (source_domain if name == "source" else target or target_domain)(images[rows], generator), labels[rows]
        )
        for name, rows in split_rows(len(labels), generator).items()
    }
    return DigitData(seen_classes, **parts)


def split_rows(num_images: int, generator: Generator) -> dict[str, Tensor]:
    """Deal the base images out: each row goes to exactly one part."""
    sizes = [round(share * num_images) for share in SHARES.values()]
    sizes[-1] = num_images - sum(sizes[:-1])
    return dict(zip(SHARES, torch.randperm(num_images, generator=generator).split(sizes), strict=True))


def keep_classes(dataset: TensorDataset, classes: list[int]) -> TensorDataset:
    """Keep only the samples of ``classes``."""
    images, labels = dataset.tensors
    kept = torch.isin(labels, torch.tensor(classes))
    return TensorDataset(images[kept], labels[kept])


def source_domain(images: Tensor, generator: Generator) -> Tensor:
    """Upright digits on black, a little jitter and noise. Shapes: ``(N, 1, H, W)`` in and out."""
    return add_noise(move(images, generator), generator)


def target_domain(images: Tensor, generator: Generator) -> Tensor:
    """Digits rotated by 25 degrees, shifted, shrunk, and blended with a smooth random texture."""
    moved = move(images, generator, degrees=25.0, shift=(0.1, -0.06), scale=0.9)
    coarse = torch.rand((len(images), 1, 4, 4), generator=generator)
    texture = F.interpolate(coarse, size=IMAGE_SIZE, mode="bicubic", align_corners=False).clamp(0, 1)
    return add_noise(0.8 * moved + 0.2 * texture, generator)


def add_noise(images: Tensor, generator: Generator) -> Tensor:
    """Add 5 % of Gaussian noise."""
    return (images + 0.05 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def move(
    images: Tensor,
    generator: Generator,
    degrees: float = 0.0,
    shift: tuple[float, float] = (0.0, 0.0),
    scale: float = 1.0,
) -> Tensor:
    """Rotate, shift (in halves of the image's width) and scale, each with a small jitter of its own per image."""
    jitter = 2 * torch.rand((len(images), 4), generator=generator) - 1
    angle = torch.deg2rad(degrees + 5 * jitter[:, 0])
    size = scale + 0.05 * jitter[:, 1]
    x, y = shift[0] + 0.05 * jitter[:, 2], shift[1] + 0.05 * jitter[:, 3]
    cos, sin = angle.cos() / size, angle.sin() / size
    theta = torch.stack([cos, -sin, x, sin, cos, y], dim=1).view(-1, 2, 3)
    return F.grid_sample(images, F.affine_grid(theta, list(images.shape), align_corners=False), align_corners=False)
