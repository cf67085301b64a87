"""README.md and docs/: flags, links, commands and code that they name."""

import collections
import itertools
import re
import shlex
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
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHERS = {"--config_file", "--num_processes", "--nproc_per_node", "--standalone", "--dynamo_backend", "--dist"}
OUR_SCRIPTS = {f"{script.__name__}.py": script for script in flags.SCRIPTS}


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """The words of every command of README and docs that runs a file, once for each value of a loop's variable."""
    found = []
    for line in itertools.chain.from_iterable(block.splitlines() for page in PAGES for block in blocks(page, "sh")):
        loop = re.match(r"for (\w+) in ([^;]+);", line)
        for value in loop[2].split() if loop else [""]:
            text = line.replace(f"${loop[1]}", value) if loop else line
            for command in re.split(r"&&|[;&|](?!\w)", text):
                words = shlex.split(command, comments=True)
                if any(word.endswith(".py") for word in words) and words not in found:
                    found.append(words)
    return found


def test_docs_have_the_tables_of_every_flag():
    assert flags.SECTION.search(flags.PAGE.read_text())[0] == flags.tables(), "run python tests/flags.py"


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_no_flag_that_does_not_exist(page):
    known = {name for script in flags.SCRIPTS for action in flags.flags_of(script) for name in action.option_strings}
    for script in (ROOT / "docs").glob("*.py"):  # which make the pages
        known |= set(re.findall(r'add_argument\("(--[\w-]+)"', script.read_text()))
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text()))
    assert named - known - LAUNCHERS - {"--help"} == set()


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks" / "README.md"], ids=lambda page: str(page.name))
def test_every_link_of_a_page_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists() and target.is_relative_to(ROOT.resolve()), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_scripts_take_every_command_of_the_pages(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, argv = OUR_SCRIPTS.get(words[at]), words[at + 1 :]
    for word in words:
        if re.match(r"(recipes|sweeps|accelerate_configs|examples|benchmarks|tests)/", word):
            assert Path(word).exists(), word
    if script in (eval_robustness, measure_forgetting):
        script.parse(argv)
    elif script is sweep:
        args, rest = sweep.parse(argv)
        content = sweep.read_sweep(Path(args.sweep))
        run = train_imagenet if args.script == "train_imagenet" else finetune_cifar
        first = sweep.points_of(args, content)[0]
        settings.parse(run.parser(), [*sweep.flags_of(args, content, rest, first), "--dry-run"])
    elif script is not None:
        settings.parse(script.parser(), [*argv, "--dry-run"])  # which lets the output folder exist
    else:
        assert Path(words[at]).exists()


def test_the_test_command_stands_on_one_line():
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if "-m pytest" in line)
    assert "pytest" in [word.strip("`") for word in shlex.split(line)] and "requirements.txt" in line  # .ci/run runs it


def test_the_first_code_of_the_readme_trains():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(16, 4), torch.arange(16) % 3
    before = [p.clone() for p in model.parameters()]
    names = {"torch": torch, "model": model, "loss_fn": nn.CrossEntropyLoss(), "loader": [(x, y)] * 3}
    exec(blocks(ROOT / "README.md", "python")[0], names)
    # AdamW moves every weight by about lr at each of its first steps
    assert all(0 < (p - q).abs().max() < 4 * 3e-3 for p, q in zip(model.parameters(), before))
    assert names["optimizer"].base_optimizer.state[model.weight]["step"] == 3


def test_no_sentence_stands_twice():
    sentences = collections.Counter()
    for page in PAGES:
        prose = re.sub(r"^(```.*?^```|\|[^\n]*|<!--[^\n]*)$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        sentences.update(" ".join(text.split()) for text in re.split(r"(?<=[.:;?!])\s|\n\n", prose))
    assert [text for text, times in sentences.items() if times > 1 and len(text) > 30] == []
