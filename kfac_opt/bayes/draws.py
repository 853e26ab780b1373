"""Draws of the weights from the posterior while it is being trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from kfac_opt._step import options as checks
from kfac_opt.bayes.posterior import NoiseSource, PosteriorBlock, PosteriorDamping, load_weights_


@dataclass(frozen=True)
class VariationalOptions:
    """What holds for all parameter groups; see :class:`kfac_opt.KFACVI` for the meanings."""

    num_samples: int = 1
    antithetic: bool = True
    posterior_damping: PosteriorDamping = "exact"
    prior_gradient: Literal["mean", "sample"] = "mean"
    weight_decay_rule: Literal["lr", "step"] = "lr"
    momentum_rule: Literal["constant", "lr"] = "constant"
    batch_statistics: Literal["step", "pass"] = "step"
    sample_group: dist.ProcessGroup | None = None

    def check(self, owner: str) -> None:
        checks.check_count(owner, "num_samples", self.num_samples)
        checks.check_process_group(owner, "sample_group", self.sample_group)
        for name, allowed in (
            ("posterior_damping", ("exact", "factored")),
            ("prior_gradient", ("mean", "sample")),
            ("weight_decay_rule", ("lr", "step")),
            ("momentum_rule", ("constant", "lr")),
            ("batch_statistics", ("step", "pass")),
        ):
            checks.check_choice(owner, name, getattr(self, name), allowed)


@dataclass(frozen=True)
class Covariances:
    """Covariances of the training draws, kept over the steps that leave them as they are.

    Attributes:
        key: what they were made from.
        blocks: those of all layers.
        source: draws the noise.
    """

    key: object
    blocks: list[PosteriorBlock]
    source: NoiseSource


class NoiseAhead:
    """Noise of the coming draws, made several at a time.

    A draw is a dozen small calls, and their code has left the caches whenever a network has run in between: eight in a
    row cost two thirds of eight single ones (``benchmarks/kfac_vi_time.py``, LeNet5). Every draw has a generator of its
    own and is computed as if it were alone, so that nothing depends on how many are made at once: there is nothing to
    save. Twice as many as the last time while none was made for nothing.
    """

    MOST, MOST_BYTES = 8, 2**22

    def __init__(self) -> None:
        self._source: NoiseSource | None = None
        self._made: dict[tuple[int, int], dict[str, Tensor]] = {}
        self._number = 1

    def noise(
        self,
        source: NoiseSource,
        coming: Iterable[tuple[int, int]],
        make_generator: Callable[[int, int], torch.Generator],
    ) -> dict[str, Tensor]:
        """The noise of the first of ``coming``, the (step, pair) numbers of the draws in the order they will be needed."""
        coming = iter(coming)
        first = next(coming)
        outdated = [key for key in self._made if source is not self._source or key[0] < first[0]]
        if outdated:
            self._number = 1
        for key in outdated:
            del self._made[key]
        self._source = source
        if first not in self._made:
            room = min(self.MOST, self.MOST_BYTES // max(1, source.num_bytes)) if source.on_host else 1
            number = max(1, min(self._number, room - len(self._made)))
            keys = [first, *islice(coming, number - 1)]
            self._made.update(zip(keys, source.draws([make_generator(*key) for key in keys])))
            self._number = min(2 * self._number, self.MOST)
        return self._made.pop(first)


class Sampler:
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
