"""Hooks that neither keep an optimizer alive nor hinder copying and pickling the model."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class _Hook:
    """A hook that says what is the matter where torch.jit.script wants to compile it."""

    remedy = ""

    @property
    def __name__(self) -> str:
        # torch.jit.script compiles a module's hooks with it and looks for their names first.
        if sys._getframe(1).f_globals.get("__name__", "").startswith("torch.jit"):
            raise RuntimeError(f"torch.jit.script cannot compile a model with the hooks of a curvature optimizer. {self.remedy}")
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '__name__'")


class _Inert(_Hook):
    """What a hook becomes in a copied or unpickled model."""

    remedy = (
        "This model was copied with them on: copy it after optimizer.detach(), or take them off with 'for part in "
        "model.modules(): part._forward_hooks.clear(); part._forward_pre_hooks.clear()'."
    )

    def __call__(self, *args: object, **kwargs: object) -> None:
        """Nothing."""


def _make_inert() -> Callable[..., None]:
    return _Inert()


class WeakHook(_Hook):
    """Calls ``getattr(owner, method)(*bound, *args)`` while the owner lives; copies and pickles as an inert function."""

    remedy = "Script the model before the optimizer is built or after optimizer.detach(); tracing and exporting work as ever."

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
