"""SAM and output bias forgetting (OBF) in a Hugging Face Trainer: copy this and sam_obf.py.

``python hf_trainer.py`` trains a small ResNet on scikit-learn's digits, which the class does not
need.
"""

import tempfile

import torch
from accelerate.optimizer import AcceleratedOptimizer
from sklearn.datasets import load_digits
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sam_obf import SAM, OutputBiasForgetting


class SAMTrainer(Trainer):
    """A Trainer (transformers 4.57 or newer) that perturbs the weights for each micro-batch.

    Each process perturbs with each of its micro-batches, so m is ``per_device_train_batch_size``.
    For a smaller m at the same update, lower it and raise ``gradient_accumulation_steps``. The
    loss that it logs is that of the perturbed weights. A checkpoint keeps rho, as it keeps lr: a
    run that is resumed goes on with that.

    With accumulation the gradient is the mean over micro-batches for every model. Trainer alone
    adds them up for those (BERT) that do not divide by ``num_items_in_batch``.

    Args:
        rho: length of the perturbation; with 0 there is none, and an update takes one pass.
        adaptive: "both" is ASAM; see ``SAM``.
        forget: None is SAM, which ascends the loss that is minimised. An ``OutputBiasForgetting``
            is OBF, for models that return ``logits`` (..., K) for ``labels`` that are class
            indices (...), or -100 where there is none: of sentences, images, tokens, language
            models. Give it ``link="softmax"``, since these models are trained by cross-entropy.
            Its ``lam`` is 1/K by default, which is about 1e-5 where K is a vocabulary. Then gamma
            acts on nearly every token, also on those that the model predicts badly.
    """

    def __init__(self, *args, rho=0.05, adaptive=None, forget=None, **kwargs):
        super().__init__(*args, **kwargs)
        if rho and self.is_deepspeed_enabled:
            raise ValueError("SAM cannot follow DeepSpeed's sharding: launch with DDP or FSDP2")
        self.rho, self.adaptive, self.forget = rho, adaptive, forget
        own = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        # Whether the logits at a token are judged by the next one, as those of language models.
        self.next_token = type(own).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or (
            getattr(own, "loss_type", None) == "ForConditionalGeneration"
            and not own.config.is_encoder_decoder
        )
        # Other models than these take num_items_in_batch, but many (BERT) do not divide by it:
        # their gradients would add up over accumulation steps and processes.
        self.model_accepts_loss_kwargs &= self.next_token

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        # At a second train() it is the first's.
        if self.rho and not isinstance(optimizer, (SAM, AcceleratedOptimizer)):
            self.optimizer = SAM(optimizer, self.model, self.rho, adaptive=self.adaptive)
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not self.rho:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()

        def ascent():
            batch = self._prepare_inputs(inputs)
            labels = batch.get("labels")  # compute_loss may take them out
            with self.compute_loss_context_manager():
                loss, outputs = self.compute_loss(model, batch, True, num_items_in_batch)
            return self.forgetting(outputs, labels) if self.forget else loss.mean()

        with self.optimizer.optimizer.perturbed(ascent, grad_scaler=self.accelerator.scaler):
            return super().training_step(model, inputs, num_items_in_batch)

    def forgetting(self, outputs, labels):
        """OBF's objective for what the model returned; another kind of model overrides it."""
        logits = outputs.get("logits") if isinstance(outputs, dict) else None
        if logits is None or labels is None or labels.is_floating_point():
            raise ValueError(
                "OBF needs a model that returns 'logits', and 'labels' that are class indices: "
                "forget=None (SAM) takes any loss"
            )
        if self.next_token:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        return self.forget(logits.flatten(0, -2), labels.flatten())


def main():
    set_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    examples = [{"pixel_values": x, "labels": y} for x, y in zip(images, digits.target)]

    widths = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1]}
    config = ResNetConfig(num_channels=1, num_labels=10, layer_type="basic", **widths)
    model = ResNetForImageClassification(config)
    options = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=10,
            per_device_train_batch_size=50,
            learning_rate=2e-3,
            **options,
        )
        trainer = SAMTrainer(
            model,
            arguments,
            train_dataset=examples[:1200],
            rho=0.05,
            forget=OutputBiasForgetting(gamma=1.0, link="softmax"),
        )
        trainer.train()
        outputs = trainer.predict(examples[1200:])
    accuracy = (outputs.predictions.argmax(-1) == outputs.label_ids).mean()
    print(f"test accuracy {accuracy:.2%}")


if __name__ == "__main__":
    main()
