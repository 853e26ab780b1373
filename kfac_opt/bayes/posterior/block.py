r"""One block of the posterior: the Gaussian over one layer's weight matrix (or over one bare parameter).

With the Fisher block :math:`F = (Q_A \otimes Q_G)\,\mathrm{diag}(\mathrm{vec}\,\lambda)\,(Q_A \otimes Q_G)^\top` the
covariance is diagonal in the same basis, so a draw, a log-density and a divergence are elementwise operations
between two rotations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kfac_opt._curvature.linalg import pi_correction
from kfac_opt._curvature.spectral import SpectralForm
from kfac_opt.layers.layout import MatrixLayout

PosteriorDamping = Literal["exact", "factored"]
DAMAGED = "The file is damaged or was changed: make the posterior again, or load an earlier file."


@dataclass(frozen=True)
class Width:
    """The numbers that set how wide the posterior is.

    Attributes:
        ess: effective sample size ``N / temperature``.
        prior_precision: ``1 / η`` of the prior ``N(0, η I)``.
        floor: added to every eigenvalue of the Fisher matrix in the covariance alone (absolute).
    """

    ess: float
    prior_precision: float = 1.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        for name, value, positive in (
            ("ess", self.ess, True),
            ("prior_precision", self.prior_precision, True),
            ("floor", self.floor, False),
        ):
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                raise ValueError(f"Posterior: {name} must be finite and {'> 0' if positive else '>= 0'}, got {value}")

    @property
    def delta(self) -> float:
        """``δ = prior_precision / ess``: the prior on the scale of the Fisher matrix."""
        return self.prior_precision / self.ess


@dataclass(frozen=True)
class PosteriorBlock:
    r"""Covariance of one layer's weights.

    Attributes:
        weight: name of the weight, or of the only parameter of the block.
        bias: name of the bias that is the matrix's last column, or None.
        layout: how both form a matrix ``[groups, out_dim, in_dim]``.
        form: the Fisher block.
        width: data size, prior and floor.
        damping: ``"exact"``: :math:`V_{ij} = 1 / (\mathrm{ess}\,(\lambda_{ij} + d))`, :math:`d = \delta +` floor;
            ``"factored"`` (for Kronecker blocks, whose eigenvalues are products :math:`\lambda^G_i \lambda^A_j`):
            :math:`V_{ij} = 1 / (\mathrm{ess}\,(\lambda^G_i + \sqrt d/\pi)(\lambda^A_j + \pi\sqrt d))`, as in Noisy
            K-FAC (Zhang et al. 2018, arXiv:1712.02390). It is too narrow in directions that neither factor
            determines, up to an order of magnitude, and therefore not the default.
        constant: row of an embedding's table that is no parameter, its ``padding_idx``, or None: it is not random.
    """

    weight: str
    bias: str | None
    layout: MatrixLayout
    form: SpectralForm
    width: Width
    damping: PosteriorDamping = "exact"
    constant: int | None = None

    def __post_init__(self) -> None:
        if tuple(self.form.eigenvalues.shape) != self.layout.shape:
            raise ValueError(
                f"Posterior: the block of '{self.weight}' has eigenvalues of shape "
                f"{list(self.form.eigenvalues.shape)}, its layout says {list(self.layout.shape)}."
            )
        if (self.bias is not None) != self.layout.has_bias:
            raise ValueError(
                f"Posterior: the block of '{self.weight}' has bias={self.bias!r}, but its layout has "
                f"has_bias={self.layout.has_bias}. Name the bias exactly when it is a column of the matrix."
            )

    @property
    def num_random(self) -> int:
        """Number of random weights."""
        row = 0 if self.constant is None else math.prod(self.layout.weight_shape[1:])
        return self.layout.numel - row

    def random_part(self, matrix: Tensor, elsewhere: float = 0.0) -> Tensor:
        """``matrix [groups, out_dim, in_dim]`` of weights, or of values in the eigenbasis, ``elsewhere`` where none is random."""
        if self.constant is None:
            return matrix
        # The input side of an embedding has no basis: its rows stay apart in the eigenbasis.
        constant = torch.zeros(self.layout.weight_shape, dtype=torch.bool, device=matrix.device)
        constant[self.constant] = True
        return matrix.masked_fill(self.layout.to_matrix(constant), elsewhere)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters of this block."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def spectrum(self) -> Tensor:
        """``V [groups, out_dim, in_dim]``: eigenvalues of the covariance."""
        d = self.width.delta + self.width.floor
        values = self.form.eigenvalues
        if self.damping == "exact":
            return (values + d).mul_(self.width.ess).reciprocal_()
        # Only the product of the two factors is known here, but V does not depend on how a constant is shared out.
        outputs, mean = values.mean(-1), values.mean((-1, -2))
        inputs = values.mean(-2) / torch.where(mean > 0, mean, 1.0).unsqueeze(-1)
        pi = pi_correction(inputs.mean(-1), outputs.mean(-1)).unsqueeze(-1)
        outputs, inputs = outputs + math.sqrt(d) / pi, inputs + math.sqrt(d) * pi
        return 1.0 / (self.width.ess * outputs.unsqueeze(-1) * inputs.unsqueeze(-2))

    @cached_property
    def deviation(self) -> Tensor:
        """``√V [groups, out_dim, in_dim]``."""
        return self.random_part(self.spectrum.sqrt())

    def whiten(self, deviation: Tensor) -> Tensor:
        """A deviation from the mean as the independent standard normal numbers that a draw would make it of."""
        return self.form.rotate(self.random_part(deviation)) / self.spectrum.sqrt()

    def log_determinant(self) -> Tensor:
        """Of the covariance, 0-dim float64."""
        return self.random_part(self.spectrum.double(), 1.0).log().sum()

    def marginal_variance(self) -> Tensor:
        """Diagonal of the covariance, ``[groups, out_dim, in_dim]``."""
        return replace(self.form, eigenvalues=self.random_part(self.spectrum)).diagonal()

    def with_width(self, width: Width) -> PosteriorBlock:
        """The same Fisher block under another data size, prior or floor."""
        return replace(self, width=width)

    def map(self, function: Callable[[Tensor], Tensor]) -> PosteriorBlock:
        """The block with ``function`` applied to every tensor."""
        form = self.form
        bases = [None if basis is None else function(basis) for basis in (form.output_basis, form.input_basis)]
        return replace(self, form=SpectralForm(bases[0], bases[1], function(form.eigenvalues)))

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and words."""
        return {
            "weight": self.weight,
            "bias": self.bias,
            "layout": self.layout.describe(),
            "output_basis": self.form.output_basis,
            "input_basis": self.form.input_basis,
            "eigenvalues": self.form.eigenvalues,
            "damping": self.damping,
            "constant": self.constant,
            "ess": self.width.ess,
            "prior_precision": self.width.prior_precision,
            "floor": self.width.floor,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> PosteriorBlock:
        """The block that :meth:`state_dict` wrote down.

        Raises:
            ValueError: for what is missing, and for what could not be drawn from.
        """
        layout = _checked(state)
        return cls(
            weight=state["weight"],
            bias=state["bias"],
            layout=layout,
            form=SpectralForm(state["output_basis"], state["input_basis"], state["eigenvalues"]),
            width=Width(state["ess"], state["prior_precision"], state["floor"]),
            damping=state["damping"],
            constant=state.get("constant"),
        )


def _checked(state: dict[str, Any]) -> MatrixLayout:
    """The layout of a saved block, if everything beside it can be used."""
    where = f"Posterior: the saved block of {state.get('weight')!r}"
    needed = {"weight", "bias", "layout", "output_basis", "input_basis", "eigenvalues", "damping", "ess", "prior_precision"}
    missing = sorted({*needed, "floor"} - state.keys())
    if missing:
        raise ValueError(f"{where} lacks {missing}. {DAMAGED}")
    if state["damping"] not in get_args(PosteriorDamping):
        raise ValueError(
            f"{where}: damping must be one of {list(get_args(PosteriorDamping))}, got {state['damping']!r}. {DAMAGED}"
        )
    try:
        layout = MatrixLayout(**{**state["layout"], "weight_shape": tuple(state["layout"]["weight_shape"])})
        groups, out_dim, in_dim = layout.shape
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{where}: {state['layout']!r} is no layout ({error}). {DAMAGED}") from error
    expected = {
        "eigenvalues": (groups, out_dim, in_dim),
        "output_basis": (groups, out_dim, out_dim),
        "input_basis": (groups, in_dim, in_dim),
    }
    for key, shape in expected.items():
        value = state[key]
        if value is None and key != "eigenvalues":
            continue
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{where}: {key!r} is {found}, its layout says {list(shape)}. {DAMAGED}")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{where}: {key!r} is not finite. {DAMAGED}")
    if bool((state["eigenvalues"] < 0).any()):
        raise ValueError(f"{where}: 'eigenvalues' has negative entries, so that there is no covariance. {DAMAGED}")
    return layout


def uncurved_block(name: str, parameter: Tensor, width: Width, constant: int | None = None) -> PosteriorBlock:
    """Block of a parameter without curvature: its Fisher is zero, its variance that of the prior (less the floor)."""
    layout = MatrixLayout("flat", tuple(parameter.shape))
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    zeros = torch.zeros(layout.shape, dtype=dtype, device=parameter.device)
    return PosteriorBlock(name, None, layout, SpectralForm(None, None, zeros), width, constant=constant)
