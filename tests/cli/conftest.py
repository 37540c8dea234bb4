"""Files that the tests of the command share."""

from __future__ import annotations

import pytest
import timm
import torch
from torchvision.transforms.functional import to_pil_image

from lightning_calibft import load_calibrated
from tests.cli.running import X
from tests.shipping.consumer import NUM_CLASSES, Classifier
from tests.shipping.fine_tuned import SEEN, train


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    """A checkpoint that the callback has calibrated."""
    return train(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def expected(best):
    return load_calibrated(Classifier, best)(X).detach()


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Weights of a timm model, without gamma."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("raw") / "raw.pth"
    torch.save(timm.create_model("test_resnet", num_classes=NUM_CLASSES).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with five images of each of three classes, whose folders are named by their rows."""
    root = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for row in SEEN:
        (root / str(row)).mkdir()
        for index in range(5):
            image = torch.rand(3, 40, 48, generator=generator) * 0.5 + row / 20
            to_pil_image(image).save(root / str(row) / f"{index}.png")
    return root
