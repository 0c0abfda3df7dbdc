"""README against the code: commands that still parse, and files that exist."""

import re
import shlex
import subprocess
from pathlib import Path

from flags import parse_flags

import pytest

import evaluate
import plan
import serve
import show
import train_dpo
import train_grpo
from tables import report

ROOT = Path(train_dpo.__file__).parent
README = (ROOT / "README.md").read_text()
SCRIPTS = {
    f"{script.__name__.replace('.', '/')}.py": script.Config
    for script in (evaluate, plan, report, serve, show, train_dpo, train_grpo)
}


def commands():
    """Every indented line of README, continued lines joined, without its comment."""
    text = README.replace("\\\n", " ")
    return [line.split("#")[0].strip() for line in text.splitlines() if line.startswith("    .venv/")]


@pytest.mark.parametrize("command", [c for c in commands() if any(script in c.split() for script in SCRIPTS)])
def test_commands_parse(command):
    """A flag renamed in the code and not in README. Break: write --sync-evry in one of its commands."""
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if word in SCRIPTS)
    parse_flags(SCRIPTS[words[place]], words[place + 1 :])


def test_files_exist():
    """A file that README names and the tree lacks. Break: rename one in README's table."""
    named = re.findall(r"`([\w/]+\.(?:py|md|txt|sh))`", README)
    named += re.findall(r"\]\((results/[\w/.]+)\)", README)
    assert len(named) > 10 and [name for name in named if not (ROOT / name).exists()] == []


def test_every_script_is_named():
    """A file that a reader cannot find. Break: delete plan.py's row in docs/files.md."""
    tracked = ["git", "ls-files", "--", "*.py"]  # a user's own files, as docs/own_reward.md's, need no row
    listed = subprocess.run(tracked, cwd=ROOT, capture_output=True, text=True).stdout.split()
    scripts = [name for name in listed or [path.name for path in ROOT.glob("*.py")] if "/" not in name]
    files = (ROOT / "docs" / "files.md").read_text()
    assert [name for name in scripts if f"`{name}`" not in files] == []
    results = (ROOT / "results" / "README.md").read_text()
    tables = {path.name for path in (ROOT / "tables").glob("*.sh")} - {"run.sh", "scales.sh"}
    pages = README + results + (ROOT / "docs" / "paper.md").read_text()
    assert [name for name in sorted(tables) if f"`tables/{name}`" not in pages] == []


def test_no_placeholders():
    """A number that was to be filled in. Break: write DEMO_MINUTES in README."""
    prose = [line for line in README.splitlines() if "`" not in line]
    assert [word for word in re.findall(r"\b[A-Z]+_[A-Z_]+\b", " ".join(prose))] == []


def test_lines_to_read():
    """A reading list of files that have grown. Break: 400 for train_dpo.py."""
    listed = dict(re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README))
    assert len(listed) == 5
    for name, lines in listed.items():
        assert abs(int(lines) - len((ROOT / name).read_text().splitlines())) <= 10, name
