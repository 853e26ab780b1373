"""Second derivatives of every logit, direction by direction: what the Hessian estimator's variance is made of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jacrev, jvp

from kfac_opt.fisher.data import Batch
from kfac_opt.fisher.frozen import Parameters
from kfac_opt.fisher.scores import OWNER, ScoreSource
from kfac_opt.fisher.source import readable


def hessian_inner_products(
    scores: ScoreSource, num_probes: int | None, generator: torch.Generator | None
) -> dict[str | None, Tensor]:
    r"""``⟨∂²h^a(x_n), ∂²h^b(x_m)⟩_F`` for the diagonal block of each layer, and for all parameters under None.

    Args:
        num_probes: None runs over all unit vectors (exact); else so many random sign vectors ``v`` per block:
            :math:`E[\partial^2 h^a v\, v^\top \partial^2 h^b]` is the inner product.

    Returns:
        ``[N, C, N, C]`` each, double precision.
    """
    inputs, classes = scores.source.num_examples, scores.classes
    device = scores.source.model.device
    blocks = scores.source.blocks
    needed = 8 * (len(blocks) + 1) * (inputs * classes) ** 2
    if needed > scores.source.memory_limit:
        raise ValueError(
            f"{OWNER}: the inner products of the Hessians of {inputs} inputs × {classes} logits need {readable(needed)}, "
            f"memory_limit is {readable(scores.source.memory_limit)}. Raise memory_limit, give fewer inputs, or leave the "
            "second estimator out with second='skip'."
        )
    shape = (inputs * classes, inputs * classes)
    found: dict[str | None, Tensor] = {
        key: torch.zeros(shape, dtype=torch.float64, device=device) for key in (None, *(b.name for b in blocks))
    }
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    for block in blocks:
        for directions, scale in _directions(scores, block.slice, num_probes, generator):
            columns = torch.cat(list(second_derivatives(scores, directions)), dim=1)  # [q, N·C, P]
            whole = columns.transpose(0, 1).flatten(1)
            found[None] += (scale * (whole @ whole.mT)).double()
            own = columns[:, :, block.slice].transpose(0, 1).flatten(1)
            found[block.name] += (scale * (own @ own.mT)).double()
    return {key: value.reshape(inputs, classes, inputs, classes) for key, value in found.items()}


def second_derivatives(scores: ScoreSource, directions: Tensor) -> Iterator[Tensor]:
    """``∂²h^a v`` of every input's logits in turn: ``[q, C, P]`` for ``directions [q, P]``."""
    model = scores.source.model
    values = {name: value.detach() for name, value in model.trainable.items()}
    sizes = [value.numel() for value in values.values()]
    shapes = [value.shape for value in values.values()]

    def unflattened(vector: Tensor) -> Parameters:
        pieces = vector.split(sizes)
        return {name: piece.reshape(shape).to(values[name]) for name, piece, shape in zip(values, pieces, shapes)}

    with torch.no_grad():
        for chunk, _ in scores.source.chunks():
            for index in range(chunk.size):
                example = chunk.slice(index, index + 1)

                def jacobian(parameters: Parameters, example: Batch = example) -> Tensor:
                    rows = jacrev(lambda p: model.forward(example, p)[0].reshape(-1))(parameters)
                    return torch.cat([rows[name].flatten(1) for name in values], dim=1)

                def along(vector: Tensor) -> Tensor:
                    return jvp(jacobian, (values,), (unflattened(vector),))[1]

                try:
                    products = torch.vmap(along)(directions)
                except (RuntimeError, NotImplementedError) as error:
                    raise ValueError(
                        f"{OWNER}: the second derivatives of this model cannot be taken ({error}). Leave the second estimator "
                        "out with second='skip'."
                    ) from error
                yield F.pad(products, (0, 0, 1, 0)) if scores.binary else products


def _directions(
    scores: ScoreSource, where: slice, num_probes: int | None, generator: torch.Generator
) -> Iterator[tuple[Tensor, float]]:
    """Vectors ``[q, P]`` that are zero outside the block, a few at a time, and the factor of their outer products."""
    model = scores.source.model
    size, width = model.size, where.stop - where.start
    count = width if num_probes is None else num_probes
    one = 3 * scores.source.num_examples * scores.classes * size * model.row_dtype.itemsize
    if one > scores.source.memory_limit:
        raise ValueError(
            f"{OWNER}: the Hessians of all logits of {scores.source.num_examples} inputs along one direction need "
            f"{readable(one)}, memory_limit is {readable(scores.source.memory_limit)}. Raise memory_limit, give fewer "
            "inputs, or leave the second estimator out with second='skip'."
        )
    step = max(1, min(256, scores.source.work_bytes // one))
    for start in range(0, count, step):
        rows = min(step, count - start)
        vectors = torch.zeros(rows, size, dtype=model.row_dtype, device=model.device)
        if num_probes is None:
            vectors[torch.arange(rows), where.start + start + torch.arange(rows)] = 1.0
            yield vectors, 1.0
        else:
            signs = 2.0 * torch.randint(0, 2, (rows, width), generator=generator, device=generator.device) - 1.0
            vectors[:, where] = signs.to(vectors)
            yield vectors, 1.0 / num_probes


def entrywise_second(scores: ScoreSource) -> Tensor:
    """``Σ_n [Σ_a p_a (∂²_ij h^a)² − (Σ_a p_a ∂²_ij h^a)²]``, ``[P, P]``."""
    model = scores.source.model
    total = torch.zeros(model.size, model.size, dtype=model.row_dtype, device=model.device)
    for block in scores.source.blocks:
        start = block.start
        for directions, _ in _directions(scores, block.slice, None, torch.Generator()):
            for p, columns in zip(scores.probabilities, second_derivatives(scores, directions)):
                mean = torch.einsum("a,qap->qp", p, columns)
                total[start : start + len(directions)] += torch.einsum("a,qap->qp", p, columns.square()) - mean.square()
            start += len(directions)
    return total
