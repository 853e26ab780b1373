"""Draws from the posterior while it is being trained: weights, or outputs of Linear layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kfac_opt.optim import options as checks
from kfac_opt.optim.output_noise import noisy_outputs
from kfac_opt.posterior import PosteriorBlock, PosteriorDamping, add_noise, correlated_noise

WEIGHTS, OUTPUTS, EVALUATION, POSTERIOR = 2, 3, 4, 5  # purpose numbers of derived seeds


@dataclass(frozen=True)
class VariationalOptions:
    """What holds for all parameter groups; see :class:`kfac_opt.KFACVI` for the meanings."""

    num_samples: int = 1
    antithetic: bool = True
    posterior_damping: PosteriorDamping = "exact"
    prior_gradient: Literal["mean", "sample"] = "mean"
    weight_decay_rule: Literal["lr", "step"] = "lr"
    momentum_rule: Literal["constant", "lr"] = "constant"
    output_noise: str | Sequence[str] | None = None
    batch_statistics: Literal["step", "pass"] = "step"
    sample_group: dist.ProcessGroup | None = None

    def check(self, owner: str) -> None:
        checks.check_count(owner, "num_samples", self.num_samples)
        for name, allowed in (
            ("posterior_damping", ("exact", "factored")),
            ("prior_gradient", ("mean", "sample")),
            ("weight_decay_rule", ("lr", "step")),
            ("momentum_rule", ("constant", "lr")),
            ("batch_statistics", ("step", "pass")),
        ):
            checks.check_choice(owner, name, getattr(self, name), allowed)


class Sampler:
    """Draws of one ``weight_samples`` loop; covariances are computed once.

    Args:
        means, parameters: the optimized parameters and copies of their means, by name.
        blocks: covariances; parameters without one stay at their means.
        noisy_layers: layers that get noise at their outputs in place of their weights.
        make_generator: private generator for a purpose and its numbers.
        antithetic: draws 2i and 2i + 1 have opposite noise.
    """

    def __init__(
        self,
        means: dict[str, Tensor],
        parameters: dict[str, Tensor],
        blocks: list[PosteriorBlock],
        noisy_layers: dict[str, nn.Module],
        make_generator: Callable[..., torch.Generator],
        *,
        antithetic: bool,
    ) -> None:
        self.means, self.parameters, self.make_generator, self.antithetic = (
            means,
            parameters,
            make_generator,
            antithetic,
        )
        by_weight = {block.weight: block for block in blocks}
        self.noisy: dict[str, tuple[nn.Module, PosteriorBlock]] = {}
        for name, module in noisy_layers.items():
            block = by_weight.pop(f"{name}.weight" if name else "weight", None)
            if block is not None:
                self.noisy[name] = (module, block)
        self.blocks = list(by_weight.values())
        self._pair: int | None = None
        self._noise: dict[str, Tensor] = {}
        self._sign = 1.0

    def draw_(self, number: int, stack: ExitStack) -> None:
        """Writes draw ``number`` of the step into the weights, and hooks the layers with noise at their outputs."""
        pair, self._sign = (number // 2, 1.0 - 2.0 * (number % 2)) if self.antithetic else (number, 1.0)
        if pair != self._pair:
            self._noise = correlated_noise(self.blocks, self.make_generator(WEIGHTS, pair))
            self._pair = pair
        write_draw_(self.parameters, self.means, self._noise, self._sign)
        if self.noisy:
            generators = [self.make_generator(OUTPUTS, pair, layer) for layer in range(len(self.noisy))]
            stack.enter_context(noisy_outputs(self.noisy, generators, self._sign))

    def add_noise_to(self, sums: dict[str, Tensor]) -> None:
        """Adds the noise of the draw in force to the sums by parameter name."""
        for name, noise in self._noise.items():
            signed = self._sign * noise.to(self.means[name].dtype)
            sums[name] = sums[name] + signed if name in sums else signed


@torch.no_grad()
def write_draw_(parameters: dict[str, Tensor], means: dict[str, Tensor], noise: dict[str, Tensor], sign: float) -> None:
    """``w ← μ + sign · ε``; parameters without noise get their mean."""
    for name, parameter in parameters.items():
        mean, part = means[name], noise.get(name)
        if part is None:
            parameter.copy_(mean)
        elif part.dtype == mean.dtype:
            torch.add(mean, part, alpha=sign, out=parameter)
        else:
            parameter.copy_(add_noise(mean, part if sign > 0 else -part))
