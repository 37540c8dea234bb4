"""The smallest example of what fine-tuning on some classes does to the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_calibft._arguments import check_integer, check_number, check_type
from lightning_calibft.analysis._axes import _AX_TYPE, _PLOT_OUT_TYPE, new_axis

SEEN, ABSENT = (0, 1), (2, 3)
_PRETRAINING_STEPS, _PRETRAINING_RATE = 2000, 0.3


@dataclass(frozen=True)
class ToyTrajectory:
    """What happened to four classes, of which 0 and 1 are fine-tuned on; ``T + 1`` rows, one before each step.

    Attributes:
        features: Mean feature of each class, of shape ``(T + 1, 4, 2)``.
        goal: Mean feature of each class in the domain of pre-training, of shape ``(4, 2)``, that the head knows.
        true_logit: Mean logit of the true class of each class' samples, of shape ``(T + 1, 4)``.
        seen_logit: Mean largest logit of a seen class, for each class' samples, of shape ``(T + 1, 4)``.
        accuracy: Accuracy of each class' samples among all classes, of shape ``(T + 1, 4)``.
        own_accuracy: The same among the two classes of its own group, seen or absent.
    """

    features: Tensor
    goal: Tensor
    true_logit: Tensor
    seen_logit: Tensor
    accuracy: Tensor
    own_accuracy: Tensor


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
        """One step of gradient descent on the mean cross-entropy over all four classes."""
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
    descent on classes 0 and 1 moves their features back towards where the head knows them, and since all features go
    through one layer, those of classes 2 and 3 come along: they can be told apart better than before. But their logits
    fall, and those of the seen classes rise: what the network predicts for them gets worse while their features get
    better. The idea is that of the toy example in Mai et al., "Fine-Tuning is Fine, if Calibrated", NeurIPS 2024.

    Args:
        steps: Number of steps ``T`` of fine-tuning.
        learning_rate: Of gradient descent, on all samples at once.
        squeeze: What the second coordinate is multiplied by in the new domain.
        samples_per_class: Number of samples of each class.
        seed: Of the samples. The global random state is not touched.

    Raises:
        ValueError: If ``steps`` or ``samples_per_class`` is less than 1.

    Example:
        >>> from lightning_calibft.analysis import toy_example
        >>> toy = toy_example()
        >>> distance = (toy.features - toy.goal).norm(dim=2)[:, 2:].mean(1)
        >>> bool(distance[-1] < distance[0] / 2)  # absent features come along,
        True
        >>> [round(toy.own_accuracy[t, 2:].mean().item(), 1) for t in (0, -1)]  # and are told apart better,
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
    rows = [_look(network, inputs, target)]
    for _ in range(steps):
        network = network.step(inputs[seen], target[seen], learning_rate)
        rows.append(_look(network, inputs, target))
    features, *rest = (torch.stack(column) for column in zip(*rows, strict=True))
    return ToyTrajectory(features, goal, *rest)


def _pretrain(samples_per_class: int, seed: int) -> tuple[Tensor, Tensor, Tensor, _Network]:
    """Samples, their classes, the mean feature of each class and the network that has learned them all."""
    generator = torch.Generator().manual_seed(seed)
    # Around a point far from the origin: all features have a part in common, as those after a ReLU do.
    angle = torch.tensor([45.0, 135.0, 225.0, 315.0], dtype=torch.float64).deg2rad()
    centres = torch.stack([angle.cos(), angle.sin()], 1) + 2
    target = torch.arange(4).repeat_interleave(samples_per_class)
    inputs = centres[target] + 0.25 * torch.randn(len(target), 2, generator=generator, dtype=torch.float64)
    network = _Network(torch.eye(2).double(), torch.zeros(4, 2).double(), torch.zeros(4).double())
    for _ in range(_PRETRAINING_STEPS):
        network = network.step(inputs, target, _PRETRAINING_RATE)
    return inputs, target, _class_means(network.features(inputs)), network


def _class_means(values: Tensor) -> Tensor:
    """Mean of each of the four equal parts."""
    return values.unflatten(0, (4, -1)).mean(1)


def _look(network: _Network, inputs: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    logits = network.logits(inputs)
    own = torch.cat([logits[:, :2].argmax(1)[target < 2], logits[:, 2:].argmax(1)[target >= 2] + 2])
    return (
        _class_means(network.features(inputs)),
        _class_means(logits.gather(1, target.unsqueeze(1)).squeeze(1)),
        _class_means(logits[:, :2].max(1).values),
        _class_means((logits.argmax(1) == target).double()),
        _class_means((own == target).double()),
    )


def plot_toy_example(trajectory: ToyTrajectory, *, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
    """Draw the way of each class' mean feature to where the head knows it, and what its logit does meanwhile.

    Args:
        trajectory: From :func:`toy_example`.
        ax: A matplotlib axis to draw on. ``None``: a new figure.

    Returns:
        Figure and axis; the figure is ``None`` if ``ax`` was given.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    check_type("trajectory", trajectory, ToyTrajectory)
    figure, axis = new_axis(ax)
    for label in (*SEEN, *ABSENT):
        path, logit = trajectory.features[:, label], trajectory.true_logit[:, label]
        group, style = ("seen", "-") if label in SEEN else ("absent", "--")
        text = f"{group} class {label}: logit {logit[0]:.1f} to {logit[-1]:.1f}"
        (line,) = axis.plot(*path.T.numpy(), style, label=text)
        axis.plot(*path[0].numpy(), "o", color=line.get_color())
        axis.plot(*trajectory.goal[label].numpy(), "*", color=line.get_color(), markersize=12)
    axis.set(xlabel="First feature", ylabel="Second feature", title="From the dot towards the star")
    axis.legend(loc="lower left", fontsize="small")
    return figure, axis
