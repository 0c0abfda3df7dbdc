"""What a user gets wrong is answered in one line that names the flag or file, before anything is computed or
written."""

import json
import os
import subprocess
import sys

from flags import expand, parse_flags, why_not

import pytest
from conftest import ROOT, write_program

import evaluate
import serve
import show
import train_dpo
import train_grpo
from data import load_prompts
from rewards import MathVerifier, gradable
from run import Run, lock, read_lines
from tables import report
from tests.bad_inputs import (
    DPO,
    EVALUATE,
    GRPO,
    REFUSED,
    REPORT,
    SERVE,
    SHOW,
    SMALL,
    lines_of,
    snapshot,
    words_of,
    write_files,
)

MAIN = {
    DPO: train_dpo.main,
    GRPO: train_grpo.main,
    EVALUATE: evaluate.main,
    SERVE: serve.main,
    SHOW: show.main,
    REPORT: report.main,
}


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
    monkeypatch.setattr(
        "builtins.input", lambda *_: pytest.fail("it asks whether to run a checkpoint's code")
    )
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


def test_the_home_folder_in_every_path(tmp_path, monkeypatch):
    """A folder that is named ~, as a shell expands no --flag=~/x. Breaks: no expand() in parse_flags, for a
    text, or for a list; none in OutFile; \\w for the task alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    words = "--run-dir=~/runs/a --model=~/m --data chat=~/d.jsonl@train:2 ~/e.jsonl math=tiny"
    config = parse_flags(train_dpo.Config, words.split())
    assert (config.run_dir, config.model) == (f"{tmp_path}/runs/a", f"{tmp_path}/m")
    assert config.data == [f"chat={tmp_path}/d.jsonl@train:2", f"{tmp_path}/e.jsonl", "math=tiny"]
    config = parse_flags(evaluate.Config, ["--model", "~/a", "b~/c", "--out=~/{}.json", "--data=~/x"])
    assert config.model == [f"{tmp_path}/a", "b~/c"]
    assert (config.out, config.data) == (f"{tmp_path}/{{}}.json", f"{tmp_path}/x")
    assert expand("gpt-4=~/a.json") == f"gpt-4={tmp_path}/a.json"


def test_what_can_be_written(tmp_path, monkeypatch):
    """A permission that is missing, noticed after the work. Breaks: no os.access(); a file's own for its
    folder's, in which a new file takes its place."""
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to(tmp_path / "gone")
    for path, folder in (("file", False), ("new/a.json", False), ("new", True), (".", True)):
        assert why_not(tmp_path / path, folder) is None
    assert why_not(tmp_path / "file", True) == "is a file"
    assert why_not(tmp_path / "file/a", False) == f"cannot be written: {tmp_path}/file is a file"
    locked = {str(tmp_path)}
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.W_OK and str(path) not in locked)
    assert why_not(tmp_path / "file", False) == f"no permission to write in {tmp_path}"
    locked = {str(tmp_path / "file")}
    assert why_not(tmp_path / "file", False) is None
    locked = {str(tmp_path)}
    assert why_not(tmp_path / "new/a/b.json", False) == f"no permission to write in {tmp_path}"
    assert why_not(tmp_path, True) == f"no permission to write in {tmp_path}"


ASCII = """
import sys
from flags import parse_flags
from run import read_lines, write_lines
from show import Config
parse_flags(Config, [])
write_lines(sys.argv[1], [{"text": "\u00e9 \u4f60"}])
print("88.3 \u00b1 0.5", *read_lines(sys.argv[1])[0].values())
"""


def test_a_locale_without_unicode(tmp_path):
    """A finished run or measurement that ends at its first accent. Breaks: no encoding= in write_text; in
    read_text; no reconfigure() in parse_flags."""
    file, program = tmp_path / "rows.jsonl", write_program(tmp_path, ASCII)
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    env = {**os.environ, **plain}
    done = subprocess.run([sys.executable, program, file], env=env, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("88.3 \\xb1 0.5 \\xe9 \\u4f60\n", "")
    assert file.read_bytes() == '{"text": "\u00e9 \u4f60"}\n'.encode()


def test_lines_of_a_file_made_elsewhere(tmp_path):
    """A mark of Windows' editors read as text; a file in another encoding, or a foreign line, that is not
    named. Breaks: utf-8 for utf-8-sig; no except in read_text; no isinstance() in read_lines."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": "\xe2\x80\xa8"}\r\n\n{"b": 1}')
    assert read_lines(file) == [{"a": "\u2028"}, {"b": 1}]
    for content, says in (
        (b'{"a": "\xe9"}', "not UTF-8 text .byte 7.: save it as UTF-8$"),
        (b'{"a": 1}\n[2]', "line 2: not a JSON object$"),
        (b'{"a": 1}\n\n{"b": ', "line 3: not JSON$"),
        (b'{"a": 1}\n\0\0\0', "line 2: not JSON$"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{file}[,:] {says}"):
            read_lines(file)


@pytest.mark.parametrize("last", ['{"step": 1, "los', "[1]", "{}", "\0\0", '{"step": 7}'])
def test_a_cut_line_in_the_metrics(tmp_path, last):
    """A traceback, or steps counted twice, where a machine that lost its power cut the last line. Breaks: no
    except in Run._forget; lines[:1] kept whatever they are."""
    config = train_dpo.Config(run_dir=str(tmp_path / "run"))
    run, metrics = Run(config), tmp_path / "run" / "metrics.jsonl"
    run.log({"step": 0, "loss": 1.0})
    run.close()
    whole = metrics.read_text()
    metrics.write_text(whole + last)
    with pytest.raises(ValueError, match=f"^{metrics}: does not hold exactly the steps 0 to 1: .*; restore"):
        Run(config, first_step=2)
    lock.cache_clear()
    Run(config, first_step=1).close()  # from a checkpoint after step 0: what is behind it goes
    assert metrics.read_text() == whole


def test_a_resume_removes_only_what_the_run_wrote(tmp_path):
    """A checkpoint that a user renamed to keep it, deleted by the next --resume, or a link that no resume
    gets past. Breaks: old.stem.isdigit() for step.isdigit(); no is_symlink(); no rest ==
    "partial"; any rest."""
    config = train_dpo.Config(run_dir=str(tmp_path / "run"))
    Run(config).close()
    export, rollouts = tmp_path / "run" / "export", tmp_path / "run" / "rollouts"
    for folder in ("1", "2", "1.partial", "2-good", "2.good", ".cache"):
        (export / folder).mkdir()
    (export / "3").symlink_to(export / "2-good")
    for file in ("0.jsonl", "1.jsonl", "notes.txt"):
        (rollouts / file).touch()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    Run(config, first_step=1).close()
    assert {path.name for path in export.iterdir()} == {"1", "2-good", "2.good", ".cache"}
    assert {path.name for path in rollouts.iterdir()} == {"0.jsonl", "notes.txt"}


def test_no_flags_from_a_file_beside_the_script(tmp_path, monkeypatch):
    """A forgotten train_dpo.args that changes every run without a word. Break: look_for_args_file=True."""
    (tmp_path / "train_dpo.args").write_text("--lr 1")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train_dpo.py")])
    assert parse_flags(train_dpo.Config).lr == 5e-5
    monkeypatch.setattr(sys, "argv", [""])  # a Python prompt
    assert parse_flags(train_dpo.Config, []).lr == 5e-5
