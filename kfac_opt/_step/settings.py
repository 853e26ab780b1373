"""The settings that hold for a whole optimizer, checked once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.distributed import ProcessGroup

from kfac_opt._capture.collector import FisherKind
from kfac_opt._curvature.block import DampingScale
from kfac_opt._step import options as checks
from kfac_opt._step.defaults import UpdateScale
from kfac_opt._step.tracking import BlockOptions
from kfac_opt.likelihoods import Likelihood, LikelihoodName


@dataclass(frozen=True)
class CurvatureOptions:
    """What holds for all parameter groups of an optimizer; see :class:`kfac_opt.KFAC` for the meanings."""

    likelihood: Likelihood | LikelihoodName = "categorical"
    fisher: FisherKind = "mc"
    label_samples: int = 1
    damping_style: Literal["factored", "exact", "split"] = "factored"
    damping_scale: DampingScale = "relative"
    update_scale: UpdateScale = "natural"
    ramp_steps: int = 10
    refresh: Literal["staggered", "together"] = "staggered"
    weight_sharing: Literal["expand", "reduce"] = "expand"
    max_factor_dim: int = 8192
    max_block_dim: int | None = None
    outputs: Callable[[Any], Any] | None = None
    loss_reduction: Literal["mean", "sum"] = "mean"
    factor_dtype: torch.dtype = torch.float32
    inverse_dtype: torch.dtype | None = None
    foreach: bool | None = None
    process_group: ProcessGroup | None = None

    def for_blocks(self, *, needs_basis: bool) -> BlockOptions:
        """What decides the kind of a block."""
        return BlockOptions(
            self.damping_style,
            self.weight_sharing,
            self.max_factor_dim,
            self.factor_dtype,
            needs_basis,
            self.inverse_dtype,
            self.max_block_dim,
        )

    def check(self, owner: str) -> None:
        """Raises ValueError or TypeError for a value that no optimizer can have."""
        for name, allowed in checks.CHOICES.items():
            checks.check_choice(owner, name, getattr(self, name), allowed, checks.REMEDIES.get(name, ""))
        checks.check_count(owner, "label_samples", self.label_samples)
        checks.check_count(owner, "ramp_steps", self.ramp_steps, low=0)
        checks.check_count(owner, "max_factor_dim", self.max_factor_dim)
        if self.max_block_dim is not None:
            checks.check_count(owner, "max_block_dim", self.max_block_dim)
        if self.factor_dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{owner}: factor_dtype must be torch.float32 or torch.float64, got {self.factor_dtype}. Factors in half "
                "precision are not positive definite; model and inputs may be."
            )
        if self.inverse_dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(
                f"{owner}: inverse_dtype must be None (as the factors), torch.bfloat16, torch.float32 or torch.float64, got "
                f"{self.inverse_dtype}. Half precision (float16) overflows: inverses are as large as 1 / damping."
            )
        if self.foreach is not None:
            checks.check_switch(owner, "foreach", self.foreach)
        checks.check_process_group(owner, "process_group", self.process_group)
        if self.outputs is not None and not callable(self.outputs):
            raise TypeError(f"{owner}: outputs must be a function of the model's output, got {self.outputs!r}")
