"""``KFACVI`` in company: other optimizers, DistributedDataParallel, layers that come and go, passes that break."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.nn.parallel import DistributedDataParallel

from kfac_opt import Posterior
from kfac_opt.bayes.laplace import fit_laplace, log_marginal_likelihood
from kfac_opt.bayes.posterior import Width
from kfac_opt.bayes.prediction import predict
from tests.posterior.helpers import dense_covariance, flat
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


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_skipped_step_leaves_no_draws_to_the_prior_gradient_of_the_next(set_to_none: bool):
    model, other = mlp(), mlp()
    found = []
    for net, skipped in ((model, 1), (other, 0)):
        optimizer = vi(net, prior_gradient="sample", antithetic=False, lr=0.0, fisher="exact")
        train(optimizer, net, steps=2)
        optimizer._sampler._next_draw = 4 * (1 - skipped)  # the draws that follow those of a skipped step
        for _ in range(1 + skipped):
            optimizer.zero_grad(set_to_none=set_to_none)
            for _ in optimizer.weight_samples(4):
                backward(net, *data())
        optimizer.step()
        found.append(optimizer._noise[id(net[0].weight)])
    close(found[0], found[1])


class Padded(nn.Module):
    """Means of embedded tokens; token 2 is padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(6, 3, padding_idx=2).double(), nn.Linear(3, 4, bias=False).double()

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(tokens).mean(1))
        return out


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal"])
def test_padding_rows_of_an_embedding_are_not_random(curvature: str, tmp_path: Any):
    """They are no parameters: torch never trains them, and a model may count on their being zero."""
    model = Padded()
    with torch.no_grad():
        model.table.weight[2] = 0.5  # a constant all the same
    optimizer = vi(model, lr=0.0, curvature=curvature, posterior_floor=0.1)
    tokens, labels = torch.arange(24).view(8, 3) % 6, torch.arange(8) % 4
    for _ in range(2):
        for _ in optimizer.weight_samples(2):
            backward(model, tokens, labels)
        optimizer.step()
    pad = model.table.weight[2].detach().clone()
    for _ in optimizer.weight_samples(2):
        assert_same(model.table.weight[2].detach(), pad)
    with optimizer.sampled_params():
        assert_same(model.table.weight[2].detach(), pad)
    optimizer.posterior().save(tmp_path / "posterior.pt")
    laplace = fit_laplace(model.eval(), [(tokens, labels)], curvature=curvature, factor_dtype=torch.float64)
    for posterior in (optimizer.posterior(), Posterior.load(tmp_path / "posterior.pt"), laplace):
        draw = posterior.sample()
        assert_same(draw["table.weight"][2], pad)
        assert float((draw["table.weight"][3] - posterior.mean["table.weight"][3]).abs().min()) > 0
        assert not posterior.variance()["table.weight"][2].any()
        # All densities are those of the Gaussian over the other weights.
        random = torch.cat([torch.arange(6).repeat_interleave(3) != 2, torch.ones(12, dtype=torch.bool)])
        whole = dense_covariance(posterior)
        mean = flat(posterior.mean)[random]
        q = MultivariateNormal(mean, whole[random][:, random])
        precision = posterior.blocks[0].width.prior_precision
        p = MultivariateNormal(torch.zeros_like(mean), torch.eye(len(mean), dtype=torch.float64) / precision)
        assert posterior.num_parameters == len(mean) == 27
        close(posterior.log_prob(draw), q.log_prob(flat(draw)[random]), 1e-9)
        close(posterior.entropy(), q.entropy(), 1e-9)
        close(posterior.kl(), kl_divergence(q, p), 1e-9)
    evidence = laplace.log_likelihood - 0.5 * mean.square().sum() + 0.5 * torch.logdet(q.covariance_matrix)
    close(log_marginal_likelihood(laplace), evidence, 1e-9)


def test_a_padding_row_that_another_layer_trains_is_random():
    model = nn.ModuleDict({"table": nn.Embedding(6, 3, padding_idx=2), "head": nn.Linear(3, 6, bias=False)})
    model["head"].weight = model["table"].weight
    posterior = Posterior.from_model(model, [], width=Width(10.0))
    assert bool((posterior.variance()["table.weight"] > 0).all())


# -- a loop that is left ----------------------------------------------------------------------------------------


def leave(how: str, samples: Iterator[int], model: nn.Module, kept: list[BaseException]) -> None:
    """Leaves a loop over ``samples`` in the middle of a pass."""
    numbers = enumerate(samples) if how == "enumerated" else samples
    try:
        for _ in numbers:
            backward(model, *data())
            if how == "break":
                break
            raise ValueError("out of memory")
    except ValueError as error:
        kept.append(error)
    del numbers


def fail(samples: Iterator[int]) -> None:
    for _ in samples:
        raise ValueError("out of memory")


@pytest.mark.parametrize("how", ["raise", "break", "enumerated", "outside"])
def test_a_loop_that_is_left_puts_the_means_back_whoever_holds_the_iterator_and_the_exception(how: str):
    model = mlp()
    optimizer = vi(model)
    train(optimizer, model, steps=2)
    before, kept = {n: p.detach().clone() for n, p in model.named_parameters()}, []
    samples = optimizer.weight_samples(2)
    if how == "outside":
        try:
            fail(samples)
        except ValueError as error:
            kept.append(error)
    else:
        leave(how, samples, model, kept)
    assert_same({n: p.detach() for n, p in model.named_parameters()}, before)
    train(optimizer, model, steps=1)
    with pytest.raises(StopIteration):
        next(samples)


def test_an_iterator_that_is_stepped_by_hand_ends_with_close():
    model = mlp()
    optimizer = vi(model)
    train(optimizer, model, steps=2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    samples = optimizer.weight_samples(2)
    assert [next(samples), next(samples)] == [0, 1]
    assert not torch.equal(model[0].weight, before["0.weight"])
    samples.close()
    assert_same({n: p.detach() for n, p in model.named_parameters()}, before)


OPEN_AT_EXIT = """
import torch
from torch import nn
from kfac_opt import KFACVI

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
optimizer = KFACVI(model, num_data=100)
x, y = torch.randn(8, 4), torch.randint(3, (8,))
for _ in range(2):
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
held = {held}
print("open")
"""


@pytest.mark.parametrize(
    "held",
    [
        "optimizer.weight_samples(2); next(held)",
        "enumerate(optimizer.weight_samples(2)); next(held)",
        "optimizer.sampled_params(); held.__enter__()",
    ],
)
def test_passes_left_open_at_the_end_of_a_program_end_with_it(held: str):
    code = OPEN_AT_EXIT.replace("{held}", held)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.strip() == "open"
    assert "Exception ignored" not in found.stderr
