"""What a curvature optimizer knows of the posterior that it draws weights from: widths, covariances, private noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from kfac_opt._step import options as checks
from kfac_opt._step.base import CurvatureOptimizer
from kfac_opt._step.schedule import factors_due
from kfac_opt._step.seeds import WEIGHTS, derive_seed, seeded
from kfac_opt._step.settings import CurvatureOptions
from kfac_opt._step.tracking import TrackedBlock
from kfac_opt.bayes.draws import Covariances, NoiseAhead, VariationalOptions
from kfac_opt.bayes.posterior import NoiseSource, PosteriorBlock, Width
from kfac_opt.bayes.posteriors import follows_refreshes, parameter_names, posterior_blocks, safe_floor
from kfac_opt.layers.embedding import padding_rows


class DrawingOptimizer(CurvatureOptimizer):
    """A curvature optimizer whose curvature defines a posterior, and the draws from it."""

    needs_basis = True
    zero_damping = True

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        defaults: dict[str, Any],
        options: CurvatureOptions,
        variational: VariationalOptions,
        generator: torch.Generator | None,
    ) -> None:
        variational.check(type(self).__name__)
        self._variational = variational
        self._forget_draws()
        super().__init__(model, params, defaults, options, generator)

    def _forget_draws(self) -> None:
        self._covariances: Covariances | None = None  # of the training draws
        self._ahead = NoiseAhead()

    # -- construction, copying ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # A process group can neither be pickled nor copied.
        kept = {"_variational": replace(self._variational, sample_group=None), "_covariances": None, "_ahead": NoiseAhead()}
        return {**super().__getstate__(), **kept}

    def __deepcopy__(self, memo: dict[int, Any]) -> DrawingOptimizer:
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, DrawingOptimizer)
        copied._variational = self._variational
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_variational", VariationalOptions())
        self._forget_draws()

    def _install(self, saved: dict[str, Any]) -> None:
        super()._install(saved)
        self._forget_draws()

    def _track(self, *, announce: bool = True) -> None:
        super()._track(announce=announce)
        self._forget_draws()
        model = self._require_model()
        self._names, self._constant = parameter_names(model), padding_rows(model)

    # -- covariances --------------------------------------------------------------------------------------------

    def _width(self, tracked: TrackedBlock) -> Width:
        group = self.param_groups[tracked.group]
        checks.check_number(type(self).__name__, "temperature", group["temperature"], low=0.0, open_low=True)
        ess, prior = float(group["num_data"]) / float(group["temperature"]), float(group["prior_precision"])
        floor = group["posterior_floor"]
        return Width(ess, prior, safe_floor(tracked.block, ess, prior) if floor is None else float(floor))

    def _blocks(self, *, current: bool) -> list[PosteriorBlock]:
        return posterior_blocks(
            self._names,
            self._tracked.values(),
            self._block_state,
            self._width,
            damping=self._variational.posterior_damping,
            current=current,
            constant=self._constant,
        )

    def _drawing(self) -> Covariances:
        """Covariances of the training draws: they change when curvature is refreshed or a width is written, not each step."""
        widths = ("num_data", "temperature", "prior_precision", "posterior_floor")
        key: list[object] = [group[name] for group in self.param_groups for name in widths]
        for tracked in self._tracked.values():
            state = self._block_state(tracked)
            if state is not None:
                names = ("refreshes",) if follows_refreshes(tracked.block) else ("refreshes", "estimates")
                trained = [parameter.requires_grad for parameter in tracked.parameters]
                key += [tracked.name, *trained, *(int(state[name]) for name in names if name in state)]
        if self._covariances is None or self._covariances.key != key:
            blocks = self._blocks(current=False)
            self._covariances = Covariances(key, blocks, NoiseSource(blocks))
        return self._covariances

    def _steps_alike(self) -> Iterator[int]:
        """This step and those after it whose draws will have the same covariances, as far as the schedule tells."""
        groups = self.param_groups
        for step in count(self._step_count()):
            yield step
            for name, tracked in self._tracked.items():
                if self._estimation.refreshes(name, step, groups):
                    return
                interval = int(groups[tracked.group]["factor_interval"])
                if not follows_refreshes(tracked.block) and factors_due(step, interval, self._options.ramp_steps):
                    return

    def _named(self) -> dict[str, Tensor]:
        """Optimized parameters by their names in the model, in the order of the groups; none that left the model."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        return {self._names[id(p)]: p for p in parameters if id(p) in self._names}

    def _generator(self, *purpose: int, step: int | None = None) -> torch.Generator:
        """Private noise, the same on every rank: from the base seed, the step (None: this one) and the purpose alone."""
        device = self.param_groups[0]["params"][0].device
        step = self._step_count() if step is None else step
        return seeded(derive_seed(self._base_seed, purpose[0], step, *purpose[1:]), device)

    def _weight_generator(self, step: int, pair: int) -> torch.Generator:
        return self._generator(WEIGHTS, pair, step=step)
