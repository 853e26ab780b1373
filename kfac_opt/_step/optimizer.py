"""``CurvatureOptimizer``: the one ``step()`` that KFAC and KFACVI share, and what it is put together from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the whole compiler
from torch.optim import Optimizer

from kfac_opt._curvature.block import Damping
from kfac_opt._curvature.precision import full_precision
from kfac_opt._step import attachment, state
from kfac_opt._step import options as checks
from kfac_opt._step.accepted import check_form
from kfac_opt._step.census import Census
from kfac_opt._step.loading import by_number, install_saved
from kfac_opt._step.rules import RULES, GroupStep
from kfac_opt._step.safety import cast_to_parameters
from kfac_opt._step.seeds import Seeds
from kfac_opt._step.settings import CurvatureOptions
from kfac_opt._step.tracking import TrackedBlock
from kfac_opt._step.views import CurvatureMapping
from kfac_opt._step.workings import Workings
from kfac_opt.likelihoods import Likelihood, make_likelihood

WRITTEN = "_preconditioned_at"  # of a gradient: its version when it was replaced by its direction


class CurvatureOptimizer(Optimizer):
    """Estimates the curvature of the model it is attached to and preconditions its gradient.

    Not used by itself: :class:`kfac_opt.KFAC` and :class:`kfac_opt.KFACVI` are its two faces. What it does while it is attached
    is done by its :class:`~kfac_opt._step.workings.Workings` and its update rule (:mod:`kfac_opt._step.rules`).
    """

    needs_basis = False  # posterior samples need eigenbases with every damping style
    zero_damping = False
    _workings: Workings | None = None  # while it is attached to a model
    _successor: str | None = None  # the optimizer that took over
    _scales: dict[int, float | Tensor]  # of the trust region, by number of the group
    _wrote = False  # whether gradients may be directions already

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
        self._options, self._likelihood = options, make_likelihood(options.likelihood)
        self._seeds = Seeds(checks.base_seed(owner, generator))
        self._rule, self._census = RULES[options.update_scale](), Census()
        super().__init__(checks.parameter_groups(owner, model, params), defaults)
        self._attach(model, flat=set())

    # -- the step -----------------------------------------------------------------------------------------------

    @_disable_dynamo  # a compiled training loop breaks its graph here: the step attaches hooks and changes the stance
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step: curvature, preconditioning, update.

        Args:
            closure: evaluates the model and returns the loss, as in torch.optim.

        Raises:
            RuntimeError: when an estimate is due and the model's forward was not seen although there are
                gradients; when the gradients were already preconditioned; when detached.
            ValueError: for values that were written into the groups and are out of range, or decide which blocks there are.
        """
        workings = self._ready_workings()
        loss = self._evaluate(closure) if closure is not None else None
        with self._taking_step(workings):
            self._advance(workings)
            self._scales = {}
            for number, group in enumerate(self.param_groups):
                gradients = self._gradients(group)
                directions = partial(workings.precondition.directions, number)
                scale = self._rule.step(GroupStep(group, gradients, directions, self.state, self._options.foreach is not False))
                if scale is not None:
                    self._scales[number] = scale
        return loss

    @_disable_dynamo
    def precondition_gradients_(self) -> None:
        """Replaces every ``.grad`` by its preconditioned direction; no clip, momentum, decay or learning rate.

        For use in front of another optimizer. Counts as one step of the intervals; ``step()`` for the same
        gradients afterwards is an error.
        """
        workings = self._ready_workings()
        with self._taking_step(workings):
            self._advance(workings)
            for number, group in enumerate(self.param_groups):
                found = workings.precondition.directions(number, self._gradients(group, raw=True))
                directions = cast_to_parameters(found.directions, found.parameters, 0.0)
                for parameter, direction in zip(found.parameters, directions):
                    assert parameter.grad is not None
                    self._wrote = True
                    # On the gradient itself: tensors that somebody refers to weakly cannot be swapped.
                    setattr(parameter.grad, WRITTEN, parameter.grad._version + 1)
                    parameter.grad.copy_(direction)

    def _advance(self, workings: Workings) -> None:
        """The curvature's part of the step."""
        workings.advance(self, self._rule, self._seeds.base)

    def _gradients(self, group: dict[str, Any], *, raw: bool = False) -> dict[int, Tensor]:
        """What the rule gets, by the id of the parameter: sign for ``maximize``, coupled decay, the prior."""
        found: dict[int, Tensor] = {}
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                checks.check_gradient(type(self).__name__, self._name_of(parameter), gradient)
            if not raw:
                gradient = self._with_decay(group, parameter, gradient)
            found[id(parameter)] = gradient
        return found

    def _with_decay(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> Tensor:
        if group["maximize"]:
            gradient = -gradient
        if group["weight_decay"] and not group["decoupled_weight_decay"]:
            gradient = gradient.add(parameter, alpha=float(group["weight_decay"]))
        return gradient

    def _name_of(self, parameter: Tensor) -> str:
        names = [name for name, own in self._require_workings().model.named_parameters() if own is parameter]
        return names[0] if names else "a parameter that left the model"

    @contextmanager
    def _taking_step(self, workings: Workings) -> Iterator[None]:
        """The next step finds its hooks, also where this one is left by an exception (no memory, an interrupt)."""
        self._refuse_written()
        device = next(p for group in self.param_groups for p in group["params"]).device
        try:
            with torch.no_grad(), full_precision(device):  # a loop may call step() inside its autocast block
                yield
        finally:
            workings.arm()

    def _ready_workings(self, what: str = "step()") -> Workings:
        """Raises where no step can be taken, or nothing else that depends on what stands in the groups (``what``)."""
        workings = self._require_workings()
        workings.blocks.check_kinds()
        for group in self.param_groups:
            self._check_values(group)
        return workings

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        with torch.enable_grad():
            return closure()

    def _refuse_written(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None] if self._wrote else []
        for parameter in parameters:
            if getattr(parameter.grad, WRITTEN, None) == parameter.grad._version:
                raise RuntimeError(
                    f"{type(self).__name__}: these gradients were already preconditioned by precondition_gradients_(). Let "
                    "the other optimizer take the step, then zero_grad() and backward() before the next call."
                )
        self._wrote = False

    # -- the model ----------------------------------------------------------------------------------------------

    def _attach(self, model: nn.Module, flat: set[str]) -> None:
        """Puts the parts together and sets the first hooks."""
        self._scales = {}
        workings = Workings(
            self,
            model,
            self._options,
            self._likelihood,
            self._seeds,
            damping=self._damping(),
            needs_basis=self.needs_basis,
            census=self._census,
            flat=flat,
        )  # may raise: nothing is attached before
        self._workings = workings
        for other in attachment.rivals(model, self):
            cast(CurvatureOptimizer, other).give_way(type(self).__name__)
        attachment.register(model, self)
        workings.arm()

    def _damping(self) -> Callable[[Mapping[str, Any]], Damping]:
        """Damping of the blocks of a group, from its settings."""
        scale = self._options.damping_scale
        return lambda group: Damping(float(group["damping"]), scale, power=float(group.get("power", 1.0)))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters of the same model, with hyper-parameters of their own."""
        workings = self._workings
        if workings is not None:
            param_group = checks.parameter_groups(type(self).__name__, workings.model, [param_group])[0]
        checks.check_keys(type(self).__name__, param_group, self.defaults)
        super().add_param_group(param_group)
        try:
            self._check_values(self.param_groups[-1])
            if workings is not None:
                workings.blocks.make()
        except ValueError:
            self.param_groups.pop()
            raise
        if workings is not None:
            workings.follow_blocks()
            workings.arm()

    def _check_values(self, group: Mapping[str, Any]) -> None:
        """Ranges of what stands in a group."""
        checks.check_rule(type(self).__name__, group, self._options.update_scale)
        checks.check_group(type(self).__name__, group, zero_damping=self.zero_damping)

    def detach(self) -> None:
        """Removes all hooks and frees the model for another optimizer. ``step()`` raises afterwards."""
        if self._workings is not None:
            self._workings.detach()
            attachment.release(self._workings.model)
        self._workings = None

    def give_way(self, successor: str) -> None:
        """Detaches this optimizer because another one was built on the same model or parameters."""
        self.detach()
        self._successor = successor

    def _require_workings(self) -> Workings:
        if self._workings is not None:
            return self._workings
        owner = type(self).__name__
        if self._successor is not None:
            raise RuntimeError(
                f"{owner}: this optimizer was detached when {self._successor} was built on the same model or "
                "parameters after it; the later one takes over. Step that one, or build one optimizer with several parameter "
                "groups instead of two."
            )
        raise RuntimeError(
            f"{owner}: this optimizer is not attached to a model (it was detached, copied or unpickled "
            f"without it). Build {owner}(model, ...) and load_state_dict() into it."
        )

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def curvature(self) -> CurvatureMapping:
        """Curvature by layer name (or parameter name, for parameters outside layers)."""
        return self._require_workings().blocks.views

    @property
    def likelihood(self) -> Likelihood:
        """The likelihood whose Fisher matrix is estimated."""
        return self._likelihood

    @property
    def dropped_estimates(self) -> int:
        """Passes dropped because their outputs or sums were not finite."""
        return self._require_workings().capture.count_dropped()

    @property
    def replaced_directions(self) -> int:
        """How often a block's direction was not finite and its plain gradient took its place, since construction."""
        return int(self._require_workings().precondition.replaced)

    @property
    def trust_region_scales(self) -> dict[int, Tensor]:
        """What the KL clip multiplied the last step's directions by (0-dim, in (0, 1]), by number of the group.

        Groups without a clip, and all before the first step, have no entry.
        """
        return {number: torch.as_tensor(scale) for number, scale in self._scales.items()}

    @property
    def blocks(self) -> Mapping[str, TrackedBlock]:
        """The blocks behind :attr:`curvature`, for tools that need their parameters and groups."""
        return self._require_workings().blocks.tracked

    # -- contexts -----------------------------------------------------------------------------------------------

    def paused(self) -> AbstractContextManager[None]:
        """Forward passes inside are not estimates."""
        return self._require_workings().capture.with_paused()

    def masked(self, mask: Tensor) -> AbstractContextManager[None]:
        """Terms where ``mask`` is False are left out of the Fisher of the passes inside, as they are of the loss.

        Args:
            mask: bool, the logits' shape without the class dimension (``[batch, time]``, ``[batch]``).
        """
        checks.check_mask(mask)
        return self._require_workings().capture.with_mask(mask)

    # -- state --------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a ``state_dict``: tensors are copied and keep their dtypes; pending passes are dropped.

        Parameter names (as distributed checkpoints write them) and numbers are both understood.

        Raises:
            ValueError, TypeError: for what would fail or poison later (missing keys, wrong shapes or dtypes, unknown words,
                NaN), with the name of the key; the optimizer is as it was.
        """
        seen: list[dict[str, Any]] = []

        def check(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            blocks = self._workings.blocks if self._workings is not None else None
            seen.append(state.acceptable(self, blocks, given, self._check_values))
            return seen[-1]

        # Last of the pre-hooks, so that it sees what the others made; first of the post-hooks, so that they see
        # our tensors and not torch's, which are cast to the dtype of the parameter.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(lambda _: self._install(seen[-1]), prepend=True)
        check_form(state_dict)
        try:
            super().load_state_dict(by_number(state_dict, self._workings.model if self._workings else None, self.param_groups))
        finally:
            before.remove()
            after.remove()

    def _install(self, saved: dict[str, Any]) -> None:
        install_saved(self, saved)
        seed = state.saved_seed(self)
        self._seeds.base = self._seeds.base if seed is None else seed
        if self._workings is not None:
            self._workings.follow_state()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_seeds": Seeds(self._seeds.base)}

    def __deepcopy__(self, memo: dict[int, Any]) -> CurvatureOptimizer:
        """With the model in the same ``deepcopy((model, optimizer))`` a working pair, alone a detached optimizer."""
        model = memo.get(id(self._workings.model)) if self._workings is not None else None
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        if model is not None:
            copied._reattach(self, cast(nn.Module, model), memo)
        return copied

    def _reattach(self, original: CurvatureOptimizer, model: nn.Module, memo: dict[int, Any]) -> None:
        """This copy goes on with a copy of the model."""
        self._options, self._likelihood, self._rule = original._options, original._likelihood, original._rule
        self._census = copy.deepcopy(original._census, memo)
        self._attach(model, flat=original._require_workings().blocks.flat)
