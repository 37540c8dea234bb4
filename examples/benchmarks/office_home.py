"""The paper's Office-Home benchmark: pre-train on one domain, fine-tune on 30 of 65 classes of another.

    python examples/benchmarks/office_home.py --data OfficeHomeDataset_10072016 --weights resnet50.pth
    python examples/benchmarks/office_home.py ... --methods all --seeds 3
    python examples/benchmarks/office_home.py ... --source Art --target Clipart --eval Ar_Cl.pth

A ResNet-50 with ImageNet weights (torchvision's first, ``resnet50.tv_in1k`` of timm) is trained on all classes of the
source domain, then fine-tuned on the seen classes of the target domain, and scored on held-out target images of all
classes. ``--data`` holds the domains as https://www.hemanthdv.org/officeHomeDataset.html has them. Without
``--source`` and ``--target`` these are the six pairs of the paper: from Art and from Real World to the three other
domains. One table is printed; what is finished is kept in ``--output``, and a run that was stopped goes on from there.

``--methods`` adds other ways to fine-tune and pseudo cross-validation: those of ``compare.py``, at this scale. The
column *cost* counts trainings: 1.0 is one ordinary fine-tuning. With all methods, a pair takes thirteen, and one of the
source model. ``--eval`` trains nothing: it scores a fine-tuned checkpoint that the authors publish; with
``--source-weights``, their model of the source domain, it scores that one and ``pseudo_absent`` as well.

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

import timm
from paper_data import (
    add_options,
    check_names,
    existing_file,
    listed_split,
    load_net,
    of_each_seed,
    open_folder,
    random_split,
    settings,
    target_data,
    transforms_of,
)
from protocol import (
    Rows,
    TargetData,
    folder_of,
    markdown,
    paper_rows,
    published_rows,
    published_weights,
    trained,
    training_loader,
)
from torch import nn
from torch.utils.data import Subset

from lightning_calibft import ClassSplit, resolve_class_map

DOMAINS = ("Art", "Clipart", "Product", "Real_World")
OF_THE_PAPER = ("Art", "Real_World")  # the source domains
TRAIN_SHARE = 0.7
CLASSES = """
    Drill Exit_Sign Bottle Glasses Computer File_Cabinet Shelf Toys Sink Laptop Kettle Folder Keyboard Flipflops
    Pencil Bed Hammer ToothBrush Couch Bike Postit_Notes Mug Webcam Desk_Lamp Telephone Helmet Mouse Pen Monitor Mop
    Sneakers Notebook Backpack Alarm_Clock Push_Pin Paper_Clip Batteries Radio Fan Ruler Pan Screwdriver Trash_Can
    Printer Speaker Eraser Bucket Chair Calendar Calculator Flowers Lamp_Shade Spoon Candles Clipboards Scissors TV
    Curtains Fork Soda Table Knives Oven Refrigerator Marker
"""
"""In the order of the rows of the authors' checkpoints."""
_ART = """
    Bottle Fork Bucket Mug Bike Push_Pin Toys TV Ruler Sneakers Webcam Knives Alarm_Clock Postit_Notes Soda Candles
    Lamp_Shade Shelf Hammer Pen Telephone Speaker Monitor Exit_Sign Radio Screwdriver Keyboard Batteries Pan
    Refrigerator
"""
_REAL_WORLD = """
    Pencil Flowers Trash_Can Fan Marker Calendar Flipflops Refrigerator Bed Telephone Scissors Bike Table Glasses
    Hammer Screwdriver Oven Bucket Bottle Calculator Computer Folder Helmet Lamp_Shade Backpack Sneakers Notebook
    Shelf Couch Soda
"""
SEEN_CLASSES = {"Art": _ART, "Clipart": _ART, "Product": _ART, "Real_World": _REAL_WORLD}


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    pairs = [
        pair
        for pair in permutations(DOMAINS, 2)
        if pair[1] == (args.target or pair[1]) and (pair[0] == args.source if args.source else pair[0] in OF_THE_PAPER)
    ]
    tables = {
        f"{source} → {target}".replace("_", " "): [run_pair(source, target, each) for each in of_each_seed(args)]
        for source, target in pairs
    }
    print("\n".join(markdown(tables)))


def run_pair(source: str, target: str, args: argparse.Namespace) -> Rows:
    """Score one pair of domains."""
    folders = {path.name for path in domain_folder(source, args).iterdir() if path.is_dir()}
    known = CLASSES.split()
    names = [*(name for name in known if name in folders), *sorted(folders.difference(known))]
    seen = args.seen_classes.read_text().split() if args.seen_classes else SEEN_CLASSES[source].split()
    for domain in (source, target):
        root = domain_folder(domain, args)
        found = [path.name for path in root.iterdir() if path.is_dir()]
        check_names(root, found, names, f"{source} has it.")
        check_names(root, found, seen, "Name the classes to fine-tune on in a file: --seen-classes.")
    if args.eval:
        net = published(args.eval, names, args)
        before = args.source_weights and published(args.source_weights, names, args)
        return published_rows(net, open_target(target, names, seen, net, args), before, args)
    facts = settings(args, source=source, target=target, seen=seen)
    folder = folder_of(f"{source}_{target}", facts, args)

    def open_all() -> tuple[nn.Module, TargetData]:
        net = source_net(source, names, args)
        return net, open_target(target, names, seen, net, args)

    return paper_rows(open_all, folder, facts, args)


def published(file: Path, names: list[str], args: argparse.Namespace) -> nn.Module:
    """Return a model that the authors publish."""
    net = timm.create_model(args.model, num_classes=len(names))
    return published_weights(net, file)


def source_net(source: str, names: list[str], args: argparse.Namespace) -> nn.Module:
    """Return the model of the source domain; one that an earlier run or pair has trained is read."""
    if args.source_weights:
        return published(args.source_weights, names, args)
    net = load_net(args)
    net.reset_classifier(len(names))
    augmented, _ = transforms_of(net, args.image_size)
    data = open_folder(domain_folder(source, args), named(names), augmented)
    path = folder_of(source, settings(args, source=source), args) / "source.ckpt"
    return trained(net, training_loader(data, args), path, args)


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
    order = [names.index(name) for name in seen]
    split = ClassSplit(len(names), order)
    return target_data(split, order, (augmented, clean), clean.targets, training, Subset(clean, test), args)


def named(names: list[str]) -> Callable[[list[str]], dict[int, int]]:
    """Return what maps the folders of a domain to rows of the head: those of the source."""
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
    parser.add_argument("--source-weights", type=existing_file, help="the authors' model of the source domain")
    args = parser.parse_args(arguments)
    if args.source and args.source == args.target:
        parser.error("--target must be another domain than --source")
    if (args.eval or args.source_weights) and not (args.source and args.target):
        parser.error("--eval and --source-weights are of one pair: name its --source and --target")
    return args


if __name__ == "__main__":
    main()
