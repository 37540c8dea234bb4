"""The training protocol of the paper's benchmarks, their images, and what they say when something is wrong."""

from __future__ import annotations

import math
from pathlib import Path

import lightning.pytorch as pl
import miniature
import pytest
import timm
import torch
from miniature import CLASSES, MODEL, options, run, script
from torch.utils.data import TensorDataset

from lightning_calibft import ClassSplit

pytestmark = [
    pytest.mark.filterwarnings("ignore:::lightning.pytorch"),
    pytest.mark.usefixtures("paper_environment"),
]

PAIR = ["--source", "Art", "--target", "Real_World"]


@pytest.mark.parametrize(
    ("name", "arguments", "epochs", "decay"),
    [("office_home", [], 20, 5e-4), ("imagenet_variants", ["--variant", "imagenet-r"], 50, 1e-4)],
)
def test_defaults_are_those_of_the_authors(name, arguments, epochs, decay):
    args = script(name).parse_arguments(["--data", "x", *arguments])
    assert (args.epochs, args.iterations, args.batch_size, args.image_size) == (epochs, 500, 64, 224)
    assert (args.learning_rate, args.weight_decay, args.model) == (1e-3, decay, "resnet50.tv_in1k")


def test_seen_classes_are_those_of_the_authors():
    by_source = {source: names.split() for source, names in script("office_home").SEEN_CLASSES.items()}
    assert {len(set(names)) for names in by_source.values()} == {30}
    assert by_source["Art"] != by_source["Real_World"]
    rows = {name: {int(row) for row in text.split()} for name, text in script("imagenet_variants").SEEN_ROWS.items()}
    assert {name: len(seen) for name, seen in rows.items()} == {"imagenet-r": 100, "imagenet-s": 500}
    assert rows["imagenet-s"] <= set(range(1000))


class Recorder(pl.Callback):
    def __init__(self):
        self.rates, self.counts = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.optimizer = trainer.optimizers[0]
        self.rates.append([group["lr"] for group in self.optimizer.param_groups])
        self.counts.append(len(batch[0]))


def test_the_optimizer_follows_the_protocol(tmp_path):
    protocol = script("protocol")
    arguments = ["--data", "x", "--epochs", "2", "--iterations", "5", "--batch-size", "3", "--workers", "0"]
    args = script("office_home").parse_arguments([*arguments, "--accelerator", "cpu", "--output", str(tmp_path)])
    net = timm.create_model(MODEL, num_classes=4).eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    module, recorder = protocol.FineTuning(net, 1e-3, 5e-4), Recorder()
    data = TensorDataset(torch.randn(7, 3, 32, 32), torch.arange(7) % 4)
    protocol.train(module, protocol.training_loader(data, args), tmp_path / "x.ckpt", args, recorder)

    assert recorder.counts == 10 * [3]  # 5 iterations of 2 epochs, though 7 images are 3 batches
    cosine = [(1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    assert [rates[1] for rates in recorder.rates] == pytest.approx([1e-3 * c for c in cosine])
    assert [rates[0] for rates in recorder.rates] == pytest.approx([1e-4 * c for c in cosine])
    backbone, head = recorder.optimizer.param_groups
    for group in (backbone, head):
        assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 5e-4)
    assert {id(p) for p in head["params"]} == {id(p) for p in net.fc.parameters()}
    assert len(backbone["params"]) + 2 == len(list(net.parameters()))

    kept = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert kept.keys() == {f"net.{key}" for key in before}
    # All is trained, and BatchNorm as well: nets come from files in eval mode.
    assert not [key for key, value in before.items() if torch.equal(kept[f"net.{key}"], value)]


def test_images_are_divided_class_by_class():
    split = script("paper_data").random_split
    rows = [row for row in (5, 2, 9) for _ in range(10)] + [7, 7]
    train, test = split(rows, 0.7, seed=0)
    assert sorted(train + test) == list(range(32))
    assert [sum(rows[p] == row for p in train) for row in (5, 2, 9, 7)] == [7, 7, 7, 1]
    assert (train, test) == split(rows, 0.7, seed=0) != split(rows, 0.7, seed=1)


def test_only_seen_classes_are_trained_on():
    rows, split = [3, 0, 1, 3, 2, 0, 1, 2], ClassSplit(4, [0, 3])
    images = TensorDataset(torch.arange(8), torch.tensor(rows))
    augmented = TensorDataset(10 + torch.arange(8), torch.tensor(rows))
    args = script("office_home").parse_arguments(["--data", "x", "--batch-size", "2", "--iterations", "9"])
    data = script("paper_data").target_data(split, [3, 0], (augmented, images), rows, range(1, 7), "test", args)
    assert {image.item() for images, _ in data.train_dataloader() for image in images} == {11, 13, 15}
    assert [image.item() for images, _ in data.calibration_dataloader() for image in images] == [1, 3, 5]
    assert [image.item() for image, _ in data.of_classes(data.clean, [0, 1])] == [1, 2, 5, 6]
    assert [image.item() for image, _ in data.clean] == [1, 2, 3, 4, 5, 6]
    assert data.test == "test"


def test_transforms_crop_and_flip_for_training_and_center_for_tests():
    net = timm.create_model(MODEL)
    augment, clean = script("paper_data").transforms_of(net, 224)
    kinds = [type(step).__name__ for step in augment.transforms]
    assert kinds == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "MaybeToTensor", "Normalize"]
    assert (clean.transforms[0].size, clean.transforms[1].size) == (256, (224, 224))


# --- errors ---


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere"], "--data: expected nowhere to hold the folders Art, .* but it lacks Art"),
        (["--seen-classes", "wrong.txt"], r"--data: .*Art has no folder of Sofa\. .* --seen-classes"),
        (
            ["--weights", "wrong.pt"],
            r"--model test_resnet --weights wrong\.pt: [\s\S]* the weights of timm's [\s\S]*fc\.bias",
        ),
        (["--model", "no_such"], "Cannot load --model no_such "),
        (["--image-lists", "nowhere"], "--image-lists: .*nowhere"),
    ],
)
def test_office_home_says_what_is_wrong(photos, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    Path("wrong.txt").write_text("Bed\nSofa\n")
    state = torch.load(photos / "weights.pt", weights_only=True)
    torch.save({key: value for key, value in state.items() if key != "fc.bias"}, "wrong.pt")
    with pytest.raises(SystemExit, match=message):
        run("office_home", options(photos, *PAIR, *more))


def test_a_domain_without_a_class_of_the_source_is_named(photos, tmp_path):
    miniature.make_images(tmp_path / "Art", CLASSES, 2)
    miniature.make_images(tmp_path / "Clipart", CLASSES[1:], 2)
    with pytest.raises(SystemExit, match=r"Clipart has no folder of Bed\. Art has it"):
        run("office_home", options(photos, "--data", tmp_path, "--source", "Art", "--target", "Clipart"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--weights", "nowhere.pt"], "argument --weights: there is no file nowhere.pt"),
        (["--source", "Art", "--target", "Art"], "--target must be another domain than --source"),
        (["--source", "Art", "--eval", __file__], "of one pair: name its --source and --target"),
        (["--methods", "magic"], "invalid choice: 'magic'"),
    ],
)
def test_wrong_usage_is_refused(photos, capsys, more, message):
    with pytest.raises(SystemExit):
        script("office_home").main([str(word) for word in options(photos, *more)])
    assert message in capsys.readouterr().err


def test_a_list_that_names_a_missing_image_is_refused(photos, tmp_path):
    lists = miniature.make_lists(tmp_path / "lists", "Real_World", number=7)
    with pytest.raises(SystemExit, match=r"lacks Bed/00006\.png, which Real_World_testing\.txt lists"):
        run("office_home", options(photos, *PAIR, "--image-lists", lists))
