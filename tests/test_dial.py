"""The whole loop on the tiny model: what --sync-every does, and what it must not change."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import generate
import sync as sync_file
import train_dpo
import train_grpo
from run import read_metrics

TINY = Path(train_dpo.__file__).parent / "tiny"
# The learning rate is pinned: what the tests expect of one step should not move with a default. The seed
# model is rarely right: among fewer responses there may be no pair to learn from.
SMALL = [
    *("--data", "tiny@validation"),  # 500 problems, tokenized in a moment
    *("--prompts-per-step", "12", "--samples-per-prompt", "8", "--max-new-tokens", "48"),
    *("--steps", "5", "--lr", "1e-4"),
]


# The defaults differ (paper section 5): what it takes for a reference that stays, or that is synced at s = 1.
KEEP_REFERENCE = {train_dpo: ["--sync-ref-every", "inf"], train_grpo: []}
SYNC_REFERENCE = {train_dpo: [], train_grpo: ["--sync-ref-every", "1"]}

both_scripts = pytest.mark.parametrize("script", [train_dpo, train_grpo])
# For what the two share: the second is in the slow tests.
either_script = pytest.mark.parametrize(
    "script", [train_dpo, pytest.param(train_grpo, marks=pytest.mark.slow)]
)


def train(script, run_dir, *flags):
    """Run the script in this process; return its metrics without what the clock put into them."""
    script.main([*SMALL, "--run-dir", str(run_dir), *flags])
    return read_metrics(run_dir, clock=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A script's run with some flags, made once however many tests look at it: its directory and metrics."""

    @cache
    def call(script, *flags):
        directory = tmp_path_factory.mktemp("runs") / script.__name__
        return directory, train(script, directory, *flags)

    return call


@both_scripts
def test_staleness_is_a_sawtooth(trained, script):
    """Weights that arrive early, late or never. Break: `step % (s + 1)` in the loop."""
    _, metrics = trained(script, "--sync-every", "3")
    assert [row["staleness"] for row in metrics] == [0, 1, 2, 0, 1]
    assert [row["sync_gap"] is not None for row in metrics] == [True, False, False, True, False]


@both_scripts
def test_online_is_never_stale(trained, script):
    """Sampling ahead past a sync. Break: leave until_sync out of the window."""
    _, metrics = trained(script, "--sync-every", "1")
    assert {row["staleness"] for row in metrics} == {0}
    assert all(row["sync_gap"] < 1e-5 and row["logp_gap"] < 1e-5 for row in metrics)


@either_script
def test_drift_past_a_threshold_syncs(trained, script, tmp_path):
    """A sync too many, too late, or none; or one that a resumed run has forgotten.

    Breaks: `>` the other way; and for or; drift of the gradient's step (log after the sync's if); no "drift"
    in Life.counts, which a resume then starts at 0; no weights kept at a sync on drift (note_sync's `or`), so
    that a resumed generator gets the seed model's. A threshold between the drifts of steps 1 and 2 asks for
    a sync at step 3.
    """
    offline = ["--sync-every", "inf", "--ahead", "1"]
    _, metrics = trained(script, *offline)
    drift = [row["drift"] for row in metrics]
    assert drift[0] < 1e-5 < drift[1] < drift[2]
    when = ["--sync-when", str((drift[1] + drift[2]) / 2)]
    _, found = trained(script, *offline, *when)
    assert [row["staleness"] for row in found] == [0, 1, 2, 0, 1]
    assert [row["drift"] for row in found][:3] == pytest.approx(drift[:3]) and found[3]["drift"] < 1e-5

    for stop in ("3", "4"):  # right before the sync, and inside the window that it begins
        run, saves = tmp_path / stop, ["--save-every", stop]
        train(script, run, *offline, *when, *saves, "--steps", stop)
        assert train(script, run, *offline, *when, *saves, "--resume") == found


@either_script
def test_offline_touches_the_generator_before_the_first_step_only(script, tmp_path, monkeypatch):
    """inf that still syncs, or staleness that does not grow. Break: sync after the last step."""
    steps_done = []  # at each copy into the generator
    load = generate.VLLMGenerator.load_weights

    def noted(generator, weights):
        steps_done.append(len(read_metrics(tmp_path / "run")))
        return load(generator, weights)

    monkeypatch.setattr(generate.VLLMGenerator, "load_weights", noted)
    metrics = train(script, tmp_path / "run", "--sync-every", "inf")
    assert [row["staleness"] for row in metrics] == [0, 1, 2, 3, 4]
    assert steps_done == [0, 0]  # the rehearsal and the weights


@either_script
def test_rollouts_do_not_depend_on_how_far_ahead_they_are_sampled(trained, script, tmp_path):
    """A speed setting that changes the experiment, or a run that cannot be repeated.

    Breaks: seed the window instead of the step; random.Random() for the pairs.
    """
    directory, metrics = trained(script, "--sync-every", "3")
    assert train(script, tmp_path / "run", "--sync-every", "3", "--ahead", "1") == metrics
    for step in range(5):
        name = f"rollouts/{step}.jsonl"
        assert (tmp_path / "run" / name).read_text() == (directory / name).read_text()


@either_script
def test_another_seed_is_another_run(trained, script, tmp_path):
    """A seed that is not used. Break: 0 for config.seed, in PromptIterator and in Window."""
    _, metrics = trained(script, "--sync-every", "3")
    other = train(script, tmp_path / "run", "--sync-every", "3", "--seed", "1", "--steps", "2")
    assert [row["reward"] for row in other] != [row["reward"] for row in metrics[:2]]


def test_first_loss_is_log_2_and_then_moves(trained):
    """A reference that is not the seed model, or a policy that is not trained.

    Break: skip optimizer.step().
    """
    _, metrics = trained(train_dpo, "--sync-every", "3")
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(metrics[1]["loss"] - math.log(2)) > 1e-4


@pytest.mark.parametrize(
    ("script", "synced"),  # at which steps of a run at s = 3
    [(train_dpo, [True, False, False, True, False]), (train_grpo, [True, False, False, False, False])],
)
def test_reference_has_its_own_default(trained, script, synced):
    """DPO's reference follows --sync-every, GRPO's stays the seed model (paper section 5).

    Break: Every(1) as the default of either --sync-ref-every.
    """
    _, metrics = trained(script, "--sync-every", "3")
    assert [row["kl_ref"] < 1e-9 for row in metrics] == synced


@either_script
def test_reference_follows_its_own_dial(trained, script):
    """A reference that is synced with the generator although it was told not to be, or the reverse.

    Break: ignore --sync-ref-every.
    """
    _, stayed = trained(script, "--sync-every", "1", *KEEP_REFERENCE[script])
    _, followed = trained(script, "--sync-every", "1", *SYNC_REFERENCE[script])
    assert stayed[-1]["kl_ref"] > 1e-4
    assert all(row["kl_ref"] < 1e-9 for row in followed)


@either_script
def test_micro_batches_change_nothing_but_speed(trained, script, tmp_path):
    """A loss whose scale depends on how the batch is cut. Break: a `/ len(rows)` in the loss."""
    _, metrics = trained(script, "--sync-every", "3")
    cut = train(script, tmp_path / "run", "--sync-every", "3", "--micro-batch-tokens", "300")
    for a, b in zip(metrics, cut, strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-3)


def test_a_broken_sync_stops_the_run(tmp_path, monkeypatch):
    """Online training that samples from the seed model, unnoticed. Break: catch SyncError in the loop."""
    frozen, calls = {}, []

    def stale(policy, dtype):  # always the weights of the first sync
        calls.append(1)
        if len(calls) == 2:  # the first was the rehearsal
            frozen.update({name: weight.clone() for name, weight in original(policy, dtype)})
        return original(policy, dtype) if len(calls) <= 2 else iter(frozen.items())

    original = sync_file.full_weights
    monkeypatch.setattr(sync_file, "full_weights", stale)
    with pytest.raises(sync_file.SyncError, match=r"sync at step 1: .* arrived as other bytes"):
        # The paper's learning rate, which hides a stale copy best.
        train(train_dpo, tmp_path / "run", "--sync-every", "1", "--lr", "1e-6")
    assert len(read_metrics(tmp_path / "run")) == 1  # what came before is on disk


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_both_families_train_and_agree_with_the_engine(trained, family):
    """Code that works for one architecture by accident. Break: skip repack_tied_head (qwen3 is tied)."""
    model = [] if family == "llama" else ["--model", str(TINY / family)]
    _, metrics = trained(train_dpo, "--sync-every", "3", *model)
    assert [row["logp_gap"] is not None for row in metrics] == [True, False, False, True, False]
    assert max(row["logp_gap"] for row in metrics if row["staleness"] == 0) < 1e-5


@both_scripts
def test_export_holds_the_trained_weights(trained, script):
    """A checkpoint of the seed model under the trained model's name. Break: export the reference."""
    directory, metrics = trained(script, "--sync-every", "1", *KEEP_REFERENCE[script])
    exported = AutoModelForCausalLM.from_pretrained(directory / "export" / "5")
    seed = AutoModelForCausalLM.from_pretrained(TINY / "llama")
    moved = max(
        (a - b).abs().max().item() for a, b in zip(exported.parameters(), seed.parameters(), strict=True)
    )
    assert 1e-5 < moved < 0.1
    config = json.loads((directory / "config.json").read_text())
    assert config["flags"]["sync_every"] == 1 and config["flags"]["sync_ref_every"] == "inf"
    assert set(metrics[0]) == set(metrics[-1])


@pytest.mark.slow
def test_bfloat16_agrees_within_its_rounding(tmp_path):
    """A sync that casts, or a tolerance that a correct bfloat16 engine breaks. Break: TOLERANCE 1e-4 for
    it."""
    metrics = train(train_dpo, tmp_path / "run", "--sync-every", "2", "--dtype", "bfloat16")
    fresh = [row["logp_gap"] for row in metrics if row["staleness"] == 0]
    assert all(1e-5 < gap < 5e-2 for gap in fresh)


@pytest.mark.slow
def test_transformers_engine_trains_too(tmp_path):
    """A fallback that rots. Break: return the logits instead of the log-probs."""
    metrics = train(train_dpo, tmp_path / "run", "--sync-every", "2", "--engine", "transformers")
    assert [row["staleness"] for row in metrics] == [0, 1, 0, 1, 0]
    assert all(row["logp_gap"] < 1e-5 for row in metrics if row["staleness"] == 0)


def test_stale_responses_without_correction_are_announced(tmp_path, monkeypatch, capsys):
    """A biased gradient that nobody was told of, or a warning that is always there.

    Break: drop `and config.sync_every > 1`, or the print.
    """

    class Ready(Exception):
        """Everything is checked and said; nothing is loaded yet."""

    def stop(*args, **settings):
        raise Ready

    monkeypatch.setattr("rewards.MathVerifier", lambda strict: None)  # it takes seconds to start
    monkeypatch.setattr("rewards.gradable", lambda prompts, verifier, fate: prompts)
    monkeypatch.setattr(train_grpo, "load", stop)

    def said(*flags):
        with pytest.raises(Ready):
            train(train_grpo, tmp_path / "run", *flags)
        return capsys.readouterr().out

    warning = said("--correction", "none", "--sync-every", "3")
    assert "--correction none with --sync-every 3:" in warning and warning.count("\n") == 1
    assert said("--correction", "none", "--sync-every", "1") == ""
    assert said("--sync-every", "3") == ""
