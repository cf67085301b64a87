"""Every example, beside copies of what it imports in an empty folder, trains on its own data.

test_text_classification.py has the one that needs a model and data of others.
"""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
NEEDS = {
    "hf_trainer": "transformers",
    "token_classification": "transformers",
    "lightning_module": "lightning",
    "optuna_search": "optuna",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "example", [example for example in EXAMPLES if example != "text_classification"]
)
def test_example_trains(tmp_path, example):
    if example in NEEDS and find_spec(NEEDS[example]) is None:
        pytest.skip(f"needs {NEEDS[example]}: pip install -r examples/requirements.txt")
    for file in {"sam_obf.py", "examples/hf_trainer.py", f"examples/{example}.py"}:
        shutil.copy(ROOT / file, tmp_path)
    command = [sys.executable, f"{example}.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"test accuracy ([\d.]+)%", done.stdout)[1]) > 90


@pytest.mark.slow
def test_a_search_goes_on_in_its_storage(tmp_path):
    pytest.importorskip("optuna", reason="pip install -r examples/requirements.txt")
    shutil.copy(ROOT / "sam_obf.py", tmp_path)
    text = (ROOT / "examples" / "optuna_search.py").read_text()
    small = text.replace("EPOCHS, TRIALS = 20, 15", "EPOCHS, TRIALS = 6, 8")
    assert small != text
    # No test image has its own label: what is printed last must not be of the images searched on.
    search = small.replace("EPOCHS,", "labels[test] = (labels[test] + 1) % 10\nEPOCHS,")
    assert search != small
    # Whether a trial falls behind is luck.
    search = search.replace("n_startup_trials=5)", "n_startup_trials=5, seed=0)", 1)
    assert "seed=0" in search
    (tmp_path / "search.py").write_text(search)
    command = [sys.executable, "search.py", f"sqlite:///{tmp_path / 'search.db'}"]
    for trials in (8, 16):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert f"best of {trials} trials: {{'rho': " in done.stdout
        assert float(re.search(r"test accuracy ([\d.]+)%", done.stdout)[1]) < 20
    assert "Trial 15 " in done.stderr and "pruned" in done.stderr
