"""What goes wrong in a run, one by one: what the user sees, and what was lost of it.

    python bench/bad_inputs.py        # a quarter of an hour on 2 cores; a full disk needs Linux's `unshare`

Three lists. REFUSED are commands that cannot work: each must end with status 2 and one line, before anything
is written. RESUMED are runs to which something happens that they can be resumed after: each must end with the
metrics and the weights, bit for bit, of a run to which nothing happened. STOPPED are faults that are put into
the program by hand, a line of Python each, as no input makes them: each must be caught, by name.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from tqdm import tqdm
from transformers.hf_argparser import HfArg

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as a script, only bench/ is there

from bench.kills import same, steps_of, torchrun  # noqa: E402
from run import parse_flags, surroundings, write_json, write_text  # noqa: E402

DPO, GRPO, EVALUATE = "train_dpo.py", "train_grpo.py", "evaluate.py"
SMALL = "--data tiny@validation --steps 6 --prompts-per-step 4 --samples-per-prompt 8 --max-new-tokens 32"
SMALL += " --lr 1e-3 --sync-every 3 --save-every 2 --keep 3 --engine transformers"

FILES = {  # name: content
    "empty.jsonl": "",
    "broken.jsonl": '{"problem": "1 + 1?", "answer": "2"}\n{"problem": "cut he',
    "fields.jsonl": '{"text": "What?"}\n',
    "golds.jsonl": '{"problem": "Which?", "answer": "\\\\frac{1}{"}\n',
    "good.jsonl": '{"problem": "What is 1 + 1?", "answer": "2"}\n',
    "chat.jsonl": '{"instruction": "Hi"}\n',
    "folder/note.txt": "no model\n",
    "used/metrics.jsonl": "{}\n",
    "file": "",
}
REFUSED = [  # script, flags; {} is a folder with FILES, in which run/ is a finished run of SMALL
    (DPO, "--sync-every 0"),
    (DPO, "--sync-every 2.5"),
    (DPO, "--sync-evry 3"),
    (DPO, "--sync-ref-every 0"),
    (DPO, "--steps many"),
    (DPO, "--prompts-per-step 0"),
    (DPO, "--samples-per-prompt 1"),
    (DPO, "--micro-batch-tokens 0"),
    (DPO, "--ahead 0"),
    (DPO, "--temperature 0"),
    (DPO, "--lr inf"),
    (DPO, "--dtype int8"),
    (DPO, "--engine tgi"),
    (DPO, "--eval-every 0"),
    (DPO, "--keep 0"),
    (DPO, "--max-new-tokens maths=8"),
    (DPO, "--pairing best"),
    (DPO, "--beta 0"),
    (DPO, "--nll-coef -1"),
    (GRPO, "--clip-low 1.5"),
    (GRPO, "--tis-cap 0.5"),
    (GRPO, "--kl-coef -1"),
    (GRPO, "--advantage-scale mean"),
    (DPO, "--model no/such"),
    (DPO, "--model {}/folder"),
    (DPO, "--data {}/none.jsonl"),
    (DPO, "--data {}/empty.jsonl"),
    (DPO, "--data {}/broken.jsonl"),
    (DPO, "--data {}/fields.jsonl"),
    (DPO, "--data {}/golds.jsonl"),
    (DPO, "--data {}/chat.jsonl"),
    (DPO, "--data talk={}/chat.jsonl"),
    (DPO, "--data chat={}/chat.jsonl@all"),
    (DPO, "--data {}/good.jsonl --reward-model rm"),
    (DPO, "--data {}/good.jsonl {}/good.jsonl --prompts-per-step 2"),
    (DPO, "--data {}/good.jsonl --eval-every 5"),
    (DPO, "--max-new-tokens 4000"),
    (EVALUATE, "--model tiny/llama --data tiny@test --max-new-tokens 4000"),
    (DPO, "--attention flash_attention_2"),
    (DPO, "--engine transformers --generator-url http://127.0.0.1:9"),
    (DPO, "--generator-url http://127.0.0.1:9"),
    (DPO, "--run-dir {}/used"),
    (DPO, "--run-dir {}/file"),
    (DPO, "--run-dir {}/used --resume"),
    (DPO, f"{SMALL} --run-dir {{}}/run"),
    (DPO, f"{SMALL} --run-dir {{}}/run --resume --lr 1e-5"),
    (DPO, f"{SMALL} --run-dir {{}}/run --resume --sync-every 1"),
    (DPO, f"{SMALL} --run-dir {{}}/run --resume --seed 1"),
]
STOPPED = {  # what is wrong: the fault, in Python, flags, and what the last error must say
    "a weight is not sent": (
        "import sync; of = sync.full_weights; "
        "sync.full_weights = lambda p, d: ((n, w) for n, w in of(p, d) if 'layers.1.mlp.down' not in n)",
        "--engine vllm",
        "weights were sent",
    ),
    "a weight is sent with its old value": (
        "import sync; of, old = sync.full_weights, {}; "
        "sync.full_weights = lambda p, d: ((n, old.setdefault(n, w.clone()) if '1.mlp.down' in n else w) "
        "for n, w in of(p, d))",
        "--engine vllm",
        "disagree on the canary",
    ),
    "nothing arrives after the first copies": (
        "import generate; G = generate.VLLMGenerator; of, calls = G.load_weights, []; "
        "G.load_weights = lambda g, w: (calls.append(1), of(g, w) if len(calls) < 3 else "
        "(names := {n for n, _ in w}, names))[1]",
        "--engine vllm",
        "disagree on the canary",
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
        "grader workers in a row",
    ),
}


@dataclass
class Config:
    only: Literal["refused", "resumed", "stopped"] | None = HfArg(default=None, help="One list alone.")
    out: str = HfArg(default="results/bad_inputs/numbers.json", help="Beside it, the same as table.md.")


def python(*command, **options):
    """Run a Python program to its end: its status and what it wrote, stderr last."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, **options
    )
    return done.returncode, done.stdout, done.stderr


def lines_of(said):
    """What a program wrote, without progress bars, which end where the next one or another line begins."""
    lines = [line.split("\r")[-1].strip() for line in said.splitlines()]
    return [line for line in lines if line and not re.search(r"\d+%\||\d+/\d+ \[", line)]


def last_line(said):
    """The last line that is no progress bar's."""
    return (lines_of(said) or [""])[-1]


def snapshot(folder):
    """{path: digest} of all that is in a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refuse(script, flags, folder):
    """One of REFUSED."""
    words = flags.replace("{}", str(folder)).split()
    if script != EVALUATE and "--run-dir" not in words:
        words += ["--run-dir", str(folder / "new")]
    before = snapshot(folder)
    status, _, said = python(script, *words)
    changed = snapshot(folder) != before
    return {
        "what": f"`{script} {flags.replace(SMALL, '...').replace('{}/', '')}`",
        "seen": last_line(said).replace(f"{folder}/", ""),
        "lost": "something was written" if changed else "nothing",
        "good": status == 2 and len(lines_of(said)) == 1 and not changed,
    }


def stop(what, fault, flags, expected, folder):
    """One of STOPPED."""
    run_dir, ranks = folder / re.sub(r"\W", "_", what), 2 if flags == "2 ranks" else 1
    program = folder / "program.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{fault}\nimport train_dpo; train_dpo.main()\n"
    )
    launch = torchrun(2) if ranks == 2 else []
    more = "" if ranks == 2 else flags
    status, _, said = python(*launch, program, *f"{SMALL} {more} --run-dir {run_dir}".split(), timeout=300)
    errors = re.findall(
        r"^(?:\[rank0\]: )?(?:\w+\.)*(\w*Error: .+)$", said, re.M
    )  # the last is the final one
    return {
        "what": what,
        "seen": (errors[-1] if errors else last_line(said)).replace(f"{folder}/", ""),
        "lost": "what came after the last checkpoint",
        "good": status != 0 and bool(errors) and expected in errors[-1],
    }


def cut(path):
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def interrupt(folder, number, flags=SMALL, victim=None):
    """Start a run, signal it (or what it started that `victim` names) after its third step. What it said."""
    command = [sys.executable, DPO, *flags.split(), "--run-dir", str(folder)]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while steps_of(folder) < 3:
        if run.poll() is not None:
            raise RuntimeError(run.stdout.read())
        time.sleep(0.02)
    started = psutil.Process(run.pid).children(recursive=True) if victim else []
    for process in [p for p in started if victim in " ".join(p.cmdline())] or [run]:
        process.send_signal(number)
    return last_line(run.communicate(timeout=300)[0])


def resumed(folder, straight):
    """For each thing that happens to a run, which then goes on: (what, what was seen, the run's folder)."""
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
    if not run.exists() or "No space left" not in log.read_text():
        raise RuntimeError(done.stdout + done.stderr + log.read_text())
    yield "the disk is full; room is made", last_line(log.read_text()), run


def compare(what, seen, run, straight):
    """One of RESUMED, beside the run to which nothing happened."""
    try:
        good = all(same(straight, run))
    except (OSError, ValueError) as error:
        return {"what": what, "seen": seen, "lost": f"the run cannot be read: {error}", "good": False}
    lost = "nothing: same metrics, same weights" if good else "the run is another one"
    return {"what": what, "seen": seen, "lost": lost, "good": good}


def as_markdown(tables):
    """A table each."""
    lines = []
    for name, rows in tables.items():
        lines += [f"\n**{name.capitalize()}**\n", "| what is wrong | what is shown | lost |", "|---|---|---|"]
        for row in rows:
            seen = row["seen"].replace("|", "\\|")
            mark = "" if row["good"] else "NOT AS IT SHOULD BE: "
            lines.append(f"| {row['what']} | {mark}`{seen}` | {row['lost']} |")
    return "\n".join(lines).strip() + "\n"


def main(args=None):
    config = parse_flags(Config, args)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"  # a model that does not exist is looked for nowhere else
    tables = {name: [] for name in ("refused", "resumed", "stopped") if config.only in (None, name)}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, content in FILES.items():
            write_text(folder / name, content)
        status, _, said = python(DPO, *SMALL.split(), "--run-dir", folder / "run")
        assert status == 0, said
        if "refused" in tables:
            tables["refused"] = [refuse(*case, folder) for case in tqdm(REFUSED, desc="refused")]
        if "resumed" in tables:
            for case in tqdm(resumed(folder, folder / "run"), desc="resumed"):
                # on a server, vLLM samples: the run beside which it stands is one of its own
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
