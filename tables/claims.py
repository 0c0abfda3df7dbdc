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
from tables.intervals import Estimate, direction, places, signed, verdict  # noqa: E402
from tables.report import markdown  # noqa: E402

START, END = "<!-- claims: python tables/claims.py -->", "<!-- end of claims -->"
MARGIN = 0.01  # of accuracy: within it two rows are the same
POINTS = "accuracy"


@dataclass
class Claim:
    """What the paper (or a reviewer) says; where we measured it; what the claim expects of the difference.

    file: of results/, with its `difference` (of accuracies), or differences.json (of a metric). names: A:B.
    what: accuracy, or the metric. step: of the accuracies; the last if None. expects: better, worse, same,
    higher or lower, of A against B; "" where the paper claims no direction and only the number matters.
    """

    says: str
    file: str
    names: str
    expects: str
    what: str = POINTS
    step: str | None = None


def claim(
    says: str, table: str, names: str, expects: str, what: str = POINTS, step: str | None = None
) -> Claim:
    """A claim whose numbers are in a table.json; of a figure, in its differences.json."""
    file = "differences.json" if table.startswith(("figure", "stability")) else "table.json"
    return Claim(says, f"{table}/{file}", names, expects, what, step)


CLAIMS = [
    claim("Table 1: offline DPO is behind semi-online", "table1", "dpo-inf:dpo-10", "worse"),
    claim("the same at half the steps", "table1", "dpo-inf:dpo-10", "worse", step="100"),
    claim("Table 1: s = 10 is as good as online", "table1", "dpo-10:dpo-1", "same"),
    claim("the same at half the steps", "table1", "dpo-10:dpo-1", "same", step="100"),
    claim("the same at a quarter of the steps", "table1", "dpo-10:dpo-1", "same", step="50"),
    claim("Table 1: s = 100 is as good as s = 10", "earlier", "dpo-100:dpo-10", "same"),
    claim("Table 1: GRPO is as good as online DPO (which still rises)", "table1", "grpo:dpo-1", "same"),
    claim("the same after twice the steps", "earlier", "grpo:dpo-1", "same"),
    claim(
        "Table 2: offline is behind online in chat, by the learned reward",
        "table2",
        "dpo-inf:dpo-1",
        "lower",
        "reward",
    ),
    claim(
        "Table 2: s = 10 is as good as online, by the learned reward",
        "table2",
        "dpo-10:dpo-1",
        "same",
        "reward",
    ),
    claim(
        "Table 2: GRPO is behind online DPO in chat, by the learned reward",
        "table2",
        "grpo:dpo-1",
        "lower",
        "reward",
    ),
    claim("the same by Elo of the true reward", "table2", "grpo:dpo-1", "lower", "elo"),
    Claim(
        "s = 100, which the paper found too unstable in chat, against s = 10 (step 200)",
        "table2/long.json",
        "dpo-100:dpo-10",
        "",
        "reward",
    ),
    claim(
        "section 6: the reward model may be hacked, as ours was made to be (true reward of online DPO)",
        "table2",
        "dpo-1:seed",
        "lower",
        "true_reward",
    ),
    claim(
        "the same of answers at temperature 1, as in training (it falls from step 25 on)",
        "temperature",
        "dpo-1-at-1:seed",
        "lower",
        "true_reward",
    ),
    claim(
        "Table 3: trained on both, mathematics is below mathematics alone",
        "table3",
        "both:math",
        "lower",
        "accuracy",
    ),
    claim(
        "Table 3: trained on both, chat is below chat alone", "table3", "both:chat-only", "lower", "reward"
    ),
    claim(
        "reviewers: both tasks at s = 10 in one run, mathematics", "table3", "both-10:both", "", "accuracy"
    ),
    claim("reviewers: both tasks at s = 10 in one run, chat", "table3", "both-10:both", "", "reward"),
    claim(
        "reviewers: both tasks by GRPO in one run, mathematics", "table3", "both-grpo:both", "", "accuracy"
    ),
    claim("reviewers: both tasks by GRPO in one run, chat", "table3", "both-grpo:both", "", "reward"),
    claim("Table 5: groups of 4 are worse than groups of 8", "table5", "grpo-4:grpo", "worse"),
    claim("Table 5: groups of 12 are no better than groups of 8", "table5", "grpo-12:grpo", "same"),
    claim(
        "figure 2: with a fixed reference length collapses (here it grows with either)",
        "figure2",
        "fixed-reference:dpo-1",
        "",
        "length",
    ),
    claim(
        "figure 2: and the reward with it (here it rises with either)",
        "figure2",
        "fixed-reference:dpo-1",
        "",
        "reward",
    ),
    claim(
        "figure 2: the same at four times the learning rate (it grows)",
        "stability",
        "fast-fixed:dpo-1",
        "lower",
        "length",
    ),
    claim(
        "stability: GRPO by response length is less stable (nothing diverges; reward at the end)",
        "stability",
        "grpo-sequence:grpo",
        "",
        "reward",
    ),
    claim(
        "stability: a large Adam epsilon, reward at the end",
        "stability",
        "fast-fixed-eps:fast-fixed",
        "",
        "reward",
    ),
    claim(
        "figure 6: the paper's largest entropy bonus does not keep entropy stable",
        "figure6",
        "entropy-5e-4:dpo-1",
        "",
        "entropy",
    ),
    claim("figure 6: a bonus of 0.1 slows its fall", "figure6", "entropy-1e-1:dpo-1", "", "entropy"),
    claim("figure 6: at a cost in reward", "figure6", "entropy-1e-1:dpo-1", "", "reward"),
    claim(
        "figure 7: reference fixed, mathematics ends with less entropy than chat (it starts lower)",
        "figure7",
        "math-fixed:chat-only",
        "lower",
        "entropy",
    ),
    claim("figure 7: chat responses grow longer", "table2", "dpo-1:seed", "higher", "characters"),
    claim(
        "figure 8: GroupDPO's reward is that of a single pair", "figure8", "group-dpo:dpo-1", "same", "reward"
    ),
    claim("figure 8: at s = 10, by accuracy", "losses", "group-dpo-10:dpo-10", "same"),
    claim("figure 10: the NLL term does not help", "figure10", "nll-1:dpo-1", "", "reward"),
    claim(
        "reviewers: a larger model (135M, on a GPU), offline is behind",
        "gpu/table1",
        "dpo-inf:dpo-10",
        "worse",
    ),
    claim("reviewers: a larger model, s = 10 is as good as online", "gpu/table1", "dpo-10:dpo-1", "same"),
    claim("reviewers: another family, offline is behind", "families", "qwen-dpo-inf:qwen-dpo-1", "worse"),
    claim(
        "reviewers: another family, s = 10 is as good as online", "families", "qwen-dpo-10:qwen-dpo-1", "same"
    ),
    claim("reviewers: GRPO at s = 10 against fresh responses, clipped", "stale_grpo", "clip:grpo", ""),
    claim("reviewers: the same, uncorrected", "stale_grpo", "none:grpo", ""),
    claim(
        "reviewers: GRPO offline, uncorrected, against fresh responses", "corrections", "inf-none:grpo", ""
    ),
    claim("reviewers: the same, weighed by seq_tis", "corrections", "inf-seq_tis:grpo", ""),
    claim("does seq_tis help offline GRPO?", "corrections", "inf-seq_tis:inf-none", ""),
    claim("does dppo help offline GRPO?", "corrections", "inf-dppo:inf-none", ""),
    claim("why offline loses: syncing the reference alone gains", "controls", "ref-1:dpo-inf", ""),
    claim("and with it offline is still behind", "controls", "ref-1:dpo-10", ""),
    claim("a sync on drift, about as many as at s = 10", "adaptive", "drift-0.015:dpo-10", ""),
    claim("the gap where the seed model was taught 4 % good answers", "dose", "good-04-10:good-04-inf", ""),
    claim("the gap with 10 % good answers", "dose", "good-10-10:good-10-inf", ""),
    claim("the gap with 42 % good answers", "dose", "good-42-10:good-42-inf", ""),
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
    if claim.what in found:  # a metric, or a column of a table with chat
        row, where = found[claim.what], claim.what
    else:
        step = claim.step or max(found, key=int)
        row, where = found[step], f"step {step}"
    return Estimate(row["mean"], row["half"], row["seeds"]), where


def judge(claim: Claim, estimate: Estimate, where: str) -> str:
    """agrees, disagrees or cannot tell; for a claim of ours what the interval says. where: as find() says."""
    of_accuracy = where.startswith("step")  # a table with chat has no margin
    if of_accuracy and claim.expects == "same" and estimate.within(MARGIN):
        return "agrees"
    says = verdict(estimate, MARGIN) if of_accuracy else direction(estimate)
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
        of_step = where.startswith("step")
        digits = 1 if of_step or where == POINTS else places(estimate.half)
        number = signed(estimate, 100.0 if of_step else 1.0, digits)
        rows.append(
            [
                *cells,
                f"{number} ({where})",
                str(estimate.seeds),
                f"[{judge(claim, estimate, where)}]({folder}/README.md)",
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
