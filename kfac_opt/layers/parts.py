"""Modules with several weight matrices, seen as several linear maps: what each part read and what reached it.

Attention and recurrent layers apply their matrices inside fused kernels, where no hook sees the rows. They are replayed: the
same function from detached inputs and weights, written with explicit linear maps, in a graph of its own whose nodes give
each part's output gradients from those of the module's outputs. Nothing of the model's own pass is replaced.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from kfac_opt.layers.adapter import LayerAdapter, WeightSharing, append_one
from kfac_opt.layers.layout import MatrixLayout


@dataclass(frozen=True)
class Part:
    """One matrix of a module.

    Attributes:
        name: within the module.
        weight, bias: parameters ``[groups · out, in]`` and ``[groups · out]``.
        groups: matrices that are stacked in one weight and have rows and factors of their own.
    """

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    groups: int = 1


class PartAdapter(LayerAdapter):
    """Reads what a replay lays out: inputs ``[groups, batch, shared, in]``, output gradients ``[groups, batch, shared, out]``."""

    def __init__(self, part: Part, with_bias: bool) -> None:
        super().__init__(cast(nn.Module, part), with_bias)

    @staticmethod
    def make_layout(module: nn.Module, with_bias: bool) -> MatrixLayout:
        part = cast(Part, module)
        return MatrixLayout("matrix", tuple(part.weight.shape), with_bias, part.groups)

    def input_rows(self, x: Tensor) -> Tensor:
        return append_one(x) if self.layout.has_bias else x

    def output_rows(self, gradient: Tensor) -> Tensor:
        return gradient

    def input_moment(self, x: Tensor, keep: Tensor | None, sharing: WeightSharing, dtype: torch.dtype) -> Tensor:
        """As the plain version; groups that read the same rows (queries, keys and values of self-attention) share it."""
        groups = x.shape[0]
        if groups > 1 and x.stride(0) == 0 and (keep is None or keep.dim() == 2):
            return super().input_moment(x[:1], keep, sharing, dtype).repeat(groups, 1, 1)
        return super().input_moment(x, keep, sharing, dtype)


@dataclass(frozen=True)
class PartRows:
    """What one part read in one call.

    Attributes:
        inputs: ``[groups, batch, shared, in]``.
        sources: tensors of the replay whose gradients make up the part's output gradient.
        lay: ``[groups, batch, shared, out]`` from the gradients of the sources.
        keep: bool ``[batch, shared]``, or ``[groups, batch, shared]`` where groups have rows of their own; rows that there
            are, None for all.
    """

    inputs: Tensor
    sources: tuple[Tensor, ...]
    lay: Callable[[Sequence[Tensor]], Tensor]
    keep: Tensor | None = None


@dataclass(frozen=True)
class Replayed:
    """One call, replayed: outputs in the order of :func:`floating_outputs`, rows by the name of the part."""

    outputs: list[Tensor]
    rows: dict[str, PartRows]

    def agrees(self, outputs: Sequence[Tensor]) -> Tensor:
        """0-dim bool: whether these are the outputs of the module, up to rounding."""
        if [tuple(own.shape) for own in self.outputs] != [tuple(out.shape) for out in outputs]:
            return torch.tensor(False)
        found = [_close(own.detach(), out.detach()) for own, out in zip(self.outputs, outputs)]
        return torch.stack(found).all()

    def output_gradients(self, gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Output gradients ``[groups, batch, shared, out]`` of the parts from those of the outputs (None: nothing came)."""
        pairs = [(own, g.to(own.dtype)) for own, g in zip(self.outputs, gradients) if g is not None and own.requires_grad]
        sources = [source for rows in self.rows.values() for source in rows.sources]
        if not pairs:
            return {}
        roots, arrived = zip(*pairs)
        found = torch.autograd.grad(roots, sources, arrived, retain_graph=True, allow_unused=True)
        by_part, position = {}, 0
        for name, rows in self.rows.items():
            here = found[position : position + len(rows.sources)]
            position += len(rows.sources)
            if any(gradient is not None for gradient in here):
                filled = [torch.zeros_like(own) if g is None else g for own, g in zip(rows.sources, here)]
                by_part[name] = rows.lay(filled)
        return by_part


def _close(own: Tensor, out: Tensor) -> Tensor:
    """Up to the root of the rounding unit: sums over steps amplify rounding, another function is wrong by far more."""
    eps = max(torch.finfo(own.dtype).eps, torch.finfo(out.dtype).eps)
    if out.device.type == "cuda" and out.dtype == torch.float32:
        eps = max(eps, 2.0**-10)  # TF32
    dtype = torch.promote_types(torch.promote_types(own.dtype, out.dtype), torch.float32)
    own, out = own.to(dtype), out.to(dtype)
    return (own - out).norm() <= eps**0.5 * out.norm() + torch.finfo(dtype).tiny


class Composite(ABC):
    """How to read one type of module with several matrices."""

    @abstractmethod
    def parts(self, module: nn.Module) -> list[Part]:
        """Its matrices; none where it is used in a way that cannot be replayed."""

    @abstractmethod
    def replay(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Sequence[Tensor]) -> Replayed:
        """The call once more, from detached inputs and weights; draws what random numbers the module draws, in its order.

        Args:
            outputs: what it gave (:func:`floating_outputs`). Where one of them comes about on the way to another, the gradient
                that will come for it has what the other sends back already: the replay cuts that way.
        """

    def draws(self, module: nn.Module) -> bool:
        """Whether the module's forward draws random numbers (dropout)."""
        return False


_COMPOSITES: dict[type[nn.Module], Composite] = {}
Class = TypeVar("Class", bound=type[Composite])


def register_composite(*module_types: type[nn.Module]) -> Callable[[Class], Class]:
    """Class decorator: read these module types so."""

    def decorate(composite: Class) -> Class:
        _COMPOSITES.update(dict.fromkeys(module_types, composite()))
        return composite

    return decorate


def find_composite(module: nn.Module) -> Composite | None:
    """How to read this module, or None: subclasses with a forward of their own are none of ours."""
    for base in type(module).__mro__:
        if base in _COMPOSITES:
            own = type(module).forward is not base.forward or "forward" in vars(module)
            return None if own else _COMPOSITES[base]
    return None


def floating_outputs(out: Any) -> list[Tensor]:
    """Floating tensors of what a module returned, tuples and packed sequences opened."""
    return [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``W x + b`` of detached weights."""
    return nn.functional.linear(x, weight.detach(), None if bias is None else bias.detach())
