"""The machinery of :class:`kfac_opt.KFACVI` around its passes: the prior in the step, the posterior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kfac_opt._capture.distributed import sum_over_ranks_
from kfac_opt._curvature.block import Damping
from kfac_opt._step import options as checks
from kfac_opt._step.seeds import POSTERIOR, derive_seed
from kfac_opt._step.tracking import TrackedBlock
from kfac_opt.bayes.posterior import Posterior, Width
from kfac_opt.bayes.posteriors import build_posterior
from kfac_opt.bayes.sampling import SamplingOptimizer


class VariationalOptimizer(SamplingOptimizer):
    """The mean follows ``(F + (δ + γ) I)⁻¹ (ḡ + δ μ)``; the covariance is the curvature."""

    # -- construction, copying ----------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters of the same model, with hyper-parameters of their own."""
        if "lr" in param_group:
            param_group = {"base_lr": param_group["lr"], **param_group}
        super().add_param_group(param_group)

    def _check_values(self, group: Mapping[str, Any]) -> None:
        super()._check_values(group)
        owner = type(self).__name__
        for name in ("num_data", "prior_precision", "temperature"):
            checks.check_number(owner, name, group[name], low=0.0, open_low=True)
        if group["posterior_floor"] is not None:
            checks.check_number(owner, "posterior_floor", group["posterior_floor"], low=0.0)
        if group["curvature"] == "identity":
            raise ValueError(
                f"{owner}: curvature='identity' has no posterior to draw weights from. Use 'diagonal', or "
                "torch.optim.SGD for these parameters."
            )

    def posterior(self) -> Posterior:
        """The posterior of the current curvature around the current weights, with a copy of everything it needs.

        Raises:
            RuntimeError: before the first estimate, or while the weights are a draw.
        """
        model = self._require_model()
        self._refuse_inside("posterior()")
        data = {float(group["num_data"]) for group in self.param_groups}
        return build_posterior(
            type(self).__name__,
            model,
            self._blocks(current=True),
            self._named().values(),
            width=self._widths(),
            likelihood=self._likelihood,
            seed=derive_seed(self._base_seed, POSTERIOR, self._step_count()),
            num_data=data.pop() if len(data) == 1 else None,
        )

    def _widths(self) -> dict[str, Width]:
        """Those of all optimized parameters by name, with curvature or without."""
        members = [(p, self._width(tracked)) for tracked in self._tracked.values() for p in tracked.parameters]
        widths = {self._names[id(p)]: width for p, width in members if id(p) in self._names}
        for group in self.param_groups:  # what was unfrozen since the last step has no block yet
            width = Width(float(group["num_data"]) / float(group["temperature"]), float(group["prior_precision"]))
            for name in [self._names[id(p)] for p in group["params"] if id(p) in self._names]:
                widths.setdefault(name, width)
        return widths

    # -- the step -----------------------------------------------------------------------------------------------

    def _advance_curvature(self) -> None:
        self._noise_mean = self._mean_noise()
        super()._advance_curvature()
        self._next_draw = self._next_evaluation = 0

    def _mean_noise(self) -> dict[int, Tensor]:
        """Mean noise of the step's draws, over the ranks that share them; empty unless the prior gradient needs it."""
        sums, count = self._noise_sum, self._noise_count
        self._noise_sum, self._noise_count = {}, 0
        if self._variational.prior_gradient == "mean":
            return {}
        named, group = self._named(), self._sample_group()
        if group is not None:
            tensors = [sums.get(name, torch.zeros_like(p)).contiguous() for name, p in named.items()]
            total = torch.tensor([float(count)], device=tensors[0].device)
            sum_over_ranks_([total, *tensors], group)
            sums, count = dict(zip(named, tensors)), round(float(total))
        return {id(p): sums[name] / count for name, p in named.items() if name in sums and count}

    def _damping(self, tracked: TrackedBlock) -> Damping:
        base = super()._damping(tracked)
        return Damping(base.value, base.scale, self._width(tracked).delta)

    def _gradient(self, group: dict[str, Any], name: str, parameter: Tensor, *, raw: bool) -> Tensor | None:
        """``ḡ + δ μ``, or ``ḡ + δ`` times the mean of the drawn weights."""
        gradient = super()._gradient(group, name, parameter, raw=raw)
        if gradient is None:
            return None
        delta = float(group["prior_precision"]) * float(group["temperature"]) / float(group["num_data"])
        gradient = gradient.add(parameter, alpha=delta)
        noise = self._noise_mean.get(id(parameter))
        return gradient if noise is None else gradient.add(noise, alpha=delta)

    def _momentum(self, group: dict[str, Any]) -> float:
        momentum = super()._momentum(group)
        if self._variational.momentum_rule == "constant" or not group["base_lr"]:
            return momentum
        return momentum * min(1.0, float(group["lr"]) / float(group["base_lr"]))

    def _before_momentum(self, group: dict[str, Any], parameters: list[Tensor], updates: list[Tensor], lr: float) -> list[Tensor]:
        decay = float(group["weight_decay"])
        if self._variational.weight_decay_rule == "lr" or not decay or not lr:
            return updates
        return [update.add(parameter, alpha=decay / lr) for update, parameter in zip(updates, parameters)]

    def _decay(self, group: dict[str, Any], lr: float) -> float:
        return super()._decay(group, lr) if self._variational.weight_decay_rule == "lr" else 0.0
