"""The house: which room imports which, what is public, and that each file has a name of its own."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_calibft
from lightning_calibft import AbsentClassCalibration
from lightning_calibft.callback.lightning_package import LightningCallback
from tests.conftest import HERE, THOROUGH

PACKAGE = Path(lightning_calibft.__file__).parent
# From the bottom to the top: a room imports those before it, and what is private at the top level comes first.
ROOMS = ("split", "labels", "functional", "plotting", "metrics", "estimators", "head", "calibration")
ROOMS += ("checkpoint", "cross_validation", "analysis", "callback", "integrations", "cli")
PRIVATE = sorted(path.stem for path in PACKAGE.glob("_[a-z]*.py"))
HEAVY = {"lightning", "pytorch_lightning", "timm", "torchvision"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files() -> list[Path]:
    """All files of the package but the first, which names everything."""
    return sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / "__init__.py"})


def imported(path: Path, at_once: bool = False) -> Iterator[str]:
    """The modules that a file imports, each with a name that may be a module too; or only those it imports at once."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (at_once and is_deferred(node)):
            waiting += ast.iter_child_nodes(node)


def is_deferred(node: ast.AST) -> bool:
    """Return whether nothing in it runs when its file is imported: a function, or imports for types alone."""
    for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    return for_types or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def rooms_imported_by(path: Path) -> set[str]:
    names = [name.split(".") for name in imported(path)]
    return {name[1] for name in names if name[0] == PACKAGE.name} - {room_of(path), "__version__"}


def test_each_room_has_its_place():
    assert {room_of(path) for path in files()} <= {*ROOMS, *PRIVATE}


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    order = [*PRIVATE, *ROOMS]
    # Head and labels stand beside the others.
    below = ["split", *PRIVATE] if room_of(path) in ("head", "labels") else order[: order.index(room_of(path))]
    if room_of(path) == "functional":
        below.remove("labels")
    assert rooms_imported_by(path) <= {*below, *PRIVATE}


@pytest.mark.parametrize("room", ["functional", "metrics"])
def test_what_is_pure_imports_torch_and_torchmetrics_alone(room):
    """Nor does any file of the package that is imported with them."""
    own = {path for path in files() if room_of(path) == room}
    assert not HEAVY & {name.split(".")[0] for path in own for name in imported(path)}
    reached: set[Path] = set()
    while waiting := own - reached:
        reached |= waiting
        for path in waiting:
            for name in imported(path, at_once=True):
                first, *parts = name.split(".")
                assert first not in HEAVY, (path, name)
                if first == PACKAGE.name:
                    places = [PACKAGE.joinpath(*parts[:end]) for end in range(len(parts) + 1)]
                    found = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
                    own |= {file for file in found if file.is_file()}


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_lightning_is_imported_for_types_alone(path):
    """The user imports it, from one of two packages. A callback must not even do it for types; see its base class."""
    for_types = {PACKAGE / "callback" / "lightning_package.py", PACKAGE / "checkpoint" / "load.py"}
    found = {name.split(".")[0] for name in imported(path, at_once=path in for_types)}
    assert not found & {"lightning", "pytorch_lightning"}


def test_the_callback_is_one_class():
    assert AbsentClassCalibration.__bases__ == (LightningCallback,)


def test_the_public_names_are_few():
    modules = [lightning_calibft]
    for found in pkgutil.walk_packages(lightning_calibft.__path__, "lightning_calibft."):
        if not found.name.endswith("__main__"):
            modules.append(importlib.import_module(found.name))
    public = {name for module in modules for name in getattr(module, "__all__", [])}
    assert len(public) <= 52, sorted(public)


def test_each_file_has_a_name_of_its_own():
    rooms = defaultdict(list)
    for path in files():
        if path.name != "__init__.py":
            rooms[path.name].append(room_of(path))
    twice = {name: places for name, places in rooms.items() if len(places) > 1}
    assert all(sorted(places) == ["functional", "metrics"] for places in twice.values()), twice


def test_what_is_thorough_exists():
    """A test that is renamed does not become a quick one unseen."""
    for entry in THOROUGH:
        path, _, name = entry.partition("::")
        assert (HERE / path).exists(), entry
        assert not name or f"\ndef {name}(" in (HERE / path).read_text(), entry
