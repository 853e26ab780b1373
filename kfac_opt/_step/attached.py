"""An optimizer that is attached to a model: construction, copying, reading, detaching. The step is in ``base``."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kfac_opt._capture.distributed import active_group, rank
from kfac_opt._capture.empirical import make_collector
from kfac_opt._capture.wrappers import unwrapped
from kfac_opt._curvature.block import Damping, State
from kfac_opt._curvature.gradient_rows import GradientRows
from kfac_opt._step import options as checks
from kfac_opt._step.census import Census
from kfac_opt._step.estimation import Estimation
from kfac_opt._step.scale_free import ScaleFreeRule
from kfac_opt._step.seeds import LABELS, derive_seed, seeded
from kfac_opt._step.settings import CurvatureOptions
from kfac_opt._step.tracking import BlockOptions, TrackedBlock, few_rows, replaced, track, uncovered
from kfac_opt._step.views import CurvatureMapping, CurvatureView
from kfac_opt.likelihoods import Likelihood, make_likelihood

INTERVALS = ("factor_interval", "inverse_interval")

_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[AttachedOptimizer]] = weakref.WeakKeyDictionary()


class AttachedOptimizer(Optimizer):
    """Knows the blocks of its model, keeps their state and arms the hooks that feed them."""

    needs_basis = False
    zero_damping = False
    _detached_by: str | None = None  # the optimizer that took over
    _armed_step = -1  # for which the hooks are set

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        defaults: dict[str, Any],
        options: CurvatureOptions,
        generator: torch.Generator | None,
    ) -> None:
        owner = type(self).__name__
        checks.check_model(owner, model)
        options.check(owner)
        self._options = options
        self._rule = ScaleFreeRule() if options.update_scale == "rms" else None
        self._likelihood = make_likelihood(options.likelihood)
        self._base_seed = 0
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"{owner}: generator must be a torch.Generator or None, got {generator!r}. For a seed pass "
                "generator=torch.Generator().manual_seed(...)."
            )
        if generator is not None:
            self._base_seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        self._flat: set[str] = set()  # layers that turned out to be used through their weights only
        self._census = Census()
        self._said_uncounted = False
        self._model: nn.Module | None = None
        groups = checks.parameter_groups(owner, model, params)
        super().__init__(groups, defaults)
        self._attach(model)

    # -- construction, copying ----------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters of the same model, with hyper-parameters of their own."""
        if getattr(self, "_model", None) is not None:
            param_group = checks.parameter_groups(type(self).__name__, cast(nn.Module, self._model), [param_group])[0]
        checks.check_keys(type(self).__name__, param_group, self.defaults)
        super().add_param_group(param_group)
        try:
            self._check_values(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        if getattr(self, "_model", None) is not None:
            try:
                self._track()
            except ValueError:
                self.param_groups.pop()
                raise
            self._arm()

    def _attach(self, model: nn.Module) -> None:
        root = unwrapped(model)
        options = self._options
        self._model = model
        self._rows = GradientRows() if options.gradient_rows else None
        self._track()  # may raise: nothing is attached before
        for other in self._others(root):
            other._give_way(self)
        _attached[root] = weakref.ref(self)
        make_generator = _PassGenerators(self)
        self._collector = make_collector(
            root,
            self._likelihood,
            options.fisher,
            options.label_samples,
            options.outputs,
            options.loss_reduction,
            make_generator,
            options.process_group,
        )
        self._wrote = False  # whether gradients may be directions already
        self._arm()

    def _track_blocks(self, groups: list[dict[str, Any]], flat: set[str], *, announce: bool = True) -> dict[str, TrackedBlock]:
        """Blocks by name for these groups; the layers named in ``flat`` get diagonal ones."""
        options = self._options
        block_options = BlockOptions(
            options.damping_style,
            options.weight_sharing,
            options.max_factor_dim,
            options.factor_dtype,
            self.needs_basis,
            options.inverse_dtype,
            options.max_block_dim,
        )
        return track(type(self).__name__, self._require_model(), groups, block_options, flat, announce=announce)

    def _track(self, *, announce: bool = True) -> None:
        options = self._options
        self._tracked = self._track_blocks(self.param_groups, self._flat, announce=announce)
        self._census.reopen()
        if hasattr(self, "_collector"):
            self._collector.proven.clear()  # other modules may stand behind the names now
        self._estimation = Estimation(
            self._tracked,
            options.refresh != "together",
            options.ramp_steps,
            options.process_group,
            shared_gradients=options.fisher == "empirical" and options.loss_reduction == "mean",
        )
        self._built_for = [group["curvature"] for group in self.param_groups]
        self._gone = uncovered(self.param_groups, self._tracked)  # parameters that left the model are not looked for again
        views = {name: self._view(name, tracked) for name, tracked in self._tracked.items()}
        self._views = CurvatureMapping(views)
        if self._rows is not None:
            self._rows.attach(few_rows(self._tracked))

    def _cover_unfrozen(self) -> bool:
        """Gives blocks to parameters that were frozen when the blocks were made and are trained now."""
        if uncovered(self.param_groups, self._tracked) <= self._gone:
            return False
        self._remake_blocks()
        return True

    def _cover_replaced(self) -> bool:
        """Gives blocks to layers that were parametrized, pruned or wrapped since the blocks were made."""
        if not replaced(type(self).__name__, self._require_model(), self.param_groups, self._tracked):
            return False
        self._remake_blocks()
        return True

    def _remake_blocks(self) -> None:
        """Blocks for the model as it is now.

        Passes since the last step belong to the old blocks and are dropped, and so is the curvature of a layer whose block
        is another one now (a bias that joins its matrix).
        """
        groups = [group["params"] for group in self.param_groups if group["curvature"] != "identity"]
        before = {id(tracked.weight): tracked.block for tracked in self._tracked.values()}
        self._track()
        now = {id(tracked.weight): tracked.block for tracked in self._tracked.values()}
        for parameter in (p for members in groups for p in members):
            old, new = before.get(id(parameter)), now.get(id(parameter))
            if parameter in self.state and (type(old), old and old.layout) != (type(new), new and new.layout):
                self.state[parameter].pop("curvature", None)
        self._collector.reset()

    def _view(self, name: str, tracked: TrackedBlock) -> CurvatureView:
        this = weakref.proxy(self)
        return CurvatureView(name, tracked.block, lambda: this._block_state(tracked), lambda: this._damping(tracked))

    def _others(self, root: nn.Module) -> list[AttachedOptimizer]:
        """Attached optimizers of the same model, or of a part or a whole of it with some of the same parameters."""
        own = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        found = []
        for model, reference in list(_attached.items()):
            other = reference()
            if other is None or other is self:
                continue
            shared = any(id(parameter) in own for group in other.param_groups for parameter in group["params"])
            if model is root or shared:
                found.append(other)
        return found

    def _give_way(self, other: AttachedOptimizer) -> None:
        """Trainers build a second optimizer while they still hold the first: the newer one is the one that steps."""
        self.detach()
        self._detached_by = type(other).__name__

    def detach(self) -> None:
        """Removes all hooks and frees the model for another optimizer. ``step()`` raises afterwards."""
        if self._model is not None:
            self._collector.detach()
            if self._rows is not None:
                self._rows.detach()
            _attached.pop(unwrapped(self._model), None)
        self._model = None

    def _require_model(self) -> nn.Module:
        if self._model is None and self._detached_by is not None:
            raise RuntimeError(
                f"{type(self).__name__}: this optimizer was detached when {self._detached_by} was built on the same model or "
                "parameters after it; the later one takes over. Step that one, or build one optimizer with several parameter "
                "groups instead of two."
            )
        if self._model is None:
            raise RuntimeError(
                f"{type(self).__name__}: this optimizer is not attached to a model (it was detached, copied or unpickled "
                f"without it). Build {type(self).__name__}(model, ...) and load_state_dict() into it."
            )
        return self._model

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def curvature(self) -> CurvatureMapping:
        """Curvature by layer name (or parameter name, for parameters outside layers)."""
        self._require_model()
        return self._views

    @property
    def likelihood(self) -> Likelihood:
        """The likelihood whose Fisher matrix is estimated."""
        return self._likelihood

    @property
    def dropped_estimates(self) -> int:
        """Passes dropped because their outputs or sums were not finite."""
        self._require_model()
        return self._collector.count_dropped()

    def _step_count(self) -> int:
        """Steps taken, as the state says."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if "step" in self.state.get(parameter, {}):
                    return int(self.state[parameter]["step"])
        return 0

    def _block_state(self, tracked: TrackedBlock) -> State | None:
        return self.state[tracked.weight].get("curvature") if tracked.weight in self.state else None

    def _damping(self, tracked: TrackedBlock) -> Damping:
        """Damping in force for a block."""
        group = self.param_groups[tracked.group]
        return Damping(float(group["damping"]), self._options.damping_scale, power=float(group.get("power", 1.0)))

    def _check_values(self, group: Mapping[str, Any]) -> None:
        """Ranges of what stands in a group."""
        owner, rule = type(self).__name__, self._options.update_scale
        if group.get("update_scale", rule) != rule:
            raise ValueError(
                f"{owner}: update_scale holds for all parameter groups, got {group['update_scale']!r} in one and {rule!r} for "
                f"the optimizer. Pass it to {owner}(model, update_scale=...)."
            )
        if self._options.gradient_rows and rule == "rms" and float(group["momentum"]) > 0.0:
            raise ValueError(
                f"{owner}: gradient_rows has no effect with update_scale='rms' and momentum, whose average of gradients is no "
                "product of the batch's rows. Leave it out, or take update_scale='natural'."
            )
        checks.check_group(type(self).__name__, group, zero_damping=self.zero_damping)

    def _check_groups(self) -> None:
        """What a user or a scheduler wrote into the groups since the last step.

        Raises:
            ValueError: for values out of range, and for what decides which blocks there are.
        """
        owner = type(self).__name__
        if len(self.param_groups) != len(self._built_for):
            raise ValueError(
                f"{owner}: there are {len(self.param_groups)} parameter groups, but the blocks were made for "
                f"{len(self._built_for)}. Add groups with add_param_group()."
            )
        for number, (group, built) in enumerate(zip(self.param_groups, self._built_for)):
            self._check_values(group)
            if group["curvature"] != built:
                raise ValueError(
                    f"{owner}: the curvature of parameter group {number} was changed to {group['curvature']!r}, but its blocks "
                    f"are of kind {built!r}. Set it back, or detach() this optimizer and build {owner}(model, ...) with the "
                    "curvature you want."
                )

    # -- contexts -----------------------------------------------------------------------------------------------

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forward passes inside are not estimates."""
        self._require_model()
        before, self._collector.paused = self._collector.paused, True
        try:
            yield
        finally:
            self._collector.paused = before

    @contextmanager
    def masked(self, mask: Tensor) -> Iterator[None]:
        """Terms where ``mask`` is False are left out of the Fisher of the passes inside, as they are of the loss.

        Args:
            mask: bool, the logits' shape without the class dimension (``[batch, time]``, ``[batch]``).
        """
        self._require_model()
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"masked: expected a bool tensor, got {found}. Convert it with mask.bool().")
        before, self._collector.mask = self._collector.mask, mask
        try:
            yield
        finally:
            self._collector.mask = before

    # -- state --------------------------------------------------------------------------------------------------

    def _states(self) -> dict[str, State]:
        return {name: self.state[tracked.weight]["curvature"] for name, tracked in self._tracked.items()}

    def _known_states(self) -> dict[str, State]:
        known = {name: self._block_state(tracked) for name, tracked in self._tracked.items()}
        return {name: state for name, state in known.items() if state is not None}

    def _as_armed(self) -> list[dict[str, Any]]:
        """Groups with the intervals that the hooks were set by: one that is changed later counts from the next step."""
        return [{**group, **armed} for group, armed in zip(self.param_groups, self._armed_intervals)]

    def _arm(self) -> None:
        """Hooks on for the next step if it takes an estimate, off if it does not."""
        step = self._step_count()
        self._armed_step = -1
        self._armed_intervals = [{name: group[name] for name in INTERVALS} for group in self.param_groups]
        due = self._estimation.due(step, self.param_groups, self._known_states())
        if not due:
            self._collector.detach()
            self._armed_step = step
            return
        states = {}
        for name, tracked in due.items():
            state = self._block_state(tracked)
            stays = state is not None and tracked.block.ready(state)
            stays = stays and not self._estimation.refreshes(name, step, self.param_groups)
            states[name] = state if stays else None
        self._collector.attach(due, states)
        self._armed_step = step

    def _retrack_flat(self, names: list[str]) -> None:
        """Layers that are used through their weights only get diagonal blocks."""
        self._flat.update(names)
        self._track(announce=False)  # they have been named before


class _PassGenerators:
    """A private generator for each pass: from the base seed, the rank, the step and the pass alone."""

    def __init__(self, optimizer: AttachedOptimizer) -> None:
        self.optimizer = weakref.ref(optimizer)

    def __call__(self, index: int, device: torch.device) -> torch.Generator:
        optimizer = self.optimizer()
        assert optimizer is not None
        group = active_group(optimizer._options.process_group)
        seed = derive_seed(optimizer._base_seed, LABELS, rank(group), optimizer._step_count(), index)
        return seeded(seed, device)
