"""Scores of all labels at once, and the moments of the estimator made of their outer products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt.fisher.routes import StoreSet, joined_rows
from kfac_opt.fisher.source import FisherSource, readable
from kfac_opt.likelihoods import Bernoulli, Categorical, Likelihood

OWNER = "estimator_variance"


class ScoreSource:
    """Jacobians of the logits, chunk by chunk, and the label probabilities.

    A Bernoulli output ``f`` is two classes with the logits ``(0, f)``.

    Attributes:
        probabilities: ``[N, classes]``.
        classes: number of labels.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        likelihood: Likelihood,
        memory_limit: int,
        outputs: Callable[[Any], Any] | None,
    ) -> None:
        if not isinstance(likelihood, (Categorical, Bernoulli)):
            raise ValueError(
                f"{OWNER}: the {likelihood.name} likelihood has no finite set of labels; the formulas are those of a "
                "softmax. Use likelihood='categorical', or 'bernoulli' with one output."
            )
        self.source = FisherSource(
            model,
            inputs,
            likelihood,
            "exact",
            label_samples=1,
            labels=None,
            generator=None,
            outputs=outputs,
            memory_limit=memory_limit,
            owner=OWNER,
        )
        self.binary = isinstance(likelihood, Bernoulli)
        self._likelihood = likelihood
        chunks = [self._chunk_probabilities(logits) for logits in self._logits()]
        self.probabilities = torch.cat(chunks)
        self.classes = self.probabilities.shape[1]
        # A tile of inner products between two chunks, and a handful of copies, must fit.
        item = self.source.model.row_dtype.itemsize
        widest = int((self.source.work_bytes / (8 * item)) ** 0.5) // self.classes
        if self.source.capture_columns < self.source.columns:
            raise ValueError(
                f"{OWNER}: the Jacobian of one input does not fit into the working memory, a quarter of the memory_limit of "
                f"{readable(memory_limit)}. Raise memory_limit."
            )
        self.source.capture_chunk = max(1, min(self.source.capture_chunk, widest))
        self._kept = self._keep(memory_limit)

    def _logits(self) -> Iterator[Tensor]:
        for chunk, _ in self.source.chunks():
            with torch.no_grad():
                logits, mask = self.source.model.forward(chunk)
            if mask is not None:
                raise ValueError(f"{OWNER}: masks are not supported. Pass an outputs= that returns the logits alone.")
            yield logits

    def _chunk_probabilities(self, logits: Tensor) -> Tensor:
        labels = 2 if self.binary else logits.shape[-1]
        per_example = logits.numel() // logits.shape[0]
        if per_example != (1 if self.binary else labels):
            raise ValueError(
                f"{OWNER}: outputs of shape {list(logits.shape)} hold several labels per input, expected "
                + ("[batch] or [batch, 1]." if self.binary else "[batch, classes].")
                + " Give inputs with one label each."
            )
        flat = logits.reshape(len(logits), -1).to(self.source.model.row_dtype)
        return (F.pad(flat, (1, 0)) if self.binary else flat).softmax(-1)

    def columns(self, logits: Tensor, mask: Tensor | None) -> list[Tensor]:
        """One unit vector per logit: their pull-backs are the rows of the Jacobian."""
        units = torch.eye(logits[0].numel(), dtype=logits.dtype, device=logits.device)
        return [unit.reshape(logits[0].shape).expand(logits.shape) for unit in units]

    def _as_rows(self, name: str) -> bool:
        source = self.source
        shape = next(source.shapes[block.name] for block in source.blocks if block.name == name)
        size = next(block.size for block in source.blocks if block.name == name)
        rows = self.classes * size
        return shape.shared == 0 or rows <= shape.groups * shape.shared * (shape.in_dim + self.classes * shape.out_dim)

    def _make(self) -> Iterator[StoreSet]:
        for chunk, _ in self.source.chunks(self.source.capture_chunk):
            yield from self.source.capture.stores(chunk, self.columns, lambda block: self._as_rows(block.name))

    def _keep(self, memory_limit: int) -> list[StoreSet] | None:
        """All Jacobians, if they fit; else they are made anew for every pair of chunks."""
        kept: list[StoreSet] = []
        room = memory_limit - self.source.work_bytes
        for stores in self._make():
            room -= sum(store.nbytes for store in stores.values())
            if room < 0:
                return None
            kept.append(stores)
        return kept

    @property
    def num_tiles(self) -> int:
        """Pairs of different chunks."""
        return self.num_chunks * (self.num_chunks - 1) // 2

    @property
    def num_chunks(self) -> int:
        """Of how many chunks :meth:`jacobians` makes one pass."""
        return sum(-(-size // self.source.capture_chunk) for size in self.source.data.sizes)

    def jacobians(self) -> Iterator[StoreSet]:
        """Stores with one column per logit, chunk by chunk."""
        return iter(self._kept) if self._kept is not None else self._make()

    def gram(self, left: StoreSet, right: StoreSet) -> dict[str, Tensor]:
        """Inner products of the Jacobians' rows per block: ``[n, classes, n', classes]``."""
        found = {}
        for name, store in left.items():
            tile = store.gram(right[name]).reshape(store.examples, store.columns, -1, store.columns)
            found[name] = F.pad(tile, (1, 0, 0, 0, 1, 0)) if self.binary else tile
        return found


@dataclass
class FirstMoments:
    """Norms of one block's covariance of ``I1`` with one label per input, averaged over the inputs."""

    total: float = 0.0
    covariance: float = 0.0
    bound: float = 0.0
    fisher_norm: float = 0.0
    spectral_norm: float = 0.0


def first_moments(
    scores: ScoreSource, num_tiles: int | None = None, generator: torch.Generator | None = None
) -> dict[str | None, FirstMoments]:
    r"""Moments of every block, and of the whole network under None.

    With :math:`Q = S S'^\top` between two inputs and :math:`R = Q \circ Q`, the inner product of their covariances is
    :math:`\sum_{yz} p_y p'_z W_{yz}^2`, :math:`W = R - b 1^\top - 1 b'^\top + p^\top R p'`, :math:`b = R p'`,
    :math:`b' = R^\top p`.

    Args:
        num_tiles: pairs of different chunks of inputs that are drawn (with replacement) for an unbiased estimate of the
            squares of ``covariance`` and ``fisher_norm``; None takes all pairs.
        generator: draws them.
    """
    weights = _tile_weights(scores, num_tiles, generator)
    names: list[str | None] = [None, *(block.name for block in scores.source.blocks)]
    sums = {name: FirstMoments() for name in names}
    label_norms = _label_covariance_norms(scores.probabilities)
    with torch.no_grad():
        start = 0
        for row, left in enumerate(scores.jacobians()):
            size = next(iter(left.values())).examples
            p = scores.probabilities[start : start + size].double()
            other = 0
            for column, right in enumerate(scores.jacobians()):
                width = next(iter(right.values())).examples
                weight = 1.0 if row == column else 2.0 * weights.get((row, column), 0.0) if weights is not None else 2.0
                if row <= column and weight:
                    own = scores.gram(left, right)
                    tiles: dict[str | None, Tensor] = dict(own.items())
                    tiles[None] = torch.stack(list(own.values())).sum(0)
                    q = scores.probabilities[other : other + width].double()
                    for name, tile in tiles.items():
                        _add_pair(sums[name], tile.double(), p, q, weight)
                        if row == column:
                            _add_own(sums[name], tile.double(), p, label_norms[start : start + size])
                other += width
            start += size
    for moments in sums.values():
        moments.total /= start**2
        moments.bound /= start**2
        moments.covariance = max(moments.covariance, 0.0) ** 0.5 / start**2
        moments.fisher_norm = max(moments.fisher_norm, 0.0) ** 0.5 / start
    return sums


def _tile_weights(
    scores: ScoreSource, num_tiles: int | None, generator: torch.Generator | None
) -> dict[tuple[int, int], float] | None:
    """How much each drawn pair of chunks counts; None when all pairs are to be taken."""
    if num_tiles is None:
        return None
    count, pairs = scores.num_chunks, scores.num_tiles
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    drawn = torch.rand(num_tiles, 2, generator=generator, dtype=torch.float64, device=generator.device).cpu()
    first = (drawn[:, 0] * count).long()
    second = (first + 1 + (drawn[:, 1] * (count - 1)).long()) % count  # any other chunk
    weights: dict[tuple[int, int], float] = {}
    for a, b in zip(first.tolist(), second.tolist()):
        pair = (min(a, b), max(a, b))
        weights[pair] = weights.get(pair, 0.0) + pairs / num_tiles
    return weights


def _centred(gram: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """``S S'ᵀ`` from ``J J'ᵀ [n, C, n', C]``: the mean row of each input is taken off."""
    gram = gram - torch.einsum("na,namb->nmb", p, gram).unsqueeze(1)
    return gram - torch.einsum("namb,mb->nam", gram, q).unsqueeze(3)


def _add_pair(moments: FirstMoments, gram: Tensor, p: Tensor, q: Tensor, weight: float) -> None:
    squares = _centred(gram, p, q).square()
    right = torch.einsum("namb,mb->nam", squares, q)
    left = torch.einsum("na,namb->nmb", p, squares)
    mean = torch.einsum("na,nam->nm", p, right)
    centred = squares - right.unsqueeze(3) - left.unsqueeze(1) + mean.unsqueeze(1).unsqueeze(3)
    moments.covariance += weight * float(torch.einsum("na,namb,mb->", p, centred.square(), q))
    moments.fisher_norm += weight * float(mean.sum())


def _add_own(moments: FirstMoments, gram: Tensor, p: Tensor, label_norms: Tensor) -> None:
    """What only one input's own scores enter: total variance, bound, spectral norm."""
    own = torch.einsum("nanb->nab", gram)
    squares = torch.einsum("nanb->nab", _centred(gram, p, p)).square()
    mean = torch.einsum("na,nab,nb->n", p, squares, p)
    moments.total += float((torch.einsum("na,naa->n", p, squares) - mean).sum())
    moments.bound += float(own.diagonal(dim1=1, dim2=2).sum(-1).square() @ label_norms.double())
    largest = torch.linalg.eigvalsh(own)[:, -1].clamp_min(0.0).max()
    moments.spectral_norm = max(moments.spectral_norm, float(largest) ** 0.5)


def _label_covariance_norms(p: Tensor) -> Tensor:
    """``‖K − H ⊗ H‖_F`` of every input ``[N]``: the same norm with the scores ``I − 1 pᵀ``."""
    norms = []
    for row in p.double():
        moments = FirstMoments()
        identity = torch.eye(len(row), dtype=row.dtype, device=row.device).reshape(1, len(row), 1, len(row))
        _add_pair(moments, identity, row.unsqueeze(0), row.unsqueeze(0), weight=1.0)
        norms.append(max(moments.covariance, 0.0) ** 0.5)
    return torch.tensor(norms, dtype=p.dtype, device=p.device)


def entrywise_first(scores: ScoreSource) -> Tensor:
    """``Σ_n (S∘S)ᵀ diag(p) (S∘S) − F_n∘F_n``, ``[P, P]``."""
    size, model = scores.source.model.size, scores.source.model
    total = torch.zeros(size, size, dtype=model.row_dtype, device=model.device)
    index = 0
    with torch.no_grad():
        for stores in scores.jacobians():
            columns = next(iter(stores.values())).columns
            limit = columns * size * model.row_dtype.itemsize  # one input at a time
            for jacobian in joined_rows(list(stores.values()), limit):
                p = scores.probabilities[index].unsqueeze(1)
                rows = F.pad(jacobian, (0, 0, 1, 0)) if scores.binary else jacobian
                rows = rows - (p * rows).sum(0)
                squares = rows.square()
                total.addmm_(squares.mT, p * squares)
                total -= (rows.mT @ (p * rows)).square_()
                index += 1
    return total
