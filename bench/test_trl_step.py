"""The parts of trl_step.py that do not need TRL."""

from bench.trl_step import as_markdown, reward, summarise


def step(seconds, tokens):
    return {"step_s": seconds, "generate_s": 1.0, "tokens": tokens}


def test_a_step_that_warms_up_does_not_count():
    """A side that looks slow because of its warm-up. Break: take run, not run[1:]."""
    summary = summarise([[step(90.0, 1), step(2.0, 100)], [step(80.0, 1), step(4.0, 500)]])
    assert (summary["step_s"], summary["first_step_s"], summary["steps"]) == (3.0, 85.0, 2)


def test_longer_responses_are_not_slower():
    """A side that looks slow because its responses are longer, or a mean of rates that favours short ones.

    Break: s_per_1000_tokens by seconds alone, or tokens_per_s as a mean of each step's.
    """
    ours, theirs = (summarise([[step(1.0, 1), step(2.0, 100), step(4.0 * n, 500 * n)]]) for n in (1, 3))
    assert ours["s_per_1000_tokens"] == 10.0 and ours["tokens_per_s"] == 100.0
    assert theirs["s_per_1000_tokens"] == 8.75
    assert "| 1.14 |" in as_markdown({"ours": ours, "theirs": theirs})


def test_reward_reads_the_box():
    r"""Rewards that are all 0, with which TRL would have nothing to learn. Break: findall of \\box\{."""
    texts = [r"It is \boxed{7}.", r"\boxed{6}, no, \boxed{7}", "7", r"\boxed{6}"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    assert reward(completions, ["7"] * 4, trainer_state=None) == [1.0, 1.0, 0.0, 0.0]
