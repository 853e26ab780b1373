"""Passes with drawn weights: the gradient and the curvature of a step are means over draws from the posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kfac_opt._capture.collector import Collector
from kfac_opt._capture.distributed import active_group, rank, sum_over_ranks_
from kfac_opt._step.passes import BatchStatistics, GradientMean, all_finite
from kfac_opt._step.seeds import EVALUATION, WEIGHTS, Seeds
from kfac_opt.bayes.draws import Draws, VariationalOptions, add_draw_
from kfac_opt.bayes.posterior import NoiseSource, restored_weights
from kfac_opt.bayes.trained_posterior import TrainedPosterior


class _Dropped(Exception):
    """Leaves a pass whose gradient is not finite, so that its statistics go with it."""


class WeightSampler:
    """Runs passes at draws from the posterior that the curvature defines, and joins their gradients.

    Args:
        posterior: which draws there are.
        capture: whose statistics each pass keeps apart.
        seeds: of the private noise, the same on every process: from the base seed, the step and the number of the draw.
    """

    def __init__(self, posterior: TrainedPosterior, capture: Collector, seeds: Seeds, options: VariationalOptions) -> None:
        self.posterior, self.capture, self.seeds, self.options = posterior, capture, seeds, options
        self.owner = posterior.blocks.owner
        self.dropped = 0  # completed passes that were left out
        self.lost = False  # the step being taken has no finite gradient
        self.inside: str | None = None
        self._discard = False
        self.drop_passes()

    def drop_passes(self) -> None:
        """Passes since the last step leave no trace."""
        self._next_draw = 0  # number of the next training draw of this step
        self._next_evaluation = 0
        self._noise_sum: dict[str, Tensor] = {}  # of the completed draws of this step
        self._noise_count = 0
        self.all_dropped = False  # every pass of the last loop

    # -- passes -------------------------------------------------------------------------------------------------

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Processes that divide the passes of a step; None when there is nobody to share with."""
        group = self.options.sample_group
        return None if group is None else active_group(group)

    def share_of(self, number: int) -> range:
        """The draws that this process runs."""
        group = self.group
        ranks, me = (1, 0) if group is None else (dist.get_world_size(group), rank(group))
        self.capture.sample_ranks = ranks
        if number < ranks:
            raise ValueError(
                f"{self.owner}: {number} weight samples cannot be divided among {ranks} ranks. Use at least "
                "one sample per rank."
            )
        return range(number * me // ranks, number * (me + 1) // ranks)

    def passes(self, draws: range) -> Generator[int, None, None]:
        """The loop of ``weight_samples()``."""
        self.refuse_inside("weight_samples()")
        model, named = self.posterior.blocks.model, self.posterior.named()
        optimized = list(named.values())
        own = set(map(id, optimized))
        gradients = GradientMean(optimized, [p for p in model.parameters() if p.requires_grad and id(p) not in own])
        if self._noise_count and not any(_has_gradient(parameter) for parameter in optimized):
            self._noise_sum, self._noise_count = {}, 0  # that of a skipped step
        first = self._next_draw + self._next_draw % 2  # pairs never span two loops
        try:
            self.inside = "weight_samples()"
            with restored_weights(optimized) as means:
                source = self.posterior.source()
                drawn = Draws(
                    dict(zip(named, means)),
                    named,
                    lambda pair: source.draw(self._generator(WEIGHTS, pair)),
                    antithetic=self.options.antithetic,
                )
                for index in draws:
                    drawn.draw_(first + index)
                    yield from self._pass(index, drawn, gradients)
        finally:
            self.inside = None
            self._next_draw = first + draws.stop
            gradients.install(self.group)
            self.all_dropped = gradients.completed == 0 and any(total is not None for total in gradients.dropped)

    def _pass(self, index: int, drawn: Draws, gradients: GradientMean) -> Generator[int, None, None]:
        gradients.start_pass()
        statistics, before = BatchStatistics(self.posterior.blocks.model), gradients.completed
        try:
            with self.capture.separately():
                yield index
                self._check_num_data()
                if not gradients.finish_pass(drop=self._discard):
                    raise _Dropped
            if self.options.prior_gradient == "sample":
                drawn.add_noise_to(self._noise_sum)
                self._noise_count += 1
        except _Dropped:
            self.dropped += 1
        finally:
            moves = self.options.batch_statistics == "pass" or before == 0
            if gradients.completed == before or not moves:
                statistics.restore_()
        self._discard = False

    def _generator(self, *purpose: int) -> torch.Generator:
        blocks = self.posterior.blocks
        device = blocks.groups[0]["params"][0].device
        return self.seeds.generator(device, purpose[0], blocks.step_count(), *purpose[1:])

    def _check_num_data(self) -> None:
        pending = self.capture.pending
        terms = pending.num_terms + sum(entry.num_terms for entry in (*pending.open, *pending.settled))
        smallest = min(float(group["num_data"]) for group in self.posterior.blocks.groups)
        if terms > smallest:
            raise ValueError(
                f"{self.owner}: num_data is {smallest:g}, but one batch has {terms} loss terms. num_data "
                "counts the terms of the whole data set: its examples, or its tokens where each has a loss term."
            )

    @contextmanager
    def one_draw(self, generator: torch.Generator | None) -> Iterator[None]:
        """The body of ``sampled_params()``."""
        self.refuse_inside("sampled_params()")
        covariances = self.posterior.covariances(current=False)
        if not covariances:
            raise RuntimeError(f"{self.owner}: there is no curvature to draw from before the first step.")
        if generator is None:
            generator = self._generator(EVALUATION, self._next_evaluation)
            self._next_evaluation += 1
        named = self.posterior.named()
        try:
            self.inside = "sampled_params()"
            with restored_weights(list(named.values())):
                add_draw_(named, NoiseSource(covariances).draw(generator), 1.0)
                yield
        finally:
            self.inside = None

    def refuse_inside(self, what: str) -> None:
        """Raises RuntimeError while the weights are a draw."""
        if self.inside is not None:
            raise RuntimeError(
                f"{self.owner}: {what} inside {self.inside}, where the weights are a draw and not the means. "
                f"Leave {self.inside} first."
            )

    # -- the step -----------------------------------------------------------------------------------------------

    def evaluate(self, closure: Callable[[], Any], samples: Generator[int, None, None]) -> Tensor:
        """A pass of the closure for each of ``samples``; the mean of their finite losses."""
        parameters = [parameter for group in self.posterior.blocks.groups for parameter in group["params"]]
        _clear(parameters)
        losses: list[Tensor] = []
        try:
            for _ in samples:
                with torch.enable_grad():
                    loss = closure()
                if loss is None:
                    raise TypeError(
                        f"{self.owner}.step: the closure returned None, expected the loss. End it with `return loss`."
                    )
                losses.append(torch.as_tensor(loss).detach())
                self._discard = not math.isfinite(losses[-1])
        finally:
            samples.close()
        if self.all_dropped:
            _clear(parameters)
        return self._mean_loss(torch.stack(losses))

    def _mean_loss(self, losses: Tensor) -> Tensor:
        finite = torch.isfinite(losses)
        totals = torch.stack([torch.where(finite, losses, 0.0).sum(), finite.sum().to(losses.dtype), losses.sum()])
        sum_over_ranks_([totals], self.group)
        return torch.where(totals[1] > 0, totals[0] / totals[1], totals[2])

    def begin_step(self) -> None:
        """A step whose passes were all dropped leaves the weights alone."""
        groups = self.posterior.blocks.groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        self.lost = self.all_dropped and not all_finite(gradients)
        self.all_dropped = False

    def end_step(self) -> None:
        """The next step's draws are numbered from the beginning."""
        self._next_draw = self._next_evaluation = 0

    def take_mean_noise(self) -> dict[int, Tensor]:
        """Mean noise of the step's draws by the id of the parameter; none unless the prior's gradient is taken at them."""
        sums, count = self._noise_sum, self._noise_count
        self._noise_sum, self._noise_count = {}, 0
        if self.options.prior_gradient == "mean":
            return {}
        named = self.posterior.named()
        if self.group is not None:
            tensors = [sums.get(name, torch.zeros_like(p)).contiguous() for name, p in named.items()]
            total = torch.tensor([float(count)], device=tensors[0].device)
            sum_over_ranks_([total, *tensors], self.group)
            sums, count = dict(zip(named, tensors)), round(float(total))
        return {id(p): sums[name] / count for name, p in named.items() if name in sums and count}


def _clear(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _has_gradient(parameter: Tensor) -> bool:
    """Not what ``zero_grad()`` leaves, of either kind."""
    return parameter.grad is not None and (parameter.grad.is_sparse or bool(parameter.grad.any()))
