"""What an accuracy costs, from a row's metrics and evaluations."""

import json

import pytest
from test_report import write_evals

from tables import costs
from tables.archive import read_directory

ROWS = [{"step": step, "reward": 0.5, "tokens": 100, "learned_tokens": 10 + step} for step in range(4)]


@pytest.fixture
def row(tmp_path):
    """Two seeds of one row, whose reference is copied at every second step."""
    for seed, accuracy in enumerate((0.5, 0.7)):
        run = tmp_path / "dpo-10" / str(seed)
        write_evals(run, {2: 0.3, 4: accuracy})
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        (run / "config.json").write_text(json.dumps({"flags": {"sync_ref_every": 2}}))
    return tmp_path / "dpo-10"


def test_costs_by_hand(row):
    """A step too many, a backward for nothing, or a reference counted where it is the policy.

    Breaks: metrics[: step + 1]; 2 * learned; == 0 for != 0. Learned of steps 0 to 2: 10, 11, 12; the
    reference is computed at step 1 alone.
    """
    run = read_directory(row / "0", "dpo-10/0")
    found = costs.costs_at(run, 3, {"seconds": 2.0})
    assert found == {"generated": 300, "learned": 33, "compute": 300 + 3 * 33 + 11, "seconds": 6.0}


def test_what_reaching_an_accuracy_takes(row):
    """Another seed's curve, or a step for its cost. Breaks: evaluations of the first run; "step" for cost.

    0.3 at step 2 and 0.5 or 0.7 at step 4: 0.4 is reached at step 3 and 2.5. Tokens: 200 to 400 likewise.
    """
    runs = [read_directory(row / seed, f"dpo-10/{seed}") for seed in ("0", "1")]
    assert costs.to_reach(runs, 0.4, "step", {}) == pytest.approx([3.0, 2.5])
    assert costs.to_reach(runs, 0.4, "generated", {}) == pytest.approx([300, 250])
    assert costs.to_reach(runs, 0.6, "step", {}) == [None, pytest.approx(3.5)]
    assert costs.to_reach(runs, 0.4, "seconds", {}) == [None, None]


def test_the_figure_and_its_table(row, tmp_path):
    """A level that one seed never reaches with a mean of the others. Break: leave None out."""
    (tmp_path / "s.json").write_text(json.dumps({"dpo-10": {"seconds": 2.0}}))
    flags = ["--out", str(tmp_path / "costs.png"), "--seconds", str(tmp_path / "s.json")]
    costs.main(["--runs", str(row), *flags])
    text = (tmp_path / "costs.md").read_text()
    assert "| s = 10 | 60 % | 1 of 2 |  |  |  |  |  |" in text
    assert "| s = 10 | 40 % | 2 of 2 | 3 | 0 | 0 | 0 | 6 |" in text
    assert "| s = 10 | 40 %" in text and "at most" not in text.partition("Mean over")[0]
    written = json.loads((tmp_path / "costs.json").read_text())
    assert written["dpo-10"]["0.4"]["step"] == pytest.approx([3.0, 2.5])
    assert (tmp_path / "costs.png").stat().st_size > 10_000


def test_an_accuracy_reached_before_the_first_evaluation_is_a_bound(row, tmp_path):
    """A cost that looks exact where it is only an upper bound. Break: no `bound`."""
    write_evals(row / "0", {2: 0.45})
    costs.main(["--runs", str(row), "--out", str(tmp_path / "costs.png")])
    assert "| s = 10 | 40 % | 2 of 2 | at most 2 |" in (tmp_path / "costs.md").read_text()


def test_runs_that_cannot_be_drawn(row, tmp_path, capfd):
    """A traceback for what an older version left. Breaks: each check alone."""
    old = [{key: value for key, value in line.items() if key != "learned_tokens"} for line in ROWS]
    (row / "0" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    for name in ("seed", "dpo-10"):
        write_evals(tmp_path / "seed", {0: 0.1})
        with pytest.raises(SystemExit) as exit:
            costs.main(["--runs", str(tmp_path / name), "--out", str(tmp_path / "c.png")])
        assert exit.value.code == 2
    said = capfd.readouterr().err
    assert "seed: needs runs with metrics" in said and "dpo-10: its metrics have no learned_tokens" in said
