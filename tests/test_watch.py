"""A run in the terminal: read while it is written, and shown without hiding the saw-tooth."""

import json
import os

import pytest

from tables import watch

NOW = 1_000_000.0


def write_run(directory, done, steps=100, sync_every=10, **more):
    """A run directory after `done` of its steps; a window's first step takes 11 s, the others 1 s."""
    directory.mkdir(parents=True, exist_ok=True)
    flags = {"steps": steps, "sync_every": sync_every, "ahead": 10, "eval_every": "inf", **more}
    (directory / "config.json").write_text(json.dumps({"command": "train_dpo.py", "flags": flags}))
    rows = [
        {
            "step": step,
            "reward": step / 100,
            "staleness": step % sync_every,
            "loss": None,
            "trainer_idle_s": 10.0 if step % sync_every == 0 else 0.0,
            "train_s": 0.75,
            "step_s": 11.0 if step % sync_every == 0 else 1.0,
            "tokens_per_s": 321.0,
        }
        for step in range(done)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.utime(directory / "metrics.jsonl", (NOW - 65, NOW - 65))


def test_a_line_half_written_is_not_there_yet(tmp_path):
    """Watching that ends with an error because it read in the middle of a write. Break: drop the [:-1] in
    whole_lines. A broken line before the last is still an error."""
    write_run(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "rew')
    assert [row["step"] for row in watch.metrics_so_far(tmp_path)] == [0, 1, 2]
    path.write_text('{"step"\n{"step": 1}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 1: not JSON"):
        watch.metrics_so_far(tmp_path)


def test_the_saw_tooth_is_never_averaged(tmp_path):
    """A flat line where the dial works. Break: squeezed(values, room) for staleness, too."""
    write_run(tmp_path, 100, steps=200)
    lines, _ = watch.view(tmp_path, 75, NOW)
    (staleness,) = (line for line in lines if line.startswith("staleness"))
    assert staleness.split() == ["staleness", "9", "0", "9", "▁▂▃▃▄▅▆▆▇█" * 3]  # the last 30 steps
    (reward,) = (line for line in lines if line.startswith("reward"))
    assert (
        reward.split()[:4] == ["reward", "0.99", "0", "0.99"] and len(reward.split()[4]) == 25
    )  # 4 steps each
    assert not any(line.startswith("loss") for line in lines)  # never measured


def test_what_a_view_says(tmp_path):
    """Minutes left of the cheap steps alone, seconds that do not add up, or an old evaluation. Break:
    rows[-1:] in step_seconds; leave out "the rest" in parts_of; sort steps as text in measured."""
    write_run(tmp_path, 38)
    for name, accuracy in (("validation/9", 0.25), ("validation/10", 0.5)):
        (tmp_path / name).mkdir(parents=True)
        found = {"accuracy": accuracy, "standard_error": 0.01}
        (tmp_path / name / "math-0.json").write_text(json.dumps(found))
    lines, ended = watch.view(tmp_path, 80, NOW)
    assert not ended and max(map(len, lines)) <= 80
    assert "step 38 of 100, about 2 min 4 s left" in lines  # 62 steps of 2 s
    assert "sync every 10, 2.00 s a step, the last 1 min 5 s ago" in lines
    table = {line[:20].strip(): line[20:].split()[:2] for line in lines}
    # 38 steps and 4 windows: 78 s, of them 40 waiting and 28.5 training
    assert table["wait for responses"] == ["1.05", "51%"] and table["train"] == ["0.75", "37%"]
    assert table["the rest"] == ["0.25", "12%"] and table["tokens a second"] == ["321"]
    assert lines[-1].split(maxsplit=2)[2] == "step 10: accuracy 50.0 ± 1.0 % (validation/10/math-0.json)"


def test_a_run_ends_with_its_last_evaluation(tmp_path):
    """Watching that stops before the run's last number, or never. Break: ended = done >= steps."""
    write_run(tmp_path, 20, steps=20)
    assert watch.view(tmp_path, 80, NOW)[1]
    write_run(tmp_path, 20, steps=20, eval_every=10)
    assert not watch.view(tmp_path, 80, NOW)[1]
    (tmp_path / "validation" / "20").mkdir(parents=True)
    assert watch.view(tmp_path, 80, NOW)[1]


def test_watching_goes_on_until_the_last_step(tmp_path, monkeypatch, capsys):
    """Control codes in a file, or a terminal that fills with views. Break: live = not config.once; print
    CLEAR_BELOW without UP."""
    sleeps = []

    def sleep(seconds):
        sleeps.append(seconds)
        write_run(tmp_path, 20 * len(sleeps), steps=40)

    monkeypatch.setattr(watch.time, "sleep", sleep)
    write_run(tmp_path, 0, steps=40)
    watch.main([str(tmp_path)])  # no terminal
    assert capsys.readouterr().out.splitlines()[1:] == ["no step yet"] and not sleeps
    monkeypatch.setattr(watch.sys.stdout, "isatty", lambda: True, raising=False)
    watch.main([str(tmp_path), "--every", "3"])
    out = capsys.readouterr().out
    assert sleeps == [3, 3] and "\x1b[2F\x1b[J" in out and out.count("\x1b[J") == 3
    assert "step 40 of 40, finished" in out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["{}/nowhere"], "nowhere: not a run directory (it has no metrics.jsonl)"),
        (["--run", "{}/foreign"], "foreign/metrics.jsonl: a line without a step, so it is not a run's"),
        ([], "--run"),
    ],
)
def test_bad_input_is_answered_in_one_line(tmp_path, capfd, words, line):
    """A traceback for a misspelt name. Break: leave out one_line_errors."""
    write_run(tmp_path / "foreign", 0)
    (tmp_path / "foreign" / "metrics.jsonl").write_text('{"epoch": 1}\n')
    with pytest.raises(SystemExit) as exit:
        watch.main([word.format(tmp_path) for word in words])
    error = capfd.readouterr().err
    assert exit.value.code == 2 and line in error and error.count("\n") == 1
