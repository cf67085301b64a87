"""examples/token_classification.py: which tokens have a label, and what its loss is the mean of."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install -r examples/requirements.txt"
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import token_classification  # noqa: E402


def test_one_label_a_word():
    """Of a word in pieces the first has its label; what belongs to no word has none."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "par", "##is", "in", "may"]
    inner = Tokenizer(models.WordPiece({x: i for i, x in enumerate(pieces)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]")
    rows = {"words": [["paris", "in", "may"], ["may"]], "tags": [[2, 0, 3], [1]]}
    tokens = token_classification.tokenize(rows, tokenizer)
    assert tokens["input_ids"] == [[2, 4, 5, 6, 7, 3], [2, 7, 3]]
    assert tokens["labels"] == [[-100, 2, -100, 0, 3, -100], [-100, 1, -100]]


def test_the_loss_is_the_mean_over_labelled_tokens():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4), torch.tensor([[0, -100, 3], [-100, -100, 1]])
    outputs = SimpleNamespace(logits=logits)
    expected = F.cross_entropy(logits[labels != -100], labels[labels != -100])
    torch.testing.assert_close(token_classification.mean_over_tokens(outputs, labels), expected)
    of_more = token_classification.mean_over_tokens(outputs, labels, torch.tensor(12))
    torch.testing.assert_close(of_more, expected * 3 / 12)
