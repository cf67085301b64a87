"""SAMTrainer against the mathematics in float64, for what people use a Trainer with."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install -r examples/requirements.txt"
)
from transformers import (  # noqa: E402
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerCallback,
    TrainingArguments,
)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from hf_trainer import SAMTrainer  # noqa: E402

from sam_obf import SAM, OutputBiasForgetting  # noqa: E402

SETTINGS = {
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "max_grad_norm": 0.0,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_steps": 3,
    "per_device_train_batch_size": 4,
}
WORDS, TOKENS, CLASSES = 40, 6, 3
SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


def bert(kind=BertForSequenceClassification, dropout=0.0, **options):
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return kind(BertConfig(**SMALL, **rates, **{"num_labels": CLASSES, **options})).double()


def gpt2():
    torch.manual_seed(0)
    widths = {"vocab_size": WORDS, "n_positions": TOKENS, "n_embd": 8, "n_layer": 1, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**widths, **dropout, bos_token_id=0, eos_token_id=0)).double()


def sentences(labels=None, size=60):
    torch.manual_seed(1)
    words = torch.randint(0, WORDS, (size, TOKENS))
    labels = torch.randint(0, CLASSES, (size,)) if labels is None else labels(words)
    return [{"input_ids": x, "labels": y} for x, y in zip(words, labels)]


def tags(words):
    """Labels of tokens, more and more of them missing."""
    tags = words % CLASSES
    for i, row in enumerate(tags):
        row[: i % TOKENS] = -100
    return tags


class Recorder:
    """A collator that keeps the batches of 4 that it made: evaluation's are larger."""

    def __init__(self):
        self.batches = []

    def __call__(self, examples):
        keys = examples[0].keys()
        batch = {key: torch.stack([torch.as_tensor(one[key]) for one in examples]) for key in keys}
        if len(examples) == SETTINGS["per_device_train_batch_size"]:
            self.batches.append({key: value.clone() for key, value in batch.items()})
        return batch


def train(folder, model, examples, settings=None, **options):
    """The weights after training, and the batches by update."""
    recorder = Recorder()
    arguments = TrainingArguments(str(folder), **{**SETTINGS, **(settings or {})})
    trainer = SAMTrainer(
        model, arguments, train_dataset=examples, data_collator=recorder, **options
    )
    trainer.train()
    k = arguments.gradient_accumulation_steps
    updates = [recorder.batches[i * k : (i + 1) * k] for i in range(arguments.max_steps)]
    return weights(model), updates


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def aligned(logits, labels):
    """Logits (examples, K) and class indices, of all examples or tokens that have one."""
    return logits[labels != -100], labels[labels != -100]


def shifted(logits, labels):
    return aligned(logits[:, :-1], labels[:, 1:])


def cross_entropy(logits, labels, **options):
    return F.cross_entropy(logits, labels, reduction="sum", **options)


def obf(gamma, lam=None):
    """OBF's objective as the paper writes it, for softmax."""

    def objective(logits, labels):
        p = logits.detach().softmax(-1).gather(-1, labels[:, None])[:, 0]
        lam_ = 1 / logits.shape[-1] if lam is None else lam
        alpha = gamma * ((1 - lam_ / p) / (1 - lam_)).clamp_min(0)
        uniform = -logits.log_softmax(-1).mean(-1)
        return ((1 - alpha) * F.cross_entropy(logits, labels, reduction="none") - uniform).sum()

    return objective


def by_hand(
    model,
    updates,
    *,
    rho=0.5,
    ascend=cross_entropy,
    loss=cross_entropy,
    flat=aligned,
    adaptive=False,
    clip=0.0,
    weigh_batches_alike=False,
    autocast=contextlib.nullcontext,
):
    """Weights after the same updates: every perturbation from one micro-batch, SGD with lr 0.1."""
    params = [p for p in model.parameters() if p.requires_grad]

    def gradient(function, batch):
        with autocast():
            outputs = model(**{key: value for key, value in batch.items() if key != "labels"})
        # An output layer's parameters may have none, as those of BERT's pooler for tokens.
        flattened = flat(outputs.logits.to(params[0].dtype), batch["labels"])
        grads = torch.autograd.grad(function(*flattened), params, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads)]

    for batches in updates:
        total = [torch.zeros_like(p) for p in params]
        counts = [len(flat(b["labels"].float().unsqueeze(-1), b["labels"])[1]) for b in batches]
        for batch, count in zip(batches, counts):
            g = gradient(ascend, batch)
            scaled = [p.detach().abs() * x for p, x in zip(params, g)] if adaptive else g
            norm = sum((x**2).sum() for x in scaled) ** 0.5
            before = [p.detach().clone() for p in params]
            with torch.no_grad():
                for p, x in zip(params, scaled):
                    p += rho * (p.abs() if adaptive else 1) * x / norm
            share = count * len(batches) if weigh_batches_alike else sum(counts)
            for t, x in zip(total, gradient(loss, batch)):
                t += x / share
            with torch.no_grad():
                for p, b in zip(params, before):
                    p.copy_(b)
        norm = sum((t**2).sum() for t in total) ** 0.5
        if clip:
            assert norm > clip  # else the case would show nothing
            total = [t * clip / (norm + 1e-6) for t in total]
        with torch.no_grad():
            for p, t in zip(params, total):
                p -= 0.1 * t
    return weights(model)


def differ(first, other):
    return max((a - b).abs().max().item() for a, b in zip(first, other))


def smoothed(logits, labels):
    return cross_entropy(logits, labels, label_smoothing=0.1)


def focal(logits, labels):
    p = logits.softmax(-1).gather(-1, labels[:, None])[:, 0]
    return (-((1 - p) ** 2) * p.log()).sum()


def focal_of(outputs, labels, num_items_in_batch=None):
    return focal(*aligned(outputs.logits, labels)) / num_items_in_batch


SOFTMAX = {"link": "softmax"}
CASES = {
    "SAM": ({}, {}, {}),
    "OBF": ({"forget": OutputBiasForgetting(**SOFTMAX)}, {}, {"ascend": obf(1.0)}),
    "OBF, gamma and lam": (
        {"forget": OutputBiasForgetting(gamma=0.3, lam=0.1, **SOFTMAX)},
        {},
        {"ascend": obf(0.3, 0.1)},
    ),
    "ASAM": ({"adaptive": "both"}, {}, {"adaptive": True}),
    "label smoothing": (
        {},
        {"label_smoothing_factor": 0.1},
        {"ascend": smoothed, "loss": smoothed},
    ),
    "OBF, label smoothing": (
        {"forget": OutputBiasForgetting(**SOFTMAX)},
        {"label_smoothing_factor": 0.1},
        {"ascend": obf(1.0), "loss": smoothed},
    ),
    "clipping": ({}, {"max_grad_norm": 0.1}, {"clip": 0.1}),
    "compute_loss_func": (
        {"compute_loss_func": focal_of},
        {},
        {"ascend": focal, "loss": focal},
    ),
    "OBF, compute_loss_func": (
        {"compute_loss_func": focal_of, "forget": OutputBiasForgetting(**SOFTMAX)},
        {},
        {"ascend": obf(1.0), "loss": focal},
    ),
    "checkpointing": ({}, {"gradient_checkpointing": True}, {}),
}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_weights_as_by_hand(tmp_path, case, k):
    """An update is the mean over k micro-batches of 4, each of which has its own perturbation."""
    options, settings, hand = CASES[case]
    settings = {**settings, "gradient_accumulation_steps": k}
    got, updates = train(tmp_path, bert(), sentences(), settings, rho=0.5, **options)
    assert [len(update) for update in updates] == [k] * 3
    expected = by_hand(bert(), updates, **hand)
    rounding = 1e-8 if "label smoothing" in case else 1e-12  # Trainer smooths labels in float32
    assert differ(got, expected) < rounding
    assert differ(got, by_hand(bert(), updates, **{**hand, "rho": 0.0})) > 1e-5


def test_no_rho_is_trainer(tmp_path):
    settings = {"gradient_accumulation_steps": 2}
    got, updates = train(tmp_path, bert(), sentences(), settings, rho=0)
    assert differ(got, by_hand(bert(), updates, rho=0.0)) < 1e-12


@pytest.mark.parametrize("gamma", [None, 1.0, 1e-12])
def test_tokens(tmp_path, gamma):
    """Tokens without a label do not count; compute_loss_func weighs all tokens alike."""
    forget = None if gamma is None else OutputBiasForgetting(gamma, **SOFTMAX)
    hand = {"ascend": cross_entropy if gamma is None else obf(gamma)}

    def mean(outputs, labels, num_items_in_batch=None):
        return cross_entropy(*aligned(outputs.logits, labels)) / num_items_in_batch

    for options, weigh_batches_alike in (({}, True), ({"compute_loss_func": mean}, False)):
        got, updates = train(
            tmp_path,
            bert(BertForTokenClassification),
            sentences(tags),
            {"gradient_accumulation_steps": 2},
            rho=0.5,
            forget=forget,
            **options,
        )
        model = bert(BertForTokenClassification)
        expected = by_hand(model, updates, **hand, weigh_batches_alike=weigh_batches_alike)
        assert differ(got, expected) < 1e-12


@pytest.mark.parametrize("gamma", [None, 1.0])
def test_language_model(tmp_path, gamma):
    """Logits foretell the next token; the loss is the mean over all tokens of an update."""
    forget = None if gamma is None else OutputBiasForgetting(gamma, **SOFTMAX)

    def words(words):
        labels = torch.where(tags(words) == -100, -100, words)
        labels[:, 0] = -100  # which no logits foretell, but Trainer counts for some models
        return labels

    settings = {"gradient_accumulation_steps": 2}
    got, updates = train(tmp_path, gpt2(), sentences(words), settings, rho=0.5, forget=forget)
    ascend = cross_entropy if gamma is None else obf(gamma)
    expected = by_hand(gpt2(), updates, ascend=ascend, flat=shifted)
    assert differ(got, expected) < 1e-7  # the model computes its loss in float32


def answers(size=60):
    torch.manual_seed(1)
    words, ends = torch.randint(0, WORDS, (size, TOKENS)), torch.randint(0, TOKENS, (size, 2))
    return [
        {"input_ids": x, "start_positions": start, "end_positions": end}
        for x, (start, end) in zip(words, ends)
    ]


def numbers(words):
    return words.double().mean(1) / WORDS


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("kind", ["regression", "question answering"])
def test_any_loss(tmp_path, kind, k):
    """SAM takes whatever loss a model returns."""
    if kind == "regression":
        make, examples = lambda: bert(num_labels=1), sentences(numbers)
    else:
        make, examples = lambda: bert(BertForQuestionAnswering, num_labels=2), answers()
    got, updates = train(tmp_path, make(), examples, {"gradient_accumulation_steps": k}, rho=0.5)
    model = make()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5)
    for batches in updates:
        for batch in batches:
            with optimizer.perturbed(lambda: model(**batch).loss):
                (model(**batch).loss / k).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert differ(got, weights(model)) < 1e-12


@pytest.mark.parametrize("kind", ["regression", "several labels", "question answering"])
def test_what_obf_cannot_take(tmp_path, kind):
    examples = answers() if kind == "question answering" else sentences(numbers)
    model = bert(num_labels=1)
    if kind == "several labels":
        model = bert(problem_type="multi_label_classification")
        examples = sentences(lambda words: (words[:, :CLASSES] % 2).double())
    if kind == "question answering":
        model = bert(BertForQuestionAnswering, num_labels=2)
    with pytest.raises(ValueError, match=r"class indices: forget=None \(SAM\) takes any loss"):
        train(tmp_path, model, examples, forget=OutputBiasForgetting(**SOFTMAX))


def test_bf16(tmp_path):
    got, updates = train(tmp_path, bert().float(), sentences(), {"bf16": True}, rho=0.5)
    hand = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16)}
    expected = by_hand(bert().float(), updates, **hand)
    exact = by_hand(bert().float(), updates)
    assert differ(got, expected) < 1e-6 < differ(got, exact)


def test_lora(tmp_path):
    """Adapters alone are perturbed and trained, also where a checkpoint is loaded."""
    peft = pytest.importorskip(
        "peft", reason="needs peft: pip install -r examples/requirements.txt"
    )

    def lora():
        config = peft.LoraConfig(
            task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False
        )
        model = bert()
        torch.manual_seed(2)
        return peft.get_peft_model(model, config).double()

    settings = {"gradient_accumulation_steps": 2}
    forget = OutputBiasForgetting(**SOFTMAX)
    model = lora()
    got, updates = train(tmp_path, model, sentences(), settings, rho=0.5, forget=forget)
    expected = by_hand(lora(), updates, ascend=obf(1.0))
    assert differ(got, expected) < 1e-12
    moved = [
        name
        for (name, p), first in zip(model.named_parameters(), weights(lora()))
        if not torch.equal(p, first)
    ]
    assert moved and all("lora" in name or "modules_to_save" in name for name in moved)
    model.save_pretrained(tmp_path / "adapter")
    opened = peft.PeftModel.from_pretrained(bert(), tmp_path / "adapter", is_trainable=True)
    assert differ(weights(opened.double()), got) == 0


def test_evaluation_changes_nothing(tmp_path):
    examples = sentences()
    settings = {"eval_strategy": "steps", "eval_steps": 1}
    data = {"eval_dataset": examples[:8]}
    got, updates = train(tmp_path, bert(), examples, settings, rho=0.5, **data)
    assert differ(got, by_hand(bert(), updates)) < 1e-12


def test_optimizer_of_ones_own_and_training_again(tmp_path):
    model = bert()
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = TrainingArguments(str(tmp_path), **SETTINGS)
    recorder = Recorder()
    trainer = SAMTrainer(
        model,
        arguments,
        train_dataset=sentences(),
        data_collator=recorder,
        optimizers=(own, None),
        rho=0.5,
    )
    trainer.train()
    trainer.train()
    updates = [[batch] for start in (0, 15) for batch in recorder.batches[start : start + 3]]
    sam = trainer.optimizer.optimizer
    assert isinstance(sam, SAM) and sam.base_optimizer is own
    if len(recorder.batches) == 30:  # the loader does not read ahead of max_steps
        assert differ(weights(model), by_hand(bert(), updates)) < 1e-12


def test_deepspeed_is_refused(tmp_path):
    class Launched(SAMTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_deepspeed_enabled = True

    with pytest.raises(ValueError, match="DeepSpeed's sharding: launch with DDP or FSDP2"):
        Launched(bert(), TrainingArguments(str(tmp_path), **SETTINGS))


# The program that the tests below start: it trains and writes weights and batches.
PROGRAM = """
import os, sys
import torch
from safetensors.torch import save_file
sys.path[:0] = [{root!r}, {tests!r}]
import test_hf_trainer as tests
from test_hf_trainer import *

{body}
"""


def start(folder, body, *launcher):
    program = folder / "program.py"
    program.write_text(
        PROGRAM.format(root=str(ROOT), tests=str(ROOT / "tests"), body=body), encoding="utf-8"
    )
    command = [sys.executable, *launcher, str(program), str(folder)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)


TWO = """
k = 2
got, updates = train(sys.argv[1], bert(), sentences(),
                     {"gradient_accumulation_steps": k, "max_grad_norm": 0.1}, rho=0.5,
                     forget=OutputBiasForgetting(link="softmax"))
kept = {f"weight {i}": p for i, p in enumerate(got)}
for i, update in enumerate(updates):
    for j, batch in enumerate(update):
        kept |= {f"{key} {i} {j}": value for key, value in batch.items()}
save_file(kept, f"{sys.argv[1]}/{os.environ['RANK']}.safetensors")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Each of four micro-batches, two a process, is perturbed for itself; their mean is clipped."""
    done = start(tmp_path, TWO, "-m", "torch.distributed.run", "--nproc_per_node", "2")
    assert done.returncode == 0, done.stderr
    first, other = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    updates = [
        [
            {key: kept[f"{key} {i} {j}"] for key in ("input_ids", "labels")}
            for kept in (first, other)
            for j in range(2)
        ]
        for i in range(3)
    ]
    assert not torch.equal(updates[0][0]["input_ids"], updates[0][2]["input_ids"])
    expected = by_hand(bert(), updates, ascend=obf(1.0), clip=0.1)
    for kept in (first, other):
        got = [kept[f"weight {i}"] for i in range(len(expected))]
        assert differ(got, expected) < 1e-12


class Killed(TrainerCallback):
    """Ends the process after the fifth update, as a full disk or a scheduler would."""

    def on_step_end(self, arguments, state, control, **_):
        if state.global_step == 5:
            os._exit(9)


KILLED = """
resumed = os.path.exists(f"{sys.argv[1]}/checkpoint-3")
settings = {**SETTINGS, "max_steps": 8, "optim": "adamw_torch", "lr_scheduler_type": "linear",
            "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
trainer = SAMTrainer(bert(dropout=0.1), TrainingArguments(sys.argv[1], **settings),
                     train_dataset=sentences(), data_collator=Recorder(), rho=0.5,
                     forget=OutputBiasForgetting(link="softmax"),
                     callbacks=[] if resumed or sys.argv[1].endswith("whole") else [Killed])
trainer.train(resume_from_checkpoint=True if resumed else None)
save_file({str(i): p for i, p in enumerate(weights(trainer.model))},
          f"{sys.argv[1]}/last.safetensors")
"""


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    """A run that was killed and goes on ends with the weights of one that was not."""
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    killed = start(tmp_path / "killed", KILLED)
    assert killed.returncode == 9, killed.stderr
    for name in ("killed", "whole"):
        done = start(tmp_path / name, KILLED)
        assert done.returncode == 0, done.stderr
    resumed, whole = (
        load_file(tmp_path / name / "last.safetensors") for name in ("killed", "whole")
    )
    assert resumed.keys() == whole.keys()
    assert differ(resumed.values(), whole.values()) == 0
