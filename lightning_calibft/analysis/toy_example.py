"""A toy example of what fine-tuning on some classes does to the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_calibft._arguments import check_integer, check_number
from lightning_calibft.plotting import _AX_TYPE, _PLOT_OUT_TYPE, COLORS, MARKERS, add_legend, new_axis

_PRETRAINING_STEPS, _PRETRAINING_RATE = 2000, 0.3


@dataclass(frozen=True)
class ToyTrajectory:
    """The course of fine-tuning on classes 0 and 1 of four classes, with ``T + 1`` rows: before and after each step.

    Attributes:
        features: Mean feature of each class, of shape ``(T + 1, 4, 2)``.
        goal: Mean feature of each class in the domain of pre-training, for which the head was trained, ``(4, 2)``.
        true_logit: Mean logit of the true class, for the samples of each class, of shape ``(T + 1, 4)``.
        seen_logit: Mean largest logit of a seen class, for the samples of each class, of shape ``(T + 1, 4)``.
        accuracy: Accuracy among all classes, for the samples of each class, of shape ``(T + 1, 4)``.
        own_accuracy: Accuracy among the two classes of the same group, seen or absent, of shape ``(T + 1, 4)``.
    """

    features: Tensor
    goal: Tensor
    true_logit: Tensor
    seen_logit: Tensor
    accuracy: Tensor
    own_accuracy: Tensor

    def plot(self, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
        """Draw the path of the mean feature of each class from its start (dot or triangle) towards its goal (star).

        Returns a new figure and its axis, or ``None`` and ``ax`` if it was given.
        """
        figure, axis = new_axis(ax)
        for label, group, style in ((0, "seen", "-"), (1, "seen", "--"), (2, "absent", "-"), (3, "absent", "--")):
            path, logit, color = self.features[:, label], self.true_logit[:, label], COLORS[group]
            text = f"{group} class {label}: logit {logit[0]:.1f} to {logit[-1]:.1f}"
            axis.plot(*path.T.numpy(), style, color=color, label=text)
            axis.plot(*path[0].numpy(), MARKERS[group], color=color)
            axis.plot(*self.goal[label].numpy(), "*", color=color, markersize=12)
        axis.set(xlabel="First feature", ylabel="Second feature")
        axis.set_title("Each class moves from its marker towards its star")
        add_legend(axis)
        return figure, axis


@dataclass
class _Network:
    """A linear layer that all classes share, and a linear head."""

    layer: Tensor
    weight: Tensor
    bias: Tensor

    def features(self, inputs: Tensor) -> Tensor:
        return inputs @ self.layer.T

    def logits(self, inputs: Tensor) -> Tensor:
        return self.features(inputs) @ self.weight.T + self.bias

    def step(self, inputs: Tensor, target: Tensor, learning_rate: float) -> _Network:
        """Take one step of gradient descent on the mean cross-entropy over all four classes."""
        error = (self.logits(inputs).softmax(1) - F.one_hot(target, 4)) / len(target)
        return _Network(
            self.layer - learning_rate * (error @ self.weight).T @ inputs,
            self.weight - learning_rate * error.T @ self.features(inputs),
            self.bias - learning_rate * error.sum(0),
        )


def toy_example(
    steps: int = 500, learning_rate: float = 0.05, squeeze: float = 0.4, samples_per_class: int = 40, seed: int = 0
) -> ToyTrajectory:
    """Fine-tune a linear layer and a linear head on two of four classes of points in the plane.

    Both are pre-trained on all four classes. Then the domain changes: the plane is squeezed along one axis. Gradient
    descent on classes 0 and 1 moves their features back to where the head expects them. All features go through the
    same layer, so those of classes 2 and 3 move along and become easier to tell apart. But the logits of classes 2 and
    3 fall while those of the seen classes rise, so their predictions get worse while their features get better. The
    idea is that of the toy example in Mai et al., "Fine-Tuning is Fine, if Calibrated", NeurIPS 2024.

    Args:
        steps: Number of steps ``T`` of fine-tuning.
        learning_rate: Learning rate of gradient descent, which uses all samples in each step.
        squeeze: Factor of the second coordinate in the new domain.
        samples_per_class: Number of samples of each class.
        seed: Seed of the samples. The global random state does not change.

    Raises:
        ValueError: If ``steps`` or ``samples_per_class`` is less than 1.

    Example:
        >>> from lightning_calibft.analysis import toy_example
        >>> toy = toy_example()
        >>> distance = (toy.features - toy.goal).norm(dim=2)[:, 2:].mean(1)
        >>> bool(distance[-1] < distance[0] / 2)  # absent features move along,
        True
        >>> [round(toy.own_accuracy[t, 2:].mean().item(), 1) for t in (0, -1)]  # and become easier to tell apart,
        [0.8, 1.0]
        >>> bool((toy.true_logit[-1, 2:] < toy.true_logit[0, 2:]).all())  # but their logits fall,
        True
        >>> [round(toy.accuracy[t, 2:].mean().item(), 1) for t in (0, -1)]  # below those of the seen classes
        [0.8, 0.3]
    """
    check_integer("steps", steps, least=1)
    check_integer("samples_per_class", samples_per_class, least=1)
    check_integer("seed", seed)
    learning_rate, squeeze = check_number("learning_rate", learning_rate), check_number("squeeze", squeeze)
    source, target, goal, network = _pretrain(samples_per_class, seed)
    inputs, seen = source * source.new_tensor([1.0, squeeze]), target < 2
    rows = [_measure(network, inputs, target)]
    for _ in range(steps):
        network = network.step(inputs[seen], target[seen], learning_rate)
        rows.append(_measure(network, inputs, target))
    features, *rest = (torch.stack(column) for column in zip(*rows, strict=True))
    return ToyTrajectory(features, goal, *rest)


def _pretrain(samples_per_class: int, seed: int) -> tuple[Tensor, Tensor, Tensor, _Network]:
    """Return samples, their classes, the mean feature of each class, and a network trained on all of them."""
    generator = torch.Generator().manual_seed(seed)
    # Around a point far from the origin, so that all features have a part in common, as after a ReLU.
    angle = torch.tensor([45.0, 135.0, 225.0, 315.0], dtype=torch.float64).deg2rad()
    centers = torch.stack([angle.cos(), angle.sin()], 1) + 2
    target = torch.arange(4).repeat_interleave(samples_per_class)
    inputs = centers[target] + 0.25 * torch.randn(len(target), 2, generator=generator, dtype=torch.float64)
    network = _Network(torch.eye(2).double(), torch.zeros(4, 2).double(), torch.zeros(4).double())
    for _ in range(_PRETRAINING_STEPS):
        network = network.step(inputs, target, _PRETRAINING_RATE)
    return inputs, target, _class_means(network.features(inputs)), network


def _class_means(values: Tensor) -> Tensor:
    """Return the mean of each quarter of the rows."""
    return values.reshape(4, -1, *values.shape[1:]).mean(1)


def _measure(network: _Network, inputs: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    logits = network.logits(inputs)
    own = torch.cat([logits[:, :2].argmax(1)[target < 2], logits[:, 2:].argmax(1)[target >= 2] + 2])
    return (
        _class_means(network.features(inputs)),
        _class_means(logits.gather(1, target.unsqueeze(1)).squeeze(1)),
        _class_means(logits[:, :2].max(1).values),
        _class_means((logits.argmax(1) == target).double()),
        _class_means((own == target).double()),
    )
