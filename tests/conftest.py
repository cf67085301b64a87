"""Settings of the whole session, and of the programs that tests start; they must come before torch and datasets."""

import atexit
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
