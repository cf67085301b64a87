"""SAM with output bias forgetting in a Hugging Face Trainer, by another ``training_step``: ``python hf_trainer.py``."""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from sam_obf import SAM, OutputBiasForgetting


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)
        )

    def forward(self, pixel_values, labels):
        logits = self.layers(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class SAMTrainer(Trainer):
    forget = OutputBiasForgetting(gamma=1.0)

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs, weight = self._prepare_inputs(inputs), 1 / self.current_gradient_accumulation_steps

        def ascent():
            with self.accelerator.no_sync(model), self.compute_loss_context_manager():
                return self.forget(model(**inputs)["logits"], inputs["labels"])

        sam = self.optimizer.optimizer
        with sam.perturbed(ascent, loss_weight=weight, grad_scaler=self.accelerator.scaler):
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs) * weight
            self.accelerator.backward(loss)
        return loss.detach()


set_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
examples = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels)]

model = Classifier()
optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model, rho=0.05)
with tempfile.TemporaryDirectory() as folder:
    options = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    arguments = TrainingArguments(folder, num_train_epochs=10, per_device_train_batch_size=50, **options)
    trainer = SAMTrainer(model, arguments, train_dataset=examples[:1200], optimizers=(optimizer, None))
    trainer.train()
    outputs = trainer.predict(examples[1200:])
print(f"test accuracy {(outputs.predictions.argmax(-1) == outputs.label_ids).mean():.2%}")
