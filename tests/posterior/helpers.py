"""Hand-made Fisher blocks and dense Gaussians to compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_opt._curvature.spectral import SpectralForm
from kfac_opt.bayes.posterior import NoiseSource, Posterior, PosteriorBlock, Width
from kfac_opt.layers.layout import MatrixLayout

WIDTH = Width(ess=40.0, prior_precision=2.0, floor=0.01)


def spd(size: int, generator: torch.Generator, *lead: int) -> Tensor:
    """A positive definite matrix that is far from diagonal, eigenvalues spread over three orders."""
    basis = torch.linalg.qr(torch.randn(*lead, size, size, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(-2, 1, size, dtype=torch.float64)
    return basis @ torch.diag(values) @ basis.mT


def kronecker_block(
    input_factor: Tensor,
    output_factor: Tensor,
    *,
    weight: str = "weight",
    bias: str | None = None,
    width: Width = WIDTH,
    damping: str = "exact",
) -> PosteriorBlock:
    """The block of ``A ⊗ G`` for one layer ``[out, in]`` with one group."""
    input_values, input_basis = torch.linalg.eigh(input_factor)
    output_values, output_basis = torch.linalg.eigh(output_factor)
    out_dim, in_dim = len(output_factor), len(input_factor)
    form = SpectralForm(output_basis[None], input_basis[None], torch.outer(output_values, input_values)[None])
    layout = MatrixLayout("matrix", (out_dim, in_dim - (bias is not None)), bias is not None)
    return PosteriorBlock(weight, bias, layout, form, width, damping)


def small_posterior(seed: int = 0, width: Width = WIDTH, damping: str = "exact") -> Posterior:
    """A linear layer with a bias, a scale-and-shift layer and a bare parameter, all with curvature."""
    generator = torch.Generator().manual_seed(seed)
    linear = kronecker_block(
        spd(4, generator), spd(2, generator), weight="fc.weight", bias="fc.bias", width=width, damping=damping
    )
    values, basis = torch.linalg.eigh(spd(2, generator, 3))
    norm = PosteriorBlock(
        "norm.weight", "norm.bias", MatrixLayout("norm", (3,), True), SpectralForm(None, basis, values[:, None]), width
    )
    diagonal = torch.rand(1, 1, 2, generator=generator, dtype=torch.float64)
    bare = PosteriorBlock("scale", None, MatrixLayout("flat", (2,)), SpectralForm(None, None, diagonal), width)
    shapes = {"scale": (2,), "fc.weight": (2, 3), "fc.bias": (2,), "norm.weight": (3,), "norm.bias": (3,)}
    means = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return Posterior(means, [linear, norm, bare])


def flat(values: dict[str, Tensor]) -> Tensor:
    """All values in one vector, in the order of the dict."""
    return torch.cat([value.reshape(-1) for value in values.values()])


def noise_map(block: PosteriorBlock) -> Tensor:
    """``L [D, D]`` of one block with ``vec W = μ + L e``: the columns are the images of the unit vectors, row-major."""
    source, eye = NoiseSource([block]), torch.eye(block.layout.numel, dtype=torch.float64)
    columns = []
    for unit in eye:
        (noise,) = source.correlate_([{(torch.float64, unit.device): unit.clone()}])
        columns.append(block.layout.to_matrix(*[noise[name] for name in block.names]).reshape(-1))
    return torch.stack(columns, dim=1)


def dense_covariance(posterior: Posterior) -> Tensor:
    """``Σ [D, D]`` in the order of the means, each row-major: dense inverses of dense Fisher blocks.

    Only for blocks with the exact damping.
    """
    offsets, total = {}, 0
    for name, mean in posterior.mean.items():
        offsets[name] = total + torch.arange(mean.numel()).reshape(mean.shape)
        total += mean.numel()
    covariance = torch.zeros(total, total, dtype=torch.float64)
    for block in posterior.blocks:
        place = block.layout.to_matrix(*[offsets[name] for name in block.names])
        d = block.width.prior_precision / block.width.ess + block.width.floor
        for group, form in enumerate(block.form.dense()):
            where = place[group].T.reshape(-1)  # column-stacking, as the dense form
            inverse = torch.linalg.inv(block.width.ess * (form + d * torch.eye(len(form), dtype=torch.float64)))
            covariance[where[:, None], where[None, :]] = inverse
    return covariance
