"""Runs into figures and tables.

    python report.py --runs runs/online runs/semi runs/offline --out curves.png

draws the runs over each other, and adds to each run that was evaluated its report.json.

    python report.py --runs runs/table1/* --out curves.png --table table.md --paper table1

takes each folder of runs that differ in their seed as one row: a curve is the mean over seeds in a band from
the lowest to the highest, an accuracy the mean and its standard error over seeds, beside the paper's.
"""

import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

from transformers.hf_argparser import HfArg

from judge import bradley_terry
from run import (
    Count,
    one_line_errors,
    parse_flags,
    read_config,
    read_lines,
    read_metrics,
    write_json,
    write_text,
)

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

# The paper's tables: the number and, in brackets, what the paper calls its standard error.
PAPER_COLUMNS = {
    "table1": ("Math500", "NuminaMath", "AMC23"),
    "table2": ("AlpacaEval LC", "Arena-Hard"),
    "table3": ("Math500", "AMC23", "AlpacaEval LC", "Arena-Hard"),
    "table5": ("Math500", "NuminaMath", "AMC23"),
}
PAPER = {
    "table1": {
        "seed": ((47.4, 1.6), (33.9, 0.6), (23.7, 5.2)),
        "dpo-inf": ((53.7, 1.6), (36.4, 0.6), (28.8, 7.0)),
        "dpo-100": ((58.9, 1.2), (39.3, 0.4), (35.1, 5.3)),
        "dpo-10": ((57.2, 1.1), (39.4, 0.5), (31.4, 4.3)),
        "dpo-1": ((58.7, 1.2), (39.6, 0.5), (32.9, 5.2)),
        "grpo": ((58.1, 1.3), (38.8, 0.5), (33.6, 5.1)),
    },
    "table2": {
        "seed": ((27.3, 1.3), (21.3, None)),
        "dpo-inf": ((53.2, 1.5), (38.3, None)),
        "dpo-10": ((81.6, 1.0), (59.4, None)),
        "dpo-5": ((78.7, 1.2), (60.7, None)),
        "dpo-1": ((83.1, 1.0), (60.1, None)),
        "grpo": ((75.2, 1.2), (55.0, None)),
    },
    "table3": {
        "seed": ((47.4, None), (23.7, None), (20.9, None), (21.3, None)),
        "dpo-1": ((35.0, None), (15.0, None), (83.1, None), (60.1, None)),  # chat only, as in table2
        "math": ((58.7, None), (32.9, None), (31.4, None), (34.8, None)),
        "both": ((50.2, None), (22.3, None), (71.0, None), (57.7, None)),
        "chat-then-math": ((53.4, None), (25.3, None), (82.2, None), (69.0, None)),
    },
    "table5": {
        "grpo-4": ((55.7, None), (37.7, None), (30.6, None)),
        "grpo": ((58.1, None), (38.8, None), (33.6, None)),
        "grpo-12": ((57.6, None), (38.4, None), (32.2, None)),
    },
}


@dataclass
class Config:
    runs: list[str] = HfArg(help="Rows: run directories, or folders of runs that differ in their seed.")
    out: str | None = HfArg(default=None, help="The figure. Default: curves.png in the first row.")
    panels: list[str] = HfArg(default_factory=lambda: PANELS, help="The metrics to draw, one a panel.")
    smooth: Count = HfArg(default=1, help="Draw each point as the mean of so many steps.")
    until: Count | None = HfArg(default=None, help="Leave out what comes after so many steps.")
    table: str | None = HfArg(
        default=None, help="A Markdown file for the accuracies of all rows; beside it .json and .png."
    )
    chat_table: str | None = HfArg(
        default=None, help="A Markdown file for rewards, lengths and Elo of all rows; beside it .json."
    )
    chat_step: Count | None = HfArg(default=None, help="The step of --chat-table.")
    paper: Literal["table1", "table2", "table3", "table5"] | None = HfArg(
        default=None, help="Beside the table, the paper's; rows are found by their folders' names."
    )


# --- Rows: one run, or several that differ in their seed ---


def runs_of(row):
    """The run directories of a row; none if it only holds an evaluation, as the seed model's row does."""
    row = Path(row)
    if (row / "metrics.jsonl").exists():
        return [row]
    runs = sorted(path.parent for path in row.glob("*/metrics.jsonl"))
    if not runs and not (row / "eval").is_dir():
        read_metrics(row)  # raises: not a run directory
    return runs


def evaluations(row):
    """The evaluations of a row: {step: [evaluation of each of its runs]}."""
    found = {}
    for run in runs_of(row) or [Path(row)]:
        for path in (run / "eval").glob("*.json"):
            if path.stem.isdigit():
                found.setdefault(int(path.stem), []).append(json.loads(path.read_text()))
    return dict(sorted(found.items()))


def check_alike(evaluations, where):
    """ValueError in one line if evaluations that are to be compared were not measured alike."""
    for setting in ("data", "problems", "n", "temperature", "top_p", "max_new_tokens"):
        values = [evaluation[setting] for evaluation in evaluations]
        other = [value for value in values if value != values[0]]
        if other:
            raise ValueError(
                f"{where}: measured with another {setting} ({values[0]} and {other[0]}); evaluate all alike"
            )


def mean_and_error(values):
    """The mean over training seeds and its standard error (deviation / sqrt(number), None for one seed)."""
    return fmean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


# --- Figures ---


def smoothed(metrics, key, width):
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


def plot_curves(rows, panels, smooth, out):
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


def last_in_common(table):
    """The last step at which every row was evaluated, but for the seed model, whose only step is 0."""
    steps = [set(row) for row in table.values() if set(row) != {0}] or [{0}]
    common = set.intersection(*steps)
    if not common:
        raise ValueError(f"--table: no step at which all rows were evaluated: {[*map(sorted, steps)]}")
    return max(common)


def plot_table(table, paper, out):
    """Draw the last column that all rows have, a dot a training seed, mean and error; and the paper's.

    paper: the name of a table in PAPER, or None.
    """
    plt = load_pyplot()
    columns = PAPER_COLUMNS.get(paper, ())
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
            if label in PAPER[paper]:
                center, error = PAPER[paper][label][column]
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


def load_pyplot():
    """matplotlib.pyplot, for files only: no screen is needed. It is slow to import, so not on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


# --- Tables ---


def percent(value, error):
    """0.883, 0.005 -> "88.3 ± 0.5 %"; the error is None where there was a single sample."""
    return f"{100 * value:.1f} %" if error is None else f"{100 * value:.1f} ± {100 * error:.1f} %"


def table_lines(table, paper):
    """A table {label: {step: accuracies of the row's runs}} as lines of Markdown, beside the paper's."""
    steps = sorted({step for row in table.values() for step in row})
    heads = ["row", "training seeds", *(f"step {step}" for step in steps)]
    columns = PAPER_COLUMNS.get(paper, ())
    heads += [f"paper: {column}" for column in columns]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for label, row in table.items():
        cells = [percent(*mean_and_error(row[step])) if step in row else "" for step in steps]
        if paper:
            cells += [
                f"{value} ({error})" if error else f"{value}"
                for value, error in PAPER[paper].get(label, [("", None)] * len(columns))
            ]
        runs = "-" if 0 in row else "/".join(map(str, sorted({len(values) for values in row.values()})))
        lines.append(f"| {label} | {runs} | {' | '.join(cells)} |")
    note = "Here: mean ± standard error over training seeds. A row without seeds, or with one, has no error."
    if paper:
        note += " The paper: one training seed; in brackets its standard error over 50 samples (see README)."
    return [*lines, "", note]


def write_table(rows, paper, until, out):
    """Write the accuracies of {label: directory} as Markdown, as JSON and as a figure; print them."""
    found = {
        label: {step: several for step, several in evaluations(row).items() if step <= (until or step)}
        for label, row in rows.items()
    }
    missing = [label for label, row in found.items() if not row]
    if missing:
        raise ValueError(f"--table: {', '.join(missing)} has no eval/STEP.json yet; evaluate it first")
    check_alike([e for row in found.values() for several in row.values() for e in several], f"--table {out}")
    table = {
        label: {step: [e["accuracy"] for e in several] for step, several in row.items()}
        for label, row in found.items()
    }
    save_table(table_lines(table, paper), table, out)
    plot_table(table, paper, out.with_suffix(".png"))


def save_table(lines, table, out):
    """Write a table's lines of Markdown and, beside them, its numbers as JSON; print it."""
    write_text(out, "\n".join(lines) + "\n")
    write_json(out.with_suffix(".json"), table)
    print("\n".join(lines))


# --- Tables with chat: accuracy, rewards, lengths, and all rows against each other ---


def read_chat(row, step):
    """A row's (summary, answers) after `step` steps, of evaluate.py: {training seed: (dict, [dict, ...])}.

    The seed model's, which was not trained, are at step 0.
    """
    runs, found = runs_of(row), {}
    for run in runs or [Path(row)]:
        stem = run / "eval" / str(step if runs else 0)
        missing = [name for name in (f"{stem}.chat.json", f"{stem}.answers.jsonl") if not Path(name).exists()]
        if missing:
            raise ValueError(f"--chat-table: no {missing[0]}; evaluate with CHAT, as tables/run.sh says")
        summary = json.loads(Path(f"{stem}.chat.json").read_text())
        found["" if run == Path(row) else run.name] = summary, read_lines(f"{stem}.answers.jsonl")
    return found


def battles_between(answers, key):
    """Every two rows on every request, {label: answers} -> battles for judge.py; the higher `key` wins."""
    battles = []
    for a, b in combinations(answers, 2):
        if [row["id"] for row in answers[a]] != [row["id"] for row in answers[b]]:
            raise ValueError(f"--chat-table: {a} and {b} answer different requests; evaluate both alike")
        for one, other in zip(answers[a], answers[b], strict=True):
            winner = "tie" if one[key] == other[key] else "model_a" if one[key] > other[key] else "model_b"
            battles.append({"question_id": one["id"], "model_a": a, "model_b": b, "winner": winner})
    return battles


def chat_columns(answers):
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
            table[label].setdefault("elo", []).append(rating)
    return table


def write_chat_table(rows, step, paper, out):
    """Write chat_columns of {label: directory}, and accuracies, as Markdown and JSON, the paper's beside."""
    if len(rows) < 2:
        raise ValueError("--chat-table: compares rows, and --runs names only one")
    found = {label: read_chat(row, step) for label, row in rows.items()}
    check_alike([one for seeds in found.values() for one, _ in seeds.values()], f"--chat-table {out}")
    table = chat_columns(
        {label: {seed: answers for seed, (_, answers) in seeds.items()} for label, seeds in found.items()}
    )
    several = {label: evaluations(row) for label, row in rows.items()}
    several = {label: row.get(step) or row.get(0) or [] for label, row in several.items()}
    check_alike([one for row in several.values() for one in row], f"--chat-table {out}")
    table = {
        label: {"accuracy": [100 * one["accuracy"] for one in several[label]], **row}
        for label, row in table.items()
    }
    heads = list(next(iter(table.values())))
    named = [f"paper: {column}" for column in PAPER_COLUMNS.get(paper, ())]
    lines = [f"| {' | '.join(['row', *heads, *named])} |", "|" + "---|" * (1 + len(heads) + len(named))]
    for label, row in table.items():
        cells = [with_error(*mean_and_error(row[head])) if row[head] else "" for head in heads]
        if paper:
            cells += [str(value) for value, _ in PAPER[paper].get(label, [("", None)] * len(named))]
        lines.append(f"| {' | '.join([label, *cells])} |")
    lines += ["", "Here: mean ± standard error over training seeds; accuracy in percent."]
    save_table(lines, table, out)


def with_error(value, error):
    """12.345, 0.678 -> "12.35 ± 0.68"."""
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"


# --- One run: what it gained and what it cost ---


def read_evals(directory):
    """A run's evaluations: (step, of the seed model, of the checkpoint at that step, its newest), or None.

    ValueError in one line if the two were not measured alike.
    """
    folder = Path(directory) / "eval"
    steps = [int(path.stem) for path in folder.glob("*.json") if path.stem.isdigit()]
    if not steps or not (folder / "seed.json").exists():
        return None
    seed, trained = (json.loads((folder / f"{name}.json").read_text()) for name in ("seed", max(steps)))
    check_alike([seed, trained], f"{folder}: seed.json and {max(steps)}.json")
    return max(steps), seed, trained


def summarize_run(directory):
    """What a run gained and what it cost, or None if it has not been evaluated."""
    evals = read_evals(directory)
    if evals is None:
        return None
    steps, seed, trained = evals
    config, metrics = read_config(directory), read_metrics(directory)
    return {
        "command": config["command"],
        "sync_every": config["flags"]["sync_every"],
        "steps": steps,
        "seed_accuracy": seed["accuracy"],
        "seed_standard_error": seed["standard_error"],
        "trained_accuracy": trained["accuracy"],
        "trained_standard_error": trained["standard_error"],
        "problems": trained["problems"],
        "n": trained["n"],
        "seconds": {
            **{phase: round(sum(row[f"{phase}_s"] for row in metrics), 1) for phase in PHASES},
            "evaluate": round(seed["seconds"] + trained["seconds"], 1),
        },
    }


def print_summaries(summaries):
    """One line a run: {label: summary}."""
    print(f"{'run':20} {'steps':>5} {'seed':>14} {'trained':>14}   seconds ({', '.join(PHASES)}, evaluate)")
    for label, row in summaries.items():
        seed, trained = (
            percent(row[f"{who}_accuracy"], row[f"{who}_standard_error"]) for who in ("seed", "trained")
        )
        seconds = ", ".join(f"{value:.0f}" for value in row["seconds"].values())
        print(f"{label:20} {row['steps']:5} {seed:>14} {trained:>14}   {seconds}")


def main(args=None):
    config = parse_flags(Config, args)
    with one_line_errors():
        names = [Path(row).name for row in config.runs]
        labels = names if len(set(names)) == len(names) else config.runs
        rows = dict(zip(labels, config.runs, strict=True))
        curves = {
            label: [read_metrics(run)[: config.until] for run in runs_of(row)] for label, row in rows.items()
        }
        curves = {label: runs for label, runs in curves.items() if runs}
        for label, metrics in ((label, metrics) for label, runs in curves.items() for metrics in runs):
            if not metrics:
                raise ValueError(f"--runs {rows[label]}: a run without a single step in its metrics.jsonl")
            missing = set(config.panels) - set(metrics[0])
            if missing:
                raise ValueError(f"--panels {' '.join(missing)}: not a metric of {label} (README lists them)")
        asked = config.table or config.chat_table
        if config.paper and not (asked and PAPER[config.paper].keys() & rows.keys()):
            names = ", ".join(PAPER[config.paper])
            raise ValueError(f"--paper {config.paper}: needs --table or --chat-table, and rows named {names}")
        if bool(config.chat_table) != bool(config.chat_step):
            raise ValueError(
                "--chat-table: goes together with --chat-step, the step whose answers it compares"
            )
        single = {label: row for label, row in rows.items() if (Path(row) / "config.json").exists()}
        reports = {label: summarize_run(row) for label, row in single.items()}
        if config.table:
            write_table(rows, config.paper, config.until, Path(config.table))
        if config.chat_table:
            write_chat_table(rows, config.chat_step, config.paper, Path(config.chat_table))
    if curves:
        out = Path(config.out or Path(config.runs[0]) / "curves.png")
        out.parent.mkdir(parents=True, exist_ok=True)
        plot_curves(curves, config.panels, config.smooth, out)
        print(f"curves: {out}")
    summaries = {label: summary for label, summary in reports.items() if summary}
    for label, summary in summaries.items():
        write_json(Path(rows[label]) / "report.json", summary)
    if summaries:
        print_summaries(summaries)


if __name__ == "__main__":
    main()
