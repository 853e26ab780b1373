"""Hugging Face: ``Trainer`` and ``accelerate`` train small models with KFAC."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from kfac_opt import KFAC
from tests.support import assert_same, data, mlp, weights

pytestmark = pytest.mark.filterwarnings("ignore")

VOCABULARY, LENGTH = 11, 8


class Counting(Dataset):
    """Sequences that count upwards modulo the vocabulary: each token tells the next."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(LENGTH) + index) % VOCABULARY
        return {"input_ids": tokens, "labels": tokens}


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def test_gpt2_has_kronecker_blocks_for_its_conv1d_layers_and_a_diagonal_for_the_tied_embedding():
    model = gpt2()
    optimizer = KFAC(model)
    for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2"):
        assert f"transformer.h.1.{layer}" in optimizer.curvature
    assert "transformer.wte.weight" in optimizer.curvature
    assert "transformer.wpe" in optimizer.curvature


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_trains_gpt2(accumulation, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = gpt2()
    optimizer = KFAC(model, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_train_epochs=5 * accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=1.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Counting(), optimizers=(optimizer, scheduler))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    assert optimizer.dropped_estimates == 0
    assert optimizer.curvature["transformer.h.0.mlp.c_fc"].to_dense().abs().sum() > 0
    assert int(optimizer.state[model.transformer.wte.weight]["step"]) == 40


def test_trainer_checkpoint_resumes_bit_for_bit(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def run(folder: str, resume: str | None, steps: int) -> nn.Module:
        model = gpt2()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        optimizer = KFAC(model, lr=0.05)
        arguments = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=16, max_steps=steps, report_to=[], use_cpu=True,
            save_strategy="steps", save_steps=5, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Counting(), optimizers=(optimizer, scheduler))
        trainer.train(resume_from_checkpoint=resume)
        return model

    straight = run(str(tmp_path / "a"), None, 10)
    resumed = run(str(tmp_path / "a"), str(tmp_path / "a" / "checkpoint-5"), 10)
    assert_same(weights(resumed), weights(straight))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_accelerate(precision, accumulation):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulation)
    model = mlp(torch.float32)
    optimizer = KFAC(model, lr=0.1, update_scale="natural")
    x, _ = data(64, dtype=torch.float32)
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16)
    model, wrapped, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(8):
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                wrapped.zero_grad()
                loss = F.cross_entropy(model(inputs), labels)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                wrapped.step()
            losses.append(loss.item())
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert optimizer.dropped_estimates == 0
    assert all(int(optimizer.state[p]["step"]) == 32 // accumulation for p in model.parameters())


def test_accelerate_equals_the_plain_loop():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    results = []
    for through in (False, True):
        model = mlp(torch.float32)
        optimizer = KFAC(model, lr=0.1)
        net, wrapped = model, optimizer
        if through:
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
            accelerator = accelerate.Accelerator(cpu=True)
            net, wrapped = accelerator.prepare(model, optimizer)
        for step in range(6):
            x, y = data(seed=step, dtype=torch.float32)
            wrapped.zero_grad()
            loss = F.cross_entropy(net(x), y)
            accelerator.backward(loss) if through else loss.backward()
            wrapped.step()
        results.append(weights(model))
    assert_same(*results)
