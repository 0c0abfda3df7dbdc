"""The embedded default: two checkpoints of about 1M parameters, their tokenizer, and problems that no split
shares."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import MATH_PROMPT
from tiny import make

TINY = Path(make.__file__).parent
FAMILIES = ["llama", "qwen3"]
SPLITS = ["train", "validation", "test"]


def read_problems(split):
    return [json.loads(line) for line in (TINY / "problems" / f"{split}.jsonl").read_text().splitlines()]


# What the sentences of a story mean, told apart by their verbs; HERO is whose things are counted.
GAIN = r"buys \d+ more|gives HERO|finds|arrive|orders|get on|join|earns|pays HERO"
LOSS = r"loses|HERO gives|sells|there\.|thrown|get off|leave|spends|HERO pays"


def read_expression(problem):
    """The expression behind a problem's words, without a look at the script's own templates."""
    numbers = [int(number) for number in re.findall(r"\d+", problem)]
    sentences = re.split(r"(?<=[.?]) ", problem)
    if len(sentences) > 2:
        hero, (start, *events, _) = problem.split()[0], sentences
        operators = ["*"] if len(re.findall(r"\d+", start)) == 2 else []
        for event in events:
            gain, loss = (re.search(words.replace("HERO", hero), event) for words in (GAIN, LOSS))
            assert bool(gain) != bool(loss), f"{event!r} in {problem!r}"
            operators.append("+" if gain else "-")
    else:
        words = {"+": "+", "-": "-", "*": "*", "add": "+", "subtract": "-", "multiply": "*"}
        operators = [words[word] for word in problem.split() if word in words]
    return make.Expression(numbers[0], tuple(zip(operators, numbers[1:], strict=True)))


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_what_its_words_say(split):
    """A wording whose verb contradicts its operator: a reward for the wrong answer. Break: put "{name} loses
    {n}." among the additions of a story, and make the problems again."""
    problems = read_problems(split)
    assert len(problems) == make.SIZES[split] == len({row["problem"] for row in problems})
    for row in problems:
        assert str(read_expression(row["problem"]).value()) == row["answer"]


def test_no_expression_is_in_two_splits():
    """Test problems seen in training under other words or with their terms in another order. Break: leave out
    `sorted` over the terms in Expression.split."""

    def terms(expression):  # the signed terms, sorted; a product is one term
        first, rest = str(expression.first), list(expression.rest)
        if rest[0][0] == "*":
            first = "*".join(sorted([first, str(rest.pop(0)[1])]))
        return tuple(sorted([("+", first), *((op, str(n)) for op, n in rest)]))

    expressions = {
        split: {terms(read_expression(row["problem"])) for row in read_problems(split)} for split in SPLITS
    }
    for one, other in combinations(SPLITS, 2):
        assert not expressions[one] & expressions[other]


@pytest.mark.parametrize("split", SPLITS)
def test_the_script_makes_the_committed_problems(split):
    """Files that nobody can make again: a draw that follows set order, hash() or a shared generator. Break:
    draw from `random` instead of `rng` in word()."""
    assert make.make_problems(split, make.Config().seed) == read_problems(split)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_is_small_and_of_its_kind(family):
    """A second family that only renames the first, and a repository that grows by a checkpoint in another
    precision. Break: swap the two values of tie_word_embeddings in make_model, and make the models again."""
    model = AutoModelForCausalLM.from_pretrained(TINY / family)
    assert model.config.model_type == family
    assert 0.9e6 < model.num_parameters() < 1.1e6
    assert sum(file.stat().st_size for file in (TINY / family).iterdir()) <= 8e6
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == model.config.tie_word_embeddings == (family == "qwen3")
    assert any("q_norm" in name for name, _ in model.named_parameters()) == (family == "qwen3")
    tokenizer = AutoTokenizer.from_pretrained(TINY / family)
    assert model.config.vocab_size == len(tokenizer)
    assert (
        model.generation_config.eos_token_id
        == tokenizer.eos_token_id
        == tokenizer.convert_tokens_to_ids(make.END)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_writes_any_text_and_digits_alone(family):
    """Text that is lost or changed on the way through the ids, and numbers glued into tokens that hide their
    digits. Break: leave out initial_alphabet, or the digits in the Split, in make_tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / family)
    for text in [
        "12 + 35 = 47\n",
        " a  b\t\r\n ",
        "naïve 北京 Ω≈ 👩‍🔬 \u2028\x00",
        "x = {y}!  ?",
        MATH_PROMPT,
    ]:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.all_special_ids)
    for ids in (
        tokenizer("2025 7 stamps cost 3.50").input_ids,
        tokenizer("The final answer is 1234").input_ids,
    ):
        assert all(len(token) == 1 for token in map(tokenizer.decode, ids) if re.search(r"\d", token))


@pytest.mark.parametrize("family", FAMILIES)
def test_template_writes_each_marker_once(family):
    """A token doubled by template and tokenizer, and a pad that is also the stop token, which a mask by ids
    would drop. Break: write <|end|> twice in CHAT_TEMPLATE, and make the models again."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / family)
    messages = [{"role": "user", "content": MATH_PROMPT.replace("{problem}", "What is 3 + 4 - 5?")}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    markers = [tokenizer.convert_tokens_to_ids(marker) for marker in (make.USER, make.END, make.ASSISTANT)]
    assert [token for token in ids if token in tokenizer.all_special_ids] == markers
    assert ids[0] == markers[0] and ids[-2:] == markers[1:]
    assert len(ids) < 48  # the fixed sentences are a few tokens
    assert tokenizer.bos_token_id is None
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_answers_come_in_their_ways():
    """Ways that are not what their names say: slips in clean answers, or a lapse with a box, which is no
    lapse. Break: close a lapse with CLOSING in answer()."""
    import random

    expression, rng = make.Expression(47, (("+", 38), ("-", 29))), random.Random(0)
    clean = {way: make.answer(expression, way, slips=False, rng=rng) for way in make.WAYS}
    closing = make.CLOSING.format(56)
    assert clean["guess"] == closing
    assert clean["half"] == f"47 + 38 = 85\n{closing}"
    assert clean["worked"] == f"47 + 38 = 85\n85 - 29 = 56\n{closing}"
    assert clean["careful"] == f"Step by step:\n47 + 38 = 77 + 8 = 85\n85 - 29 = 65 - 9 = 56\n{closing}"
    assert clean["muse"].endswith(closing) and len(clean["muse"]) > len(clean["half"])
    assert "56" in clean["lapse"] and "boxed" not in clean["lapse"]
    assert MATH_PROMPT.split("'")[1] == make.CLOSING.format("[answer]")
    slipped = [make.answer(expression, "guess", slips=True, rng=rng) == closing for _ in range(2000)]
    assert sum(slipped) / 2000 == pytest.approx(1 - make.GUESS_SLIP["guess"], abs=0.05)
