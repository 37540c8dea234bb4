"""Fine-tuning loops with Lightning Fabric."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_calibft import calibrate
from tests.helpers.references import _reference_gap

NUM_CLASSES, SEEN, ABSENT = 6, [0, 2, 3], [1, 4, 5]
# Of 41 samples the first process reads one more, and so, in batches of 4, a batch more.
KINDS = {"norm": {}, "plain": {"norm": False}}


class Net(nn.Module):
    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU())
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, x):
        return self.fc(self.body(x))


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    target = torch.tensor(SEEN)[torch.randint(3, (41,), generator=generator)]
    inputs = torch.randn(41, 5, generator=generator)
    inputs[:, 0] += target
    return TensorDataset(inputs, target)


def fine_tune(fabric, norm: bool = True, in_between: bool = True):
    torch.manual_seed(0)
    model = Net(norm)
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.1))
    loader = fabric.setup_dataloaders(DataLoader(samples(), 4, shuffle=True, drop_last=True))
    orders = []
    for epoch in range(3):
        orders.append([])
        for inputs, target in loader:
            orders[-1] += target.tolist()
            optimizer.zero_grad()
            fabric.backward(nn.functional.cross_entropy(wrapped(inputs), target))
            optimizer.step()
        if epoch == 1 and in_between:  # in the middle of training, which goes on as without it
            calibrate(wrapped, loader, SEEN, progress=False)
    state, random = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    result = calibrate(wrapped, loader, SEEN, progress=False)
    assert torch.equal(torch.get_rng_state(), random)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in state.items() if "calibration" not in key)
    return SimpleNamespace(result=result, model=model, wrapped=wrapped, orders=orders)


@torch.no_grad()
def reference(model):
    inputs, target = samples().tensors
    shift = model.fc.absent_class_calibration
    logits = model.eval()(inputs) - shift.offset * shift.mask
    return _reference_gap(logits, target, SEEN, ABSENT)
