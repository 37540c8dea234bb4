"""Compare ways to keep the absent classes on about 140 characters: without a download besides Debian's fonts.

    apt-get install fonts-dejavu fonts-liberation ...    (the script names all packages that it misses)
    python examples/benchmarks/glyphs.py --jobs 2

Networks of timm are trained from scratch on upright text faces, and fine-tuned on other faces, colored and distorted,
of some of the characters; they are tested on faces they have not seen. See ``compare.py`` for the rows. Leave-out local
SGD has four local models here. What is finished is kept in the folder ``--output``: a benchmark that was stopped goes
on from there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

import glyphs_data
import methods
from compare import kept, method_rows, method_tables, prepare, summary
from glyphs_data import (
    CHARACTERS,
    FACES,
    GlyphData,
    MissingFontsError,
    contact_sheet,
    find_faces,
    fingerprint,
    make_data,
)
from methods import Classifier, Setting, fit
from table import Rows
from timm.layers import HybridEmbed
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn

PRETRAINING = {"resnet": (3e-3, 1), "vit": (1e-3, 3)}  # the learning rate of AdamW, and how many times the epochs
FINE_TUNING = {
    ("resnet", "sgd"): ("SGD", 1e-2),
    ("resnet", "adamw"): ("AdamW", 1e-3),
    ("vit", "sgd"): ("SGD", 1e-2),
    ("vit", "adamw"): ("AdamW", 5e-4),
}
TITLES = {"resnet": "ResNet", "vit": "ViT"}


@dataclass(frozen=True, kw_only=True)
class GlyphSetting(Setting):
    """A setting on characters.

    Args:
        network: ``"resnet"`` or ``"vit"``.
        characters: The classes.
        packages: Names in ``FACES``.
        fonts: The folder with the files of these.
        output: The folder for weights and scores.
    """

    sources: ClassVar[tuple[Path, ...]] = (Path(__file__), Path(glyphs_data.__file__))
    local_models: ClassVar[int] = 4

    network: str
    characters: str
    packages: tuple[str, ...]
    fonts: Path
    output: Path

    @property
    def num_classes(self) -> int:
        """As many as there are characters."""
        return len(self.characters)

    @property
    def data(self) -> GlyphData:
        """All images of this seed."""
        return make_data(self.fonts, self.packages, self.characters, self.seed)

    def pretrained(self) -> nn.Module:
        """Return the network trained on source images of all characters."""
        return pretrained(self)[0]

    def facts(self) -> dict[str, Any]:
        """Return all that the scores depend on: of the fonts, not where they are, but what is in them."""
        facts = {name: value for name, value in asdict(self).items() if name not in ("packages", "fonts", "output")}
        faces = chain.from_iterable(find_faces(self.fonts, self.packages).values())
        return {**facts, "faces": fingerprint(face.file for face in faces)}


def make_network(name: str, num_classes: int) -> nn.Sequential:
    """Make a small network for images of 32 x 32."""
    backbone: Any
    if name == "resnet":
        backbone = ResNet(BasicBlock, layers=(1, 1, 1, 1), channels=(64, 96, 128, 192), num_classes=0)
    else:
        stem = ConvStem(depth=3, channels=(48, 96, 160), stride=(2, 2, 2))
        embed = partial(HybridEmbed, backbone=stem, proj=False)
        backbone = VisionTransformer(32, 1, embed_dim=160, depth=4, num_heads=5, num_classes=0, embed_layer=embed)
    head = nn.Linear(backbone.num_features, num_classes)
    return nn.Sequential(OrderedDict(backbone=backbone, head=head))


@cache
def pretrained(setting: GlyphSetting) -> tuple[nn.Module, float]:
    """Read the pre-trained network, or train and write it; its accuracy in % on source faces that it has not seen."""
    file = setting.output / f"{setting.network}_{setting.seed}.pt"
    fine_tuning = ("share", "optimizer", "learning_rate")
    facts = {name: value for name, value in setting.facts().items() if name not in fine_tuning}
    facts |= {"torch": str(torch.__version__), "code": fingerprint([*setting.sources, Path(methods.__file__)])}
    torch.manual_seed(setting.seed)
    network = make_network(setting.network, setting.num_classes)
    stored = torch.load(file, weights_only=True) if file.exists() else {"facts": None}
    if stored["facts"] == facts:
        network.load_state_dict(stored["state"])
        return network.eval(), stored["accuracy"]
    begin, data = time.perf_counter(), setting.data
    rate, times = PRETRAINING[setting.network]
    module = Classifier(network, "AdamW", rate)
    fit(module, data.source, times * setting.epochs, setting.seed, batch_size=64, accelerator=setting.accelerator)
    images, labels = data.source_test.tensors
    with torch.no_grad():
        accuracy = 100 * (module(images).argmax(1) == labels).double().mean().item()
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"facts": facts, "accuracy": accuracy, "state": module.state_dict()}, file)
    print(f"{file.name}: {time.perf_counter() - begin:.0f} s, {accuracy:.1f} % on source faces", file=sys.stderr)
    return module, accuracy


def source_accuracy(setting: GlyphSetting) -> float:
    """Pre-train, if that is not done yet."""
    return pretrained(setting)[1]


def rows_of(setting: GlyphSetting) -> Rows:
    """Score all methods, if that is not done yet."""
    return kept(setting.output, setting.network, setting, method_rows)


def settings_of(args: argparse.Namespace) -> dict[str, list[GlyphSetting]]:
    """Return the settings of each table, one for each seed. ``vit`` has all shares only if they are asked for."""
    common = {"characters": CHARACTERS[: args.characters], "packages": tuple(args.packages), "fonts": args.fonts}
    common |= {"output": args.output, "epochs": args.epochs, "accelerator": args.accelerator}
    tables = {}
    for network in args.networks:
        for share in args.shares or ((30, 50, 70) if network == "resnet" else (50,)):
            for optimizer in args.optimizers:
                name, rate = FINE_TUNING[network, optimizer]
                tables[f"{TITLES[network]}, {share} % seen, {name}"] = [
                    GlyphSetting(seed, share, name, rate, network=network, **common) for seed in range(args.seeds)
                ]
    return tables


def lines(args: argparse.Namespace) -> Iterator[str]:
    """Pre-train, then score, each in ``--jobs`` processes; a table comes as soon as its settings are done."""
    tables = settings_of(args)
    starts = {(each.network, each.seed): each for settings in tables.values() for each in settings}
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), initializer=prepare) as pool:
        accuracies = dict(zip(starts, pool.map(source_accuracy, starts.values()), strict=True))
        runs = pool.map(rows_of, [each for settings in tables.values() for each in settings])
        scored = ((title, [next(runs) for _ in settings]) for title, settings in tables.items())
        yield from method_tables(scored, args.only)
    for name in args.networks:
        mean = statistics.mean(accuracy for (network, _), accuracy in accuracies.items() if network == name)
        yield f"{TITLES[name]}, pre-trained: {mean:.1f} % on source faces that it has not seen"


def check_fonts(args: argparse.Namespace) -> None:
    """Exit with what to install if files of fonts are missing."""
    try:
        find_faces(args.fonts, tuple(args.packages))
    except MissingFontsError as error:
        sys.exit(str(error))


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    prepare()
    check_fonts(args)
    if args.samples:
        contact_sheet(make_data(args.fonts, tuple(args.packages), CHARACTERS[: args.characters], seed=0), args.samples)
        return
    for line in lines(args):
        print(line, flush=True)
    print(summary(args))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--shares", type=int, nargs="+", choices=(30, 50, 70), help="%% seen (default: all; ViT: 50)")
    parser.add_argument("--optimizers", nargs="+", choices=("sgd", "adamw"), default=("sgd", "adamw"))
    parser.add_argument("--seeds", type=int, default=3, help="number of runs (default: 3)")
    parser.add_argument("--epochs", type=int, default=12, help="epochs of each training (default: 12)")
    parser.add_argument("--characters", type=int, default=len(CHARACTERS), help="number of classes (default: all)")
    parser.add_argument("--packages", nargs="+", choices=list(FACES), default=list(FACES), help="default: all")
    parser.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts"), help="where the font files are")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_glyphs"), help="where all is kept")
    parser.add_argument("--only", choices=("scores", "overall"), help="some of the tables")
    parser.add_argument("--samples", type=Path, help="only write a picture of some images to this file")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes (default: 1)")
    parser.add_argument("--accelerator", default="auto", help="as the Trainer takes it (default: auto)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
