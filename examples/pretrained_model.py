"""Fine-tune a pretrained timm model with SAM on a folder of photographs, TRAIN/CLASS/FILE and
VAL/CLASS/FILE: ``python pretrained_model.py TRAIN VAL [MODEL]``.

Without arguments it draws its own, and takes a tiny model with random weights.
"""

import sys
import tempfile
from pathlib import Path

import timm
import torch
from PIL import Image, ImageDraw
from timm.data import create_transform, resolve_data_config
from torchvision.datasets import ImageFolder

from sam_obf import SAM


def draw(folder, images):
    """Oranges and plums, as a folder of photographs would hold them."""
    for name, colour in {"orange": (230, 130, 40), "plum": (110, 40, 130)}.items():
        (folder / name).mkdir(parents=True)
        for i in range(images):
            image = Image.new("RGB", (96, 96), tuple(torch.randint(0, 80, (3,)).tolist()))
            x, y, side = torch.randint(20, 40, (3,)).tolist()
            ImageDraw.Draw(image).ellipse((x, y, x + side, y + side), fill=colour)
            image.save(folder / name / f"{i}.png")
    return str(folder)


torch.manual_seed(0)
if len(sys.argv) > 2:
    train, val = sys.argv[1:3]
    model = timm.create_model((*sys.argv, "resnet50.a1_in1k")[3], pretrained=True)
    size, lr = {}, 1e-4
else:
    place = Path(tempfile.mkdtemp())
    train, val = draw(place / "train", 96), draw(place / "val", 32)
    model = timm.create_model("test_resnet", pretrained=False)
    size, lr = {"img_size": 32}, 3e-3

config = resolve_data_config(size, model=model)
shared = {key: config[key] for key in ("input_size", "interpolation", "mean", "std")}
augmented = create_transform(**shared, is_training=True, scale=(0.5, 1.0), color_jitter=None)
plain = create_transform(**shared, crop_pct=config["crop_pct"])
train_set, val_set = ImageFolder(train, augmented), ImageFolder(val, plain)
loader = torch.utils.data.DataLoader(train_set, batch_size=16, shuffle=True, drop_last=True)

model.reset_classifier(len(train_set.classes))
loss_fn, epochs = torch.nn.CrossEntropyLoss(), 6
optimizer = SAM(torch.optim.AdamW(model.parameters(), lr=lr), model, rho=0.05)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))

for epoch in range(epochs):
    model.train()
    for x, y in loader:
        with optimizer.perturbed(lambda x=x, y=y: loss_fn(model(x), y)):
            loss = loss_fn(model(x), y)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

model.eval()
right = 0
with torch.no_grad():
    for x, y in torch.utils.data.DataLoader(val_set, batch_size=32):
        right += (model(x).argmax(-1) == y).sum().item()
print(f"test accuracy {right / len(val_set):.2%}")
