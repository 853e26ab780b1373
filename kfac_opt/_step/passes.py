"""What several passes with drawn weights leave behind: the mean gradient, batch statistics, the draws' own mean."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kfac_opt._capture.distributed import sum_over_ranks_
from kfac_opt._step.update import gathered


class GradientMean:
    """Mean gradient over the passes that were completed and finite; what stood in ``.grad`` before is kept.

    Args:
        parameters: those that are optimized, in the same order on every rank.
        others: the model's other trainable ones, which another optimizer may hold: averaged all the same, but their
            gradients drop no pass.
    """

    def __init__(self, parameters: Sequence[Tensor], others: Sequence[Tensor] = ()) -> None:
        self.deciding = len(parameters)
        self.parameters = parameters = [*parameters, *others]
        self.before = [parameter.grad for parameter in parameters]
        # DistributedDataParallel's gradients may be views of its buckets, which every backward writes anew.
        self.kept = [None if gradient is None or not gradient._is_view() else gradient.clone() for gradient in self.before]
        self.sums: list[Tensor | None] = [None] * len(parameters)
        self.dropped: list[Tensor | None] = [None] * len(parameters)
        self.completed = 0

    def start_pass(self) -> None:
        """Each pass starts without gradients, so that the user's ``backward`` accumulates nothing."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def finish_pass(self, *, drop: bool = False) -> bool:
        """Takes the gradients of a completed pass; False if they are not finite (or ``drop``)."""
        gradients = [parameter.grad for parameter in self.parameters]
        finite = not drop and all_finite([gradient for gradient in gradients[: self.deciding] if gradient is not None])
        sums = self.sums if finite else self.dropped
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                total = sums[index]
                if total is not None:
                    total.add_(gradient)
                else:
                    sums[index] = gradient.clone() if gradient._is_view() else gradient
        self.completed += finite
        return finite

    @torch.no_grad()
    def install(self, group: dist.ProcessGroup | None = None) -> None:
        """``.grad = before + mean``; the sum of the dropped ones if no pass was finite, so that a scaler sees it.

        Args:
            group: ranks that ran other passes of the same step.
        """
        if group is not None:
            self._sum_over_ranks(group)
        sums, count = (self.sums, self.completed) if self.completed else (self.dropped, 1)
        for parameter, before, kept, total in zip(self.parameters, self.before, self.kept, sums):
            if before is not None and kept is not None:
                before.copy_(kept)
            if total is None:
                parameter.grad = before
                continue
            mean = total if count == 1 else total.div_(count)
            parameter.grad = mean if before is None else before.add_(mean)

    def _sum_over_ranks(self, group: dist.ProcessGroup) -> None:
        """Adds the passes of the other ranks; a gradient that some rank lacks counts as zero there."""
        device = self.parameters[0].device
        present = [[float(total is not None) for total in sums] for sums in (self.sums, self.dropped)]
        counts = torch.tensor([float(self.completed), *present[0], *present[1]], dtype=torch.float64, device=device)
        sum_over_ranks_([counts], group)
        self.completed = round(float(counts[0]))
        needed = [value > 0 for value in counts[1:].tolist()]
        number = len(self.parameters)
        for sums, wanted in ((self.sums, needed[:number]), (self.dropped, needed[number:])):
            if sums is self.dropped and self.completed:
                continue
            for index, parameter in enumerate(self.parameters):
                if wanted[index] and sums[index] is None:
                    sums[index] = torch.zeros_like(parameter)
            tensors = [total.contiguous() for total in sums if total is not None]
            sum_over_ranks_(tensors, group)
            summed = iter(tensors)
            sums[:] = [None if total is None else next(summed) for total in sums]


def all_finite(gradients: Sequence[Tensor]) -> bool:
    """One read of the device for all; a gradient whose squares overflow single precision counts as broken."""
    if not gradients:
        return True
    values = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
    norms: list[Tensor] = []
    for dtype in {value.dtype for value in values}:
        wide = torch.promote_types(dtype, torch.float32)
        same = [value for value in values if value.dtype == dtype]
        norms += torch._foreach_norm(same) if wide == dtype else torch._foreach_norm(same, dtype=wide)
    return math.isfinite(sum(gathered(norms).tolist()))


class BatchStatistics:
    """The running statistics of normalization layers as they are before a pass that may not move them."""

    def __init__(self, model: nn.Module) -> None:
        names = ("running_mean", "running_var", "num_batches_tracked")
        # Read off the dict of buffers: a module raises and catches where it has no such attribute, at every pass.
        buffers = [m._buffers.get(name) for m in model.modules() if m.training and m._buffers for name in names]
        self.saved = [(buffer, buffer.clone()) for buffer in buffers if buffer is not None]

    @torch.no_grad()
    def restore_(self) -> None:
        """Puts them back."""
        for buffer, value in self.saved:
            buffer.copy_(value)
