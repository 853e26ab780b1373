"""Says once where a sum over examples needs to know which rows belong to one, and that cannot be known."""

from __future__ import annotations

from kfac_opt._capture.due import Due
from kfac_opt._capture.passes import Pass
from kfac_opt._capture.saying import say
from kfac_opt._curvature.grouping import all_different, group_rows
from kfac_opt.layers.embedding import EmbeddingAdapter


class RowGrouping:
    """Writes down which rows of the calls belong to one example."""

    def __init__(self, due: Due) -> None:
        self.due = due
        self.said = False

    def group(self, current: Pass, num_examples: int) -> None:
        """Of a pass whose outputs are those of ``num_examples``."""
        unknown = group_rows(current.calls, num_examples, current.num_inputs)
        needed = [name for name in unknown if self.due.entries[name].block.per_example]
        names = [name for name in needed if not self._reads_once(current, name)]
        if names and not self.said:
            self.said = True
            say(
                f"the leading dimension of what {', '.join(map(repr, names))} gets ({unknown[names[0]]}) is no multiple of the "
                f"{num_examples} examples of the model's outputs, so that it is not known which rows belong to one example: each "
                "entry of it is taken for an example of its own (right for packed rows that do not meet in one loss term). If "
                "examples have several rows there, keep the batch in front, or use curvature='kronecker' and "
                "weight_sharing='expand', whose factors need no examples."
            )

    def _reads_once(self, current: Pass, name: str) -> bool:
        """A table of positions, say, whose rows do not meet."""
        adapter = self.due.entries[name].block.adapter
        return isinstance(adapter, EmbeddingAdapter) and all(all_different(call.x) for call in current.calls[name])
