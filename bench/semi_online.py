"""Seconds of a step at --sync-every 1, 10 and 100: the generator on the trainer's cores, or on its own.

    python bench/semi_online.py        # a quarter of an hour on two quiet cores

Real runs of train_grpo.py. `shared`: one process with both cores, so a window saves only the start and the
tail of a call. `apart`: the trainer is pinned to one core and a vLLM server (serve.py) to the other, so all
but the first step of a window is sampled while the trainer trains. In a row of runs only the dial differs. A
step's time is the whole run's, first window and syncs included, divided by its steps.

Expected, with g seconds to sample a step's responses, t to score and train on them, and s the dial:
    shared: g + t      apart: max(g, t) + min(g, t) / s
"""

import os
import secrets
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as a script, only bench/ is there

from flags import (  # noqa: E402
    Count,
    OutFile,  # noqa: E402
    parse_flags,
)

from run import read_metrics, surroundings, write_json  # noqa: E402
from serve import TOKEN, free_port, healthy  # noqa: E402

DIALS = (1, 10, 100)
SETTINGS = {  # name: flags of train_grpo.py, and the server's context
    "tiny": ("--steps 40 --lr 1e-4", 128),
    "SmolLM2-135M": (
        "--model models/smollm2 --data models/one_digit.jsonl --dtype bfloat16 --lr 1e-5 --steps 10 "
        "--prompts-per-step 4 --samples-per-prompt 8 --max-new-tokens 24",
        256,
    ),
}


@dataclass
class Config:
    out: OutFile = HfArg(default="results/semi_online/numbers.json", help="Where the numbers are written.")
    only: str | None = HfArg(default=None, help=f"One of {', '.join(SETTINGS)}.")
    repeats: Count = HfArg(default=1, help="Runs of each kind; the fastest counts.")


def start_server(flags: str, context: int) -> tuple[subprocess.Popen, str]:
    """Start a server on the second core: its process and address."""
    wanted = [flag for flag in ("--model", "--dtype") if flag in flags]
    given = flags.split()
    same = [word for flag in wanted for word in (flag, given[given.index(flag) + 1])]
    port = free_port()
    command = ["taskset", "-c", "1", sys.executable, "serve.py", "--attached", "True", "--port", str(port)]
    command += ["--max-model-len", str(context), *same]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    url = f"http://127.0.0.1:{port}"
    while not healthy(url):
        if process.poll() is not None:
            raise RuntimeError("the server did not start")
        time.sleep(0.5)
    return process, url


def run_once(folder: Path, flags: str, pinned: bool, script: str = "train_grpo.py") -> dict[str, float]:
    """A run's seconds per step, in all and of each phase."""
    command = [sys.executable, script, "--run-dir", str(folder), "--ahead", "100", *flags.split()]
    threads = "1" if pinned else "2"
    env = {**os.environ, "OMP_NUM_THREADS": threads}
    subprocess.run(
        (["taskset", "-c", "0"] if pinned else []) + command,
        cwd=ROOT,
        env=env,
        check=True,
        stderr=subprocess.DEVNULL,
    )
    rows = read_metrics(folder)
    keys = [key for key in rows[0] if key.endswith("_s") and not key.endswith("per_s")]
    return {key: sum(row[key] for row in rows) / len(rows) for key in keys}


def main(args: list[str] | None = None) -> None:
    config, table = parse_flags(Config, args), []
    os.environ[TOKEN] = secrets.token_urlsafe()  # of the servers and the trainers, which inherit it
    for name, (flags, context) in SETTINGS.items():
        if config.only not in (None, name):
            continue
        server, url = start_server(flags, context)
        places = {"shared": ("", False), "apart": (f"--generator-url {url}", True)}
        with tempfile.TemporaryDirectory() as folder:
            # The first run of each kind is not counted: engines are slow in their first calls.
            for place, (more, pinned) in places.items():
                run_once(Path(folder) / f"{place}-first", f"{flags} --steps 2 {more}", pinned)
            for repeat in range(config.repeats):
                for s in DIALS:
                    for place, (more, pinned) in places.items():
                        run = Path(folder) / f"{place}-{s}-{repeat}"
                        seconds = run_once(run, f"{flags} --sync-every {s} {more}", pinned)
                        table.append({"model": name, "place": place, "sync_every": s, **seconds})
                        show(table[-1])
        server.terminate()
        server.wait()
    gains = gains_of(table)
    for row in gains:
        print(
            f"{row['model']:14} {row['place']:7} s={row['sync_every']:<4} {row['step_s']:7.3f} s a step, "
            f"{row['times_as_fast']:.2f} times as fast as s=1; the two lines say {row['two_lines_s']:.2f} s"
        )
    write_json(config.out, {"runs": table, "gains": gains, **surroundings()})


def gains_of(table: list[dict]) -> list[dict]:
    """The fastest run of each kind beside s = 1: how many times as fast, and what the model above says."""
    best = {}
    for row in table:
        key = (row["model"], row["place"], row["sync_every"])
        best[key] = min(row, best.get(key, row), key=lambda row: row["step_s"])
    gains = []
    for (name, place, s), row in best.items():
        one, flags = best[name, place, 1], SETTINGS[name][0].split()
        generate, train = one["generate_s"], one["score_s"] + one["train_s"]
        window = min(s, int(flags[flags.index("--steps") + 1]))
        apart = max(generate, train) + min(generate, train) / window
        gains.append(
            {
                **{key: row[key] for key in ("model", "place", "sync_every", "step_s")},
                "times_as_fast": one["step_s"] / row["step_s"],
                "generate_s_at_1": generate,
                "score_and_train_s_at_1": train,
                "two_lines_s": apart if place == "apart" else generate + train,
            }
        )
    return gains


def show(row: dict) -> None:
    """Print a run in one line."""
    phases = ("trainer_idle_s", "score_s", "train_s", "sync_s", "generate_s", "generator_idle_s")
    seconds = ", ".join(f"{phase.removesuffix('_s')} {row[phase]:.3f}" for phase in phases)
    print(
        f"{row['model']} {row['place']} s={row['sync_every']}: {row['step_s']:.3f} s ({seconds})", flush=True
    )


if __name__ == "__main__":
    main()
