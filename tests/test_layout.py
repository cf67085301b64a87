"""The house: what stands where, and which file may import which."""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COPIED = ("sam_obf", "forgetting")
SCRIPTS = ("train_imagenet", "finetune_cifar", "eval_robustness", "measure_forgetting", "sweep")


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports, as "sam_obf" or "common.data"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in ("common", "robustness"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {
        name
        for name in found
        if name.partition(".")[0] in ("common", "robustness", *COPIED, *SCRIPTS)
    }


def test_the_root_holds_what_people_copy_and_run():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(COPIED + SCRIPTS)


@pytest.mark.parametrize("name", COPIED)
def test_a_file_to_copy_imports_nothing_of_the_project(name):
    assert imports(ROOT / f"{name}.py") == set()


@pytest.mark.parametrize(
    ("folder", "allowed"), [("common", ("common",)), ("robustness", ("common", "robustness"))]
)
def test_what_the_scripts_share_imports_downwards(folder, allowed):
    below = {f"{folder}.{path.stem}": imports(path) for path in (ROOT / folder).glob("*.py")}
    found = set().union(*below.values())
    assert {name.partition(".")[0] for name in found} <= {*allowed, *COPIED}
    ground = graphlib.TopologicalSorter(
        {name: names & below.keys() for name, names in below.items()}
    )
    ground.prepare()  # raises CycleError where files import each other


@pytest.mark.parametrize(
    "name", [*SCRIPTS, *(f"examples/{path.stem}" for path in (ROOT / "examples").glob("*.py"))]
)
def test_nothing_imports_from_a_script(name):
    assert not imports(ROOT / f"{name}.py") & set(SCRIPTS)


LAUNCHERS = {
    "python": [],
    # It has an --m
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"],
    "accelerate": [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "accelerate_configs" / "cpu.yaml"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_scripts_run_from_any_folder(tmp_path, launcher):
    flags = ["--recipe", str(ROOT / "recipes" / "digits.yaml"), "--m", "8", "--dry-run"]
    command = [sys.executable, *LAUNCHERS[launcher], str(ROOT / "train_imagenet.py"), *flags]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "nothing was written" in done.stdout and not list(tmp_path.iterdir())
