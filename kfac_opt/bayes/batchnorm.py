"""Running statistics of batch normalization for the weights that will predict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from kfac_opt.bayes.posterior import Posterior, load_weights_, parameters_of, restored_weights
from kfac_opt.bayes.prediction import batches_of


@torch.no_grad()
def update_bn(
    model: nn.Module,
    loader: Iterable[Any],
    at: Literal["mean", "sample"] = "mean",
    *,
    posterior: Posterior | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Replaces running means and variances by plain averages over ``loader``.

    While a posterior is trained the statistics follow the drawn weights, and they lag behind; before predicting at
    the mean, or with an ensemble, take them anew. A model without batch norm is left alone.

    Args:
        loader: iterable of inputs, or of ``(inputs, targets)`` pairs; batches of the size used in training.
        at: ``"mean"``: at the posterior's mean, or at the model's weights without a posterior; ``"sample"``: each batch
            at another draw, so that the statistics are averages over the posterior.
        posterior: needed for ``"sample"``.
        generator: of the draws; None: the posterior's own.

    Weights and mode of the model are afterwards what they were; after an error the old statistics as well. Layers that the
    model does not run in evaluation mode (auxiliary heads) keep theirs.

    Raises:
        ValueError: for ``"sample"`` without a posterior, a posterior of another model, or an empty loader.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> update_bn(model, [torch.randn(8, 2)])
    """
    if at not in ("mean", "sample"):
        raise ValueError(f"update_bn: at must be 'mean' or 'sample', got {at!r}")
    if at == "sample" and posterior is None:
        raise ValueError("update_bn: at='sample' needs posterior=, the distribution to draw the weights from.")
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    parameters = [] if posterior is None else parameters_of(model, posterior.shapes, posterior.fixed)
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    saved = [(norm, buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    unseen = set(norms)
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's word for the plain average over batches
            norm.train()
        with restored_weights(parameters):
            if posterior is not None:
                load_weights_(parameters, list(posterior.mean.values()))
            empty = True
            for inputs in batches_of(loader):
                empty = False
                if at == "sample" and posterior is not None:
                    load_weights_(parameters, list(posterior.sample(generator).values()))
                model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        if empty:
            raise ValueError("update_bn: the loader has no batches. Give at least one.")
        unseen = {norm for norm in norms if norm.num_batches_tracked is not None and not int(norm.num_batches_tracked)}
    finally:
        for norm, buffer, value in saved:
            if norm in unseen:
                buffer.copy_(value)
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training
