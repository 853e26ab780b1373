"""Fisher matrices by loops over examples, outputs and loss terms, sharing no code with the package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import example_hessian, parameter_jacobian


def jacobians(model: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """For each example ``[outputs, P]``, trainable parameters in order."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    table = parameter_jacobian(model, inputs, parameters)
    return [torch.cat([part.reshape(part.shape[0], -1) for part in row], dim=1) for row in table]


def one_output(model: nn.Module, inputs: Tensor | tuple[Tensor, ...], index: int) -> Tensor:
    """Outputs of one example without the batch dimension, detached."""
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    return model(*(x[index : index + 1] for x in inputs))[0].detach()


def exact_fisher(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    likelihood: str = "categorical",
    class_dim: int | None = None,
    masks: Tensor | None = None,
) -> Tensor:
    """``(1/N) Σ JᵀHJ``; ``masks [batch, terms...]`` keep terms; ``class_dim`` of one example's outputs."""
    total, terms = torch.zeros(()), 0
    for index, jacobian in enumerate(jacobians(model, inputs)):
        mask = None if masks is None else masks[index]
        hessian, count = example_hessian(likelihood, one_output(model, inputs, index), class_dim, mask)
        total = total + jacobian.T @ hessian @ jacobian
        terms += count
    return total / terms


def label_fisher(
    model: nn.Module, inputs: Tensor | tuple[Tensor, ...], labels: Tensor, likelihood: str = "categorical"
) -> Tensor:
    """``(1/(N m)) Σ s sᵀ`` of the given labels, one ``s`` per loss term and label.

    Args:
        labels: ``[batch, m]``; per token ``[batch, time, m]``; several outputs ``[batch, outputs, m]``.
    """
    rows = []
    for index, jacobian in enumerate(jacobians(model, inputs)):
        outputs = one_output(model, inputs, index)
        for sample in range(labels.shape[-1]):
            label = labels[index, ..., sample]
            if likelihood == "categorical":
                flat = outputs.reshape(-1, outputs.shape[-1])
                for term, (logits, y) in enumerate(zip(flat, label.reshape(-1))):
                    gradient = torch.zeros_like(flat)
                    gradient[term] = logits.softmax(-1) - F.one_hot(y.long(), len(logits))
                    rows.append(gradient.reshape(-1) @ jacobian)
            else:
                mean = outputs.sigmoid() if likelihood == "bernoulli" else outputs
                rows.append((mean - label).reshape(-1) @ jacobian)
    stacked = torch.stack(rows)
    return stacked.T @ stacked / len(stacked)


def block_diagonal(matrix: Tensor, slices: dict[str, slice]) -> Tensor:
    """The matrix with everything between the blocks set to zero."""
    kept = torch.zeros_like(matrix)
    for where in slices.values():
        kept[where, where] = matrix[where, where]
    return kept


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A dense symmetric matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator, dtype=torch.float64))
    return (basis * eigenvalues) @ basis.T
