"""The README's tables of flags and the help that they come from."""

import re
from pathlib import Path

import flags
import pytest

from common import settings

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_readme_has_the_tables_of_every_flag():
    section = re.search(r"<!-- python tests/flags.py -->\n(.*)<!-- end -->", README, re.DOTALL)[1]
    assert section == flags.tables(), "put into the README what python tests/flags.py prints"


@pytest.mark.parametrize("script", flags.SCRIPTS, ids=lambda script: script.__name__)
def test_help_of_every_flag_ends_with_its_default(script):
    for action in flags.flags_of(script):
        text = flags.explained(action)
        shown = re.search(r"\S.* \((.+)\)$", text)
        assert shown, f"{action.dest}: {text!r}"
        if action.dest == "workers":  # its default depends on the machine, and the help must not
            assert shown[1] == "the machine's cores, at most 4" and action.default == settings.WORKERS <= 4
        elif isinstance(action.default, (str, int, float)) and not isinstance(action.default, bool):
            assert shown[1].startswith(str(action.default)), f"{action.dest}: {text!r}"


def test_readme_names_no_flag_that_does_not_exist():
    known = {name for script in flags.SCRIPTS for action in flags.flags_of(script) for name in action.option_strings}
    launchers = {"--config_file", "--num_processes", "--nproc_per_node", "--standalone", "--dynamo_backend"}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README))
    assert named - known - launchers - {"--rounds", "--models", "--optimizers", "--report"} == set()
