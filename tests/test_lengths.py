"""tables/lengths.py: the lengths of right and wrong answers at a checkpoint."""

import json

import pytest

from tables import archive, lengths


def keep(results, seed, answers):
    """Put a checkpoint's answers into an archive: [(reward, length), ...]."""
    run = archive.Run(f"first/{seed}", "evaluate.py")
    run.answers["25"] = [{"id": str(i), "reward": r, "length": n} for i, (r, n) in enumerate(answers)]
    archive.write(results, [*archive.read(results), run])


def test_right_and_wrong_answers_by_seed(tmp_path):
    """A mean over all answers, in which a seed with many counts for more; right and wrong exchanged.

    Breaks: one list for all seeds in lengths(); 0.0 for 1.0. By hand: seed 0 right 20, wrong 10; seed 1 right
    31 and 33, wrong 12: differences 10 and 20.
    """
    keep(tmp_path, 0, [(1.0, 20), (0.0, 10)])
    keep(tmp_path, 1, [(1.0, 31), (1.0, 33), (0.0, 12), (0.0, 12)])
    lengths.main(["--runs", str(tmp_path / "first"), "--out", str(tmp_path / "lengths.png")])
    found = json.loads((tmp_path / "lengths.json").read_text())
    row = found["difference"]["right:wrong"]["characters"]
    assert (row["first"], row["second"], row["mean"], row["seeds"]) == (26, 11, 15, 2) and found[
        "right"
    ] == 0.5
    assert "| right answers less wrong answers | characters | 2 |" in (tmp_path / "lengths.md").read_text()
    assert (tmp_path / "lengths.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("answers", "says"), [([(1.0, 5)], "first/0 has no wrong answer"), (None, "first/0 has not")]
)
def test_answers_that_cannot_be_compared(tmp_path, capsys, answers, says):
    """A traceback after an evaluation of minutes. Breaks: each check in lengths() alone."""
    keep(tmp_path, 0, answers or [])
    if answers is None:
        archive.write(tmp_path, [archive.Run("first/0", "evaluate.py")])
    with pytest.raises(SystemExit):
        lengths.main(["--runs", str(tmp_path / "first"), "--out", str(tmp_path / "lengths.png")])
    assert says in capsys.readouterr().err
