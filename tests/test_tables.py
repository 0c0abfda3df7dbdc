"""The scripts in tables/ without training anything: what they run, what they draw, and what run.sh keeps."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from flags import parse_flags

import pytest

import evaluate
import train_dpo
import train_grpo
from metrics import glossary
from tables import archive, costs, dose, paper, report, temperature

ROOT = Path(train_dpo.__file__).parent
PROGRAMS = {
    "train_dpo.py": train_dpo, "train_grpo.py": train_grpo, "evaluate.py": evaluate,
    "tables/report.py": report, "tables/costs.py": costs, "tables/dose.py": dose,
    "tables/temperature.py": temperature,
}  # fmt: skip
TABLES = sorted({path.name for path in (ROOT / "tables").glob("*.sh")} - {"run.sh", "scales.sh"})
DRAWN_ONLY = {"dial.sh", "figure3.sh"}  # from the runs of other scripts
SCALES = ("laptop", "gpu", "paper")


def write_program(path, *lines):
    """A bash script that can be called by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
    path.chmod(0o755)


def bash(folder, *args, lines="", **settings):
    """Run a script with lines on its standard input, and of run.sh's settings these alone."""
    ours = {"DRAW", "JOBS", "OMP_NUM_THREADS", "RANKS", "DATA", "N", "CHAT", "REWARD_MODEL", "SEEDS"}
    ours |= {"WHEN", "EVALUATE"}
    environment = {name: value for name, value in os.environ.items() if name not in ours} | settings
    return subprocess.run(
        ["bash", *args], cwd=folder, env=environment, input=lines, capture_output=True, text=True, timeout=60
    )


# --- What the scripts ask for ---


@pytest.fixture(scope="module")
def printing(tmp_path_factory):
    """A folder with the scripts, where all that they call only prints what it was asked for."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "tables", folder / "tables")
    write_program(folder / "tables" / "run.sh", 'sed "s/^/${N:-10} /"')
    write_program(folder / ".venv" / "bin" / "python", 'echo "$@"')
    return folder


@pytest.fixture(scope="module")
def plans(printing):
    """{scale: {table: (runs, commands)}}.

    runs: [(samples a problem, name, program, flags), ...], as run.sh gets them; commands: [(program, flags),
    ...], what the script calls itself.
    """
    found = {}
    for scale in SCALES:
        found[scale] = {}
        for table in TABLES:
            done = bash(printing, f"tables/{table}", scale)
            assert (done.returncode, done.stderr) == (0, "")
            lines = [line.split() for line in done.stdout.splitlines()]
            runs = [(int(n), name, program, flags) for n, name, program, *flags in lines if n.isdigit()]
            commands = [(program, flags) for program, *flags in lines if not program.isdigit()]
            found[scale][table] = runs, commands
    return found


def parse(program, flags):
    """The command's Config; a wrong flag ends the test."""
    return parse_flags(PROGRAMS[program].Config, flags)


def row_of(name):
    """The row of runs that differ in their seed, as report.py takes it: table1/grpo/2 -> table1/grpo."""
    return re.sub(r"/\d+$", "", name)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("table", TABLES)
def test_runs_have_flags_names_and_seeds_of_their_own(plans, table, scale):
    """What shows after hours: a flag of another script, two runs of one name, a row with fewer seeds.

    Breaks: --sync-evry; no $how in a name of stale_grpo.sh; SEEDS="0 1" at one scale; --seed 0 in one.
    """
    runs, _ = plans[scale][table]
    seeds = {}  # row: the seeds of its runs
    for _, name, program, flags in runs:
        config, row = parse(program, flags), row_of(name)
        if program == "evaluate.py":  # a model that is not trained has no training seed
            assert flags == ["--model", *config.model]  # all that run.sh reads of such a line
            exports = {str(Path(model).parents[1]) for model in config.model if "/export/" in model}
            if exports:  # the seed of the run that exported them
                (run,) = exports
                assert row != name and name.removeprefix(f"{row}/") == Path(run).name
                seeds.setdefault(row, []).append(int(Path(run).name))
            else:
                assert row == name
            continue
        assert name in (row, f"{row}/{config.seed}")
        seeds.setdefault(row, []).append(config.seed)
    # A choice is made on a training seed that no table uses; two scripts show that one run works.
    one = {"sweep.sh": [100], "sweep_chat.sh": [100], "smollm2.sh": [0], "wildchat.sh": [0]}
    one["corrections.sh"] = [0, 1, 2]  # cheaper: it trains on all responses
    expected = one.get(table, [0, 1, 2, 3, 4])
    assert {row: found for row, found in seeds.items() if found != expected} == {}
    assert len({name for _, name, _, _ in runs}) == len(runs) and (runs == []) == (table in DRAWN_ONLY)


def rows_made(plans):
    """The rows of runs that the scripts of a scale leave: {row: (program, steps, whether evaluated)}."""
    runs = [run for runs, _ in plans.values() for run in runs]
    return {
        f"results/{row_of(name)}": (program, getattr(parse(program, flags), "steps", None), n > 0)
        for n, name, program, flags in runs
    }


def metrics_of(program):
    """The keys that a train script logs, by the glossary."""
    other = {"train_dpo.py": "GRPO: ", "train_grpo.py": "DPO: "}[program]
    return {
        key for key, meaning in glossary().items() if key != "true_reward" and not meaning.startswith(other)
    }


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("table", TABLES)
def test_what_is_drawn_was_made(plans, table, scale):
    """What shows after hours, too: a row or metric that no run has, a table of runs that were not evaluated,
    the paper's numbers beside no row, or a row that was trained for longer than the others.

    Breaks: figure1 for table1 in a --runs; a name without ${AT}; ratio_max in figure3.sh; N=0 in table5.sh;
    grpo-16 in table5.sh; no $UNTIL in figure6.sh; no line for the seed model in table1.sh.
    """
    _, commands = plans[scale][table]
    made = rows_made(plans[scale])
    if table == "temperature.sh":
        (command,) = commands
        assert set(parse(*command).runs) == made.keys() & {
            f"results/{row_of(n)}" for _, n, *_ in plans[scale][table][0]
        }
        return
    if table == "dose.sh":  # which has a script of its own, and the laptop's models alone
        made |= rows_made(plans["laptop"])
        assert {row for rows in dose.DOSES.values() for row in rows} <= made.keys()
        return
    for other in (parse(*command) for command in commands if command[0] == "tables/costs.py"):
        assert set(other.runs) <= made.keys()
    reports = [parse(*command) for command in commands if command[0] == "tables/report.py"]
    assert reports
    for config in reports:
        # Table 1's GRPO has half the steps of the others, and says so.
        one_length = scale == "paper" or table != "table1.sh"
        check_report(config, made, plans[scale][table], one_length)


def check_report(config, made, plan, one_length):
    """What one call of report.py draws, beside the rows that were made."""
    config.runs = [row.replace("results/earlier", "results/table1") for row in config.runs]
    assert set(config.runs) <= made.keys()
    trained = [made[row] for row in config.runs if made[row][0] != "evaluate.py"]
    programs, steps, evaluated = (set(column) for column in zip(*trained, strict=True))
    embedded = "chat=tiny" in json.dumps(plan)  # whose true reward tiny/chat.py adds
    known = {"true_reward"} if embedded else set()
    known |= {"math_reward", "chat_reward"}  # of a run of one task, too: report.with_task
    assert set(config.panels) <= known | set.intersection(*(metrics_of(program) for program in programs))
    known |= set.intersection(*(metrics_of(program) for program in programs))
    assert {name.removesuffix("/first") for name in config.compare_metrics} <= known
    assert evaluated == {True} or not config.table
    assert len(steps) == 1 or config.until == min(steps) or not one_length
    if config.paper:
        other = dict(name.split("=") for name in config.names)
        rows = {other.get(Path(row).name, Path(row).name) for row in config.runs}
        assert rows >= paper.ROWS[config.paper].keys()


def test_another_scale_is_refused(printing):
    """A misspelt scale taken for the laptop's. Break: `laptop | *)` in scales.sh."""
    done = bash(printing, "tables/table1.sh", "gpus")
    assert (done.returncode, done.stdout) == (2, "") and "laptop, gpu or paper, not gpus" in done.stderr


# --- make figures ---


def figures(folder):
    """The figures and tables that the scripts in tables/ draw, in the results of a folder."""
    drawn = ("curves.png", "table.md", "table.json", "table.png", "differences.md", "differences.json")
    paths = [folder / "results" / table.removesuffix(".sh") / name for table in TABLES for name in drawn]
    return [str(path.relative_to(folder)) for path in paths if path.exists()]


@pytest.mark.slow
def test_the_archives_are_enough_to_redraw_every_figure_and_table(tmp_path):
    """Results that nobody can redraw, because a number of theirs is not kept. Break: drop "true_reward" from
    ANSWER in archive.py and add the runs of table 2 again; or drop a row from a --runs."""
    copied = [ROOT / "Makefile", *ROOT.glob("requirements-*.txt"), *ROOT.glob("*.py")]
    for path in copied:
        shutil.copy2(path, tmp_path)  # with its time: a lock that is newer than .venv is installed again
    for name in ("judge", "grader", "tables", "results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    drawn = figures(ROOT)
    for name in drawn:
        (tmp_path / name).unlink()
    done = subprocess.run(["make", "figures"], cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert len(drawn) > 30 and figures(tmp_path) == drawn
    for name in drawn:
        if name.endswith(".png"):  # which other versions of matplotlib draw a little differently
            assert (tmp_path / name).stat().st_size > 10_000
        else:
            assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes(), name
    assert not (tmp_path / "runs").exists()  # nothing was trained


# --- run.sh ---

LINE = "mine/first train_dpo.py --sync-every 10"


@pytest.fixture
def repository(tmp_path):
    """A folder with tables/run.sh and programs that leave what a run and an evaluation leave, at once.

    An "evaluation" holds the command that made it, and so do the one answer and the true reward added to it.
    """
    (tmp_path / "tables").mkdir()
    for name in ("tables/run.sh", "tables/archive.py", "run.py", "flags.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    # The last argument of the one is --run-dir's, that of the other (evaluate.py) is --out's.
    leave = [
        'mkdir -p "${!#}"/export/{5,10}',
        'echo "{}" >"${!#}"/config.json',
        'touch "${!#}"/metrics.jsonl',
    ]
    write_program(tmp_path / ".venv" / "bin" / "torchrun", *leave)
    write_program(
        tmp_path / ".venv" / "bin" / "python",
        f'[ "$1" != tables/archive.py ] || exec {sys.executable} "$@"',
        """out="${!#}" all="$*" """,
        """[[ "$all" != *--truth* ]] || {""",
        """  echo '{"id": "q", "reward": 1, "true_reward": 0.5}' >"$out"; exit; }""",
        # evaluate.py --model MODEL ... --data: a file for each model, whose name stands for {}
        """models="${all#*--model }" """,
        """for model in ${models%% --*}; do""",
        """  file="${out//\\{\\}/${model##*/}}" """,
        """  printf '{"made_by": "%s"}\\n' "$all" >"$file" """,
        """  [[ "$all" != *--answers* ]] ||""",
        """    echo '{"id": "q", "reward": 1}' >"${file%.chat.json}.answers.jsonl" """,
        "done",
    )
    return tmp_path


def results(repository):
    """What the archive of "mine" holds."""
    return archive.read(repository / "results" / "mine")


def test_a_run_is_made_evaluated_and_kept_once(repository):
    """Results that cannot be told from those of a run cut short, or hours spent on what is there.

    Breaks: drop the last line of run.sh; drop the exit of a run that has its results.
    """
    done = bash(repository, "tables/run.sh", lines=LINE)
    assert done.returncode == 0 and done.stdout.endswith(" mine/first: train_dpo.py --sync-every 10\n")
    (run,) = results(repository)
    assert (run.name, run.command) == ("first", "train_dpo.py --sync-every 10")
    assert (run.config, run.metrics, run.evaluations.keys()) == ({}, [], {"5", "10"})
    made_by = run.evaluations["5"]["made_by"]
    # one engine for both
    models = " ".join(f"runs/mine/first/export/{step}" for step in ("10", "5"))
    assert f"--model {models} --data tiny@test --n 10 " in made_by

    shutil.rmtree(repository / "runs")
    again = bash(repository, "tables/run.sh", lines=LINE)
    assert (again.returncode, again.stdout) == (0, "") and not (repository / "runs").exists()


def test_the_runs_of_a_table_are_all_kept(repository):
    """A run whose results replace those of the others. Break: `write(table, [run])` in archive.add."""
    lines = "\n".join(f"mine/first/{seed} train_dpo.py --seed {seed}" for seed in range(6))
    assert bash(repository, "tables/run.sh", lines=lines, JOBS="6", N="0").returncode == 0
    assert [run.seed for run in results(repository)] == list("012345")


def test_drawing_makes_no_runs(repository):
    """`make figures` that trains for a day, or fails for runs that are not there yet but only drawn later.
    Break: drop the line of DRAW in run.sh."""
    many = "\n".join([LINE] * 10_000)  # more than a pipe holds: a writer without a reader would fail
    done = bash(repository, "-c", "set -o pipefail; cat | bash tables/run.sh", lines=many, DRAW="1")
    assert (done.returncode, done.stdout) == (0, "") and not (repository / "runs").exists()


def test_no_samples_no_evaluation(repository):
    """A figure's runs that take twice their time. Break: drop the break of N=0."""
    assert bash(repository, "tables/run.sh", lines=LINE, N="0").returncode == 0
    (run,) = results(repository)
    assert run.evaluations == {}


def test_only_some_steps_are_evaluated(repository):
    """Hours of evaluations that no table shows, or a step that is taken for another's end. Breaks: no WHEN;
    *"$(basename "$checkpoint")"* without the spaces."""
    bash(repository, "tables/run.sh", lines=LINE, WHEN="10 15")
    (run,) = results(repository)
    assert run.evaluations.keys() == {"10"}


def test_chat_is_evaluated_where_it_is_asked_for(repository):
    """Answers without their true reward, or a run that fails after its hours for want of a reward model.
    Breaks: drop `return 0`; drop the line of --truth; drop the check."""
    done = bash(repository, "tables/run.sh", lines=LINE, CHAT="tiny@test")
    assert done.returncode != 0 and "CHAT needs a REWARD_MODEL" in done.stderr and done.stdout == ""
    bash(repository, "tables/run.sh", lines=LINE, CHAT="tiny@test", REWARD_MODEL="rm", N="3")
    (run,) = results(repository)
    for step in ("5", "10"):
        assert "--data tiny@test --n 3 " in run.evaluations[step]["made_by"]
        asked = run.chat[step]["made_by"]
        assert "--data chat=tiny@test --reward-model rm --n 1 --answers runs/mine/first/eval/{}." in asked
        assert run.answers[step] == [{"id": "q", "reward": 1.0, "true_reward": 0.5}]


def test_a_model_that_was_not_trained_is_evaluated_as_step_0(repository):
    """A table's seed row that is missing, or is trained. Break: `evaluate.py --models` in run.sh."""
    assert bash(repository, "tables/run.sh", lines="mine/seed evaluate.py --model tiny/llama").returncode == 0
    (run,) = results(repository)
    assert (run.name, run.metrics, run.config) == ("seed", None, None)
    assert run.evaluations["0"]["made_by"].startswith(
        "evaluate.py --model tiny/llama --data tiny@test --n 10 "
    )


def test_exports_are_evaluated_as_their_steps(repository):
    """Checkpoints of one run that overwrite each other. Break: drop the line of /export/ in run.sh."""
    line = "mine/hot/3 evaluate.py --model runs/mine/first/3/export/5 runs/mine/first/3/export/10"
    assert (
        bash(repository, "tables/run.sh", lines=line, N="0", CHAT="x@test", REWARD_MODEL="rm").returncode == 0
    )
    (run,) = results(repository)
    assert (run.name, run.metrics, run.evaluations, run.chat.keys()) == ("hot/3", None, {}, {"5", "10"})


def test_results_of_another_command_are_not_taken_for_a_runs_own(repository):
    """A table whose rows were made with flags that its script no longer has. Break: drop the comparison."""
    bash(repository, "tables/run.sh", lines=LINE)
    done = bash(repository, "tables/run.sh", lines=f"{LINE} --lr 1e-5")
    assert done.returncode != 0 and len(done.stdout.splitlines()) == 1
    assert "mine/first: results/mine/first was made by another command; remove it: python " in done.stdout
    remedy = done.stdout.strip().partition("remove it: ")[2].split()
    assert subprocess.run([sys.executable, *remedy[1:]], cwd=repository).returncode == 0
    assert bash(repository, "tables/run.sh", lines=f"{LINE} --lr 1e-5").returncode == 0
    assert [run.command for run in results(repository)] == ["train_dpo.py --sync-every 10 --lr 1e-5"]


@pytest.mark.parametrize("program", ["torchrun", "python"])
def test_a_run_that_fails_says_where_to_look_and_is_made_anew(repository, program):
    """Half a run among the results, or a traceback that nobody sees. Break: drop `trap ... ERR`."""
    shutil.copytree(repository / ".venv", repository / "sound")
    archived = f'[ "$1" != tables/archive.py ] || exec {sys.executable} "$@"'
    write_program(repository / ".venv" / "bin" / program, archived, "echo out of memory >&2", "exit 1")
    done = bash(repository, "tables/run.sh", lines=LINE)
    assert done.returncode != 0
    assert done.stdout.splitlines()[1:] == ["mine/first: failed, see runs/mine/first.log"]
    assert "out of memory" in (repository / "runs" / "mine" / "first.log").read_text()
    assert results(repository) == []

    shutil.copytree(repository / "sound", repository / ".venv", dirs_exist_ok=True)
    assert bash(repository, "tables/run.sh", lines=LINE).returncode == 0
    assert [run.name for run in results(repository)] == ["first"]


def test_a_run_that_is_being_made_is_left_alone(repository):
    """Two processes that write one run. Break: drop flock."""
    lock = repository / "runs" / "mine" / "first.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = bash(repository, "tables/run.sh", lines=LINE)
    assert done.returncode != 0 and done.stdout == "mine/first: is being made by another process\n"
