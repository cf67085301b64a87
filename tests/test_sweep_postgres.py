"""sweep.py with its queue on a real PostgreSQL: the one that is installed, started here on a free port."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from test_sweep import calls, finish, free_port, start, table, wait_for_calls, write_sweep

import sweep

POINTS = {"seed": list(range(100))}
PROGRAMS = [path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))]
PROGRAMS += [Path(found).resolve().parent for found in [shutil.which("pg_ctl")] if found]

pytestmark = pytest.mark.slow
psycopg = pytest.importorskip("psycopg", reason="needs PostgreSQL's driver: pip install 'psycopg[binary]'")


class Server:
    """PostgreSQL in a temporary folder, on a port of this machine alone."""

    def __init__(self):
        self.folder, self.port = Path(tempfile.mkdtemp(prefix="postgres")), free_port()
        self.user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []  # it refuses to run as root
        if self.user:
            shutil.chown(self.folder, "postgres")
        self.run("initdb", "--username=postgres", "--auth=trust", "--no-sync")

    def run(self, program, *arguments):
        command = [*self.user, str(PROGRAMS[-1] / program), "--pgdata", str(self.folder / "data"), *arguments]
        subprocess.run(command, check=True, timeout=120, cwd="/", stdout=subprocess.DEVNULL)

    def start(self):
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        self.run("pg_ctl", "start", "--wait", "--log", str(self.folder / "log"), "--options", options)

    def stop(self):
        self.run("pg_ctl", "stop", "--wait", "--mode", "fast")

    def storage(self, tmp_path):
        """A new database."""
        url = f"127.0.0.1:{self.port}"
        with psycopg.connect(f"postgresql://postgres@{url}/postgres", autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{tmp_path.name}"')
        return ["--storage", f"postgresql+psycopg://postgres:secret@{url}/{tmp_path.name}"]


@pytest.fixture(scope="module")
def server():
    if not PROGRAMS:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    server = Server()
    server.start()
    yield server
    server.stop()
    shutil.rmtree(server.folder)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(sweep, "HEARTBEAT", 1)


def wait_for_bars(*workers, seconds=60):
    """Until every worker has opened the storage; one that cannot gives up sooner than one that has trained."""
    deadline = time.monotonic() + seconds
    while not all("run/s" in one.output.read_text() for one in workers) and time.monotonic() < deadline:
        time.sleep(0.02)


def names():
    return sorted(f"seed={seed}" for seed in POINTS["seed"])


def test_four_workers_train_every_point_once(server, tmp_path):
    flags = write_sweep(tmp_path, POINTS) + server.storage(tmp_path)
    status, printed = finish(*(start(tmp_path, flags, grace=60, seconds=0.02) for _ in range(4)), seconds=300)
    assert status == [0] * 4, printed
    assert sorted(calls(tmp_path, "begin")) == sorted(calls(tmp_path, "end")) == names()
    assert len(table(tmp_path)) == 100


def test_the_run_of_a_killed_worker_is_trained_again_and_no_other(server, tmp_path):
    flags = write_sweep(tmp_path, POINTS) + server.storage(tmp_path)
    workers = [start(tmp_path, flags, grace=10, seconds=0.1) for _ in range(4)]
    wait_for_calls(tmp_path, 20)
    os.kill(workers[0].pid, signal.SIGKILL)
    status, printed = finish(*workers, seconds=300)
    assert status == [-signal.SIGKILL, 0, 0, 0], printed
    assert sorted(set(calls(tmp_path, "end"))) == names() and len(table(tmp_path)) == 100
    assert 100 <= len(calls(tmp_path, "begin")) <= 101  # not again, if it was between two runs


def test_a_run_outlives_a_restart_of_the_server(server, tmp_path):
    """Its heartbeats go on: else the other worker would take it, after three seconds."""
    flags = write_sweep(tmp_path, {"seed": [0, 1]}) + server.storage(tmp_path)
    workers = [start(tmp_path, flags, grace=3, seconds=seconds) for seconds in (14, 5)]
    wait_for_calls(tmp_path, 2)
    server.stop()
    time.sleep(1.5)
    server.start()
    status, printed = finish(*workers)
    assert status == [0, 0], printed
    assert sorted(calls(tmp_path, "begin")) == sorted(calls(tmp_path, "end")) == ["seed=0", "seed=1"]


def test_workers_go_on_after_a_restart_or_say_what_to_do_and_none_is_lost(server, tmp_path):
    flags = write_sweep(tmp_path, POINTS) + server.storage(tmp_path)
    workers = [start(tmp_path, flags, grace=10, seconds=0.1) for _ in range(4)]
    wait_for_bars(*workers)
    wait_for_calls(tmp_path, 20)
    server.stop()
    time.sleep(2)
    server.start()
    status, printed = finish(*workers, seconds=300)
    for code, text in zip(status, printed):
        last = text.splitlines()[-1]
        lost = last.startswith("error: lost the storage: ") and last.endswith(
            "Once it is back, the same command goes on"
        )
        assert code == 0 or (code == 1 and lost), text
    status, printed = finish(start(tmp_path, flags, grace=10, seconds=0.05), seconds=300)
    assert status == [0], printed
    assert sorted(set(calls(tmp_path, "end"))) == names() and len(table(tmp_path)) == 100
    assert len(calls(tmp_path, "begin")) <= 104  # of each worker, at most the run whose result was not stored


def test_a_server_that_is_down_is_named_without_the_password(server, tmp_path):
    flags = write_sweep(tmp_path, {"seed": [0]}) + server.storage(tmp_path)
    server.stop()
    status, (printed,) = finish(start(tmp_path, flags))
    server.start()
    assert status == [1] and "Traceback" not in printed
    last = printed.splitlines()[-1]
    assert last.startswith("error: cannot use the storage postgresql+psycopg://postgres:***@127.0.0.1")
    assert "refused" in last and "Start its server" in last and "secret" not in printed
