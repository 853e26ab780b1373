"""Refreshes of several layers at once: matrices of one size are inverted or decomposed as one batch.

A GPU takes as long for one small matrix as for many. On CPUs one by one is as fast. Not measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from kfac_opt._curvature.block import Damping, State
from kfac_opt._curvature.kronecker import KroneckerBlock, Refreshed
from kfac_opt._curvature.linalg import FactorizationError, damped_root, eigenbasis

Layer = tuple[KroneckerBlock, State, Damping]
Problem = tuple[Tensor, Tensor | None, float]  # a factor, its damping (None for the eigenbasis) and the power
STACKED_DEVICES = {"cuda"}


def stacks(block: object, state: State) -> bool:
    """Whether this layer's refresh can be part of a batch: whole dense factors on a device where that pays."""
    return (
        isinstance(block, KroneckerBlock)
        and state["scale"].device.type in STACKED_DEVICES
        and all(side.dense and not side.blocked for side in block.sides.values())
    )


def refresh_stacked(layers: Sequence[Layer]) -> list[FactorizationError | None]:
    """:meth:`KroneckerBlock.refresh` of each layer, all that have problems of one shape in common calls.

    A batch that fails as a whole is done again layer by layer, so that it is known whose factors are at fault.

    Returns:
        What each layer's refresh would have raised.
    """
    works = [block.refresh_work(state, damping) for block, state, damping in layers]
    problems: dict[tuple[int, str], Problem] = {}
    for index, ((block, state, damping), work) in enumerate(zip(layers, works)):
        if work is not None:
            problems |= {(index, key): (*value, damping.power) for key, value in block.problems(state, damping).items()}
    solved = _solve(problems)
    errors: list[FactorizationError | None] = [None] * len(layers)
    for index, ((block, state, damping), work) in enumerate(zip(layers, works)):
        if work is None:
            continue
        own = [(key, solved.get((number, key))) for number, key in problems if number == index]
        if all(result is not None for _, result in own):
            found: Refreshed = {}
            for _, result in own:
                found |= result or {}
            work = partial(work, found)
        try:
            block.finish_refresh(state, work, int(state["estimates"]), damping)
        except FactorizationError as error:
            errors[index] = error
    return errors


def _solve(problems: dict[tuple[int, str], Problem]) -> dict[tuple[int, str], Refreshed]:
    """Results of each problem under the names of the state they go to; none for those of a batch that failed."""
    batches: dict[tuple[object, ...], list[tuple[int, str]]] = {}
    for name, (matrix, damping, power) in problems.items():
        kind = None if damping is None else power
        batches.setdefault((matrix.shape[-1], matrix.dtype, matrix.device, kind), []).append(name)
    solved: dict[tuple[int, str], Refreshed] = {}
    for names in batches.values():
        matrices = torch.cat([problems[name][0] for name in names])
        dampings = [damping for _, damping, _ in (problems[name] for name in names) if damping is not None]
        counts = [problems[name][0].shape[0] for name in names]
        try:
            if dampings:
                inverses = damped_root(matrices, torch.cat(dampings), problems[names[0]][2])
                for (index, key), inverse in zip(names, inverses.split(counts)):
                    solved[index, key] = {key: [inverse]}
            else:
                values, vectors = (part.split(counts) for part in eigenbasis(matrices))
                for (index, key), value, vector in zip(names, values, vectors):
                    solved[index, key] = {key: [vector], key.replace("_basis", "_values"): [value]}
        except FactorizationError:
            continue
    return solved
