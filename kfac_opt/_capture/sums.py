"""From inputs and output gradients of layers to the sums that their blocks ask for."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_opt._capture.due import Due, Tracked, module_name
from kfac_opt._capture.passes import Pass
from kfac_opt._capture.rounding import Rounding
from kfac_opt._curvature.block import Call, Statistics
from kfac_opt._curvature.precision import full_precision


class Sums:
    """Adds to the statistics of a pass.

    Args:
        due: the blocks.
        rounding: which gradients are nothing but rounding and count as zeros.
    """

    def __init__(self, due: Due, rounding: Rounding) -> None:
        self.due, self.rounding = due, rounding

    def take_input(self, current: Pass, name: str, call: Call) -> None:
        """What the input of one call contributes, now."""
        block = self.due.entries[name].block
        statistics = current.statistics.setdefault(name, Statistics())
        call.taken = True
        with torch.no_grad(), full_precision(call.x.device):
            block.add_input(statistics, call)
        statistics.num_rows += call.num_examples() if block.sharing == "reduce" else call.num_rows()
        if not block.needs_input:
            call.x = call.x.new_empty(0)

    def take_inputs(self, current: Pass) -> None:
        """Those that had to wait for the mask, and with one for the rows that gradients reach."""
        for name in [name for name in current.calls if name in self.due.entries and name not in current.held]:
            for call in current.calls[name]:
                if not call.taken and not (current.masked and call.keep is None):  # no gradient came to that call at all
                    self.take_input(current, name, call)

    def add_output(self, current: Pass, name: str, gradients: list[Tensor | None]) -> None:
        """One column of output gradients of a layer, one for each of its calls."""
        arrivals = zip(current.calls[name], gradients)
        pairs = [(call, call.output_gradient(g.detach())) for call, g in arrivals if g is not None]
        if not pairs:
            return
        calls, arrived = [call for call, _ in pairs], self._without_rounding(name, [g for _, g in pairs])
        block = self.due.entries[name].block
        if current.masked and block.adapter is not None:
            for call, gradient in pairs:
                call.reach(block.adapter.output_rows(gradient))
        block.add_output(current.statistics.setdefault(name, Statistics()), calls, arrived, self.due.states.get(name))

    def add_parameter(self, current: Pass, entry: Tracked, gradient: Tensor) -> None:
        """The gradient of a parameter outside layers."""
        statistics = current.statistics.setdefault(entry.name, Statistics())
        entry.block.add_output(statistics, [], self._without_rounding(entry.name, [gradient]), None)

    def _without_rounding(self, name: str, gradients: list[Tensor]) -> list[Tensor]:
        noise = self.rounding.noise
        if noise and (name in noise or module_name(self.due.entries[name]) in noise):
            return [torch.zeros_like(gradient) for gradient in gradients]
        return gradients
