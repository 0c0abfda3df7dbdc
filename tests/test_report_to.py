"""--report-to: a run as wandb, trackio and tensorboard see it. Those that are not installed are skipped."""

import json
import os
import subprocess
import sys
from types import ModuleType

import pytest
from conftest import write_program

import life
import run as run_file
import train_dpo
from run import Run, check_tracker, read_metrics

SMALL = "--data tiny@validation --prompts-per-step 4 --samples-per-prompt 8 --max-new-tokens 16"
SMALL += " --engine transformers --steps 3"


def row(step):
    """A step's metrics: what a tracker takes, and what it does not."""
    return {
        "step": step,
        "reward": step / 10,
        "math_length": 7,
        "train_s": 0.5,
        "sync_gap": None,
        "name": "x",
    }


def config(tracker, folder):
    return train_dpo.Config(run_dir=str(folder / "mine"), report_to=tracker, seed=5)


class Wandb(ModuleType):
    """A wandb that keeps what it is told; from step `fails_at` on its network is gone."""

    def __init__(self, fails_at=None):
        super().__init__("wandb")
        self.fails_at, self.inits, self.logged, self.finished = fails_at, [], [], 0

    def init(self, **settings):
        self.inits.append(settings)
        return self

    def log(self, numbers, step, commit):
        if self.fails_at is not None and step >= self.fails_at:
            raise ConnectionError("network gone")
        assert commit  # otherwise wandb keeps a step back until the next comes
        self.logged.append((step, numbers))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    """Put such a double where wandb would be."""

    def call(**settings):
        double = Wandb(**settings)
        monkeypatch.setitem(sys.modules, "wandb", double)
        monkeypatch.setattr(run_file, "distributions", lambda name: [name])
        return double

    return call


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_missing_package_is_one_line(name, monkeypatch, tmp_path, capsys):
    """A traceback, or minutes of loading before it. Break: no check_tracker() in prepare."""
    monkeypatch.setattr(run_file, "distributions", lambda name: [])
    monkeypatch.setattr("life.load_tokenizer", lambda *_: pytest.fail("a model is loaded first"))
    with pytest.raises(SystemExit):
        train_dpo.main(f"{SMALL} --report-to {name} --run-dir {tmp_path / 'run'}".split())
    assert capsys.readouterr().err.endswith(
        f": --report-to {name}: not installed; python -m pip install {name}\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_that_name_is_not_the_package(monkeypatch, tmp_path):
    """The folder wandb/ that an earlier run left. Break: importlib.util.find_spec() for distributions()."""
    (tmp_path / "wandb_of_old").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="not installed"):
        check_tracker("wandb_of_old")


def test_a_step_arrives_in_groups(wandb, tmp_path):
    """Text and nulls, which trackers refuse, or one panel of fifty lines. Breaks: no isinstance(); `key` for
    grouped(key)."""
    double = wandb()
    run = Run(config("wandb", tmp_path))
    run.log({**row(0), "chat_reward": float("nan"), "graded_per_s": 3.0})
    assert double.logged == [
        (0, {"train/reward": 0.0, "math/length": 7, "clock/train_s": 0.5, "clock/graded_per_s": 3.0})
    ]
    (settings,) = double.inits
    assert settings["name"] == "mine" and settings["config"]["seed"] == 5
    run.close()
    assert double.finished == 1
    assert Run(config("wandb", tmp_path), rank=1) and len(double.inits) == 1  # only rank 0 reports


def test_a_resumed_run_is_one_tracked_run(wandb, tmp_path):
    """Two runs in wandb, or steps twice, or a hole. The run is killed twice, the second time before it is as
    far as the first. Breaks: starts[-1] for starts[0]; no comparison with to_send; first_step for to_send."""
    double = wandb()
    for first_step, last in ((0, 4), (2, 3), (2, 7)):  # killed: not closed
        run = Run(config("wandb", tmp_path), first_step=first_step)
        for step in range(first_step, last):
            run.log(row(step))
        run_file.lock.cache_clear()  # as if that process had ended
    assert [step for step, _ in double.logged] == list(range(7))
    assert len({settings["id"] for settings in double.inits}) == 1
    assert {settings["resume"] for settings in double.inits} == {"allow"}
    other = Run(train_dpo.Config(run_dir=str(tmp_path / "other" / "mine"), report_to="wandb"))
    other.log(row(0))
    assert double.inits[-1]["id"] != double.inits[0]["id"] and double.logged[-1][0] == 0


def test_a_network_that_goes_does_not_end_the_run(wandb, tmp_path, capsys):
    """A week's run that ends with wandb's server. Breaks: no except in _tracking; no to_send = inf there;
    send before metrics.write, and raise."""
    double = wandb(fails_at=2)
    run = Run(config("wandb", tmp_path))
    for step in range(5):
        run.log(row(step))
    run.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("--report-to wandb: ConnectionError('network gone'): no more is sent")
    assert [step for step, _ in double.logged] == [0, 1] and double.finished == 0
    assert [r["step"] for r in read_metrics(tmp_path / "mine")] == [0, 1, 2, 3, 4]
    double.fails_at = None  # what it missed and is computed again, it gets
    run = Run(config("wandb", tmp_path), first_step=2)
    run.log(row(2))
    assert [step for step, _ in double.logged] == [0, 1, 2]


def test_a_tracker_that_does_not_start_is_one_line(wandb, monkeypatch, tmp_path):
    """wandb's traceback where nobody has logged in. Break: no except in start_tracker."""
    double = wandb()
    monkeypatch.setattr(double, "init", lambda **_: 1 / 0, raising=False)
    with pytest.raises(ValueError, match="--report-to wandb: division by zero; mend it, then add --resume"):
        Run(config("wandb", tmp_path))
    Run(train_dpo.Config(run_dir=str(tmp_path / "mine")), first_step=0).log(row(0))  # --resume works


def test_a_signal_ends_the_tracked_run_too(wandb, monkeypatch, tmp_path):
    """A run that wandb shows as running for ever after SIGTERM. Break: no end_tracking() in Run.close."""
    double = wandb()
    monkeypatch.setattr(life.Stop, "requested", lambda stop: True)
    train_dpo.main(f"{SMALL} --report-to wandb --run-dir {tmp_path / 'run'}".split())
    assert [step for step, _ in double.logged] == [0] and double.finished == 1
    assert double.logged[0][1]["train/reward"] == read_metrics(tmp_path / "run")[0]["reward"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["flags"]["report_to"] == "wandb"


def test_tensorboard(tmp_path):
    """The files that `tensorboard --logdir runs` reads, of a run that is killed and resumed. Break: no
    comparison with to_send."""
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    for first_step, last in ((0, 4), (2, 6)):
        run = Run(config("tensorboard", tmp_path), first_step=first_step)
        for step in range(first_step, last):
            run.log(row(step))
        seen = reader.EventAccumulator(str(tmp_path / "mine"))  # before the run is closed
        seen.Reload()
        assert [event.step for event in seen.Scalars("train/reward")] == list(range(last))
        run_file.lock.cache_clear()
    assert sorted(seen.Tags()["scalars"]) == ["clock/train_s", "math/length", "train/reward"]
    assert [event.value for event in seen.Scalars("train/reward")] == pytest.approx(
        [n / 10 for n in range(6)]
    )
    assert '"seed": 5' in seen.Tensors("flags/text_summary")[0].tensor_proto.string_val[0].decode()


PROGRAM = """
import train_dpo
from run import Run
folder, first_step, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
run = Run(train_dpo.Config(run_dir=folder, report_to="trackio", seed=5), first_step=first_step)
for step in range(first_step, last):
    run.log({"step": step, "reward": step / 10, "sync_gap": None})
raise RuntimeError("the run fails")
"""


def test_trackio(tmp_path):
    """What `trackio show` reads, of a run that ends by an error and is resumed. Breaks: resume="never";
    no comparison with to_send."""
    pytest.importorskip("trackio", reason="trackio is not installed")
    program = write_program(tmp_path, PROGRAM)
    env = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    for steps in ("0 4", "2 6"):
        words = [sys.executable, program, tmp_path / "mine", *steps.split()]
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
        assert "the run fails" in done.stderr
    read = "import json, trackio; from trackio.sqlite_storage import SQLiteStorage as S; "
    read += "(run,) = trackio.Api().runs('semi-online'); "
    read += "print(json.dumps([run.name, run.config['seed'], S.get_logs('semi-online', run.name)]))"
    done = subprocess.run([sys.executable, "-c", read], env=env, capture_output=True, text=True, check=True)
    name, seed, logs = json.loads(done.stdout.splitlines()[-1])
    assert name.startswith("mine-") and seed == 5
    assert [(log["step"], log["train/reward"]) for log in logs] == [(n, n / 10) for n in range(6)]
