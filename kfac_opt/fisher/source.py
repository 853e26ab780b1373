"""A Fisher matrix as a stream of rows: which model, data and labels, in chunks that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kfac_opt.fisher.capture import BlockShape, RowCapture, audited_blocks, measured_shapes
from kfac_opt.fisher.data import Batch, RepeatedData
from kfac_opt.fisher.frozen import FrozenModel, ParameterBlock
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
        columns: rows per example: terms per example × ``K``.
        labels: ``[N, m, ...]`` of ``mc``, else None.
        shapes: sizes of the blocks as linear maps.
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
        self.owner, self.memory_limit = owner, memory_limit
        self.work_bytes = max(memory_limit // WORK_SHARE, 1)
        self.model = FrozenModel(model, outputs, owner)
        self.data = RepeatedData(data, owner)
        self.terms = OutputTerms(likelihood, kind, label_samples, owner)
        self.labels = labels
        self.counts: list[int] = []
        self.chunk_size = 0
        self._survey(generator)
        self.num_terms = sum(self.counts)
        if self.num_terms == 0:
            raise ValueError(f"{owner}: every term of the data is masked. Let the mask keep at least one term.")
        if self.labels is not None:
            self._check_labels(label_samples)
        self.capture = RowCapture(self.model, self.blocks, self.work_bytes)

    # -- the survey ---------------------------------------------------------------------------------------------

    def _survey(self, generator: torch.Generator | None) -> None:
        """One pass without gradients: sizes, checks, number of terms, labels."""
        draw = self.terms.kind == "mc" and self.labels is None
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        drawn: list[Tensor] = []
        self.num_examples = 0
        for batch in self.data:
            if self.chunk_size == 0:
                self._measure(batch.slice(0, PROBE).to(self.model.device))
            pieces = [self._surveyed(chunk) for chunk in self._cut(batch)]
            self.num_examples += batch.size
            if draw:
                # From all outputs of the batch at once, so that the labels do not depend on the memory limit.
                masks = [mask for _, mask in pieces if mask is not None]
                outputs = torch.cat([logits for logits, _ in pieces])
                drawn.append(self.terms.draw(outputs, torch.cat(masks) if masks else None, generator))
        if draw:
            self.labels = torch.cat(drawn)

    def _surveyed(self, chunk: Batch) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            logits, mask = self.model.forward(chunk)
        self.terms.check(logits, chunk.size)
        self.counts.append(self.terms.likelihood.num_terms(logits, mask))
        if self.terms.kind == "empirical":
            self.terms.roots(logits, mask, chunk.targets, None)
        if len(self.counts) == 1:
            self._refuse_dependence(chunk, logits)
        return logits, mask

    def _measure(self, probe: Batch) -> None:
        model = self.model
        state = torch.random.get_rng_state()
        with torch.no_grad():
            logits, _ = model.forward(probe)
        changed = not torch.equal(state, torch.random.get_rng_state())
        torch.random.set_rng_state(state)
        if changed:
            raise ValueError(
                f"{self.owner}: the model draws random numbers in its forward: every pass would see another network. "
                "Call model.eval() first, or take the randomness out."
            )
        self.terms.check(logits, probe.size)
        if not self._depends_on_weights(probe):
            raise ValueError(
                f"{self.owner}: the model's outputs do not depend on its trainable parameters. Check requires_grad, "
                "and that the forward does not run under torch.no_grad()."
            )
        self.columns = (self.terms.term_shape(logits).numel() // probe.size) * self.terms.num_columns(logits)
        self.blocks = audited_blocks(model, probe)
        self.shapes: dict[str, BlockShape] = measured_shapes(model, self.blocks, probe)
        self.example_bytes = model.activation_bytes(probe) // probe.size
        self.chunk_size = min(MAX_CHUNK, self.work_bytes // max(self.capture_bytes(), 1))
        if self.chunk_size == 0:
            raise ValueError(
                f"{self.owner}: one example needs {readable(self.capture_bytes())} of working memory, a quarter of the "
                f"memory_limit of {readable(self.memory_limit)} is {readable(self.work_bytes)}. Raise memory_limit to "
                f"at least {readable(WORK_SHARE * self.capture_bytes())}."
            )

    def _depends_on_weights(self, probe: Batch) -> bool:
        with torch.enable_grad():
            return self.model.forward(probe)[0].requires_grad

    def capture_bytes(self) -> int:
        """Memory for the rows of one example on their way: activations, inputs, gradients, rows of the rest."""
        item = self.model.row_dtype.itemsize
        total = 2 * self.example_bytes
        for block in self.blocks:
            shape = self.shapes[block.name]
            if block.adapter is None:
                total += 3 * self.columns * block.size * item + self.columns * self.example_bytes
            else:
                inputs, gradients = shape.in_dim, 2 * self.columns * shape.out_dim
                total += shape.groups * shape.shared * (inputs + gradients) * item
                total += min(self.columns * block.size, self.columns * shape.groups * shape.shared * shape.out_dim) * item
        return total

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
        self.labels = self.labels.to(self.model.device)

    # -- chunks -------------------------------------------------------------------------------------------------

    def _cut(self, batch: Batch) -> Iterator[Batch]:
        for start in range(0, batch.size, self.chunk_size):
            yield batch.slice(start, start + self.chunk_size).to(self.model.device)

    def chunks(self) -> Iterator[tuple[Batch, Callable[[Tensor, Tensor | None], Roots]]]:
        """All examples in chunks, each with the function that makes its roots from logits and mask."""
        first, index = 0, 0
        for batch in self.data:
            for chunk in self._cut(batch):
                labels = None
                if self.labels is not None:
                    labels = self.labels[first : first + self.counts[index]]
                    first, index = first + self.counts[index], index + 1
                yield chunk, self._roots_of(chunk, labels)

    def _roots_of(self, chunk: Batch, labels: Tensor | None) -> Callable[[Tensor, Tensor | None], Roots]:
        return lambda logits, mask: self.terms.roots(logits, mask, chunk.targets, labels)

    def stores(self, as_rows: Callable[[ParameterBlock], bool]) -> Iterator[dict[str, Store]]:
        """Rows of all examples, chunk by chunk, by block name; not yet divided by ``N``."""
        for chunk, roots in self.chunks():
            yield self.capture.stores(chunk, _separated(roots), as_rows)


def _separated(roots: Callable[[Tensor, Tensor | None], Roots]) -> Callable[[Tensor, Tensor | None], list[Tensor]]:
    return lambda logits, mask: roots(logits, mask).separate()


def readable(size: float) -> str:
    """``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
