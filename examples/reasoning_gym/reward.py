"""reasoning-gym's own score of what a response puts into its last box, for --reward reward.py:score."""

from functools import cache

from reasoning_gym import get_score_answer_fn

scorer_of = cache(get_score_answer_fn)


def score(data_source: str, solution_str: str, extra_info: dict) -> float:
    """From 0 to 1, as the task `data_source` scores its answers; extra_info is the task's entry."""
    _, box, rest = solution_str.rpartition(r"\boxed{")  # the prompt of data.py asks for it
    answer, closed, _ = rest.partition("}")
    return scorer_of(data_source)(answer if box and closed else None, extra_info)
