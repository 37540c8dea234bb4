"""Each way out of the package: written here, read in a fresh process by those who will read it, logits compared."""

import json

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from torch import nn

from lightning_calibft import (
    CalibrationResult,
    ClassSplit,
    export,
    fold_checkpoint,
    inspect_checkpoint,
    load_calibrated,
    set_gamma,
)
from tests.helpers.processes import run_python
from tests.shipping import consumer
from tests.shipping.consumer import NUM_CLASSES, Classifier
from tests.shipping.fine_tuned import SEEN, train

WAYS = [name for name in vars(consumer) if name.startswith("from_")]
INPUTS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def hugging_face(folder):
    """Write calibrated models of transformers and return the logits that they should give."""
    transformers = pytest.importorskip("transformers")
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = transformers.ViTConfig(image_size=32, patch_size=16, num_labels=NUM_CLASSES, **tiny)
    text = transformers.BertConfig(vocab_size=50, max_position_embeddings=64, num_labels=NUM_CLASSES, **tiny)
    image_model = set_gamma(transformers.ViTForImageClassification(vision).eval(), 2.5, SEEN)
    text_model = set_gamma(transformers.BertForSequenceClassification(text).eval(), 2.5, SEEN)
    export(image_model, folder / "transformers_folder")
    export(text_model, folder / "text_folder")
    tokens = torch.arange(3, 11)[None].repeat(2, 1)
    return {
        "from_transformers": image_model(INPUTS).logits,
        "from_transformers_text": text_model(input_ids=tokens).logits,
    }


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A folder with the model in every format, the logits that were read from them, and those that should be."""
    folder = tmp_path_factory.mktemp("shipped")
    best = train(folder)
    for name in ("model.ckpt", "model.pth", "model.safetensors"):
        fold_checkpoint(best, folder / name)
    model = load_calibrated(Classifier, best).model
    for name in ("model.onnx", "model.pt2", "timm_folder"):
        export(model, folder / name, INPUTS)
    with pytest.warns(FutureWarning, match=r"torch\.jit"):
        torch.jit.save(torch.jit.trace(model, INPUTS), folder / "traced.pt")
    expected = dict.fromkeys(WAYS, model(INPUTS)) | hugging_face(folder)
    torch.save(INPUTS, folder / "inputs.pt")
    run_python(consumer.__file__, cwd=folder)
    return folder, torch.load(folder / "logits.pt", weights_only=True), expected


@pytest.mark.parametrize("way", WAYS)
def test_the_logits(way, shipped):
    _, logits, expected = shipped
    if way not in logits:
        pytest.skip("an optional package is missing")
    tolerance = 0.05 if way == "from_int8" else 1e-5
    torch.testing.assert_close(logits[way], expected[way].detach(), rtol=0, atol=tolerance)


def test_gamma_is_what_changes_them(shipped):
    folder, logits, _ = shipped
    gamma = inspect_checkpoint(folder / "best.ckpt")["gamma"]
    raw = load_calibrated(Classifier, folder / "best.ckpt").model.train().fc  # training mode: raw logits
    model = load_calibrated(Classifier, folder / "best.ckpt").model
    features = model.forward_head(model.forward_features(INPUTS), pre_logits=True)
    shift = torch.full((NUM_CLASSES,), gamma)
    shift[SEEN] = 0
    assert abs(gamma) > 0.1
    torch.testing.assert_close(logits["from_torch"] - raw(features).detach(), shift.expand(2, -1), rtol=0, atol=1e-5)


FILES = [
    "model.ckpt",
    "model.pth",
    "model.safetensors",
    "timm_folder",
    "transformers_folder",
    "model.onnx",
    "model.pt2",
]


@pytest.mark.parametrize("name", FILES)
def test_the_metadata_are_in_each_file(name, shipped):
    folder, _, _ = shipped
    info = inspect_checkpoint(folder / name)
    assert info["folded"]
    assert not info["calibrated"]
    assert info["seen_classes"] == SEEN
    if name in ("model.ckpt", "model.pth", "model.safetensors"):
        assert info["num_samples"] == 48
        assert info["gamma"] == pytest.approx(inspect_checkpoint(folder / "best.ckpt")["gamma"])


@pytest.mark.parametrize("name", ["model.ckpt", "model.pth", "model.safetensors"])
def test_folding_again_is_refused(name, shipped, tmp_path):
    with pytest.raises(ValueError, match="gamma is already folded into the bias"):
        fold_checkpoint(shipped[0] / name, tmp_path / "again.pth")
    assert not list(tmp_path.iterdir())


def test_exporting_leaves_the_model_as_it_is(tmp_path):
    model = set_gamma(timm.create_model("test_resnet", num_classes=NUM_CLASSES).eval(), 2.5, SEEN)
    before, logits = {key: value.clone() for key, value in model.state_dict().items()}, model(INPUTS)
    export(torch.compile(model, backend="eager"), tmp_path / "model.pth")
    assert list(model.state_dict()) == list(before)
    assert torch.equal(model(INPUTS), logits)
    plain = timm.create_model("test_resnet", num_classes=NUM_CLASSES, checkpoint_path=str(tmp_path / "model.pth"))
    torch.testing.assert_close(plain.eval()(INPUTS), logits)


def test_a_graph_takes_any_number_of_rows(shipped):
    program = torch.export.load(shipped[0] / "model.pt2").module()
    assert program(torch.randn(5, 3, 32, 32)).shape == (5, NUM_CLASSES)


def test_safetensors_says_that_its_tensors_are_of_torch(shipped):
    with safe_open(shipped[0] / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"  # transformers refuses files without it
    assert json.loads(metadata["lightning_calibft"])["folded"]


@pytest.mark.parametrize(
    ("destination", "inputs", "match"),
    [
        (
            "model.onnx",
            None,
            r"`inputs` to hold tensors with at least two rows for .*model\.onnx', but got \[None\]",
        ),
        ("model.pt2", torch.zeros(1, 3, 32, 32), r"at least two rows .* but got \[\(1, 3, 32, 32\)\]"),
        ("model.h5", None, r"model\.h5' to end in one of \.safetensors, \.pth, \.pt, \.onnx, \.pt2, or to be a folder"),
    ],
)
def test_wrong_destinations(destination, inputs, match, tmp_path):
    model = set_gamma(timm.create_model("test_resnet", num_classes=NUM_CLASSES), 2.5, SEEN)
    with pytest.raises(ValueError, match=match):
        export(model, tmp_path / destination, inputs)
    assert not list(tmp_path.iterdir())


def test_a_folder_needs_a_library_that_reads_it(tmp_path):
    with pytest.raises(ValueError, match=r"a timm or transformers model to write the folder .* but got Linear"):
        export(set_gamma(nn.Linear(3, 5), 2.5, [0, 1]), tmp_path / "folder")
    model = set_gamma(timm.create_model("test_resnet", num_classes=NUM_CLASSES), 2.5, SEEN)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match=r"full' exists\. Remove it"):
        export(model, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


@pytest.mark.parametrize("destination", ["model.pth", "folder"])
def test_models_without_gamma_or_without_bias(destination, tmp_path):
    model = timm.create_model("test_resnet", num_classes=NUM_CLASSES)
    with pytest.raises(ValueError, match="holds no gamma"):
        export(model, tmp_path / destination)
    model.fc = nn.Linear(model.fc.in_features, NUM_CLASSES, bias=False)
    with pytest.raises(ValueError, match="but it has none"):
        export(set_gamma(model, 2.5, SEEN), tmp_path / destination)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_transformers_is_not_calibrated_again(shipped):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForImageClassification.from_pretrained(shipped[0] / "transformers_folder")
    with pytest.raises(ValueError, match="without a folded gamma, but its bias already holds one"):
        set_gamma(model, 1.0, SEEN)


def test_a_head_that_does_not_fold_goes_into_a_graph(tmp_path):
    model = timm.create_model("test_resnet", num_classes=NUM_CLASSES)
    model.fc = nn.Linear(model.fc.in_features, NUM_CLASSES, bias=False)
    set_gamma(model.eval(), 2.5, SEEN)
    export(model, tmp_path / "model.pt2", INPUTS)
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(INPUTS), model(INPUTS))
    assert inspect_checkpoint(tmp_path / "model.pt2")["gamma"] == 2.5


def test_an_onnx_file_holds_2_gib(tmp_path, monkeypatch):
    model = set_gamma(timm.create_model("test_resnet", num_classes=NUM_CLASSES), 2.5, SEEN)
    monkeypatch.setattr("lightning_calibft.checkpoint.export._LARGEST_ONNX", 1000)
    monkeypatch.setattr("torch.onnx.export", None)  # refused before the work
    with pytest.raises(ValueError, match=r"less than 2 GiB, the limit of an ONNX file, .* Write a \.pt2 or"):
        export(model, tmp_path / "model.onnx", INPUTS)
    assert not list(tmp_path.iterdir())


def test_the_model_card_of_a_folder(tmp_path):
    model = set_gamma(timm.create_model("test_resnet", num_classes=5), 2.5, [0, 1])
    result = CalibrationResult(2.5, 0.1, 64, ClassSplit(5, [0, 1]), "pseudo_absent", absent_share=0.3)
    measured = {"test_acc_absent": 0.4, "test_acc_all": torch.tensor(0.5), "test_ausuc": float("nan"), "note": "good"}
    export(model, tmp_path / "folder", result=result, metrics=measured)
    card = ModelCard.load(tmp_path / "folder" / "README.md")
    assert card.data.library_name == "timm"
    assert card.data.model_name == "test_resnet"
    found = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert found == {"test_acc_absent": 0.4, "test_acc_all": 0.5}
    for line in ("gamma: 2.500 ± 0.100", "seen classes (2): 0, 1", "absent classes (3): 2, 3, 4", "for: 30.0%"):
        assert line in card.text
    assert "nan" not in card.text


@pytest.mark.parametrize("name", ["folder", "model.safetensors", "model.pth", "model.pt2"])
def test_weights_in_another_layout(name, tmp_path):
    """Convolutions in channels-last, as many train on GPUs, and a head whose weight is a transposed tensor."""
    model = timm.create_model("test_resnet", num_classes=NUM_CLASSES).eval().to(memory_format=torch.channels_last)
    model.fc.weight.data = model.fc.weight.data.T.contiguous().T
    set_gamma(model, 2.5, SEEN)
    strides = {key: value.stride() for key, value in model.state_dict().items()}
    export(model, tmp_path / name, INPUTS)
    if name == "model.pt2":
        shipped = torch.export.load(tmp_path / name).module()
    elif name == "folder":
        shipped = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
    else:
        kwargs = {"num_classes": NUM_CLASSES, "checkpoint_path": str(tmp_path / name)}
        shipped = timm.create_model("test_resnet", **kwargs).eval()
    torch.testing.assert_close(shipped(INPUTS), model(INPUTS), rtol=0, atol=1e-5)
    assert {key: value.stride() for key, value in model.state_dict().items()} == strides
