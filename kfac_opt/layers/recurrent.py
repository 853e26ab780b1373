"""Recurrent layers and cells as linear maps of the inputs and of the states, step by step.

Parts: ``ih_l0``, ``hh_l0``, ``hr_l0`` (of ``proj_size``), with ``_reverse`` for the second direction; ``ih``, ``hh`` of cells.
Rows are steps, as in a linear layer that is called at each of them (Martens, Ba & Johnson 2018 take them for independent).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from kfac_opt.layers.parts import Composite, Part, PartRows, Replayed, plain_linear, register_composite

State = tuple[Tensor, ...]  # hidden, and cell state of an LSTM


@register_composite(nn.RNN, nn.LSTM, nn.GRU)
class RecurrentParts(Composite):
    """Any number of layers, both directions, packed sequences, ``proj_size``."""

    def parts(self, module: nn.Module) -> list[Part]:
        assert isinstance(module, nn.RNNBase)
        return _own_parts(module, [suffix for suffix, _ in _directions(module)])

    def draws(self, module: nn.Module) -> bool:
        assert isinstance(module, nn.RNNBase)
        return module.training and module.dropout > 0.0 and module.num_layers > 1

    def replay(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Sequence[Tensor]) -> Replayed:
        assert isinstance(module, nn.RNNBase)
        return _replay(module, *args, **kwargs)


@register_composite(nn.RNNCell, nn.LSTMCell, nn.GRUCell)
class CellParts(Composite):
    """One step."""

    def parts(self, module: nn.Module) -> list[Part]:
        return _own_parts(module, [""])

    def replay(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Sequence[Tensor]) -> Replayed:
        assert isinstance(module, nn.RNNCellBase)
        fused = len({id(out.grad_fn) for out in outputs}) == 1
        return _replay_cell(module, *args, **kwargs, fused=fused)


def _own_parts(module: nn.Module, suffixes: Sequence[str]) -> list[Part]:
    """All matrices, or none if one is no parameter of the module (a parametrization computes it)."""
    own, found = module._parameters, []
    matrices = ("ih", "hh", "hr") if getattr(module, "proj_size", 0) else ("ih", "hh")
    for suffix in suffixes:
        for name in matrices:
            weight = own.get(f"weight_{name}{suffix}")
            if weight is None:
                return []
            found.append(Part(f"{name}{suffix}", weight, own.get(f"bias_{name}{suffix}")))
    return found


def _directions(module: nn.RNNBase) -> list[tuple[str, bool]]:
    """Suffix of the parameters' names and whether time runs backwards, in the order of the states."""
    turns = (False, True) if module.bidirectional else (False,)
    return [(f"_l{layer}{'_reverse' * turn}", turn) for layer in range(module.num_layers) for turn in turns]


def _times(module: nn.Module, part: str, x: Tensor) -> Tensor:
    """What this matrix makes of ``x``."""
    return plain_linear(x, getattr(module, f"weight_{part}"), getattr(module, f"bias_{part}", None))


# -- a step ---------------------------------------------------------------------------------------------------------


def _step(module: nn.Module) -> Callable[[Tensor, Tensor, State], State]:
    """New state from what input and state give to the gates, ``[batch, gates · hidden]``, and the state."""
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        return _lstm_step
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        return _gru_step
    activation = torch.relu if module.nonlinearity == "relu" else torch.tanh
    return lambda of_input, of_state, _: (activation(of_input + of_state),)


def _lstm_step(of_input: Tensor, of_state: Tensor, state: State) -> State:
    """Hochreiter & Schmidhuber 1997."""
    gate_in, gate_forget, candidate, gate_out = (of_input + of_state).chunk(4, dim=-1)
    cell = gate_forget.sigmoid() * state[1] + gate_in.sigmoid() * candidate.tanh()
    return gate_out.sigmoid() * cell.tanh(), cell


def _gru_step(of_input: Tensor, of_state: Tensor, state: State) -> State:
    """Cho et al. 2014, arXiv:1406.1078, with the reset behind the matrix of the state."""
    reset_in, update_in, new_in = of_input.chunk(3, dim=-1)
    reset_state, update_state, new_state = of_state.chunk(3, dim=-1)
    new = (new_in + (reset_in + reset_state).sigmoid() * new_state).tanh()
    return ((update_in + update_state).sigmoid() * (state[0] - new) + new,)


def _replay_cell(module: nn.RNNCellBase, input: Tensor, hx: Any = None, *, fused: bool) -> Replayed:
    """``fused``: all outputs are those of one kernel; else the hidden state of an LSTM is computed from its cell state."""
    batched = input.dim() == 2
    x = input.detach() if batched else input.detach().unsqueeze(0)
    width = 2 if isinstance(module, nn.LSTMCell) else 1
    if hx is None:
        state: State = (x.new_zeros(x.shape[0], module.hidden_size),) * width
    else:
        given = hx if isinstance(hx, (tuple, list)) else (hx,)
        state = tuple(part.detach() if batched else part.detach().unsqueeze(0) for part in given)
    of_input, of_state = (_times(module, part, given).requires_grad_() for part, given in (("ih", x), ("hh", state[0])))
    after = _step(module)(of_input, of_state, state)
    if isinstance(module, nn.LSTMCell) and not fused:
        gate_out = (of_input + of_state).chunk(4, dim=-1)[3]
        after = gate_out.sigmoid() * after[1].detach().tanh(), after[1]

    def lay(found: Sequence[Tensor]) -> Tensor:
        return found[0].unsqueeze(0).unsqueeze(2)

    rows = {
        "ih": PartRows(x.unsqueeze(0).unsqueeze(2), (of_input,), lay),
        "hh": PartRows(state[0].unsqueeze(0).unsqueeze(2), (of_state,), lay),
    }
    return Replayed([part if batched else part.squeeze(0) for part in after], rows)


# -- a sequence -----------------------------------------------------------------------------------------------------


@dataclass
class _Sequence:
    """Inputs time first, ``[time, batch, features]``, and how the module's tensors come from and go back to that.

    Attributes:
        active: bool ``[time, batch]``, steps that there are; None for all. Packed sequences are in order of their length.
        order: puts sequences where the user has them.
    """

    x: Tensor
    batch_first: bool
    batched: bool = True
    active: Tensor | None = None
    order: Tensor | None = None
    rows: dict[str, PartRows] = field(default_factory=dict)

    def lay(self, by_time: Tensor) -> Tensor:
        """``[1, batch, time, features]``."""
        return self._ordered(by_time.transpose(0, 1)).unsqueeze(0)

    def keep(self) -> Tensor | None:
        return None if self.active is None else self._ordered(self.active.mT)

    def _ordered(self, x: Tensor) -> Tensor:
        return x if self.order is None else x.index_select(0, self.order)

    def add(self, name: str, inputs: Tensor, source: Tensor) -> None:
        """Rows of one matrix: what it read and where its output gradients come, both time first."""
        self.rows[name] = PartRows(self.lay(inputs.detach()), (source,), lambda found: self.lay(found[0]), self.keep())

    def output(self, by_time: Tensor) -> Tensor:
        """As the module returns it; the data of a packed sequence."""
        if self.active is not None:
            return by_time[self.active]
        if not self.batched:
            return by_time.squeeze(1)
        return by_time.transpose(0, 1) if self.batch_first else by_time

    def state(self, parts: list[Tensor]) -> Tensor:
        """``[layers · directions, batch, features]`` of last states."""
        state = torch.stack(parts)
        if self.order is not None:
            state = state.index_select(1, self.order)
        return state if self.batched else state.squeeze(1)

    def dropped(self, by_time: Tensor, p: float) -> Tensor:
        """With dropout, drawn as the module draws it: for a packed sequence on its data."""
        if self.active is None:
            return F.dropout(by_time, p)
        data = F.dropout(by_time[self.active], p)
        return torch.zeros_like(by_time).masked_scatter(self.active.unsqueeze(-1), data)


def _read(module: nn.RNNBase, input: Tensor | PackedSequence) -> tuple[_Sequence, Tensor | None]:
    """The sequences, and the order in which their states are used."""
    if isinstance(input, PackedSequence):
        data = input.data.detach()
        x, _ = pad_packed_sequence(PackedSequence(data, input.batch_sizes))
        sizes = input.batch_sizes.to(data.device)
        active = torch.arange(x.shape[1], device=data.device) < sizes.unsqueeze(1)
        return _Sequence(x, module.batch_first, active=active, order=input.unsorted_indices), input.sorted_indices
    x, batched = input.detach(), input.dim() == 3
    if not batched:
        x = x.unsqueeze(1)
    elif module.batch_first:
        x = x.transpose(0, 1)
    return _Sequence(x, module.batch_first, batched), None


def _first_states(module: nn.RNNBase, sequence: _Sequence, order: Tensor | None, given: Any) -> list[State]:
    """One for each layer and direction."""
    number = module.num_layers * (2 if module.bidirectional else 1)
    if given is None:
        batch = sequence.x.shape[1]
        sizes = [module.proj_size or module.hidden_size, *[module.hidden_size] * isinstance(module, nn.LSTM)]
        return [tuple(sequence.x.new_zeros(batch, size) for size in sizes)] * number
    parts = [part.detach() for part in (given if isinstance(given, (tuple, list)) else (given,))]
    parts = [part if part.dim() == 3 else part.unsqueeze(1) for part in parts]
    if order is not None:
        parts = [part.index_select(1, order) for part in parts]
    return list(zip(*(part.unbind(0) for part in parts)))


def _replay(module: nn.RNNBase, input: Tensor | PackedSequence, hx: Any = None) -> Replayed:
    sequence, order = _read(module, input)
    states = _first_states(module, sequence, order, hx)
    directions, x = _directions(module), sequence.x
    width, last = (2 if module.bidirectional else 1), []
    for layer in range(module.num_layers):
        found = []
        for number in range(layer * width, (layer + 1) * width):
            out, after = _run(module, sequence, x, states[number], *directions[number])
            found.append(out)
            last.append(after)
        x = torch.cat(found, dim=-1) if width > 1 else found[0]
        if module.dropout > 0.0 and module.training and layer < module.num_layers - 1:
            x = sequence.dropped(x, module.dropout)
    outputs = [sequence.output(x), *(sequence.state(list(parts)) for parts in zip(*last))]
    return Replayed(outputs, sequence.rows)


def _run(module: nn.RNNBase, sequence: _Sequence, x: Tensor, state: State, suffix: str, backwards: bool) -> tuple[Tensor, State]:
    """One layer in one direction: its outputs ``[time, batch, features]`` and last state; notes the rows of its matrices."""
    step, active, projects = _step(module), sequence.active, module.proj_size > 0
    of_input = _times(module, f"ih{suffix}", x)
    if not of_input.requires_grad:
        of_input.requires_grad_()
    # Added to what the state gives, zeros whose gradients are those of all steps in one tensor.
    of_state = torch.zeros_like(of_input).requires_grad_()
    of_projection = x.new_zeros(*x.shape[:2], module.proj_size).requires_grad_()
    by_step = list(zip(of_input.unbind(0), of_state.unbind(0), of_projection.unbind(0)))
    before, unprojected, outputs = [], [], []
    for time in reversed(range(len(by_step))) if backwards else range(len(by_step)):
        to_gates, zeros, to_projection = by_step[time]
        before.append(state[0].detach())
        after = step(to_gates, _times(module, f"hh{suffix}", state[0]) + zeros, state)
        if projects:
            unprojected.append(after[0].detach())
            after = (_times(module, f"hr{suffix}", after[0]) + to_projection, *after[1:])
        if active is not None:
            there = active[time].unsqueeze(-1)
            after = tuple(torch.where(there, new, old) for new, old in zip(after, state))
        outputs.append(after[0])
        state = after

    def in_time(steps: list[Tensor]) -> Tensor:
        return torch.stack(steps[::-1] if backwards else steps)

    sequence.add(f"ih{suffix}", x, of_input)
    sequence.add(f"hh{suffix}", in_time(before), of_state)
    if projects:
        sequence.add(f"hr{suffix}", in_time(unprojected), of_projection)
    return in_time(outputs), state
