"""The worked examples in docstrings, run."""

import doctest
import importlib

import pytest

NAMES = [
    *(
        "batch",
        "data",
        "evaluate",
        "grader.grade",
        "judge.winrates",
        "tables.archive",
        "tiny.chat",
        "tiny.preferences",
        "tiny.smollm2",
    ),
    *("train_dpo", "train_grpo", "bench.train_flops", "bench.trl_step"),
]


@pytest.mark.parametrize("name", NAMES)
def test_examples_in_docstrings(name):
    """An example that a reader trusts and the code no longer gives. Break: change a number in one of them."""
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0
