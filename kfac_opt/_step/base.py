"""``CurvatureOptimizer``: the one ``step()`` that KFAC and its siblings share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the whole compiler

from kfac_opt._capture.distributed import active_group, sum_over_ranks_
from kfac_opt._capture.passes import Pending
from kfac_opt._curvature.gradient_rows import match_rows
from kfac_opt._curvature.kronecker import KroneckerBlock
from kfac_opt._curvature.precision import full_precision
from kfac_opt._step import options as checks
from kfac_opt._step.safety import cast_to_parameters, replace_unsafe_
from kfac_opt._step.saved import SavedOptimizer
from kfac_opt._step.scale_free import ScaleFreeRule, StepSettings, move_
from kfac_opt._step.tracking import TrackedBlock, describe_apart, describe_foreign, describe_unused
from kfac_opt._step.uncounted import describe_uncounted
from kfac_opt._step.update import Directions, apply_, bound_updates_, kl_clip_factor, momentum_, multiply_
from kfac_opt.layers import MatrixLayout

WRITTEN = "_preconditioned_at"  # of a gradient: its version when it was replaced by its direction


class CurvatureOptimizer(SavedOptimizer):
    """Estimates the curvature of the model it is attached to and preconditions its gradient.

    Not used by itself: :class:`kfac_opt.KFAC` and :class:`kfac_opt.KFACVI` are its two faces.
    """

    _broken_off = False  # a step that took the passes was left by an exception
    _replaced_directions: int | Tensor = 0
    _trust_region_scales: dict[int, float | Tensor] = {}  # noqa: RUF012 - replaced, never written to

    # -- the step -----------------------------------------------------------------------------------------------

    @_disable_dynamo  # a compiled training loop breaks its graph here: the step attaches hooks and changes the stance
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step: curvature, preconditioning, trust region, momentum, decay.

        Args:
            closure: evaluates the model and returns the loss, as in torch.optim.

        Raises:
            RuntimeError: when an estimate is due and the model's forward was not seen although there are
                gradients; when the gradients were already preconditioned; when detached.
            ValueError: for values that were written into the groups and are out of range, or decide which blocks there are.
        """
        self._require_model()
        self._check_groups()
        self._refuse_step()
        loss = self._evaluate(closure) if closure is not None else None
        self._refuse_written()
        with self._left_ready(), torch.no_grad(), self._outside_autocast():
            self._advance_curvature()
            self._trust_region_scales = {}
            for number, group in enumerate(self.param_groups):
                self._step_group(number, group)
        return loss

    @contextmanager
    def _left_ready(self) -> Iterator[None]:
        """The next step finds its hooks, also where this one is left by an exception (no memory, an interrupt)."""
        try:
            yield
        finally:
            self._forget_rows()
            self._arm()

    @property
    def trust_region_scales(self) -> dict[int, Tensor]:
        """What the KL clip multiplied the last step's directions by (0-dim, in (0, 1]), by number of the group.

        Groups without a clip, and all before the first step, have no entry.
        """
        return {number: torch.as_tensor(scale) for number, scale in self._trust_region_scales.items()}

    @property
    def replaced_directions(self) -> int:
        """How often a block's direction was not finite and its plain gradient took its place, since construction."""
        return int(self._replaced_directions)

    def _refuse_step(self) -> None:
        """Raises where a subclass cannot take a step just now."""
        return

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        with torch.enable_grad():
            return closure()

    @_disable_dynamo
    @torch.no_grad()
    def precondition_gradients_(self) -> None:
        """Replaces every ``.grad`` by its preconditioned direction; no clip, momentum, decay or learning rate.

        For use in front of another optimizer. Counts as one step of the intervals; ``step()`` for the same
        gradients afterwards is an error.
        """
        self._require_model()
        self._check_groups()
        self._refuse_step()
        self._refuse_written()
        with self._left_ready(), self._outside_autocast():
            self._advance_curvature()
            for number, group in enumerate(self.param_groups):
                found = self._directions(number, group, raw=True)
                directions = cast_to_parameters(found.directions, found.parameters, 0.0)
                for parameter, direction in zip(found.parameters, directions):
                    assert parameter.grad is not None
                    self._wrote = True
                    # On the gradient itself: tensors that somebody refers to weakly cannot be swapped.
                    setattr(parameter.grad, WRITTEN, parameter.grad._version + 1)
                    parameter.grad.copy_(direction)

    def _forget_rows(self) -> None:
        if self._rows is not None:
            self._rows.clear()

    def _outside_autocast(self) -> AbstractContextManager[object]:
        """A loop may call ``step()`` inside its autocast block, where products of matrices are cast down."""
        return full_precision(next(p for group in self.param_groups for p in group["params"]).device)

    def _refuse_written(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None] if self._wrote else []
        for parameter in parameters:
            if getattr(parameter.grad, WRITTEN, None) == parameter.grad._version:
                raise RuntimeError(
                    f"{type(self).__name__}: these gradients were already preconditioned by precondition_gradients_(). Let "
                    "the other optimizer take the step, then zero_grad() and backward() before the next call."
                )
        self._wrote = False

    def _advance_curvature(self) -> None:
        """State, estimates and refreshes of this step; counts it."""
        changed = self._cover_unfrozen() or (self._collector.attached and self._cover_replaced())
        self._init_state()
        step = self._step_count()
        groups = self._as_armed()
        armed = self._armed_step == step  # not after an interrupt while hooks were set: the old curvature goes on
        due = self._estimation.due(step, groups, self._states()) if armed and not changed else {}
        pending = None
        if due:
            self._refuse_unusable(due)
            self._broken_off = True
            pending = self._collector.take(gradients_came=self._collector.watching and self._any_gradient())
            self._say_uncounted(pending)
            self._flatten_unused(due, pending)
        self._estimation.advance(self._states(), pending, step, groups, self._damping)
        steps = [self.state[p]["step"] for group in self.param_groups for p in group["params"] if p in self.state]
        torch._foreach_add_(steps, 1)
        self._broken_off = False

    def _refuse_unusable(self, due: dict[str, TrackedBlock]) -> None:
        """An estimate is due and there are gradients, but the forward of the model never ran, or hooks cannot see a layer.

        Decided over the ranks, before anybody waits for the others' sums: a rank without a batch joins with zeros.
        """
        seen, hidden = self._collector.forward_seen or self._broken_off, self._hidden_layer(due)
        unseen = not seen and self._any_gradient()
        group = active_group(self._options.process_group)
        if group is not None:
            device = next(iter(due.values())).weight.device
            flags = torch.tensor([seen, unseen, hidden is not None], dtype=torch.float64, device=device)
            sum_over_ranks_([flags], group)
            seen, unseen = bool(flags[0]), bool(flags[1])
            hidden = hidden or ("of another rank" if bool(flags[2]) else None)
        if unseen and not seen:
            raise RuntimeError(
                f"{type(self).__name__}: there are gradients, but the forward of the model was not seen since the last "
                f"step, so that the estimate that is due has no data. Give {type(self).__name__} the module that you "
                "call (a part of the model was called, or the forward method directly)."
            )
        if hidden is not None:
            raise RuntimeError(
                f"{type(self).__name__}: layer '{hidden}' runs inside a reentrant checkpoint, which hides it from "
                "hooks. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or fisher='empirical', which gives such "
                "layers diagonal blocks."
            )

    def _any_gradient(self) -> bool:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return any(bool(gradient.any()) for gradient in gradients if not gradient.is_sparse)

    def _say_uncounted(self, pending: Pending) -> None:
        """Once: an estimate was due, there are gradients, and no pass gave one."""
        if self._said_uncounted or pending.num_terms or not pending.missed or "paused" in pending.missed:
            return
        alone = active_group(self._options.process_group) is None  # else a rank may have no batch
        if (alone or pending.missed != {"no gradients"}) and self._any_gradient():
            self._said_uncounted = True
            describe_uncounted(type(self).__name__, pending.missed)

    def _hidden_layer(self, due: dict[str, TrackedBlock]) -> str | None:
        """A layer with a gradient that ran where hooks do not see it, by name (the empirical Fisher can do with the gradient)."""
        if self._options.fisher == "empirical":
            return None
        for name in self._collector.hidden - self._collector.fired:
            gradient = due[name].weight.grad if name in due else None
            if gradient is not None and bool(gradient.any()):  # zeros are what zero_grad(set_to_none=False) leaves
                return name
        return None

    def _flatten_unused(self, due: dict[str, TrackedBlock], pending: Pending) -> None:
        """Layers that are not what their blocks were made for move to diagonal blocks, by name, whenever that shows.

        What has a gradient that does not come through the logits is named as well.
        """
        group = active_group(self._options.process_group)
        found = self._census.look(due, self._states(), pending, self._collector, group)
        owner = type(self).__name__
        if found.foreign or found.unused:
            describe_unused(owner, found.unused)
            describe_foreign(owner, found.foreign)
            self._flatten([*found.unused, *found.foreign])
        describe_apart(owner, found.apart)

    def _flatten(self, names: list[str]) -> None:
        for name in names:
            self.state[self._tracked[name].weight].pop("curvature", None)
        self._retrack_flat(names)
        self._init_state()

    # -- directions and update ----------------------------------------------------------------------------------

    def _gradient(self, group: dict[str, Any], name: str, parameter: Tensor, *, raw: bool) -> Tensor | None:
        """The gradient to precondition: sign for ``maximize``, coupled decay and whatever a subclass adds."""
        gradient = parameter.grad
        if gradient is None:
            return None
        checks.check_gradient(type(self).__name__, name, gradient)
        if raw:
            return gradient
        if group["maximize"]:
            gradient = -gradient
        if group["weight_decay"] and not group["decoupled_weight_decay"]:
            gradient = gradient.add(parameter, alpha=float(group["weight_decay"]))
        return gradient

    def _directions(
        self, number: int, group: dict[str, Any], *, raw: bool = False, averages: dict[int, Tensor] | None = None
    ) -> Directions:
        """Preconditioned directions of one group in the dtypes of their blocks, and what the trust region needs to know.

        ``averages``: what to precondition in place of the gradients, by id of the parameter.
        """
        found = Directions()
        gradient_of = self._gradient if averages is None else lambda *at, raw: averages.get(id(at[2]))
        covered: set[int] = set()
        for name, tracked in self._tracked.items():
            if tracked.group != number:
                continue
            covered.update(id(parameter) for parameter in tracked.parameters)
            gradients = [gradient_of(group, name, parameter, raw=raw) for parameter in tracked.parameters]
            if any(gradient is not None for gradient in gradients):
                self._precondition_block(tracked, gradients, found)
        for parameter in group["params"]:
            if id(parameter) in covered or parameter.grad is None:
                continue
            name = self._name_of(parameter) if parameter.grad.is_sparse else ""  # for the message alone
            gradient = gradient_of(group, name, parameter, raw=raw)
            if gradient is not None:
                if group["curvature"] != "identity":
                    if gradient is parameter.grad:
                        gradient = gradient.clone()  # directions are scaled in place, the user's gradients are not
                    found.add_block(gradient.new_zeros(()), MatrixLayout("flat", tuple(parameter.shape)))
                found.add(parameter, gradient, gradient, found.num_blocks - 1)
        self._replaced_directions = self._replaced_directions + replace_unsafe_(found)
        return found

    def _name_of(self, parameter: Tensor) -> str:
        names = [name for name, own in self._require_model().named_parameters() if own is parameter]
        return names[0] if names else "a parameter that left the model"

    def _precondition_block(self, tracked: TrackedBlock, gradients: list[Tensor | None], found: Directions) -> None:
        block, layout = tracked.block, tracked.block.layout
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(tracked.parameters, gradients)]
        matrix = layout.to_matrix(filled[0], filled[1] if len(filled) > 1 else None).to(block.dtype)
        state = self.state[tracked.weight]["curvature"]
        if block.ready(state):
            rows = self._rows_of(tracked, matrix)
            if rows is not None:
                assert isinstance(block, KroneckerBlock)
                direction = block.precondition_rows(state, *rows)
            else:
                direction = block.precondition(state, matrix, self._damping(tracked))
        else:
            direction = matrix.clone()  # the plain gradient; the trust region bounds it
        found.add_block(torch.linalg.vecdot(matrix.flatten(), direction.flatten()), layout)
        for parameter, gradient, part in zip(tracked.parameters, gradients, layout.from_matrix(direction)):
            if gradient is not None and part is not None:
                found.add(parameter, part, gradient, found.num_blocks - 1)

    def _rows_of(self, tracked: TrackedBlock, matrix: Tensor) -> tuple[Tensor, Tensor] | None:
        """Inputs and output gradients whose product this gradient is, if they were kept and it is."""
        block = tracked.block
        if self._rows is None or not isinstance(block, KroneckerBlock):
            return None
        rows = self._rows.take(tracked.name, block.layer, matrix.dtype)
        scale = match_rows(matrix[0], *rows) if rows is not None else None
        if rows is None or scale is None:
            return None
        return rows[0] if scale == 1.0 else rows[0].mul_(scale), rows[1]

    def _step_group(self, number: int, group: dict[str, Any]) -> None:
        """Trust region, momentum, bound, decay and update of one group."""
        if self._rule is not None and group["curvature"] != "identity":
            self._scale_free_step(self._rule, number, group)
            return
        found = self._directions(number, group)
        if not found.parameters:
            return
        foreach = self._options.foreach is not False
        lr = float(group["lr"])
        trust_region = group["curvature"] != "identity"
        updates, factors = found.directions, None
        if trust_region and group["kl_clip"] is not None and found.num_blocks:
            scale = kl_clip_factor(found.products, lr, float(group["kl_clip"]))
            self._trust_region_scales[number] = scale
            multiply_(updates, scale, foreach=foreach)
        updates = self._before_momentum(group, found.parameters, updates, lr)
        # Shortened before they are cast: half precision does not hold a direction as it comes.
        updates = cast_to_parameters(updates, found.parameters, self._momentum(group))
        if float(group["momentum"]) > 0.0:
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in found.parameters]
            updates = momentum_(
                updates,
                buffers,
                self._momentum(group),
                nesterov=group["nesterov"],
                foreach=foreach,
                reuse=group["curvature"] != "identity",  # whose directions are the gradients themselves
            )
        if trust_region and group["max_relative_update"] is not None and found.num_blocks:
            factors = bound_updates_(updates, found, lr, float(group["max_relative_update"]))
        apply_(found.parameters, updates, lr, self._decay(group, lr), factors, foreach=foreach)

    def _scale_free_step(self, rule: ScaleFreeRule, number: int, group: dict[str, Any]) -> None:
        """Momentum, directions, step of a given size and decay of one group."""
        foreach = self._options.foreach is not False
        lr, momentum = float(group["lr"]), float(group["momentum"])
        gradients: dict[int, Tensor] = {}
        for parameter in group["params"]:
            sparse = parameter.grad is not None and parameter.grad.is_sparse
            name = self._name_of(parameter) if sparse else ""  # for the message alone
            gradient = self._gradient(group, name, parameter, raw=False)
            if gradient is not None:
                gradients[id(parameter)] = gradient
        averages = momenta = gradients
        if momentum > 0.0 and gradients:
            buffers = [self.state[p]["momentum_buffer"] for p in group["params"] if id(p) in gradients]
            given = list(gradients.values())
            averaged = rule.averaged_(given, buffers, momentum, nesterov=group["nesterov"], foreach=foreach)
            averages, momenta = dict(zip(gradients, averaged)), dict(zip(gradients, buffers))
        found = self._directions(number, group, averages=averages)
        if not found.parameters:
            return
        factors = rule.factors(
            found,
            [gradients[id(parameter)] for parameter in found.parameters],
            [momenta[id(parameter)] for parameter in found.parameters],
            [self.state[parameter]["pace"] for parameter in found.parameters],
            StepSettings(lr, momentum, group["max_relative_update"]),
        )
        move_(found, factors, self._decay(group, lr), foreach=foreach)

    def _before_momentum(self, group: dict[str, Any], parameters: list[Tensor], updates: list[Tensor], lr: float) -> list[Tensor]:
        """What a subclass adds to the clipped directions before they enter the momentum."""
        return updates

    def _momentum(self, group: dict[str, Any]) -> float:
        return float(group["momentum"])

    def _decay(self, group: dict[str, Any], lr: float) -> float:
        """Decoupled decay of this step."""
        return lr * float(group["weight_decay"]) if group["decoupled_weight_decay"] else 0.0


def _num_outputs(layout: MatrixLayout) -> int:
    """Output size by which the bound of a step is measured: a parameter without an adapter is laid out as torch does it."""
    if layout.kind != "flat":
        return layout.whole_shape[0]
    return next((size for size in layout.weight_shape if size > 1), 1)
