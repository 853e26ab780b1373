"""What to say where an estimate was due, there are gradients, and no pass of the model gave one."""

from __future__ import annotations

from kfac_opt._capture.passes import Missed
from kfac_opt._capture.saying import say

REASONS: dict[Missed, str] = {  # the likeliest first
    "no backward": "the backward never came through the tensor that is taken for the model's output. Let outputs= pick the "
    "tensor that the loss is computed from, not a new one made of it, or use fisher='mc'",
    "evaluation": "the model was in evaluation mode. Call model.train() (Hugging Face's from_pretrained() returns a model in "
    "evaluation mode); to hold dropout or running statistics still, set eval() on those layers alone",
    "transformed": "the gradients come from transforms of torch.func, inside which no batch can be seen. Run the model once "
    "on the batch without them, in training mode, before step(): model(x) is enough, without a backward if fisher='mc'",
    "detached": "the tensor that is taken for the model's output carries no gradient. Pick the one that the loss is computed "
    "from, with outputs=",
    "masked": "the masks left no term of the loss",
    "dropped": "the model's outputs or the sums over them were not finite (see dropped_estimates)",
    "no gradients": "only passes with gradients disabled were seen, so that the gradients come from elsewhere. Call the "
    "module that the optimizer was given: model(x), not model.forward(x), another method of it or a part of it",
}


def describe_uncounted(owner: str, missed: set[Missed]) -> None:
    """Says once why no pass counts, as far as that can be told."""
    reason = next(words for known, words in REASONS.items() if known in missed)
    say(
        f"{owner}: an estimate of the curvature is due and there are gradients, but no pass since the last step counts: "
        f"{reason}. Until then the curvature stays as it is (the plain gradient, where there is none yet)."
    )
