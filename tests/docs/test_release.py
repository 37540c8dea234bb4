"""What is said about the package outside of it agrees with ``pyproject.toml``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

tomllib = pytest.importorskip("tomllib")  # not in Python 3.10

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEPENDENCIES = PYPROJECT["project"]["dependencies"]
CONDA_NAMES = {"torch": "pytorch", "typing-extensions": "typing_extensions"}


def conda(requirements: list[str]) -> set[str]:
    """Return requirements in the words of conda."""
    parts = [re.fullmatch(r"([\w-]+)(.*)", requirement).groups() for requirement in requirements]
    return {f"{CONDA_NAMES.get(name, name)} {bounds}".strip() for name, bounds in parts}


def test_the_recipe_of_conda():
    recipe = yaml.safe_load((ROOT / ".github" / "conda-forge" / "recipe.yaml").read_text())
    project = PYPROJECT["project"]
    assert recipe["context"]["version"] == project["version"]
    assert f">={recipe['context']['python_min']}" == project["requires-python"]
    assert set(recipe["requirements"]["run"][1:]) == conda(DEPENDENCIES)
    assert set(recipe["requirements"]["host"][2:]) == conda(PYPROJECT["build-system"]["requires"])
    scripts = [f"{name} = {target}" for name, target in project["scripts"].items()]
    assert recipe["build"]["python"]["entry_points"] == scripts
    assert recipe["about"]["summary"] == project["description"]
    assert recipe["about"]["license"] == project["license"]


def test_the_oldest_versions():
    """They are the lower bounds."""
    bounds = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in DEPENDENCIES if ">=" in line)
    for line in (ROOT / "tests" / "oldest.txt").read_text().splitlines()[1:]:
        name, version = line.split("==")
        if name in bounds:  # torchvision has none: the one of this torch
            assert [*map(int, version.split("."))][:2] == [*map(int, bounds[name].split("."))][:2], line


def test_each_python_is_tested():
    versions = re.findall(r"Python :: (3\.\d+)", str(PYPROJECT["project"]["classifiers"]))
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert all(job["strategy"]["matrix"]["python"] == versions for job in jobs.values())
