"""Errors that a user can act on: one line, and no traceback."""

import contextlib
import difflib
import gc
import multiprocessing
import signal
import sys
import traceback

import torch
from accelerate.state import PartialState


class InputError(ValueError):
    """Something that the user can mend; the scripts print its message and no traceback."""

    def __str__(self):
        # A loader worker's error comes with the worker's traceback before the message.
        return super().__str__().split("errors.InputError: ")[-1].strip()


def did_you_mean(word, known) -> str:
    """The end of an error about an unknown word: the nearest known one, or nothing if none is."""
    nearest = difflib.get_close_matches(str(word), known, 1)
    return f": did you mean {nearest[0]!r}?" if nearest else ""


def the_nearest(word: str, known: list[str]) -> str:
    """The end of an error about an unknown name of many: the nearest few, or nothing if none is."""
    nearest = difflib.get_close_matches(word, known, 3)
    return f"; the nearest are {', '.join(nearest)}" if nearest else ""


def lost_process(error: Exception) -> bool:
    """Whether an error says that another process of the run cannot be reached.

    gloo has no class for that.
    """
    lost = isinstance(error, torch.distributed.DistError)
    return lost or (isinstance(error, RuntimeError) and "gloo" in str(error))


# Of images that do not come, and of workers that die.
WORKER_REMEDY = (
    "lower --workers (0 needs no shared memory) or the batch that is loaded at once, or give the "
    "container more shared memory (docker run --shm-size 8g)"
)


def lost_worker(error: Exception) -> str:
    """What to do about an error that says that a loader worker died, hangs or lacks memory."""
    text = str(error)
    if not isinstance(error, (RuntimeError, OSError, EOFError)):
        return ""
    if "Bus error" in text or "shared memory" in text or "</torch_" in text:
        return f"the shared memory (/dev/shm) of the loader workers is full: {WORKER_REMEDY}"
    died = "killed by signal" in text or "exited unexpectedly" in text
    if ("DataLoader worker" in text and died) or _receiving(error):
        killed = "a loader worker was killed, as the system does when memory runs out"
        return f"{killed}: lower --workers, or the batch that is loaded at once"
    if "DataLoader timed out" in text:
        stuck = f"no batch came from the loader workers ({text})"
        return f"{stuck}: see whether the disk answers, and try --workers 0"
    return ""


def _receiving(error):
    """Whether a loader failed to take a batch over from its worker."""
    if not isinstance(error, (OSError, EOFError)):
        return False
    files = {frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)}
    loads = any(file.endswith("utils/data/dataloader.py") for file in files)
    return loads and any("/multiprocessing/" in file for file in files)


@contextlib.contextmanager
def clear_errors():
    """End the program with one line for what the user can mend, or if another process died."""
    try:
        yield
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        saved = "what was saved is intact (training: go on with --resume auto)"
        print(f"\ninterrupted: {saved}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except (RuntimeError, OSError, EOFError) as error:
        anew = "What was saved is intact: the same command begins anew (training: --resume auto)"
        if remedy := lost_worker(error):
            raise SystemExit(f"error: {remedy}. {anew}") from None
        if not lost_process(error):
            raise
        raise SystemExit(
            "error: another process of this run died or cannot be reached; look for its own error "
            f"({error}). {anew}, in all processes"
        ) from None
    else:
        # Garbage may hold the process group, whose threads would go on. If one of them frees a
        # tensor while Python ends, the program aborts.
        gc.collect()
        PartialState().destroy_process_group()
    finally:
        # Loader workers outlive a SIGTERM by a minute, also the one of this program's own end.
        # Meanwhile without torch's handler, which takes a killed worker for an accident.
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join()
        signal.signal(signal.SIGCHLD, handler)
