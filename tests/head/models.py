"""Small classifiers of each kind that the tests share."""

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


def inputs(n=4):
    return torch.randn(n, 3, 2, 2, generator=torch.Generator().manual_seed(0))
