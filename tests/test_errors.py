"""What a user reads at the end of a program that failed."""

import pytest
from accelerate import Accelerator
from helpers import in_process, recipe, run_script, small_recipe, write_folder

from common import errors


def test_ctrl_c_is_one_line_and_no_traceback(capsys):
    with pytest.raises(SystemExit) as ended, errors.clear_errors():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip().startswith("interrupted: what was saved is intact")


def test_process_that_dies_while_a_checkpoint_is_written_is_called_that_and_no_full_disk(tmp_path, images, monkeypatch):
    def save_state(*_):
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer")

    monkeypatch.setattr(Accelerator, "save_state", save_state)
    with pytest.raises(SystemExit, match=r"^error: another process of this run died .*reset by peer.* --resume auto"):
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
    assert last.startswith(f"error: cannot read the image {bad}: replace or remove it (UnidentifiedImageError(")
    assert "Traceback" not in done.stderr
