"""The output side of the Fisher matrix: a root of the output Hessian per loss term, and the labels it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from kfac_opt.likelihoods import Bernoulli, Categorical, Likelihood

FisherKind = Literal["exact", "mc", "empirical"]


@dataclass(frozen=True)
class Roots:
    r"""Columns :math:`r_k` with :math:`\sum_k r_k r_k^\top = H` for every loss term of a batch.

    Attributes:
        columns: ``K`` tensors of the shape of the outputs, zero at masked terms.
        term_shape: the outputs' shape with 1 in the dimensions that belong to one term.
    """

    columns: list[Tensor]
    term_shape: torch.Size

    @property
    def terms_per_example(self) -> int:
        """``T``: loss terms of one example, masked ones included."""
        return self.term_shape[1:].numel()

    def multiply(self, tangent: Tensor) -> Tensor:
        """``H t`` per term, in the shape of the outputs."""
        dims = [d for d, (term, full) in enumerate(zip(self.term_shape, tangent.shape)) if term != full]
        total = torch.zeros_like(tangent)
        for column in self.columns:
            product = column * tangent
            total += column * (product.sum(dims, keepdim=True) if dims else product)
        return total

    def separate(self) -> SeparateColumns:
        """``T · K`` columns that each touch one term per example: their pull-backs are rows of the Fisher matrix."""
        return SeparateColumns(self)


class SeparateColumns(Sequence[Tensor]):
    """The columns of :class:`Roots` for each term alone, made when asked for: a long sequence has very many."""

    def __init__(self, roots: Roots) -> None:
        self.roots = roots

    def __len__(self) -> int:
        return len(self.roots.columns) * self.roots.terms_per_example

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        term, column = divmod(index, len(self.roots.columns))
        terms = self.roots.terms_per_example
        values = self.roots.columns[column]
        if terms == 1:
            return values
        select = values.new_zeros(self.roots.term_shape)
        select.reshape(self.roots.term_shape[0], terms)[:, term] = 1.0
        return values * select


class OutputTerms:
    """Turns a batch's outputs into roots of the output Hessian.

    Args:
        likelihood: distribution of the targets given the outputs.
        kind: ``exact`` uses the root of the Hessian, ``mc`` the scores of drawn labels, ``empirical`` those of the
            data's targets.
        label_samples: ``m``, labels per term of ``mc``.
        owner: name for error messages.
    """

    def __init__(self, likelihood: Likelihood, kind: FisherKind, label_samples: int, owner: str) -> None:
        self.likelihood, self.kind, self.label_samples, self.owner = likelihood, kind, label_samples, owner

    def num_columns(self, outputs: Tensor) -> int:
        """``K`` of one term."""
        return {"exact": self.likelihood.root_columns(outputs), "mc": self.label_samples, "empirical": 1}[self.kind]

    def check(self, outputs: Tensor, examples: int) -> None:
        """Raises if the likelihood cannot describe these outputs of a batch of ``examples``."""
        self.likelihood.check(outputs)
        if outputs.shape[0] != examples:
            raise ValueError(
                f"{self.owner}: the model returned outputs of shape {list(outputs.shape)} for {examples} examples, "
                "expected the examples in the first dimension. Pass outputs=lambda output: ... to bring them there."
            )
        if not self.likelihood.admits(outputs):
            raise ValueError(
                f"{self.owner}: the model's outputs hold values that are not finite. Check the weights and the data."
            )

    def term_shape(self, outputs: Tensor) -> torch.Size:
        """The outputs' shape with 1 in the dimensions that belong to one term."""
        return self.likelihood.term_signs(torch.empty(outputs.shape), torch.Generator()).shape

    def term_keep(self, outputs: Tensor, mask: Tensor | None) -> Tensor:
        """Bool ``[terms]``: the terms of the batch that count, in order."""
        shape = self.term_shape(outputs)
        if mask is None:
            return torch.ones(shape.numel(), dtype=torch.bool, device=outputs.device)
        keep = self.likelihood.term_mask(outputs, mask)
        assert keep is not None
        dims = [d for d, (term, full) in enumerate(zip(shape, outputs.shape)) if term != full]
        keep = keep.expand(outputs.shape)
        for dim in dims:
            keep = keep.any(dim, keepdim=True)
        return keep.reshape(-1)

    def draw(self, outputs: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        """Labels ``[terms that count, m, ...]`` from the model, drawn on the generator's device."""
        local = outputs.detach().to(generator.device)
        terms, keep = self.term_shape(outputs).numel(), self.term_keep(outputs, mask)
        drawn = [self.likelihood.sample(local, generator) for _ in range(self.label_samples)]
        labels = torch.stack([self._flat(sample, terms) for sample in drawn], dim=1)
        return labels.to(outputs.device)[keep]

    @staticmethod
    def _flat(labels: Tensor, terms: int) -> Tensor:
        """One row per term: numbers where a term has one label, vectors where it has several."""
        return labels.reshape(terms) if labels.numel() == terms else labels.reshape(terms, *labels.shape[1:])

    def roots(self, outputs: Tensor, mask: Tensor | None, targets: Any, labels: Tensor | None) -> Roots:
        """Roots for a batch.

        Args:
            outputs: detached, the shape the likelihood knows.
            mask: terms that count, or None.
            targets: of the data; only ``empirical`` reads them.
            labels: ``[examples, terms, m, ...]`` of this batch, anything at masked terms; only ``mc`` reads them.
        """
        likelihood = self.likelihood
        outputs = outputs.detach()
        if self.kind == "exact":
            columns = [likelihood.root_column(outputs, index) for index in range(likelihood.root_columns(outputs))]
        elif self.kind == "empirical":
            columns = [likelihood.label_gradients(outputs, self._targets(outputs, mask, targets))]
        else:
            assert labels is not None
            columns = [
                likelihood.label_gradients(outputs, labels[:, :, index].reshape(self._label_shape(outputs)))
                * self.label_samples**-0.5
                for index in range(self.label_samples)
            ]
        keep = likelihood.term_mask(outputs, mask)
        if keep is not None:
            columns = [torch.where(keep, column, 0.0) for column in columns]
        return Roots(columns, self.term_shape(outputs))

    def checked_labels(self, labels: Tensor, output_shape: torch.Size) -> Tensor:
        """Labels handed in for ``mc``, as class numbers where they are such.

        Raises:
            ValueError: values that the likelihood cannot draw.
        """
        if not isinstance(self.likelihood, Categorical):
            return self._in_range(labels, "labels")
        classes = output_shape[self.likelihood.dimension(torch.empty(output_shape, device="meta"))]
        if labels.is_floating_point() or labels.dtype == torch.bool or bool(((labels < 0) | (labels >= classes)).any()):
            raise ValueError(
                f"{self.owner}: labels are {labels.dtype} in [{float(labels.min()):g}, {float(labels.max()):g}], expected "
                f"class numbers (torch.long) in [0, {classes - 1}]."
            )
        return labels.long()

    def _label_shape(self, outputs: Tensor) -> list[int]:
        shape = list(outputs.shape)
        if isinstance(self.likelihood, Categorical):
            del shape[self.likelihood.dimension(outputs)]
        return shape

    def _targets(self, outputs: Tensor, mask: Tensor | None, targets: Any) -> Tensor:
        expected = self._label_shape(outputs)
        if not isinstance(targets, Tensor) or list(targets.shape) != expected:
            found = list(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise ValueError(
                f"{self.owner}: targets are {found}, expected a tensor of shape {expected} for outputs of shape "
                f"{list(outputs.shape)} and the {self.likelihood.name} likelihood"
                + (". Give (inputs, targets) pairs." if targets is None else ". Choose the likelihood that fits.")
            )
        targets = targets.to(outputs.device)
        if not isinstance(self.likelihood, Categorical):
            return self._values(outputs, mask, targets)
        if targets.dtype.is_floating_point or targets.dtype == torch.bool:
            raise TypeError(
                f"{self.owner}: targets have dtype {targets.dtype}, the categorical likelihood expects class numbers "
                "(torch.long). For regression use likelihood='gaussian'."
            )
        targets = targets.long() if mask is None else torch.where(mask, targets.long(), 0)
        classes = outputs.shape[self.likelihood.dimension(outputs)]
        if bool(((targets < 0) | (targets >= classes)).any()):
            raise ValueError(
                f"{self.owner}: targets lie in [{int(targets.min())}, {int(targets.max())}], expected class numbers in "
                f"[0, {classes - 1}]. Mask padded terms with outputs=lambda output: (logits, mask)."
            )
        return targets

    def _values(self, outputs: Tensor, mask: Tensor | None, targets: Tensor) -> Tensor:
        """Targets of a Bernoulli or Gaussian likelihood, zero at masked terms."""
        keep = self.likelihood.term_mask(outputs, mask)
        return self._in_range(targets if keep is None else torch.where(keep, targets, 0), "targets")

    def _in_range(self, values: Tensor, what: str) -> Tensor:
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{self.owner}: the {what} hold values that are not finite. Check the data.")
        if isinstance(self.likelihood, Bernoulli) and bool(((values < 0) | (values > 1)).any()):
            raise ValueError(
                f"{self.owner}: {what} lie in [{float(values.min()):g}, {float(values.max()):g}], the bernoulli likelihood "
                "expects values in [0, 1]. For regression use likelihood='gaussian'."
            )
        return values
