"""Every public name has a docstring: classes, functions, methods and properties of all public modules."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import pytest

import kfac_opt


def _modules() -> Iterator[str]:
    yield "kfac_opt"
    for info in pkgutil.walk_packages(kfac_opt.__path__, "kfac_opt."):
        if not any(part.startswith("_") for part in info.name.split(".")):
            yield info.name


def _public(module: object, name: str) -> Iterator[tuple[str, object]]:
    for key, value in vars(module).items():
        if key.startswith("_") or getattr(value, "__module__", None) != name:
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            yield f"{name}.{key}", value


def _members(path: str, owner: type) -> Iterator[tuple[str, object]]:
    """Public methods and properties that this class adds: one that overrides another inherits its docstring."""
    for key, value in vars(owner).items():
        inherited = any(key in vars(base) for base in owner.__mro__[1:])
        if key.startswith("_") or inherited:
            continue
        value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if inspect.isfunction(value) or isinstance(value, property):
            yield f"{path}.{key}", value


@pytest.mark.parametrize("name", list(_modules()))
def test_public_names_have_docstrings(name):
    module = importlib.import_module(name)
    found = [(name, module), *_public(module, name)]
    found += [member for path, value in found[1:] if inspect.isclass(value) for member in _members(path, value)]
    missing = [path for path, value in found if not (inspect.getdoc(value) or "").strip()]
    assert not missing, missing
