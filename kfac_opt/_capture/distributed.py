"""Sums over processes and results from an owner, with as few collectives as possible."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def active_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group to work over, None when there is nobody else: the default group unless one is given."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = dist.group.WORLD if group is None else group
    return group if group is not None and dist.get_world_size(group) > 1 else None


def rank(group: dist.ProcessGroup | None) -> int:
    """Own number within the group, 0 without one."""
    return 0 if group is None else dist.get_rank(group)


def num_ranks(group: dist.ProcessGroup | None) -> int:
    """Size of the group that is worked over, 1 when there is nobody else."""
    active = active_group(group)
    return 1 if active is None else dist.get_world_size(active)


def sum_over_ranks_(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Replaces each tensor by its sum over the ranks, in one collective per dtype and device.

    Every rank must pass tensors of the same shapes in the same order.
    """
    if group is None:
        return
    for members in _by_kind(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in members])
        dist.all_reduce(flat, group=group)
        _scatter_back(flat, members)


def send_from_owners_(owned: Sequence[tuple[int, list[Tensor]]], group: dist.ProcessGroup | None) -> None:
    """Each ``(owner rank, tensors)``: everybody gets the owner's values. One broadcast per owner, dtype and device."""
    if group is None:
        return
    for owner in sorted({number for number, _ in owned}):
        tensors = [tensor for number, members in owned if number == owner for tensor in members]
        for members in _by_kind(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in members])
            dist.broadcast(flat, src=dist.get_global_rank(group, owner), group=group)
            _scatter_back(flat, members)


def assign_owners(costs: Sequence[float], num_ranks: int) -> list[int]:
    """Owner rank of each item: the dearest first, always to the rank with the least so far."""
    load = [0.0] * num_ranks
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owner = min(range(num_ranks), key=load.__getitem__)
        owners[item] = owner
        load[owner] += costs[item]
    return owners


def _by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(kinds.values())


def _scatter_back(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    start = 0
    for tensor in tensors:
        tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()
