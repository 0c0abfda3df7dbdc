"""--reward FILE.py:NAME: both shapes, what is handed over, what is refused, and what ends a run."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from flags import parse_flags

import pytest
import torch

import evaluate
import life
import metrics
import show
import train_dpo
import train_grpo
from data import Prompt
from grader import OwnReward, call, own, workers
from run import read_metrics
from train_dpo import pick_pairs
from train_grpo import group_advantages

ROOT = Path(train_dpo.__file__).parent
DOC = (ROOT / "docs" / "own_reward.md").read_text()
CODE = """
import asyncio, mmap, os, subprocess, sys, time
from helper import TWO              # beside the file
import evaluate                     # beside the file, too: ours must not hide it
print("loaded")                     # not between the replies

def given(solution_str, **rest):
    return {"score": TWO, "seen": open(os.environ["SEEN"], "w").write(repr((solution_str, rest)))}
def columns(prompts, completions, answer, flag=None):
    open(os.environ["SEEN"], "w").write(repr((prompts, completions, answer, flag)))
    return [None if gold is None else len(completions) for gold in answer]
async def later(solution_str):
    await asyncio.sleep(0)
    return sys.stdin.read() == "" and not subprocess.run(["cat"], stdout=subprocess.PIPE).stdout
odd = {"yes": True, "nan": float("nan"), "none": None, "no": {}}
one = lambda solution_str: odd.get(solution_str, solution_str)
several = {"short": [], "text": ["1"], "inf": [1e999], "huge": [-1e39], "one": 1.0}
many = lambda completions: several[completions[0]]
def raises(solution_str):
    if solution_str == "bad":
        raise KeyError("of mine")
    return 1
def exits(solution_str):
    sys.exit("of mine")
def slow(solution_str):
    subprocess.run(["sleep", "61.25"]) if solution_str == "slow" else None
    return 1
def slow_batch(completions):
    time.sleep(60 * ("slow" in completions))
    return [1] * len(completions)
def greedy(solution_str):
    return len(mmap.mmap(-1, 3 << 30))  # address space, not memory
def crash(solution_str):
    os.abort()
class Scale:
    def __call__(self, completions, **columns):
        return [TWO] * len(completions)
scale = Scale()
def neither(prompt, response): pass
def more(solution_str, weight): pass
def needs(completions, hint): pass
def positional(solution_str, /): pass
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.py").write_text(CODE)
    (folder / "helper.py").write_text("TWO = 2")
    (folder / "evaluate.py").write_text("")
    (folder / "broken.py").write_text("import no_such_module\n")
    (folder / "script.py").write_text("import argparse\nargparse.ArgumentParser().parse_args(['--x'])\n")
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", DOC, re.DOTALL):
        (folder / name).write_text(code)
    return folder


@pytest.fixture(autouse=True)
def one_worker(monkeypatch, folder):
    monkeypatch.setattr(own, "cores", lambda: 1)
    monkeypatch.setenv("SEEN", str(folder / "seen"))


def prompt(name="p", content="What?", gold="4", **row):
    return Prompt(name, "math", [{"role": "user", "content": content}], gold, row)


def scored(file, *responses, prompts=None, **settings):
    with OwnReward(str(file), **settings) as reward:
        items = list(zip(responses, prompts or [prompt()] * len(responses), strict=True))
        return reward.score(items), reward


def seen(folder):
    return eval((folder / "seen").read_text())


# --- What is handed over, and taken back ---


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (prompt(data_source="d", answer="4"), ("d", "4", {"answer": "4"})),
        (prompt(gold=None, solution="long"), (None, "long", {"solution": "long"})),
        (
            prompt(reward_model={"ground_truth": [1, 2]}, extra_info={"index": 7}),
            (None, [1, 2], {"index": 7}),
        ),
    ],
)
def test_verl_gets_its_four(folder, of, expected):
    """Golds that are ours where the data has verl's; an extra_info that is lost; a score in a dictionary.

    Breaks: prompt.answer first in truth(); `others` alone; `returned` for `returned["score"]`.
    """
    scores, _ = scored(folder / "mine.py:given", "text", prompts=[of])
    source, gold, extra = expected
    assert scores == [2.0]
    assert seen(folder) == ("text", {"data_source": source, "ground_truth": gold, "extra_info": extra})


def test_trl_gets_columns_and_messages(folder):
    """Columns in another order, or texts where TRL has messages; a dropped row that scores 0.

    Breaks: no isinstance in batch_of; all columns whatever it takes; 0.0 for math.nan in score().
    """
    chat = [{"role": "user", "content": "Hi"}]
    asked = [prompt("a", "A", answer=1, other=0, problem="A"), prompt("b", "Hi", prompt=chat, flag=True)]
    scores, reward = scored(folder / "mine.py:columns", "x", "y", prompts=asked)
    assert scores[0] == 2.0 and math.isnan(scores[1]) and reward.dropped == 1
    message = [{"role": "assistant", "content": "y"}]
    assert seen(folder) == (["A", chat], ["x", message], [1, None], [None, True])


def test_batches_keep_groups_whole(folder, monkeypatch):
    """A group split over two calls, whose rewards a function may compare; one call for a whole benchmark.

    Breaks: no `prompt is not before`; no BATCH.
    """
    monkeypatch.setattr(own, "BATCH", 3)
    asked = [one for one in (prompt(f"p{i}", answer=i) for i in range(5)) for _ in range(2)]
    scores, _ = scored(folder / "mine.py:columns", *"abcdefghij", prompts=asked)
    assert scores == [4.0] * 8 + [2.0] * 2


def test_an_async_function_an_object_and_a_helper(folder):
    """A coroutine taken for a score; a program that reads our requests as its input.

    Breaks: no run_until_complete; no os.dup2 of os.devnull.
    """
    assert scored(folder / "mine.py:later", "x", "y", timeout_s=5)[0] == [1.0, 1.0]
    assert scored(folder / "mine.py:scale", "x", "y")[0] == [2.0, 2.0]
    assert not (folder / "__pycache__").exists()


# --- What is refused ---


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mine.py:none", "the file has no none"),
        ("mine.py:Scale", "is a class, not a function"),
        ("mine.py:TWO", "is of type int"),
        ("mine.py:neither", "needs one of the parameters solution_str"),
        ("mine.py:positional", "needs one of the parameters solution_str"),
        ("mine.py:more", "needs more than data_source, solution_str"),
        ("broken.py:score", "raised ModuleNotFoundError: No module named 'no_such_module', see above"),
        ("script.py:score", "raised SystemExit: 2, see above"),
    ],
)
def test_what_is_no_reward_function(folder, name, says):
    """A function found out at the first step, when the engine is up; a script without a main guard that only
    "died while starting". Breaks: each check of shape_of alone; no SystemExit in RAISED."""
    with pytest.raises(ValueError, match=re.escape(f"--reward {folder}/{name}: {says}")):
        OwnReward(f"{folder}/{name}")


def test_columns_that_are_not_there(folder):
    """A TypeError of the user's function after a step of sampling. Break: no check() in usable()."""
    with OwnReward(f"{folder}/mine.py:needs") as reward:
        reward.check([prompt(hint=None)])
        with pytest.raises(ValueError, match="mine.py:needs: needs hint; --data has the columns problem"):
            reward.check([prompt(problem="A")])
        with pytest.raises(ValueError, match="a column that is not JSON .*set"):
            reward.check([prompt(hint={1})])


@pytest.mark.parametrize(
    ("name", "response", "says"),
    [
        (
            "one",
            "some text",
            "returned 'some text' (str), not a finite number, for the response 'some text' to",
        ),
        ("one", "nan", "returned 'nan' (float), not a finite number"),
        ("one", "none", "returned 'None' (NoneType), not a finite number"),
        ("one", "no", "returned a dictionary without 'score'"),
        ("many", "short", "returned 0 rewards for 1 completions"),
        ("many", "text", "returned '1' (str), not a finite number"),
        ("many", "inf", "returned 'inf' (float), not a finite number"),
        ("many", "huge", "returned -1e+39, which float32 cannot hold: keep it within 3.4e+38, for the"),
        ("many", "one", "returned float, not a list"),
    ],
)
def test_what_is_no_reward(folder, name, response, says):
    """A text that float() reads, NaN that counts as dropped, a number that is infinite in the trainer, a list
    that is shifted. Breaks: no isinstance in number(); no isfinite; no LARGEST; no comparison of lengths."""
    with pytest.raises(ValueError, match=re.escape(f"mine.py:{name}: {says}")):
        scored(folder / f"mine.py:{name}", response)


def test_an_exception_ends_the_run_below_its_traceback(folder, capfd):
    """A broken reward that passes for wrong answers; a traceback of ours above theirs, or none; sys.exit()
    taken for a crash.

    Breaks: 0.0 for failure(); no tb_next; no print in _error(); no SystemExit in RAISED.
    """
    with pytest.raises(ValueError) as raised:
        scored(folder / "mine.py:raises", "good", "bad", prompts=[prompt("p1"), prompt("p2")])
    told = capfd.readouterr().err
    assert str(raised.value) == (
        f"--reward {folder}/mine.py:raises: raised KeyError: 'of mine', for the response 'bad' to prompt p2, "
        "see above"
    )
    assert 'raise KeyError("of mine")' in told and "call.py" not in told and told.count("Traceback") == 1
    with pytest.raises(ValueError, match="mine.py:exits: raised SystemExit: of mine, for the response 'go"):
        scored(folder / "mine.py:exits", "good")


def test_late_responses_score_0_and_late_batches_are_dropped(folder, capsys, monkeypatch):
    """A run that hangs; a batch of zeros for one hostile response; a program that outlives its worker; a
    function that is always late.

    Breaks: [0.0] for a batch; kill() for killpg(); no _late.
    """
    scores, reward = scored(folder / "mine.py:slow", "slow", "fast", timeout_s=1.0)
    assert scores == [0.0, 1.0] and (reward.timeouts, reward.restarts, reward.dropped) == (1, 1, 0)
    said = capsys.readouterr().err
    assert "mine.py:slow: over 1 s for the response 'slow' to prompt p; it scores 0" in said
    assert subprocess.run(["pgrep", "-f", "^sleep 61.25$"], capture_output=True).stdout == b""
    scores, reward = scored(folder / "mine.py:slow_batch", "slow", "fast", timeout_s=1.0)
    assert list(map(math.isnan, scores)) == [True, True] and (reward.timeouts, reward.dropped) == (1, 2)
    monkeypatch.setattr(own, "IN_A_ROW", 1)
    with pytest.raises(ValueError, match="took over 0.3 s 2 times in a row.*; raise --reward-timeout 0.3"):
        scored(folder / "mine.py:slow", "slow", "slow", timeout_s=0.3)


@pytest.mark.skipif(sys.platform != "linux", reason="only there memory is limited")
def test_memory_has_a_limit_that_can_be_raised(folder):
    """A runaway that starves the trainer, or a limit that nobody can raise. Break: MEMORY_BYTES in words."""
    with pytest.raises(ValueError, match="Cannot allocate memory.*; raise --reward-memory 2, or"):
        scored(folder / "mine.py:greedy", "x", memory_gib=2)
    assert scored(folder / "mine.py:greedy", "x", memory_gib=4)[0] == [float(3 << 30)]


def test_a_crash_ends_the_run(folder, monkeypatch):
    """A crash in C code that passes for a wrong answer; a file that never loads. Breaks: no "died" in _run;
    no RuntimeError in __init__."""
    with pytest.raises(ValueError, match="mine.py:crash: killed its worker.*--reward-memory 8"):
        scored(folder / "mine.py:crash", "x")
    monkeypatch.setattr(workers, "START_S", 0.0)
    with pytest.raises(ValueError, match="mine.py:one: a worker died while starting or took over 0 s"):
        OwnReward(f"{folder}/mine.py:one")


def test_a_deadline_that_no_call_can_meet(folder, monkeypatch):
    """A TypeError of ours for a small --reward-timeout. Break: no "late" in __init__."""
    monkeypatch.setattr(workers.Workers, "_run", lambda self, requests: iter([(0, "late")]))
    says = "mine.py:one: took over 0.01 s to say what it takes; raise --reward-timeout 0.01, or make it"
    with pytest.raises(ValueError, match=f"{says} faster$"):
        OwnReward(f"{folder}/mine.py:one", timeout_s=0.01)


# --- What a dropped response means ---


def test_dropped_responses_are_in_no_pair_and_no_mean():
    """NaN, which is neither more nor less than anything, picked as the best; a group without advantages.

    Breaks: max(group) in pick_pairs; mean() for nanmean(); no masked_fill; no given().
    """
    nan = math.nan
    rewards = [[nan, 1.0, 0.0, nan], [nan, 1.0, 1.0, nan], [nan] * 4, [3.0, nan, nan, nan]]
    for how in ("random", "bestworst", "all"):
        assert pick_pairs(rewards, how) == [(0, 1, 2)]
    assert pick_pairs([[nan, 0.2, 0.7]], "bestworst") == [(0, 2, 1)]
    with pytest.raises(ValueError, match="bestworst"):
        pick_pairs([[nan, 0.2, 0.7]], "random")
    expected = torch.zeros(4, 4)
    expected[0, 1:3] = torch.tensor([0.5, -0.5])
    assert group_advantages(torch.tensor(rewards)).equal(expected)
    assert torch.allclose(group_advantages(torch.tensor(rewards), "std"), expected * 2**0.5, atol=1e-3)
    assert metrics.has_pair(torch.tensor(rewards))[::4] == [True, False, False, False]
    assert evaluate.over_runs([[nan, 1.0], [3.0, nan]])[0] == 2.0
    assert evaluate.over_runs([[nan, 1.0], [nan, 2.0]]) == (1.5, None, None)
    assert evaluate.over_runs([[nan, nan]]) == (None, None, None)


# --- In the scripts ---

ROWS = [{"question": "What is 2 + 2?", "answer": None}, {"question": "And 3 + 3?", "answer": "6"}]
SMALL = "--prompts-per-step 2 --samples-per-prompt 4 --max-new-tokens 6 --engine transformers"


@pytest.fixture
def train(checkpoints, folder, tmp_path):
    """Train for two steps on ROWS, one of which has no gold: (metrics, flags in config.json, directory)."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def call(script, reward, *flags):
        given = [*SMALL.split(), "--model", checkpoints["llama"], "--data", str(tmp_path / "rows.jsonl")]
        given += [
            "--reward",
            f"{folder}/{reward}",
            "--run-dir",
            str(tmp_path / "run"),
            "--steps",
            "2",
            *flags,
        ]
        script.main(given)
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        return read_metrics(tmp_path / "run"), config["flags"], tmp_path / "run"

    return call


@pytest.mark.parametrize("script", [train_dpo, train_grpo])
@pytest.mark.parametrize("reward", ["length.py:score", "steps.py:reward"])
def test_the_documented_functions_train(train, script, reward, folder, capsys):
    """A run that wants a gold, or refuses rewards that are not 0 or 1; documented code that does not work.

    Breaks: load_sources without own; "random" as the default of --pairing; no given() in of_rollouts.
    """
    rows, flags, directory = train(script, reward)
    dropped = 4 if reward == "steps.py:reward" else 0  # a step: those to the prompt without a gold
    assert [row["reward_dropped"] for row in rows] == [dropped, 2 * dropped]
    assert rows[-1]["parse_failures"] is None and rows[-1]["grader_restarts"] == 0
    assert rows[-1]["graded_per_s"] > 0 and rows[0]["reward"] is not None
    assert flags["reward"] == f"{folder}/{reward}"
    if script is train_dpo:
        assert flags["pairing"] == "bestworst"
    kept = [json.loads(line) for line in (directory / "rollouts" / "0.jsonl").read_text().splitlines()]
    assert sum(row["reward"] is None for row in kept) == dropped
    if reward == "length.py:score":
        assert rows[0]["pair_frac"] > 0


def test_pairs_of_right_and_wrong_want_zeros_and_ones(train, capsys):
    """A traceback for --pairing random with other rewards. Break: no one_line_errors() around pair_up()."""
    with pytest.raises(SystemExit):
        train(train_dpo, "length.py:score", "--pairing", "random")
    assert "--pairing random needs rewards of 0 and 1; use bestworst" in capsys.readouterr().err


def test_pairing_without_a_reward(monkeypatch):
    """Another default for everybody else. Break: "bestworst" whatever config.reward is."""
    assert parse_flags(train_dpo.Config, []).pairing is None
    monkeypatch.setattr(train_dpo, "prepare", lambda config: pytest.fail(config.pairing))
    chat = ["--data", "chat=tiny"]  # whose record says what is done
    for flags, expected in (([], "random"), (["--pairing", "all"], "all"), (chat, "bestworst")):
        with pytest.raises(pytest.fail.Exception, match=f"^{expected}$"):
            train_dpo.main(flags)


def test_a_changed_function_is_announced(train, folder, capsys):
    """A run half by one reward and half by another, unsaid; a mended function that cannot go on.

    Breaks: no print in check_same_run; reward in FREE.
    """
    file = folder / "changing.py"
    file.write_text("def score(solution_str): return len(solution_str)\n")
    train(train_grpo, "changing.py:score", "--save-every", "1")
    file.write_text("def score(solution_str): return -len(solution_str)\n")
    rows, _, _ = train(train_grpo, "changing.py:score", "--save-every", "1", "--resume", "--steps", "3")
    assert "changing.py:score: the file has changed since the run began" in capsys.readouterr().out
    assert rows[1]["reward"] > 0 > rows[2]["reward"]
    with pytest.raises(SystemExit):
        train(train_grpo, "length.py:score", "--resume")


def test_validation_and_evaluation_score_by_it(checkpoints, folder, tmp_path, monkeypatch):
    """A best checkpoint chosen by Math-Verify, or by nothing; an accuracy made of rewards.

    Breaks: no reward in validate's flags; "accuracy" in best_step; summarize() for every problem.
    """
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = parse_flags(
        train_dpo.Config,
        ["--engine", "transformers", "--dtype", "float32", "--max-new-tokens", "6", "--date", "2026-11-26"]
        + ["--reward", f"{folder}/steps.py:reward", "--reward-timeout", "9", "--reward-memory", "7"],
    )
    asked = []

    def measure(command, **options):
        asked.append(parse_flags(evaluate.Config, command[2:]))
        evaluate.main(command[2:])
        return SimpleNamespace(returncode=0)

    checkpoint = tmp_path / "run" / "export" / "1"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.symlink_to(checkpoints["llama"])
    monkeypatch.setattr(life.subprocess, "run", measure)
    life.validate(checkpoint, [f"{tmp_path}/rows.jsonl@all"], config)
    (flags,) = asked
    assert (flags.reward_timeout, flags.reward_memory) == (9.0, 7.0)
    found = json.loads((tmp_path / "run" / "validation" / "1" / "math-0.json").read_text())
    assert "accuracy" not in found and 0 <= found["reward"] <= 1 and found["reward_dropped"] == 4
    assert os.readlink(tmp_path / "run" / "best" / "math") == "../export/1"


def test_evaluation_gives_pass_at_n_for_right_and_wrong(checkpoints, folder, tmp_path, capsys):
    """A share of problems solved that is a largest reward. Break: pass_at_n for all rewards."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "binary.py").write_text(
        "def score(solution_str, extra_info): return '2' in extra_info['question']\n"
    )
    given = ["--model", checkpoints["llama"], "--data", str(tmp_path / "rows.jsonl"), "--n", "2"]
    given += ["--engine", "transformers", "--max-new-tokens", "4", "--out", str(tmp_path / "out.json")]
    for reward, passed in (("binary.py:score", 0.5), ("length.py:score", None)):
        evaluate.main([*given, "--reward", f"{folder}/{reward}"])
        found = json.loads((tmp_path / "out.json").read_text())
        assert found.get("pass_at_n") == passed
    capsys.readouterr()
    small = ["--engine", "transformers", "--samples-per-prompt", "2", "--max-new-tokens", "4", "--show", "1"]
    show.main([*given[:4], *small, "--reward", f"{folder}/binary.py:score"])
    assert capsys.readouterr().out.count("[1]") == 2


def test_a_broken_reward_ends_a_script_in_one_line(train, folder, capfd):
    """A traceback of ours through the loop, for a fault of the user's. Break: no one_line_errors in score."""
    (folder / "fails.py").write_text("def score(solution_str): return 1 / 0\n")
    with pytest.raises(SystemExit):
        train(train_grpo, "fails.py:score")
    told = capfd.readouterr().err
    assert "fails.py:score: raised ZeroDivisionError: division by zero, for the response" in told
    assert "train_grpo.py" not in told and "return 1 / 0" in told


def test_the_shape_is_told_by_a_parameter_alone():
    """A function called in the wrong shape. Break: `"prompts" in named`."""
    assert call.shape_of(lambda solution_str, ground_truth=None: 0) == {
        "batch": False, "takes": ["solution_str", "ground_truth"], "needs": ["solution_str"],
    }  # fmt: skip
    with pytest.raises(call.Refused, match="one of the parameters"):
        call.shape_of(lambda solution_str, completions: 0)
    assert call.number(torch.tensor(2)) == 2.0 and call.number(True) == 1.0
