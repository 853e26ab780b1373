"""Every network under every curvature and every Fisher passes the same battery."""

from __future__ import annotations

import copy

import pytest
import torch

from kfac_opt import KFAC
from kfac_opt._step.views import CurvatureView
from tests.contracts.zoo import KRONECKER_ONLY, NETWORKS, ONE_TERM_PER_ROW, build, loss
from tests.reference import unvec, vec
from tests.support import assert_same, bare_kfac, close, gradients, train_step, weights

CURVATURES = ["kronecker", "eigenbasis", "diagonal", "identity"]


def again(name: str, examples: int = 4):
    return build(name, examples)[0]


def directions(model, optimizer, x, y) -> dict[str, torch.Tensor]:
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.precondition_gradients_()
    return gradients(model)


def estimated(optimizer: KFAC) -> dict[str, CurvatureView]:
    """All views but those of the layer that the output does not depend on."""
    return {name: view for name, view in optimizer.curvature.items() if not name.startswith("spare")}


BLOCKS = [("kronecker", "factored"), ("kronecker", "exact"), ("eigenbasis", "factored")]
SCALED = [
    (network, *block)
    for network in ONE_TERM_PER_ROW
    for block in BLOCKS
    if (network, block[0]) != ("tokens", "eigenbasis")  # tokens of one example mix: unbiased, not equal
]


@pytest.mark.parametrize(("network", "curvature", "style"), SCALED)
def test_duplicating_every_example_changes_nothing(network, curvature, style):
    """The scale of the factors: neither batch size nor positions may enter it. The main mistake of the field."""
    _, x, y = build(network)
    found = []
    for copies in (1, 3):
        model = again(network)
        optimizer = bare_kfac(model, curvature=curvature, damping_style=style, damping=0.05)
        repeated = (torch.cat([t] * copies) for t in (x, y))
        found.append((directions(model, optimizer, *repeated), {n: v.to_dense() for n, v in optimizer.curvature.items()}))
    for one, three in zip(*found):
        for name in one:
            close(three[name], one[name], rtol=1e-8)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("network", NETWORKS)
def test_defaults_lower_the_training_loss_of_every_network(network, curvature, fisher):
    model, x, y = build(network, examples=8)
    optimizer = KFAC(model, curvature=curvature, fisher=fisher)
    losses = [train_step(optimizer, model, x, y, loss) for _ in range(25)]
    assert all(torch.tensor(losses).isfinite())
    assert min(losses) < losses[0]
    assert losses[-1] < losses[0]
    assert optimizer.dropped_estimates == 0
    assert all(view.to_dense().isfinite().all() for view in estimated(optimizer).values())


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("network", NETWORKS)
def test_resume_is_bitwise_identical_for_every_network(network, curvature):
    model, x, y = build(network)
    options = {"curvature": curvature, "factor_interval": 2, "inverse_interval": 3, "ramp_steps": 0}
    optimizer = KFAC(model, **options)
    for _ in range(3):
        train_step(optimizer, model, x, y, loss)
    resumed = again(network)
    resumed.load_state_dict(model.state_dict())
    twin = KFAC(resumed, **options)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(5):
        train_step(optimizer, model, x, y, loss)
        train_step(twin, resumed, x, y, loss)
    assert_same(weights(resumed), weights(model))
    assert_same(twin.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal"])
@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_are_those_without_kfac_for_every_network(network, curvature):
    model, x, y = build(network)
    loss(model(x), y).backward()
    expected = gradients(model)
    twin = again(network)
    optimizer = KFAC(twin, curvature=curvature)
    loss(twin(x), y).backward()
    assert_same(gradients(twin), expected)
    assert optimizer.param_groups


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal"])
@pytest.mark.parametrize("network", NETWORKS)
def test_blocks_are_symmetric_positive_and_precondition_solves_with_them(network, curvature):
    """Exact damping: ``precondition`` is ``(F + γ)^-1`` of the block that ``to_dense`` shows, whatever the block."""
    model, x, y = build(network)
    optimizer = bare_kfac(model, curvature=curvature, damping_style="exact", damping=0.1)
    train_step(optimizer, model, x, y, loss)
    parameters = dict(model.named_parameters())
    for name, view in estimated(optimizer).items():
        block = view.to_dense()
        close(block, block.T)
        assert torch.linalg.eigvalsh(block).min() >= -1e-12 * block.abs().max()
        damped = block + 0.1 * torch.eye(len(block), dtype=torch.float64)
        if name in parameters:  # a diagonal block, in the shape of the parameter
            v = torch.randn(parameters[name].shape, dtype=torch.float64)
            expected = torch.linalg.solve(damped, v.reshape(-1)).reshape(v.shape)
        else:
            v = torch.randn(view.diagonal.shape, dtype=torch.float64)
            expected = unvec(torch.linalg.solve(damped, vec(v)), len(v))
        close(view.precondition(v), expected, rtol=1e-9)


@pytest.mark.parametrize("network", KRONECKER_ONLY)
@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_equal_the_batch_for_every_network(network, parts):
    _, x, y = build(network)
    found = []
    for count in (1, parts):
        model = again(network)
        optimizer = bare_kfac(model, damping=0.05)
        for part_x, part_y in zip(x.chunk(count), y.chunk(count)):
            (loss(model(part_x), part_y) / count).backward()
        optimizer.precondition_gradients_()
        found.append((gradients(model), {n: v.to_dense() for n, v in optimizer.curvature.items()}))
    for one, several in zip(*found):
        for name in one:
            close(several[name], one[name], rtol=1e-9)
