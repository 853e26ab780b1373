"""Calls of modules with several matrices, which are replayed: :mod:`kfac_opt.layers.parts`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, saved_tensors_hooks
from torch.utils._pytree import tree_flatten

from kfac_opt._capture.due import Due
from kfac_opt._capture.passes import Pass, Replay, Seen
from kfac_opt._capture.proving import Proving
from kfac_opt._capture.random_state import RandomState
from kfac_opt._capture.status import LayerStatuses
from kfac_opt._capture.sums import Sums
from kfac_opt._curvature.block import Call
from kfac_opt._curvature.edges import output_edge
from kfac_opt.layers.parts import Composite, Replayed, find_composite, floating_outputs


class Replays:
    """Writes the calls into the pass: edges under the name of the module, what each part read under the name of the part.

    Args:
        on_call: is told of every output, with the edge in the graph that its gradient passes.
    """

    def __init__(
        self,
        due: Due,
        statuses: LayerStatuses,
        proving: Proving,
        sums: Sums,
        on_call: Callable[[Pass, str, GradientEdge], None],
    ) -> None:
        self.due, self.statuses, self.proving, self.sums, self.on_call = due, statuses, proving, sums, on_call
        self.parts: dict[str, dict[str, str]] = {}  # names of blocks by that of the module and of its part

    def attach(self) -> None:
        """For the blocks that are due now."""
        self.parts = self.due.parts()

    def has(self, name: str) -> bool:
        """Whether this module has several matrices."""
        return name in self.parts

    def drawing(self) -> dict[str, nn.Module]:
        """Modules in front of whose forward :meth:`before` is to be called."""
        modules = self.due.modules()
        return {name: modules[name] for name in self.parts}

    def before(self, current: Pass, name: str, module: nn.Module) -> None:
        """A forward begins: what its dropout draws will have to be drawn again."""
        if _composite(module).draws(module):
            current.random[name] = RandomState.now(next(module.parameters()).device)

    def record(
        self,
        current: Pass,
        name: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        *,
        maskable: bool,
    ) -> None:
        """One call.

        Args:
            maskable: whether a mask may come with the outputs.
        """
        parts = {part: own for part, own in self.parts[name].items() if self.statuses[own].foreign is None}
        if not torch.is_grad_enabled():
            for own in parts.values():
                self.statuses[own].hidden = True
            return
        outputs = floating_outputs(out)
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        wanted = [number for number, part in enumerate(outputs) if part.requires_grad]
        if not parts or not wanted:
            return
        if any(part.is_nested or part.layout != torch.strided for part in (*given, *outputs)):
            for own in parts.values():
                self.proving.refuse(current, own, "tensors")
            return
        for own in parts.values():
            self.statuses[own].ran = True
        if outputs[0].numel() == 0:
            return  # no rows
        drawn = current.random.pop(name, None)
        replayed = _replay(module, args, kwargs, outputs, drawn)
        sure = drawn is None and not any(map(self._to_prove, parts.values()))
        edges, views = zip(*(output_edge(outputs[number], given[0]) for number in wanted))
        agrees = None if sure else replayed.agrees(outputs)
        current.replays.setdefault(name, []).append(Replay(replayed, wanted, list(views), agrees))
        for edge in edges:
            current.edges.setdefault(name, []).append(edge)
            self.on_call(current, name, edge)
        for part, own in parts.items():
            self._keep(current, own, replayed, part, maskable=maskable)

    def _keep(self, current: Pass, name: str, replayed: Replayed, part: str, *, maskable: bool) -> None:
        """What one part read."""
        rows = replayed.rows[part]
        _, batch, shared, _ = rows.inputs.shape
        call = Call(rows.inputs, (batch, shared), keep=rows.keep, laid_out=True)
        current.calls.setdefault(name, []).append(call)
        if self._to_prove(name):
            current.inputs.setdefault(name, []).append(Seen.of(rows.inputs))
        if not maskable and self.due.entries[name].block.sharing == "expand":
            self.sums.take_input(current, name, call)

    def _to_prove(self, name: str) -> bool:
        return self.statuses[name].proof != "proven" and self.proving.possible(name)

    def judge(self, current: Pass) -> None:
        """The pass is over: parts of modules whose replay gave something else leave it; one read of the device."""
        if not current.replays:
            return
        told = [(name, replay.agrees) for name, calls in current.replays.items() for replay in calls]
        asked = [(name, agrees) for name, agrees in told if agrees is not None]
        if asked:
            device = asked[0][1].device
            found = torch.stack([agrees.to(device) for _, agrees in asked]).tolist()
            for name in {name for (name, _), right in zip(asked, found) if not right}:
                for own in self.parts[name].values():
                    self.proving.refuse(current, own, "replay")
                current.forget(name)
                del current.replays[name]
        if current.masked:  # which rows count is read off the gradients
            for own in (own for name in current.replays for own in self.parts[name].values()):
                for call in current.calls.get(own, []):
                    call.keep = None


def hand_to_parts(current: Pass, arrived: dict[str, list[Tensor | None]]) -> None:
    """Puts the output gradients of the parts, one for each call, in the place of those of their modules' outputs.

    Args:
        arrived: gradients of calls by name; those of modules in the order of the edges.
    """
    for name, calls in current.replays.items():
        gradients = iter(arrived.pop(name, []))
        for index, replay in enumerate(calls):
            by_output: list[Tensor | None] = [None] * len(replay.replayed.outputs)
            for number, view, gradient in zip(replay.wanted, replay.views, gradients):
                if gradient is not None:
                    by_output[number] = gradient if view is None else view.take(gradient)
            with torch.enable_grad():
                found = replay.replayed.output_gradients(by_output)
            for own, gradient in found.items():
                part = f"{name}.{own}" if name else own
                if part in current.calls:
                    arrived.setdefault(part, [None] * len(calls))[index] = gradient


def _composite(module: nn.Module) -> Composite:
    composite = find_composite(module)
    assert composite is not None
    return composite


def _replay(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor], drawn: RandomState | None
) -> Replayed:
    """The call once more, in a graph that nobody else sees."""
    with torch.enable_grad(), _own_saving():
        if drawn is None:
            return _composite(module).replay(module, args, kwargs, outputs)
        with drawn.again():
            return _composite(module).replay(module, args, kwargs, outputs)


@contextmanager
def _own_saving() -> Iterator[None]:
    """Hooks of the user on saved tensors do not see the body's."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        yield
        return
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield
