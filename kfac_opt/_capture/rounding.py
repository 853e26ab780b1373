r"""Layers whose gradient is nothing but rounding: their true Fisher block is zero, and noise must not be inverted.

In front of an instance norm and a mean over the image, or for a bias in front of a batch norm, the true gradient vanishes and
what is computed is what its terms leave when they cancel. Small gradients alone tell nothing: those behind a small factor,
or many saturated units, are small and right. But a backward pass is linear: with the output gradients times three, a right
gradient is three times as large, and rounding is something else. (The empirical Fisher matrix has the user's backward pass
alone, and nothing to compare it with.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

SAMPLE = 4096  # entries of a gradient that are compared
NOISE = 0.5  # relative change from which a gradient is rounding: that of independent errors is about 1, else 1e-6
ROUNDINGS = 2.0**10  # of the dtype: how large, relative to the largest gradient of the net, cancelled terms may be

Pull = Callable[[Tensor, Callable[[int, Tensor], None]], None]


class Rounding:
    """Watches the first passes, and those that follow while there is something to watch.

    Attributes:
        noise: names whose gradients were rounding in the last pass that was looked at.
    """

    def __init__(self) -> None:
        self.noise: set[str] = set()
        self._right: set[str] = set()
        self._passes = 0

    def due(self, names: Iterable[str]) -> bool:
        """Whether this pass is to be looked at: names that had no gradient yet are looked for ever more rarely."""
        self._passes += 1
        early = self._passes & (self._passes - 1) == 0
        return bool(self.noise) or (early and not self._right.issuperset(names))

    def look(self, pull: Pull, column: Tensor, owners: Sequence[str]) -> None:
        """Two backward passes from one column of output gradients.

        Args:
            pull: ``pull(column, receive)`` calls ``receive(number, gradient)`` for each of the targets that it reaches.
            owners: name of each target's block.
        """
        first: dict[int, Tensor] = {}
        norms: dict[int, Tensor] = {}
        eps: dict[str, float] = {}

        @torch.no_grad()
        def keep(number: int, gradient: Tensor) -> None:
            first[number] = _sample(gradient)
            eps[owners[number]] = torch.finfo(gradient.dtype).eps

        @torch.no_grad()
        def compare(number: int, gradient: Tensor) -> None:
            before = first.pop(number, None)
            if before is not None:
                parts = _sample(gradient) / 3.0 - before, before, gradient
                norms[number] = torch.stack([torch.linalg.vector_norm(part, dtype=before.dtype) for part in parts])

        pull(column, keep)
        pull(3.0 * column, compare)
        if norms:
            self._judge([owners[number] for number in norms], list(norms.values()), eps)

    def _judge(self, names: Sequence[str], norms: Sequence[Tensor], eps: Mapping[str, float]) -> None:
        """``norms`` of error, sample and whole gradient of each call; one read of the device."""
        totals: dict[str, list[float]] = {}
        device = norms[0].device
        for name, row in zip(names, torch.stack([part.to(device, torch.float64) for part in norms]).tolist()):
            totals[name] = [total + part * part for total, part in zip(totals.get(name, [0.0] * 3), row)]
        largest = max(whole for _, _, whole in totals.values())
        for name, (error, sample, whole) in totals.items():
            if not sample > 0.0:
                continue
            small = whole <= (ROUNDINGS * eps[name]) ** 2 * largest
            if small and error > NOISE**2 * sample:
                self.noise.add(name)
            else:
                self.noise.discard(name)
                self._right.add(name)


def _sample(gradient: Tensor) -> Tensor:
    """Up to ``SAMPLE`` entries, in single precision or better; an odd distance, so that they do not lie in one column."""
    flat = gradient.reshape(-1)
    return flat[:: (flat.numel() // SAMPLE) | 1].to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
