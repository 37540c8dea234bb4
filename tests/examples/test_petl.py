"""The parameter-efficient ways to fine-tune do what they say, and their benchmark prints what their models do."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import TensorDataset

from lightning_calibft import AbsentClassCalibration, fold, get_gamma
from lightning_calibft.functional import ausuc
from tests.helpers.processes import run_python

pytestmark = pytest.mark.filterwarnings("ignore:::lightning.pytorch")

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
NUMBER = 12
SMALLEST = ["--packages", "fonts-dejavu", "--characters", str(NUMBER), "--seeds", "1", "--epochs", "1"]
WAYS = ["all parameters", "only the head", "BitFit", "LoRA", "adapters", "SSF", "VPT", "VQT"]
SMALL, LARGE = "0.0005", "0.005"  # steps
GAMMAS = ["ALG", "pseudo_absent", "oracle"]


@pytest.fixture(scope="module")
def petl():
    """The script as a module."""
    pytest.importorskip("peft")
    threads = torch.get_num_threads()
    with isolate_rng(), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        torch.set_num_threads(1)
        yield importlib.import_module("petl")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def fonts(petl):
    data = importlib.import_module("glyphs_data")
    try:
        data.find_faces(Path("/usr/share/fonts"), ("fonts-dejavu",))
    except data.MissingFontsError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def printed(fonts, tmp_path_factory):
    """What the script printed, and the folder it ran in."""
    folder = tmp_path_factory.mktemp("petl")
    done = run_python(FOLDER / "petl.py", *SMALLEST, cwd=folder)
    return done.stdout, folder / "outputs" / "benchmark_petl"


def start(petl, way):
    """A network with weights at random whose BatchNorm has seen images, the module to train, and what it had before."""
    torch.manual_seed(0)
    before = petl.glyphs.make_network("vit", NUMBER)
    with torch.no_grad():
        before(torch.randn(64, 3, 32, 32))
    module = petl.Classifier(before.eval(), "AdamW", 1e-2)
    module.backbone.requires_grad_(False).eval()
    pretrained = {**dict(module.backbone.named_parameters()), **dict(module.backbone.named_buffers())}
    petl.WAYS[way](module)
    return before, module, pretrained


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_each_way_starts_with_the_pretrained_logits(petl, way):
    before, module, _ = start(petl, way)
    images = torch.randn(3, 3, 32, 32)
    same = torch.equal(module.eval()(images), before(images))
    assert same == (way != "VPT")  # its prompts are attended to from the start


@pytest.mark.parametrize("way", WAYS)
def test_only_what_a_way_names_or_adds_is_trained(petl, way):
    _, module, pretrained = start(petl, way)
    old = {name: value.clone() for name, value in pretrained.items()}
    added = {
        name: value.detach().clone()
        for name, value in module.backbone.named_parameters()
        if not any(value is each for each in pretrained.values())
    }
    assert bool(added) == (way in ("LoRA", "adapters", "SSF", "VPT", "VQT"))
    data = TensorDataset(torch.randn(64, 3, 32, 32), torch.arange(64) % NUMBER)
    importlib.import_module("methods").fit(module, data, 2, 0)
    moved = {name for name, value in pretrained.items() if not torch.equal(value, old[name])}
    expected = {"all parameters": set(old), "BitFit": {name for name in old if name.endswith("bias")}}
    assert moved == expected.get(way, set())
    after = dict(module.backbone.named_parameters())
    assert not any(torch.equal(value, after[name]) for name, value in added.items())


def attention(block, asking, asked):
    """What a pre-norm block makes of some tokens that attend to others, from the definition."""
    heads, width = block.attn.num_heads, asking.shape[-1]
    query, key, value = block.attn.qkv.weight.split(width)
    of_query, of_key, of_value = block.attn.qkv.bias.split(width) if block.attn.qkv.bias is not None else (0, 0, 0)
    q = block.norm1(asking) @ query.T + of_query
    k, v = block.norm1(asked) @ key.T + of_key, block.norm1(asked) @ value.T + of_value
    parts = []
    for mine, keys, values in zip(*(each.chunk(heads, -1) for each in (q, k, v)), strict=True):
        weights = (mine @ keys.mT / (width / heads) ** 0.5).softmax(-1)
        parts.append(weights @ values)
    tokens = asking + block.attn.proj(torch.cat(parts, -1))
    return tokens + block.mlp(block.norm2(tokens))


@torch.no_grad()
def test_queries_find_and_change_nothing(petl):
    before, module, _ = start(petl, "VQT")
    images, vit = torch.randn(2, 3, 32, 32), before.backbone
    inputs = []
    for block in vit.blocks:
        block.register_forward_pre_hook(lambda block, args: inputs.append(args[0]))
    own, features = vit(images), module.eval().backbone(images)
    assert torch.equal(features[:, : own.shape[1]], own)
    found = features[:, own.shape[1] :].reshape(2, len(vit.blocks), petl.TOKENS, -1)
    for index, (block, tokens) in enumerate(zip(vit.blocks, inputs, strict=True)):
        queries = module.backbone.vit.blocks[index].queries.expand(2, -1, -1)
        torch.testing.assert_close(found[:, index], vit.norm(attention(block, queries, tokens)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_prompts_are_attended_to_and_dropped(petl):
    before, module, _ = start(petl, "VPT")
    images, tokens = torch.randn(2, 3, 32, 32), []
    before.backbone.blocks[0].register_forward_pre_hook(lambda block, args: tokens.append(args[0]))
    before(images)
    (tokens,) = tokens
    for prompted, block in zip(module.backbone.blocks, before.backbone.blocks, strict=True):
        asked = torch.cat([tokens, prompted.prompts.expand(2, -1, -1)], 1)
        tokens = attention(block, tokens, asked)
    expected = before.head(before.backbone.norm(tokens)[:, 0])
    torch.testing.assert_close(module.eval()(images), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("axis", "shape"), [(1, (2, 5, 3, 4)), (-1, (2, 7, 5))], ids=["maps", "tokens"])
def test_scales_and_shifts_are_those_of_channels(petl, axis, shape):
    x = torch.randn(shape)
    along = (1, 5, 1, 1) if axis == 1 else (5,)
    added = petl.ScaleShift(5, axis)
    added.scale.copy_(torch.arange(5.0))
    added.shift.copy_(torch.arange(5.0) ** 2)
    torch.testing.assert_close(added(x), x * added.scale.reshape(along) + added.shift.reshape(along))


@torch.no_grad()
def test_an_adapter_is_a_bottleneck_beside_the_identity(petl):
    tokens, adapter = torch.randn(2, 7, 5), petl.Adapter(5)
    assert adapter.down.weight.shape == (petl.WIDTH, 5)
    nn.init.normal_(adapter.up.weight)
    hidden = (tokens @ adapter.down.weight.T + adapter.down.bias).clamp(min=0)
    torch.testing.assert_close(adapter(tokens), tokens + hidden @ adapter.up.weight.T + adapter.up.bias)


def stored(printed, way):
    """The scores after training with small steps."""
    return json.loads((printed[1] / f"{way.replace(' ', '_')}_50_AdamW_{SMALL}_0.json").read_text())["rows"]


def test_it_prints_a_table(printed):
    header, _, *lines = (line.strip("| ").split(" | ") for line in printed[0].split("\n\n")[0].splitlines())
    columns = ["thousands trained", "seconds", "Acc_S/S", "AUSUC", "fine-tuned", *(f"+ {name}" for name in GAMMAS)]
    assert header == ["ViT, 50 % seen, AdamW", *columns, *(f"gamma of {name}" for name in GAMMAS)]
    both = [f"{way}, {rate}" for way in WAYS for rate in (SMALL, LARGE)]
    assert [line[0] for line in lines] == [name for name in both if name != f"all parameters, {LARGE}"]
    for line in lines:
        tuned, *calibrated = (float(cell.split(" ± ")[0]) for cell in line[5:9])
        assert calibrated[-1] >= max(tuned, *calibrated)


def test_all_start_from_the_same_scores(printed):
    assert len({json.dumps(stored(printed, way)["pre-trained"]) for way in WAYS}) == 1
    before = stored(printed, "VQT")["pre-trained"]
    assert f"Before fine-tuning: AUSUC {before['AUSUC']:.1f} ± 0.0, Acc_U/U {before['Acc_U/U']:.1f} ± 0.0" in printed[0]


def test_parameters_are_counted(printed):
    """The ViT has four blocks of width 160; each gets four tokens, or an adapter of width 16."""
    head, tokens = 160 * NUMBER + NUMBER, 4 * 4 * 160
    added = {"only the head": 0, "VPT": tokens, "VQT": tokens + tokens * NUMBER}
    added["adapters"] = 4 * (2 * 16 * 160 + 16 + 160)
    for way, number in added.items():
        assert stored(printed, way)["training"]["parameters"] == head + number


def setting_of(petl, printed, way):
    """The setting of the printed run, with small steps."""
    ((start,),) = petl.glyphs.settings_of(petl.parse_arguments([*SMALLEST, "--output", str(printed[1])])).values()
    return next(each for each in petl.tunings(start) if each.way == way)


@torch.no_grad()
def test_absent_classes_can_do_without_queries(petl, printed):
    setting = setting_of(petl, printed, "VQT")
    with torch.enable_grad():
        module = petl.tune(setting, setting.start())
    images, target = setting.data.target_test.tensors
    features, weight = module.backbone(images), module.head.weight
    seen = torch.isin(torch.arange(NUMBER), torch.tensor(setting.seen))
    logits = features[:, :160] @ weight[:, :160].T + module.head.bias
    logits += (features[:, 160:] @ weight[:, 160:].T) * seen
    rows = stored(printed, "VQT")
    area = 100 * ausuc(logits.double(), target, setting.seen).item()
    assert rows["VQT without absent queries"]["AUSUC"] == pytest.approx(area, abs=1e-3)
    assert rows["fine-tuned"]["AUSUC"] != pytest.approx(area, abs=1e-3)
    assert f"VQT, {SMALL}, with the new columns of absent classes set to zero after training: AUSUC" in printed[0]


def test_draws_differ_in_the_seen_classes_alone(petl, printed):
    args = petl.parse_arguments([*SMALLEST, "--seeds", "2", "--output", str(printed[1])])
    (starts,) = petl.glyphs.settings_of(args).values()
    one, other = (next(petl.tunings(start)) for start in starts)
    assert one.seen != other.seen
    assert one.data is other.data
    for a, b in zip(one.pretrained().parameters(), other.pretrained().parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("way", ["LoRA", "VQT"])
def test_the_callback_finds_the_same_gamma(petl, printed, way):
    setting = setting_of(petl, printed, way)
    calibration = AbsentClassCalibration(setting.seen, estimator="pseudo_absent", source="train")
    module = setting.start()
    importlib.import_module("methods").fit(module, setting.seen_data, 1, 0, callbacks=[calibration])
    gamma = stored(printed, way)["fine-tuned + pseudo_absent"]["gamma"]
    assert calibration.result.gamma == pytest.approx(gamma, abs=1e-4)
    assert get_gamma(module) == pytest.approx(gamma, abs=1e-4)
    images = setting.data.target_test.tensors[0][:8]
    with torch.no_grad():
        logits = module.eval()(images)
        torch.testing.assert_close(fold(module)(images), logits)


def test_a_second_run_trains_nothing(petl, printed, monkeypatch, capsys):
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", None)
    petl.main([*SMALLEST, "--output", str(printed[1])])
    assert capsys.readouterr().out == printed[0]


def test_without_fonts_it_says_what_to_install(petl, tmp_path):
    with pytest.raises(SystemExit, match="apt-get install fonts-dejavu"):
        petl.main([*SMALLEST, "--fonts", str(tmp_path)])
