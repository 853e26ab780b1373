r"""EKFAC: Kronecker eigenbases with the second moments of the per-example gradient in them.

George, Laurent, Bouthillier, Ballas & Vincent 2018, arXiv:1806.03884: in the basis of the Kronecker factors the
best diagonal (in Frobenius norm) is :math:`s = E[(Q_G^\top \nabla W\, Q_A)^2]`. Damping adds γ to it; ``split`` adds the cross
terms of the factored damping too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kfac_opt._curvature.block import Call, Damping, State, Statistics, average_into, average_weight
from kfac_opt._curvature.grouping import by_example, join_calls
from kfac_opt._curvature.kronecker import KroneckerBlock, Refreshed
from kfac_opt._curvature.spectral import SpectralForm
from kfac_opt.layers import LayerAdapter, WeightSharing
from kfac_opt.layers.embedding import EmbeddingAdapter

CHUNK_ENTRIES = 2**24  # of per-example gradients held at a time: 64 MB in single precision


class EigenbasisBlock(KroneckerBlock):
    """Kronecker eigenbases; eigenvalues are averaged per-example second moments that follow the data."""

    needs_input = True
    per_example = True

    def __init__(
        self,
        adapter: LayerAdapter,
        dtype: torch.dtype,
        sharing: WeightSharing,
        *,
        max_factor_dim: int,
        max_block_dim: int | None = None,
        split: bool = False,
    ) -> None:
        super().__init__(
            adapter,
            dtype,
            sharing,
            style="split" if split else "exact",
            max_factor_dim=max_factor_dim,
            max_block_dim=max_block_dim,
        )

    def add_output(self, statistics: Statistics, calls: list[Call], gradients: list[Tensor], state: State | None) -> None:
        super().add_output(statistics, calls, gradients, state)
        if state is None:
            statistics.examples.append((calls, gradients, 1.0))
        else:
            statistics.add("squares", self.example_squares(state, calls, gradients))

    def example_squares(self, state: State, calls: list[Call], gradients: list[Tensor]) -> Tensor:
        """Sum over examples of the squared per-example gradient in the basis in force, ``[groups, out, in]``."""
        outputs = []
        for call, gradient in zip(calls, gradients):
            rows = by_example(self.layer.output_rows(gradient.to(self.dtype)), call)
            dense = self.dense_sides["output"]
            outputs.append(self.sides["output"].times_basis(rows, state["output_basis"]) if dense else rows)
        joined = join_calls(outputs, examples=1, positions=2)  # the calls of one example belong to one gradient
        if isinstance(self.layer, EmbeddingAdapter):
            tokens = [by_example(self.layer.tokens(call.x), call, dim=0) for call in calls]
            return self.layer.example_squares(join_calls(tokens, examples=0, positions=1), joined[0])
        inputs = [by_example(self.layer.input_rows(call.x.to(self.dtype)), call) for call in calls]
        turn = self._turn_input(state) if self.dense_sides["input"] else None
        return _row_squares(join_calls(inputs, examples=1, positions=2), joined, turn)

    def _turn_input(self, state: State) -> Callable[[Tensor], Tensor]:
        return lambda rows: self.sides["input"].times_basis(rows, state["input_basis"])

    def sum_shapes(self) -> dict[str, tuple[int, ...]]:
        return {**super().sum_shapes(), "squares": self.layout.shape}

    def init_state(self, device: torch.device) -> State:
        state = super().init_state(device)
        state["scales"] = torch.zeros(self.layout.shape, dtype=self.dtype, device=device)
        state["scales_weight"] = torch.zeros((), dtype=torch.float64)
        return state

    def _install(self, state: State, new: Refreshed) -> None:
        """The old scales go along into the new basis: ``ŝ ← (R_G∘R_G) ŝ (R_A∘R_A)ᵀ``, ``R = Q_newᵀ Q_old``."""
        if self.ready(state):
            scales = state["scales"].clone()
            for name, side in self.sides.items():
                if f"{name}_basis" not in new:
                    continue
                pairs = zip(*(side.basis_blocks(basis) for basis in (new[f"{name}_basis"][0], state[f"{name}_basis"])))
                turns = [(after.mT @ before).square() for after, before in pairs]
                for (start, end), turn in zip(side.ranges, turns):
                    if name == "output":
                        scales[:, start:end] = turn @ scales[:, start:end]
                    else:
                        scales[..., start:end] = scales[..., start:end] @ turn.mT
            new = {**new, "scales": [scales]}
        super()._install(state, new)

    def resolve_examples(self, state: State, statistics: Statistics) -> None:
        """Turns examples that waited for the basis into sums."""
        for calls, gradients, factor in statistics.examples:
            statistics.add("squares", self.example_squares(state, calls, gradients).mul_(factor * factor))
        statistics.examples = []

    def update_after_refresh(self, state: State, statistics: Statistics, num_terms: int, decay: float) -> None:
        if "squares" not in statistics.sums or not self.ready(state):
            return
        average_into(state["scales"], statistics.sums["squares"] / num_terms, decay)
        average_weight(state, decay, "scales_weight")

    def scales(self, state: State) -> Tensor:
        """Averaged second moments ``[groups, out_dim, in_dim]`` in the basis of the last refresh."""
        return state["scales"] / max(float(state["scales_weight"]), torch.finfo(torch.float64).tiny)

    def refreshed_tensors(self, state: State) -> list[Tensor]:
        return [*super().refreshed_tensors(state), state["scales"]]

    def denominators(self, state: State, damping: Damping) -> Tensor:
        return self._damped(self.scales(state), self.gamma(state, damping))

    def spectral_form(self, state: State, *, current: bool = True) -> SpectralForm:
        return self._form(state, self.scales(state))


def _row_squares(a: Tensor, g: Tensor, turn: Callable[[Tensor], Tensor] | None) -> Tensor:
    """``Σ_n ((Σ_t g_nt a_ntᵀ) Q_A)²`` for rows ``[groups, batch, shared, ·]``, chunked over examples; ``turn``: times Q_A."""
    groups, batch, shared, in_dim = a.shape
    out_dim = g.shape[-1]
    if shared == 1:
        a = a if turn is None else turn(a)
        return g.squeeze(2).square().mT @ a.squeeze(2).square()
    rotate_first = shared < out_dim
    if rotate_first and turn is not None:
        a = turn(a)
    total = a.new_zeros(groups, out_dim, in_dim)
    step = max(1, CHUNK_ENTRIES // max(groups * out_dim * in_dim, 1))
    for start in range(0, batch, step):
        gradient = g[:, start : start + step].mT @ a[:, start : start + step]
        if not rotate_first and turn is not None:
            gradient = turn(gradient)
        total += gradient.square().sum(1)
    return total
