"""A spectral density: nodes and weights, and what can be read off them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KERNEL_SHARE = 0.01
"""Width of the kernel relative to the range of the nodes, as in the study by Ishii and Yokota."""
KERNEL_DECADES = 0.15
"""Width of the kernel on a logarithmic axis."""
FLOOR_SHARE = 1e-7
"""Values below this share of the largest are zero to single precision; the logarithmic view counts them apart."""


@dataclass(frozen=True)
class SpectralErrors:
    """How far an estimated density is from another one, all relative.

    Attributes:
        wasserstein: Wasserstein-1 distance over the mean eigenvalue; everything at zero has 1.
        trace, squares, top: error of ``Σλ``, ``Σλ²`` and the largest eigenvalue.
    """

    wasserstein: float
    trace: float
    squares: float
    top: float


@dataclass(frozen=True)
class SpectralDensity:
    r"""The measure :math:`\sum_j w_j \delta(t - \theta_j)`: an estimate of :math:`\frac1P \sum_i \delta(t - \lambda_i)`

    Attributes:
        nodes: ``[nodes]``, ascending, double precision, on the CPU.
        weights: ``[nodes]``, sum to one.
        size: ``P``.
        method: how it was made.
        num_products: products with the matrix that it took.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    method: str
    num_products: int = 0

    def moment(self, order: int) -> float:
        """Mean of the ``order``-th power of the eigenvalues."""
        return float(self.weights @ self.nodes**order)

    @property
    def mean(self) -> float:
        """Mean eigenvalue, ``tr F / P``."""
        return self.moment(1)

    @property
    def trace(self) -> float:
        """``tr F``."""
        return self.size * self.mean

    @property
    def largest(self) -> float:
        """The largest node."""
        return float(self.nodes.max())

    @property
    def default_sigma(self) -> float:
        """1 % of the range of the nodes."""
        spread = float(self.nodes.max() - self.nodes.min())
        return KERNEL_SHARE * spread if spread > 0 else KERNEL_SHARE * max(abs(self.largest), 1.0)

    def grid(self, num_points: int = 1000, sigma: float | None = None) -> Tensor:
        """Points that hold the whole broadened density: four kernel widths beyond both ends, below zero too."""
        sigma = self.default_sigma if sigma is None else sigma
        return torch.linspace(
            float(self.nodes.min()) - 4 * sigma, float(self.nodes.max()) + 4 * sigma, num_points, dtype=torch.float64
        )

    def density(self, grid: Tensor, sigma: float | None = None) -> Tensor:
        """The measure broadened by a Gaussian, at the points ``grid``; it integrates to one.

        Args:
            grid: ``[points]``.
            sigma: width of the kernel; 1 % of the range of the nodes by default. Give both curves of a comparison
                the same grid and width.
        """
        sigma = self.default_sigma if sigma is None else sigma
        if not sigma > 0:
            raise ValueError(f"SpectralDensity: sigma must be > 0, got {sigma}")
        return _broadened(self.nodes, self.weights, grid, sigma)

    def default_floor(self) -> float:
        """What counts as zero in the logarithmic view: 1e-7 of the largest node."""
        return FLOOR_SHARE * self.largest

    def fraction_below(self, floor: float | None = None) -> float:
        """Share of the eigenvalues below ``floor``."""
        floor = self.default_floor() if floor is None else floor
        return float(self.weights[self.nodes < floor].sum())

    def log_density(self, grid: Tensor, floor: float | None = None, decades: float = KERNEL_DECADES) -> Tensor:
        """Density of ``log10 λ`` per decade at ``λ = grid``, of the eigenvalues from ``floor`` on.

        It integrates (over ``log10 λ``) to ``1 - fraction_below(floor)``.
        """
        floor = self.default_floor() if floor is None else floor
        if not (floor > 0 and bool((grid > 0).all())):
            raise ValueError(f"SpectralDensity: a logarithmic view needs floor > 0 and a grid > 0, got floor {floor}")
        above = self.nodes >= floor
        return _broadened(self.nodes[above].log10(), self.weights[above], grid.double().log10(), decades)

    def wasserstein(self, other: SpectralDensity) -> float:
        r"""Wasserstein-1 distance :math:`\int |\Phi - \Phi'| dt` of the two measures, in units of eigenvalues.

        Of the measures themselves, not of broadened curves: about one percent of the mass carries nearly the whole
        trace, and a curve hardly shows it. Divide by the mean eigenvalue for a number without units
        (:meth:`errors` does).
        """
        nodes = torch.cat([self.nodes, other.nodes])
        mass = torch.cat([self.weights, -other.weights])
        order = nodes.argsort()
        gap = mass[order].cumsum(0)[:-1].abs()
        return float(gap @ nodes[order].diff())

    def errors(self, exact: SpectralDensity) -> SpectralErrors:
        """How far this estimate is from ``exact``.

        Raises:
            ValueError: all eigenvalues of ``exact`` are zero: no relative error.
        """
        if not exact.mean > 0:
            raise ValueError(
                f"SpectralDensity: the mean eigenvalue to compare with is {exact.mean:g}: relative errors need one above zero. "
                "Use wasserstein()."
            )
        return SpectralErrors(
            wasserstein=self.wasserstein(exact) / exact.mean,
            trace=abs(self.moment(1) / exact.moment(1) - 1),
            squares=abs(self.moment(2) / exact.moment(2) - 1),
            top=abs(self.largest / exact.largest - 1),
        )

    def plot(
        self,
        ax: Axes | None = None,
        *,
        axis: Literal["linear", "log"] = "log",
        sigma: float | None = None,
        floor: float | None = None,
        grid: Tensor | None = None,
        label: str | None = None,
        **line: Any,
    ) -> Axes:
        """Draws the broadened density and returns the axes.

        Args:
            ax: matplotlib axes; new ones (without a display) by default.
            axis: ``"linear"`` with a Gaussian of width ``sigma`` on a logarithmic ordinate (the study's figure), or
                ``"log"``: density per decade of eigenvalue, with the fraction below ``floor`` in the legend.
            sigma: width of the linear kernel.
            floor: start of the logarithmic axis.
            grid: points to draw at.
            label: of the curve.
            line: passed to ``Axes.plot``.
        """
        if axis not in ("linear", "log"):
            raise ValueError(f"SpectralDensity: axis must be 'linear' or 'log', got {axis!r}")
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(5, 3.5), layout="constrained").add_subplot()
        label = self.method if label is None else label
        if axis == "linear":
            points = self.grid(sigma=sigma) if grid is None else grid
            ax.plot(points.numpy(), self.density(points, sigma).clamp_min(1e-12).numpy(), label=label, **line)
            ax.set_yscale("log")
            ax.set_xlabel("eigenvalue")
            ax.set_ylabel("density")
        else:
            floor = self.default_floor() if floor is None else floor
            if not floor > 0:
                raise ValueError(f"SpectralDensity: axis='log' needs a floor > 0, got {floor:g}. Use axis='linear'.")
            points = _log_grid(floor, self.largest) if grid is None else grid
            curve = self.log_density(points, floor)
            ax.plot(points.numpy(), curve.numpy(), label=f"{label} ({self.fraction_below(floor):.1%} below)", **line)
            ax.set_xscale("log")
            ax.set_xlabel("eigenvalue")
            ax.set_ylabel("density per decade")
        ax.legend()
        return ax


def _log_grid(floor: float, largest: float, num_points: int = 600) -> Tensor:
    low, high = math.log10(floor) - 4 * KERNEL_DECADES, math.log10(max(largest, floor)) + 4 * KERNEL_DECADES
    return torch.logspace(low, high, num_points, dtype=torch.float64)


def _broadened(nodes: Tensor, weights: Tensor, grid: Tensor, sigma: float) -> Tensor:
    """``Σ w_j N(grid; θ_j, σ²)``, a few thousand nodes at a time."""
    grid = grid.double().cpu()
    total = torch.zeros_like(grid)
    for start in range(0, len(nodes), 4096):
        scaled = (grid.unsqueeze(1) - nodes[start : start + 4096]) / sigma
        total += (-0.5 * scaled.square()).exp() @ weights[start : start + 4096]
    return total / (sigma * math.sqrt(2 * math.pi))
