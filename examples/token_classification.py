"""Tagging with SAM or OBF: finds places, months and names in sentences made up here.

``may``, ``paris`` and others are one or another, as their neighbours say. Copy this with
hf_trainer.py and sam_obf.py; for data of your own replace ``make_up`` and the tokenizer.
"""

import random
import tempfile

import torch.nn.functional as F
from datasets import Dataset
from hf_trainer import SAMTrainer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)

from sam_obf import OutputBiasForgetting

TAGS = ["O", "NAME", "PLACE", "MONTH"]
NAMES, MONTHS = ["ann", "april", "may", "paris", "june"], ["april", "may", "june", "july"]
PLACES = ["paris", "rome", "jordan", "georgia"]


def make_up(size: int) -> Dataset:
    """Sentences as lists of ``words``, and a number of ``TAGS`` for each word."""
    rows = []
    for _ in range(size):
        parts = [
            [("miss", 0), (random.choice(NAMES), 1), ("left", 0)],
            [("for", 0), (random.choice(PLACES), 2)],
            [("in", 0), ("early", 0), (random.choice(MONTHS), 3)],
        ]
        kept = random.sample(parts, random.randint(1, 3))
        pairs = [pair for part in kept for pair in part]
        rows.append({"words": [word for word, _ in pairs], "tags": [tag for _, tag in pairs]})
    return Dataset.from_list(rows)


def word_tokenizer(sentences) -> PreTrainedTokenizerFast:
    """A token for each word; with a pretrained model, take its own tokenizer."""
    words = ["[PAD]", "[UNK]", *sorted({word for words in sentences for word in words})]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def tokenize(rows, tokenizer):
    """Token ids, and a label for the first token of each word; -100, no label, for other tokens."""
    tokens = tokenizer(rows["words"], is_split_into_words=True, truncation=True)
    tokens["labels"] = []
    for i, tags in enumerate(rows["tags"]):
        previous, labels = None, []
        for word in tokens.word_ids(i):
            labels.append(-100 if word is None or word == previous else tags[word])
            previous = word
        tokens["labels"].append(labels)
    return tokens


def mean_over_tokens(outputs, labels, num_items_in_batch=None):
    """Cross-entropy where every token of an update counts alike, whatever its micro-batch."""
    losses = F.cross_entropy(outputs.logits.movedim(-1, 1), labels, reduction="sum")
    return losses / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def accuracy(found):
    labelled = found.label_ids != -100
    right = found.predictions.argmax(-1) == found.label_ids
    return {"accuracy": float(right[labelled].mean())}


def main():
    random.seed(0)
    set_seed(0)
    train, test = make_up(400), make_up(200)
    tokenizer = word_tokenizer(train["words"])
    train, test = (
        ds.map(tokenize, batched=True, fn_kwargs={"tokenizer": tokenizer}) for ds in (train, test)
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=len(tokenizer), intermediate_size=64, num_labels=len(TAGS), **sizes
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=5,
            learning_rate=3e-3,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SAMTrainer(
            BertForTokenClassification(config),
            arguments,
            train_dataset=train,
            data_collator=DataCollatorForTokenClassification(tokenizer),
            compute_loss_func=mean_over_tokens,
            compute_metrics=accuracy,
            rho=0.05,
            forget=OutputBiasForgetting(gamma=1.0, link="softmax"),
        )
        trainer.train()
        found = trainer.evaluate(test)
    print(f"test accuracy {found['eval_accuracy']:.2%}")


if __name__ == "__main__":
    main()
