"""The blocks of a model's parameters as one object: which there are, their state, their damping."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from kfac_opt._curvature.block import Damping, State
from kfac_opt._step.loading import has_diagonal
from kfac_opt._step.tracking import BlockOptions, TrackedBlock, replaced, track, uncovered
from kfac_opt._step.views import CurvatureMapping, CurvatureView

Groups = list[dict[str, Any]]


class ModelBlocks:
    """Reads the groups and the state of an optimizer, makes the blocks of its model, and makes them anew when it changes.

    Args:
        optimizer: whose ``param_groups`` and ``state`` are read; held weakly.
        model: whose parameters they are.
        options: what decides the kind of a block.
        damping: in force for the blocks of a group.
        flat: names of layers that turned out to be used in ways that their blocks do not cover: they have diagonal ones.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        options: BlockOptions,
        damping: Callable[[Mapping[str, Any]], Damping],
        flat: set[str],
    ) -> None:
        self.owner, self.model, self.flat = type(optimizer).__name__, model, set(flat)
        self._optimizer, self._options, self._damping = weakref.ref(optimizer), options, damping
        self.make()

    @property
    def groups(self) -> Groups:
        """Those of the optimizer, as they are now."""
        return self._alive().param_groups

    def _alive(self) -> Optimizer:
        optimizer = self._optimizer()
        assert optimizer is not None  # which holds this object
        return optimizer

    # -- making -------------------------------------------------------------------------------------------------

    def make(self, *, announce: bool = True) -> None:
        """Blocks for the model as it is now. ``announce``: say which parameters have diagonal curvature."""
        groups = self.groups
        self.tracked = self.made_for(groups, self.flat, announce=announce)
        self.kinds = [group["curvature"] for group in groups]
        self._members: list[tuple[int, bool]] = []  # as they were when all had the blocks that they need
        self._gone = uncovered(groups, self.tracked)  # parameters that left the model are not looked for again
        self.views = CurvatureMapping({name: self._view(entry) for name, entry in self.tracked.items()})

    def made_for(self, groups: Groups, flat: set[str], *, announce: bool) -> dict[str, TrackedBlock]:
        """Blocks by name for these groups; the layers named in ``flat`` get diagonal ones."""
        return track(self.owner, self.model, groups, self._options, flat, announce=announce)

    def _view(self, entry: TrackedBlock) -> CurvatureView:
        this = weakref.proxy(self)
        return CurvatureView(entry.name, entry.block, lambda: this.state_of(entry), lambda: this.damping_of(entry))

    def outdated(self, *, look_for_replaced: bool) -> bool:
        """Whether parameters were unfrozen, or layers parametrized, pruned or wrapped, since the blocks were made."""
        members = [(id(p), p.requires_grad) for group in self.groups for p in group["params"]]
        if members != self._members:
            if not uncovered(self.groups, self.tracked) <= self._gone:
                return True
            self._members = members
        return look_for_replaced and replaced(self.owner, self.model, self.groups, self.tracked)

    def make_anew(self) -> None:
        """Blocks for the model as it is now, without the curvature of layers whose block is another one (a bias joined it)."""
        before = {id(entry.weight): entry.block for entry in self.tracked.values()}
        self.make()
        now = {id(entry.weight): entry.block for entry in self.tracked.values()}
        state = self._alive().state
        for group in self.groups:
            for parameter in group["params"] if group["curvature"] != "identity" else []:
                old, new = before.get(id(parameter)), now.get(id(parameter))
                if parameter in state and (type(old), old and old.layout) != (type(new), new and new.layout):
                    state[parameter].pop("curvature", None)

    def flatten(self, names: list[str]) -> None:
        """These layers have been named already: their parameters get diagonal blocks."""
        self.flat.update(names)
        self.make(announce=False)

    def make_for_state(self) -> None:
        """Blocks of the kinds that the groups and the state of the optimizer say, after both were loaded."""
        self.flat.clear()
        self.flatten([])
        state = self._alive().state
        layers = {name: entry for name, entry in self.tracked.items() if entry.module is not None}
        flat = [name for name, entry in layers.items() if has_diagonal(state.get(entry.weight))]
        if flat:
            self.flatten(flat)

    def check_kinds(self) -> None:
        """Raises ValueError for a group that was added by hand, or says another curvature than its blocks were made for."""
        groups = self.groups
        if len(groups) != len(self.kinds):
            raise ValueError(
                f"{self.owner}: there are {len(groups)} parameter groups, but the blocks were made for "
                f"{len(self.kinds)}. Add groups with add_param_group()."
            )
        for number, (group, kind) in enumerate(zip(groups, self.kinds)):
            if group["curvature"] != kind:
                raise ValueError(
                    f"{self.owner}: the curvature of parameter group {number} was changed to {group['curvature']!r}, but its "
                    f"blocks are of kind {kind!r}. Set it back, or detach() this optimizer and build {self.owner}(model, ...) "
                    "with the curvature you want."
                )

    # -- reading ------------------------------------------------------------------------------------------------

    def state_of(self, entry: TrackedBlock) -> State | None:
        """Curvature state of a block, None before the first step."""
        state = self._alive().state
        return state[entry.weight].get("curvature") if entry.weight in state else None

    def damping_of(self, entry: TrackedBlock) -> Damping:
        """Damping in force for a block."""
        return self._damping(self.groups[entry.group])

    def states(self) -> dict[str, State]:
        """Those of all blocks, once they are allocated."""
        state = self._alive().state
        return {name: state[entry.weight]["curvature"] for name, entry in self.tracked.items()}

    def known_states(self) -> dict[str, State]:
        """Those that there are."""
        found = {name: self.state_of(entry) for name, entry in self.tracked.items()}
        return {name: state for name, state in found.items() if state is not None}

    def step_count(self) -> int:
        """Steps taken, as the state says."""
        state = self._alive().state
        for group in self.groups:
            for parameter in group["params"]:
                if "step" in state.get(parameter, {}):
                    return int(state[parameter]["step"])
        return 0
