"""Faults in a run, one by one: what the user sees, and what is lost.

    python bench/bad_inputs.py        # a quarter of an hour on 2 cores; a full disk needs Linux's `unshare`

Three lists. REFUSED (tests/bad_inputs.py) are commands that cannot work: each must end with status 2 and one
line that says what is wrong, before anything is written. RESUMED are runs that are disturbed and then
resumed: each must end with the metrics and the weights, bit for bit, of an undisturbed run. STOPPED are
faults injected into the program, a line of Python each, because no input causes them: each must be caught,
by name.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from tqdm import tqdm
from transformers.hf_argparser import HfArg

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as a script, only bench/ is there

from flags import OutFile, parse_flags  # noqa: E402

from bench.kills import same, wait_for_step  # noqa: E402
from ranks import launch  # noqa: E402
from run import surroundings, write_json, write_text  # noqa: E402
from serve import TOKEN  # noqa: E402
from tests.bad_inputs import DPO, REFUSED, SMALL, lines_of, snapshot, words_of, write_files  # noqa: E402

STOPPED = {  # what is wrong: the fault, in Python, flags, and what the last error must say
    "a weight is not sent": (
        "import sync; of = sync.full_weights; "
        "sync.full_weights = lambda p, d: ((n, w) for n, w in of(p, d) if 'layers.1.mlp.down' not in n)",
        "--engine vllm",
        "did not arrive: model.layers.1.mlp.down_proj.weight",
    ),
    "a weight is sent with its old value": (
        "import sync; of, old = sync.full_weights, {}; "
        "sync.full_weights = lambda p, d: ((n, old.setdefault(n, w.clone()) if '1.mlp.down' in n else w) "
        "for n, w in of(p, d))",
        "--engine vllm",
        "arrived as other bytes: model.layers.1.mlp.down_proj.weight",
    ),
    "nothing arrives after the first copies": (
        "import generate; G = generate.VLLMGenerator; of, seen = G.load_weights, []; "
        "G.load_weights = lambda g, w: (seen.append(of(g, w)) if len(seen) < 2 else list(w), seen[-1])[1]",
        "--engine vllm",
        "arrived as other bytes",
    ),
    "the prefix cache is not reset": (
        "import generate; generate.VLLMGenerator.reset_prefix_cache = lambda g: False",
        "--engine vllm",
        "prefix cache still holds",
    ),
    "a rank does not come to the sync": (
        "import ranks, sync, train_dpo; sync.PATIENCE_S = 3; of = train_dpo.sync; "
        "train_dpo.sync = lambda *a: of(*a) if ranks.rank() == 0 else __import__('time').sleep(60)",
        "2 ranks",
        "Ranks 1 failed",
    ),
    "the engine returns fewer responses than asked": (
        "import generate; G = generate.TransformersGenerator; of = G._complete; "
        "G._complete = lambda *a: [group[:-1] for group in of(*a)]",
        "",
        "7 responses, not 8",
    ),
    "the engine returns a response without a token": (
        "import generate; G = generate.TransformersGenerator; of = G._complete; "
        "G._complete = lambda *a: [[([], [], 'stop'), *group[1:]] for group in of(*a)]",
        "",
        "0 tokens",
    ),
    "the engine returns an id that is no token's": (
        "import generate; G = generate.TransformersGenerator; of = G._complete; "
        "G._complete = lambda *a: [[([9999], [-1.0], 'stop'), *group[1:]] for group in of(*a)]",
        "",
        "ids from 9999",
    ),
    "gradients are not finite": (
        "import train_dpo; train_dpo.clip_gradients = lambda *a: float('nan')",
        "",
        "third gradient in a row",
    ),
    "every grader dies of what it is to grade": (
        "from grader.workers import _Worker as W; of = W.send; "
        "W.send = lambda w, n, request: (of(w, n, request), request[0] == 'grade' and w.process.kill())",
        "",
        "workers in a row",
    ),
}


@dataclass
class Config:
    only: Literal["refused", "resumed", "stopped"] | None = HfArg(default=None, help="One list alone.")
    out: OutFile = HfArg(default="results/bad_inputs/numbers.json", help="Beside it, the same as table.md.")


def python(*command: str | Path, **options: Any) -> tuple[int, str, str]:
    """Run a Python program to its end: its status and what it wrote, stderr last."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, **options
    )
    return done.returncode, done.stdout, done.stderr


def last_line(said: str) -> str:
    """The last line that is not a progress bar."""
    return (lines_of(said) or [""])[-1]


def refuse(script: str, flags: str, says: str, folder: Path) -> dict[str, Any]:
    """One of REFUSED."""
    before = snapshot(folder)
    env = {name: value for name, value in os.environ.items() if name != TOKEN}
    status, _, said = python(script, *words_of(script, flags, folder), env=env)
    changed, lines = snapshot(folder) != before, lines_of(said)
    as_said = len(lines) == 1 and says.replace("{}", str(folder)) in lines[0]
    return {
        "what": f"`{script} {flags.replace(SMALL, '...').replace('{}/', '')}`",
        "seen": last_line(said).replace(f"{folder}/", ""),
        "lost": "something was written" if changed else "nothing",
        "good": status == 2 and as_said and not changed,
    }


def stop(what: str, fault: str, flags: str, expected: str, folder: Path) -> dict[str, Any]:
    """One of STOPPED."""
    run_dir, ranks = folder / re.sub(r"\W", "_", what), 2 if flags == "2 ranks" else 1
    program = folder / "program.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{fault}\nimport train_dpo; train_dpo.main()\n"
    )
    start = launch(2) if ranks == 2 else []
    more = "" if ranks == 2 else flags
    status, _, said = python(*start, program, *f"{SMALL} {more} --run-dir {run_dir}".split(), timeout=300)
    errors = re.findall(r"^(?:\[rank0\]: )?(?:\w+\.)*(\w*Error: .+)$", said, re.M)  # the last ended it
    return {
        "what": what,
        "seen": (errors[-1] if errors else last_line(said)).replace(f"{folder}/", ""),
        "lost": "what came after the last checkpoint",
        "good": status != 0 and bool(errors) and expected in errors[-1],
    }


def cut(path: Path) -> None:
    """Truncate a file to its first half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def interrupt(folder: Path, number: int, flags: str = SMALL, victim: str | None = None) -> str:
    """Start a run, signal it (or its child named `victim`) after its third step; return its last line."""
    log = folder.with_suffix(".txt")
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, DPO, *flags.split(), "--run-dir", str(folder)]
        run = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
    wait_for_step(run, folder, 3, log)
    started = psutil.Process(run.pid).children(recursive=True) if victim else []
    for process in [p for p in started if victim in " ".join(p.cmdline())] or [run]:
        process.send_signal(number)
    run.wait(timeout=300)
    return last_line(log.read_text(encoding="utf-8"))


def resumed(folder: Path, straight: Path) -> Iterator[tuple[str, str, Path]]:
    """Disturb and resume runs: yield (what happened, what was seen, the run's folder) of each."""
    finish = [DPO, *SMALL.split(), "--resume", "--run-dir"]

    def damaged(what, damage):
        run = folder / re.sub(r"\W", "_", what)
        shutil.copytree(straight, run, symlinks=True)
        shutil.rmtree(run / "checkpoints" / "6")  # the one before it is inside a window
        damage(run / "checkpoints" / "4")
        status, out, said = python(*finish, run)
        seen = [line for line in out.splitlines() if "not whole" in line]
        return what, seen[0].replace(f"{run.parent}/{run.name}", "RUN") if seen else last_line(said), run

    yield damaged("the last checkpoint's rollouts are cut", lambda path: cut(path / "rollouts.jsonl"))
    yield damaged("the last checkpoint's tensors are cut", lambda path: cut(next(path.glob("*.safetensors"))))
    yield damaged("the last checkpoint's state is cut", lambda path: cut(path / "state.json"))

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        run = folder / number.name
        seen = interrupt(run, number)
        python(*finish, run)
        yield number.name, seen if number != signal.SIGKILL else "nothing: the process is gone", run

    run = folder / "server"
    served = SMALL.replace("--engine transformers", "--generator-devices cpu")
    seen = interrupt(run, signal.SIGKILL, served, victim="vllm.entrypoints.launchers")
    python(DPO, *served.split(), "--resume", "--run-dir", run)
    yield "the vLLM server dies (--generator-devices)", seen, run

    disk, run, log = folder / "disk", folder / "full", folder / "full.txt"
    disk.mkdir()
    train = f"{sys.executable} {DPO} {SMALL} --run-dir {disk}/run"
    script = f"mount -t tmpfs -o size=30m tmpfs {disk}; {train} 2> {log}; "
    script += f"mount -o remount,size=1g {disk}; {train} --resume 2>&1; cp -r {disk}/run {run}"
    done = subprocess.run(["unshare", "-rm", "bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    if not run.exists() or "No space left" not in log.read_text(encoding="utf-8"):
        raise RuntimeError(done.stdout + done.stderr + log.read_text(encoding="utf-8"))
    yield "the disk is full; room is made", last_line(log.read_text(encoding="utf-8")), run


def compare(what: str, seen: str, run: Path, straight: Path) -> dict[str, Any]:
    """One of RESUMED, compared with the undisturbed run."""
    try:
        good = all(same(straight, run))
    except (OSError, ValueError) as error:
        return {"what": what, "seen": seen, "lost": f"the run cannot be read: {error}", "good": False}
    lost = "nothing: same metrics, same weights" if good else "the run is another one"
    return {"what": what, "seen": seen, "lost": lost, "good": good}


def as_markdown(tables: dict[str, list[dict]]) -> str:
    """One table per list."""
    lines = []
    for name, rows in tables.items():
        lines += [f"\n**{name.capitalize()}**\n", "| what is wrong | what is shown | lost |", "|---|---|---|"]
        for row in rows:
            seen = row["seen"].replace("|", "\\|")
            mark = "" if row["good"] else "NOT AS IT SHOULD BE: "
            lines.append(f"| {row['what']} | {mark}`{seen}` | {row['lost']} |")
    return "\n".join(lines).strip() + "\n"


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"  # a model that does not exist is not looked up on the Hub
    tables = {name: [] for name in ("refused", "resumed", "stopped") if config.only in (None, name)}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_files(folder)
        status, _, said = python(DPO, *SMALL.split(), "--run-dir", folder / "run")
        assert status == 0, said
        if "refused" in tables:
            tables["refused"] = [refuse(*case, folder) for case in tqdm(REFUSED, desc="refused")]
        if "resumed" in tables:
            for case in tqdm(resumed(folder, folder / "run"), desc="resumed"):
                # a server samples with vLLM, so its run is compared with a vLLM run
                straight = folder / "run"
                if "server" in case[0]:
                    straight = folder / "served"
                    served = SMALL.replace("--engine transformers", "--engine vllm")
                    python(DPO, *served.split(), "--run-dir", straight)
                tables["resumed"].append(compare(*case, straight))
        if "stopped" in tables:
            for what, fault in tqdm(STOPPED.items(), desc="stopped"):
                tables["stopped"].append(stop(what, *fault, folder))
    print(as_markdown(tables))
    write_json(config.out, {**tables, **surroundings()})
    write_text(Path(config.out).with_name("table.md"), as_markdown(tables))
    bad = [row["what"] for rows in tables.values() for row in rows if not row["good"]]
    print(json.dumps(bad) if bad else "all as they should be")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
