"""One YAML file per experiment, read by OmegaConf into a typed dataclass, every value overridable on the command line.

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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

ConfigType = TypeVar("ConfigType")

LOCAL = {"local": True}
"""Field metadata for values that concern one machine only (paths): they are not stored with results."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, what was found and what is allowed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """What all experiments have.

    Attributes:
        name: of this experiment's files.
        seed: of the first run.
        out: folder of everything; ``keep``: folder for the small summary, the JSON alone.
    """

    name: str
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    data_root: Path = dataclasses.field(default=Path("data"), metadata=LOCAL)
    out: Path = dataclasses.field(default=Path("out"), metadata=LOCAL)
    keep: Path | None = dataclasses.field(default=None, metadata=LOCAL)

    @property
    def folder(self) -> Path:
        """Where this experiment writes."""
        return self.out / self.name


def load_config(config_class: type[ConfigType], path: str | Path | None, overrides: Iterable[tuple[str, Any]] = ()) -> ConfigType:
    """The configuration in ``path`` with ``overrides`` (pairs of dotted key and value) on top.

    Raises:
        ConfigError: a file that is missing or no mapping, an unknown or missing key, a value of another type.
    """
    try:
        content = OmegaConf.create() if path is None else OmegaConf.load(path)
        if not isinstance(content, DictConfig):
            raise ConfigError(f"config file '{path}' must hold a mapping of keys, found a list.")
        for key, value in overrides:
            OmegaConf.update(content, key, value, merge=False, force_add=True)
        schema = OmegaConf.structured(config_class)
        OmegaConf.set_readonly(schema, False)
        for key in content:  # a mapping that is given replaces the default one
            if key in schema and isinstance(schema[key], DictConfig) and OmegaConf.get_type(schema, str(key)) is dict:
                schema[key] = {}
        merged = OmegaConf.merge(schema, content)
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise ConfigError(f"key '{key}' is missing and has no default.")
        config: Any = OmegaConf.to_object(merged)
    except FileNotFoundError:
        raise ConfigError(f"config file '{path}' does not exist. Give an existing YAML file with --config.") from None
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(_explain(error)) from error
    except ConfigError:
        raise
    except ValueError as error:  # of a dataclass that checks its values
        raise ConfigError(str(error)) from error
    if isinstance(config, ExperimentConfig) and not re.fullmatch(r"\w[\w.+-]*", config.name):
        raise ConfigError(
            f"key 'name' must be letters, digits, '_', '-', '+' and '.', for it names a folder below 'out', got '{config.name}'."
        )
    return config


def _explain(error: Exception) -> str:
    """What YAML says; of OmegaConf the first line, with the whole key and what is allowed there."""
    if isinstance(error, yaml.YAMLError):
        return " ".join(str(error).split())
    text, key = str(error).splitlines()[0], getattr(error, "full_key", None)
    kind = getattr(error, "object_type", None)
    if isinstance(error, ConfigKeyError) and dataclasses.is_dataclass(kind):
        text += f" Allowed: {', '.join(sorted(field.name for field in dataclasses.fields(kind)))}."
    return f"key '{key}': {text}" if key else text


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
    keys = ", ".join(field.name for field in dataclasses.fields(config_class))  # type: ignore[arg-type]
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Any value of the config can be given as --key value or --set key=value, nested keys joined by dots: {keys}.",
    )
    parser.add_argument("--config", default=default, help=f"YAML file (default: {default})")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one value")
    known, rest = parser.parse_known_args(arguments)
    try:
        config = load_config(config_class, known.config, [_split(text, "--set") for text in known.set] + _read_flags(rest))
        check_place(config)
        return config
    except ConfigError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def _split(text: str, option: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"{option} needs KEY=VALUE, got '{text}'.")
    try:
        return key.strip().replace("-", "_"), OmegaConf.from_dotlist([f"value={value}"])["value"]
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of '{key}' cannot be read: '{value}' is no YAML.") from error


def _read_flags(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """``--key value`` and ``--key=value``; a negative number is a value."""
    overrides, rest = [], list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"'{flag}' is no option. Values are given as --key value or --set key=value.")
        if "=" not in flag:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"option '{flag}' needs a value.")
            flag += "=" + rest.pop(0)
        overrides.append(_split(flag[2:], flag))
    return overrides


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


def resolved(config: Any) -> Any:
    """``config`` as plain dicts, lists, numbers and words, for storing; machine-specific paths are left out."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = [field for field in dataclasses.fields(config) if not field.metadata.get("local", False)]
        return {field.name: resolved(getattr(config, field.name)) for field in fields}
    if isinstance(config, Mapping):
        return {key: resolved(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [resolved(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def check_keys(given: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    """Raises ConfigError for a key of ``given`` that is not in ``allowed``, naming both."""
    for key in given:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise ConfigError(f"unknown key '{where}.{key}'; allowed: {', '.join(sorted(allowed))}.{hint}")
