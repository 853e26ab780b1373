r"""The Fisher matrix of a model as a matrix: products, trace, eigenvalues, without writing it out.

:math:`F = \frac1N \sum_n J_n^\top H_n J_n` with the Jacobian ``J_n`` and the output Hessian ``H_n`` of every term of
the mean loss (Martens 2020, arXiv:1412.1193, §9).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kfac_opt.fisher.krylov import TopEigenpairs
from kfac_opt.fisher.lanczos import drive
from kfac_opt.fisher.plan import Blocks, RouteName, make_plan
from kfac_opt.fisher.routes import DenseRoute, StoreRoute, dense_blocks, gram_matrices, make_route
from kfac_opt.fisher.source import FisherSource, is_number, readable
from kfac_opt.fisher.stores import Store
from kfac_opt.fisher.terms import FisherKind
from kfac_opt.likelihoods import Likelihood, LikelihoodName, make_likelihood

KINDS = ("exact", "mc", "empirical")
BLOCKS = ("full", "layer_wise")
ROUTES = ("dense", "gram", "factored", "streamed", "func")
DIRECT_SIZE = 2500
"""Up to this size eigenpairs come from a dense decomposition, beyond from Krylov iteration."""
KRYLOV_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


class FisherMatrix:
    r"""Fisher matrix of a model on some data, at the weights that the model has now.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> fisher = FisherMatrix(model, torch.randn(8, 3), kind="exact")
    >>> fisher.shape, (fisher @ torch.ones(26)).shape, fisher.route
    ((26, 26), torch.Size([26]), 'dense')

    Args:
        model: any module; ``model.eval()`` where it has batch normalization or dropout. Its gradients, mode, buffers,
            and all random states are left alone; an attached KFAC does not count the passes. Later changes of the
            weights do not reach the matrix.
        data: a tensor of inputs, an ``(inputs, targets)`` pair, or an iterable of such (a DataLoader), which is
            walked through several times and must give the same examples each time. Batches count by their size.
        likelihood: output distribution.
        kind: ``"exact"``: expectation over the model's labels. ``"mc"``: ``label_samples`` labels per loss term drawn
            from the model, once, here. ``"empirical"``: the data's targets.
        blocks: ``"full"``, or ``"layer_wise"``: block diagonal with one block per module that owns parameters.
        label_samples: ``m`` of ``"mc"``.
        labels: ``[N, m]``, to use instead of drawing; of a multi-output Gaussian or Bernoulli ``[N, m, outputs]``.
        generator: draws the labels; None means seed 0.
        route: how products are made. None takes the fastest that fits, said in ``route`` and ``route_reason``:
            ``"dense"`` writes the matrix out (taken up to P = 5000); ``"gram"`` keeps all rows (few rows);
            ``"factored"`` keeps layer inputs and output gradients of linear maps, so that a product needs no pass
            through the network; ``"streamed"`` makes those anew for every product; ``"func"`` is jvp and vjp of
            torch.func.
        memory_limit: bytes that this object may keep and use on the way; default 2 GiB. The data, the model's copy,
            and the vectors are not counted.
        outputs: picks the logits, or ``(logits, mask)`` with a bool mask over loss terms, from what the model returns.

    Vectors hold the trainable parameters in the order of ``model.named_parameters()``, each flattened row-major.

    Raises:
        ValueError: the model has no per-example Jacobian (batch normalization in training mode, examples that see
            each other, dropout); the likelihood does not fit the output; the limit cannot be met; bad arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        likelihood: LikelihoodName | Likelihood = "categorical",
        kind: FisherKind = "exact",
        blocks: Blocks = "full",
        label_samples: int = 1,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        route: RouteName | None = None,
        memory_limit: int = 2 * 1024**3,
        outputs: Callable[[Any], Any] | None = None,
    ) -> None:
        _one_of("kind", kind, KINDS)
        _one_of("blocks", blocks, BLOCKS)
        if route is not None:
            _one_of("route", route, ROUTES)
        if not is_number(label_samples, whole=True) or label_samples < 1:
            raise ValueError(f"FisherMatrix: label_samples must be a whole number >= 1, got {label_samples!r}")
        if labels is not None and kind != "mc":
            raise ValueError(f"FisherMatrix: labels belong to kind='mc', got kind='{kind}'. Leave labels out.")
        self.kind, self.is_layer_wise = kind, blocks == "layer_wise"
        self._source = FisherSource(
            model,
            data,
            make_likelihood(likelihood),
            kind,
            label_samples=label_samples,
            labels=labels,
            generator=generator,
            outputs=outputs,
            memory_limit=memory_limit,
            owner="FisherMatrix",
        )
        plan = make_plan(self._source, blocks, route)
        self.route: RouteName = plan.route
        self.route_reason = plan.reason
        self._route = make_route(self._source, blocks, plan)
        self._traces: dict[str, Tensor] | None = None

    # -- what it is ---------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)``."""
        return self._source.model.size, self._source.model.size

    @property
    def dtype(self) -> torch.dtype:
        """Of products: that of the parameters, at least single precision."""
        return self._source.model.row_dtype

    @property
    def device(self) -> torch.device:
        """Of products: that of the model."""
        return self._source.model.device

    @property
    def memory_limit(self) -> int:
        """Bytes that this object may use."""
        return self._source.memory_limit

    @property
    def num_terms(self) -> int:
        """``N``: examples, or unmasked tokens or pixels."""
        return self._source.num_terms

    @property
    def num_rows(self) -> int:
        """Rows ``u`` in ``F = (1/N) Σ u uᵀ``: the rank is at most this."""
        return self._source.num_rows

    @property
    def labels(self) -> Tensor | None:
        """``[N, label_samples]`` in the order of the data, for ``kind="mc"``."""
        return self._source.labels

    @property
    def block_slices(self) -> dict[str, slice]:
        """Where the parameters of each module lie in a vector; the blocks of ``layer_wise``."""
        return {block.name: block.slice for block in self._source.blocks}

    def __repr__(self) -> str:
        blocks = "layer_wise" if self.is_layer_wise else "full"
        sizes = f"P={self.shape[0]}, N={self.num_terms}"
        return f"FisherMatrix({sizes}, kind='{self.kind}', blocks='{blocks}', route='{self.route}')"

    def with_blocks(self, blocks: Blocks) -> FisherMatrix:
        """The same matrix, full or layer-wise, sharing the data, the labels and the kept rows."""
        _one_of("blocks", blocks, BLOCKS)
        other = copy.copy(self)
        other.is_layer_wise = blocks == "layer_wise"
        if isinstance(self._route, StoreRoute):
            other._route = copy.copy(self._route)
            other._route.layer_wise = other.is_layer_wise
        elif other.is_layer_wise != self.is_layer_wise:
            plan = make_plan(self._source, blocks, None)
            other.route, other.route_reason = plan.route, plan.reason
            other._route = make_route(self._source, blocks, plan)
        return other

    def rows_by_block(self) -> Iterator[tuple[str, Store]]:
        """Name of a block and the rows of some examples in it, until all examples of all blocks were seen.

        For every block the examples come in the order of the data. Rows are not yet divided by ``N``.
        """
        with torch.no_grad():
            for stores in self._route.store_sets():
                yield from stores.items()

    # -- products -----------------------------------------------------------------------------------------------

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """``F v`` for ``v [P]``, or ``F V`` for ``V [P, q]``."""
        if not isinstance(vectors, Tensor) or vectors.dim() not in (1, 2) or vectors.shape[0] != self.shape[0]:
            found = list(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
            raise ValueError(
                f"FisherMatrix: cannot multiply with {found}, expected a tensor of shape [{self.shape[0]}] or "
                f"[{self.shape[0]}, q]."
            )
        columns = vectors.detach().to(self.device, self.dtype)
        if columns.numel() == 0:
            return columns
        result = self._route.product(columns.reshape(self.shape[0], -1))
        return result.reshape(columns.shape)

    def trace(self) -> Tensor:
        """Exact trace, 0-dim: the mean squared norm of the rows."""
        return torch.stack(list(self.block_traces().values())).sum()

    def block_traces(self) -> dict[str, Tensor]:
        """Exact trace of the diagonal block of every module that owns parameters, 0-dim each."""
        if self._traces is None:
            totals = {name: torch.zeros((), dtype=torch.float64, device=self.device) for name in self.block_slices}
            with torch.no_grad():
                if isinstance(self._route, DenseRoute):
                    for name, where in self.block_slices.items():
                        matrices = self._route.matrices
                        diagonal = matrices[name].diagonal() if self.is_layer_wise else matrices[""].diagonal()[where]
                        totals[name] += diagonal.double().sum()
                else:
                    for stores in self._route.store_sets():
                        for name, store in stores.items():
                            totals[name] += store.squares().double().sum() / self.num_terms
            self._traces = {name: total.to(self.dtype) for name, total in totals.items()}
        return dict(self._traces)

    def diagonal(self) -> Tensor:
        """The diagonal ``[P]``: of every parameter the mean squared entry of its rows (of EWC, Kirkpatrick et al. 2017).

        The same for ``full`` and ``layer_wise``; summed in double precision over rows that are made in turn, so that it
        takes no more memory than a product.
        """
        if isinstance(self._route, DenseRoute):
            names = self.block_slices if self.is_layer_wise else [""]
            return torch.cat([self._route.matrices[name].diagonal() for name in names])
        total = torch.zeros(self.shape[0], dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for name, store in self.rows_by_block():
                for rows in store.row_slices(max(1, self._source.work_bytes // 4)):
                    total[self.block_slices[name]] += rows.square().sum(0)
        return (total / self.num_terms).to(self.dtype)

    def to_dense(self) -> Tensor:
        """``[P, P]``; zero between the blocks of ``layer_wise``."""
        size = self.shape[0]
        self._demand("to_dense", 2 * size * size, f"P = {size}")
        matrices = self._matrices()
        if not self.is_layer_wise:
            return matrices[""].clone()
        dense = torch.zeros(size, size, dtype=self.dtype, device=self.device)
        for block in self._source.blocks:
            dense[block.slice, block.slice] = matrices[block.name]
        return dense

    def eigenvalues(self) -> Tensor:
        """All ``P`` eigenvalues ``[P]``, ascending, zeros included.

        Of the matrix, or of the Gram matrix of its rows where that is smaller; in double precision.
        """
        values = list(self.block_eigenvalues().values())
        return torch.cat(values).sort().values

    def block_eigenvalues(self) -> dict[str, Tensor]:
        """Eigenvalues of each diagonal block, ascending, by module name; of the whole under ``""`` for ``full``."""
        if self._uses_gram():
            grams = self._grams()
            return {name: self._padded(_eigenvalues(grams[name]), size) for name, size in self._parts().items()}
        for name, size in self._parts().items():
            self._demand("eigenvalues", 4 * size * size, f"{self._part(name)} with {size} parameters")
        return {name: _eigenvalues(matrix) for name, matrix in self._matrices().items()}

    def top_eigenpairs(self, k: int, *, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
        """The ``k`` largest eigenvalues ``[k]``, descending, and their eigenvectors ``[P, k]``.

        Args:
            k: number of pairs.
            tolerance: residual norm relative to the largest eigenvalue; 1e-12 in double, 1e-5 in single precision.
        """
        size = self.shape[0]
        if not is_number(k, whole=True) or not 1 <= k <= size:
            raise ValueError(f"FisherMatrix: k must be a whole number in [1, {size}], got {k!r}")
        pairs = self.block_eigenpairs(k, tolerance=tolerance)
        slices = self.block_slices if self.is_layer_wise else {"": slice(0, size)}
        values = torch.cat([found for found, _ in pairs.values()])
        vectors = torch.zeros(size, len(values), dtype=self.dtype, device=self.device)
        column = 0
        for name, (found, own) in pairs.items():
            vectors[slices[name], column : column + len(found)] = own
            column += len(found)
        order = values.argsort(descending=True)[:k]
        return values[order], vectors[:, order]

    def block_eigenpairs(self, k: int, *, tolerance: float | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """The ``k`` (or all, if fewer) largest eigenpairs of each block: values ``[k]``, vectors ``[size, k]``.

        One Krylov iteration over all blocks at once where they are large: a product serves every block.
        """
        parts = self._parts()
        fits = self._dense_entries() * self.dtype.itemsize <= self.memory_limit
        if (max(parts.values()) <= DIRECT_SIZE and fits) or isinstance(self._route, DenseRoute):
            return {name: _top(matrix, min(k, len(matrix))) for name, matrix in self._matrices().items()}
        tolerance = KRYLOV_TOLERANCE[self.dtype] if tolerance is None else tolerance
        return self._krylov(parts, k, tolerance)

    # -- helpers ------------------------------------------------------------------------------------------------

    def _parts(self) -> dict[str, int]:
        """Sizes of the matrices whose union of spectra is the spectrum."""
        if self.is_layer_wise:
            return {block.name: block.size for block in self._source.blocks}
        return {"": self.shape[0]}

    def _part(self, name: str) -> str:
        return f"block '{name}'" if self.is_layer_wise else "a matrix"

    def _matrices(self) -> dict[str, Tensor]:
        if isinstance(self._route, DenseRoute):
            return self._route.matrices
        self._demand("a dense matrix", self._dense_entries(), f"P = {self.shape[0]}")
        return dense_blocks(self._source, self._route.store_sets(), self.is_layer_wise)

    def _dense_entries(self) -> int:
        """Numbers of the matrices written out, and of as many again on the way."""
        return sum(2 * size * size for size in self._parts().values())

    def _uses_gram(self) -> bool:
        """Whether the Gram matrix of the rows is the smaller problem, and its rows can be kept."""
        if self.num_rows >= max(self._parts().values()) or isinstance(self._route, DenseRoute):
            return False
        room = self._source.memory_limit
        return isinstance(self._route, StoreRoute) and 4 * self.num_rows**2 * self.dtype.itemsize <= room

    def _grams(self) -> dict[str, Tensor]:
        return gram_matrices(self._source, list(self._route.store_sets()), self.is_layer_wise)

    def _padded(self, values: Tensor, size: int) -> Tensor:
        """The rows' spectrum with the zeros that bring it to ``size``."""
        if len(values) >= size:
            return values[-size:] if size else values
        return torch.cat([values.new_zeros(size - len(values)), values])

    def _demand(self, what: str, entries: int, size: str) -> None:
        needed = entries * self.dtype.itemsize
        if needed > self._source.memory_limit:
            raise ValueError(
                f"FisherMatrix: {what} of {size} needs {readable(needed)}, memory_limit is "
                f"{readable(self._source.memory_limit)}. Raise memory_limit, or use products, top_eigenpairs() and "
                "spectral_density()."
            )

    def _krylov(self, parts: dict[str, int], k: int, tolerance: float) -> dict[str, tuple[Tensor, Tensor]]:
        size = self.shape[0]
        room = self._source.memory_limit // (2 * size * self.dtype.itemsize)
        if room < 2 * k + 2:
            needed = 2 * (2 * k + 2) * size * self.dtype.itemsize
            raise ValueError(
                f"FisherMatrix: {k} eigenpairs of size {size} need {readable(needed)}, "
                f"memory_limit is {readable(self._source.memory_limit)}. Raise memory_limit or ask for fewer pairs."
            )
        slices = self.block_slices if self.is_layer_wise else {"": slice(0, size)}
        searches: dict[str, TopEigenpairs] = {}
        for name, part in parts.items():
            noise = torch.randn(part, min(part, max(2, k)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            searches[name] = TopEigenpairs(
                noise.to(self.device, self.dtype), k, tolerance=tolerance, max_columns=min(room, max(40, 4 * k))
            )
        drive(searches, slices, self)
        return {name: (search.values, search.pairs) for name, search in searches.items()}


def _eigenvalues(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(matrix.double()).clamp_min(0.0).to(matrix.dtype)


def _top(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix.double())
    order = slice(len(matrix) - k, None)
    return values[order].flip(0).clamp_min(0.0).to(matrix.dtype), vectors[:, order].flip(1).to(matrix.dtype)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"FisherMatrix: {name} must be one of {list(allowed)}, got {value!r}")
