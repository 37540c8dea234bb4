"""The paper's Office-Home benchmark: pre-train on one domain, fine-tune on 30 of 65 classes of another.

    python examples/benchmarks/office_home.py --data OfficeHomeDataset_10072016 --weights resnet50.pth

A ResNet-50 with ImageNet weights (torchvision's first, ``resnet50.tv_in1k`` of timm) is trained on all classes of the
source domain, then fine-tuned on the seen classes of the target domain, and scored on held-out target images of all
classes. ``--data`` holds the domains as https://www.hemanthdv.org/officeHomeDataset.html has them. Without
``--source`` and ``--target`` these are the six pairs of the paper: from Art and from Real World to the three other
domains. One table is printed; what is finished is kept in ``--output``, and a run that was stopped goes on from there.

What is the authors' (their code is named in ``protocol.py``): 20 epochs of 500 iterations, weight decay 5e-4, the 30
seen classes of each source domain, and 70 % of the images of each class to train on. Which these are, their lists say:
pass the folder ``asset/OfficeHome/image_list`` of their repository as ``--image-lists``; else they are drawn here.

What is assumed: the source model, which they only publish, is trained by the same protocol on all images of the source
domain, from those weights. From Clipart and Product, which are no sources in the paper, the seen classes are those of
Art.

The paper's own scores are not shown beside ours: we could not check them against the paper's tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

from paper_data import (
    add_options,
    check_names,
    listed_split,
    load_net,
    open_folder,
    random_split,
    settings,
    target_data,
    transforms_of,
)
from protocol import (
    FineTuning,
    Rows,
    TargetData,
    folder_of,
    kept,
    markdown,
    paper_rows,
    train,
    training_loader,
)
from torch import nn
from torch.utils.data import Subset

from lightning_calibft import ClassSplit, resolve_class_map

DOMAINS = ("Art", "Clipart", "Product", "Real_World")
OF_THE_PAPER = ("Art", "Real_World")  # the source domains
TRAIN_SHARE = 0.7
_ART = """
    Alarm_Clock Batteries Bike Bottle Bucket Candles Exit_Sign Fork Hammer Keyboard Knives Lamp_Shade Monitor Mug Pan
    Pen Postit_Notes Push_Pin Radio Refrigerator Ruler Screwdriver Shelf Sneakers Soda Speaker TV Telephone Toys Webcam
"""
_REAL_WORLD = """
    Backpack Bed Bike Bottle Bucket Calculator Calendar Computer Couch Fan Flipflops Flowers Folder Glasses Hammer
    Helmet Lamp_Shade Marker Notebook Oven Pencil Refrigerator Scissors Screwdriver Shelf Sneakers Soda Table Telephone
    Trash_Can
"""
SEEN_CLASSES = {"Art": _ART, "Clipart": _ART, "Product": _ART, "Real_World": _REAL_WORLD}


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    pairs = [
        pair
        for pair in permutations(DOMAINS, 2)
        if pair[1] == (args.target or pair[1]) and (pair[0] == args.source if args.source else pair[0] in OF_THE_PAPER)
    ]
    tables = {f"{source} → {target}".replace("_", " "): run_pair(source, target, args) for source, target in pairs}
    print("\n".join(markdown(tables)))


def run_pair(source: str, target: str, args: argparse.Namespace) -> Rows:
    """Score one pair of domains."""
    names = sorted(path.name for path in domain_folder(source, args).iterdir() if path.is_dir())
    seen = args.seen_classes.read_text().split() if args.seen_classes else SEEN_CLASSES[source].split()
    for domain in (source, target):
        root = domain_folder(domain, args)
        folders = [path.name for path in root.iterdir() if path.is_dir()]
        check_names(root, folders, names, f"{source} has it.")
        check_names(root, folders, seen, "Name the classes to fine-tune on in a file: --seen-classes.")
    facts = settings(args, source=source, target=target, seen=sorted(seen))
    folder = folder_of(f"{source}_{target}", facts, args)

    def compute() -> Rows:
        net = source_net(source, names, args)
        return paper_rows(net, open_target(target, names, seen, net, args), folder, args)

    return kept(folder, facts, compute)


def source_net(source: str, names: list[str], args: argparse.Namespace) -> nn.Module:
    """Return the model of the source domain; one that an earlier run or pair has trained is read."""
    net = load_net(args)
    net.reset_classifier(len(names))
    path = folder_of(source, settings(args, source=source), args) / "source.ckpt"
    module = FineTuning(net, args.learning_rate, args.weight_decay)
    if not path.exists():
        augmented, _ = transforms_of(net, args.image_size)
        data = open_folder(domain_folder(source, args), named(names), augmented)
        train(module, training_loader(data, args), path, args)
    trained = FineTuning.load_from_checkpoint(
        path, map_location="cpu", net=net, learning_rate=args.learning_rate, weight_decay=args.weight_decay
    )
    return trained.net.eval()


def open_target(target: str, names: list[str], seen: list[str], net: nn.Module, args: argparse.Namespace) -> TargetData:
    """Divide the images of the target domain."""
    augmented, clean = (
        open_folder(domain_folder(target, args), named(names), transform)
        for transform in transforms_of(net, args.image_size)
    )
    if args.image_lists:
        training, test = listed_split(clean, args.image_lists, target)
    else:
        training, test = random_split(clean.targets, TRAIN_SHARE, args.seed)
    split = ClassSplit(len(names), [names.index(name) for name in seen])
    return target_data(split, augmented, clean, clean.targets, training, Subset(clean, test), args)


def named(names: list[str]) -> Callable[[list[str]], dict[int, int]]:
    """Return what maps the folders of a domain to rows of the head: those of the source, in alphabetical order."""
    return lambda folders: resolve_class_map(folders, names)


def domain_folder(domain: str, args: argparse.Namespace) -> Path:
    """Return the folder of a domain; in the original archive it is ``Real World``."""
    for name in (domain, domain.replace("_", " ")):
        if (args.data / name).is_dir():
            return args.data / name
    raise SystemExit(f"--data: expected {args.data} to hold the folders {', '.join(DOMAINS)}, but it lacks {domain}.")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, epochs=20, weight_decay=5e-4)
    parser.add_argument("--model", default="resnet50.tv_in1k", help="name of a timm model (%(default)s)")
    parser.add_argument("--source", choices=DOMAINS, help="domain to pre-train on; none: those of the paper")
    parser.add_argument("--target", choices=DOMAINS, help="domain to fine-tune on; none: all others")
    parser.add_argument("--seen-classes", type=Path, help="file that names the classes to fine-tune on, one a line")
    args = parser.parse_args(arguments)
    if args.source and args.source == args.target:
        parser.error("--target must be another domain than --source")
    return args


if __name__ == "__main__":
    main()
