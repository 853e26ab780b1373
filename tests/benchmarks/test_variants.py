"""The script that says what settings cost in convergence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import compare_optimizers, variants

TINY = """
name: tiny
task:
  data: {name: digits, flatten: true, num_train: 200, num_test: 50}
  model: {name: mlp, sizes: [64, 12, 12, 10]}
  steps: 12
  batch_size: 32
  eval_interval: 4
num_seeds: 2
variants:
  plain: {}
  again: {factor_decay: 0.95}
  blocks: {max_block_dim: 8}
  ekfac: {optimizer: ekfac, damping_style: split}
  broken: {lr: 1.0e+30, kl_clip: null, max_relative_update: null}
"""


def test_variants_are_trained_once_and_held_against_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "tiny.yaml").write_text(TINY)
    arguments = ["--config", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out"), "--keep", str(tmp_path / "kept")]
    summaries = variants.main(arguments).content["summaries"]
    results = {summary["name"]: summary for summary in summaries}
    assert results["plain"]["final_loss"] == results["again"]["final_loss"]  # the default, written out
    assert results["plain"]["final_loss"] != results["blocks"]["final_loss"]
    assert results["plain"]["final_loss"] != results["ekfac"]["final_loss"]
    assert 12 in results["plain"]["reach_steps"]  # the first one's own median is the target
    assert [summary["num_diverged"] for summary in summaries] == [0, 0, 0, 0, 2]
    assert [summary["num_trials"] for summary in summaries] == [0] * 5
    assert "broken" in capsys.readouterr().out
    kept = json.loads((tmp_path / "kept" / "tiny.json").read_text())
    assert {"versions", "machine", "config", "summaries"} <= kept.keys()
    monkeypatch.setattr(compare_optimizers, "train", lambda *_, **__: pytest.fail("a finished run was run again"))
    assert json.dumps(variants.main(arguments).content["summaries"]) == json.dumps(summaries)


def test_a_config_without_variants_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "tiny.yaml").write_text(TINY[: TINY.index("variants")] + "variants: {}\n")
    with pytest.raises(SystemExit):
        variants.main(["--config", str(tmp_path / "tiny.yaml")])
    assert "variants must not be empty" in capsys.readouterr().err
