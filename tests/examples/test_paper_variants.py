"""The variants of ImageNet and VTAB on miniature images."""

from __future__ import annotations

import json

import miniature
import pytest
import torch
from miniature import MODEL, TINY, run, script
from PIL import Image
from timm.data import ImageNetInfo
from torchvision import transforms as T

from lightning_calibft import inspect_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:::lightning.pytorch"),
    pytest.mark.usefixtures("paper_environment"),
]

IDS = ImageNetInfo("imagenet-1k").label_names()


def variant(name, folder, *more):
    files = ["--data", folder / name, "--weights", folder / "weights.pt", "--model", MODEL]
    return ["--variant", name, *files, *TINY, "--output", folder / "outputs", *more]


def make_variant(folder, name, rows):
    """Two images of each class: the first is for training."""
    miniature.make_images(folder / name, [IDS[row] for row in rows], 2, size=8)
    miniature.make_weights(folder / "weights.pt")
    for part, position in (("training", 0), ("testing", 1)):
        lines = [f"{name}/{IDS[row]}/{position:05d}.png {row}" for row in rows]
        (folder / f"{name[-1].upper()}_{part}.txt").write_text("\n".join(lines))


def rows_of_imagenet_r():
    return [IDS.index(name) for name in script("lightning_calibft.labels.label_names").wordnet_ids("imagenet-r")]


def test_imagenet_r_competes_among_its_200_classes(tmp_path):
    rows = rows_of_imagenet_r()
    make_variant(tmp_path, "imagenet-r", rows)
    table = run("imagenet_variants", variant("imagenet-r", tmp_path, "--image-lists", tmp_path))
    assert len(table) == 2 + 6
    (file,) = (tmp_path / "outputs").glob("imagenet-r-*/results.json")
    facts = inspect_checkpoint(file.with_name("fine_tuned.ckpt"))
    seen, absent = facts["seen_classes"], facts["absent_classes"]
    assert sorted(seen + absent) == sorted(rows)
    assert (len(seen), len(absent), facts["num_classes"], facts["num_samples"]) == (100, 100, 1000, 100)

    tests = [tmp_path / "imagenet-r" / IDS[row] / "00001.png" for row in rows]
    trains = [path.with_name("00000.png") for path in tests]
    tuned = file.with_name("fine_tuned.ckpt")
    of = {
        (tuned, part): miniature.outputs_of(tuned, paths, 1000) for part, paths in (("train", trains), ("test", tests))
    }
    (train_features, train_logits), (features, logits) = of[tuned, "train"], of[tuned, "test"]
    found = json.loads(file.read_text())["rows"]
    gamma = found["fine-tuned + ALG"]["gamma"]
    assert gamma == pytest.approx(miniature.reference_alg(train_logits, rows, seen, absent), abs=1e-4)
    for column, samples in (("Acc_Y/Y", rows), ("Acc_S/Y", seen), ("Acc_U/Y", absent)):
        expected = miniature.reference_accuracy(logits, rows, seen, absent, gamma, set(samples))
        assert found["fine-tuned + ALG"][column] == pytest.approx(expected)
    assert found["fine-tuned + ALG"]["Acc_Y/Y"] > 0
    nearest = miniature.reference_ncm(features, rows, train_features, rows, set(absent))
    assert found["fine-tuned + ALG"]["NCM_U/Y"] == pytest.approx(nearest)


def test_imagenet_sketch_has_500_seen_classes(tmp_path):
    make_variant(tmp_path, "imagenet-s", range(1000))
    run("imagenet_variants", variant("imagenet-s", tmp_path, "--batch-size", "64", "--iterations", "1"))
    (file,) = (tmp_path / "outputs").glob("imagenet-s-*/fine_tuned.ckpt")
    facts = inspect_checkpoint(file)
    assert (len(facts["seen_classes"]), len(facts["absent_classes"]), facts["num_samples"]) == (500, 500, 500)


def test_vtab_starts_from_the_texts_of_the_classes(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    names = ["AnnualCrop", "Forest", "River", "SeaLake"]
    miniature.make_images(tmp_path / "data/eurosat/2750", names, 10)
    weights = miniature.make_clip(tmp_path / "clip")
    arguments = ["--variant", "eurosat", "--data", tmp_path / "data", "--weights", weights, "--model", "tiny-clip"]
    run("imagenet_variants", [*arguments, *TINY, "--output", tmp_path / "outputs"])
    (file,) = (tmp_path / "outputs").glob("eurosat-*/fine_tuned.ckpt")
    facts = inspect_checkpoint(file)
    assert (len(facts["seen_classes"]), len(facts["absent_classes"]), facts["num_samples"]) == (2, 2, 16)

    clip = open_clip.create_model("tiny-clip", pretrained=str(weights)).eval()
    texts = open_clip.get_tokenizer("tiny-clip")([f"a photo of a {name.lower()}." for name in names])
    read = T.Compose([T.Resize(36, T.InterpolationMode.BICUBIC), T.CenterCrop(32), T.ToTensor()])
    normalize = T.Normalize(clip.visual.image_mean, clip.visual.image_std)
    rows = [row for row in range(4) for _ in range(10)]
    _, test = script("paper_data").random_split(rows, 0.8, 0)
    right = []
    for position in test:
        with torch.no_grad(), Image.open(sorted((tmp_path / "data").rglob("*.png"))[position]) as image:
            logits, _ = clip.get_logits(normalize(read(image)).unsqueeze(0), texts)
        right.append(logits.argmax().item() == rows[position])
    scores = json.loads(file.with_name("results.json").read_text())["rows"]
    assert scores["pre-trained"]["Acc_Y/Y"] == pytest.approx(100 * sum(right) / 8)
    state = torch.load(file, weights_only=True)["state_dict"]
    with torch.no_grad():
        features = clip.encode_text(texts, normalize=True) * clip.logit_scale.exp()
    torch.testing.assert_close(state["net.1.weight"], features)  # the texts stay
    assert not torch.equal(state["net.0.conv1.weight"], clip.visual.conv1.weight)


def test_variants_say_what_is_wrong(tmp_path):
    weights = miniature.make_weights(tmp_path / "weights.pt")
    miniature.make_images(tmp_path / "imagenet-r", [IDS[1], IDS[8]], 2, size=8)
    with pytest.raises(SystemExit, match=r"has no folder of n\d+, .* and 193 more\. imagenet-r has 200 classes"):
        run("imagenet_variants", variant("imagenet-r", tmp_path))
    miniature.make_images(tmp_path / "more", [*(IDS[row] for row in rows_of_imagenet_r()), "sofa"], 2, size=8)
    with pytest.raises(SystemExit, match=r"--data: .*more: Expected .* but got 'sofa'"):
        run("imagenet_variants", [*variant("imagenet-r", tmp_path), "--data", tmp_path / "more"])
    with pytest.raises(SystemExit, match=r"--data: expected .*nowhere to hold one folder of images a class"):
        run("imagenet_variants", [*variant("imagenet-r", tmp_path), "--data", tmp_path / "nowhere"])
    miniature.make_weights(weights, num_classes=5)
    with pytest.raises(SystemExit, match="expected a head of the 1000 classes of ImageNet, but got 5 rows"):
        run("imagenet_variants", variant("imagenet-r", tmp_path))
    with pytest.raises(SystemExit, match="does not hold eurosat, as torchvision keeps it"):
        run("imagenet_variants", [*variant("imagenet-r", tmp_path), "--variant", "eurosat"])
