"""Train for hours, and record the memory of every process of the run (Linux).

    python bench/soak.py --hours 2                  # the engine in the trainer's process
    python bench/soak.py --hours 2 --served True    # on a separate vLLM server

A run of train_grpo.py on the tiny model at --sync-every 10, with a checkpoint every 50 steps. Once a minute
the memory of the run and its child processes is recorded, as USS: the memory that would be
free if the process ended. At the end the run is sent SIGTERM: it must stop by itself, with a checkpoint. A
process's slope is that of a line fitted to its records after the first quarter.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import linear_regression, mean
from typing import Any

import psutil
from tqdm import tqdm
from transformers.hf_argparser import HfArg

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as a script, only bench/ is there

from flags import (  # noqa: E402
    OutFile,  # noqa: E402
    Positive,
    parse_flags,
)

from run import read_metrics, surroundings, write_json  # noqa: E402
from tables.figures import load_pyplot  # noqa: E402

FLAGS = "--steps 1000000 --sync-every 10 --save-every 50 --lr 1e-6 --prompts-per-step 16"
EVERY_S = 60
MB = 2**20
ROLES = {  # text in a process's command line: its role; the first that fits
    "grader/program.py": "grader",
    "VLLM::": "engine",
    "multiprocessing": "multiprocessing's",
    "api_server": "server",
    "serve.py": "server",
    "train_grpo.py": "trainer",
}


Points = list[tuple[float, float, int]]  # of a process: (minute, MB, open files)


@dataclass
class Config:
    hours: Positive = HfArg(default=2.0, help="How long.")
    served: bool = HfArg(default=False, help="Generate on a server (--generator-devices cpu).")
    out: OutFile = HfArg(default="results/soak/numbers.json", help="The numbers; beside them, the figure.")


def role_of(process: psutil.Process) -> str:
    """The role of a process in the run."""
    line = " ".join(process.cmdline()) or process.name()
    return next((role for text, role in ROLES.items() if text in line), line[:40])


def note(run: psutil.Process, seen: dict[tuple[str, int], Points], minute: float) -> None:
    """Add to `seen` what every living process of a run holds now: {(role, pid): [(minute, MB, files)]}."""
    for process in [run, *run.children(recursive=True)]:
        try:
            held, files = round(process.memory_full_info().uss / MB, 2), process.num_fds()
            seen[role_of(process), process.pid].append((round(minute, 2), held, files))
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue  # it ended meanwhile


def summary(role: str, pid: int, points: Points) -> dict[str, Any]:
    """One process: when it was there, its memory after the first quarter and at the end, its slope."""
    minutes, held, files = zip(*points, strict=True)
    late = [(m, h) for m, h in zip(minutes, held, strict=True) if m >= minutes[-1] / 4]
    slope = linear_regression(*zip(*late, strict=True)).slope if len(late) > 1 else None
    tenth = max(1, len(late) // 10)
    return {
        "role": role,
        "pid": pid,
        "minutes": [minutes[0], minutes[-1]],
        "mb_after_a_quarter": mean(h for _, h in late[:tenth]),
        "mb_at_the_end": mean(h for _, h in late[-tenth:]),
        "mb_an_hour": None if slope is None else 60 * slope,
        "open_files": [files[0], files[-1]],
    }


def as_markdown(rows: list[dict]) -> str:
    """One line per process."""
    lines = ["| process | minutes | after a quarter | at the end | slope | open files |", "|" + "---|" * 6]
    for row in rows:
        first, last = row["minutes"]
        slope = "" if row["mb_an_hour"] is None else f"{row['mb_an_hour']:+.2f} MB an hour"
        cells = [row["role"], f"{first:.0f} to {last:.0f}", f"{row['mb_after_a_quarter']:.1f} MB"]
        cells += [f"{row['mb_at_the_end']:.1f} MB", slope, "{} to {}".format(*row["open_files"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(seen: dict[tuple[str, int], Points], out: Path) -> None:
    """One line per process: megabytes over minutes."""
    plt = load_pyplot()
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for (role, _), points in seen.items():
        minutes, held, _ = zip(*points, strict=True)
        axis.plot(minutes, held, label=role, lw=1)
    axis.set_xlabel("minutes")
    axis.set_ylabel("memory of its own (MB)")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(args: list[str] | None = None) -> None:
    config, seen = parse_flags(Config, args), defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train_grpo.py", *FLAGS.split(), "--run-dir", f"{folder}/run"]
        command += ["--generator-devices", "cpu"] if config.served else []
        with Path(folder, "log.txt").open("w+", encoding="utf-8") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
            run, start = psutil.Process(process.pid), time.monotonic()
            progress, minute = tqdm(desc="soak", unit=" notes"), 0.0
            while minute < 60 * config.hours:
                time.sleep(EVERY_S)
                minute = (time.monotonic() - start) / 60
                progress.update()
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"the run ended by itself:\n{log.read()[-3000:]}")
                note(run, seen, minute)
            children = run.children(recursive=True)
            process.send_signal(signal.SIGTERM)
            status = process.wait(timeout=300)
            left = [str(child) for child in psutil.wait_procs(children, timeout=60)[1]]
        steps = len(read_metrics(f"{folder}/run"))
        saved = sorted(int(path.name) for path in Path(folder, "run/checkpoints").iterdir())
    rows = [summary(*key, points) for key, points in seen.items()]
    print(as_markdown(rows))
    print(f"{steps} steps; status {status} after SIGTERM, checkpoints {saved}")
    print(f"still running: {left or 'nothing'}")
    record = {"command": " ".join(sys.argv), "flags": asdict(config), **surroundings()}
    record |= {"steps": steps, "status": status, "checkpoints": saved, "left_running": left}
    points = {f"{role} {pid}": points for (role, pid), points in seen.items()}
    write_json(config.out, {**record, "processes": rows})
    Path(config.out).with_suffix(".points.json").write_text(json.dumps(points) + "\n", encoding="utf-8")
    plot(seen, Path(config.out).with_suffix(".png"))
    sys.exit(1 if status or left or not saved else 0)


if __name__ == "__main__":
    main()
