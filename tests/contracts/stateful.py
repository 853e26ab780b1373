"""Networks whose backward pass can be noticed: hooks with a memory, Functions that do things, graphs that are read once.

Every network writes what it notices to ``log``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

DOUBLE = torch.float64


class Noting(nn.Module):
    """Two layers around ``middle``, on images or vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Any] = []
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.setup()

    def setup(self) -> None:
        """What is put in place once."""

    def note(self, name: str, *values: Any) -> None:
        self.log.append((name, [v.detach().clone() if isinstance(v, Tensor) else v for v in values]))

    def middle(self, h: Tensor) -> Tensor:
        return torch.tanh(self.second(h))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(torch.tanh(self.first(x))))


class Equilibrium(Noting):
    """A fixed point with the implicit gradient; the hook that solves for it removes itself, as such networks are written."""

    def middle(self, h: Tensor) -> Tensor:
        def step(z: Tensor) -> Tensor:
            return torch.tanh(0.3 * self.second(z) + h)

        with torch.no_grad():
            z = torch.zeros_like(h)
            for _ in range(20):
                z = step(z)
        z = step(z)
        start = z.detach().requires_grad_()
        again = step(start)

        def solve(gradient: Tensor) -> Tensor:
            self.handle.remove()
            u = gradient
            for _ in range(20):
                u = torch.autograd.grad(again, start, u, retain_graph=True)[0] + gradient
            self.note("solved", u)
            return u

        self.handle = z.register_hook(solve)
        return z


class Logger(Noting):
    """Writes down every gradient of the activations, and scales one of them."""

    def middle(self, h: Tensor) -> Tensor:
        h.register_hook(lambda g: self.note("in", g))
        out = torch.tanh(self.second(h))
        out.register_hook(lambda g: g * 0.5)
        if h.requires_grad:
            torch.autograd.graph.register_multi_grad_hook([h, out], lambda gs: self.note("both", *gs))
        return out


class Retaining(Noting):
    def middle(self, h: Tensor) -> Tensor:
        h.retain_grad()
        self.kept = torch.tanh(self.second(h))
        self.kept.retain_grad()
        self.before = h
        return self.kept

    def retained(self) -> list[Tensor | None]:
        return [self.before.grad, self.kept.grad]


class NodeHooks(Noting):
    def middle(self, h: Tensor) -> Tensor:
        out = torch.tanh(self.second(h))
        assert out.grad_fn is not None
        out.grad_fn.register_prehook(lambda gs: self.note("before", *gs))
        out.grad_fn.register_hook(lambda ins, outs: self.note("after", *ins, *outs))
        return out


class ModuleHooks(Noting):
    """Grad-CAM and its kind."""

    def setup(self) -> None:
        for name in ("first", "second", "head"):
            module = getattr(self, name)
            module.register_full_backward_hook(functools.partial(self.seen, f"{name} hook"))
            module.register_full_backward_pre_hook(functools.partial(self.seen, f"{name} pre-hook"))

    def seen(self, name: str, module: nn.Module, *gradients: tuple[Tensor | None, ...]) -> None:
        self.note(name, *(g for part in gradients for g in part))


class OldModuleHook(Noting):
    def setup(self) -> None:
        self.second.register_backward_hook(lambda module, ins, outs: self.note("old", *outs))


class ParameterHooks(Noting):
    def setup(self) -> None:
        self.second.weight.register_hook(lambda g: self.note("hook", g))
        self.second.weight.register_post_accumulate_grad_hook(lambda p: self.note("accumulated", p.grad))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class StraightThrough(Noting):
    def middle(self, h: Tensor) -> Tensor:
        return _StraightThrough.apply(4 * torch.tanh(self.second(h)))


class _Popping(torch.autograd.Function):
    """Two outputs, of which one is not used; frees what it kept; draws a random number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.kept, ctx.stack = x.detach().clone(), [factor]
        return x * factor + y, x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor, unused: Tensor) -> tuple[Tensor, None, Tensor]:
        factor = ctx.stack.pop() + 0 * ctx.kept.sum()
        del ctx.kept
        return g * factor * (1 + 0.1 * torch.rand(())), None, g


class Popping(Noting):
    def middle(self, h: Tensor) -> Tensor:
        return _Popping.apply(self.second(h), 0.5, h)[0]


class Checkpointed(Noting):
    """Dropout and batch normalization are run again in the backward."""

    def setup(self) -> None:
        self.norm = nn.BatchNorm1d(6)

    def part(self, h: Tensor) -> Tensor:
        return nn.functional.dropout(torch.tanh(self.norm(self.second(h))), 0.3, self.training)

    def middle(self, h: Tensor) -> Tensor:
        return checkpoint(self.part, h, use_reentrant=False)


class Offloaded(Noting):
    def middle(self, h: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return torch.tanh(self.second(h))


REPEATABLE: dict[str, Callable[[], Noting]] = {
    kind.__name__: kind
    for kind in (
        Noting,
        Equilibrium,
        Logger,
        Retaining,
        NodeHooks,
        ModuleHooks,
        OldModuleHook,
        ParameterHooks,
        StraightThrough,
        Popping,
        Checkpointed,
        Offloaded,
    )
}
"""Every kind of Fisher matrix; nothing changes."""


class SelectivelyCheckpointed(Noting):
    def middle(self, h: Tensor) -> Tensor:
        def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            keep = op == torch.ops.aten.addmm.default
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(lambda h: torch.tanh(self.second(h)), h, use_reentrant=False, context_fn=contexts)


class ReadOnce(Noting):
    """Saved tensors are handed out once, as offloading to a file would do it."""

    def middle(self, h: Tensor) -> Tensor:
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> int:
            kept[len(kept)] = tensor
            return len(kept) - 1

        with torch.autograd.graph.saved_tensors_hooks(pack, kept.pop):
            return torch.tanh(self.second(h))


class UnpackCounted(Noting):
    def middle(self, h: Tensor) -> Tensor:
        def unpack(tensor: Tensor) -> Tensor:
            self.note("unpacked", tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            return torch.tanh(self.second(h))


class _Reversible(torch.autograd.Function):
    """Keeps its output alone and makes the input from it, running the layers again: a reversible block's backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: nn.Module, g: nn.Module) -> Tensor:
        with torch.no_grad():
            a, b = x.chunk(2, -1)
            a = a + f(b)
            b = b + g(a)
        ctx.out, ctx.parts = torch.cat([a, b], -1), (f, g)
        return ctx.out.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        f, g = ctx.parts
        a, b = ctx.out.chunk(2, -1)
        del ctx.out
        da, db = gradient.chunk(2, -1)
        with torch.enable_grad():
            a = a.detach().requires_grad_()
            g_a = g(a)
            g_a.backward(db)
        with torch.no_grad():
            b, da = b - g_a, da + a.grad
        with torch.enable_grad():
            b = b.detach().requires_grad_()
            f(b).backward(da)
        return torch.cat([da, db + b.grad], -1), None, None


class Reversible(Noting):
    def setup(self) -> None:
        self.f, self.g = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Sequential(nn.Linear(3, 3), nn.Tanh())

    def middle(self, h: Tensor) -> Tensor:
        return _Reversible.apply(self.second(h), self.f, self.g)


class _HandWritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module = module
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.module(x).backward(g)
        return x.grad, None


class HandWrittenCheckpoint(Noting):
    def middle(self, h: Tensor) -> Tensor:
        return torch.tanh(_HandWritten.apply(h, self.second))


class _Adjoint(torch.autograd.Function):
    """Euler steps forward, and the adjoint equation backward; gradients of the field's weights are returned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, field: nn.Module, *weights: Tensor) -> Tensor:
        with torch.no_grad():
            for _ in range(4):
                x = x + 0.25 * field(x)
        ctx.field, ctx.weights = field, weights
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Any, ...]:
        (x,), weights = ctx.saved_tensors, ctx.weights
        sums = [torch.zeros_like(w) for w in weights]
        for _ in range(4):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                slope = ctx.field(x)
                down, *found = torch.autograd.grad(slope, (x, *weights), 0.25 * adjoint)
            sums = [s + g for s, g in zip(sums, found)]
            adjoint, x = adjoint + down, (x - 0.25 * slope).detach()
        return adjoint, None, *sums


class AdjointEquation(Noting):
    def middle(self, h: Tensor) -> Tensor:
        return _Adjoint.apply(h, nn.Sequential(self.second, nn.Tanh()), *self.second.parameters())


class _Overwriting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.work = x.detach().clone()
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return ctx.work.copy_(g).mul_(2).clone()


class Overwriting(Noting):
    def middle(self, h: Tensor) -> Tensor:
        return _Overwriting.apply(torch.tanh(self.second(h)))


class ForwardHookInCheckpoint(Checkpointed):
    def setup(self) -> None:
        super().setup()
        self.second.register_forward_hook(lambda module, args, out: self.note("forward"))


REFUSED: dict[str, tuple[Callable[[], Noting], str]] = {
    "SelectivelyCheckpointed": (SelectivelyCheckpointed, "selective activation checkpointing"),
    "ReadOnce": (ReadOnce, "saved_tensors_hooks"),
    "UnpackCounted": (UnpackCounted, "saved_tensors_hooks"),
    "Reversible": (Reversible, r"_Reversible.*calls backward\(\) inside its backward.*'f.0.weight'"),
    "HandWrittenCheckpoint": (HandWrittenCheckpoint, r"_HandWritten.*calls backward\(\)"),
    "AdjointEquation": (AdjointEquation, r"'second' runs inside a torch.autograd.Function \(_Adjoint\)"),
    "Overwriting": (Overwriting, "_Overwriting.*can run only once"),
    "ForwardHookInCheckpoint": (ForwardHookInCheckpoint, "'second' runs inside a checkpoint and has a forward hook"),
}
"""Only the user's own backward may run there: the empirical Fisher's."""


def build(kind: Callable[[], Noting]) -> tuple[Noting, Tensor, Tensor]:
    torch.manual_seed(3)
    model = kind().to(DOUBLE)
    return model, torch.randn(5, 4, dtype=DOUBLE), torch.randint(3, (5,))
