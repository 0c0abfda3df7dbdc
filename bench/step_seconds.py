"""Seconds of a step of each row of Table 1 on a quiet machine: the time axis of tables/costs.py.

    python bench/step_seconds.py        # a quarter of an hour on two quiet cores

One run of each kind, of 50 steps with the row's own flags. `seconds`: one process with all cores, in which
generator and trainer take turns. `apart`: the trainer pinned to one core and a vLLM server to the other, as
in semi_online.py.
"""

import os
import secrets
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only bench/ is there

from flags import Count, OutFile, parse_flags  # noqa: E402

from bench.semi_online import run_once, start_server  # noqa: E402
from run import surroundings, write_json  # noqa: E402
from serve import TOKEN  # noqa: E402

ROWS = {  # of tables/table1.sh; s = 100 takes the seconds of offline, but for a sync in 100 steps
    "dpo-inf": "train_dpo.py --sync-every inf --lr 5e-5",
    "dpo-10": "train_dpo.py --sync-every 10 --lr 5e-5",
    "dpo-1": "train_dpo.py --sync-every 1 --lr 5e-5",
    "grpo": "train_grpo.py --sync-every 1 --lr 2e-4",
}
CONTEXT = 128  # tokens of the server's sequences, as in semi_online.py


@dataclass
class Config:
    out: OutFile = HfArg(default="results/efficiency/seconds.json", help="Where the numbers are written.")
    steps: Count = HfArg(default=50, help="Steps of each run.")


def main(args: list[str] | None = None) -> None:
    config, found = parse_flags(Config, args), {}
    os.environ[TOKEN] = secrets.token_urlsafe()  # of the server and the trainers, which inherit it
    server, url = start_server("", CONTEXT)
    with tempfile.TemporaryDirectory() as folder:
        for place, more in (("seconds", ""), ("apart", f"--generator-url {url}")):
            for row, command in ROWS.items():
                script, _, flags = command.partition(" ")
                run = Path(folder) / f"{place}-{row}"
                phases = run_once(run, f"{flags} --steps {config.steps} {more}", place == "apart", script)
                found.setdefault(row, {})[place] = phases["step_s"]
                found[row][f"{place}_phases"] = phases
                print(f"{row:8} {place:8} {phases['step_s']:.3f} s a step", flush=True)
    server.terminate()
    server.wait()
    write_json(config.out, {**found, "steps": config.steps, **surroundings()})


if __name__ == "__main__":
    main()
