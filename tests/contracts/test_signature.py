"""The names that users and other parts of the package build on."""

from __future__ import annotations

import inspect

import torch

import kfac_opt
from kfac_opt import KFAC, likelihoods

FIXED = {
    "params": None,
    "weight_decay": 0.0,
    "power": None,
    "likelihood": "categorical",
    "fisher": "mc",
    "label_samples": 1,
    "curvature": "kronecker",
    "damping_style": "factored",
    "damping_scale": None,
    "nesterov": True,
    "ramp_steps": None,
    "factor_decay": 0.95,
    "weight_sharing": "expand",
    "decoupled_weight_decay": True,
    "outputs": None,
    "loss_reduction": "mean",
    "factor_dtype": torch.float32,
    "maximize": False,
    "foreach": None,
    "generator": None,
    "process_group": None,
}
MEASURED = [
    "lr",
    "momentum",
    "damping",
    "factor_interval",
    "inverse_interval",
    "kl_clip",
    "max_relative_update",
    "max_factor_dim",
]

GROUPED = {
    "lr",
    "momentum",
    "damping",
    "power",
    "weight_decay",
    "factor_decay",
    "factor_interval",
    "inverse_interval",
    "kl_clip",
    "max_relative_update",
    "curvature",
}


def test_model_first_then_params_and_the_four_numbers_by_position():
    parameters = list(inspect.signature(KFAC).parameters.values())
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["model", "params", "lr", "momentum", "damping", "weight_decay"]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[len(positional) :])


def test_defaults_that_the_contract_fixes():
    parameters = inspect.signature(KFAC).parameters
    assert {name: parameters[name].default for name in FIXED} == FIXED


def test_defaults_that_were_measured_exist_and_are_explained():
    parameters = inspect.signature(KFAC).parameters
    for name in MEASURED:
        assert parameters[name].default is not inspect.Parameter.empty
        assert f"{name}:" in KFAC.__doc__


def test_every_argument_is_documented():
    for name in inspect.signature(KFAC).parameters:
        assert name in KFAC.__doc__, name


def test_public_names():
    assert {"KFAC", "register_layer"} <= set(kfac_opt.__all__)
    for name in kfac_opt.__all__:
        assert getattr(kfac_opt, name).__doc__
    for name in ("Categorical", "Bernoulli", "Gaussian"):
        assert issubclass(getattr(likelihoods, name), likelihoods.Likelihood)


def test_hyper_parameters_that_may_differ_per_group_are_in_the_groups():
    group = KFAC(torch.nn.Linear(2, 2)).param_groups[0]
    assert GROUPED.issubset(group)
