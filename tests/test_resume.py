"""A run that was cut short and resumed is the run that was not: the same metrics and weights, bit for bit."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import datetime
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import computed, torchrun, wait_for_step
from safetensors.torch import load_file

import evaluate
import life
import train_dpo
import train_grpo
from checkpoint import blank_moments, newest
from run import Run, check_same_run, flags_of, lock, read_config, read_metrics, same_value, write_lines

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--data tiny@validation --steps 6 --prompts-per-step 6 --samples-per-prompt 8 --max-new-tokens 32"
SMALL += " --lr 1e-3 --ahead 3 --save-every 2"


class Killed(Exception):
    """As good as kill -9: nothing that main() would still do is done."""


def assert_same(one, two):
    assert one[0] == two[0]
    assert one[1].keys() == two[1].keys() and all(torch.equal(one[1][name], two[1][name]) for name in one[1])


@pytest.fixture
def die_at(monkeypatch):
    """Let a run be killed while it records a step, after its metrics are written."""
    save = Run.save_rollouts

    def at(step):
        def save_rollouts(self, now, *rest):
            if now == step:
                raise Killed
            save(self, now, *rest)

        monkeypatch.setattr(Run, "save_rollouts", save_rollouts)

    return at


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing happens to, made once for its flags."""

    @cache
    def call(script, flags):
        directory = tmp_path_factory.mktemp("straight") / "run"
        script.main(f"{SMALL} {flags} --run-dir {directory}".split())
        return computed(directory)

    return call


@pytest.mark.parametrize(
    "script, flags, dies",
    [
        (train_dpo, "--sync-every 3", 3),  # from step 2: inside a window, a batch of which is sampled already
        (
            train_grpo,
            "--sync-every 4 --sync-ref-every 3 --engine transformers",
            4,
        ),  # from 4: a sync comes next
        pytest.param(train_dpo, "--sync-every 1", 3, marks=pytest.mark.slow),
        # From 4: just after a sync.
        pytest.param(
            train_dpo, "--sync-every 3 --sync-ref-every inf --engine transformers", 5, marks=pytest.mark.slow
        ),
        # From 4 and from 5, both inside the window of step 3's weights, and nothing is sampled ahead.
        pytest.param(train_dpo, "--sync-every 3 --save-every 1 --ahead 1", 4, marks=pytest.mark.slow),
        pytest.param(train_grpo, "--sync-every inf", 5, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_run(script, flags, dies, straight, die_at, monkeypatch, tmp_path):
    """Data that begins again, metrics twice, moments or a reference that are lost, counts from zero, and the
    one nobody looks for: a stale generator that wakes up with fresh weights.

    Breaks: no _restore_generator, but generator.stamp(version); leave out note_sync there (a second kill);
    range(config.steps); no "reference." in _tensors; no adam; `step` for `0` as batches' step.
    """
    expected = straight(script, flags)
    for step in (dies, 5):  # killed twice; at 5 the checkpoint is that of step 4
        with monkeypatch.context():
            die_at(step)
            with pytest.raises(Killed):
                script.main(f"{SMALL} {flags} --resume --run-dir {tmp_path / 'run'}".split())
        monkeypatch.undo()
    script.main(f"{SMALL} {flags} --resume --run-dir {tmp_path / 'run'}".split())
    assert_same(computed(tmp_path / "run"), expected)
    starts = [start["first_step"] for start in read_config(tmp_path / "run")["starts"]]
    every = 1 if "--save-every 1" in flags else 2
    assert starts == [0, dies - dies % every, 5 - 5 % every]
    assert sorted(path.stem for path in (tmp_path / "run" / "rollouts").iterdir()) == list("012345")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [str(6 - every), "6"]


@pytest.mark.slow
def test_another_number_of_ranks(straight, die_at, monkeypatch, tmp_path):
    """Shards, or rollouts, that only fit as many ranks as wrote them. Breaks: gather(rows) -> rows; no
    `rank() == 0` before set_counts."""
    flags = "--sync-every 6 --engine transformers"  # one window: each checkpoint has the generator's weights
    rows, weights = straight(train_dpo, flags)
    command = f"{SMALL} {flags} --resume --run-dir {tmp_path / 'run'}"
    die_at(3)
    with pytest.raises(Killed):
        train_dpo.main(command.split())
    monkeypatch.undo()
    lock.cache_clear()  # as if that process had ended
    for again in ("two ranks, from step 2 of one", "one rank, from step 4 of two"):
        if again.startswith("two"):
            torchrun(2, "train_dpo.py", *command.split())
        else:
            shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
            train_dpo.main(command.split())
        resumed, others = computed(tmp_path / "run")
        for row, other in zip(rows, resumed, strict=True):
            for key, value in row.items():
                close = value if value is None else pytest.approx(value, rel=1e-3, abs=2e-5)
                assert other[key] == close, (again, row["step"], key)
        for name, weight in weights.items():
            torch.testing.assert_close(others[name], weight, rtol=0, atol=1e-4)


def test_a_signal_ends_a_run_after_its_step(straight, tmp_path):
    """SIGTERM that loses the steps since the last checkpoint, or is an error. Break: no stop.requested()."""
    flags = "--sync-every 3"
    command = (
        f"train_dpo.py {SMALL.replace('--save-every 2', '')} {flags} --resume --run-dir {tmp_path / 'run'}"
    )
    run = subprocess.Popen([sys.executable, *command.split()], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for_step(run, tmp_path / "run")
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=60)[0]
    steps = len(read_metrics(tmp_path / "run"))
    assert run.returncode == 0 and steps < 6 and f"stopped after {steps} steps; " in said
    train_dpo.main(command.split()[1:])
    assert_same(computed(tmp_path / "run"), straight(train_dpo, flags))


def test_a_checkpoint_that_is_cut_is_passed_over(die_at, tmp_path, capsys):
    """A file that the disk lost half of, read as if it were whole, or kept instead of the last whole one; or
    a run begun again over its own exports.

    Breaks: no comparison of sizes in newest(); numbered() for `earlier`; no look at export/ in load();
    only its own partial removed in save().
    """
    command = f"{SMALL} --engine transformers --steps 5 --resume --run-dir {tmp_path / 'run'}"
    die_at(4)
    with pytest.raises(Killed):
        train_dpo.main(command.split())
    whole = sorted((tmp_path / "run" / "checkpoints" / "4").glob("*.safetensors"))[0]
    os.truncate(whole, whole.stat().st_size - 1)
    (
        tmp_path / "run" / "checkpoints" / "9.partial"
    ).mkdir()  # what a kill leaves of one that was being written
    assert newest(tmp_path / "run" / "checkpoints").name == "2"
    assert f"checkpoints/4 is not whole ({whole.name}); taking the one before" in capsys.readouterr().out
    train_dpo.main(command.replace("--steps 5", "--steps 3 --keep 1 --save-every 1").split())
    assert newest(tmp_path / "run" / "checkpoints").name == "3"  # --keep has not kept the cut one instead
    assert not (tmp_path / "run" / "checkpoints" / "9.partial").exists()
    (tmp_path / "run" / "checkpoints" / "3" / "state.json").write_text("{")
    assert newest(tmp_path / "run" / "checkpoints") is None
    with pytest.raises(SystemExit):
        train_dpo.main(command.split())
    assert "--resume: no whole checkpoint in" in capsys.readouterr().err.strip().splitlines()[-1]
    assert (tmp_path / "run" / "export" / "3").exists()


def test_killed_between_a_checkpoint_and_its_export(straight, monkeypatch, tmp_path):
    """A run that cannot go on, or an export that is never made. Breaks: publish() before
    checkpoints.save(); no publish() in steps()."""
    flags = "--sync-every 3 --engine transformers"
    command = f"{SMALL} {flags} --resume --run-dir {tmp_path / 'run'}".split()
    export, kills = life.export, {2, 4}

    def killed(policy, tokenizer, directory, step):
        if step in kills:
            kills.remove(step)
            raise Killed
        return export(policy, tokenizer, directory, step)

    monkeypatch.setattr(life, "export", killed)
    for _ in range(2):
        with pytest.raises(Killed):
            train_dpo.main(command)
    train_dpo.main(command)
    assert_same(computed(tmp_path / "run"), straight(train_dpo, flags))
    assert sorted(path.name for path in (tmp_path / "run" / "export").iterdir()) == ["2", "4", "6"]


UNSCORED = SimpleNamespace(usable=lambda prompts, **_: prompts)  # the real one starts processes


def test_the_date_is_that_of_the_runs_start(monkeypatch, tmp_path):
    """A resumed run, its own validation, or a later evaluation whose prompts print another day. Breaks: no
    run_date() in prepare(), in rendering(); no "date" in generator_settings(), in validate."""
    days, told, commands = iter(["2024-07-26", "2030-01-01"]), [], []
    load_generator = life.load_generator

    def load(*arguments, **settings):
        told.append(settings["date"])
        return load_generator(*arguments, **settings)

    monkeypatch.setattr(life, "time", SimpleNamespace(strftime=lambda form: next(days)))
    monkeypatch.setattr(life, "load_generator", load)
    run = SimpleNamespace(returncode=1)
    monkeypatch.setattr(life.subprocess, "run", lambda command, **_: commands.append(command) or run)
    monkeypatch.setattr("run.surroundings", lambda: {"versions": {}})
    directory, data = tmp_path / "run", tmp_path / "sums.jsonl"
    write_lines(data, ({"problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(40)))
    command = (
        f"{SMALL} --data {data}@train --run-dir {directory} --engine transformers --save-every 1".split()
    )
    command += ["--prompts-per-step", "2", "--samples-per-prompt", "2"]
    train_dpo.main([*command, "--steps", "1"])
    train_dpo.main([*command, "--steps", "2", "--resume", "--eval-every", "2"])
    assert told == ["2024-07-26"] * 2 and read_config(directory)["flags"]["date"] == "2024-07-26"
    (words,) = commands
    assert words[words.index("--date") + 1] == "2024-07-26"
    monkeypatch.setattr(evaluate.Scorer, "of", lambda *_, **__: UNSCORED)
    for model in (directory, directory / "export" / "1"):
        ((_, tokenizer, *_),), *_ = evaluate.prepare(evaluate.Config(model=[str(model)], data=str(data)))
        assert tokenizer.date == "2024-07-26"
    with pytest.raises(SystemExit):
        train_dpo.main([*command, "--resume", "--date", "2024-07-27"])


def test_a_checkpoint_of_no_run_prints_todays_date(monkeypatch, tmp_path, capsys):
    """Two evaluations that differ by the day, without a word. Break: no line in evaluate.prepare."""
    monkeypatch.setattr(evaluate.Scorer, "of", lambda *_, **__: UNSCORED)
    folder = shutil.copytree(ROOT / "tiny/llama", tmp_path / "seed")
    template = (folder / "chat_template.jinja").read_text()
    for printed in ("", "{{ strftime_now('%d %B') }}"):
        (folder / "chat_template.jinja").write_text(printed + template)
        evaluate.prepare(evaluate.Config(model=[str(folder)], limit=3))
        said = f"{folder}: its chat template prints the date, today's {datetime.now():%Y-%m-%d} (--date)"
        assert (said in capsys.readouterr().out) == bool(printed)
    evaluate.prepare(evaluate.Config(model=[str(folder)], limit=3, date="2024-07-26"))
    assert "prints the date" not in capsys.readouterr().out


def test_a_run_is_resumed_from_another_directory(monkeypatch, tmp_path):
    """A run that is refused since the same path is written otherwise; one that goes on with another model.
    Breaks: == for same_value, for same_path; no started_in; "data" into FREE."""
    model, other = tmp_path / "here" / "models" / "a", tmp_path / "there" / "models" / "a"
    for folder in (model, other):
        folder.mkdir(parents=True)
    (tmp_path / "here" / "p.jsonl").touch()

    def config(folder, **flags):
        monkeypatch.chdir(folder)
        run_dir = os.path.relpath(tmp_path / "runs" / "x")
        usual = {"run_dir": run_dir, "model": "models/a", "data": ["p.jsonl@train:2", "tiny"]}
        usual["date"] = "2024-07-26"
        return train_dpo.Config(**{**usual, **flags})

    Run(config(tmp_path / "here")).close()
    check_same_run(config(tmp_path / "here"))
    data = ["math=../here/p.jsonl@train:2", "tiny"]
    alike = {"model": "../here/models/a", "data": data}
    check_same_run(config(tmp_path / "there", **alike))
    check_same_run(config(tmp_path, model=str(model), data=[f"{tmp_path}/here/p.jsonl@train:2", "tiny"]))
    others = ["p.jsonl@train:3", "../here/p.jsonl@test:2", "chat=../here/p.jsonl@train:2", "p.json@train:2"]
    for flags in ({"model": "models/a"}, *({"data": [spec, "tiny"]} for spec in others), {"data": data[:1]}):
        with pytest.raises(ValueError, match=f"--{[*flags][0]} .*: the run in .* has .*; resume it with"):
            check_same_run(config(tmp_path / "there", **{**alike, **flags}))


def test_a_reward_is_told_by_its_file(monkeypatch, tmp_path):
    """A resume refused for ./mine.py; one by another function. Break: no "reward" in same_value."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").touch()
    (tmp_path / "other.py").touch()
    assert same_value("reward", f"{tmp_path}/mine.py:f", "./mine.py:f", tmp_path)
    for other in ("mine.py:g", "other.py:f", None):
        assert not same_value("reward", other, "mine.py:f", tmp_path)


def test_a_run_from_before_the_strict_flag_was_graded_strictly(tmp_path):
    """A run of older code that no flag can resume. Breaks: no "strict_paper_grading" in check_same_run; no
    defaults there."""
    config = train_dpo.Config(run_dir=str(tmp_path / "run"), date="2024-07-26")
    Run(config).close()
    path = tmp_path / "run" / "config.json"
    started = json.loads(path.read_text())
    del started["flags"]["strict_paper_grading"], started["flags"]["sync_when"]
    path.write_text(json.dumps(started))
    with pytest.raises(ValueError, match="--strict-paper-grading False: the run in .* has True"):
        check_same_run(config)
    config.strict_paper_grading = True
    check_same_run(config)


def test_flags_are_json_that_every_program_reads():
    """Infinity in config.json, which JSON lacks. Break: only Every's infinity is "inf" in as_json."""
    for script in (train_dpo, train_grpo):
        json.dumps(flags_of(script.Config()), allow_nan=False)


HOLD = "import sys; from pathlib import Path; from run import lock; lock(Path(sys.argv[1])); print(); input()"


def test_main_gives_the_signals_back(tmp_path):
    """A notebook that Ctrl-C no longer interrupts after a run. Break: no finally in Life.steps."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    command = f"{SMALL} --engine transformers --steps 1 --run-dir {tmp_path / 'run'}".split()
    train_dpo.main(command)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_an_error_in_a_step_gives_the_signals_back(die_at, tmp_path):
    """The same where a step raises. Break: close the Stop after the loop instead."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    die_at(0)
    with pytest.raises(Killed):
        train_dpo.main(f"{SMALL} --engine transformers --steps 2 --run-dir {tmp_path / 'run'}".split())
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_two_processes_in_one_directory(monkeypatch, tmp_path, capsys):
    """Two runs that write into each other's metrics: torchrun is killed, its ranks live on, and the user
    resumes. Breaks: no lock() in check_run_dir, or in Run; fcntl.LOCK_SH."""
    command = f"{SMALL} --engine transformers --resume --run-dir {tmp_path / 'run'}".split()
    hold = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "close", lambda run: None)
        train_dpo.main([*command, "--steps", "2"])  # a new run, which Run alone locks
    other = subprocess.run(hold, cwd=ROOT, input="", capture_output=True, text=True)
    assert "another process trains in it" in other.stderr
    lock.cache_clear()  # as if this process had ended
    other = subprocess.Popen(hold, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(life, "load_tokenizer", None)  # refused before anything is read
        train_dpo.main(command)
    assert f"--run-dir {tmp_path / 'run'}: another process trains in it;" in capsys.readouterr().err
    other.kill()
    other.wait()
    train_dpo.main([*command, "--steps", "3"])
    free = subprocess.run(hold, cwd=ROOT, input="\n", text=True, stdout=subprocess.PIPE)
    assert free.returncode == 0
    assert len(read_metrics(tmp_path / "run")) == 3


@pytest.mark.slow
def test_a_checkpoint_in_several_files(straight, monkeypatch, tmp_path):
    """Parts of a model that lie in a file nobody reads. Break: read only the first of files.

    A file is written from memory: in one alone, a rank's whole part of the run would be there twice.
    """
    monkeypatch.setattr("checkpoint.FILE_BYTES", 2**20)
    flags = "--sync-every 3 --engine transformers"
    command = f"{SMALL} {flags} --resume --run-dir {tmp_path / 'run'}".split()
    train_dpo.main([*command, "--steps", "4"])
    sizes = [path.stat().st_size for path in (tmp_path / "run/checkpoints/4").glob("*.safetensors")]
    assert len(sizes) > 4 and max(sizes) < 3 * 2**20
    train_dpo.main(command)
    assert_same(computed(tmp_path / "run"), straight(train_dpo, flags))


def no_space(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "where, name",
    [
        ("torch.distributed.checkpoint.filesystem.FileSystem", "create_stream"),  # inside dcp's own error
        pytest.param("run", "write_text", marks=pytest.mark.slow),
        pytest.param("transformers.LlamaForCausalLM", "save_pretrained", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_ends_a_run_that_can_go_on(straight, where, name, monkeypatch, tmp_path, capsys):
    """A traceback of dcp, or a half-written checkpoint that is taken for one. Breaks: no full_disk_ends_run()
    before save, before export; `except OSError`."""
    flags = "--sync-every 3 --engine transformers"
    command = f"{SMALL} {flags} --resume --run-dir {tmp_path / 'run'}".split()
    train_dpo.main([*command, "--steps", "3"])
    with monkeypatch.context() as patch:
        patch.setattr(f"{where}.{name}", no_space)
        with pytest.raises(SystemExit, match="--run-dir: No space left on device; make room; the same"):
            train_dpo.main(command)
    train_dpo.main(command)
    assert_same(computed(tmp_path / "run"), straight(train_dpo, flags))


def test_a_gradient_that_is_not_finite(monkeypatch, tmp_path):
    """One bad batch that makes every weight NaN, or ends a day's run; or a broken run that goes on for ever.

    Breaks: no isfinite() before optimizer.step(); 300 for 3.
    """
    norms = iter([float("nan"), float("inf"), 1.0, float("nan"), float("nan"), float("nan")])
    monkeypatch.setattr(train_grpo, "clip_gradients", lambda policy, norm: next(norms))
    with pytest.raises(FloatingPointError, match="step 5: the third .* new run from .*export/4,"):
        train_grpo.main(f"{SMALL} --engine transformers --steps 9 --run-dir {tmp_path / 'run'}".split())
    rows = read_metrics(tmp_path / "run")
    assert [row["skipped_steps"] for row in rows] == [1, 2, 2, 3, 4, 5]
    assert [row["grad_norm"] for row in rows] == [None, None, 1.0, None, None, None]
    weights = load_file(tmp_path / "run" / "export" / "2" / "model.safetensors")
    assert all(
        torch.equal(weights[n], w) for n, w in load_file(ROOT / "tiny/llama/model.safetensors").items()
    )
    assert not (tmp_path / "run" / "checkpoints" / "6").exists()  # nothing to resume from the brink


def test_moments_as_adam_makes_them():
    """A resumed run that ends at its first step on a GPU: fused AdamW wants the step beside the weights.
    Break: torch.tensor(0.0) for the step."""
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    made, blank = optimizer.state[weight], blank_moments(weight)
    assert {key: (x.shape, x.dtype) for key, x in made.items()} == {
        key: (x.shape, x.dtype) for key, x in blank.items()
    }
    elsewhere = blank_moments(torch.empty(3, 2, device="meta"))
    assert {x.device.type for x in elsewhere.values()} == {"meta"}
