"""From an optimizer's curvature to blocks of a posterior."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from kfac_opt.curvature.block import CurvatureBlock, State
from kfac_opt.curvature.eigenbasis import EigenbasisBlock
from kfac_opt.curvature.kronecker import KroneckerBlock
from kfac_opt.likelihoods import Likelihood
from kfac_opt.optim.tracking import TrackedBlock
from kfac_opt.posterior import Posterior, PosteriorBlock, PosteriorDamping, Width, unwrapped


@torch.no_grad()
def build_posterior(
    owner: str,
    model: nn.Module,
    blocks: list[PosteriorBlock],
    parameters: Iterable[Tensor],
    *,
    width: Width,
    likelihood: Likelihood,
    seed: int,
    num_data: float | None,
) -> Posterior:
    """A posterior around the current weights with copies of everything; ``parameters`` are the random ones.

    Raises:
        RuntimeError: without blocks.
    """
    if not blocks:
        raise RuntimeError(f"{owner}: there is no curvature yet. Call posterior() after a step of training.")
    names = parameter_names(model)
    random = [names[id(parameter)] for parameter in parameters if parameter.requires_grad]
    copies = [block.map(lambda tensor: tensor.clone(memory_format=torch.contiguous_format)) for block in blocks]
    return Posterior.from_model(model, copies, width=width, names=random, likelihood=likelihood, seed=seed, num_data=num_data)


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Names of the user's model by the id of the parameter, without prefixes of wrappers."""
    return {id(parameter): name for name, parameter in unwrapped(model).named_parameters()}


@torch.no_grad()
def posterior_blocks(
    names: Mapping[int, str],
    tracked: Iterable[TrackedBlock],
    state_of: Callable[[TrackedBlock], State | None],
    width_of: Callable[[TrackedBlock], Width],
    *,
    damping: PosteriorDamping = "exact",
    current: bool = True,
) -> list[PosteriorBlock]:
    """Blocks of all layers that have curvature; the tensors may be those of the state, not copies.

    Args:
        names: of the parameters, by their id (:func:`parameter_names`).
        state_of: curvature state of a layer, None before the first step.
        width_of: data size, prior and floor of a layer.
        damping: ``"factored"`` concerns Kronecker blocks alone.
        current: eigenbases of the current factors, or those of the last refresh.
    """
    blocks: list[PosteriorBlock] = []
    for entry in tracked:
        state, block = state_of(entry), entry.block
        if state is None or not _has_curvature(block, state, current):
            continue
        is_product = follows_refreshes(block)
        blocks.append(
            PosteriorBlock(
                weight=names[id(entry.weight)],
                bias=None if entry.bias is None else names[id(entry.bias)],
                layout=block.layout,
                form=block.spectral_form(state, current=current),
                width=width_of(entry),
                damping=damping if is_product else "exact",
            )
        )
    return blocks


def follows_refreshes(block: CurvatureBlock) -> bool:
    """Whether the covariance of the last refresh is that of its bases alone: others move with every estimate."""
    return isinstance(block, KroneckerBlock) and not isinstance(block, EigenbasisBlock)


def safe_floor(block: CurvatureBlock, ess: float, prior_precision: float) -> float:
    """The floor that keeps the noise below the signal: no weight's deviation is above ``0.5 / √in_dim``.

    Inputs of unit size then meet noise of at most half that size. Norm layers and single parameters, whose weights are
    no sums over inputs, get deviations of at most 0.05.
    """
    largest = 0.5 / block.layout.shape[2] ** 0.5 if isinstance(block, KroneckerBlock) else 0.05
    return max(0.0, 1.0 / (ess * largest**2) - prior_precision / ess)


def _has_curvature(block: object, state: State, current: bool) -> bool:
    if float(state["weight"]) == 0.0:
        return False
    needs_refresh = isinstance(block, EigenbasisBlock) or (isinstance(block, KroneckerBlock) and not current)
    return not needs_refresh or int(state["refreshes"]) > 0
