"""Putting drawn weights into a model and getting the old ones back."""

from __future__ import annotations

import atexit
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kfac_opt._capture.wrappers import unwrapped


def parameters_of(model: nn.Module, shapes: Mapping[str, torch.Size], fixed: Sequence[str] = ()) -> list[nn.Parameter]:
    """The parameters of ``model`` named in ``shapes``, in that order.

    Args:
        shapes: names and shapes of the random parameters.
        fixed: names of the parameters that the model may have besides.

    Raises:
        ValueError: if names or shapes are not those of ``model``, saying which.
    """
    found = dict(unwrapped(model).named_parameters())
    complaints = []
    for name, shape in shapes.items():
        if name not in found:
            complaints.append(f"'{name}' {list(shape)} is not in the model")
        elif found[name].shape != shape:
            complaints.append(f"'{name}' is {list(shape)} in the posterior and {list(found[name].shape)} in the model")
    allowed = {*shapes, *fixed}
    complaints += [
        f"'{name}' {list(parameter.shape)} of the model is not in the posterior"
        for name, parameter in found.items()
        if name not in allowed
    ]
    if complaints:
        more = f", and {len(complaints) - 5} more" if len(complaints) > 5 else ""
        raise ValueError(
            f"the posterior belongs to another model: {'; '.join(complaints[:5])}{more}. "
            "Use the model that it was made from, or one built with the same arguments."
        )
    return [found[name] for name in shapes]


@torch.no_grad()
def load_weights_(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copies ``values`` into ``parameters``: same storage, so that compiled models and views stay valid."""
    if parameters:
        torch._foreach_copy_(list(parameters), list(values))


@torch.no_grad()
def erase_weights_(parameters: Sequence[Tensor]) -> None:
    """Not a number, everywhere: ``functional_call`` puts others in their place, and a model that reads these shows it.

    It replaces what modules register; a weight that is kept in a list or a closure besides would silently stay as it is.
    """
    for parameter in parameters:
        parameter.fill_(torch.nan)


@torch.no_grad()
def write_draw_(parameters: Sequence[Tensor], means: Sequence[Tensor], noise: Sequence[Tensor], sign: float = 1.0) -> None:
    """``w ← μ + sign · ε`` into ``parameters``, added in the wider of both dtypes and on the device of the means."""
    for parameter, mean, part in zip(parameters, means, noise):
        if parameter.dtype == mean.dtype == part.dtype and parameter.device == mean.device:
            torch.add(mean, part, alpha=sign, out=parameter)
        else:
            parameter.copy_((mean + sign * part).to(mean.dtype))


_at_exit: list[bool] = []


@atexit.register
def _end() -> None:
    """Contexts that are still open then are closed when torch is half gone: their weights end with the program."""
    _at_exit.append(True)


@contextmanager
def restored_weights(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gives copies of the weights, and puts them back at the end, also when the body raises."""
    with torch.no_grad():
        saved = [parameter.detach().clone() for parameter in parameters]
    try:
        yield saved
    finally:
        if not _at_exit:
            try:
                load_weights_(parameters, saved)
            except BaseException:  # an interrupt
                load_weights_(parameters, saved)
                raise
