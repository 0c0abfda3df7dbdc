"""Both tasks in one run: each response has its own task's reward, pairing rule, length limit and metrics."""

import json
import os
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

from flags import Limits, parse_flags

import pytest
from conftest import Grader

import evaluate
import life
import metrics
import train_dpo
import train_grpo
from data import Prompt
from rewards import Scorer
from run import point_to_best, read_metrics

# What is answered: problems are right where it says yes, requests are scored by their length.
SCRIPT = {
    "2 + 2?": ("math", ["yes", "no, it is not", "yes, yes", "no"]),
    "3 + 3?": ("math", ["no", "no", "nope", "no"]),
    "Tell me more.": ("chat", ["aaa", "a", "yes", "aaaaaa"]),
}
PROMPTS = [Prompt(text, task, [{"role": "user", "content": text}], "") for text, (task, _) in SCRIPT.items()]
SOURCES = [(PROMPTS[:2], 2), (PROMPTS[2:], 1)]
LENGTHS = [len(text) + 1 for _, texts in SCRIPT.values() for text in texts]  # a byte a token, and the stop
TASKS = [task for task, texts in SCRIPT.values() for _ in texts]


class CountingGrader(Grader):
    """One that has already failed to read something."""

    parse_failures = 7


class Ruler:
    """A reward model that likes length."""

    truncated = 3

    def __init__(self, path, device=None, date=None):
        self.tokenizer = SimpleNamespace(apply_chat_template=str)

    def has_room(self, messages):
        return True

    def score(self, conversations):
        assert all([turn["role"] for turn in turns] == ["user", "assistant"] for turns in conversations)
        return [float(len(turns[-1]["content"])) for turns in conversations]


@pytest.fixture
def doubles(monkeypatch):
    monkeypatch.setattr("rewards.MathVerifier", CountingGrader)
    monkeypatch.setattr("rewards.RewardModel", Ruler)


@pytest.fixture
def run(doubles, scripted, checkpoints, tmp_path):
    """Run a script for a step: (its metrics, the limits that its engine was given, the rollouts on disk)."""

    def call(script, *flags):
        engines = scripted(SOURCES, {text: responses for text, (_, responses) in SCRIPT.items()})
        given = [
            "--steps",
            "1",
            "--prompts-per-step",
            "3",
            "--samples-per-prompt",
            "4",
            "--reward-model",
            "rm",
        ]
        given += ["--data", "math=tiny", "chat=tiny", "--max-new-tokens", "math=20,chat=10"]
        given += ["--engine", "transformers", *flags]
        script.main([*given, "--model", checkpoints["llama"], "--run-dir", str(tmp_path / "run")])
        rows = (tmp_path / "run" / "rollouts" / "0.jsonl").read_text().splitlines()
        (logged,) = read_metrics(tmp_path / "run")
        return logged, engines[0].limits, [json.loads(row) for row in rows]

    return call


def test_each_response_is_scored_by_its_own_task(doubles):
    """A mixed batch scored by the reward of its first row (fairseq2's branch). Break: the task of prompts[0]
    for every response."""
    asked = [PROMPTS[i] for i in (2, 0, 2, 1, 0, 2)]
    responses = ["abc", "yes", "yes", "no", "no", ""]
    scorer = Scorer(["math", "chat"], "rm")
    together = scorer.score(asked, responses)
    assert together == [3.0, 1.0, 3.0, 0.0, 0.0, 0.0]
    assert together == [scorer.score([p], [r])[0] for p, r in zip(asked, responses, strict=True)]


def test_chat_and_reward_model_go_together(doubles):
    """Chat scored 0 throughout, or a reward model that scores nothing. Break: either check in Scorer."""
    with pytest.raises(ValueError, match="--reward-model: chat needs"):
        Scorer(["chat"])
    with pytest.raises(ValueError, match="--reward-model rm: nothing to score"):
        Scorer(["math"], "rm")


@pytest.mark.parametrize("script", [train_dpo, train_grpo])
def test_metrics_of_each_task(run, script):
    """One task's reward drowned in the other's. Break: all rows for those of the task in by_task; losses of
    other rows; a limit for all prompts."""
    logged, limits, rollouts = run(script)
    assert limits == {"2 + 2?": 20, "3 + 3?": 20, "Tell me more.": 10}
    chat = [float(len(text)) for text in SCRIPT["Tell me more."][1]]
    assert [row["reward"] for row in rollouts] == [1, 0, 1, 0, 0, 0, 0, 0, *chat]
    assert logged["math_reward"] == 2 / 8 and logged["chat_reward"] == fmean(chat)
    assert logged["math_pair_frac"] == 1 / 2 and logged["chat_pair_frac"] == 1
    for task in ("math", "chat"):
        lengths = [length for length, of in zip(LENGTHS, TASKS, strict=True) if of == task]
        assert logged[f"{task}_length"] == fmean(lengths)
    assert logged["math_loss_share"] + logged["chat_loss_share"] == pytest.approx(1)
    # Responses of reward 1 or 0 in chat are neither right nor wrong.
    assert logged["right_length"] == fmean([4, 9]) and (
        logged["parse_failures"],
        logged["reward_truncated"],
    ) == (7, 3)
    if script is train_dpo:  # at the first step every pair loses log 2: one pair of each task
        assert logged["math_loss_share"] == pytest.approx(1 / 2)
    else:  # |loss| of a response: |reward - mean| * length / limit; the reference is the policy
        shares = {"math": (0.5 * (4 + 14 + 9 + 3)) / 20, "chat": 0}
        for reward, text in zip(chat, SCRIPT["Tell me more."][1], strict=True):
            shares["chat"] += abs(reward - fmean(chat)) * (len(text) + 1) / 10
        assert logged["math_loss_share"] == pytest.approx(shares["math"] / sum(shares.values()))


@pytest.mark.parametrize(("script", "other"), [(train_dpo, "GRPO:"), (train_grpo, "DPO:")])
def test_the_glossary_is_what_a_run_logs(run, script, other):
    """A key that nobody can look up, or an entry that no run has. Break: delete an entry of
    docs/metrics.md, or add one."""
    logged, _, _ = run(script)
    defined = {key for key, meaning in metrics.glossary().items() if not meaning.startswith(other)}
    assert logged.keys() == defined - {"true_reward"}  # which tiny/chat.py adds afterwards


def test_chat_pairs_the_best_with_the_worst(run):
    """A scalar reward paired by a rule for right and wrong. Break: config.pairing for both tasks."""
    logged, _, _ = run(train_dpo, "--pairing", "all")
    # math: 2 right with 2 wrong; chat: the longest with the shortest
    assert logged["chosen_length"] == fmean([4, 4, 9, 9, 7])
    assert logged["rejected_length"] == fmean([14, 3, 14, 3, 2])


def test_the_reference_stays_where_there_is_chat(run, tmp_path):
    """The paper's reference: synced on mathematics, fixed in chat and mixed runs (Table 4). Break: the same
    default for both."""
    run(train_dpo, "--sync-every", "5")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["flags"]["sync_ref_every"] == "inf"


@pytest.mark.parametrize(
    "text", ["0", "math=10,chat=x", "", "chat=10,", "1.5", "maths=10,64", "64,128", "math=1,math=2"]
)
def test_bad_limits(text, capsys, tmp_path):
    """A limit that is no number, found out when the run is under way. Break: no check in Limits."""
    with pytest.raises(SystemExit):
        parse_flags(train_dpo.Config, ["--max-new-tokens", text])
    assert "--max-new-tokens" in capsys.readouterr().err


def test_limits_by_task():
    """Chat cut at mathematics' length. Break: the first number for every task."""
    assert Limits("64").of("math") == Limits("64").of("chat") == 64
    assert Limits("math=2048,chat=1024").of("chat") == 1024
    assert Limits("chat=1024,64").of("math") == 64
    with pytest.raises(ValueError, match="--max-new-tokens chat=10: none for math"):
        Limits("chat=10").of("math")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_only_mathematics_is_graded_ahead_and_beside_a_gpu_alone(monkeypatch, device):
    """A reward model asked by one rank, which waits for the others; graders that take a CPU trainer's cores.
    Breaks: all items in begin; no `self.ahead`."""
    begun = []
    monkeypatch.setattr("rewards.MathVerifier", lambda strict: SimpleNamespace(begin=begun.append))
    monkeypatch.setattr("rewards.RewardModel", Ruler)
    Scorer(["math", "chat"], "rm", device).begin(PROMPTS[1:], ["2", "b"])
    assert begun == ([[("2", "")]] if device == "cuda" else [])


# --- Choosing a checkpoint ---


def write_validation(folder, step, **results):
    """What --eval-every measured at a step; results: file name (with _ for -) = summary."""
    (folder / "validation" / step).mkdir(parents=True)
    (folder / "export" / step).mkdir(parents=True)
    for name, summary in results.items():
        file = folder / "validation" / step / f"{name.replace('_', '-')}.json"
        file.write_text(json.dumps(summary))


def test_the_best_step(tmp_path, capsys):
    """best/ that names the last checkpoint, one source's best, or chat's best by raw reward, which grows with
    length. Breaks: min for max; the first file alone; the key `reward`; no look at the sign."""
    folder = tmp_path / "validation"
    for step, first, second, reward, normalized in [
        ("10", 0.5, 0.5, 2.0, 0.10),
        ("20", 0.7, 0.6, 3.0, 0.12),
        ("30", 0.9, 0.1, 4.0, 0.08),
    ]:
        chat = {"reward": reward, "length_normalized_reward": normalized}
        write_validation(tmp_path, step, math_0={"accuracy": first}, math_1={"accuracy": second}, chat_2=chat)
    assert life.best_step(folder, "math") == life.best_step(folder, "chat") == "20"
    assert capsys.readouterr().out == ""
    chat = {"reward": -1.0, "length_normalized_reward": -0.001}  # the longest is the least negative
    write_validation(tmp_path, "40", math_0={"accuracy": 0.1}, chat_2=chat)
    assert life.best_step(folder, "chat") == "30" and "not all positive" in capsys.readouterr().out


def test_measuring_in_a_process_of_its_own(monkeypatch, tmp_path, capsys):
    """Flags that evaluate.py does not know, found out after hours; a healthy run that ends because a
    measurement found no memory, or says nothing of it. Breaks: --gpu-memory among the flags; no look at the
    exit status; sys.exit for print; no `most == 0`."""
    args = ["--max-new-tokens", "math=20,chat=10", "--reward-model", "rm", "--dtype", "float32"]
    config, status = parse_flags(train_dpo.Config, args), 0

    def measure(command, **options):
        flags = parse_flags(evaluate.Config, command[2:])
        assert os.path.samefile(command[1], evaluate.__file__)
        assert flags.attached and "LOCAL_RANK" not in options["env"]  # it ends with the run, and is no rank
        task = flags.data.split("=")[0]
        assert (flags.max_new_tokens, flags.reward_model) == {"math": (20, None), "chat": (10, "rm")}[task]
        if status == 0:
            os.makedirs(os.path.dirname(flags.out), exist_ok=True)
            with open(flags.out, "w") as file:
                json.dump({"accuracy": 0.5, "reward": 1.0, "length_normalized_reward": 0.1}, file)
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(life.subprocess, "run", measure)
    checkpoint = tmp_path / "export" / "10"
    checkpoint.mkdir(parents=True)
    specs = ["math=tiny@validation", "chat=tiny@validation"]
    life.validate(checkpoint, specs, config)
    for task in ("math", "chat"):
        assert os.path.samefile(tmp_path / "best" / task, checkpoint)
    status = 1
    life.validate(checkpoint, specs, config)  # as a resumed run does: it is measured already
    (tmp_path / "export" / "20").mkdir()
    life.validate(tmp_path / "export" / "20", specs, config)
    assert f"{tmp_path}/export/20 could not be measured on math=tiny@validation" in capsys.readouterr().out
    missing = (tmp_path / "validation" / "20" / "missing.txt").read_text().splitlines()
    assert [line.startswith("python evaluate.py --model ") for line in missing] == [True, True]
    assert os.path.samefile(tmp_path / "best" / "math", checkpoint)  # the best of those that were measured
    first = tmp_path / "new" / "export" / "20"
    first.mkdir(parents=True)
    life.validate(first, specs, config)
    assert not (tmp_path / "new" / "best").exists()


def test_a_run_chooses_its_best_checkpoint(run, checkpoints, monkeypatch, tmp_path):
    """--eval-every that measures nothing, or not what is exported at the end. Break: no `or last`."""
    measured = []
    monkeypatch.setattr(life, "load_held_out", lambda specs, sources, own: {"spec": PROMPTS[:1]})
    monkeypatch.setattr(life, "validate", lambda path, specs, config: measured.append((path, [*specs])))
    run(train_dpo, "--eval-every", "5")
    assert measured == [(tmp_path / "run" / "export" / "1", ["spec"])] and measured[0][0].is_dir()


def test_a_run_that_was_cut_while_it_measured(run, monkeypatch, tmp_path):
    """A measurement that a resumed run leaves out, or a checkpoint lost to one that failed. Breaks: no
    validate() before the loop; checkpoints.save() after validate()."""

    def fail(*arguments):
        raise SystemExit("--eval-every: no memory")

    monkeypatch.setattr(life, "load_held_out", lambda specs, sources, own: {"spec": PROMPTS[:1]})
    monkeypatch.setattr(life, "validate", fail)
    flags = ("--eval-every", "1", "--save-every", "1", "--steps", "1", "--resume")
    with pytest.raises(SystemExit, match="no memory"):
        run(train_dpo, *flags)
    assert (tmp_path / "run" / "checkpoints" / "1" / "state.json").exists()
    measured = []
    monkeypatch.setattr(life, "validate", lambda path, specs, config: measured.append(path.name))
    run(train_dpo, *flags)
    assert measured == ["1"]


def test_best_moves_in_one_act(monkeypatch, tmp_path):
    """A reader that finds no best/ while it moves. Break: unlink, then symlink."""
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "math").symlink_to("../export/1")
    rename, seen = Path.rename, []

    def looked_at(path, target):
        seen.append(os.readlink(tmp_path / "best" / "math"))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", looked_at)
    point_to_best(tmp_path, "math", "2")
    assert seen == ["../export/1"]
    assert os.readlink(tmp_path / "best" / "math") == "../export/2"
    assert os.listdir(tmp_path / "best") == ["math"]


def test_length_normalized_reward():
    """Checkpoints chosen by raw reward. Break: the mean of each response's reward over its own length."""
    found = evaluate.summarize_rewards([[1.0, 3.0], [2.0, 6.0]], [[10, 20], [10, 40]])
    assert found["reward"] == 3.0 and found["length_normalized_reward"] == pytest.approx(3.0 / 20)
    assert found["standard_error"] == pytest.approx(1.5)  # runs of 1.5 and 4.5


def test_evaluate_chat(doubles, checkpoints, tmp_path):
    """Requests measured as problems, or answers that the judge cannot read. Break: no rows for the file."""
    from judge.answers import load_answers

    file = tmp_path / "requests.jsonl"
    file.write_text("".join(json.dumps({"instruction": text}) + "\n" for text in ("Hi", "Ho")))
    args = ["--model", checkpoints["llama"], "--data", f"chat={file}", "--reward-model", "rm", "--n", "1"]
    args += ["--engine", "transformers", "--max-new-tokens", "4"]
    evaluate.main([*args, "--out", str(tmp_path / "out.json"), "--answers", str(tmp_path / "a.jsonl")])
    result = json.loads((tmp_path / "out.json").read_text())
    answers = load_answers([tmp_path / "a.jsonl"])["a"]
    assert {row["prompt"] for row in answers.values()} == {"Hi", "Ho"}
    assert result["reward"] == fmean(row["length"] for row in answers.values())
    assert result["problems"] == 2 and result["standard_error"] is None

    unscored = [word for word in args if word not in ("--reward-model", "rm")]
    evaluate.main([*unscored, "--answers", str(tmp_path / "b.jsonl")])  # for the judge alone
    assert load_answers([tmp_path / "b.jsonl"])["b"].keys() == answers.keys()
