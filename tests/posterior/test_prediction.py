"""``predict`` against a plain loop over draws, and what it must leave alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from kfac_opt.bayes.linearized import linearized_predict
from kfac_opt.bayes.posterior import Posterior, Width
from kfac_opt.bayes.prediction import mixture, predict
from kfac_opt.likelihoods import Categorical
from tests.posterior.helpers import WIDTH
from tests.support import assert_same, close, data, weights

NARROW = Width(ess=100.0, prior_precision=30.0)


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)).to(dtype).eval()


def around(model: nn.Module, likelihood: Any = "categorical", width: Width = NARROW) -> Posterior:
    return Posterior.from_model(model, [], width=width, likelihood=likelihood)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def plain_loop(model: nn.Module, posterior: Posterior, x: Tensor, number: int) -> Tensor:
    source = generator()
    draws = [posterior.sample(source) for _ in range(number)]
    with torch.no_grad():
        return torch.stack([functional_call(model, draw, (x,)).softmax(-1) for draw in draws])


@pytest.mark.parametrize("vectorize", ["auto", "loop", "vmap"])
def test_prediction_is_the_mean_of_the_probabilities_of_the_draws_in_order(vectorize: Any):
    model, (x, _) = net(), data(8)
    posterior = around(model)
    expected = plain_loop(model, posterior, x, 37)  # more than two chunks of vmap
    prediction = predict(model, posterior, x, 37, generator(), vectorize, keep_samples=True)
    close(prediction.probabilities, expected.mean(0))
    close(prediction.samples, expected)
    close(prediction.variance, expected.var(0, correction=0))
    entropy = -(expected.mean(0) * expected.mean(0).log()).sum(-1)
    expected_entropy = -(expected * expected.log()).sum(-1).mean(0)
    close(prediction.entropy, entropy)
    close(prediction.expected_entropy, expected_entropy)
    close(prediction.mutual_information, entropy - expected_entropy)
    assert bool((prediction.mutual_information > 0).all())
    close(prediction.entropy, prediction.expected_entropy + prediction.mutual_information)


def test_samples_are_kept_on_request_only():
    model = net()
    assert predict(model, around(model), data()[0], 2).samples is None


@pytest.mark.parametrize("vectorize", ["loop", "vmap"])
@pytest.mark.parametrize("with_targets", [True, False])
def test_a_loader_gives_the_result_of_all_inputs_at_once(vectorize: Any, with_targets: bool):
    model, (x, y) = net(), data(10)
    posterior = around(model)
    batches = [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])] if with_targets else [x[:4], x[4:8], x[8:]]
    whole = predict(model, posterior, x, 5, generator(), vectorize, keep_samples=True)
    # An iterator can be read only once.
    streamed = predict(model, posterior, iter(batches), 5, generator(), vectorize, keep_samples=True)
    for part in ("probabilities", "entropy", "expected_entropy", "mutual_information", "samples"):
        close(getattr(streamed, part), getattr(whole, part))


def test_a_shuffled_data_loader_is_read_once_and_in_its_order():
    model, (x, _) = net(), data(12)
    posterior = around(model)
    loader = torch.utils.data.DataLoader(x, batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(1))
    seen = torch.cat(list(torch.utils.data.DataLoader(x, 5, True, generator=torch.Generator().manual_seed(1))))
    close(
        predict(model, posterior, loader, 3, generator()).probabilities,
        predict(model, posterior, seen, 3, generator()).probabilities,
    )


def test_the_given_generator_advances_by_one_draw_per_sample():
    model, (x, _) = net(), data(6)
    posterior, source, counted = around(model), generator(), generator()
    predict(model, posterior, [x[:2], x[2:]], 4, source)
    for _ in range(4):
        posterior.sample(counted)
    assert torch.equal(source.get_state(), counted.get_state())


@pytest.mark.parametrize("vectorize", ["loop", "vmap"])
@pytest.mark.parametrize("number", [1, 36, 37])
def test_antithetic_draws_are_pairs_around_the_mean_and_an_odd_last_one_stands_alone(number: int, vectorize: Any):
    model, (x, _) = net(), data(8)
    posterior, source, mean = around(model), generator(), around(model).mean
    expected = []
    with torch.no_grad():
        for draw in [posterior.sample(source) for _ in range((number + 1) // 2)]:
            mirrored = {name: 2 * mean[name] - value for name, value in draw.items()}
            expected += [functional_call(model, weights, (x,)).softmax(-1) for weights in (draw, mirrored)]
    drawn = generator()
    prediction = predict(model, posterior, x, number, drawn, vectorize, antithetic=True, keep_samples=True)
    close(prediction.samples, torch.stack(expected[:number]))
    close(prediction.probabilities, torch.stack(expected[:number]).mean(0))
    assert torch.equal(drawn.get_state(), source.get_state())  # half the random numbers


def test_antithetic_pairs_predict_the_mean_of_a_linear_model_without_error():
    from kfac_opt.likelihoods import Gaussian

    model, (x, _) = nn.Linear(4, 2, dtype=torch.float64), data()
    posterior = around(model, Gaussian(variance=0.25), WIDTH)
    independent, paired = (
        predict(model, posterior, [x[:3], x[3:]], 10, generator(), antithetic=antithetic) for antithetic in (False, True)
    )
    close(paired.probabilities, model(x).detach())
    assert bool(((independent.probabilities - model(x)).abs() > 1e-3).any())


def test_without_a_generator_the_posterior_goes_on_drawing():
    model, (x, _) = net(), data()
    posterior = around(model)
    first, second = (predict(model, posterior, x, 2).probabilities for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(predict(model, around(model), x, 2).probabilities, first)


@pytest.mark.parametrize("vectorize", ["loop", "vmap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_buffers_mode_and_gradients_are_left_bit_for_bit(vectorize: Any, dtype: torch.dtype):
    model, (x, _) = net(dtype), data(dtype=dtype)
    before, storages = {k: v.clone() for k, v in model.state_dict().items()}, [p.data_ptr() for p in model.parameters()]
    model[0].weight.grad = torch.ones_like(model[0].weight)
    prediction = predict(model, around(model), x, 3, vectorize=vectorize)
    assert_same(dict(model.state_dict()), before)
    assert [p.data_ptr() for p in model.parameters()] == storages
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert not model.training
    assert prediction.probabilities.dtype == torch.float32
    assert not prediction.probabilities.requires_grad


class Failing(nn.Module):
    """Raises at the third forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3, dtype=torch.float64)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise KeyError("third")
        return self.inner(x)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_exception_in_the_model_leaves_the_weights_bit_identical(error: type[BaseException], monkeypatch: Any):
    model, (x, _) = Failing(), data()
    if error is KeyboardInterrupt:
        monkeypatch.setattr(model, "calls", 2)
        monkeypatch.setattr(model.inner, "forward", lambda x: (_ for _ in ()).throw(KeyboardInterrupt))
        model.calls = 5
    before = weights(model)
    with pytest.raises(error):
        predict(model, around(model), x, 5, vectorize="loop")
    assert_same(weights(model), before)


def test_training_mode_is_kept():
    model = net().train()
    predict(model, around(model), data()[0], 2)
    assert model.training
    assert model[0].training


def test_auto_falls_back_to_the_loop_where_vmap_cannot_run_the_model():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            logits = self.inner(x)
            return logits if float(logits.sum()) > 0 else -logits

    model, (x, _) = Branching().eval(), data(4)
    posterior = around(model)
    with pytest.raises(RuntimeError, match="vmap"):
        predict(model, posterior, x, 3, generator(), "vmap")
    auto, loop = (predict(model, posterior, x, 3, generator(), v).probabilities for v in ("auto", "loop"))
    close(auto, loop)


class HiddenWeight(nn.Module):
    """The output layer has the table's weight, kept in a list so that it is registered once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 4).double()
        self.shared = [self.table.weight]

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.table(tokens).mean(1).tanh(), self.shared[0])


def test_a_weight_that_vmap_would_leave_as_it_is_sends_the_prediction_through_the_loop():
    model, tokens = HiddenWeight().eval(), torch.arange(6).view(2, 3)
    before, generator = weights(model), lambda: torch.Generator().manual_seed(1)
    loop = predict(model, around(model), tokens, 5, generator(), "loop")
    close(predict(model, around(model), tokens, 5, generator()).probabilities, loop.probabilities)
    with pytest.raises(RuntimeError, match=r"not numbers.*outside its parameters.*vectorize='loop'"):
        predict(model, around(model), tokens, 5, generator(), "vmap")
    with pytest.raises(ValueError, match=r"linearized prediction: the outputs are not numbers.*outside its parameters"):
        linearized_predict(model, around(model), tokens)
    assert_same(weights(model), before)


def test_a_posterior_of_another_model_is_refused_with_names_and_shapes():
    posterior = around(net())
    wider = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(), nn.Linear(7, 3)).double()
    with pytest.raises(ValueError, match=r"another model: '0.weight' is \[6, 4\] in the posterior and \[7, 4\] in the model"):
        predict(wider, posterior, data()[0])
    with pytest.raises(ValueError, match=r"'0.weight' \[6, 4\] is not in the model"):
        predict(nn.Sequential(), posterior, data()[0])
    deeper = nn.Sequential(*net(), nn.ReLU(), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"'6.weight' \[3, 3\] of the model is not in the posterior"):
        predict(deeper, posterior, data()[0])


def test_frozen_parameters_keep_their_values_and_may_be_trainable_later():
    model, (x, _) = net(), data()
    model[0].requires_grad_(False)
    posterior = around(model)
    model[0].requires_grad_(True)
    prediction = predict(model, posterior, x, 3, generator())
    close(prediction.probabilities, plain_loop(model, posterior, x, 3).mean(0))


def test_a_compiled_model_is_recognised():
    model, (x, _) = net(), data()
    posterior = around(model)
    compiled = torch.compile(model, backend="eager")
    close(
        predict(compiled, posterior, x, 3, generator(), "loop").probabilities,
        predict(model, posterior, x, 3, generator(), "loop").probabilities,
    )


def test_gaussian_likelihood_gives_mean_and_spread_of_the_outputs():
    from kfac_opt.likelihoods import Gaussian

    model, (x, _) = nn.Linear(4, 2, dtype=torch.float64), data()
    posterior = around(model, Gaussian(variance=0.25), WIDTH)
    prediction = predict(model, posterior, x, 200, generator(), keep_samples=True)
    close(prediction.probabilities, prediction.samples.mean(0))
    close(prediction.variance, prediction.samples.var(0, correction=0))
    noise, total = (
        torch.distributions.Normal(0.0, 0.5),
        torch.distributions.Normal(0.0, (prediction.variance + 0.25).sqrt()),
    )
    close(prediction.expected_entropy, noise.entropy().double().expand(8, 2), rtol=1e-6)
    close(prediction.entropy, total.entropy())


def test_bernoulli_entropy_is_that_of_each_output():
    model, (x, _) = nn.Linear(4, 2, dtype=torch.float64), data()
    prediction = predict(model, around(model, "bernoulli"), x, 10, generator(), keep_samples=True)
    close(prediction.entropy, torch.distributions.Bernoulli(prediction.probabilities).entropy())
    close(prediction.expected_entropy, torch.distributions.Bernoulli(prediction.samples).entropy().mean(0))


def test_sequences_keep_their_time_dimension():
    model = nn.Linear(4, 3, dtype=torch.float64)
    prediction = predict(model, around(model), torch.randn(2, 5, 4, dtype=torch.float64), 3)
    assert prediction.probabilities.shape == (2, 5, 3)
    assert prediction.mutual_information.shape == (2, 5)


class ClassesFirst(nn.Module):
    """Logits ``[classes, batch]``, in one buffer for all calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3, dtype=torch.float64)
        self.register_buffer("logits", torch.zeros(3, 8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.copy_(self.layer(x).T)


class Reused(ClassesFirst):
    """Logits ``[batch, classes]``, in one buffer for all calls, as a captured graph returns them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).T


@pytest.mark.parametrize("kind", [ClassesFirst, Reused])
def test_outputs_in_a_buffer_of_the_model_and_classes_in_the_first_dimension(kind: type[ClassesFirst]):
    torch.manual_seed(2)
    model, (x, _) = kind(), data(8)
    plain = Posterior.from_model(model.layer, [], width=NARROW)
    expected = predict(model.layer, plain, x, 21, generator(), keep_samples=True)
    dimension = 0 if kind is ClassesFirst else 1
    posterior = around(model, Categorical(class_dim=dimension))
    found = predict(model, posterior, x, 21, generator(), "loop", keep_samples=True)
    close(found.probabilities.movedim(dimension, -1), expected.probabilities)
    close(found.samples.movedim(1 + dimension, -1), expected.samples)
    for part in ("entropy", "expected_entropy"):
        close(getattr(found, part), getattr(expected, part))


class Wrapped(nn.Module):
    """Returns its logits the way a library does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": self.inner(x)}


@pytest.mark.parametrize("vectorize", ["loop", "vmap"])
def test_logits_are_picked_and_keyword_inputs_understood(vectorize: Any):
    model, (x, _) = Wrapped(net()).eval(), data()
    posterior = around(model)
    prediction = predict(model, posterior, {"x": x}, 3, generator(), vectorize, outputs=lambda result: result["scores"])
    expected = predict(model.inner, around(model.inner), x, 3, generator(), vectorize)
    close(prediction.probabilities, expected.probabilities)
    with pytest.raises(TypeError, match="the model returned dict"):
        predict(model, posterior, x, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples must be an integer >= 1, got 0"),
        ({"num_samples": 2.5}, "num_samples must be an integer >= 1, got 2.5"),
        ({"vectorize": "fast"}, "vectorize must be 'auto', 'loop' or 'vmap', got 'fast'"),
        ({"x": []}, "the loader has no batches"),
    ],
)
def test_bad_arguments_are_explained(arguments: dict[str, Any], message: str):
    model = net()
    with pytest.raises(ValueError, match=message):
        predict(model, around(model), **{"x": data()[0], **arguments})


def test_whole_numbers_of_numpy_are_numbers_of_samples():
    numpy = pytest.importorskip("numpy")
    model = net()
    assert len(predict(model, around(model), data()[0], numpy.int64(3), keep_samples=True).samples) == 3


def test_a_seed_in_place_of_a_generator_is_explained():
    model = net()
    with pytest.raises(TypeError, match=r"predict: generator must be a torch.Generator or None, got 1234.*manual_seed"):
        predict(model, around(model), data()[0], generator=1234)  # type: ignore[arg-type]


def test_averaging_lowers_the_likelihood_loss_of_overconfident_draws():
    model, (x, y) = nn.Linear(4, 3, dtype=torch.float64), data(64)
    posterior = around(model, width=Width(1.0, 0.05))
    prediction = predict(model, posterior, x, 30, generator(), keep_samples=True)
    single = torch.stack([F.nll_loss(sample.log(), y) for sample in prediction.samples])
    assert float(F.nll_loss(prediction.probabilities.log(), y)) < float(single.mean())


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_a_mixture_is_the_prediction_of_all_draws_together(likelihood: Any):
    model, (x, _) = net(), data(8)
    other = net()
    for parameter in other.parameters():
        parameter.data.mul_(-0.7)
    parts = [predict(m, around(m, likelihood), x, 5, generator(), keep_samples=True) for m in (model, other)]
    joined = mixture(parts, likelihood)
    together = torch.cat([part.samples for part in parts])
    close(joined.samples, together)
    close(joined.probabilities, together.mean(0))
    close(joined.variance, together.var(0, correction=0))
    close(joined.expected_entropy, (parts[0].expected_entropy + parts[1].expected_entropy) / 2)
    if likelihood == "categorical":
        mean = together.mean(0)
        close(joined.entropy, -(mean * mean.log()).sum(-1))
    if likelihood == "gaussian":
        close(joined.entropy, 0.5 * (2 * torch.pi * torch.e * (1 + together.var(0, correction=0))).log())
    assert mixture([predict(model, around(model, likelihood), x, 5, generator()), parts[1]], likelihood).samples is None


def test_a_mixture_of_nothing_or_of_other_inputs_is_refused():
    model = net()
    parts = [predict(model, around(model), data(number)[0], 2, generator()) for number in (8, 5)]
    with pytest.raises(ValueError, match=r"got no prediction"):
        mixture([])
    with pytest.raises(ValueError, match=r"shapes \[\(8, 3\), \(5, 3\)\]"):
        mixture(parts)
