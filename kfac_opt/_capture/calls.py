"""Calls of layers as their hooks see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from kfac_opt._capture.hooks import hook_layers

Kept = TypeVar("Kept")


def layer_tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> tuple[Tensor, Tensor] | None:
    """Input and output of a call; None where one of them is no tensor."""
    x = args[0] if args else next(iter(kwargs.values()), None)
    return (x, out) if isinstance(x, Tensor) and isinstance(out, Tensor) else None


@contextmanager
def recorded(
    layers: Mapping[str, nn.Module], keep: Callable[[str, Tensor, Tensor], Kept | None]
) -> Iterator[dict[str, list[Kept]]]:
    """By name what ``keep(name, input, output)`` makes of every call of these layers during the body."""
    calls: dict[str, list[Kept]] = {name: [] for name in layers}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            tensors = layer_tensors(args, kwargs, out)
            kept = None if tensors is None else keep(name, *tensors)
            if kept is not None:
                calls[name].append(kept)

        return hook

    handles = hook_layers(layers, hook_of)
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
