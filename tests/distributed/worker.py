"""What each of two processes does: scenarios whose results the tests compare with one process."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

RANKS = 2
DOUBLE = torch.float64


class Network(nn.Module):
    """A convolution, a norm layer, a layer that is called twice, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(2, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.shared = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.convolution(x)).mean(2))
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(hidden)))))


def network(dtype: torch.dtype = DOUBLE) -> Network:
    torch.manual_seed(0)
    return Network().to(dtype)


def batch(step: int, size: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(size, 2, 5, generator=generator, dtype=DOUBLE), torch.randint(3, (size,), generator=generator)


def share(x: Tensor, rank: int | None) -> Tensor:
    """The rank's half of a batch, or all of it."""
    return x if rank is None else x.chunk(RANKS)[rank]


def results(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return {
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "blocks": {n: v.to_dense().clone() for n, v in optimizer.curvature.items()},
        "dropped": optimizer.dropped_estimates,
    }


def options(**changes: Any) -> dict[str, Any]:
    # absolute, dominant damping: rounding in the factors must not be amplified by small eigenvalues
    return {"update_scale": "natural", "lr": 0.1, "damping": 0.1, "damping_scale": "absolute", "fisher": "exact",
            "factor_interval": 1, "inverse_interval": 1, "ramp_steps": 0, "kl_clip": 1e-3, "factor_dtype": DOUBLE,
            **changes}  # fmt: skip


def train(rank: int | None, *, attach: str = "inner", steps: int = 3, parts: int = 1, **changes: Any) -> dict[str, Any]:
    """An ordinary loop; ``rank=None`` is one process with the whole batch."""
    from kfac_opt import KFAC

    model = network()
    net = model if rank is None else DistributedDataParallel(model)
    optimizer = KFAC(net if attach == "wrapper" else model, **options(**changes))
    for step in range(steps):
        x, y = (share(t, rank) for t in batch(step))
        optimizer.zero_grad()
        for part_x, part_y in zip(x.chunk(parts), y.chunk(parts)):
            (F.cross_entropy(net(part_x), part_y) / parts).backward()
        optimizer.step()
    out = results(model, optimizer)
    out["blocks"] = {n.removeprefix("module."): b for n, b in out["blocks"].items()}
    optimizer.detach()
    return out


def unequal(rank: int | None) -> dict[str, Any]:
    """40 examples on one rank, 24 on the other: sums and counts, never a mean of means."""
    from kfac_opt import KFAC

    model = network()
    optimizer = KFAC(model, **options(lr=0.0))
    x, _ = batch(0)
    model(x if rank is None else x[:40] if rank == 0 else x[40:])
    optimizer.step()
    return results(model, optimizer)


def one_rank_drops(rank: int | None, *, all_drop: bool = False) -> dict[str, Any]:
    """One rank meets a NaN: it joins every collective with zero sums and counts."""
    from kfac_opt import KFAC

    model = network()
    optimizer = KFAC(model, **options(lr=0.0, curvature="eigenbasis"))
    x, _ = batch(0)
    model(share(x, rank))
    optimizer.step()
    x, _ = batch(1)
    mine = x[:32] if rank is None else share(x, rank)
    if rank == 1 or all_drop:
        mine = torch.full_like(mine, float("nan"))
    model(mine)
    optimizer.step()
    return results(model, optimizer)


def no_sync(rank: int | None) -> dict[str, Any]:
    from kfac_opt import KFAC

    model = network()
    net = model if rank is None else DistributedDataParallel(model)
    optimizer = KFAC(model, **options())
    for step in range(2):
        x, y = (share(t, rank) for t in batch(step))
        optimizer.zero_grad()
        if rank is None:
            F.cross_entropy(net(x), y).backward()
        else:
            with net.no_sync():
                (F.cross_entropy(net(x[:16]), y[:16]) / 2).backward()
            (F.cross_entropy(net(x[16:]), y[16:]) / 2).backward()
        optimizer.step()
    return results(model, optimizer)


def missing_forward(rank: int | None) -> dict[str, Any]:
    """Gradients are summed by hand, and the second rank has no batch in the second step: it never runs the model."""
    from kfac_opt import KFAC

    model = network()
    optimizer = KFAC(model, **options(lr=0.0))
    x, y = batch(0)
    F.cross_entropy(model(share(x, rank)), share(y, rank)).backward()
    optimizer.step()
    if rank != 1:
        optimizer.zero_grad()
        x, y = batch(1)
        F.cross_entropy(model(x[:32]), y[:32]).backward()
    optimizer.step()  # the gradients of the second rank are there, however they came
    return results(model, optimizer)


def no_forward_at_all(rank: int | None) -> dict[str, Any]:
    """A part of the model is called, on all ranks: all say so."""
    from kfac_opt import KFAC

    model = network()
    optimizer = KFAC(model, **options())
    model.head.weight.grad = torch.ones_like(model.head.weight)
    try:
        optimizer.step()
    except RuntimeError as error:
        return {"error": str(error)}
    return {}


def not_factorised(rank: int | None) -> dict[str, Any]:
    """One rank cannot factorise what it owns: nobody waits for it."""
    from kfac_opt import KFAC
    from kfac_opt._curvature.kronecker import KroneckerBlock
    from kfac_opt._curvature.linalg import FactorizationError

    model = network()
    optimizer = KFAC(model, **options())
    model(share(batch(0)[0], rank))
    inverses = KroneckerBlock._inverses

    def fail(*_: Any) -> Any:
        raise FactorizationError("broken on purpose")

    if rank == 1:
        KroneckerBlock._inverses = fail  # type: ignore[method-assign]
    try:
        optimizer.step()
    except FactorizationError as error:
        return {"error": str(error)}
    finally:
        KroneckerBlock._inverses = inverses  # type: ignore[method-assign]
    return {}


def unequal_squares(rank: int | None) -> dict[str, Any]:
    """Empirical Fisher of parameters outside layers: ``N`` times the square of the gradient that all ranks hold."""
    from kfac_opt import KFAC

    model = network()
    net = model if rank is None else DistributedDataParallel(model)
    optimizer = KFAC(model, **options(lr=0.0, fisher="empirical", curvature="diagonal"))
    mine = slice(None) if rank is None else slice(0, 40) if rank == 0 else slice(40, 64)
    x, y = batch(0)
    F.cross_entropy(net(x[mine]), y[mine]).backward()
    optimizer.step()
    expected = {n: (64 * p.grad.square()).flatten() for n, p in model.named_parameters() if p.grad is not None}
    found = {n: v.to_dense().diagonal().clone() for n, v in optimizer.curvature.items()}
    return {"expected": expected, "found": found}


class Experts(nn.Module):
    """Each example goes through one of two layers, by the sign of its first entry."""

    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative, self.head = nn.Linear(10, 4), nn.Linear(10, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        hidden = x.new_zeros(len(x), 4)
        for expert, chosen in ((self.positive, x[:, 0] > 0), (self.negative, x[:, 0] <= 0)):
            if chosen.any():
                hidden = hidden.index_put((chosen,), expert(x[chosen]))
        return self.head(torch.tanh(hidden))


def experts(rank: int | None, curvature: str) -> dict[str, Any]:
    """Each rank uses a layer that the other does not."""
    from kfac_opt import KFAC

    torch.manual_seed(0)
    model = Experts().to(DOUBLE)
    net = model if rank is None else DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = KFAC(model, **options(curvature=curvature))
    for step in range(3):
        x, y = batch(step)
        x[:, 0, 0] = x[:, 0, 0].abs()
        x[32:, 0, 0] *= -1
        optimizer.zero_grad()
        F.cross_entropy(net(share(x, rank)), share(y, rank)).backward()
        optimizer.step()
    return results(model, optimizer)


def nothing_left(rank: int | None) -> dict[str, Any]:
    """The last batch has no example for the second rank."""
    from kfac_opt import KFAC

    model = network()
    net = model if rank is None else DistributedDataParallel(model)
    optimizer = KFAC(model, **options(curvature="eigenbasis"))
    x, y = batch(0)
    for start, end in ((0, 32), (0, 64)):
        mine = slice(None) if rank is None else slice(start, end) if rank == 0 else slice(end, 64)
        optimizer.zero_grad()
        ((1 if rank is None else RANKS) * F.cross_entropy(net(x[mine]), y[mine], reduction="sum") / 64).backward()
        optimizer.step()
    return results(model, optimizer)


class Factorizations(TorchDispatchMode):
    """Counts the matrices that are factorised or inverted."""

    NAMES = ("cholesky", "eigh", "inv", "svd", "lu", "solve")

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if any(word in name for word in self.NAMES) and "cholesky_inverse" not in name and "potri" not in name:
            matrix = next(a for a in args if isinstance(a, Tensor))
            self.sizes += [matrix.shape[-1]] * (matrix.numel() // matrix.shape[-1] ** 2)
        return function(*args, **(kwargs or {}))


def factorizations(rank: int | None, curvature: str) -> dict[str, Any]:
    """Which matrices this rank factorised in one step of eight equal layers."""
    from kfac_opt import KFAC

    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(8)]).to(DOUBLE)
    optimizer = KFAC(model, **options(curvature=curvature))
    x = torch.randn(16, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(rank or 0))
    model(x)
    with Factorizations() as counter:
        optimizer.step()
    return {"sizes": counter.sizes}


def sampled(rank: int | None, curvature: str) -> dict[str, Any]:
    """The default Fisher: labels differ between the ranks, the weights must not."""
    from kfac_opt import KFAC

    model = network(torch.float32)
    net = model if rank is None else DistributedDataParallel(model)
    optimizer = KFAC(model, lr=0.1, curvature=curvature)
    losses = []
    for step in range(12):
        x, y = (share(t, rank) for t in batch(step))
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x.float()), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return {**results(model, optimizer), "losses": losses}


class HiddenUse(nn.Module):
    """The weight is used beside its module, where the input is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(10, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head(torch.tanh(self.inner(x)) + F.linear(x, self.inner.weight).square())


def hidden_use(rank: int | None) -> dict[str, Any]:
    """The second rank's inputs are zero: it cannot tell, and does what the first one finds."""
    from kfac_opt import KFAC

    torch.manual_seed(0)
    model = HiddenUse().to(DOUBLE)
    net = model if rank is None else DistributedDataParallel(model)
    optimizer = KFAC(model, **options())
    for step in range(3):
        x, y = batch(step)
        x[len(x) // RANKS :] = 0.0
        optimizer.zero_grad()
        F.cross_entropy(net(share(x, rank)), share(y, rank)).backward()
        optimizer.step()
    return results(model, optimizer)


def label_noise(rank: int | None) -> dict[str, Any]:
    """One example, the same on both ranks: the sum over ranks tells whether the sampled labels were equal."""
    from kfac_opt import KFAC

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3)).to(DOUBLE)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    optimizer = KFAC(model, **options(lr=0.0, fisher="mc", factor_decay=0.0))
    traces = []
    for _ in range(40):
        model(torch.ones(1, 2, dtype=DOUBLE))
        optimizer.step()
        traces.append(optimizer.curvature["0"].output_factor.clone())
    return {"factors": torch.stack(traces)}


def resume(rank: int | None) -> dict[str, Any]:
    """Save and load on every rank, in the middle of the intervals."""
    from kfac_opt import KFAC

    finals = []
    saved: Any = None
    for interrupted in (False, True):
        model = network()
        optimizer = KFAC(model, **options(fisher="mc", factor_interval=2, inverse_interval=4))
        for step in range(6):
            if interrupted and step == 3:
                saved = optimizer.state_dict(), model.state_dict()
                optimizer.detach()
                model = network()
                optimizer = KFAC(model, **options(fisher="mc", factor_interval=2, inverse_interval=4))
                optimizer.load_state_dict(saved[0])
                model.load_state_dict(saved[1])
            x, y = (share(t, rank) for t in batch(step))
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            for p in model.parameters():
                if rank is not None:
                    dist.all_reduce(p.grad)
                    p.grad.div_(RANKS)
            optimizer.step()
        finals.append(results(model, optimizer))
        optimizer.detach()
    return {"straight": finals[0], "resumed": finals[1]}


def own_group(rank: int | None) -> dict[str, Any]:
    """A process group of one's own rank alone: factors are those of the own half."""
    from kfac_opt import KFAC

    group = None
    if rank is not None:
        groups = [dist.new_group([r]) for r in range(RANKS)]
        group = groups[rank]
    model = network()
    optimizer = KFAC(model, **options(lr=0.0), process_group=group)
    model(batch(0)[0].chunk(RANKS)[rank or 0])
    optimizer.step()
    return results(model, optimizer)


def sharded(rank: int | None) -> dict[str, Any]:
    """FSDP2: right for linear layers, or a clear refusal."""
    from kfac_opt import KFAC

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(DOUBLE)
    if rank is not None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    try:
        optimizer = KFAC(model, **options())
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            x, y = torch.randn(8, 4, dtype=DOUBLE, generator=generator), torch.randint(3, (8,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(share(x, rank)), share(y, rank)).backward()
            optimizer.step()
    except (ValueError, TypeError, RuntimeError) as error:
        return {"refused": str(error)}
    full = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    return {"weights": {n: p.detach().clone() for n, p in full.items()}}


SCENARIOS: dict[str, Callable[[int | None], dict[str, Any]]] = {
    **{
        f"{curvature} {style} {fisher}": lambda rank, c=curvature, s=style, f=fisher: train(
            rank, curvature=c, damping_style=s, fisher=f
        )
        for curvature, style, fisher in (
            ("kronecker", "factored", "exact"),
            ("kronecker", "exact", "exact"),
            ("eigenbasis", "factored", "exact"),
            ("kronecker", "factored", "empirical"),
        )
    },
    "momentum, intervals": lambda rank: train(rank, momentum=0.9, factor_interval=2, inverse_interval=4, steps=7),
    "wrapper": lambda rank: train(rank, attach="wrapper"),
    "accumulation": lambda rank: train(rank, parts=2),
    "diagonal": lambda rank: train(rank, curvature="diagonal", fisher="empirical"),
    "unequal": unequal,
    "one rank drops": one_rank_drops,
    "all ranks drop": lambda rank: one_rank_drops(rank, all_drop=True),
    "no sync": no_sync,
    "experts kronecker": lambda rank: experts(rank, "kronecker"),
    "experts eigenbasis": lambda rank: experts(rank, "eigenbasis"),
    "nothing left": nothing_left,
    "factorizations kronecker": lambda rank: factorizations(rank, "kronecker"),
    "factorizations eigenbasis": lambda rank: factorizations(rank, "eigenbasis"),
    "sampled kronecker": lambda rank: sampled(rank, "kronecker"),
    "sampled eigenbasis": lambda rank: sampled(rank, "eigenbasis"),
    "labels": label_noise,
    "hidden use": hidden_use,
    "resume": resume,
    "own group": own_group,
    "missing forward": missing_forward,
    "no forward at all": no_forward_at_all,
    "not factorised": not_factorised,
    "unequal squares": unequal_squares,
    "sharded": sharded,
}


def main(rank: int, folder: str) -> None:
    """Runs every scenario on this rank and writes the results, or the error, of each."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    found: dict[str, Any] = {}
    for name, scenario in SCENARIOS.items():
        found[name] = scenario(rank)
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
