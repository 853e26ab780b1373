"""Rows of the Fisher matrix from passes through the network: by layer where it is a linear map, else by example."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_flatten, tree_unflatten

from kfac_opt._capture.backward import OutputGraph
from kfac_opt._capture.repeatable import RepeatableGraph
from kfac_opt._curvature.edges import ViewOfBase, output_edge
from kfac_opt.fisher.data import Batch
from kfac_opt.fisher.frozen import FrozenModel, ParameterBlock, Parameters, pull_back
from kfac_opt.fisher.stores import FactorStore, RowStore, Store
from kfac_opt.layers import LayerAdapter

Columns = Callable[[Tensor, Tensor | None], Sequence[Tensor]]
"""From logits and mask to the output gradients whose pull-backs are the rows."""


@dataclass(frozen=True)
class BlockShape:
    """Sizes of one block seen as a linear map; ``shared`` is 0 for a block without an adapter."""

    groups: int
    shared: int
    in_dim: int
    out_dim: int


@dataclass
class _Call:
    """Input of one call of a layer (its rows already for a normalization: they depend on buffers), and its output."""

    inputs: Tensor
    edge: GradientEdge
    view: ViewOfBase | None
    is_rows: bool

    def rows(self, adapter: LayerAdapter) -> Tensor:
        """``[groups, batch, shared, in_dim]``."""
        return self.inputs if self.is_rows else adapter.input_rows(self.inputs)


class RowCapture:
    """Makes stores for batches.

    Args:
        model: the frozen model.
        blocks: which blocks; a block's ``adapter`` is trusted (see :func:`audited_blocks`).
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
        with torch.enable_grad(), _recorded(self.model, linear) as calls:
            logits, mask = self.model.forward(batch)
        roots = columns(logits.detach(), mask)
        step = len(roots) if at_once is None else at_once
        for start in range(0, len(roots), step):
            some = roots[start : start + step]
            found: dict[str, Store] = {}
            for block, store in zip(linear, self._linear(linear, calls, batch, logits, some)):
                found[block.name] = RowStore(_rows_of(store)) if as_rows(block) else store
            if other:
                found.update(_example_rows(self.model, other, batch, some))
            yield {block.name: found[block.name] for block in self.blocks}

    def _linear(
        self,
        blocks: list[ParameterBlock],
        calls: dict[str, list[_Call]],
        batch: Batch,
        logits: Tensor,
        roots: Sequence[Tensor],
    ) -> Iterator[FactorStore]:
        owners = [(block.name, call) for block in blocks for call in calls[block.name]]
        edges = [call.edge for _, call in owners]
        arrived: dict[str, list[list[Tensor | None]]] = {block.name: [] for block in blocks}
        graph = RepeatableGraph(self.model.module, OutputGraph(logits, edges), self.model.owner)
        for root in roots:
            gradients: list[Tensor | None] = [None] * len(edges)
            with graph.untouched():
                graph.pull(root, gradients.__setitem__)
            for name in arrived:
                arrived[name].append([])
            for (name, call), gradient in zip(owners, gradients):
                arrived[name][-1].append(gradient if gradient is None or call.view is None else call.view.take(gradient))
        with torch.no_grad():
            for block in blocks:
                yield self._store(block, calls[block.name], arrived.pop(block.name), batch.size)

    def _store(self, block: ParameterBlock, calls: list[_Call], columns: list[list[Tensor | None]], examples: int) -> FactorStore:
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
            inputs.append(call.rows(adapter).to(dtype))
            gradients.append(torch.stack(rows, dim=2))
        if not inputs:
            inputs = [torch.zeros(groups, examples, 0, in_dim, dtype=dtype, device=self.model.device)]
            gradients = [torch.zeros(groups, examples, len(columns), 0, out_dim, dtype=dtype, device=self.model.device)]
        a = inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=2)
        g = gradients[0] if len(gradients) == 1 else torch.cat(gradients, dim=3)
        return FactorStore(block, a.contiguous(), g.contiguous(), self.work_bytes)


def _rows_of(store: Store) -> Tensor:
    return store.rows().reshape(store.examples, store.columns, -1)


@contextmanager
def _recorded(model: FrozenModel, blocks: list[ParameterBlock]) -> Iterator[dict[str, list[_Call]]]:
    """Inputs and gradient edges of all calls of the blocks' layers during the body."""
    calls: dict[str, list[_Call]] = {block.name: [] for block in blocks}

    def hook_of(block: ParameterBlock) -> Callable[..., None]:
        adapter = block.adapter
        assert adapter is not None

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(x, Tensor) and isinstance(out, Tensor) and out.requires_grad:
                norm = adapter.structure == "norm"
                inputs = adapter.input_rows(x.detach()) if norm else x.detach()
                calls[block.name].append(_Call(inputs, *output_edge(out, x), norm))

        return hook

    handles = [
        model.module.get_submodule(block.name).register_forward_hook(hook_of(block), with_kwargs=True, prepend=True)
        for block in blocks
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


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


def audited_blocks(
    model: FrozenModel, blocks: tuple[ParameterBlock, ...], batch: Batch, seed: int = 0
) -> tuple[ParameterBlock, ...]:
    """The model's ``blocks``; those whose layer is not the linear map that its adapter says lose the adapter.

    A weight used elsewhere too, positions in front of the examples, examples folded into positions, a layer that
    never ran: all of them change the gradient of a randomly weighted sum of the examples' outputs, which the rows
    of a trusted layer must reproduce.
    """
    linear = tuple(block for block in blocks if block.adapter is not None)
    if not linear:
        return blocks
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(batch.size, generator=generator, dtype=torch.float64)
    with torch.enable_grad():
        logits, _ = model.forward(batch)
        parameters = [model.parameters[name] for block in linear for name in block.parameters]
        cotangent = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits)
        scaled = cotangent * weights.to(cotangent).reshape(-1, *([1] * (logits.dim() - 1)))
        gradients: list[Tensor | None] = [None] * len(parameters)
        graph = RepeatableGraph(model.module, OutputGraph(logits, parameters), model.owner)
        with graph.untouched():
            graph.pull(scaled, gradients.__setitem__)
    expected = {
        name: torch.zeros_like(p) if g is None else g
        for name, p, g in zip([n for block in linear for n in block.parameters], parameters, gradients)
    }
    usable = _shapes_fit(model, linear, batch)
    capture = RowCapture(model, tuple(block for block in linear if block.name in usable), 1 << 28)
    stores = next(capture.stores(batch, lambda _, __: [cotangent], lambda _: False)) if usable else {}
    trusted = set()
    for block in linear:
        if block.name not in stores:
            continue
        found = stores[block.name].expand(weights.to(model.device, model.row_dtype).reshape(-1, 1, 1)).squeeze(1)
        truth = torch.cat([expected[name].flatten() for name in block.parameters]).to(found.dtype)
        rounding = torch.finfo(model.dtype).eps ** 0.5
        if float((found - truth).norm()) <= rounding * max(float(truth.norm()), 1e-30):
            trusted.add(block.name)
    return tuple(block if block.name in trusted else replace(block, adapter=None) for block in blocks)


def _shapes_fit(model: FrozenModel, blocks: tuple[ParameterBlock, ...], batch: Batch) -> set[str]:
    """Names of the layers that ran and whose rows are grouped by the batch's examples."""
    with torch.enable_grad(), _recorded(model, list(blocks)) as calls:
        model.forward(batch)
    fitting = set()
    for block in blocks:
        assert block.adapter is not None
        sizes = {call.rows(block.adapter).shape[1] for call in calls[block.name]}
        if sizes == {batch.size}:
            fitting.add(block.name)
    return fitting


def recorded_calls(model: FrozenModel, names: list[str], batch: Batch) -> dict[str, Tensor]:
    """Input of the (first) call of each of these layers."""
    found: dict[str, Tensor] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            found.setdefault(name, args[0].detach())

        return hook

    handles = [model.module.get_submodule(name).register_forward_hook(hook_of(name)) for name in names]
    try:
        with torch.no_grad():
            model.forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def measured_shapes(model: FrozenModel, blocks: tuple[ParameterBlock, ...], batch: Batch) -> dict[str, BlockShape]:
    """Sizes of the blocks on this data; positions of all calls of a layer are added."""
    linear = [block for block in blocks if block.adapter is not None]
    with torch.enable_grad(), _recorded(model, linear) as calls:
        model.forward(batch)
    shapes = {block.name: BlockShape(1, 0, 1, block.size) for block in blocks}
    for block in linear:
        assert block.adapter is not None
        groups, out_dim, in_dim = block.adapter.layout.shape
        shared = sum(call.rows(block.adapter).shape[2] for call in calls[block.name])
        shapes[block.name] = BlockShape(groups, shared, in_dim, out_dim)
    return shapes
