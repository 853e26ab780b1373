"""Hooks that neither keep an optimizer alive nor hinder copying and pickling the model."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from kfac_opt._capture.stance import hold_eager, release_eager


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

    @property
    def owner(self) -> object | None:
        """Whose method it calls, while that lives."""
        return self._owner()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self._owner()
        if owner is None:
            return None
        return getattr(owner, self._method)(*self._bound, *args, **kwargs)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_inert, ()


class HookSet:
    """The hooks of one owner on a model and its layers. While they are on, compiled code runs eagerly."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        weakref.finalize(self, _remove, id(self), self._handles)

    def __bool__(self) -> bool:
        return bool(self._handles)

    def put(self, owner: object, root: nn.Module, layers: Mapping[str, nn.Module], drawing: Mapping[str, nn.Module]) -> None:
        """Calls ``on_root_start``, ``on_root_end`` and, with the name in front, ``on_layer`` of ``owner``.

        Args:
            drawing: layers in front of whose forward ``on_draw`` is called.
        """
        for name, module in drawing.items():
            self._handles.append(module.register_forward_pre_hook(WeakHook(owner, "on_draw", name), with_kwargs=True))
        # Before the root's: a model that is itself a layer.
        self._handles += hook_layers(layers, lambda name: WeakHook(owner, "on_layer", name))
        self._handles.append(root.register_forward_pre_hook(WeakHook(owner, "on_root_start"), with_kwargs=True))
        end = WeakHook(owner, "on_root_end")
        self._handles.append(root.register_forward_hook(end, with_kwargs=True, always_call=True))
        hold_eager(id(self))

    def remove(self) -> None:
        """Takes them off."""
        _remove(id(self), self._handles)


def hook_layers(layers: Mapping[str, nn.Module], hook_of: Callable[[str], Callable[..., None]]) -> list[RemovableHandle]:
    """``hook(module, args, kwargs, out)`` on every layer, in front of the user's, which may replace the output."""
    return [module.register_forward_hook(hook_of(name), prepend=True, with_kwargs=True) for name, module in layers.items()]


def _remove(holder: int, handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
    release_eager(holder)


def owners_of_hooks(model: nn.Module) -> Iterator[object]:
    """Who has a :class:`WeakHook` in front of the model's forward or of one of its parts."""
    for part in model.modules():
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, WeakHook) and hook.owner is not None:
                yield hook.owner


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
