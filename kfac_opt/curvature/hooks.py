"""Hooks that neither keep an optimizer alive nor hinder copying and pickling the model."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def _inert(*args: object, **kwargs: object) -> None:
    """What a hook becomes in a copied or unpickled model."""


def _make_inert() -> Callable[..., None]:
    return _inert


class WeakHook:
    """Calls ``getattr(owner, method)(*bound, *args)`` while the owner lives; copies and pickles as an inert function."""

    def __init__(self, owner: object, method: str, *bound: object) -> None:
        self._owner = weakref.ref(owner)
        self._method = method
        self._bound = bound

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self._owner()
        if owner is None:
            return None
        return getattr(owner, self._method)(*self._bound, *args, **kwargs)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_inert, ()


def active_calls(module: nn.Module) -> int:
    """How many calls of ``module`` are under way in this thread.

    torch calls ``always_call`` hooks for an ``Exception`` alone: after an interrupt nobody says that the forward is over.
    """
    frame, number = sys._getframe(), 0
    code = nn.Module._call_impl.__code__
    while frame is not None:
        number += frame.f_code is code and frame.f_locals.get("self") is module
        frame = frame.f_back  # type: ignore[assignment]
    return number


def is_transformed() -> bool:
    """Inside ``torch.func`` transforms, tracing or exporting there is no batch of data to take statistics of."""
    functorch = torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return functorch or bool(tracing) or torch.compiler.is_compiling()
