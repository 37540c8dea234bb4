"""Characters in two domains: upright text faces, dark on light, and other faces, colored and distorted.

All images are drawn from Debian's font packages, and are determined by the seed, the font files and Pillow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor
from torch.utils.data import TensorDataset

# Of characters that look alike when they are drawn equally large, such as c and C or the Latin and the Greek A, one.
CHARACTERS = (
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abdefghijmnqrty" + "123456789"
    "ÆŒØÞÇÑÅÉÜŠŁßÂÔŽ"
    "ΓΔΛΞΠΣΨΩ" + "αβγδεζηθλμξπσςτω"
    "БДЖИЙЛФЦЧШЩЪЫЬЭЮЯЄЇЉЊЂЏҐ" + "бђ"
    "&%#@$€£¥§?!+=<>*{}©¶«»±÷¿†‡"
)  # fmt: skip
IMAGE_SIZE = 32
MASK_SIZE = 2 * IMAGE_SIZE
GLYPH_SIZE = 44  # the longer side of a character in its mask
NOT_A_CHARACTER = "\uffff"  # drawn as what a face shows for all that it lacks
FACES: dict[str, tuple[str, str]] = {  # package -> source faces, target faces: files without their suffix
    "fonts-dejavu": (
        "DejaVuSans DejaVuSans-ExtraLight DejaVuSansCondensed DejaVuSerif DejaVuSerifCondensed",
        "DejaVuSans-BoldOblique DejaVuSansMono-Bold DejaVuSansMono-Oblique DejaVuSerif-BoldItalic DejaVuSerif-Italic",
    ),
    "fonts-liberation": (
        "LiberationSans-Regular LiberationSansNarrow-Regular LiberationSerif-Regular",
        "LiberationMono-Bold LiberationMono-Italic LiberationSans-BoldItalic LiberationSerif-BoldItalic",
    ),
    "fonts-freefont-ttf": (
        "FreeSans FreeSerif",
        "FreeMono FreeMonoBoldOblique FreeSansBoldOblique FreeSerifBold FreeSerifItalic",
    ),
    "fonts-linuxlibertine": ("LinBiolinum_R LinLibertine_R", "LinBiolinum_RI LinLibertine_M LinLibertine_RBI"),
    "fonts-roboto-unhinted": (
        "Roboto-Regular Roboto-Light Roboto-Medium RobotoCondensed-Regular",
        "Roboto-BlackItalic Roboto-ThinItalic RobotoCondensed-BoldItalic",
    ),
    "fonts-open-sans": ("OpenSans-Regular OpenSans-Light", "OpenSans-ExtraBoldItalic OpenSans-CondLightItalic"),
    "fonts-lato": ("Lato-Regular Lato-Medium Lato-Light", "Lato-BlackItalic Lato-HairlineItalic"),
    "fonts-cmu": (
        "cmunrm cmunss cmunorm",
        "cmunbi cmunci cmunit cmuntb cmuntt cmunui cmunvi cmunbtl cmunso cmunssdc",
    ),
    "fonts-paratype": ("PTF55F PTS55F PTN57F PTC55F", "PTF76F PTS76F PTM75F PTZ56F"),
    "fonts-ebgaramond": ("EBGaramond12-Regular", "EBGaramond12-Italic EBGaramond12-Bold"),
    "fonts-oldstandard": ("OldStandard-Regular", "OldStandard-Italic OldStandard-Bold"),
    "fonts-vollkorn": ("Vollkorn-Regular Vollkorn-Medium", "Vollkorn-BlackItalic Vollkorn-Italic"),
    "fonts-stix": ("STIX-Regular", "STIX-BoldItalic"),
    "fonts-play": ("Play-Regular", "Play-Bold"),
    "fonts-jura": ("", "Jura-Light Jura-Bold"),
    "fonts-comfortaa": ("", "Comfortaa-Light Comfortaa-Bold"),
    "fonts-lobster": ("", "lobster"),
    "fonts-fantasque-sans": ("", "FantasqueSansMono-Regular FantasqueSansMono-BoldItalic"),
    "fonts-mononoki": ("", "mononoki-Bold mononoki-Italic"),
    "fonts-gnutypewriter": ("", "GNUTypewriter"),
    "fonts-opendyslexic": ("", "OpenDyslexic-Bold OpenDyslexicAlta-Italic"),
    "fonts-comic-neue": ("", "ComicNeue-BoldItalic ComicNeue-Light"),
    "fonts-dkg-handwriting": ("", "dkg dkgBI"),
    "fonts-breip": ("", "Breip"),
    "fonts-femkeklaver": ("", "femkeklaver"),
    "fonts-kaushanscript": ("", "KaushanScript-Regular"),
    "fonts-ecolier-court": ("", "Ecolier-court"),
}


class MissingFontsError(Exception):
    """Some of the faces are not there; the message names the packages."""


@dataclass(frozen=True)
class GlyphData:
    """The parts of the data, images ``(N, 3, 32, 32)`` from -1 to 1. No face is in two parts."""

    source: TensorDataset
    source_test: TensorDataset
    target_train: TensorDataset
    held_out: TensorDataset
    target_test: TensorDataset


SHARES = {"source": {"source": 0.8, "source_test": 0.2}}
SHARES["target"] = {"target_train": 0.55, "target_test": 0.35, "held_out": 0.1}  # of the faces of a domain
IMAGES = {"source": 32, "source_test": 5, "target_train": 10, "target_test": 10, "held_out": 1}  # of each class


@dataclass(frozen=True)
class Face:
    """A font file, and the characters that it has."""

    file: Path
    characters: frozenset[str]

    @property
    def font(self) -> ImageFont.FreeTypeFont:
        """The face in the size that all is drawn in."""
        return ImageFont.truetype(str(self.file), GLYPH_SIZE, layout_engine=ImageFont.Layout.BASIC)


@lru_cache
def find_faces(folder: Path, packages: tuple[str, ...]) -> dict[str, list[Face]]:
    """Find the faces of the two domains below a folder, in the order of ``FACES``."""
    files: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".ttf", ".otf"):
            files.setdefault(file.stem, file)
    names = {package: " ".join(FACES[package]).split() for package in packages}
    if missing := [package for package in packages if not files.keys() >= set(names[package])]:
        raise MissingFontsError(
            f"Expected the faces of {len(packages)} font packages below {folder}, but those of {len(missing)} are not "
            f"there. Get them by\n\n    apt-get install {' '.join(missing)}\n\nor name their folder by `--fonts`."
        )
    pairs = [FACES[package] for package in packages]
    return {
        domain: [read_face(files[name]) for pair in pairs for name in pair[index].split()]
        for index, domain in enumerate(SHARES)
    }


def fingerprint(files: Iterable[Path]) -> str:
    """Hash what is in some files."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def read_face(file: Path) -> Face:
    """Read which of the characters a face has: it does not draw them as nothing, or as what it lacks."""
    font = Face(file, frozenset()).font
    lacking = bytes(font.getmask(NOT_A_CHARACTER))
    masks = {character: font.getmask(character) for character in CHARACTERS}
    has = [character for character, mask in masks.items() if mask.getbbox() and bytes(mask) != lacking]
    return Face(file, frozenset(has))


def draw(face: Face, character: str) -> Image.Image:
    """Draw a character white on black, in the middle of a square and as large as all others."""
    left, top, right, bottom = face.font.getbbox(character)
    image = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(image).text((2 - left, 2 - top), character, fill=255, font=face.font)
    cut = image.crop(image.getbbox())
    ratio = GLYPH_SIZE / max(cut.size)
    size = [max(1, round(side * ratio)) for side in cut.size]
    canvas = Image.new("L", (MASK_SIZE, MASK_SIZE))
    canvas.paste(cut.resize((size[0], size[1])), ((MASK_SIZE - size[0]) // 2, (MASK_SIZE - size[1]) // 2))
    return canvas


@lru_cache(maxsize=2)
def make_data(folder: Path, packages: tuple[str, ...], characters: str, seed: int) -> GlyphData:
    """Deal the faces out to the parts, and draw each part's images, all determined by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for domain, faces in find_faces(folder, packages).items():
        for part, of_part in deal(faces, SHARES[domain], characters, generator).items():
            masks, labels = draw_part(of_part, characters, IMAGES[part], generator)
            images = (source_domain if domain == "source" else target_domain)(masks, generator)
            parts[part] = TensorDataset(2 * images - 1, labels)
    return GlyphData(**parts)


def deal(
    faces: Sequence[Face], shares: dict[str, float], characters: str, generator: Generator
) -> dict[str, list[Face]]:
    """Deal the faces out, each to one part, so that each part has one with all characters."""
    dealt: dict[str, list[Face]] = {part: [] for part in shares}
    complete = [face.characters >= set(characters) for face in faces]
    for kind in (True, False):
        of_kind = [face for face, whole in zip(faces, complete, strict=True) if whole == kind]
        order = iter(torch.randperm(len(of_kind), generator=generator).tolist())
        for part, share in list(shares.items())[::-1]:
            number = max(int(kind), round(share * len(of_kind)))
            dealt[part] += [of_kind[row] for _, row in zip(range(number), order, strict=False)]
    return dealt


def draw_part(faces: Sequence[Face], characters: str, number: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw each character in ``number`` faces, in all that have it before one is taken twice."""
    rows = []
    for character in characters:
        able = [face for face in faces if character in face.characters]
        order = torch.randperm(len(able), generator=generator).tolist()
        rows += [draw(able[order[k % len(able)]], character).tobytes() for k in range(number)]
    masks = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(-1, 1, MASK_SIZE, MASK_SIZE)
    return masks.float() / 255, torch.arange(len(characters)).repeat_interleave(number)


def source_domain(masks: Tensor, generator: Generator) -> Tensor:
    """Dark on light, with a little jitter. Masks ``(N, 1, 64, 64)`` to images ``(N, 3, 32, 32)``."""
    shape = move(masks, generator, degrees=4, scale=(0.94, 1.06), shift=0.05, shear=0)
    paper = 0.6 + 0.4 * torch.rand((len(masks), 3, 1, 1), generator=generator)
    ink = 0.3 * torch.rand((len(masks), 3, 1, 1), generator=generator)
    return add_noise(torch.lerp(paper, ink, shape), 0.03, generator)


def target_domain(masks: Tensor, generator: Generator) -> Tensor:
    """Any ink on colored clouds, lighter or darker than these; turned, slanted, shifted and of any size."""
    shape = move(masks, generator, degrees=15, scale=(0.8, 1.15), shift=0.08, shear=0.2)
    coarse = torch.rand((len(masks), 1, 5, 5), generator=generator)
    clouds = F.interpolate(coarse, size=IMAGE_SIZE, mode="bicubic", align_corners=False).clamp(0, 1)
    colors = torch.rand((2, len(masks), 3, 1, 1), generator=generator)
    dark = (torch.rand((len(masks), 1, 1, 1), generator=generator) < 0.25).float()
    paper = torch.lerp(0.4 + 0.6 * colors[0], 0.4 + 0.6 * colors[1], clouds) - 0.4 * dark
    ink = 0.3 * torch.rand((len(masks), 3, 1, 1), generator=generator) + 0.7 * dark
    return add_noise(torch.lerp(paper, ink, shape), 0.05, generator)


def add_noise(images: Tensor, deviation: float, generator: Generator) -> Tensor:
    """Add Gaussian noise, within the range of colors."""
    return (images + deviation * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def move(
    masks: Tensor, generator: Generator, *, degrees: float, scale: tuple[float, float], shift: float, shear: float
) -> Tensor:
    """Turn, slant, shift (in halves of the width) and scale each mask at random, and halve its size."""
    jitter = 2 * torch.rand((len(masks), 5), generator=generator) - 1
    angle = torch.deg2rad(degrees * jitter[:, 0])
    size = (scale[0] + scale[1]) / 2 + (scale[1] - scale[0]) / 2 * jitter[:, 1]
    cos, sin, slant = angle.cos() / size, angle.sin() / size, shear * jitter[:, 4]
    theta = torch.stack(
        [cos, slant * cos - sin, shift * jitter[:, 2], sin, slant * sin + cos, shift * jitter[:, 3]], dim=1
    )
    grid = F.affine_grid(theta.view(-1, 2, 3), [len(masks), 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    return F.grid_sample(masks, grid, align_corners=False)


def contact_sheet(data: GlyphData, file: Path, columns: int = 24) -> None:
    """Write a picture: one row of the source domain, three of the target domain."""
    pictures = []
    for part, number in ((data.source, 1), (data.target_train, 2), (data.target_test, 1)):
        images = part.tensors[0]
        rows = torch.linspace(0, len(images) - 1, number * columns).long()
        pictures.append((images[rows] + 1) / 2)
    cells = torch.cat(pictures).view(-1, columns, 3, IMAGE_SIZE, IMAGE_SIZE)
    pixels = (255 * cells.permute(0, 3, 1, 4, 2)).round().byte().flatten(0, 1).flatten(1, 2)
    Image.fromarray(pixels.numpy()).resize((pixels.shape[1] * 2, pixels.shape[0] * 2)).save(file)
