"""Folders of tiny images and tiny weights in place of the paper's, and slow scores of what the scripts keep of them."""

import contextlib
import importlib
import io
import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torchvision import transforms as T

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
MODEL = "test_resnet"
NORMALIZE = T.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # as timm has it for this model
SEEN = ["Fan", "Bed", "TV"]
DOMAINS = ["Art", "Clipart", "Product", "Real World"]
CLASSES = ["Bed", "Bike", "Mug", "Pen", "Fan", "TV"]  # in the order of the authors
TINY = ["--image-size", "32", "--epochs", "1", "--iterations", "4", "--batch-size", "8", "--learning-rate", "0.2"]
TINY += ["--workers", "0", "--accelerator", "cpu"]


def make_images(root, names, number, size=32):
    """Write images of a color for each class, disturbed, with one folder a class."""
    rng = random.Random(f"{root.name} {number}")
    for name in names:
        (root / name).mkdir(parents=True)
        color = [random.Random(name).randrange(80, 176) for _ in range(3)]
        for position in range(number):
            low = Image.new("RGB", (4, 4))
            low.putdata([tuple(part + rng.randrange(-80, 80) for part in color) for _ in range(16)])
            low.resize((size, size)).save(root / name / f"{position:05d}.png")
    return root


def make_office_home(root, number=6):
    for domain in DOMAINS:
        make_images(root / domain, CLASSES, number)
    return root


def make_lists(folder, domain, number=6):
    """Write lists as the authors': the first three images of each class are for training, the others for tests."""
    folder.mkdir(exist_ok=True)
    for part, positions in (("training", range(3)), ("testing", range(3, number))):
        lines = [f"{domain}/{name}/{p:05d}.png {row}" for row, name in enumerate(CLASSES) for p in positions]
        (folder / f"{domain}_{part}.txt").write_text("\n".join(lines) + "\n")
    return folder


def make_weights(path, num_classes=1000):
    torch.manual_seed(0)
    torch.save(timm.create_model(MODEL, num_classes=num_classes).state_dict(), path)
    return path


def make_clip(folder):
    """Write a configuration ``tiny-clip`` of open_clip and random weights, and tell open_clip of it."""
    import open_clip

    vision = {"image_size": 32, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    folder.mkdir()
    config = folder / "tiny-clip.json"
    config.write_text(json.dumps({"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(config)
    torch.manual_seed(0)
    weights = folder / "clip.pt"
    torch.save(open_clip.create_model("tiny-clip").state_dict(), weights)
    return weights


@contextlib.contextmanager
def environment():
    """Find the scripts, and leave no seed behind."""
    with isolate_rng(), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # `seed_everything` sets them
            patch.setenv(name, "0")
        yield


def script(name):
    return importlib.import_module(name)


def run(name, arguments):
    """Run a script and return the lines of its table."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        script(name).main([str(argument) for argument in arguments])
    lines = printed.getvalue().splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("| %;")) :]


def make_photos(folder):
    """Make all that the Office-Home benchmark reads."""
    make_office_home(folder / "data")
    make_lists(folder / "lists", "Real_World")
    make_weights(folder / "weights.pt")
    (folder / "seen.txt").write_text("\n".join(SEEN) + "\n")
    return folder


def options(photos, *more):
    files = ["--data", photos / "data", "--weights", photos / "weights.pt", "--seen-classes", photos / "seen.txt"]
    longer = ["--iterations", "24", "--learning-rate", "0.05"]
    return [*files, "--model", MODEL, *TINY, *longer, "--output", photos / "outputs", *more]


def outputs_of(file, paths, num_classes):
    """Features and logits without gamma, of weights that are kept."""
    net = timm.create_model(MODEL, num_classes=num_classes).eval()
    state = torch.load(file, weights_only=True)["state_dict"]
    net.load_state_dict({key.removeprefix("net."): value for key, value in state.items() if "absent_class" not in key})
    read = T.Compose([T.Resize(36), T.CenterCrop(32), T.ToTensor(), NORMALIZE])
    features, logits = [], []
    for path in paths:
        with torch.no_grad(), Image.open(path) as image:
            before_head = net.forward_features(read(image.convert("RGB")).unsqueeze(0))
            features.append(net.forward_head(before_head, pre_logits=True)[0].double())
            logits.append(net.forward_head(before_head)[0].double())
    return torch.stack(features), torch.stack(logits)


def reference_accuracy(logits, target, seen, absent, gamma, samples):
    right = []
    for row, label in zip(logits.tolist(), target, strict=True):
        best = max([*seen, *absent], key=lambda c: row[c] + gamma * (c in absent))
        if label in samples:
            right.append(best == label)
    return 100 * sum(right) / len(right)


def reference_ausuc(logits, target, seen, absent):
    margins = sorted({(row[seen].max() - row[absent].max()).item() for row in logits})
    between = [(low + high) / 2 for low, high in pairwise(margins)]
    points = [
        [reference_accuracy(logits, target, seen, absent, gamma, samples) for samples in (seen, absent)]
        for gamma in [margins[0] - 1, *between, margins[-1] + 1]
    ]
    return sum((a[0] - b[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points)) / 100


def reference_macro_f1(logits, target, seen, absent, gamma):
    best = [max([*seen, *absent], key=lambda c: row[c] + gamma * (c in absent)) for row in logits.tolist()]
    hits = {c: sum(b == t == c for b, t in zip(best, target, strict=True)) for c in set(target)}
    return 100 * sum(2 * number / (best.count(c) + target.count(c)) for c, number in hits.items()) / len(hits)


def reference_alg(logits, target, seen, absent, of=None):
    """Mean gap of the samples of seen classes, or of the classes ``of``."""
    gaps = []
    for row, label in zip(logits.tolist(), target, strict=True):
        if label in (of or seen):
            others = [row[c] for c in seen if c != label]
            gaps.append(sum(others) / len(others) - sum(row[c] for c in absent) / len(absent))
    return sum(gaps) / len(gaps)


def reference_ncm(features, target, of_train, train_target, samples):
    unit = of_train / of_train.norm(dim=1, keepdim=True)
    means = {c: unit[[t == c for t in train_target]].mean(0) for c in set(train_target)}
    right = [
        max(means, key=lambda c: (x @ means[c] / means[c].norm()).item()) == label
        for x, label in zip(features, target, strict=True)
        if label in samples
    ]
    return 100 * sum(right) / len(right)


def among(test, group):
    """The test as if there were no other classes."""
    logits, target, *_ = test
    return logits, target, group, []


def reference_row(of, file, target, seen, absent, gamma):
    (of_train, _), (features, logits) = of[file, "train"], of[file, "test"]
    test = logits, target["test"], seen, absent
    return [
        *(reference_accuracy(*test, gamma, samples) for samples in (seen + absent, seen, absent)),
        *(reference_accuracy(*among(test, group), 0, group) for group in (seen, absent)),
        reference_ausuc(*test),
        reference_macro_f1(*test, gamma),
        *(reference_ncm(features, target["test"], of_train, target["train"], samples) for samples in (seen, absent)),
        gamma,
    ]
