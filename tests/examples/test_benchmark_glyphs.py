"""The glyphs benchmark in its smallest setting, on the faces of one package."""

from __future__ import annotations

import importlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image

from tests.helpers.processes import run_python

pytestmark = pytest.mark.filterwarnings("ignore:::lightning.pytorch")

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
FONTS = Path("/usr/share/fonts")
NUMBER = 12
SMALLEST = ["--packages", "fonts-dejavu", "--characters", str(NUMBER), "--seeds", "1", "--epochs", "1"]
ONE_TABLE = ["--networks", "resnet", "--optimizers", "sgd", "--shares", "50", "--accelerator", "cpu"]


@pytest.fixture(scope="module")
def bench():
    """The script as a module."""
    threads = torch.get_num_threads()
    with isolate_rng(), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        torch.set_num_threads(1)
        yield importlib.import_module("glyphs")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def glyphs(bench):
    """The module of the data, if there are faces to draw with."""
    module = importlib.import_module("glyphs_data")
    try:
        module.find_faces(FONTS, ("fonts-dejavu",))
    except module.MissingFontsError as error:
        pytest.skip(str(error))
    return module


@pytest.fixture(scope="module")
def printed(glyphs, tmp_path_factory):
    """What the script printed in two processes, and the folder it ran in."""
    folder = tmp_path_factory.mktemp("glyphs")
    done = run_python(FOLDER / "glyphs.py", *SMALLEST, *ONE_TABLE, "--jobs", "2", cwd=folder)
    return done, folder


@pytest.fixture(scope="module")
def setting(bench, printed):
    args = bench.parse_arguments([*SMALLEST, *ONE_TABLE])
    ((only,),) = bench.settings_of(args).values()
    return replace(only, output=printed[1] / "outputs" / "benchmark_glyphs")


def draw(glyphs, seed):
    glyphs.make_data.cache_clear()
    return glyphs.make_data(FONTS, ("fonts-dejavu",), glyphs.CHARACTERS[:NUMBER], seed)


def test_images_are_determined_by_the_seed(glyphs):
    first, again, other = (draw(glyphs, seed) for seed in (0, 0, 1))
    for name, number in glyphs.IMAGES.items():
        images, labels = getattr(first, name).tensors
        assert images.shape == (NUMBER * number, 3, 32, 32)
        assert labels.bincount().tolist() == [number] * NUMBER
        assert -1 <= images.min() < -0.5
        assert 0.5 < images.max() <= 1
        assert torch.equal(images, getattr(again, name).tensors[0])
        assert not torch.equal(images, getattr(other, name).tensors[0])


def test_no_face_is_in_two_parts_and_each_part_has_all_characters(glyphs):
    domains = glyphs.find_faces(FONTS, ("fonts-dejavu",))
    parts = []
    for domain, faces in domains.items():
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            dealt = glyphs.deal(faces, glyphs.SHARES[domain], glyphs.CHARACTERS, generator)
            parts = [{face.file for face in part} for part in dealt.values()]
            assert not any(a & b for a, b in combinations(parts, 2))
            assert set.union(*parts) == {face.file for face in faces}
            for part in dealt.values():
                assert set(glyphs.CHARACTERS) == set().union(*(face.characters for face in part))
    source, target = ({face.file for face in faces} for faces in domains.values())
    assert not source & target


def test_the_table_names_each_face_once(glyphs):
    names = list(chain.from_iterable(" ".join(pair).split() for pair in glyphs.FACES.values()))
    assert len(names) == len(set(names)) > 80
    assert len(glyphs.CHARACTERS) == len(set(glyphs.CHARACTERS))


def test_no_two_characters_look_the_same(glyphs):
    for face in glyphs.find_faces(FONTS, ("fonts-dejavu",))["source"]:
        assert face.characters == set(glyphs.CHARACTERS)
        pictures = {glyphs.draw(face, character).tobytes() for character in glyphs.CHARACTERS}
        assert len(pictures) == len(glyphs.CHARACTERS)


def test_characters_are_drawn_whole_and_equally_large(glyphs):
    for face in glyphs.find_faces(FONTS, ("fonts-dejavu",))["target"]:
        for character in glyphs.CHARACTERS:
            left, top, right, bottom = glyphs.draw(face, character).getbbox()
            assert glyphs.GLYPH_SIZE - 3 <= max(right - left, bottom - top) <= glyphs.GLYPH_SIZE
            assert abs(left + right - glyphs.MASK_SIZE) <= 4
            assert abs(top + bottom - glyphs.MASK_SIZE) <= 4


def test_what_a_face_lacks_is_not_drawn(glyphs, monkeypatch):
    face = glyphs.find_faces(FONTS, ("fonts-dejavu",))["source"][0]
    monkeypatch.setattr(glyphs, "CHARACTERS", "A Б\ue83a漢")  # a space, one for private use, one that it lacks
    assert glyphs.read_face(face.file).characters == {"A", "Б"}
    partial = glyphs.Face(face.file, frozenset("B"))
    masks, labels = glyphs.draw_part([partial, face], "AB", 3, torch.Generator().manual_seed(0))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = torch.frombuffer(bytearray(glyphs.draw(face, "A").tobytes()), dtype=torch.uint8).view(1, 64, 64) / 255
    assert all(torch.equal(mask, expected) for mask in masks[:3])


def test_without_fonts_it_says_what_to_install(bench, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main([*SMALLEST, "--fonts", str(tmp_path), "--output", str(tmp_path / "scores")])
    assert f"below {tmp_path}" in stopped.value.code  # a string: Python prints it, and ends with status 1
    assert "\n    apt-get install fonts-dejavu\n" in stopped.value.code
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def test_it_writes_a_picture_and_nothing_else(bench, glyphs, tmp_path, capsys):
    bench.main([*SMALLEST, "--samples", str(tmp_path / "sheet.png"), "--output", str(tmp_path / "scores")])
    assert capsys.readouterr().out == ""
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.size == (24 * 64, 4 * 64)


def test_it_prints_the_table_of_all_methods(printed, setting):
    done, _ = printed
    rows = json.loads((setting.output / "resnet_50_SGD_0.01_0.json").read_text())["rows"]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("| ResNet, 50 % seen, SGD | Acc_Y/Y |")
    assert [line.split(" | ")[0].strip("| ") for line in lines[2 : 2 + len(rows)]] == list(rows)
    assert len(rows) == 31
    assert rows["fine-tuned + oracle gamma"]["Acc_Y/Y"] >= rows["fine-tuned"]["Acc_Y/Y"]
    assert rows["fine-tuned on all classes"]["cost"] == 2
    assert any(line.startswith("ResNet, pre-trained: ") for line in lines)
    assert "resnet_0.pt: " in done.stderr
    assert "resnet_50_SGD_0.01_0.json: " in done.stderr


def test_a_second_run_trains_nothing_and_prints_the_same(bench, printed, setting, monkeypatch, capsys):
    def in_this_process(jobs, context, initializer):
        return ThreadPoolExecutor(jobs, initializer=initializer)

    monkeypatch.setattr(bench, "ProcessPoolExecutor", in_this_process)
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", None)
    bench.main([*SMALLEST, *ONE_TABLE, "--output", str(setting.output)])
    again = capsys.readouterr()
    assert again.out.splitlines()[:-1] == printed[0].stdout.splitlines()[:-1]
    assert again.err == ""


def test_one_process_computes_the_same(bench, setting, tmp_path):
    rows = json.loads((setting.output / "resnet_50_SGD_0.01_0.json").read_text())["rows"]
    torch.manual_seed(123)
    assert bench.rows_of(replace(setting, output=tmp_path)) == rows


def test_other_weights_are_trained_again(bench, setting, tmp_path, capsys):
    for epochs in (1, 1, 2):
        bench.pretrained.cache_clear()
        bench.source_accuracy(replace(setting, output=tmp_path, epochs=epochs))
    assert capsys.readouterr().err.count("resnet_0.pt: ") == 2


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_linear_probing_keeps_running_statistics(bench, setting, tmp_path, name):
    methods = importlib.import_module("methods")
    setting = replace(setting, network=name, output=tmp_path)
    before = setting.pretrained().state_dict()
    statistics = {key for key in before if "running_" in key}
    for method, stay in ((methods.linear_probing, True), (methods.fine_tuned, False)):
        after = method(setting).state_dict()
        assert all(torch.equal(after[key], before[key]) == stay for key in statistics)
        assert not torch.equal(after["head.weight"], before["head.weight"])
    after = methods.with_cosine_head(setting).state_dict()
    assert all(torch.equal(after[key], before[key]) for key in statistics)
    assert statistics
