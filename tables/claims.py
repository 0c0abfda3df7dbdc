"""The paper's claims beside what our runs say: the table of results/README.md, made from the tables' numbers.

    python tables/claims.py        # rewrites the table between the two marks of results/README.md

A claim is a difference of two rows. Its interval decides: agrees, disagrees, or cannot tell.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as a script, only tables/ is there

from flags import OutFile, one_line_errors, parse_flags  # noqa: E402

from run import write_text  # noqa: E402
from tables.figures import row_name  # noqa: E402
from tables.intervals import Estimate, signed, verdict  # noqa: E402
from tables.report import markdown  # noqa: E402

START, END = "<!-- claims: python tables/claims.py -->", "<!-- end of claims -->"
MARGIN = 0.01  # of accuracy: within it two rows are the same
POINTS = "accuracy"


@dataclass
class Claim:
    """What the paper (or a reviewer) says; where we measured it; what the claim expects of the difference.

    file: of results/, with its `difference` (of accuracies), or differences.json (of a metric). names: A:B.
    what: accuracy, or the metric. step: of the accuracies; the last if None. expects: better, worse, same,
    higher or lower, of A against B; "" where the claim is ours and only the number matters.
    """

    says: str
    file: str
    names: str
    expects: str
    what: str = POINTS
    step: str | None = None


CLAIMS = [
    Claim(
        "Table 1: offline DPO is behind semi-online (s = 10)", "table1/table.json", "dpo-inf:dpo-10", "worse"
    ),
    Claim("Table 1: s = 10 is as good as online", "table1/table.json", "dpo-10:dpo-1", "same"),
    Claim("Table 1: GRPO is as good as online DPO", "table1/table.json", "grpo:dpo-1", "same"),
    Claim("Table 1: s = 100 is as good as s = 10", "earlier/table.json", "dpo-100:dpo-10", "same"),
    Claim(
        "another family (Qwen3): offline is behind",
        "families/table.json",
        "qwen-dpo-inf:qwen-dpo-10",
        "worse",
    ),
    Claim(
        "another family: s = 10 is as good as online", "families/table.json", "qwen-dpo-10:qwen-dpo-1", "same"
    ),
    Claim("Table 5: groups of 12 are no better than 8", "table5/table.json", "grpo-12:grpo", "same"),
    Claim("Table 5: groups of 4 are worse than 8", "table5/table.json", "grpo-4:grpo", "worse"),
    Claim("reviewers: GRPO at s = 10, uncorrected", "stale_grpo/table.json", "none:grpo", ""),
    Claim("reviewers: GRPO at s = 10, clipped", "stale_grpo/table.json", "clip:grpo", ""),
]


def find(claim: Claim, results: Path) -> tuple[Estimate, str] | None:
    """The difference that a claim is about, and the step of an accuracy. None if it was not measured."""
    path = results / claim.file
    if not path.exists():
        return None
    numbers = json.loads(path.read_text(encoding="utf-8"))
    found = numbers.get("difference", numbers).get(claim.names)
    if found is None:
        return None
    if claim.what == POINTS:
        step = claim.step or max(found, key=int)
        return Estimate(found[step]["mean"], found[step]["half"], found[step]["seeds"]), f"step {step}"
    row = found[claim.what]
    return Estimate(row["mean"], row["half"], row["seeds"]), claim.what


def judge(claim: Claim, estimate: Estimate) -> str:
    """agrees, disagrees or cannot tell; for a claim of ours what the interval says."""
    says = verdict(estimate, MARGIN if claim.what == POINTS else 0.0)
    says = says if claim.what == POINTS else {"better": "higher", "worse": "lower"}.get(says, says)
    if says == "cannot tell" or not claim.expects:
        return says
    return "agrees" if says == claim.expects else f"disagrees: {says}"


def table(results: Path) -> str:
    """All claims as a table of Markdown."""
    rows = []
    for claim in CLAIMS:
        folder = claim.file.partition("/")[0]
        a, b = (row_name(label)[0] for label in claim.names.split(":"))
        found = find(claim, results)
        cells = [claim.says, f"{a} less {b}"]
        if found is None:
            rows.append([*cells, "", "", f"not run: `tables/{folder}.sh`"])
            continue
        estimate, where = found
        number = signed(estimate) if claim.what == POINTS else signed(estimate, 1.0)
        rows.append(
            [
                *cells,
                f"{number} ({where})",
                str(estimate.seeds),
                f"[{judge(claim, estimate)}]({folder}/README.md)",
            ]
        )
    return "\n".join(markdown(["claim", "measured", "difference, 95 % interval", "seeds", "verdict"], rows))


@dataclass
class Config:
    out: OutFile = HfArg(default="results/README.md", help="The page whose table is made anew.")


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    with one_line_errors():
        page = Path(config.out).read_text(encoding="utf-8")
        before, mark, rest = page.partition(START)
        _, end, after = rest.partition(END)
        if not mark or not end:
            raise ValueError(f"--out {config.out}: has no {START} ... {END}")
        write_text(Path(config.out), f"{before}{START}\n\n{table(ROOT / 'results')}\n\n{END}{after}")


if __name__ == "__main__":
    main()
