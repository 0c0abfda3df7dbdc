"""docs/: the walkthrough runs, and each exercise's solution does what the exercise says."""

import doctest
import importlib.util
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path

from flags import parse_flags

import pytest
import torch
from conftest import Grader

import life
import train_dpo
import train_grpo
from rewards import math_reward
from run import read_metrics
from sync import SyncError
from tables import report

ROOT = Path(train_dpo.__file__).parent
SOLUTIONS = ROOT / "docs" / "solutions"
EXERCISES = (ROOT / "docs" / "exercises.md").read_text()
CONFIGS = {  # a program that the exercises run: its flags
    "train_dpo.py": train_dpo.Config,
    "train_grpo.py": train_grpo.Config,
    "docs/solutions/broken_sync.py": train_grpo.Config,
    "docs/solutions/rloo.py": train_grpo.Config,
    "docs/solutions/ipo.py": train_dpo.Config,
    "tables/report.py": report.Config,
}
REPLACED = [  # what solutions replace
    (train_dpo, "dpo_loss"),
    *((train_grpo, "group_advantages"), (train_grpo, "sync"), (life, "load_generator")),
]
SMALL = [
    *("--data", "tiny@validation", "--engine", "transformers", "--lr", "1e-4"),
    *("--prompts-per-step", "12", "--max-new-tokens", "32"),
]


def function_of(solution, name):
    """A function that a solution defines."""
    return runpy.run_path(str(SOLUTIONS / solution))[name]


def commands():
    """Every command of the exercises as words, with $SMALL written out."""
    small = re.search(r'^ +SMALL="(.*?)"$', EXERCISES, re.MULTILINE | re.DOTALL).group(1)
    text = EXERCISES.replace("\\\n", " ").replace("$SMALL", small.replace("\\\n", " "))
    lines = [line.split("#")[0].strip() for line in text.splitlines() if line.startswith("    ")]
    return [shlex.split(line) for line in lines if line.startswith((".venv/", "git "))]


def test_commands_parse():
    """A flag, a file or a patch that an exercise names and the tree lacks. Break: write --sync-evry there."""
    used = set()
    for program, *words in commands():
        if program == "git":
            assert words[0] == "apply" and (ROOT / words[-1]).exists()
            continue
        script, *flags = words
        used.add(script)
        parse_flags(CONFIGS[script], flags[2:] if script.endswith("broken_sync.py") else flags)
    assert used == set(CONFIGS)


@pytest.mark.parametrize("patch", [path.name for path in SOLUTIONS.glob("*.patch")])
def test_patches_apply(patch):
    """A solution that the code has left behind. Break: rename run.steps() in train_dpo.py."""
    subprocess.run(["git", "apply", "--check", SOLUTIONS / patch], cwd=ROOT, check=True)


def test_rloo_by_hand():
    """A baseline that holds the answer's own reward. Break: divide by G."""
    rloo = function_of("rloo.py", "rloo_advantages")
    rewards = torch.tensor([[1.0, 0.5, 0.0], [2.0, 2.0, 2.0]])
    expected = torch.tensor([[1 - 0.25, 0.5 - 0.5, 0 - 0.75], [0, 0, 0]])
    assert torch.allclose(rloo(rewards), expected)
    assert torch.allclose(rloo(rewards), 3 / 2 * train_grpo.group_advantages(rewards))
    doctest.run_docstring_examples(rloo, {"rloo_advantages": rloo}, name="rloo")
    with pytest.raises(ValueError, match="--advantage-scale std"):
        rloo(rewards, "std")


def test_ipo_by_hand():
    """Another target, or another sign. Break: 1 / beta; or the rejected gain added."""
    ipo = function_of("ipo.py", "ipo_loss")
    chosen, rejected = torch.tensor([-3.0, -3.0, -3.0], requires_grad=True), torch.tensor([-4.0, -5.0, -6.0])
    losses = ipo(chosen, rejected, torch.full((3,), -4.0), torch.full((3,), -4.0), beta=0.25)  # target 2
    assert losses.tolist() == [1.0, 0.0, 1.0]  # margins 1, 2 and 3
    losses.sum().backward()
    assert chosen.grad.tolist() == [-2.0, 0.0, 2.0]  # up, nothing, and down again


# --- Runs ---


@pytest.mark.slow
def test_walkthrough():
    """A claim of its text that is no longer so. Break: the other sign in dpo_loss; or no proof of names."""
    done = subprocess.run(
        [sys.executable, "docs/walkthrough.py"], cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-3000:]


class InProcess(Grader):
    """The real reward, without the seconds that worker processes take to start."""

    def score(self, items):
        return [math_reward(response, gold) for response, gold in items]


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Run a script's main() with SMALL and more flags, in this process; its metrics."""
    monkeypatch.setattr("rewards.MathVerifier", InProcess)
    directories = (tmp_path / str(number) for number in count())

    def call(main, *flags):
        directory = next(directories)
        main([*SMALL, *flags, "--run-dir", str(directory)])
        return read_metrics(directory)

    return call


@pytest.fixture
def patched(monkeypatch, tmp_path):
    """main() of train_dpo.py after a patch."""

    def call(patch):
        file = Path(shutil.copy(train_dpo.__file__, tmp_path))
        subprocess.run(["git", "apply", SOLUTIONS / patch], cwd=tmp_path, check=True)
        assert file.read_text() != Path(train_dpo.__file__).read_text()  # git may skip what it does not track
        spec = importlib.util.spec_from_file_location("patched_dpo", file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module.main

    return call


@pytest.fixture
def solution(monkeypatch):
    """main() of a solution: the program, run in this process as from the command line."""

    def call(name, *first):
        def main(flags):
            with monkeypatch.context() as until_it_ends:
                until_it_ends.setattr(sys, "argv", [name, *first, *flags])
                for script, replaced in REPLACED:
                    until_it_ends.setattr(script, replaced, getattr(script, replaced))
                runpy.run_path(str(SOLUTIONS / name), run_name="__main__")

        return main

    return call


@pytest.mark.slow
def test_ema_reference(train, patched):
    """A reference that does not follow, or a loss that does not use it.

    Breaks, in the patch: decay=0; or reference_is_policy as it was, which is True at every step.
    """
    fixed = train(train_dpo.main, "--steps", "2", "--sync-ref-every", "inf")
    ema = train(patched("ema_reference.patch"), "--steps", "2")
    assert ema[0]["margin"] == 0 != fixed[1]["margin"]
    # The responses are the same. The reference has gone a tenth of the way that the policy has.
    assert ema[1]["margin"] / fixed[1]["margin"] == pytest.approx(0.9, abs=0.02)


@pytest.mark.slow
def test_constant_lag(train, patched):
    """Weights of another age than the stamp says. Break, in the patch: append policy, not a copy of it."""
    offline = train(train_dpo.main, "--steps", "5", "--sync-every", "inf", "--sync-ref-every", "3")
    lag = train(patched("constant_lag.patch"), "--steps", "5", "--sync-every", "3", "--ahead", "1")
    assert [row["staleness"] for row in lag] == [0, 1, 2, 2, 2]
    assert all(row["sync_gap"] < 1e-4 for row in lag)
    same = [ours["entropy"] == theirs["entropy"] for ours, theirs in zip(lag, offline, strict=True)]
    assert same == [True, True, True, False, False]  # the seed model's responses until step 2


@pytest.mark.slow
def test_broken_sync(train, solution):
    """A bug that the exercise's metrics do not show, or that the proofs do not name.

    Breaks: any bug of BUGS replaced by D; drop a fault in sync.prove_copy.
    """
    gaps = {}
    for copy in "ABCD":
        rows = train(solution("broken_sync.py", copy, "off"), "--steps", "3")
        gaps[copy] = [row["logp_gap"] for row in rows]
        assert [row["staleness"] for row in rows] == [0, 0, 0]  # as stamped, which is not true of A and C
    assert max(gaps["D"]) < 1e-5
    for copy in "ABC":
        assert gaps[copy][0] < 1e-5 < 1e-4 < min(gaps[copy][1:])
    assert gaps["C"][1] == gaps["A"][1] and gaps["C"][2] < gaps["A"][2]  # one step behind, and two

    said = {
        "A": "rehearsal of the sync at step 0: .* disagree on the canary",
        "B": "1 did not arrive: lm_head.weight",
        "C": "39 arrived as other bytes",
    }
    for copy, message in said.items():
        with pytest.raises(SyncError, match=message):
            train(solution("broken_sync.py", copy, "on"), "--steps", "3")


@pytest.mark.slow
def test_rloo_run(train, solution):
    """A solution that trains with the group's mean all the same. Break: drop its line before main()."""
    (group,) = train(train_grpo.main, "--steps", "1")
    (rloo,) = train(solution("rloo.py"), "--steps", "1")
    assert rloo["grad_norm"] == pytest.approx(8 / 7 * group["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_ipo_run(train, solution):
    """A solution that trains with DPO's loss all the same. Break: drop its line before main()."""
    (row,) = train(solution("ipo.py"), "--steps", "1", "--beta", "1")
    assert row["margin"] == 0 and row["loss"] == pytest.approx(1 / 4)  # DPO's: log 2


def experiments():
    """The training commands of README's table of experiments, without `torchrun`, as words."""
    readme = (ROOT / "README.md").read_text()
    found = [shlex.split(span)[1:] for span in re.findall(r"`(torchrun train_\w+\.py[^`]*)`", readme)]
    return [words for words in found if "--run-dir" in words]


@pytest.mark.slow
@pytest.mark.parametrize("words", experiments(), ids=" ".join)
def test_experiments_of_the_readme_run(words, tmp_path):
    """A command that parses and does not run: two small steps of each. Break: --pairing all in chat."""
    script, *flags = words
    flags[flags.index("--run-dir") + 1] = str(tmp_path / "run")
    small = ["--steps", "2", "--prompts-per-step", "4", "--samples-per-prompt", "4"]
    subprocess.run([sys.executable, script, *flags, *small], cwd=ROOT, check=True, timeout=300)
    assert len(read_metrics(tmp_path / "run")) == 2
