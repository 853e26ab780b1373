"""A model at the weights it has now: forwards that leave the model, its hooks and all random states alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.func import functional_call, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from kfac_opt._capture.backward import OutputGraph
from kfac_opt._capture.collector import unnoticed
from kfac_opt._capture.outputs import pick_logits
from kfac_opt._capture.repeatable import RepeatableGraph
from kfac_opt._capture.wrappers import unwrapped
from kfac_opt.fisher.blocks import parameter_blocks
from kfac_opt.fisher.data import Batch

Parameters = dict[str, Tensor]
WAY_OUT = "Give the matrix a copy of the model that does without it"


class FrozenModel:
    """A copy of the weights, and forwards with them through the module's code.

    Args:
        model: compiled and DistributedDataParallel wrappers are taken off.
        outputs: picks the logits, or ``(logits, mask)``, from what the model returns; None for a tensor or an
            object with ``.logits``.
        owner: name for error messages.

    Raises:
        ValueError: no trainable parameters; batch normalization on batch statistics; dropout in training mode.
    """

    def __init__(self, model: nn.Module, outputs: Callable[[Any], Any] | None, owner: str) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{owner}: model is {type(model).__name__}, expected a torch.nn.Module.")
        self.module = unwrapped(model)
        self.outputs, self.owner = outputs, owner
        named = dict(self.module.named_parameters())
        trainable = {name: p for name, p in named.items() if p.requires_grad}
        if not trainable:
            raise ValueError(f"{owner}: the model has no trainable parameters. Set requires_grad=True for some.")
        self._refuse_mixing()
        self.parameters: Parameters = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in named.items()}
        self.buffers: Parameters = {name: b.detach().clone() for name, b in self.module.named_buffers()}
        self.modes = [module.training for module in self.module.modules()]
        first = next(iter(trainable.values()))
        self.device = first.device
        self.dtype = first.dtype
        for p in trainable.values():
            self.dtype = torch.promote_types(self.dtype, p.dtype)
        self.row_dtype = torch.promote_types(self.dtype, torch.float32)
        self.blocks = parameter_blocks(self.module, trainable)
        self.size = sum(block.size for block in self.blocks)

    def _refuse_mixing(self) -> None:
        for name, module in self.module.named_modules():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                raise ValueError(
                    f"{self.owner}: '{name}' ({type(module).__name__}) normalizes with the statistics of its batch, so "
                    "that an example's output depends on the others and has no Jacobian of its own. Call model.eval() "
                    "first" + (" and give the layer running statistics." if module.running_mean is None else ".")
                )
            dropout = isinstance(module, _DropoutNd) and module.p > 0
            dropout |= isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout > 0
            if dropout and module.training:
                raise ValueError(
                    f"{self.owner}: '{name}' ({type(module).__name__}) drops units at random in training mode: every "
                    "pass would see another network. Call model.eval() first."
                )

    @property
    def trainable(self) -> Parameters:
        """The trainable parameters, in vector order."""
        return {name: self.parameters[name] for block in self.blocks for name in block.parameters}

    def forward(self, batch: Batch, parameters: Parameters | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits and mask (or None) of a batch; ``parameters`` replace the kept ones of the same name.

        Gradients are on inside, whatever they are outside: a model may take some of its own (forces, residuals of differential
        equations).
        """
        if [module.training for module in self.module.modules()] != self.modes:
            raise RuntimeError(
                f"{self.owner}: the model changed between training and evaluation mode since the matrix was made. "
                "Put it back, or build a new one."
            )
        buffers = {name: value.clone() for name, value in self.buffers.items()}
        values = self.parameters
        if parameters is not None:  # the others are constants
            values = {**{name: value.detach() for name, value in values.items()}, **parameters}
        args, kwargs = _arguments(batch.inputs)
        detached = parameters is None and not torch.is_grad_enabled()
        kernels = _differentiable_kernels()
        with unnoticed(self.module), _hookless(self.module), kernels, _no_autocast(self.device), torch.enable_grad():
            returned = functional_call(self.module, (values, buffers), args, kwargs)
            logits, mask = pick_logits(returned, self.outputs)
        return logits.detach() if detached else logits, mask

    def graph(self, logits: Tensor, targets: Sequence[GradientEdge | Tensor], **options: Any) -> RepeatableGraph:
        """For any number of backward passes from the logits to these."""
        return RepeatableGraph(self.module, OutputGraph(logits, targets), self.owner, **options)

    def refuse_unrepeatable(self, batch: Batch) -> None:
        """Refuses models of which a backward pass would be noticed, or would be that of other weights than the kept ones."""
        with torch.enable_grad():
            logits, _ = self.forward(batch)
        if not logits.requires_grad:
            return
        graph = self.graph(logits, list(self.trainable.values()), way_out=WAY_OUT)
        graph.check()
        if graph.recomputes:
            raise RuntimeError(
                f"{self.owner}: a checkpoint runs layers again in the backward pass, with the weights that the model has then. "
                "Switch checkpointing off for this: memory_limit bounds the memory."
            )
        with graph.untouched():
            graph.pull(torch.ones_like(logits), lambda number, gradient: None)

    def forward_without_randomness(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """:meth:`forward`, refusing models that draw from the global generators; their states are put back."""
        on_gpu = self.device.type == "cuda"
        state = torch.random.get_rng_state()
        gpu_state = torch.cuda.get_rng_state(self.device) if on_gpu else state
        logits, mask = self.forward(batch)
        changed = not torch.equal(state, torch.random.get_rng_state())
        torch.random.set_rng_state(state)
        if on_gpu:
            changed |= not torch.equal(gpu_state, torch.cuda.get_rng_state(self.device))
            torch.cuda.set_rng_state(gpu_state, self.device)
        if changed:
            raise ValueError(
                f"{self.owner}: the model draws random numbers in its forward: every pass would see another network. "
                "Call model.eval() first, or take the randomness out."
            )
        return logits, mask

    def activation_bytes(self, batch: Batch) -> int:
        """Memory that one forward and backward over ``batch`` keeps for its intermediate values."""
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            pointer, size = tensor.untyped_storage().data_ptr(), tensor.numel() * tensor.element_size()
            kept[pointer] = max(size, kept.get(pointer, 0))  # a view counts by itself: it may be one of all data
            return tensor

        own = {p.untyped_storage().data_ptr() for p in self.parameters.values()}
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits, _ = self.forward(batch)
        total = sum(size for pointer, size in kept.items() if pointer not in own)
        return total + logits.numel() * logits.element_size()


@contextmanager
def _hookless(module: nn.Module) -> Iterator[None]:
    """Graphs made in the body have no hooks of the user: his are for the gradients of his loss."""
    kinds = [hooks for part in module.modules() for hooks in (part._backward_hooks, part._backward_pre_hooks) if hooks]
    kept = [dict(hooks) for hooks in kinds]
    for hooks in kinds:
        hooks.clear()
    try:
        with _NoTensorHooks():
            yield
    finally:
        for hooks, entries in zip(kinds, kept):
            hooks.update(entries)


class _NoTensorHooks(TorchFunctionMode):
    """Hooks on tensors, and the wish to retain a gradient, are taken note of by nobody."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is Tensor.register_hook:
            return RemovableHandle(OrderedDict())
        if func is Tensor.retain_grad:
            return None
        return func(*args, **(kwargs or {}))


def _no_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


@contextmanager
def _differentiable_kernels() -> Iterator[None]:
    """The kernels of attention that every kind of differentiation supports."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def pull_back(function: Callable[[Parameters], Tensor], values: Parameters) -> Callable[[Tensor], Parameters]:
    """The vector-Jacobian product of ``function`` at ``values``, as a function of the cotangent."""
    try:
        pull = vjp(function, values)[1]
    except RuntimeError as error:
        if not outside_torch_func(error):
            raise
        return _plain_pull_back(function, values)
    return lambda cotangent: cast(Parameters, pull(cotangent)[0])


def outside_torch_func(error: RuntimeError) -> bool:
    """Whether ``torch.func`` cannot transform the model.

    It holds a ``torch.autograd.Function`` of the older form, or takes gradients of its own.
    """
    return any(words in str(error) for words in ("setup_context", "functorch transform", "does not require grad"))


def _plain_pull_back(function: Callable[[Parameters], Tensor], values: Parameters) -> Callable[[Tensor], Parameters]:
    """:func:`pull_back` by plain automatic differentiation; differentiable in the cotangent."""
    leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
    with torch.enable_grad():
        result = function(leaves)

    def pull(cotangent: Tensor) -> Parameters:
        if not result.requires_grad:  # these parameters do not reach the outputs
            return {name: torch.zeros_like(value) for name, value in leaves.items()}
        gradients = torch.autograd.grad(
            result, list(leaves.values()), cotangent, retain_graph=True, create_graph=cotangent.requires_grad, allow_unused=True
        )
        return {name: torch.zeros_like(v) if g is None else g for (name, v), g in zip(leaves.items(), gradients)}

    return pull


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}
