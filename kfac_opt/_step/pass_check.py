"""Holds what the passes of a step showed against the gradients that there are, and says what is missing."""

from __future__ import annotations

from collections.abc import Mapping

from kfac_opt._capture.collector import Collector
from kfac_opt._capture.passes import Pending
from kfac_opt._step.census import Census
from kfac_opt._step.model_blocks import ModelBlocks
from kfac_opt._step.placement import Replicated
from kfac_opt._step.tracking import TrackedBlock, describe_apart, describe_foreign, describe_unused
from kfac_opt._step.uncounted import describe_uncounted


class PassCheck:
    """Looks over each estimate before and after its passes are taken.

    Args:
        census: what has been found and said so far.
    """

    def __init__(self, blocks: ModelBlocks, capture: Collector, placement: Replicated, census: Census) -> None:
        self.blocks, self.capture, self.placement, self.census = blocks, capture, placement, census
        self.broken_off = False  # a step that took the passes was left by an exception

    def any_gradient(self) -> bool:
        """Whether there is a gradient that is not zero (zeros are what ``zero_grad(set_to_none=False)`` leaves)."""
        gradients = [p.grad for group in self.blocks.groups for p in group["params"] if p.grad is not None]
        return any(bool(gradient.any()) for gradient in gradients if not gradient.is_sparse)

    def refuse_unusable(self, due: Mapping[str, TrackedBlock]) -> None:
        """Raises if there are gradients, but the model's forward never ran, or hooks cannot see a layer.

        Decided over the processes, before anybody waits for the others' sums: one without a batch joins with zeros.
        """
        owner = self.blocks.owner
        seen, hidden = self.capture.forward_seen or self.broken_off, self._hidden_layer(due)
        unseen = not seen and self.any_gradient()
        flags = self.placement.added([seen, unseen, hidden is not None], next(iter(due.values())).weight.device)
        if flags[1] and not flags[0]:
            raise RuntimeError(
                f"{owner}: there are gradients, but the forward of the model was not seen since the last "
                f"step, so that the estimate that is due has no data. Give {owner} the module that you "
                "call (a part of the model was called, or the forward method directly)."
            )
        if flags[2]:
            raise RuntimeError(
                f"{owner}: layer '{hidden or 'of another rank'}' runs inside a reentrant checkpoint, which hides it from "
                "hooks. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or fisher='empirical', which gives such "
                "layers diagonal blocks."
            )

    def _hidden_layer(self, due: Mapping[str, TrackedBlock]) -> str | None:
        """A layer with a gradient that ran where hooks do not see it, by name (the empirical Fisher can do with the gradient)."""
        if self.capture.fisher == "empirical":
            return None
        for name in self.capture.hidden - self.capture.fired:
            gradient = due[name].weight.grad if name in due else None
            if gradient is not None and bool(gradient.any()):
                return name
        return None

    def misfits(self, due: Mapping[str, TrackedBlock], pending: Pending) -> list[str]:
        """Layers that are not what their blocks were made for, named whenever that shows.

        Says as well, once each, that no pass counted, and which gradients do not come through the logits.
        """
        self._say_uncounted(pending)
        found = self.census.look(due, self.blocks.states(), pending, self.capture, self.placement.group)
        describe_unused(self.blocks.owner, found.unused)
        describe_foreign(self.blocks.owner, found.foreign)
        describe_apart(self.blocks.owner, found.apart)
        return [*found.unused, *found.foreign]

    def _say_uncounted(self, pending: Pending) -> None:
        if self.census.said_uncounted or pending.num_terms or not pending.missed or "paused" in pending.missed:
            return
        alone = self.placement.group is None  # else a process may have no batch
        if (alone or pending.missed != {"no gradients"}) and self.any_gradient():
            self.census.said_uncounted = True
            describe_uncounted(self.blocks.owner, pending.missed)
