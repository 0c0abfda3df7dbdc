"""tables/temperature.py: the rewards of answers at two temperatures."""

import json

import pytest

from tables import archive, temperature


def keep(results, name, answers, temperature):
    """Put evaluations on requests into an archive: answers {step: [(reward, true_reward), ...]}."""
    alike = {"data": "x", "problems": 2, "n": 1, "temperature": temperature, "top_p": 1, "max_new_tokens": 9}
    run = archive.Run(name, "evaluate.py")
    for step, rewards in answers.items():
        rows = [
            {"id": str(i), "reward": r, "true_reward": t, "length": 9} for i, (r, t) in enumerate(rewards)
        ]
        run.answers[step], run.chat[step] = rows, {"reward": 0.0, **alike}
    archive.write(results, [*archive.read(results), run])


@pytest.fixture
def rows(tmp_path):
    """The seed model and two training seeds of a row at each of two temperatures."""
    for at, shift in ((0.6, -1.0), (1, 1.0)):
        keep(tmp_path, f"seed-at-{at}", {"0": [(1.0, 0.5), (3.0, 0.5)]}, at)
        for seed in (0, 1):
            answers = {"100": [(4.0, 0.5 + shift), (6.0, 0.5 + shift + 0.2 * seed)], "50": [(3.0, 0.5)] * 2}
            keep(tmp_path, f"dpo-1-at-{at}/{seed}", answers, at)
    return [str(tmp_path / f"{row}-at-{at}") for row in ("seed", "dpo-1") for at in (0.6, 1)]


def test_a_reward_that_falls_at_one_temperature_and_rises_at_the_other(rows, tmp_path, capsys):
    """Breaks: sorted() of the steps as text; rows[0] of a run for the seed model's; that of the other
    temperature."""
    temperature.main(["--runs", *rows, "--out", str(tmp_path / "table.md")])
    found = json.loads((tmp_path / "table.json").read_text())["difference"]
    cold, hot = (found[f"dpo-1-at-{at}:seed"] for at in (0.6, 1))
    assert (cold["reward"]["mean"], hot["reward"]["mean"], cold["reward"]["seeds"]) == (3.0, 3.0, 2)
    assert cold["true_reward"]["mean"] == pytest.approx(-0.95) and hot["true_reward"][
        "mean"
    ] == pytest.approx(1.05)
    assert found["dpo-1-at-0.6:first"]["reward"]["mean"] == 2  # 4 and 6, from 3 at step 50
    assert found["dpo-1-at-0.6:dpo-1-at-1"]["true_reward"]["mean"] == pytest.approx(-2)
    text = (tmp_path / "table.md").read_text()
    assert "| online, temperature 0.6 | reward | 2 | 2.00 | 3.00 ± 0.00 | 5.0 ± 2.0 |" in text
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_temperature_needs_its_seed_model(rows, tmp_path, capsys):
    """A change that is measured from the other temperature. Break: drop the check."""
    with pytest.raises(SystemExit):
        temperature.main(["--runs", *rows[1:], "--out", str(tmp_path / "table.md")])
    assert "dpo-1-at-0.6 needs seed-at-0.6 beside it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ({"100": [(1.0, 0.5)] * 2}, "takes the same two or more checkpoints"),
        ({"50": [(1.0, 0.5)] * 3, "100": [(1.0, 0.5)] * 3}, "not all answer the same requests"),
    ],
)
def test_runs_measured_unlike_are_refused(rows, tmp_path, capsys, answers, says):
    """A difference of other checkpoints, or of other requests. Breaks: each check in courses() alone."""
    keep(tmp_path, "dpo-1-at-1/2", answers, 1)
    with pytest.raises(SystemExit):
        temperature.main(["--runs", *rows, "--out", str(tmp_path / "table.md")])
    assert says in capsys.readouterr().err
