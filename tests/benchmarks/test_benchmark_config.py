"""Configs: typed, overridable, and no unknown key passes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from benchmarks.common.config import LOCAL, ConfigError, load_config, parse_arguments, resolved
from benchmarks.compare_optimizers import ComparisonConfig
from benchmarks.robustness import RobustnessConfig
from benchmarks.step_parts import PartsConfig
from benchmarks.step_time import StepTimeConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHIPPED = [
    (kind, path)
    for kind, folder in (
        (ComparisonConfig, "compare_optimizers"),
        (RobustnessConfig, "robustness"),
        (StepTimeConfig, "step_time"),
        (PartsConfig, "step_parts"),
    )
    for path in sorted((CONFIGS / folder).glob("*.yaml"))
]


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    kind: Literal["small", "large"] = "small"

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError(f"rate must be > 0, got {self.rate}")


@dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner = field(default_factory=Inner)
    limit: int | None = None
    sizes: list[int] = field(default_factory=list)
    free: dict[str, Any] = field(default_factory=dict)
    out: Path = field(default=Path("out"), metadata=LOCAL)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("steps: 5\ninner: {rate: 1e-3}\nfree: {lr: 2e-4, name: 3e}\n")
    return path


def test_exponents_without_a_point_are_numbers(config_file: Path):
    config = load_config(Outer, config_file)
    assert config.inner.rate == 1e-3
    assert config.free == {"lr": 2e-4, "name": "3e"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--set", "inner.rate=0.5"], 0.5),
        (["--inner.rate", "0.5"], 0.5),
        (["--inner.rate=5e-1"], 0.5),
        (["--inner.rate", "1"], 1.0),
    ],
)
def test_every_value_can_be_overridden_on_the_command_line(config_file: Path, arguments: list[str], expected: float):
    config = parse_arguments(Outer, ["--config", str(config_file), *arguments], description="test")
    assert config.inner.rate == expected
    assert config.steps == 5


def test_negative_values_and_lists_can_be_given_as_flags(config_file: Path):
    config = parse_arguments(Outer, ["--config", str(config_file), "--limit", "-3", "--sizes", "[1, 2]"], description="test")
    assert (config.limit, config.sizes) == (-3, [1, 2])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("inner.rat", 1.0), r"key 'inner\.rat': .*Did you mean: 'rate'\? Allowed: kind, rate\."),
        (("stepz", 1), r"key 'stepz': .*Did you mean: 'steps'\? Allowed: free, inner, limit, out, sizes, steps\."),
        (("steps", 1.5), r"key 'steps': Value '1\.5' of type 'float' could not be converted to Integer"),
        (("steps", True), r"key 'steps': Value 'True' of type 'bool' could not be converted to Integer"),
        (("inner.rate", "fast"), r"key 'inner\.rate': Value 'fast' .* could not be converted to Float"),
        (("inner.kind", "medium"), r"key 'inner\.kind': Invalid value 'medium', expected one of \['small', 'large'\]"),
        (("inner", 3), r"int is not a subclass of Inner"),
        (("sizes", 3), r"key 'sizes': Invalid value assigned"),
        (("sizes", [1, "x"]), r"key 'sizes\[1\]': Value 'x' .* could not be converted to Integer"),
        (("free", 3), r"key 'free': Cannot assign int to Dict"),
        (("inner.rate", -1.0), r"rate must be > 0, got -1\.0"),
        (("steps.deep", 1), r"steps"),
    ],
)
def test_wrong_values_are_named_with_what_is_allowed(config_file: Path, override: tuple[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(Outer, config_file, [override])


def test_a_mapping_that_is_given_replaces_the_default_one():
    @dataclass(frozen=True)
    class Many:
        parts: dict[str, Inner] = field(default_factory=lambda: {"first": Inner(), "second": Inner(0.5)})

    assert set(load_config(Many, None).parts) == {"first", "second"}
    assert set(load_config(Many, None, [("parts", {"third": {}})]).parts) == {"third"}


def test_a_missing_key_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="key 'steps' is missing"):
        load_config(Outer, None)


def test_a_missing_file_and_a_file_without_keys_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(Outer, tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        load_config(Outer, tmp_path / "list.yaml")


def test_a_key_that_stands_there_twice_is_named(tmp_path: Path):
    (tmp_path / "twice.yaml").write_text("steps: 5\nfree:\n  lr: 1\n  lr: 2\n")
    with pytest.raises(ConfigError, match=r"twice\.yaml.*found duplicate key lr.*line 4"):
        load_config(Outer, tmp_path / "twice.yaml")


@pytest.mark.parametrize(
    "arguments", [["--stepz", "1"], ["5"], ["--steps"], ["--set", "steps"], ["--steps", "--limit"], ["--sizes", "[1"]]
)
def test_the_command_line_ends_with_a_message_instead_of_a_traceback(
    config_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(Outer, ["--config", str(config_file), *arguments], description="test")
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip()


def test_paths_of_one_machine_are_not_stored_with_results(config_file: Path):
    config = load_config(Outer, config_file, [("out", "/somewhere/private")])
    assert resolved(config) == {
        "steps": 5,
        "inner": {"rate": 1e-3, "kind": "small"},
        "limit": None,
        "sizes": [],
        "free": {"lr": 2e-4, "name": "3e"},
    }
    assert config.out == Path("/somewhere/private")


@pytest.mark.parametrize(("kind", "path"), SHIPPED, ids=[f"{path.parent.name}/{path.stem}" for _, path in SHIPPED])
def test_shipped_configs_are_valid(kind: type, path: Path):
    config = load_config(kind, path)
    assert load_config(kind, None, list(resolved(config).items())) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("reference", "rmsprop"), "key 'reference' must be one of the optimizers"),
        (("optimizers.rmsprop", {}), "unknown optimizer 'rmsprop'; allowed: sgd, adamw"),
        (("optimizers.sgd.search.lr", {"low": 1.0, "high": 0.1}), "a search range needs finite low < high"),
        (("optimizers.sgd.search.lr", {"low": 0.0, "high": 0.1, "log": True}), "logarithmic range needs low > 0"),
        (("shortened", {"lion": 0.5}), r"shortened: 'lion' is none of the optimizers \(sgd, adamw"),
        (("shortened", {"kfac": 1.5}), r"share of the steps must be in \(0, 1\), got 1.5 for kfac"),
        (("num_seeds", 0), "num_seeds must be >= 1, got 0"),
        (("search.num_trials", 0), "num_trials must be >= 1, got 0"),
        (("task.steps", 0), "steps must be >= 1, got 0"),
    ],
)
def test_wrong_comparisons_are_refused(override: tuple[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(ComparisonConfig, CONFIGS / "compare_optimizers" / "digits_mlp.yaml", [override])
