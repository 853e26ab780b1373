r"""What the curvature of one step has to be, from plain autograd: no hook, factor or layer of the package is used.

The network runs example by example (as one batch where examples mix). Hooks record each call's input and put a copy in the
place of its output, so that nothing overwrites what is recorded. For each column of output gradients (of a sampled label, of
the data's, of the root of the output Hessian) autograd gives the gradient in the outputs of all calls and in all parameters.
Rows are read off by loops (``layers``).

``N`` terms of the loss, ``R`` rows of a layer, over all passes of the step:
:math:`A = \frac1N \sum a a^\top`, :math:`G = \frac1R \sum_{\text{columns}} \sum g g^\top`; EKFAC's scales and the moments of norm
layers are sums of squares of per-example gradients over ``N``, diagonals those of the gradient of a pass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.fixed import OBSERVED, SAMPLED, class_dimension, labels, signs
from tests.fuzz.layers import MATRICES, NORMS, call_rows, matrix, unbatched
from tests.fuzz.nets import Case


@dataclass
class Expected:
    """Sums of one block over the passes of a step.

    Attributes:
        inputs, outputs: ``Σ a aᵀ``, ``Σ g gᵀ`` ``[groups, ·, ·]``.
        rows: ``R``.
        examples: gradients of single examples as matrices ``[out, in]``, one for each column; None where not defined.
        diagonal: sum of squares of the gradient of the whole pass, for parameters of their own.
    """

    inputs: Tensor | float = 0.0
    outputs: Tensor | float = 0.0
    rows: int = 0
    examples: list[Tensor] | None = field(default_factory=list)
    diagonal: Tensor | float = 0.0


@dataclass
class Truth:
    """Everything that one step must know: blocks by name, the number of terms, the gradient of the loss."""

    blocks: dict[str, Expected]
    terms: int
    gradients: dict[str, Tensor]


def block_names(model: nn.Module) -> dict[str, nn.Module | None]:
    """Names of the blocks that a model must have: layers whose forward shows all that their weight does, else parameters."""
    apart = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention) or getattr(m, "flat", False)]
    inside = {id(part) for m in apart for part in m.modules()}
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (*MATRICES, *NORMS)) and id(module) not in inside and module.weight.requires_grad
    }
    covered = {id(p) for module in layers.values() for p in module.parameters()}
    alone = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in covered]
    return {**layers, **dict.fromkeys(alone)}


def truth(case: Case, fisher: str, sharing: str) -> Truth:
    """The reference for one step of ``fisher`` on all passes of ``case``."""
    names = block_names(case.model)
    found = {name: Expected() for name in names}
    model = copy.deepcopy(case.model)
    terms = sum(num_terms(case, number, model) for number in range(len(case.inputs)))
    for number, x in enumerate(case.inputs):
        examples = [slice(None)] if case.mixes else [slice(n, n + 1) for n in range(len(x))]
        for where in examples:
            _add_run(found, model, case, number, where, fisher, sharing)
        _add_diagonals(found, model, case, number, fisher)
    model = copy.deepcopy(case.model)
    for number, x in enumerate(case.inputs):
        (mean_loss(case, number, model(x), terms)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return Truth(found, terms, gradients)


# ---------------------------------------------------------------------------------------------
# Losses and columns


def num_terms(case: Case, number: int, model: nn.Module) -> int:
    """Terms of the loss of one pass."""
    if case.masks is not None:
        return int(case.masks[number].sum())
    logits = copy.deepcopy(model)(case.inputs[number])
    return logits.numel() // logits.shape[class_dimension(logits)] if case.likelihood == "categorical" else len(logits)


def total_loss(kind: str, variance: float, logits: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
    """Sum of the negative log-likelihoods; a Gaussian's targets are given relative to the outputs."""
    if kind == "categorical":
        losses = F.cross_entropy(logits.movedim(class_dimension(logits), 1), targets, reduction="none")
        return losses.sum() if mask is None else losses[mask].sum()
    if kind == "bernoulli":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    noise = targets * variance**0.5
    return 0.5 * (logits - (logits.detach() + noise)).square().sum() / variance


def mean_loss(case: Case, number: int, logits: Tensor, terms: int) -> Tensor:
    """The user's: its share of the mean over all ``terms`` of the step."""
    targets = labels(case.likelihood, logits, OBSERVED)
    mask = None if case.masks is None else case.masks[number]
    return total_loss(case.likelihood, case.variance, logits, targets, mask) / terms


def root(kind: str, variance: float, logits: Tensor) -> list[Tensor]:
    """Columns ``L_k`` with ``Σ_k L_k L_kᵀ`` the Hessian of every term, in the shape of the outputs."""
    logits = logits.detach()
    if kind == "categorical":
        dim = class_dimension(logits)
        p = logits.softmax(dim).movedim(dim, -1)
        tail = p.flip(-1).cumsum(-1).flip(-1)
        columns = []
        for j in range(p.shape[-1] - 1):
            column = torch.zeros_like(p)
            column[..., j] = (p[..., j] * tail[..., j + 1] / tail[..., j]).sqrt()
            column[..., j + 1 :] = -p[..., j + 1 :] * (p[..., j] / (tail[..., j] * tail[..., j + 1])).sqrt().unsqueeze(-1)
            columns.append(column.movedim(-1, dim))
        return columns
    p = logits.sigmoid()
    deviation = (p * (1 - p)).sqrt() if kind == "bernoulli" else torch.full_like(p, variance**-0.5)
    return [deviation * torch.eye(logits.shape[1])[k] for k in range(logits.shape[1])]


def scores(case: Case, number: int, logits: Tensor, where: slice, fisher: str) -> list[Tensor]:
    """Scalars whose gradients are the columns, for the examples ``where`` of the pass, of which ``logits`` are the outputs."""
    whole = logits.new_zeros(len(case.inputs[number]), *logits.shape[1:])
    mask = None if case.masks is None else case.masks[number][where]
    if fisher != "exact":
        targets = labels(case.likelihood, whole, SAMPLED if fisher == "mc" else OBSERVED)[where]
        return [total_loss(case.likelihood, case.variance, logits, targets, mask)]
    found = []
    for k, column in enumerate(root(case.likelihood, case.variance, logits)):
        sign = signs(case.likelihood, whole, k)[where]
        if mask is not None:
            sign = sign * mask
        if case.likelihood == "categorical":
            sign = sign.unsqueeze(class_dimension(logits))
        found.append((logits * column * sign.reshape(*sign.shape, *[1] * (logits.dim() - sign.dim()))).sum())
    return found


# ---------------------------------------------------------------------------------------------
# One run of the network


class Recorder:
    """Inputs and outputs of every call of the layers that have a block."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.handles = []
        for name, module in block_names(model).items():
            if module is not None:
                self.handles.append(module.register_forward_hook(self._hook(name)))

    def _hook(self, name: str):
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            self.calls.setdefault(name, []).append((args[0].detach().clone(), output))
            copied = output.clone()
            # torch's backward of InstanceNorm is wrong for one example whose gradient lies channels-last in memory.
            copied.register_hook(lambda gradient: gradient.contiguous())
            return copied

        return hook

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _add_run(
    found: dict[str, Expected], model: nn.Module, case: Case, number: int, where: slice, fisher: str, sharing: str
) -> None:
    """Adds the examples ``where`` of one pass to all blocks of layers."""
    x = case.inputs[number][where]
    recorder = Recorder(model)
    logits = model(x)
    recorder.remove()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    layers = {name: module for name, module in block_names(model).items() if module is not None and name in recorder.calls}
    columns: list[dict[str, list[tuple[Tensor, Tensor, Tensor]]]] = []  # of each column the calls of each layer
    for score in scores(case, number, logits, where, fisher):
        outputs = [output for name in layers for _, output in recorder.calls[name]]
        gradients = iter(torch.autograd.grad(score, [*outputs, *named.values()], retain_graph=True, allow_unused=True))
        at_calls = {name: [(a, _or_zero(g, out), out) for (a, out), g in zip(recorder.calls[name], gradients)] for name in layers}
        at_parameters = dict(zip((id(p) for p in named.values()), gradients))
        columns.append(at_calls)
        for name, module in layers.items():
            if case.mixes:
                examples = list(example_matrices(module, at_calls[name], len(x)))
            else:
                examples = [matrix(module, lambda p, found=at_parameters: _or_zero(found[id(p)], p))]
            if found[name].examples is not None:
                found[name].examples = found[name].examples + examples if examples else None
    for name, module in layers.items():
        if isinstance(module, NORMS):
            continue
        for number_of_call, (a, _) in enumerate(recorder.calls[name]):
            arrived = [at_calls[name][number_of_call][1] for at_calls in columns]
            _add_call(found[name], module, a, arrived, len(x), sharing, masked=case.masks is not None)


def _or_zero(gradient: Tensor | None, of: Tensor) -> Tensor:
    return torch.zeros_like(of) if gradient is None else gradient


def _add_call(
    block: Expected, module: nn.Module, x: Tensor, gradients: list[Tensor], batch: int, sharing: str, *, masked: bool
) -> None:
    """Adds the rows of one call, with the output gradients of all columns.

    Under a mask a row that no column reaches (padding) is no row of the layer.
    """
    rows = [call_rows(module, x, g) for g in gradients]
    a, g = rows[0][0], torch.stack([g_rows for _, g_rows in rows])  # [leading, positions, groups, .], columns in front of g
    keep = g.flatten(3).abs().sum((0, -1)) > 0 if masked else torch.ones(a.shape[:2], dtype=torch.bool)
    if sharing == "reduce":
        if len(a) % batch:
            return
        a, keep, g = a.reshape(batch, -1, *a.shape[2:]), keep.reshape(batch, -1), g.reshape(len(g), batch, -1, *g.shape[3:])
        a = (a * keep[..., None, None]).sum(1, keepdim=True) / keep.sum(1).clamp_min(1).reshape(-1, 1, 1, 1)
        g, keep = g.sum(2, keepdim=True), keep.any(1, keepdim=True)
    a_rows = a[keep].transpose(0, 1)
    block.inputs = block.inputs + a_rows.mT @ a_rows
    block.rows += a_rows.shape[1]
    for column in g:
        g_rows = column[keep].transpose(0, 1)
        block.outputs = block.outputs + g_rows.mT @ g_rows


def example_matrices(module: nn.Module, calls: list[tuple[Tensor, Tensor, Tensor]], batch: int) -> Iterator[Tensor]:
    """Gradient of each example's rows ``[out, in]``, batch-major; nothing where the rows cannot be told apart."""
    if any(unbatched(module, x) or len(x) % batch for x, _, _ in calls):
        return
    for n in range(batch):
        total: Tensor | float = 0.0
        for x, g, out in calls:
            share = slice(n * len(x) // batch, (n + 1) * len(x) // batch)
            if isinstance(module, NORMS):
                total = total + _norm_gradient(module, g[share], out[share].detach())
                continue
            a_rows, g_rows = call_rows(module, x[share], g[share])
            total = total + torch.einsum("lpgo,lpgi->goi", g_rows, a_rows).flatten(0, 1)
        assert isinstance(total, Tensor)
        yield total


def _norm_gradient(module: nn.Module, g: Tensor, out: Tensor) -> Tensor:
    """``(Σ g x̂, Σ g)`` per channel; the layer's output tells what it normalized to."""
    last = isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    shape = module.weight.shape if last else (-1, *[1] * (out.dim() - 2))
    bias = getattr(module, "bias", None)
    shift = 0.0 if bias is None else bias.detach().reshape(shape)
    normalized = (out - shift) / module.weight.detach().reshape(shape)
    sums = [g * normalized, g] if bias is not None and bias.requires_grad else [g * normalized]
    if last:
        return torch.stack([s.flatten(0, s.dim() - module.weight.dim() - 1).sum(0).flatten() for s in sums], dim=-1)
    return torch.stack([s.transpose(0, 1).flatten(1).sum(1) for s in sums], dim=-1)


def _add_diagonals(found: dict[str, Expected], model: nn.Module, case: Case, number: int, fisher: str) -> None:
    """Parameters of their own: the square of the gradient of the whole pass, column by column."""
    names = [name for name, module in block_names(model).items() if module is None]
    if not names:
        return
    logits = model(case.inputs[number])
    parameters = [model.get_parameter(name) for name in names]
    for score in scores(case, number, logits, slice(None), fisher):
        gradients = torch.autograd.grad(score, parameters, retain_graph=True, allow_unused=True)
        for name, p, g in zip(names, parameters, gradients):
            found[name].diagonal = found[name].diagonal + _or_zero(g, p).square()
