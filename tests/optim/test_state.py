"""State: round trips, resume bit for bit in the middle of both intervals, distributed checkpoint, layout."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_opt import KFAC
from tests.support import assert_same, data, mlp, train_step, weights

OPTIONS = [
    {"curvature": "kronecker"},
    {"curvature": "kronecker", "damping_style": "exact"},
    {"curvature": "eigenbasis", "damping_style": "split"},
    {"curvature": "eigenbasis"},
    {"curvature": "diagonal"},
    {"curvature": "identity"},
    {"curvature": "kronecker", "fisher": "exact", "damping_scale": "absolute"},
    {"curvature": "eigenbasis", "fisher": "empirical"},
]


class Everything(nn.Module):
    """One layer of every kind of block."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.convolution = nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(4)
        self.gain = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.convolution(self.embedding(x).mT).mT
        return self.head(self.gain * torch.tanh(self.norm(hidden)).mean(1))


def make(dtype: torch.dtype = torch.float32) -> Everything:
    torch.manual_seed(0)
    return Everything().to(dtype)


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(7, (6, 5), generator=g), torch.randint(3, (6,), generator=g)


def build(model: nn.Module, **options) -> KFAC:
    settings = {"lr": 0.1, "momentum": 0.9, "factor_interval": 3, "inverse_interval": 5, "ramp_steps": 0}
    return KFAC(model, **{**settings, **options})


def through_a_file(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("after", [1, 4, 7])
def test_resuming_from_a_file_is_bitwise_identical(after, options, dtype):
    """In the middle of both intervals, with momentum, also where the model is in bf16 and the curvature is not."""
    model = make(dtype)
    optimizer = build(model, **options)
    for step in range(after):
        train_step(optimizer, model, *batch(step))
    saved_model, saved = through_a_file(model.state_dict()), through_a_file(optimizer.state_dict())
    resumed = make(dtype)
    resumed.load_state_dict(saved_model)
    again = build(resumed, **{**options, "lr": 0.77})
    again.load_state_dict(saved)
    for step in range(after, after + 7):
        a = train_step(optimizer, model, *batch(step))
        b = train_step(again, resumed, *batch(step))
        assert a == b
        assert_same(weights(resumed), weights(model))
    assert_same(again.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_resuming_within_the_ramp_is_bitwise_identical(options):
    model = make()
    optimizer = build(model, **options, ramp_steps=10)
    for step in range(3):
        train_step(optimizer, model, *batch(step))
    resumed = make()
    resumed.load_state_dict(model.state_dict())
    again = build(resumed, **options, ramp_steps=10)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 14):
        train_step(optimizer, model, *batch(step))
        train_step(again, resumed, *batch(step))
    assert_same(weights(resumed), weights(model))


def test_the_seed_of_the_sampled_labels_is_part_of_the_state():
    model = make()
    optimizer = build(model, generator=torch.Generator().manual_seed(123))
    train_step(optimizer, model, *batch(0))
    resumed = make()
    resumed.load_state_dict(model.state_dict())
    again = build(resumed)
    again.load_state_dict(optimizer.state_dict())
    for step in range(1, 8):
        train_step(optimizer, model, *batch(step))
        train_step(again, resumed, *batch(step))
    assert_same(weights(resumed), weights(model))


def test_round_trip_keeps_every_tensor_and_its_dtype():
    model = make(torch.bfloat16)
    optimizer = build(model)
    for step in range(4):
        train_step(optimizer, model, *batch(step))
    state = copy.deepcopy(optimizer.state_dict())
    again = build(make(torch.bfloat16))
    again.load_state_dict(state)
    assert_same(again.state_dict(), state)


def test_loading_clones():
    """torch itself shares tensors with the given dict."""
    model = make()
    optimizer = build(model, factor_interval=1)
    train_step(optimizer, model, *batch(0))
    state = optimizer.state_dict()
    frozen = copy.deepcopy(state)
    other = make()
    again = build(other, factor_interval=1)
    again.load_state_dict(state)
    train_step(again, other, *batch(1))
    assert_same(state, frozen)


def test_loading_drops_pending_passes_and_arms_for_the_loaded_step():
    model = make()
    optimizer = build(model)
    for step in range(3):  # an estimate is due in the step that follows
        train_step(optimizer, model, *batch(step))
    saved, saved_model = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train_step(optimizer, model, *batch(3))
    resumed = make()
    again = build(resumed)
    train_step(again, resumed, *batch(50))
    resumed(batch(51)[0])
    again.load_state_dict(saved)
    resumed.load_state_dict(saved_model)
    train_step(again, resumed, *batch(3))
    assert_same(weights(resumed), weights(model))
    assert_same(again.state_dict(), optimizer.state_dict())


def tensors(value: object, path: str = "") -> list[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        return [(path, value)]
    assert isinstance(value, dict), (path, type(value))
    return [item for key, v in value.items() for item in tensors(v, f"{path}.{key}")]


def test_state_is_nested_dicts_of_tensors_under_parameters_all_there_after_the_first_step():
    model = make()
    optimizer = build(model)
    train_step(optimizer, model, *batch(0))
    first = {path: t.shape for path, t in tensors(optimizer.state_dict()["state"])}
    for step in range(1, 8):
        train_step(optimizer, model, *batch(step))
    assert {path: t.shape for path, t in tensors(optimizer.state_dict()["state"])} == first
    assert all(key in set(model.parameters()) for key in optimizer.state)
    assert all(int(optimizer.state[p]["step"]) == 8 for p in model.parameters())


def test_state_is_allocated_by_a_first_step_without_gradients():
    model, other = make(), make()
    a, b = build(model), build(other)
    a.step()
    train_step(b, other, *batch(0))
    shapes = [{path: t.shape for path, t in tensors(o.state_dict()["state"])} for o in (a, b)]
    assert shapes[0] == shapes[1]


def test_a_fresh_optimizers_state_dict_is_torchs():
    model = make()
    state = build(model).state_dict()
    assert set(state) == {"state", "param_groups"}
    assert state["param_groups"][0]["params"] == list(range(len(list(model.parameters()))))
    fresh_model = make()
    fresh = build(fresh_model)
    fresh.load_state_dict(state)
    train_step(fresh, fresh_model, *batch(0))


@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoint_round_trip(flatten):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        get_state_dict,
        set_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = make()
    optimizer = build(model)
    for step in range(4):
        train_step(optimizer, model, *batch(step))
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    model_state, optimizer_state = copy.deepcopy(model_state), copy.deepcopy(optimizer_state)
    resumed = make()
    again = build(resumed)
    get_optimizer_state_dict(resumed, again, options=options)  # steps a fresh optimizer with zero gradients
    set_state_dict(resumed, again, model_state_dict=model_state, optim_state_dict=optimizer_state, options=options)
    for step in range(4, 10):
        train_step(optimizer, model, *batch(step))
        train_step(again, resumed, *batch(step))
    assert_same(weights(resumed), weights(model))


def test_distributed_checkpoint_of_a_fresh_optimizer_changes_neither_weights_nor_curvature():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, twin = make(), make()
    optimizer, untouched = build(model), build(twin)
    before = weights(model)
    get_optimizer_state_dict(model, optimizer)
    assert_same(weights(model), before)
    with pytest.raises(RuntimeError, match="head"):
        optimizer.curvature["head"].to_dense()
    train_step(optimizer, model, *batch(0))
    train_step(untouched, twin, *batch(0))
    block, expected = (o.curvature["head"].input_factor for o in (optimizer, untouched))
    torch.testing.assert_close(block, expected)


def test_distributed_checkpoint_writes_and_reads_files(tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = make()
    optimizer = build(model)
    for step in range(4):
        train_step(optimizer, model, *batch(step))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path, no_dist=True)
    resumed = make()
    again = build(resumed)
    target_model, target_optimizer = get_state_dict(resumed, again)
    target = {"model": target_model, "optimizer": target_optimizer}
    dcp.load(target, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(resumed, again, model_state_dict=target["model"], optim_state_dict=target["optimizer"])
    for step in range(4, 10):
        train_step(optimizer, model, *batch(step))
        train_step(again, resumed, *batch(step))
    assert_same(weights(resumed), weights(model))


def test_loading_a_state_with_other_groups_is_refused_as_torch_does():
    state = build(make()).state_dict()
    with pytest.raises(ValueError, match="parameter group"):
        KFAC(mlp(torch.float32)).load_state_dict(state)


def test_the_step_counter_survives_a_checkpoint():
    model = make()
    optimizer = build(model, factor_interval=4, inverse_interval=4)
    for step in range(3):
        train_step(optimizer, model, *batch(step))
    resumed = make()
    again = build(resumed, factor_interval=4, inverse_interval=4)
    again.load_state_dict(optimizer.state_dict())
    assert all(int(again.state[p]["step"]) == 3 for p in resumed.parameters())
    before = again.curvature["head"].input_factor.clone()
    train_step(again, resumed, *batch(3))
    assert torch.equal(again.curvature["head"].input_factor, before)
    train_step(again, resumed, *batch(4))
    assert not torch.equal(again.curvature["head"].input_factor, before)


# ---------------------------------------------------------------------------------------------
# deepcopy and pickle


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
@pytest.mark.parametrize("steps", [0, 4])
def test_a_copied_pair_works_and_goes_the_same_way(steps, options):
    model = make()
    optimizer = build(model, **options)
    for step in range(steps):
        train_step(optimizer, model, *batch(step))
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    before = weights(model)
    for step in range(steps, steps + 6):
        train_step(optimizer2, model2, *batch(step))
    assert_same(weights(model), before)
    for step in range(steps, steps + 6):
        train_step(optimizer, model, *batch(step))
    assert_same(weights(model2), weights(model))
    assert_same(optimizer2.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_a_pickled_model_and_optimizer_go_on_where_they_were(options):
    model = make()
    optimizer = build(model, **options)
    for step in range(4):
        train_step(optimizer, model, *batch(step))
    model2, lonely = pickle.loads(pickle.dumps((model, optimizer)))
    optimizer2 = build(model2, **options)
    optimizer2.load_state_dict(lonely.state_dict())
    for step in range(4, 10):
        train_step(optimizer, model, *batch(step))
        train_step(optimizer2, model2, *batch(step))
    assert_same(weights(model2), weights(model))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copied_model_carries_inert_hooks(how):
    model = make()
    optimizer = build(model, factor_interval=1)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    x, y = batch(0)
    F.cross_entropy(other(x), y).backward()  # would be a pass of ``optimizer`` if its hooks lived on
    train_step(optimizer, model, x, y)
    alone = make()
    twin = build(alone, factor_interval=1)
    train_step(twin, alone, x, y)
    assert_same(optimizer.curvature["head"].to_dense(), twin.curvature["head"].to_dense())
    second = build(other, factor_interval=1)
    other.zero_grad()
    train_step(second, other, x, y)
    assert_same(second.curvature["head"].to_dense(), twin.curvature["head"].to_dense())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_an_optimizer_restored_without_its_model_says_what_to_do(how):
    model = make()
    optimizer = build(model)
    train_step(optimizer, model, *batch(0))
    lonely = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    with pytest.raises(RuntimeError, match=r"KFAC\(model(.|\n)*load_state_dict"):
        lonely.step()
    resumed = make()
    resumed.load_state_dict(model.state_dict())
    again = build(resumed)
    again.load_state_dict(lonely.state_dict())
    for step in range(1, 7):
        train_step(optimizer, model, *batch(step))
        train_step(again, resumed, *batch(step))
    assert_same(weights(resumed), weights(model))


def test_copying_between_backward_and_step_leaves_the_original_as_it_was():
    model, twin = make(), make()
    optimizer, alone = build(model), build(twin)
    for net in (model, twin):
        F.cross_entropy(net(batch(0)[0]), batch(0)[1]).backward()
    _, copied = copy.deepcopy((model, optimizer))
    copied.step()
    optimizer.step()
    alone.step()
    assert_same(weights(model), weights(twin))
    assert_same(optimizer.state_dict(), alone.state_dict())


def test_a_state_can_be_loaded_twice():
    model = mlp(torch.float32)
    optimizer = KFAC(model, model.named_parameters())
    train_step(optimizer, model, *data(dtype=torch.float32))
    for _ in range(2):
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        optimizer.load_state_dict(torch.load(buffer, weights_only=True))
        train_step(optimizer, model, *data(dtype=torch.float32))


def test_the_state_of_another_optimizer_is_refused_before_anything_changes():
    model = mlp(torch.float32)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train_step(sgd, model, *data(dtype=torch.float32))
    optimizer = KFAC(model)
    with pytest.raises(ValueError, match=r"'damping'.*not saved by KFAC"):
        optimizer.load_state_dict(sgd.state_dict())
    train_step(optimizer, model, *data(dtype=torch.float32))


def test_a_state_saved_with_another_damping_style_is_refused_by_name():
    model = mlp(torch.float32)
    first = KFAC(model)
    train_step(first, model, *data(dtype=torch.float32))
    first.detach()
    second = KFAC(model, damping_style="exact")
    with pytest.raises(ValueError, match=r"'0'.*damping_style"):
        second.load_state_dict(first.state_dict())
    train_step(second, model, *data(dtype=torch.float32))


def test_the_curvature_of_the_saved_groups_is_taken_over_as_every_option_of_a_group_is():
    model = mlp(torch.float32)
    first = KFAC(model, curvature="eigenbasis")
    train_step(first, model, *data(dtype=torch.float32))
    twin = copy.deepcopy(model)
    second = KFAC(twin)
    second.load_state_dict(first.state_dict())
    for optimizer, net in ((first, model), (second, twin)):
        train_step(optimizer, net, *data(dtype=torch.float32, seed=7))
    assert_same(weights(model), weights(twin))
