"""One thread for each process: on a busy machine, threads that wait for one another make seconds into minutes."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
