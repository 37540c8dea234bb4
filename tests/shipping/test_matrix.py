"""The table of docs/heads.md: every kind of head goes through every tool."""

import re
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_calibft import attach, fold, get_gamma, set_gamma
from lightning_calibft.head.offset import attached_heads
from lightning_calibft.head.probe import probe
from tests.shipping.kinds import KINDS

SEEN, GAMMA = [0, 2], 2.5
SHIFT = torch.tensor([0.0, GAMMA, 0.0, GAMMA, GAMMA])
PAGE = Path(__file__).parents[2] / "docs" / "heads.md"

pytestmark = pytest.mark.filterwarnings("ignore")  # of the tools


def logits_of(model, x):
    with torch.no_grad():
        output = model(x)
    if isinstance(output, (tuple, list)):
        (output,) = output
    return output["logits"] if isinstance(output, dict) else getattr(output, "logits", output)


def assert_calibrated(model, kind, tolerance=1e-4):
    raw = logits_of(kind.make(), kind.inputs)
    assert raw.std() > 1e-3
    torch.testing.assert_close(logits_of(model, kind.inputs), raw + SHIFT, rtol=0, atol=tolerance)


def calibrated(kind):
    return set_gamma(kind.make(), GAMMA, SEEN, head=kind.head)


def attach_and_probe(kind, tmp_path):
    model = attach(kind.make(), kind.head)
    probe(lambda: model(kind.inputs), model)
    assert_calibrated(set_gamma(model, GAMMA, SEEN), kind)
    torch.testing.assert_close(logits_of(model.train().eval(), kind.inputs), logits_of(model, kind.inputs))


def compile_(kind, tmp_path):
    torch.compiler.reset()
    model = torch.compile(calibrated(kind), backend="aot_eager", fullgraph=True)
    assert_calibrated(model, kind)


def export(kind, tmp_path):
    program = torch.export.export(calibrated(kind), (kind.inputs,), strict=False)  # the default of newer torch
    torch.export.save(program, tmp_path / "model.pt2")
    assert_calibrated(torch.export.load(tmp_path / "model.pt2").module(), kind)


def onnx(kind, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.onnx.export(calibrated(kind), (kind.inputs,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    name = session.get_inputs()[0].name
    assert_calibrated(lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), kind)


def trace(kind, tmp_path):
    torch.jit.save(torch.jit.trace(calibrated(kind), kind.inputs, strict=False), tmp_path / "model.pt")
    assert_calibrated(torch.jit.load(tmp_path / "model.pt"), kind)


def fold_(kind, tmp_path):
    model = fold(calibrated(kind))
    assert not attached_heads(model)
    assert_calibrated(model, kind)
    fresh = kind.make()
    fresh.load_state_dict(model.state_dict())
    assert_calibrated(fresh, kind)


def int8(kind, tmp_path):
    """Weights in 8 bits move the logits; beside that, gamma is what it was."""
    torchao = pytest.importorskip("torchao.quantization")

    def quantized(model):
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        assert any("Int8" in type(weight).__name__ for weight in model.parameters()), "nothing is quantized"
        return logits_of(model, kind.inputs)

    attached, folded, expected = calibrated(kind), calibrated(kind), quantized(kind.make()) + SHIFT
    with suppress(ValueError):  # as the column before says
        fold(folded)
    for model in (attached, folded):
        torch.testing.assert_close(quantized(model), expected, rtol=0, atol=1e-4)


def adapters(kind, tmp_path):
    """LoRA elsewhere in the model, put in before or after calibrating. Where it is on the head, fold before merging."""
    peft = pytest.importorskip("peft")
    model = calibrated(kind)
    if isinstance(model, peft.PeftModel):
        assert_calibrated(fold(model).merge_and_unload(), kind)
        return
    heads = attached_heads(model).values()
    layers = (
        name
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer not in heads
    )
    config = peft.LoraConfig(target_modules=[next(layers)])  # which changes no logits until it is trained
    after = peft.get_peft_model(kind.make(), config)
    set_gamma(after, GAMMA, SEEN, head=kind.head and f"base_model.model.{kind.head}")
    for wrapped in (peft.get_peft_model(model, config), after):
        assert_calibrated(wrapped.eval(), kind)
        probe(partial(wrapped, kind.inputs), wrapped)
        assert_calibrated(wrapped.merge_and_unload(), kind)


def averages(kind, tmp_path):
    model = attach(kind.make(), kind.head)
    timm_average = ModelEmaV3(model, decay=0.0)
    torch_average = AveragedModel(model, use_buffers=True).eval()
    set_gamma(model, GAMMA, SEEN)
    timm_average.update(model)
    torch_average.update_parameters(model)
    for average in (timm_average.module, torch_average):
        assert get_gamma(average) == GAMMA
        assert_calibrated(average, kind)


TOOLS = {
    "attach, probe": attach_and_probe,
    "torch.compile": compile_,
    "torch.export": export,
    "ONNX": onnx,
    "torch.jit.trace": trace,
    "fold": fold_,
    "int8 (torchao)": int8,
    "LoRA (PEFT)": adapters,
    "EMA (timm, torch)": averages,
}


class Note(NamedTuple):
    """Why a cell has no check mark, and how the tool fails there."""

    letter: str
    reason: str
    error: type[Exception]
    match: str


NO_BIAS = Note(
    "a",
    "Refused: these logits do not have a bias that is added to them directly. Keep the calibration attached.",
    ValueError,
    "to fold gamma into",
)
NO_LINEAR = Note(
    "b",
    "Nothing to do: torchao quantizes `Linear` layers, and this model has none.",
    AssertionError,
    "nothing is quantized",
)
EXCEPTIONS = {
    ("custom cosine head", "fold"): NO_BIAS,
    ('`head="forward"` (SqueezeNet of torchvision)', "fold"): NO_BIAS,
    ('`head="forward"` (GPT-2 of Hugging Face)', "fold"): NO_BIAS,
    ("1x1 `Conv2d` (ResNetV2 of timm)", "int8 (torchao)"): NO_LINEAR,
    ('`head="forward"` (SqueezeNet of torchvision)', "int8 (torchao)"): NO_LINEAR,
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("row", KINDS)
def test_cell(row, tool, tmp_path):
    if note := EXCEPTIONS.get((row, tool)):
        with pytest.raises(note.error, match=note.match):
            TOOLS[tool](KINDS[row], tmp_path)
    else:
        TOOLS[tool](KINDS[row], tmp_path)


def test_the_page_says_what_was_run():
    page = PAGE.read_text().partition("## Networks")[0]
    header, _, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")
    ]
    cells = {(row, tool): cell for row, *line in rows for tool, cell in zip(header[1:], line, strict=True)}
    outcomes = {cell: f"({EXCEPTIONS[cell].letter})" if cell in EXCEPTIONS else "✓" for cell in product(KINDS, TOOLS)}
    assert cells == outcomes
    assert list(cells) == list(outcomes)
    notes = dict(re.findall(r"^- \((\w)\) (.*)$", page, re.MULTILINE))
    assert notes == {note.letter: note.reason for note in EXCEPTIONS.values()}
