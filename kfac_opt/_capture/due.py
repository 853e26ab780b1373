"""What a capture is for: the model and its Fisher matrix, and the layers whose turn it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import nn

from kfac_opt._curvature.block import CurvatureBlock, State
from kfac_opt.likelihoods import Likelihood

FisherKind = Literal["mc", "exact", "empirical"]


class Tracked(Protocol):
    """One block and the parameters it belongs to.

    ``module`` is None for a parameter of its own; ``part`` says which of its matrices it is where a module has several.
    """

    @property
    def name(self) -> str: ...
    @property
    def block(self) -> CurvatureBlock: ...
    @property
    def weight(self) -> nn.Parameter: ...
    @property
    def bias(self) -> nn.Parameter | None: ...
    @property
    def module(self) -> nn.Module | None: ...
    @property
    def part(self) -> str | None: ...


def module_name(entry: Tracked) -> str:
    """Of the module that the block is a layer or a part of."""
    return entry.name if entry.part is None else entry.name.removesuffix(entry.part).removesuffix(".")


@dataclass(frozen=True)
class Estimate:
    """Which Fisher matrix is estimated.

    Attributes:
        root: the module whose forward is one pass.
        likelihood, fisher, label_samples, outputs, loss_reduction: as in the optimizer.
        make_generator: a private generator for this pass on the given device.
        process_group: over which gradients are averaged and sums are added.
    """

    root: nn.Module
    likelihood: Likelihood
    fisher: FisherKind
    label_samples: int
    outputs: Callable[[Any], Any] | None
    loss_reduction: Literal["mean", "sum"]
    make_generator: Callable[[int, torch.device], torch.Generator]
    process_group: dist.ProcessGroup | None = None


@dataclass
class Due:
    """The blocks that hooks are on for.

    Attributes:
        entries: by name.
        states: the basis in force of each, or None where examples wait for a new one.
    """

    entries: Mapping[str, Tracked] = field(default_factory=dict)
    states: Mapping[str, State | None] = field(default_factory=dict)

    def modules(self) -> dict[str, nn.Module]:
        """Those that blocks are layers or parts of, by name."""
        return {module_name(entry): entry.module for entry in self.entries.values() if entry.module is not None}

    def parts(self) -> dict[str, dict[str, str]]:
        """Names of blocks by the name of their part, by the name of the module that they are parts of."""
        found: dict[str, dict[str, str]] = {}
        for name, entry in self.entries.items():
            if entry.part is not None:
                found.setdefault(module_name(entry), {})[entry.part] = name
        return found

    def alone(self) -> list[Tracked]:
        """Parameters outside layers; one may have been frozen since the blocks were made."""
        return [entry for entry in self.entries.values() if entry.module is None and entry.weight.requires_grad]

    def own_parameters(self, name: str) -> list[nn.Parameter | None]:
        """Weight and bias of a layer's block, None for one that is frozen."""
        entry = self.entries[name]
        return [p if p is not None and p.requires_grad else None for p in (entry.weight, entry.bias)]
