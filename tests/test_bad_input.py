"""What a user gets wrong is answered in one line that names the flag or file, before anything is computed or
written."""

import json
import os

import pytest

import evaluate
import serve
import train_dpo
import train_grpo
from data import load_prompts
from rewards import MathVerifier, gradable
from run import Run
from tests.bad_inputs import (
    DPO,
    EVALUATE,
    GRPO,
    REFUSED,
    SERVE,
    SMALL,
    lines_of,
    snapshot,
    words_of,
    write_files,
)

MAIN = {DPO: train_dpo.main, GRPO: train_grpo.main, EVALUATE: evaluate.main, SERVE: serve.main}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """FILES, and a finished run."""
    folder = tmp_path_factory.mktemp("refused")
    write_files(folder)
    train_dpo.main(words_of(DPO, f"{SMALL} --steps 1 --run-dir {{}}/run", folder))
    return folder


@pytest.mark.parametrize("script, flags, says", REFUSED, ids=[f"{script} {f}" for script, f, _ in REFUSED])
def test_wrong_commands(script, flags, says, folder, capfd, monkeypatch):
    """A value that fails deep inside, a traceback, or a run that writes before it looks.

    Break: what bad_inputs.py says above each group of commands.
    """
    monkeypatch.delenv(serve.TOKEN, raising=False)
    monkeypatch.setattr(os, "execvpe", lambda *_: pytest.fail("this process would become a server"))
    before = snapshot(folder)
    with pytest.raises(SystemExit) as exit:
        MAIN[script](words_of(script, flags, folder))
    assert exit.value.code == 2
    (line,) = lines_of(capfd.readouterr().err)
    assert says.replace("{}", str(folder)) in line
    assert snapshot(folder) == before  # nothing was written


def test_gold_answers_that_cannot_be_parsed(tmp_path, capfd):
    """A problem nobody can be right about. Break: return all prompts from gradable()."""
    rows = [{"problem": "What is 1 + 1?", "answer": "2"}, {"problem": "Which?", "answer": "\\frac{1}{"}]
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with MathVerifier(workers=1) as verifier:
        assert [prompt.answer for prompt in gradable(load_prompts(str(file)), verifier)] == ["2"]
    assert "cannot parse 1 of 2 gold answers" in capfd.readouterr().out


def test_metrics_keep_their_keys(tmp_path):
    """A key logged at some steps only breaks every table. Break: drop the comparison in Run.log."""
    run = Run(train_dpo.Config(run_dir=str(tmp_path / "run")))
    run.log({"step": 0, "loss": 1.0})
    with pytest.raises(KeyError, match="reward"):
        run.log({"step": 1, "reward": 1.0})
