"""What the probe says of whole models, and when it offers them."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_calibft.head import attach, detach
from lightning_calibft.head.probe import probe

from .models import NUM_CLASSES, Plain, Scaled, Then, inputs


@pytest.mark.parametrize("head", ["forward", "0.forward"])
def test_a_model_that_gives_probabilities_is_refused(head):
    model, x = Then(Scaled(), nn.Softmax(-1)), inputs()
    attach(model, head=head)
    if head == "0.forward":
        return probe(lambda: model(x), model)
    with pytest.raises(
        ValueError, match=r"'forward' of Then .* is probabilities.*\(2 times\)\. Let the forward return"
    ):
        probe(lambda: model(x), model)
    model, x = Then(Plain(), nn.Softmax(-1)), inputs()
    attach(model, head=head)
    with pytest.raises(ValueError, match=r"is probabilities.* pass `head=\"0.fc\"`"):
        probe(lambda: model(x), model)


def test_a_model_that_gives_log_probabilities_passes():
    model, x = Then(Scaled(), nn.LogSoftmax(-1)).eval(), inputs()
    attach(model, head="forward")
    probe(lambda: model(x), model)


def test_the_probe_offers_the_whole_model():
    model, x = Scaled(), inputs()
    attach(model)
    expected = r"'model.fc'.* by 2 times.*: none\. If no layer gives the logits, pass `head=\"forward\"`, which"
    with pytest.raises(ValueError, match=expected) as error:
        probe(lambda: model(x), model)
    assert "num_classes" not in str(error.value)
    detach(model)
    attach(model, head="forward")
    probe(lambda: model(x), model)


def test_the_probe_offers_the_part_that_runs():
    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Scaled()
            del self.net.num_classes

        def forward(self, x):
            return self.net(x)

    module, x = attach(Module()), inputs()
    for forward in (lambda: module(x), lambda: module.net(x)):
        with pytest.raises(
            ValueError, match=r"`head=\"net.forward\"`.*\. Set `num_classes = 5` on that Scaled first\."
        ):
            probe(forward, module)
    detach(module)
    module.net.num_classes = NUM_CLASSES
    attach(module, head="net.forward")
    probe(lambda: module(x), module)
    detach(module)
    module.net.forward = lambda x: module.net.model(x)
    module.num_classes = NUM_CLASSES
    module.forward = lambda x: 3 * module.net(x)
    attach(module)
    with pytest.raises(ValueError, match=r"`head=\"forward\"`, which stands for the output of the whole\."):
        probe(lambda: module(x), module)


def test_the_probe_of_a_compiled_model_offers_the_whole():
    model, x = torch.compile(attach(Scaled()), backend="eager"), inputs()
    with pytest.raises(ValueError, match=r"`head=\"(_orig_mod\.)?forward\"`") as error:
        probe(lambda: model(x), model)
    detach(model)
    attach(model, head="_orig_mod.forward" if "_orig_mod.forward" in str(error.value) else "forward")
    probe(lambda: model(x), model)
