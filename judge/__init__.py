"""Compare models' answers: an LLM judge's verdicts, turned into win rates or ratings.

`python -m judge --help` describes the command. The methods are those of alpaca_eval 0.6.6 (Dubois et al.
2024, arXiv 2404.04475) and of arena-hard-auto v0.1 (Li et al. 2024, arXiv 2406.11939). What differs:

1. Every question is asked in both orders, as in Arena-Hard, because judges favour a position. AlpacaEval asks
   once, in a random order; here its preference is the mean of the two.
2. AlpacaEval regularises its fit with data outside its repository: see length_controlled_winrate.
3. Arena-Hard asks on when a reply holds no verdict. Here that reply is recorded, counted and left out. So is
   one that was cut off. Reasoning in <think> is not read; both benchmarks are older than judges that reason.
"""

from importlib import import_module
from typing import Any

from judge.prompts import (
    ALPACA_EVAL_PROMPT,
    ALPACA_EVAL_SYSTEM,
    ARENA_HARD_PROMPT,
    ARENA_HARD_SYSTEM,
    LABELS,
    ONE_TOKEN,
    STYLES,
    Style,
    read_label,
    read_preference,
)
from judge.winrates import (
    Battles,
    arena_hard_score,
    bradley_terry,
    bradley_terry_intervals,
    fit_logistic,
    length_controlled_winrate,
    sigmoid,
    winrate,
)

# Names imported at first use. Their modules need transformers, which the statistics do not; and `python -m
# judge.answers` warns if importing the package has already imported that module.
LATER = {
    "load_answers": "judge.answers",
    "read_answers": "judge.answers",
    "KEY": "judge.verdicts",
    "ask_about": "judge.verdicts",
    "connect": "judge.verdicts",
    "read_judgments": "judge.verdicts",
    "to_battles": "judge.verdicts",
    "to_preferences": "judge.verdicts",
}

__all__ = [
    "ALPACA_EVAL_PROMPT",
    "ALPACA_EVAL_SYSTEM",
    "ARENA_HARD_PROMPT",
    "ARENA_HARD_SYSTEM",
    "Battles",
    "LABELS",
    "ONE_TOKEN",
    "STYLES",
    "Style",
    "arena_hard_score",
    "bradley_terry",
    "bradley_terry_intervals",
    "fit_logistic",
    "length_controlled_winrate",
    "read_label",
    "read_preference",
    "sigmoid",
    "winrate",
    *LATER,
]


def __getattr__(name: str) -> Any:
    """Import one of LATER from its module (PEP 562)."""
    if name in LATER:
        return getattr(import_module(LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
