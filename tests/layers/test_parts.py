"""Attention and recurrent layers replayed: the module's own outputs, and rows that make up autograd's gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from kfac_opt._curvature.edges import output_edge
from kfac_opt.layers.parts import PartAdapter, find_composite, floating_outputs
from tests.support import close

DOUBLE = torch.float64
BATCH, TIME = 3, 4


def check(module: nn.Module, *args, **kwargs) -> None:
    """Outputs equal the module's; ``Σ g aᵀ`` over the rows is the gradient of each weight and bias."""
    composite = find_composite(module)
    out = floating_outputs(module(*args, **kwargs))
    replayed = composite.replay(module, args, kwargs, out)
    assert bool(replayed.agrees(out))
    for own, expected in zip(replayed.outputs, out):
        close(own.detach(), expected.detach())
    parts = composite.parts(module)
    loss = sum((part * torch.randn_like(part)).sum() for part in out)
    edges = [output_edge(part, torch.empty(0)) for part in out]
    found = torch.autograd.grad(loss, [edge for edge, _ in edges], retain_graph=True)
    gradients = [g if view is None else view.take(g) for g, (_, view) in zip(found, edges)]
    arrived = replayed.output_gradients(gradients)
    assert list(arrived) == [part.name for part in parts]
    assert not any(rows.inputs.requires_grad for rows in replayed.rows.values())
    for part in parts:
        own = [p for p in (part.weight, part.bias) if p is not None]
        expected = torch.autograd.grad(loss, own, retain_graph=True)
        adapter, rows = PartAdapter(part, part.bias is not None), replayed.rows[part.name]
        assert rows.inputs.shape[:3] == arrived[part.name].shape[:3]
        close(adapter.weight_gradient(rows.inputs, arrived[part.name], DOUBLE), adapter.layout.to_matrix(*expected))
        if rows.keep is not None:
            assert not bool((arrived[part.name] != 0).any(-1).logical_and(~rows.keep).any())


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
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "two layers": {"num_layers": 2},
    "bidirectional, two layers": {"bidirectional": True, "num_layers": 2, "batch_first": True},
}


def states(module: nn.RNNBase, batch: int | None = BATCH):
    sizes = [module.proj_size or module.hidden_size, *[module.hidden_size] * isinstance(module, nn.LSTM)]
    number = module.num_layers * (2 if module.bidirectional else 1)
    found = tuple(torch.randn(number, *([] if batch is None else [batch]), size, dtype=DOUBLE) for size in sizes)
    return found if isinstance(module, nn.LSTM) else found[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_layers_over_time(kind, form):
    torch.manual_seed(0)
    make, options = KINDS[kind]
    module = make(5, 3, **options, **FORMS[form]).to(DOUBLE)
    shape = (BATCH, TIME, 5) if module.batch_first else (TIME, BATCH, 5)
    x = torch.randn(shape, dtype=DOUBLE)
    check(module, x)
    check(module, x, states(module))
    check(module, input=x, hx=states(module))


@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_layers_without_a_batch(kind):
    torch.manual_seed(0)
    make, options = KINDS[kind]
    module = make(5, 3, batch_first=True, num_layers=2, **options).to(DOUBLE)
    check(module, torch.randn(TIME, 5, dtype=DOUBLE))
    check(module, torch.randn(TIME, 5, dtype=DOUBLE), states(module, None))


@pytest.mark.parametrize("sorted_already", [True, False])
@pytest.mark.parametrize("form", ["plain", "bidirectional, two layers"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind, form, sorted_already):
    torch.manual_seed(0)
    make, options = KINDS[kind]
    module = make(5, 3, **options, **FORMS[form]).to(DOUBLE)
    lengths = [4, 3, 1] if sorted_already else [1, 4, 3]
    x = torch.randn(BATCH, TIME, 5, dtype=DOUBLE)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=sorted_already)
    check(module, packed)
    check(module, packed, states(module))
    rows = find_composite(module).replay(module, (packed,), {}, []).rows
    for part in rows.values():  # as the user has them
        assert part.keep.sum(1).tolist() == lengths
    first = rows["ih_l0"]
    assert torch.equal(first.inputs[0][first.keep], x[first.keep])


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_between_layers_is_drawn_as_the_module_draws_it(packed):
    torch.manual_seed(0)
    module = nn.LSTM(5, 3, num_layers=3, dropout=0.5, batch_first=True).to(DOUBLE)
    x = torch.randn(BATCH, TIME, 5, dtype=DOUBLE)
    given = pack_padded_sequence(x, [2, 4, 3], batch_first=True, enforce_sorted=False) if packed else x
    composite = find_composite(module)
    assert composite.draws(module)
    state = torch.get_rng_state()
    out = floating_outputs(module(given))
    torch.set_rng_state(state)
    assert bool(composite.replay(module, (given,), {}, out).agrees(out))
    assert not bool(composite.replay(module, (given,), {}, out).agrees(out))  # another draw
    assert not composite.draws(module.eval())
    check(module, given)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(make, bias):
    torch.manual_seed(0)
    module = make(5, 3, bias=bias).to(DOUBLE)
    for shape in ((BATCH,), ()):
        x, h, c = (torch.randn(*shape, size, dtype=DOUBLE) for size in (5, 3, 3))
        check(module, x)
        check(module, x, (h, c) if make is nn.LSTMCell else h)


# -- attention ------------------------------------------------------------------------------------------------------

CAUSAL = torch.ones(TIME, TIME, dtype=torch.bool).triu(1)
MASKS = {
    "no mask": {},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
    "bool": {"attn_mask": CAUSAL},
    "added": {"attn_mask": torch.randn(TIME, TIME, dtype=DOUBLE)},
    "of each head": {"attn_mask": torch.randn(2 * BATCH, TIME, TIME, dtype=DOUBLE)},
    "padding": {"key_padding_mask": torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 1]]).bool()},
    "padding and causal": {
        "key_padding_mask": torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 1]]).bool(),
        "attn_mask": CAUSAL,
        "is_causal": True,
    },
}
WEIGHTS = {
    "without weights": {"need_weights": False},
    "with weights": {},
    "with weights of heads": {"average_attn_weights": False},
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mask", MASKS)
def test_self_attention(mask, weights, batch_first):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(6, 2, batch_first=batch_first, bias=mask != "bool").to(DOUBLE)
    x = torch.randn(BATCH, TIME, 6, dtype=DOUBLE)
    x = x if batch_first else x.transpose(0, 1)
    check(module, x, x, x, **MASKS[mask], **WEIGHTS[weights])


@pytest.mark.parametrize("sizes", [{}, {"kdim": 3, "vdim": 5}])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("length", [2, TIME, 5])
def test_cross_attention(length, batch_first, bias, sizes):
    """With more, as many, and fewer queries than keys."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(6, 2, bias=bias, batch_first=batch_first, **sizes).to(DOUBLE)
    shapes = [(length, 6), (TIME, sizes.get("kdim", 6)), (TIME, sizes.get("vdim", 6))]
    given = [torch.randn(BATCH, *shape, dtype=DOUBLE) for shape in shapes]
    given = given if batch_first else [x.transpose(0, 1) for x in given]
    padding = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 1]]).bool()
    check(module, *given)
    check(module, *given, key_padding_mask=padding, need_weights=False)
    check(module, query=given[0], key=given[1], value=given[2], attn_mask=torch.randn(length, TIME, dtype=DOUBLE))
    names = [part.name for part in find_composite(module).parts(module)]
    assert names == (["q", "k", "v", "out_proj"] if sizes else ["in_proj", "out_proj"])


def test_attention_without_a_batch():
    torch.manual_seed(0)
    module = nn.MultiheadAttention(6, 2, batch_first=True).to(DOUBLE)
    x, y = torch.randn(TIME, 6, dtype=DOUBLE), torch.randn(2, 6, dtype=DOUBLE)
    check(module, x, x, x)
    check(module, y, x, x, attn_mask=torch.randn(2, TIME, dtype=DOUBLE))
    check(module, x, x, x, need_weights=False, attn_mask=torch.randn(2, TIME, TIME, dtype=DOUBLE))


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_of_attention_is_drawn_as_the_module_draws_it(need_weights):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(6, 2, dropout=0.5).to(DOUBLE)
    x = torch.randn(TIME, BATCH, 6, dtype=DOUBLE)
    composite, options = find_composite(module), {"need_weights": need_weights}
    assert composite.draws(module)
    state = torch.get_rng_state()
    out = floating_outputs(module(x, x, x, **options))
    torch.set_rng_state(state)
    assert bool(composite.replay(module, (x, x, x), options, out).agrees(out))
    assert not bool(composite.replay(module, (x, x, x), options, out).agrees(out))
    check(module.eval(), x, x, x, **options)


# -- what is left to others -----------------------------------------------------------------------------------------


class Own(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


def test_modules_that_cannot_be_replayed_have_no_parts():
    assert find_composite(nn.Linear(2, 2)) is None
    assert find_composite(Own(2, 2)) is None
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        module = nn.MultiheadAttention(4, 2, **options)
        assert find_composite(module).parts(module) == []
    lstm = nn.LSTM(2, 2)
    nn.utils.parametrizations.weight_norm(lstm, "weight_hh_l0")
    assert find_composite(lstm).parts(lstm) == []
    attention = nn.MultiheadAttention(4, 2)
    nn.utils.parametrizations.spectral_norm(attention.out_proj)
    assert find_composite(attention).parts(attention) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_agrees_up_to_rounding(dtype):
    torch.manual_seed(0)
    for module, width in ((nn.LSTM(8, 8, num_layers=2), 1), (nn.GRU(8, 8), 1), (nn.MultiheadAttention(8, 2), 3)):
        module, given = module.to(dtype), (torch.randn(20, 4, 8, dtype=dtype),) * width
        replayed = find_composite(module).replay(module, given, {}, [])
        assert bool(replayed.agrees(floating_outputs(module(*given))))
        with torch.no_grad():
            next(module.parameters()).mul_(1.5)
        assert not bool(replayed.agrees(floating_outputs(module(*given))))


def test_rows_shared_by_groups_give_the_same_moment():
    torch.manual_seed(0)
    module = nn.MultiheadAttention(6, 2).to(DOUBLE)
    x = torch.randn(TIME, BATCH, 6, dtype=DOUBLE)
    rows = find_composite(module).replay(module, (x, x, x), {}, []).rows["in_proj"].inputs
    adapter = PartAdapter(find_composite(module).parts(module)[0], with_bias=True)
    assert rows.stride(0) == 0
    keep = torch.rand(BATCH, TIME) < 0.5
    for where in (None, keep, keep.expand(3, -1, -1)):
        moment = adapter.input_moment(rows, where, "expand", DOUBLE)
        close(moment, adapter.input_moment(rows.contiguous(), where, "expand", DOUBLE))
