"""Softmax over classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_opt.likelihoods.base import Likelihood, random_signs, widened
from kfac_opt.likelihoods.reading import certain_margin, fitted_scale, in_front_of_log_softmax, slack, underflow


class Categorical(Likelihood):
    """Softmax over classes.

    Args:
        class_dim: dimension of the classes. None: the last for ``[batch, classes]`` and
            ``[batch, time, classes]``, 1 for images ``[batch, classes, height, width, ...]``.
        ignore_index: targets with this value are left out of :meth:`loss` (torch's meaning and default). It
            concerns the loss alone; mask the Fisher with a mask.

    >>> Categorical().loss(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor(1.3863)
    """

    name = "categorical"

    def __init__(self, class_dim: int | None = None, ignore_index: int = -100) -> None:
        self.class_dim = class_dim
        self.ignore_index = ignore_index

    def describe(self) -> dict[str, object]:
        return {"name": self.name, "class_dim": self.class_dim, "ignore_index": self.ignore_index}

    def dimension(self, outputs: Tensor) -> int:
        """The class dimension of these outputs, non-negative."""
        if self.class_dim is None:
            return outputs.dim() - 1 if outputs.dim() <= 3 else 1
        return self.class_dim % outputs.dim()

    def check(self, outputs: Tensor) -> None:
        self._check_floating(outputs)
        if outputs.dim() < 2:
            raise ValueError(
                f"categorical likelihood: the model's output has shape {list(outputs.shape)}, expected logits "
                "[batch, classes], [batch, time, classes] or [batch, classes, height, width]. For one logit per "
                "example use likelihood='bernoulli', for regression likelihood='gaussian'."
            )
        if self.class_dim is not None and not -outputs.dim() <= self.class_dim < outputs.dim():
            raise ValueError(
                f"categorical likelihood: class_dim={self.class_dim} does not exist in an output of shape "
                f"{list(outputs.shape)}. Choose class_dim in [{-outputs.dim()}, {outputs.dim() - 1}]."
            )
        if outputs.shape[self.dimension(outputs)] < 2:
            raise ValueError(
                f"categorical likelihood: dimension {self.dimension(outputs)} of the model's output "
                f"{list(outputs.shape)} holds a single class, expected at least 2. For one logit per example use "
                "likelihood='bernoulli', for regression likelihood='gaussian', for another class dimension "
                "likelihood=Categorical(class_dim=...)."
            )

    def admits(self, outputs: Tensor, mask: Tensor | None = None) -> bool:
        """A logit of ``-inf`` is probability zero (actions that are not allowed, a padded vocabulary); one class must be left."""
        if super().admits(outputs):
            return True
        dim = self.dimension(outputs)
        highest = outputs.detach().amax(dim, keepdim=True)  # NaN where one of them is
        allowed = torch.isfinite(highest)
        keep = self.term_mask(outputs, mask)
        if keep is not None:
            allowed = allowed | (~keep & (highest == -float("inf")))
        return bool(allowed.all())

    def term_mask(self, outputs: Tensor, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        dim = self.dimension(outputs)
        expected = [*outputs.shape[:dim], *outputs.shape[dim + 1 :]]
        if mask.dtype != torch.bool or list(mask.shape) != expected:
            raise ValueError(
                f"mask: got {mask.dtype} of shape {list(mask.shape)}, expected torch.bool of shape {expected} (the "
                "logits' shape without the class dimension), True for the terms that count in the loss."
            )
        return mask.unsqueeze(dim)

    def num_terms(self, outputs: Tensor, mask: Tensor | None = None) -> int:
        if mask is not None:
            return int(mask.sum())
        return outputs.numel() // outputs.shape[self.dimension(outputs)]

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        dim = self.dimension(outputs)
        logits = outputs.detach().movedim(dim, -1)
        rows = logits.reshape(-1, logits.shape[-1])
        if rows.dtype == torch.float64:  # which may be beyond single precision
            highest = rows.amax(-1, keepdim=True)
            rows = rows - highest.where(torch.isfinite(highest), 0.0)
        flat = torch.softmax(rows.float(), dim=-1)
        return torch.multinomial(flat, 1, generator=generator).reshape(logits.shape[:-1])

    def label_gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        dim = self.dimension(outputs)
        gradients = torch.softmax(widened(outputs), dim=dim)
        one = torch.ones((), dtype=gradients.dtype, device=gradients.device)
        gradients.scatter_add_(dim, targets.unsqueeze(dim), -one.expand(targets.unsqueeze(dim).shape))
        return gradients.to(outputs.dtype)

    def sample_gradients(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.label_gradients(outputs.detach(), self.sample(outputs, generator))

    def root_columns(self, outputs: Tensor) -> int:
        return outputs.shape[self.dimension(outputs)] - 1

    def root_column(self, outputs: Tensor, column: int) -> Tensor:
        r"""Column ``j`` of the triangular root of :math:`\mathrm{diag}(p) - p p^\top` with ``C - 1`` columns.

        With :math:`t_j = \sum_{k \ge j} p_k`: :math:`L_{jj} = \sqrt{p_j t_{j+1} / t_j}` and
        :math:`L_{ij} = -p_i \sqrt{p_j / (t_j t_{j+1})}` below the diagonal; zero where a tail has no mass.
        """
        dim = self.dimension(outputs)
        p = torch.softmax(widened(outputs), dim=dim).movedim(dim, -1)
        rest = p[..., column + 1 :].sum(-1)
        here = p[..., column]
        tail = here + rest
        root = torch.zeros_like(p)
        root[..., column] = torch.where(tail > 0, here * rest / tail.clamp_min(_tiny(p)), 0.0).sqrt()
        # -p_i sqrt(p_j / (t_j t_{j+1})), written with p_i / t_{j+1} <= 1 so that a tiny tail cannot overflow.
        share = p[..., column + 1 :] / rest.clamp_min(_tiny(p)).unsqueeze(-1)
        scale = torch.where(tail > 0, here * rest / tail.clamp_min(_tiny(p)), 0.0).sqrt()
        root[..., column + 1 :] = -share * scale.unsqueeze(-1)
        return root.movedim(-1, dim).to(outputs.dtype)

    def term_signs(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        dim = self.dimension(outputs)
        return random_signs([*outputs.shape[:dim], 1, *outputs.shape[dim + 1 :]], outputs, generator)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        logits = outputs.movedim(self.dimension(outputs), 1)
        return F.cross_entropy(logits, targets, ignore_index=self.ignore_index)

    def predictive(self, outputs: Tensor) -> Tensor:
        return torch.softmax(outputs, dim=self.dimension(outputs))

    def gradient_scale(self, outputs: Tensor, gradients: Tensor) -> float | None:
        dim = self.dimension(outputs)
        p = torch.softmax(widened(outputs.detach()), dim=dim).movedim(dim, -1)
        g = in_front_of_log_softmax(outputs, gradients.to(p.dtype), dim).movedim(dim, -1)
        p, g = p.reshape(-1, p.shape[-1]), g.reshape(-1, p.shape[-1])
        used = g.abs().sum(-1) > 0  # masked terms have no gradient
        target = g.argmin(-1, keepdim=True)
        residual = p.scatter_add(-1, target, -torch.ones_like(p[:, :1]))
        return fitted_scale(residual[used], g[used], gradients.dtype)

    def contradiction(self, outputs: Tensor, gradients: Tensor) -> str | None:
        dim = self.dimension(outputs)
        g = gradients.detach().to(torch.promote_types(gradients.dtype, torch.float32))
        g = in_front_of_log_softmax(outputs, g, dim)
        # A row whose label is certain has a gradient of rounding errors: it sums to nothing in particular. But only the
        # label's entry is negative in it; two negative ones come from another loss on large outputs.
        level = certain_margin(gradients.dtype)
        unsure = torch.softmax(widened(outputs.detach()), dim=dim).amax(dim) < 1 - level
        negative = (g < -level * g.abs().amax(dim, keepdim=True)).sum(dim)
        counts = unsure | (negative >= 2)
        total, size = (g.sum(dim).abs() * counts).sum(), (g.abs().sum(dim) * counts).sum()
        lost = g.shape[dim] * counts.sum() * underflow(gradients.dtype)  # entries may have vanished
        if bool(size > 0) and bool(total > slack(gradients.dtype) * size + lost):
            other = self._other_dimension(outputs, gradients)
            where = "" if other is None else f"; it does along dimension {other}, where the loss has its classes"
            return (
                f"the output gradient of a cross-entropy sums to zero over the classes (dimension {dim} of "
                f"{list(outputs.shape)}), that of this loss does not (|sum| / sum of |entries| = {float(total / size):.2g})"
                f"{where}"
            )
        return None

    def remedy(self, outputs: Tensor, gradients: Tensor) -> str:
        other = self._other_dimension(outputs, gradients)
        return super().remedy(outputs, gradients) if other is None else f"Choose likelihood=Categorical(class_dim={other})"

    def _other_dimension(self, outputs: Tensor, gradients: Tensor) -> int | None:
        """Another dimension than that of the classes along which the gradient sums to zero, as only theirs does."""
        g = widened(gradients.detach())
        for dim in range(1, outputs.dim()):
            total, size = g.sum(dim).abs().sum(), g.abs().sum()
            if dim != self.dimension(outputs) and outputs.shape[dim] > 1 and bool(total <= slack(gradients.dtype) * size):
                return dim
        return None

    def silent_terms(self, outputs: Tensor, gradients: Tensor) -> tuple[int, int]:
        dim, level = self.dimension(outputs), certain_margin(gradients.dtype)
        largest = gradients.detach().abs().amax(dim)
        if not bool(level * largest.max() > 4 * underflow(gradients.dtype)):
            return 0, 0  # the gradient of a term may have vanished
        p = torch.softmax(widened(outputs.detach()), dim=dim)
        if bool(((gradients == 0) & (p > level) & (largest > 0).unsqueeze(dim)).any()):
            return 0, 0  # a loss at another temperature, whose terms may be certain
        silent = (largest == 0) & (p.amax(dim) < 1 - level)
        if silent.dim() == 2 and not bool(silent[:, :-1].any()):
            return 0, 0  # the last position of sequences alone: a language model's loss shifts the labels by one
        return int(silent.sum()), largest.numel()


def _tiny(reference: Tensor) -> float:
    return torch.finfo(reference.dtype).tiny
