"""The scripts in tables/ without training anything: what they would run and draw, and what run.sh keeps."""

import fcntl
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import evaluate
import report
import train_dpo
import train_grpo
from run import parse_flags

ROOT = Path(train_dpo.__file__).parent
PROGRAMS = {f"{script.__name__}.py": script for script in (train_dpo, train_grpo, evaluate, report)}
TABLES = sorted({path.name for path in (ROOT / "tables").glob("*.sh")} - {"run.sh", "scales.sh"})
DRAWN_ONLY = {"figure3.sh", "figure7.sh", "figure9.sh"}  # from the runs of other scripts
SCALES = ("laptop", "gpu", "paper")


def write_program(path, *lines):
    """A bash script that can be called by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
    path.chmod(0o755)


def bash(folder, *args, lines="", **settings):
    """Run a script with lines on its standard input, and of run.sh's settings these alone."""
    ours = {"JOBS", "OMP_NUM_THREADS", "RANKS", "DATA", "N", "CHAT", "REWARD_MODEL"}
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
    evaluate = '[ "${1:-}" != --evaluate ] || { echo "evaluate.py --model $2 --out $3.json"; exit; }'
    write_program(folder / "tables" / "run.sh", evaluate, 'sed "s/^/${N:-10} /"')
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
    """The folder of runs that differ in their seed, as report.py takes it: table1/grpo/2 -> table1/grpo."""
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
        seed, row = parse(program, flags).seed, row_of(name)
        assert name in (row, f"{row}/{seed}")
        seeds.setdefault(row, []).append(seed)
    # A choice is made on a training seed that no table uses; wildchat.sh shows that one run works.
    expected = {"sweep.sh": [100], "sweep_chat.sh": [100], "wildchat.sh": [0]}.get(table, [0, 1, 2])
    assert {row: found for row, found in seeds.items() if found != expected} == {}
    assert len({name for _, name, _, _ in runs}) == len(runs) and (runs == []) == (table in DRAWN_ONLY)


def rows_made(plans):
    """The rows of runs that the scripts of a scale leave: {row: (program, steps, whether evaluated)}."""
    runs = [run for runs, _ in plans.values() for run in runs]
    return {
        f"results/{row_of(name)}": (program, parse(program, flags).steps, n > 0)
        for n, name, program, flags in runs
    }


def seed_rows(plans):
    """The rows that only hold an evaluation: {row}."""
    own = [command for _, commands in plans.values() for command in commands if command[0] == "evaluate.py"]
    return {str(Path(parse(*command).out).parents[1]) for command in own}


def metrics_of(program):
    """The keys that a train script logs, timings aside."""
    return set(re.findall(r'^ {12}"(\w+)": ', (ROOT / program).read_text(), re.M))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("table", TABLES)
def test_what_is_drawn_was_made(plans, table, scale):
    """What shows after hours, too: a row or metric that no run has, a table of runs that were not evaluated,
    the paper's numbers beside no row, or a row that was trained for longer than the others.

    Breaks: figure1 for table1 in a --runs; a name without ${AT}; ratio_max in figure3.sh; N=0 in table5.sh;
    grpo-16 in table5.sh; no $UNTIL in figure6.sh.
    """
    _, commands = plans[scale][table]
    (config,) = (parse(*command) for command in commands if command[0] == "report.py")
    made, rows = rows_made(plans[scale]), set(config.runs) - seed_rows(plans[scale])
    assert rows <= made.keys()
    programs, steps, evaluated = (set(column) for column in zip(*(made[row] for row in rows), strict=True))
    embedded = "chat=tiny" in json.dumps(plans[scale][table])  # whose true reward tiny/chat.py adds
    known = {"true_reward"} if embedded else set()
    assert set(config.panels) <= known | set.intersection(*(metrics_of(program) for program in programs))
    assert evaluated == {True} or not config.table
    assert len(steps) == 1 or config.until == min(steps)
    if config.paper:
        assert {Path(row).name for row in config.runs} == report.PAPER[config.paper].keys()


def test_another_scale_is_refused(printing):
    """A misspelt scale taken for the laptop's. Break: `laptop | *)` in scales.sh."""
    done = bash(printing, "tables/table1.sh", "gpus")
    assert (done.returncode, done.stdout) == (2, "") and "laptop, gpu or paper, not gpus" in done.stderr


# --- run.sh ---

LINE = "mine/first train_dpo.py --sync-every 10"


@pytest.fixture
def repository(tmp_path):
    """A folder with tables/run.sh and programs that leave what a run and an evaluation leave, at once."""
    (tmp_path / "tables").mkdir()
    shutil.copy(ROOT / "tables" / "run.sh", tmp_path / "tables")
    # The last argument of the one is --run-dir's, that of the other (evaluate.py) is --out's.
    leave = ['mkdir -p "${!#}"/export/{5,10}', 'touch "${!#}"/{config.json,metrics.jsonl}']
    write_program(tmp_path / ".venv" / "bin" / "torchrun", *leave)
    write_program(
        tmp_path / ".venv" / "bin" / "python", 'mkdir -p "$(dirname "${!#}")"', 'echo "$@" >"${!#}"'
    )
    return tmp_path


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_made_evaluated_and_kept_once(repository):
    """Results that cannot be told from those of a run cut short, or hours spent on what is there.

    Breaks: drop the last line of run.sh; drop the exit of a run that has its results.
    """
    done, kept = bash(repository, "tables/run.sh", lines=LINE), repository / "results" / "mine" / "first"
    assert done.returncode == 0 and done.stdout.endswith(" mine/first: train_dpo.py --sync-every 10\n")
    evaluated = {"eval/5.json", "eval/10.json"}
    assert files(kept) == {"config.json", "metrics.jsonl", "command.txt", *evaluated}
    assert (kept / "command.txt").read_text() == "train_dpo.py --sync-every 10\n"
    command = (kept / "eval" / "5.json").read_text()
    assert "--model runs/mine/first/export/5 --data tiny@test --n 10 " in command

    shutil.rmtree(repository / "runs")
    again = bash(repository, "tables/run.sh", lines=LINE)
    assert (again.returncode, again.stdout) == (0, "") and not (repository / "runs").exists()


def test_no_samples_no_evaluation(repository):
    """A figure's runs that take twice their time. Break: drop the break of N=0."""
    assert bash(repository, "tables/run.sh", lines=LINE, N="0").returncode == 0
    assert not any("eval" in name for name in files(repository / "results"))


def test_chat_is_evaluated_where_it_is_asked_for(repository):
    """Answers without their true reward, or a run that fails after its hours for want of a reward model.
    Breaks: drop `return 0`; drop the line of --truth; drop the check."""
    done = bash(repository, "tables/run.sh", lines=LINE, CHAT="tiny@test")
    assert done.returncode != 0 and "CHAT needs a REWARD_MODEL" in done.stderr and done.stdout == ""
    bash(repository, "tables/run.sh", lines=LINE, CHAT="tiny@test", REWARD_MODEL="rm", N="3")
    kept = repository / "results" / "mine" / "first" / "eval"
    for step in ("5", "10"):
        assert "--data tiny@test --n 3 " in (kept / f"{step}.json").read_text()
        asked = (kept / f"{step}.chat.json").read_text()
        assert "--data chat=tiny@test --reward-model rm --n 1 --answers runs/mine/first/eval/" in asked
        assert "tiny/chat.py --truth" in (kept / f"{step}.answers.jsonl").read_text()


def test_a_model_that_was_not_trained_is_evaluated_once(repository):
    """The seed's row measured again each time a table is drawn. Break: drop `[ -e ...`."""
    for _ in range(2):
        bash(repository, "tables/run.sh", "--evaluate", "tiny/llama", "results/seed/eval/0")
        found = repository / "results" / "seed" / "eval" / "0.json"
        assert found.read_text().startswith(("evaluate.py --model tiny/llama", "kept"))
        found.write_text("kept")
    assert found.read_text() == "kept"


def test_results_of_another_command_are_not_taken_for_a_runs_own(repository):
    """A table whose rows were made with flags that its script no longer has. Break: drop the comparison."""
    bash(repository, "tables/run.sh", lines=LINE)
    done = bash(repository, "tables/run.sh", lines=f"{LINE} --lr 1e-5")
    assert done.returncode != 0 and len(done.stdout.splitlines()) == 1
    assert "mine/first: results/mine/first was made by another command" in done.stdout


@pytest.mark.parametrize("program", ["torchrun", "python"])
def test_a_run_that_fails_says_where_to_look_and_is_made_anew(repository, program):
    """Half a run among the results, or a traceback that nobody sees. Break: drop `trap ... ERR`."""
    shutil.copytree(repository / ".venv", repository / "sound")
    write_program(repository / ".venv" / "bin" / program, "echo out of memory >&2", "exit 1")
    done = bash(repository, "tables/run.sh", lines=LINE)
    assert done.returncode != 0
    assert done.stdout.splitlines()[1:] == ["mine/first: failed, see runs/mine/first.log"]
    assert "out of memory" in (repository / "runs" / "mine" / "first.log").read_text()
    assert files(repository / "results") == set()

    shutil.copytree(repository / "sound", repository / ".venv", dirs_exist_ok=True)
    assert bash(repository, "tables/run.sh", lines=LINE).returncode == 0
    assert (repository / "results" / "mine" / "first" / "command.txt").exists()


def test_a_run_that_is_being_made_is_left_alone(repository):
    """Two processes that write one run. Break: drop flock."""
    lock = repository / "runs" / "mine" / "first.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = bash(repository, "tables/run.sh", lines=LINE)
    assert done.returncode != 0 and done.stdout == "mine/first: is being made by another process\n"
