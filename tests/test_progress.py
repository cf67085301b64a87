"""Progress where there is no terminal: a few lines say how far the work is."""

import sys

import pytest

from common import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_a_line_comes_at_most_once_a_minute_and_at_the_end(clock, capsys):
    with progress.bar("v2", total=1000, unit="image") as bar:
        for second in range(1, 101):
            clock[0] = second
            bar.update(10)
    assert lines(capsys) == [
        "v2: 600/1,000 images, 10 images/s, 00:40 left",
        "v2: 1,000/1,000 images, 10 images/s, 00:00 left",
    ]


def test_a_line_has_the_values_and_what_a_resumed_run_did_before_is_no_speed(clock, capsys):
    bar = progress.bar("epoch 3/4", total=40, unit="update", initial=20)
    bar.set_postfix({"loss": "0.500", "lr": "0.1"})
    clock[0] = 10
    bar.update(5)
    bar.refresh()
    bar.close()  # nothing new
    expected = "epoch 3/4: 25/40 updates, loss 0.500, lr 0.1, 0.5 updates/s, 00:30 left"
    assert lines(capsys) == [expected]


def test_work_of_unknown_length_has_no_time_left(clock, capsys):
    bar = progress.bar("stream", total=None, unit="image")
    clock[0] = 2
    bar.update(6)
    bar.close()
    assert lines(capsys) == ["stream: 6 images, 3 images/s"]


def test_other_processes_show_nothing(clock, capsys):
    with progress.bar("v2", total=10, unit="image", disable=True) as bar:
        clock[0] = 100
        bar.update(10)
    assert lines(capsys) == []


def test_a_terminal_has_a_bar(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.bar("v2", total=10, unit="image", disable=True) as bar:
        assert isinstance(bar, progress.tqdm)
