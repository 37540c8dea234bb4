import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import lightning_calibft
from lightning_calibft.head import attach, find_head
from lightning_calibft.head.find import HeadNotFoundError
from lightning_calibft.head.layers import head_names, num_classes

from .models import NUM_CLASSES, Convolutional, Distilled, Plain, Wrapper


def _names(model, head=None):
    return head_names(model, find_head(model, head))


def _named(**children):
    """A model with these children, which registers a linear layer of another width last."""
    model = nn.Module()
    for name, child in children.items():
        model.add_module(name, child)
    model.add_module("projection", nn.Linear(8, 16))
    return model


def _stack():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, NUM_CLASSES), nn.Dropout())


class _Encoder(nn.Module):
    """A backbone whose `get_classifier` fails, as that of some timm models without classes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Linear(8, 8)

    def get_classifier(self):
        raise AttributeError("no head")


@pytest.mark.parametrize("name", ["fc", "classifier", "head", "heads", "score", "classification_head", "last_linear"])
def test_well_known_names(name):
    assert _names(_named(**{name: nn.Linear(8, NUM_CLASSES)})) == (name,)
    assert _names(_named(**{name: _stack()})) == (f"{name}.2",)
    assert _names(Wrapper(_named(**{name: nn.Conv2d(8, NUM_CLASSES, 1)}))) == (f"model.{name}",)


@pytest.mark.parametrize(
    "names",
    [("head", "head_dist"), ("cls_classifier", "distillation_classifier"), ("classifier", "classifier_distill")],
)
def test_pairs(names):
    model = _named(**{name: nn.Linear(8, NUM_CLASSES) for name in names})
    assert _names(model) == names
    assert num_classes(find_head(model)) == NUM_CLASSES


def test_a_deep_layer_with_a_well_known_name_is_no_head():
    model = nn.Module()
    model.block = _named(fc=nn.Linear(8, 8))
    model.output = nn.Linear(8, NUM_CLASSES)
    assert _names(model) == ("output",)


def test_a_module_is_its_own_head():
    for head in (nn.Linear(8, NUM_CLASSES), nn.Conv2d(8, NUM_CLASSES, 1)):
        assert find_head(head) is head


def test_an_attached_head_comes_first():
    model = _named(fc=nn.Linear(8, NUM_CLASSES))
    attach(model, head="projection")
    assert _names(model) == ("projection",)


@pytest.mark.parametrize(
    "wrap",
    [
        Wrapper,
        AveragedModel,
        nn.parallel.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: Wrapper(torch.compile(model, backend="eager")),
    ],
)
@pytest.mark.parametrize("make", [Plain, Convolutional, Distilled, lambda: timm.create_model("resnet18")])
def test_wrappers_are_looked_through(make, wrap):
    model = make()
    heads = find_head(model)
    found = find_head(wrap(model))
    if wrap is AveragedModel:  # It holds a copy.
        assert str(found) == str(heads)
    else:
        assert found is heads or found == heads


def test_a_compiled_head_is_looked_through():
    model = Plain()
    head = model.fc
    model.fc = torch.compile(head, backend="eager")
    assert find_head(model) is head


def test_the_outermost_classifier_of_timm_wins():
    model = _Encoder()
    model.encoder = timm.create_model("resnet18", num_classes=7)
    model.output = nn.Linear(7, NUM_CLASSES)
    model.get_classifier = lambda: model.output
    assert find_head(Wrapper(model)) is model.output


def test_the_classifier_of_timm_wins_over_names():
    model = timm.create_model("resnet18", num_classes=7)
    model.classifier = nn.Linear(3, 3)
    assert find_head(Wrapper(model)) is model.fc


@pytest.mark.parametrize("encoder", [_Encoder, lambda: timm.create_model("resnet18", num_classes=0)])
def test_an_encoder_without_classes_is_passed_over(encoder):
    model = nn.Module()
    model.encoder = encoder()
    model.output = nn.Linear(8, NUM_CLASSES)
    assert find_head(model) is model.output


def test_the_last_linear_needs_a_width_of_its_own():
    assert _names(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES))) == ("1",)
    with pytest.raises(
        ValueError, match=r"several.*Candidates: '0' \(Linear, width 8\), '1' \(Linear, width 8\).*head=\"1\""
    ):
        find_head(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8)))


def test_two_models_are_ambiguous():
    for make in (Plain, lambda: timm.create_model("resnet18", num_classes=7)):
        model = nn.ModuleDict({"student": make(), "teacher": make()})
        with pytest.raises(ValueError, match=r"several.*: 'student.fc', 'teacher.fc'\. Candidates.*head=") as error:
            find_head(model)
        assert not isinstance(error.value, HeadNotFoundError)
        assert _names(model, "student.fc") == ("student.fc",)


def test_an_explicit_head_is_a_name_or_a_module():
    model = Wrapper(_named(fc=nn.Linear(8, 8), other=_stack()))
    assert _names(model, "model.fc") == ("model.fc",)
    assert _names(model, model.model.fc) == ("model.fc",)
    assert _names(model, "model.other") == ("model.other.2",)
    assert _names(timm.create_model("convnext_atto"), "head") == ("head.fc",)
    assert _names(torch.compile(model, backend="eager"), "model.fc") == ("_orig_mod.model.fc",)


def test_an_explicit_container_of_a_pair_is_the_pair():
    assert _names(Wrapper(Distilled()), "model") == ("model.head", "model.head_dist")


def test_an_explicit_list_is_a_set():
    model = nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(8, 5), nn.Linear(4, 5)])})
    assert _names(model, "heads") == ("heads.0", "heads.1")


def test_any_module_with_out_features_can_be_the_head():
    model = _named(cosine=nn.CosineSimilarity())
    with pytest.raises(ValueError, match=r"attribute `out_features`, but got CosineSimilarity"):
        find_head(model, "cosine")
    model.cosine.out_features = 3
    assert find_head(model, "cosine") is model.cosine
    assert num_classes(model.cosine) == 3


def test_a_name_that_is_not_there_may_come_later():
    with pytest.raises(HeadNotFoundError, match=r"`head` to name a module of Plain, but got 'model\.fc'.*head=\"fc\""):
        find_head(Plain(), "model.fc")


def test_a_module_from_elsewhere_is_refused():
    with pytest.raises(ValueError, match="to be a module of Plain, but got a Linear that is not in it"):
        find_head(Plain(), nn.Linear(8, NUM_CLASSES))


@pytest.mark.parametrize("head", [3, ["fc"], nn.Linear])
def test_an_argument_of_another_type_is_refused(head):
    with pytest.raises(TypeError, match="`head` to be a dotted name or a module"):
        find_head(Plain(), head)


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Conv2d(3, 5, 3), nn.Sequential(), nn.Identity()])
def test_a_module_without_a_width_is_refused(module):
    with pytest.raises(ValueError, match="`head` to be a Linear, a 1x1 Conv2d"):
        find_head(_named(other=module), "other")
    with pytest.raises(ValueError, match="`head` to be a Linear, a 1x1 Conv2d"):
        num_classes(module)


def test_no_head_at_all():
    with pytest.raises(HeadNotFoundError, match=r"Found no classification head in Sequential.*Build the head first"):
        find_head(nn.Sequential(nn.Flatten()))


def test_a_lazy_head_is_not_found_until_it_is_built():
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(NUM_CLASSES))
    with pytest.raises(HeadNotFoundError, match=r"'1' has no weights yet. Run one batch"):
        find_head(model)
    model(torch.ones(1, 4))
    assert find_head(model) is model[1]


def test_heads_of_different_widths_are_no_set():
    with pytest.raises(ValueError, match="Linear of width 5 and Linear of width 6"):
        num_classes((nn.Linear(8, 5), nn.Linear(8, 6)))


def test_a_long_list_of_candidates_is_cut():
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(30)])
    with pytest.raises(ValueError, match=r"Candidates \(the last 10 of 30\): '20' "):
        find_head(model)


def test_the_remedies_name_the_whole_model():
    with pytest.raises(
        HeadNotFoundError, match=r"no `out_features`\. Build the head first, or pass `head=\"forward\"`"
    ):
        find_head(nn.Sequential(nn.Flatten()))
    with pytest.raises(
        ValueError, match=r"for example `head=\"1\"`, or pass `head=\"forward\"`, or `\"model\.forward\"`"
    ):
        find_head(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=r"got Sigmoid\. If its output is the logits, pass `head=\"1\.forward\"`"):
        find_head(nn.Sequential(nn.Linear(4, 8), nn.Sigmoid()), "1")


def test_the_head_needs_no_lightning():
    script = """
    import sys, types
    package = types.ModuleType("lightning_calibft")
    package.__path__ = [sys.argv[1]]
    sys.modules["lightning_calibft"] = package
    import lightning_calibft.head
    loaded = {name.split(".")[0] for name in sys.modules}
    assert not loaded & {"lightning", "pytorch_lightning", "timm", "torchvision", "transformers", "peft"}, loaded
    """
    folder = Path(lightning_calibft.__file__).parent
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), folder], check=True)
