"""What datasets say about their labels, without loading a sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, StackDataset, Subset, TensorDataset, random_split
from torchvision.datasets import MNIST, FakeData, ImageFolder

from lightning_calibft.labels.dataset_labels import class_names_of, class_names_of_loaders, labels_of

Y = [4, 4, 7, 1, 0, 7]


class Listed(Dataset):
    """A dataset with attributes, whose samples must not be loaded."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __len__(self):
        return len(Y)

    def __getitem__(self, index):
        raise AssertionError("a sample was loaded")


class Counted(Listed):
    @property
    def targets(self):
        return [self[index] for index in range(len(self))]


@pytest.mark.parametrize(
    "dataset",
    [
        Listed(targets=Y),
        Listed(targets=torch.tensor(Y, dtype=torch.int16)),
        Listed(labels=np.array(Y, dtype=np.uint8)),
        Listed(labels=np.array(Y)[:, None]),
        Listed(samples=[("a.png", label) for label in Y]),
        Listed(imgs=[("a.png", label) for label in Y], targets=Y),
        Listed(targets=Y, labels=["cat", "dog"]),
        Listed(targets=Y, labels=[0, 1]),  # of the classes, not of the samples
        TensorDataset(torch.randn(6, 3), torch.tensor(Y)),
        TensorDataset(torch.tensor(Y), torch.randn(6)),
        Subset(Listed(targets=Y), np.arange(6)),
        ConcatDataset(
            [Subset(Listed(targets=Y), [0, 1]), Subset(Subset(Listed(targets=Y), [5, 4, 3, 2]), [3, 2, 1, 0])]
        ),
    ],
)
def test_labels(dataset):
    assert labels_of(dataset).tolist() == Y


class Renumbered(Subset):
    def __getitem__(self, index):
        return super().__getitem__(index)[0], 0

    def __getitems__(self, indices):
        return [self[index] for index in indices]


@pytest.mark.parametrize(
    "dataset",
    [
        Listed(),
        Counted(),
        Listed(targets=Y, labels=Y[::-1]),
        Listed(targets=Y[1:]),
        Listed(targets=[float(label) for label in Y]),
        Listed(targets=[str(label) for label in Y]),
        Listed(targets=[True] * 6),
        Listed(targets=np.eye(6, dtype=int)),
        Listed(targets=Y, target_transform=lambda label: 0),
        Listed(targets=Y, transforms=lambda image, label: (image, 0)),
        TensorDataset(torch.randn(6, 3), torch.tensor(Y), torch.arange(6)),
        TensorDataset(torch.randn(6, 3), torch.rand(6)),
        Subset(Listed(targets=Y), ["a", "b"]),
        Subset(Listed(targets=Y), [0, 6]),
        Renumbered(Listed(targets=Y), [0, 1]),
        ConcatDataset([Listed(targets=Y), Listed()]),
        StackDataset(torch.randn(6), torch.tensor(Y)),
        FakeData(6),
        [(0, 1)],
        None,
    ],
)
def test_no_labels(dataset):
    assert labels_of(dataset) is None


def test_random_split():
    parts = random_split(Listed(targets=Y), [4, 2], torch.Generator().manual_seed(0))
    assert sorted(torch.cat([labels_of(part) for part in parts]).tolist()) == sorted(Y)


@pytest.fixture
def folder(tmp_path):
    for name, number in {"ant": 2, "bee": 1}.items():
        (tmp_path / name).mkdir()
        for index in range(number):
            Image.new("RGB", (2, 2)).save(tmp_path / name / f"{index}.png")
    return tmp_path


def test_image_folder(folder):
    assert labels_of(ImageFolder(folder)).tolist() == [0, 0, 1]
    assert labels_of(ImageFolder(folder, transform=lambda image: image)).tolist() == [0, 0, 1]
    assert labels_of(ImageFolder(folder, target_transform=lambda label: 1 - label)) is None
    assert class_names_of(Subset(ImageFolder(folder), [0])) == {0: "ant", 1: "bee"}


@pytest.mark.parametrize(
    ("dataset", "names"),
    [
        (Listed(classes=["ant", "bee"]), {0: "ant", 1: "bee"}),
        (Listed(classes=["ant", "bee"], class_to_idx={"ant": 3, "bee": 5}), {3: "ant", 5: "bee"}),
        (Listed(classes=[1, 2, 4]), {}),
        (Listed(classes=3), {}),
        (Listed(), {}),
        (None, {}),
        (MNIST, dict(enumerate(MNIST.classes))),
        (ConcatDataset([Listed(classes=["ant"]), Listed(classes=["ant"])]), {0: "ant"}),
        (ConcatDataset([Listed(classes=["ant"]), Listed(classes=["bee"])]), {}),
    ],
)
def test_class_names(dataset, names):
    assert class_names_of(dataset) == names


def test_class_names_of_several_loaders():
    loaders = [torch.utils.data.DataLoader(Listed(classes=names)) for names in (["ant"], ["ant"], ["bee"])]
    assert class_names_of_loaders(loaders[:2]) == {0: "ant"}
    assert class_names_of_loaders(loaders) == class_names_of_loaders([]) == class_names_of_loaders([[1]]) == {}
