"""Random networks against per-example autograd: factors, scales, diagonals and directions, number by number."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kfac_opt import KFAC
from tests.fuzz.brute import NORMS, Truth, block_names, mean_loss, truth
from tests.fuzz.fixed import fixed_likelihood
from tests.fuzz.nets import Case, cases
from tests.quiet import beyond_announcements, own_warnings
from tests.reference import dense_solve, factored_solve, module_matrix, weight_matrix
from tests.support import bare_kfac

TOLERANCE = 1e-8  # eps times condition numbers below 1e5 times sums of 1e2 terms
NOISE = 1e-4  # times the tolerance, of the largest number of its kind in the net: below is the rounding of what is zero
UNKNOWN_EXAMPLES = r"example"  # said where a layer does not hold its examples along the first dimension


@dataclass(frozen=True)
class Setting:
    """What the optimizer is asked for."""

    fisher: str
    curvature: str
    style: str
    sharing: str
    label_samples: int
    damping: float
    through: str  # the logits are the model's output, or picked by outputs=, which also hands over the mask


PRECONDITIONERS = [
    ("kronecker", "factored"),
    ("kronecker", "exact"),
    ("kronecker", "split"),
    ("eigenbasis", "exact"),
    ("diagonal", "factored"),
]


@st.composite
def optimizer_settings(draw) -> Setting:
    fisher = draw(st.sampled_from(["mc", "exact", "empirical"]))
    curvature, style = draw(st.sampled_from(PRECONDITIONERS))
    sharing = draw(st.sampled_from(["expand", "expand", "reduce"]))
    through = draw(st.sampled_from(["tensor", "tensor", "outputs"]))
    samples = draw(st.sampled_from([1, 2])) if fisher == "mc" else 1
    return Setting(fisher, curvature, style, sharing, samples, draw(st.sampled_from([1e-2, 1.0])), through)


FUZZ = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
}


@settings(max_examples=70, **FUZZ)
@given(cases(), optimizer_settings())
def test_curvature_and_directions_of_random_nets(case, setting):
    check(case, setting)


@settings(max_examples=20, **FUZZ)
@given(cases(masked=True), optimizer_settings())
def test_curvature_and_directions_of_random_nets_with_masked_terms(case, setting):
    check(case, setting)


@pytest.mark.slow
@settings(max_examples=1000, **FUZZ)
@given(cases(), optimizer_settings())
def test_curvature_and_directions_of_many_random_nets(case, setting):
    check(case, setting)


@pytest.mark.slow
@settings(max_examples=200, **FUZZ)
@given(cases(masked=True), optimizer_settings())
def test_curvature_and_directions_of_many_random_nets_with_masked_terms(case, setting):
    check(case, setting)


# ---------------------------------------------------------------------------------------------


def check(case: Case, setting: Setting) -> None:
    """A step of a bare KFAC with ``lr=1`` on the passes of ``case``, against the reference.

    A step with ``lr=0`` comes before it: what a layer's weight does beside its forward shows in it, and all else repeats.
    """
    note(f"{case.model}\ninputs {[tuple(x.shape) for x in case.inputs]}, {case.likelihood}, masks {case.masks}, {setting}")
    expected = truth(case, setting.fisher, setting.sharing)
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    mask: list[Tensor] = []
    pick = {"tensor": None, "outputs": lambda logits: (logits, mask[-1]) if mask else logits}[setting.through]
    with own_warnings() as said:
        optimizer = bare_kfac(
            case.model,
            fisher=setting.fisher,
            curvature=setting.curvature,
            damping_style=setting.style,
            weight_sharing=setting.sharing,
            label_samples=setting.label_samples,
            damping=setting.damping,
            factor_decay=0.0,  # the last estimate alone: bases of degenerate factors may differ between the steps
            likelihood=fixed_likelihood(case.likelihood, case.variance),
            outputs=pick,
        )
        for lr in (0.0, 1.0):
            optimizer.param_groups[0]["lr"] = lr
            run(optimizer, case, expected, mask if setting.through == "outputs" else None)
            check_gradients(case.model, expected.gradients)
    directions = {name: before[name] - p.detach() for name, p in case.model.named_parameters()}
    unexpected = beyond_announcements(said, [UNKNOWN_EXAMPLES] if case.unaligned else [])
    assert not unexpected, unexpected
    check_blocks(optimizer, case, setting, expected, directions)


def run(optimizer: KFAC, case: Case, expected: Truth, handed_over: list[Tensor] | None) -> None:
    """One step; masks go into ``handed_over`` if it is there, else through ``masked``."""
    optimizer.zero_grad()
    for number, x in enumerate(case.inputs):
        mask = None if case.masks is None else case.masks[number]
        if handed_over is not None and mask is not None:
            handed_over.append(mask)
        with nullcontext() if mask is None or handed_over is not None else optimizer.masked(mask):
            logits = case.model(x)
        mean_loss(case, number, logits, expected.terms).backward()
    optimizer.step()
    assert optimizer.dropped_estimates == 0


def check_gradients(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """The user's gradients are those of the model alone, bit for bit."""
    for name, p in model.named_parameters():
        if p.grad is None:
            assert expected[name] is None, name
        else:
            assert torch.equal(p.grad, expected[name]), name


def check_blocks(optimizer: KFAC, case: Case, setting: Setting, expected: Truth, directions: dict[str, Tensor]) -> None:
    names = block_names(case.model)
    if setting.curvature == "diagonal":
        names = {name: None for name, p in case.model.named_parameters() if p.requires_grad}
    assert set(optimizer.curvature) == set(names)
    largest = Largest()
    checks = []
    for name, module in names.items():
        if module is None:
            checks += diagonal_checks(optimizer, name, case, setting, expected, directions)
        elif name in case.unaligned and (setting.sharing == "reduce" or isinstance(module, NORMS)):
            continue
        elif isinstance(module, NORMS):
            checks += norm_checks(optimizer, name, module, setting, expected, directions)
        else:
            checks += matrix_checks(optimizer, name, module, case, setting, expected, directions)
    for kind, _, _, wanted in checks:
        largest.see(kind, wanted)
    for kind, where, actual, wanted in checks:
        assert actual.shape == wanted.shape, (where, kind, actual.shape, wanted.shape)
        atol = max(TOLERANCE * float(wanted.abs().max()), NOISE * TOLERANCE * largest.of[kind], 1e-300)
        worst = float((actual - wanted).abs().max())
        assert worst <= atol, f"{where}: {kind} off by {worst:.3g} of {float(wanted.abs().max()):.3g} (allowed {atol:.3g})"


class Largest:
    """The largest number of each kind in the net."""

    def __init__(self) -> None:
        self.of: dict[str, float] = {}

    def see(self, kind: str, value: Tensor) -> None:
        self.of[kind] = max(self.of.get(kind, 0.0), float(value.abs().max()))


Check = tuple[str, str, Tensor, Tensor]  # kind, name of the block, found, expected


def diagonal_checks(
    optimizer: KFAC, name: str, case: Case, setting: Setting, expected: Truth, directions: dict[str, Tensor]
) -> list[Check]:
    gradient = expected.gradients[name]
    if setting.curvature == "diagonal" and name not in expected.blocks:
        return []  # the reference has the sums of layers there
    if setting.fisher == "empirical":
        diagonal = expected.terms * gradient**2
    else:
        diagonal = expected.blocks[name].diagonal / expected.terms
    view = optimizer.curvature[name]
    direction = gradient / (diagonal + setting.damping)
    return [("diagonal", name, view.diagonal, diagonal), ("diagonal direction", name, directions[name], direction)]


def norm_checks(
    optimizer: KFAC, name: str, module: nn.Module, setting: Setting, expected: Truth, directions: dict[str, Tensor]
) -> list[Check]:
    block = expected.blocks[name]
    assert block.examples is not None
    rows = torch.stack(block.examples)  # [examples · columns, channels, 1 or 2]
    moment = torch.einsum("nci,ncj->cij", rows, rows) / expected.terms
    channels, columns = rows.shape[1:]
    dense = torch.zeros(columns, channels, columns, channels, dtype=rows.dtype)
    for c in range(channels):
        dense[:, c, :, c] = moment[c]
    gradient = module_matrix(module, lambda p: p.grad)
    damped = moment + setting.damping * torch.eye(columns, dtype=rows.dtype)
    direction = torch.linalg.solve(damped, gradient.unsqueeze(-1)).squeeze(-1)
    found = matrix_of(module, name, directions)
    size = columns * channels
    return [
        ("moment", name, optimizer.curvature[name].to_dense(), dense.reshape(size, size)),
        ("norm direction", name, found, direction),
    ]


def matrix_checks(
    optimizer: KFAC, name: str, module: nn.Module, case: Case, setting: Setting, expected: Truth, directions: dict[str, Tensor]
) -> list[Check]:
    block, view = expected.blocks[name], optimizer.curvature[name]
    input_factor, output_factor = block.inputs / expected.terms, block.outputs / block.rows
    found_inputs, found_outputs = view.input_factor, view.output_factor
    if len(input_factor) == 1:
        found_inputs, found_outputs = found_inputs.unsqueeze(0), found_outputs.unsqueeze(0)
    if isinstance(module, nn.Embedding):
        input_factor = torch.diag_embed(input_factor.diagonal(dim1=-2, dim2=-1))
        found_inputs = torch.diag_embed(found_inputs)
    checks = [("A", name, found_inputs, input_factor), ("G", name, found_outputs, output_factor)]
    gradient = module_matrix(module, lambda p: p.grad)
    groups = len(input_factor)
    parts = gradient.unflatten(0, (groups, -1))
    direction = matrix_of(module, name, directions)
    if setting.curvature == "eigenbasis":
        return checks + scale_checks(view, name, case, setting, expected, parts, direction)
    solve = kronecker_solve if setting.style == "exact" else split_solve
    wanted = torch.cat([solve(a, g, setting.damping, v) for a, g, v in zip(input_factor, output_factor, parts)])
    return [*checks, ("direction", name, direction, wanted)]


def scale_checks(view, name: str, case: Case, setting: Setting, expected: Truth, parts: Tensor, direction: Tensor) -> list[Check]:
    """In the basis that the optimizer found, which has to diagonalize the factors."""
    block = expected.blocks[name]
    if setting.sharing == "reduce" or block.examples is None or name in case.unaligned:
        return []
    form = view.spectral_form()
    groups, out_dim, in_dim = form.eigenvalues.shape
    eye = {n: torch.eye(n, dtype=parts.dtype).expand(groups, n, n) for n in (out_dim, in_dim)}
    q_out = eye[out_dim] if form.output_basis is None else form.output_basis
    q_in = eye[in_dim] if form.input_basis is None else form.input_basis
    checks = []
    for side, basis, factor in (("A", q_in, block.inputs / expected.terms), ("G", q_out, block.outputs / block.rows)):
        turned = basis.mT @ factor @ basis
        off_diagonal = turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))
        checks.append((side, name, factor + off_diagonal, factor))
        checks.append(("basis", name, basis.mT @ basis, eye[basis.shape[-1]]))
    turned = torch.stack([q_out.mT @ m.unflatten(0, (groups, -1)) @ q_in for m in block.examples])
    scales = turned.square().sum(0) / expected.terms
    wanted = q_out @ ((q_out.mT @ parts @ q_in) / (scales + setting.damping)) @ q_in.mT
    return [*checks, ("scales", name, form.eigenvalues, scales), ("direction", name, direction, wanted.flatten(0, 1))]


def kronecker_solve(input_factor: Tensor, output_factor: Tensor, damping: float, gradient: Tensor) -> Tensor:
    return dense_solve(torch.kron(input_factor, output_factor), damping, gradient)


def split_solve(input_factor: Tensor, output_factor: Tensor, damping: float, gradient: Tensor) -> Tensor:
    """By π; a side without any curvature leaves ``V / γ``."""
    if min(float(input_factor.trace()), float(output_factor.trace())) == 0.0:
        return gradient / damping
    return factored_solve(input_factor, output_factor, damping, gradient)


def matrix_of(module: nn.Module, name: str, tensors: dict[str, Tensor]) -> Tensor:
    """The layer's weight and bias among ``tensors`` by name, as a matrix."""
    bias = getattr(module, "bias", None)
    trained = bias is not None and bias.requires_grad
    return weight_matrix(module, tensors[f"{name}.weight"], tensors[f"{name}.bias"] if trained else None)
