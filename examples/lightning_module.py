"""SAM with output bias forgetting under Lightning's automatic optimization.

``python lightning_module.py``
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sam_obf import SAM, OutputBiasForgetting


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(1, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(1024, 10),
        )
        self.loss_fn, self.forget = nn.CrossEntropyLoss(), OutputBiasForgetting(gamma=1.0)

    def configure_optimizers(self):
        return SAM(torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9), self, rho=0.05)

    def training_step(self, batch, _):
        # Lightning hands this step, forward and backward, to SAM.step: it runs once for each pass.
        x, y = batch
        if self.optimizers().optimizer.ascending:
            return self.forget(self.model(x), y)
        return self.loss_fn(self.model(x), y)

    def test_step(self, batch, _):
        x, y = batch
        self.log("test accuracy", (self.model(x).argmax(-1) == y).float().mean())


lightning.seed_everything(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
train = DataLoader(TensorDataset(images[:1200], labels[:1200]), batch_size=50, shuffle=True)
test = DataLoader(TensorDataset(images[1200:], labels[1200:]), batch_size=100)

quiet = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
trainer = lightning.Trainer(max_epochs=10, accelerator="auto", devices=1, **quiet)
model = Classifier()
trainer.fit(model, train)
(results,) = trainer.test(model, test, verbose=False)
print(f"test accuracy {results['test accuracy']:.2%}")
