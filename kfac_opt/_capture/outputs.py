"""What a model returns, as logits and a mask of the terms that count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def pick_logits(output: Any, outputs: Callable[[Any], Any] | None = None) -> tuple[Tensor, Tensor | None]:
    """Logits, and the mask if the model (or ``outputs``) gives one.

    Args:
        output: what the model returned: a tensor, or an object or dict with ``logits``.
        outputs: picks the logits, or ``(logits, mask)``, from anything else.

    Raises:
        TypeError: if no tensor is found; the message says how to pick one.
    """
    mask: Tensor | None = None
    if outputs is not None:
        output = outputs(output)
        if isinstance(output, tuple) and len(output) == 2:
            output, mask = output
    elif not isinstance(output, Tensor):
        logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor) and _holds_losses(output):
            raise TypeError(
                f"the model returned {type(output).__name__} with the losses {sorted(output)}, expected logits: the Fisher "
                "matrix belongs to the outputs that a loss is computed from. Keep them as the model computes them and pick "
                "them: kept = {}; model.head.register_forward_hook(lambda module, inputs, output: kept.update(logits=output)) "
                "for the module that returns them, and outputs=lambda losses: kept['logits']."
            )
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"the model returned {type(output).__name__}, expected a tensor of logits or an object with `.logits`. "
                "Pass outputs=lambda output: ... to pick the logits from what the model returns."
            )
        output = logits
    return output, mask


def _holds_losses(output: Any) -> bool:
    """A dict of scalars with gradients, as detectors return while they train."""
    values = list(output.values()) if isinstance(output, dict) else []
    return bool(values) and all(isinstance(value, Tensor) and value.dim() == 0 for value in values)
