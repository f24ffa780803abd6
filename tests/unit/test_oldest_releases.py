"""`constraints-oldest.txt` has what CI calls the oldest releases: the lower bounds of pyproject.toml, no newer ones."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lower_bounds(requirements: list[str]) -> dict[str, Version]:
    """By name, also those of extras of this package that are named there."""
    bounds: dict[str, Version] = {}
    for requirement in map(Requirement, requirements):
        if requirement.name == PROJECT["name"]:
            for extra in requirement.extras:
                bounds |= lower_bounds(PROJECT["optional-dependencies"][extra])
        else:
            bound = next(Version(s.version) for s in requirement.specifier if s.operator == ">=")
            name = canonicalize_name(requirement.name)
            bounds[name] = max(bound, bounds.get(name, bound))
    return bounds


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    named = [line.partition(";")[0].strip().split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in named)
    return {canonicalize_name(name): Version(version) for name, version in named}


def test_the_oldest_environment_has_the_lower_bounds() -> None:
    pinned, required = pins(), lower_bounds(PROJECT["dependencies"])
    assert {"torch", "transformers"} <= required.keys()
    assert {name: pinned.get(name) for name in required} == required
    # Extras whose packages are too large for a second environment are left out of it.
    optional = lower_bounds(PROJECT["optional-dependencies"]["test"])
    installed = {name: bound for name, bound in optional.items() if name in pinned}
    assert {"pytest", "datasets"} <= installed.keys()
    assert {name: pinned[name] for name in installed} == installed
