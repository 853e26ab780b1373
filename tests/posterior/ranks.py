"""What each of four processes does: the passes of a step, or its batch, or both are divided among them."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from kfac_opt import KFACVI
from tests.support import data, mlp, weights

RANKS = 4
SAMPLES = 6  # not a multiple of the number of ranks


def optimizer_of(model: nn.Module, **options: Any) -> KFACVI:
    # absolute, dominant damping: rounding in the factors must not be amplified by small eigenvalues
    plain: dict[str, Any] = {
        "lr": 0.1,
        "damping": 0.1,
        "damping_scale": "absolute",
        "num_data": 200,
        "prior_precision": 20.0,
        "fisher": "exact",
        "factor_interval": 1,
        "inverse_interval": 2,
        "ramp_steps": 0,
        "kl_clip": 1e-3,
        "factor_dtype": torch.float64,
        "prior_gradient": "sample",
    }
    return KFACVI(model, **{**plain, **options})


def train(
    net: nn.Module,
    optimizer: KFACVI,
    part: int = 0,
    parts: int = 1,
    *,
    break_first: bool = False,
    closure: bool = False,
) -> dict[str, Any]:
    """Three steps of ``SAMPLES`` passes on this part of the batch; what they leave behind."""
    losses: list[float] = []
    for step in range(3):
        x, y = (t.chunk(parts)[part] for t in data(32, seed=step))
        optimizer.zero_grad()

        def backward(x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            return loss

        if closure:
            losses.append(float(optimizer.step(backward)))
            continue
        for index in optimizer.weight_samples(SAMPLES):
            backward()
            if break_first and step == 1 and index == 0:
                next(net.parameters()).grad.fill_(float("nan"))
        optimizer.step()
    inner = net.module if isinstance(net, DistributedDataParallel) else net
    return {
        "weights": weights(inner),
        "blocks": {name.removeprefix("module."): view.to_dense() for name, view in optimizer.curvature.items()},
        "variance": optimizer.posterior().variance(),
        "dropped": optimizer.dropped_samples,
        "losses": losses,
    }


def alone(name: str) -> dict[str, Any]:
    """One process with all passes on the whole batch."""
    model = mlp()
    options = {"num_samples": SAMPLES} if name == "closure" else {}
    return train(model, optimizer_of(model, **options), break_first=name == "one pass drops", closure=name == "closure")


def scenario(name: str, rank: int) -> dict[str, Any]:
    model = mlp()
    if name == "batch":
        return train(DistributedDataParallel(model), optimizer_of(model), rank, RANKS)
    if name == "both":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("samples", "batch"))
        net = DistributedDataParallel(model, process_group=mesh["batch"].get_group())
        optimizer = optimizer_of(model, sample_group=mesh["samples"].get_group())
        return train(net, optimizer, mesh["batch"].get_local_rank(), 2)
    options: dict[str, Any] = {"sample_group": dist.group.WORLD}
    if name == "closure":
        options["num_samples"] = SAMPLES
    optimizer = optimizer_of(model, **options)
    return train(model, optimizer, break_first=name == "one pass drops", closure=name == "closure")


SCENARIOS = ("samples", "batch", "both", "one pass drops", "closure")


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=120))
    results: dict[str, Any] = {name: scenario(name, rank) for name in SCENARIOS}
    try:
        model = mlp()
        optimizer_of(model, sample_group=dist.group.WORLD).weight_samples(RANKS - 1)
    except ValueError as error:
        results["too few"] = str(error)
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
