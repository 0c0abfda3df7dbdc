"""Draw runs: their metrics as curves, their evaluations as a table with intervals.

    python tables/report.py --runs runs/online runs/semi runs/offline --out curves.png

draws three runs over each other, and writes the report.json of each run that was evaluated.

    python tables/report.py --runs runs/table1/* --out curves.png --table table.md --paper table1 \\
        --compare dpo-1:dpo-10 dpo-inf:dpo-10

takes each folder as one row, whose runs differ in their seed. A curve is the mean over seeds, in a band from
the lowest to the highest. An accuracy is the mean over seeds and its 95 % interval (tables/intervals.py),
beside the paper's; --compare gives the differences of two rows, paired by training seed and problem. With
--compare-metrics it compares the ends of curves, too, and writes differences.md beside the figure.

A row is read from run directories, as above, or from an archive (tables/archive.py): results/table1/dpo-1
names the runs dpo-1/0, dpo-1/1 and dpo-1/2 in results/table1/runs.jsonl.gz.
"""

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Literal

from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only tables/ is there

from flags import Count, OutFile, Positive, one_line_errors, parse_flags, why_not  # noqa: E402

from judge import bradley_terry  # noqa: E402
from run import write_json, write_text  # noqa: E402
from tables import archive, paper  # noqa: E402
from tables.archive import Run  # noqa: E402
from tables.figures import plot_curves, plot_table, row_name  # noqa: E402
from tables.intervals import (  # noqa: E402
    Estimate,
    direction,
    over,
    over_seeds,
    places,
    seeds_needed,
    shown,
    signed,
    verdict,
)

PANELS = ["reward", "entropy", "length", "staleness", "logp_gap"]
PHASES = ("generate", "score", "train", "sync")
SEED_ROW = "seed"  # the row of the model that the others were trained from

OTHERS = {  # of an evaluation, beside accuracy: its column
    "pass_at_n": "pass@{n}",
    "majority": "majority",
    "greedy_accuracy": "greedy",
}

Row = dict[int, dict[str, dict]]  # {step: {training seed: evaluation}}


@dataclass
class Config:
    runs: list[str] = HfArg(
        help="Rows: run directories, folders of runs that differ in their seed, or rows of an archive."
    )
    out: OutFile | None = HfArg(
        default=None, help="The figure. Default: curves.png in the first row's run directory."
    )
    names: list[str] = HfArg(
        default_factory=list, help="Other names for rows, as dpo-1=chat-only (tables/figures.py lists them)."
    )
    panels: list[str] = HfArg(default_factory=lambda: PANELS, help="The metrics to draw, one a panel.")
    smooth: Count = HfArg(default=1, help="Draw each point as the mean of so many steps.")
    until: Count | None = HfArg(default=None, help="Leave out what comes after so many steps.")
    table: OutFile | None = HfArg(
        default=None, help="A Markdown file for the accuracies of all rows; beside it .json and .png."
    )
    chat_table: OutFile | None = HfArg(
        default=None, help="A Markdown file for rewards, lengths and Elo of all rows; beside it .json."
    )
    chat_step: Count | None = HfArg(default=None, help="The step of --chat-table.")
    compare: list[str] = HfArg(
        default_factory=list, help="Differences of two rows each, as dpo-1:dpo-10, in every table."
    )
    compare_metrics: list[str] = HfArg(
        default_factory=list,
        help="Metrics that --compare compares, too: beside the figure, differences.md. METRIC/first: the "
        "share that is left of it at the end.",
    )
    last: Count = HfArg(default=20, help="--compare-metrics takes a metric's mean over so many last steps.")
    margin: Positive = HfArg(
        default=1.0, help="Points within which --compare calls two rows the same, if the interval allows it."
    )
    paper: Literal["table1", "table2", "table3", "table5"] | None = HfArg(
        default=None, help="Beside the table, the paper's; rows are found by their folders' names."
    )


# --- Rows: one run, or several that differ in their seed ---


def read_row(row: str | Path) -> list[Run]:
    """The runs of a row, from run directories or from an archive. ValueError in one line if there are none.

    The seed model's row is one Run that has evaluations, and None for its metrics.
    """
    path = Path(row)
    if (path / "metrics.jsonl").exists():
        return [archive.read_directory(path, path.name)]
    runs = sorted(found.parent for found in path.glob("*/metrics.jsonl"))
    if runs:
        return [archive.read_directory(run, f"{path.name}/{run.name}") for run in runs]
    if (path / "eval").is_dir():
        return [archive.read_directory(path, path.name)]
    table, name = archive.locate(path)
    found = archive.select(archive.read(table), name)
    if not found:
        raise ValueError(f"{row}: not a run directory, and {table / archive.FILE} has no {name}")
    return found


def evaluations(runs: list[Run]) -> Row:
    """The evaluations of a row: {step: {training seed: evaluation}}, by step."""
    found = {}
    for run in runs:
        for step, evaluation in run.evaluations.items():
            if step.isdigit():
                found.setdefault(int(step), {})[run.seed] = evaluation
    return dict(sorted(found.items()))


def check_alike(evaluations: list[dict], where: str) -> None:
    """ValueError in one line if evaluations that are to be compared were not measured alike."""
    for setting in ("data", "problems", "n", "temperature", "top_p", "max_new_tokens"):
        if any(setting not in evaluation for evaluation in evaluations):
            raise ValueError(f"{where}: an evaluation without {setting}; take what evaluate.py writes")
        values = [evaluation[setting] for evaluation in evaluations]
        other = [value for value in values if value != values[0]]
        if other:
            raise ValueError(
                f"{where}: measured with another {setting} ({values[0]} and {other[0]}); evaluate all alike"
            )


# --- Tables ---


def shares(evaluations: Iterable[dict], whole: float = 1.0) -> list[list[float]] | list[float]:
    """Of each evaluation the share of right answers to each problem; its accuracy if any keeps no counts.

    whole: what all right answers come to; 100 for percent.
    """
    evaluations = list(evaluations)
    if any("right" not in one for one in evaluations):
        return [whole * one["accuracy"] for one in evaluations]
    return [[whole * count / one["n"] for count in one["right"]] for one in evaluations]


def accuracy(several: dict[str, dict]) -> Estimate:
    """A row's accuracy at one step, {training seed: evaluation}, with its interval.

    Of seeds and problems; of seeds alone where an evaluation keeps no counts.
    """
    return over(shares(several.values()))


def seeds_in_common(a: dict[str, dict], b: dict[str, dict], names: str) -> list[str]:
    """The training seeds of both rows, {seed: ...} each. ValueError in one line if there are none."""
    both = sorted(a.keys() & b.keys())
    if not both:
        raise ValueError(f"--compare {names}: no training seed in common ({', '.join(a)} and {', '.join(b)})")
    return both


def less(x: float | list[float], y: float | list[float]) -> float | list[float]:
    """x - y, of numbers or of lists."""
    return [i - j for i, j in zip(x, y, strict=True)] if isinstance(x, list) else x - y


def difference(a: dict[str, dict], b: dict[str, dict], names: str) -> Estimate:
    """The accuracy of one row less that of another at one step, {training seed: evaluation} each.

    Paired: by training seed, whose runs see the same prompts in the same order, and by problem. ValueError in
    one line if no seed is in both.
    """
    both = seeds_in_common(a, b, names)
    found = shares(side[seed] for side in (a, b) for seed in both)
    return over([less(x, y) for x, y in zip(found[: len(both)], found[len(both) :], strict=True)])


def markdown(heads: list[str], rows: list[list[str]]) -> list[str]:
    """A table as lines of Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def table_lines(
    found: dict[str, Row],
    estimates: dict[str, dict[int, Estimate]],
    ratings: dict[str, list[float]],
    beside: str | None,
) -> list[str]:
    """The accuracies as lines of Markdown, in percent, beside one of the paper's tables.

    estimates: {label: {step: accuracy() of the row there}}. ratings: elo_of_problems.
    """
    steps = sorted({step for row in found.values() for step in row})
    columns = paper.COLUMNS.get(beside, ())
    last = {label: list(row[max(row)].values()) for label, row in found.items()}
    n = next(iter(last.values()))[0]["n"]
    extra = {
        key: head.format(n=n)
        for key, head in OTHERS.items()
        if all(key in evaluation for several in last.values() for evaluation in several)
    }
    heads = ["row", "seeds", *(f"step {step}" for step in steps), *extra.values()]
    heads += ["Elo"] if ratings else []
    rows = []
    for label, row in found.items():
        cells = [row_name(label)[0], "/".join(map(str, sorted({len(several) for several in row.values()})))]
        cells += [shown(estimates[label][step]) if step in row else "" for step in steps]
        cells += [shown(over_seeds([one[key] for one in last[label]])) for key in extra]
        cells += [with_interval(over_seeds(ratings[label]))] if ratings else []
        if beside:
            cells += [
                f"{value} ({error})" if error else f"{value}"
                for value, error in paper.ROWS[beside].get(label, [("", None)] * len(columns))
            ]
        rows.append(cells)
    note = "Accuracy in percent: mean over training seeds ± half its 95 % interval."
    if extra:
        note += f" {', '.join(extra.values())}: at the row's last step, of {n} samples a problem."
    if ratings:
        note += (
            " Elo: the models of one training seed against each other, at their last steps; on a problem the "
            "one with more right answers wins. 400 more are odds of 10 to 1; ratings hold within one table."
        )
    if beside and any(error for row in paper.ROWS[beside].values() for _, error in row):
        note += " The paper: one training seed; in brackets its error over 50 samples (docs/metrics.md)."
    return [*markdown(heads + [f"paper: {column}" for column in columns], rows), "", note]


def two_rows(names: str, rows: dict) -> tuple[str, str]:
    """The labels in A:B. ValueError in one line if they are not two of the rows."""
    a, _, b = names.partition(":")
    if a not in rows or b not in rows:
        raise ValueError(f"--compare {names}: takes two of the rows {', '.join(rows)}, as A:B")
    return a, b


def compare(found: dict[str, Row], pairs: list[str]) -> dict[str, dict[int, Estimate]]:
    """The differences of rows, {"A:B": {step: estimate}} at each step that both have."""
    differences = {}
    for names in pairs:
        a, b = two_rows(names, found)
        steps = sorted(found[a].keys() & found[b].keys())
        if not steps:
            raise ValueError(f"--compare {names}: no step at which both were evaluated")
        differences[names] = {step: difference(found[a][step], found[b][step], names) for step in steps}
    return differences


def comparison_lines(differences: dict[str, dict[int, Estimate]], margin: float) -> list[str]:
    """Differences as lines of Markdown, in points of percent."""
    steps, rows = sorted({step for row in differences.values() for step in row}), []
    for names, row in differences.items():
        a, b = (row_name(name)[0] for name in names.split(":"))
        last = row[max(row)]
        says = verdict(last, margin / 100)
        needed = (
            seeds_needed(last, margin / 100) or "over 1000" if says == "cannot tell" and last.half else ""
        )
        rows.append(
            [f"{a} less {b}", str(last.seeds), *(signed(row[step]) if step in row else "" for step in steps)]
            + [says, str(needed)]
        )
    heads = ["difference", "seeds", *(f"step {step}" for step in steps), "at the last step", "seeds to tell"]
    note = (
        "Points of percent with 95 % intervals, paired by training seed, and by problem where a run keeps "
        f"its counts. same: the interval lies within {margin:g} point{'s' * (margin != 1)}. "
        "seeds to tell: that many would decide, if mean and scatter stay."
    )
    return ["", *markdown(heads, rows), "", note]


def differences_of(values: dict[str, dict[str, dict]], pairs: list[str]) -> dict[str, dict]:
    """Differences of any numbers, {label: {training seed: {what: number}}}, paired by training seed.

    A list instead of a number has one of each problem or request: then the pairs are of these, too, and the
    interval is of both.
    {"A:B": {what: {"first", "second": the rows' means, "mean", "half", "seeds": of the difference, "verdict",
    "seeds_to_tell"}}}. There is no margin, so the verdict is higher, lower or cannot tell. ValueError in one
    line without a seed in common.
    """
    differences = {}
    for names in pairs:
        a, b = (values[label] for label in two_rows(names, values))
        seeds = seeds_in_common(a, b, names)
        row = differences[names] = {}
        both = dict.fromkeys(what for seed in seeds for what in a[seed] if what in b[seed])
        for what in both:  # the seed model lacks some, and Elo is of the seeds that all rows have
            of = [seed for seed in seeds if what in a[seed] and what in b[seed]]
            first, second = ([side[seed][what] for seed in of] for side in (a, b))
            estimate = over([less(x, y) for x, y in zip(first, second, strict=True)])
            says = direction(estimate)
            row[what] = {
                "first": over(first).mean,
                "second": over(second).mean,
                **asdict(estimate),
                "verdict": says,
                "seeds_to_tell": seeds_needed(estimate, 0.0)
                if says == "cannot tell" and estimate.half
                else None,
            }
    return differences


def difference_lines(differences: dict[str, dict], what: str) -> list[str]:
    """differences_of as lines of Markdown."""
    heads = ["rows", what, "seeds", "first", "second", "difference", "the first is", "seeds to tell"]
    rows = []
    for names, row in differences.items():
        names, _, step = names.partition(" at ")
        a, b = (row_name(label)[0] for label in names.split(":"))
        at = f", step {step}" if step else ""
        for key, found in row.items():
            digits = places(found["half"])
            sides = (f"{found[side]:.{digits}f}" for side in ("first", "second"))
            rows.append([f"{a} less {b}{at}", key, str(found["seeds"]), *sides])
            interval = signed(Estimate(found["mean"], found["half"], found["seeds"]), 1.0, digits)
            unknown = "over 1000" if found["verdict"] == "cannot tell" and found["half"] else ""
            rows[-1] += [interval, found["verdict"], str(found["seeds_to_tell"] or unknown)]
    return markdown(heads, rows)


def other_differences(found: dict[str, Row], pairs: list[str]) -> dict[str, dict]:
    """differences_of pass@n, majority and greedy answers, in points, at each pair's last step in common."""
    differences = {}
    for names in pairs:
        a, b = two_rows(names, found)
        step = max(found[a].keys() & found[b].keys())
        both = {label: found[label][step] for label in (a, b)}
        n = next(iter(both[a].values()))["n"]
        keys = [key for key in OTHERS if all(key in e for several in both.values() for e in several.values())]
        values = {
            label: {
                seed: {OTHERS[key].format(n=n): 100 * e[key] for key in keys} for seed, e in several.items()
            }
            for label, several in both.items()
        }
        differences |= {f"{names} at {step}": row for row in differences_of(values, [names]).values()}
    return differences


def write_metric_differences(rows: dict[str, list[Run]], config: Config, out: Path) -> None:
    """Write --compare-metrics beside the figure `out`: differences.md, and .json."""

    def mean(run, key, metrics):
        found = [row[key] for row in metrics if row.get(key) is not None]
        if not found:
            raise ValueError(f"--compare-metrics {key}: not a metric of {run.name}")
        return fmean(found)

    values = {}
    for label, runs in rows.items():
        for run in (run for run in runs if run.metrics):
            metrics, row = with_task(run)[: config.until], {}
            for name in config.compare_metrics:
                row[name] = mean(run, name.removesuffix("/first"), metrics[-config.last :])
                if name.endswith("/first"):
                    row[name] /= mean(run, name.removesuffix("/first"), metrics[: config.last])
            values.setdefault(label, {})[run.seed] = row
    differences = differences_of(values, config.compare)
    note = (
        f"Means over the last {config.last} steps and training seeds; differences with 95 % intervals, "
        "paired by training seed. seeds to tell: that many would decide, if mean and scatter stay."
    )
    if any(name.endswith("/first") for name in config.compare_metrics):
        note += f" /first: as a share of the mean over the first {config.last} steps."
    save_table(
        [*difference_lines(differences, "metric"), "", note], differences, out.with_name("differences.md")
    )


def commits_of(rows: dict[str, list[Run]]) -> str:
    """One line about the commits that made the runs: one, or which rows are whose."""
    made = {}
    for label, runs in rows.items():
        for run in runs:
            if run.config:
                made.setdefault(run.config.get("commit") or "unknown", set()).add(label)
    if len(made) < 2:
        return f"Made by commit {', '.join(made)}." if made else ""
    return (
        "Made by commits "
        + "; ".join(f"{c} ({', '.join(sorted(labels))})" for c, labels in made.items())
        + "."
    )


def write_table(rows: dict[str, list[Run]], config: Config) -> None:
    """Write the accuracies of {label: runs}, and --compare's differences, as Markdown, JSON and a figure."""
    out, until = Path(config.table), config.until
    found = {
        label: {step: several for step, several in evaluations(runs).items() if step <= (until or step)}
        for label, runs in rows.items()
    }
    missing = [label for label, row in found.items() if not row]
    if missing:
        raise ValueError(f"--table: {', '.join(missing)} has no eval/STEP.json yet; evaluate it first")
    every = [e for row in found.values() for several in row.values() for e in several.values()]
    check_alike(every, f"--table {out}")
    if any("accuracy" not in e for e in every):
        raise ValueError(f"--table {out}: an evaluation without accuracy; requests go to --chat-table")
    estimates = {
        label: {step: accuracy(several) for step, several in row.items()} for label, row in found.items()
    }
    differences = compare(found, config.compare)
    ratings = elo_of_problems(found)
    lines = table_lines(found, estimates, ratings, config.paper)
    others = other_differences(found, config.compare)
    if differences:
        lines += comparison_lines(differences, config.margin)
    if any(others.values()):
        lines += ["", *difference_lines(others, "beside accuracy")]
    numbers = {
        "accuracy": {
            label: {step: [e["accuracy"] for e in several.values()] for step, several in row.items()}
            for label, row in found.items()
        },
        "half": {label: {step: e.half for step, e in row.items()} for label, row in estimates.items()},
        "difference": {
            names: {step: asdict(e) for step, e in row.items()} for names, row in differences.items()
        },
        "others": others,
        **({"elo": ratings} if ratings else {}),
    }
    if made := commits_of(rows):
        lines += ["", made]
    save_table(lines, numbers, out)
    plot_table(estimates, config.paper, out.with_suffix(".png"))


def save_table(lines: list[str], table: dict, out: Path) -> None:
    """Print a table's lines of Markdown; write them and, beside them, its numbers as JSON."""
    print("\n".join(lines))
    write_text(out, "\n".join(lines) + "\n")
    write_json(out.with_suffix(".json"), table)


# --- Tables with chat: accuracy, rewards, lengths, and all rows against each other ---


def read_chat(runs: list[Run], step: int) -> dict[str, tuple[dict, list[dict]]]:
    """A row's evaluations on requests after `step` steps: {training seed: (summary, answers)}.

    The seed model's, which was not trained, are at step 0.
    """
    found = {}
    for run in runs:
        at = str(step if run.metrics is not None else 0)
        if at not in run.chat or at not in run.answers:
            raise ValueError(
                f"--chat-table: {run.name} has no eval/{at}.chat.json and {at}.answers.jsonl; evaluate with "
                "CHAT, as tables/run.sh says"
            )
        found[run.seed] = run.chat[at], run.answers[at]
    return found


def battles_between(answers: dict[str, list[dict]], key: str) -> list[dict]:
    """Every two rows on every request, {label: answers} -> battles for judge/; the higher `key` wins."""
    battles = []
    for a, b in combinations(answers, 2):
        if [row["id"] for row in answers[a]] != [row["id"] for row in answers[b]]:
            raise ValueError(f"--chat-table: {a} and {b} answer different requests; evaluate both alike")
        for one, other in zip(answers[a], answers[b], strict=True):
            winner = "tie" if one[key] == other[key] else "model_a" if one[key] > other[key] else "model_b"
            battles.append({"question_id": one["id"], "model_a": a, "model_b": b, "winner": winner})
    return battles


def elo(answers: dict[str, dict[str, list[dict]]], key: str) -> dict[str, list[float]]:
    """Elo ratings of rows, {label: [one for each training seed that all have]}, by battles_between.

    answers: {label: {training seed: [dict, ...]}}. The runs of one training seed meet each other; the seed
    model, which has none, meets all of them.
    """
    trained = {label: seeds for label, seeds in answers.items() if label != SEED_ROW}
    table = {label: [] for label in answers}
    for seed in sorted(set.intersection(*map(set, trained.values()))):
        group = {label: seeds[seed] for label, seeds in trained.items()}
        if SEED_ROW in answers:
            group[SEED_ROW] = next(iter(answers[SEED_ROW].values()))
        for label, rating in bradley_terry(battles_between(group, key)).items():
            table[label].append(round(rating, 6))  # beyond that, machines differ
    return table


def elo_of_problems(found: dict[str, Row]) -> dict[str, list[float]]:
    """elo() of rows at their last steps: on a problem the model with more right answers wins.

    {} for a single row, for rows without a training seed in common, and where an evaluation keeps no counts.
    """
    last = {label: row[max(row)] for label, row in found.items()}
    every = [one for several in last.values() for one in several.values()]
    if len(last) < 2 or any("right" not in one for one in every):
        return {}
    counts = {
        label: {
            seed: [{"id": at, "right": count} for at, count in enumerate(one["right"])]
            for seed, one in several.items()
        }
        for label, several in last.items()
    }
    ratings = elo(counts, "right")
    return ratings if any(ratings.values()) else {}


def chat_columns(answers: dict[str, dict[str, list[dict]]]) -> dict[str, dict[str, list]]:
    """The columns of a table, {label: {column: [for each training seed a list, one number a request]}}, from
    each row's answers {label: {training seed: [dict, ...]}}. Elo has one number a training seed.

    elo: by the true reward where it is known, else by the learned one, the runs of one training seed that all
    rows have against each other; the seed model, which has no training seed, is in all of them.
    """
    known = {"true_reward" in row for seeds in answers.values() for rows in seeds.values() for row in rows}
    if len(known) > 1:
        raise ValueError("--chat-table: a part of the answers has its true reward; add it to all, or to none")
    judged_by = "true_reward" if known == {True} else "reward"
    columns = {"reward": "reward", "true_reward": "true_reward", "characters": "length"}
    if judged_by == "reward":
        del columns["true_reward"]
    table = {
        label: {
            name: [[row[key] for row in rows] for rows in seeds.values()] for name, key in columns.items()
        }
        for label, seeds in answers.items()
    }
    for label, of_seeds in elo(answers, judged_by).items():
        table[label]["elo"] = of_seeds
    return table


def write_chat_table(
    rows: dict[str, list[Run]], step: int, beside: str | None, out: Path, pairs: list[str] | None = None
) -> None:
    """Write chat_columns of {label: runs}, and accuracies, as Markdown and JSON, the paper's beside.

    pairs: --compare's.
    """
    if len(rows) < 2:
        raise ValueError("--chat-table: compares rows, and --runs names only one")
    found = {label: read_chat(runs, step) for label, runs in rows.items()}
    check_alike([one for seeds in found.values() for one, _ in seeds.values()], f"--chat-table {out}")
    table = chat_columns(
        {label: {seed: answers for seed, (_, answers) in seeds.items()} for label, seeds in found.items()}
    )
    several = {label: evaluations(runs) for label, runs in rows.items()}
    several = {label: [*(row.get(step) or row.get(0) or {}).values()] for label, row in several.items()}
    check_alike([one for row in several.values() for one in row], f"--chat-table {out}")
    percent = iter(shares((one for row in several.values() for one in row), 100))  # all of one kind
    right = {label: [next(percent) for _ in row] for label, row in several.items()}
    table = {label: {"accuracy": right[label], **row} for label, row in table.items()}
    heads = list(next(iter(table.values())))
    named = [f"paper: {column}" for column in paper.COLUMNS.get(beside, ())]
    cells = []
    for label, row in table.items():
        ours = [with_interval(over(row[head])) if row[head] else "" for head in heads]
        theirs = paper.ROWS[beside].get(label, [("", None)] * len(named)) if beside else []
        cells.append(
            [row_name(label)[0], str(len(found[label])), *ours, *(str(value) for value, _ in theirs)]
        )
    lines = markdown(["row", "seeds", *heads, *named], cells)
    lines += [
        "",
        "Mean over training seeds ± half its 95 % interval, which is of seeds and of requests or problems "
        "(Elo: of seeds alone; the seed model was measured once). Accuracy in percent.",
    ]
    numbers = {
        label: {head: [over([value]).mean for value in column] for head, column in row.items()}
        for label, row in table.items()
    }
    if pairs:
        numbers["difference"] = differences_of(by_seed(table, found), pairs)
        lines += ["", *difference_lines(numbers["difference"], "column"), ""]
        lines += [
            "Paired by training seed, and by request or problem; 95 % intervals of both (Elo: of seeds)."
        ]
    save_table(lines, numbers, out)


def by_seed(table: dict[str, dict[str, list]], found: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """A table's columns as {label: {training seed: {column: number or list}}}; the seed model has all seeds.

    Elo has a value for each training seed that all rows have.
    """
    trained = [set(row) for label, row in found.items() if label != SEED_ROW]
    every, common = sorted(set.union(*trained)), sorted(set.intersection(*trained))
    values = {}
    for label, row in table.items():
        own = every if label == SEED_ROW else sorted(found[label])
        values[label] = {seed: {} for seed in own}
        for head, column in row.items():
            if head != "elo" and label == SEED_ROW:
                column = column * len(own)  # measured once
            for seed, value in zip(common if head == "elo" else own, column, strict=bool(column)):
                values[label][seed][head] = value
    return values


def with_interval(estimate: Estimate) -> str:
    """Estimate(12.345, 0.678, 3) -> "12.35 ± 0.68", and with a half width of 67.8 -> "12 ± 68"."""
    digits = places(estimate.half)
    mean = f"{estimate.mean:.{digits}f}"
    return mean if estimate.half is None else f"{mean} ± {estimate.half:.{digits}f}"


# --- One run: what it gained and what it cost ---


def first_and_last(run: Run) -> tuple[int, dict, dict] | None:
    """A run's evaluations: (step, of the seed model, of the checkpoint at that step, its newest), or None.

    ValueError in one line if the two were not measured alike.
    """
    steps = list(evaluations([run]))
    if not steps or "seed" not in run.evaluations:
        return None
    seed, trained = (run.evaluations[name] for name in ("seed", str(steps[-1])))
    check_alike([seed, trained], f"{run.name}: eval/seed.json and eval/{steps[-1]}.json")
    return steps[-1], seed, trained


def summarize_run(run: Run) -> dict | None:
    """What a run gained and what it cost, or None if it has not been evaluated."""
    found = first_and_last(run)
    if found is None:
        return None
    step, seed, trained = found
    if "accuracy" not in seed or "accuracy" not in trained:  # of --reward
        return None
    return {
        "command": run.config["command"],
        "sync_every": run.config["flags"]["sync_every"],
        "steps": step,
        "seed_accuracy": seed["accuracy"],
        "seed_standard_error": seed["standard_error"],
        "trained_accuracy": trained["accuracy"],
        "trained_standard_error": trained["standard_error"],
        "problems": trained["problems"],
        "n": trained["n"],
        "seconds": {
            **{phase: round(sum(row[f"{phase}_s"] for row in run.metrics), 1) for phase in PHASES},
            "evaluate": round(seed["seconds"] + trained["seconds"], 1),
        },
    }


def percent(value: float, error: float | None) -> str:
    """0.883, 0.005 -> "88.3 ± 0.5 %"; the error is None where there was a single sample."""
    return f"{100 * value:.1f} %" if error is None else f"{100 * value:.1f} ± {100 * error:.1f} %"


def print_summaries(summaries: dict[str, dict]) -> None:
    """One line a run: {label: summary}."""
    print(f"{'run':20} {'steps':>5} {'seed':>14} {'trained':>14}   seconds ({', '.join(PHASES)}, evaluate)")
    for label, row in summaries.items():
        seed, trained = (
            percent(row[f"{who}_accuracy"], row[f"{who}_standard_error"]) for who in ("seed", "trained")
        )
        seconds = ", ".join(f"{value:.0f}" for value in row["seconds"].values())
        print(f"{label:20} {row['steps']:5} {seed:>14} {trained:>14}   {seconds}")


def with_task(run: Run) -> list[dict]:
    """A run's metrics, where a run of one task has its `reward` under that task's name, too.

    So runs of one task and of both can be drawn on one axis: math_reward is 0 to 1, chat_reward is not.
    """
    if not run.config or "flags" not in run.config or "math_reward" in run.metrics[0]:
        return run.metrics
    data = run.config["flags"].get("data", "tiny")
    own = (
        "chat"
        if all(spec.startswith("chat=") for spec in ([data] if isinstance(data, str) else data))
        else "math"
    )
    other = {"chat": "math", "math": "chat"}[own]
    return [{**row, f"{own}_reward": row["reward"], f"{other}_reward": None} for row in run.metrics]


def curves_of(rows: dict[str, list[Run]], config: Config) -> dict[str, list[list[dict]]]:
    """The metrics to draw: {label: [metrics of each run]}. ValueError in one line if a run lacks a panel."""
    curves = {}
    for label, runs in rows.items():
        for run in runs:
            if run.metrics is None:  # a model that was only evaluated
                continue
            if not run.metrics:
                raise ValueError(f"--runs {run.name}: a run without a single step in its metrics.jsonl")
            metrics = with_task(run)
            missing = set(config.panels) - set(metrics[0])
            if missing:
                raise ValueError(f"--panels {' '.join(missing)}: not a metric of {label} (docs/metrics.md)")
            curves.setdefault(label, []).append(metrics[: config.until])
    return curves


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    with one_line_errors():
        other = dict(name.split("=", 1) for name in config.names)
        names = [other.get(Path(row).name, Path(row).name) for row in config.runs]
        labels = names if len(set(names)) == len(names) else config.runs
        paths = dict(zip(labels, map(Path, config.runs), strict=True))
        rows = {label: read_row(path) for label, path in paths.items()}
        curves = curves_of(rows, config)
        if config.paper and not (
            (config.table or config.chat_table) and paper.ROWS[config.paper].keys() & rows.keys()
        ):
            names = ", ".join(paper.ROWS[config.paper])
            raise ValueError(f"--paper {config.paper}: needs --table or --chat-table, and rows named {names}")
        if config.compare and not (config.table or config.chat_table or config.compare_metrics):
            raise ValueError("--compare: goes with --table, --chat-table or --compare-metrics")
        if config.compare_metrics and not config.compare:
            raise ValueError("--compare-metrics: goes with --compare, which names the rows")
        if bool(config.chat_table) != bool(config.chat_step):
            raise ValueError(
                "--chat-table: goes together with --chat-step, the step whose answers it compares"
            )
        if curves and not config.out and not Path(config.runs[0]).is_dir():
            raise ValueError(f"--out: name the figure; {config.runs[0]} is no folder to put it in")
        single = {label: path for label, path in paths.items() if (path / "config.json").exists()}
        reports = {label: summarize_run(rows[label][0]) for label in single}
        summaries = {label: summary for label, summary in reports.items() if summary}
        out = Path(config.out or Path(config.runs[0]) / "curves.png")
        for file in [out] * bool(curves) + [paths[label] / "report.json" for label in summaries]:
            if problem := why_not(file, folder=False):
                raise ValueError(f"{file}: {problem}")
        if summaries:
            print_summaries(summaries)
        if config.table:
            write_table(rows, config)
        if config.chat_table:
            write_chat_table(rows, config.chat_step, config.paper, Path(config.chat_table), config.compare)
        if config.compare_metrics:
            write_metric_differences(rows, config, out)
        if curves:
            out.parent.mkdir(parents=True, exist_ok=True)
            plot_curves(curves, config.panels, config.smooth, out)
            print(f"curves: {out}")
        for label, summary in summaries.items():
            write_json(paths[label] / "report.json", summary)


if __name__ == "__main__":
    main()
