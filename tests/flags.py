"""The tables of docs/flags.md, from the scripts' help; ``python tests/flags.py`` writes them."""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval_robustness
import finetune_cifar
import measure_forgetting
import sweep
import train_imagenet
from common import settings

PAGE = Path(__file__).resolve().parents[1] / "docs" / "flags.md"
SECTION = re.compile(r"(?<=<!-- python tests/flags.py -->\n).*(?=<!-- end -->)", re.DOTALL)
SCRIPTS = (train_imagenet, finetune_cifar, eval_robustness, measure_forgetting, sweep)


def flags_of(script) -> list[argparse.Action]:
    return [action for action in script.parser()._actions if action.dest != "help"]


def check_every_flag_has_a_row(script, rows, file: str):
    """Assert that a test's tables, in ``file``, know each flag of a script."""
    new = [action.dest for action in flags_of(script) if action.dest not in rows]
    assert not new, (
        f"{', '.join(new)}: add a row to the table of {script.__name__} in {file}, which says what "
        f"the flag changes"
    )


def explained(action) -> str:
    """A flag's help, as ``--help`` shows it."""
    return action.help % {"default": action.default}


def tables() -> str:
    """A table for each script; of ``finetune_cifar`` only the defaults that are its own."""
    text = []
    for script in (s for s in SCRIPTS if s is not finetune_cifar):
        text += [f"\n## {script.__name__}.py\n", "| flag | |", "| --- | --- |"]
        for action in flags_of(script):
            listed = (
                action.choices and action.choices is not settings.TRACKERS
            )  # which depend on Accelerate's version
            choices = f" `{'`, `'.join(action.choices)}`:" if listed else ""
            name = (action.option_strings or [action.dest])[0]
            text.append(
                f"| `{name}` |{choices} {explained(action)} |".replace("|theta|", "abs(theta)")
            )
        if script is train_imagenet:
            usual = {
                action.dest: script.parser().get_default(action.dest) for action in flags_of(script)
            }
            own = {key: finetune_cifar.parser().get_default(key) for key in usual}
            changed = ", ".join(
                f"`--{key.replace('_', '-')} {own[key]}`" for key in usual if own[key] != usual[key]
            )
            text.append(
                f"\n`finetune_cifar.py` has the same flags; its defaults differ in {changed}. It "
                "also has:\n\n| flag | |\n| --- | --- |"
            )
            more = [action for action in flags_of(finetune_cifar) if action.dest not in usual]
            text += [f"| `{action.option_strings[0]}` | {explained(action)} |" for action in more]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    PAGE.write_text(SECTION.sub(lambda _: tables(), PAGE.read_text()))
