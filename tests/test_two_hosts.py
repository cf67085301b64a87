"""Two hosts, each a network namespace: they train as one machine does, until one dies."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TORCHRUN, final_weights, recipe, updates_saved, wait_for, write_folder

pytestmark = pytest.mark.slow
ADDRESSES = ("192.0.2.1", "192.0.2.2")  # for documentation, RFC 5737: nobody's
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "1", "GLOO_SOCKET_IFNAME": "wire"}


def on(host, *command):
    """A command line that runs in the namespaces of the process ``host``."""
    return [
        *"nsenter --preserve-credentials --user --net --target".split(), str(host.pid), *command,
    ]  # fmt: skip


def hold(*command):
    """Start a process whose namespaces stay until it is killed."""
    process = subprocess.Popen(
        [*command, "sh", "-c", "echo ready; exec sleep 600"], stdout=-1, stderr=-1, text=True
    )
    if process.stdout.readline() != "ready\n":
        pytest.skip(f"no network namespaces here: {process.communicate()[1].strip()}")
    return process


@pytest.fixture(scope="module")
def hosts():
    """Two processes that hold a network namespace each, with a cable between the two."""
    for tool in ("unshare", "nsenter", "ip"):
        if subprocess.run(["which", tool], capture_output=True).returncode:
            pytest.skip(f"no network namespaces here: the program {tool} is missing")
    first = hold("unshare", "--user", "--map-root-user", "--net")
    second = hold(*on(first, "unshare", "--net"))
    cable = f"link add wire type veth peer name wire netns {second.pid}"
    links = [on(first, "ip", *cable.split())]
    for host, address in zip((first, second), ADDRESSES):
        links += [
            on(host, "ip", *line.split())
            for line in ("link set lo up", f"addr add {address}/24 dev wire")
        ]
        links.append(on(host, "ip", "link", "set", "wire", "up"))
    for link in links:
        done = subprocess.run(link, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no network namespaces here: {' '.join(link)}: {done.stderr.strip()}")
    yield first, second
    for host in (second, first):
        host.kill()
        host.wait()


def launch(hosts, recipe, output, *flags):
    """Start a run of two processes, one on each host."""
    config = [
        str(ROOT / "accelerate_configs" / "multi_node.yaml"),
        "--num_processes",
        "2",
        "--mixed_precision",
        "no",
    ]
    script = ["train_imagenet.py", "--recipe", str(recipe), "--output", str(output), *flags]
    processes = []
    for rank, host in enumerate(hosts):
        place = ["--machine_rank", str(rank), "--main_process_ip", ADDRESSES[0]]
        command = [
            sys.executable, *"-m accelerate.commands.launch --config_file".split(), *config,
            *place, *script,
        ]  # fmt: skip
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(on(host, *command), cwd=ROOT, env=ENVIRONMENT, **pipes))
    return processes


def die(host):
    """Kill all that runs on a host, at once."""
    network = os.readlink(f"/proc/{host.pid}/ns/net")
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended by itself
            if os.readlink(process / "ns" / "net") == network and process.name != str(host.pid):
                os.kill(int(process.name), signal.SIGKILL)


def finish(processes):
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A recipe of 32 updates, and the weights that two processes of one machine end with."""
    folder = tmp_path_factory.mktemp("hosts")
    changes = {
        "model": "test_resnet", "model_kwargs": {}, "img_size": 32, "method": "obf", "epochs": 8,
        "workers": 0,
    }  # fmt: skip
    path = recipe(folder, write_folder(folder / "images", images=8), **changes)
    flags = ["train_imagenet.py", "--recipe", str(path), "--output", str(folder / "one")]
    command = [*TORCHRUN, "2", *flags]
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "GLOO_SOCKET_IFNAME"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return path, final_weights(folder / "one")


def test_two_hosts_equal_one_machine(tmp_path, hosts, run):
    path, weights = run
    finish(launch(hosts, path, tmp_path / "two"))
    torch.testing.assert_close(final_weights(tmp_path / "two"), weights, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dead, how", [(0, "killed"), (1, "unplugged")])
def test_host_dies_the_other_says_so_and_the_run_resumes(tmp_path, hosts, run, dead, how):
    path, weights = run
    # TCP gives up on a silent host after 15 tries, a quarter of an hour; here after 3.
    subprocess.run(
        on(hosts[1 - dead], "sh", "-c", "echo 3 > /proc/sys/net/ipv4/tcp_retries2"), check=True
    )
    processes = launch(hosts, path, tmp_path / "run")
    wait_for(tmp_path / "run" / "checkpoints" / "step-00000005", processes[1 - dead])
    try:
        if how == "unplugged":
            subprocess.run(on(hosts[dead], "ip", "link", "set", "wire", "down"), check=True)
        else:
            die(hosts[dead])
        start = time.monotonic()
        out, _ = processes[1 - dead].communicate(timeout=60)
        assert processes[1 - dead].returncode != 0
        assert "error: another process of this run died or cannot be reached" in out
        assert "Traceback" not in out.split("error: another process")[0]
        assert time.monotonic() - start < 45
    finally:
        die(hosts[dead])
        processes[dead].wait()
        subprocess.run(on(hosts[dead], "ip", "link", "set", "wire", "up"), check=True)
    assert 5 <= updates_saved(tmp_path / "run") < 32
    finish(launch(hosts, path, tmp_path / "run", "--resume", "auto"))
    torch.testing.assert_close(final_weights(tmp_path / "run"), weights, rtol=1e-6, atol=1e-6)
