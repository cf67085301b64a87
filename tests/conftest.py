"""Settings of the session and of the programs that tests start; they come before torch."""

import atexit
import functools
import os
import shutil
import tempfile

# On a busy machine, threads that wait for one another make seconds into minutes.
os.environ["OMP_NUM_THREADS"] = "1"
# What tests load stays out of the user's own caches.
for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_MODULES_CACHE"):
    os.environ.pop(name, None)
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import datasets  # noqa: E402
import pytest  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.utils import set_seed  # noqa: E402
from helpers import fresh_process, write_folder  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from timm.models import save_for_hf  # noqa: E402

from common import images as images_module  # noqa: E402

# timm reads its tables of ImageNet's classes anew for each run, which costs more than a small one.
images_module.ImageNetInfo = functools.cache(images_module.ImageNetInfo)
# So many seconds datasets would wait at the end of each stream of Parquet files.
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
# And so many seconds a loader for each of its workers' end; usually 5.
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 1.0


@pytest.fixture(autouse=True)
def seed():
    """Whatever a test draws, it draws the same each time, alone as among others."""
    set_seed(0)


@pytest.fixture(autouse=True)
def undrawn_pictures(request, monkeypatch):
    """Pictures are empty files but in tests marked ``pictures``: drawing costs more than a run."""
    if "pictures" not in request.keywords:
        monkeypatch.setattr(Figure, "draw_without_rendering", lambda figure: None)
        monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: path.touch())


@pytest.fixture
def accelerator():
    """Accelerate on the CPU, in one process."""
    fresh_process()
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of three images each, to train and to validate on: an update an epoch."""
    return write_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small model of two classes in timm's layout, whose seed is that of no run."""
    folder = tmp_path_factory.mktemp("checkpoint") / "run" / "best"
    torch.manual_seed(7)
    model = timm.create_model("test_resnet", num_classes=2)
    save_for_hf(model, folder, safe_serialization=True)
    return folder
