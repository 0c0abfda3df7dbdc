"""docs/ against the code: commands that still parse, flags, links and headings that exist."""

import re
import shlex
from functools import cache

from flags import parse_flags

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser
from transformers import HfArgumentParser

import judge.__main__
import judge.answers
import tiny.chat
import tiny.preferences
import tiny.smollm2
from tests.test_readme import ROOT, SCRIPTS

# A template of another file.
ELSEWHERE = ("model_card.md",)
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
DOCS = {name: text for name, text in DOCS.items() if name not in ELSEWHERE}
CONFIGS = SCRIPTS | {
    f"tiny/{script.__name__.split('.')[1]}.py": script.Config
    for script in (tiny.chat, tiny.preferences, tiny.smollm2)
}
MODULES = {"judge": judge.__main__.Config, "judge.answers": judge.answers.Config}
OURS = "examples/reasoning_gym/reward.py:score"  # a function that is there, for the mine.py of the texts
FOREIGN = {"--append", "--project", "--signal"}  # of other programs


def blocks(text: str) -> list[str]:
    """The commands of indented blocks that start a script of ours: continued lines joined, no comments."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [line.split(" #")[0].strip().removeprefix("srun ") for line in lines if line.startswith("    ")]
    ours = re.compile(r"(\.venv/bin/)?(python|torchrun|bash|make|bench/\S+) ")
    return [line for line in found if ours.match(line) and "$SMALL" not in line]  # those: tests/test_docs.py


def spans(text: str) -> list[str]:
    """The inline pieces of code that name flags, without the messages that programs print."""
    text = re.sub(r"(?m)^    .*$|```[\s\S]*?```", "", text)
    found = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    return [span for span in found if "--" in span and ": " not in span and not span.endswith(":")]


def program(words: list[str]) -> tuple[int, type | None]:
    """Where a command's script stands among its words, and its Config; AssertionError if it is not there."""
    for place, word in enumerate(words):
        if words[place - 1] == "-m" and place:
            return place, MODULES.get(word)
        if word.endswith((".py", ".sh")):
            assert (ROOT / word).exists(), f"{word} is not there"
            return place, CONFIGS.get(word)
    return len(words), None


@cache
def flags_of(config: type) -> set[str]:
    """All flags of a script."""
    return set(HfArgumentParser(config)._option_string_actions)


def named(text: str) -> set[str]:
    """The flags in a piece of code."""
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


ALL_FLAGS = set().union(*map(flags_of, [*CONFIGS.values(), *MODULES.values()]))
TORCHRUN = set(torchrun_parser()._option_string_actions)


@pytest.mark.parametrize("command", [command for text in DOCS.values() for command in blocks(text)])
def test_commands_parse(command):
    """A script or flag renamed in the code and not in docs. Break: write --sync-evry in docs/scaling.md."""
    words = [OURS if word == "mine.py:score" else word for word in shlex.split(command)]
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert all(re.search(rf"(?m)^{target}:", (ROOT / "Makefile").read_text()) for target in targets)
        return
    place, config = program(words)
    if "torchrun" in words[0]:
        assert named(" ".join(words[:place])) <= TORCHRUN
    if config:
        parse_flags(config, words[place + 1 :])


@pytest.mark.parametrize("name", DOCS)
def test_flags_in_sentences_exist(name):
    """A flag that a sentence names and no script has. Break: write `--eval-evry` in docs/chat.md."""
    wrong = []
    for span in spans(DOCS[name]):
        scripts = [word for word in span.split() if word in CONFIGS]
        known = flags_of(CONFIGS[scripts[0]]) | TORCHRUN if scripts else ALL_FLAGS | TORCHRUN | FOREIGN
        wrong += [(span, flag) for flag in sorted(named(span) - known)]
    assert wrong == []


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", DOCS)
def test_links_lead_somewhere(name):
    """A file or a heading that was renamed. Break: rename a heading of docs/resuming.md."""
    dead = []
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)", DOCS[name]):
        path = (ROOT / "docs" / target) if target else ROOT / "docs" / name
        if not path.exists():
            dead.append(target)
        elif anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", path.read_text())
            dead += [] if anchor in map(slug, headings) else [f"{target}#{anchor}"]
    assert dead == []


def test_files_exist():
    """A file that a sentence names and the tree lacks. Break: rename a script in docs/paper.md's table."""
    sentences = " ".join(DOCS.values())
    found = set(re.findall(r"`((?:tables|tiny|bench|tests|grader|judge|results)/[\w/.]+\.\w+)`", sentences))
    assert len(found) > 10 and [file for file in sorted(found) if not (ROOT / file).exists()] == []


def test_every_document_is_listed():
    """A document that nobody finds. Break: delete dial.md's row in docs/files.md."""
    assert [name for name in DOCS if name != "files.md" and f"({name})" not in DOCS["files.md"]] == []


def test_scripts_are_named():
    """A script that the map of the files leaves out. Break: delete plan.py's row in docs/files.md."""
    scripts = [path.name for path in ROOT.glob("*.py")]
    assert [name for name in scripts if f"| `{name}` |" not in DOCS["files.md"]] == []
