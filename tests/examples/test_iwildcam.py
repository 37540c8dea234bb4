"""The benchmark of camera traps on a miniature of the folder of WILDS."""

from __future__ import annotations

import csv
import json
import random

import miniature
import pytest
import torch
from miniature import MODEL, TINY, run, script
from PIL import Image

from lightning_calibft import inspect_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:::lightning.pytorch"),
    pytest.mark.usefixtures("paper_environment"),
]

# Trap 7 shows species 1 and 2, and 3 in its later half; trap 8 nothing new; trap 9 species 4 in its third month.
TRAPS = {
    ("0", "train"): [0, 1, 2, 3, 4] * 4,
    ("7", "test"): [1, 2, 1, 1, 2, 1, 3, 1, 3, 2],
    ("8", "val"): [1, 2, 1, 2],
    ("9", "val"): [0, 1, 0, 1, 4, 0],
    ("5", "id_test"): [1, 2, 3, 4],
}
TIMES = [f"2013-{month:02d}-{day:02d} 10:00:00" for month in range(1, 11) for day in (3, 17)]


@pytest.fixture(scope="module")
def wilds(tmp_path_factory):
    """A folder as WILDS has it."""
    folder = tmp_path_factory.mktemp("iwildcam")
    (folder / "train").mkdir()
    rng, lines = random.Random(0), []
    for (trap, split), species in TRAPS.items():
        for position, y in enumerate(species):
            name = f"{trap}_{position}.jpg"
            Image.new("RGB", (32, 32), tuple((40 * y + rng.randrange(60)) % 256 for _ in range(3))).save(
                folder / "train" / name
            )
            line = {"split": split, "location_remapped": trap, "datetime": TIMES[position], "filename": name, "y": y}
            lines.append({**line, "sequence": 1})
    rng.shuffle(lines)
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    miniature.make_weights(folder / "weights.pt")
    return folder


def options(wilds, *more):
    return [
        "--data",
        wilds,
        "--weights",
        wilds / "weights.pt",
        "--model",
        MODEL,
        *TINY,
        "--output",
        wilds / "out",
        *more,
    ]


def steps(wilds, *more):
    iwildcam = script("iwildcam")
    args = iwildcam.parse_arguments([str(word) for word in options(wilds, *more)])
    return iwildcam.choose_steps(iwildcam.read_metadata(args.data), args)


def test_traps_that_show_new_species_later_are_divided_by_time(wilds):
    (first, second) = steps(wilds)
    assert (first.name, second.name) == ("7", "9")  # two absent images, and one
    assert [photo.species for photo in first.early] == [1, 2, 1, 1, 2]
    assert [photo.species for photo in first.late] == [1, 3, 1, 3, 2]
    assert (first.seen, first.num_absent, second.seen, second.num_absent) == ([1, 2], 2, [0, 1], 1)
    assert [step.name for step in steps(wilds, "--traps", "1")] == ["7"]


def test_a_stream_adds_month_after_month(wilds):
    found = {step.name: step for step in steps(wilds, "--stream")}
    assert list(found) == ["7, 2013-04", "9, 2013-03"]  # in May species 3 is no longer absent
    assert [photo.species for photo in found["7, 2013-04"].early] == [1, 2, 1, 1, 2, 1]
    assert [photo.species for photo in found["7, 2013-04"].late] == [3, 1]


@torch.no_grad()
def test_the_table_has_the_means_over_traps(wilds):
    table = run("iwildcam", options(wilds))
    head, _, *lines = [line.strip("| ").split(" | ") for line in table]
    assert "macro F1" in head
    assert [line[1] for line in lines][:3] == ["pre-trained", "fine-tuned", "fine-tuned + ALG"]
    files = [next((wilds / "out").glob(f"{trap}-*/results.json")) for trap in "79"]
    scores = [json.loads(file.read_text())["rows"]["fine-tuned + ALG"] for file in files]
    mean = sum(score["macro F1"] for score in scores) / 2
    assert lines[2][head.index("macro F1")] == f"{mean:.1f}"
    facts = inspect_checkpoint(files[0].with_name("fine_tuned.ckpt"))
    assert (facts["seen_classes"], facts["absent_classes"]) == ([1, 2], [0, 3, 4])
    assert facts["num_samples"] == 5

    late = [wilds / "train" / f"7_{position}.jpg" for position in range(5, 10)]
    target = TRAPS["7", "test"][5:]
    _, logits = miniature.outputs_of(files[0].with_name("fine_tuned.ckpt"), late, 5)
    logits[:, [0, 3, 4]] += scores[0]["gamma"]
    predicted, of_species = logits.argmax(1).tolist(), []
    for y in (1, 2, 3):
        hits = sum(p == t == y for p, t in zip(predicted, target, strict=True))
        of_species.append(2 * hits / (predicted.count(y) + target.count(y)))
    assert scores[0]["macro F1"] == pytest.approx(100 * sum(of_species) / 3, abs=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "lacks the columns datetime, filename"), (None, "to hold metadata.csv, as WILDS has it")],
)
def test_a_folder_that_is_not_that_of_wilds_is_refused(wilds, tmp_path, text, message):
    if text is not None:
        (tmp_path / "metadata.csv").write_text("split,y\n")
    with pytest.raises(SystemExit, match=message):
        run("iwildcam", options(wilds, "--data", tmp_path))
