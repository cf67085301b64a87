"""SAM with output bias forgetting in a plain PyTorch loop, on scikit-learn's digits: ``python
plain_loop.py``.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from sam_obf import SAM, OutputBiasForgetting

torch.manual_seed(0)
digits = load_digits()
images, labels = (
    torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16,
    torch.tensor(digits.target),
)
train, test = slice(0, 1200), slice(1200, None)

model = nn.Sequential(
    nn.Conv2d(1, 32, 3),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.Conv2d(32, 64, 3),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(1024, 10),
)
loss_fn, forget = nn.CrossEntropyLoss(), OutputBiasForgetting(gamma=1.0)
optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model, rho=0.05)

for epoch in range(10):
    for batch in torch.randperm(1200).split(50):
        x, y = images[train][batch], labels[train][batch]
        with optimizer.perturbed(lambda: forget(model(x), y)):
            loss = loss_fn(model(x), y)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

with torch.no_grad():
    accuracy = (model.eval()(images[test]).argmax(-1) == labels[test]).float().mean()
print(f"test accuracy {accuracy:.2%}")
