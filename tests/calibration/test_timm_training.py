"""``calibrate()`` in a training loop made of timm's own pieces, as in its ``train.py``."""

from __future__ import annotations

import argparse
import copy
import random

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import FastCollateMixup, create_dataset, create_loader, create_transform, resolve_data_config
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3, random_seed

from lightning_calibft import attach, calibrate, detach, fold, fold_checkpoint, get_gamma, inspect_checkpoint
from tests.helpers.references import _reference_gap
from tests.helpers.runs import assert_same, quiet

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]
SEEN = [5, 1, 3]
EACH = 6

pytestmark = quiet


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Noise of another color for each class, in folders, and timm's own kind of class map: a name a row."""
    root, rng = tmp_path_factory.mktemp("photos"), random.Random(0)
    for row in SEEN:
        (root / "train" / NAMES[row]).mkdir(parents=True)
        for number in range(EACH):
            image = Image.new("RGB", (44, 36))
            image.putdata([tuple((rng.randrange(120) + 40 * row * channel) % 256 for channel in range(3))] * 44 * 36)
            image.paste((rng.randrange(256), 40 * row, 9), (rng.randrange(20), rng.randrange(20), 40, 33))
            image.save(root / "train" / NAMES[row] / f"{number}.png")
    (root / "names.txt").write_text("\n".join(NAMES))
    return root


def make(name="test_resnet", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=len(NAMES), **kwargs)


CONFIG = resolve_data_config({"input_size": (3, 32, 32), "mean": (0.4, 0.5, 0.6), "std": (0.3, 0.2, 0.25)})
TRANSFORM = {key: CONFIG[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct")}


def make_dataset(photos, class_map="names.txt"):
    return create_dataset(
        "", str(photos / "train"), split="train", is_training=True, class_map=class_map and str(photos / class_map)
    )


def make_loader(photos, is_training=False, use_prefetcher=True, batch_size=6, dataset=None, **kwargs):
    defaults = {"num_workers": 0, "persistent_workers": False, "device": torch.device("cpu"), **TRANSFORM}
    return create_loader(
        make_dataset(photos) if dataset is None else dataset,
        batch_size=batch_size,
        is_training=is_training,
        use_prefetcher=use_prefetcher,
        **{**defaults, **kwargs},
    )


def images_of(photos, **kwargs):
    """The images and their rows, one by one and without timm's loader."""
    transform = create_transform(**TRANSFORM, **kwargs)
    files = [(file, row) for row in SEEN for file in sorted((photos / "train" / NAMES[row]).iterdir())]
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file, _ in files])
    return images, torch.tensor([row for _, row in files])


def logits_of(model, images):
    with torch.no_grad():
        return model.eval()(images)


def _reference_gamma(model, photos, **kwargs):
    images, target = images_of(photos, **kwargs)
    absent = [row for row in range(len(NAMES)) if row not in SEEN]
    gamma, *_ = _reference_gap(logits_of(detach(copy.deepcopy(model)), images), target, SEEN, absent)
    assert abs(gamma) > 1e-2
    return gamma


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("use_prefetcher", [False, True])
@pytest.mark.parametrize("is_training", [False, True])
def test_loaders(is_training, use_prefetcher, num_workers, photos):
    model, no_aug = make(), {"no_aug": True} if is_training else {}
    loader = make_loader(photos, is_training, use_prefetcher, num_workers=num_workers, **no_aug)
    state = torch.get_rng_state()
    result = calibrate(model, loader, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert result.gamma == pytest.approx(_reference_gamma(model, photos, is_training=is_training, **no_aug), rel=1e-3)
    assert (result.num_samples, result.split.seen_classes) == (18, (1, 3, 5))
    assert sum(len(target) for _, target in loader) == 18  # it goes on as before


def test_a_prefetching_loader_is_read_as_it_is(photos):
    """Its transforms and its dropped last batch are its own; a plain loader is read whole."""
    for use_prefetcher, count in ((True, 16), (False, 18)):
        loader = make_loader(photos, is_training=True, use_prefetcher=use_prefetcher, batch_size=4)
        assert calibrate(make(), loader, SEEN, progress=False).num_samples == count


def test_folders_that_number_their_classes(photos):
    dataset = make_dataset(photos, class_map="")
    model, loader = make(), make_loader(photos, dataset=dataset)
    names = list(dataset.reader.class_to_idx)
    result = calibrate(model, loader, class_map=names, label_names=photos / "names.txt", progress=False)
    assert names == ["bee", "dog", "fox"]
    assert result.gamma == pytest.approx(_reference_gamma(model, photos), rel=1e-3)
    assert result.split.seen_classes == (1, 3, 5)


@pytest.mark.parametrize("enabled", [True, False])
def test_mixed_labels_are_refused_with_a_remedy(enabled, photos):
    collate = FastCollateMixup(mixup_alpha=0.2, num_classes=len(NAMES))
    loader = make_loader(photos, is_training=True, collate_fn=collate)
    loader.mixup_enabled = enabled  # as after `--mixup-off-epoch`: the labels stay soft
    model = make()
    keys = list(model.state_dict())
    with pytest.raises(TypeError, match=r"Soft .* do not name a single class. If the .* mixes labels \(mixup"):
        calibrate(model, loader, progress=False)
    assert list(model.state_dict()) == keys
    calibrate(model, make_loader(photos), progress=False)
    assert get_gamma(model) is not None


def fine_tune(photos, model, ema=None, calibrated=(), epochs=2):
    """What ``train.py`` does, in short; ``calibrated`` after each epoch."""
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01, momentum=0.9)
    loader, step = make_loader(photos, is_training=True), 0
    for _ in range(epochs):
        model.train()
        for inputs, target in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), target).backward()
            optimizer.step()
            step += 1
            if ema is not None:
                ema.update(model, step=step)
        for one in calibrated:
            calibrate(one, make_loader(photos), progress=False)
    return optimizer


@pytest.fixture
def saved(photos, tmp_path):
    """A fine-tuned model, its average, both calibrated, and the file that timm saves of them."""
    model = make()
    ema = ModelEmaV3(model, decay=0.5)
    optimizer = fine_tune(photos, model, ema)
    for one in (model, ema):
        calibrate(one, make_loader(photos), progress=False)
    args = argparse.Namespace(model="test_resnet", num_classes=len(NAMES), lr=0.01)
    saver = CheckpointSaver(
        model, optimizer, args, ema, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path), max_history=2
    )
    saver.save_checkpoint(1, metric=0.5)
    return model, ema, optimizer, tmp_path / "model_best.pth.tar"


def test_the_model_and_its_average_have_their_own_gamma(photos, saved):
    model, ema, *_ = saved
    assert get_gamma(model) == pytest.approx(_reference_gamma(model, photos), rel=1e-3)
    assert get_gamma(ema) == pytest.approx(_reference_gamma(ema.module, photos), rel=1e-3)
    assert get_gamma(ema) != pytest.approx(get_gamma(model), rel=1e-3)
    again = calibrate(ema.module, make_loader(photos), progress=False)
    assert get_gamma(ema) == pytest.approx(again.gamma, rel=1e-6)


@pytest.mark.parametrize("use_ema", [True, False])
def test_the_file_of_the_checkpoint_saver(use_ema, photos, saved):
    model, ema, optimizer, file = saved
    source, images = ema.module if use_ema else model, images_of(photos)[0]
    loaded = attach(timm.create_model("test_resnet", num_classes=len(NAMES)))
    load_checkpoint(loaded, str(file), use_ema=use_ema)
    assert_same(dict(loaded.state_dict()), dict(source.state_dict()))
    assert torch.equal(logits_of(loaded, images), logits_of(source, images))
    assert get_gamma(loaded) == get_gamma(source)

    resumed = attach(make())
    assert resume_checkpoint(resumed, str(file), copy.deepcopy(optimizer)) == 2
    assert_same(dict(resumed.state_dict()), dict(model.state_dict()))
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*absent_class_calibration"):
        load_checkpoint(make(), str(file), use_ema=use_ema)

    info = inspect_checkpoint(file)  # of the average, which timm prefers as well
    assert (info["gamma"], info["heads"], info["absent_classes"]) == (get_gamma(ema), ["fc"], [0, 2, 4])


@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".safetensors"])
def test_a_folded_file_loads_into_a_plain_model(suffix, photos, saved):
    *_, ema, _, file = saved
    images = images_of(photos)[0]
    expected = logits_of(ema.module, images)
    folded = file.with_name(f"folded{suffix}")
    fold_checkpoint(file, folded)
    plain = make()
    load_checkpoint(plain, str(folded))
    torch.testing.assert_close(logits_of(plain, images), expected)
    assert list(plain.state_dict()) == list(make().state_dict())


def test_a_folded_model_saved_by_timm_loads_into_a_plain_model(photos, saved, tmp_path):
    model, _, optimizer, _ = saved
    images = images_of(photos)[0]
    expected = logits_of(model, images)
    args = argparse.Namespace(model="test_resnet")
    (tmp_path / "folded").mkdir()
    saver = CheckpointSaver(fold(model), optimizer, args, checkpoint_dir=str(tmp_path / "folded"))
    saver.save_checkpoint(0, metric=1.0)
    plain = make()
    load_checkpoint(plain, str(tmp_path / "folded" / "last.pth.tar"))
    torch.testing.assert_close(logits_of(plain, images), expected)


def distilled():
    return make("deit_tiny_distilled_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2)


def test_an_average_goes_on_if_the_calibration_was_attached_before_it_was_made(photos):
    """timm averages the entries of two state dicts by their order, not by their names: they must stay the same."""
    states = []
    for calibrated in (False, True):
        model = distilled()
        if calibrated:
            attach(model)
        ema = ModelEmaV3(model, decay=0.5)
        random_seed(1)  # of the augmentation as well
        fine_tune(photos, model, ema, calibrated=[model] if calibrated else [])
        states.append(dict(detach(ema.module).state_dict()))
    assert_same(*states)
