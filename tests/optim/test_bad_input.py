"""Every misuse gets an error that names the thing, says what was found, what was expected and what to do."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_opt import KFAC
from tests.support import Lambda, bare_kfac, close, data, mlp, train_step, weights

DOUBLE = torch.float64
ERRORS = (TypeError, ValueError, RuntimeError)
NAN, INF = float("nan"), float("inf")

RANGES = [
    *[("lr", v) for v in (-0.1, NAN, INF, "0.1")],
    *[("momentum", v) for v in (-0.1, 1.0, 1.5, NAN)],
    *[("damping", v) for v in (0.0, -1e-3, NAN, INF, "small")],
    *[("weight_decay", v) for v in (-0.1, NAN, INF)],
    *[("factor_decay", v) for v in (-0.1, 1.0, NAN)],
    *[("factor_interval", v) for v in (0, -1, 1.5)],
    *[("inverse_interval", v) for v in (0, -1, 2.5)],
    *[("kl_clip", v) for v in (0.0, -1e-4, NAN)],
    *[("max_relative_update", v) for v in (0.0, -0.1, NAN)],
    *[("ramp_steps", v) for v in (-1, 1.5)],
    *[("label_samples", v) for v in (0, -1, 1.5)],
    *[("max_factor_dim", v) for v in (0, -5)],
]
WORDS = [
    ("likelihood", "softmax"),
    ("fisher", "type2"),
    ("curvature", "ekfac"),
    ("damping_style", "pi"),
    ("damping_scale", "log"),
    ("weight_sharing", "sum"),
    ("loss_reduction", "none"),
]


@pytest.mark.parametrize(("name", "value"), RANGES)
def test_every_range_is_checked_in_the_constructor(name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        KFAC(mlp(), **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        r
        for r in RANGES
        if r[0]
        in (
            "lr",
            "momentum",
            "damping",
            "weight_decay",
            "factor_decay",
            "factor_interval",
            "inverse_interval",
            "kl_clip",
        )
    ],
)
def test_ranges_of_a_group_are_checked_too(name, value):
    model = mlp()
    with pytest.raises((TypeError, ValueError), match=name):
        KFAC(model, [{"params": model[0].parameters(), name: value}, {"params": model[2].parameters()}])
    optimizer = KFAC(model, list(model[0].parameters()))
    with pytest.raises((TypeError, ValueError), match=name):
        optimizer.add_param_group({"params": model[2].parameters(), name: value})


@pytest.mark.parametrize(("name", "value"), [("damping", -0.1), ("lr", -0.5), ("momentum", 1.5)])
def test_a_range_error_shows_what_was_found(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be .*{value}"):
        KFAC(mlp(), **{name: value})


@pytest.mark.parametrize(("name", "value"), [("lr", -0.1), ("momentum", 1.0), ("damping", 0.0), ("inverse_interval", 0)])
@pytest.mark.parametrize("call", ["step", "precondition_gradients_"])
def test_values_that_are_written_into_a_group_later_are_checked_before_anything_changes(name, value, call):
    model = mlp()
    optimizer = KFAC(model)
    train_step(optimizer, model, *data())
    before = weights(model)
    good, optimizer.param_groups[0][name] = optimizer.param_groups[0][name], value
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    with pytest.raises(ValueError, match=rf"KFAC: {name} must"):
        getattr(optimizer, call)()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert optimizer.state[model[0].weight]["step"] == 1
    optimizer.param_groups[0][name] = good
    getattr(optimizer, call)()


@pytest.mark.parametrize("word", ["async", "never"])
def test_an_unknown_way_to_refresh_is_answered_with_the_one_that_stalls_no_step(word):
    with pytest.raises(ValueError, match=rf"KFAC: refresh must be one of .*, got '{word}'. \"staggered\" spreads the refreshes"):
        KFAC(mlp(), refresh=word)


@pytest.mark.parametrize("call", ["step", "precondition_gradients_"])
def test_a_curvature_written_into_a_group_later_is_refused(call):
    model = mlp()
    optimizer = KFAC(model, [{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    optimizer.param_groups[1]["curvature"] = "eigenbasis"
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    with pytest.raises(ValueError, match=r"(?s)group 1 .*'eigenbasis'.*'kronecker'.*build KFAC\(model"):
        getattr(optimizer, call)()
    optimizer.param_groups[1]["curvature"] = "kronecker"
    getattr(optimizer, call)()


def test_a_group_that_was_appended_by_hand_is_refused():
    model = mlp()
    optimizer = KFAC(model, model[0].parameters())
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": list(model[2].parameters())})
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    with pytest.raises(ValueError, match=r"2 parameter groups.*for 1.*add_param_group"):
        optimizer.step()


def test_numbers_of_numpy_are_numbers():
    model = mlp()
    optimizer = KFAC(model, lr=np.float32(0.1), factor_interval=np.int64(3))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float32(0.5))
    train_step(optimizer, model, *data())
    scheduler.step()
    train_step(optimizer, model, *data())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    with pytest.raises(ValueError, match="factor_interval must"):
        KFAC(mlp(), factor_interval=np.float64(3.0))


@pytest.mark.parametrize(("name", "word"), WORDS)
def test_an_unknown_word_lists_the_known_ones(name, word):
    known = {"likelihood": "categorical", "fisher": "exact", "curvature": "eigenbasis", "damping_style": "factored",
             "damping_scale": "relative", "weight_sharing": "reduce", "loss_reduction": "mean"}[name]  # fmt: skip
    with pytest.raises(ValueError, match=rf"(?s){name}(?=.*{known})(?=.*{word})"):
        KFAC(mlp(), **{name: word})


def test_the_boundaries_of_the_ranges_are_allowed():
    KFAC(
        mlp(),
        lr=0.0,
        momentum=0.0,
        weight_decay=0.0,
        factor_decay=0.0,
        ramp_steps=0,
        kl_clip=None,
        max_relative_update=None,
    )
    KFAC(mlp(), factor_interval=1, inverse_interval=1, label_samples=1, damping=1e-30, momentum=0.999)


def test_a_misspelt_argument_fails():
    with pytest.raises(TypeError, match="dampng"):
        KFAC(mlp(), dampng=0.1)


@pytest.mark.parametrize("number", [0.1, 1])
def test_a_number_where_the_parameters_belong(number):
    with pytest.raises((TypeError, ValueError), match=r"(?s)params.*lr="):
        KFAC(mlp(), number)


@pytest.mark.parametrize("model", [list, lambda: mlp().parameters(), lambda: list(mlp().parameters()), lambda: "net"])
def test_parameters_where_the_model_belongs(model):
    with pytest.raises(TypeError, match=r"(?s)[Mm]odule.*KFAC\(model"):
        KFAC(model())


def test_parameters_that_are_not_in_the_model():
    model, stranger = mlp(), nn.Parameter(torch.zeros(7, 9))
    with pytest.raises(ValueError, match=r"(?s)(?=.*model)(?=.*7, 9)"):
        KFAC(model, [*model.parameters(), stranger])


def test_a_parameter_in_two_groups():
    model = mlp()
    with pytest.raises(ValueError, match=r"more than one parameter group|0\.weight"):
        KFAC(model, [{"params": model[0].parameters()}, {"params": model.parameters()}])


def test_a_parameter_twice_in_a_group():
    model = mlp()
    with pytest.raises(ValueError, match=r"group 0 holds '0.weight' twice"):
        KFAC(model, [model[0].weight, model[0].bias, model[0].weight])


def test_weight_and_bias_in_different_groups():
    model = mlp()
    with pytest.raises(ValueError, match=r"(?s)'2'.*groups.*(0.*1|1.*0).*one group"):
        KFAC(model, [{"params": [*model[0].parameters(), model[2].weight]}, {"params": [model[2].bias]}])


def test_weight_and_bias_in_different_groups_are_fine_where_no_matrix_needs_both():
    model = mlp()
    groups = [
        {"params": [model[0].weight, model[2].weight]},
        {"params": [model[0].bias, model[2].bias], "weight_decay": 0.0},
    ]
    for curvature in ("diagonal", "identity"):
        KFAC(model, groups, curvature=curvature).detach()


def test_a_layer_of_which_only_the_weight_is_given():
    """The bias is not this optimizer's: it must not move."""
    model = mlp()
    optimizer = KFAC(model, [model[0].weight, *model[2].parameters()], lr=0.1)
    bias = model[0].bias.detach().clone()
    train_step(optimizer, model, *data())
    assert torch.equal(bias, model[0].bias)


def test_no_parameters_to_train():
    model = mlp().requires_grad_(False)
    with pytest.raises(ValueError, match=r"(?s)trainable|requires_grad|empty parameter list"):
        KFAC(model)


def test_a_frozen_parameter_that_is_given_explicitly():
    model = mlp()
    model[0].weight.requires_grad_(False)
    optimizer = KFAC(model, list(model.parameters()), lr=0.1)
    before = model[0].weight.clone()
    train_step(optimizer, model, *data())
    assert torch.equal(before, model[0].weight)


def test_sparse_gradients_are_refused_by_name():
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), Lambda(lambda h: h.mean(1)), nn.Linear(4, 3))
    x = torch.randint(5, (6, 2))
    with pytest.raises(ERRORS, match=r"(?s)0(\.weight)?'.*sparse=False"):
        train_step(KFAC(model), model, x, torch.randint(3, (6,)))


def test_sparse_gradients_are_refused_by_name_where_there_is_no_curvature():
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), Lambda(lambda h: h.mean(1)), nn.Linear(4, 3))
    optimizer = KFAC(model, curvature="identity")
    with pytest.raises(RuntimeError, match=r"'0\.weight' is sparse.*sparse=False"):
        train_step(optimizer, model, torch.randint(5, (8, 2)), torch.randint(3, (8,)))


def test_complex_parameters_are_refused_by_name():
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.phase, self.head = nn.Parameter(torch.randn(4, dtype=torch.cfloat)), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((x * self.phase).abs())

    model = Complex()
    with pytest.raises(ERRORS, match=r"(?s)phase.*complex"):
        train_step(KFAC(model), model, torch.randn(6, 4), torch.randint(3, (6,)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_and_traced_models_are_refused():
    for scripted in (torch.jit.script(mlp()), nn.Sequential(torch.jit.trace(mlp(), data()[0]))):
        with pytest.raises(TypeError, match=r"ScriptModule.*plain module"):
            KFAC(scripted)


def test_a_model_on_the_meta_device_is_refused_until_it_is_materialised():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"'0.weight' is on the meta device.*to_empty"):
        KFAC(model)
    model.to_empty(device="cpu").load_state_dict(mlp(torch.float32).state_dict())
    optimizer, (x, y) = KFAC(model), data(dtype=torch.float32)
    losses = [train_step(optimizer, model, x, y) for _ in range(10)]
    assert losses[-1] < losses[0]


def test_data_parallel_is_refused_with_the_remedy():
    with pytest.raises(ERRORS, match=r"(?s)DataParallel.*DistributedDataParallel"):
        KFAC(nn.DataParallel(mlp()))


class Returns(nn.Module):
    def __init__(self, what) -> None:
        super().__init__()
        self.net, self.what = mlp(torch.float32), what

    def forward(self, x: torch.Tensor) -> object:
        return self.what(self.net(x))


OUTPUTS = {
    "a dict": (lambda f: {"prediction": f}, r"(?s)dict.*outputs="),
    "a tuple": (lambda f: (f, f), r"(?s)tuple.*outputs="),
    "nothing": (lambda f: None, r"(?s)NoneType.*outputs="),
    "predicted classes": (lambda f: f.argmax(1), r"(?s)int64.*outputs="),
    "one number per example": (lambda f: f[:, 0], r"(?s)\[8\].*(bernoulli|gaussian)"),
    "one class": (lambda f: f[:, :1], r"(?s)single class.*bernoulli"),
    "a loss": (lambda f: f.sum(), r"(?s)\[\].*\[batch, classes\]"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_model_output_that_holds_no_logits(kind):
    what, message = OUTPUTS[kind]
    model = Returns(what)
    optimizer = KFAC(model)
    with pytest.raises(ERRORS, match=message):
        model(torch.randn(8, 4))
        optimizer.step()


def test_outputs_that_picks_nonsense():
    model = mlp(torch.float32)
    optimizer = KFAC(model, outputs=lambda f: "logits")
    with pytest.raises(ERRORS, match=r"(?s)str.*outputs="):
        model(torch.randn(8, 4))
        optimizer.step()


def test_a_mask_of_the_wrong_shape():
    model = mlp(torch.float32)
    optimizer = KFAC(model)
    with pytest.raises(ERRORS, match=r"(?s)mask.*\[5\].*\[8\]"):
        with optimizer.masked(torch.ones(5, dtype=torch.bool)):
            model(torch.randn(8, 4))
        optimizer.step()


def test_an_optimizer_on_other_parameters_of_the_same_model():
    model = mlp()
    first = KFAC(model, model[0].parameters())
    KFAC(model, model[2].parameters())
    with pytest.raises(RuntimeError, match=r"(?s)the later one takes over.*one optimizer with several parameter groups"):
        first.step()


def test_calling_only_a_part_of_the_model():
    """An estimate was due, there are gradients, and the root's forward never ran."""
    model = nn.Sequential(mlp(), nn.Linear(3, 3).to(DOUBLE))
    optimizer = KFAC(model)
    x, y = data()
    F.cross_entropy(model[0](x), y).backward()
    with pytest.raises(RuntimeError, match=r"(?s)forward.*(module that you call|the module you call)"):
        optimizer.step()


def test_step_after_precondition_gradients_for_the_same_gradients():
    model = mlp()
    optimizer = KFAC(model)
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    optimizer.precondition_gradients_()
    with pytest.raises(RuntimeError, match="precondition_gradients_"):
        optimizer.step()


def test_preconditioning_the_same_gradients_twice():
    model = mlp()
    optimizer = KFAC(model)
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    optimizer.precondition_gradients_()
    with pytest.raises(RuntimeError, match="precondition_gradients_"):
        optimizer.precondition_gradients_()


@pytest.mark.parametrize("shape", [(5,), (4, 5), (5, 4), (1, 5, 5)])
def test_precondition_of_a_matrix_of_the_wrong_shape(shape):
    model = mlp()
    optimizer = bare_kfac(model)
    model(data()[0])
    optimizer.step()
    with pytest.raises(ERRORS, match=r"(?s)'?0'?.*5, 5"):
        optimizer.curvature["0"].precondition(torch.zeros(shape, dtype=DOUBLE))


# ---------------------------------------------------------------------------------------------
# a likelihood that contradicts the loss


def fit(model, x, y, loss, steps: int = 3, **options) -> None:
    optimizer = KFAC(model, **options)
    for _ in range(steps):
        train_step(optimizer, model, x, y, loss)
    optimizer.detach()


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_regression_with_the_default_likelihood_is_noticed(fisher):
    x, _ = data(dtype=torch.float32)
    with pytest.warns(UserWarning, match=r"(?s)likelihood.*gaussian"):
        fit(mlp(torch.float32), x, torch.randn(8, 3), F.mse_loss, fisher=fisher)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_classification_with_another_likelihood_is_noticed(likelihood):
    x, y = data(dtype=torch.float32)
    with pytest.warns(UserWarning, match="likelihood"):
        fit(mlp(torch.float32), x, y, F.cross_entropy, likelihood=likelihood)


def test_one_sigmoid_per_class_with_the_categorical_likelihood_is_noticed():
    x, _ = data(dtype=torch.float32)
    with pytest.warns(UserWarning, match="likelihood"):
        fit(mlp(torch.float32), x, torch.rand(8, 3).round(), F.binary_cross_entropy_with_logits)


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        lambda f, y: F.cross_entropy(f, y, reduction="sum"),
        lambda f, y: F.cross_entropy(f, y, label_smoothing=0.1),
        lambda f, y: F.cross_entropy(f, y, weight=torch.tensor([1.0, 2.0, 0.5])),
        lambda f, y: 1e-3 * F.cross_entropy(f, y),
        lambda f, y: F.kl_div(f.log_softmax(1), F.one_hot(y, 3).float() * 0.8 + 0.2 / 3, reduction="batchmean"),
        lambda f, y: F.cross_entropy(1e3 * f, y),
        lambda f, y: F.cross_entropy(1e3 * f, y, label_smoothing=0.1),
    ],
    ids=["mean", "sum", "smoothing", "class weights", "scaled", "soft labels", "sharp", "sharp and smooth"],
)
def test_no_false_alarm_for_cross_entropies(loss, recwarn):
    x, y = data(dtype=torch.float32)
    fit(mlp(torch.float32), x, y, loss)
    assert [str(w.message) for w in recwarn] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_false_alarm_for_a_model_of_log_probabilities(dtype, recwarn):
    x, y = data(dtype=dtype)
    fit(nn.Sequential(mlp(dtype), nn.LogSoftmax(1)), x, y, F.nll_loss)
    assert [str(w.message) for w in recwarn] == []


def test_regression_with_large_outputs_is_noticed_too():
    x, _ = data(dtype=torch.float32)
    model = mlp(torch.float32)
    with torch.no_grad():
        model[2].weight.mul_(1000.0)
    assert float(model(x).detach().softmax(1).amax(1).min()) > 0.999
    with pytest.warns(UserWarning, match="likelihood"):
        fit(model, x, torch.randn(8, 3), F.mse_loss)


def test_probabilities_where_the_logits_belong_are_noticed():
    x, y = data(16, dtype=torch.float32)
    model = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid())
    with pytest.warns(UserWarning, match="likelihood 'bernoulli'.*probabilities; return logits"):
        fit(model, x, (y[:, None] > 0).float(), F.binary_cross_entropy, likelihood="bernoulli")


def test_warnings_point_at_the_line_that_builds_the_optimizer():
    model = nn.Sequential(nn.Linear(4, 3), nn.PReLU())
    with pytest.warns(UserWarning, match="'1.weight'") as caught:
        KFAC(model)
    assert [warning.filename for warning in caught] == [__file__]


def test_a_contradiction_is_said_once():
    model, x = mlp(), data()[0]
    optimizer = KFAC(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        F.triplet_margin_loss(model(x), model(x + 0.1), model(x.flip(0)), margin=5.0).backward()
        optimizer.step()
        train_step(optimizer, model, x, torch.randn(8, 3, dtype=DOUBLE), F.mse_loss)
    assert len([w for w in caught if "likelihood" in str(w.message)]) == 1


@pytest.mark.parametrize("name", ["nesterov", "maximize", "decoupled_weight_decay", "foreach"])
def test_a_switch_is_true_or_false(name):
    with pytest.raises(ValueError, match=f"{name} must be True or False, got 'yes'"):
        KFAC(mlp(), **{name: "yes"})


def test_a_seed_where_the_generator_belongs():
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator.*manual_seed"):
        KFAC(mlp(), generator=3)


def test_a_model_that_another_wrapper_shards_is_refused():
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._fsdp_wrapped_module = mlp()  # the name that FullyShardedDataParallel gives to what it wraps

    with pytest.raises(ValueError, match="FullyShardedDataParallel"):
        KFAC(nn.Sequential(Wrapper()))


def test_no_false_alarm_for_the_other_likelihoods(recwarn):
    x, _ = data(dtype=torch.float32)
    fit(mlp(torch.float32), x, torch.randn(8, 3), F.mse_loss, likelihood="gaussian")
    fit(mlp(torch.float32), x, torch.rand(8, 3).round(), F.binary_cross_entropy_with_logits, likelihood="bernoulli")
    assert [str(w.message) for w in recwarn] == []


def test_no_false_alarm_in_low_precision(recwarn):
    model, (x, y) = mlp(torch.float32), data(dtype=torch.float32)
    optimizer = KFAC(model)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    fit(mlp(torch.bfloat16), x.bfloat16(), y, F.cross_entropy)
    assert [str(w.message) for w in recwarn if "likelihood" in str(w.message)] == []


# ---------------------------------------------------------------------------------------------
# NaN, inf, failed factorisations


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal"])
def test_a_poisoned_batch_never_reaches_the_curvature(curvature, fisher, poison):
    model, (x, y) = mlp(), data()
    optimizer = bare_kfac(model, curvature=curvature, fisher=fisher)
    train_step(optimizer, model, x, y)
    blocks = {n: v.to_dense().clone() for n, v in optimizer.curvature.items()}
    bad = x.clone()
    bad[2, 1] = poison
    optimizer.zero_grad()
    F.cross_entropy(model(bad), y).backward()
    optimizer.precondition_gradients_()
    assert optimizer.dropped_estimates == 1
    for name, view in optimizer.curvature.items():
        close(view.to_dense(), blocks[name])
    train_step(optimizer, model, x, y)
    assert optimizer.dropped_estimates == 1
    assert all(v.to_dense().isfinite().all() for v in optimizer.curvature.values())


def test_only_the_poisoned_pass_of_a_step_is_dropped():
    from tests import reference

    model, (x, _) = mlp(), data()
    expected = reference.kronecker_factors(model, x, "0")
    optimizer = bare_kfac(model)
    model(x[:5])
    model(torch.full_like(x, NAN))
    model(x[5:])
    optimizer.step()
    assert optimizer.dropped_estimates == 1
    close(optimizer.curvature["0"].to_dense(), torch.kron(*expected))


def test_a_hidden_overflow_with_finite_outputs_is_dropped():
    """The outputs are finite, the second moments of the inputs are not."""
    model, x = mlp(torch.float32), torch.full((8, 4), 1e30)
    optimizer = KFAC(model, lr=0.0)
    assert model(x).isfinite().all()
    optimizer.step()
    assert optimizer.dropped_estimates == 1
    model(torch.randn(8, 4))
    optimizer.step()
    assert all(v.to_dense().isfinite().all() for v in optimizer.curvature.values())


def test_an_empty_batch_is_harmless():
    model, (x, y) = mlp(), data()
    optimizer = bare_kfac(model, lr=0.1)
    train_step(optimizer, model, x, y)
    optimizer.zero_grad()
    model(x[:0]).sum().backward()
    optimizer.step()
    train_step(optimizer, model, x, y)
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(v.to_dense().isfinite().all() for v in optimizer.curvature.values())


def broken(*_args, **_kwargs):
    raise torch.linalg.LinAlgError("the algorithm failed to converge")


def no_factorisation(matrix: torch.Tensor, **_kwargs):
    return torch.full_like(matrix, NAN), torch.ones(matrix.shape[:-2], dtype=torch.int32)


@pytest.mark.parametrize(("curvature", "style"), [("kronecker", "factored"), ("kronecker", "exact"), ("eigenbasis", "factored")])
def test_a_failing_factorisation_keeps_the_old_inverse_and_in_the_end_names_the_layer(monkeypatch, curvature, style):
    model, (x, y) = mlp(torch.float32), data(dtype=torch.float32)
    optimizer = bare_kfac(model, lr=1e-3, curvature=curvature, damping_style=style, factor_dtype=torch.float32)
    train_step(optimizer, model, x, y)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", no_factorisation)
    monkeypatch.setattr(torch.linalg, "eigh", broken)
    monkeypatch.setattr(torch.linalg, "cholesky", broken)
    train_step(optimizer, model, x, y)
    assert all(p.isfinite().all() for p in model.parameters())
    with pytest.raises(RuntimeError, match=r"(?s)'?[02]'?.*damping"):
        for _ in range(100):
            train_step(optimizer, model, x, y)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_failing_cholesky_is_retried_in_double_precision(monkeypatch):
    model, (x, y) = mlp(torch.float32), data(dtype=torch.float32)
    twin = mlp(torch.float32)
    options = {"lr": 0.1, "factor_dtype": torch.float32}
    train_step(bare_kfac(twin, **options), twin, x, y)
    original = torch.linalg.cholesky_ex
    monkeypatch.setattr(
        torch.linalg,
        "cholesky_ex",
        lambda matrix, **k: no_factorisation(matrix) if matrix.dtype == torch.float32 else original(matrix, **k),
    )
    train_step(bare_kfac(model, **options), model, x, y)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)


def test_a_matrix_of_huge_and_tiny_scales_stays_finite():
    """Inputs over 16 orders of magnitude: the factor's condition number is beyond float32."""
    model = nn.Sequential(nn.Linear(6, 3))
    x, y = torch.randn(32, 6) * 10.0 ** torch.tensor([-8.0, -4, 0, 2, 4, 8]), torch.randn(32, 3)
    optimizer = KFAC(model, lr=0.1, likelihood="gaussian", kl_clip=None)
    before = weights(model)
    for _ in range(5):
        train_step(optimizer, model, x, y, F.mse_loss)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(before["0.weight"], model[0].weight)


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal"])
@pytest.mark.parametrize("style", ["factored", "exact"])
def test_a_saturated_model_without_any_curvature_still_moves(curvature, style):
    """All probabilities are 0 or 1 in float32: the sampled Fisher is exactly zero, the gradient is not."""
    model = nn.Sequential(nn.Linear(6, 3))
    x, y = 1e4 * torch.randn(32, 6), torch.randint(3, (32,))
    optimizer = KFAC(model, lr=0.1, curvature=curvature, damping_style=style)
    losses = [train_step(optimizer, model, x, y) for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]


def test_nan_gradients_with_a_sound_forward_leave_the_curvature_alone():
    model, (x, y) = mlp(), data()
    optimizer = bare_kfac(model, lr=0.0)
    train_step(optimizer, model, x, y)
    F.cross_entropy(model(x), y).backward()
    model[0].weight.grad[0, 0] = NAN
    optimizer.step()
    assert all(v.to_dense().isfinite().all() for v in optimizer.curvature.values())
    assert math.isfinite(float(optimizer.curvature["0"].to_dense().sum()))


def test_an_unknown_option_of_a_group_is_kept_and_said():
    model = mlp()
    with pytest.warns(UserWarning, match=r"'dampng' in a parameter group is no option of KFAC"):
        optimizer = KFAC(model, [{"params": model.parameters(), "dampng": 0.1}])
    assert optimizer.param_groups[0]["dampng"] == 0.1


@pytest.mark.parametrize("group", ["x", 0, object()])
def test_a_process_group_that_is_none(group):
    with pytest.raises(TypeError, match=r"KFAC: process_group must be a torch.distributed.ProcessGroup .*new_group"):
        KFAC(mlp(), process_group=group)
