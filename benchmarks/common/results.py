"""Results on disk: JSON written atomically, with the versions, the machine and the seeds that made them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "optuna", "kfac_opt")


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def describe_machine(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Processor, memory, threads and accelerator; nothing that names the machine or its user."""
    description: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "system": platform.system(),
        "device": str(device),
    }
    if torch.device(device).type == "cuda":
        description["gpu"] = torch.cuda.get_device_name(torch.device(device))
        description["cuda"] = torch.version.cuda
    return description


def provenance(config: Any, seed: int | None, device: str | torch.device = "cpu") -> dict[str, Any]:
    """What is stored beside every result: resolved config, seed, versions, machine."""
    from benchmarks.common.config import resolved

    return {
        "config": resolved(config),
        "seed": seed,
        "versions": describe_versions(),
        "machine": describe_machine(device),
    }


def fingerprint(value: Any) -> str:
    """Twelve hexadecimal digits that change when ``value`` (plain data) changes: names results that may be reused."""
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()[:12]


def write_json(path: str | Path, content: Any) -> Path:
    """Writes ``content`` to ``path`` whole or not at all; numbers that are not finite become ``null``."""
    return write_text(path, json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> Path:
    """Writes ``text`` to a file beside ``path`` and renames it, so that a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, suffix=".part", delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return path


def read_json(path: str | Path) -> Any:
    """The content of a JSON file."""
    return json.loads(Path(path).read_text())


def append_json_line(path: str | Path, content: Mapping[str, Any]) -> None:
    """Adds one line to a log of finished runs; on disk when this returns."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(_plain(content), allow_nan=False) + "\n").encode()
    torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("ab") as file:
        # A killed process may have left half a line: end it, so that only that run is lost.
        file.write(b"\n" + line if torn else line)
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The finished runs in a log; a line that was cut off by a kill is left out."""
    path = Path(path)
    if not path.is_file():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def tensorboard_writer(folder: str | Path) -> Any:
    """A ``SummaryWriter`` for ``folder``."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


def _plain(value: Any) -> Any:
    """``value`` with tensors, numpy numbers and paths as plain data, non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # no such file on macOS and Windows: platform knows less, but something
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
