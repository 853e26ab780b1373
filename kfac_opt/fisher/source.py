"""A Fisher matrix as a stream of rows: which model, data and labels, in chunks that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from kfac_opt.fisher.audit import BlockShape, audited_blocks, measured_shapes
from kfac_opt.fisher.blocks import ParameterBlock
from kfac_opt.fisher.capture import RowCapture
from kfac_opt.fisher.data import Batch, RepeatedData
from kfac_opt.fisher.frozen import FrozenModel
from kfac_opt.fisher.stores import Store
from kfac_opt.fisher.terms import FisherKind, OutputTerms, Roots
from kfac_opt.likelihoods import Likelihood

WORK_SHARE = 4
"""One quarter of the memory limit is for chunks on their way, the rest for what is kept."""
MAX_CHUNK = 128
"""Examples per chunk: LeNet on 2000 images, exact, one thread: 3.5 s with 32 to 256 examples, 7 s with 512."""
PROBE = 3
"""Examples on which sizes are measured and layers are checked."""


class FisherSource:
    """Surveys the data once (checks, counts, labels) and then gives chunks, roots and rows.

    Attributes:
        num_terms: ``N``.
        num_examples: examples of the data.
        columns: rows per example: terms per example × ``K``; of the longest examples where they differ.
        num_rows: rows of all examples.
        labels: ``[N, m, ...]`` of ``mc``, else None.
        shapes: sizes of the blocks as linear maps.
        pass_chunk: examples that go through the network together.
        capture_chunk, capture_columns: examples and columns whose rows are made together.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        likelihood: Likelihood,
        kind: FisherKind,
        *,
        label_samples: int,
        labels: Tensor | None,
        generator: torch.Generator | None,
        outputs: Callable[[Any], Any] | None,
        memory_limit: int,
        owner: str,
    ) -> None:
        if not is_number(memory_limit) or memory_limit < 1:
            raise ValueError(f"{owner}: memory_limit must be a number of bytes > 0, got {memory_limit!r}")
        memory_limit = int(memory_limit)  # 2e9 is a number of bytes too
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"{owner}: generator is {type(generator).__name__}, expected a torch.Generator or None.")
        self.owner, self.memory_limit = owner, memory_limit
        self.work_bytes = max(memory_limit // WORK_SHARE, 1)
        self.model = FrozenModel(model, outputs, owner)
        self.data = RepeatedData(data, owner)
        self.terms = OutputTerms(likelihood, kind, label_samples, owner)
        self.labels = labels
        self._batch_labels: list[Tensor] = []  # of every batch, masked terms included: [examples, terms · m ...]
        self.num_examples = self.num_terms = self.num_rows = self.pass_chunk = 0
        self.blocks = self.model.blocks
        keeps = self._survey(generator)
        if self.num_terms == 0:
            raise ValueError(f"{owner}: every term of the data is masked. Let the mask keep at least one term.")
        if self.labels is not None:
            self._check_labels(label_samples)
            self._spread_labels(keeps)
        self.capture = RowCapture(self.model, self.blocks, self.work_bytes)

    # -- the survey ---------------------------------------------------------------------------------------------

    def _survey(self, generator: torch.Generator | None) -> list[tuple[Tensor, int]]:
        """One pass without gradients: sizes, checks, number of terms, labels.

        Returns:
            For every batch which terms count, and its number of examples.
        """
        draw = self.terms.kind == "mc" and self.labels is None
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        drawn: list[Tensor] = []
        keeps: list[tuple[Tensor, int]] = []
        largest = 0
        for batch in self.data:
            if batch.example_numel > largest:
                # The first batch, or one with longer examples than before.
                largest = batch.example_numel
                self._measure(batch.slice(0, PROBE).to(self.model.device))
            pieces = [self._surveyed(chunk) for chunk in self.cut(batch, self.pass_chunk)]
            self.num_examples += batch.size
            keeps.append((torch.cat([self.terms.term_keep(logits, mask) for logits, mask in pieces]), batch.size))
            if draw:
                # From all outputs of the batch at once, so that the labels do not depend on the memory limit.
                masks = [mask for _, mask in pieces if mask is not None]
                outputs = torch.cat([logits for logits, _ in pieces])
                drawn.append(self.terms.draw(outputs, torch.cat(masks) if masks else None, generator))
        if draw:
            self.labels = torch.cat(drawn)
        return keeps

    def _surveyed(self, chunk: Batch) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            logits, mask = self.model.forward(chunk)
        self.terms.check(logits, chunk.size)
        if self.num_terms == 0:
            self._refuse_dependence(chunk, logits)
        self.num_terms += self.terms.likelihood.num_terms(logits, mask)
        self.num_rows += self.terms.term_shape(logits).numel() * self.terms.num_columns(logits)
        if self.terms.kind == "empirical":
            self.terms.roots(logits, mask, chunk.targets, None)
        return logits, mask

    def _measure(self, probe: Batch) -> None:
        model = self.model
        with torch.no_grad():
            logits, _ = model.forward_without_randomness(probe)
        self.terms.check(logits, probe.size)
        if not self._depends_on_weights(probe):
            raise ValueError(
                f"{self.owner}: the model's outputs do not depend on its trainable parameters. Check requires_grad, "
                "and that the forward does not run under torch.no_grad()."
            )
        model.refuse_unrepeatable(probe)
        self.columns = (self.terms.term_shape(logits).numel() // probe.size) * self.terms.num_columns(logits)
        self.output_shape = logits.shape
        self.blocks = audited_blocks(model, self.blocks, probe)
        self.shapes: dict[str, BlockShape] = measured_shapes(model, self.blocks, probe)
        self.example_bytes = model.activation_bytes(probe) // probe.size
        self._choose_chunks()

    def _choose_chunks(self) -> None:
        """Chunks that fit into the working memory; where one example's rows do not, its columns are taken in turn."""
        fixed, per_column = self._capture_bytes()
        self.pass_chunk = min(MAX_CHUNK, self.work_bytes // max(4 * self.example_bytes, 1))
        room = self.work_bytes - fixed
        if self.pass_chunk == 0 or room < per_column:
            needed = max(4 * self.example_bytes, fixed + per_column)
            raise ValueError(
                f"{self.owner}: one example needs {readable(needed)} of working memory, a quarter of the "
                f"memory_limit of {readable(self.memory_limit)} is {readable(self.work_bytes)}. Raise memory_limit to "
                f"at least {readable(1.05 * WORK_SHARE * needed)}."
            )
        self.capture_chunk = max(1, min(MAX_CHUNK, self.work_bytes // (fixed + per_column * self.columns)))
        self.capture_columns = min(self.columns, room // per_column)

    def _depends_on_weights(self, probe: Batch) -> bool:
        with torch.enable_grad():
            return self.model.forward(probe)[0].requires_grad

    def _capture_bytes(self) -> tuple[int, int]:
        """Memory for the rows of one example on their way: fixed, and for every column."""
        item = self.model.row_dtype.itemsize
        fixed, per_column = 2 * self.example_bytes, 1
        for block in self.blocks:
            shape = self.shapes[block.name]
            if block.adapter is None:
                per_column += 3 * block.size * item + self.example_bytes
            else:
                fixed += shape.groups * shape.shared * shape.in_dim * item
                outputs = shape.groups * shape.shared * shape.out_dim
                per_column += (2 * outputs + min(block.size, outputs)) * item
        return fixed, per_column

    def _refuse_dependence(self, chunk: Batch, logits: Tensor) -> None:
        """Examples must not see each other: an example has no Jacobian of its own then."""
        if chunk.size < 3:
            return
        with torch.no_grad():
            alone, _ = self.model.forward(chunk.slice(0, 2))
        difference = float((alone - logits[:2]).abs().max())
        if difference > 10.0 * torch.finfo(self.model.dtype).eps ** 0.5 * max(1.0, float(logits.abs().max())):
            raise ValueError(
                f"{self.owner}: the outputs of the first two examples change by {difference:.2g} when the rest of the "
                "batch is left out: examples see each other and have no Jacobian of their own. Call model.eval(), or "
                "take the dependence out."
            )

    def _check_labels(self, label_samples: int) -> None:
        assert self.labels is not None
        found = list(self.labels.shape)
        if len(found) < 2 or found[:2] != [self.num_terms, label_samples]:
            raise ValueError(
                f"{self.owner}: labels have shape {found}, expected [{self.num_terms}, {label_samples}]: one row per "
                "loss term in the order of the data, label_samples columns."
            )
        self.labels = self.terms.checked_labels(self.labels.to(self.model.device), self.output_shape)

    def _spread_labels(self, keeps: list[tuple[Tensor, int]]) -> None:
        """Labels by batch and example, with zeros at the terms that do not count."""
        assert self.labels is not None
        first = 0
        for keep, examples in keeps:
            count = int(keep.sum())
            full = self.labels.new_zeros(len(keep), *self.labels.shape[1:])
            full[keep] = self.labels[first : first + count]
            self._batch_labels.append(full.reshape(examples, -1, *self.labels.shape[1:]))
            first += count

    # -- chunks -------------------------------------------------------------------------------------------------

    def cut(self, batch: Batch, size: int) -> Iterator[Batch]:
        """The batch in pieces of at most ``size`` examples, on the model's device."""
        for start in range(0, batch.size, size):
            yield batch.slice(start, start + size).to(self.model.device)

    def chunks(self, size: int | None = None) -> Iterator[tuple[Batch, Callable[[Tensor, Tensor | None], Roots]]]:
        """All examples in chunks, each with the function that makes its roots from logits and mask."""
        size = self.pass_chunk if size is None else size
        for index, batch in enumerate(self.data):
            first = 0
            for chunk in self.cut(batch, size):
                labels = self._batch_labels[index][first : first + chunk.size] if self._batch_labels else None
                yield chunk, self._roots_of(chunk, labels)
                first += chunk.size

    def _roots_of(self, chunk: Batch, labels: Tensor | None) -> Callable[[Tensor, Tensor | None], Roots]:
        return lambda logits, mask: self.terms.roots(logits, mask, chunk.targets, labels)

    def stores(self, as_rows: Callable[[ParameterBlock], bool]) -> Iterator[dict[str, Store]]:
        """Rows of all examples by block name, some examples (and some of their columns) at a time.

        Not yet divided by ``N``. Columns come in turn only where one example alone fills the working memory, so that
        the rows of every block are in the order of the examples and their terms.
        """
        for chunk, roots in self.chunks(self.capture_chunk):
            yield from self.capture.stores(chunk, _separated(roots), as_rows, self.capture_columns)


def _separated(
    roots: Callable[[Tensor, Tensor | None], Roots],
) -> Callable[[Tensor, Tensor | None], Sequence[Tensor]]:
    return lambda logits, mask: roots(logits, mask).separate()


def is_number(value: object, *, whole: bool = False) -> bool:
    """Whether this is a (whole) number, numpy's included."""
    return isinstance(value, Integral if whole else Real)


def readable(size: float) -> str:
    """``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
