"""Two ranks against one, on the same global batches: the same numbers, and the same weights at the end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import computed, torchrun, wait_for_step, write_program
from transformers import AutoModelForCausalLM

import life
from ranks import launch, see_one_gpu

ROOT = Path(__file__).resolve().parents[1]
# Two prompts a step, six responses each: prompts whose responses are all wrong are common, so there are
# steps where one rank has no pair, and steps where none has. Micro-batches of two or three responses.
SMALL = "--data tiny@validation --steps 8 --prompts-per-step 2 --samples-per-prompt 6 --max-new-tokens 24"
SMALL += " --lr 1e-3 --sync-every 3 --micro-batch-tokens 150 --engine transformers"
MIXED = "--model tiny/chat --reward-model tiny/reward --prompts-per-step 4"
MIXED += " --data math=tiny@validation chat=tiny@validation"


def train(ranks, script, folder, flags):
    """Run a train script on so many ranks; its metrics without timings, its last weights, what it printed."""
    said = torchrun(ranks, script, "--run-dir", str(folder), *flags.split())
    return *computed(folder), said


def assert_alike(one, two):
    """The same metrics and weights, but for the order of float32 sums, which Adam makes more of: a gradient
    near 0 moves a weight by the learning rate, 1e-3."""
    (ours, weights, said), (theirs, sharded, said_by_two) = one, two
    assert len(ours) == len(theirs) and said.count("\n") == said_by_two.count("\n")
    for row, other in zip(ours, theirs, strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            close = value if value is None else pytest.approx(value, rel=1e-3, abs=2e-5)
            assert other[key] == close, (row["step"], key)
    assert weights.keys() == sharded.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(sharded[name], weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "script, flags",
    [
        ("train_dpo.py", "--grpo-coef 0.1 --entropy-coef 0.01 --length-normalize"),
        pytest.param(
            "train_grpo.py",
            f"--normalize sequence --kl-coef 0.1 --advantage-scale std {MIXED}",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_ranks_are_one(script, flags, tmp_path):
    """Gradients that are averaged, or never meet; counts of one rank taken for the step's; a rank without a
    pair that leaves the others waiting, or adds to the loss; a pair drawn otherwise because of its rank.

    Breaks: no set_gradient_divide_factor; len(groups) for all_groups; no pad_to_same_count; a mean of this
    rank alone; len(rollouts) for all_rows; one random.Random for all pairs of a step.
    """
    one = train(1, script, tmp_path / "one", f"{SMALL} {flags}")
    assert MIXED in flags or {row["pair_frac"] for row in one[0]} == {0.0, 0.5, 1.0}
    assert_alike(one, train(2, script, tmp_path / "two", f"{SMALL} {flags}"))


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["--engine vllm", "--generator-devices cpu"])
def test_two_ranks_are_one_with_vllm(generator, tmp_path):
    """Engines that wait for each other, weights that are gathered in another order than they are read, or two
    ranks that both give a server weights. Breaks: in sync.py, iterate over reversed(list(full_weights(...)))
    on one rank; no deque() in Servers.load_weights."""
    flags = SMALL.replace("--engine transformers", generator)
    one = train(1, "train_dpo.py", tmp_path / "one", flags)
    assert_alike(one, train(2, "train_dpo.py", tmp_path / "two", flags))


@pytest.mark.slow
def test_checkpoints_of_two_ranks(tmp_path):
    """A weight that only FSDP knows in what others are to load, or a checkpoint that two ranks measure while
    one of them writes it. Breaks: leave out state_dict in life.export; no rank() == 0 in
    validate()."""
    lines = (ROOT / "tiny/problems/test.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "problems.jsonl").write_text("".join(lines[:30]))
    flags = (
        f"{SMALL} --data {tmp_path}/problems.jsonl@train --model tiny/qwen3 --dtype bfloat16 --eval-every 8"
    )
    train(2, "train_dpo.py", tmp_path / "run", flags)  # Qwen3's embeddings are tied
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "run/best/math", output_loading_info=True)
    assert not any(report.values())


UNEQUAL = """
import json, sys
from ranks import init_ranks
from rewards import RewardModel

rank, world, device = init_ranks()
conversations = json.loads(sys.argv[1])
model = RewardModel("tiny/reward", batch_tokens=200)
mine = conversations[:1] if rank == 0 else conversations[1:]
scores = model.score(mine if world == 2 else conversations)
print(json.dumps(scores), file=sys.stderr if rank else sys.stdout, flush=True)
"""


@pytest.mark.slow
def test_ranks_that_score_unequal_batches(tmp_path):
    """A rank with fewer batches leaves the others waiting for its part of the reward model's weights.
    Break: no pad_to_same_count in RewardModel.score."""
    turns = [{"role": "user", "content": "Describe the fox: its food."}]
    answers = ["It eats mice. " * (1 + i % 7) for i in range(30)]
    conversations = json.dumps([[*turns, {"role": "assistant", "content": text}] for text in answers])
    program = write_program(tmp_path, UNEQUAL)
    alone, first = (json.loads(torchrun(n, program, conversations)) for n in (1, 2))
    assert len(alone) == 30 and first == pytest.approx(alone[:1], abs=1e-4)


MISSING = """
import time
import sync
from ranks import init_ranks

rank, world, device = init_ranks()
sync.PATIENCE_S = 2
try:
    if rank == 0:
        sync.sync(None, None, 7)  # it goes no further than to the meeting
    time.sleep(10)  # rank 1 is busy with something else
except sync.SyncError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_rank_that_does_not_come_to_a_sync(tmp_path):
    """Ranks that wait two hours for one that is stuck, and do not say for which. Break: no meet_within."""
    said = torchrun(2, write_program(tmp_path, MISSING))
    assert "sync at step 7" in said and "Ranks 1 failed" in said


@pytest.mark.parametrize("seen, local, left", [("0,1", 1, "1"), ("GPU-a,GPU-b", 0, "GPU-a"), ("", 1, "")])
def test_a_rank_sees_its_own_gpu(seen, local, left, monkeypatch):
    """All engines on the first GPU; or GPUs that come back to a run that was kept from them. Breaks: gpus[0];
    treat "" as unset."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    see_one_gpu(local, 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left


def test_more_ranks_than_gpus(monkeypatch):
    """A rank that silently takes the CPU beside others on GPUs. Break: no check."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ValueError, match="--nproc-per-node 2: 1 GPUs here; start as many ranks"):
        see_one_gpu(0, 2)


@pytest.mark.parametrize("hidden", ["", "-1", "-1,0,1"])
def test_hidden_gpus_are_no_gpus(monkeypatch, hidden):
    """Ranks on the CPU that are refused for want of GPUs. Break: only "" counts as none."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    see_one_gpu(1, 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == hidden


@pytest.mark.slow
def test_prompts_that_do_not_divide(tmp_path):
    """Ranks with different shares. Break: drop the check in data.MixedIterator."""
    with pytest.raises(
        AssertionError, match="--prompts-per-step 3: 3 of a source, which 2 ranks cannot share"
    ):
        train(2, "train_dpo.py", tmp_path / "run", SMALL.replace("per-step 2", "per-step 3"))


@pytest.mark.slow
def test_a_killed_rank_ends_the_others(tmp_path):
    """A rank that is killed for want of memory, and others that wait for it for hours. Break: start the ranks
    without torchrun, each by `python`."""
    flags = f"{SMALL} --steps 1000 --run-dir {tmp_path / 'run'}"
    command = [sys.executable, *launch(2), "train_dpo.py", *flags.split()]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for_step(run, tmp_path / "run")
    ranks = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    said = run.communicate(timeout=60)[1]
    assert run.returncode != 0 and "Signal 9 (SIGKILL)" in said
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in ranks)


def test_a_run_dir_that_ranks_do_not_share(monkeypatch, tmp_path):
    """Checkpoints of which each machine has a part, found out at the resume. Breaks: no meet() before the
    look (not seen here); `not blind`; in Checkpoints.save, no look at the others' files."""
    monkeypatch.setattr("life.world_size", lambda: 4)
    life.check_shared(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    monkeypatch.setattr("life.all_sum", lambda values: sum(values) + 3)  # of the other three ranks
    with pytest.raises(ValueError, match="3 of 4 ranks do not see what rank 0 writes there; name a folder"):
        life.check_shared(tmp_path / "run")
