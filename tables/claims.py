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


@dataclass
class Claim:
    """What the paper (or a reviewer) says; where we measured it; what the claim expects of the difference.

    table: a folder of results/. names: A:B. expects: better, worse, same, higher or lower, of A against B; ""
    where the difference does not decide the claim, and only the number matters. what: accuracy, or a metric.
    step: of the accuracies; the last if None. file: with the `difference`.
    """

    says: str
    table: str
    names: str
    expects: str
    what: str = "accuracy"
    step: str | None = None
    file: str = "table.json"


CURVES = "differences.json"  # of the ends of a figure's curves

# fmt: off
CLAIMS = [
    # Mathematics over the dial
    Claim("Table 1: offline DPO is behind s = 10", "table1", "dpo-inf:dpo-10", "worse"),
    Claim("Table 1 after 100 steps: offline DPO is behind s = 10",
          "table1", "dpo-inf:dpo-10", "worse", step="100"),
    Claim("Table 1: s = 10 is as good as online DPO", "table1", "dpo-10:dpo-1", "same"),
    Claim("Table 1 after 100 steps: s = 10 is as good as online DPO",
          "table1", "dpo-10:dpo-1", "same", step="100"),
    Claim("Table 1 after 50 steps: s = 10 is as good as online DPO",
          "table1", "dpo-10:dpo-1", "same", step="50"),
    Claim("Table 1, earlier model: s = 100 is as good as s = 10", "earlier", "dpo-100:dpo-10", "same"),
    Claim("Table 1, 100 steps each, GRPO at four times DPO's learning rate: GRPO against online DPO",
          "table1", "grpo:dpo-1", ""),
    Claim("Table 1, 100 steps each at one learning rate, 2e-4: GRPO is as good as online DPO",
          "stability", "grpo:fast", "same"),
    Claim("Table 1, earlier model, 200 steps each: GRPO (at four times the rate) is as good as online DPO",
          "earlier", "grpo:dpo-1", "same"),
    Claim("reviewers: a larger model (135M, on a GPU): offline is behind s = 10",
          "gpu/table1", "dpo-inf:dpo-10", "worse"),
    Claim("reviewers: a larger model: s = 10 is as good as online", "gpu/table1", "dpo-10:dpo-1", "same"),
    Claim("reviewers: another family: offline is behind online",
          "families", "qwen-dpo-inf:qwen-dpo-1", "worse"),
    Claim("reviewers: another family: s = 10 is as good as online",
          "families", "qwen-dpo-10:qwen-dpo-1", "same"),
    Claim("reviewers: another family, 100 steps each, GRPO at four times the learning rate: GRPO "
          "against online DPO",
          "families", "qwen-grpo:qwen-dpo-1", ""),

    # Chat over the dial
    Claim("Table 2: offline DPO is ahead of the seed model in chat",
          "table2", "dpo-inf:seed", "higher", "reward"),
    Claim("Table 2: offline DPO is behind online DPO in chat", "table2", "dpo-inf:dpo-1", "lower", "reward"),
    Claim("Table 2: s = 10 against online DPO in chat (the paper: as good)",
          "table2", "dpo-10:dpo-1", "", "reward"),
    Claim("Table 2: s = 5 against online DPO in chat (the paper: as good)",
          "table2", "dpo-5:dpo-1", "", "reward"),
    Claim("chat, 200 steps: s = 100 against s = 10 (the paper: too unstable; here one run of five is astray)",
          "table2", "dpo-100:dpo-10", "", "reward", file="long.json"),
    Claim("Table 2: GRPO against online DPO in chat by the learned reward (the paper, by judges: "
          "behind)",
          "table2", "grpo:dpo-1", "", "reward"),
    Claim("Table 2: GRPO is behind online DPO in chat, by the true reward",
          "table2", "grpo:dpo-1", "lower", "true_reward"),
    Claim("Table 2: GRPO is behind online DPO in chat, by Elo of the true reward",
          "table2", "grpo:dpo-1", "lower", "elo"),
    Claim("chat: the true reward after online DPO (our reward model was made to be hacked)",
          "table2", "dpo-1:seed", "", "true_reward"),
    Claim("chat, answers at temperature 1, as in training: the true reward after online DPO",
          "temperature", "dpo-1-at-1:seed", "", "true_reward"),
    Claim("chat, answers at temperature 1: its change from step 25 to 100",
          "temperature", "dpo-1-at-1:first", "", "true_reward"),
    Claim("figure 7: chat responses grow longer (test answers)",
          "table2", "dpo-1:seed", "higher", "characters"),

    # Both tasks
    Claim("Table 3: chat alone hurts mathematics (of which the seed model has 8.5 %)",
          "table3", "chat-only:seed", "lower"),
    Claim("Table 3: mathematics alone helps chat a little", "table3", "math:seed", "higher", "reward"),
    Claim("Table 3: one run on both tasks beats the seed model in mathematics",
          "table3", "both:seed", "higher"),
    Claim("Table 3: one run on both tasks beats the seed model in chat, by the learned reward",
          "table3", "both:seed", "higher", "reward"),
    Claim("Table 3: the same run's true reward against the seed model's",
          "table3", "both:seed", "", "true_reward"),
    Claim("Table 3: it is below mathematics alone in mathematics (also half the prompts, another rate "
          "and reference)",
          "table3", "both:math", "lower"),
    Claim("Table 3: it is below chat alone in chat (also half the prompts)",
          "table3", "both:chat-only", "lower", "reward"),
    Claim("Table 3: mathematics after chat is below mathematics alone (also 200 steps in all, not 100)",
          "table3", "chat-then-math:math", "lower"),
    Claim("Table 3: mathematics after chat against chat alone, in chat (the paper: as good)",
          "table3", "chat-then-math:chat-only", "", "reward"),
    Claim("reviewers: both tasks at s = 10 in one run, mathematics", "table3", "both-10:both", ""),
    Claim("reviewers: both tasks at s = 10 in one run, chat", "table3", "both-10:both", "", "reward"),
    Claim("reviewers: both tasks by GRPO in one run, mathematics", "table3", "both-grpo:both", ""),
    Claim("reviewers: both tasks by GRPO in one run, chat", "table3", "both-grpo:both", "", "reward"),

    # Groups, stability, entropy, what is added to the loss
    Claim("Table 5, earlier model: groups of 4 are worse than groups of 8", "table5", "grpo-4:grpo", "worse"),
    Claim("Table 5, earlier model: groups of 12 are as good as groups of 8",
          "table5", "grpo-12:grpo", "same"),
    Claim("figure 2: length with a fixed reference against a synced one (the paper: it "
          "collapses; here it grows with either)",
          "figure2", "fixed-reference:dpo-1", "", "length", file=CURVES),
    Claim("figure 2: reward with a fixed reference against a synced one (the paper: it "
          "falls; here it rises with either)",
          "figure2", "fixed-reference:dpo-1", "", "reward", file=CURVES),
    Claim("figure 2 at four times the learning rate: length, reference fixed against synced",
          "stability", "fast-fixed:fast", "", "length", file=CURVES),
    Claim("figure 2 at four times the learning rate: reward, reference fixed against synced",
          "stability", "fast-fixed:fast", "", "reward", file=CURVES),
    Claim("stability: reward of GRPO by response length against by a constant (the paper: less stable; "
          "here nothing diverges)",
          "stability", "grpo-sequence:grpo", "", "reward", file=CURVES),
    Claim("stability: GRPO by response length favours short responses",
          "stability", "grpo-sequence:grpo", "lower", "length", file=CURVES),
    Claim("stability: reward at the end with Adam's epsilon 1e-4 against 1e-8 (at first it slows learning)",
          "stability", "fast-fixed-eps:fast-fixed", "", "reward", file=CURVES),
    Claim("figure 3: online, the samples' entropy falls below offline's",
          "figure3", "dpo-1:dpo-inf", "lower", "entropy", file=CURVES),
    Claim("figure 3: length online against offline (the paper: stable)",
          "figure3", "dpo-1:dpo-inf", "", "length", file=CURVES),
    Claim("figure 6 at s = 10: entropy with the paper's largest bonus, 5e-4, against none",
          "losses", "entropy-5e-4-10:dpo-10", "", "entropy", file=CURVES),
    Claim("figure 6 at s = 10: entropy with a bonus of 0.1 against none",
          "losses", "entropy-1e-1-10:dpo-10", "", "entropy", file=CURVES),
    Claim("figure 6 at s = 10: accuracy with a bonus of 0.1 against none",
          "losses", "entropy-1e-1-10:dpo-10", ""),
    Claim("figure 7, reference fixed: mathematics keeps less of its entropy than chat (at half its rate)",
          "figure7", "math-fixed:chat-only", "lower", "entropy/first", file=CURVES),
    Claim("figure 8, earlier model, online: GroupDPO's reward against a single pair's (the paper: as "
          "good)",
          "figure8", "group-dpo:dpo-1", "", "reward", file=CURVES),
    Claim("figure 8 at s = 10, after 50 steps: GroupDPO is as accurate as a single pair",
          "losses", "group-dpo-10:dpo-10", "same", step="50"),
    Claim("figure 8 at s = 10, after 100 steps: GroupDPO is as accurate as a single pair",
          "losses", "group-dpo-10:dpo-10", "same"),
    Claim("figure 8 at s = 10: GRPO's loss added to GroupDPO changes nothing",
          "losses", "group-dpo-grpo-10:group-dpo-10", "same"),
    Claim("figure 8 at s = 10: entropy with GroupDPO against a single pair (the paper: alike)",
          "losses", "group-dpo-10:dpo-10", "", "entropy", file=CURVES),
    Claim("figure 9 at the first checkpoint, step 25: right answers are shorter than wrong ones",
          "figure9", "right:wrong", "lower", "characters", file="lengths.json"),
    Claim("figure 10, earlier model, online: reward with the NLL term per token (the paper: it does not"
          " help)",
          "figure10", "nll-1:dpo-1", "", "reward", file=CURVES),
    Claim("figure 10 at s = 10: the NLL term per token changes nothing", "losses", "nll-10:dpo-10", "same"),
    Claim("figure 10 at s = 10: entropy with the NLL term (the paper: alike)",
          "losses", "nll-10:dpo-10", "", "entropy", file=CURVES),

    # What the reviewers asked, and what we did
    Claim("reviewers: GRPO at s = 10, clipped, against fresh responses (earlier model)",
          "stale_grpo", "clip:grpo", ""),
    Claim("reviewers: GRPO at s = 10, uncorrected, against fresh responses (earlier model)",
          "stale_grpo", "none:grpo", ""),
    Claim("reviewers: GRPO offline, uncorrected, against fresh responses",
          "corrections", "inf-none:grpo", ""),
    Claim("reviewers: GRPO offline, weighed by seq_tis, against fresh responses",
          "corrections", "inf-seq_tis:grpo", ""),
    Claim("does seq_tis help offline GRPO?", "corrections", "inf-seq_tis:inf-none", ""),
    Claim("does dppo help offline GRPO?", "corrections", "inf-dppo:inf-none", ""),
    Claim("why offline DPO loses: a reference that is synced, alone", "controls", "ref-1:dpo-inf", ""),
    Claim("why offline DPO loses: what is missing to online with it", "controls", "ref-1:dpo-1", ""),
    Claim("a sync on drift, about as many as at s = 10, against s = 10",
          "adaptive", "drift-0.015:dpo-10", ""),
    Claim("offline's gap where the seed model was taught 4 % good answers",
          "dose", "good-04-inf:good-04-10", ""),
    Claim("offline's gap with 10 % good answers", "dose", "good-10-inf:good-10-10", ""),
    Claim("offline's gap with 42 % good answers", "dose", "good-42-inf:good-42-10", ""),
]
# fmt: on


def find(claim: Claim, results: Path) -> tuple[Estimate, str] | None:
    """The difference that a claim is about, and the step of an accuracy. None if it was not measured."""
    path = results / claim.table / claim.file
    if not path.exists():
        return None
    numbers = json.loads(path.read_text(encoding="utf-8"))
    found = numbers.get("difference", numbers).get(claim.names)
    if found is None:
        return None
    if claim.what in found:  # a metric, or a column of a table with chat
        row, where = found[claim.what], claim.what
    else:
        step = claim.step or max((step for step in found if step.isdigit()), key=int, default=None)
        if step not in found:
            return None
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
        folder = claim.table.partition("/")[0]
        a, b = (row_name(label)[0] for label in claim.names.split(":"))
        found = find(claim, results)
        cells = [claim.says, f"{a} less {b}"]
        if found is None:
            rows.append([*cells, "", "", f"[not run]({folder}/README.md)"])
            continue
        estimate, where = found
        of_step = where.startswith("step")
        digits = 1 if of_step or where == "accuracy" else places(estimate.half)
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
