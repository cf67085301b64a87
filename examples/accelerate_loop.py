"""SAM with output bias forgetting under Accelerate: mixed precision, processes, accumulation.

``accelerate launch accelerate_loop.py``, or on two CPU processes
``ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 accelerate_loop.py``
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sam_obf import SAM, OutputBiasForgetting

ACCUMULATION = 2

set_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
train = DataLoader(TensorDataset(images[:1200], labels[:1200]), batch_size=25, shuffle=True)
test = DataLoader(TensorDataset(images[1200:], labels[1200:]), batch_size=100)

model = nn.Sequential(
    nn.Conv2d(1, 32, 3),
    nn.ReLU(),
    nn.Conv2d(32, 64, 3),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(1024, 10),
)
loss_fn, forget = nn.CrossEntropyLoss(), OutputBiasForgetting(gamma=1.0)
sam = SAM(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model, rho=0.05)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(sam, 10 * 24)
model, optimizer, scheduler, train, test = accelerator.prepare(model, sam, scheduler, train, test)

for epoch in range(10):
    for x, y in train:
        options = {"loss_weight": 1 / ACCUMULATION, "grad_scaler": accelerator.scaler}
        with accelerator.accumulate(model), sam.perturbed(lambda: forget(model(x), y), **options):
            loss = loss_fn(model(x), y)
            accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

model.eval()
right = total = 0
for x, y in test:
    with torch.no_grad():
        predictions, y = accelerator.gather_for_metrics((model(x).argmax(-1), y))
    right, total = right + (predictions == y).sum().item(), total + len(y)
accelerator.print(f"test accuracy {right / total:.2%}")
accelerator.end_training()
