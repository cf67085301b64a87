"""timm's published accuracies, and what they say of ours: more robust, or only more accurate."""

import csv
import functools
import re
from pathlib import Path

import numpy as np
from scipy.special import expit, logit
from scipy.stats import linregress

RESULTS = Path(__file__).with_name("timm_results.csv")
# What a model saw besides ImageNet-1k, by timm's name of its weights.
LARGER = re.compile(
    "in12k|in21k|in22k|laion|openai|clip|webli|jft|ig1b|yfcc|seer|swag|m30m|m38m|ssld"
)
# Models whose teachers saw more: BEiT v2 learns to predict CLIP's features (Peng et al. 2022); the
# teachers of BiT's distilled ResNet (Beyer et al. 2022) and of USI's (Ridnik et al. 2022) were
# pretrained on ImageNet-21k. Those of the other distilled models saw ImageNet-1k, as RegNetY-16GF.
LARGER_TEACHER = re.compile(r"^beitv2_|\.goog_distilled_|\.usi_")
# Of each protocol under shift: the one on ImageNet's own images of the same classes, and timm's
# columns of both.
SHIFTS = {
    "v2": ("imagenet", "imagenet", "imagenetv2-matched-frequency"),
    "sketch": ("imagenet", "imagenet", "imagenet-sketch"),
    "r-200": ("r-clean", "imagenet-r-clean", "imagenet-r"),
    "a-200": ("a-clean", "imagenet-a-clean", "imagenet-a"),
}
RESAMPLES = 2000
NEIGHBOURS = 200  # models of nearly the same accuracy, which say what is usual


@functools.cache
def results() -> list[dict[str, str]]:
    """timm's table, ``timm_results.csv``; top-1 in %.

    It has a row for each model at each size, crop and interpolation.
    """
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def imagenet_alone(model: str) -> bool:
    """Whether timm's model, and its teacher if it had one, saw ImageNet-1k and nothing larger."""
    tag = model.partition(".")[2]
    larger = LARGER.search(tag) or LARGER_TEACHER.search(model)
    return tag.endswith("in1k") and not larger


@functools.cache
def baseline(protocol: str) -> np.ndarray:
    """Accuracies (models, 2) in [0, 1], clean and under shift, of timm's models.

    They are those trained on ImageNet-1k alone. Each counts once, at the size and crop at which it
    is best on ImageNet.
    """
    _, clean, shifted = SHIFTS[protocol]
    best = {}
    for row in sorted(results(), key=lambda row: float(row["imagenet"])):
        if imagenet_alone(row["model"]) and row[clean] and row[shifted]:
            best[row["model"]] = (float(row[clean]) / 100, float(row[shifted]) / 100)
    return np.array(list(best.values()))


@functools.cache
def line(protocol: str) -> tuple[float, float]:
    """Slope and intercept of ``baseline``'s line on the logit scale, by least squares."""
    fitted = linregress(*logit(baseline(protocol)).T)
    return fitted.slope, fitted.intercept


@functools.cache
def resampled_lines(protocol: str, seed: int = 0) -> np.ndarray:
    """Slopes and intercepts (2, ``RESAMPLES``) of lines through models drawn from ``baseline``.

    They are drawn with replacement.
    """
    points, rng = logit(baseline(protocol)), np.random.default_rng(seed)
    drawn = points[rng.integers(len(points), size=(RESAMPLES, len(points)))]
    (x, y), means = np.moveaxis(drawn - drawn.mean(1, keepdims=True), 2, 0), drawn.mean(1)
    slopes = (x * y).sum(1) / (x * x).sum(1)
    return np.stack([slopes, means[:, 1] - slopes * means[:, 0]])


def expected(clean, slope, intercept):
    """The accuracy under shift that a line gives for a clean one, both in [0, 1]."""
    return expit(slope * logit(clean) + intercept)


def usual(clean: float, protocol: str) -> tuple[float, float]:
    """Between which points above ``line`` 95 % of timm's models near a clean accuracy lie.

    They are neighbours, and not all models, since these scatter more at some accuracies than at
    others, and since on ImageNet-A the line itself fits some better than others.
    """
    models = baseline(protocol)
    above = models[:, 1] - expected(models[:, 0], *line(protocol))
    nearest = np.argsort(np.abs(models[:, 0] - clean), kind="stable")[:NEIGHBOURS]
    low, high = np.percentile(above[nearest], [2.5, 97.5])
    return float(low), float(high)


def effective_robustness(
    clean: np.ndarray, shifted: np.ndarray, protocol: str, seed: int = 0
) -> dict[str, float]:
    """How much better a model is under shift than timm's models of its accuracy.

    That is acc(shifted) - f(acc(clean)), with the line f fitted on the logit scale to models
    trained on ImageNet-1k (Taori et al. 2020, section 2).

    Args:
        clean, shifted: (images,) each, whether the model was right on ImageNet's own images and on
            the shifted set's.
        protocol: one of ``SHIFTS``.

    Returns:
        ``clean`` and ``shifted`` accuracy, the ``expected`` one under shift and what is ``above``
        it, all in [0, 1]; ``low`` and ``high``, its 95 % bootstrap interval: percentiles over
        resampled images of each set together with lines through resampled models of timm's;
        ``usual_low`` and ``usual_high``, between which 95 % of the ``NEIGHBOURS`` models whose
        clean accuracy is nearest lie, above or below the same line; ``unusual``, whether the whole
        interval lies outside, and there are such models; ``clean_images`` and ``shifted_images``,
        how many they are; and ``extrapolated``, whether none of those models is as bad, or as good,
        on clean images.
    """
    models, rng = baseline(protocol), np.random.default_rng(seed)
    accuracies = np.mean(clean), np.mean(shifted)
    # Resampling a set's images is drawing how many of them the model gets right; no image is in
    # both sets.
    drawn_clean, drawn_shifted = (
        rng.binomial(len(right), right.mean(), RESAMPLES) / len(right) for right in (clean, shifted)
    )
    drawn_expected = expected(drawn_clean, *resampled_lines(protocol))
    low, high = np.percentile(drawn_shifted - drawn_expected, [2.5, 97.5])
    predicted = expected(accuracies[0], *line(protocol))
    usual_low, usual_high = usual(accuracies[0], protocol)
    extrapolated = not models[:, 0].min() <= accuracies[0] <= models[:, 0].max()
    return {
        "clean": float(accuracies[0]),
        "shifted": float(accuracies[1]),
        "expected": float(predicted),
        "above": float(accuracies[1] - predicted),
        "low": float(low),
        "high": float(high),
        "usual_low": usual_low,
        "usual_high": usual_high,
        "unusual": bool(not extrapolated and (low > usual_high or high < usual_low)),
        "clean_images": len(clean),
        "shifted_images": len(shifted),
        "extrapolated": bool(extrapolated),
    }


# timm's columns, by protocol.
COLUMNS = {
    "imagenet": "imagenet", "real": "imagenet-real", "v2": "imagenetv2-matched-frequency",
    "sketch": "imagenet-sketch", "r-200": "imagenet-r", "r-clean": "imagenet-r-clean",
    "a-200": "imagenet-a", "a-clean": "imagenet-a-clean",
}  # fmt: skip


def timm_setting(config):
    """Size, crop and interpolation, as timm's tables of results have them."""
    return {
        "img_size": str(config["input_size"][-1]),
        "crop_pct": f"{config['crop_pct']:.3f}",
        "interpolation": config["interpolation"],
    }


def beside_ours(models, measured):
    """What timm publishes of its own models, by model.

    It is ``top1`` in %, ours and timm's by protocol, where timm has it at the same size and crop;
    otherwise ``elsewhere``, the sizes and crops at which it has.
    """
    published_by_model = {}
    for name, (model, config) in models.items():
        shown = [protocol for protocol in measured[name] if protocol in COLUMNS]
        if not shown or Path(name.removeprefix("local-dir:")).expanduser().exists():
            continue
        full_name = f"{model.pretrained_cfg.get('architecture')}.{model.pretrained_cfg.get('tag')}"
        rows = [row for row in results() if row["model"] == full_name]
        here = timm_setting(config)
        same = [row for row in rows if all(row[key] == value for key, value in here.items())]
        if same:
            top1 = {}
            for protocol in shown:
                if timms := same[0][COLUMNS[protocol]]:
                    top1[protocol] = (100 * measured[name][protocol]["top1"], float(timms))
            published_by_model[name] = {"top1": top1}
        elif rows:
            elsewhere = [{key: row[key] for key in here} for row in rows]
            published_by_model[name] = {"elsewhere": elsewhere}
    return published_by_model
