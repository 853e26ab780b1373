"""One test for each known mistake of other K-FAC implementations; each would catch it here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_opt import KFAC
from tests import reference
from tests.support import (
    Lambda,
    Twice,
    assert_same,
    bare_kfac,
    close,
    data,
    estimate,
    gradients,
    mlp,
    pool,
    train_step,
    weights,
)

DOUBLE = torch.float64


def trace(model: nn.Module, x: Tensor, name: str) -> Tensor:
    optimizer = bare_kfac(model)
    estimate(optimizer, model, x)
    value = optimizer.curvature[name].to_dense().trace()
    optimizer.detach()
    return value


def convolution(size: int = 0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), Lambda(pool), nn.Linear(3, 3)).to(DOUBLE)


# ---------------------------------------------------------------------------------------------
# scale


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_scale_of_a_linear_layer_at_every_batch_size(batch):
    """Wrong by 1/B² elsewhere. One example, repeated: the block is that of the example."""
    model = mlp()
    x = data(1)[0].expand(batch, -1)
    close(trace(model, x, "0"), reference.fisher_block(mlp(), data(1)[0], "0").trace())


@pytest.mark.parametrize("length", [1, 2, 9])
def test_scale_of_a_sequence_at_every_length(length):
    """Wrong by 1/(B² T) elsewhere. Equal tokens, a loss per token: the block is that of one token."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(DOUBLE)
    token = torch.randn(1, 4, dtype=DOUBLE)
    expected = reference.fisher_block(model, token, "0").trace()
    close(trace(model, token.expand(2, length, 4), "0"), expected)


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("batch", [1, 5])
def test_scale_of_a_convolution_at_every_map_size_and_batch_size(batch, size):
    """Wrong by 1/(B² S⁵) elsewhere, so that no damping fits two sizes of image. The reference is a plain loop."""
    model, x = convolution(), torch.randn(batch, 2, size, size, dtype=DOUBLE)
    a, g = reference.kronecker_factors(model, x, "0")
    close(trace(model, x, "0"), torch.kron(a, g).trace())


def test_preconditioning_a_convolution_turns_the_gradient():
    """Elsewhere the cosine of raw and preconditioned gradient is 1.000 on convolutions: SGD with a clip."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), Lambda(pool), nn.Linear(8, 10))
    x = torch.randn(32, 3, 16, 16).cumsum(2).cumsum(3) / 16  # smooth images, as real ones are
    optimizer = KFAC(model)
    F.cross_entropy(model(x), torch.randint(10, (32,))).backward()
    raw = gradients(model)
    optimizer.precondition_gradients_()
    for name in ("0.weight", "2.weight"):
        cosine = F.cosine_similarity(raw[name].reshape(-1), model.get_parameter(name).grad.reshape(-1), dim=0)
        assert 0 < cosine < 0.9, (name, cosine)


@pytest.mark.parametrize("scale", ["absolute", "relative"])
def test_damping_carries_over_between_batch_sizes(scale):
    directions = []
    for copies in (1, 16):
        model, (x, y) = mlp(), data(4)
        optimizer = bare_kfac(model, damping=0.03, damping_scale=scale)
        F.cross_entropy(model(x.repeat(copies, 1)), y.repeat(copies)).backward()
        optimizer.precondition_gradients_()
        directions.append(gradients(model))
    for name in directions[0]:
        close(directions[1][name], directions[0][name], rtol=1e-9)


@pytest.mark.parametrize("copies", [2, 5])
def test_a_whole_run_does_not_change_when_every_batch_is_duplicated(copies):
    results = []
    for count in (1, copies):
        model = mlp()
        optimizer = KFAC(model, fisher="exact", lr=0.1, factor_dtype=DOUBLE)
        for step in range(12):
            x, y = data(8, seed=step)
            train_step(optimizer, model, x.repeat(count, 1), y.repeat(count))
        results.append(weights(model))
    for name in results[0]:
        close(results[1][name], results[0][name], rtol=1e-7)  # rounding, amplified by twelve inverses


# ---------------------------------------------------------------------------------------------
# averages, first steps


def test_the_factor_average_does_not_start_at_the_identity():
    model, (x, _) = mlp(), data()
    a, g = reference.kronecker_factors(model, 1e-3 * x, "0")
    optimizer = bare_kfac(model, factor_decay=0.99)
    estimate(optimizer, model, 1e-3 * x)
    close(optimizer.curvature["0"].input_factor, a)
    close(optimizer.curvature["0"].output_factor, g)


def test_the_first_factors_are_not_twenty_times_too_small():
    model, (x, _) = mlp(), data()
    a, _ = reference.kronecker_factors(model, x, "0")
    optimizer = bare_kfac(model, factor_decay=0.95)
    for _ in range(5):
        estimate(optimizer, model, x)
        close(optimizer.curvature["0"].input_factor, a)


def test_several_sampled_labels_are_not_divided_by_their_number_twice():
    model, (x, _) = mlp(), data(64)
    exact = reference.kronecker_factors(model, x, "2")[1].trace()
    traces = []
    for labels in (1, 10):
        optimizer = bare_kfac(model, fisher="mc", label_samples=labels, factor_decay=0.0, inverse_interval=10**6)
        values = []
        for _ in range(50):
            estimate(optimizer, model, x)
            values.append(optimizer.curvature["2"].output_factor.trace())
        optimizer.detach()
        traces.append(torch.stack(values))
    for values in traces:
        assert (values.mean() - exact).abs() <= 4 * values.std() / len(values) ** 0.5


# ---------------------------------------------------------------------------------------------
# pairing, rotation, layers


def test_a_layer_called_twice_pairs_each_input_with_its_own_gradient():
    """Invisible in Kronecker factors, visible in EKFAC scales."""
    torch.manual_seed(0)
    model, (x, _) = Twice().to(DOUBLE), data(20)
    f = reference.fisher_block(model, x, "shared")
    a, g = reference.kronecker_factors(model, x, "shared")
    qa, qg = torch.linalg.eigh(a)[1], torch.linalg.eigh(g)[1]
    basis = torch.kron(qa.contiguous(), qg.contiguous())
    optimizer = bare_kfac(model, curvature="eigenbasis")
    estimate(optimizer, model, x)
    dense = optimizer.curvature["shared"].to_dense()
    close((basis.T @ dense @ basis).diagonal(), (basis.T @ f @ basis).diagonal(), rtol=1e-9)
    swapped = wrong_pairing(model, x)
    assert (swapped - f.trace()).abs() > 1e-3 * f.trace(), "the network must tell the pairings apart"


def wrong_pairing(model: nn.Module, x: Tensor) -> Tensor:
    """Trace of the block when the calls' gradients are exchanged."""
    total = torch.zeros((), dtype=DOUBLE)
    for example in reference.layer_rows(model, x, "shared"):
        a, j = example["inputs"][:, 0], example["jacobian"][:, :, 0].flip(1)
        per_output = torch.einsum("kro,ri->koi", j, a).reshape(len(j), -1)
        total += torch.einsum("kp,kl,lp->", per_output, example["hessian"], per_output)
    return total / len(x)


def test_eigenbasis_rotations_are_transposed_where_they_must_be():
    """A rotation without its transpose survives symmetric test matrices; these bases are far from symmetric."""
    model, (x, y) = mlp(), data(30)
    a, g = reference.kronecker_factors(model, x, "0")
    qa, qg = torch.linalg.eigh(a)[1], torch.linalg.eigh(g)[1]
    assert (qa - qa.T).norm() > 0.5
    assert (qg - qg.T).norm() > 0.5
    block = reference.dense_eigenbasis(reference.eigenbasis_scales(*reference.per_example_fisher(model, x, "0"), qa, qg), qa, qg)
    optimizer = bare_kfac(model, curvature="eigenbasis", damping=0.01)
    F.cross_entropy(model(x), y).backward()
    v = reference.module_matrix(model[0], lambda p: p.grad.clone())
    optimizer.precondition_gradients_()
    close(reference.module_matrix(model[0], lambda p: p.grad), reference.dense_solve(block, 0.01, v), rtol=1e-9)


def test_dilation_is_not_ignored():
    torch.manual_seed(0)
    factors = []
    for dilation in (1, 2):
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3, dilation=dilation, padding=dilation), nn.Tanh(), Lambda(pool), nn.Linear(3, 3)
        ).to(DOUBLE)
        x = torch.randn(3, 2, 6, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
        expected = reference.kronecker_factors(model, x, "0")[0]
        optimizer = bare_kfac(model)
        estimate(optimizer, model, x)
        close(optimizer.curvature["0"].input_factor, expected)
        factors.append(expected)
    assert not torch.allclose(*factors)


def test_an_in_place_relu_gives_the_gradient_in_front_of_it():
    factors = []
    for inplace in (False, True):
        model, (x, _) = mlp(activation=lambda inplace=inplace: nn.ReLU(inplace=inplace)), data()
        optimizer = bare_kfac(model)
        estimate(optimizer, model, x)
        factors.append(optimizer.curvature["0"].output_factor)
    assert torch.equal(*factors)


# ---------------------------------------------------------------------------------------------
# random numbers, resume, device reads


def test_no_global_seed_is_reset_at_a_step():
    model, (x, y) = mlp(), data()
    optimizer = KFAC(model)
    draws = []
    for _ in range(3):
        train_step(optimizer, model, x, y)
        draws.append(torch.rand(3))
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])


def test_the_step_counter_is_saved():
    model, (x, y) = mlp(), data()
    optimizer = KFAC(model)
    for _ in range(3):
        train_step(optimizer, model, x, y)
    saved = optimizer.state_dict()["state"]
    assert [int(state["step"]) for state in saved.values()] == [3] * 4


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
def test_resume_is_exact(curvature):
    model, (x, y) = mlp(), data()
    optimizer = KFAC(model, curvature=curvature)
    for _ in range(17):  # past the ramp, in the middle of both intervals
        train_step(optimizer, model, x, y)
    resumed = mlp()
    resumed.load_state_dict(model.state_dict())
    again = KFAC(resumed, curvature=curvature)
    again.load_state_dict(optimizer.state_dict())
    for _ in range(17):
        train_step(optimizer, model, x, y)
        train_step(again, resumed, x, y)
    assert_same(weights(resumed), weights(model))


class DeviceReads(TorchDispatchMode):
    """Counts values that are read from the device to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"):
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
def test_the_clip_does_not_read_the_device_once_per_layer(curvature):
    """On steps without an estimate the reads must not grow with the number of layers (host counters aside)."""
    reads = []
    for depth in (2, 12):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(depth)])
        optimizer = KFAC(
            model, curvature=curvature, likelihood="gaussian", ramp_steps=0, factor_interval=100, inverse_interval=100
        )
        x = torch.randn(8, 4)
        train_step(optimizer, model, x, torch.randn(8, 4), F.mse_loss)
        loss = F.mse_loss(model(x), torch.randn(8, 4))
        optimizer.zero_grad()
        loss.backward()
        counters = {t.data_ptr() for t in host_counters(optimizer)}
        with OnlyDevice(counters) as counter:
            optimizer.step()
        reads.append(counter.count)
    assert reads[1] <= reads[0] + 1, reads


def host_counters(optimizer: KFAC) -> list[Tensor]:
    """0-dim tensors of the state that live on the CPU on every machine: reading them costs no synchronisation."""
    found: list[Tensor] = []

    def visit(value: object, name: str = "") -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                visit(part, str(key))
        elif isinstance(value, Tensor) and value.dim() == 0 and name not in ("scale", "scale_max"):
            found.append(value)

    visit(dict(optimizer.state))
    return found


class OnlyDevice(DeviceReads):
    def __init__(self, host: set[int]) -> None:
        super().__init__()
        self.host = host

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        first = next((a for a in args if isinstance(a, Tensor)), None)
        before = self.count
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if first is not None and first.data_ptr() in self.host:
            self.count = before
        return result


# ---------------------------------------------------------------------------------------------
# fragility


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
@pytest.mark.parametrize("lr", [0.003, 0.1, 0.3])
@pytest.mark.parametrize("damping", [1e-3, 1e-1, 1.0])
def test_no_setting_of_a_wide_grid_diverges_on_a_deep_linear_net(curvature, lr, damping):
    """Elsewhere up to eight of nine settings are lost. Small, to run always; the full grid is a benchmark."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(*[nn.Linear(20, 20) for _ in range(5)], nn.Linear(20, 5))
    centers = torch.randn(5, 20, generator=generator)
    y = torch.randint(5, (512,), generator=generator)
    x = centers[y] + 1.5 * torch.randn(512, 20, generator=generator)
    optimizer = KFAC(model, lr=lr, damping=damping, curvature=curvature)
    start = float(F.cross_entropy(model(x), y).detach())
    for step in range(80):
        index = torch.randint(512, (64,), generator=generator)
        assert torch.tensor(train_step(optimizer, model, x[index], y[index])).isfinite(), step
    with torch.no_grad():
        end = float(F.cross_entropy(model(x), y))
    assert end < start
