"""Draw runs: their metrics as curves, their evaluations as a table.

    python tables/report.py --runs runs/online runs/semi runs/offline --out curves.png

draws three runs over each other, and writes the report.json of each run that was evaluated.

    python tables/report.py --runs runs/table1/* --out curves.png --table table.md --paper table1

takes each folder as one row, whose runs differ in their seed. A curve is the mean over seeds, in a band from
the lowest to the highest. An accuracy is the mean and its standard error over seeds, beside the paper's.

A row is read from run directories, as above, or from an archive (tables/archive.py): results/table1/dpo-1
names the runs dpo-1/0, dpo-1/1 and dpo-1/2 in results/table1/runs.jsonl.gz.
"""

import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType
from typing import Literal

from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only tables/ is there

from flags import Count, OutFile, one_line_errors, parse_flags, why_not  # noqa: E402

from judge import bradley_terry  # noqa: E402
from run import write_json, write_text  # noqa: E402
from tables import archive, paper  # noqa: E402
from tables.archive import Run  # noqa: E402

TITLES = {
    "reward": "mean reward of the sampled responses",
    "true_reward": "true reward of the responses kept (tiny/chat.py)",
    "entropy": "next-token entropy of the sampler (nats)",
    "policy_entropy": "next-token entropy of the policy (nats)",
    "length": "response length (tokens)",
    "right_length": "length of right responses (tokens)",
    "wrong_length": "length of wrong responses (tokens)",
    "staleness": "staleness (steps)",
    "logp_gap": "|trainer - generator| (nats per token)",
    "margin": "margin of the pairs (nats)",
    "chosen_logp": "log-prob of chosen responses (nats)",
    "chosen_length": "length of chosen responses (tokens)",
    "rejected_length": "length of rejected responses (tokens)",
    "kl_ref": "KL to the reference, k3 estimate (nats)",
    "pair_frac": "share of prompts with unequal rewards",
    "ratio_max": "largest importance ratio of a token",
    "bound_frac": "share of tokens with a ratio out of bounds",
    "grad_norm": "norm of the gradient",
}
PANELS = ["reward", "entropy", "length", "staleness", "logp_gap"]
LOGARITHMIC = {"logp_gap", "kl_ref", "ratio_max"}
PHASES = ("generate", "score", "train", "sync")
SEED_ROW = "seed"  # the row of the model that the others were trained from

Accuracies = dict[str, dict[int, list[float]]]  # {label: {step: the accuracy of each of the row's runs}}


@dataclass
class Config:
    runs: list[str] = HfArg(
        help="Rows: run directories, folders of runs that differ in their seed, or rows of an archive."
    )
    out: OutFile | None = HfArg(
        default=None, help="The figure. Default: curves.png in the first row's run directory."
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


def evaluations(runs: list[Run]) -> dict[int, list[dict]]:
    """The evaluations of a row: {step: [evaluation of each of its runs]}."""
    found = {}
    for run in runs:
        for step, evaluation in run.evaluations.items():
            if step.isdigit():
                found.setdefault(int(step), []).append(evaluation)
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


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """The mean over training seeds and its standard error (deviation / sqrt(number), None for one seed)."""
    return fmean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


# --- Figures ---


def smoothed(metrics: list[dict], key: str, width: int) -> list[tuple[float, float]]:
    """The points (step, value) of a metric: the middle of each block of `width` steps, and its mean there.

    The middle is the same in every run, whichever steps have a value; a block without any has no point.
    """
    points = []
    for start in range(0, len(metrics), width):
        block = metrics[start : start + width]
        values = [row[key] for row in block if row[key] is not None]
        if values:
            points.append(((block[0]["step"] + block[-1]["step"]) / 2, fmean(values)))
    return points


def plot_curves(rows: dict[str, list[list[dict]]], panels: list[str], smooth: int, out: Path) -> None:
    """Draw metrics of several rows, {label: [metrics of each run]}, against the step.

    A row's line is the mean over its runs, in a band from the lowest to the highest.
    """
    plt = load_pyplot()
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4 * len(panels), 3.2), layout="constrained", squeeze=False
    )
    for axis, key in zip(axes[0], panels, strict=True):
        for label, runs in rows.items():
            values = {}  # step: its value in each run
            for metrics in runs:
                for step, value in smoothed(metrics, key, smooth):
                    values.setdefault(step, []).append(value)
            steps = sorted(values)
            few = len(steps) < len(runs[0]) / smooth  # measured at some steps only: show where
            means = [fmean(values[step]) for step in steps]
            (line,) = axis.plot(steps, means, label=label, linewidth=1.2, marker="." if few else None)
            if len(runs) > 1:
                low, high = ([pick(values[step]) for step in steps] for pick in (min, max))
                axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set(title=TITLES.get(key, key), xlabel="step")
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if key in LOGARITHMIC:
            axis.set_yscale("log")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def last_in_common(table: Accuracies) -> int:
    """The last step at which every row was evaluated, but for the seed model, whose only step is 0."""
    steps = [set(row) for row in table.values() if set(row) != {0}] or [{0}]
    common = set.intersection(*steps)
    if not common:
        raise ValueError(f"--table: no step at which all rows were evaluated: {[*map(sorted, steps)]}")
    return max(common)


def plot_table(table: Accuracies, beside: str | None, out: Path) -> None:
    """Draw the accuracies at the last step that all rows have: each training seed, mean and standard error.

    beside: the name of the paper's table to draw beside them, or None.
    """
    plt = load_pyplot()
    columns = paper.COLUMNS.get(beside, ())
    figure, axes = plt.subplots(
        1, 1 + len(columns), figsize=(3.6 * (1 + len(columns)), 3.2), layout="constrained", squeeze=False
    )
    labels, step = list(table), last_in_common(table)
    for x, row in enumerate(table.values()):
        values = [100 * value for value in row.get(step) or row[0]]
        center, error = mean_and_error(values)
        axes[0][0].errorbar(x, center, yerr=error, fmt="o", color="C0", capsize=4)
        axes[0][0].plot([x + 0.2] * len(values), values, ".", color="C0", alpha=0.5)
    axes[0][0].set_title(f"here, step {step}: mean, standard error, each seed", fontsize=9)
    for axis, column in zip(axes[0][1:], range(len(columns)), strict=True):
        for x, label in enumerate(labels):
            if label in paper.ROWS[beside]:
                center, error = paper.ROWS[beside][label][column]
                axis.errorbar(x, center, yerr=error, fmt="s", color="C1", capsize=4)
        axis.set_title(f"paper: {columns[column]}", fontsize=9)
    for axis in axes[0]:
        axis.set_xticks(range(len(labels)), labels, fontsize=8, rotation=30)
        axis.set_xlim(-0.5, len(labels) - 0.5)
        axis.set_ylabel("accuracy (%)")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def load_pyplot() -> ModuleType:
    """matplotlib.pyplot, for files only: no screen is needed. It is slow to import, so not on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


# --- Tables ---


def percent(value: float, error: float | None) -> str:
    """0.883, 0.005 -> "88.3 ± 0.5 %"; the error is None where there was a single sample."""
    return f"{100 * value:.1f} %" if error is None else f"{100 * value:.1f} ± {100 * error:.1f} %"


def table_lines(table: Accuracies, beside: str | None) -> list[str]:
    """The accuracies as lines of Markdown, beside one of the paper's tables."""
    steps = sorted({step for row in table.values() for step in row})
    heads = ["row", "training seeds", *(f"step {step}" for step in steps)]
    columns = paper.COLUMNS.get(beside, ())
    heads += [f"paper: {column}" for column in columns]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for label, row in table.items():
        cells = [percent(*mean_and_error(row[step])) if step in row else "" for step in steps]
        if beside:
            cells += [
                f"{value} ({error})" if error else f"{value}"
                for value, error in paper.ROWS[beside].get(label, [("", None)] * len(columns))
            ]
        runs = "-" if 0 in row else "/".join(map(str, sorted({len(values) for values in row.values()})))
        lines.append(f"| {label} | {runs} | {' | '.join(cells)} |")
    note = "Here: mean ± standard error over training seeds. A row without seeds, or with one, has no error."
    if beside:
        note += " The paper: one training seed; in brackets its standard error over 50 samples (see README)."
    return [*lines, "", note]


def write_table(rows: dict[str, list[Run]], beside: str | None, until: int | None, out: Path) -> None:
    """Write the accuracies of {label: runs} as Markdown, as JSON and as a figure; print them."""
    found = {
        label: {step: several for step, several in evaluations(runs).items() if step <= (until or step)}
        for label, runs in rows.items()
    }
    missing = [label for label, row in found.items() if not row]
    if missing:
        raise ValueError(f"--table: {', '.join(missing)} has no eval/STEP.json yet; evaluate it first")
    every = [e for row in found.values() for several in row.values() for e in several]
    check_alike(every, f"--table {out}")
    if any("accuracy" not in e for e in every):
        raise ValueError(f"--table {out}: an evaluation without accuracy; requests go to --chat-table")
    table = {
        label: {step: [e["accuracy"] for e in several] for step, several in row.items()}
        for label, row in found.items()
    }
    save_table(table_lines(table, beside), table, out)
    plot_table(table, beside, out.with_suffix(".png"))


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


def chat_columns(answers: dict[str, dict[str, list[dict]]]) -> dict[str, dict[str, list[float]]]:
    """The columns of a table, {label: {column: [a value for each training seed]}}, from each row's answers
    {label: {training seed: [dict, ...]}}.

    elo: by the true reward where it is known, else by the learned one, the runs of one training seed against
    each other; the seed model, which has no training seed, is in all of them.
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
            name: [fmean(row[key] for row in rows) for rows in seeds.values()]
            for name, key in columns.items()
        }
        for label, seeds in answers.items()
    }
    trained = {label: seeds for label, seeds in answers.items() if label != SEED_ROW}
    for seed in sorted(set.union(*map(set, trained.values()))):
        lacking = [label for label, seeds in trained.items() if seed not in seeds]
        if lacking:
            raise ValueError(
                f"--chat-table: {', '.join(lacking)} has no training seed {seed}, as others have"
            )
        group = {label: seeds[seed] for label, seeds in trained.items()}
        if SEED_ROW in answers:
            group[SEED_ROW] = next(iter(answers[SEED_ROW].values()))
        for label, rating in bradley_terry(battles_between(group, judged_by)).items():
            table[label].setdefault("elo", []).append(round(rating, 6))  # beyond that, machines differ
    return table


def write_chat_table(rows: dict[str, list[Run]], step: int, beside: str | None, out: Path) -> None:
    """Write chat_columns of {label: runs}, and accuracies, as Markdown and JSON, the paper's beside."""
    if len(rows) < 2:
        raise ValueError("--chat-table: compares rows, and --runs names only one")
    found = {label: read_chat(runs, step) for label, runs in rows.items()}
    check_alike([one for seeds in found.values() for one, _ in seeds.values()], f"--chat-table {out}")
    table = chat_columns(
        {label: {seed: answers for seed, (_, answers) in seeds.items()} for label, seeds in found.items()}
    )
    several = {label: evaluations(runs) for label, runs in rows.items()}
    several = {label: row.get(step) or row.get(0) or [] for label, row in several.items()}
    check_alike([one for row in several.values() for one in row], f"--chat-table {out}")
    table = {
        label: {"accuracy": [100 * one["accuracy"] for one in several[label]], **row}
        for label, row in table.items()
    }
    heads = list(next(iter(table.values())))
    named = [f"paper: {column}" for column in paper.COLUMNS.get(beside, ())]
    lines = [f"| {' | '.join(['row', *heads, *named])} |", "|" + "---|" * (1 + len(heads) + len(named))]
    for label, row in table.items():
        cells = [with_error(*mean_and_error(row[head])) if row[head] else "" for head in heads]
        if beside:
            cells += [str(value) for value, _ in paper.ROWS[beside].get(label, [("", None)] * len(named))]
        lines.append(f"| {' | '.join([label, *cells])} |")
    lines += ["", "Here: mean ± standard error over training seeds; accuracy in percent."]
    save_table(lines, table, out)


def with_error(value: float, error: float | None) -> str:
    """12.345, 0.678 -> "12.35 ± 0.68"."""
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"


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


def print_summaries(summaries: dict[str, dict]) -> None:
    """One line a run: {label: summary}."""
    print(f"{'run':20} {'steps':>5} {'seed':>14} {'trained':>14}   seconds ({', '.join(PHASES)}, evaluate)")
    for label, row in summaries.items():
        seed, trained = (
            percent(row[f"{who}_accuracy"], row[f"{who}_standard_error"]) for who in ("seed", "trained")
        )
        seconds = ", ".join(f"{value:.0f}" for value in row["seconds"].values())
        print(f"{label:20} {row['steps']:5} {seed:>14} {trained:>14}   {seconds}")


def curves_of(rows: dict[str, list[Run]], config: Config) -> dict[str, list[list[dict]]]:
    """The metrics to draw: {label: [metrics of each run]}. ValueError in one line if a run lacks a panel."""
    curves = {}
    for label, runs in rows.items():
        for run in runs:
            if run.metrics is None:  # a model that was only evaluated
                continue
            if not run.metrics:
                raise ValueError(f"--runs {run.name}: a run without a single step in its metrics.jsonl")
            missing = set(config.panels) - set(run.metrics[0])
            if missing:
                raise ValueError(f"--panels {' '.join(missing)}: not a metric of {label} (README lists them)")
            curves.setdefault(label, []).append(run.metrics[: config.until])
    return curves


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    with one_line_errors():
        names = [Path(row).name for row in config.runs]
        labels = names if len(set(names)) == len(names) else config.runs
        paths = dict(zip(labels, map(Path, config.runs), strict=True))
        rows = {label: read_row(path) for label, path in paths.items()}
        curves = curves_of(rows, config)
        if config.paper and not (
            (config.table or config.chat_table) and paper.ROWS[config.paper].keys() & rows.keys()
        ):
            names = ", ".join(paper.ROWS[config.paper])
            raise ValueError(f"--paper {config.paper}: needs --table or --chat-table, and rows named {names}")
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
            write_table(rows, config.paper, config.until, Path(config.table))
        if config.chat_table:
            write_chat_table(rows, config.chat_step, config.paper, Path(config.chat_table))
        if curves:
            out.parent.mkdir(parents=True, exist_ok=True)
            plot_curves(curves, config.panels, config.smooth, out)
            print(f"curves: {out}")
        for label, summary in summaries.items():
            write_json(paths[label] / "report.json", summary)


if __name__ == "__main__":
    main()
