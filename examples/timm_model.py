"""SAM with output bias forgetting on timm's model, loss, optimizer and schedule: ``python
timm_model.py [MODEL]``.
"""

import sys

import timm
import torch
from sklearn.datasets import load_digits
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from sam_obf import SAM, OutputBiasForgetting, proportional_rho

torch.manual_seed(0)
digits = load_digits()
images, labels = (
    torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1,
    torch.tensor(digits.target),
)
images = torch.nn.functional.interpolate(images, size=(32, 32), mode="bilinear")

model = timm.create_model(
    sys.argv[1] if len(sys.argv) > 1 else "test_resnet", num_classes=10, in_chans=1
)
loss_fn, forget = BinaryCrossEntropy(0.0, sum_classes=True), OutputBiasForgetting(gamma=1.0)
optimizer = SAM(create_optimizer_v2(model, "adamw", lr=3e-3, weight_decay=0.05), model, rho=0.1)
scheduler, epochs = create_scheduler_v2(optimizer, "cosine", num_epochs=10, min_lr=3e-5)

for epoch in range(epochs):
    scheduler.step(epoch)
    proportional_rho(optimizer, rho_min=0.0, rho_max=0.1, lr_min=3e-5, lr_max=3e-3)
    model.train()
    for batch in torch.randperm(1200).split(50):
        x, y = images[batch], labels[batch]
        with optimizer.perturbed(lambda: forget(model(x), y)):
            loss = loss_fn(model(x), y)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, rho {optimizer.param_groups[0]['rho']:.3f}")

model.eval()
with torch.no_grad():
    predictions = torch.cat([model(x).argmax(-1) for x in images[1200:].split(100)])
print(f"test accuracy {(predictions == labels[1200:]).float().mean():.2%}")
