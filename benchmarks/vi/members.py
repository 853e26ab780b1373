"""Trained nets on disk: the members of an ensemble are trained once, also when several ensembles and seeds share them."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common.results import fingerprint
from kfac_opt import Posterior


@dataclass(frozen=True)
class MemberStore:
    """Where trained nets are kept, and what their training was.

    Attributes:
        folder: of the files, one for each net.
        training: everything that the nets' training depends on besides method, settings and seed; plain data.
    """

    folder: Path
    training: dict[str, Any]

    def path(self, method: Any, settings: dict[str, Any], seed: int) -> Path:
        """File of one net; ensembles of any size share it, and so do posteriors fitted afterwards."""
        own = {key: value for key, value in asdict(method).items() if key not in _AFTER_THE_TRAINING}
        settings = {key: value for key, value in settings.items() if key != LAPLACE_PRIOR}
        return self.folder / f"{method.kind}-{seed}-{fingerprint([own, settings, self.training, seed])}.pt"


LAPLACE_PRIOR = "laplace_prior"
"""Among the settings: prior precision of a Laplace posterior."""
_AFTER_THE_TRAINING = ("members", "laplace", "search", "start", "settings")


def save_member(path: Path, model: nn.Module, posterior: Posterior | None, facts: dict[str, Any]) -> None:
    """Writes the net, its posterior and the numbers of its training; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    state = {"model": model.state_dict(), "posterior": posterior and posterior.state_dict(), "facts": facts}
    torch.save(state, part)
    os.replace(part, path)


def load_member(path: Path, model: nn.Module, device: str) -> tuple[Posterior | None, dict[str, Any]]:
    """Puts the net's weights into ``model``; returns its posterior and the numbers of its training."""
    state = torch.load(path, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    found = state["posterior"]
    return found and Posterior.from_state_dict(found), state["facts"]
