"""The parts of an optimizer that is attached to a model, and what keeps them in step with each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from kfac_opt._capture.collector import Collector
from kfac_opt._capture.passes import Pending
from kfac_opt._capture.wrappers import unwrapped
from kfac_opt._curvature.block import Damping
from kfac_opt._step import state
from kfac_opt._step.census import Census
from kfac_opt._step.curvature import Curvature
from kfac_opt._step.directions import Preconditioner
from kfac_opt._step.model_blocks import ModelBlocks
from kfac_opt._step.pass_check import PassCheck
from kfac_opt._step.placement import Replicated
from kfac_opt._step.rules import UpdateRule
from kfac_opt._step.schedule import Schedule
from kfac_opt._step.seeds import LABELS, Seeds
from kfac_opt._step.settings import CurvatureOptions
from kfac_opt._step.tracking import TrackedBlock
from kfac_opt.likelihoods import Likelihood


class Workings:
    """Everything that an optimizer consists of while it watches a model.

    ================  ===========================================================================================
    ``blocks``        which block belongs to which parameter, its state and damping
    ``capture``       hooks, passes, sums (``kfac_opt._capture``)
    ``check``         what the passes showed, held against the gradients
    ``schedule``      which step takes an estimate, which refreshes what
    ``curvature``     averages and refreshes, by the schedule and a placement
    ``precondition``  directions
    ================  ===========================================================================================

    Args:
        optimizer: whose groups and state these parts read; held weakly.
        damping: of the blocks of a group, from its settings.
        census: what was found and said of the model's layers so far.
        flat: names of layers that have diagonal blocks although their type has an adapter.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        options: CurvatureOptions,
        likelihood: Likelihood,
        seeds: Seeds,
        *,
        damping: Callable[[Mapping[str, Any]], Damping],
        needs_basis: bool,
        census: Census,
        flat: set[str],
    ) -> None:
        self.model, self._census = model, census
        placement = Replicated(options.process_group)
        blocks = self.blocks = ModelBlocks(optimizer, model, options.for_blocks(needs_basis=needs_basis), damping, flat)
        self.capture = Collector(
            unwrapped(model),
            likelihood,
            options.fisher,
            options.label_samples,
            options.outputs,
            options.loss_reduction,
            lambda index, device: seeds.generator(device, LABELS, placement.rank, blocks.step_count(), index),
            options.process_group,
        )
        self.schedule = Schedule(staggered=options.refresh != "together", ramp_steps=options.ramp_steps)
        shared = options.fisher == "empirical" and options.loss_reduction == "mean"
        self.curvature = Curvature(blocks, self.schedule, placement, shared_gradients=shared)
        self.check = PassCheck(blocks, self.capture, placement, census)
        self.precondition = Preconditioner(blocks)
        self._armed_step = -1  # for which the hooks are set
        self._allocated: tuple[object, ...] = ()  # the sizes that the state was allocated for
        self._followers: list[Callable[[], None]] = []
        self.follow_blocks()

    # -- staying together ---------------------------------------------------------------------------------------

    def when_blocks_change(self, call: Callable[[], None]) -> None:
        """Calls this after the blocks, or their state as a whole, were made anew."""
        self._followers.append(call)

    def follow_blocks(self) -> None:
        """The blocks were made anew: everything that depends on which there are follows."""
        self._allocated = ()
        self._census.reopen()
        self.capture.forget_proofs()  # other modules may stand behind the names now
        self.curvature.follow_blocks()
        for call in self._followers:
            call()

    def follow_state(self) -> None:
        """The groups and the state of the optimizer were loaded."""
        self.blocks.make_for_state()
        self.follow_blocks()
        if self.blocks.step_count() > 0:
            self._census.forget_silent(self.blocks.known_states())
        self.capture.reset()
        self.arm()

    def _follow_model(self) -> bool:
        """Gives blocks to what was unfrozen or replaced. Passes since the last step belong to the old blocks and are dropped."""
        if not self.blocks.outdated(look_for_replaced=self.capture.attached):
            return False
        self.blocks.make_anew()
        self.follow_blocks()
        self.capture.reset()
        return True

    def arm(self) -> None:
        """Hooks on for the next step if it takes an estimate, off if it does not."""
        self._armed_step = -1
        self.schedule.read(self.blocks.groups)
        step = self.blocks.step_count()
        due = self.curvature.due(step)
        if due:
            self.capture.attach(due, self.curvature.bases(step))
        else:
            self.capture.detach()
        self._armed_step = step

    def detach(self) -> None:
        """Removes all hooks."""
        self.capture.detach()

    # -- a step -------------------------------------------------------------------------------------------------

    def advance(self, optimizer: Optimizer, rule: UpdateRule, seed: int) -> None:
        """Sums of the passes since the last step into the averages; inverses follow; the step is counted."""
        changed = self._follow_model()
        self._allocate(optimizer, rule, seed)
        step = self.blocks.step_count()
        due = {} if changed else self._estimate_due(step)
        statistics = self._take_statistics(due) if due else None
        if statistics is not None and self._move_misfits(optimizer, self.check.misfits(due, statistics)):
            self._allocate(optimizer, rule, seed)
        self.curvature.update(statistics, step)
        self.curvature.refresh(step)
        state.count_step(optimizer)
        self.check.broken_off = False

    def _allocate(self, optimizer: Optimizer, rule: UpdateRule, seed: int) -> None:
        """State for what has none; at most steps there is nothing to do."""
        parts = (len(optimizer.state), *((len(group["params"]), float(group["momentum"]) > 0.0) for group in self.blocks.groups))
        if parts != self._allocated:
            state.allocate(optimizer, self.blocks, rule, seed)
            self._allocated = (len(optimizer.state), *parts[1:])

    def _estimate_due(self, step: int) -> dict[str, TrackedBlock]:
        """None after an interrupt while hooks were set: the old curvature goes on."""
        return self.curvature.due(step) if self._armed_step == step else {}

    def _take_statistics(self, due: dict[str, TrackedBlock]) -> Pending:
        """Sums of the passes since the last step."""
        self.check.refuse_unusable(due)
        self.check.broken_off = True
        return self.capture.take(gradients_came=self.capture.watching and self.check.any_gradient())

    def _move_misfits(self, optimizer: Optimizer, misfits: list[str]) -> bool:
        """Layers that turned out not to be what their blocks were made for get diagonal blocks."""
        for name in misfits:
            optimizer.state[self.blocks.tracked[name].weight].pop("curvature", None)
        if misfits:
            self.blocks.flatten(misfits)
            self.follow_blocks()
        return bool(misfits)
