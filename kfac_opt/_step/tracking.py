"""Which block each trainable parameter belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from kfac_opt._capture.collector import Foreign
from kfac_opt._capture.due import module_name
from kfac_opt._capture.saying import say
from kfac_opt._curvature.block import CurvatureBlock
from kfac_opt._curvature.diagonal import DiagonalBlock, NormBlock
from kfac_opt._curvature.eigenbasis import EigenbasisBlock
from kfac_opt._curvature.kronecker import DampingStyle, KroneckerBlock
from kfac_opt.layers import LayerAdapter, MatrixLayout, WeightSharing, find_adapter
from kfac_opt.layers.parts import Part, PartAdapter, find_composite


@dataclass
class TrackedBlock:
    """A block, its parameters, its name (of the layer or of the parameter) and its parameter group.

    Of a module with several matrices each is a block; ``part`` is its name within the module, the last piece of ``name``.
    """

    name: str
    block: CurvatureBlock
    weight: nn.Parameter
    bias: nn.Parameter | None
    module: nn.Module | None
    group: int
    part: str | None = None

    def __post_init__(self) -> None:
        self.parameters = [self.weight] if self.bias is None else [self.weight, self.bias]


@dataclass(frozen=True)
class BlockOptions:
    """What decides the kind of a block, for all groups."""

    damping_style: DampingStyle
    weight_sharing: WeightSharing
    max_factor_dim: int
    factor_dtype: torch.dtype
    needs_basis: bool  # posterior samples need eigenbases with every damping style
    inverse_dtype: torch.dtype | None = None
    max_block_dim: int | None = None


def track(
    owner: str,
    model: nn.Module,
    groups: list[dict[str, Any]],
    options: BlockOptions,
    flat: set[str] | None = None,
    *,
    announce: bool = True,
) -> dict[str, TrackedBlock]:
    """Blocks by name, in the order of ``named_parameters``.

    Args:
        flat: names of layers whose parameters get diagonal blocks although their type has an adapter.
        announce: say which parameters and sides have diagonal curvature; False where they have been named already.

    Raises:
        ValueError: if the weight and the bias of a layer are in different groups.
    """
    group_of = {id(p): number for number, group in enumerate(groups) for p in group["params"] if p.requires_grad}
    layers = _layers(owner, model, group_of, groups, options, flat or set())
    tracked: dict[str, TrackedBlock] = {}
    alone: list[str] = []
    for name, parameter in model.named_parameters():
        number = group_of.get(id(parameter))
        if number is None or groups[number]["curvature"] == "identity":
            continue
        if id(parameter) in layers:
            layer = layers[id(parameter)]
            tracked[layer.name] = layer
            continue
        dtype = torch.promote_types(options.factor_dtype, parameter.dtype)
        block = DiagonalBlock(MatrixLayout("flat", tuple(parameter.shape)), None, dtype)
        tracked[name] = TrackedBlock(name, block, parameter, None, None, number)
        if groups[number]["curvature"] != "diagonal":
            alone.append(name)
    if announce:
        _announce(owner, alone, tracked)
    return tracked


def _layers(
    owner: str,
    model: nn.Module,
    group_of: dict[int, int],
    groups: list[dict[str, Any]],
    options: BlockOptions,
    flat: set[str],
) -> dict[int, TrackedBlock]:
    """Layers with an adapter, by the id of each of their parameters."""
    owners: dict[int, int] = {}
    hidden: set[int] = set()  # modules inside MultiheadAttention, whose forward never runs
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        if isinstance(module, nn.MultiheadAttention):
            hidden.update(id(part) for part in module.modules())
    layers: dict[int, TrackedBlock] = {}
    for matrix in _matrices(model, hidden):
        name, weight, bias = matrix.name, matrix.weight, matrix.bias
        if name in flat:
            continue
        number = group_of.get(id(weight))
        if number is None or owners[id(weight)] != 1:
            continue
        if groups[number]["curvature"] in ("diagonal", "identity"):
            continue
        if bias is not None and (id(bias) not in group_of or owners[id(bias)] != 1):
            bias = None
        if bias is not None and group_of[id(bias)] != number:
            raise ValueError(
                f"{owner}: the weight and the bias of '{name}' are in different parameter groups ({number} and "
                f"{group_of[id(bias)]}), but a layer is preconditioned as one matrix. Put both into one group."
            )
        block = _block(matrix.adapter(bias is not None), groups[number]["curvature"], weight.dtype, options)
        layer = TrackedBlock(name, block, weight, bias, matrix.module, number, matrix.part)
        layers.update((id(parameter), layer) for parameter in layer.parameters)
    return layers


@dataclass(frozen=True)
class _Matrix:
    """A weight matrix of the model that has an adapter; ``adapter(with_bias)`` makes it."""

    name: str
    module: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None
    adapter: Callable[[bool], LayerAdapter]
    part: str | None = None


def _matrices(model: nn.Module, hidden: set[int]) -> Iterator[_Matrix]:
    """Layers and parts of layers, but those in ``hidden``."""
    for name, module in model.named_modules():
        for part in _parts(module):
            own = f"{name}.{part.name}" if name else part.name
            yield _Matrix(own, module, part.weight, part.bias, partial(PartAdapter, part), part.name)
        adapter, weight = find_adapter(module), module._parameters.get("weight")
        if adapter is not None and weight is not None and id(module) not in hidden:
            yield _Matrix(name, module, weight, module._parameters.get("bias"), partial(adapter, module))


def _parts(module: nn.Module) -> list[Part]:
    composite = find_composite(module)
    return [] if composite is None else composite.parts(module)


def _block(adapter: LayerAdapter, curvature: str, dtype: torch.dtype, options: BlockOptions) -> CurvatureBlock:
    dtype = torch.promote_types(options.factor_dtype, dtype)
    if adapter.structure == "norm":
        return NormBlock(adapter.layout, adapter, dtype, options.weight_sharing)
    limit = options.max_factor_dim
    if curvature == "eigenbasis":
        return EigenbasisBlock(
            adapter,
            dtype,
            options.weight_sharing,
            max_factor_dim=limit,
            max_block_dim=options.max_block_dim,
            split=options.damping_style == "split",
        )
    return KroneckerBlock(
        adapter,
        dtype,
        options.weight_sharing,
        style=options.damping_style,
        max_factor_dim=limit,
        max_block_dim=options.max_block_dim,
        basis=options.needs_basis,
        inverse_dtype=options.inverse_dtype,
    )


def _announce(owner: str, alone: list[str], tracked: dict[str, TrackedBlock]) -> None:
    """Says once which parameters have no Kronecker block, and which sides of one are diagonal."""
    sides = [
        f"'{name}' ({side} side, {block.dims[side]})"
        for name, block in ((name, entry.block) for name, entry in tracked.items())
        if isinstance(block, KroneckerBlock)
        for side in ("input", "output")
        if not block.dense_sides[side] and not (side == "input" and block.layer.diagonal_input)
    ]
    if alone:
        say(
            f"{owner}: no layer adapter covers {', '.join(repr(name) for name in alone)}; diagonal curvature "
            "(Gauss-Newton-Bartlett) is used there. register_layer adds adapters."
        )
    if sides:
        say(f"{owner}: larger than max_factor_dim, so that a diagonal factor is used: {', '.join(sides)}.")


def describe_unused(owner: str, names: list[str]) -> None:
    """Says that layers were used through their weights only."""
    if names:
        say(
            f"{owner}: the forward of {_listed(names)} never ran although the weight has a gradient (it is used through "
            "its weight only); diagonal curvature is used there from now on."
        )


def describe_foreign(owner: str, reasons: Mapping[str, Foreign]) -> None:
    """Says that layers are not the maps that their class has an adapter for."""
    for reason, words in FOREIGN.items():
        names = [name for name, own in reasons.items() if own == reason]
        if names:
            say(f"{owner}: {words.format(_listed(names))}; diagonal curvature is used there from now on.")


FOREIGN: dict[Foreign, str] = {
    "forward": "{} has a forward of its own that computes something else with its weight than the class it derives from "
    "(register_layer adds adapters)",
    "uses": "the weight of {} enters the outputs in ways that the calls of its module do not show (the weight used beside "
    "them or sliced, a derivative taken inside the model, a state carried from pass to pass; with fisher='empirical' a "
    "derivative of its outputs in the loss as well)",
    "tensors": "{} takes or returns nested or sparse tensors, which no layer adapter reads",
    "replay": "the outputs of the module of {} are not those of its matrices computed step by step (dropout whose random "
    "numbers cannot be drawn again, an output replaced inside the module)",
    "hidden": "{} runs with gradients disabled and yet has a gradient (a reentrant checkpoint, which use_reentrant=False would "
    "open, or a torch.autograd.Function that runs layers in its backward)",
}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def describe_apart(owner: str, names: list[str]) -> None:
    """Says which parameters the Fisher matrix does not know."""
    if names:
        say(
            f"{owner}: the gradient of {', '.join(map(repr, names))} does not come through the logits that the Fisher matrix "
            "belongs to (another output of the model, an auxiliary loss): there is no curvature, the plain gradient is used. "
            "outputs= picks other logits, or joins several of one shape: outputs=lambda out: torch.cat([out.a, out.b])."
        )


def uncovered(groups: list[dict[str, Any]], tracked: dict[str, TrackedBlock]) -> set[int]:
    """Ids of trainable parameters that no block belongs to."""
    covered = {id(parameter) for entry in tracked.values() for parameter in entry.parameters}
    members = [group["params"] for group in groups if group["curvature"] != "identity"]
    return {id(p) for parameters in members for p in parameters if p.requires_grad and id(p) not in covered}


def replaced(owner: str, model: nn.Module, groups: list[dict[str, Any]], tracked: dict[str, TrackedBlock]) -> bool:
    """Whether a layer is no longer the module, with the weight, that its block was made for.

    Raises:
        RuntimeError: if trainable parameters that are in no group have taken its place.
    """
    known = {id(parameter) for group in groups for parameter in group["params"]}
    changed = False
    for entry in tracked.values():
        if entry.module is None:
            continue
        try:
            module = model.get_submodule(module_name(entry))
        except AttributeError:
            changed = True
            continue
        if module is entry.module and _weight_now(module, entry.part) is entry.weight:
            continue
        changed = True
        lost = [own for own, p in module.named_parameters(module_name(entry)) if p.requires_grad and id(p) not in known]
        if lost:
            raise RuntimeError(
                f"{owner}: {', '.join(map(repr, lost))} took the place of parameters that the optimizer was built with and "
                "would not be trained (a replaced layer, load_state_dict(assign=True) or to_empty() does that). Hand them to "
                f"add_param_group(), or build {owner} again."
            )
    return changed


def _weight_now(module: nn.Module, part: str | None) -> nn.Parameter | None:
    if part is None:
        return module._parameters.get("weight")
    return next((own.weight for own in _parts(module) if own.name == part), None)
