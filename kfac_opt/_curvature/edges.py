"""Where in the graph the gradient of a layer's output is found, whatever is done to the output in place later."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Size, Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


@dataclass(frozen=True)
class ViewOfBase:
    """How an output lies in the tensor that it is a view of.

    Attributes:
        base_shape, base_stride: of that tensor.
        shape, stride, offset: of the output, counted in entries from the start of that tensor.
    """

    base_shape: Size
    base_stride: tuple[int, ...]
    shape: Size
    stride: tuple[int, ...]
    offset: int
    whole: bool  # the same entries in the same order

    def take(self, base_gradient: Tensor) -> Tensor:
        """The output's gradient from that of its base."""
        if self.whole:
            return base_gradient.reshape(self.shape)
        laid_out = base_gradient.new_empty_strided(self.base_shape, self.base_stride).copy_(base_gradient)
        return laid_out.as_strided(self.shape, self.stride, self.offset)


def output_edge(out: Tensor, x: Tensor) -> tuple[GradientEdge, ViewOfBase | None]:
    """The edge that the whole gradient of a layer's output ``out`` passes, and how to read it off there.

    An edge, not the tensor: after ``ReLU(inplace=True)`` the tensor gives the gradient behind the ReLU. And of a view
    (Linear with a bias on more than two dimensions, unbatched convolutions, InstanceNorm) the edge of its base: an in-place
    operation on a view gives the base a new history, in which the view's old node no longer occurs.

    Args:
        x: the layer's input; an output that is a view of it has no base of its own.
    """
    base = out._base if out._is_view() else None
    if base is None or base.grad_fn is None or base is x or base is x._base:
        return get_gradient_edge(out), None
    whole = out.numel() == base.numel() and out.is_contiguous() and base.is_contiguous()
    offset = 0 if whole else int(out.storage_offset() - base.storage_offset())
    return get_gradient_edge(base), ViewOfBase(base.shape, base.stride(), out.shape, out.stride(), offset, whole)
