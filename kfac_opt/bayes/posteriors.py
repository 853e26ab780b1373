"""From an optimizer's curvature to blocks of a posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from kfac_opt._capture.wrappers import unwrapped
from kfac_opt._curvature.block import CurvatureBlock, State
from kfac_opt._curvature.eigenbasis import EigenbasisBlock
from kfac_opt._curvature.kronecker import KroneckerBlock
from kfac_opt._curvature.spectral import SpectralForm
from kfac_opt._step.tracking import TrackedBlock
from kfac_opt.bayes.posterior import Posterior, PosteriorBlock, PosteriorDamping, Width
from kfac_opt.layers import MatrixLayout
from kfac_opt.likelihoods import Likelihood


@torch.no_grad()
def build_posterior(
    owner: str,
    model: nn.Module,
    blocks: list[PosteriorBlock],
    parameters: Iterable[Tensor],
    *,
    width: Width | Mapping[str, Width],
    likelihood: Likelihood,
    seed: int,
    num_data: float | None,
) -> Posterior:
    """A posterior around the current weights with copies of everything.

    Args:
        parameters: the random ones; those that left the model are left out.
        width: of parameters without curvature, one for all or by name.

    Raises:
        RuntimeError: without blocks.
    """
    if not blocks:
        raise RuntimeError(f"{owner}: there is no curvature yet. Call posterior() after a step of training.")
    names = parameter_names(model)
    random = [names[id(parameter)] for parameter in parameters if parameter.requires_grad and id(parameter) in names]
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
    constant: Mapping[int, int] | None = None,
) -> list[PosteriorBlock]:
    """Blocks of what is trained and has curvature; the tensors may be those of the state, not copies.

    Args:
        names: of the parameters, by their id (:func:`parameter_names`).
        state_of: curvature state of a layer, None before the first step.
        width_of: data size, prior and floor of a layer.
        damping: ``"factored"`` concerns Kronecker blocks alone.
        current: eigenbases of the current factors, or those of the last refresh.
        constant: rows that are no parameters, by the id of their table (``padding_rows``).
    """
    blocks: list[PosteriorBlock] = []
    for entry in tracked:
        state, block = state_of(entry), entry.block
        if state is None or not _has_curvature(block, state, current):
            continue
        trained = [parameter for parameter in entry.parameters if parameter.requires_grad]
        if not trained:
            continue  # frozen since: not random any more
        form = block.spectral_form(state, current=current)
        if len(trained) < len(entry.parameters):
            blocks.append(_rest(names[id(trained[0])], block, form, width_of(entry), is_bias=trained[0] is entry.bias))
            continue
        is_product = follows_refreshes(block)
        blocks.append(
            PosteriorBlock(
                weight=names[id(entry.weight)],
                bias=None if entry.bias is None else names[id(entry.bias)],
                layout=block.layout,
                form=form,
                width=width_of(entry),
                damping=damping if is_product else "exact",
                constant=(constant or {}).get(id(entry.weight)),
            )
        )
    return blocks


def _rest(name: str, block: CurvatureBlock, form: SpectralForm, width: Width, *, is_bias: bool) -> PosteriorBlock:
    """What is left of a layer's block when its bias or its weight was frozen: the diagonal of the other's Fisher matrix."""
    weight, bias = block.layout.from_matrix(form.diagonal())
    values = bias if is_bias else weight
    assert values is not None
    layout = MatrixLayout("flat", tuple(values.shape))
    return PosteriorBlock(name, None, layout, SpectralForm(None, None, values.reshape(layout.shape)), width)


def follows_refreshes(block: CurvatureBlock) -> bool:
    """Whether the covariance of the last refresh is that of its bases alone: others move with every estimate."""
    return isinstance(block, KroneckerBlock) and not isinstance(block, EigenbasisBlock)


def safe_floor(block: CurvatureBlock, ess: float, prior_precision: float) -> float:
    """The floor that keeps the noise below the signal: no weight's deviation is above ``0.5 / √in_dim``.

    Inputs of unit size then meet noise of at most half that size. Norm layers and single parameters, which are no sums
    over inputs, get deviations of at most 0.05; so do weights without a matrix block (of modules without an adapter,
    ``curvature="diagonal"``), unless they have more than a hundred inputs, as torch's initialization counts them.
    """
    layout = block.layout
    if isinstance(block, KroneckerBlock):
        largest = 0.5 / layout.shape[2] ** 0.5
    else:
        in_dim = math.prod(layout.weight_shape[1:]) if layout.kind == "flat" else 1
        largest = min(0.05, 0.5 / max(1, in_dim) ** 0.5)
    return max(0.0, 1.0 / (ess * largest**2) - prior_precision / ess)


def _has_curvature(block: object, state: State, current: bool) -> bool:
    if float(state["weight"]) == 0.0:
        return False
    needs_refresh = isinstance(block, EigenbasisBlock) or (isinstance(block, KroneckerBlock) and not current)
    return not needs_refresh or int(state["refreshes"]) > 0
