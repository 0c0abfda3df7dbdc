"""Kill a run with SIGKILL at random moments, resume it each time, and compare it with an undisturbed run.

    python bench/kills.py --kills 50       # half an hour on two cores

The run saves every step. It is killed --kills times, each at a random moment in the seconds after its last
start, then left to finish. Nothing may be lost: its metrics, except the seconds, and its last weights must be
those of the undisturbed run, bit for bit, and every step must be in metrics.jsonl once.
"""

import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from tqdm import tqdm
from transformers.hf_argparser import HfArg

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as a script, only bench/ is there

from flags import (  # noqa: E402
    Count,
    Every,
    OutFile,  # noqa: E402
    parse_flags,
)

from ranks import launch  # noqa: E402
from run import read_config, read_metrics, surroundings, write_json  # noqa: E402


@dataclass
class Config:
    script: Literal["train_dpo.py", "train_grpo.py"] = HfArg(default="train_dpo.py", help="Which algorithm.")
    sync_every: Every = HfArg(default=Every(3), help="The dial.")
    ranks: Count = HfArg(default=1, help="Processes of the run.")
    steps: Count = HfArg(default=150, help="Steps of the run; each start takes at least one.")
    kills: Count = HfArg(default=50, help="Times that it is killed.")
    seed: int = HfArg(default=0, help="Of the moments.")
    out: OutFile = HfArg(default="results/kills/numbers.json", help="Where the numbers are written.")


def command(config: Config, folder: Path) -> list[str]:
    """The run: its steps are small, because the test is between them."""
    python = [sys.executable, *(launch(config.ranks) if config.ranks > 1 else [])]
    flags = "--data tiny@validation --prompts-per-step 4 --samples-per-prompt 8 --max-new-tokens 32 --lr 1e-3"
    flags += " --engine transformers --save-every 1"
    flags += f" --sync-every {config.sync_every:g} --steps {config.steps}"
    return [*python, config.script, *flags.split(), "--resume", "--run-dir", str(folder)]


def steps_of(folder: Path) -> int:
    """How many steps are in a run's metrics."""
    path = folder / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0


def wait_for_step(run: subprocess.Popen, folder: Path, step: int, log: Path) -> None:
    """Wait until a run's metrics have `step` steps. RuntimeError with its log if the run ends before."""
    while steps_of(folder) < step:
        if run.poll() is not None:
            raise RuntimeError(f"the run ended by itself:\n{log.read_text(encoding='utf-8')[-2000:]}")
        time.sleep(0.01)


def kill_once(config: Config, folder: Path, rng: random.Random) -> int:
    """Start the run, let it take a step or more, kill it and its children; return the step it was in."""
    before, log = steps_of(folder), folder.with_suffix(".txt")
    with log.open("w", encoding="utf-8") as file:
        run = subprocess.Popen(command(config, folder), cwd=ROOT, stdout=file, stderr=file)
    wait_for_step(run, folder, before + 1, log)  # a run that is killed too early never gets anywhere
    time.sleep(rng.uniform(0, 1.5))
    # Kill every process: torchrun's ranks have their own sessions and would outlive it.
    everything = [process := psutil.Process(run.pid), *process.children(recursive=True)]
    for process in everything:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    run.wait()
    psutil.wait_procs(everything)
    return steps_of(folder)


def same(one: Path, two: Path) -> tuple[bool, bool]:
    """Whether two runs have computed the same, bit for bit: (their metrics, their last weights)."""
    rows, others = (read_metrics(run, clock=False) for run in (one, two))
    weights, other_weights = (
        (run / "export" / str(len(rows)) / "model.safetensors").read_bytes() for run in (one, two)
    )
    return rows == others, weights == other_weights


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    rng, killed_at = random.Random(config.seed), []
    with tempfile.TemporaryDirectory() as folder:
        straight, resumed = Path(folder) / "straight", Path(folder) / "resumed"
        subprocess.run(command(config, straight), cwd=ROOT, check=True, capture_output=True)
        for _ in tqdm(range(config.kills), desc="kills"):
            if steps_of(resumed) >= config.steps - 3:
                break
            killed_at.append(kill_once(config, resumed, rng))
        subprocess.run(command(config, resumed), cwd=ROOT, check=True, capture_output=True)
        same_metrics, same_weights = same(straight, resumed)
        starts = [start["first_step"] for start in read_config(resumed)["starts"]]
    print(f"{len(killed_at)} kills, {len(starts)} starts; metrics {same_metrics}, weights {same_weights}")
    record = {
        "killed_at": killed_at,
        "first_steps": starts,
        "flags": vars(config) | {"sync_every": str(config.sync_every)},
    }
    record |= {"same_metrics": same_metrics, "same_weights": same_weights, **surroundings()}
    write_json(config.out, record)
    sys.exit(0 if same_metrics and same_weights and len(killed_at) == config.kills else 1)


if __name__ == "__main__":
    main()
