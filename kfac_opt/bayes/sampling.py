"""Passes with drawn weights: the gradient and the curvature of a step are means over draws from the posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kfac_opt._capture.distributed import active_group, rank, sum_over_ranks_
from kfac_opt._step import options as checks
from kfac_opt._step.passes import BatchStatistics, GradientMean, all_finite
from kfac_opt._step.seeds import EVALUATION
from kfac_opt._step.settings import CurvatureOptions
from kfac_opt._step.suspended import Suspended
from kfac_opt.bayes.drawing import DrawingOptimizer
from kfac_opt.bayes.draws import Sampler, VariationalOptions, add_draw_, pair_of
from kfac_opt.bayes.posterior import NoiseSource, restored_weights


class _Dropped(Exception):
    """Leaves a pass whose gradient is not finite, so that its statistics go with it."""


class SamplingOptimizer(DrawingOptimizer):
    """A curvature optimizer whose gradients are taken at draws from the posterior that its curvature defines."""

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        defaults: dict[str, Any],
        options: CurvatureOptions,
        variational: VariationalOptions,
        generator: torch.Generator | None,
    ) -> None:
        self._reset_transient()
        super().__init__(model, params, defaults, options, variational, generator)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_inside" not in self.__dict__:
            self._reset_transient()

    def _install(self, saved: dict[str, Any]) -> None:
        super()._install(saved)
        self._drop_passes()

    def _reset_transient(self) -> None:
        self._inside: str | None = None
        self._discard = False
        self._dropped_samples = 0
        self._lost = False  # the step being taken has no finite gradient
        self._drop_passes()

    def _drop_passes(self) -> None:
        """Passes since the last step leave no trace."""
        self._next_draw = 0  # number of the next training draw of this step
        self._next_evaluation = 0
        self._noise_sum: dict[str, Tensor] = {}  # of the completed draws of this step
        self._noise_count = 0
        self._all_dropped = False  # every pass of the last loop
        self._noise_mean: dict[int, Tensor] = {}  # of the step being taken, by the id of the parameter

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def dropped_samples(self) -> int:
        """Completed passes that were left out because their loss or gradient was not finite."""
        return self._dropped_samples

    # -- passes with drawn weights ------------------------------------------------------------------------------

    def weight_samples(self, num_samples: int | None = None) -> Suspended:
        """Loop over passes: inside the body the weights are a draw from the posterior, afterwards the means again.

        Run forward and backward in the body. After the loop every ``.grad`` of the model, also where another optimizer
        holds the parameter, is what it was before plus the mean over the passes, and the curvature statistics of the
        passes are joined. A pass that is left by an exception or ``break`` is dropped, with what it did to running
        statistics; one whose gradient is not finite is dropped and counted (``dropped_samples``); if all are
        dropped, the sum of their gradients is left for a gradient scaler to find, and a ``step()`` that is taken with
        it leaves the weights alone. Before the first estimate all passes run at the mean.

        Args:
            num_samples: number of passes; None: that given at construction. With a ``sample_group`` it is the number
                over all ranks, and this rank's share is run.

        Yields:
            The number of the draw.

        Raises:
            RuntimeError: inside another ``weight_samples()`` or ``sampled_params()``.
            ValueError: for fewer samples than ranks, or a batch with more terms than ``num_data``.
        """
        self._require_model()
        number = self._variational.num_samples if num_samples is None else num_samples
        checks.check_count(type(self).__name__, "weight_samples: num_samples", number)
        self._refuse_inside("weight_samples()")
        return Suspended(self._passes(self._share_of(number)))

    def _sample_group(self) -> dist.ProcessGroup | None:
        """Ranks that divide the passes of a step; None when there is nobody to share with."""
        group = self._variational.sample_group
        return None if group is None else active_group(group)

    def _share_of(self, number: int) -> range:
        """The draws that this rank runs."""
        group = self._sample_group()
        ranks, me = (1, 0) if group is None else (dist.get_world_size(group), rank(group))
        self._collector.sample_ranks = ranks
        if number < ranks:
            raise ValueError(
                f"{type(self).__name__}: {number} weight samples cannot be divided among {ranks} ranks. Use at least "
                "one sample per rank."
            )
        return range(number * me // ranks, number * (me + 1) // ranks)

    def _passes(self, draws: range) -> Generator[int, None, None]:
        self._refuse_inside("weight_samples()")
        model = self._require_model()
        self._check_groups()
        named = self._named()
        optimized = list(named.values())
        own = set(map(id, optimized))
        gradients = GradientMean(optimized, [p for p in model.parameters() if p.requires_grad and id(p) not in own])
        if self._noise_count and not any(_has_gradient(parameter) for parameter in optimized):
            self._noise_sum, self._noise_count = {}, 0  # that of a skipped step
        first = self._next_draw + self._next_draw % 2  # pairs never span two loops
        try:
            self._inside = "weight_samples()"
            with restored_weights(optimized) as means:
                covariances, antithetic = self._drawing(), self._variational.antithetic
                pairs = list(dict.fromkeys(pair_of(first + index, antithetic=antithetic)[0] for index in draws))

                def noise_of(pair: int) -> dict[str, Tensor]:
                    now, later = pairs[pairs.index(pair) :], pairs  # the next steps will probably run the same passes
                    coming = ((s, p) for n, s in enumerate(self._steps_alike()) for p in (later if n else now))
                    return self._ahead.noise(covariances.source, coming, self._weight_generator)

                sampler = Sampler(
                    dict(zip(named, means)),
                    named,
                    noise_of,
                    antithetic=antithetic,
                )
                for index in draws:
                    gradients.start_pass()
                    sampler.draw_(first + index)
                    statistics, before = BatchStatistics(model), gradients.completed
                    try:
                        with self._collector.separately():
                            yield index
                            self._check_num_data()
                            if not gradients.finish_pass(drop=self._discard):
                                raise _Dropped
                        if self._variational.prior_gradient == "sample":
                            sampler.add_noise_to(self._noise_sum)
                            self._noise_count += 1
                    except _Dropped:
                        self._dropped_samples += 1
                    finally:
                        moves = self._variational.batch_statistics == "pass" or before == 0
                        if gradients.completed == before or not moves:
                            statistics.restore_()
                    self._discard = False
        finally:
            self._inside = None
            self._next_draw = first + draws.stop
            gradients.install(self._sample_group())
            self._all_dropped = gradients.completed == 0 and any(total is not None for total in gradients.dropped)

    @contextmanager
    def sampled_params(self, generator: torch.Generator | None = None) -> Iterator[None]:
        """One draw from the posterior while the body runs; the means come back bit for bit, also if it raises.

        Args:
            generator: of the draw; None: a private one that neither disturbs nor repeats the training draws.

        Raises:
            RuntimeError: before the first estimate, or inside another sampling context.
        """
        self._require_model()
        self._check_groups()
        self._refuse_inside("sampled_params()")
        blocks = self._blocks(current=False)
        if not blocks:
            raise RuntimeError(f"{type(self).__name__}: there is no curvature to draw from before the first step.")
        if generator is None:
            generator = self._generator(EVALUATION, self._next_evaluation)
            self._next_evaluation += 1
        named = self._named()
        try:
            self._inside = "sampled_params()"
            with restored_weights(list(named.values())):
                add_draw_(named, NoiseSource(blocks).draw(generator), 1.0)
                yield
        finally:
            self._inside = None

    def _refuse_inside(self, what: str) -> None:
        if self._inside is not None:
            raise RuntimeError(
                f"{type(self).__name__}: {what} inside {self._inside}, where the weights are a draw and not the means. "
                f"Leave {self._inside} first."
            )

    def _check_num_data(self) -> None:
        pending = self._collector.pending
        terms = pending.num_terms + sum(entry.num_terms for entry in (*pending.open, *pending.settled))
        smallest = min(float(group["num_data"]) for group in self.param_groups)
        if terms > smallest:
            raise ValueError(
                f"{type(self).__name__}: num_data is {smallest:g}, but one batch has {terms} loss terms. num_data "
                "counts the terms of the whole data set: its examples, or its tokens where each has a loss term."
            )

    # -- the step -----------------------------------------------------------------------------------------------

    def _refuse_step(self) -> None:
        self._refuse_inside("step()")

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        """``num_samples`` passes; the mean of their finite losses."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        losses: list[Tensor] = []
        samples = self.weight_samples()
        try:
            for _ in samples:
                with torch.enable_grad():
                    loss = closure()
                if loss is None:
                    raise TypeError(
                        f"{type(self).__name__}.step: the closure returned None, expected the loss. End it with `return loss`."
                    )
                losses.append(torch.as_tensor(loss).detach())
                self._discard = not math.isfinite(losses[-1])
        finally:
            samples.close()
        if self._all_dropped:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        return self._mean_loss(torch.stack(losses))

    def _step_group(self, number: int, group: dict[str, Any]) -> None:
        if not self._lost:
            super()._step_group(number, group)

    def _advance_curvature(self) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._lost = self._all_dropped and not all_finite(gradients)
        self._all_dropped = False
        super()._advance_curvature()

    def _mean_loss(self, losses: Tensor) -> Tensor:
        finite = torch.isfinite(losses)
        totals = torch.stack([torch.where(finite, losses, 0.0).sum(), finite.sum().to(losses.dtype), losses.sum()])
        sum_over_ranks_([totals], self._sample_group())
        return torch.where(totals[1] > 0, totals[0] / totals[1], totals[2])


def _has_gradient(parameter: Tensor) -> bool:
    """Not what ``zero_grad()`` leaves, of either kind."""
    return parameter.grad is not None and (parameter.grad.is_sparse or bool(parameter.grad.any()))
