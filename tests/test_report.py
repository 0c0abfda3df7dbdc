"""Runs into tables and figures: which numbers are averaged, and what must not stand side by side."""

import json
import math

import pytest

from tables import archive, figure1, figures, report


def write_run(directory, evals, steps=3):
    """A run directory with a reward of 0.5 at each step, and evaluations {step: accuracy}."""
    (directory / "eval").mkdir(parents=True)
    rows = [{"step": step, "reward": 0.5, "entropy": None if step else 1.0} for step in range(steps)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_evals(directory, evals)


def write_evals(directory, evals, data="tiny@test"):
    """evals: {step: an accuracy, or the right ones of 2 answers to each problem}."""
    (directory / "eval").mkdir(parents=True, exist_ok=True)
    alike = {"data": data, "problems": 5, "n": 2, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 64}
    for step, found in evals.items():
        if isinstance(found, list):
            solved = sum(count > 0 for count in found) / len(found)
            more = {"pass_at_n": solved, "majority": 0.25, "greedy_accuracy": 0.75}
            found = {"accuracy": sum(found) / 2 / len(found), "right": found, **more}
        else:
            found = {"accuracy": found}
        (directory / "eval" / f"{step}.json").write_text(json.dumps({**found, **alike}))


@pytest.fixture
def table1(tmp_path):
    """Two rows of the paper's Table 1: the seed model, and three training seeds of DPO."""
    write_evals(tmp_path / "seed", {0: 0.25})
    for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
        write_run(tmp_path / "dpo-1" / str(seed), {100: 0.4, 200: accuracy})
    return tmp_path


def make_table(folder, *flags):
    rows = [str(folder / name) for name in ("seed", "dpo-1")]
    out = ["--out", str(folder / "curves.png"), "--table", str(folder / "table.md")]
    report.main(["--runs", *rows, "--panels", "reward", "entropy", *out, *flags])
    return (folder / "table.md").read_text().splitlines()


def test_accuracy_is_the_mean_over_training_seeds_and_its_interval(table1):
    """The error of one evaluation passed off as that over training seeds. Break: leave out the square root.

    0.5, 0.6, 0.7: mean 0.6, deviation 0.1, standard error 0.1 / sqrt(3) = 0.0577, times 4.303 is 0.248.
    """
    head, _, seed, dpo, *note = make_table(table1, "--paper", "table1")
    steps, papers = "step 0 | step 100 | step 200", "paper: Math500 | paper: NuminaMath | paper: AMC23"
    assert head == f"| row | seeds | {steps} | {papers} |" and len(note) == 2
    assert seed == "| seed model | 1 | 25.0 |  |  | 47.4 (1.6) | 33.9 (0.6) | 23.7 (5.2) |"
    assert dpo == "| online | 3 |  | 40.0 ± 0.0 | 60.0 ± 24.8 | 58.7 (1.2) | 39.6 (0.5) | 32.9 (5.2) |"
    written = json.loads((table1 / "table.json").read_text())
    assert written["accuracy"]["dpo-1"]["200"] == [0.5, 0.6, 0.7]
    assert written["half"]["dpo-1"]["200"] == pytest.approx(0.2484, abs=1e-4)
    assert min((table1 / name).stat().st_size for name in ("table.png", "curves.png")) > 10_000


def test_rows_measured_unlike_do_not_stand_in_one_table(table1):
    """A gain between two benchmarks. Break: drop check_alike in write_table."""
    write_evals(table1 / "seed", {0: 0.25}, data="math500.jsonl")
    rows = {name: report.read_row(table1 / name) for name in ("seed", "dpo-1")}
    with pytest.raises(ValueError, match="another data .math500.jsonl and tiny@test.; evaluate all alike"):
        report.write_table(rows, report.Config(runs=[], table=str(table1 / "t.md")))


# Three seeds of two rows: each seed of one answers one problem more than the other's, but the third.
COUNTS = {"dpo-10": ([2, 2, 0, 1, 0], [2, 1, 0, 0, 0], [2, 2, 1, 1, 0]),
          "dpo-1": ([2, 2, 2, 1, 0], [2, 1, 2, 0, 0], [2, 2, 1, 1, 0])}  # fmt: skip


@pytest.fixture
def counted(table1):
    """Two rows that keep counts a problem, in another order of seeds."""
    for row, several in COUNTS.items():
        for seed, right in enumerate(several):
            write_run(table1 / f"{row}-x" / str(seed), {100: right})
    (table1 / "dpo-1-x" / "0").rename(table1 / "dpo-1-x" / "9")
    write_run(table1 / "dpo-1-x" / "0", {100: COUNTS["dpo-1"][0]})  # and a seed that the other row lacks
    return table1


def test_differences_are_paired_by_seed_and_problem(counted):
    """Seeds paired by their place, or an interval of the two rows' scatter, which here is five times as wide.

    Breaks: zip of the two rows' values in place of both; over_seeds of each row's own accuracies; no sign.
    The differences of the seeds are 0.2, 0.2 and 0; of the problems 0, 0, 4 / 3 / 2, 0, 0. By hand: seeds
    0.1333 with a standard error of 0.0667, times 4.303; problems' scatter as below.
    """
    folder = str(counted)
    report.main(
        [
            "--runs",
            f"{folder}/dpo-1-x",
            f"{folder}/dpo-10-x",
            "--panels",
            "reward",
            "--out",
            f"{folder}/c.png",
        ]
        + ["--table", f"{folder}/t.md", "--compare", "dpo-1-x:dpo-10-x", "--margin", "2"]
    )
    written = json.loads((counted / "t.json").read_text())["difference"]["dpo-1-x:dpo-10-x"]["100"]
    d = [[(a - b) / 2 for a, b in zip(*pair, strict=True)] for pair in zip(*COUNTS.values(), strict=True)]
    d = [[-x for x in row] for row in d]
    expected = report.over(d)
    assert written == {"mean": pytest.approx(expected.mean), "half": pytest.approx(expected.half), "seeds": 3}
    assert expected.mean == pytest.approx(0.4 / 3) and 4.303 * 0.2 / 3 <= expected.half < 1
    text = (counted / "t.md").read_text()
    assert "| dpo-1-x less dpo-10-x | 3 | +13.3 [" in text and "| cannot tell |" in text
    assert "| pass@2 | majority | greedy |" in text and "| 25.0 ± 0.0 | 75.0 ± 0.0 |" in text
    # Solved by one sample at least: 4, 3 and 4 of 5 problems against 3, 2 and 4.
    others = json.loads((counted / "t.json").read_text())["others"]["dpo-1-x:dpo-10-x at 100"]
    assert (others["pass@2"]["first"], others["pass@2"]["second"]) == pytest.approx((1100 / 15, 60))
    assert others["pass@2"]["half"] == pytest.approx(4.303 * 20 / 3) and others["greedy"]["mean"] == 0
    assert "| dpo-1-x less dpo-10-x, step 100 | pass@2 | 3 | 73 | 60 | +13 [-15, 42] | cannot tell |" in text


def test_elo_on_problems():
    """Ratings of models that never met, or of the accuracies in place of the problems.

    Breaks: battles of all seeds in one pot (the seed that one row lacks would count); the sum of `right` for
    each problem's; the seed model left out. By hand: 6 problems won, 2 lost and 2 tied are odds of 7 to 3, so
    147 points; the prior takes less than 3 of them.
    """
    counts = {"a": [3] * 6 + [0] * 2 + [1] * 2, "b": [2] * 6 + [4] * 2 + [1] * 2}
    found = {label: {100: {"0": {"right": right}}} for label, right in counts.items()}
    found["b"][100]["1"] = {"right": [5] * 10}  # of a training seed that the other row lacks
    found["b"][50] = {"0": {"right": [0] * 10}}  # and not the last step
    ratings = report.elo_of_problems(found)
    assert ratings["a"][0] - ratings["b"][0] == pytest.approx(400 * math.log10(7 / 3), abs=3)
    assert sum(map(len, ratings.values())) == 2 and sum(counts["a"]) < sum(counts["b"])
    seed = {"seed": {0: {"None": {"right": [0] * 10}}}}
    with_seed = report.elo_of_problems(found | seed)
    assert with_seed["seed"] < with_seed["b"] < with_seed["a"]
    assert report.elo_of_problems({"a": found["a"]}) == {}
    assert report.elo_of_problems(found | {"c": {100: {"0": {"accuracy": 0.5}}}}) == {}


def test_the_ends_of_curves_are_compared_by_training_seed(tmp_path, capsys):
    """A difference of bands that cover each other, read from another part of the curve or from other seeds.

    Breaks: [: config.last] in write_metric_differences; first and second exchanged; no config.until; a zip of
    the rows' runs in place of the seeds in common; the last steps for both in METRIC/first.
    By hand: of seeds 0 to 2 the means over the last 2 of 4 steps differ by 1, 1 and 4: mean 2, deviation
    sqrt(3), so half of the interval is 4.303 sqrt(3) / sqrt(3).
    """
    ends = {"dpo-1": (5, 15, 25), "nll-1": (6, 16, 29, 99)}  # the last has a seed that dpo-1 lacks
    for row, values in ends.items():
        for seed, end in enumerate(values):
            write_run(tmp_path / row / str(seed), {})
            curve = [100, 100, end - 1, end + 1, 1000]
            rows = [{"step": step, "reward": value, "x": None} for step, value in enumerate(curve)]
            (tmp_path / row / str(seed) / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--runs", str(tmp_path / "dpo-1"), str(tmp_path / "nll-1"), "--panels", "reward", "--until", "4"]
    flags += ["--out", str(tmp_path / "c.png"), "--compare", "nll-1:dpo-1", "--last", "2"]
    flags += ["--compare-metrics"]
    report.main([*flags, "reward"])
    (found,) = json.loads((tmp_path / "differences.json").read_text())["nll-1:dpo-1"].values()
    assert (found["first"], found["second"], found["mean"], found["seeds"]) == (17, 15, 2, 3)
    assert found["half"] == pytest.approx(4.303) and found["verdict"] == "cannot tell"
    line = (tmp_path / "differences.md").read_text().splitlines()[2]
    numbers = "17.0 | 15.0 | +2.0 [-2.3, 6.3] | cannot tell | 6"
    assert line == f"| online, with NLL less online | reward | 3 | {numbers} |"
    report.main([*flags, "reward/first"])  # 17 and 15 of the 100 at first
    (found,) = json.loads((tmp_path / "differences.json").read_text())["nll-1:dpo-1"].values()
    assert (found["first"], found["second"], found["half"]) == pytest.approx((0.17, 0.15, 0.04303), abs=1e-6)
    # So many seeds n that t(n - 1) sqrt(3 / n) < 2: 2.571 sqrt(3 / 6) = 1.82, but 2.776 sqrt(3 / 5) = 2.15.
    for bad in "x", "y":
        with pytest.raises(SystemExit):
            report.main([*flags, bad])
    assert f"--compare-metrics {bad}: not a metric of dpo-1/0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mean", "says"), [(5.0, "higher"), (-5.0, "lower"), (0.1, "cannot tell")], ids=lambda value: str(value)
)
def test_without_a_margin_a_difference_is_higher_lower_or_unknown(mean, says):
    """ "same" without a margin, or of equal seeds, or a sign lost. Breaks: the names exchanged;
    verdict(difference, 10); no look at half in direction."""
    values = {
        "a": {seed: {"x": mean + at} for at, seed in enumerate("012")},
        "b": {seed: {"x": 0.0} for seed in "012"},
    }
    (found,) = report.differences_of(values, ["a:b"])["a:b"].values()
    assert found["verdict"] == says and (found["seeds_to_tell"] is None) == (says != "cannot tell")
    (found,) = report.differences_of({**values, "a": values["b"]}, ["a:b"])["a:b"].values()
    assert (found["half"], found["verdict"], found["seeds_to_tell"]) == (0, "cannot tell", None)


@pytest.mark.parametrize(
    ("pairs", "line"),
    [
        (["dpo-1:nowhere"], "--compare dpo-1:nowhere: takes two of the rows seed, dpo-1, as A:B"),
        (["dpo-1"], "--compare dpo-1: takes two of the rows"),
        (["dpo-1:seed"], "--compare dpo-1:seed: no step at which both were evaluated"),
    ],
)
def test_comparisons_that_cannot_be_made(table1, capfd, pairs, line):
    """A traceback, or a difference of nothing. Breaks: each check alone."""
    with pytest.raises(SystemExit) as exit:
        make_table(table1, "--compare", *pairs)
    assert exit.value.code == 2 and line in capfd.readouterr().err


def test_the_table_names_the_commits_that_made_its_rows(table1):
    """Rows of two states of the code side by side without a word. Break: the first commit alone."""
    for seed, commit in enumerate(("abc", "abc", "def")):
        (table1 / "dpo-1" / str(seed) / "config.json").write_text(json.dumps({"commit": commit}))
    assert make_table(table1)[-1] == "Made by commits abc (dpo-1); def (dpo-1)."
    (table1 / "dpo-1" / "2" / "config.json").write_text(json.dumps({"commit": "abc"}))
    assert make_table(table1)[-1] == "Made by commit abc."


@pytest.fixture
def keep():
    """Put all runs in a folder into the archive of another, as run.sh does."""

    def call(folder, table):
        for path in sorted(folder.rglob("eval")):
            run = path.parent
            archive.add(str(table / run.relative_to(folder)), run, f"train --out {run.name}")

    return call


def test_an_archive_gives_the_same_table_as_the_run_directories(table1, keep, tmp_path_factory):
    """A row that loses a seed, or a number, when its runs are kept. Break: `run.name.startswith(name)` in
    archive.select, which takes dpo-10 for a seed of dpo-1."""
    write_run(table1 / "dpo-10" / "0", {100: 0.1, 200: 0.1})
    kept = tmp_path_factory.mktemp("results")
    keep(table1, kept)
    assert [path.name for path in kept.iterdir()] == [archive.FILE]
    flags = "--paper", "table1"
    assert make_table(kept, *flags) == make_table(table1, *flags)
    assert (kept / "table.json").read_bytes() == (table1 / "table.json").read_bytes()
    assert (kept / "curves.png").read_bytes() == (table1 / "curves.png").read_bytes()


def test_rewards_of_one_task_and_of_both_are_drawn_apart(tmp_path):
    """A reward of 0 to 1 and one of 5 to 7 on one axis. Breaks: `reward` under the other task's name; all()
    for any of a run's data."""
    row = {"step": 0, "reward": 0.5}
    both = {**row, "math_reward": 0.2, "chat_reward": 0.8}
    for data, metrics, expected in (
        ("tiny", row, (0.5, None)),
        (["math=tiny:1"], row, (0.5, None)),
        ("chat=tiny", row, (None, 0.5)),
        (["math=tiny", "chat=tiny"], both, (0.2, 0.8)),
    ):
        run = archive.Run("a", "", {"flags": {"data": data}}, [metrics])
        (found,) = report.with_task(run)
        assert (found["math_reward"], found["chat_reward"]) == expected


def test_a_row_under_another_name(table1):
    """Two tables' rows of one folder name that cannot be told apart. Break: no other.get."""
    _, _, _, dpo, *_ = make_table(table1, "--names", "dpo-1=chat-only")
    assert dpo.startswith("| chat only |")


def test_what_comes_after_until_is_left_out(table1):
    """Runs of 100 steps drawn beside runs of 200. Break: leave `until` out of write_table."""
    head, _, _, dpo, *_ = make_table(table1, "--until", "100")
    assert head == "| row | seeds | step 0 | step 100 |" and dpo == "| online | 3 |  | 40.0 ± 0.0 |"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--runs", "{}/nowhere"], "nowhere: not a run directory, and"),
        (["--runs", "{}/dpo-1", "--panels", "rewards"], "--panels rewards: not a metric of dpo-1"),
        (["--runs", "{}/dpo-1", "--panels", "reward", "--paper", "table1"], "--paper table1: needs --table"),
        (["--runs", "{}/dpo-2", "--panels", "reward", "--table", "t.md"], "dpo-2 has no eval/STEP.json yet"),
        (["--runs", "{}/dpo-3", "--panels", "reward"], "dpo-3: a run without a single step"),
        (["--runs", "{}/kept/dpo-1", "--panels", "reward"], "kept/dpo-1 is no folder to put it in"),
        (["--runs", "{}/kept/dpo-9"], "kept/dpo-9: not a run directory, and"),
    ],
)
def test_bad_input_is_answered_in_one_line(table1, capfd, flags, line):
    """A traceback for a misspelt name. Break: leave out one_line_errors."""
    write_run(table1 / "dpo-2" / "0", {})
    write_run(table1 / "dpo-3", {}, steps=0)
    archive.add(str(table1 / "kept" / "dpo-1"), table1 / "dpo-1" / "0", "train")
    with pytest.raises(SystemExit) as exit:
        report.main([flag.format(table1) for flag in flags])
    assert exit.value.code == 2 and line in capfd.readouterr().err


def test_smoothing_averages_the_steps_that_have_a_value():
    """None read as 0, the last steps lost, or seeds that do not meet. Break: range(width, ...)."""
    metrics = [{"step": step, "x": x} for step, x in enumerate([1.0, None, 3.0, 5.0, None])]
    assert figures.smoothed(metrics, "x", 2) == [(0.5, 1.0), (2.5, 4.0)]
    assert figures.smoothed(metrics, "x", 1) == [(0, 1.0), (2, 3.0), (3, 5.0)]


def test_report_of_a_run(tmp_path, capsys):
    """A figure or a sum that reads another key. Break: swap seed and trained in summarize_run."""
    run = tmp_path / "run"
    (run / "eval").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"command": "train", "flags": {"sync_every": 10.0}}))
    row = {
        "reward": 0.5,
        "entropy": 1.0,
        "length": 9.0,
        "staleness": 0,
        "generate_s": 1.0,
        "score_s": 2.0,
        "train_s": 3.0,
        "sync_s": 4.0,
    }
    rows = [{"step": step, **row, "logp_gap": 1e-6 if step == 0 else None} for step in range(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    evaluation = {"standard_error": 0.01, "problems": 5, "n": 2, "seconds": 1.5, "data": "tiny@test"}
    evaluation |= {"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 64}
    (run / "eval" / "seed.json").write_text(json.dumps({"accuracy": 0.25, **evaluation}))
    (run / "eval" / "3.json").write_text(json.dumps({"accuracy": 0.75, **evaluation}))
    report.main(["--runs", str(run)])
    written = json.loads((run / "report.json").read_text())
    assert (written["seed_accuracy"], written["trained_accuracy"], written["steps"]) == (0.25, 0.75, 3)
    assert written["seconds"] == {"generate": 3.0, "score": 6.0, "train": 9.0, "sync": 12.0, "evaluate": 3.0}
    assert (run / "curves.png").stat().st_size > 10_000
    assert "75.0" in capsys.readouterr().out


def test_report_refuses_to_compare_what_was_measured_differently(tmp_path):
    """A gain between two benchmarks. Break: drop the check in first_and_last."""
    (tmp_path / "eval").mkdir()
    alike = {"problems": 5, "n": 2, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 64}
    (tmp_path / "eval" / "seed.json").write_text(json.dumps({"data": "tiny@test", **alike}))
    (tmp_path / "eval" / "3.json").write_text(json.dumps({"data": "math500.jsonl", **alike}))
    with pytest.raises(ValueError, match="another data"):
        report.first_and_last(archive.read_directory(tmp_path, "run"))


def write_answers(run, step, rewards, **more):
    """An answers file with these learned rewards, and its summary; `more`: further columns."""
    rows = [{"id": f"q{i}", "reward": reward, "length": 10 * (i + 1)} for i, reward in enumerate(rewards)]
    for key, values in more.items():
        for row, value in zip(rows, values, strict=True):
            row[key] = value
    (run / "eval").mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "eval" / f"{step}.answers.jsonl").write_text(lines)
    alike = {"data": "chat=x", "problems": 3, "n": 1, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 9}
    (run / "eval" / f"{step}.chat.json").write_text(json.dumps({"reward": 1.0, **alike}))


@pytest.fixture
def chat(tmp_path):
    """The seed model and two training seeds of a row, which wins by the learned reward alone."""
    write_answers(tmp_path / "seed", 0, [1.0, 1.0, 2.0], true_reward=[1.0, 1.0, 1.0])
    for seed, truths in enumerate(([1.0, 0.0, 0.0], [0.0, 0.0, 1.0])):
        write_run(tmp_path / "dpo-1" / str(seed), {100: 0.4})
        write_answers(tmp_path / "dpo-1" / str(seed), 100, [3.0, 4.0, 5.0 + 3 * seed], true_reward=truths)
    return tmp_path


def test_an_archive_gives_the_same_chat_table(chat, keep, tmp_path_factory):
    """Answers without what the table is made of. Break: drop "length" from archive.ANSWER."""
    kept = tmp_path_factory.mktemp("results")
    keep(chat, kept)
    for folder in (chat, kept):
        rows = {name: report.read_row(folder / name) for name in ("seed", "dpo-1")}
        report.write_chat_table(rows, 100, "table2", folder / "chat.md")
    for name in ("chat.md", "chat.json"):
        assert (kept / name).read_bytes() == (chat / name).read_bytes()


def test_chat_table_by_hand(chat, capsys):
    """A hacked reward that also decides who wins; an interval that leaves out which requests were asked.

    Breaks: "reward" for judged_by; the mean over both seeds' answers; the seed model left out of the second
    seed's battles; over_seeds of means in chat_columns. Rewards by hand: of the seeds 4 and 5, variance 1/2;
    of the requests 3, 4 and 6.5, variance 3.25, of which 1.5 / 2 is the residuals'.
    """
    half = (12.706**2 * 0.5 / 2 + 1.96**2 * (3.25 - 1.5 / 2) / 3) ** 0.5
    rows = [str(chat / name) for name in ("seed", "dpo-1")]
    out = ["--out", str(chat / "curves.png"), "--chat-table", str(chat / "chat.md"), "--chat-step", "100"]
    report.main(["--runs", *rows, "--panels", "reward", "--paper", "table2", *out])
    table = json.loads((chat / "chat.json").read_text())
    assert table["dpo-1"]["reward"] == [4.0, 5.0] and table["dpo-1"]["true_reward"] == [1 / 3, 1 / 3]
    assert table["dpo-1"]["accuracy"] == [40.0] * 2 and table["seed"]["accuracy"] == []
    # Each training seed: one tie, two lost; odds of 1 to 5, but for the weak prior.
    odds = 400 * math.log10(5)
    assert len(table["seed"]["elo"]) == len(table["dpo-1"]["elo"]) == 2
    for seed_model, trained in zip(table["seed"]["elo"], table["dpo-1"]["elo"], strict=True):
        assert seed_model - trained == pytest.approx(odds, rel=0.03)
        assert seed_model + trained == pytest.approx(2000)
    assert report.over([[3.0, 4.0, 5.0], [3.0, 4.0, 8.0]]).half == pytest.approx(half, abs=1e-3)
    assert "difference" not in table
    report.main(["--runs", *rows, "--panels", "reward", *out, "--compare", "dpo-1:seed"])
    found = json.loads((chat / "chat.json").read_text())["difference"]["dpo-1:seed"]
    assert found["reward"]["mean"] == pytest.approx(4.5 - 4 / 3) and found["reward"]["seeds"] == 2
    assert found["true_reward"]["mean"] == -2 / 3 and found["true_reward"]["verdict"] == "cannot tell"
    assert found["elo"]["mean"] == pytest.approx(-odds, rel=0.03)
    text = (chat / "chat.md").read_text()
    assert "| online less seed model | true_reward | 2 | 0.33 | 1.00 |" in text
    report.main(["--runs", *rows, "--panels", "reward", "--paper", "table2", *out])
    text = (chat / "chat.md").read_text()
    assert "| online | 2 | 40.00 ± 0.00 | 4.5 ± 6.6 | 0.33 ± 0.00 |" in text and "| 83.1 | 60.1 |" in text


def test_rows_of_chat_with_fewer_seeds(chat):
    """A row of one training seed beside one of two: Elo and differences of the seed that both have, which is
    the second. Break: `every` for `common` in by_seed, or `seeds` for `of` in differences_of."""
    write_run(chat / "dpo-5" / "1", {100: 0.4})
    write_answers(chat / "dpo-5" / "1", 100, [1.0] * 3, true_reward=[0.0, 1.0, 1.0])
    rows = {name: report.read_row(chat / name) for name in ("seed", "dpo-1", "dpo-5")}
    report.write_chat_table(rows, 100, None, chat / "chat.md", ["dpo-5:dpo-1", "dpo-1:seed"])
    table = json.loads((chat / "chat.json").read_text())
    assert [len(table[name]["elo"]) for name in rows] == [1, 1, 1] and len(table["dpo-1"]["reward"]) == 2
    found = table["difference"]["dpo-5:dpo-1"]
    assert (found["reward"]["mean"], found["reward"]["seeds"], found["elo"]["seeds"]) == (-4.0, 1, 1)
    found = table["difference"]["dpo-1:seed"]
    assert (found["reward"]["seeds"], found["elo"]["seeds"]) == (2, 1)
    assert found["elo"]["mean"] == table["dpo-1"]["elo"][0] - table["seed"]["elo"][0]
    text = (chat / "chat.md").read_text()
    assert "| online | 2 | 40.00 ± 0.00 |" in text and "| s = 5 | 1 | 40.00 |" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda chat: write_answers(chat / "dpo-1" / "1", 100, [1.0] * 3), "a part of the answers"),
        (lambda chat: write_answers(chat / "seed", 0, [1.0], true_reward=[1.0]), "answer different requests"),
        (lambda chat: (chat / "dpo-1" / "0" / "eval" / "100.answers.jsonl").unlink(), "evaluate with CHAT"),
        (lambda chat: write_run(chat / "dpo-5" / "0", {100: 0.4}), "dpo-5/0 has no eval/100.chat.json"),
        (lambda chat: write_evals(chat / "seed", {0: 0.1}, data="tiny@train"), "another data"),
    ],
)
def test_chat_is_compared_alike(chat, change, message):
    """Rows side by side that were judged by different rewards, on other requests, or measured differently.
    Break: each check alone."""
    change(chat)
    rows = {path.name: report.read_row(path) for path in sorted(chat.iterdir()) if path.is_dir()}
    with pytest.raises(ValueError, match=message):
        report.write_chat_table(rows, 100, None, chat / "chat.md")


def test_the_diagram_is_drawn(tmp_path):
    """Figure 1, which no run is needed for. Break: a row of DIAL that figures.ROWS lacks."""
    figure1.main(["--out", str(tmp_path / "diagram.png")])
    assert (tmp_path / "diagram.png").stat().st_size > 10_000
