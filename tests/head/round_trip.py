"""Once around with a model: attach, probe, record, calibrate, train, detach, fold, and load into a fresh one."""

import copy

import numpy as np
import pytest
import torch

from lightning_calibft.head import attach, detach, fold, get_gamma, set_gamma
from lightning_calibft.head.offset import attached_heads
from lightning_calibft.head.output import get_logits
from lightning_calibft.head.probe import probe
from lightning_calibft.head.record import record_logits

NUM_CLASSES = 7
SEEN, ABSENT = [0, 1, 2], [3, 4, 5, 6]


def _run(model, x):
    return model(**x) if isinstance(x, dict) else model(x)


def _in_training(model, x):
    """Return the output of a training step's forward, each time with the same random numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        np.random.seed(0)  # some models of timm mix tokens with it
        output = _run(copy.deepcopy(model).train(), x)
    # Some return several: those of heads that are averaged in eval mode, or the auxiliary ones.
    return output if type(output) in (tuple, list) else get_logits(output)


def _assert_moved(model, x, raw, gamma):
    """The logits of the absent classes moved by gamma and the others did not."""
    logits = get_logits(_run(model, x))
    assert torch.equal(logits[:, SEEN], raw[:, SEEN])
    # A pair of heads is shifted twice and then averaged, which rounds.
    torch.testing.assert_close(logits[:, ABSENT], raw[:, ABSENT] + gamma, rtol=0, atol=1e-6 * gamma)
    return logits


@torch.no_grad()
def check(make, x, head=None, folds=True):
    """Go once around with what ``make`` builds and return the names of its heads."""
    model = make().eval()
    plain, keys, raw = copy.deepcopy(model), list(model.state_dict()), get_logits(_run(model, x))
    # Some models without pre-trained weights have logits of 1e9.
    gamma = max(1.0, raw.abs().max().item())

    attach(model, head)
    names = tuple(attached_heads(model))
    probe(lambda: _run(model, x), model)
    with record_logits(model) as recorded:
        _run(model, x)
    torch.testing.assert_close(recorded, [raw], rtol=0, atol=1e-6 * gamma)

    set_gamma(model, gamma, SEEN)
    calibrated = _assert_moved(model, x, raw, gamma)
    assert get_gamma(model) == gamma
    torch.testing.assert_close(_in_training(model, x), _in_training(plain, x), rtol=0, atol=0, equal_nan=True)

    assert list(detach(model).state_dict()) == keys
    assert torch.equal(get_logits(_run(model, x)), raw)

    set_gamma(model, gamma, SEEN, head=head)
    if not folds:
        with pytest.raises(ValueError, match="to fold gamma into"):
            fold(model)
        return names
    assert list(fold(model).state_dict()) == keys
    torch.testing.assert_close(get_logits(_run(model, x)), calibrated, rtol=0, atol=1e-5 * gamma)
    fresh = make().eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(get_logits(_run(fresh, x)), get_logits(_run(model, x)))
    return names


def check_with_whole_model(make, x, match):
    """The head of such a model is refused, with the remedy, and the remedy is right for all but folding."""
    with pytest.raises(ValueError, match=match):
        check(make, x)
    assert check(make, x, "forward", folds=False) == ("",)


def random_weights(make):
    """Draw all weights: initial ones may make all logits zero."""
    model = make()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * (2 / weight[0].numel()) ** 0.5)
    return model
