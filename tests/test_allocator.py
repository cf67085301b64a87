"""Freed memory is kept for the next tensor, with glibc and unless the user chose otherwise."""

import ctypes
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
from helpers import ROOT

from common import allocator

# How often the system gave the process a page for ten tensors of 64 MiB, one after the other.
FAULTS = """
numpy.ones(2**26, numpy.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    numpy.ones(2**26, numpy.uint8)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
COUNT = f"""
import resource, sys
import numpy
from common import allocator
kept = allocator.keep_freed_memory() if sys.argv[1] == "keep" else False
{FAULTS}"""
# The same after a script's main() has read its flags, or a loader worker has begun: a child each.
COUNT_IN_EACH = f"""
import contextlib, importlib, io, os, resource, sys
import numpy
from accelerate import Accelerator
from common import loaders
options = loaders.worker_options(Accelerator(cpu=True), 1)
scripts = {{name: importlib.import_module(name) for name in sys.argv[1].split()}}
for name in [*scripts, "worker"]:
    if os.fork():
        os.wait()
        continue
    if name == "worker":
        options["worker_init_fn"](0)
    else:
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            scripts[name].main(["--help"])
    kept = name
{textwrap.indent(FAULTS, "    ")}
    sys.stdout.flush()
    os._exit(0)
"""
SCRIPTS = "train_imagenet finetune_cifar eval_robustness measure_forgetting sweep"
PAGES = 10 * 2**26 // os.sysconf("SC_PAGE_SIZE")


def output_of(program, *flags, **environment):
    """What a process of its own prints."""
    command = [sys.executable, "-c", program, *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def count(what, **environment):
    """Whether memory is kept, and the page faults, in a process of its own."""
    kept, faults = output_of(COUNT, what, **environment).split()
    return kept == "True", int(faults)


def has_glibc():
    try:
        return hasattr(ctypes.CDLL("libc.so.6"), "gnu_get_libc_version")
    except OSError:
        return False


needs_glibc = pytest.mark.skipif(not has_glibc(), reason="needs glibc")


@needs_glibc
def test_a_tensor_gets_the_memory_of_the_one_before_it():
    huge = {"NUMPY_MADVISE_HUGEPAGE": "0"}  # else a fault may bring 512 pages at once
    assert count("keep", **huge) == (True, pytest.approx(0, abs=PAGES // 100))
    assert count("leave", **huge)[1] > PAGES // 2


@pytest.mark.slow
@needs_glibc
@pytest.mark.parametrize("chosen", [{}, {"MALLOC_MMAP_THRESHOLD_": "131072"}])
def test_each_script_and_its_loader_workers_keep_freed_memory_unless_told_otherwise(chosen):
    lines = output_of(COUNT_IN_EACH, SCRIPTS, NUMPY_MADVISE_HUGEPAGE="0", **chosen).splitlines()
    faults = {name: int(number) for name, number in map(str.split, lines)}
    assert list(faults) == [*SCRIPTS.split(), "worker"]
    kept = [name for name, number in faults.items() if number < PAGES // 100]
    assert kept == ([] if chosen else list(faults))


@needs_glibc
@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_MMAP_THRESHOLD_": "131072"},
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"MALLOC_MMAP_MAX_": "65536"},
        {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2:glibc.malloc.mmap_threshold=131072"},
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_the_users_own_limits_stay(environment):
    kept, faults = count("keep", NUMPY_MADVISE_HUGEPAGE="0", **environment)
    assert not kept and faults > PAGES // 2


@needs_glibc
def test_variables_that_set_something_else_do_not_matter():
    assert count("keep", MALLOC_ARENA_MAX="2", GLIBC_TUNABLES="glibc.malloc.arena_max=2")[0]


@needs_glibc
@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_another_allocator_stays(tmp_path):
    (tmp_path / "own.c").write_text(
        "#include <stddef.h>\n"
        "extern void *__libc_malloc(size_t);\n"
        "void *malloc(size_t size) { return __libc_malloc(size); }\n"
    )
    library = str(tmp_path / "own.so")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, str(tmp_path / "own.c")], check=True)
    assert not count("keep", LD_PRELOAD=library)[0]


def test_other_systems_are_left_alone(monkeypatch):
    for platform in ("darwin", "win32"):
        monkeypatch.setattr(sys, "platform", platform)
        assert not allocator.keep_freed_memory()


def test_a_c_library_that_is_not_glibc_is_left_alone(monkeypatch):
    def missing(name):
        raise OSError

    for library in (missing, lambda name: object()):
        monkeypatch.setattr(ctypes, "CDLL", library)
        assert not allocator.keep_freed_memory()
