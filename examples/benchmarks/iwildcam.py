"""The paper's negative case, iWildCam: adapt a classifier of animals to one camera trap after the other.

    python examples/benchmarks/iwildcam.py --data iwildcam_v2.0 --weights resnet50.pth
    python examples/benchmarks/iwildcam.py --data iwildcam_v2.0 --weights resnet50.pth --stream

``--data`` is the folder of WILDS (https://wilds.stanford.edu): ``metadata.csv`` and the images in ``train``. A
ResNet-50 is trained on the camera traps of the split ``train``. Then it is fine-tuned for each of some traps of the
splits ``val`` and ``test``, on the earlier half of the trap's images; the later half is for tests. Species that the
earlier half does not show are absent, whether or not they come later: a trap sees few species, and one of them in most
of its images. The table has the means over traps and, besides accuracies, the macro F1 that WILDS reports, the mean
over the species that occur in the tests. The class means of NCM are those of the trap's earlier half; those of absent
species are of up to 20 images of the first traps.

``--stream`` goes through the months of each trap: a model is fine-tuned on all months so far and tested on the next.

What is assumed: the paper and those before it (Tu et al., "Holistic Transfer", NeurIPS 2023) take new locations as
target domains, but we know neither which these are nor how their images are divided. Here they are the traps with the
most test images of absent species, 21 as there; optimizer and schedule are those of the paper's other benchmarks. The
paper's own scores are not shown beside ours.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paper_data import add_options, load_net, of_each_seed, settings, target_data, transforms_of
from PIL import Image
from protocol import Rows, TargetData, folder_of, markdown, mean_of, paper_rows, trained, training_loader
from torch import nn
from torch.utils.data import Dataset

from lightning_calibft import ClassSplit

FOR_MEANS = 20
COLUMNS = ("split", "location_remapped", "datetime", "filename", "y")


@dataclass(frozen=True)
class Photo:
    """A line of the metadata."""

    split: str
    location: str
    time: str
    file: str
    species: int


class Photos(Dataset):
    """Images of a list."""

    def __init__(self, photos: Sequence[Photo], folder: Path, transform: Any) -> None:
        self.photos, self.folder, self.transform = photos, folder, transform

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.photos)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        """Return an image and the row of its species."""
        photo = self.photos[position]
        with Image.open(self.folder / "train" / photo.file) as image:
            return self.transform(image.convert("RGB")), photo.species


@dataclass(frozen=True)
class Step:
    """What a model is fine-tuned on at a trap, and what it is tested on: both in the order of time."""

    name: str
    early: list[Photo]
    late: list[Photo]

    @property
    def seen(self) -> list[int]:
        """The species to fine-tune on."""
        return sorted({photo.species for photo in self.early})

    @property
    def num_absent(self) -> int:
        """The number of test images of other species."""
        return sum(photo.species not in self.seen for photo in self.late)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    photos = read_metadata(args.data)
    steps = choose_steps(photos, args)
    print(f"{len({step.name.split(',')[0] for step in steps})} traps, {len(steps)} models a seed;", end=" ")
    print(f"{sum(step.num_absent for step in steps)} of {sum(len(step.late) for step in steps)} test images are absent")
    print()
    runs = [mean_of([run_step(step, photos, each) for step in steps]) for each in of_each_seed(args)]
    print("\n".join(markdown({"iWildCam": runs})))


def read_metadata(folder: Path) -> list[Photo]:
    """Read the lines of ``metadata.csv``."""
    try:
        with (folder / "metadata.csv").open(newline="") as file:
            lines = csv.DictReader(file)
            if missing := set(COLUMNS).difference(lines.fieldnames or ()):
                raise SystemExit(f"--data: {folder / 'metadata.csv'} lacks the columns {', '.join(sorted(missing))}.")
            photos = [Photo(*(line[column] for column in COLUMNS[:4]), int(line["y"])) for line in lines]
    except OSError as error:
        raise SystemExit(f"--data: expected {folder} to hold metadata.csv, as WILDS has it: {error}") from error
    return photos


def choose_steps(photos: Sequence[Photo], args: argparse.Namespace) -> list[Step]:
    """Return the steps of the traps with the most test images of absent species."""
    traps: dict[str, list[Photo]] = {}
    for photo in photos:
        if photo.split in ("val", "test"):
            traps.setdefault(photo.location, []).append(photo)
    of_traps = []
    for name, of_trap in traps.items():
        ordered = sorted(of_trap, key=lambda photo: photo.time)
        found = months(name, ordered) if args.stream else halves(name, ordered)
        if steps := [step for step in found if len(step.seen) > 1 and 0 < step.num_absent < len(step.late)]:
            of_traps.append(steps)
    of_traps.sort(key=lambda steps: (-sum(step.num_absent for step in steps), steps[0].name))
    if not of_traps:
        raise SystemExit("--data: no trap of `val` or `test` shows species later that it has not shown before.")
    return [step for steps in of_traps[: args.traps] for step in steps]


def halves(name: str, photos: list[Photo]) -> Iterator[Step]:
    """Divide a trap at the middle of its images; those of the same instant stay together."""
    middle = photos[len(photos) // 2].time
    yield Step(name, [photo for photo in photos if photo.time < middle], [p for p in photos if p.time >= middle])


def months(name: str, photos: list[Photo]) -> Iterator[Step]:
    """Take each month but the first as the test of those before."""
    for month in sorted({photo.time[:7] for photo in photos})[1:]:
        early = [photo for photo in photos if photo.time[:7] < month]
        yield Step(f"{name}, {month}", early, [photo for photo in photos if photo.time[:7] == month])


def run_step(step: Step, photos: Sequence[Photo], args: argparse.Namespace) -> Rows:
    """Score one model."""
    facts = settings(args, trap=step.name)
    folder = folder_of(step.name.replace(", ", "_"), facts, args)

    def open_all() -> tuple[nn.Module, TargetData]:
        net = source_net(photos, args)
        augment, clean = transforms_of(net, args.image_size)
        known = [*step.early, *of_absent_species(step, photos)]
        folders = Photos(known, args.data, augment), Photos(known, args.data, clean)
        rows = [photo.species for photo in known]
        split, test = ClassSplit(num_species(photos), step.seen), Photos(step.late, args.data, clean)
        return net, target_data(split, step.seen, folders, rows, range(len(rows)), test, args)

    return paper_rows(open_all, folder, facts, args)


def of_absent_species(step: Step, photos: Sequence[Photo]) -> list[Photo]:
    """Return images of the split ``train`` that class means are taken of."""
    found: dict[int, list[Photo]] = {}
    for photo in photos:
        if photo.split == "train" and photo.species not in step.seen:
            found.setdefault(photo.species, []).append(photo)
    return [photo for of_species in found.values() for photo in of_species[:FOR_MEANS]]


def num_species(photos: Sequence[Photo]) -> int:
    """Return the number of rows of the head."""
    return max(photo.species for photo in photos) + 1


def source_net(photos: Sequence[Photo], args: argparse.Namespace) -> nn.Module:
    """Return the model of the traps of the split ``train``; one that is finished is read."""
    net = load_net(args)
    net.reset_classifier(num_species(photos))
    augment, _ = transforms_of(net, args.image_size)
    data = Photos([photo for photo in photos if photo.split == "train"], args.data, augment)
    path = folder_of("iwildcam_source", settings(args), args) / "source.ckpt"
    return trained(net, training_loader(data, args), path, args)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, epochs=20, weight_decay=5e-4)
    parser.add_argument("--model", default="resnet50.tv_in1k", help="name of a timm model (%(default)s)")
    parser.add_argument("--traps", type=int, default=21, help="number of camera traps (%(default)s)")
    parser.add_argument("--stream", action="store_true", help="month by month, on all months so far")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
