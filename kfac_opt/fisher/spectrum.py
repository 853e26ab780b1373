"""Spectral density of a Fisher matrix: stochastic Lanczos quadrature, block Lanczos, or all eigenvalues."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from kfac_opt._curvature.spectral import SpectralForm
from kfac_opt.fisher.density import SpectralDensity, SpectralErrors
from kfac_opt.fisher.lanczos import BlockLanczos, ProbeLanczos, Quadrature, drive
from kfac_opt.fisher.matrix import FisherMatrix
from kfac_opt.fisher.source import is_number, readable

Method = Literal["slq", "block_lanczos", "exact"]
NodeWeights = Literal["quadrature", "snapped"]
__all__ = ["SpectralDensity", "SpectralErrors", "spectral_density"]


class HasSpectralForm(Protocol):
    """A curvature block that knows its eigenvalues: an entry of ``optimizer.curvature``."""

    def spectral_form(self) -> SpectralForm:
        """Eigenvalues and bases."""
        ...


def spectral_density(
    fisher: FisherMatrix | Tensor | Mapping[str, HasSpectralForm],
    method: Method = "slq",
    generator: torch.Generator | None = None,
    *,
    num_probes: int = 10,
    block_size: int = 10,
    num_steps: int | None = None,
    node_weights: NodeWeights | None = None,
    probes: Tensor | None = None,
) -> SpectralDensity:
    r"""Estimate of :math:`\phi(t) = \frac1P \sum_i \delta(t - \lambda_i)`, the density of the eigenvalues.

    >>> fisher = FisherMatrix(nn.Linear(5, 3), torch.randn(20, 5), blocks="layer_wise")
    >>> spectral_density(fisher, "block_lanczos").errors(spectral_density(fisher, "exact")).wasserstein < 1e-3
    True

    Args:
        fisher: the matrix; for ``layer_wise`` blocks one recurrence runs per block inside one product, weighted by
            the blocks' sizes. Also a dense symmetric tensor ``[P, P]``, or ``optimizer.curvature`` of a running KFAC,
            whose blocks' eigenvalues are known (``method`` is ``"exact"`` then): the spectrum of the approximation, to
            draw beside the true one.
        method: ``"slq"``: ``num_probes`` independent random starts of ``num_steps`` products each, default 10 × 50
            (Ubaru, Chen & Saad 2017; Ishii & Yokota). ``"block_lanczos"``: one recurrence with ``block_size``
            vectors (Golub & Underwood 1977), far more accurate for the same number of products. ``"exact"``: all
            eigenvalues.
        generator: draws the starts; None means seed 0.
        num_probes: starts of ``slq``.
        block_size: of ``block_lanczos``; eigenvalues of a higher multiplicity are seen as if they had this one. With
            200 products in all, 4 × 50 has half the error of the default 10 × 20 and a quarter of that of 20 × 10 on a
            trained CNN (``benchmarks/fisher_spectrum.py``); 1 × 200 is worse again.
        num_steps: products per start; None: 50 for ``slq``, 20 for ``block_lanczos``.
        node_weights: ``"quadrature"`` (default of slq) or ``"snapped"`` (default of block_lanczos): a converged Ritz
            value is an eigenvalue and gets its known weight ``1/P``; the rest is fitted to the exact trace.
        probes: starts ``[P, num_probes]`` to use instead of random ones, for ``slq``; not zero on any block.

    Returns:
        The density, on the CPU in double precision.

    Raises:
        ValueError: unknown words, numbers out of range, or a basis that exceeds the matrix's memory limit.
    """
    if isinstance(fisher, Mapping):
        return _known_density(fisher)
    if num_steps is None:
        num_steps = 20 if method == "block_lanczos" else 50
    _check(fisher, method, num_probes, block_size, num_steps, node_weights, probes)
    if method == "exact":
        return _exact_density(fisher)
    snap = (node_weights or ("quadrature" if method == "slq" else "snapped")) == "snapped"
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    size = fisher.shape[0]
    slices = _slices(fisher)
    parts = {name: where.stop - where.start for name, where in slices.items()}
    measures: dict[str, list[Quadrature]] = {name: [] for name in slices}
    if method == "block_lanczos":
        _demand(
            fisher,
            sum(min(n, block_size * num_steps) * n for n in parts.values()),
            f"{block_size} × {num_steps} vectors",
        )
        starts = _noise(size, block_size, generator).to(fisher.device, fisher.dtype)
        blocks = {name: BlockLanczos(starts[where], num_steps) for name, where in slices.items()}
        products = drive(blocks, slices, fisher)
        measures = {name: [block.quadrature()] for name, block in blocks.items()}
    else:
        starts = _noise(size, num_probes, generator) if probes is None else probes.double()
        starts = starts.to(fisher.device, fisher.dtype)
        products = 0
        for group in starts.split(_probes_at_once(fisher, parts, num_steps), dim=1):
            runs = {name: ProbeLanczos(group[where], num_steps) for name, where in slices.items()}
            products += drive(runs, slices, fisher)
            for name, run in runs.items():
                measures[name] += run.quadratures()
    nodes, weights = [], []
    traces = _traces(fisher) if snap else {}
    for name, found in measures.items():
        for measure in found:
            measure = measure.snapped(parts[name], traces[name] / parts[name]) if snap else measure
            nodes.append(measure.nodes.double().cpu())
            weights.append(measure.weights.double().cpu() * (parts[name] / size / len(found)))
    return _sorted(torch.cat(nodes), torch.cat(weights), size, method, products)


def _known_density(curvature: Mapping[str, HasSpectralForm]) -> SpectralDensity:
    """Eigenvalues of every block of a curvature approximation."""
    if not curvature:
        raise ValueError(
            "spectral_density: the mapping holds no curvature blocks (a KFAC with curvature='identity' has none). Give "
            "optimizer.curvature of another curvature, or a FisherMatrix."
        )
    values = torch.cat([view.spectral_form().eigenvalues.double().flatten().cpu() for view in curvature.values()])
    return _sorted(values, torch.full_like(values, 1.0 / len(values)), len(values), "curvature", 0)


def _exact_density(fisher: FisherMatrix | Tensor) -> SpectralDensity:
    values = fisher.eigenvalues() if isinstance(fisher, FisherMatrix) else torch.linalg.eigvalsh(fisher.double())
    values = values.double().cpu()
    return _sorted(values, torch.full_like(values, 1.0 / len(values)), len(values), "exact", 0)


def _sorted(nodes: Tensor, weights: Tensor, size: int, method: str, products: int) -> SpectralDensity:
    order = nodes.argsort()
    return SpectralDensity(nodes[order], weights[order] / weights.sum(), size, method, products)


def _slices(fisher: FisherMatrix | Tensor) -> dict[str, slice]:
    if isinstance(fisher, FisherMatrix) and fisher.is_layer_wise:
        return fisher.block_slices
    return {"": slice(0, fisher.shape[0])}


def _traces(fisher: FisherMatrix | Tensor) -> dict[str, float]:
    if isinstance(fisher, Tensor):
        return {"": float(fisher.trace())}
    traces = {name: float(value) for name, value in fisher.block_traces().items()}
    return traces if fisher.is_layer_wise else {"": sum(traces.values())}


def _noise(size: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(size, columns, generator=generator, dtype=torch.float64, device=generator.device)


def _probes_at_once(fisher: FisherMatrix | Tensor, parts: Mapping[str, int], steps: int) -> int:
    """Probes whose bases fit together into the memory limit."""
    entries = sum(min(n, steps) * n for n in parts.values())
    _demand(fisher, entries, f"{steps} vectors of one probe")
    if not isinstance(fisher, FisherMatrix):
        return 10
    return max(1, fisher.memory_limit // (entries * fisher.dtype.itemsize))


def _demand(fisher: FisherMatrix | Tensor, entries: int, what: str) -> None:
    if isinstance(fisher, FisherMatrix) and entries * fisher.dtype.itemsize > fisher.memory_limit:
        raise ValueError(
            f"spectral_density: {what} of size {fisher.shape[0]} need {readable(entries * fisher.dtype.itemsize)}, the "
            f"matrix's memory_limit is {readable(fisher.memory_limit)}. Raise memory_limit or lower num_steps."
        )


def _check(
    fisher: FisherMatrix | Tensor,
    method: str,
    num_probes: int,
    block_size: int,
    num_steps: int,
    node_weights: str | None,
    probes: Tensor | None,
) -> None:
    if not isinstance(fisher, (FisherMatrix, Tensor)):
        raise TypeError(
            f"spectral_density: got {type(fisher).__name__}, expected a FisherMatrix, a symmetric tensor, or the curvature of an "
            "optimizer. For a model: FisherMatrix(model, data); for a KFAC: optimizer.curvature."
        )
    if method not in ("slq", "block_lanczos", "exact"):
        raise ValueError(f"spectral_density: method must be 'slq', 'block_lanczos' or 'exact', got {method!r}")
    if node_weights not in (None, "quadrature", "snapped"):
        raise ValueError(f"spectral_density: node_weights must be 'quadrature' or 'snapped', got {node_weights!r}")
    for name, value in (("num_probes", num_probes), ("block_size", block_size), ("num_steps", num_steps)):
        if not is_number(value, whole=True) or value < 1:
            raise ValueError(f"spectral_density: {name} must be a whole number >= 1, got {value!r}")
    if isinstance(fisher, Tensor) and not (fisher.is_floating_point() and bool(torch.isfinite(fisher).all())):
        raise ValueError(f"spectral_density: a tensor must hold finite floating point numbers, got {fisher.dtype}. Check it.")
    if isinstance(fisher, Tensor) and (fisher.dim() != 2 or not torch.allclose(fisher, fisher.mT)):
        raise ValueError(
            f"spectral_density: a tensor must be a symmetric matrix [P, P], got shape {list(fisher.shape)}"
            + (" that is not symmetric. Symmetrize it." if fisher.dim() == 2 and fisher.shape[0] == fisher.shape[1] else ".")
        )
    if probes is None:
        return
    if method != "slq":
        raise ValueError(f"spectral_density: probes belong to method='slq', got method='{method}'. Leave probes out.")
    if probes.dim() != 2 or probes.shape[0] != fisher.shape[0]:
        raise ValueError(f"spectral_density: probes have shape {list(probes.shape)}, expected [{fisher.shape[0]}, num_probes].")
    for name, where in _slices(fisher).items():
        if bool((probes[where].norm(dim=0) == 0).any()):
            raise ValueError(f"spectral_density: a probe is zero on block '{name}'. Give probes that reach every block.")
