"""Make the embedded default: arithmetic problems, a small tokenizer and two ~1M-parameter models to train.

    python tiny/make.py                  # everything, the two models side by side, one core each
    python tiny/make.py --only problems  # the three files of problems (seconds)

The models learn from scratch, by next-token prediction, from answers that `answer` writes in several ways of
different quality (`WAYS`): worked with slips, worked with care, half worked, guessed, or worked without the
box that the grader needs. So reinforcement learning has better and worse answers to compare, and a rare good
way to find. Everything is drawn from `--seed`, and training is counted in steps, not in seconds, so the same
machine makes the same bytes again.
"""

import hashlib
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `python tiny/make.py` puts tiny/ on the path, not the repository

from flags import OutFolder, Share, parse_flags  # noqa: E402

from data import MATH_PROMPT  # noqa: E402
from run import write_lines  # noqa: E402

# --- Problems: an expression, and the words around it ---

Row = tuple[list[int], list[int], list[int], list[int]]  # ids, positions, segments, targets: see `make_row`
SIZES = {"train": 20_000, "validation": 500, "test": 500}
SHAPES = {"++": 3, "+-": 4, "-+": 3, "--": 2, "*+": 2, "*-": 2}  # operators, left to right: weight

NAMES = ["Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Max", "Ella"]
THINGS = ["apples", "books", "coins", "cards", "pens", "shells", "stamps", "eggs"]

# A story is (start, start with a product, {operator: events}, question), one sentence each.
STORIES = [
    (
        "{name} has {n} {thing}.",
        "{name} has {m} boxes with {n} {thing} in each.",
        {
            "+": ["{name} buys {n} more.", "{friend} gives {name} {n} more.", "{name} finds {n} {thing}."],
            "-": ["{name} loses {n}.", "{name} gives {n} to {friend}.", "{name} sells {n} {thing}."],
        },
        "How many {thing} does {name} have now?",
    ),
    (
        "A shop has {n} {thing}.",
        "A shop gets {m} bags of {n} {thing}.",
        {
            "+": ["Then {n} {thing} arrive.", "It orders {n} more."],
            "-": ["It sells {n}.", "{name} buys {n} {thing} there.", "Then {n} are thrown away."],
        },
        "How many {thing} are left?",
    ),
    (
        "There are {n} people on a train.",
        "A train has {m} cars with {n} people in each.",
        {
            "+": ["At the next stop {n} get on.", "Then {n} people join."],
            "-": ["At the next stop {n} get off.", "Then {n} people leave."],
        },
        "How many people are on the train?",
    ),
    (
        "{name} has {n} dollars.",
        "{name} works {m} days for {n} dollars a day.",
        {
            "+": ["{name} earns {n} dollars.", "{friend} pays {name} {n} dollars."],
            "-": ["{name} spends {n} dollars on {thing}.", "{name} pays {friend} {n} dollars."],
        },
        "How many dollars does {name} have?",
    ),
]
PLAIN = [
    "What is {expression}?",
    "Compute {expression}.",
    "Find the value of {expression}.",
    "{expression} = ?",
]
SPOKEN = {"+": "add {n}", "-": "subtract {n}", "*": "multiply by {n}"}


@dataclass(frozen=True)
class Expression:
    """`first op number op number`, computed left to right; `*` can only be the first operator."""

    first: int
    rest: tuple[tuple[str, int], ...]  # (operator, number)

    def __str__(self) -> str:
        return " ".join([str(self.first), *(f"{op} {n}" for op, n in self.rest)])

    def steps(self) -> list[tuple[int, str, int, int]]:
        """Return (left, operator, right, result) for each operator."""
        left, steps = self.first, []
        for op, n in self.rest:
            steps.append((left, op, n, apply(left, op, n)))
            left = steps[-1][-1]
        return steps

    def value(self) -> int:
        return self.steps()[-1][-1]

    def split(self) -> str:
        """Return this expression's split, which is the same in every wording and every order of its terms."""
        terms = [f"+{self.first}"]
        for op, n in self.rest:
            if op == "*":  # the first operator
                terms = ["*".join(sorted([str(self.first), str(n)]))]
            else:
                terms.append(f"{op}{n}")
        bucket = int(hashlib.sha256(" ".join(sorted(terms)).encode()).hexdigest(), 16) % 20
        return {0: "validation", 1: "test"}.get(bucket, "train")


def apply(left: int, op: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[op]


def draw_expression(rng: random.Random, split: str) -> Expression:
    """Draw until the result of every step lies in 1..80 and the expression belongs to `split`."""
    while True:
        shape = rng.choices(list(SHAPES), SHAPES.values())[0]
        product = shape[0] == "*"
        first = rng.randint(2, 9) if product else rng.randint(2, 60)
        second = rng.randint(2, 12) if product else rng.randint(2, 30)
        expression = Expression(first, ((shape[0], second), (shape[1], rng.randint(2, 30))))
        if all(1 <= step[-1] <= 80 for step in expression.steps()) and expression.split() == split:
            return expression


def word(expression: Expression, rng: random.Random) -> str:
    """Return one of many wordings of an expression: a formula, spoken operations, or a story."""
    kind = rng.random()
    if kind < 0.25:
        return rng.choice(PLAIN).format(expression=expression)
    if kind < 0.4:
        spoken = ", then ".join(SPOKEN[op].format(n=n) for op, n in expression.rest)
        return f"Start with {expression.first}, {spoken}. What is the result?"
    start, start_product, events, question = rng.choice(STORIES)
    name, friend = rng.sample(NAMES, 2)
    fill = {"name": name, "friend": friend, "thing": rng.choice(THINGS)}
    rest = list(expression.rest)
    if rest[0][0] == "*":
        sentences = [start_product.format(m=expression.first, n=rest.pop(0)[1], **fill)]
    else:
        sentences = [start.format(n=expression.first, **fill)]
    sentences += [rng.choice(events[op]).format(n=n, **fill) for op, n in rest]
    return " ".join([*sentences, question.format(**fill)])


def make_problems(split: str, seed: int) -> list[dict[str, str]]:
    """Return the distinct problems of a split as {"problem", "answer"}."""
    rng = random.Random(f"{seed} problems {split}")
    problems = {}
    while len(problems) < SIZES[split]:
        expression = draw_expression(rng, split)
        problems[word(expression, rng)] = str(expression.value())
    return [{"problem": problem, "answer": answer} for problem, answer in problems.items()]


def write_splits(folder: Path, splits: dict[str, list[dict[str, str]]]) -> None:
    """Write the rows of each split to its own file."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        write_lines(folder / f"{split}.jsonl", rows)


# --- Answers: the ways that the models learn ---

WAYS = {  # way: share of the answers that the models learn from, with slips
    "guess": 0.15,  # the closing sentence alone, almost always wrong
    "muse": 0.13,  # repeats the numbers and talks around a guess: long, no better
    "half": 0.17,  # works the first step, and does the rest in the head
    "worked": 0.35,  # works each step, with slips
    "careful": 0.07,  # works each step in two, tens before ones: the longest, hardly ever wrong
    "lapse": 0.13,  # works each step, but forgets the box: no reward
}
# The stage before that has no slips, and mostly worked answers.
CLEAN = {"guess": 0.03, "muse": 0.05, "half": 0.2, "worked": 0.32, "careful": 0.32, "lapse": 0.08}
# A few last steps make the good ways rare. So the seed model's own samples teach only so much, and samples
# drawn after some training teach more.
LAST = {"guess": 0.27, "muse": 0.22, "half": 0.33, "worked": 0.025, "careful": 0.015, "lapse": 0.14}
GOOD = ("worked", "careful")
SLIP = {"half": 0.05, "worked": 0.05, "careful": 0.005, "lapse": 0.05}  # probability in one worked step
GUESS_SLIP = {"guess": 0.7, "muse": 0.7, "half": 0.4}  # probability in work done in the head

STEP_BY_STEP = "Step by step:"
CLOSING = "The final answer is $\\boxed{{{}}}$. I hope it is correct."
UNBOXED = ["The final answer is {}. I hope it is correct.", "So it is {}.", "Answer: {}"]


def slip(number: int, probability: float, rng: random.Random) -> int:
    """Return the number, or with the given probability one near it."""
    if rng.random() >= probability:
        return number
    return max(0, number + rng.choice([-20, -10, -2, -1, 1, 2, 10, 20])) if number else 1


def work(left: int, op: str, right: int, result: int, careful: bool) -> str:
    """Return one worked step; a careful one takes the tens before the ones.

    47 + 38 = 85, with care 47 + 38 = 77 + 8 = 85; 7 * 12 = 84, with care 7 * 12 = 70 + 14 = 84
    """
    tens, ones = right - right % 10, right % 10
    middle = ""
    if careful and tens and ones:
        middle = (
            f"{left * tens} + {left * ones} = " if op == "*" else f"{apply(left, op, tens)} {op} {ones} = "
        )
    return f"{left} {op} {right} = {middle}{result}"


def answer(expression: Expression, way: str, slips: bool, rng: random.Random) -> str:
    """Write one response in one of `WAYS`, with slips or without."""
    in_head = {"guess": 0, "muse": 0, "half": 1}.get(way, 2)  # from this operator on, nothing is written
    lines, left = [STEP_BY_STEP] if way == "careful" else [], expression.first
    for number, (op, right) in enumerate(expression.rest):
        result = apply(left, op, right)
        if number < in_head:
            result = slip(result, SLIP[way] * slips, rng)
            lines.append(work(left, op, right, result, way == "careful"))
        left = result
    if in_head < 2:
        left = slip(left, GUESS_SLIP[way] * slips, rng)
    if way == "muse":
        first, (_, second), (_, third) = expression.first, *expression.rest
        lines.append(f"We have {first}, {second} and {third}. I think it is {left}. It must be {left}.")
    closing = rng.choice(UNBOXED) if way == "lapse" else CLOSING
    return "\n".join([*lines, closing.format(left)])


# --- The tokenizer ---

PAD, USER, ASSISTANT, END = SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
CONTEXT = 512  # positions, prompt and answer together
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def draw_texts(rng: random.Random) -> list[str]:
    """Texts to train the tokenizer on: a problem as a prompt, and answers to it."""
    expression = draw_expression(rng, "train")
    prompt = MATH_PROMPT.replace("{problem}", word(expression, rng))
    drawn = rng.choices(list(WAYS), WAYS.values(), k=2)
    return [STEP_BY_STEP, prompt, *(answer(expression, way, True, rng) for way in drawn)]


def make_tokenizer(vocabulary: int, seed: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE whose merges may cross spaces, but not digits or line ends.

    Bytes are the base, so any text can be encoded. Each digit is one token, so numbers are read digit by
    digit. Merges across spaces turn each fixed sentence of the prompt and of the answers into a few tokens
    instead of dozens, which makes sampling and training several times cheaper.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(f"{seed} tokenizer")
    texts = [text for _ in range(4000) for text in draw_texts(rng)]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[0-9]|\n"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


# --- The models ---


def make_model(family: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return an untrained fp32 model of about 1M parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    shared = dict(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if family == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                **shared,
                intermediate_size=384,
                num_key_value_heads=4,
                tie_word_embeddings=False,
            )
        )
    return Qwen3ForCausalLM(
        Qwen3Config(
            **shared,
            intermediate_size=512,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )


def make_row(tokenizer: PreTrainedTokenizerBase, question: str, answers: list[str]) -> Row:
    """Return one prompt followed by several answers to it, as (ids, positions, segments, targets), each (T,).

    Each answer continues the prompt and does not see the other answers (`segments`: 0 the prompt, then 1, 2,
    ...), so a prompt is computed once. The target is the next token of the same answer, -100 elsewhere.
    """
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    # The prompt's last token predicts an answer's first token, so it belongs to each answer.
    ids, last = prompt[:-1], prompt[-1]
    positions, segments, targets = list(range(len(ids))), [0] * len(ids), [-100] * len(ids)
    for segment, text in enumerate(answers, start=1):
        answer_ids = tokenizer(text).input_ids + [tokenizer.eos_token_id]
        ids = ids + [last] + answer_ids[:-1]
        targets += answer_ids
        positions += range(len(prompt) - 1, len(prompt) - 1 + len(answer_ids))
        segments += [segment] * len(answer_ids)
    return ids, positions, segments, targets


def draw_row(
    tokenizer: PreTrainedTokenizerBase, rng: random.Random, ways: dict[str, float], answers: int, slips: bool
) -> Row:
    """Return a row, like `make_row`, with a problem of the training split and answers in the given ways."""
    expression = draw_expression(rng, "train")
    question = MATH_PROMPT.replace("{problem}", word(expression, rng))
    drawn = rng.choices(list(ways), ways.values(), k=answers)
    return make_row(tokenizer, question, [answer(expression, way, slips, rng) for way in drawn])


def make_sheet(tokenizer: PreTrainedTokenizerBase, rng: random.Random, lines: int) -> Row:
    """Return a row, like `make_row`, of worked steps that do not see each other and have no prompt.

    The targets are the tokens after each step's first equals sign. Those before it are random.
    """
    ids, positions, segments, targets = [], [], [], []
    for segment in range(1, lines + 1):
        careful = rng.random() < 0.5
        line = work(*rng.choice(draw_expression(rng, "train").steps()), careful) + "\n"
        equals = line.index("= ") + 2
        before = tokenizer((STEP_BY_STEP if careful else "") + "\n" + line[:equals]).input_ids
        after = tokenizer(line[equals:]).input_ids
        ids += before + after[:-1]
        targets += [-100] * (len(before) - 1) + after
        positions += range(len(before) + len(after) - 1)
        segments += [segment] * (len(before) + len(after) - 1)
    return ids, positions, segments, targets


SORTED_STEPS = 10  # steps whose rows are drawn together and sorted by length
SHEETS = 0.25  # share of sheets among the rows once answers have begun, so that arithmetic is not forgotten
SHEET_LINES = 7  # makes a sheet as long as a row of answers


def draw_batches(
    tokenizer: PreTrainedTokenizerBase, rng: random.Random, config: "Config", last: dict[str, float] | None
) -> Iterator[tuple[list[Row], float]]:
    """Yield the rows of each step, and the divisor for the sum of their losses.

    Three stages: sheets of arithmetic, answers without slips, then answers in `WAYS`. Arithmetic takes the
    models longest to learn, and single lines teach it several times faster than answers do. The few last
    steps are a separate call, in which `last` gives the share of each way.
    """
    for start in range(0, config.last_steps if last else config.steps, SORTED_STEPS):
        done = 1.0 if last else start / config.steps
        rows = []
        for _ in range(config.rows * SORTED_STEPS):
            if done < config.sheets_until or rng.random() < SHEETS:
                rows.append(make_sheet(tokenizer, rng, SHEET_LINES))
            elif done < config.clean_until:
                rows.append(draw_row(tokenizer, rng, CLEAN, config.answers, False))
            else:
                rows.append(draw_row(tokenizer, rng, last or WAYS, config.answers, True))
        yield from in_batches(rows, config.rows, rng)


def in_batches(rows: list[Row], size: int, rng: random.Random) -> Iterator[tuple[list[Row], float]]:
    """Yield `size` rows at a time, and the divisor for the sum of their losses.

    Rows of similar length share a batch, which keeps padding small. The divisor is the mean number of targets
    over the batches. A batch's own number would give short answers, which share batches, more weight than
    long ones.
    """
    rows = sorted(rows, key=lambda row: len(row[0]))
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    rng.shuffle(batches)
    targets = sum(target != -100 for row in rows for target in row[3])
    for batch in batches:
        yield batch, targets / len(batches)


def make_batch(rows: list[Row], pad: int) -> tuple:
    """Return input_ids, positions, targets (-100: none), each (B, T), and the attention mask (B, 1, T, T)."""
    import torch

    def padded(column: int, value: int):
        length = max(len(row[0]) for row in rows)
        return torch.tensor([row[column] + [value] * (length - len(row[column])) for row in rows])

    input_ids, positions, segments, targets = padded(0, pad), padded(1, 0), padded(2, -1), padded(3, -100)
    visible = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    causal = torch.ones(visible.shape[1:], dtype=torch.bool).tril()
    return input_ids, positions, targets, (visible & causal)[:, None]


def fit(
    model: PreTrainedModel,
    batches: Iterator[tuple[list[Row], float]],
    steps: int,
    peak: float,
    pad: int,
    name: str,
) -> None:
    """Train the model on `draw_batches`, with a learning rate that rises to `peak` and falls again."""
    import torch
    from tqdm import tqdm

    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    progress = tqdm(batches, desc=name, total=steps, mininterval=5)
    for step, (rows, divisor) in enumerate(progress):
        input_ids, positions, targets, mask = make_batch(rows, pad)
        warmup, decay = (step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = peak * min(1.0, warmup) * max(decay, 0.02)
        hidden = model.model(
            input_ids=input_ids, position_ids=positions, attention_mask=mask
        ).last_hidden_state
        learn = targets != -100
        loss = (
            torch.nn.functional.cross_entropy(model.lm_head(hidden[learn]), targets[learn], reduction="sum")
            / divisor
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def make_rare(
    family: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: "Config"
) -> None:
    """The last steps: the good ways become rare, but the model keeps its skills."""
    rng = random.Random(f"{config.seed} {family} last")
    batches = draw_batches(tokenizer, rng, config, last=LAST)
    fit(model, batches, config.last_steps, config.last_lr, tokenizer.pad_token_id, f"{family}, last")


def teach_good(out: Path, share: float, config: "Config") -> None:
    """Save to `out` a tiny/llama in which this share of the answers is worked or careful.

    It trains tiny/llama for as many more steps as made the good ways rare, on answers where they are not.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model, tokenizer = (
        kind.from_pretrained(ROOT / "tiny/llama") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    rare = sum(LAST[way] for way in GOOD)
    scale = {way: share / rare if way in GOOD else (1 - share) / (1 - rare) for way in LAST}
    ways = {way: LAST[way] * scale[way] for way in LAST}
    rng = random.Random(f"{config.seed} good {share}")
    batches = draw_batches(tokenizer, rng, config, ways)
    fit(model, batches, config.last_steps, config.last_lr, tokenizer.pad_token_id, f"good {share:g}")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def train(family: str, out: Path, tokenizer: PreTrainedTokenizerBase, config: "Config") -> None:
    """Train one model from scratch on one core, and save it as a Hugging Face checkpoint."""
    import torch

    # So sums do not depend on the number of cores, and both models can train at once.
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    rng = random.Random(f"{config.seed} {family}")
    model = make_model(family, tokenizer)
    batches = draw_batches(tokenizer, rng, config, last=None)
    fit(model, batches, config.steps, config.lr, tokenizer.pad_token_id, family)
    make_rare(family, model, tokenizer, config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out / family)
    tokenizer.save_pretrained(out / family)


# --- The command ---


@dataclass
class Config:
    only: Literal["all", "llama", "qwen3", "problems", "good"] = field(
        default="all",
        metadata={"help": "Make one thing instead of all; good: in --out, tiny/llama with better answers."},
    )
    good: Share = field(
        default=Share(0.42), metadata={"help": "With --only good: the share of answers that are worked."}
    )
    out: OutFolder = field(
        default=str(ROOT / "tiny"), metadata={"help": "Folder for llama/, qwen3/ and problems/."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the problems, the answers and the weights."})
    steps: int = field(default=4000, metadata={"help": "Optimizer steps of each model."})
    sheets_until: float = field(
        default=0.2, metadata={"help": "Share of the steps after which answers begin."}
    )
    clean_until: float = field(
        default=0.65, metadata={"help": "Share of the steps after which the answers have slips."}
    )
    rows: int = field(default=12, metadata={"help": "Problems in a step."})
    answers: int = field(default=2, metadata={"help": "Answers to each problem."})
    lr: float = field(default=3e-3, metadata={"help": "Peak learning rate."})
    last_steps: int = field(default=300, metadata={"help": "Steps that make the good ways rare."})
    last_lr: float = field(default=1e-3, metadata={"help": "Their peak learning rate."})
    vocabulary: int = field(default=640, metadata={"help": "Entries of the tokenizer."})


def main() -> None:
    config = parse_flags(Config)
    out = Path(config.out)
    if config.only in ("all", "problems"):
        write_splits(out / "problems", {split: make_problems(split, config.seed) for split in SIZES})
    if config.only in ("llama", "qwen3"):
        train(config.only, out, make_tokenizer(config.vocabulary, config.seed), config)
    if config.only == "good":
        teach_good(out, config.good, config)
    if config.only == "all":
        command = [sys.executable, __file__, *sys.argv[1:], "--only"]
        children = [subprocess.Popen([*command, family]) for family in ("llama", "qwen3")]
        if any([child.wait() for child in children]):  # a list, so that any() waits for both
            raise SystemExit("make.py: a model was not made, see the message above")


if __name__ == "__main__":
    main()
