"""Traps of reward models: where the score is read, padding, two BOS, truncation, a wrong or missing head."""

import gzip
import json
import random
import re
import shutil
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification, LlamaModel

from data import Prompt
from rewards import RewardModel, Scorer

TINY = Path(__file__).parents[1] / "tiny" / "llama"
PREFERENCES = Path(__file__).parents[2] / "shared/data/preferences/hh_rlhf_harmless_base_test.jsonl.gz"
FORMS = ["v_head", "classifier"]
END = 3  # the id of <|end|>, which closes a turn


def make_config(**fields):
    return LlamaConfig(
        vocab_size=642, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.1, bos_token_id=640,
        eos_token_id=END, pad_token_id=0, **fields,
    )  # fmt: skip


def save_tokenizer(folder):
    """The tiny model's, with a CLS token, and as Llama 3's with a BOS from the template and from encode()."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"bos_token": "<|bos|>", "cls_token": "<|cls|>"})
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 640)]
    )
    tokenizer.model_max_length = 4096
    tokenizer.save_pretrained(folder)


def save_checkpoint(folder, form):
    """A random reward model; with a v_head under the names, and with the config, of Athene-RM-8B's files."""
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    save_tokenizer(folder)
    if form == "classifier":
        LlamaForSequenceClassification(make_config(num_labels=1)).save_pretrained(folder)
        return folder
    config = make_config(CLS_ID=641)
    weights = {f"model.{name}": weight for name, weight in LlamaModel(config).state_dict().items()}
    save_file(weights | {"v_head.weight": torch.randn(1, 32)}, folder / "model.safetensors", {"format": "pt"})
    config.architectures = ["CustomAutoModelForSequenceClassification"]
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{"v_head": path, "classifier": path}"""
    return {form: save_checkpoint(tmp_path_factory.mktemp(form), form) for form in FORMS}


def conversation(prompt, response, *earlier):
    """Turns of user and assistant in this order: the earlier ones, then the prompt, then the response."""
    return [
        {"role": ("user", "assistant")[turn % 2], "content": text}
        for turn, text in enumerate((*earlier, prompt, response))
    ]


def plain_ids(folder, messages, cut=0):
    """The token ids by hand, from the bare vocabulary: no chat template, no RewardModel, and no CLS token.

    cut: so many tokens are taken off the end of the response.
    """
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary.encode_special_tokens = True  # <|cls|> in a text is seven characters
    ids = [640]
    for message in messages:
        text = vocabulary.encode(message["content"], add_special_tokens=False).ids
        text = text[: len(text) - cut] if message is messages[-1] else text
        ids += [{"user": 1, "assistant": 2}[message["role"]], *text, END]
    return ids


@cache
def plain_model(folder):
    """-> (a bare LlamaModel, the head (D,), the ids after the conversation), from the file of weights."""
    weights = load_file(folder / "model.safetensors")
    last = [641] if "v_head.weight" in weights else []
    head = weights.pop("v_head.weight" if last else "score.weight")[0]
    body = LlamaModel(LlamaConfig.from_pretrained(folder)).eval()
    body.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()})
    return body, head, last


@torch.no_grad()
def plain_score(folder, messages, cut=0):
    """One row alone, without padding: the head times the state of the last token."""
    body, head, last = plain_model(folder)
    ids = torch.tensor([plain_ids(folder, messages, cut) + last])  # (1, T)
    return float(body(ids).last_hidden_state[0, -1] @ head)


def edited(folder, file="config.json", **fields):
    """The folder, after a change of fields in one of its .json files; None removes a field."""
    all_fields = json.loads((folder / file).read_text()) | fields
    (folder / file).write_text(json.dumps({name: v for name, v in all_fields.items() if v is not None}))
    return folder


CONVERSATIONS = [
    conversation("What is 2 + 2?", "It is 4."),
    conversation("Count to thirty, please.", " ".join(map(str, range(1, 31)))),
    conversation("And now?", "I still say 4.", "What is 2 + 2?", "It is 4."),
    conversation("Say nothing.", ""),
    conversation("Naïve café, 東京?", "  Oui: 東京.\n"),
]


@pytest.mark.parametrize("form", FORMS)
def test_scores_equal_a_plain_forward(folders, form):
    """Two BOS, a score read at another token, from another head, or through a sigmoid.

    Break: add_special_tokens=True in _encode.
    """
    scores = RewardModel(folders[form]).score(CONVERSATIONS)
    assert scores == pytest.approx([plain_score(folders[form], row) for row in CONVERSATIONS], abs=1e-5)
    assert max(scores) - min(scores) > 1


@pytest.mark.parametrize("form", FORMS)
def test_the_batch_changes_nothing(folders, form):
    """Scores in the order of the lengths, or batches that outgrow the memory.

    Break: scores[batch.index(index)] = score; or micro_batches with 10 * self.batch_tokens.
    """
    conversations = CONVERSATIONS * 3
    together = RewardModel(folders[form]).score(conversations)
    model, shapes = RewardModel(folders[form], batch_tokens=100), []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, given: shapes.append(given["input_ids"].shape), with_kwargs=True
    )
    order = random.Random(0).sample(range(15), 15)
    shuffled = model.score([conversations[index] for index in order])
    hook.remove()
    assert shuffled == pytest.approx([together[index] for index in order], abs=1e-5)
    assert all(rows == 1 or rows * longest <= 100 for rows, longest in shapes) and 3 < len(shapes) < 10
    assert [model.score([row])[0] for row in conversations] == pytest.approx(together, abs=1e-5)
    assert model.score([]) == []


@pytest.mark.parametrize("form", FORMS)
def test_the_tokenizers_sides_do_not_matter(folders, form, tmp_path):
    """The score of another row's token, or a prompt cut at its start, where the tokenizer says left.

    Break: put the padding before the row if self.tokenizer.padding_side is left.
    """
    left = shutil.copytree(folders[form], tmp_path / "left")
    edited(left, "tokenizer_config.json", padding_side="left", truncation_side="left")
    long = conversation("What is 2 + 2?", "It is 4. " * 50)
    model = RewardModel(left, max_length=60)
    assert model.tokenizer.padding_side == model.tokenizer.truncation_side == "left"
    rows = [CONVERSATIONS[0], CONVERSATIONS[2], long]
    assert model.score(rows) == RewardModel(folders[form], max_length=60).score(rows)


def test_padding_like_the_end_of_a_turn(folders, tmp_path):
    """pad_token_id = eos_token_id: transformers then reads before a final <|end|>, and so must we.

    Break: self.pad_id = 0.
    """
    folder = edited(shutil.copytree(folders["classifier"], tmp_path / "copy"), pad_token_id=END)
    theirs = LlamaForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = [float(theirs(torch.tensor([plain_ids(folder, row)])).logits) for row in CONVERSATIONS]
    assert RewardModel(folder).score(CONVERSATIONS) == pytest.approx(expected, abs=1e-5)
    assert expected[0] != pytest.approx(plain_score(folder, CONVERSATIONS[0]), abs=0.01)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(folders, form):
    """Scores of bfloat16 weights are near, and a v_head's are not rounded to bfloat16 (ties where none are).

    Break: dtype="float32" in from_pretrained; or drop both `.float()` of the head.
    """
    exact = torch.tensor(RewardModel(folders[form]).score(CONVERSATIONS))
    near = torch.tensor(RewardModel(folders[form], dtype="bfloat16").score(CONVERSATIONS))
    assert 1e-4 < (near - exact).abs().max() < 0.1 * exact.std()
    assert form == "classifier" or (near != near.bfloat16()).any()


@pytest.mark.parametrize("form", FORMS)
def test_a_long_response_is_cut_and_nothing_else(folders, form):
    """The right end cut off, and with it the CLS token or the end of the turn, where the score is read; or an
    earlier response cut, that reads the same.

    Break: `del ids[self.max_length - 1 :]`; or text.find.
    """
    count = " ".join(map(str, range(30)))
    row = conversation("Again, please.", count, "Count, please.", count)
    model = RewardModel(folders[form], max_length=150)
    over = len(plain_ids(folders[form], row)) + (form == "v_head") - 150
    ids = model._encode(0, row)
    assert over > 30 and len(ids) == 150 and model.truncated == 1
    assert ids == plain_ids(folders[form], row, over) + [641] * (form == "v_head")
    assert model.score([row]) == pytest.approx([plain_score(folders[form], row, over)], abs=1e-5)
    assert len(RewardModel(folders[form])._encode(0, conversation("Go on.", "4 " * 9000))) == 4096

    with pytest.raises(ValueError, match=r"conversation 1: \d+ tokens beside .* max_length is 150: raise"):
        model.score([row, conversation("4 " * 90, "It is 4.")])
    with pytest.raises(ValueError, match="conversation 0: its last message is not the assistant's"):
        model.score([row[:1]])


def test_a_long_response_that_the_template_rewrites(folders):
    """A run ended by one long sample, where a template such as Qwen3's leaves out the thoughts. Break: no
    look at start < 0."""
    model = RewardModel(folders["classifier"], max_length=150)
    rewrites = "message.content.split('</think>')[-1]"
    model.tokenizer.chat_template = model.tokenizer.chat_template.replace("message.content", rewrites)
    count = " ".join(map(str, range(60)))
    row, said = (conversation("Count, please.", text + count) for text in ("<think>So.</think>", ""))
    ids = model._encode(0, row)
    assert len(ids) == 150 and model.truncated == 1
    assert ids == plain_ids(folders["classifier"], said, len(plain_ids(folders["classifier"], said)) - 150)


def test_the_cls_token_in_a_message_is_text(folders):
    """A user, or a policy after reward, writes <|cls|>: two CLS tokens, of which one is read inside its text.

    Break: `plain = [token]`.
    """
    row = conversation("What does <|cls|> mean?", "<|cls|><|cls|> is 4.")
    model = RewardModel(folders["v_head"])
    assert model._encode(0, row).count(641) == 1
    assert model.score([row]) == pytest.approx([plain_score(folders["v_head"], row)], abs=1e-5)


def test_the_cls_token_of_the_tokenizer(folders, tmp_path):
    """No CLS_ID in config.json: Athene-RM-8B's card appends its tokenizer's. Break: None for the default."""
    folder = edited(shutil.copytree(folders["v_head"], tmp_path / "copy"), CLS_ID=None)
    assert RewardModel(folder).score(CONVERSATIONS) == RewardModel(folders["v_head"]).score(CONVERSATIONS)


def read_dialogue(text):
    """A dialogue as Anthropic's files have it, in one string -> messages."""
    parts = re.split(r"\n\n(Human|Assistant):", text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[who], "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


@pytest.mark.skipif(not PREFERENCES.exists(), reason="shared/data/preferences is not here")
@pytest.mark.parametrize("form", FORMS)
def test_accuracy_on_preferences(folders, form):
    """Real dialogues of many turns, in one call. Break: zip(reversed(batch), ...) in score."""
    with gzip.open(PREFERENCES, "rt") as lines:
        pairs = [json.loads(line) for line in islice(lines, 40)]
    rows = [read_dialogue(pair[side]) for pair in pairs for side in ("chosen", "rejected")]
    scores = RewardModel(folders[form]).score(rows)
    expected = [plain_score(folders[form], row) for row in rows]
    assert scores == pytest.approx(expected, abs=1e-5)
    wins = sum(chosen > rejected for chosen, rejected in zip(scores[::2], scores[1::2], strict=True))
    assert wins == sum(expected[2 * pair] > expected[2 * pair + 1] for pair in range(40)) and 5 < wins < 35


@pytest.mark.parametrize("form", FORMS)
def test_a_score_that_is_not_finite_names_its_conversation(folders, form, capsys):
    """DPO that pairs a response with itself, GRPO that blames gradients. Breaks: no isfinite() in
    score(); no one_line_errors() in Scorer.score()."""
    model = RewardModel(folders[form], batch_tokens=64)
    model.model.model.embed_tokens.weight.data[END] = float("nan")
    with pytest.raises(ValueError, match=f"^{folders[form]}: scores conversation 1 by nan; it ends 'the e"):
        model.score([conversation("Why?", "the end" + i * "!") for i in (40, 0)])
    scorer = Scorer(["chat"], folders[form])
    scorer.model = model
    with pytest.raises(SystemExit):
        scorer.score([Prompt("p", "chat", conversation("Why?", "")[:1], None)], ["the end"])
    assert "by nan" in capsys.readouterr().err


def reweighed(folder, **changes):
    """The folder, after a change of tensors in model.safetensors; None removes one."""
    weights = load_file(folder / "model.safetensors") | changes
    kept = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def rewritten(folder, file, text):
    """The folder, after a file in it was replaced by this text; None removes the file."""
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    return folder


NO_CLS = {"file": "tokenizer_config.json", "cls_token": None}
TWO_LABELS = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
ONE_LABEL = {"id2label": {"0": "good"}, "label2id": {"good": 0}}
NO_HEAD, TWO_ROWS = {"v_head.weight": None}, {"v_head.weight": torch.zeros(2, 32)}
NO_NORM, BIAS = {"model.norm.weight": None}, {"v_head.bias": torch.zeros(1)}

NAN_HEAD = {"v_head.weight": torch.full((1, 32), torch.nan)}
INF_HEAD = {"score.weight": torch.full((1, 32), torch.inf)}


@pytest.mark.parametrize(
    ("form", "spoil", "message"),
    [
        ("classifier", lambda f: edited(f, **TWO_LABELS), "2 labels.*num_labels 1"),
        ("v_head", lambda f: TINY, "LlamaForCausalLM without v_head.weight, 2 labels.*pass"),
        ("v_head", lambda f: reweighed(f, **NO_HEAD), "without v_head.weight.*pass a Llama with a v_head"),
        ("v_head", lambda f: reweighed(edited(f, **ONE_LABEL), **NO_HEAD), "missing.*score.weight.*save"),
        ("v_head", lambda f: reweighed(f, **NO_NORM), "missing.*model.norm.weight.*save"),
        ("v_head", lambda f: reweighed(f, **BIAS), "unexpected.*v_head.bias.*save the model again"),
        ("v_head", lambda f: reweighed(f, **TWO_ROWS), "mismatched.*v_head.weight.*save"),
        ("v_head", lambda f: reweighed(f, **NAN_HEAD), "hold NaN"),
        ("classifier", lambda f: reweighed(f, **INF_HEAD), "hold NaN"),
        ("v_head", lambda f: edited(edited(f, **NO_CLS), CLS_ID=None), "no CLS token: set CLS_ID"),
        ("v_head", lambda f: rewritten(f, "chat_template.jinja", "{{ cls_token }}"), "writes the CLS token"),
        ("v_head", lambda f: rewritten(f, "chat_template.jinja", None), "no chat template: add"),
        ("classifier", lambda f: edited(f, pad_token_id=None), "no pad token.*set pad_token_id"),
        ("classifier", lambda f: rewritten(f, "model.safetensors", None), "no .*safetensors: save"),
        ("classifier", lambda f: rewritten(f, "model.safetensors", "version https:"), "not a checkpoint"),
        ("classifier", lambda f: rewritten(f, "config.json", None), "not a checkpoint"),
        ("classifier", lambda f: "nobody/no-such-model", "not a checkpoint, in a folder or on the Hub"),
    ],
)  # fmt: skip
def test_what_is_no_reward_model_is_refused(folders, tmp_path, form, spoil, message):
    """transformers makes up the weights that are missing, and warns. Break: drop `if wrong`, or any check."""
    path = spoil(shutil.copytree(folders[form], tmp_path / "copy"))
    with pytest.raises(ValueError, match=message) as error:
        RewardModel(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
