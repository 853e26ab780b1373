"""Results on disk: JSON written atomically, with the versions, the machine and the seeds that made them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.common.config import resolved

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
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.system(),
        "device": str(device),
    }
    if torch.device(device).type == "cuda":
        description["gpu"] = torch.cuda.get_device_name(torch.device(device))
        description["cuda"] = torch.version.cuda
    return description


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if (
        info.is_file()
    ) else []  # fmt: skip
    return names[0] if names else platform.processor() or platform.machine()


def provenance(config: Any, seed: int | None, device: str | torch.device = "cpu") -> dict[str, Any]:
    """What is stored beside every result: resolved config, seed, versions, machine."""
    return {
        "config": resolved(config),
        "seed": seed,
        "versions": describe_versions(),
        "machine": describe_machine(device),
    }


def fingerprint(value: Any) -> str:
    """Twelve hexadecimal digits that change when ``value`` (plain data) changes: names results that may be reused."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()[:12]


def write_json(path: str | Path, content: Any) -> Path:
    """Writes ``content`` to ``path`` whole or not at all; numbers that are not finite become ``null``."""
    return write_text(path, json.dumps(plain(content), indent=1, allow_nan=False) + "\n")


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


class RunLog:
    """Finished runs by what they are, one line of a file each: the same command goes on after the last one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = {line["identity"]: line["run"] for line in read_json_lines(path)}

    def get(self, identity: Any, make: Callable[[], Any], **notes: Any) -> Any:
        """The run described by ``identity`` (plain data) as plain data, made and noted where it is not there yet."""
        key = fingerprint(identity)
        if key not in self.known:
            self.known[key] = plain(make())
            append_json_line(self.path, {"identity": key, **notes, "run": self.known[key]})
        return self.known[key]


def append_json_line(path: str | Path, content: Mapping[str, Any]) -> None:
    """Adds one line to a log of finished runs; on disk when this returns."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(plain(content), allow_nan=False) + "\n").encode()
    torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("ab") as file:
        # A killed process may have left half a line: end it, so that only that run is lost.
        file.write(b"\n" + line if torn else line)
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The finished runs in a log; a line that was cut off by a kill is left out."""
    for line in Path(path).read_text().splitlines() if Path(path).is_file() else []:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def plain(value: Any) -> Any:
    """``value`` with tensors, numpy numbers and paths as plain data, non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
