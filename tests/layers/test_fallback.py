"""Everything without an adapter is trained too, with a diagonal block, and is named at construction."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_opt import KFAC
from tests import reference
from tests.support import Lambda, bare_kfac, close, data, estimate

DOUBLE = torch.float64


class Attention(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cell, self.head = kind(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Doubled(nn.LSTM):
    def forward(self, x: torch.Tensor):
        out, state = super().forward(x)
        return 2 * out, state


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 4)
        self.middle = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 3, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(torch.tanh(self.middle(self.embedding(x))))


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight) * self.temperature


SEQUENCE = (3, 2, 4)
CASES = {
    "attention with a bias among the keys": (
        lambda: Attention(add_bias_kv=True),
        SEQUENCE,
        [f"attention.{n}" for n in ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "out_proj.weight", "out_proj.bias")],
    ),
    "attention to a zero": (
        lambda: Attention(add_zero_attn=True),
        SEQUENCE,
        [f"attention.{n}" for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")],
    ),
    "lstm with a forward of its own": (
        lambda: Recurrent(Doubled),
        SEQUENCE,
        [f"cell.{n}_l0" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")],
    ),
    "bare parameters": (Bare, (3, 4), ["weight", "temperature"]),
    "bilinear": (
        lambda: nn.Sequential(Lambda(lambda x: x), Bilinear(), nn.Linear(3, 3)),
        (3, 4),
        ["1.inner.weight", "1.inner.bias"],
    ),
    "prelu": (lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU(4), nn.Linear(4, 3)), (3, 4), ["1.weight"]),
}


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Bilinear(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(x, x))


def build(case: str) -> tuple[nn.Module, torch.Tensor, list[str]]:
    torch.manual_seed(0)
    make, shape, names = CASES[case]
    return make().to(DOUBLE), torch.randn(shape, dtype=DOUBLE), names


@pytest.mark.parametrize("case", CASES)
def test_exact_diagonal_of_one_example_equals_brute_force(case):
    model, x, names = build(case)
    x = x[:1]
    parameters = dict(model.named_parameters())
    expected = {n: reference.parameter_fisher_diagonal(model, x, parameters[n]) for n in names}
    optimizer = bare_kfac(model)
    estimate(optimizer, model, x)
    for name, diagonal in expected.items():
        close(optimizer.curvature[name].diagonal, diagonal)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_is_trained_and_named(case, caplog, recwarn):
    model, x, names = build(case)
    caplog.set_level("INFO")
    optimizer = bare_kfac(model, lr=0.1)
    said = caplog.text + " ".join(str(w.message) for w in recwarn)
    for name in names:
        assert name in optimizer.curvature
        assert name in said
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    F.cross_entropy(model(x), torch.tensor([0, 1, 2])).backward()
    moving = [n for n, p in model.named_parameters() if p.grad.abs().max() > 0]
    optimizer.step()
    assert set(names) <= set(moving)
    for name, p in model.named_parameters():
        assert p.isfinite().all()
        assert not torch.equal(before[name], p) or name not in moving


def test_a_model_of_adapted_layers_says_nothing_about_fallbacks(recwarn):
    KFAC(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)))
    assert [str(w.message) for w in recwarn] == []


def test_tied_weights_get_one_diagonal_block():
    torch.manual_seed(0)
    model, x = Tied().to(DOUBLE), torch.tensor([1])
    expected = reference.parameter_fisher_diagonal(model, x, model.embedding.weight)
    middle = reference.kronecker_factors(model, x, "middle")
    optimizer = bare_kfac(model, lr=0.1)
    assert list(optimizer.curvature) in (["embedding.weight", "middle"], ["middle", "embedding.weight"])
    F.cross_entropy(model(x), torch.tensor([2])).backward()
    optimizer.step()
    close(optimizer.curvature["embedding.weight"].diagonal, expected)
    close(optimizer.curvature["middle"].to_dense(), torch.kron(*middle))
    assert model.decoder.weight is model.embedding.weight


def test_the_layer_behind_attention_is_exact():
    model, x, _ = build("attention to a zero")
    a, g = reference.kronecker_factors(model, x, "head")
    optimizer = bare_kfac(model)
    estimate(optimizer, model, x)
    close(optimizer.curvature["head"].to_dense(), torch.kron(a, g))
    assert "attention.out_proj" not in optimizer.curvature  # its forward never runs: no hook fires


def test_a_transformer_encoder_trains():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    model = nn.Sequential(nn.Linear(4, 8), encoder, Lambda(lambda h: h.mean(1)), nn.Linear(8, 3))
    x, y = torch.randn(16, 5, 4), torch.randint(3, (16,))
    optimizer = KFAC(model, lr=0.1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    layers = ["self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2", "norm1", "norm2"]
    assert set(optimizer.curvature) == {"0", "3", *(f"1.{name}" for name in layers)}


def test_an_unused_layer_does_no_harm():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare, self.extra = nn.Linear(4, 3), nn.Linear(4, 3), nn.Parameter(torch.ones(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.spare(x)  # called, but its output goes nowhere
            return self.used(x)

    torch.manual_seed(0)
    model, (x, y) = Unused().to(DOUBLE), data()
    a, g = reference.kronecker_factors(model, x, "used")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = bare_kfac(model, lr=0.1, momentum=0.9)
    for step in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if step == 0:
            close(optimizer.curvature["used"].to_dense(), torch.kron(a, g))
    assert torch.equal(model.spare.weight, before["spare.weight"])
    assert torch.equal(model.extra, before["extra"])
    assert not torch.equal(model.used.weight, before["used.weight"])
    assert optimizer.state_dict()
