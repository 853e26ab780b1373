"""Draws from a set of blocks: what the posterior and the optimizer that trains it share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kfac_opt._curvature.precision import full_precision
from kfac_opt._kernels.products import product_for
from kfac_opt.bayes.posterior.block import PosteriorBlock

Kind = tuple[torch.dtype, torch.device]


class NoiseSource:
    r"""Deviations from the means, :math:`Q_G (E \circ \sqrt V) Q_A^\top` for each block of a fixed set.

    What depends on the covariances alone is computed once: a draw is one call for the random numbers, one for the
    deviations of all blocks together, and two products for each layer.

    Args:
        blocks: covariances; one of a network that is being trained must not change while the source is in use.
    """

    def __init__(self, blocks: Sequence[PosteriorBlock]) -> None:
        self._parts: dict[Kind, list[_Part]] = {}
        for block in blocks:
            values = block.form.eigenvalues
            self._parts.setdefault((values.dtype, values.device), []).append(_Part(block))
        self._sizes = {kind: [part.block.layout.numel for part in parts] for kind, parts in self._parts.items()}
        with torch.no_grad():
            self._deviations = {kind: torch.cat([p.deviations() for p in parts]) for kind, parts in self._parts.items()}

    @property
    def num_bytes(self) -> int:
        """Size of one draw."""
        return sum(deviation.numel() * deviation.element_size() for deviation in self._deviations.values())

    @property
    def on_host(self) -> bool:
        """Whether drawing is work of the processor that runs the program."""
        return all(device.type == "cpu" for _, device in self._parts)

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """One draw for every block, by the names of the parameters; from one call for the numbers of each dtype.

        Args:
            generator: of the noise, on any device.
        """
        return self.draws([generator])[0]

    @torch.no_grad()
    def draws(self, generators: Sequence[torch.Generator]) -> list[dict[str, Tensor]]:
        """One draw from each of ``generators`` in turn (they may all be the same), bit for bit those of :meth:`draw`."""
        return self.correlate_([self._numbers(generator) for generator in generators])

    def _numbers(self, generator: torch.Generator) -> dict[Kind, Tensor]:
        drawn = {}
        for (dtype, device), deviations in self._deviations.items():
            numbers = torch.randn(len(deviations), generator=generator, dtype=dtype, device=generator.device)
            drawn[dtype, device] = numbers.to(device)
        return drawn

    @torch.no_grad()
    def correlate_(self, draws: Sequence[dict[Kind, Tensor]]) -> list[dict[str, Tensor]]:
        """The deviations that independent standard normal numbers stand for; those are used up.

        Args:
            draws: for each a vector by dtype and device, as long as the blocks of this kind have parameters.
        """
        noise: list[dict[str, Tensor]] = [{} for _ in draws]
        for kind, parts in self._parts.items():
            scaled = [numbers[kind].mul_(self._deviations[kind]).split(self._sizes[kind]) for numbers in draws]
            with full_precision(kind[1]):
                for index, part in enumerate(parts):  # layer by layer: its bases stay in the cache for all draws
                    for values, found in zip(scaled, noise):
                        part.write(values[index], found)
        return noise


class _Part:
    """One block of a source: where its numbers go.

    The numbers of a layer with an output basis are laid out ``[in_dim, out_dim]``: the first product, which transposes
    its right side, then leaves a contiguous matrix to the second.
    """

    def __init__(self, block: PosteriorBlock) -> None:
        self.block, form = block, block.form
        groups, out_dim, in_dim = block.layout.shape
        self.transposed = groups == 1 and form.output_basis is not None
        kind = form.eigenvalues.dtype, form.eigenvalues.device
        self.from_left: Callable[[Tensor, Tensor], Tensor] = product_for(out_dim, out_dim, in_dim, *kind)
        self.from_right: Callable[[Tensor, Tensor], Tensor] = product_for(out_dim, in_dim, in_dim, *kind)
        self.output_basis = form.output_basis[0].contiguous() if self.transposed and form.output_basis is not None else None
        basis = None if form.input_basis is None else form.input_basis[0]
        self.input_basis = basis if basis is None or basis.mT.is_contiguous() else basis.contiguous()

    def deviations(self) -> Tensor:
        """``√V`` in the order of the numbers."""
        deviations = self.block.random_part(self.block.spectrum.sqrt_())
        return (deviations.mT if self.transposed else deviations).reshape(-1)

    def write(self, values: Tensor, noise: dict[str, Tensor]) -> None:
        """``Q_G (E ∘ √V) Q_Aᵀ`` of ``values = E ∘ √V`` under the names of the parameters."""
        layout = self.block.layout
        _, out_dim, in_dim = layout.shape
        if self.output_basis is not None:
            matrix = self.from_left(self.output_basis, values.view(in_dim, out_dim))
            if self.input_basis is not None:
                matrix = self.from_right(matrix, self.input_basis)
        else:
            matrix = self.block.form.rotate_back(values.view(layout.shape))
        weight, bias = layout.from_matrix(matrix)
        noise[self.block.weight] = weight
        if self.block.bias is not None and bias is not None:
            noise[self.block.bias] = bias


def add_noise(mean: Tensor, noise: Tensor) -> Tensor:
    """``mean + noise`` in the wider dtype, returned in that of the mean."""
    return (mean + noise).to(mean.dtype)
