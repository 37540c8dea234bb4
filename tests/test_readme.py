"""The README's Python runs as written, in its order."""

import re
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def make_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 6))


class MyModule(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = make_net()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("loss", nn.functional.cross_entropy(self(x), y))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(num_classes: int) -> DataLoader:
    generator = torch.Generator().manual_seed(num_classes)
    target = torch.randint(num_classes, (60,), generator=generator)
    inputs = torch.randn(60, 4, 4, generator=generator)
    inputs.flatten(1)[torch.arange(60), target] += 3
    return DataLoader(TensorDataset(inputs, target), batch_size=20)


def test_python_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"MyModule": MyModule, "make_net": make_net, "model": MyModule(), "net": make_net()}
    names |= {"train_loader": loader(3), "val_loader": loader(6), "test_loader": loader(6)}
    assert len(BLOCKS) == 4
    outputs = []
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), names)
        outputs.append(dict(names))

    assert "test_acc_absent" in outputs[0]["trainer"].callback_metrics
    module = names["MyLoggingModule"]()
    pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False).validate(module, loader(6))
    inputs = loader(6).dataset.tensors[0]
    calibrated = outputs[0]["model"]  # the test has loaded the best weights into it
    torch.testing.assert_close(outputs[2]["model"].eval()(inputs), calibrated.eval()(inputs))
    assert (tmp_path / "model.ckpt").is_file()
    assert names["result"].num_samples == 60
