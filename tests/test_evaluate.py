"""Accuracy and its errors, and a report made from a run."""

import json
import statistics

import pytest

import evaluate
from run import checkpoint_path


def test_summary_by_hand():
    """The error over problems instead of runs, or a population deviation. Break: statistics.pstdev.

    Three runs over two problems with accuracies 1, 0.5, 0.5: mean 2/3, deviation 0.288675, error 0.288675 /
    sqrt 3.
    """
    summary = evaluate.summarize([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    assert summary["accuracy"] == pytest.approx(2 / 3)
    assert summary["standard_deviation"] == pytest.approx(statistics.stdev([1, 0.5, 0.5]))
    assert summary["standard_error"] == pytest.approx(1 / 6)
    assert (summary["pass_at_n"], summary["problems"], summary["n"]) == (1.0, 2, 3)


def test_one_sample_has_no_error():
    """A standard error of 0 from one run looks like certainty. Break: return 0.0."""
    assert evaluate.summarize([[1.0], [0.0]])["standard_error"] is None


def test_evaluate_a_checkpoint(tmp_path, capsys, checkpoints):
    """The command as README gives it. Break: give load_generator TINY_MODEL instead of the path."""
    out = tmp_path / "eval.json"
    evaluate.main(
        ["--model", "tiny/llama", "--data", "tiny@validation", "--n", "2", "--limit", "20", "--out", str(out)]
    )
    result = json.loads(out.read_text())
    assert (result["problems"], result["n"], result["model"]) == (20, 2, "tiny/llama")
    assert 0 < result["accuracy"] < 0.95 and result["grader_restarts"] == 0
    assert "accuracy" in capsys.readouterr().out

    data = tmp_path / "data.jsonl"
    data.write_text('{"problem": "What is 1 + 1?", "answer": "2"}\n')
    random = evaluate.accuracy(checkpoints["llama"], str(data), n=2, max_new_tokens=8)
    assert random["accuracy"] == 0.0 and random["truncated_frac"] > 0.5  # random weights answer nothing


def test_newest_export_of_a_run(tmp_path):
    """'9' sorts after '10' as text. Break: max over names."""
    for step in ("9", "10", "11.partial"):
        (tmp_path / "export" / step).mkdir(parents=True)
    assert checkpoint_path(tmp_path) == str(tmp_path / "export" / "10")
