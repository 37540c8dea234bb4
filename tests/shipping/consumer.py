"""What somebody does who has the files and has never heard of the package: run as a script in a folder of them."""

import sys
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as pl
import timm
import torch

NUM_CLASSES = 10


class Classifier(pl.LightningModule):
    """The user's own module; the producer of the files imports it from here."""

    def __init__(self):
        super().__init__()
        self.model = timm.create_model("test_resnet", num_classes=NUM_CLASSES)

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def from_lightning(x):
    return Classifier.load_from_checkpoint("model.ckpt").eval()(x)


def from_timm_safetensors(x):
    return timm.create_model("test_resnet", num_classes=NUM_CLASSES, checkpoint_path="model.safetensors").eval()(x)


def from_timm_pth(x):
    return timm.create_model("test_resnet", num_classes=NUM_CLASSES, checkpoint_path="model.pth").eval()(x)


def from_torch(x):
    model = timm.create_model("test_resnet", num_classes=NUM_CLASSES).eval()
    model.load_state_dict(torch.load("model.pth", weights_only=True))
    return model(x)


def from_timm_folder(x):
    model = timm.create_model("local-dir:timm_folder", pretrained=True).eval()
    assert model.num_classes == NUM_CLASSES
    return model(x)


def from_transformers(x):
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained("transformers_folder").eval()(x).logits


def from_transformers_text(x):
    from transformers import AutoModelForSequenceClassification

    tokens = torch.arange(3, 11)[None].repeat(2, 1)
    return AutoModelForSequenceClassification.from_pretrained("text_folder").eval()(input_ids=tokens).logits


def from_export(x):
    return torch.export.load("model.pt2").module()(x)


def from_export_compiled(x):
    return torch.compile(torch.export.load("model.pt2").module(), backend="aot_eager")(x)


def from_onnx(x):
    import onnxruntime

    session = onnxruntime.InferenceSession("model.onnx")
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def from_trace(x):
    return torch.jit.load("traced.pt")(x)


def from_int8(x):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = timm.create_model("test_resnet", num_classes=NUM_CLASSES, checkpoint_path="model.safetensors").eval()
    quantize_(model, Int8WeightOnlyConfig())
    return model(x)


if __name__ == "__main__":
    sys.modules["lightning_calibft"] = None  # importing it fails
    inputs, logits = torch.load("inputs.pt", weights_only=True), {}
    for way, read in [(name, function) for name, function in globals().items() if name.startswith("from_")]:
        with torch.no_grad(), suppress(ModuleNotFoundError):
            logits[way] = read(inputs)
    torch.save(logits, Path("logits.pt"))
