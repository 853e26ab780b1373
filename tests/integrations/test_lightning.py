"""Lightning's ``Trainer`` trains with KFAC: closures, accumulation, clipping, precision, checkpoints."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kfac_opt import KFAC
from tests.support import assert_same, data, weights

L = pytest.importorskip("lightning")

pytestmark = pytest.mark.filterwarnings("ignore")


class Classifier(L.LightningModule):
    def __init__(self, attach: str = "net", **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Linear(16, 3))
        self.attach, self.options, self.losses = attach, options, []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x) if self.attach == "self" else self.net(x), y)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _index: int) -> None:
        self.log("validation", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = KFAC(self.net if self.attach == "net" else self, lr=0.1, **self.options)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)}


def loader() -> DataLoader:
    x, _ = data(96, dtype=torch.float32)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()), batch_size=16)


def fit(module: Classifier, checkpoint: str | None = None, **options):
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **{"max_epochs": 5, **options},
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader(), loader(), ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
@pytest.mark.parametrize("attach", ["net", "self"])
def test_trainer_trains_with_the_optimizer_on_the_module_or_its_network(attach, curvature):
    module = Classifier(attach, curvature=curvature)
    trainer = fit(module)
    assert sum(module.losses[-6:]) < 0.7 * sum(module.losses[:6])
    optimizer = trainer.optimizers[0]
    assert isinstance(optimizer, KFAC)
    assert optimizer.dropped_estimates == 0
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**5)
    assert all(int(optimizer.state[p]["step"]) == 30 for p in module.net.parameters())
    assert all(v.to_dense().abs().sum() > 0 for v in optimizer.curvature.values())


def test_trainer_equals_the_plain_loop():
    module = Classifier()
    module.net[2].p = 0.0
    fit(module, max_epochs=2)
    twin = Classifier().net
    twin[2].p = 0.0
    optimizer = KFAC(twin, lr=0.1)
    for epoch in range(2):
        for x, y in loader():
            optimizer.zero_grad()
            F.cross_entropy(twin(x), y).backward()
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1 * 0.9 ** (epoch + 1)
    for p, q in zip(module.net.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}], ids=str
)
def test_trainer_options(options):
    module = Classifier()
    trainer = fit(module, **options)
    assert sum(module.losses[-6:]) < 0.95 * sum(module.losses[:6])
    steps = 10 if "accumulate_grad_batches" in options else 30
    assert all(int(trainer.optimizers[0].state[p]["step"]) == steps for p in module.net.parameters())


def test_trainer_checkpoint_resumes_bit_for_bit(tmp_path):
    straight = Classifier()
    straight.net[2].p = 0.0
    fit(straight, max_epochs=4)
    first = Classifier()
    first.net[2].p = 0.0
    fit(first, max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    second = Classifier()
    second.net[2].p = 0.0
    fit(second, checkpoint=str(tmp_path / "half.ckpt"), max_epochs=4)
    assert_same(weights(second.net), weights(straight.net))
