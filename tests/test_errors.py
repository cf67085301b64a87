"""What a user reads at the end of a program that failed."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate import Accelerator
from helpers import ROOT, in_process, recipe, run_script, small_recipe, write_folder

from common import errors


def test_ctrl_c_is_one_line_and_no_traceback(capsys):
    with pytest.raises(SystemExit) as ended, errors.clear_errors():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip().startswith("interrupted: what was saved is intact")


def test_process_that_dies_while_a_checkpoint_is_written_is_called_that_and_no_full_disk(
    tmp_path, images, monkeypatch
):
    def save_state(*_):
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer")

    monkeypatch.setattr(Accelerator, "save_state", save_state)
    with pytest.raises(
        SystemExit,
        match=r"^error: another process of this run died .*reset by peer.* --resume auto",
    ):
        with errors.clear_errors():
            in_process(recipe(tmp_path, images, workers=0), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_ends_the_run_with_its_name(tmp_path, workers):
    dataset = write_folder(tmp_path / "images")
    bad = dataset / "train" / "dog" / "bad.jpg"
    bad.write_bytes(b"not an image")
    done = run_script(*small_recipe(tmp_path, dataset, workers=workers, batch_size=7, m=7))
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"error: cannot read the image {bad}: replace or remove it (UnidentifiedImageError("
    )
    assert "Traceback" not in done.stderr


KILLED = """
import os, signal, sys
sys.path.insert(0, os.getcwd())
import multiprocessing, train_imagenet
from common import errors, loop

update = loop.update

def kill_a_worker(*args, **options):
    for worker in multiprocessing.active_children()[:1]:  # none before the first batch
        os.kill(worker.pid, signal.SIGKILL)
    return update(*args, **options)

loop.update = kill_a_worker
with errors.clear_errors():
    train_imagenet.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_loader_worker_is_one_line_with_what_to_do(tmp_path, images):
    flags = small_recipe(tmp_path, images, workers=2, epochs=500)
    command = [sys.executable, "-c", KILLED, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if not line.startswith("epoch ")]
    assert len(lines) == 1 and lines[0].startswith("error: a loader worker was killed"), done.stderr
    assert all(word in lines[0] for word in ("memory", "--workers", "--resume auto"))


def fail_below(files, error):
    """Raise an error below a frame of each file."""
    if not files:
        raise error
    names = {}
    exec(compile("def call(f, *args): f(*args)", files[0], "exec"), names)
    names["call"](fail_below, files[1:], error)


@pytest.mark.parametrize("kind", [ConnectionResetError, EOFError])
def test_a_batch_that_a_dying_worker_does_not_hand_over_says_the_same(kind):
    """Torch sees the connection's end before the worker's."""
    files = ["torch/utils/data/dataloader.py", "python/multiprocessing/connection.py"]
    with pytest.raises(SystemExit, match=r"^error: a loader worker was killed"):
        with errors.clear_errors():
            fail_below(files, kind())
    for others in (files[:1], files[1:]):
        with pytest.raises(kind), errors.clear_errors():
            fail_below(others, kind())


SHARED_MEMORY = [
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
    "workers are out of shared memory. Please try to raise your shared memory limit.",
    "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback ...\nRuntimeError: "
    "unable to write to file </torch_7_1_0>: No space left on device (28)",
    "unable to allocate shared memory(shm) for file </torch_7_1_0>: No space left on device (28)",
]


@pytest.mark.parametrize("text", SHARED_MEMORY)
def test_full_shared_memory_is_one_line_with_what_to_do(text):
    with pytest.raises(SystemExit, match=r"^error: the shared memory .* --workers .* --shm-size"):
        with errors.clear_errors():
            raise RuntimeError(text)


def test_other_errors_keep_their_traceback():
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError("gone")):
        with pytest.raises(type(error)), errors.clear_errors():
            raise error


def test_workers_end_with_the_program_and_later_ones_are_watched_as_before():
    """Torch sets its handler once a process; without it, a killed worker is a wait of minutes."""
    called = []
    previous = signal.signal(signal.SIGCHLD, lambda *args: called.append(args))
    try:
        with errors.clear_errors():
            first = torch.multiprocessing.get_context("fork").Process(target=time.sleep, args=[60])
            first.start()
        assert not first.is_alive() and not called
        last = torch.multiprocessing.get_context("fork").Process(target=os._exit, args=[1])
        last.start()
        last.join()
        assert called
    finally:
        signal.signal(signal.SIGCHLD, previous)


@pytest.mark.slow
def test_without_a_home_to_write_to_a_run_trains_and_evaluates(tmp_path, images):
    """As a container's user without one has it; nobody can make a folder in /proc."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HOME": "/proc", "MPLCONFIGDIR": str(tmp_path / "matplotlib")}
    command = [sys.executable, "train_imagenet.py", *small_recipe(tmp_path, images)]
    options = {"capture_output": True, "text": True, "timeout": 120, "cwd": ROOT}
    done = subprocess.run(command, env=environment, **options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "results.json").exists()
