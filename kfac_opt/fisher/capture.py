"""Rows of the Fisher matrix from passes through the network: by layer where it is a linear map, else by example."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_flatten, tree_unflatten

from kfac_opt._capture.calls import recorded
from kfac_opt._curvature.edges import ViewOfBase, output_edge
from kfac_opt.fisher.blocks import ParameterBlock
from kfac_opt.fisher.data import Batch
from kfac_opt.fisher.frozen import FrozenModel, Parameters, pull_back
from kfac_opt.fisher.stores import FactorStore, RowStore, Store
from kfac_opt.layers import LayerAdapter

Columns = Callable[[Tensor, Tensor | None], Sequence[Tensor]]
"""From logits and mask to the output gradients whose pull-backs are the rows."""


@dataclass(frozen=True)
class RowCall:
    """Input of one call of a layer (its rows already for a normalization: they depend on buffers), and its output."""

    adapter: LayerAdapter
    inputs: Tensor
    edge: GradientEdge
    view: ViewOfBase | None

    @staticmethod
    def of(adapter: LayerAdapter, x: Tensor, out: Tensor) -> RowCall | None:
        """None for a call that no gradient comes to."""
        if not out.requires_grad:
            return None
        inputs = adapter.input_rows(x.detach()) if adapter.structure == "norm" else x.detach()
        return RowCall(adapter, inputs, *output_edge(out, x))

    def rows(self) -> Tensor:
        """``[groups, batch, shared, in_dim]``."""
        return self.inputs if self.adapter.structure == "norm" else self.adapter.input_rows(self.inputs)

    def output_gradient(self, arrived: Tensor | None) -> Tensor | None:
        """From what came at the edge."""
        return arrived if arrived is None or self.view is None else self.view.take(arrived)


@dataclass(frozen=True)
class RecordedPass:
    """Outputs of a forward with its graph, and the calls of layers in it."""

    logits: Tensor
    mask: Tensor | None
    calls: dict[str, list[RowCall]]

    @staticmethod
    def of(model: FrozenModel, blocks: Sequence[ParameterBlock], batch: Batch) -> RecordedPass:
        """``blocks``: those with an adapter."""
        adapters = {block.name: block.adapter for block in blocks if block.adapter is not None}
        layers = {name: model.module.get_submodule(name) for name in adapters}
        with torch.enable_grad(), recorded(layers, lambda name, x, out: RowCall.of(adapters[name], x, out)) as calls:
            logits, mask = model.forward(batch)
        return RecordedPass(logits, mask, calls)


class RowCapture:
    """Makes stores for batches.

    Args:
        model: the frozen model.
        blocks: which blocks; a block's ``adapter`` is trusted (see :func:`kfac_opt.fisher.audit.audited_blocks`).
        work_bytes: memory for intermediate values.
    """

    def __init__(self, model: FrozenModel, blocks: tuple[ParameterBlock, ...], work_bytes: int) -> None:
        self.model, self.blocks, self.work_bytes = model, blocks, work_bytes

    def stores(
        self, batch: Batch, columns: Columns, as_rows: Callable[[ParameterBlock], bool], at_once: int | None = None
    ) -> Iterator[dict[str, Store]]:
        """One store per block, for ``at_once`` (default: all) columns in turn.

        ``as_rows`` says which blocks with an adapter are written out as rows.
        """
        linear = [block for block in self.blocks if block.adapter is not None]
        other = [block for block in self.blocks if block.adapter is None]
        seen = RecordedPass.of(self.model, linear, batch)
        roots = columns(seen.logits.detach(), seen.mask)
        step = len(roots) if at_once is None else at_once
        for start in range(0, len(roots), step):
            some = roots[start : start + step]
            found: dict[str, Store] = {}
            for block, store in zip(linear, self._linear(linear, seen, batch, some)):
                found[block.name] = RowStore(_rows_of(store)) if as_rows(block) else store
            if other:
                found.update(_example_rows(self.model, other, batch, some))
            yield {block.name: found[block.name] for block in self.blocks}

    def _linear(
        self, blocks: list[ParameterBlock], seen: RecordedPass, batch: Batch, roots: Sequence[Tensor]
    ) -> Iterator[FactorStore]:
        owners = [(block.name, call) for block in blocks for call in seen.calls[block.name]]
        arrived: dict[str, list[list[Tensor | None]]] = {block.name: [] for block in blocks}
        graph = self.model.graph(seen.logits, [call.edge for _, call in owners])
        for root in roots:
            for name in arrived:
                arrived[name].append([])
            for (name, call), gradient in zip(owners, graph.gradients(root)):
                arrived[name][-1].append(call.output_gradient(gradient))
        with torch.no_grad():
            for block in blocks:
                yield self._store(block, seen.calls[block.name], arrived.pop(block.name), batch.size)

    def _store(
        self, block: ParameterBlock, calls: list[RowCall], columns: list[list[Tensor | None]], examples: int
    ) -> FactorStore:
        """Joins all calls of a layer along the positions."""
        adapter = block.adapter
        assert adapter is not None
        dtype = self.model.row_dtype
        groups, out_dim, in_dim = adapter.layout.shape
        inputs: list[Tensor] = []
        gradients: list[Tensor] = []
        for index, call in enumerate(calls):
            found = [column[index] for column in columns]
            if any(gradient is None for gradient in found):
                continue  # this call does not reach the outputs
            rows = [adapter.output_rows(gradient.to(dtype)) for gradient in found if gradient is not None]
            inputs.append(call.rows().to(dtype))
            gradients.append(torch.stack(rows, dim=2))
        if not inputs:
            inputs = [torch.zeros(groups, examples, 0, in_dim, dtype=dtype, device=self.model.device)]
            gradients = [torch.zeros(groups, examples, len(columns), 0, out_dim, dtype=dtype, device=self.model.device)]
        a = inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=2)
        g = gradients[0] if len(gradients) == 1 else torch.cat(gradients, dim=3)
        return FactorStore(block, a.contiguous(), g.contiguous(), self.work_bytes)


def _rows_of(store: Store) -> Tensor:
    return store.rows().reshape(store.examples, store.columns, -1)


def _example_rows(model: FrozenModel, blocks: list[ParameterBlock], batch: Batch, roots: Sequence[Tensor]) -> dict[str, Store]:
    """Rows by one vector-Jacobian product per example and column, vectorised where the model's code allows it."""
    names = [name for block in blocks for name in block.parameters]
    with torch.no_grad():
        try:
            rows = _vectorised_rows(model, names, batch, torch.stack(list(roots), dim=1))
        except (RuntimeError, NotImplementedError):
            # vmap refuses control flow on values and some in-place operations; the plain loop gives the same rows.
            rows = _looped_rows(model, names, batch, roots)
        return {
            block.name: RowStore(torch.cat([rows[name].flatten(2) for name in block.parameters], dim=2).to(model.row_dtype))
            for block in blocks
        }


def _vectorised_rows(model: FrozenModel, names: list[str], batch: Batch, columns: Tensor) -> dict[str, Tensor]:
    """``[examples, columns, *shape]`` per parameter; ``columns [examples, columns, ...]``."""
    values = {name: model.parameters[name].detach() for name in names}
    leaves, structure = tree_flatten(batch.inputs)
    batched = [
        index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch.size
    ]

    def one(own_columns: Tensor, *own_leaves: Tensor) -> dict[str, Tensor]:
        single = list(leaves)
        for index, leaf in zip(batched, own_leaves):
            single[index] = leaf.unsqueeze(0)
        example = Batch(tree_unflatten(single, structure), None, 1)
        pull = pull_back(_logits_of(model, example), values)
        return torch.vmap(lambda column: pull(column.unsqueeze(0)))(own_columns)

    return torch.vmap(one)(columns, *[leaves[index] for index in batched])


def _logits_of(model: FrozenModel, batch: Batch) -> Callable[[Parameters], Tensor]:
    return lambda parameters: model.forward(batch, parameters)[0]


def _looped_rows(model: FrozenModel, names: list[str], batch: Batch, roots: Sequence[Tensor]) -> dict[str, Tensor]:
    values = {name: model.parameters[name].detach() for name in names}
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for index in range(batch.size):
        example = batch.slice(index, index + 1)
        pull = pull_back(_logits_of(model, example), values)
        pulled = [pull(root[index : index + 1]) for root in roots]
        for name in names:
            found[name].append(torch.stack([column[name] for column in pulled]))
    return {name: torch.stack(parts) for name, parts in found.items()}
