"""
Ensembles and calibration
=========================

``KFACVI`` trains a Gaussian posterior over the weights at the price of one optimizer: every pass runs with weights drawn from
it, and predictions are averaged over draws. On two hundred digits it is less sure of its mistakes than a single net.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from kfac_opt import KFACVI
from kfac_opt.bayes.metrics import accuracy, expected_calibration_error, negative_log_likelihood, reliability_diagram
from kfac_opt.bayes.prediction import predict

digits = load_digits()
order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(0))
x = torch.tensor(digits.data, dtype=torch.float32)[order] / 16.0
y = torch.tensor(digits.target)[order]
x_train, y_train, x_test, y_test = x[:200], y[:200], x[200:], y[200:]

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = KFACVI(model, num_data=len(x_train), temperature=0.3)
for epoch in range(150):
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * (1 - epoch / 150) + 1e-3
    for batch in torch.randperm(200).split(100):
        optimizer.zero_grad()
        for _ in optimizer.weight_samples(2):
            F.cross_entropy(model(x_train[batch]), y_train[batch]).backward()
        optimizer.step()

# %%
# The net at the posterior's mean, and the average over fifty draws.

model.eval()
with torch.no_grad():
    single = model(x_test).softmax(1)
ensemble = predict(model, optimizer.posterior(), x_test, num_samples=50)

fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6))
for name, probabilities in {"mean weights": single, "50 draws": ensemble.probabilities}.items():
    numbers = accuracy(probabilities, y_test), negative_log_likelihood(probabilities, y_test)
    print(f"{name}: accuracy {numbers[0]:.3f}, NLL {numbers[1]:.3f}, ECE {expected_calibration_error(probabilities, y_test):.3f}")
    diagram = reliability_diagram(probabilities, y_test, num_bins=10)
    left.plot(diagram.confidence, diagram.accuracy, "o-", label=name)
left.plot([0, 1], [0, 1], color="grey", linewidth=1)
left.set_xlabel("confidence")
left.set_ylabel("accuracy")
left.legend()
right_answers = ensemble.probabilities.argmax(1) == y_test
for name, rows in {"right": right_answers, "wrong": ~right_answers}.items():
    right.hist(ensemble.entropy[rows], bins=20, density=True, alpha=0.6, label=f"{name} predictions")
right.set_xlabel("entropy, nats")
right.legend()
fig.tight_layout()
