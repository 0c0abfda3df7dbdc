"""Commands that cannot work, and what each must say: in one line, before anything is computed or written.

test_bad_input.py calls the scripts' main(), bench/bad_inputs.py starts a process for each command. In flags
and messages {} stands for a folder that holds FILES, and a finished run of SMALL as {}/run.
"""

import hashlib
import json
import re
from pathlib import Path

from run import write_text

DPO, GRPO, EVALUATE, SERVE = "train_dpo.py", "train_grpo.py", "evaluate.py", "serve.py"
SHOW, REPORT = "show.py", "tables/report.py"
SMALL = "--data tiny@validation --steps 6 --prompts-per-step 4 --samples-per-prompt 8 --max-new-tokens 32"
SMALL += " --lr 1e-3 --sync-every 3 --save-every 2 --keep 3 --engine transformers"

GOOD = '{"problem": "What is 1 + 1?", "answer": "2"}\n'
FILES = {  # name: content
    "empty.jsonl": "",
    "broken.jsonl": GOOD + '{"problem": "cut he',
    "fields.jsonl": GOOD + '{"text": "What?"}\n',
    "golds.jsonl": '{"problem": "Which?", "answer": "\\\\frac{1}{"}\n',
    "good.jsonl": GOOD,
    "roots.jsonl": '{"prompt": "x^2 = 4?", "label": ["2", "-2"]}\n',
    "pointer.parquet": "version https://git-lfs.github.com/spec/v1\noid sha256:083b\nsize 3754529\n",
    "chat.jsonl": '{"instruction": "Hi"}\n',
    "folder/note.txt": "no model\n",
    "used/metrics.jsonl": "{}\n",
    "mine.py": "def score(solution_str): pass\ndef hint(completions, hint): pass\ndef other(text): pass\n",
    "file": "",
    "cut/metrics.jsonl": '{"step": 0, "reward": 0.5}\n{"step": 1, "rew',
    "foreign/metrics.jsonl": '{"step": 0, "reward": 0.5}\n{"epoch": 1}\n',
    "number/metrics.jsonl": "7\n",
    "nosteps/metrics.jsonl": "",
    "other/eval/3.json": '{"what": "else"}',
    "half/eval/3.json": '{"accuracy": ',
    "odd/config.json": "[]",
    "odd/metrics.jsonl": "",
}
TINY = Path(__file__).parents[1] / "tiny" / "llama"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
CODE = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
CHECKPOINTS = {  # name: what is not as in tiny/llama, whose weights are left out; None removes a file
    "lfs": {"model.safetensors": LFS},
    "cut_weights": {"model.safetensors": (TINY / "model.safetensors").read_bytes()[:90000]},
    "shard": {"model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'},
    "empty_config": {"config.json": b""},
    "cut_tokenizer": {"tokenizer.json": (TINY / "tokenizer.json").read_bytes()[:100]},
    "no_tokenizer": {"tokenizer.json": None},
    "code": {"config.json": json.dumps(CODE).encode(), "mine.py": b"open('ran', 'w')"},
    "tokenizer_code": {
        "tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["mine.Mine", null]}}',
        "mine.py": b"open('ran', 'w')",
    },
    "quantized": {
        "config.json": json.dumps(
            {**json.loads((TINY / "config.json").read_text()), "quantization_config": {"quant_method": "fp8"}}
        ).encode()
    },
}

STEPS = "takes a whole number of steps from 1 up, or inf; got"
COUNT = "takes a whole number from 1 up; got"
POSITIVE = "takes a number above 0; got"
SHARE = "takes a number above 0 and at most 1; got"
COEFFICIENT = "takes a number from 0 up; got"
RUN = "the run in {}/run has"

BOTH = [  # for each of the train scripts: flags, what the line must say
    # A dial of 0 divides by zero; one of -3 never syncs. Break: float for Every.
    *((f"--sync-every {s}", f"--sync-every: {STEPS} '{s}'") for s in ("0", "-3", "abc", "2.5", "nan")),
    # A misspelt flag that is ignored. Break: no look at what is left over in parse_flags.
    ("--sync-evry 3", "unknown flag: --sync-evry 3"),
    # Values that fail deep inside, after the engine has started. Breaks: int for Count; float for Positive;
    # no check of --samples-per-prompt in either script.
    ("--sync-ref-every 0", f"--sync-ref-every: {STEPS} '0'"),
    ("--eval-every 0", f"--eval-every: {STEPS} '0'"),
    ("--steps 0", f"--steps: {COUNT} '0'"),
    ("--steps many", f"--steps: {COUNT} 'many'"),
    ("--prompts-per-step 0", f"--prompts-per-step: {COUNT} '0'"),
    ("--samples-per-prompt 1", "--samples-per-prompt 1: a "),
    ("--micro-batch-tokens 0", f"--micro-batch-tokens: {COUNT} '0'"),
    ("--ahead 0", f"--ahead: {COUNT} '0'"),
    ("--keep 0", f"--keep: {COUNT} '0'"),
    ("--temperature 0", f"--temperature: {POSITIVE} '0'"),
    ("--lr inf", f"--lr: {POSITIVE} 'inf'"),
    ("--dtype int8", "--dtype: invalid choice: 'int8'"),
    ("--engine tgi", "--engine: invalid choice: 'tgi'"),
    (
        "--max-new-tokens maths=8",
        "--max-new-tokens: takes a number, or math=NUMBER,chat=NUMBER; got 'maths=8'",
    ),
    # Mixtures whose error comes late, in a traceback, or names nothing. Break: each check alone.
    ("--data talk={}/chat.jsonl", "--data talk={}/chat.jsonl: unknown task 'talk'"),
    ("--data {}/chat.jsonl", "requests are chat=..."),
    ("--data chat={}/chat.jsonl@all", "--reward-model: chat needs a checkpoint"),
    ("--data chat={}/chat.jsonl@all --reward-model {}/folder", "{}/folder: not a checkpoint"),
    ("--data {}/good.jsonl --reward-model rm", "--reward-model rm: nothing to score"),
    # A reward function found out when the engine is up. Breaks: str for OwnFunction; no shape_of; no check().
    ("--reward mine", "--reward: takes FILE.py:NAME, a function in a file; got 'mine'"),
    ("--reward {}/none.py:score", "--reward: no such file: {}/none.py"),
    (
        "--data {}/good.jsonl --reward {}/mine.py:score --reward-timeout 0",
        f"--reward-timeout: {POSITIVE} '0'",
    ),
    ("--data {}/good.jsonl --reward {}/mine.py:scores", "--reward {}/mine.py:scores: the file has no scores"),
    (
        "--data {}/good.jsonl --reward {}/mine.py:other",
        "--reward {}/mine.py:other: needs one of the parameters",
    ),
    ("--data {}/good.jsonl --reward {}/mine.py:hint", "--reward {}/mine.py:hint: needs hint; --data has the"),
    (
        "--data chat={}/chat.jsonl@all --reward-model rm --reward {}/mine.py:score",
        "--reward {}/mine.py:score: nothing to score, --data has no math",
    ),
    ("--data {}/good.jsonl --eval-every 5", "--eval-every: --data {}/good.jsonl leaves nothing held out"),
    (
        "--data {}/good.jsonl chat={}/chat.jsonl:2 --max-new-tokens math=8",
        "--max-new-tokens math=8: none for chat",
    ),
    (
        "--data {}/good.jsonl {}/good.jsonl",
        "--data {}/good.jsonl: all its prompts are in the sources before it",
    ),
    (
        "--data {}/good.jsonl:2 --prompts-per-step 3",
        "--prompts-per-step 3: takes 3 prompts from a source of 1",
    ),
]
REFUSED = [  # script, flags, what the line must say
    *((script, *case) for script in (DPO, GRPO) for case in BOTH),
    # Terms of a loss that are turned around or infinite. Breaks: float for Coefficient, for Share; no check
    # of --tis-cap.
    (DPO, "--pairing best", "--pairing: invalid choice: 'best'"),
    (DPO, "--pairing all --data chat=tiny --reward-model tiny/reward", "--pairing all: is for math"),
    (DPO, "--beta 0", f"--beta: {POSITIVE} '0'"),
    (DPO, "--nll-coef -1", f"--nll-coef: {COEFFICIENT} '-1'"),
    (DPO, "--entropy-coef nan", f"--entropy-coef: {COEFFICIENT} 'nan'"),
    (DPO, "--grpo-coef inf", f"--grpo-coef: {COEFFICIENT} 'inf'"),
    (GRPO, "--correction foo", "--correction: invalid choice: 'foo'"),
    (GRPO, "--clip-low 1.5", f"--clip-low: {SHARE} '1.5'"),
    (GRPO, "--clip-high 0", f"--clip-high: {POSITIVE} '0'"),
    (GRPO, "--tis-cap 0.5", "--tis-cap 0.5: a cap below 1"),
    # Flags that do nothing. Breaks: each check in check_engine() and in prepare() alone.
    (DPO, "--compile True", "--compile True: on a CPU vLLM switches torch's compiler off"),
    (DPO, "--engine-sleep True", "--engine-sleep: is for a vLLM engine on the trainer's GPU"),
    (DPO, "--generator-devices 6,7", "--generator-devices 6,7: name each GPU once, separated by"),
    (DPO, "--generator-devices 6 6", "--generator-devices 6 6: name each GPU once"),
    (DPO, "--sync-when 0.1", "--sync-when 0.1: every step syncs"),
    (DPO, "--sync-when 0.1 --sync-every inf", "--sync-when 0.1: needs --ahead 1"),
    (DPO, "--sync-when -1", "--sync-when: takes a number from 0 up, or inf"),
    (GRPO, "--kl-coef -1", f"--kl-coef: {COEFFICIENT} '-1'"),
    (GRPO, "--normalize foo", "--normalize: invalid choice: 'foo'"),
    (GRPO, "--advantage-scale mean", "--advantage-scale: invalid choice: 'mean'"),
    # A traceback of the Hub's client; a folder taken for a model. Breaks: no except in load_config; no look
    # for config.json there.
    (DPO, "--model no/such", "--model no/such: no such folder"),
    (DPO, "--model {}/folder", "--model {}/folder: not a Hugging Face checkpoint (it has no config.json)"),
    # Checkpoints that a download left half, or that run code. Breaks: each check in check_files() alone; no
    # one_line() around a load; trust_remote_code=None. The reward model's are the same checks.
    *(
        (script, f"--model {{}}/{name}", f"--model {{}}/{name}: {says}")
        for script in (DPO, EVALUATE, SHOW)
        for name, says in (
            ("lfs", "model.safetensors is Git LFS's pointer to the file; run git lfs pull"),
            ("cut_weights", "model.safetensors is cut, or damaged; download it again"),
            ("shard", "model.safetensors.index.json names model-00001-of-00002.safetensors, which is not"),
            ("empty_config", "{}/empty_config/config.json, line 1: not JSON"),
            ("cut_tokenizer", "its tokenizer (tokenizer.json) cannot be loaded"),
            ("no_tokenizer", "its tokenizer (tokenizer.json) cannot be loaded"),
            ("code", "it wants code of its own to run (auto_map)"),
            ("tokenizer_code", "its tokenizer (tokenizer.json) cannot be loaded: it wants code of its own"),
        )
    ),
    (SERVE, "--model {}/code", "--model {}/code: it wants code of its own"),
    (
        DPO,
        "--data chat=tiny --reward-model {}/code",
        "{}/code: not a checkpoint, in a folder or on the Hub: it",
    ),
    (DPO, "--data chat=tiny --reward-model {}/lfs", "model.safetensors is Git LFS's pointer"),
    # What could be trained, but not exported. Break: no look at quantization_config in prepare().
    (DPO, "--model {}/quantized", "--model {}/quantized: is quantized; train the model that it was made of"),
    # Outputs that cannot be written, found after the work. Breaks: str for OutFile, for OutFolder.
    *(
        (script, f"{flags} {{}}/{where}", f"{flags.split()[-1]}: {{}}/{where}: {says}")
        for script, flags in (
            (EVALUATE, "--model tiny/llama --out"),
            (EVALUATE, "--model tiny/llama --answers"),
            (REPORT, "--runs {}/run --out"),
            (REPORT, "--runs {}/run --table"),
            (REPORT, "--runs {}/run --chat-table"),
        )
        for where, says in (
            ("file/deep/a.json", "cannot be written: {}/file is a file"),
            ("folder", "is a folder; name a file in it"),
        )
    ),
    # Results that are cut, or another's. Breaks: json.loads for read_lines, for read_json; no comparison of
    # keys in read_directory; no look for the settings in check_alike.
    (REPORT, "--runs {}/cut", "{}/cut/metrics.jsonl, line 2: not JSON"),
    (REPORT, "--runs {}/foreign", "{}/foreign/metrics.jsonl, line 2: not a step's metrics"),
    (REPORT, "--runs {}/number", "{}/number/metrics.jsonl, line 1: not a JSON object"),
    (REPORT, "--runs {}/nosteps", "a run without a single step in its metrics.jsonl"),
    (REPORT, "--runs {}/other --table {}/t.md", "an evaluation without data; take what evaluate.py writes"),
    (REPORT, "--runs {}/half", "{}/half/eval/3.json, line 1: not JSON"),
    (DPO, "--run-dir {}/odd --resume", "{}/odd/config.json: holds a list, not an object"),
    (DPO, "--date yesterday", "--date yesterday: Invalid isoformat string: 'yesterday'; write it as in 2026"),
    # Data that is wrong somewhere. Break: leave the file's name, or the line, out of one message.
    (DPO, "--data {}/none.jsonl", "{}/none.jsonl: no such file"),
    (DPO, "--data {}/empty.jsonl", "--data {}/empty.jsonl: is empty"),
    (DPO, "--data {}/broken.jsonl", "{}/broken.jsonl, line 2: not JSON"),
    (DPO, "--data {}/fields.jsonl", "{}/fields.jsonl, line 2: no text in"),
    # Golds that may mean any or all; a file never downloaded. Breaks: no `several` in gold_answer; no
    # refuse_pointer.
    (DPO, "--data {}/roots.jsonl", "{}/roots.jsonl, line 1: several answers in 'label'"),
    (DPO, "--data {}/pointer.parquet", "{}/pointer.parquet: a Git LFS pointer"),
    # Problems nobody can be right about. Break: return all prompts from gradable().
    (DPO, "--data {}/golds.jsonl", "1 of 1 gold answers, the first is '\\\\frac{1}{'"),
    # Responses that the engine would cut, or refuse, later. Break: no check in fit_context.
    (DPO, "--data tiny@test --max-new-tokens 4000", "--max-new-tokens 4000: the longest prompt has"),
    (
        EVALUATE,
        "--model tiny/llama --data tiny@test --max-new-tokens 4000",
        "--max-new-tokens 4000: the longest prompt has",
    ),
    # Kernels and servers that are not there. Breaks: no check_attention; no check_engine; no except in
    # Servers._check.
    (DPO, "--attention varlen", "--attention varlen: needs a GPU; leave the flag out"),
    (DPO, "--engine transformers --generator-url http://127.0.0.1:9", "--generator-url: these are vLLM"),
    (
        DPO,
        "--data {}/good.jsonl --prompts-per-step 1 --generator-url http://127.0.0.1:9",
        "--generator-url http://127.0.0.1:9: no server that takes weights (http://127.0.0.1:9 does not",
    ),
    # Tokens that are not there, and a server that runs anybody's code. Breaks: no check of token_file in
    # check_engine; no except in read_token; no re.fullmatch there; no look at LOOPBACK in server_token.
    (DPO, "--generator-token-file {}/file", "--generator-token-file {}/file: is for running servers"),
    *(
        (
            DPO,
            f"--data {{}}/good.jsonl --prompts-per-step 1 --generator-url http://127.0.0.1:9 "
            f"--generator-token-file {file}",
            f"--generator-token-file {file}: {problem}",
        )
        for file, problem in (("{}/none", "No such file"), ("{}/file", "holds no token"))
    ),
    *(
        (SERVE, f"--host {host}", f"--host {host.split()[0]}: whoever reaches the server runs code on it")
        for host in ("0.0.0.0", ":: --token-file {}/none")
    ),
    # A run written over another, or half of it with one learning rate and half with another. Breaks: no look
    # inside the directory; put lr into run.FREE.
    (DPO, "--run-dir {}/file", "--run-dir: {}/file: is a file"),
    (DPO, "--run-dir {}/file/run", "--run-dir: {}/file/run: cannot be written: {}/file is a file"),
    (DPO, "--run-dir {}/used", "--run-dir {}/used: not empty"),
    (DPO, "--run-dir {}/used --resume", "--run-dir {}/used: has no config.json"),
    (DPO, f"{SMALL} --run-dir {{}}/run", "--run-dir {}/run: not empty; --resume it"),
    (
        DPO,
        f"{SMALL} --run-dir {{}}/run --resume --lr 1e-5",
        f"--lr 1e-05: {RUN} 0.001; resume it with the same",
    ),
    (DPO, f"{SMALL} --run-dir {{}}/run --resume --sync-every 1", f"--sync-every 1: {RUN} 3"),
    (DPO, f"{SMALL} --run-dir {{}}/run --resume --seed 1", f"--seed 1: {RUN} 0"),
    (
        DPO,
        f"{SMALL} --run-dir {{}}/run --resume --data tiny@test",
        f"--data ['tiny@test']: {RUN} ['tiny@validation']",
    ),
]


def write_files(folder: Path) -> None:
    """Write FILES and CHECKPOINTS into a folder."""
    for name, content in FILES.items():
        write_text(folder / name, content)
    for name, changes in CHECKPOINTS.items():
        (folder / name).mkdir()
        files = {path.name: path.read_bytes() for path in TINY.iterdir() if path.suffix != ".safetensors"}
        no_weights = {"model.safetensors": b"\2\0\0\0\0\0\0\0{}"}  # the length of a header, and one
        for file, content in {**files, **no_weights, **changes}.items():
            if content is not None:
                (folder / name / file).write_bytes(content)


def words_of(script: str, flags: str, folder: Path) -> list[str]:
    """The words of a command. A train script that does not refuse it takes one step, in {}/new."""
    words = flags.replace("{}", str(folder)).split()
    for flag, value in {"--run-dir": f"{folder}/new", "--steps": "1"}.items():
        words += [flag, value] if script in (DPO, GRPO) and flag not in words else []
    return words


def snapshot(folder: Path) -> dict[str, str]:
    """{path: digest} of all that is in a folder, empty folders included."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(
            path.read_bytes() if path.is_file() else b""
        ).hexdigest()
        for path in sorted(folder.rglob("*"))
    }


def lines_of(said: str) -> list[str]:
    """The lines that a program wrote, without progress bars, which end where the next bar or line begins."""
    lines = [line.split("\r")[-1].strip() for line in said.splitlines()]
    return [line for line in lines if line and not re.search(r"\d+%\||\d+/\d+ \[", line)]
