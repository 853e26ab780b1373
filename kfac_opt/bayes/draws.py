"""Draws of the weights from the posterior while it is being trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from kfac_opt._step import options as checks
from kfac_opt.bayes.posterior import PosteriorDamping, load_weights_


@dataclass(frozen=True)
class VariationalOptions:
    """What holds for all parameter groups; see :class:`kfac_opt.KFACVI` for the meanings."""

    num_samples: int = 1
    antithetic: bool = True
    posterior_damping: PosteriorDamping = "exact"
    prior_gradient: Literal["mean", "sample"] = "mean"
    batch_statistics: Literal["step", "pass"] = "step"
    sample_group: dist.ProcessGroup | None = None

    def check(self, owner: str) -> None:
        """Raises ValueError for a value that is none of the choices."""
        checks.check_count(owner, "num_samples", self.num_samples)
        checks.check_process_group(owner, "sample_group", self.sample_group)
        for name, allowed in (
            ("posterior_damping", ("exact", "factored")),
            ("prior_gradient", ("mean", "sample")),
            ("batch_statistics", ("step", "pass")),
        ):
            checks.check_choice(owner, name, getattr(self, name), allowed)


class Draws:
    """Draws of one ``weight_samples`` loop.

    Args:
        means, parameters: the optimized parameters, which are at their means, and copies of those, by name.
        noise_of: deviations of a draw by its number, by the name of the parameter; others stay at their means.
        antithetic: draws 2i and 2i + 1 have opposite noise.
    """

    def __init__(
        self,
        means: dict[str, Tensor],
        parameters: dict[str, Tensor],
        noise_of: Callable[[int], dict[str, Tensor]],
        *,
        antithetic: bool,
    ) -> None:
        self.means, self.parameters, self.noise_of, self.antithetic = means, parameters, noise_of, antithetic
        self._pair: int | None = None
        self._noise: dict[str, Tensor] = {}
        self._sign = 1.0

    def draw_(self, number: int) -> None:
        """Writes draw ``number`` of the step into the weights."""
        pair, self._sign = pair_of(number, antithetic=self.antithetic)
        if self._pair is not None:
            load_weights_(list(self.parameters.values()), list(self.means.values()))
        if pair != self._pair:
            self._noise = self.noise_of(pair)
            self._pair = pair
        add_draw_(self.parameters, self._noise, self._sign)

    def add_noise_to(self, sums: dict[str, Tensor]) -> None:
        """Adds the noise of the draw in force to the sums by parameter name."""
        for name, noise in self._noise.items():
            signed = self._sign * noise.to(self.means[name].dtype)
            sums[name] = sums[name] + signed if name in sums else signed


def pair_of(number: int, *, antithetic: bool) -> tuple[int, float]:
    """Which noise a draw has, and with which sign."""
    return (number // 2, 1.0 - 2.0 * (number % 2)) if antithetic else (number, 1.0)


@torch.no_grad()
def add_draw_(parameters: dict[str, Tensor], noise: dict[str, Tensor], sign: float) -> None:
    """``w ← μ + sign · ε`` for parameters that are at their means, in the wider of both dtypes."""
    names = [name for name in noise if name in parameters]
    if names:
        torch._foreach_add_([parameters[name] for name in names], [noise[name] for name in names], alpha=sign)
