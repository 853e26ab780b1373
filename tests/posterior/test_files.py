"""A posterior on the disk: whole or not at all, and refused where it could not be drawn from."""

from __future__ import annotations

import copy
import io
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kfac_opt import Posterior
from kfac_opt._curvature.spectral import SpectralForm
from kfac_opt.bayes.posterior import PosteriorBlock, Width
from kfac_opt.layers.layout import MatrixLayout
from kfac_opt.likelihoods import Categorical, Gaussian
from tests.support import assert_same

DOUBLE = torch.float64


def small(**options: Any) -> Posterior:
    torch.manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(1, n, n, dtype=DOUBLE))[0] for n in (2, 4)]
    form = SpectralForm(bases[0], bases[1], torch.rand(1, 2, 4, dtype=DOUBLE))
    block = PosteriorBlock("weight", "bias", MatrixLayout("matrix", (2, 3), has_bias=True), form, Width(100.0, 2.0))
    return Posterior({"weight": torch.randn(2, 3), "bias": torch.randn(2)}, [block], **options)


KILLED = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)
from kfac_opt import Posterior
from kfac_opt.bayes.posterior.block import Width, uncurved_block

path = sys.argv[1]
mean = torch.zeros(1_500_000)
posterior = Posterior({"weight": mean}, [uncurved_block("weight", mean, Width(1.0))])
posterior.save(path)
for turn in range(12):
    child = os.fork()
    if child == 0:
        while True:
            posterior.save(path)
    time.sleep(0.01 + 0.007 * turn)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert Posterior.load(path).num_parameters == len(mean)
print("whole")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the writer is killed in a process of its own")
def test_killing_who_saves_leaves_a_whole_file(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "posterior.pt")]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert found.stdout.strip() == "whole", found.stderr[-2000:]


def test_an_error_while_saving_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "posterior.pt"
    posterior = small()
    posterior.save(path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        posterior.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["posterior.pt"]


def test_the_file_has_the_rights_of_an_ordinary_one_and_a_link_stays_a_link(tmp_path):
    path, link = tmp_path / "posterior.pt", tmp_path / "latest.pt"
    ordinary = tmp_path / "ordinary"
    ordinary.write_bytes(b"")
    small().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)
    path.chmod(0o600)
    link.symlink_to(path)
    small(seed=3).save(link)
    assert link.is_symlink()
    assert Posterior.load(path).seed == 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_open_file_is_written_too():
    buffer = io.BytesIO()
    small().save(buffer)
    buffer.seek(0)
    assert_same(Posterior.load(buffer).state_dict(), small().state_dict())


def entry(key: str, value: Any) -> Callable[[dict], None]:
    def change(state: dict) -> None:
        block = state["blocks"][0]
        block[key] = value(block[key]) if callable(value) else value

    return change


def with_number(index: int, number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def write(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        tensor.view(-1)[index] = number
        return tensor

    return write


BROKEN: list[tuple[Callable[[dict], Any], str]] = [
    (lambda s: s["mean"]["weight"].view(-1)[0:1].fill_(float("nan")), "mean of 'weight' is no finite tensor"),
    (lambda s: s["mean"].update(bias=3), "mean of 'bias' is no finite tensor"),
    (entry("eigenvalues", with_number(2, float("nan"))), "block of 'weight': 'eigenvalues' is not finite"),
    (entry("eigenvalues", with_number(2, -1e-3)), "'eigenvalues' has negative entries"),
    (entry("eigenvalues", lambda t: t[..., :3]), r"'eigenvalues' is \[1, 2, 3\], its layout says \[1, 2, 4\]"),
    (entry("eigenvalues", None), "'eigenvalues' is NoneType"),
    (entry("input_basis", with_number(0, float("inf"))), "'input_basis' is not finite"),
    (entry("output_basis", lambda t: t[0]), "'output_basis' is"),
    (entry("damping", "pi"), r"damping must be one of \['exact', 'factored'\], got 'pi'"),
    (entry("ess", float("nan")), "ess must be finite"),
    (entry("prior_precision", -1.0), "prior_precision must be finite and > 0"),
    (entry("layout", {"kind": "round", "weight_shape": [2, 3]}), "is no layout"),
    (entry("layout", {"kind": "matrix"}), "is no layout"),
    (lambda s: s["blocks"][0].pop("layout"), r"block of 'weight' lacks \['layout'\]"),
    (lambda s: s["blocks"][0].pop("eigenvalues"), "lacks"),
    (lambda s: s.update(blocks=[]), "every mean needs exactly one block"),
    (lambda s: s.update(likelihood={"name": "poisson"}), "likelihood must be one of"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_a_state_that_could_not_be_drawn_from_is_refused_by_name(change, message, tmp_path):
    state = copy.deepcopy(small().state_dict())
    change(state)
    torch.save(state, tmp_path / "posterior.pt")
    with pytest.raises(ValueError, match=message):
        Posterior.load(tmp_path / "posterior.pt")


class Own(Categorical):
    """Describes itself as what it derives from."""


class Named(Gaussian):
    def describe(self) -> dict[str, object]:
        return {"name": "named", "variance": 1.0}


@pytest.mark.parametrize("likelihood", [Own(), Named(1.0)], ids=["inherits", "names itself"])
def test_a_likelihood_that_could_not_be_built_again_is_refused_at_save_with_the_way_out(likelihood, tmp_path):
    posterior = small(likelihood=likelihood)
    with pytest.raises(ValueError, match=r"Posterior.save: the likelihood (Own|Named) .*from_state_dict\(state, likelihood="):
        posterior.save(tmp_path / "posterior.pt")
    assert not list(tmp_path.iterdir())
    torch.save(posterior.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    loaded = Posterior.from_state_dict(state, likelihood=likelihood)
    assert loaded.likelihood is likelihood
    assert_same(loaded.sample(), posterior.sample())
