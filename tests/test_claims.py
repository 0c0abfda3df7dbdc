"""The claims of results/README.md: verdicts by the interval, and numbers that are those of the tables."""

import json

import pytest

from tables import claims
from tables.claims import Claim
from tables.intervals import Estimate


def test_the_page_shows_what_the_tables_say():
    """A number that was drawn anew and not in the text. Break: change one in results/README.md."""
    page = (claims.ROOT / "results" / "README.md").read_text(encoding="utf-8")
    assert claims.table(claims.ROOT / "results") in page


@pytest.mark.parametrize(
    ("expects", "where", "mean", "half", "says"),
    [
        ("worse", "step 100", -0.2, 0.1, "agrees"),
        ("worse", "step 100", 0.2, 0.1, "disagrees: better"),
        ("worse", "step 100", -0.2, 0.3, "cannot tell"),
        ("same", "step 100", 0.001, 0.005, "agrees"),
        ("same", "step 100", 0.02, 0.01, "disagrees: better"),
        ("same", "step 100", 0.001, 0.02, "cannot tell"),
        ("", "step 100", -0.2, 0.1, "worse"),
        ("", "accuracy", 0.5, 0.2, "higher"),  # of a table with chat
        ("lower", "length", -0.2, 0.1, "agrees"),
        ("lower", "length", 0.2, 0.1, "disagrees: higher"),
        ("lower", "length", 0.001, 0.005, "cannot tell"),  # no margin for a metric
    ],
)
def test_verdicts(expects, where, mean, half, says):
    """A claim that agrees because its interval is wide. Breaks: a margin for metrics; `cannot tell` last."""
    assert claims.judge(Claim("", "", "a:b", expects), Estimate(mean, half, 5), where) == says


def test_what_was_not_run_is_named(tmp_path, monkeypatch):
    """A claim that is left out, or a traceback. Break: no `if found is None` in table()."""
    (tmp_path / "table1").mkdir()
    found = {str(step): {"mean": mean, "half": 0.1, "seeds": 5} for step, mean in ((50, 0.5), (100, -0.5))}
    found = {"difference": {"a:b": found}}
    (tmp_path / "table1" / "table.json").write_text(json.dumps(found))
    some = [("one", "table1", "a:b"), ("two", "dose", "a:b"), ("three", "table1", "a:c")]
    some = [Claim(says, table, names, "worse") for says, table, names in some]
    some.append(Claim("four", "table1", "a:b", "worse", step="25"))
    monkeypatch.setattr(claims, "CLAIMS", some)
    *_, one, two, three, four = claims.table(tmp_path).splitlines()
    assert one == "| one | a less b | -50.0 [-60.0, -40.0] (step 100) | 5 | [agrees](table1/README.md) |"
    assert two.endswith("| [not run](dose/README.md) |")
    assert all(line.endswith("| [not run](table1/README.md) |") for line in (three, four))
