"""Every number of an optimizer's curvature and every direction of its step, beside the reference's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfac_opt import KFAC
from kfac_opt._step.views import CurvatureView
from tests.fuzz import directions
from tests.fuzz.brute import Expected, Truth, block_names
from tests.fuzz.layers import NORMS, matrix
from tests.fuzz.nets import Case

TOLERANCE = 1e-8  # eps times condition numbers below 1e5 times sums of 1e2 terms
NOISE = 1e-4  # times the tolerance, of the largest number of its kind in the net: below is the rounding of what is zero
ZERO = 1e-9  # of the largest gradient in the net: what a relative damping would make of the rounding of zero is not compared

Check = tuple[str, str, Tensor, Tensor]  # kind, name of the block, found, expected


@dataclass(frozen=True)
class Setting:
    """What the optimizer is asked for."""

    fisher: str
    curvature: str
    style: str
    sharing: str
    label_samples: int
    damping: float
    scale: str
    power: float
    through: str  # the logits are the model's output, or picked by outputs=, which also hands over the mask

    def in_force(self, tau: float) -> float:
        return directions.damping_in_force(self.damping, self.scale, tau)


class Comparison:
    """The blocks of one step.

    Args:
        moved: what the step subtracted from each parameter, by name.
    """

    def __init__(self, optimizer: KFAC, case: Case, setting: Setting, truth: Truth, moved: dict[str, Tensor]) -> None:
        self.optimizer, self.case, self.setting, self.truth, self.moved = optimizer, case, setting, truth, moved
        self.largest_gradient = max(float(g.abs().max()) for g in truth.gradients.values() if g is not None)

    def run(self) -> None:
        """Raises AssertionError, with the block and the kind of number, for the first that is off."""
        names = block_names(self.case.model)
        if self.setting.curvature == "diagonal":
            names = {name: None for name, p in self.case.model.named_parameters() if p.requires_grad}
        assert set(self.optimizer.curvature) == set(names), (list(self.optimizer.curvature), list(names))
        checks = [check for name, module in names.items() for check in self._block(name, module)]
        largest: dict[str, float] = {}
        for kind, _, _, wanted in checks:
            largest[kind] = max(largest.get(kind, 0.0), float(wanted.abs().max()))
        for kind, name, found, wanted in checks:
            assert found.shape == wanted.shape, (name, kind, found.shape, wanted.shape)
            size = float(wanted.abs().max())
            allowed = max(TOLERANCE * size, NOISE * TOLERANCE * largest[kind], 1e-300)
            worst = float((found - wanted).abs().max())
            assert worst <= allowed, f"{name}: {kind} off by {worst:.3g} of {size:.3g} (allowed {allowed:.3g})"

    def _block(self, name: str, module: nn.Module | None) -> list[Check]:
        if module is None:
            return self._diagonal(name)
        unaligned = name in self.case.unaligned
        if unaligned and (self.setting.sharing == "reduce" or isinstance(module, NORMS)):
            return []
        return self._norm(name, module) if isinstance(module, NORMS) else self._matrix(name, module)

    def _direction(self, name: str, gradient: Tensor, found: Tensor, wanted: Tensor) -> list[Check]:
        if self.setting.scale == "relative" and float(gradient.abs().max()) < ZERO * self.largest_gradient:
            return []
        # Relative damping gives every layer a size of its own; an absolute one leaves noise small beside the others.
        kind = f"direction of '{name}'" if self.setting.scale == "relative" else "direction"
        return [(kind, name, found, wanted)]

    # -- blocks -------------------------------------------------------------------------------------------------

    def _diagonal(self, name: str) -> list[Check]:
        gradient = self.truth.gradients[name]
        if name not in self.truth.blocks:
            return []  # curvature="diagonal": the reference has the sums of the layer that the parameter belongs to
        if self.setting.fisher == "empirical":
            diagonal = self.truth.terms * gradient**2
        else:
            diagonal = self.truth.blocks[name].diagonal / self.truth.terms
        gamma = self.setting.in_force(float(diagonal.mean()) * diagonal.numel() ** 0.5)
        wanted = gradient / (diagonal + gamma) ** self.setting.power
        found = self.optimizer.curvature[name].diagonal
        return [("diagonal", name, found, diagonal), *self._direction(name, gradient, self.moved[name], wanted)]

    def _norm(self, name: str, module: nn.Module) -> list[Check]:
        block = self.truth.blocks[name]
        assert block.examples is not None
        rows = torch.stack(block.examples)  # [examples · columns, channels, 1 or 2]
        moment = torch.einsum("nci,ncj->cij", rows, rows) / self.truth.terms
        channels, columns = rows.shape[1:]
        dense = torch.zeros(columns, channels, columns, channels, dtype=rows.dtype)
        for c in range(channels):
            dense[:, c, :, c] = moment[c]
        dense = dense.reshape(columns * channels, columns * channels)
        gamma = self.setting.in_force(float(dense.diagonal().mean()) * len(dense) ** 0.5)
        gradient = self._of(name, module, self.truth.gradients)
        wanted = (directions.power_of(moment, gamma, self.setting.power) @ gradient.unsqueeze(-1)).squeeze(-1)
        found = self.optimizer.curvature[name].to_dense()
        return [("moment", name, found, dense), *self._direction(name, gradient, self._of(name, module, self.moved), wanted)]

    def _matrix(self, name: str, module: nn.Module) -> list[Check]:
        block, view = self.truth.blocks[name], self.optimizer.curvature[name]
        a, g = block.inputs / self.truth.terms, block.outputs / block.rows
        found_a, found_g = view.input_factor, view.output_factor
        if len(a) == 1:
            found_a, found_g = found_a.unsqueeze(0), found_g.unsqueeze(0)
        if isinstance(module, nn.Embedding):
            a, found_a = torch.diag_embed(a.diagonal(dim1=-2, dim2=-1)), torch.diag_embed(found_a)
        gamma = self.setting.in_force(directions.matrix_scale(a, g))
        gradient, found = self._of(name, module, self.truth.gradients), self._of(name, module, self.moved)
        parts = gradient.unflatten(0, (len(a), -1))
        checks = [("A", name, found_a, a), ("G", name, found_g, g)]
        if self.setting.curvature == "eigenbasis":
            if self.setting.sharing == "reduce" or block.examples is None or name in self.case.unaligned:
                return checks
            checks, wanted = self._scales(name, view, block, a, g, parts, gamma)
        else:
            solve = directions.exact if self.setting.style == "exact" else directions.split
            groups = zip(a, g, parts)
            wanted = torch.cat([solve(one, other, gamma, self.setting.power, part) for one, other, part in groups])
        return [*checks, *self._direction(name, gradient, found, wanted)]

    def _scales(
        self, name: str, view: CurvatureView, block: Expected, a: Tensor, g: Tensor, parts: Tensor, gamma: float
    ) -> tuple[list[Check], Tensor]:
        """In the basis that the optimizer found, which has to diagonalize the factors."""
        form = view.spectral_form()
        groups, out_dim, in_dim = form.eigenvalues.shape
        eye = {n: torch.eye(n, dtype=parts.dtype).expand(groups, n, n) for n in (out_dim, in_dim)}
        q_out = eye[out_dim] if form.output_basis is None else form.output_basis
        q_in = eye[in_dim] if form.input_basis is None else form.input_basis
        checks: list[Check] = []
        for side, basis, factor in (("A", q_in, a), ("G", q_out, g)):
            turned = basis.mT @ factor @ basis
            off_diagonal = turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))
            checks.append((side, name, factor + off_diagonal, factor))
            checks.append(("basis", name, basis.mT @ basis, eye[basis.shape[-1]]))
        assert block.examples is not None
        turned = torch.stack([q_out.mT @ one.unflatten(0, (groups, -1)) @ q_in for one in block.examples])
        scales = turned.square().sum(0) / self.truth.terms
        checks.append(("scales", name, form.eigenvalues, scales))
        divided = (q_out.mT @ parts @ q_in) / (scales + gamma) ** self.setting.power
        return checks, (q_out @ divided @ q_in.mT).flatten(0, 1)

    def _of(self, name: str, module: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        """The layer's weight and bias among ``tensors`` by name, as a matrix."""
        names = {id(p): f"{name}.{key}" for key, p in module.named_parameters()}
        return matrix(module, lambda p: tensors[names[id(p)]])
