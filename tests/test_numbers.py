"""Every number in the READMEs and in docs/ comes from a file.

A decimal number that one quotes must be found, at its precision, among the numbers of its folder's files
and of what it links to, or among those that the rules below derive from its runs. Whole numbers are not
checked: too many would be found by chance. So are some four in ten wrong decimals: this finds stale texts,
whose numbers are wrong together, rather than one wrong digit.
"""

import json
import re
from bisect import bisect_left
from functools import cache
from pathlib import Path
from statistics import fmean, median

import pytest

from tables import archive, paper
from tables.intervals import over_seeds

ROOT = Path(archive.__file__).resolve().parents[1]
READMES = [*sorted((ROOT / "results").glob("*/README.md")), ROOT / "tiny" / "README.md"]
PAGES = [ROOT / "README.md", ROOT / "results" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
READ = {".json", ".md", ".txt", ".py", ".sh"}  # the files that numbers are read from
NUMBER = re.compile(r"(?<![\w.])(\d[\d,]*\.(\d+))(?![\d.]*\w|\.\d)(?: (ms|KiB|MiB|KB|MB|GB|%))?")
UNITS = {"": (1, 100), "%": (100, 1), "ms": (1e3,), "KB": (1, 1e-3), "MB": (1, 1e-6), "GB": (1, 1e-9)}
UNITS |= {"KiB": (1,), "MiB": (1 / 1024,)}  # of what is kept in KiB
WITH_VERSION = re.compile(r"\b(?:Llama|Qwen|vLLM|TRL|torch|transformers) \d[\d.]*\d")


def quoted(text):
    """The decimal numbers outside commands and code, as [(as written, value, decimals, unit)].

    >>> quoted("`--lr 0.5`: 1,234.50 MB, TRL 1.16.0, not 2.6.1 or [3.5](a/4.5).")
    [('1,234.50', 1234.5, 2, 'MB'), ('3.5', 3.5, 1, '')]
    """
    text = re.sub(r"(?m)^    .*$|`[^`]*`|\]\([^)]*\)", "", text)
    found = NUMBER.findall(WITH_VERSION.sub("", text))
    return [(written, float(written.replace(",", "")), len(part), unit) for written, part, unit in found]


# --- What is known ---


def numbers_in(value):
    """All numbers in what JSON holds; of a list its median, too, and the means of blocks of ten."""
    if isinstance(value, str):
        yield from (float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", value))
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers_in(key)
            yield from numbers_in(inner)
    elif isinstance(value, list):
        if len(value) > 2 and all(type(number) in (int, float) for number in value):
            yield median(value)
            yield from (fmean(value[at : at + 10]) for at in range(0, len(value), 10) if len(value) > 20)
        for inner in value:
            yield from numbers_in(inner)
    elif isinstance(value, (int, float)):
        yield float(value)


def derived(table, text):
    """Numbers of the runs in an archive, whose rows are runs that differ in their seed.

    Of each field of an evaluation that the text names: each seed's, and their mean and interval. Of each
    metric that it names: the mean over seeds of its first and last 10 and 20 steps; of a single run its
    blocks of 5 and 10, too, and its smallest and largest value. Of flags, and of an evaluation's sampling:
    their values.
    """
    rows = {}
    for run in archive.read(table):
        yield from (one[key] for one in run.evaluations.values() for key in ("temperature", "top_p"))
        rows.setdefault(run.name.partition("/")[0], []).append(run)
    for runs in rows.values():
        for kind in ("evaluations", "chat"):
            steps = {step for run in runs for step in getattr(run, kind)}
            for several in ([getattr(run, kind)[step] for run in runs] for step in steps):
                for key in named(several[0], text):
                    values = [one[key] for one in several if type(one.get(key)) in (int, float)]
                    yield from values
                    if len(values) > 1:
                        yield from (over_seeds(values).mean, over_seeds(values).half)
        trained = [run.metrics for run in runs if run.metrics]
        yield from numbers_in([run.config["flags"] for run in runs if run.config])
        for key in named((trained or [[{}]])[0][0], text):
            yield from windows([[row[key] for row in metrics if row[key] is not None] for metrics in trained])


def named(keys, text):
    """The keys that a text names as words."""
    return [key for key in keys if re.search(rf"\b{key}\b", text)]


def windows(curves):
    """One metric of a row's runs: the means that derived() names."""
    for part in (slice(10), slice(20), slice(-10, None), slice(-20, None)):
        parts = [curve[part] for curve in curves if curve]
        if parts:
            yield fmean(map(fmean, parts))
    if len(curves) == 1 and curves[0]:
        (curve,) = curves
        yield from (min(curve), max(curve))
        yield from (fmean(curve[at : at + n]) for n in (5, 10) for at in range(0, len(curve), n))


@cache
def parameters(folder):
    """The numbers of weights of the models in a folder, in millions."""
    from safetensors import safe_open

    found = []
    for path in folder.glob("*/model.safetensors"):
        with safe_open(path, "numpy") as file:
            found.append(sum(file.get_tensor(name).size for name in file.keys()) / 1e6)  # noqa: SIM118
    return found


def known(readme):
    """All numbers that a README may quote, sorted."""
    text, folder = readme.read_text(), readme.parent
    linked = [(folder / link).resolve() for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    folders = {folder, *(path.parent for path in linked if path.name in ("README.md", archive.FILE))}
    files = {path for path in linked if path.is_file()}
    files |= {path for each in folders for path in each.glob("*") if path.is_file()}
    found = {number for _, number in ((path, n) for path in files for n in of_file(path))}
    for each in folders:
        found |= set(derived(each, text)) | set(parameters(each))
        found |= {n for row in paper.ROWS.get(each.name, {}).values() for cell in row for n in cell if n}
    return sorted(map(abs, found))


@cache
def of_file(path):
    """The numbers in a file; a README's are no source."""
    if path.suffix not in READ or path.name == "README.md":
        return ()
    text = path.read_text()
    return tuple(numbers_in(json.loads(text) if path.suffix == ".json" else text))


def has(known, value, decimals, unit):
    """Whether a known number, rounded, is the one that was quoted."""
    for scale in UNITS[unit]:
        at = bisect_left(known, (value - 0.5000001 * 10**-decimals) / scale)
        if at < len(known) and known[at] <= (value + 0.5000001 * 10**-decimals) / scale:
            return True
    return False


# --- The tests ---


@pytest.mark.slow
@pytest.mark.parametrize("readme", [*READMES, *PAGES], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_number_comes_from_a_file(readme):
    """A number that nobody can check: typed wrong, or left from runs that were made again.

    Breaks: 92.6 for 92.7 in families/README.md; the entropy of another row in figure2/README.md.
    """
    numbers = known(readme)
    assert [written for written, *number in quoted(readme.read_text()) if not has(numbers, *number)] == []


@pytest.mark.slow
@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_tables_are_those_of_the_files(readme):
    """A line of a generated table that was pasted, and changed or forgotten when the table was made again.

    Break: a seed more in a line of table5/README.md.
    """
    lines = {
        line for path in readme.parent.glob("*.md") if path != readme for line in path.read_text().split("\n")
    }
    table, wrong = False, []
    for line in readme.read_text().split("\n"):
        table = line.startswith("|") and (table or line in lines)  # from a head that a file has, too
        if table and line not in lines:
            wrong.append(line)
    assert wrong == []


def test_a_wrong_number_is_noticed(tmp_path):
    """A test that finds every number. Breaks: 1 for 0.5000001 in has(); (1, 10) for a unit."""
    (tmp_path / "numbers.json").write_text('{"a": [0.2341, 0.2345, 2000000], "b": "0.7 of 31"}')
    readme = tmp_path / "README.md"
    for text, wrong in (
        ("0.234 and 23.4 %, 2.0 MB", []),
        ("0.233, 2.34, 23.5 %", ["0.233", "2.34"]),
        ("0.7 of 0.8 and -0.7", ["0.8"]),
        ("`0.8`, vLLM 0.8 and 1.2.3", []),
        ("3.1 of ten, 3.1 GB", ["3.1", "3.1"]),
    ):
        readme.write_text(text)
        numbers = known(readme)
        assert [written for written, *number in quoted(text) if not has(numbers, *number)] == wrong
