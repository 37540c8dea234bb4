"""The toy example."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_calibft.analysis.toy_example import _pretrain, toy_example


def _reference_trajectory(steps, learning_rate, squeeze, samples, seed):
    """By torch's own modules, autograd and optimizer."""
    inputs, target, _, network = _pretrain(samples, seed)
    body, head = nn.Linear(2, 2, bias=False).double(), nn.Linear(2, 4).double()
    with torch.no_grad():
        body.weight.copy_(network.layer)
        head.weight.copy_(network.weight)
        head.bias.copy_(network.bias)
    inputs = inputs.clone()
    inputs[:, 1] *= squeeze
    optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=learning_rate)
    rows = []
    for _ in range(steps + 1):
        with torch.no_grad():
            features = body(inputs)
            logits = head(features)
        row = []
        for label in range(4):
            own, mine = logits[target == label], [0, 1] if label < 2 else [2, 3]
            row.append(
                (
                    *features[target == label].mean(0).tolist(),
                    own[:, label].mean().item(),
                    own[:, :2].max(1).values.mean().item(),
                    sum(sample.argmax().item() == label for sample in own) / samples,
                    sum(max(mine, key=sample.tolist().__getitem__) == label for sample in own) / samples,
                )
            )
        rows.append(row)
        optimizer.zero_grad()
        seen = target < 2
        nn.functional.cross_entropy(head(body(inputs[seen])), target[seen]).backward()
        optimizer.step()
    return torch.tensor(rows, dtype=torch.float64)


def test_the_trajectory_is_that_of_gradient_descent():
    arguments = (12, 0.1, 0.6, 7, 3)
    toy, expected = toy_example(*arguments), _reference_trajectory(*arguments)
    found = torch.cat(
        [
            toy.features,
            *(part.unsqueeze(2) for part in (toy.true_logit, toy.seen_logit, toy.accuracy, toy.own_accuracy)),
        ],
        2,
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (expected[0] != expected[-1]).any(1).all()


@pytest.mark.parametrize("seed", range(4))
def test_absent_features_come_along_while_their_logits_fall(seed):
    toy = toy_example(seed=seed)
    distance = (toy.features - toy.goal).norm(dim=2)
    assert (distance[-1] < 0.7 * distance[0]).all()  # of all classes
    assert toy.own_accuracy[-1, 2:].mean() > toy.own_accuracy[0, 2:].mean() + 0.05
    assert (toy.true_logit[-1, 2:] < toy.true_logit[0, 2:]).all()
    assert (toy.seen_logit[-1, 2:] > toy.seen_logit[0, 2:]).all()
    assert toy.accuracy[-1, 2:].mean() < toy.accuracy[0, 2:].mean() - 0.1
    assert toy.accuracy[-1, :2].mean() > 0.95 > toy.accuracy[0, :2].mean()


def test_it_draws_no_random_numbers():
    streams = torch.get_rng_state()
    toy_example(steps=1)
    assert torch.equal(torch.get_rng_state(), streams)


def test_errors():
    with pytest.raises(ValueError, match="`steps` to be at least 1, but got 0"):
        toy_example(steps=0)


def test_picture():
    toy = toy_example(steps=20)
    _, ax = toy.plot()
    assert len(ax.lines) == 12  # a path, its beginning and its goal for each class
    path = ax.lines[6]
    assert path.get_ydata().tolist() == toy.features[:, 2, 1].tolist()
    assert "absent class 2" in path.get_label()
