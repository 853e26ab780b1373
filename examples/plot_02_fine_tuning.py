"""
Fine-tune a torchvision net
===========================

A ShuffleNet learns the digits 0 to 4; then its head is replaced and the whole net is fine-tuned on 5 to 9 from few examples. In
your own script the first half is ``torchvision.models.shufflenet_v2_x0_5(weights="DEFAULT")``.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torchvision.models import shufflenet_v2_x0_5

from kfac_opt import KFAC

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0
images = F.interpolate(images, size=32).expand(-1, 3, -1, -1)
labels = torch.tensor(digits.target)


def fit(model, optimizer, x, y, steps):
    rows, losses = torch.Generator().manual_seed(0), []
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=rows)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %%
# The net that knows something already.

torch.manual_seed(0)
known = labels < 5
net = shufflenet_v2_x0_5(num_classes=5)
fit(net, KFAC(net), images[known], labels[known], steps=60)
pretrained = {name: value.clone() for name, value in net.state_dict().items() if not name.startswith("fc.")}

# %%
# A new head, the body at a tenth of the learning rate. Groups work as in torch.optim; a layer's weight and bias belong to
# one group here.

new = torch.nonzero(labels >= 5).flatten()
train, test = new[:100], new[100:]


def fine_tune(make_optimizer):
    torch.manual_seed(1)
    model = shufflenet_v2_x0_5(num_classes=5)
    model.load_state_dict(pretrained, strict=False)
    head = list(model.fc.parameters())
    body = [p for name, p in model.named_parameters() if not name.startswith("fc.")]
    losses = fit(model, make_optimizer(model, head, body), images[train], labels[train] - 5, steps=50)
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(1) == labels[test] - 5).float().mean().item()
    return losses, accuracy


def kfac(model, head, body):
    optimizer = KFAC(model, [{"params": head}, {"params": body}])
    optimizer.param_groups[1]["lr"] *= 0.1
    return optimizer


def adamw(model, head, body):
    return torch.optim.AdamW([{"params": head, "lr": 3e-3}, {"params": body, "lr": 3e-4}])


# %%
fig, ax = plt.subplots(figsize=(6, 3.6))
for name, make in {"AdamW": adamw, "KFAC": kfac}.items():
    losses, accuracy = fine_tune(make)
    ax.semilogy(losses, label=f"{name}: test accuracy {100 * accuracy:.0f} %")
ax.set_xlabel("step of fine-tuning on 100 images")
ax.set_ylabel("training loss of the batch")
ax.legend()
fig.tight_layout()
