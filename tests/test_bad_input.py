"""What a user gets wrong is answered in one line that names the flag or file, before anything is computed or
written."""

import json

import pytest

import evaluate
import train_dpo
import train_grpo
from run import Run

GOOD = {"problem": "What is 1 + 1?", "answer": "2"}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def refused(tmp_path, capfd, checkpoints):
    """Call a script's main with flags that must be refused; return the one line it prints."""

    def call(*flags, script=train_dpo):
        run_dir = [] if script is evaluate or "--run-dir" in flags else ["--run-dir", str(tmp_path / "run")]
        model = [] if "--model" in flags else ["--model", checkpoints["llama"]]
        with pytest.raises(SystemExit) as exit:
            script.main([*model, *run_dir, *flags])
        assert exit.value.code == 2
        *progress, error = capfd.readouterr().err.strip().split("\n")
        assert all("\r" in bar for bar in progress), progress  # progress bars may come first
        error = error.split("\r")[-1].strip()
        assert not (tmp_path / "run").exists()  # nothing was written
        return error

    return call


both_scripts = pytest.mark.parametrize("script", [train_dpo, train_grpo])


@both_scripts
@pytest.mark.parametrize("value", ["0", "-3", "abc", "2.5", "nan"])
def test_sync_every(refused, script, value):
    """A dial of 0 divides by zero; of -3 it never syncs. Break: type float instead of Every."""
    assert "--sync-every" in (line := refused("--sync-every", value, script=script)) and value in line


@both_scripts
def test_unknown_flag(refused, script):
    """A misspelt flag that is silently ignored. Break: drop the check of what is left over."""
    assert "--sync-evry" in refused("--sync-evry", "3", script=script)


WRONG_VALUES = [
    "--sync-ref-every 0",
    "--steps 0",
    "--steps many",
    "--prompts-per-step 0",
    "--samples-per-prompt 1",
    "--micro-batch-tokens 0",
    "--ahead 0",
    "--temperature 0",
    "--lr inf",
    "--dtype int8",
    "--engine tgi",
    "--eval-every 0",
    "--max-new-tokens maths=8",
]
WRONG_IN = {
    train_dpo: ["--pairing best", "--beta 0", "--nll-coef -1", "--entropy-coef nan", "--grpo-coef inf"],
    train_grpo: [
        "--correction foo",
        "--clip-low 1.5",
        "--clip-high 0",
        "--tis-cap 0.5",
        "--kl-coef -1",
        "--normalize foo",
        "--advantage-scale mean",
    ],
}
WRONG = [(script, flags) for script, own in WRONG_IN.items() for flags in WRONG_VALUES + own]


@pytest.mark.parametrize(("script", "flags"), WRONG)
def test_values_out_of_range(refused, script, flags):
    """A value that fails deep inside, after the engine has started, or that turns a term of the loss around.

    Breaks: int instead of Count; float instead of Coefficient or Share; drop the check of --tis-cap, or of
    --samples-per-prompt in either script.
    """
    flag, value = flags.split()
    line = refused(flag, value, script=script)
    assert flag in line and value in line


def test_model_that_does_not_exist(refused):
    """A traceback from the hub client. Break: drop the except in load_config."""
    assert "--model no/such" in refused("--model", "no/such")


def test_model_folder_without_a_checkpoint(refused, tmp_path):
    """A folder taken for a model. Break: drop the look for config.json."""
    assert "config.json" in refused("--model", str(tmp_path))


@both_scripts
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data chat={file}@all", "--reward-model: chat needs a checkpoint"),
        ("--data {problems} --reward-model rm", "--reward-model rm: nothing to score"),
        ("--data chat={file}@all --reward-model {folder}", "{folder}: not a checkpoint"),
        ("--data {problems} --eval-every 5", "--eval-every: --data {problems} leaves nothing held out"),
        ("--data {problems} chat={file}:2 --max-new-tokens math=8", "--max-new-tokens math=8: none for chat"),
        ("--data {problems} {problems}", "--data {problems}: all its prompts are in the sources before it"),
        ("--data talk={file}", "unknown task 'talk'"),
        ("--data {file}", "requests are chat=..."),
        (
            "--data {problems}:2 --prompts-per-step 3",
            "--prompts-per-step 3: takes 3 prompts from a source of 1",
        ),
    ],
)
def test_two_tasks(refused, script, flags, message, tmp_path):
    """Mixtures whose error comes late, in a traceback, or names nothing. Break: each check alone."""
    names = {
        "file": write(tmp_path / "requests.jsonl", {"instruction": "Hi"}),
        "problems": write(tmp_path / "problems.jsonl", GOOD),
        "folder": str(tmp_path),
    }
    words = [word.format(**names) for word in flags.split()]
    words += [] if "--max-new-tokens" in words else ["--max-new-tokens", "8"]
    assert message.format(**names) in refused(*words, script=script)


def test_missing_empty_and_broken_data(refused, tmp_path):
    """Data errors that do not say where. Break: leave the file's name out of one message."""
    assert "none.jsonl" in refused("--data", str(tmp_path / "none.jsonl"))
    assert "empty.jsonl" in refused("--data", write(tmp_path / "empty.jsonl"))
    line = refused("--data", write(tmp_path / "broken.jsonl", GOOD, "{not json"))
    assert "broken.jsonl" in line and "line 2" in line
    line = refused("--data", write(tmp_path / "fields.jsonl", GOOD, {"text": "What?"}))
    assert "fields.jsonl" in line and "line 2" in line


def test_gold_answers_that_cannot_be_parsed(refused, tmp_path, capfd):
    """A problem nobody can be right about. Break: return all prompts from gradable()."""
    from data import load_prompts
    from rewards import MathVerifier, gradable

    some = write(tmp_path / "some.jsonl", GOOD, {"problem": "Which?", "answer": "\\frac{1}{"})
    with MathVerifier(workers=1) as verifier:
        assert [prompt.answer for prompt in gradable(load_prompts(some), verifier)] == ["2"]
    assert "cannot parse 1 of 2 gold answers" in capfd.readouterr().out
    none = write(tmp_path / "none.jsonl", {"problem": "Which?", "answer": "\\frac{1}{"})
    line = refused("--data", none, "--max-new-tokens", "8")
    assert "1 of 1 gold answers" in line and "frac" in line


def test_response_longer_than_the_context(refused, tmp_path):
    """A generation that the engine cuts or refuses later.

    Break: drop the check. The context is 256 tokens.
    """
    data = write(
        tmp_path / "data.jsonl", *({"problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(40))
    )
    assert "--max-new-tokens" in refused("--data", data, "--max-new-tokens", "257")
    assert "--max-new-tokens" in refused("--data", data, "--max-new-tokens", "257", script=evaluate)


def test_run_directory_that_is_not_empty(refused, tmp_path):
    """A run written over another. Break: exist_ok without the look inside."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").write_text("{}\n")
    assert "--run-dir" in refused("--run-dir", str(tmp_path / "old"))
    assert (tmp_path / "old" / "metrics.jsonl").read_text() == "{}\n"


def test_metrics_keep_their_keys(tmp_path):
    """A key logged at some steps only breaks every table. Break: drop the comparison in Run.log."""
    run = Run(train_dpo.Config(run_dir=str(tmp_path / "run")))
    run.log({"step": 0, "loss": 1.0})
    with pytest.raises(KeyError, match="reward"):
        run.log({"step": 1, "reward": 1.0})
