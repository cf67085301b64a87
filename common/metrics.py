"""Top-1 accuracy, as an ``evaluate.Metric``."""

import tempfile

import datasets
import evaluate
import numpy as np


class Top1(evaluate.Metric):
    """The share of ``predictions``, class indices, that equal ``references``, and their number."""

    def _info(self):
        names = ("predictions", "references")
        return evaluate.MetricInfo(
            description="Share of examples whose most likely class is the true one.",
            citation="",
            features=datasets.Features({name: datasets.Value("int64") for name in names}),
        )

    def _compute(self, predictions, references):
        top1 = float(np.mean(np.equal(predictions, references)))
        return {"top1": top1, "examples": len(references)}


def in_memory(metric: type[evaluate.Metric]) -> evaluate.Metric:
    """A metric that leaves nothing on the disk: else ``evaluate`` needs a home to write to."""
    with tempfile.TemporaryDirectory() as folder:
        return metric(keep_in_memory=True, cache_dir=folder)
