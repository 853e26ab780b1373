"""Libraries that read per-example gradients off their own hooks, and reversible networks, beside an attached optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt import KFAC
from tests.support import assert_same, data, gradients, mlp

Step = Callable[[nn.Module], list[Any]]


def run(model: nn.Module, step: Step, fisher: str | None) -> list[Any]:
    """What three steps leave behind; the weights stay."""
    torch.manual_seed(5)
    optimizer = KFAC(model, fisher=fisher, lr=0.0, factor_interval=2, ramp_steps=0) if fisher else None
    found = []
    for _ in range(3):
        model.zero_grad()
        own = step(model)
        found.append([gradients(model), *own])
        if optimizer is not None:
            optimizer.step()
    return found


def opacus() -> tuple[nn.Module, Step]:
    library = pytest.importorskip("opacus")
    (x, y), model = data(), library.GradSampleModule(mlp())

    def step(model: nn.Module) -> list[Any]:
        for parameter in model.parameters():
            parameter.grad_sample = None
        F.cross_entropy(model(x), y).backward()
        return [parameter.grad_sample.clone() for parameter in model.parameters()]

    return model, step


def backpack() -> tuple[nn.Module, Step]:
    library, extensions = pytest.importorskip("backpack"), pytest.importorskip("backpack.extensions")
    (x, y), model = data(), library.extend(mlp())
    loss = library.extend(nn.CrossEntropyLoss())

    def step(model: nn.Module) -> list[Any]:
        with library.backpack(extensions.BatchGrad(), extensions.DiagGGNExact()):
            loss(model(x), y).backward()
        return [(p.grad_batch.clone(), p.diag_ggn_exact.clone()) for p in model.parameters()]

    return model, step


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("library", [opacus, backpack])
def test_libraries_of_per_example_gradients_see_the_users_backward_alone(library, fisher):
    expected = run(*library(), None)
    assert_same(run(*library(), fisher), expected)


def reformer() -> tuple[nn.Module, Tensor, Tensor]:
    """Tiny, random, without dropout: it takes its seeds from the operating system."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ReformerConfig(
        attention_head_size=4,
        attn_layers=["local", "lsh"],
        axial_pos_embds=False,
        hidden_size=8,
        num_attention_heads=2,
        feed_forward_size=8,
        max_position_embeddings=16,
        vocab_size=20,
        local_attn_chunk_length=4,
        lsh_attn_chunk_length=4,
        num_buckets=2,
        hash_seed=1,
        is_decoder=False,
        num_labels=3,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
        lsh_attention_probs_dropout_prob=0.0,
    )
    model = transformers.ReformerForSequenceClassification(config).train()
    return model, torch.randint(20, (4, 16)), torch.randint(3, (4,))


@pytest.mark.filterwarnings("ignore")  # those of the classes it is made of
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_reformer_is_refused_before_its_gradients_change_or_read_from_the_users_backward(fisher):
    model, x, y = reformer()

    def step(model: nn.Module) -> list[Any]:
        F.cross_entropy(model(x).logits, y).backward()
        return []

    if fisher == "empirical":
        expected = run(reformer()[0], step, None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert_same(run(model, step, fisher), expected)
        assert any("runs with gradients disabled and yet has a gradient" in str(w.message) for w in caught)
        return
    with pytest.raises(RuntimeError, match=r"(?s)_ReversibleFunction.*calls backward\(\).*and \d+ more.*fisher='empirical'"):
        run(model, step, fisher)
    assert all(parameter.grad is None for parameter in model.parameters())
