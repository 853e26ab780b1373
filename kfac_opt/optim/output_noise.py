r"""Local reparameterization: noise per example at the output of Linear layers in place of noise in their weights.

Kingma, Salimans & Welling 2015, arXiv:1506.02557. With an independent draw of the weights for every example the
output of a Linear layer is Gaussian, :math:`s \sim N(\mu a, Q_G\,\mathrm{diag}((a^\top Q_A)^2 V^\top)\,Q_G^\top)`,
and can be drawn directly: the gradient then averages over as many draws as the batch has examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kfac_opt.layers.adapter import append_one
from kfac_opt.posterior import PosteriorBlock


class OutputNoise:
    """Forward hook of one Linear layer for one pass.

    Args:
        name: of the layer, for messages.
        block: covariance of its weights.
        generator: of the noise; reads it at the call, so that an antithetic pass can repeat it.
        sign: 1, or -1 for the second of an antithetic pair.
    """

    def __init__(self, name: str, block: PosteriorBlock, generator: torch.Generator, sign: float) -> None:
        self.name, self.block, self.generator, self.sign = name, block, generator, sign
        self.calls = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        x: Tensor = args[0]
        self.calls += 1
        if x.dim() != 2 or self.calls > 1:
            found = f"an input of shape {list(x.shape)}" if x.dim() != 2 else "more than one call in a pass"
            raise RuntimeError(
                f"KFACVI: output_noise for '{self.name}' needs one call per pass on [batch, features], found {found}. "
                "Several rows of one example share the weights, and independent noise per row would not be that of "
                "the posterior. Leave the layer out of output_noise; antithetic=True lowers the variance there."
            )
        form, dtype = self.block.form, self.block.form.eigenvalues.dtype
        with torch.autocast(x.device.type, enabled=False):
            rows = x.to(dtype)
            rows = append_one(rows) if self.block.bias is not None else rows
            rotated = rows if form.input_basis is None else rows @ form.input_basis[0]
            # The square root has no derivative at 0, where an example's input is zero and there is no bias.
            variance = (rotated.square() @ self.block.spectrum[0].mT).clamp_min(torch.finfo(dtype).tiny)
            draw = torch.randn(variance.shape, generator=self.generator, dtype=dtype, device=self.generator.device)
            noise = self.sign * variance.sqrt() * draw.to(x.device)
            noise = noise if form.output_basis is None else noise @ form.output_basis[0].mT
        return out + noise.to(out.dtype)


def choose_layers(choice: str | Sequence[str] | None, modules: dict[str, nn.Module | None]) -> dict[str, nn.Module]:
    """The layers with output noise by name: none, all Linear layers, or those listed.

    Args:
        modules: tracked layers; None for a parameter of its own.

    Raises:
        ValueError: for another word, an unknown layer, or a layer that is not an ``nn.Linear``.
    """
    if choice is None:
        return {}
    linear: dict[str, nn.Module] = {name: m for name, m in modules.items() if isinstance(m, nn.Linear)}
    if isinstance(choice, str):
        if choice != "linear":
            raise ValueError(f"KFACVI: output_noise must be None, 'linear' or names of Linear layers, got {choice!r}")
        return linear
    for name in choice:
        if name not in linear:
            kind = type(modules[name]).__name__ if modules.get(name) is not None else "not a layer with curvature"
            raise ValueError(
                f"KFACVI: output_noise (local reparameterization) is exact for nn.Linear alone, {name!r} is {kind}. "
                f"Choose from {list(linear)}; for other layers use antithetic=True or more samples."
            )
    return {name: linear[name] for name in choice}


@contextmanager
def noisy_outputs(
    layers: dict[str, tuple[nn.Module, PosteriorBlock]], generators: Sequence[torch.Generator], sign: float
) -> Iterator[None]:
    """Every layer adds its noise to its output while the body runs.

    Args:
        layers: module and covariance by layer name.
        generators: one for each layer.
    """
    handles = [
        module.register_forward_hook(OutputNoise(name, block, generator, sign))
        for (name, (module, block)), generator in zip(layers.items(), generators)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
