"""Make one HTML file of a run, to read in a browser: curves, samples with their rewards, seconds by part.

    python tables/page.py runs/demo                          # writes runs/demo/page.html
    python tables/page.py runs/demo --out demo.html --samples 100

The file needs no network and no server. tables/page.html is its template; what a run holds stands in it as
JSON, and the template's script writes it as text, so that nothing a model wrote can act as HTML.

A run keeps a step's first responses, with their rewards but without the log-probs of their tokens: show.py
samples anew and prints those. The pair that DPO's loss drew, and GRPO's advantages, are computed here as the
train scripts do, for the prompts all of whose responses were kept.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only tables/ is there

from flags import Count, OutFile, one_line_errors, parse_flags, why_not  # noqa: E402

import torch  # noqa: E402

from data import Prompt  # noqa: E402
from metrics import glossary  # noqa: E402
from run import read_config, write_text  # noqa: E402
from tables.watch import measured, metrics_so_far, parts_of, run_first, whole_lines  # noqa: E402
from train_dpo import pair_up  # noqa: E402
from train_grpo import group_advantages  # noqa: E402

TEMPLATE = Path(__file__).with_suffix(".html")
CHARTS = [  # title, unit, keys, whether the axis is logarithmic
    ("Reward", "", ["reward", "true_reward", "math_reward", "chat_reward"], False),
    ("Staleness", "steps", ["staleness"], False),
    ("Entropy", "nats a token", ["entropy", "policy_entropy"], False),
    ("Response length", "tokens", ["length", "right_length", "wrong_length"], False),
    ("Loss", "", ["loss"], False),
    ("Gap between trainer and generator", "nats a token", ["logp_gap", "logp_gap_max"], True),
]


@dataclass
class Config:
    run: str = HfArg(help="The run's directory; without the flag's name if it comes first.")
    out: OutFile | None = HfArg(
        default=None, help="The HTML file. Default: page.html in the run's directory."
    )
    samples: Count = HfArg(default=40, help="Show the samples of so many steps, spread over the run.")


def meaning(key: str) -> str:
    """A metric's meaning in the glossary, as plain text."""
    return glossary().get(key, "").replace("`", "").replace("\\|", "|")


def spread(steps: list[int], count: int) -> list[int]:
    """At most so many of the steps, evenly spaced, the first and the last among them.

    >>> spread([0, 1, 2, 3, 4, 5, 6], 3)
    [0, 3, 6]
    """
    if len(steps) <= count or count == 1:
        return steps[-1:] if count == 1 else steps
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def groups_of(rows: list[dict], flags: dict, step: int) -> list[dict]:
    """A step's kept responses by prompt, with what each counted for where its whole group was kept.

    rows: the lines of rollouts/STEP.jsonl. A group has `pairs`, [[chosen, rejected], ...] as indices into its
    responses, if DPO made the run, and `advantages`, one a response, if GRPO did; None where a response
    of the group was not kept.
    """
    G, groups = flags["samples_per_prompt"], []
    for task in sorted({row["task"] for row in rows}):
        kept = [row for row in rows if row["task"] == task]
        for start in range(0, len(kept), G):
            responses = kept[start : start + G]
            group = {"task": task, "prompt": responses[0]["prompt"], "pairs": None, "advantages": None}
            group["responses"] = [
                {key: row[key] for key in ("response", "reward", "version", "finish_reason")}
                for row in responses
            ]
            groups.append(group)
            if len(responses) < G or len({row["prompt_id"] for row in responses}) > 1:
                continue
            rewards = [math.nan if row["reward"] is None else row["reward"] for row in responses]
            rewards = torch.tensor([rewards])  # (1, G)
            if "pairing" in flags:
                prompt = Prompt(id=responses[0]["prompt_id"], task=task, messages=[], answer=None)
                pairs = pair_up([prompt], rewards, flags["pairing"], f"pairs/{flags['seed']}/{step}")
                group["pairs"] = [[chosen, rejected] for _, chosen, rejected in pairs]
            elif "advantage_scale" in flags:
                group["advantages"] = group_advantages(rewards, flags["advantage_scale"])[0].tolist()
    return groups


def content(directory: Path, samples: int) -> dict:
    """What the page shows of a run. ValueError in one line if the directory holds none, or not a step yet."""
    metrics, config = metrics_so_far(directory), read_config(directory)
    if not metrics:
        raise ValueError(f"--run {directory}: a run without a single step in its metrics.jsonl")
    flags = config["flags"]
    charts = []
    for title, unit, keys, logarithmic in CHARTS:
        lines = {key: [row.get(key) for row in metrics] for key in keys}
        lines = {key: values for key, values in lines.items() if any(value is not None for value in values)}
        if lines:
            notes = {key: meaning(key) for key in lines}
            charts.append({"title": title, "unit": unit, "log": logarithmic, "lines": lines, "notes": notes})
    parts = [parts_of(row) for row in metrics]
    steps = [step for step in kept_steps(directory) if step <= metrics[-1]["step"]]
    shown = {
        step: groups_of(whole_lines(directory / "rollouts" / f"{step}.jsonl"), flags, step)
        for step in spread(steps, samples)
    }
    return {
        "name": directory.resolve().name,
        "command": config.get("command", ""),
        "started": config.get("started", ""),
        "of": flags.get("steps"),
        "tokens_per_s": metrics[-1].get("tokens_per_s"),
        "steps": [row["step"] for row in metrics],
        "charts": charts,
        "seconds": {label: [one[label] for one in parts] for label in parts[0]},
        "samples": [{"step": step, "groups": groups} for step, groups in shown.items() if groups],
        "evaluations": measured(directory),
        "flags": flags,
        "made": {key: config.get(key) for key in ("versions", "commit", "machine")},
    }


def kept_steps(directory: Path) -> list[int]:
    """The steps whose samples a run has kept, in order."""
    found = (path.stem for path in directory.glob("rollouts/*.jsonl"))
    return sorted(int(stem) for stem in found if stem.isdigit())


def html(run: dict) -> str:
    """The page of what content() returns. In a script a < could end it, so JSON's \\u003c stands for it."""
    text = json.dumps(run, allow_nan=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("RUN_AS_JSON", text)


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, run_first(args))
    with one_line_errors():
        directory = Path(config.run)
        out = Path(config.out or directory / "page.html")
        run = content(directory, config.samples)
        if problem := why_not(out, folder=False):
            raise ValueError(f"--out {out}: {problem}")
        write_text(out, html(run))
    print(f"page: {out}")


if __name__ == "__main__":
    main()
