"""Which way to multiply with the Fisher matrix: what each costs, what fits into memory, which is fastest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kfac_opt.fisher.blocks import ParameterBlock
from kfac_opt.fisher.source import WORK_SHARE, FisherSource, readable

RouteName = Literal["dense", "gram", "factored", "streamed", "func"]
Blocks = Literal["full", "layer_wise"]

DENSE_LIMIT = 5000
"""Largest matrix that is written out without being asked for."""
EXPECTED_PRODUCTS = 200
"""Products over which the cost of building is spread: one spectral density."""
BYTE_COST = 0.1
"""Nanoseconds to read a byte: 10 GB/s, one CPU thread."""
MAC_COST = 0.04
"""Nanoseconds for a multiply-add in a matrix product: 50 GFlop/s, one CPU thread (the ratio is alike on GPUs)."""
NETWORK_COST = 0.1
"""Nanoseconds for a multiply-add of a small network's layer in a pass: activations and overhead included."""


CALL_COST = 30_000.0
"""Nanoseconds for the handful of calls that multiply with one block; a pass through a layer counts as ten."""


@dataclass(frozen=True)
class Plan:
    """The chosen route.

    Attributes:
        route: its name.
        reason: why, in words with numbers.
        as_rows: names of the blocks whose rows are written out.
        needed: memory of what is kept, in bytes, for every route.
    """

    route: RouteName
    reason: str
    as_rows: frozenset[str]
    needed: dict[RouteName, int]


def make_plan(source: FisherSource, blocks: Blocks, forced: RouteName | None) -> Plan:
    """The route with the least estimated time for about 200 products among those that fit, or the forced one.

    Raises:
        ValueError: the forced route needs more memory than the limit allows.
    """
    costs = _Costs(source, blocks)
    room = source.memory_limit - source.memory_limit // WORK_SHARE
    needed = costs.needed(room)
    if forced is not None:
        if needed[forced] > room:
            smaller = [name for name, size in needed.items() if size <= room]
            raise ValueError(
                f"{source.owner}: route '{forced}' keeps {readable(needed[forced])}, but memory_limit="
                f"{readable(source.memory_limit)} leaves {readable(room)}. Raise memory_limit to at least "
                f"{readable(needed[forced] * WORK_SHARE / (WORK_SHARE - 1))}, or choose one of {smaller}."
            )
        return Plan(forced, "as asked for", costs.as_rows(forced, room), needed)
    times = costs.times(room)
    fitting = {name: times[name] for name in times if needed[name] <= room}
    if costs.largest > DENSE_LIMIT:
        fitting.pop("dense", None)
    best = min(fitting, key=lambda name: fitting[name])
    if "dense" in fitting and fitting["dense"] <= 2.0 * fitting[best]:
        best = "dense"  # eigenvalues and eigenvectors come without building anything further
    others = ", ".join(f"{name} {time / 1e9:.2g} s" for name, time in times.items() if name != best)
    reason = (
        f"estimated {fitting[best] / 1e9:.2g} s for {EXPECTED_PRODUCTS} products, keeps {readable(needed[best])} of "
        f"{readable(room)} ({others})"
    )
    return Plan(best, reason, costs.as_rows(best, room), needed)


class _Costs:
    """Estimated nanoseconds and bytes of every route."""

    def __init__(self, source: FisherSource, blocks: Blocks) -> None:
        self.source, self.layer_wise = source, blocks == "layer_wise"
        self.examples, self.columns = source.num_examples, source.columns
        self.item = source.model.row_dtype.itemsize
        sizes = [block.size for block in source.blocks]
        self.largest = max(sizes) if self.layer_wise else sum(sizes)
        self.entries = sum(size**2 for size in sizes) if self.layer_wise else sum(sizes) ** 2

    # per example and block ------------------------------------------------------------------------------------

    def _row_bytes(self, block: ParameterBlock) -> int:
        return self.columns * block.size * self.item

    def _factor_bytes(self, block: ParameterBlock) -> int:
        shape = self.source.shapes[block.name]
        return shape.groups * shape.shared * (shape.in_dim + self.columns * shape.out_dim) * self.item

    def _row_time(self, block: ParameterBlock) -> float:
        return 2 * self._row_bytes(block) * BYTE_COST

    def _factor_time(self, block: ParameterBlock) -> float:
        shape = self.source.shapes[block.name]
        return 2 * self._factor_bytes(block) * BYTE_COST + 2 * shape.shared * block.size * MAC_COST

    def _pass_time(self, block: ParameterBlock) -> float:
        """One forward of this layer."""
        return max(1, self.source.shapes[block.name].shared) * block.size * NETWORK_COST

    # routes ---------------------------------------------------------------------------------------------------

    def as_rows(self, route: RouteName, room: int) -> frozenset[str]:
        """Blocks to write out as rows: all for ``gram``, where it is faster (or, if room is short, smaller) else."""
        blocks = self.source.blocks
        if route == "gram":
            return frozenset(block.name for block in blocks)
        without = {block.name for block in blocks if block.adapter is None}
        fast = without | {b.name for b in blocks if b.adapter and self._row_time(b) <= self._factor_time(b)}
        if route in ("streamed", "func", "dense") or self._kept(fast) <= room:
            return frozenset(fast)
        return frozenset(without | {b.name for b in blocks if b.adapter and self._row_bytes(b) <= self._factor_bytes(b)})

    def _kept(self, rows: set[str] | frozenset[str]) -> int:
        """Of all examples; the largest block counts twice, for joining its chunks."""
        sizes = [self._row_bytes(b) if b.name in rows else self._factor_bytes(b) for b in self.source.blocks]
        return self.examples * (sum(sizes) + max(sizes))

    def needed(self, room: int) -> dict[RouteName, int]:
        """Bytes that each route keeps."""
        return {
            "dense": 2 * self.entries * self.item,
            "gram": self._kept(self.as_rows("gram", room)),
            "factored": self._kept(self.as_rows("factored", room)),
            "streamed": 0,
            "func": 0,
        }

    def _stored_product(self, rows: frozenset[str]) -> float:
        times = [self._row_time(b) if b.name in rows else self._factor_time(b) for b in self.source.blocks]
        return self.examples * sum(times) + 2 * len(times) * CALL_COST

    def times(self, room: int) -> dict[RouteName, float]:
        """Building and ``EXPECTED_PRODUCTS`` products."""
        blocks = self.source.blocks
        network = self.examples * sum(self._pass_time(b) for b in blocks)
        generic = self.examples * sum(self._pass_time(b) for b in blocks if b.adapter is None)
        sweeps = len(blocks) if self.layer_wise else 1
        calls = -(-self.examples // self.source.capture_chunk) * len(blocks) * 10 * CALL_COST
        capture = (1 + self.columns) * network + 4 * (1 + 2 * self.columns) * generic + calls
        rows = self.examples * self.columns
        squares = sum(b.size**2 for b in blocks) if self.layer_wise else sum(b.size for b in blocks) ** 2
        return {
            "dense": capture + rows * squares * MAC_COST + EXPECTED_PRODUCTS * (self.entries * self.item * BYTE_COST + CALL_COST),
            "gram": capture + EXPECTED_PRODUCTS * self._stored_product(self.as_rows("gram", room)),
            "factored": capture + EXPECTED_PRODUCTS * self._stored_product(self.as_rows("factored", room)),
            "streamed": EXPECTED_PRODUCTS * (capture + self._stored_product(self.as_rows("streamed", room))),
            "func": EXPECTED_PRODUCTS * sweeps * (5 * network + calls),
        }
