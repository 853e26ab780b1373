"""What survives a restart or a copy: allocation, saving, loading, pickling and copying of the state."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.optim import Optimizer

from kfac_opt._step.accepted import check_form, check_groups, check_parameter
from kfac_opt._step.attached import AttachedOptimizer
from kfac_opt._step.loading import by_number, has_diagonal, in_current_form, install_saved
from kfac_opt._step.tracking import TrackedBlock


class SavedOptimizer(AttachedOptimizer):
    """Allocates the state of its blocks and parameters, saves it, and goes on from what was saved."""

    def _init_state(self) -> None:
        """Every key of every parameter, so that the state is all there or not at all."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "step" not in state:
                    state["step"] = torch.tensor(float(self._step_count()))
                if "seed" not in state:
                    state["seed"] = torch.tensor(self._base_seed, dtype=torch.int64)
                if float(group["momentum"]) > 0.0 and "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                if self._rule is not None and group["curvature"] != "identity" and "pace" not in state:
                    state["pace"] = self._rule.init_state(parameter.device)
        for tracked in self._tracked.values():
            state = self.state[tracked.weight]
            if "curvature" not in state:
                state["curvature"] = tracked.block.init_state(tracked.weight.device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a ``state_dict``: tensors are copied and keep their dtypes; pending passes are dropped.

        Parameter names (as distributed checkpoints write them) and numbers are both understood.

        Raises:
            ValueError, TypeError: for what would fail or poison later (missing keys, wrong shapes or dtypes, unknown words,
                NaN), with the name of the key; the optimizer is as it was.
        """
        seen: list[dict[str, Any]] = []

        def check(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            check_form(given)
            given = {**given, "state": {key: in_current_form(state) for key, state in given["state"].items()}}
            self._check_saved(given)
            seen.append(given)
            return given

        # Last of the pre-hooks, so that it sees what the others made; first of the post-hooks, so that they see
        # our tensors and not torch's, which are cast to the dtype of the parameter.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(lambda _: self._install(seen[-1]), prepend=True)
        check_form(state_dict)
        try:
            super().load_state_dict(by_number(state_dict, self._model, self.param_groups))
        finally:
            before.remove()
            after.remove()

    def _check_saved(self, saved: dict[str, Any]) -> None:
        """Raises for a state that cannot be gone on with, before anything is changed."""
        groups, owner = saved["param_groups"], type(self).__name__
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            return  # torch says so
        check_groups(owner, groups, self.param_groups, self.defaults)
        for group in groups:
            self._check_values(group)
        members = [(key, p) for given, own in zip(groups, self.param_groups) for key, p in zip(given["params"], own["params"])]
        states = {id(parameter): saved["state"][key] for key, parameter in members if key in saved["state"]}
        blocks = self._blocks_of(groups, states) if self._model is not None else {}
        names = {id(p): name for name, p in self._model.named_parameters()} if self._model is not None else {}
        for key, parameter in members:
            if id(parameter) in states:
                name = names.get(id(parameter), str(key))
                check_parameter(owner, name, states[id(parameter)], parameter, blocks.get(id(parameter)))

    def _blocks_of(self, groups: list[dict[str, Any]], states: dict[int, Any]) -> dict[int, TrackedBlock]:
        """The blocks that a saved state belongs to, by the id of their weight: the saved groups say of which kind."""
        kinds = [{**own, "curvature": given["curvature"]} for own, given in zip(self.param_groups, groups)]
        whole = self._track_blocks(kinds, set(), announce=False)  # they are named when the state is loaded
        flat = {name for name, entry in whole.items() if entry.module is not None and has_diagonal(states.get(id(entry.weight)))}
        found = self._track_blocks(kinds, flat, announce=False) if flat else whole
        return {id(entry.weight): entry for entry in found.values()}

    def _install(self, saved: dict[str, Any]) -> None:
        install_saved(self, saved)
        seeds = [state["seed"] for state in self.state.values() if "seed" in state]
        if seeds:
            self._base_seed = int(seeds[0])
        if self._model is None:
            return
        self._flat.clear()
        self._retrack_flat([])  # the saved groups say which curvature they have
        flat = [
            name
            for name, entry in self._tracked.items()
            if entry.module is not None and has_diagonal(self.state.get(entry.weight))
        ]
        if flat:
            self._retrack_flat(flat)
        self._census.reopen()
        if self._step_count() > 0:
            self._census.forget_silent(self._known_states())
        self._collector.reset()
        self._arm()

    # -- copying ------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["_base_seed"] = self._base_seed
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_model", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> SavedOptimizer:
        """With the model in the same ``deepcopy((model, optimizer))`` a working pair, alone a detached optimizer."""
        model = memo.get(id(self._model)) if self._model is not None else None
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        if model is not None:
            copied._options, copied._rule = self._options, self._rule
            copied._likelihood, copied._flat = self._likelihood, set(self._flat)
            copied._said_uncounted = self._said_uncounted
            copied._census = copy.deepcopy(self._census, memo)
            copied._attach(model)
        return copied
