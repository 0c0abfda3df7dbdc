"""The reward of a math answer, for a worker (program.py) and for Python.

Of the project it imports only as_meant.py, and no torch: a worker starts in a second and stays small.
"""

import logging
import os
import sys
from collections.abc import Callable
from functools import cache, lru_cache

if __name__ == "grader.grade":
    from grader.as_meant import as_meant, boxed_as_meant
else:  # in a worker, whose path lacks our folders; appended last, this one hides no library
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    from as_meant import as_meant, boxed_as_meant

# Math-Verify's regular expressions can take time cubic in the length, so only the end of a response is
# graded: the prompt asks for the answer last. The paper's limit, 2048 tokens, is about 7,000 characters.
MAX_CHARS = 8192


@cache
def _targets():
    """Math-Verify's settings, as in the paper: what to extract from a gold, and what from a response."""
    from math_verify import LatexExtractionConfig  # slow, it imports sympy: only processes that grade do so
    from math_verify.parser import NormalizationConfig

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off
    gold = NormalizationConfig(
        basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    return [LatexExtractionConfig(normalization_config=gold)], [LatexExtractionConfig(boxed_match_priority=0)]


@lru_cache(maxsize=4096)  # all responses of a group share one gold
def _parse_gold(gold, strict=False):
    """Parse a gold answer with Math-Verify; [] if it finds nothing. A gold without $...$ gets them."""
    from math_verify import parse

    # A line break is a space in LaTeX, but Math-Verify would end the $...$ there.
    text = " ".join((gold if strict else as_meant(gold)).split())
    return parse(text if text.startswith("$") else f"${text}$", _targets()[0], parsing_timeout=None)


def _grade(response, gold, strict=False):
    """Return the reward, and whether Math-Verify extracted anything from the response."""
    from math_verify import parse, verify

    response = response[-MAX_CHARS:]
    answer = response if strict else boxed_as_meant(response)
    prediction = parse(answer, _targets()[1], parsing_timeout=None)
    # verify() is not symmetric: the gold comes first. float_rounding is the paper's "precision 6".
    right = verify(_parse_gold(gold, strict), prediction, float_rounding=6, timeout_seconds=None)
    return float(right), bool(prediction)


def _usable(gold, strict=False):
    """Whether a response that states the gold earns 1.0. A broken `\\frac{` also parses, but only as text."""
    return _grade(f"$\\boxed{{{gold}}}$", gold, strict)[0] == 1.0


def math_reward(response: str, gold: str, strict: bool = False) -> float:
    """1.0 if the answer in `response` equals `gold`, else 0.0 (paper section 4).

    The answer must be in LaTeX (`$...$`, `\\[...\\]`, `\\boxed{...}`): "The answer is 8" in prose earns 0.0.
    Boxed answers take precedence over others, and later answers over earlier ones. If the gold cannot be
    parsed, every response earns 0.0; `MathVerifier.unparsable` finds such golds. Both are first written as
    people mean them (as_meant.py): the last box alone counts, `12 345` is one number, `20 euros` is 20.
    strict: skip that, as in the paper. This function has no deadline: for text that a model wrote use
    `MathVerifier`.

    >>> math_reward(r"Half of it, so $\\boxed{\\frac{1}{2}}$", "0.5")
    1.0
    """
    return _grade(response, gold, strict)[0]


def functions() -> dict[str, Callable]:
    """What a request to a worker can call."""
    _grade("$1$", "1")  # imports, and compiles the regular expressions, before the first deadline
    return {"grade": _grade, "usable": _usable}
