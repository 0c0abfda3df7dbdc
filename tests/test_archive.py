"""The archive of a table's runs: nothing lost, nothing mixed up, and one writer at a time."""

import gzip
import json
import subprocess
import sys
import time

import pytest

from tables import archive

COMMAND = "train_dpo.py --sync-every 10"


def write_run(directory, reward=0.1):
    """A run directory with everything that an archive keeps of one."""
    (directory / "eval").mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"command": "train", "flags": {"sync_every": "inf"}}))
    rows = [{"step": 0, "reward": reward, "logp_gap": 1e-7}, {"step": 1, "reward": 1 / 3, "logp_gap": None}]
    answers = [{"id": "q1", "prompt": "Why?", "response": "So.", "length": 3, "reward": 7.5871357917785645}]
    for name, lines in (("metrics.jsonl", rows), ("eval/100.answers.jsonl", answers)):
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in lines))
    (directory / "eval" / "100.json").write_text(json.dumps({"accuracy": 0.11200000000000002}))
    (directory / "eval" / "100.chat.json").write_text(json.dumps({"reward": 7.5871357917785645}))
    (directory / "eval" / "seed.json").write_text(json.dumps({"accuracy": 0.0882}))
    return directory


@pytest.fixture
def directory(tmp_path):
    return write_run(tmp_path / "runs" / "0")


@pytest.fixture
def table(tmp_path):
    return tmp_path / "results" / "table1"


def test_nothing_of_a_run_is_lost(directory, table):
    """A number that was rounded, a null read as 0, an evaluation under another step.

    Breaks: round a column in columns(); `or 0` there; drop `chat` in read_directory.
    """
    archive.add(str(table / "dpo-10" / "0"), str(directory), COMMAND)
    (run,) = archive.read(table)
    assert run == archive.read_directory(directory, "dpo-10/0", COMMAND)
    assert run.metrics == [json.loads(line) for line in (directory / "metrics.jsonl").open()]
    assert [list(row) for row in run.metrics] == [["step", "reward", "logp_gap"]] * 2  # in their order
    assert run.config == json.loads((directory / "config.json").read_text())
    assert run.evaluations == {"100": {"accuracy": 0.11200000000000002}, "seed": {"accuracy": 0.0882}}
    assert run.chat == {"100": {"reward": 7.5871357917785645}}
    assert run.answers == {"100": [{"id": "q1", "length": 3, "reward": 7.5871357917785645}]}  # but the texts


def test_a_model_that_was_only_evaluated(tmp_path, table):
    """A seed model that is taken for a run whose metrics are missing. Break: drop the None of read()."""
    (tmp_path / "seed" / "eval").mkdir(parents=True)
    (tmp_path / "seed" / "eval" / "0.json").write_text("{}")
    archive.add(str(table / "seed"), str(tmp_path / "seed"), "evaluate.py --model tiny/llama")
    (run,) = archive.read(table)
    assert (run.metrics, run.config, run.evaluations) == (None, None, {"0": {}})


def test_the_same_results_give_the_same_bytes(tmp_path, table):
    """A file that changes in git when nothing did. Break: drop mtime=0, or the sorting."""
    found = []
    for order in ((0, 1, 2), (2, 0, 1)):
        for seed in order:
            write_run(tmp_path / str(order) / str(seed), reward=seed)
            archive.add(str(table / "grpo" / str(seed)), str(tmp_path / str(order) / str(seed)), COMMAND)
        found.append((table / archive.FILE).read_bytes())
        archive.remove(str(table / "grpo"))
        time.sleep(1.1)  # a time stamp in gzip counts seconds
    assert found[0] == found[1]


def test_results_of_another_command_are_refused(directory, table):
    """Rows of one table that were made with different flags. Break: drop the second `if` in has()."""
    path = str(table / "dpo-10" / "0")
    assert not archive.has(path, COMMAND)
    archive.add(path, str(directory), COMMAND)
    assert archive.has(path, COMMAND)
    with pytest.raises(
        ValueError, match=f"another command; remove it: python tables/archive.py remove {path}"
    ):
        archive.has(path, f"{COMMAND} --lr 1e-5")
    with pytest.raises(ValueError, match="has its results"):
        archive.add(path, str(directory), COMMAND)


@pytest.mark.parametrize(("kept", "new"), [("dpo-1/0", "dpo-1"), ("dpo-1", "dpo-1/0")])
def test_a_row_is_one_run_or_a_run_for_each_seed(directory, table, kept, new):
    """A row whose mean is over its seeds and an older run. Break: drop the third `if` in has()."""
    archive.add(str(table / kept), str(directory), COMMAND)
    with pytest.raises(ValueError, match="holds other runs: .*dpo-1"):
        archive.add(str(table / new), str(directory), COMMAND)
    archive.add(str(table / "dpo-10"), str(directory), COMMAND)  # not one of row dpo-1


def test_a_row_or_a_run_is_removed_and_nothing_else(directory, table):
    """`remove dpo-1` that takes dpo-10 with it, or leaves an archive of nothing. Break: `startswith(name)`
    in select(), or drop the unlink in write()."""
    for name in ("dpo-1/0", "dpo-1/1", "dpo-10/0"):
        archive.add(str(table / name), str(directory), COMMAND)
    assert archive.remove(str(table / "dpo-1/0")) == ["dpo-1/0"]
    assert archive.remove(str(table / "dpo-1")) == ["dpo-1/1"]
    with pytest.raises(ValueError, match="dpo-1: .*runs.jsonl.gz has dpo-10/0"):
        archive.remove(str(table / "dpo-1"))
    assert archive.remove(str(table / "dpo-10/0")) == ["dpo-10/0"] and not any(table.iterdir())


def test_processes_that_add_at_the_same_time_lose_nothing(directory, table):
    """Two runs that end together, of which the archive keeps one. Break: drop flock in locked()."""
    script = (
        f"import sys; sys.path.insert(0, {str(archive.__file__).rpartition('/tables')[0]!r})\n"
        "from tables import archive\n"
        "for seed in range(5):\n"
        f"    archive.add(f'{table}/{{sys.argv[1]}}/{{seed}}', {str(directory)!r}, 'train')\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, row]) for row in ("a", "b", "c")]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    names = [run.name for run in archive.read(table)]
    assert names == [f"{row}/{seed}" for row in "abc" for seed in range(5)]
    assert [path.name for path in table.iterdir()] == [archive.FILE]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["add", "{}/t/run", "{}/nowhere", "train"], "nowhere: not a run directory"),
        (["remove", "{}/nowhere/run"], "there is no"),
        (["list", "{}/cut"], "cut short, or not an archive of runs"),
        (["list", "{}/text"], "cut short, or not an archive of runs"),
    ],
)
def test_bad_input_is_answered_in_one_line(tmp_path, directory, capfd, args, line):
    """A traceback for a misspelt name or a damaged file. Break: leave zlib.error out in read()."""
    archive.add(str(tmp_path / "cut" / "run"), str(directory), COMMAND)
    path = tmp_path / "cut" / archive.FILE
    path.write_bytes(path.read_bytes()[:20] + b"\xff" * 50 + path.read_bytes()[70:])
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / archive.FILE).write_bytes(gzip.compress(b'{"reward": 1}\n'))
    with pytest.raises(SystemExit) as exit:
        archive.main([arg.format(tmp_path) for arg in args])
    said = capfd.readouterr().err
    assert exit.value.code == 2 and line in said and said.count("\n") == 1
