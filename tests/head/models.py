"""Small classifiers of each kind that the tests share."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

NUM_CLASSES = 5
SEEN = [0, 2]
ABSENT = [1, 3, 4]
GAMMA = 2.5
SHIFT = torch.tensor([0.0, GAMMA, 0.0, GAMMA, GAMMA])


class Plain(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.fc = nn.Linear(8, NUM_CLASSES, bias=bias)

    def forward(self, x):
        return self.fc(self.body(x))


class Convolutional(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 2)
        self.classifier = nn.Conv2d(8, NUM_CLASSES, 1, bias=bias)

    def forward(self, x):
        return self.classifier(self.body(x)).flatten(1)


class Distilled(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
        self.head = nn.Linear(8, NUM_CLASSES)
        self.head_dist = nn.Linear(8, NUM_CLASSES)

    def forward(self, x):
        x = self.body(x)
        return (self.head(x) + self.head_dist(x)) / 2


AFTER = {
    "nothing": lambda self, z, h: z,
    "log_softmax": lambda self, z, h: z.log_softmax(-1),
    "softmax": lambda self, z, h: z.softmax(-1),
    "tuple": lambda self, z, h: (z, h),
    "list": lambda self, z, h: ["text", z],
    "mapping": lambda self, z, h: {"loss": z.sum(), "logits": z},
    "attribute": lambda self, z, h: SimpleNamespace(loss=z.sum(), logits=z),
    "float32": lambda self, z, h: z.float(),
    "auxiliary": lambda self, z, h: self.real(h),
    "temperature": lambda self, z, h: z / 2,
    "relu": lambda self, z, h: z.relu(),
    "sigmoid": lambda self, z, h: z.sigmoid(),
    "softcap": lambda self, z, h: 3 * torch.tanh(z / 3),
    "functional": lambda self, z, h: F.linear(h, self.classifier.weight, self.classifier.bias),
    "twice": lambda self, z, h: (z + self.classifier(h)) / 2,
    "narrowed": lambda self, z, h: z[:, :3],
    "added": lambda self, z, h: z + self.real(h),
    "pooled": lambda self, z, h: self.classifier(h[:, None].expand(-1, 2, -1)).mean(1),
    "nan": lambda self, z, h: z * float("nan"),
    "none": lambda self, z, h: None,
}


class After(nn.Module):
    """A head with something behind it."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
        self.classifier = nn.Linear(8, NUM_CLASSES)
        self.real = nn.Linear(8, NUM_CLASSES)

    def forward(self, x):
        h = self.body(x)
        # The head does not run before these two: one never calls it, the other calls it itself.
        z = None if self.kind in ("functional", "pooled") else self.classifier(h)
        return AFTER[self.kind](self, z, h)


class Wrapper(nn.Module):
    """As a LightningModule holds its model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


class CosineLinear(nn.Module):
    """A head that is no `Linear`."""

    def __init__(self, in_features, out_features, scale=5.0):
        super().__init__()
        self.out_features = out_features
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(out_features, in_features))

    def forward(self, x):
        return self.scale * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class SplitCosineLinear(nn.Module):
    """A head of two, for old and new classes, as in class-incremental learning."""

    def __init__(self, in_features, first, second):
        super().__init__()
        self.out_features = first + second
        self.fc1 = CosineLinear(in_features, first, scale=1.0)
        self.fc2 = CosineLinear(in_features, second, scale=1.0)
        self.sigma = nn.Parameter(torch.tensor(5.0))

    def forward(self, x):
        return self.sigma * torch.cat((self.fc1(x), self.fc2(x)), dim=1)


def encoder_of_width(width):
    """An encoder that tells the number of its features, without tensors of its own."""
    encoder = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU())
    encoder.out_features = width
    return encoder


class Projected(CosineLinear):
    """A custom head with a layer in it."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.project = nn.Linear(in_features, in_features)


NamedLogits = namedtuple("NamedLogits", "features logits")
NamedPair = namedtuple("NamedPair", "scores features")


@dataclass
class Output:
    logits: torch.Tensor
    features: torch.Tensor


@dataclass(frozen=True)
class FrozenOutput:
    features: torch.Tensor
    logits_per_image: torch.Tensor


# What a model returns of its logits and features.
OUTPUTS = {
    "tensor": lambda z, h: z,
    "tuple": lambda z, h: (z, h),
    "loss first": lambda z, h: (z.sum(), z, h),
    "list": lambda z, h: ["text", z, h],
    "named logits": lambda z, h: NamedLogits(h, z),
    "named tuple": lambda z, h: NamedPair(z, h),
    "dict": lambda z, h: {"features": h, "logits": z},
    "ordered dict": lambda z, h: OrderedDict(features=h, logits=z),
    "dataclass": lambda z, h: Output(z, h),
    "frozen dataclass": lambda z, h: FrozenOutput(h, z),
    "namespace": lambda z, h: SimpleNamespace(features=h, logits=z),
    "nested": lambda z, h: SimpleNamespace(features=h, logits=(z, h)),
}


class Prototypes(nn.Module):
    """A classifier without any layer that could be its head."""

    def __init__(self, kind="tensor"):
        super().__init__()
        self.kind = kind
        self.num_classes = NUM_CLASSES
        self.body = nn.Conv2d(3, 8, 2)
        self.prototypes = nn.Parameter(torch.randn(NUM_CLASSES, 8))

    def forward(self, x):
        h = self.body(x).flatten(1)
        return OUTPUTS[self.kind](h @ self.prototypes.T, h)


def logits_by_hand(kind, output):
    """Pick the logits by hand."""
    return {
        "tensor": lambda: output,
        "tuple": lambda: output[0],
        "loss first": lambda: output[1],
        "list": lambda: output[1],
        "named logits": lambda: output.logits,
        "named tuple": lambda: output.scores,
        "dict": lambda: output["logits"],
        "ordered dict": lambda: output["logits"],
        "dataclass": lambda: output.logits,
        "frozen dataclass": lambda: output.logits_per_image,
        "namespace": lambda: output.logits,
        "nested": lambda: output.logits[0],
    }[kind]()


def tensors_of(output):
    """Return all tensors of an output, in a fixed order."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = vars(output).values() if hasattr(output, "__dict__") and not isinstance(output, dict) else output
    values = output.values() if isinstance(output, dict) else values
    return [part for value in values if not isinstance(value, str) for part in tensors_of(value)]


class Scaled(nn.Module):
    """A model whose logits no layer gives."""

    def __init__(self, kind="tensor"):
        super().__init__()
        self.kind = kind
        self.num_classes = NUM_CLASSES
        self.model = Plain()

    def forward(self, x):
        return OUTPUTS[self.kind](2 * self.model(x), x)


class Then(nn.Sequential):
    """A model with something behind it."""

    def __init__(self, *modules):
        super().__init__(*modules)
        self.num_classes = NUM_CLASSES


def inputs(n=4):
    return torch.randn(n, 3, 2, 2, generator=torch.Generator().manual_seed(0))
