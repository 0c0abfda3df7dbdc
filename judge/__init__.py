"""Compare models' answers: an LLM judge's verdicts, turned into win rates or ratings.

`python -m judge --help` describes the command. The methods are those of alpaca_eval 0.6.6 (Dubois et al.
2024, arXiv 2404.04475) and of arena-hard-auto v0.1 (Li et al. 2024, arXiv 2406.11939). What differs:

1. Every question is asked in both orders, as in Arena-Hard, because judges favour a position. AlpacaEval asks
   once, in a random order; here its preference is the mean of the two.
2. AlpacaEval regularises its fit with data outside its repository: see length_controlled_winrate.
3. Arena-Hard asks on when a reply holds no verdict. Here that reply is recorded, counted and left out. So is
   one that was cut off. Reasoning in <think> is not read; both benchmarks are older than judges that reason.
"""

from judge.winrates import arena_hard_score, bradley_terry, length_controlled_winrate

__all__ = ["arena_hard_score", "bradley_terry", "length_controlled_winrate"]
