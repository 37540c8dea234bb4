import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_calibft import calibrate
from lightning_calibft.head import attach, detach, set_gamma
from lightning_calibft.head.probe import gives_output, is_proved, probe
from lightning_calibft.head.record import record_logits

from .models import GAMMA, NUM_CLASSES, SEEN, Convolutional, Distilled, Plain, inputs


def prove(model):
    x = inputs()
    probe(lambda: model(x), model)
    assert is_proved(model)
    return model


def run(model):
    with record_logits(model) as records:
        output = model(inputs())
    return records[0], output


@pytest.mark.parametrize("model_class", [Plain, Convolutional, Distilled])
def test_a_head_that_passes_is_proved_and_keeps_its_keys(model_class):
    model = attach(model_class())
    keys = list(model.state_dict())
    assert not is_proved(model)
    prove(model)
    assert list(model.state_dict()) == keys
    set_gamma(model, GAMMA, SEEN)
    model.load_state_dict(model.state_dict())
    model.half().float().eval().train()
    assert is_proved(model)


def test_a_head_that_fails_is_not():
    class Scaled(Plain):
        def forward(self, x):
            return 2 * super().forward(x)

    model, x = attach(Scaled()), inputs()
    with pytest.raises(ValueError, match="moves them by 2 times"):
        probe(lambda: model(x), model)
    assert not is_proved(model)


def replaced_body(model):
    name, body = next(iter(model.named_children()))
    setattr(model, name, copy.deepcopy(body))


def another_module(model):
    model.temperature = nn.Identity()


def another_class(model):
    model.__class__ = type("Changed", (type(model),), {})


def a_new_calibration(model):
    attach(detach(model))


@pytest.mark.parametrize("change", [replaced_body, another_module, another_class, a_new_calibration])
def test_another_structure_is_not_proved(change):
    model = prove(attach(Plain()))
    change(model)
    assert not is_proved(model)
    prove(model)


def test_part_of_a_proved_model_is_not_proved():
    assert not is_proved(prove(attach(Plain())).fc)


def test_no_model_without_a_calibration_is_proved():
    assert not is_proved(Plain())


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_not_proved(copy_of):
    model = prove(attach(Plain()))
    copied = copy_of(model)
    assert not is_proved(copied)
    assert is_proved(model)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("model_class", [Plain, Convolutional, Distilled])
@pytest.mark.parametrize("after", [lambda x: x, lambda x: x.softmax(-1), lambda x: x.log_softmax(-1), lambda x: (x, 0)])
def test_the_output_that_the_head_gives(model_class, calibrated, after):
    class Model(model_class):
        def forward(self, x):
            return after(super().forward(x))

    model = attach(Model().eval())
    if calibrated:
        set_gamma(model, GAMMA, SEEN)
    logits, output = run(model)
    assert gives_output(model, logits, output)
    assert not gives_output(model, logits + torch.eye(NUM_CLASSES)[0], output)


@pytest.mark.parametrize("output", ["text", None, torch.zeros(2, NUM_CLASSES + 1), torch.zeros(2, NUM_CLASSES).long()])
def test_other_output_is_not_given_by_the_head(output):
    assert not gives_output(attach(Plain()), torch.zeros(2, NUM_CLASSES), output)


def test_training_mode_has_no_gamma():
    model = set_gamma(Plain(), GAMMA, SEEN)
    assert gives_output(model, *run(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = set_gamma(nn.Linear(16, 8), GAMMA, [0, 1, 2]).to(dtype).eval()
    x = 10 * torch.randn(32, 16).to(dtype)
    with record_logits(model) as records:
        output = model(x)
    assert gives_output(model, records[0], output)
    assert not gives_output(model, records[0], 1.5 * output)


class Counted(nn.Module):
    """Counts its forwards, and may multiply its logits by a learned scale that is 1 in the beginning."""

    def __init__(self, scaled=False):
        super().__init__()
        self.fc = nn.Linear(8, NUM_CLASSES)
        self.scale = nn.Parameter(torch.zeros(()))
        self.scaled = scaled

    def forward(self, x):
        forwards.append(len(x))
        return self.fc(x) * self.scale.exp() if self.scaled else self.fc(x)


forwards: list[int] = []


def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 8, generator=generator), torch.arange(n) % 2) for n in (0, 6, 8)]


def calibrated(model):
    forwards.clear()
    return calibrate(model, batches(), [0, 1], progress=False).gamma


def test_a_pass_over_a_proved_model_makes_no_forward_of_its_own():
    model = Counted()
    first = calibrated(model)
    assert forwards == [6, 4, 4, 6, 8]
    assert calibrated(model) == first
    assert forwards == [6, 8]
    with torch.no_grad():
        model.fc.weight.mul_(2)
    assert calibrated(model) != first
    assert forwards == [6, 8]
    model.fc = copy.deepcopy(model.fc)
    calibrated(model)
    assert forwards == [6, 4, 4, 6, 8]


def test_a_scale_that_was_one_when_the_head_was_proved_is_refused_after_training():
    model = Counted(scaled=True)
    gamma = calibrated(model)
    optimizer = torch.optim.SGD([model.scale], lr=1)
    x, target = batches()[1]
    nn.functional.cross_entropy(model(x), target).backward()
    optimizer.step()
    assert model.scale.abs() > 0.01
    with pytest.raises(ValueError, match="Something after it scales, clips or replaces its output"):
        calibrated(model)
    assert forwards[:3] == [6, 6, 4]
    with torch.no_grad():
        model.scale.zero_()
    assert calibrated(model) == gamma


def test_a_bias_after_the_head_that_was_zero_is_refused_after_training():
    class Shifted(Counted):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(NUM_CLASSES))

        def forward(self, x):
            return super().forward(x) + self.shift

    model = Shifted()
    calibrated(model)
    with torch.no_grad():
        model.shift[0] = 1
    with pytest.raises(ValueError, match="Something is added after it"):
        calibrated(model)


def test_heads_that_are_weighed_anew_are_recorded_anew():
    class Weighed(Distilled):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            x = x.flatten(1)[:, :8]
            return self.weight * self.head(x) + (1 - self.weight) * self.head_dist(x)

    def gamma_of(model):
        data = [(inputs(8), torch.arange(8) % 2) for _ in range(2)]
        return calibrate(model, data, [0, 1], progress=False).gamma

    torch.manual_seed(0)
    model = Weighed()
    model.head, model.head_dist = nn.Linear(8, NUM_CLASSES), nn.Linear(8, NUM_CLASSES)
    gamma_of(model)
    with torch.no_grad():
        model.weight.fill_(0.9)
    expected = gamma_of(detach(copy.deepcopy(model)))
    assert gamma_of(model) == pytest.approx(expected, abs=1e-6)


def test_a_proved_model_is_scripted_traced_and_compiled():
    model, x = prove(set_gamma(Plain(), GAMMA, SEEN)).eval(), inputs()
    expected = model(x)
    for made in (torch.jit.script(model), torch.jit.trace(model, x), torch.compile(model, backend="eager")):
        torch.testing.assert_close(made(x), expected)
