"""What survives a restart or a copy: allocation, saving, loading, pickling and copying of the state."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.optim import Optimizer

from kfac_opt.optim.attached import AttachedOptimizer
from kfac_opt.optim.loading import by_number, check_saved, install_saved


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
        for tracked in self._tracked.values():
            state = self.state[tracked.weight]
            if "curvature" not in state:
                state["curvature"] = tracked.block.init_state(tracked.weight.device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a ``state_dict``: tensors are copied and keep their dtypes; pending passes are dropped.

        Parameter names (as distributed checkpoints write them) and numbers are both understood.
        """
        seen: list[dict[str, Any]] = []

        def check(_: Optimizer, given: dict[str, Any]) -> None:
            blocks = {id(entry.weight): entry for entry in self._tracked.values()} if self._model is not None else {}
            check_saved(type(self).__name__, given, self.param_groups, self.defaults, blocks)
            seen.append(given)

        # Last of the pre-hooks, so that it sees what the others made; first of the post-hooks, so that they see
        # our tensors and not torch's, which are cast to the dtype of the parameter.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(lambda _: self._install(seen[-1]), prepend=True)
        try:
            super().load_state_dict(by_number(state_dict, self._model, self.param_groups))
        finally:
            before.remove()
            after.remove()

    def _install(self, saved: dict[str, Any]) -> None:
        install_saved(self, saved)
        seeds = [state["seed"] for state in self.state.values() if "seed" in state]
        if seeds:
            self._base_seed = int(seeds[0])
        if self._model is None:
            return
        self._retrack_flat([])  # the saved groups say which curvature they have
        flat = [
            name
            for name, entry in self._tracked.items()
            if entry.module is not None and "diagonal" in self.state.get(entry.weight, {}).get("curvature", {})
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
            copied._options, copied._likelihood, copied._flat = self._options, self._likelihood, set(self._flat)
            copied._said_uncounted = self._said_uncounted
            copied._census = copy.deepcopy(self._census, memo)
            copied._attach(model)
        return copied
