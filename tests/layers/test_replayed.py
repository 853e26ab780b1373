"""Exact factors of attention and recurrent layers against hand-written linear layers, example by example."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from kfac_opt import KFACVI
from tests import reference
from tests.layers.by_hand import HandAttention, HandRecurrent, linear
from tests.support import assert_same, bare_kfac, close, estimate, gradients, weights

DOUBLE = torch.float64
BATCH, TIME, WIDTH, CLASSES = 4, 3, 4, 3
LENGTHS = torch.tensor([1, 3, 2, 3])
PADDING = torch.arange(TIME) >= LENGTHS[:, None]


class Net(nn.Module):
    """A head on one vector per example (or per position) that ``read`` makes of the core's call."""

    def __init__(self, core: nn.Module, read: Callable[..., Tensor], head: nn.Linear) -> None:
        super().__init__()
        self.core, self.read, self.head = core, read, head

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.head(self.read(self.core, *inputs))


def pair(core: nn.Module, hand: nn.Module, read, read_hand, width: int) -> tuple[Net, Net]:
    """Torch's module and the hand-written one behind equal heads."""
    head = nn.Linear(width, CLASSES).to(DOUBLE)
    return Net(core, read, head), Net(hand, read_hand, linear(head.weight, head.bias))


def compare(net: Net, hand: Net, inputs: tuple[Tensor, ...], parts: dict[str, tuple[str, ...]], **options) -> None:
    """Both compute the same; factors of each part are brute force's of the hand-written layers (one for each group)."""
    close(net(*inputs).detach(), hand(*inputs).detach())
    names = {f"core.{part}": [f"core.{name}" for name in names] for part, names in parts.items()}
    expected = {part: [reference.kronecker_factors(hand, inputs, name, **options) for name in own] for part, own in names.items()}
    mask = options.get("mask")
    optimizer = bare_kfac(net, **({} if mask is None else {"outputs": lambda out: (out, mask)}))
    estimate(optimizer, net, *inputs)
    assert {*names, "head"} == {name for name, view in optimizer.curvature.items() if "Kronecker" in type(view.block).__name__}
    for part, factors in expected.items():
        a, g = (torch.stack(own) if len(own) > 1 else own[0] for own in zip(*factors))
        close(optimizer.curvature[part].input_factor, a)
        close(optimizer.curvature[part].output_factor, g)


# -- attention ------------------------------------------------------------------------------------------------------

PACKED = {"in_proj": ("q", "k", "v"), "out_proj": ("out",)}
SEPARATE = {"q": ("q",), "k": ("k",), "v": ("v",), "out_proj": ("out",)}
CAUSAL = torch.ones(TIME, TIME, dtype=torch.bool).triu(1)


def attention(*, cross: bool, batch_first: bool = True, per_token: bool = False, options=None, **call) -> tuple[Net, Net]:
    """``call``: arguments of every call beside the inputs; the last input is a padding mask where there are several."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first, **(options or {})).to(DOUBLE)
    if module.in_proj_bias is not None:
        nn.init.normal_(module.in_proj_bias)

    def arguments(inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], dict]:
        number = 3 if module.kdim != WIDTH else 2 if cross else 1
        given = [*inputs[:number]]
        given += [given[-1]] * (3 - number)
        return given, {**call, **({"key_padding_mask": inputs[number]} if len(inputs) > number else {})}

    def result(out: Tensor) -> Tensor:
        return out if per_token else out.mean(1)

    def read(core: nn.Module, *inputs: Tensor) -> Tensor:
        given, options = arguments(inputs)
        if not batch_first:
            turned = {id(x): x.transpose(0, 1) for x in given}
            given = [turned[id(x)] for x in given]
        out, weights = core(*given, **options)
        out = result(out if batch_first else out.transpose(0, 1))
        return out if weights is None else out + weights.square().sum((1, 2)).reshape(-1, *[1] * (out.dim() - 1))

    def read_hand(core: nn.Module, *inputs: Tensor) -> Tensor:
        given, options = arguments(inputs)
        out, weights = core(*given, **options)
        out = result(out)
        return (
            out
            if not options.get("need_weights", True)
            else out + weights.square().sum((1, 2)).reshape(-1, *[1] * (out.dim() - 1))
        )

    return pair(module, HandAttention(module), read, read_hand, WIDTH)


def sequences(length: int = TIME, width: int = WIDTH) -> Tensor:
    return torch.randn(BATCH, length, width, dtype=DOUBLE)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_self_attention(need_weights, batch_first):
    net, hand = attention(cross=False, batch_first=batch_first, need_weights=need_weights)
    compare(net, hand, (sequences(),), PACKED)


@pytest.mark.parametrize("call", [{"attn_mask": CAUSAL}, {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}])
def test_self_attention_with_masks(call):
    net, hand = attention(cross=False, **call)
    compare(net, hand, (sequences(),), PACKED)
    compare(net, hand, (sequences(), PADDING), PACKED)


def test_self_attention_without_biases():
    compare(*attention(cross=False, options={"bias": False}), (sequences(),), PACKED)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("queries", [2, TIME, 5])
def test_cross_attention_with_more_or_fewer_queries_than_keys(queries, batch_first):
    """Each projection has rows of its own: the averages over them have their own numbers of rows."""
    net, hand = attention(cross=True, batch_first=batch_first)
    compare(net, hand, (sequences(queries), sequences()), PACKED)
    compare(net, hand, (sequences(queries), sequences(), PADDING), PACKED)


def test_cross_attention_to_keys_and_values_of_other_sizes():
    net, hand = attention(cross=True, options={"kdim": 3, "vdim": 5})
    compare(net, hand, (sequences(2), sequences(width=3), sequences(width=5)), SEPARATE)


@pytest.mark.parametrize("cross", [True, False])
def test_padding_that_gradients_do_not_reach_is_left_out(cross):
    """The last token of each example counts: other queries carry no gradient, and keys that it may not look at none either."""
    net, hand = attention(cross=cross, per_token=True, need_weights=False)
    lengths = torch.tensor([[2], [3], [2], [3]])  # of one key alone no query depends
    keys = torch.arange(5) >= torch.tensor([[5], [2], [3], [4]])
    inputs = (sequences(), sequences(5), keys) if cross else (sequences(), torch.arange(TIME) >= lengths)
    compare(net, hand, inputs, PACKED, mask=torch.arange(TIME) == lengths - 1)


# -- recurrent ------------------------------------------------------------------------------------------------------

KINDS = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "rnn": (nn.RNN, {}),
    "rnn, relu": (nn.RNN, {"nonlinearity": "relu"}),
    "lstm, projected": (nn.LSTM, {"proj_size": 2}),
}
FORMS = {
    "plain": {},
    "no bias": {"bias": False},
    "two layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "bidirectional, two layers": {"bidirectional": True, "num_layers": 2},
}


def recurrent(kind: str, *, batch_first: bool = True, **options) -> tuple[Net, Net, dict[str, tuple[str]]]:
    """The head reads all outputs and all last states."""
    torch.manual_seed(0)
    make, own = KINDS[kind]
    module = make(WIDTH, 3, batch_first=batch_first, **own, **options).to(DOUBLE)
    hand = HandRecurrent(module)

    def features(out: Tensor, states) -> Tensor:
        states = states if isinstance(states, (tuple, list)) else [states]
        return torch.cat([out.mean(1), *(state.transpose(0, 1).flatten(1) for state in states)], -1)

    def read(core: nn.Module, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is not None:
            packed, states = core(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
            return features(pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])[0], states)
        out, states = core(x if batch_first else x.transpose(0, 1))
        return features(out if batch_first else out.transpose(0, 1), states)

    def read_hand(core: nn.Module, *inputs: Tensor) -> Tensor:
        return features(*core(*inputs))

    width = read(module, torch.zeros(1, 2, WIDTH, dtype=DOUBLE)).shape[1]
    return *pair(module, hand, read, read_hand, width), {name: (f"parts.{name}",) for name in hand.parts}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_layers(kind, form):
    net, hand, parts = recurrent(kind, batch_first=form != "plain", **FORMS[form])
    compare(net, hand, (sequences(),), parts)


@pytest.mark.parametrize("form", ["plain", "bidirectional, two layers"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind, form):
    net, hand, parts = recurrent(kind, **FORMS[form])
    compare(net, hand, (sequences(), LENGTHS), parts)


class Loop(nn.Module):
    """A cell called step by step."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_cells_called_in_a_loop_equal_the_layer(kind, curvature):
    torch.manual_seed(0)
    layer = getattr(nn, kind)(WIDTH, 3, batch_first=True).to(DOUBLE)
    cell = getattr(nn, f"{kind}Cell")(WIDTH, 3).to(DOUBLE)
    for name, parameter in cell.named_parameters():
        parameter.data.copy_(getattr(layer, f"{name}_l0"))
    x = sequences()
    nets = pair(layer, Loop(cell), lambda core, x: core(x)[0][:, -1], lambda core, x: core(x), 3)
    optimizers = [bare_kfac(net, curvature=curvature) for net in nets]
    for net, optimizer in zip(nets, optimizers):
        estimate(optimizer, net, x)
    of_layer, of_cell = (optimizer.curvature for optimizer in optimizers)
    for part in ("ih", "hh"):
        close(of_cell[f"core.cell.{part}"].to_dense(), of_layer[f"core.{part}_l0"].to_dense(), rtol=1e-9)


# -- what blocks make of them ---------------------------------------------------------------------------------------

NETS = {
    "lstm": lambda: recurrent("lstm", num_layers=2),
    "gru": lambda: recurrent("gru"),
    "attention": lambda: (*attention(cross=True), PACKED),
}


def inputs_of(case: str) -> tuple[Tensor, ...]:
    return (sequences(2), sequences()) if case == "attention" else (sequences(),)


def in_one(own: list[Tensor]) -> Tensor:
    """Values of the hand-written layers' parameters, stacked as torch's module has them."""
    return torch.cat(own)


@pytest.mark.parametrize("case", NETS)
def test_scales_of_the_eigenbasis_equal_brute_force(case):
    net, hand, parts = NETS[case]()
    inputs = inputs_of(case)
    expected = {}
    for part, names in parts.items():
        blocks = []
        for name in names:
            a, g = reference.kronecker_factors(hand, inputs, f"core.{name}")
            qa, qg = torch.linalg.eigh(a)[1], torch.linalg.eigh(g)[1]
            per_example, terms = reference.per_example_fisher(hand, inputs, f"core.{name}")
            scales = reference.eigenbasis_scales(per_example, terms, qa, qg)
            blocks.append(scales.flatten())  # whatever the signs of eigenvectors
        expected[part] = torch.cat(blocks).sort()[0]
    optimizer = bare_kfac(net, curvature="eigenbasis")
    estimate(optimizer, net, *inputs)
    for part, scales in expected.items():
        view = optimizer.curvature[f"core.{part}"]
        close(torch.linalg.eigvalsh(view.to_dense()), scales, rtol=1e-8)


@pytest.mark.parametrize("options", [{"damping_style": "factored"}, {"damping_style": "exact"}, {"curvature": "eigenbasis"}])
@pytest.mark.parametrize("case", NETS)
def test_directions_equal_those_of_hand_written_layers(case, options):
    net, hand, parts = NETS[case]()
    inputs, y = inputs_of(case), torch.tensor([0, 1, 2, 1])
    for model in (net, hand):
        optimizer = bare_kfac(model, **options)
        F.cross_entropy(model(*inputs), y).backward()
        optimizer.precondition_gradients_()
    for part, names in parts.items():
        entry = next(e for e in optimizer_parts(net) if e[0] == part)
        layers = [hand.get_submodule(f"core.{name}") for name in names]
        if "curvature" not in options and len(names) > 1 and options["damping_style"] == "factored":
            continue  # one damping for the groups of a weight, from the mean of their scales, is not three
        close(entry[1].weight.grad, in_one([layer.weight.grad for layer in layers]), rtol=1e-8)
        if entry[1].bias is not None:
            close(entry[1].bias.grad, in_one([layer.bias.grad for layer in layers]), rtol=1e-8)


def optimizer_parts(net: Net):
    from kfac_opt.layers.parts import find_composite

    return [(part.name, part) for part in find_composite(net.core).parts(net.core)]


@pytest.mark.parametrize("case", NETS)
def test_posterior_of_kfac_vi_equals_that_of_hand_written_layers(case):
    net, hand, parts = NETS[case]()
    inputs, y, variances = inputs_of(case), torch.tensor([0, 1, 2, 1]), []
    for model in (net, hand):
        optimizer = KFACVI(
            model, lr=0.0, num_data=100, fisher="exact", factor_interval=1, inverse_interval=1, ramp_steps=0, factor_dtype=DOUBLE
        )
        before = weights(model)
        seen = []
        for step in range(2):
            optimizer.zero_grad()
            for _ in optimizer.weight_samples(2):
                seen.append(weights(model))
                F.cross_entropy(model(*inputs), y).backward()
            optimizer.step()
            if step == 0:
                variances.append(optimizer.posterior().variance())
        assert_same(weights(model), before)
        names = [name for name in before if name.startswith("core.")]
        assert all(not torch.equal(seen[2][name], before[name]) for name in names)
        assert all(bool(torch.isfinite(value).all()) for value in optimizer.posterior().sample().values())
    own = dict(zip((id(p) for p in net.parameters()), (name for name, _ in net.named_parameters())))
    for part, entry in optimizer_parts(net):
        expected = in_one([variances[1][f"core.{name}.weight"] for name in parts[part]])
        close(variances[0][own[id(entry.weight)]], expected, rtol=1e-8)


@pytest.mark.parametrize("case", NETS)
def test_resuming_is_bitwise_identical(case):
    inputs, y = inputs_of(case), torch.tensor([0, 1, 2, 1])

    def train(net, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(net(*inputs), y).backward()
            optimizer.step()

    net = NETS[case]()[0]
    optimizer = bare_kfac(net, lr=0.1, momentum=0.9, fisher="mc")
    train(net, optimizer, 3)
    saved = {"net": weights(net), "optimizer": optimizer.state_dict()}
    other = NETS[case]()[0]
    other.load_state_dict(saved["net"])
    resumed = bare_kfac(other, lr=0.1, momentum=0.9, fisher="mc")
    resumed.load_state_dict(saved["optimizer"])
    train(net, optimizer, 2)
    train(other, resumed, 2)
    assert_same(weights(net), weights(other))


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("case", ["lstm", "attention"])
def test_the_users_pass_is_untouched_with_dropout(case, fisher):
    """Gradients, and what is drawn afterwards, are bit for bit those without the optimizer."""

    def run(attach: bool) -> tuple[dict[str, Tensor], Tensor]:
        net = NETS[case]()[0]
        net.core.dropout = 0.5
        inputs = inputs_of(case)
        optimizer = bare_kfac(net, fisher=fisher) if attach else None
        torch.manual_seed(3)
        F.cross_entropy(net(*inputs), torch.tensor([0, 1, 2, 1])).backward()
        found, drawn = gradients(net), torch.rand(4)
        if optimizer is not None:
            optimizer.step()
            assert all(float(view.output_factor.abs().sum()) > 0 for view in optimizer.curvature.values())
        return found, drawn

    plain, watched = run(False), run(True)
    assert_same(plain, watched)
