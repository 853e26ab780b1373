"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def save_atomically(value: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save`` into a file beside ``path``, on the disk before it takes the name."""
    if hasattr(path, "write"):  # an open file, whose owner sees to it
        torch.save(value, path)
        return
    target = Path(path)
    target = target.resolve() if target.is_symlink() else target  # the link stays, as with open()
    with suppress(OSError):
        mode = target.stat().st_mode & 0o777
    if not target.exists():
        mask = os.umask(0)
        os.umask(mask)
        mode = 0o666 & ~mask
    handle, beside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, mode)
        os.replace(beside, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)
        raise
    with suppress(OSError):  # the name as well; not every system opens folders
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
