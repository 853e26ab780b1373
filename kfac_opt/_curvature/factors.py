r"""The two factors of a Kronecker block: what passes add to them and how they are averaged."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from kfac_opt._curvature.block import (
    Call,
    CurvatureBlock,
    LateSum,
    State,
    Statistics,
    average_into,
    average_weight,
    track_scale,
)
from kfac_opt._curvature.grouping import by_example
from kfac_opt._curvature.linalg import pack_triangle
from kfac_opt._curvature.sides import Side
from kfac_opt.layers import LayerAdapter, WeightSharing
from kfac_opt.layers.adapter import gram, pooled_rows

SIDES = ("input", "output")
LATE_RATIO = 2  # an input that is so many times smaller than its second moment is kept in its place


class FactorBlock(CurvatureBlock):
    """``A = (1/N) Σ a aᵀ`` (positions summed) and ``G = (1/R) Σ g gᵀ`` (rows averaged).

    A side larger than ``max_block_dim`` keeps diagonal blocks of its factor, one larger than ``max_factor_dim``, or the
    input of an embedding, only its diagonal.
    """

    needs_input = False

    def __init__(
        self,
        adapter: LayerAdapter,
        dtype: torch.dtype,
        sharing: WeightSharing,
        *,
        max_factor_dim: int,
        max_block_dim: int | None = None,
    ) -> None:
        super().__init__(adapter.layout, adapter, dtype, sharing)
        self.layer = adapter
        groups, out_dim, in_dim = self.layout.shape
        self.groups = groups
        self.per_example = self.per_example or sharing == "reduce"
        self.dims = {"input": in_dim, "output": out_dim}
        self.dense_sides = {
            "input": in_dim <= max_factor_dim and not adapter.diagonal_input,
            "output": out_dim <= max_factor_dim,
        }
        units = {"input": adapter.features_per_channel, "output": 1}
        self.sides = {
            side: Side(n, groups, dense=self.dense_sides[side], max_block_dim=max_block_dim, unit=units[side])
            for side, n in self.dims.items()
        }

    # -- collecting ---------------------------------------------------------------------------------------------

    def add_input(self, statistics: Statistics, call: Call) -> None:
        side = self.sides["input"]
        sum_bytes = math.prod(side.sum_shape) * self.dtype.itemsize
        if side.packs_at_once and LATE_RATIO * call.x.nbytes <= sum_bytes:
            # The sums of all layers would wait for the step side by side, beside the activations.
            copy = replace(call, x=call.x.clone())
            statistics.put_off(LateSum(copy, self._input_sum, sum_bytes))
        else:
            statistics.add("input", self._input_sum(call))

    def _input_sum(self, call: Call) -> Tensor:
        """What the input of one call adds, ``sum_shape``."""
        side, layer = self.sides["input"], self.layer
        if self.sharing == "reduce" and call.flat_batch > 1:
            if layer.diagonal_input:  # tokens; their one-hot rows would be large
                keep = None if call.keep is None else by_example(call.keep, call, dim=0)
                return layer.input_square(by_example(call.x.reshape(call.positions), call, dim=0), keep, self.sharing, self.dtype)
            return self._pooled_sum(side, layer.input_rows(call.x.to(self.dtype)), call, "mean")
        how = call.x, call.keep, self.sharing, self.dtype
        rows = layer.input_moment_rows(*how) if side.packs_at_once and not side.blocked else None
        packed = None if rows is None else side.packed_rows(rows, self.dtype, call.x.device)
        if packed is not None:
            return packed
        if not side.dense:
            return layer.input_square(*how)
        moments = layer.input_block_moments(*how, side.ranges) if side.blocked else [layer.input_moment(*how)]
        return side.packed(moments) if side.packs_at_once else moments[0]

    def add_output(self, statistics: Statistics, calls: list[Call], gradients: list[Tensor], state: State | None) -> None:
        side, layer = self.sides["output"], self.layer
        for call, gradient in zip(calls, gradients):
            if self.sharing == "reduce" and call.flat_batch > 1:
                statistics.add("output", self._pooled_sum(side, layer.output_rows(gradient.to(self.dtype)), call, "sum"))
                continue
            how = gradient, None, self.sharing, self.dtype  # rows that do not count are zero
            if not side.dense:
                total = layer.output_square(*how)
            else:
                moments = layer.output_block_moments(*how, side.ranges) if side.blocked else [layer.output_moment(*how)]
                total = side.packed(moments) if side.packs_at_once else moments[0]
            scale = call.group_scale(total.dtype) if self.sharing == "expand" else None  # pooled, groups have as many examples
            if scale is not None:
                total.mul_(scale.reshape(-1, *[1] * (total.dim() - 1)))
            statistics.add("output", total)

    def _pooled_sum(self, side: Side, rows: Tensor, call: Call, pool: Literal["mean", "sum"]) -> Tensor:
        """``sum_shape`` from rows ``[groups, batch, shared, features]`` whose examples are spread over the batch."""
        keep = None if call.keep is None else by_example(call.keep, call, dim=call.keep.dim() - 2)
        pooled = pooled_rows(by_example(rows, call), keep if pool == "mean" else None, pool)
        if not side.dense:
            return pooled.square().sum(-2)
        moments = [gram(pooled[..., start:end].mT) for start, end in side.ranges]
        return side.packed(moments) if side.packs_at_once else moments[0]

    def sum_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: side.sum_shape for name, side in self.sides.items()}

    def update(self, state: State, statistics: Statistics, num_terms: int, decay: float) -> None:
        if not statistics.num_rows or "output" not in statistics.sums:
            return
        statistics.settle()
        for name, count in (("input", num_terms), ("output", statistics.num_rows)):
            total, side = statistics.sums.pop(name), self.sides[name]  # gone before the next layer's is formed
            packed = pack_triangle(total) if side.dense and not side.packs_at_once else total
            average_into(state[f"{name}_factor"], packed, decay, count)
        average_weight(state, decay)
        self._track_scale(state)

    def _track_scale(self, state: State) -> None:
        """τ = (tr A / dim A)(tr G / dim G) √(dim A · dim G), groups averaged, and the largest so far."""
        weight = float(state["weight"])
        means = [side.diagonal(state[f"{name}_factor"]).mean(-1) / weight for name, side in self.sides.items()]
        size = self.dims["input"] * self.dims["output"]
        track_scale(state, (means[0] * means[1]).mean() * size**0.5)

    def factor(self, state: State, side: str) -> Tensor:
        """The averaged factor ``[groups, n, n]``, or its diagonal ``[groups, n]``."""
        blocks = self._factor_blocks(state, side)
        return self.sides[side].whole(blocks) if self.dense_sides[side] else blocks[0]

    def _factor_blocks(self, state: State, name: str) -> list[Tensor]:
        """Diagonal blocks ``[groups, n, n]`` of the averaged factor, or its diagonal alone."""
        factor, side = state[f"{name}_factor"], self.sides[name]
        blocks = side.unpacked(factor) if side.dense else [factor.clone()]
        return [block.div_(float(state["weight"])) for block in blocks]
