"""tiny/preferences.py: a reward model from pairs, on a small model and on pairs with a rule to find."""

import json
import random

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rewards import RewardModel
from tiny import preferences

QUESTION = "Who are you?"


def dialogue(answer):
    return f"\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: {QUESTION}\n\nAssistant: {answer}"


@pytest.fixture(scope="module")
def made(checkpoints, tmp_path_factory):
    """(folder of a reward model trained to prefer answers in capitals, pairs of conversations to measure)"""
    folder = tmp_path_factory.mktemp("preferences")
    rng, file = random.Random(0), folder / "pairs.jsonl"
    words = [" ".join(rng.choices(["ant", "bee", "cow", "dog", "elk"], k=3)) for _ in range(330)]
    rows = [{"chosen": dialogue(text.upper()), "rejected": dialogue(text)} for text in words]
    two_in_a_row = dialogue("one") + "\n\nAssistant: two"
    rows += [{"chosen": two_in_a_row, "rejected": dialogue("three")}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"--model {checkpoints['llama']} --data {file} --out {folder / 'out'} --layers 1 --lr 1e-3"
    preferences.main(f"{flags} --pairs 256 --held-out 64 --batch 16".split())
    return folder / "out", [[preferences.last_turns(row[side]) for side in row] for row in rows[:64]]


def test_rule_is_learned(made):
    """A loss with its sign turned, or the halves of a batch mixed up, which trains as smoothly. Break: write
    -margins in the loss."""
    path, pairs = made
    assert preferences.pairwise_accuracy(RewardModel(path), pairs) > 0.95


def test_pairwise_accuracy_is_that_of_plain_forwards(made):
    """Scores of other rows, or of other positions in padded batches. Break: write scores[1::2] twice, or read
    the first token."""
    path, pairs = made
    pairs = pairs[:32] + [pair[::-1] for pair in pairs[32:48]]  # a third of them the wrong way round
    tokenizer = AutoTokenizer.from_pretrained(path)
    model, right = AutoModelForSequenceClassification.from_pretrained(path).eval(), 0
    for pair in pairs:
        ids = [torch.tensor([tokenizer.apply_chat_template(turns, return_dict=False)]) for turns in pair]
        with torch.no_grad():
            chosen, rejected = (model(input_ids=row).logits.item() for row in ids)
        right += chosen > rejected
    assert 0.5 < right / len(pairs) < 0.8
    assert preferences.pairwise_accuracy(RewardModel(path), pairs) == right / len(pairs)


def test_only_pairs_of_a_request_and_its_answer_are_kept():
    """Half a dialogue taken for a conversation. Break: return turns whatever their sides are."""
    assert preferences.last_turns(dialogue("one") + "\n\nAssistant: two") == []
    assert preferences.last_turns("no turns") == []


@pytest.mark.parametrize(
    "rows, problem",
    [
        (None, "find any data file"),
        ([{"chosen": "a"}], "rejected"),
        ([{"chosen": dialogue("a"), "rejected": dialogue("b")}], "pairs wanted"),
    ],
)
def test_bad_data_is_one_line(rows, problem, checkpoints, tmp_path, capsys):
    """A traceback for a file that is none. Break: leave KeyError out of what load_pairs catches."""
    file = tmp_path / "pairs.jsonl"
    if rows:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as stop:
        flags = f"--model {checkpoints['llama']} --layers 1 --data {file} --out {tmp_path / 'out'}"
        preferences.main(flags.split())
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "--data" in message and problem in message
    assert not (tmp_path / "out").exists()
