"""
Hugging Face Trainer
====================

A tiny BERT with random weights learns whether the first token comes again. The Trainer takes the optimizer as it takes any
other; ``KFAC`` finds the logits in the model's output.
"""

import tempfile

import matplotlib.pyplot as plt
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from kfac_opt import KFAC

torch.manual_seed(0)
tokens = torch.randint(1, 20, (1024, 12))
labels = (tokens[:, 1:] == tokens[:, :1]).any(1).long()
data = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels)]

config = BertConfig(
    vocab_size=20, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, num_labels=2,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


def train(make_optimizer):
    torch.manual_seed(1)
    model = BertForSequenceClassification(config)
    optimizer = make_optimizer(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=150, per_device_train_batch_size=64, logging_steps=5, report_to=[],
            disable_tqdm=True, save_strategy="no", use_cpu=True,
        )  # fmt: skip
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 150)
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))
        trainer.train()
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


# %%
curves = {
    "AdamW, lr 1e-3": train(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3)),
    "KFAC(model)": train(lambda model: KFAC(model)),
}
fig, ax = plt.subplots(figsize=(6, 3.6))
for name, curve in curves.items():
    ax.plot(*zip(*curve), label=name)
ax.set_xlabel("step")
ax.set_ylabel("training loss")
ax.legend()
fig.tight_layout()
