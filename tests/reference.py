r"""Brute-force references that share no code with the package.

Everything here is a plain loop over examples, outputs and positions in the dtype of the model
(float64 in the tests). The per-example Jacobian of each output is one ``torch.autograd.grad``;
convolution patches are read off index by index; inverses are dense solves.

A layer's weight is the matrix ``W [out_dim, in_dim]``, its bias the last column, ``vec`` stacks
columns. ``N`` counts the terms in the mean of the loss, ``H`` is the Hessian of one term's negative
log-likelihood in the outputs, so that the Fisher block of a layer is
:math:`F = \frac1N \sum_n J_n^\top H_n J_n` with the Jacobian ``J_n`` of example ``n``'s outputs.

Call these functions before an optimizer is attached to the model: their forwards would count.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Sharing = str
"""``"expand"`` or ``"reduce"``."""


# ---------------------------------------------------------------------------------------------
# Likelihoods


def term_hessian(likelihood: str, outputs: Tensor, variance: float = 1.0) -> Tensor:
    """Hessian ``[outputs, outputs]`` of the negative log-likelihood of one term in its outputs."""
    if likelihood == "categorical":
        p = outputs.softmax(-1)
        return torch.diag(p) - torch.outer(p, p)
    if likelihood == "bernoulli":
        p = outputs.sigmoid()
        return torch.diag(p * (1 - p))
    if likelihood == "gaussian":
        return torch.eye(outputs.numel(), dtype=outputs.dtype) / variance
    raise ValueError(likelihood)


def example_hessian(
    likelihood: str, outputs: Tensor, class_dim: int | None = None, mask: Tensor | None = None
) -> tuple[Tensor, int]:
    """Hessian over all flattened outputs of one example, and how many terms of the loss it has.

    Args:
        likelihood: ``"categorical"``, ``"bernoulli"`` or ``"gaussian"``.
        outputs: ``[...]``, the outputs of one example without the batch dimension.
        class_dim: where the classes are (of ``outputs``); last if not given. Categorical only.
        mask: ``True`` where a term counts, the shape of ``outputs`` without the classes.
    """
    size = outputs.numel()
    if likelihood != "categorical":
        return term_hessian(likelihood, outputs.reshape(-1)), 1
    class_dim = outputs.dim() - 1 if class_dim is None else class_dim
    positions = torch.arange(size).reshape(outputs.shape).movedim(class_dim, -1).reshape(-1, outputs.shape[class_dim])
    counts = torch.ones(len(positions), dtype=torch.bool) if mask is None else mask.reshape(-1)
    hessian = torch.zeros(size, size, dtype=outputs.dtype)
    for where, counted in zip(positions, counts.tolist()):
        if counted:
            hessian[where[:, None], where[None, :]] = term_hessian("categorical", outputs.reshape(-1)[where])
    return hessian, int(counts.sum())


# ---------------------------------------------------------------------------------------------
# Layers as linear maps: rows of inputs and of output gradients


def _padded_coordinate(index: int, size: int, mode: str) -> int | None:
    """The input coordinate that the padded coordinate ``index`` reads; ``None`` is a zero."""
    if 0 <= index < size:
        return index
    if mode == "zeros":
        return None
    if mode == "circular":
        return index % size
    if mode == "reflect":
        return -index if index < 0 else 2 * (size - 1) - index
    if mode == "replicate":
        return 0 if index < 0 else size - 1
    raise ValueError(mode)


def _left_right(module: nn.Module, axis: int) -> tuple[int, int]:
    if module.padding == "valid":
        return 0, 0
    if module.padding == "same":
        total = module.dilation[axis] * (module.kernel_size[axis] - 1)
        return total // 2, total - total // 2
    return module.padding[axis], module.padding[axis]


def convolution_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Patches ``[positions, groups, channels/groups * taps]`` of one image ``x [channels, *space]``, by loops."""
    space, axes = x.shape[1:], range(x.dim() - 1)
    extent = []
    for axis in axes:
        left, right = _left_right(module, axis)
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        extent.append((space[axis] + left + right - reach) // module.stride[axis] + 1)
    per_group = x.shape[0] // module.groups
    taps = list(itertools.product(*[range(k) for k in module.kernel_size]))
    rows = []
    for position in itertools.product(*[range(e) for e in extent]):
        patch = x.new_zeros(x.shape[0], len(taps))
        for number, tap in enumerate(taps):
            source = [
                _padded_coordinate(
                    position[axis] * module.stride[axis] - _left_right(module, axis)[0] + tap[axis] * module.dilation[axis],
                    space[axis],
                    module.padding_mode,
                )
                for axis in axes
            ]
            if None not in source:
                patch[:, number] = x[(slice(None), *source)]
        rows.append(patch.reshape(module.groups, per_group * len(taps)))
    return torch.stack(rows)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Inputs ``[positions, groups, in_dim]`` of one example ``x`` (no batch dimension), the 1 for the bias last."""
    if isinstance(module, _CONVOLUTIONS):
        rows = convolution_rows(module, x)
    elif isinstance(module, nn.Embedding):
        rows = torch.nn.functional.one_hot(x.reshape(-1), module.num_embeddings).to(module.weight.dtype).unsqueeze(1)
    else:
        rows = x.reshape(-1, 1, x.shape[-1])
    bias = getattr(module, "bias", None)
    if bias is not None and bias.requires_grad:
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)
    return rows


def output_rows(module: nn.Module, g: Tensor) -> Tensor:
    """Output gradients ``[positions, groups, out_dim/groups]`` of one example ``g`` (no batch dimension)."""
    if isinstance(module, _CONVOLUTIONS):
        flat = g.reshape(module.groups, module.out_channels // module.groups, -1)
        return flat.permute(2, 0, 1)
    return g.reshape(-1, 1, g.shape[-1])


def weight_matrix(module: nn.Module, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``[out_dim, in_dim]`` from the gradients (or values) of a weight and a bias; bias last."""
    columns = []
    if weight is not None:
        if isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D":
            columns.append(weight.T)
        elif "Norm" in type(module).__name__:
            columns.append(weight.reshape(-1, 1))
        else:
            columns.append(weight.reshape(weight.shape[0], -1))
    if bias is not None:
        columns.append(bias.reshape(-1, 1))
    return torch.cat(columns, dim=1)


def module_matrix(module: nn.Module, of: Callable[[nn.Parameter], Tensor]) -> Tensor:
    """``weight_matrix`` of ``of(parameter)`` for the trainable weight and bias of ``module``."""
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    return weight_matrix(
        module,
        of(weight) if weight is not None and weight.requires_grad else None,
        of(bias) if bias is not None and bias.requires_grad else None,
    )


def vec(matrix: Tensor) -> Tensor:
    """Column-stacking ``vec`` of the last two dimensions."""
    return matrix.transpose(-2, -1).reshape(*matrix.shape[:-2], -1)


def unvec(vector: Tensor, out_dim: int) -> Tensor:
    """Inverse of :func:`vec`."""
    return vector.reshape(-1, out_dim).T


# ---------------------------------------------------------------------------------------------
# Per-example derivatives


def _one(inputs: Tensor | tuple[Tensor, ...], n: int) -> tuple[Tensor, ...]:
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    return tuple(x[n : n + 1] for x in inputs)


def batch_size(inputs: Tensor | tuple[Tensor, ...]) -> int:
    """Number of examples."""
    return len(inputs[0] if isinstance(inputs, tuple) else inputs)


def parameter_jacobian(model: nn.Module, inputs: Tensor | tuple[Tensor, ...], parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """``[batch][parameter]``: Jacobian ``[outputs, *parameter.shape]`` of one example's flattened outputs."""
    table = []
    for n in range(batch_size(inputs)):
        outputs = model(*_one(inputs, n)).reshape(-1)
        columns = [torch.autograd.grad(o, parameters, retain_graph=True, allow_unused=True) for o in outputs]
        table.append(
            [torch.stack([torch.zeros_like(p) if c[i] is None else c[i] for c in columns]) for i, p in enumerate(parameters)]
        )
    return table


def _calls(model: nn.Module, module: nn.Module, x: tuple[Tensor, ...]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The model's output for one example, and the input and output of every call of ``module``."""
    calls: list[tuple[Tensor, Tensor]] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        calls.append((args[0].detach(), output))
        return output.clone()  # what comes later may overwrite the copy, never ``output``

    handle = module.register_forward_hook(hook)
    try:
        outputs = model(*x)
    finally:
        handle.remove()
    return outputs, calls


def layer_rows(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    name: str,
    likelihood: str = "categorical",
    sharing: Sharing = "expand",
    class_dim: int | None = None,
    mask: Tensor | None = None,
) -> list[dict[str, Tensor | int]]:
    """Per example ``inputs [rows, groups, in]``, ``jacobian [outputs, rows, groups, out]``, ``hessian``, ``terms``.

    Rows are all positions of all calls of the module. ``reduce`` averages the inputs and sums the
    output gradients of each call over its positions. ``mask``: terms that count; with one, rows that none of
    these terms depends on are left out.
    """
    module = model.get_submodule(name)
    examples = []
    for n in range(batch_size(inputs)):
        outputs, calls = _calls(model, module, _one(inputs, n))
        term_mask = None if mask is None else mask[n]
        hessian, terms = example_hessian(likelihood, outputs[0].detach(), class_dim, term_mask)
        per_output = [
            torch.autograd.grad(o, [c[1] for c in calls], retain_graph=True, allow_unused=True) for o in outputs.reshape(-1)
        ]
        a_calls, j_calls = [], []
        for c, (a, out) in enumerate(calls):
            a_rows = input_rows(module, a[0])
            j_rows = torch.stack(
                [output_rows(module, torch.zeros_like(out[0]) if grads[c] is None else grads[c][0]) for grads in per_output]
            )
            if term_mask is not None:
                reached = torch.einsum("ij,jrgo->irgo", hessian, j_rows).abs().sum((0, 2, 3)) > 0
                a_rows, j_rows = a_rows[reached], j_rows[:, reached]
            if sharing == "reduce" and len(a_rows):
                a_rows, j_rows = a_rows.mean(0, keepdim=True), j_rows.sum(1, keepdim=True)
            a_calls.append(a_rows)
            j_calls.append(j_rows)
        examples.append({"inputs": torch.cat(a_calls), "jacobian": torch.cat(j_calls, dim=1), "hessian": hessian, "terms": terms})
    return examples


def kronecker_factors(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    name: str,
    likelihood: str = "categorical",
    sharing: Sharing = "expand",
    class_dim: int | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Factors :math:`A = \frac1N \sum a a^\top` and :math:`G = \frac1R \sum J^\top H J`, one pair per group.

    ``N`` terms of the loss, ``R`` rows that the layer saw. Without groups the leading dimension is dropped.
    """
    examples = layer_rows(model, inputs, name, likelihood, sharing, class_dim, mask)
    terms = sum(e["terms"] for e in examples)
    num_rows = sum(len(e["inputs"]) for e in examples)
    a = torch.cat([e["inputs"] for e in examples])
    input_factor = torch.stack([a[:, k].T @ a[:, k] for k in range(a.shape[1])]) / terms
    output_factor = torch.zeros(a.shape[1], *2 * [examples[0]["jacobian"].shape[-1]], dtype=a.dtype)
    for e in examples:
        for row, k in itertools.product(range(len(e["inputs"])), range(a.shape[1])):
            j = e["jacobian"][:, row, k]
            output_factor[k] += j.T @ e["hessian"] @ j / num_rows
    if len(input_factor) == 1:
        return input_factor[0], output_factor[0]
    return input_factor, output_factor


def dense_kronecker(input_factor: Tensor, output_factor: Tensor) -> Tensor:
    """``A ⊗ G`` for the whole ``[out_dim, in_dim]`` matrix; groups give a permuted block-diagonal matrix."""
    if input_factor.dim() == 2:
        return torch.kron(input_factor, output_factor)
    groups, in_dim, _ = input_factor.shape
    out = output_factor.shape[-1]
    index = torch.arange(groups * out * in_dim).reshape(in_dim, groups, out)  # vec stacks columns
    dense = torch.zeros(index.numel(), index.numel(), dtype=input_factor.dtype)
    for k in range(groups):
        where = index[:, k].reshape(-1)
        dense[where[:, None], where[None, :]] = torch.kron(input_factor[k], output_factor[k])
    return dense


def fisher_block(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    name: str,
    likelihood: str = "categorical",
    class_dim: int | None = None,
) -> Tensor:
    """The exact Fisher block ``[D, D]`` of one module's matrix, in the order of :func:`vec`."""
    per_example, terms = per_example_fisher(model, inputs, name, likelihood, class_dim)
    return per_example.sum(0) / terms


def per_example_fisher(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    name: str,
    likelihood: str = "categorical",
    class_dim: int | None = None,
) -> tuple[Tensor, int]:
    """``J_n^T H_n J_n`` ``[batch, D, D]`` of one module's matrix, and the number of terms ``N``."""
    module = model.get_submodule(name)
    named = [(key, p) for key, p in module.named_parameters(recurse=False) if p.requires_grad]
    jacobians = parameter_jacobian(model, inputs, [p for _, p in named])
    blocks, total = [], 0
    for n, jacobian in enumerate(jacobians):
        outputs = model(*_one(inputs, n))[0].detach()
        hessian, terms = example_hessian(likelihood, outputs, class_dim)
        by_name = {key: j for (key, _), j in zip(named, jacobian)}
        matrices = torch.stack(
            [
                weight_matrix(
                    module,
                    by_name["weight"][k] if "weight" in by_name else None,
                    by_name["bias"][k] if "bias" in by_name else None,
                )
                for k in range(outputs.numel())
            ]
        )
        rows = vec(matrices)
        blocks.append(rows.T @ hessian @ rows)
        total += terms
    return torch.stack(blocks), total


def parameter_fisher_diagonal(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    parameter: Tensor,
    likelihood: str = "categorical",
    class_dim: int | None = None,
) -> Tensor:
    """Diagonal of the exact Fisher for one parameter, in its shape."""
    total, terms = torch.zeros_like(parameter).reshape(-1), 0
    for n, (jacobian,) in enumerate(parameter_jacobian(model, inputs, [parameter])):
        outputs = model(*_one(inputs, n))[0].detach()
        hessian, count = example_hessian(likelihood, outputs, class_dim)
        flat = jacobian.reshape(len(jacobian), -1)
        total = total + torch.einsum("ip,ij,jp->p", flat, hessian, flat)
        terms += count
    return (total / terms).reshape(parameter.shape).detach()


def label_enumeration(model: nn.Module, inputs: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
    """All Gauss-Newton-Bartlett diagonals of a categorical model, and the probability of each.

    For each of the ``classes ** batch`` labellings: ``B (∂L/∂θ)²`` of the mean loss ``L`` with these labels.

    Returns:
        ``[labellings, *parameter.shape]`` and ``[labellings]``, which sums to one.
    """
    batch = len(inputs)
    log_p = model(inputs).log_softmax(-1)
    values, weights = [], []
    for labels in itertools.product(range(log_p.shape[1]), repeat=batch):
        picked = log_p[torch.arange(batch), torch.tensor(labels)]
        (g,) = torch.autograd.grad(-picked.mean(), parameter, retain_graph=True)
        values.append(batch * g**2)
        weights.append(picked.sum().exp().detach())
    return torch.stack(values), torch.stack(weights)


def empirical_factors(
    model: nn.Module, inputs: Tensor, name: str, example_loss: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Factors from the gradient of each example's own loss ``example_loss(outputs [1, ...], n)``."""
    module = model.get_submodule(name)
    a_rows, g_rows = [], []
    for n in range(len(inputs)):
        outputs, calls = _calls(model, module, _one(inputs, n))
        grads = torch.autograd.grad(example_loss(outputs, n), [c[1] for c in calls])
        a_rows += [input_rows(module, a[0])[:, 0] for a, _ in calls]
        g_rows += [output_rows(module, g[0])[:, 0] for g in grads]
    a, g = torch.cat(a_rows), torch.cat(g_rows)
    return a.T @ a / len(inputs), g.T @ g / len(g)


# ---------------------------------------------------------------------------------------------
# Preconditioners by dense solves


def dense_solve(block: Tensor, damping: float, matrix: Tensor) -> Tensor:
    """``(F + γ I)^-1 vec V`` as a matrix."""
    eye = torch.eye(len(block), dtype=block.dtype)
    return unvec(torch.linalg.solve(block + damping * eye, vec(matrix)), matrix.shape[0])


def factored_solve(input_factor: Tensor, output_factor: Tensor, damping: float, matrix: Tensor) -> Tensor:
    """``(G + √γ/π I)^-1 V (A + π√γ I)^-1`` as one dense solve with the Kronecker product."""
    pi = math.sqrt(input_factor.diagonal().mean() / output_factor.diagonal().mean())
    damped_in = input_factor + pi * math.sqrt(damping) * torch.eye(len(input_factor), dtype=matrix.dtype)
    damped_out = output_factor + math.sqrt(damping) / pi * torch.eye(len(output_factor), dtype=matrix.dtype)
    return unvec(torch.linalg.solve(torch.kron(damped_in, damped_out), vec(matrix)), matrix.shape[0])


def eigenbasis_scales(per_example: Tensor, terms: int, input_basis: Tensor, output_basis: Tensor) -> Tensor:
    """EKFAC scales ``[out, in]``: second moments of the per-example gradients in ``Q_A ⊗ Q_G``."""
    basis = torch.kron(input_basis.contiguous(), output_basis.contiguous())
    scales = torch.stack([(basis.T @ block @ basis).diagonal() for block in per_example]).sum(0) / terms
    return unvec(scales, len(output_basis))


def dense_eigenbasis(scales: Tensor, input_basis: Tensor, output_basis: Tensor) -> Tensor:
    """``(Q_A ⊗ Q_G) diag(s) (Q_A ⊗ Q_G)^T``."""
    basis = torch.kron(input_basis.contiguous(), output_basis.contiguous())
    return basis @ torch.diag(vec(scales)) @ basis.T


def layer_scale(input_factor: Tensor, output_factor: Tensor) -> float:
    """``τ = (tr A/dim A)(tr G/dim G) sqrt(dim A · dim G)``."""
    means = float(input_factor.diagonal().mean() * output_factor.diagonal().mean())
    return means * math.sqrt(len(input_factor) * len(output_factor))
