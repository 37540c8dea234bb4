"""Pictures of ImageNet classes, drawn in the styles of openly licensed icon sets.

Each set is a package ``@iconify-json/...`` of npm: one JSON file with the SVG of every icon, and one with its license.
They are downloaded from the registry, checked by their hash, and rendered with ``resvg-py``; no picture is kept in this
repository. A picture is an icon that is turned, shifted, scaled and mirrored at random, on a light background of
random colors.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import tarfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from lightning_calibft import resolve_class_map

# A class of ImageNet, and the icons that show it. An icon has other names in other sets.
CLASSES = dict(
    line.split(": ")
    for line in """
great white shark: shark
cock: rooster
hen: chicken
bald eagle: eagle
great grey owl: owl
bullfrog: frog
box turtle: turtle
common iguana: lizard
African crocodile: crocodile
green snake: snake
scorpion: scorpion
black widow: spider
peacock: peacock
macaw: parrot
drake: duck
goose: goose
wallaby: kangaroo
koala: koala
jellyfish: jellyfish
conch: spiral-shell
snail: snail
Dungeness crab: crab
American lobster: lobster
flamingo: flamingo
king penguin: penguin
grey whale: whale spouting-whale spurting-whale
sea lion: seal
beagle: dog dog-face dog-side
standard poodle: poodle
timber wolf: wolf
red fox: fox
tabby: cat cat-face cat-side
leopard: leopard leopard-side
lion: lion lion-face
tiger: tiger tiger-face tiger-side
brown bear: bear bear-face
ice bear: polar-bear
ladybug: lady-beetle
ground beetle: beetle
fly: fly
bee: honeybee
ant: ant
cricket: cricket
cockroach: cockroach
monarch: butterfly
wood rabbit: rabbit rabbit-face bunny bunny-side
hamster: hamster hamster-face
porcupine: hedgehog
fox squirrel: chipmunk
beaver: beaver
sorrel: horse horse-face
zebra: zebra
hog: pig pig-face pig-side
wild boar: boar
hippopotamus: hippopotamus
ox: ox
water buffalo: water-buffalo
bison: bison
ram: ram
ibex: goat
impala: deer
Arabian camel: camel two-hump-camel bactrian-camel dromedary-camel
llama: llama
otter: otter
skunk: skunk
badger: badger
three-toed sloth: sloth
orangutan: orangutan
gorilla: gorilla
macaque: monkey monkey-face
African elephant: elephant
giant panda: panda panda-face
puffer: blowfish
abacus: abacus
accordion: accordion
acoustic guitar: guitar
airliner: airplane airplane-departure airplane-arrival
ambulance: ambulance
analog clock: alarm-clock mantelpiece-clock
ashcan: wastebasket
backpack: backpack school-backpack school-satchel
balloon: balloon
ballpoint: pen lower-left-pen
Band Aid: adhesive-bandage
banjo: banjo
barbershop: barber-pole
barrel: oil-drum
baseball: baseball
basketball: basketball basketball-and-hoop
bathtub: bathtub bath
beach wagon: automobile oncoming-automobile
beaker: alembic test-tube
bearskin: guard guardsman
beer glass: beer-mug clinking-beer-mugs
bikini: bikini
bow: bow-and-arrow
broom: broom
bucket: bucket
bullet train: bullet-train high-speed-train high-speed-train-with-bullet-nose high-speed-train-bullet-nose
cab: taxi oncoming-taxi
candle: candle
canoe: canoe
car wheel: wheel
carousel: carousel-horse
carpenter's kit: toolbox
carton: package
cassette: videocassette video-cassette
castle: castle japanese-castle european-castle
cellular telephone: mobile-phone mobile-phone-with-arrow cellphone
chain: chains
chime: bell ringing-bell bellhop-bell
church: church
computer keyboard: keyboard wired-keyboard
cornet: trumpet
cowboy boot: womans-boot boot
crutch: crutch
desktop computer: desktop-computer
dial telephone: telephone
digital watch: watch
drum: drum long-drum
electric locomotive: train metro
envelope: envelope e-mail incoming-envelope envelope-with-arrow envelope-down-arrow-above
file: file-cabinet
fire engine: fire-engine
flute: flute
folding chair: chair
fountain: fountain
fountain pen: fountain-pen black-nib lower-left-fountain-pen
French horn: postal-horn
frying pan: cooking
gas pump: fuel-pump
gown: dress
grand piano: musical-keyboard
hammer: hammer hammer-and-wrench
hatchet: axe
hourglass: hourglass hourglass-done hourglass-not-done hourglass-with-flowing-sand hourglass-flowing-sand
jack-o'-lantern: jack-o-lantern
jean: jeans
jersey: t-shirt
jigsaw puzzle: puzzle-piece
joystick: joystick
kimono: kimono
knot: knot
lab coat: lab-coat
laptop: laptop laptop-computer
liner: passenger-ship ship ferry
lipstick: lipstick
lotion: lotion-bottle
loudspeaker: speaker-high-volume speaker-medium-volume speaker-low-volume speaker
loupe: magnifying-glass-tilted-left magnifying-glass-tilted-right left-pointing-magnifying-glass left-magnifying-glass
magnetic compass: compass
mailbox: postbox closed-mailbox-with-raised-flag open-mailbox-with-raised-flag closed-mailbox-raised open-mailbox-raised
maraca: maracas
mask: performing-arts
microphone: microphone studio-microphone studio-mic
minibus: minibus
minivan: sport-utility-vehicle recreational-vehicle
mitten: gloves
moped: motorcycle
mortarboard: graduation-cap
mosque: mosque
motor scooter: motor-scooter
mountain bike: bicycle
mountain tent: tent camping
computer mouse: computer-mouse
mousetrap: mouse-trap
moving van: delivery-truck
necklace: prayer-beads
nipple: baby-bottle
padlock: locked unlocked locked-with-key locked-with-pen lock open-lock lock-and-key lock-with-ink-pen
paintbrush: paintbrush lower-left-paintbrush
palace: classical-building
parachute: parachute
passenger car: railway-car
petri dish: petri-dish
pickup: pickup-truck
ping-pong ball: ping-pong
plate: fork-and-knife-with-plate
plunger: plunger
police van: police-car oncoming-police-car
pot: potted-plant
printer: printer printer-icon
projectile: rocket
projector: film-projector movie-camera
puck: ice-hockey
purse: handbag clutch-bag
racer: racing-car race-car
racket: badminton
radio: radio
radio telescope: satellite-antenna
reel: fishing-pole fishing-pole-and-fish
reflex camera: camera camera-with-flash
rugby ball: rugby-football
ruler: straight-ruler triangular-ruler
running shoe: running-shoe
safety pin: safety-pin
saltshaker: salt
sandal: womans-sandal thong-sandal sandals
sax: saxophone
school bus: bus oncoming-bus
screw: nut-and-bolt
screwdriver: screwdriver
seashore: beach-with-umbrella desert-island
shield: shield
shopping basket: basket
shopping cart: shopping-cart
ski: skis skier ski-and-ski-boot
slot: slot-machine
snorkel: diving-mask
soccer ball: soccer-ball
sock: socks
soup bowl: bowl-with-spoon
speedboat: speedboat motor-boat
spider web: spider-web
steam locomotive: locomotive steam-locomotive
stethoscope: stethoscope
stopwatch: stopwatch timer-clock
streetcar: tram tram-car light-rail
studio couch: couch-and-lamp
sunglasses: sunglasses dark-sunglasses
suspension bridge: bridge-at-night
swimming trunks: shorts
syringe: syringe
tank suit: one-piece-swimsuit
teapot: teapot
teddy: teddy-bear
television: television
tennis ball: tennis tennis-ball
toilet seat: toilet
toilet tissue: roll-of-paper
torch: flashlight electric-torch
tractor: tractor
traffic light: vertical-traffic-light horizontal-traffic-light
trailer truck: articulated-lorry
trench coat: coat
trolleybus: trolleybus
umbrella: umbrella umbrella-with-rain-drops closed-umbrella umbrella-on-ground
vase: amphora funeral-urn
violin: violin
volleyball: volleyball
wall clock: one-oclock four-oclock eight-oclock
wallet: purse pink-wallet
weighing machine: balance-scale
Windsor tie: necktie tie
wine bottle: bottle-with-popping-cork
wooden spoon: spoon
wool: yarn
yawl: sailboat
street sign: stop-sign
book jacket: closed-book green-book blue-book orange-book
hot pot: pot-of-food
ice cream: ice-cream soft-ice-cream
ice lolly: lollipop
French loaf: baguette-bread
bagel: bagel
pretzel: pretzel
cheeseburger: hamburger
hot dog: hot-dog
broccoli: broccoli
cucumber: cucumber
bell pepper: bell-pepper
mushroom: brown-mushroom
Granny Smith: green-apple
strawberry: strawberry
orange: tangerine
lemon: lemon
pineapple: pineapple
banana: banana
carbonara: spaghetti
pizza: pizza slice-of-pizza
potpie: pie
burrito: burrito
red wine: wine-glass red-wine-glass
cup: hot-beverage teacup-without-handle
alp: mountain snow-capped-mountain mount-fuji snow-mountains
coral reef: coral
volcano: volcano
daisy: blossom
corn: ear-of-corn ear-of-maize
buckeye: chestnut
agaric: mushroom
""".strip().splitlines()
)


@dataclass(frozen=True)
class IconSet:
    """A package of npm.

    Args:
        part: What its pictures are for: ``"train"``, ``"near"`` or ``"test"``.
        version: The release.
        integrity: SHA-512 of its archive, as npm writes it.
    """

    part: str
    version: str
    integrity: str


# Each set for training has an older or a plainer relative among those that are near; those of the test have none.
ICON_SETS = {
    "noto": IconSet(
        "train",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "emojione": IconSet(
        "train",
        "1.2.3",
        "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
    ),
    "fluent-emoji-flat": IconSet(
        "train",
        "1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "noto-v1": IconSet(
        "near",
        "1.2.5",
        "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
    ),
    "emojione-v1": IconSet(
        "near",
        "1.2.3",
        "sha512-UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww==",
    ),
    "fluent-emoji": IconSet(
        "near",
        "1.2.7",
        "sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
    ),
    "twemoji": IconSet(
        "test",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
    "openmoji": IconSet(
        "test",
        "1.2.29",
        "sha512-vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
    ),
    "fxemoji": IconSet(
        "test",
        "1.2.2",
        "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
    ),
    "streamline-emojis": IconSet(
        "test",
        "1.2.4",
        "sha512-iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
    ),
}


def read_icon_set(name: str, folder: Path) -> dict[str, Any]:
    """Read the icons of a set and what they may be used for, downloading them if they are not there yet."""
    file = folder / f"{name}.json"
    if not file.exists():
        of = ICON_SETS[name]
        url = f"https://registry.npmjs.org/@iconify-json/{name}/-/{name}-{of.version}.tgz"
        with urllib.request.urlopen(url, timeout=60) as response:
            archive = response.read()
        if (found := "sha512-" + base64.b64encode(hashlib.sha512(archive).digest()).decode()) != of.integrity:
            raise SystemExit(f"{url} is not the file that it was: expected {of.integrity}, but got {found}.")
        with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
            icons, info = (json.load(opened.extractfile(f"package/{part}.json")) for part in ("icons", "info"))
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**icons, "info": info}))
    return json.loads(file.read_text())


def icons_of(icon_set: dict[str, Any], words: str) -> list[dict[str, Any]]:
    """Return the icons of a set that have one of these names. Hyphens and numbers at the end do not matter."""
    wanted = {word.replace("-", "") for word in words.split()}
    aliases, found = icon_set.get("aliases", {}), {}
    for name in [*icon_set["icons"], *aliases]:
        if re.sub(r"-\d+$", "", name).replace("-", "") in wanted:
            while name in aliases:
                name = aliases[name]["parent"]
            found[name] = icon_set["icons"][name]
    return list(found.values())


def rendered(icon: dict[str, Any], icon_set: dict[str, Any], side: int) -> Tensor:
    """Render an icon: color times opacity, and opacity, ``(4, side, side)`` of uint8."""
    import resvg_py  # from the extra `benchmarks`, and not needed for other images

    left, top, *size = (
        icon.get(key, icon_set.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    box = " ".join(map(str, (left, top, *size)))
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}"'
    svg += f' width="{side}" height="{side}">{icon["body"]}</svg>'
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True))
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(png)).convert("RGBA"))).permute(2, 0, 1).float()
    pixels[:3] *= pixels[3:] / 255  # so that no color of transparent pixels shows at the edges
    return pixels.round().to(torch.uint8)


@cache
def draw(folder: Path, part: str, side: int) -> tuple[Tensor, Tensor]:
    """Render all icons of a part, ``(N, 4, side, side)``, and name the row of ImageNet of each, ``(N,)``.

    What was rendered before is read from the folder.
    """
    sets = [read_icon_set(name, folder) for name, of in ICON_SETS.items() if of.part == part]
    digest = hashlib.sha256(json.dumps([side, CLASSES, sets]).encode()).hexdigest()[:8]
    file = folder / f"{part}_{digest}.pt"
    if not file.exists():
        rows = resolve_class_map(list(CLASSES), "imagenet-1k", 1000)
        found = [
            (rendered(icon, icon_set, side), rows[number])
            for icon_set in sets
            for number, words in enumerate(CLASSES.values())
            for icon in icons_of(icon_set, words)
        ]
        pixels, of_pixels = zip(*found, strict=True)
        torch.save((torch.stack(pixels), torch.tensor(of_pixels)), file)
    return torch.load(file, weights_only=True)


class Pictures(Dataset):
    """Icons on random backgrounds.

    Args:
        icons: As of ``draw``, ``(N, 4, H, W)``.
        rows: The class of each, ``(N,)``.
        mean: Of the colors, as the network has it.
        std: Their standard deviation.
        fixed: Whether a picture is the same each time.
    """

    move = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(10, (0.05, 0.05), (0.75, 0.95), interpolation=InterpolationMode.BILINEAR),
        ]
    )

    def __init__(self, icons: Tensor, rows: Tensor, mean: Any, std: Any, *, fixed: bool) -> None:
        self.icons, self.rows, self.fixed = icons, rows, fixed
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    def __len__(self) -> int:
        return len(self.icons)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with torch.random.fork_rng(devices=(), enabled=self.fixed):
            if self.fixed:
                torch.manual_seed(index)
            icon = self.move(self.icons[index].float() / 255)
            corners = 0.8 + 0.2 * torch.rand(1, 3, 2, 2)
            background = F.interpolate(corners, size=icon.shape[1:], mode="bilinear", align_corners=True)[0]
            brightness = 0.9 + 0.2 * torch.rand(())
        image = (brightness * (icon[:3] + (1 - icon[3:]) * background)).clamp(0, 1)
        return (image - self.mean) / self.std, int(self.rows[index])


def licenses(folder: Path) -> Iterator[str]:
    """One line a set: its author, its license, and how many pictures of how many classes it gives."""
    yield "| set | used for | pictures | classes | author | license |"
    yield "| :-- | :-- | --: | --: | :-- | :-- |"
    for name, of in ICON_SETS.items():
        icon_set = read_icon_set(name, folder)
        counts = [len(icons_of(icon_set, words)) for words in CLASSES.values()]
        info = icon_set["info"]
        author, license_ = (
            f"[{info[key]['title' if key == 'license' else 'name']}]({info[key]['url']})"
            for key in ("author", "license")
        )
        source = f"`@iconify-json/{name}` {of.version}"
        yield f"| {source} | {of.part} | {sum(counts)} | {sum(map(bool, counts))} | {author} | {license_} |"
