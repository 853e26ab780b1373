"""One data set, seen several times: the same examples in the same order at every pass, or an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""What the model is called with: a tensor, a tuple of positional or a mapping of keyword arguments."""

FINGERPRINT_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Batch:
    """Some examples: ``inputs`` of the model, ``targets`` or None, and the number of ``examples``."""

    inputs: Inputs
    targets: Any
    size: int

    @property
    def example_numel(self) -> int:
        """Numbers in the inputs of one example."""
        leaves = [leaf for leaf in tree_leaves(self.inputs) if isinstance(leaf, Tensor)]
        return max(1, sum(leaf.numel() for leaf in leaves) // max(1, self.size))

    def slice(self, start: int, stop: int) -> Batch:
        """Examples ``start`` to ``stop``."""
        stop = min(stop, self.size)
        if start == 0 and stop == self.size:
            return self
        cut = _slicer(start, stop, self.size)
        return Batch(tree_map(cut, self.inputs), tree_map(cut, self.targets), stop - start)

    def to(self, device: torch.device) -> Batch:
        """The same examples on ``device``."""

        def move(leaf: Any) -> Any:
            return leaf.to(device) if isinstance(leaf, Tensor) else leaf

        return Batch(tree_map(move, self.inputs), tree_map(move, self.targets), self.size)


class RepeatedData:
    """Walks through ``data`` as often as needed.

    Args:
        data: a tensor of inputs, an ``(inputs, targets)`` pair, or an iterable of such (a DataLoader). ``inputs``
            may also be a tuple of positional or a mapping of keyword arguments of the model.
        owner: name for error messages.

    A loader that shuffles or augments draws from torch's global generator; every pass sees the generator as it
    was at construction, and it is put back afterwards, so that passes repeat and the caller's random numbers do
    not change. What differs nevertheless (other sources of randomness, files that change) is found by a
    fingerprint of every batch and raised.
    """

    def __init__(self, data: Any, owner: str) -> None:
        self.owner = owner
        _refuse_ambiguous(data, owner)
        self.batches: Iterable[Any] = [data] if _is_single(data) else data
        if not isinstance(self.batches, Iterable):
            raise TypeError(
                f"{owner}: data is {type(data).__name__}, expected a tensor of inputs, an (inputs, targets) pair or an "
                "iterable of such pairs (a DataLoader)."
            )
        self.repeats = _is_single(data) or isinstance(data, list)  # tensors in hand: nothing to check again
        self.generators = [g for g in _generators(data) if isinstance(g, torch.Generator)]
        self.states = [g.get_state() for g in self.generators]
        self.random_state = torch.random.get_rng_state()
        self.fingerprints: list[tuple[int, float]] | None = None

    @property
    def sizes(self) -> list[int]:
        """Examples of every batch, as the first pass gave them."""
        assert self.fingerprints is not None
        return [size for size, _ in self.fingerprints]

    def __iter__(self) -> Iterator[Batch]:
        """One pass over all batches.

        Raises:
            ValueError: no examples, or other examples than in the first pass.
            TypeError: an element that is neither a tensor nor a pair.
        """
        seen: list[tuple[int, float]] = []
        expected = self.fingerprints
        source = self._elements()
        for element in source:
            batch = self._batch(element, len(seen))
            mark = (batch.size, 0.0 if self.repeats else _fingerprint(batch.inputs))
            if expected is not None:
                self._compare(expected, mark, len(seen))
            seen.append(mark)
            if batch.size:
                yield batch
        if not seen or sum(size for size, _ in seen) == 0:
            raise ValueError(
                f"{self.owner}: the data holds no examples{' in this pass' if expected else ''}. Give at least one"
                + (", in a list or a DataLoader: an iterator can be walked through only once." if expected else ".")
            )
        if expected is not None and len(seen) != len(expected):
            raise ValueError(
                f"{self.owner}: the data changed its size between passes: {len(expected)} batches "
                f"({sum(s for s, _ in expected)} examples) first, now {len(seen)} "
                f"({sum(s for s, _ in seen)} examples). Every pass must give the same examples."
            )
        self.fingerprints = seen

    def _elements(self) -> Iterator[Any]:
        """The elements, with the random state of construction in force while the source runs, and only then."""
        iterator: Iterator[Any] | None = None
        state, own = self.random_state, self.states
        while True:
            outside, outside_own = torch.random.get_rng_state(), [g.get_state() for g in self.generators]
            self._set(state, own)
            try:
                if iterator is None:
                    iterator = iter(self.batches)
                element = next(iterator)
            except StopIteration:
                return
            finally:
                state, own = torch.random.get_rng_state(), [g.get_state() for g in self.generators]
                self._set(outside, outside_own)
            yield element

    def _set(self, state: Tensor, own: list[Tensor]) -> None:
        torch.random.set_rng_state(state)
        for generator, value in zip(self.generators, own):
            generator.set_state(value)

    def _compare(self, expected: list[tuple[int, float]], mark: tuple[int, float], index: int) -> None:
        size, value = mark
        if index >= len(expected) or expected[index][0] != size:
            was = f"{expected[index][0]} examples" if index < len(expected) else "no such batch"
            raise ValueError(
                f"{self.owner}: the data changed its size between passes: batch {index} has {size} examples, it had "
                f"{was} before. Every pass must give the same batches."
            )
        old = expected[index][1]
        if abs(value - old) > FINGERPRINT_TOLERANCE * max(abs(value), abs(old), 1e-12):
            raise ValueError(
                f"{self.owner}: batch {index} holds other examples than in the first pass. Give data without random "
                "augmentation that comes in the same order every time (shuffle=False), or tensors."
            )

    def _batch(self, element: Any, index: int) -> Batch:
        inputs, targets = element, None
        if isinstance(element, (tuple, list)):
            if len(element) == 1:
                inputs = element[0]
            elif len(element) == 2:
                inputs, targets = element
            else:
                raise TypeError(
                    f"{self.owner}: batch {index} of the data has {len(element)} parts, expected inputs or an (inputs, "
                    "targets) pair. Put several inputs into one tuple: ((first, second), targets)."
                )
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim() > 0]
        if not tensors:
            raise TypeError(
                f"{self.owner}: batch {index} of the data is {type(inputs).__name__} without a tensor, expected a "
                "tensor of inputs or an (inputs, targets) pair."
            )
        return Batch(inputs, targets, tensors[0].shape[0])


def _is_single(data: Any) -> bool:
    """A tensor, a mapping of inputs, or an ``(inputs, targets)`` pair, and no sequence of batches.

    A list of two tensors of the same length is a pair too: it is what DataLoaders give as a batch.
    """
    if isinstance(data, (Tensor, Mapping)):
        return True
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        return False
    if isinstance(data, tuple):
        return data[1] is None or isinstance(data[1], Tensor)
    return all(isinstance(part, Tensor) for part in data) and data[0].shape[:1] == data[1].shape[:1]


def _refuse_ambiguous(data: Any, owner: str) -> None:
    """A list of two tensors that look alike may be a pair or two batches: half of the data must not get lost silently."""
    if not isinstance(data, list) or not _is_single(data):
        return
    left, right = data
    if left.shape == right.shape and left.dtype == right.dtype:
        raise ValueError(
            f"{owner}: data is a list of two tensors of shape {list(left.shape)}: a pair, or two batches? Give the tuple "
            "(inputs, targets) for a pair, [(first, None), (second, None)] for two batches of inputs."
        )


def _slicer(start: int, stop: int, size: int) -> Callable[[Any], Any]:
    def cut(leaf: Any) -> Any:
        return leaf[start:stop] if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size else leaf

    return cut


def _generators(data: Any) -> set[Any]:
    """Generators that a DataLoader and its samplers draw from."""
    sampler = getattr(data, "sampler", None)
    inner = getattr(getattr(data, "batch_sampler", None), "sampler", None)
    return {getattr(part, "generator", None) for part in (data, sampler, inner)}


def _fingerprint(inputs: Inputs) -> float:
    """One number that changes when entries change or move, the same on every pass over the same values."""
    total = 0.0
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.numel():
            flat = leaf.detach().reshape(-1).double()
            wave = torch.arange(flat.numel(), dtype=torch.float64, device=flat.device).mul_(0.7548776662466927).frac_()
            total += float(flat @ wave)
    return total
