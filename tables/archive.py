"""The archive of a table: `results/TABLE/runs.jsonl.gz` holds the results of its runs, one JSON line a run.

    python tables/archive.py list results/table1              # its runs and their commands
    python tables/archive.py remove results/table1/dpo-1      # a row of runs
    python tables/archive.py remove results/table1/dpo-1/0    # one run
    python tables/archive.py add results/table1/dpo-1/0 runs/table1/dpo-1/0 "train_dpo.py --sync-every 1 ..."

A line holds the small files of a run's directory, all numbers at full precision:

    name         ROW, or ROW/SEED where the runs of a row differ in their seed
    command      the script and its flags, without --run-dir
    config       config.json; null for a model that was not trained, only evaluated
    metrics      metrics.jsonl by columns, {key: [its value at each step]}; null likewise
    evaluations  {STEP: eval/STEP.json}, and "seed" where there is an eval/seed.json
    chat         {STEP: eval/STEP.chat.json}
    answers      {STEP: eval/STEP.answers.jsonl by columns}, without the texts

The lines are sorted by name, and gzip gets no time stamp, so the same results give the same bytes.

`archive.read("results/table1")` reads one, and so does pandas.read_json(".../runs.jsonl.gz", lines=True).
"""

import argparse
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only tables/ is there

FILE = "runs.jsonl.gz"
ANSWER = ("id", "reward", "true_reward", "length")  # the fields kept of an answer


@dataclass
class Run:
    """The results of one run; `metrics` and `answers` are lists of rows here, and columns in the file."""

    name: str
    command: str
    config: dict | None = None
    metrics: list[dict] | None = None
    evaluations: dict[str, dict] = field(default_factory=dict)
    chat: dict[str, dict] = field(default_factory=dict)
    answers: dict[str, list[dict]] = field(default_factory=dict)

    @property
    def seed(self) -> str:
        """The part of the name that tells runs of one row apart; "" for a row's only run."""
        return self.name.partition("/")[2]


def locate(path: str | Path) -> tuple[Path, str]:
    """The archive's folder and the name of a row or run.

    >>> locate("results/table1/dpo-1/0")
    (PosixPath('results/table1'), 'dpo-1/0')
    >>> locate("results/table1/dpo-1")
    (PosixPath('results/table1'), 'dpo-1')
    """
    path = Path(path)
    depth = 2 if path.name.isdigit() and len(path.parents) > 1 else 1
    return path.parents[depth - 1], "/".join(path.parts[-depth:])


def select(runs: list[Run], name: str) -> list[Run]:
    """The run of that name, or the runs of that row."""
    return [run for run in runs if run.name == name or run.name.startswith(f"{name}/")]


# --- A run's directory ---


def read_directory(directory: str | Path, name: str, command: str = "") -> Run:
    """The results in a run's directory. ValueError in one line if it has neither metrics nor evaluations."""
    from run import read_json, read_lines  # here, because run.sh calls has() for every run

    directory, found = Path(directory), Run(name, command)
    if (directory / "config.json").exists():
        found.config = read_json(directory / "config.json")
    if (directory / "metrics.jsonl").exists():
        found.metrics = read_lines(directory / "metrics.jsonl")
        for number, row in enumerate(found.metrics, 1):
            if "step" not in row:
                raise ValueError(f"{directory}/metrics.jsonl, line {number}: not a step's metrics")
        # A run that newer code resumed has more metrics from there on.
        keys = dict.fromkeys(key for row in found.metrics for key in row)
        found.metrics = [{key: row.get(key) for key in keys} for row in found.metrics]
    for path in sorted((directory / "eval").glob("*")):
        stem, _, ending = path.name.partition(".")
        if ending == "answers.jsonl":
            rows = read_lines(path)
            found.answers[stem] = [{key: row[key] for key in ANSWER if key in row} for row in rows]
        elif ending in ("json", "chat.json"):
            kind = found.evaluations if ending == "json" else found.chat
            kind[stem] = read_json(path)
    if found.metrics is None and not (directory / "eval").is_dir():
        raise ValueError(f"{directory}: not a run directory (it has no metrics.jsonl)")
    return found


# --- The file ---


def columns(rows: list[dict]) -> dict[str, list]:
    """Rows with the same keys, as columns; ValueError if their keys differ.

    >>> columns([{"step": 0, "reward": 0.5}, {"step": 1, "reward": None}])
    {'step': [0, 1], 'reward': [0.5, None]}
    """
    keys = list(rows[0]) if rows else []
    if any(row.keys() != set(keys) for row in rows):
        raise ValueError(f"rows with different keys: {keys} and others")
    return {key: [row[key] for row in rows] for key in keys}


def rows_of(columns: dict[str, list]) -> list[dict]:
    """The inverse of columns()."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def read(table: str | Path) -> list[Run]:
    """The runs of a table's folder, sorted by name; none if it has no archive."""
    path = Path(table) / FILE
    if not path.exists():
        return []
    try:
        runs = [Run(**json.loads(line)) for line in gzip.decompress(path.read_bytes()).splitlines()]
    except (OSError, EOFError, zlib.error, ValueError, TypeError) as error:
        raise ValueError(f"{path}: cut short, or not an archive of runs ({error})") from None
    for run in runs:
        run.metrics = None if run.metrics is None else rows_of(run.metrics)
        run.answers = {step: rows_of(answers) for step, answers in run.answers.items()}
    return runs


def write(table: str | Path, runs: list[Run]) -> None:
    """Write a table's archive atomically; without runs, remove it."""
    path, lines = Path(table) / FILE, []
    for run in sorted(runs, key=lambda run: run.name):
        line = asdict(run)
        line["metrics"] = None if run.metrics is None else columns(run.metrics)
        line["answers"] = {step: columns(answers) for step, answers in run.answers.items()}
        lines.append(json.dumps(line, separators=(",", ":")) + "\n")
    if not lines:
        path.unlink(missing_ok=True)
        return
    packed = io.BytesIO()
    with gzip.GzipFile("", "wb", 9, packed, mtime=0) as file:
        file.write("".join(lines).encode())
    path.with_name(f"{FILE}.partial").write_bytes(packed.getvalue())
    path.with_name(f"{FILE}.partial").rename(path)


@contextmanager
def locked(table: Path) -> Iterator[None]:
    """Let one process at a time change a table's archive; the others wait. The folder itself is locked."""
    import fcntl  # here, because Windows has none

    table.mkdir(parents=True, exist_ok=True)
    folder = os.open(table, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


# --- Commands ---


def has(path: str | Path, command: str) -> bool:
    """Whether the archive has the results of a run that this command made.

    ValueError in one line if another command made them, or if the archive has runs below or above that name:
    a row is either one run or a run for each seed.
    """
    table, name = locate(path)
    for run in read(table):
        if run.name == name and run.command == command:
            return True
        if run.name == name:
            raise ValueError(
                f"{path} was made by another command; remove it: python tables/archive.py remove {path}"
            )
        if run.name.startswith(f"{name}/") or name.startswith(f"{run.name}/"):
            raise ValueError(f"{path} holds other runs: {table}/{run.name}")
    return False


def add(path: str | Path, directory: str | Path, command: str) -> None:
    """Put the results in a run's directory into an archive, under the name that the path gives.

    ValueError in one line if the archive has them already, or for the reasons that has() gives.
    """
    table, name = locate(path)
    run = read_directory(directory, name, command)
    with locked(table):
        if has(path, command):
            raise ValueError(f"{path} has its results; remove it: python tables/archive.py remove {path}")
        write(table, [*read(table), run])


def remove(path: str | Path) -> list[str]:
    """Remove a run, or all runs of a row, from its archive: their names. ValueError if there are none."""
    table, name = locate(path)
    if not (table / FILE).exists():
        raise ValueError(f"{path}: there is no {table / FILE}")
    with locked(table):
        runs = read(table)
        gone = [run.name for run in select(runs, name)]
        if not gone:
            raise ValueError(f"{path}: {table / FILE} has {', '.join(run.name for run in runs)}")
        write(table, [run for run in runs if run.name not in gone])
    return gone


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="action", required=True, metavar="list | remove | add | has")
    commands.add_parser("list").add_argument("table", help="a folder with an archive")
    commands.add_parser("remove").add_argument("path", help="a run or a row, as in results/table1/dpo-1")
    for action in ("add", "has"):
        command = commands.add_parser(action)
        command.add_argument("path", help="the run's name, as in results/table1/dpo-1/0")
        if action == "add":
            command.add_argument("directory", help="where the run wrote its results")
        command.add_argument("command", help="what made it: a script and its flags, as one word")
    given = parser.parse_args(args)
    try:
        if given.action == "list":
            for run in read(given.table):
                print(f"{run.name:24} {run.command}")
        elif given.action == "remove":
            print(f"removed {', '.join(remove(given.path))}")
        elif given.action == "add":
            add(given.path, given.directory, given.command)
        else:
            print("yes" if has(given.path, given.command) else "no")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
