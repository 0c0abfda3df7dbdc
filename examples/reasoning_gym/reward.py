"""reasoning-gym's own score of what a response puts into its last box, for --reward reward.py:score."""

import re
from functools import cache

from reasoning_gym import get_score_answer_fn

BOX = re.compile(r"\\boxed\{([^{}]*)\}")  # the prompt of data.py asks for it
scorer_of = cache(get_score_answer_fn)


def score(data_source: str, solution_str: str, extra_info: dict) -> float:
    """From 0 to 1, as the task `data_source` scores its answers; extra_info is the task's entry."""
    boxes = BOX.findall(solution_str)
    return scorer_of(data_source)(boxes[-1] if boxes else None, extra_info)
