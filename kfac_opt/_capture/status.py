"""What is known of each layer: whether its hook sees it, and whether it is the map that its adapter takes it for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Foreign = Literal["forward", "uses", "tensors", "hidden", "replay"]
"""Why a layer is not the map of its adapter: a forward of its own, other uses of its weight, tensors without rows, calls that
hooks do not see, outputs that a replay does not give."""

Proof = Literal["open", "told", "proven"]
"""That a layer is the map of its adapter: nothing is known, the passes since the last step told so, earlier ones did."""


@dataclass
class LayerStatus:
    """What the passes so far have shown of one layer.

    Attributes:
        ran: its hook saw a call with gradients.
        hidden: since the last step it ran with gradients disabled inside a pass with gradients.
        proof: that it is the map of its adapter.
        foreign: why it is not.
    """

    ran: bool = False
    hidden: bool = False
    proof: Proof = "open"
    foreign: Foreign | None = None


class LayerStatuses(dict[str, LayerStatus]):
    """The status of every layer, by name; of one that nobody asked for before, a new one."""

    def __missing__(self, name: str) -> LayerStatus:
        return self.setdefault(name, LayerStatus())

    @property
    def ran(self) -> set[str]:
        return {name for name, status in self.items() if status.ran}

    @property
    def hidden(self) -> set[str]:
        return {name for name, status in self.items() if status.hidden}

    @property
    def unseen(self) -> set[str]:
        """Layers that ran since the last step, and never where their hooks see them."""
        return {name for name, status in self.items() if status.hidden and not status.ran}

    @property
    def proven(self) -> set[str]:
        return {name for name, status in self.items() if status.proof == "proven"}

    @property
    def foreign(self) -> dict[str, Foreign]:
        return {name: status.foreign for name, status in self.items() if status.foreign is not None}

    def confirm(self) -> None:
        """The passes of a step are over: what they told holds, unless others of them contradict."""
        for status in self.values():
            if status.proof == "told" and status.foreign is None:
                status.proof = "proven"

    def start_step(self) -> None:
        """Forgets what belongs to the passes since the last step."""
        for status in self.values():
            status.hidden = False
            if status.proof == "told":
                status.proof = "open"

    def forget_proofs(self) -> None:
        """Other modules may stand behind the names now."""
        for status in self.values():
            if status.proof == "proven":
                status.proof = "open"
