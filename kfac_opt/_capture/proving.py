"""Which layers still have to be proven, and what becomes of them: the proof itself is in ``proof``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from kfac_opt._capture.due import Due
from kfac_opt._capture.passes import Pass
from kfac_opt._capture.proof import Evidence, verdicts
from kfac_opt._capture.status import Foreign, LayerStatuses
from kfac_opt._capture.sums import Sums


class Proving:
    """Holds what hooks saw of layers against the gradients of their weights, until each layer is proven.

    Args:
        due: the blocks.
        statuses: of the layers, where the verdicts are written down.
        sums: where inputs go that waited for a verdict.
    """

    def __init__(self, due: Due, statuses: LayerStatuses, sums: Sums) -> None:
        self.due, self.statuses, self.sums = due, statuses, sums

    def possible(self, name: str) -> bool:
        """Whether this layer can be proven."""
        entry = self.due.entries[name]
        adapter = entry.block.adapter
        return entry.module is not None and adapter is not None and adapter.provable

    def own_parameters(self, current: Pass) -> dict[str, list[nn.Parameter | None]]:
        """Weight and bias of the layers of this pass whose gradients are to be held against what the hook saw."""
        names = [n for n in current.calls if n in current.inputs and self.due.entries[n].weight.requires_grad]
        return {name: self.due.own_parameters(name) for name in names}

    def note(self, evidence: dict[str, Evidence], current: Pass, name: str, gradients: list[Tensor | None]) -> None:
        """Inputs and output gradients of a layer that has to be proven."""
        if name not in current.inputs:
            return
        adapter = self.due.entries[name].block.adapter
        assert adapter is not None
        seen = evidence[name] = Evidence(adapter)
        for call, x, gradient in zip(current.calls[name], current.inputs.pop(name), gradients):
            if gradient is not None:
                seen.unusable |= not x.unchanged
                seen.add(x.x, call.output_gradient(gradient))

    def judge(self, current: Pass, evidence: dict[str, Evidence], gradients: Mapping[str, list[Tensor | None]]) -> None:
        """Layers that are none of their adapters' maps leave the pass; the others' inputs are taken if they waited."""
        for name, right in verdicts(evidence, gradients).items():
            if not right:
                self.refuse(current, name, "forward" if name in current.held else "uses")
            elif self.statuses[name].proof == "open":
                self.statuses[name].proof = "told"
        for name in current.held & current.calls.keys() & self.due.entries.keys():
            for call in [] if current.masked else current.calls[name]:
                self.sums.take_input(current, name, call)
        current.held.clear()
        current.inputs.clear()

    def refuse(self, current: Pass, name: str, reason: Foreign) -> None:
        """The layer is none of its adapter's maps: its block goes at the next step."""
        self.statuses[name].foreign = reason
        current.forget(name)
