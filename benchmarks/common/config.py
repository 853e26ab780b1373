"""One YAML file per experiment, read into a typed dataclass, every value overridable on the command line.

    python -m benchmarks.compare_optimizers --config configs/compare_optimizers/digits_mlp.yaml \\
        --set search.num_trials=5 --task.steps 100 --data-root ~/data

Unknown keys are errors that name the key and the allowed keys: a misspelt setting must not run in silence.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import tempfile
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import torch
import yaml

ConfigType = TypeVar("ConfigType")

LOCAL = {"local": True}
"""Field metadata for values that concern one machine only (paths): they are not stored with results."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, what was found and what is allowed."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-3`` as text (it wants ``1.0e-3``); here it is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*(?:[eE][-+]?[0-9]+)|[0-9]+\.[0-9]*|\.[0-9]+|\.inf|\.nan)$"),
    list("-+0123456789."),
)


def read_value(text: str) -> Any:
    """The Python value of one YAML expression, e.g. of a command line argument."""
    return yaml.load(text, Loader=_Loader)


def load_config(config_class: type[ConfigType], path: str | Path | None, overrides: Sequence[tuple[str, Any]] = ()) -> ConfigType:
    """The configuration in ``path`` with ``overrides`` (pairs of dotted key and value) on top.

    Raises:
        ConfigError: a file that is missing or no mapping, an unknown or missing key, a value of another type.
    """
    content: dict[str, Any] = {}
    if path is not None:
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"config file '{path}' does not exist. Give an existing YAML file with --config.")
        loaded = read_value(path.read_text())
        if not isinstance(loaded, dict):
            raise ConfigError(f"config file '{path}' must hold a mapping of keys, found {type(loaded).__name__}.")
        content = loaded
    for key, value in overrides:
        _set_nested(content, key, value)
    config = _convert(config_class, content, "")
    if hasattr(config, "name"):
        _check_name(config.name)
    return typing.cast(ConfigType, config)


def _check_name(name: str) -> None:
    """The name of an experiment names files and folders below ``out``: nothing may be written elsewhere."""
    if not re.fullmatch(r"[\w][\w.+-]*", name):
        raise ConfigError(
            f"key 'name' must be letters, digits, '_', '-', '+' and '.', for it names a folder below 'out', got '{name}'."
        )


def parse_arguments(
    config_class: type[ConfigType],
    arguments: Sequence[str] | None = None,
    *,
    description: str,
    default: str | Path | None = None,
) -> ConfigType:
    """Reads ``--config FILE``, ``--set a.b=c`` and ``--a.b c`` (dashes count as underscores) into ``config_class``.

    Ends the program with status 2 and the message when the configuration is wrong.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Any value of the config can be given as --key value or --set key=value, nested keys joined by dots. "
        f"Keys: {', '.join(_allowed(config_class))}.",
    )
    parser.add_argument("--config", default=default, help=f"YAML file (default: {default})")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one value")
    known, rest = parser.parse_known_args(arguments)
    try:
        overrides = [_split_assignment(text) for text in known.set] + _read_flags(rest)
        config = load_config(config_class, known.config, overrides)
        check_place(config)
        return config
    except ConfigError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def check_place(config: Any) -> None:
    """Checks the ``device`` and the folders of a config on this machine, so that no run fails on them hours later.

    Raises:
        ConfigError: naming the key.
    """
    if hasattr(config, "device"):
        check_device(config.device)
    for key in ("out", "keep"):
        if getattr(config, key, None) is not None:
            check_folder(getattr(config, key), key)


def check_device(device: str) -> None:
    """Raises ConfigError unless tensors can be made on ``device``."""
    try:
        usable = torch.device(device).type != "meta"
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # torch raises each of them for a missing backend
        usable = False
    if not usable:
        allowed = "cpu or cuda" if torch.cuda.is_available() else "cpu"
        raise ConfigError(f"key 'device' must be a device that torch finds on this machine ({allowed}), got '{device}'.")


def check_folder(folder: Path, key: str) -> None:
    """Makes ``folder`` and raises ConfigError where no file can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise ConfigError(
            f"key '{key}': '{folder}' cannot be written ({error.strerror}). Give another folder with --{key}."
        ) from error


def resolved(config: Any, *, include_local: bool = False) -> Any:
    """``config`` as plain dicts, lists, numbers and words, for storing; machine-specific paths are left out."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {
            field.name: resolved(getattr(config, field.name), include_local=include_local)
            for field in dataclasses.fields(config)
            if include_local or not field.metadata.get("local", False)
        }
    if isinstance(config, Mapping):
        return {key: resolved(value, include_local=include_local) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [resolved(value, include_local=include_local) for value in config]
    return str(config) if isinstance(config, Path) else config


def check_keys(given: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    """Raises ConfigError for a key of ``given`` that is not in ``allowed``, naming both."""
    for key in given:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise ConfigError(f"unknown key '{_join(where, str(key))}'; allowed: {', '.join(sorted(allowed))}.{hint}")


def _split_assignment(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set needs KEY=VALUE, got '{text}'.")
    return key.strip().replace("-", "_"), read_value(value)


def _read_flags(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    overrides: list[tuple[str, Any]] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if not argument.startswith("--"):
            raise ConfigError(f"'{argument}' is no option. Values are given as --key value or --set key=value.")
        if "=" in argument:
            overrides.append(_split_assignment(argument[2:]))
            position += 1
            continue
        if position + 1 >= len(arguments) or arguments[position + 1].startswith("--"):
            raise ConfigError(f"option '{argument}' needs a value.")
        overrides.append((argument[2:].replace("-", "_"), read_value(arguments[position + 1])))
        position += 2
    return overrides


def _set_nested(content: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        child = content.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"cannot set '{key}': '{parent}' holds the value {child!r}, not a mapping.")
        content = child
    content[last] = value


def _allowed(config_class: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(config_class)]


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _convert(kind: Any, value: Any, where: str) -> Any:
    """``value`` as ``kind``, or a ConfigError that names the key ``where``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is Literal:
        if value not in arguments:
            raise _mismatch(where, value, "one of " + ", ".join(map(str, arguments)))
        return value
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise _mismatch(where, value, "a list")
        items = [_convert(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if origin is tuple else items
    if origin in (dict, Mapping) or kind is dict:
        if not isinstance(value, Mapping):
            raise _mismatch(where, value, "a mapping")
        item_kind = arguments[1] if arguments else Any
        return {str(key): _convert(item_kind, item, _join(where, str(key))) for key, item in value.items()}
    return _convert_scalar(kind, value, where)


def _convert_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is Path and isinstance(value, str | Path):
        return Path(value).expanduser()
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if kind is type(None) and value is None:
        return None
    raise _mismatch(where, value, {float: "a number", int: "a whole number", bool: "true or false"}.get(kind, "text"))


def _convert_union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    errors = []
    for choice in choices:
        if choice is type(None):
            continue
        try:
            return _convert(choice, value, where)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _build(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value) and isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise _mismatch(where, value, f"a mapping with the keys {', '.join(_allowed(kind))}")
    check_keys(value, _allowed(kind), where)
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        missing = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if missing and field.name not in value:
            raise ConfigError(f"key '{_join(where, field.name)}' is missing and has no default.")
    arguments = {key: _convert(hints[key], item, _join(where, key)) for key, item in value.items()}
    try:
        return kind(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where + ': ' if where else ''}{error}") from error


def _mismatch(where: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"key '{where}' must be {expected}, got {value!r}.")
