"""``KFACVI`` in company: other optimizers, DistributedDataParallel, layers that come and go, passes that break."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_opt.prediction import predict
from tests.posterior.test_kfac_vi import backward, train, vi
from tests.support import assert_same, close, data, gradients, mlp


@pytest.fixture
def one_rank(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_parameters_of_another_optimizer_have_the_mean_gradient_too():
    model = mlp()
    optimizer = vi(model, model[0].parameters())  # before the first estimate all passes run at the mean
    x, y = data()
    backward(model, x, y)
    expected = gradients(model)
    model.zero_grad()
    for _ in optimizer.weight_samples(4):
        backward(model, x, y)
    close(model[2].weight.grad, expected["2.weight"])
    for _ in optimizer.weight_samples(2):
        backward(model, x, y)
    close(model[2].weight.grad, 2 * expected["2.weight"])


@pytest.mark.parametrize("loops", [1, 2])
def test_gradients_that_are_views_of_buckets_are_averaged_like_any(loops: int, one_rank: None):
    """The next backward writes into the memory of the gradients of the last pass."""
    plain = mlp()
    wrapped = DistributedDataParallel(copy.deepcopy(plain), gradient_as_bucket_view=True)
    found = []
    for model in (plain, wrapped):
        optimizer, kept = vi(model), []
        for step in range(3):
            x, y = data(seed=step)
            optimizer.zero_grad()
            for loop in range(loops):
                for _ in optimizer.weight_samples(3):
                    backward(model, x * (1 + loop), y)
            kept.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            optimizer.step()
        found.append(torch.stack(kept))
    close(found[1], found[0])


def test_a_flat_buffer_that_holds_the_gradients_goes_on_holding_them():
    model = nn.Linear(4, 3).double()
    optimizer = vi(model)
    buffer = torch.zeros(15, dtype=torch.float64)
    model.weight.grad, model.bias.grad = buffer[:12].view(3, 4), buffer[12:]
    x, y = data()
    for _ in optimizer.weight_samples(2):
        backward(model, x, y)
    assert float(buffer.norm()) > 0
    assert model.weight.grad.data_ptr() == buffer.data_ptr()
    close(torch.cat([model.weight.grad.flatten(), model.bias.grad]), buffer)


def test_output_noise_acts_inside_a_wrapper(one_rank: None):
    """The wrapper puts a prefix on the names of the layers."""
    model = mlp()
    wrapped = DistributedDataParallel(model)
    optimizer = vi(wrapped, output_noise="linear")
    train(optimizer, wrapped, steps=2)
    x, y = data()
    before, at_mean = model[0].weight.detach().clone(), wrapped(x).detach()
    for _ in optimizer.weight_samples(1):
        assert_same(model[0].weight.detach(), before)
        out = wrapped(x)
        F.cross_entropy(out, y).backward()
    assert not torch.allclose(out.detach(), at_mean)


def test_output_noise_without_a_linear_layer_is_refused():
    with pytest.raises(ValueError, match="output_noise='linear' has no layer to act on"):
        vi(mlp(), curvature="diagonal", output_noise="linear")


def test_a_layer_whose_bias_was_frozen_gets_noise_in_its_weights_again():
    model = mlp()
    optimizer = vi(model, output_noise="linear")
    train(optimizer, model, steps=2)
    model[0].bias.requires_grad_(False)
    before, drawn = model[0].weight.detach().clone(), []
    for _ in optimizer.weight_samples(1):
        drawn.append(model[0].weight.detach().clone())
        backward(model, *data())
    assert not torch.equal(drawn[0], before)


def test_a_replaced_layer_leaves_the_loop_and_the_posterior():
    model = mlp()
    optimizer = vi(model)
    train(optimizer, model, steps=2)
    model[2] = nn.Linear(model[2].in_features, 3).double()
    optimizer.add_param_group({"params": model[2].parameters()})
    train(optimizer, model, steps=2, samples=2)
    posterior = optimizer.posterior()
    assert set(posterior.mean) == set(dict(model.named_parameters()))
    assert torch.isfinite(predict(model, posterior, data()[0], num_samples=3).probabilities).all()


class TwoHeads(nn.Module):
    """One head has seen no data yet."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3).double(), nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.used(x)
        return out


def test_parameters_without_curvature_have_the_prior_and_the_floor_of_their_group():
    model = TwoHeads()
    groups = [
        {"params": model.used.parameters()},
        {"params": model.unused.parameters(), "prior_precision": 50.0, "temperature": 0.5, "posterior_floor": 0.1},
    ]
    optimizer = vi(model, groups)
    train(optimizer, model)
    (width,) = {block.width for block in optimizer.posterior().blocks if block.weight.startswith("unused")}
    assert (width.ess, width.prior_precision, width.floor) == (200.0, 50.0, 0.1)
    close(optimizer.posterior().variance()["unused.bias"], torch.full((2,), 1 / (50 + 200 * 0.1), dtype=torch.float64))


@pytest.mark.parametrize("rule", ["step", "pass"])
@pytest.mark.parametrize("way", ["not finite", "left"])
def test_running_statistics_are_those_of_passes_that_count(rule: str, way: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    optimizer = vi(model, batch_statistics=rule)
    x, y = data()
    if way == "left":
        for _ in optimizer.weight_samples(1):
            backward(model, x, y)
            break
    for number in optimizer.weight_samples(3):
        backward(model, x * float("nan") if number == 0 and way == "not finite" else x, y)
    moves = {"step": 1, "pass": 2 if way == "not finite" else 3}[rule]
    close(model[1].running_mean, (1 - 0.9**moves) * model[0](x).mean(0).detach())
    assert int(model[1].num_batches_tracked) == moves
