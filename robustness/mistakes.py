"""What a model gets wrong: each class's accuracy, which class for which, the surest mistakes."""

import collections
import csv
import re
import warnings

import matplotlib.pyplot as plt
import numpy as np

from common import report
from common.folders import file_name

MOST = 20  # mistakes that a picture shows
MAX_CLASSES = 40  # of a picture of confusions
MAX_COUNTED = 20  # classes, up to which its cells have room for a number
MAX_LETTERS = 24  # of a name in a picture


class Mistakes:
    """The surest mistakes of a pass in this process, with the images as the model saw them."""

    def __init__(self):
        self.by_protocol = {}

    def add(self, protocol, images, kept, columns):
        """Look through a batch.

        Args:
            images: uint8 (batch, 3, height, width).
            kept: the places in the batch of the images that have a right answer, one at least.
            columns: the protocol's so far, lists that end with these images.
        """
        found = self.by_protocol.setdefault(protocol, [])
        names = ("top1", "confidence", "file", "true", "predicted", "key")
        rows = zip(*(columns[name][-len(kept) :] for name in names))
        for place, (right, confidence, file, true, predicted, key) in zip(kept, rows):
            if not right and (len(found) < MOST or confidence > found[-1][0]):
                text = (file or f"image {key}", true, predicted)
                found.append((confidence, text, images[place].permute(1, 2, 0).numpy().copy()))
                found[:] = surest(found)


def surest(mistakes: list[tuple]) -> list[tuple]:
    """The ``MOST`` with the highest confidence, the first of each."""
    return sorted(mistakes, key=lambda mistake: (-mistake[0], mistake[1]))[:MOST]


def write_per_class(path, tables, classes):
    """Write a line for each class: its images, top-1 in %, and what it is most often taken for.

    Images that are corrupted, and sets with several right answers to an image, are left out.

    Args:
        tables: by model and protocol.
        classes: by model and protocol's name, the names of the classes.
    """
    head = ["model", "benchmark", "class", "images", "top1", "taken for", "times"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        for model, protocol, table in one_answer_each(tables):
            rows = per_class(table, classes[model][protocol.name])
            writer.writerows([model, protocol.name, *row] for row in rows)


def one_answer_each(tables):
    """Model, protocol and table of the images as they are, where each has one right answer."""
    for model, by_protocol in tables.items():
        for protocol, table in by_protocol.items():
            if not protocol.corruption and (table["label"] >= 0).all():
                yield model, protocol, table


def per_class(table, names):
    """Of each class: name, images, top-1 in %, the class it is most often taken for, how often."""
    rows = []
    for label in np.unique(table["label"]):
        predictions = table["prediction"][table["label"] == label]
        taken_for = collections.Counter(predictions[predictions != label].tolist())
        other, times = taken_for.most_common(1)[0] if taken_for else (None, 0)
        top1 = 100 * (predictions == label).mean()
        other_name = "" if other is None else names[other]
        rows.append([names[label], len(predictions), f"{top1:.2f}", other_name, times])
    return rows


def confusions(table) -> tuple[np.ndarray, np.ndarray]:
    """The classes that have images, and how often each (row) was taken for each (column).

    A last column counts predictions of other classes.
    """
    labels = np.unique(table["label"])
    places = np.searchsorted(labels, table["prediction"]).clip(max=len(labels) - 1)
    places[labels[places] != table["prediction"]] = len(labels)
    counts = np.zeros((len(labels), len(labels) + 1), int)
    np.add.at(counts, (np.searchsorted(labels, table["label"]), places), 1)
    return labels, counts


def draw_confusions(table, names, title, path):
    """Draw which class was taken for which, unless the classes are more than ``MAX_CLASSES``.

    Returns:
        Whether there is a picture.
    """
    labels, counts = confusions(table)
    if not 2 <= len(labels) <= MAX_CLASSES:
        return False
    shown = [short(names[label]) for label in labels]
    columns = [*shown, "another"] if counts[:, -1].any() else shown
    counts = counts[:, : len(columns)]
    side = 2.5 + 0.32 * len(labels)
    figure, axis = plt.subplots(figsize=(side + 1, side + 0.6), layout="constrained")
    shares = 100 * counts / counts.sum(1, keepdims=True)
    colours = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    if len(labels) <= MAX_COUNTED:
        for row, column in zip(*counts.nonzero()):
            light = "white" if shares[row, column] > 60 else "black"
            text = {"ha": "center", "va": "center", "fontsize": 7, "color": light}
            axis.text(column, row, counts[row, column], **text)
    axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8, parse_math=False)
    axis.set_yticks(range(len(shown)), shown, fontsize=8, parse_math=False)
    axis.set(xlabel="predicted class", ylabel="true class")
    axis.set_title(title, fontsize=9, parse_math=False)
    figure.colorbar(colours, shrink=0.6, label="% of the class")
    caption = "A row is a class's images, by what they were taken for"
    caption += ": cells have their number." if len(labels) <= MAX_COUNTED else "."
    save(figure, path, caption)
    return True


def draw_mistakes(mistakes, title, path):
    """Draw the surest mistakes of a protocol: image, file name, true and predicted class."""
    columns = min(5, len(mistakes))
    rows = -(-len(mistakes) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(0.4 + 2.1 * columns, 5), 1 + 2.7 * rows), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (confidence, (file, true, predicted), image) in zip(axes.flat, mistakes):
        axis.imshow(image)
        lines = [middle_cut(file_name(file)), f"is {short(true)}"]
        lines.append(f"taken for {short(predicted)}, {100 * confidence:.3g} %")
        axis.set_title("\n".join(lines), fontsize=7, parse_math=False)
    figure.suptitle(title, fontsize=9, parse_math=False)
    save(figure, path, "The mistakes of the highest confidence, as the model saw the images.")


def save(figure, path, caption):
    """Write a picture as PNG; names in scripts that the font lacks are boxes, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        report.save(figure, path, caption, suffixes=[".png"], dpi=100)


def short(name: str) -> str:
    """A class's name for a picture: of several words that mean it the first, and cut."""
    parts = (part.split(",")[0] for part in name.split(" | "))
    words = " | ".join(re.sub(r"^n\d{8} ", "", part) for part in parts)
    return words if len(words) <= MAX_LETTERS else f"{words[: MAX_LETTERS - 3]}..."


def middle_cut(name: str) -> str:
    """A file's name for a picture: its begin and its end."""
    half = MAX_LETTERS // 2
    return name if len(name) <= 2 * half + 3 else f"{name[:half]}...{name[-half:]}"
