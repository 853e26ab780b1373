"""Attention and recurrent layers in models that train: precision, hooks, refusals, and steps equal to hand-written layers'."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt import KFAC
from tests.layers.by_hand import HandAttention, HandRecurrent
from tests.support import Lambda, assert_same, bare_kfac, close, estimate, gradients, weights

WIDTH, TIME, CLASSES = 8, 5, 3


class Last(nn.Module):
    """The last output of a recurrent layer through a head."""

    def __init__(self, core: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.core, self.head = core, nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x)[0][:, -1])


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.TransformerDecoderLayer(WIDTH, 2, 16, dropout=0.2, batch_first=True), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(3)
        return self.head(self.layer(x[:, :3], x, tgt_mask=mask, tgt_is_causal=True).mean(1))


def encoder(**options) -> nn.Sequential:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, **options)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), layer, Lambda(lambda h: h.mean(1)), nn.Linear(WIDTH, CLASSES))


MODELS = {
    "encoder": encoder,
    "decoder": Decoder,
    "lstm": lambda: Last(nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, dropout=0.2, bidirectional=True), 2 * WIDTH),
    "gru": lambda: Last(nn.GRU(WIDTH, WIDTH, 2, batch_first=True, dropout=0.2)),
    "rnn": lambda: Last(nn.RNN(WIDTH, WIDTH, batch_first=True)),
}


def batch(size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, TIME, WIDTH, generator=generator), torch.randint(CLASSES, (size,), generator=generator)


def kronecker(optimizer: KFAC) -> set[str]:
    return {name for name, view in optimizer.curvature.items() if hasattr(view.block, "sides")}


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_models_train_without_a_word_in_single_precision_and_under_autocast(model, autocast, fisher):
    torch.manual_seed(0)
    net, (x, y) = MODELS[model](), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = KFAC(net, fisher=fisher, likelihood="categorical")
        blocks, losses = kronecker(optimizer), []
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert blocks == kronecker(optimizer)
    assert len(blocks) >= 2
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("model", ["encoder", "lstm"])
def test_a_copy_in_half_precision_keeps_its_blocks(model):
    torch.manual_seed(0)
    net, (x, _) = MODELS[model]().to(torch.bfloat16), batch()
    optimizer = KFAC(net)
    blocks = kronecker(optimizer)
    estimate(optimizer, net, x.to(torch.bfloat16))
    estimate(optimizer, net, x.to(torch.bfloat16))
    assert kronecker(optimizer) == blocks


@pytest.mark.parametrize("model", ["encoder", "lstm"])
def test_what_hooks_on_saved_tensors_see_is_the_models_own(model):
    x, y = batch()

    def packed(*, attach: bool) -> list[Tensor]:
        torch.manual_seed(0)
        net, found = MODELS[model](), []
        optimizer = KFAC(net, fisher="empirical") if attach else None
        torch.manual_seed(2)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t.detach().clone()) or t, lambda t: t):
            F.cross_entropy(net(x), y).backward()
        if optimizer is not None:
            optimizer.step()
            assert all(
                float(view.output_factor.abs().sum()) > 0 for view in optimizer.curvature.values() if hasattr(view.block, "sides")
            )
        return [t for t in found if t.is_floating_point()]  # kernels keep workspaces that are not filled

    assert_same(packed(attach=False), packed(attach=True))


def test_dropout_that_cannot_be_drawn_again_is_said_once_and_gets_diagonal_blocks():
    torch.manual_seed(0)
    net, (x, y) = MODELS["lstm"](), batch()
    optimizer = KFAC(net)
    net.core.register_forward_pre_hook(lambda *_: torch.rand(1) and None)  # draws between ours and the layer's
    with pytest.warns(UserWarning, match=r"the outputs of the module of 'core.ih_l0', .* are not those of its matrices") as said:
        estimate(optimizer, net, x)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    assert kronecker(optimizer) == {"head"}
    assert {"core.weight_ih_l0", "core.bias_hh_l1_reverse"} <= set(optimizer.curvature)
    resumed = KFAC(copy.deepcopy(net))
    resumed.load_state_dict(optimizer.state_dict())
    assert set(resumed.curvature) == set(optimizer.curvature)


def test_a_model_that_is_itself_a_recurrent_layer():
    torch.manual_seed(0)
    net = nn.GRU(4, CLASSES, batch_first=True).double()
    optimizer = bare_kfac(net, outputs=lambda out: out[0][:, -1])
    estimate(optimizer, net, torch.randn(6, TIME, 4, dtype=torch.float64))
    assert list(optimizer.curvature) == ["ih_l0", "hh_l0"]
    assert float(optimizer.curvature["hh_l0"].output_factor.abs().sum()) > 0


def test_frozen_parts_have_no_block():
    torch.manual_seed(0)
    net = MODELS["encoder"]()
    net[1].self_attn.out_proj.weight.requires_grad_(False)
    net[1].self_attn.in_proj_bias.requires_grad_(False)
    optimizer = KFAC(net)
    estimate(optimizer, net, batch()[0])
    assert optimizer.curvature["1.self_attn.in_proj"].input_factor.shape == (3, WIDTH, WIDTH)
    assert "1.self_attn.out_proj" not in optimizer.curvature
    assert "1.self_attn.out_proj.bias" in optimizer.curvature


def test_a_replaced_weight_is_found():
    torch.manual_seed(0)
    net, (x, y) = MODELS["gru"](), batch()
    optimizer = KFAC(net)
    for replaced in (False, True):
        if replaced:
            net.core = nn.GRU(WIDTH, WIDTH, 2, batch_first=True)
        F.cross_entropy(net(x), y).backward()
        if replaced:
            with pytest.raises(RuntimeError, match=r"'core.weight_ih_l0'.* took the place of parameters"):
                optimizer.step()
        else:
            optimizer.step()
            optimizer.zero_grad()


# -- equal steps ----------------------------------------------------------------------------------------------------


class HandEncoder(nn.Module):
    """``nn.TransformerEncoderLayer`` without dropout out of linear layers."""

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.attention = HandAttention(layer.self_attn)
        self.linear1, self.linear2, self.norm1, self.norm2 = (
            copy.deepcopy(part) for part in (layer.linear1, layer.linear2, layer.norm1, layer.norm2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, x, x)[0])
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


def twins(kind: str) -> tuple[nn.Module, nn.Module]:
    """A model and one of the same function with hand-written layers."""
    torch.manual_seed(0)
    if kind == "encoder":
        net = encoder(dropout=0.0)
        hand = nn.Sequential(copy.deepcopy(net[0]), HandEncoder(net[1]), net[2], copy.deepcopy(net[3]))
    else:
        net = Last(nn.LSTM(WIDTH, WIDTH, batch_first=True))
        hand = Last(HandRecurrent(net.core))
        hand.head = copy.deepcopy(net.head)
    return net, hand


def losses(net: nn.Module, optimizer: KFAC, steps: int, dtype: torch.dtype = torch.float32) -> list[float]:
    x, y = batch(48)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x.to(dtype)), y)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("kind", ["encoder", "lstm"])
def test_steps_equal_those_of_hand_written_layers(kind):
    """Same factors, same directions: the same losses."""
    net, hand = (model.double() for model in twins(kind))
    found = [
        losses(model, bare_kfac(model, lr=0.05, damping=0.1, damping_style="exact"), 10, torch.float64) for model in (net, hand)
    ]
    close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-6)
    assert found[0][-1] < found[0][0]


@pytest.mark.parametrize("kind", ["encoder", "lstm"])
def test_defaults_train_at_least_as_well_as_on_hand_written_layers(kind):
    found = [losses(model, KFAC(model), 40) for model in twins(kind)]
    assert min(found[0]) < 1.1 * min(found[1])
    assert found[0][-1] < 0.2 * found[0][0]


def test_gradients_stay_the_users_in_every_model():
    x, y = batch()
    for make in MODELS.values():
        seen = []
        for attach in (False, True):
            torch.manual_seed(0)
            net = make()
            optimizer = KFAC(net, fisher="exact") if attach else None
            torch.manual_seed(4)
            F.cross_entropy(net(x), y).backward()
            seen.append((gradients(net), torch.rand(2)))
            del optimizer
        assert_same(seen[0], seen[1])
        assert weights(net)
