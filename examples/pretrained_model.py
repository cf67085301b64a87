"""Fine-tune a pretrained timm model with SAM on a folder of photographs, TRAIN/CLASS/FILE and
VAL/CLASS/FILE: ``python pretrained_model.py TRAIN VAL [MODEL]``.

Without arguments it draws circles and squares, and takes a tiny model.
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
    """Circles and squares, as a folder of photographs would hold them."""
    for name in ("circle", "square"):
        (folder / name).mkdir(parents=True)
        for i in range(images):
            image = Image.new("RGB", (96, 96), tuple(torch.randint(0, 100, (3,)).tolist()))
            x, y, side = torch.randint(20, 40, (3,)).tolist()
            shape = ImageDraw.Draw(image)
            paint = shape.ellipse if name == "circle" else shape.rectangle
            paint((x, y, x + side, y + side), fill="white")
            image.save(folder / name / f"{i}.png")
    return str(folder)


torch.manual_seed(0)
if len(sys.argv) > 2:
    train, val = sys.argv[1:3]
    model = timm.create_model((*sys.argv, "resnet50.a1_in1k")[3], pretrained=True)
else:
    place = Path(tempfile.mkdtemp())
    train, val = draw(place / "train", 96), draw(place / "val", 32)
    model = timm.create_model("test_resnet", pretrained=False)

config = resolve_data_config(model=model)
shared = {key: config[key] for key in ("input_size", "interpolation", "mean", "std")}
augmented = create_transform(**shared, is_training=True, scale=(0.25, 1.0), color_jitter=None)
plain = create_transform(**shared, crop_pct=config["crop_pct"])
train_set, val_set = ImageFolder(train, augmented), ImageFolder(val, plain)
loader = torch.utils.data.DataLoader(train_set, batch_size=32, shuffle=True, drop_last=True)

model.reset_classifier(len(train_set.classes))
loss_fn, epochs = torch.nn.CrossEntropyLoss(), 5
optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), model, rho=0.1)
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
