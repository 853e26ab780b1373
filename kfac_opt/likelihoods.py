"""Output distributions of a model: what the Fisher matrix, the loss and the predictive are made of.

A likelihood turns the outputs ``f`` of the model into the gradients of ``-log p(y | f)`` that the Fisher
matrix needs: for labels sampled from the model (``sample_gradients``), or for all labels at once through a
root of the output Hessian ``H`` (``root_gradients``). ``H`` is the Hessian of the negative log-likelihood in
the outputs, so that the exact Fisher equals the generalized Gauss-Newton matrix (Martens 2020, §9).

A *term* is one summand of the mean loss: an example, an unmasked token of a sequence, a pixel of a
segmentation. ``N`` always counts terms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

UNSURE = 1e-3  # probability mass beside the top label from which a gradient is more than rounding, in single precision


class Likelihood(ABC):
    """Distribution of a target given the model's outputs. Stateless; all arguments are tensors."""

    name: str

    @abstractmethod
    def check(self, outputs: Tensor) -> None:
        """Raises TypeError or ValueError, with the remedy, if ``outputs`` cannot be this likelihood's parameters."""

    @abstractmethod
    def term_mask(self, outputs: Tensor, mask: Tensor | None) -> Tensor | None:
        """Checks ``mask`` and returns it broadcastable against ``outputs`` (bool, True counts), or None."""

    @abstractmethod
    def num_terms(self, outputs: Tensor, mask: Tensor | None = None) -> int:
        """``N``, the number of terms in the mean of the loss."""

    @abstractmethod
    def sample_gradients(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Gradient of every term's ``-log p(y)`` for one label ``y`` drawn from the model; the shape of ``outputs``."""

    @abstractmethod
    def root_columns(self, outputs: Tensor) -> int:
        """Number ``K`` of columns of the root of a term's output Hessian."""

    @abstractmethod
    def root_column(self, outputs: Tensor, column: int) -> Tensor:
        """Column ``column`` of the root of every term's output Hessian; the shape of ``outputs``."""

    @abstractmethod
    def term_signs(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """One independent random sign per loss term, broadcastable against ``outputs``."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss this Fisher belongs to: ``-log p`` without constants, summed over outputs, mean over terms."""

    @abstractmethod
    def predictive(self, outputs: Tensor) -> Tensor:
        """Mean of the target under the model: probabilities, or the outputs themselves for a Gaussian."""

    @abstractmethod
    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Labels drawn from the model: class indices without the class dimension, else the shape of ``outputs``."""

    @abstractmethod
    def label_gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradient of every term's ``-log p(targets)`` in the outputs; the shape of ``outputs``."""

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """Constructor arguments and ``name``: plain values that ``make_likelihood`` reads back."""

    def gradient_scale(self, outputs: Tensor, gradients: Tensor) -> float | None:
        """The factor ``c`` by which the user's output gradients differ from ``label_gradients``, if it can be read off.

        None when the gradients are not those of this likelihood with hard labels (label smoothing, class weights,
        another loss), or when nothing can be read off (a Gaussian's residual has no known size).
        """
        return None

    def contradiction(self, outputs: Tensor, gradients: Tensor) -> str | None:
        """What about the loss's output gradients cannot come from this likelihood, in words, or None."""
        return None

    def _check_floating(self, outputs: Tensor) -> None:
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"{self.name} likelihood: the model returned {type(outputs).__name__}, expected a tensor of logits. "
                "Pass outputs=lambda output: ... to pick the logits from what the model returns."
            )
        if not outputs.dtype.is_floating_point:
            raise TypeError(
                f"{self.name} likelihood: the model's output has dtype {outputs.dtype}, expected floating point logits. "
                "Return the logits, not the predicted classes, or pick them with outputs=."
            )


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
        flat = torch.softmax(logits.reshape(-1, logits.shape[-1]).float(), dim=-1)
        return torch.multinomial(flat, 1, generator=generator).reshape(logits.shape[:-1])

    def label_gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        dim = self.dimension(outputs)
        gradients = torch.softmax(_wide(outputs), dim=dim)
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
        p = torch.softmax(_wide(outputs), dim=dim).movedim(dim, -1)
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
        return _signs([*outputs.shape[:dim], 1, *outputs.shape[dim + 1 :]], outputs, generator)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        logits = outputs.movedim(self.dimension(outputs), 1)
        return F.cross_entropy(logits, targets, ignore_index=self.ignore_index)

    def predictive(self, outputs: Tensor) -> Tensor:
        return torch.softmax(outputs, dim=self.dimension(outputs))

    def gradient_scale(self, outputs: Tensor, gradients: Tensor) -> float | None:
        dim = self.dimension(outputs)
        p = torch.softmax(_wide(outputs.detach()), dim=dim).movedim(dim, -1)
        g = _in_front_of_log_softmax(outputs, gradients.to(p.dtype), dim).movedim(dim, -1)
        p, g = p.reshape(-1, p.shape[-1]), g.reshape(-1, p.shape[-1])
        used = g.abs().sum(-1) > 0  # masked terms have no gradient
        target = g.argmin(-1, keepdim=True)
        residual = p.scatter_add(-1, target, -torch.ones_like(p[:, :1]))
        return _fitted_scale(residual[used], g[used], gradients.dtype)

    def contradiction(self, outputs: Tensor, gradients: Tensor) -> str | None:
        dim = self.dimension(outputs)
        g = gradients.detach().to(torch.promote_types(gradients.dtype, torch.float32))
        g = _in_front_of_log_softmax(outputs, g, dim)
        # A row whose label is certain has a gradient of rounding errors: it sums to nothing in particular. But only the
        # label's entry is negative in it; two negative ones come from another loss on large outputs.
        level = _unsure(gradients.dtype)
        unsure = torch.softmax(_wide(outputs.detach()), dim=dim).amax(dim) < 1 - level
        negative = (g < -level * g.abs().amax(dim, keepdim=True)).sum(dim)
        counts = unsure | (negative >= 2)
        total, size = (g.sum(dim).abs() * counts).sum(), (g.abs().sum(dim) * counts).sum()
        lost = g.shape[dim] * counts.sum() * _underflow(gradients.dtype)  # entries may have vanished
        if bool(size > 0) and bool(total > _slack(gradients.dtype) * size + lost):
            return (
                "the output gradient of a cross-entropy sums to zero over the classes, that of this loss does not "
                f"(|sum| / sum of |entries| = {float(total / size):.2g})"
            )
        return None


class _PerExample(Likelihood):
    """What Bernoulli and Gaussian share: outputs are independent, the terms are the examples."""

    def check(self, outputs: Tensor) -> None:
        self._check_floating(outputs)
        if outputs.dim() < 1:
            raise ValueError(
                f"{self.name} likelihood: the model's output is a scalar, expected [batch] or [batch, outputs]. "
                "Return one output per example; the loss is taken outside the model."
            )

    def term_mask(self, outputs: Tensor, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        if mask.dtype != torch.bool or list(mask.shape) != list(outputs.shape[: mask.dim()]):
            raise ValueError(
                f"mask: got {mask.dtype} of shape {list(mask.shape)}, expected torch.bool of shape "
                f"{list(outputs.shape)} or a prefix of it, True for the outputs that count in the loss."
            )
        return mask.reshape(*mask.shape, *([1] * (outputs.dim() - mask.dim())))

    def num_terms(self, outputs: Tensor, mask: Tensor | None = None) -> int:
        if mask is not None:
            return int(mask.flatten(1).any(1).sum()) if mask.dim() > 1 else int(mask.sum())
        return outputs.shape[0]

    def root_columns(self, outputs: Tensor) -> int:
        return max(outputs[0].numel(), 1) if outputs.shape[0] else 0

    def root_column(self, outputs: Tensor, column: int) -> Tensor:
        # Not zeros_like: it keeps the strides of channels-last outputs, and reshape would then write into a copy.
        root = torch.zeros(outputs.shape, dtype=outputs.dtype, device=outputs.device)
        root.reshape(outputs.shape[0], -1)[:, column] = self._deviation(outputs).reshape(outputs.shape[0], -1)[:, column]
        return root

    def term_signs(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        return _signs([outputs.shape[0], *([1] * (outputs.dim() - 1))], outputs, generator)

    @abstractmethod
    def _deviation(self, outputs: Tensor) -> Tensor:
        """Square root of the diagonal of the output Hessian, the shape of ``outputs``."""

    def sample_gradients(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.label_gradients(outputs.detach(), self.sample(outputs, generator))


class Bernoulli(_PerExample):
    """Independent binary outputs given by logits ``[batch, ...]``; targets in [0, 1]."""

    name = "bernoulli"

    def describe(self) -> dict[str, object]:
        return {"name": self.name}

    def _deviation(self, outputs: Tensor) -> Tensor:
        p = torch.sigmoid(_wide(outputs.detach()))
        return (p * (1 - p)).sqrt().to(outputs.dtype)

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        p = torch.sigmoid(_wide(outputs.detach()))
        uniform = torch.rand(p.shape, generator=generator, dtype=p.dtype, device=p.device)
        return (uniform < p).to(outputs.dtype)

    def label_gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (torch.sigmoid(_wide(outputs)) - targets).to(outputs.dtype)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        total = F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="sum")
        return total / outputs.shape[0]

    def predictive(self, outputs: Tensor) -> Tensor:
        return torch.sigmoid(outputs)

    def gradient_scale(self, outputs: Tensor, gradients: Tensor) -> float | None:
        p = torch.sigmoid(_wide(outputs.detach())).flatten()
        g = gradients.to(p.dtype).flatten()
        used = g != 0
        residual = torch.where(g < 0, p - 1, p)
        return _fitted_scale(residual[used], g[used], gradients.dtype)

    def contradiction(self, outputs: Tensor, gradients: Tensor) -> str | None:
        f, g = _wide(outputs.detach()).flatten(), gradients.to(torch.promote_types(gradients.dtype, torch.float32)).flatten()
        if bool(((f > 0) & (f < 1)).all()) and self.gradient_scale(outputs, gradients) is None:
            used = g != 0
            residual = torch.where(g < 0, -1 / f, 1 / (1 - f))  # of the loss in probabilities
            if _fitted_scale(residual[used], g[used], gradients.dtype) is not None:
                return "the outputs are probabilities; return logits and use the loss with logits"
        return _softmax_like(outputs, gradients)


class Gaussian(_PerExample):
    """Outputs with independent Gaussian noise of known ``variance`` (a positive number): regression."""

    name = "gaussian"

    def __init__(self, variance: float = 1.0) -> None:
        if not variance > 0.0:
            raise ValueError(f"Gaussian: variance must be > 0, got {variance}")
        self.variance = float(variance)

    def describe(self) -> dict[str, object]:
        return {"name": self.name, "variance": self.variance}

    def _deviation(self, outputs: Tensor) -> Tensor:
        return torch.full_like(outputs, self.variance**-0.5)

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        wide = _wide(outputs.detach())
        noise = torch.randn(wide.shape, generator=generator, dtype=wide.dtype, device=wide.device)
        return (wide + self.variance**0.5 * noise).to(outputs.dtype)

    def sample_gradients(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        wide = _wide(outputs.detach())
        noise = torch.randn(wide.shape, generator=generator, dtype=wide.dtype, device=wide.device)
        return (-(self.variance**-0.5) * noise).to(outputs.dtype)  # (f - y) / variance without cancellation

    def label_gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets) / self.variance

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs - targets).square().sum() / (self.variance * outputs.shape[0])

    def predictive(self, outputs: Tensor) -> Tensor:
        return outputs

    def contradiction(self, outputs: Tensor, gradients: Tensor) -> str | None:
        return _softmax_like(outputs, gradients)


LikelihoodName = Literal["categorical", "bernoulli", "gaussian"]
_LIKELIHOODS: dict[str, type[Likelihood]] = {"categorical": Categorical, "bernoulli": Bernoulli, "gaussian": Gaussian}


def make_likelihood(likelihood: LikelihoodName | Likelihood | dict[str, object]) -> Likelihood:
    """The likelihood itself, or the one named, or the one that ``describe()`` wrote down.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    arguments = dict(likelihood) if isinstance(likelihood, dict) else {"name": likelihood}
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in _LIKELIHOODS:
        raise ValueError(
            f"likelihood must be one of {sorted(_LIKELIHOODS)} or an instance of Likelihood, got {name!r}"
        )
    return _LIKELIHOODS[name](**arguments)


def output_gradients(
    likelihood: Likelihood,
    outputs: Tensor,
    *,
    kind: Literal["mc", "exact"],
    num_labels: int,
    mask: Tensor | None,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """Output gradients whose summed outer products estimate (``mc``) or are (``exact``) the output Hessians.

    Yields ``num_labels`` draws, each scaled by ``num_labels ** -0.5``, or the ``K`` root columns, each term with
    a random sign of its own: where a layer's rows mix several terms the cross products then cancel in
    expectation, and where they do not the outer products do not see the sign. Masked terms are zero.
    """
    outputs = outputs.detach()
    keep = likelihood.term_mask(outputs, mask)
    for index in range(num_labels if kind == "mc" else likelihood.root_columns(outputs)):
        if kind == "mc":
            gradients = likelihood.sample_gradients(outputs, generator)
            gradients = gradients if num_labels == 1 else gradients * num_labels**-0.5
        else:
            gradients = likelihood.root_column(outputs, index) * likelihood.term_signs(outputs, generator)
        yield gradients if keep is None else torch.where(keep, gradients, 0.0)


def _wide(outputs: Tensor) -> Tensor:
    """At least single precision: probabilities of half precision logits round badly."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _tiny(reference: Tensor) -> float:
    return torch.finfo(reference.dtype).tiny


def _signs(shape: list[int], outputs: Tensor, generator: torch.Generator | None) -> Tensor:
    bits = torch.randint(0, 2, shape, generator=generator, device=outputs.device)
    return (2 * bits - 1).to(outputs.dtype)


def _slack(dtype: torch.dtype) -> float:
    """Rounding that a row of output gradients may carry, relative to the sum of its entries."""
    return 0.1 if dtype in (torch.float16, torch.bfloat16) else 1e-2


def _unsure(dtype: torch.dtype) -> float:
    """Probability mass beside the top label from which ``p - y``, computed in this dtype, is more than rounding."""
    return max(UNSURE, 32 * torch.finfo(dtype).eps)


def _underflow(dtype: torch.dtype) -> float:
    """Size up to which an entry of a gradient in this dtype becomes zero."""
    info = torch.finfo(dtype)
    return info.tiny * info.eps


def _in_front_of_log_softmax(outputs: Tensor, gradients: Tensor, dim: int) -> Tensor:
    """Gradients in the logits if the outputs are log-probabilities (a model that ends in ``log_softmax``), else as given.

    A negative log-likelihood has ``-c y`` in log-probabilities where it has ``c (p - y)`` in the logits. The Fisher matrix
    is the same: ``log_softmax`` does not change log-probabilities, and scores sum to zero.
    """
    dtype, outputs = outputs.dtype, _wide(outputs.detach())
    if bool((torch.logsumexp(outputs, dim).abs() > _slack(dtype)).any()):
        return gradients
    return gradients - outputs.exp() * gradients.sum(dim, keepdim=True)


def _fitted_scale(residual: Tensor, gradients: Tensor, dtype: torch.dtype) -> float | None:
    """Least-squares ``c`` with ``gradients = c * residual``, None unless it explains them to rounding."""
    square = residual.square().sum()
    if residual.numel() == 0 or not bool(square > 0):
        return None
    scale = (residual * gradients).sum() / square
    error = (gradients - scale * residual).norm()
    if not bool(error <= _slack(dtype) * gradients.norm()) or not bool(scale > 0):
        return None
    return float(scale)


def _softmax_like(outputs: Tensor, gradients: Tensor) -> str | None:
    """Every row of two or more output gradients sums to zero: only a softmax does that."""
    if outputs.dim() < 2:
        return None
    g = gradients.detach().to(torch.promote_types(gradients.dtype, torch.float32))
    for dim in {1, outputs.dim() - 1}:
        if outputs.shape[dim] < 2:
            continue
        total, size = g.sum(dim).abs().sum(), g.abs().sum()
        if bool(size > 0) and bool(total <= 1e-5 * size):
            return "every row of the loss's output gradient sums to zero, as only that of a cross-entropy does"
    return None
