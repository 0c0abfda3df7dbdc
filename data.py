"""Load prompts: problems with their gold answers, and requests to a chat model.

    load_prompts("tiny")                             the embedded problems (tiny/make.py), the training split
    load_prompts("tiny@test")                        ... the held-out ones
    load_prompts("problems.jsonl")                   a .jsonl, .json, .csv (or their .gz) or .parquet file
    load_prompts("AI-MO/NuminaMath-CoT@validation")  a data set on the Hugging Face Hub, or in a folder
    load_prompts("openai/gsm8k:main")                one that has several configurations
    load_prompts("chat=allenai/WildChat-1M")         requests; chat=tiny are the embedded ones (tiny/chat.py)
    load_sources(["math=tiny:2", "chat=tiny:1"])     both, two math prompts for each chat prompt

Each row is read by its own fields, in any case; null and [] count as absent, and so does an empty cell of a
.csv, whose other cells are texts as they are written. The first field found wins:

problem  `prompt` or `context_messages`, a list of messages (verl, DAPO, TRL, OpenRLHF): used as they are;
         `problem`, `question`, a text: wrapped in the paper's prompt;
         `prompt`, `input`, a text (TRL, OpenRLHF): wrapped, too, unless it says how to answer (SAYS_HOW);
         `messages`, `conversations`: used as they are, up to the user's last turn
gold     `ground_truth` in `reward_model`, `answer`, the last box of `solution`, `ground_truth`, `label`,
         `target`, a short `solution` without a `problem`, the assistant's last box
request  a string; the user's first turn in a list (CONVERSATIONS, `prompt`); `instruction`, `prompt`, `input`

Data are split by a hash of the prompt's text, except `tiny` and sets whose only part is test or validation.
"""

import csv
import glob
import gzip
import hashlib
import io
import json
import math
import os
import random
import re
import tempfile
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from grader.as_meant import BOX, box_at

TASKS = ("math", "chat")
TINY = {"math": Path(__file__).parent / "tiny/problems", "chat": Path(__file__).parent / "tiny/requests"}
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")
SPLITS = ("train", "validation", "test")
HELD_OUT = {"math": 1980, "chat": 470}  # prompts in validation, and as many in test (paper sections 4 and 6)

# owner/name, with a dot only before a digit (NuminaMath-1.5): data/typo.txt is a mistake, not a Hub name.
HUB_DATA = re.compile(r"[\w-]+/[\w-]+(\.\d[\w-]*)*(:[\w.-]+)?")

CACHED_FROM = 5000  # prompts: with fewer nothing is cached on disk, since computing it takes seconds at most

# The user turn (the paper's figure 4). Its three parts are one line break apart; the paper may have two,
# which our copy does not show.
MATH_PROMPT = (
    "Given the following problem, reason and give a final answer to the problem.\n"
    "Problem: {problem}\n"
    r"Your response should end with 'The final answer is $\boxed{[answer]}$. I hope it is correct.' "
    "where [answer] is the response to the problem."
)

WHOLE, TALKS = ("prompt", "context_messages"), ("messages", "conversations")  # lists of messages
TEXTS = ("problem", "question", "prompt", "input")
GOLDS = ("reward_model", "answer", "solution's box", "ground_truth", "label", "target", "solution", "reply")
USUAL = {"problem", "question", "answer", "solution's box", None}  # fields that need no mention
CONVERSATIONS = ("conversation", "messages", "turns", "conversations", "context_messages")  # of requests
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
SAYS_HOW = re.compile(r"\\boxed|####|</?answer>|step[ -]by[ -]step")  # not AMC's "final answer"
PROSE = re.compile(r"[^\W\d_]{2,}\s+[^\W\d_]{2,}")  # two words: a solution, not an answer

# The values of `source` in NuminaMath-CoT and -1.5: a row that has one is filtered, in any file or data set.
NUMINA_SYNTHETIC = ("orca_math", "synthetic_amc", "synthetic_math")
NUMINA_SOURCES = NUMINA_SYNTHETIC + (
    *("amc_aime", "aops_forum", "cn_contest", "cn_k12", "gsm8k", "inequalities", "math", "metamath"),
    *("number_theory", "olympiads", "olympiads_ref"),
)
NUMINA_FILTERS = (*NUMINA_SYNTHETIC, "proof", "multiple choice")

LONGEST_REQUEST = 4000  # characters, some 1,000 tokens: as long as the paper's longest response in chat
# Words that tell languages apart where a row has no label: frequent in one, rare in the other.
ENGLISH = (
    "the a an of to in is and for i you it that this with on what how are can my be do as write from not "
    "your have which will make give explain who when by or if all about please"
)
FOREIGN = (
    "de la el los las que en un una con por para como del es mi le les des est et une je pour dans sur il di "
    "che per e o da em um uma der die das und ist ein eine mit für von ich het een van voor yang dan untuk "
    "dengan dari ini na ne ve bir czy jak jest w z si se sono puoi dei della salut hola"
)

# Broad on purpose: a lost problem is one in 260,000, but on a proof no response could earn the reward.
ASKS_FOR_PROOF = re.compile(
    r"\b([Pp]rove|[Dd]isprove|([Ss]how|[Vv]erify|[Dd]emonstrate)\s+that|Show(?!\s+(your|all)\b))\b"
)


@dataclass(frozen=True)
class Prompt:
    id: str  # from the problem's text alone: the same in every file, split and run
    task: str  # "math" or "chat": which reward scores the responses
    messages: list[dict[str, str]]  # [{"role": "user", "content": ...}], before the chat template
    answer: str | None  # the gold; None where there is nothing to verify
    row: dict = field(default_factory=dict, repr=False)  # as it was read: for the user's own reward


def load_prompts(spec: str, own_reward: bool = False) -> list[Prompt]:
    """The prompts of `[TASK=]NAME[@SPLIT]`; TASK is math or chat, SPLIT is train, validation, test or all.

    The default task is math; the default split is `all` for a file, else `train`, or a set's only part.
    own_reward: problems need no gold, and keep their rows. Raises ValueError, in one line, on bad input.
    """
    task, name, split = split_spec(spec)
    if split not in (None, *SPLITS, "all"):
        raise ValueError(f"--data {spec}: unknown split '{split}': use train, validation, test or all")

    if name == "tiny":  # already split, disjoint by construction
        files = [TINY[task] / f"{part}.jsonl" for part in SPLITS if (split or "train") in (part, "all")]
        return make_prompts(chain.from_iterable(map(read_file, files)), name, task, own_reward)
    if name.endswith(SUFFIXES):
        rows, split = read_file(Path(name)), split or "all"
    elif HUB_DATA.fullmatch(name) or os.path.isdir(name):
        part, rows = read_dataset(name)
        whole = part in ("validation", "test")  # a benchmark: none of it is for training
        if whole and split not in (None, part, "all"):
            raise ValueError(f"--data {spec}: its only part is named '{part}': use @{part}")
        if whole:
            print(f"data: {name}: its only part is named '{part}', taken whole", flush=True)
        split = "all" if whole else split or "train"
    else:
        kinds = f"a file in {', '.join(SUFFIXES)}, a folder or a Hub name owner/name"
        raise ValueError(f"--data {spec}: no such data: use tiny, {kinds}")
    return take_split(make_prompts(rows, name, task, own_reward), split, name)


def split_spec(spec: str) -> tuple[str, str, str | None]:
    """(task, name, split) of `[TASK=]NAME[@SPLIT]`; the split is None if it names none."""
    task, name, split = re.fullmatch(r"(?:(\w+)=)?(.*?)(?:@(\w*))?", spec, re.DOTALL).groups()
    if task not in (None, *TASKS):
        raise ValueError(f"--data {spec}: unknown task '{task}': use math=... or chat=...")
    return task or "math", name, split


def split_weight(spec: str) -> tuple[str, int]:
    """(spec without it, weight) of `SPEC[:WEIGHT]`: a whole number after the last colon, or 1."""
    spec, weight = re.fullmatch(r"(.*?)(?::([1-9]\d*))?", spec, re.DOTALL).groups()
    return spec, int(weight or 1)


def tasks_of(specs: list[str]) -> list[str]:
    """The tasks that `--data` names, in order: math, chat, or both."""
    return sorted({split_spec(spec)[0] for spec in specs})


def load_sources(specs: list[str], own_reward: bool = False) -> list[tuple[list[Prompt], int]]:
    """(prompts, weight) of each `SPEC[:WEIGHT]`: a source gives its weight's share of a step's prompts.

    Prompts that an earlier source has are left out and their count printed: no step has a prompt twice.
    """
    sources, seen = [], set()
    for spec in specs:
        name, weight = split_weight(spec)
        prompts = load_prompts(name, own_reward)
        fresh = [prompt for prompt in prompts if prompt.id not in seen]
        if known := len(prompts) - len(fresh):
            print(f"data: {name}: {known:,} prompts are in an earlier source, too; left out")
        if not fresh:
            raise ValueError(f"--data {spec}: all its prompts are in the sources before it; name it once")
        seen |= {prompt.id for prompt in fresh}
        sources.append((fresh, weight))
    return sources


def load_held_out(
    specs: list[str], sources: list[tuple[list[Prompt], int]], own_reward: bool = False
) -> dict[str, list[Prompt]]:
    """{spec: its validation prompts} of the training data; `sources` is load_sources(specs).

    ValueError, in one line, if nothing is held out.
    """
    trained = {prompt.id for prompts, _ in sources for prompt in prompts}
    held_out = {}
    for spec in specs:
        source, _ = split_weight(spec)
        _, name, split = split_spec(source)
        source = source.removesuffix(f"@{split}")
        if split not in (None, "train") or (split is None and name.endswith(SUFFIXES)):
            raise ValueError(f"--eval-every: --data {spec} leaves nothing held out; train on {source}@train")
        prompts = held_out[f"{source}@validation"] = load_prompts(f"{source}@validation", own_reward)
        if any(prompt.id in trained for prompt in prompts):
            raise ValueError(f"--eval-every: {source}@validation is trained on from another source, too")
    return held_out


def take_split(prompts: list[Prompt], split: str, name: str) -> list[Prompt]:
    """Test has the HELD_OUT lowest ids, validation the next (a tenth each of a small set), train the rest."""
    if split == "all":
        return prompts
    held_out = HELD_OUT[prompts[0].task]
    size = held_out if len(prompts) >= 10 * held_out else len(prompts) // 10
    ids = sorted(prompt.id for prompt in prompts)
    chosen = set({"test": ids[:size], "validation": ids[size : 2 * size], "train": ids[2 * size :]}[split])
    if not chosen:
        raise ValueError(f"--data {name}@{split}: its {len(ids)} prompts are too few to split, use @all")
    return [prompt for prompt in prompts if prompt.id in chosen]


def read_file(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield (where, row): `where` names the place in an error message."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    refuse_pointer(path)
    if path.suffix == ".parquet":
        yield from read_dataset(str(path))[1]
        return
    content = path.read_bytes()
    try:
        if content.startswith(b"\x1f\x8b"):  # not by its name: some programs unpack what they download
            content = gzip.decompress(content)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: a damaged .gz file ({error}): download it again") from None
    if path.name.endswith((".csv", ".csv.gz")):
        yield from read_table(text, path)
        return
    one_a_line = path.name.endswith((".jsonl", ".jsonl.gz"))
    # Not splitlines(): a JSON string may hold U+2028 and its like, which that takes for line ends.
    for number, line in enumerate(text.split("\n") if one_a_line else [text], 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            hint = "" if one_a_line else "; if it has one object a line, name it .jsonl"
            at = number + error.lineno - 1
            raise ValueError(f"{path}, line {at}: not JSON ({error.msg}){hint}") from None
        if one_a_line:
            yield f"{path}, line {number}", value
        elif isinstance(value, list):
            yield from ((f"{path}, item {item}", row) for item, row in enumerate(value, 1))
        else:
            raise ValueError(f"{path}: holds one {type(value).__name__}, not a list of objects")


def read_table(text: str, path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of a CSV file, whose first line has the names. Cells are texts; an empty one is None.

    `datasets` would make numbers of them: 1.2345678901234568e+22 of 12345678901234567890123.
    """
    csv.field_size_limit(2**31 - 1)  # its default, 131,072 characters, is less than a long conversation
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in table:
            if None in row:
                raise csv.Error('more cells than names: put a cell with a comma in "..."')
            yield f"{path}, line {table.line_num}", {name: cell or None for name, cell in row.items()}
    except csv.Error as error:
        raise ValueError(f"{path}, line {table.reader.line_num}: not CSV ({error})") from None


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is a Git LFS pointer, which Git without LFS leaves in place of a large file."""
    with path.open("rb") as file:
        return file.read(23) == b"version https://git-lfs"


def refuse_pointer(path: Path) -> None:
    """ValueError in one line for a Git LFS pointer in place of the data."""
    if is_lfs_pointer(path):
        raise ValueError(f"{path}: a Git LFS pointer, not the data: run `git lfs pull` there")


def read_dataset(name: str) -> tuple[str, Iterator[tuple[str, dict]]]:
    """(the part's name, its rows as from read_file) of a Hub set, a folder or a .parquet file.

    If a set has splits, only its `train` is read, and our splits are cut from it: its test set stays unseen.
    """
    import datasets  # 1 s to import

    try:
        if name.endswith(".parquet"):
            parts = datasets.load_dataset("parquet", data_files=glob.escape(name))
        else:
            repository, _, configuration = name.partition(":")
            parts = datasets.load_dataset(repository, configuration or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        for file in filter(Path.is_file, Path(name).rglob("*")):
            refuse_pointer(file)
        reason = str(error.__cause__ or error).partition("\n")[0]
        remedy = "check the name and the network, or download it and pass a file or folder"
        raise ValueError(f"--data {name}: cannot be loaded ({reason}): {remedy}") from error
    if "train" not in parts and len(parts) > 1:
        raise ValueError(f"--data {name}: no split 'train' but {', '.join(parts)}: pass one as a file")
    part = "train" if "train" in parts else next(iter(parts))
    return part, ((f"{name}, row {number}", row) for number, row in enumerate(parts[part], 1))


def make_prompts(
    rows: Iterable[tuple[str, dict | str]], name: str, task: str = "math", own_reward: bool = False
) -> list[Prompt]:
    """Turn rows into prompts, in order; drop, count and print those that are repeated, problems that
    NuminaMath's filters reject or that have no answer (MATH's training set has four), and requests that are
    not in English, too long or empty.
    """
    prompts: dict[str, Prompt] = {}
    dropped, read, total, numina, unanswered = Counter(), Counter(), 0, False, None
    for where, row in tqdm(rows, desc="data", unit="row", delay=3, leave=False):
        total += 1
        reason, gold, form = None, None, (None, "", None)
        if task == "math":
            form, text, messages, gold = read_problem(row, where, own_reward)
            if row.get("source") in NUMINA_SOURCES:
                numina, reason = True, numina_filter(row, text, gold)
            if reason is None and gold is None and not own_reward:
                reason, unanswered = "no answer", unanswered or where
        else:
            text = request_text(row, where)
            messages = [{"role": "user", "content": text}]
            reason = request_filter(row, text)
        try:
            key = prompt_id(text)
        except UnicodeEncodeError:  # half of a surrogate pair, where an emoji was cut: no tokenizer takes it
            key, reason = text, reason or "half a character"
        if reason is None and key in prompts:
            reason = "repeated"
        if reason:
            dropped[reason] += 1
            continue
        kept = {"data_source": name, **row} if own_reward and task == "math" else {}
        prompts[key] = Prompt(key, task, messages, gold, kept)
        read[form] += 1

    reasons = dict.fromkeys((*(NUMINA_FILTERS if numina else ()), *dropped))  # a filter that drops none, too
    counts = ", ".join(f"{reason} {dropped[reason]:,}" for reason in reasons)
    note = f"{len(prompts):,} prompts from {total:,} rows, dropped: {counts}"
    note += f"; the first without an answer is {unanswered}" if unanswered else ""
    if not prompts:
        raise ValueError(f"--data {name}: {note if total else 'is empty'}")
    if reasons:
        print(f"data: {name}: {note}", flush=True)
    if any({field, gold} - USUAL for field, _, gold in read):
        found = "; ".join(f"{n:,} in '{f}' {how}, gold in '{g}'" for (f, how, g), n in read.items())
        unboxed = sum("boxed" not in str(prompt.messages) for prompt in prompts.values())
        hint = f"; {unboxed:,} ask for no \\boxed{{}}: an answer outside LaTeX earns 0" if unboxed else ""
        print(f"data: {name}: problems: {found}{'' if own_reward else hint}", flush=True)
    return list(prompts.values())


def filled(row: dict) -> dict[str, Any]:
    """A row's fields by lower-case name, with verl's gold, without null, NaN (pandas) and []."""
    fields = {key.lower(): value for key, value in row.items()}
    verl = fields.get("reward_model")
    fields["reward_model"] = verl.get("ground_truth") if isinstance(verl, dict) else None
    return {key: value for key, value in fields.items() if value not in (None, []) and value == value}


def read_turns(conversation: list) -> list[dict[str, Any]]:
    """The turns as {"role", "content"}, also from ShareGPT's {"from", "value"}. The role may be ""."""
    turns = [turn if isinstance(turn, dict) else {"content": turn} for turn in conversation]  # MT-bench's
    roles = [str(turn.get("role") or turn.get("from") or "").lower() for turn in turns]
    contents = [turn.get("content", turn.get("value")) for turn in turns]
    return [{"role": ROLES.get(r, r), "content": c} for r, c in zip(roles, contents, strict=True)]


def request_text(row: dict | str | None, where: str) -> str:
    """The user's first turn, of a string or of a row with any of the fields above; "" if it is empty."""
    if isinstance(row, str | None):
        return (row or "").strip()
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {type(row).__name__}, not a string or an object with 'instruction'")
    fields, known = filled(row), (*CONVERSATIONS, "instruction", "prompt", "input")
    asked = fields.get("instruction") or fields.get("prompt") or ""
    text = next((fields[name] for name in CONVERSATIONS if name in fields), asked)
    if isinstance(text, list):
        users = [turn["content"] for turn in read_turns(text) if turn["role"] in ("user", "")]
        text = (users[0] or "") if users else None
    elif text is asked and isinstance(text, str):
        about = fields.get("input")  # Alpaca's
        match fields.get("instances"):
            case [{"input": of_first}, *_]:  # Self-Instruct's
                about = about or of_first
        text += f"\n\n{about}" if about else ""
    else:
        text = None
    if not isinstance(text, str) or not {*known} & {*map(str.lower, row)}:
        raise ValueError(f"{where}: no user's text in {', '.join(known)}; its fields: {', '.join(row)}")
    return text.strip()


def request_filter(row: dict | str, text: str) -> str | None:
    """Why a request is dropped, or None. Users' requests are filtered; a benchmark's are all kept.

    WildChat labels a row's language; without a label `is_english` guesses.
    """
    if not text:
        return "empty"
    if isinstance(row, dict) and "conversation" not in row:
        return None
    label = row.get("language") if isinstance(row, dict) else None
    if label != "English" if label else not is_english(text):
        return "not English"
    return "too long" if len(text) > LONGEST_REQUEST else None


def is_english(text: str) -> bool:
    """Guess from the alphabet and from frequent words; undecided text counts as English.

    >>> [is_english(text) for text in ("hello there", "Jelaskan 2 metode yang saudara pelajari", "Привет")]
    [True, False, False]
    """
    letters = [character for character in text if character.isalpha()]
    if sum(character.isascii() for character in letters) < 0.9 * len(letters):
        return False
    words = Counter(re.findall(r"[^\W\d_]+", text.lower()))
    english, foreign = (sum(words[word] for word in known.split()) for known in (ENGLISH, FOREIGN))
    return english >= foreign


def cached(what: str, items: list, rest: Callable[[], list], compute: Callable[[], Any]) -> Any:
    """The JSON value that compute() returns, read from disk if it was computed for the same content before.

    It may depend only on `items` (messages, or golds) and on rest(), lists of JSON values. `what` and a hash
    of these name its file in ~/.cache/semi-online (or $XDG_CACHE_HOME). A broken file is not used.
    SEMI_ONLINE_CACHE=off always computes.
    """
    if len(items) < CACHED_FROM or os.environ.get("SEMI_ONLINE_CACHE") == "off":
        return compute()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "semi-online"
    path = folder / f"{what}-{json_hash(chain(rest(), items))[:32]}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["value"]
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"data: {path} is broken ({type(error).__name__}); computed again")
    value = compute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as partial:  # two runs may write the same file
            new = Path(partial) / path.name
            new.write_text(json.dumps({"value": value}), encoding="utf-8")
            new.replace(path)
    except OSError as error:
        print(f"data: {path} cannot be written ({error.strerror}); the next start computes it again")
    return value


def json_hash(values: Iterable[Any]) -> str:
    """A hash of JSON values, in order."""
    content = hashlib.sha256()
    for value in values:
        content.update(json.dumps(value).encode() + b"\n")
    return content.hexdigest()


def prompt_id(text: str) -> str:
    """A prompt's id, from its text alone: the same in every file, split and run."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def read_problem(row: dict, where: str, own_reward: bool = False) -> tuple:
    """((its field, how it is used, the gold's field), the problem, the messages, the gold) of a row.

    ValueError, in one line, for a row without a text, or without a gold's field unless own_reward is set.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {type(row).__name__}, not an object with 'problem' and 'answer'")
    fields, answer, how = filled(row), None, "as it stands"
    lists = [name for name in (*WHOLE, *TALKS) if isinstance(fields.get(name), list)]
    texts = TEXTS[: -1 if "instruction" in fields else None]  # Alpaca's `input` is half of a request
    order = (*(name for name in lists if name in WHOLE), *texts, *lists)
    name = next((name for name in order if name in fields), None)
    text = fields.get(name)
    if name in lists:
        turns = read_turns(text)
        end = max((number for number, turn in enumerate(turns, 1) if turn["role"] == "user"), default=0)
        messages, rest = turns[:end], turns[end:]
        if name in TALKS:
            answer, rest = rest[-1]["content"] if rest else None, []
        if not end or rest or not all(turn["role"] and isinstance(turn["content"], str) for turn in messages):
            raise ValueError(f"{where}: '{name}' must be turns of a role and a text, the last the user's")
        text = "\n\n".join(turn["content"] for turn in messages if turn["role"] != "system")
        text = fields.get("problem", fields.get("question", text))  # a problem has one id in all forms
    if not isinstance(text, str) or not text.strip():
        known = "'problem', 'question', 'prompt', 'input' or 'messages' (requests are chat=...)"
        raise ValueError(f"{where}: no text in {known}; its fields: {', '.join(row)}")
    text = text.strip()
    if name not in lists:
        stands = name not in USUAL and (own_reward or SAYS_HOW.search(text))
        how = how if stands else "wrapped in the paper's prompt"
        # Not format(): both sides are full of braces.
        messages = [{"role": "user", "content": text if stands else MATH_PROMPT.replace("{problem}", text)}]
    if not own_reward and answer is None and {*GOLDS}.isdisjoint(map(str.lower, row)):
        fields = ", ".join(row)
        raise ValueError(
            f"{where}: no 'answer' and no 'solution'; its fields: {fields}; add one, or score by --reward"
        )
    field, gold = gold_answer(row, where, answer, own_reward)
    return (name, how, field), text, messages, gold


def gold_answer(row: dict, where: str = "", answer: Any = None, own_reward: bool = False) -> tuple:
    r"""(field, gold): a text, GSM8K's number after #### (1,234 -> 1234), a number (27.0 -> 27), the last box
    of a solution or an assistant's answer, a list's only item. ValueError, in one line, if it has several.
    """
    fields = filled(row)
    boxed = {"solution's box": fields.get("solution"), "reply": answer}  # where a gold is in the last box
    for name in GOLDS:
        value = boxed_answer(str(boxed[name] or "")) if name in boxed else fields.get(name)
        if isinstance(value, list):
            several = len({*map(str, value)}) > 1
            if several and not own_reward:
                raise ValueError(f"{where}: several answers in '{name}'; keep one, or make them one text")
            value = None if several else value[0]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return name, str(value)
        if not isinstance(value, str):
            continue
        if "####" in value:
            value = value.rpartition("####")[2].strip()
            if not value.startswith(("(", "[", "{", r"\{")):  # (1,234) is a pair
                value = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", value)
        if name == "solution" and ({"problem", "question"} & fields.keys() or PROSE.search(value)):
            continue
        return name, value.strip() or None
    return None, None


def boxed_answer(text: str) -> str | None:
    r"""The content of the last \boxed{...} or \fbox{...}, braces balanced, or None. MATH has `\boxed 2` too.

    >>> boxed_answer(r"so $x=\boxed{1}$, hence $\boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    """
    boxes = list(BOX.finditer(text))
    return box_at(text, boxes[-1].end()) if boxes else None


def numina_filter(row: dict, problem: str, gold: str | None) -> str | None:
    """The name of the first of the paper's filters (section 4) that rejects the row; None if none does.

    NuminaMath-1.5 labels a row: `question_type`, and "proof" or "notfound" for its answer. CoT does not.
    """
    if row["source"] in NUMINA_SYNTHETIC:
        return row["source"]
    label = row.get("question_type")
    if label == "proof" or gold == "proof" or (label is None and ASKS_FOR_PROOF.search(problem)):
        return "proof"
    if label == "MCQ" or (label is None and is_multiple_choice(problem, gold)):
        return "multiple choice"
    return "no answer" if gold == "notfound" else None


def is_multiple_choice(problem: str, gold: str | None) -> bool:
    """Option letters for a gold (`B`, `ABD`, `(C) 12`), or options (A), (B), (C), (D) in the problem."""
    markup = re.compile(r"\\(text|textbf|textrm|mathrm|mathbf)\b|[{}]")
    letters = markup.sub("", gold or "").strip()
    if re.match(r"\([A-F]\)", letters) or re.fullmatch(r"(?=\w)A?B?C?D?E?F?", re.sub(r"[\s,.]", "", letters)):
        return True
    plain = unicodedata.normalize("NFKC", problem)  # NuminaMath's Chinese sources have full-width （A）
    rest = markup.sub("", re.sub(r"\\q?quad", " ", plain))
    for letter in "ABCD":  # `(A)`, `A.`, `A:` or `A)`, in this order; not P(A), AB: or the point $A$.
        option = re.search(rf"(?<![A-Za-z])\({letter}\)|(?<![\w$(]){letter}[.:)、](?=[\s$\\(])", rest)
        if option is None:
            return False
        rest = rest[option.end() :]
    return True


class PromptIterator:
    """`next(it)` gives this rank's P / world prompts of the next step, epoch after epoch, without end.

    The P prompts of a step depend on the prompts, the seed and the step alone; rank r takes the r-th slice.
    Each epoch is shuffled anew. Prompts that are left at its end, too few for a step, start the next epoch's
    first step: no prompt is dropped and no step is short. No step has a prompt twice, because groups are told
    apart by prompt id; so P may not exceed the number of prompts (MixedIterator checks).
    """

    def __init__(self, prompts: list[Prompt], per_step: int, seed: int, rank: int = 0, world: int = 1):
        self.prompts, self.per_step, self.seed, self.rank, self.world = prompts, per_step, seed, rank, world
        self.step, self.epoch, self.queue = 0, 0, []

    def draw(self) -> list[int]:
        """Take the indices of the next step's P prompts off the queue."""
        if len(self.queue) < self.per_step:
            order = list(range(len(self.prompts)))
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
            left = set(self.queue)
            order.sort(key=lambda index: index in left)  # stable: those left over come last, in a later step
            self.queue += order
            self.epoch += 1
        batch = self.queue[: self.per_step]
        del self.queue[: self.per_step]
        self.step += 1
        return batch

    def __next__(self) -> list[Prompt]:
        batch, share = self.draw(), self.per_step // self.world
        return [self.prompts[index] for index in batch[self.rank * share : (self.rank + 1) * share]]

    @cached_property
    def content(self) -> str:
        """A hash of all that the prompts hold, but data_source: a path may be written in another way."""
        rows = ({k: v for k, v in prompt.row.items() if k != "data_source"} for prompt in self.prompts)
        held = ([p.id, p.messages, p.answer, row] for p, row in zip(self.prompts, rows, strict=True))
        return json_hash(held)[:16]

    def state_dict(self) -> dict:
        """The same on every rank and for every `world`: a run may resume on another number of ranks."""
        return {"step": self.step, "seed": self.seed, "prompts-per-step": self.per_step, "data": self.content}

    def load_state_dict(self, state: dict) -> None:
        """Draw up to the step of `state`; ValueError if its steps were drawn from other data or settings."""
        if self.seed != state["seed"]:
            raise ValueError(f"--seed {self.seed}: the checkpoint has {state['seed']}: resume with the same")
        if self.per_step != state["prompts-per-step"]:
            shares = f"{self.per_step} of these prompts, the checkpoint has {state['prompts-per-step']}"
            raise ValueError(f"--prompts-per-step: a step takes {shares}: resume with the same")
        if self.content != state["data"]:
            raise ValueError(
                "--data: the prompts are not those that the checkpoint was drawn from: another file, changed "
                "texts or answers, or other code; resume with the same"
            )
        self.step, self.epoch, self.queue = 0, 0, []
        while self.step < state["step"]:
            self.draw()


class MixedIterator:
    """A PromptIterator for each source of `load_sources`; every step has a share of each, in their order."""

    def __init__(
        self, sources: list[tuple[list[Prompt], int]], per_step: int, seed: int, rank: int = 0, world: int = 1
    ):
        divisor = math.gcd(*(weight for _, weight in sources))
        sources = [(prompts, weight // divisor) for prompts, weight in sources]
        total, flag = sum(weight for _, weight in sources), f"--prompts-per-step {per_step}"
        if per_step % total:
            shares = ":".join(str(weight) for _, weight in sources)
            raise ValueError(f"{flag}: cannot be shared {shares}; use a multiple of {total}")
        self.parts = []
        for prompts, weight in sources:
            share = per_step // total * weight
            if share % world:
                raise ValueError(f"{flag}: {share} of a source, which {world} ranks cannot share")
            if share > len(prompts):
                raise ValueError(f"{flag}: takes {share} prompts from a source of {len(prompts)}")
            self.parts.append(PromptIterator(prompts, share, seed, rank, world))

    def __next__(self) -> list[Prompt]:
        return [prompt for part in self.parts for prompt in next(part)]

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        if len(states) != len(self.parts):
            raise ValueError(f"--data: {len(self.parts)} sources, the checkpoint has {len(states)}: use them")
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
