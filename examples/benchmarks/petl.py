"""Fine-tune few parameters: which ways need gamma, and which estimators find it?

    python examples/benchmarks/petl.py

Each way starts from the pre-trained ViT of ``glyphs.py``, that of seed 0; the runs differ in which characters are seen.
The head is trained, and of the backbone only what a way adds or names. All else is frozen, BatchNorm's running
statistics too. The learning rate is that of ``glyphs.py``, and for few parameters also ten times as much. What is
finished is kept in the folder ``--output``: a benchmark that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

import glyphs
from compare import before, gamma_rows, kept, prepare
from glyphs import GlyphSetting
from glyphs_data import GlyphData
from methods import Classifier, add_low_rank, tune
from table import Rows, Scores, markdown, oracle, run, score, spread
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

TOKENS = 4
"""Prompts or queries of each block."""
WIDTH = 16
"""Of an adapter."""


class Adapter(nn.Module):
    """A bottleneck beside the identity. It starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, WIDTH), nn.Linear(WIDTH, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``(N, L, D)`` to tokens."""
        return tokens + self.up(self.down(tokens).relu())


class ScaleShift(nn.Module):
    """A factor and a summand for each channel. They start at 1 and 0.

    Args:
        channels: Number of channels.
        axis: Their axis.
    """

    def __init__(self, channels: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.scale, self.shift = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        return (x.movedim(self.axis, -1) * self.scale + self.shift).movedim(-1, self.axis)


def learned_tokens(width: int) -> nn.Parameter:
    """Return new tokens, drawn as those of visual prompt tuning."""
    limit = (6 / (3 * 8 * 8 + width)) ** 0.5  # a token of these networks is made of about 8 x 8 pixels
    return nn.Parameter(torch.empty(TOKENS, width).uniform_(-limit, limit))


class PromptedBlock(nn.Module):
    """A block whose tokens attend to learned ones as well; what becomes of those is dropped."""

    def __init__(self, block: Block, width: int) -> None:
        super().__init__()
        self.block, self.prompts = block, learned_tokens(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``(N, L, D)`` to tokens."""
        return self.block(torch.cat([tokens, self.prompts.expand(len(tokens), -1, -1)], 1))[:, : tokens.shape[1]]


class QueriedBlock(nn.Module):
    """A block with learned tokens that attend to its own ``length`` ones, which do not attend to them.

    So nothing changes for the tokens of the network. What the learned ones find goes with them, behind the
    ``length`` first, past all later blocks.
    """

    def __init__(self, block: Block, width: int, length: int) -> None:
        super().__init__()
        self.block, self.queries, self.length = block, learned_tokens(width), length

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``(N, L, D)`` to tokens ``(N, L + TOKENS, D)``."""
        own, found = tokens[:, : self.length], tokens[:, self.length :]
        both = torch.cat([own, self.queries.expand(len(own), -1, -1)], 1)
        attended = torch.arange(both.shape[1], device=both.device) < self.length
        both = self.block(both, attn_mask=attended.expand(both.shape[1], -1))
        return torch.cat([both[:, : self.length], found, both[:, self.length :]], 1)


class QueriedViT(nn.Module):
    """A ViT whose features are followed by what the queries of all its blocks have found, normalized like its own."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit, self.length = vit, vit.num_prefix_tokens + vit.patch_embed.num_patches
        vit.blocks = nn.Sequential(*(QueriedBlock(block, vit.embed_dim, self.length) for block in vit.blocks))

    def forward(self, images: Tensor) -> Tensor:
        """Map images to features ``(N, D + blocks * TOKENS * D)``."""
        tokens = self.vit.forward_features(images)
        own = self.vit.forward_head(tokens[:, : self.length], pre_logits=True)
        return torch.cat([own, tokens[:, self.length :].flatten(1)], 1)


def nothing(module: Classifier) -> None:
    """Linear probing."""


def everything(module: Classifier) -> None:
    """Ordinary fine-tuning."""
    module.backbone.requires_grad_(True).train()


def biases(module: Classifier) -> None:
    """BitFit: Ben Zaken et al., ACL 2022."""
    for name, parameter in module.backbone.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))


def low_rank(module: Classifier) -> None:
    """LoRA by ``peft``, on all linear layers and convolutions: Hu et al., ICLR 2022."""
    add_low_rank(module.backbone, torch.initial_seed())


def adapters(module: Classifier) -> None:
    """Adapters behind the MLP of each block: Houlsby et al., ICML 2019."""
    for block in module.backbone.blocks:
        block.mlp = nn.Sequential(block.mlp, Adapter(module.backbone.embed_dim))


def scales_and_shifts(module: Classifier) -> None:
    """SSF, behind all linear layers, convolutions and norms: Lian et al., NeurIPS 2022."""
    for name, layer in list(module.backbone.named_modules()):
        if isinstance(layer, nn.Linear):
            added = ScaleShift(layer.out_features, -1)
        elif isinstance(layer, nn.Conv2d):
            added = ScaleShift(layer.out_channels, 1)
        elif isinstance(layer, nn.LayerNorm):
            added = ScaleShift(layer.normalized_shape[0], -1)
        elif isinstance(layer, nn.BatchNorm2d):
            added = ScaleShift(layer.num_features, 1)
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(module.backbone.get_submodule(parent), child, nn.Sequential(layer, added))


def prompts(module: Classifier) -> None:
    """Deep visual prompt tuning: Jia et al., ECCV 2022."""
    vit = module.backbone
    vit.blocks = nn.Sequential(*(PromptedBlock(block, vit.embed_dim) for block in vit.blocks))


def queries(module: Classifier) -> None:
    """Visual query tuning: Tu et al., CVPR 2023.

    The head gets new columns for what the queries find. They are zero at first, so that training starts from the
    logits of the pre-trained network.
    """
    head, module.backbone = module.head, QueriedViT(module.backbone)
    columns = (1 + len(module.backbone.vit.blocks) * TOKENS) * head.in_features
    module.head = nn.Linear(columns, head.out_features)
    with torch.no_grad():
        module.head.weight.zero_()[:, : head.in_features] = head.weight
        module.head.bias.copy_(head.bias)


WAYS: dict[str, Callable[[Classifier], None]] = {
    "all parameters": everything,
    "only the head": nothing,
    "BitFit": biases,
    "LoRA": low_rank,
    "adapters": adapters,
    "SSF": scales_and_shifts,
    "VPT": prompts,
    "VQT": queries,
}


@dataclass(frozen=True, kw_only=True)
class Tuning(GlyphSetting):
    """A setting, whose data and pre-trained network are those of seed 0, and how to fine-tune.

    Args:
        way: A name in ``WAYS``.
    """

    sources: ClassVar[tuple[Path, ...]] = (*GlyphSetting.sources, Path(__file__))

    way: str

    @property
    def origin(self) -> GlyphSetting:
        """Where the data and the pre-trained network come from."""
        return GlyphSetting(**{**fields_of(self), "seed": 0})

    @property
    def data(self) -> GlyphData:
        """All images."""
        return self.origin.data

    def pretrained(self) -> nn.Module:
        """Return the network trained on source images of all characters."""
        return self.origin.pretrained()

    def start(self) -> Classifier:
        """Return a new module with the pre-trained weights, in which only what is to be trained needs gradients."""
        module = Classifier(self.pretrained(), self.optimizer, self.learning_rate)
        module.backbone.requires_grad_(False).eval()
        torch.manual_seed(self.seed)
        WAYS[self.way](module)
        return module


def fields_of(setting: GlyphSetting) -> dict[str, Any]:
    """Return what a setting of ``glyphs.py`` is made of."""
    return {each.name: getattr(setting, each.name) for each in fields(GlyphSetting)}


def rows_of(setting: Tuning) -> Rows:
    """Fine-tune, and score the model with all gammas."""
    module = setting.start()
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    begin = time.process_time()
    tune(setting, module)
    seconds = time.process_time() - begin
    outputs = run(module, setting)
    started = replace(setting, way="all parameters", learning_rate=0.0)  # the same for all: scored once
    rows = gamma_rows("fine-tuned", outputs, started)
    rows["fine-tuned + oracle"] = score(outputs, setting, oracle(outputs, setting))
    rows |= {"pre-trained": score(before(started), setting), "training": {"parameters": trained, "seconds": seconds}}
    if setting.way == "VQT":
        with torch.no_grad():
            absent = [row for row in range(setting.num_classes) if row not in setting.seen]
            module.head.weight[absent, module.backbone.vit.embed_dim :] = 0
        rows["VQT without absent queries"] = score(run(module, setting), setting)
    return rows


def in_one_line(rows: Rows) -> Scores:
    """Return what is trained and for how long, the overall accuracy with each gamma, and the gammas."""
    tuned, *calibrated = (name for name in rows if name.startswith("fine-tuned"))
    line = {"thousands trained": rows["training"]["parameters"] / 1000, "seconds": rows["training"]["seconds"]}
    line |= {column: rows[tuned][column] for column in ("Acc_S/S", "AUSUC")}
    line |= {name.removeprefix(f"{tuned} "): rows[name]["Acc_Y/Y"] for name in (tuned, *calibrated)}
    return line | {f"gamma of {name.removeprefix(f'{tuned} + ')}": rows[name]["gamma"] for name in calibrated}


def tunings(start: GlyphSetting) -> Iterator[Tuning]:
    """Yield all ways: all but the first with small and with large steps."""
    for way in WAYS:
        for factor in (1,) if way == "all parameters" else (1, 10):
            yield Tuning(**{**fields_of(start), "learning_rate": factor * start.learning_rate}, way=way)


def lines(args: argparse.Namespace) -> Iterator[str]:
    """Score all ways on each draw of the seen classes."""
    ((title, starts),) = glyphs.settings_of(args).items()
    runs = []
    for start in starts:
        done = {each: kept(each.output, each.way.replace(" ", "_"), each, rows_of) for each in tunings(start)}
        runs.append({f"{each.way}, {each.learning_rate:g}": rows for each, rows in done.items()})
    yield from markdown(title, [{name: in_one_line(rows) for name, rows in each.items()} for each in runs])
    yield ""
    yield f"- Before fine-tuning: {scores([next(iter(each.values())) for each in runs], 'pre-trained')}"
    for name in (name for name in runs[0] if name.startswith("VQT")):
        text = f"{name}, with the new columns of absent classes set to zero after training"
        yield f"- {text}: {scores([each[name] for each in runs], 'VQT without absent queries')}"
    yield ""
    yield f"mean ± sd of {len(runs)} draws of the seen classes; %, gamma in logits; seconds of a core for a training"


def scores(runs: Sequence[Rows], row: str) -> str:
    """Format what is told in a sentence."""
    return ", ".join(f"{column} {spread(runs, row, column)}" for column in ("AUSUC", "Acc_U/U", "Acc_Y/Y"))


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    prepare()
    glyphs.check_fonts(args)
    for line in lines(args):
        print(line, flush=True)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    of_glyphs = glyphs.parse_arguments(["--networks", "vit", "--shares", "50", "--optimizers", "adamw"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of draws of the seen classes (default: 3)")
    parser.add_argument("--epochs", type=int, default=12, help="epochs of each training (default: 12)")
    parser.add_argument("--characters", type=int, default=of_glyphs.characters, help="number of classes (default: all)")
    parser.add_argument("--packages", nargs="+", choices=of_glyphs.packages, default=of_glyphs.packages)
    parser.add_argument("--fonts", type=Path, default=of_glyphs.fonts, help="where the font files are")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_petl"), help="where all is kept")
    return argparse.Namespace(**{**vars(of_glyphs), **vars(parser.parse_args(arguments))})


if __name__ == "__main__":
    main()
