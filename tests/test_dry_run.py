"""What a dry run says, and that it leaves nothing behind."""

import re

import pytest
from helpers import train

import train_imagenet
from common import dry_run


@pytest.mark.parametrize(
    "seconds, words",
    [
        (0.021, "0.021 seconds"),
        (40, "40 seconds"),
        (150, "2.5 minutes"),
        (9000, "2.5 hours"),
        (950400, "11 days"),
    ],
)
def test_duration_is_in_a_sensible_unit(seconds, words):
    assert dry_run.duration(seconds) == words


def test_dry_run_reports_and_writes_nothing(tmp_path, images, capsys):
    assert (
        train(train_imagenet, tmp_path, "--dry-run", dataset=str(images), model="test_resnet")
        is None
    )
    printed = capsys.readouterr().out
    assert "4 examples per update: 1 process x 1 loader batch x micro-batches of 2" in printed
    assert re.search(
        r"^1 epoch of 1 update of [\d.]+ seconds: about [\d.]+ seconds, and", printed, re.MULTILINE
    )
    assert "GiB on cpu" in printed and "nothing was written" in printed
    assert not (tmp_path / "run").exists()
