"""Graphs that a second backward pass would change, or be noticed by: made repeatable, or refused.

The sampled and the exact Fisher matrix need a backward pass of their own over the graph of the user's forward
(:mod:`kfac_opt._capture.backward` keeps hooks out of it). What is left to be noticed: Functions written in Python, whose
``backward`` may do anything, and hooks that pack and unpack saved tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules._functions import BackwardHookFunction

from kfac_opt._capture.backward import OutputGraph, Receive

WAY_OUT = (
    "Use fisher='empirical', which reads the gradients of your own backward and runs nothing twice (layers that it cannot see "
    "get diagonal blocks)"
)
MOST_NAMES = 3  # in one message
UNPACKS_AGAIN = ("torch.autograd.graph", "torch.utils.checkpoint")
"""Modules whose hooks for saved tensors may be called any number of times: ``save_on_cpu``, checkpointing."""

_saved_names: dict[type, tuple[str, ...]] = {}


class RepeatableGraph:
    """An :class:`OutputGraph` whose passes leave no trace.

    Args:
        root: the model, whose parameters, buffers and forward hooks are looked after.
        graph: from the logits of a pass to what the capture wants.
        owner: for messages.
        hidden: by name the weights of layers that ran with gradients disabled in this pass.
        way_out: what messages advise.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: OutputGraph,
        owner: str,
        hidden: Mapping[str, Tensor] | None = None,
        *,
        way_out: str = WAY_OUT,
    ) -> None:
        self.root, self.graph, self.owner, self.hidden, self.way_out = root, graph, owner, hidden or {}, way_out
        self.functions = [node for node in graph.executed if isinstance(node, BackwardCFunction) and not _is_module_hook(node)]
        self.unpacks = {id(unpack): unpack for node in graph.executed for unpack in _unpack_hooks(node)}.values()
        self.recomputes = any(_module_of(unpack) == "torch.utils.checkpoint" for unpack in self.unpacks)

    @property
    def safe(self) -> bool:
        """Whether it is certain beforehand that a pass leaves no trace."""
        return not self.functions and not self.unpacks

    def check(self) -> None:
        """Refuses what cannot be repeated, before anything is run.

        Raises:
            RuntimeError: naming it and the way out.
        """
        self._refuse_saved_tensors()
        self._refuse_hidden()

    # -- refusals -----------------------------------------------------------------------------------------------

    def _refuse_saved_tensors(self) -> None:
        for unpack in self.unpacks:
            if _module_of(unpack) not in UNPACKS_AGAIN:
                name = getattr(unpack, "__qualname__", type(unpack).__qualname__)
                raise RuntimeError(
                    f"{self.owner}: saved tensors are packed and unpacked by hooks ('{name}' of "
                    "torch.autograd.graph.saved_tensors_hooks), and the estimate would unpack them once more, which your "
                    f"backward may not survive. {self.way_out}; save_on_cpu and "
                    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False) are fine as well."
                )
            if _is_selective(unpack):
                raise RuntimeError(
                    f"{self.owner}: a checkpoint with a context_fn (selective activation checkpointing) keeps tensors that can "
                    "be read by one backward only, which would be the estimate's instead of yours. "
                    f"{self.way_out}, or checkpoint without context_fn."
                )

    def _refuse_hidden(self) -> None:
        if not self.hidden or not self.functions:
            return
        leaves = self.graph.leaves
        reached = [name for name, weight in self.hidden.items() if id(weight) in leaves]
        if reached:
            raise RuntimeError(
                f"{self.owner}: {_listed(reached)} runs inside a torch.autograd.Function ({self._kinds()}), which hides it from "
                f"hooks. {self.way_out}, or give its parameters a group with curvature='diagonal'."
            )

    def _kinds(self) -> str:
        return ", ".join(sorted({_name(node) for node in self.functions}))

    def pull(self, column: Tensor, receive: Receive) -> None:
        """One pass: see :meth:`OutputGraph.pull`. What Functions write to their contexts is put back.

        Raises:
            RuntimeError: when a Function overwrote tensors that it had saved.
        """
        notes = [_Notes(node) for node in self.functions]
        try:
            self.graph.pull(column, receive)
        finally:
            changed = [note.node for note in notes if not note.restore()]
        if changed:
            raise RuntimeError(
                f"{self.owner}: the backward of a torch.autograd.Function ({', '.join(sorted(map(_name, changed)))}) overwrites "
                f"tensors that it saved, so that it can run only once. {self.way_out}."
            )

    def gradients(self, column: Tensor) -> list[Tensor | None]:
        """One pass of ``<column, logits>`` that leaves no trace: the gradients of all targets, None where it does not come."""
        found: list[Tensor | None] = [None] * len(self.graph.edges)
        with self.untouched():
            self.pull(column, found.__setitem__)
        return found

    # -- looking after ------------------------------------------------------------------------------------------

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Keeps what Functions and recomputed layers write to: gradients, buffers, random states.

        Raises:
            RuntimeError: after the body, when a Function added to gradients; they are what they were.
        """
        if not self.functions and not self.recomputes:
            yield
            return
        with _random_states(self.graph.logits), _buffers(self.root), self._forward_hooks(), _gradients(self.root) as written:
            yield
        if written:
            raise RuntimeError(
                f"{self.owner}: a torch.autograd.Function ({self._kinds()}) calls backward() inside its backward and so adds to "
                f"the gradients of {_listed(written)}. The backward pass of the estimate would add to them once more. "
                f"{self.way_out}."
            )

    @contextmanager
    def _forward_hooks(self) -> Iterator[None]:
        """A checkpoint runs layers again for the capture: hooks of the user on them would see one more call."""
        replaced: list[tuple[dict[Any, Any], Any, Any]] = []
        for name, module in self.root.named_modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key, hook in hooks.items():
                    if not _is_known(hook):
                        replaced.append((hooks, key, hook))
                        hooks[key] = self._refuser(name, hook)
        try:
            yield
        finally:
            for hooks, key, hook in replaced:
                hooks[key] = hook

    def _refuser(self, name: str, hook: Any) -> Any:
        def refuse(*args: Any, **kwargs: Any) -> None:
            label = getattr(hook, "__qualname__", type(hook).__qualname__)
            raise RuntimeError(
                f"{self.owner}: '{name}' runs inside a checkpoint and has a forward hook ('{label}'), which would be called once "
                f"more when the estimate recomputes the layer. {self.way_out}, or remove the hook."
            )

        return refuse


class _Notes:
    """What a Function keeps on its context: attributes, the contents of containers, versions of tensors."""

    def __init__(self, node: Any) -> None:
        self.node = node
        self.attributes = dict(node.__dict__)
        containers = (list, dict, set, deque)
        self.contents = [(value, value.copy()) for value in self.attributes.values() if isinstance(value, containers)]
        tensors = [value for value in self.attributes.values() if isinstance(value, Tensor)]
        tensors += [item for _, copy in self.contents if not isinstance(copy, dict) for item in copy if isinstance(item, Tensor)]
        self.versions = [(tensor, tensor._version, tensor.untyped_storage().size()) for tensor in tensors]

    def restore(self) -> bool:
        """Puts attributes and containers back; False where a tensor was overwritten."""
        self.node.__dict__.clear()
        self.node.__dict__.update(self.attributes)
        for value, copy in self.contents:
            value.clear()
            value.update(copy) if isinstance(value, (dict, set)) else value.extend(copy)
        return all(t._version == version and t.untyped_storage().size() == size for t, version, size in self.versions)


@contextmanager
def _gradients(root: nn.Module) -> Iterator[list[str]]:
    """Parameters without gradients and hooks for the body; the names of those that got a gradient there."""
    written: list[str] = []
    before = []
    for name, parameter in root.named_parameters():
        hooks = [hooks for hooks in (parameter._backward_hooks, parameter._post_accumulate_grad_hooks) if hooks]
        before.append((name, parameter, parameter.grad, [(entries, dict(entries)) for entries in hooks]))
        parameter.grad = None
        for entries in hooks:
            entries.clear()
    try:
        yield written
    finally:
        for name, parameter, gradient, kept in before:
            if parameter.grad is not None:
                written.append(name)
            parameter.grad = gradient
            for entries, copy in kept:
                entries.update(copy)


@contextmanager
def _buffers(root: nn.Module) -> Iterator[None]:
    """Running statistics of recomputed layers; written back behind autograd's back, which may have saved them."""
    own = [(module._buffers, name, b) for module in root.modules() for name, b in module._buffers.items() if b is not None]
    copies = [buffer.detach().clone() for _, _, buffer in own]
    try:
        yield
    finally:
        for (buffers, name, buffer), copy in zip(own, copies):
            buffer.data.copy_(copy)
            buffers[name] = buffer


@contextmanager
def _random_states(logits: Tensor) -> Iterator[None]:
    devices = [logits.device] if logits.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield


def _unpack_hooks(node: Any) -> Iterator[Any]:
    """Unpack hooks of the tensors that a node saved."""
    kind = type(node)
    names = _saved_names.get(kind)
    if names is None:
        names = _saved_names[kind] = tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
    for name in names:
        saved = getattr(node, name)
        for one in saved if isinstance(saved, (tuple, list)) else (saved,):
            unpack = getattr(one, "unpack_hook", None)
            if unpack is not None:
                yield unpack


def _is_selective(unpack: Any) -> bool:
    """Whether the checkpoint behind this hook recomputes under a context of the user."""
    frame = _closed_over(unpack, "frame")
    context = _closed_over(getattr(frame, "recompute_fn", None), "recompute_context")
    return context is not None and type(context).__name__ != "nullcontext"


def _closed_over(function: Any, name: str) -> Any:
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    for variable, cell in zip(code.co_freevars, function.__closure__ or ()):
        if variable == name:
            try:
                return cell.cell_contents
            except ValueError:  # not filled
                return None
        if variable == "unpack_hook":  # checkpoint's debug mode wraps the hook
            return _closed_over(cell.cell_contents, name)
    return None


def _module_of(hook: Any) -> str:
    return str(getattr(hook, "__module__", ""))


def _is_known(hook: Any) -> bool:
    """Hooks that belong to the forward (torch's spectral norm, pruning) or are ours."""
    return _module_of(hook).partition(".")[0] in ("torch", "kfac_opt")


def _is_module_hook(node: Any) -> bool:
    return getattr(node, "_forward_cls", None) is BackwardHookFunction


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(repr(name) for name in names[:MOST_NAMES]) + more


def _name(node: Any) -> str:
    return str(getattr(getattr(node, "_forward_cls", None), "__qualname__", type(node).__name__))
