"""Top-1 accuracy, as an evaluate.Metric."""

import datasets
import evaluate
import numpy as np


class Top1(evaluate.Metric):
    """Top-1 accuracy: the share of ``predictions`` (class indices) equal to ``references``, and their number."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of examples whose most likely class is the true one.",
            citation="",
            features=datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")}),
        )

    def _compute(self, predictions, references):
        return {"top1": float(np.mean(np.equal(predictions, references))), "examples": len(references)}
