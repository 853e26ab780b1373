"""Products with the Fisher matrix, one class per way; all give the same numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import jvp, vjp

from kfac_opt.fisher.frozen import outside_torch_func, pull_back
from kfac_opt.fisher.plan import Blocks, Plan
from kfac_opt.fisher.source import FisherSource
from kfac_opt.fisher.stores import Store

StoreSet = dict[str, Store]


class Route(ABC):
    """``F V`` for ``V [P, q]`` in the row dtype; ``F`` is full or block diagonal."""

    def __init__(self, source: FisherSource, blocks: Blocks) -> None:
        self.source, self.layer_wise = source, blocks == "layer_wise"

    @abstractmethod
    def product(self, vectors: Tensor) -> Tensor:
        """``F V``, ``[P, q]``."""

    @abstractmethod
    def store_sets(self) -> Iterator[StoreSet]:
        """The rows of all examples, chunk by chunk, not yet divided by ``N``."""


class StoreRoute(Route):
    """Rows or factors of all examples, kept in memory (``gram``, ``factored``) or made anew (``streamed``)."""

    def __init__(self, source: FisherSource, blocks: Blocks, plan: Plan) -> None:
        super().__init__(source, blocks)
        self.rows = plan.as_rows
        self.kept = None if plan.route == "streamed" else _joined(list(self._made()), source.work_bytes)

    def _made(self) -> Iterator[StoreSet]:
        return self.source.stores(lambda block: block.name in self.rows)

    def store_sets(self) -> Iterator[StoreSet]:
        return self._made() if self.kept is None else iter(self.kept)

    def product(self, vectors: Tensor) -> Tensor:
        total = torch.zeros_like(vectors)
        slices = {block.name: block.slice for block in self.source.blocks}
        with torch.no_grad():
            for stores in self.store_sets():
                projected = {name: store.project(vectors[slices[name]]) for name, store in stores.items()}
                if not self.layer_wise:
                    joined = _sum(projected.values())
                    projected = {name: joined for name in projected}
                for name, store in stores.items():
                    total[slices[name]] += store.expand(projected[name])
        return total / self.source.num_terms


class DenseRoute(Route):
    """The matrix, or its diagonal blocks, written out."""

    def __init__(self, source: FisherSource, blocks: Blocks, plan: Plan) -> None:
        super().__init__(source, blocks)
        self.rows = plan.as_rows
        self.matrices = dense_blocks(source, self.store_sets(), self.layer_wise)

    def store_sets(self) -> Iterator[StoreSet]:
        return self.source.stores(lambda block: block.name in self.rows)

    def product(self, vectors: Tensor) -> Tensor:
        if not self.layer_wise:
            return self.matrices[""] @ vectors
        return torch.cat([self.matrices[block.name] @ vectors[block.slice] for block in self.source.blocks])


class FuncRoute(Route):
    """Jacobian-vector, output-Hessian and vector-Jacobian products of ``torch.func``; works for any model."""

    def __init__(self, source: FisherSource, blocks: Blocks, plan: Plan) -> None:
        super().__init__(source, blocks)
        self.rows = plan.as_rows

    def store_sets(self) -> Iterator[StoreSet]:
        return self.source.stores(lambda block: block.name in self.rows)

    def product(self, vectors: Tensor) -> Tensor:
        model = self.source.model
        parts = [[block] for block in model.blocks] if self.layer_wise else [list(model.blocks)]
        total = torch.zeros_like(vectors)
        with torch.no_grad():
            for chunk, roots_of in self.source.chunks():
                logits, mask = model.forward(chunk)
                roots = roots_of(logits, mask)
                for blocks in parts:
                    where = slice(blocks[0].start, blocks[-1].start + blocks[-1].size)
                    shapes = [(n, s) for block in blocks for n, s in zip(block.parameters, block.shapes)]
                    values = {name: model.parameters[name].detach() for name, _ in shapes}

                    def outputs(given: dict[str, Tensor], chunk: Any = chunk) -> Tensor:
                        return model.forward(chunk, given)[0]

                    pull = pull_back(outputs, values)
                    for index in range(vectors.shape[1]):
                        tangents = _unflattened(vectors[where, index], shapes, values)
                        moved = _tangent(outputs, values, tangents, pull, logits)
                        gradients = pull(roots.multiply(moved))
                        flat = torch.cat([gradients[name].reshape(-1) for name, _ in shapes])
                        total[where, index] += flat.to(total.dtype)
        return total / self.source.num_terms


def _tangent(
    outputs: Callable[[dict[str, Tensor]], Tensor],
    values: dict[str, Tensor],
    tangents: dict[str, Tensor],
    pull: Callable[[Tensor], dict[str, Tensor]],
    logits: Tensor,
) -> Tensor:
    """``J v``: forward mode, or the transpose of the linear map ``u -> Jᵀ u`` where an operation has no forward mode."""
    try:
        return cast(Tensor, jvp(outputs, (values,), (tangents,))[1])
    except NotImplementedError:
        transposed = vjp(pull, torch.zeros_like(logits))[1]
        return cast(Tensor, transposed(tangents)[0])
    except RuntimeError as error:
        if not outside_torch_func(error):
            raise
        with torch.enable_grad():
            cotangent = torch.zeros_like(logits).requires_grad_()
            gradients = pull(cotangent)
            reached = {name: gradient for name, gradient in gradients.items() if gradient.requires_grad}
            if not reached:
                return cotangent.detach()  # these parameters do not reach the outputs
            return torch.autograd.grad(list(reached.values()), cotangent, [tangents[name] for name in reached])[0]


def make_route(source: FisherSource, blocks: Blocks, plan: Plan) -> Route:
    """The planned route, built."""
    if plan.route == "dense":
        return DenseRoute(source, blocks, plan)
    if plan.route == "func":
        return FuncRoute(source, blocks, plan)
    return StoreRoute(source, blocks, plan)


def dense_blocks(source: FisherSource, store_sets: Iterable[StoreSet], layer_wise: bool) -> dict[str, Tensor]:
    """``F`` as one matrix under the name ``""``, or its diagonal blocks by name."""
    blocks, dtype, device = source.blocks, source.model.row_dtype, source.model.device
    names = {block.name: block.size for block in blocks} if layer_wise else {"": source.model.size}
    matrices = {name: torch.zeros(size, size, dtype=dtype, device=device) for name, size in names.items()}
    limit = max(1, source.work_bytes // 4)
    with torch.no_grad():
        for stores in store_sets:
            if layer_wise:
                for name, store in stores.items():
                    for rows in store.row_slices(limit):
                        matrices[name].addmm_(rows.mT, rows)
                continue
            for rows in joined_rows(list(stores.values()), limit):
                matrices[""].addmm_(rows.mT, rows)
    return {name: matrix.div_(source.num_terms) for name, matrix in matrices.items()}


def joined_rows(stores: list[Store], max_bytes: int) -> Iterator[Tensor]:
    """Rows over all blocks, ``[examples · columns, P]``, a few examples at a time."""
    first = [store.rows(0, 1) for store in stores]
    size = sum(rows.numel() * rows.element_size() for rows in first)
    step = max(1, max_bytes // max(1, size))
    for start in range(0, stores[0].examples, step):
        stop = min(start + step, stores[0].examples)
        yield torch.cat([store.rows(start, stop) for store in stores], dim=1)


def gram_matrices(source: FisherSource, sets: list[StoreSet], layer_wise: bool) -> dict[str, Tensor]:
    """``U Uᵀ / N`` over all rows, ``[rows, rows]``, under the name ``""``, or one per block."""
    names = [block.name for block in source.blocks]
    counts = [next(iter(stores.values())) for stores in sets]
    sizes = [store.examples * store.columns for store in counts]
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    dtype, device = source.model.row_dtype, source.model.device
    matrices = {name: torch.zeros(ends[-1], ends[-1], dtype=dtype, device=device) for name in (names if layer_wise else [""])}
    with torch.no_grad():
        for i, left in enumerate(sets):
            for j in range(i, len(sets)):
                for name in names:
                    tile = left[name].gram(sets[j][name])
                    target = matrices[name if layer_wise else ""]
                    target[ends[i] : ends[i + 1], ends[j] : ends[j + 1]] += tile
                    if i != j:
                        target[ends[j] : ends[j + 1], ends[i] : ends[i + 1]] += tile.mT
    return {name: matrix.div_(source.num_terms) for name, matrix in matrices.items()}


def _joined(sets: list[StoreSet], work_bytes: int) -> list[StoreSet]:
    """Fewer, larger stores: as many examples together as a product's intermediate values allow."""
    example_work = max(store.example_work for store in sets[0].values())
    limit = max(1, work_bytes // max(1, 4 * example_work))
    groups: list[list[StoreSet]] = []
    size = 0
    for stores in sets:
        examples = next(iter(stores.values())).examples
        alike = bool(groups) and all(groups[-1][0][name].fits(store) for name, store in stores.items())
        if not alike or size + examples > limit:
            groups.append([])
            size = 0
        groups[-1].append(stores)
        size += examples
    joined: list[StoreSet] = []
    for group in groups:
        joined.append({})
        for name in group[0]:
            parts = [stores.pop(name) for stores in group[1:]]
            first = group[0][name]
            joined[-1][name] = first.joined(parts) if parts else first
    return joined


def _sum(parts: Iterable[Tensor]) -> Tensor:
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total + part
    assert total is not None
    return total


def _unflattened(vector: Tensor, shapes: list[tuple[str, torch.Size]], like: dict[str, Tensor]) -> dict[str, Tensor]:
    pieces = vector.split([shape.numel() for _, shape in shapes])
    return {name: piece.reshape(shape).to(like[name].dtype) for (name, shape), piece in zip(shapes, pieces)}
