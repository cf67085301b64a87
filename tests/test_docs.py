"""README.md, docs/ and the pages of experiments: flags, links, commands and code that they name."""

import collections
import itertools
import os
import re
import shlex
import subprocess
from pathlib import Path

import flags
import pytest
import torch
from torch import nn

import eval_robustness
import finetune_cifar
import measure_forgetting
import sweep
import train_imagenet
from common import settings

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted((ROOT / "experiments").glob("*/README.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *EXPERIMENTS]
LINKED = [*PAGES, ROOT / "benchmarks" / "README.md"]
MOST_LINES = 250
# Flags of launchers and of pytest, which the pages name too.
LAUNCHERS = {
    "--config_file",
    "--num_processes",
    "--nproc_per_node",
    "--standalone",
    "--dynamo_backend",
    "--dist",
}
COMING_FROM = ROOT / "docs" / "coming_from.md"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


OUR_SCRIPTS = {f"{script.__name__}.py": script for script in flags.SCRIPTS}


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """The words of every command of a page that runs Python, once for each value of a loop."""
    found = []
    for line in itertools.chain.from_iterable(
        block.splitlines() for page in LINKED for block in blocks(page, "sh")
    ):
        loop = re.match(r"for (\w+) in ([^;]+);", line)
        for value in loop[2].split() if loop else [""]:
            text = line.replace(f"${loop[1]}", value) if loop else line
            for command in re.split(r"&&|[;&|](?!\w)", text):
                words = shlex.split(command, comments=True)
                if runs_python(words) and words not in found:
                    found.append(words)
    return found


def runs_python(words) -> bool:
    return any(word.endswith(".py") or word.startswith("experiments.") for word in words)


def test_docs_have_the_tables_of_every_flag():
    assert flags.SECTION.search(flags.PAGE.read_text())[0] == flags.tables(), (
        "run python tests/flags.py"
    )


@pytest.mark.parametrize("script", flags.SCRIPTS, ids=lambda script: script.__name__)
def test_help_of_every_flag_ends_with_its_default(script):
    for action in flags.flags_of(script):
        text = flags.explained(action)
        shown = re.search(r"\S.* \((.+)\)$", text)
        assert shown, f"{action.dest}: {text!r}"
        if action.dest == "workers":  # the one default that depends on the machine
            assert shown[1] == "the machine's cores, at most 4"
        elif isinstance(action.default, (str, int, float)) and not isinstance(action.default, bool):
            assert shown[1].startswith(str(action.default)), f"{action.dest}: {text!r}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_names_no_flag_that_does_not_exist(page):
    known = {"--help"}
    for script in flags.SCRIPTS:
        for action in flags.flags_of(script):
            known |= set(action.option_strings)
    for script in [*ROOT.glob("experiments/*/*.py"), *ROOT.glob("examples/*.py")]:
        known |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', script.read_text()))
    text = page.read_text()
    if page == COMING_FROM:  # the first column of its tables has the flags of the other code
        text = re.sub(r"^\| `[^|]*\|", "|", text, flags=re.MULTILINE)
        text = re.sub(r"`(--sharpness-m|--min-rho)`", "", text)
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert named - known - LAUNCHERS == set()


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_a_page_can_be_read_in_one_sitting(page):
    assert len(page.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_every_link_of_a_page_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists() and target.is_relative_to(ROOT.resolve()), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def check_command(words):
    """Check that a command's files exist, and that the script takes its flags."""
    for word in words:
        if re.match(r"(recipes|accelerate_configs|examples|experiments|benchmarks|tests)/", word):
            assert Path(word).exists(), word
    if "-m" in words[:2]:  # python -m MODULE
        assert Path(*words[2].split(".")).with_suffix(".py").exists(), words[2]
        return
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, argv = OUR_SCRIPTS.get(words[at]), words[at + 1 :]
    if script in (eval_robustness, measure_forgetting):
        script.parse(argv)
    elif script is sweep:
        args, rest = sweep.parse(argv)
        content = sweep.read_sweep(Path(args.sweep))
        run = train_imagenet if args.script == "train_imagenet" else finetune_cifar
        first = sweep.points_of(args, content)[0]
        own = sweep.flags_of(args, content, rest, first)
        settings.parse(run.parser(), [*own, "--dry-run"])
    elif script is not None:
        settings.parse(script.parser(), [*argv, "--dry-run"])  # lets the output folder exist
    else:
        assert Path(words[at]).exists()


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_scripts_take_every_command_of_the_pages(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_command(words)


@pytest.mark.parametrize("script", sorted((ROOT / "experiments").glob("*/run.sh")), ids=name_of)
def test_the_scripts_take_every_command_of_an_experiment(script, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    log = tmp_path / "log"
    for name in ("python", "torchrun"):  # which only note how they were called
        stub = tmp_path / name
        stub.write_text(f'#!/bin/bash\nline=$(printf "%q " {name} "$@")\necho "$line" >> {log}\n')
        stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", str(script)], check=True, env=environment, timeout=60)
    called = [shlex.split(line) for line in log.read_text().splitlines()]
    assert called[-1][:2] == ["python", "-m"] and "--collect" in called[-1]
    for words in called:
        check_command(words)


def test_the_test_command_stands_on_one_line():
    line = next(
        line for line in (ROOT / "README.md").read_text().splitlines() if "-m pytest" in line
    )
    words = [word.strip("`") for word in shlex.split(line)]  # .ci/run runs it
    assert {"pytest", "requirements.txt", "tests/requirements.txt"} <= set(words)


def test_the_first_code_of_the_readme_trains():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(16, 4), torch.arange(16) % 3
    before = [p.clone() for p in model.parameters()]
    names = {
        "torch": torch,
        "model": model,
        "loss_fn": nn.CrossEntropyLoss(),
        "loader": [(x, y)] * 3,
    }
    exec(blocks(ROOT / "README.md", "python")[0], names)
    # AdamW moves every weight by about lr at each of its first steps
    assert all(0 < (p - q).abs().max() < 4 * 3e-3 for p, q in zip(model.parameters(), before))
    assert names["optimizer"].base_optimizer.state[model.weight]["step"] == 3


def test_no_sentence_stands_twice():
    sentences = collections.Counter()
    for page in (page for page in PAGES if page not in EXPERIMENTS):  # these are read alone
        pattern = r"^(```.*?^```|\|[^\n]*|<!--[^\n]*)$"
        prose = re.sub(pattern, "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        texts = re.split(r"(?<=[.:;?!])\s|\n\n", prose)
        sentences.update(" ".join(text.split()) for text in texts)
    assert [text for text, times in sentences.items() if times > 1 and len(text) > 30] == []
