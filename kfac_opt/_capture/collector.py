"""Fills statistics from forward passes of a model: what optimizers and Laplace's approximation see of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kfac_opt._capture.carried import CarriedGraphs
from kfac_opt._capture.due import Due, Estimate, FisherKind, Tracked
from kfac_opt._capture.grouping import RowGrouping
from kfac_opt._capture.hooks import HookSet, is_transformed, owners_of_hooks
from kfac_opt._capture.likelihood_gradients import LikelihoodGradients
from kfac_opt._capture.outputs import pick_logits
from kfac_opt._capture.passes import Missed, Pass, Pending, Tally
from kfac_opt._capture.proving import Proving
from kfac_opt._capture.recorder import Recorder
from kfac_opt._capture.replays import Replays
from kfac_opt._capture.rounding import Rounding
from kfac_opt._capture.running import Running
from kfac_opt._capture.source import GradientSource
from kfac_opt._capture.status import Foreign, LayerStatus, LayerStatuses
from kfac_opt._capture.sums import Sums
from kfac_opt._capture.user_gradients import UserGradients
from kfac_opt._capture.watch import LossWatch
from kfac_opt._curvature.block import State
from kfac_opt.likelihoods import Likelihood

__all__ = ["Collector", "FisherKind", "Foreign", "Tracked", "unnoticed"]


class Collector:
    """Watches the passes that are due: :meth:`attach`, passes of the user, :meth:`take`, and :meth:`detach` or attach anew.

    Args:
        root: the module whose forward is one pass.
        likelihood, fisher, label_samples, outputs, loss_reduction, make_generator, process_group: see
            :class:`kfac_opt._capture.due.Estimate`.

    Attributes:
        paused: passes do not count.
        mask: of the terms of the passes that begin now, where the model gives none.
        any_mode: whether passes in evaluation mode count as well.
        sample_ranks: ranks among which the passes of a step are divided.
        forward_seen: whether a forward of the model, counted or not, began since the last step.
        pending: what the passes since the last step add up to, so far.
    """

    def __init__(
        self,
        root: nn.Module,
        likelihood: Likelihood,
        fisher: FisherKind,
        label_samples: int,
        outputs: Callable[[Any], Any] | None,
        loss_reduction: Literal["mean", "sum"],
        make_generator: Callable[[int, torch.device], torch.Generator],
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.likelihood, self.fisher, self.outputs, self.process_group = likelihood, fisher, outputs, process_group
        self.paused = self.any_mode = self.forward_seen = False
        self.mask: Tensor | None = None
        self.sample_ranks = 1
        self.pending = Pending()
        self._tally = Tally()
        self._due, self._statuses = Due(), LayerStatuses()
        self._sums = Sums(self._due, Rounding())
        proving = Proving(self._due, self._statuses, self._sums)
        estimate = Estimate(root, likelihood, fisher, label_samples, outputs, loss_reduction, make_generator, process_group)
        kind = UserGradients if fisher == "empirical" else LikelihoodGradients
        self._source: GradientSource = kind(estimate, self._due, self._statuses, proving, self._sums, self._tally)
        self._recorder = Recorder(self._due, self._statuses, proving, self._sums, self._source.on_call)
        self._replays = Replays(self._due, self._statuses, proving, self._sums, self._source.on_call)
        self._grouping = RowGrouping(self._due)
        # The empirical one's gradients come through all calls at once.
        self._carried = None if fisher == "empirical" else CarriedGraphs(root)
        self._watch = LossWatch(likelihood, outputs)
        self._root, self._hooks, self._running = root, HookSet(), Running()

    # -- hooks --------------------------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """Whether hooks are on."""
        return bool(self._hooks)

    def attach(self, due: Mapping[str, Tracked], states: Mapping[str, State | None]) -> None:
        """Hooks the layers that are due. ``states``: bases in force, or None where examples wait for a new one."""
        self.detach()
        self._due.entries, self._due.states = due, states
        self._replays.attach()
        self._hooks.put(self, self._root, self._due.modules(), self._replays.drawing())

    def detach(self) -> None:
        """Takes the hooks off; a pass under way is none."""
        self._hooks.remove()
        self._running = Running()

    @contextmanager
    def with_paused(self) -> Iterator[None]:
        """Passes inside do not count."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    @contextmanager
    def with_mask(self, mask: Tensor | None) -> Iterator[None]:
        """Terms where ``mask`` is False do not count in the passes inside; None: all do."""
        before, self.mask = self.mask, mask
        try:
            yield
        finally:
            self.mask = before

    # -- what is known of the layers ----------------------------------------------------------------------------

    def status(self, name: str) -> LayerStatus:
        """Of one layer."""
        return self._statuses[name]

    @property
    def fired(self) -> set[str]:
        """Layers whose hook ever saw a call with gradients."""
        return self._statuses.ran

    @property
    def hidden(self) -> set[str]:
        """Layers that since the last step ran with gradients disabled inside a pass with gradients."""
        return self._statuses.hidden

    @property
    def proven(self) -> set[str]:
        """Layers that are what their adapter says."""
        return self._statuses.proven

    def forget_proofs(self) -> None:
        """Other modules may stand behind the names now."""
        self._statuses.forget_proofs()

    @property
    def foreign(self) -> dict[str, Foreign]:
        """Layers that are not, and why."""
        return self._statuses.foreign

    @property
    def watching(self) -> bool:
        """Whether the loss of these passes is held against the likelihood."""
        return self._watch.waiting

    # -- a pass: called by hooks --------------------------------------------------------------------------------

    def on_root_start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward of the model begins."""
        running = self._running
        if not running.enter(module):
            return
        self.forward_seen = True
        if torch._C._current_graph_task_id() == -1:  # not while a checkpoint recomputes the model: gradients still come
            self._source.settle(self.pending)
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "nn.DataParallel copies the model at every forward, and its hooks see only a part of the batch. Use "
                "torch.nn.parallel.DistributedDataParallel (one process per device) or a single device."
            )
        reason = self._why_not(module)
        if reason is not None:
            self._tally.missed.add(reason)
            running.current = None
            return
        if self._carried is not None:
            self._carried.look((args, kwargs))
        running.current = Pass(num_inputs=_leading_dim([*args, *kwargs.values()]))

    def _why_not(self, module: nn.Module) -> Missed | None:
        """Why a pass that begins now does not count, or None."""
        if self.paused:
            return "paused"
        if is_transformed():
            return "transformed"
        if not torch.is_grad_enabled():
            return "no gradients"
        return None if module.training or self.any_mode else "evaluation"

    def on_draw(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module with several matrices is about to be called, which may draw random numbers."""
        current = self._running.current
        if current is not None:
            self._replays.before(current, name, module)

    def on_layer(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """A layer was called."""
        current = self._running.current
        if current is not None:
            maskable = self.outputs is not None or self.mask is not None
            recorder = self._replays if self._replays.has(name) else self._recorder
            recorder.record(current, name, module, args, kwargs, out, maskable=maskable)

    def on_root_end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The forward of the model is over."""
        current = self._running.leave()
        if current is None or (output is None and sys.exc_info()[0] is not None):
            return  # the forward raised: no pass
        logits, mask = pick_logits(output, self.outputs)
        mask = self.mask if mask is None else mask
        if not self._counts(current, logits, mask):
            return
        current.masked = mask is not None and not bool(mask.all())
        self._replays.judge(current)
        self._grouping.group(current, logits.shape[0])
        if not current.masked:
            self._sums.take_inputs(current)
        self._source.collect(current, logits, mask, self.pending)
        self._watch.attach(logits, mask, output)  # now: hooks are to see the gradients of the loss alone

    def _counts(self, current: Pass, logits: Tensor, mask: Tensor | None) -> bool:
        """Whether a pass that is over counts; its number of terms."""
        self.likelihood.check(logits)
        if not logits.requires_grad:
            self._tally.missed.add("detached")
            return False
        if mask is not None:
            self.likelihood.term_mask(logits, mask)
        current.num_terms = self.likelihood.num_terms(logits, mask)
        if current.num_terms == 0:
            self._tally.missed.add("masked")
            return False
        if not self.likelihood.admits(logits, mask):
            self._tally.drop()
            return False
        return True

    # -- handing over -------------------------------------------------------------------------------------------

    def count_dropped(self) -> int:
        """Passes dropped so far, those included whose backward has just come."""
        self._source.settle(self.pending)
        return self._tally.dropped

    def take(self, *, gradients_came: bool = False) -> Pending:
        """Everything since the last step; starts anew.

        Args:
            gradients_came: whether there was a backward, for what is to be said of the loss.
        """
        self._source.end_step()
        self._source.settle(self.pending)
        self._watch.settle(gradients_came=gradients_came)
        taken = self.pending
        if taken.open:
            self._tally.missed.add("no backward")
        taken.missed = set(self._tally.missed)
        self._source.complete(taken, self.sample_ranks)
        self._statuses.confirm()
        self.reset()
        return taken

    def reset(self) -> None:
        """Forgets pending passes."""
        self.pending = Pending()
        self.forward_seen = False
        self._source.start_step()
        self._statuses.start_step()
        self._tally.missed.clear()

    @contextmanager
    def separately(self) -> Iterator[None]:
        """Collects the body's passes as a step of its own; they are dropped if the body raises."""
        before, self.pending = self.pending, Pending()
        try:
            yield
            self._source.settle(self.pending)
            self._source.complete(self.pending, self.sample_ranks)
            before.merge(self.pending)
        finally:
            self.pending = before


@contextmanager
def unnoticed(model: nn.Module) -> Iterator[None]:
    """Forwards in the body are not passes of any collector that is attached to the model or to a part of it."""
    collectors = {id(owner): owner for owner in owners_of_hooks(model) if isinstance(owner, Collector)}.values()
    before = [(collector, collector.paused, collector.forward_seen) for collector in collectors]
    for collector in collectors:
        collector.paused = True
    try:
        yield
    finally:
        for collector, paused, seen in before:
            collector.paused, collector.forward_seen = paused, seen


def _leading_dim(arguments: list[Any]) -> int | None:
    dense = [part for part in arguments if isinstance(part, Tensor) and not part.is_nested]
    return next((int(part.shape[0]) for part in dense if part.dim()), None)
