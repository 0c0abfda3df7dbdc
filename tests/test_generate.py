"""Rollouts: whole, reproducible, and the same however they are batched."""

import json
import re
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

from flags import TrainFlags, parse_flags

import pytest
import torch
from conftest import byte_tokenizer, make_checkpoint, torchrun, write_program

import data
import generate
import train_dpo
from batch import to_batch
from data import Prompt
from generate import (
    Generator,
    ServedGenerator,
    VLLMGenerator,
    Window,
    encode_prompts,
    fit_context,
    keep_top_p,
    load_generator,
    request_seed,
)
from model import load_tokenizer, stop_ids, tokenizer_content
from serve import engine_settings

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["vllm", "transformers"])
def generator(request, checkpoints):
    return load_generator(request.param, checkpoints["llama"], torch.float32, CPU, max_model_len=128)


def as_tokens(groups):
    return [[(r.prompt_id, r.response_ids, r.finish_reason) for r in group] for group in groups]


def test_a_top_p_of_almost_nothing_is_greedy(generator, prompts):
    """A greedy answer that depends on the seed (evaluate.py --greedy). Break: 0.9 for 1e-6 in this test."""
    one, other = (
        as_tokens(generator.sample(prompts, 1, 1.0, 1e-6, 12, [seed + p for p in range(len(prompts))]))
        for seed in (0, 1000)
    )
    assert one == other


def test_sampling_repeats_with_its_seeds_and_not_otherwise(generator, prompts):
    """Samples of a group that are all the same, or that change from run to run.

    Break: seed 0 for every request.
    """
    first, again, other = (
        generator.sample(prompts, n=4, temperature=1.0, top_p=1.0, max_tokens=8, seeds=seeds)
        for seeds in ([1, 50], [1, 50], [2, 60])
    )
    assert as_tokens(first) == as_tokens(again) != as_tokens(other)
    assert len({tuple(r.response_ids) for r in first[0]}) == 4


def test_one_call_equals_many(generator, prompts):
    """Sampling ahead would change the experiment if batching changed the tokens.

    Break: ignore the seeds argument.
    """
    together = generator.sample(prompts, n=2, temperature=1.0, top_p=1.0, max_tokens=8, seeds=[1, 50])
    apart = [
        generator.sample([prompt], n=2, temperature=1.0, top_p=1.0, max_tokens=8, seeds=[seed])[0]
        for prompt, seed in zip(prompts, [1, 50], strict=True)
    ]
    assert as_tokens(together) == as_tokens(apart)


def test_rollouts_are_whole(generator, prompts):
    """Prompt ids retokenised, log-probs of another length, a version that nobody set.

    Break: decode and encode again.
    """
    generator.version = 12
    groups = generator.sample(prompts, n=2, temperature=1.0, top_p=1.0, max_tokens=8, seeds=[1, 50])
    encoded = encode_prompts(generator.tokenizer, prompts)
    for prompt, ids, group in zip(prompts, encoded, groups, strict=True):
        for r in group:
            assert (r.prompt_id, r.prompt_ids, r.version) == (prompt.id, ids, 12)
            assert 1 <= len(r.response_ids) == len(r.logps) <= 8 and max(r.logps) <= 0
            stopped = r.response_ids[-1] == generator.tokenizer.eos_token_id
            assert r.finish_reason == ("stop" if stopped else "length")
            assert generator.tokenizer.eos_token_id not in r.response_ids[:-1]


def test_stop_token_is_kept_and_logged(generator, prompts):
    """A stop token dropped from the response is never trained. Break: cut the last id of a finished response.

    At temperature 2 the random model samples all over its 260 tokens, so some of 400 samples stop within 8
    tokens.
    """
    groups = generator.sample(prompts, n=200, temperature=2.0, top_p=1.0, max_tokens=8, seeds=[1, 500])
    stopped = [r for group in groups for r in group if r.finish_reason == "stop"]
    assert stopped and all(r.response_ids[-1] == generator.tokenizer.eos_token_id for r in stopped)
    assert {len(r.response_ids) for group in groups for r in group if r.finish_reason == "length"} == {8}


def test_request_seeds_differ_by_step_prompt_and_run():
    """Two prompts of a step with one seed answer alike; a step that reuses the last one's seeds learns
    nothing new.

    Break: leave `step` out of the hash. Sample i adds i, so neighbours must be far apart.
    """
    names = [(run, step, f"p{i}") for run in range(3) for step in range(20) for i in range(20)]
    seeds = sorted(request_seed(*name) for name in names)
    assert min(b - a for a, b in zip(seeds, seeds[1:], strict=False)) > 1000 and max(seeds) < 2**63 - 1000
    assert request_seed(0, 0, "p") == request_seed(0, 0, "p")


def test_double_bos_is_refused(generator, prompts):
    """Template and tokenizer that both add BOS shift every position. Break: drop the check."""
    tokenizer = generator.tokenizer
    template, tokenizer.chat_template = tokenizer.chat_template, "<user><user>" + tokenizer.chat_template
    tokenizer.bos_token = "<user>"
    try:
        with pytest.raises(ValueError, match="BOS"):
            encode_prompts(tokenizer, prompts)
    finally:
        tokenizer.chat_template, tokenizer.bos_token = template, None


def test_prompts_encoded_together_are_those_encoded_alone(checkpoints, monkeypatch):
    """A batch pads rows, or loses those at its edges. Breaks: padding=True in encode_each; `start + 1`."""
    monkeypatch.setattr(generate, "ENCODED_AT_ONCE", 2)
    tokenizer = load_tokenizer(checkpoints["llama"])
    turns = [[{"role": "user", "content": "é <bot> " * n}] for n in (1, 4, 0, 2, 3)]
    alone = [
        tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False) for turn in turns
    ]
    prompts = [Prompt(str(i), "chat", turn, None) for i, turn in enumerate(turns)]
    assert encode_prompts(tokenizer, prompts) == alone and encode_prompts(tokenizer, []) == []


def test_lengths_are_kept_for_these_prompts_and_this_tokenizer(checkpoints, prompts, tmp_path, monkeypatch):
    """Lengths under another template, or of other prompts, taken from the cache: a prompt that does not fit.

    Breaks: leave tokenizer_content, or items, out of the key. The second call must encode nothing; break: no
    write in cached.
    """
    monkeypatch.setattr(data, "CACHED_FROM", 0)
    monkeypatch.setenv("SEMI_ONLINE_CACHE", "on")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path, calls, encode_each = checkpoints["llama"], [], generate.encode_each
    monkeypatch.setattr(generate, "encode_each", lambda *args: calls.append(1) or encode_each(*args))
    tokenizer = load_tokenizer(path)
    first = fit_context(path, tokenizer, prompts, 8)
    assert fit_context(path, load_tokenizer(path), prompts, 8) == first and len(calls) == 1
    assert fit_context(path, tokenizer, prompts[:1], 8)[1] < first[1]
    tokenizer.chat_template = "<user>" + tokenizer.chat_template
    assert fit_context(path, tokenizer, prompts, 8)[1] == first[1] + 1


SHARED = """
import torch.distributed as dist
from data import Prompt
from generate import fit_context
from model import load_tokenizer
from ranks import init_ranks
from rewards import gradable

class Verifier:
    def unparsable(self, golds):
        return [i for i, gold in enumerate(golds) if gold == "bad"]

rank, _, _ = init_ranks()
golds = ["1", "2", "bad", "4", "bad"]
prompts = [Prompt(str(i), "math", [{"role": "user", "content": f"{i}" * n}], gold)
           for i, (n, gold) in enumerate(zip([5, 8, 7, 300, 9], golds))]
kept = [prompt.id for prompt in gradable(prompts, Verifier())]
try:
    fit_context(sys.argv[1], load_tokenizer(sys.argv[1]), prompts, 8)
except ValueError as error:
    open(f"{sys.argv[2]}/{rank}", "w").write(f"{kept} {error}")
dist.destroy_process_group()
"""


def test_ranks_share_the_prompts(checkpoints, tmp_path):
    """Ranks that keep other prompts, or fit another context, than each other; an error that names a prompt of
    another rank. Breaks: no all_max in longest_prompt; `first + i`; no broadcast in gradable.

    Rank 1 has the longest prompt, 3, as its second.
    """
    program = write_program(tmp_path, SHARED)
    torchrun(2, str(program), checkpoints["llama"], str(tmp_path))
    found = [(tmp_path / rank).read_text() for rank in ("0", "1")]
    assert found[0] == found[1]
    assert found[0].startswith("['0', '1', '3'] --data: a prompt has 302 tokens") and "'3333" in found[0]


def test_keep_top_p_by_hand():
    """One token too few or too many kept. Break: drop `- probs` from `before`."""
    logits = torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log()
    assert keep_top_p(logits, 0.5).isfinite().tolist() == [[False, True, False, False]]
    assert keep_top_p(logits, 0.75).isfinite().tolist() == [[True, True, False, False]]
    assert keep_top_p(logits, 0.8).isfinite().sum() == 3
    assert keep_top_p(logits, 1.0).isfinite().all()


def test_prompts_end_where_the_response_begins(generator):
    """A missing generation prompt makes the model continue the user's turn.

    Break: add_generation_prompt=False.
    """
    (ids,) = encode_prompts(
        generator.tokenizer, [Prompt("a", "math", [{"role": "user", "content": "hi"}], "1")]
    )
    assert generator.tokenizer.decode(ids) == "<user>hi<bot>"


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_ids_past_the_tokenizer_are_never_sampled(engine, prompts, tmp_path):
    """Ids that no text has, sampled from a padded vocabulary: they decode to nothing, and crash some
    tokenizers. Breaks: no logit_bias; do not set their logits."""
    path = make_checkpoint(tmp_path / "padded", "llama", vocab_size=520)  # half are padding
    generator = load_generator(engine, path, torch.float32, CPU, max_model_len=128)
    groups = generator.sample(prompts, 8, 1.0, 1.0, 20, [1, 2])
    generator.close()
    ids = {token for group in groups for rollout in group for token in rollout.response_ids}
    assert len(ids) > 50 and max(ids) < len(generator.tokenizer) == 260


def listed(folder, **eos):
    """A random checkpoint with these eos_token_id in generation_config and config; None is no such file."""
    path = Path(make_checkpoint(folder, "llama"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "eos_token_id": eos.get("config")}))
    (path / "generation_config.json").unlink()
    if "generation" in eos:
        text = json.dumps({"eos_token_id": eos["generation"], "temperature": 0.6})
        (path / "generation_config.json").write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "eos, expected",  # the tokenizer's EOS is 256
    [
        ({"generation": [97, 98], "config": 5}, [97, 98, 256]),
        ({"generation": 97}, [97, 256]),
        ({"generation": None, "config": 5}, [256]),
        ({"config": [97, 5]}, [5, 97, 256]),
        ({"config": None}, [256]),
        ({"generation": [97, 99999, "x"]}, [97, 256]),
    ],
)
def test_stop_ids_come_from_every_source(tmp_path, eos, expected):
    """Responses that never stop, as the stop token is listed where nobody looks. Breaks: leave out the
    tokenizer's; config.json's although there is the file."""
    path = listed(tmp_path, **eos)
    assert stop_ids(path, load_tokenizer(path)) == expected


def test_no_stop_token_at_all(tmp_path):
    """Every response is cut, without a word. Break: no look at `ids` in stop_ids."""
    path = listed(tmp_path, generation=[], config=None)
    tokenizer = load_tokenizer(path)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=f"--model {path}: no stop token, .* generation_config.json$"):
        stop_ids(path, tokenizer)


def test_both_kinds_of_stop_tokens_end_a_response(tmp_path, prompts):
    """A response that goes on behind its stop token, or whose stop token is not trained. Breaks: the
    tokenizer's alone, or generation_config's alone, in stop_ids; `if not tokens[i][-1] in`."""
    generator = load_generator("transformers", listed(tmp_path, generation=[97, 98]), torch.float32, CPU, 128)
    rollouts = sum(generator.sample(prompts, 16, 1.0, 1.0, 150, [1, 50]), [])
    stopped = [rollout.response_ids for rollout in rollouts if rollout.finish_reason == "stop"]
    assert {ids[-1] for ids in stopped} == {97, 98, 256}
    assert not any({97, 98, 256} & {*rollout.response_ids[:-1]} for rollout in rollouts)
    assert all(len(rollout.response_ids) == 150 for rollout in rollouts if rollout.finish_reason == "length")
    ids, mask, _ = to_batch(rollouts, CPU)
    assert [row[on.bool()].tolist() for row, on in zip(ids, mask, strict=True)] == [
        rollout.response_ids for rollout in rollouts
    ]


def test_every_engine_is_told_the_same_stop_tokens(tmp_path, prompts):
    """vLLM that stops elsewhere than the transformers engine. Breaks: no stop_token_ids in either; vLLM's
    default for generation_config, by which it reads the checkpoint's file as well."""
    path, told = listed(tmp_path, generation=[97, 98]), []
    answer = [([5], [-1.0], "stop")]
    mine, served = Generator.__new__(VLLMGenerator), Generator.__new__(ServedGenerator)
    for generator in (mine, served):
        Generator.__init__(generator, path, torch.float32)
    mine.sleeps, mine.asleep, mine.vllm = False, False, SimpleNamespace(SamplingParams=dict)
    mine.llm = SimpleNamespace(generate=lambda requests, params, use_tqdm: told.extend(params) or [])
    mine._complete([[5]], 1, 1.0, 1.0, [8], [1], 0)
    served.complete = lambda ids, sampling, *_: told.append(sampling) or [answer]
    served.sample(prompts[:1], 1, 1.0, 1.0, 8, [1])
    assert [sampling["stop_token_ids"] for sampling in told] == [[97, 98, 256]] * 2
    settings = engine_settings(path, torch.float32, 128, 0.5)
    assert settings["generation_config"] == "vllm" and settings["trust_remote_code"] is False


@pytest.mark.parametrize(
    ("memory", "expected"),
    [(0.4, {"gpu_memory_utilization": 0.4}), ("1", {"gpu_memory_utilization": 1.0}),
     ("2.5GiB", {"kv_cache_memory_bytes": 2684354560, "gpu_memory_utilization": 0.01})],
)  # fmt: skip
def test_memory_of_an_engine_on_a_gpu(monkeypatch, memory, expected):
    """Runs that start on one GPU together and each count the others' memory as their own. Breaks: GiB taken
    for a share, or for 10**9 bytes; vLLM's own share of 0.9, which it asks to be free."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = engine_settings("tiny/llama", torch.bfloat16, 128, memory)
    told = {key: value for key, value in settings.items() if "memory" in key}
    assert told == expected


class Sleeper:
    """What VLLMGenerator asks of an engine, in the order asked."""

    def __init__(self):
        self.calls = []

    def generate(self, requests, params, use_tqdm):
        self.calls.append("generate")
        return []

    def collective_rpc(self, function, args):
        self.calls.append("load")
        return [(set(), set())]

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self):
        self.calls.append("wake")


def test_a_sleeping_engine_is_woken_first(checkpoints):
    """Weights loaded into an engine that sleeps, which puts the old ones back when it wakes (TRL issue 5312);
    nonsense sampled after level 2; a copy of the weights kept that the next sync replaces.

    Breaks: no _wake() in load_weights; level=2 always; no error in _wake; level=1 always.
    """
    generator = Generator.__new__(VLLMGenerator)
    Generator.__init__(generator, checkpoints["llama"], torch.float32)
    generator.llm, generator.sleeps, generator.can_sleep, generator.asleep = Sleeper(), True, True, 0
    generator.vllm = SimpleNamespace(SamplingParams=dict)
    generator.sample([], 1, 1.0, 1.0, 8, [])
    generator.load_weights([])
    generator.sample([], 1, 1.0, 1.0, 8, [])
    generator.sync_is_next = True
    generator.sample([], 1, 1.0, 1.0, 8, [])
    with pytest.raises(RuntimeError, match="no sync has come"):
        generator.sample([], 1, 1.0, 1.0, 8, [])
    generator.load_weights([])
    generator.repacks = True
    generator.sample([], 1, 1.0, 1.0, 8, [])
    awake = ["generate", "sleep 1", "wake"]
    last = ["generate", "sleep 2", "wake", "load", "generate", "sleep 1"]
    assert generator.llm.calls == [*awake, "load", *awake, *last]


@pytest.mark.parametrize("sync_every, ahead, calls", [(3, 10, [True]), (4, 3, [False, True])])
def test_the_generator_is_told_that_a_sync_comes_next(sync_every, ahead, calls, checkpoints):
    """An engine that drops its weights while steps of its window are to be sampled, or never does. Break:
    sync_is_next = True."""
    told = []

    class Told(Odd):
        answer = [([1, 2], [-1.0, -1.0], "stop")]

        def _complete(self, *arguments):
            told.append(self.sync_is_next)
            return super()._complete(*arguments)

    flags = TrainFlags(sync_every=sync_every, ahead=ahead, steps=6, samples_per_prompt=1)
    batches = data.MixedIterator([(data.load_prompts("tiny@validation"), 1)], 2, seed=0)
    generator = Told(checkpoints["llama"], torch.float32)
    generator.version = 0
    window = Window(generator, batches, SimpleNamespace(begin=lambda *items: None), flags)
    for step in range(sync_every):
        window.take(step)
    assert told == calls


class Odd(Generator):
    """An engine that answers every prompt with the same."""

    def _complete(self, prompt_ids, *sampling):
        return [self.answer for _ in prompt_ids]


@pytest.mark.parametrize(
    "answer, problem",
    [
        ([([5], [-1.0], "stop")], "returned 1 responses, not 2"),
        ([([5], [-1.0], "stop"), ([], [], "stop")], "a response of 0 tokens and 0 log-probs"),
        ([([5], [-1.0], "stop"), ([5, 6], [-1.0], "stop")], "a response of 2 tokens and 1 log-probs"),
        ([([5], [-1.0], "stop"), ([5, 260], [-1.0, -1.0], "stop")], "ids from 5 to 260, of a vocabulary of"),
        ([([5], [-1.0], "stop"), ([-1, 5], [-1.0, -1.0], "stop")], "ids from -1 to 5"),
        ([([5], [-1.0], "stop"), ([5, 6], [-1.0, float("nan")], "stop")], "a log-prob that is not finite"),
        ([([5], [-1.0], "stop"), ([5, 6], [float("-inf"), -1.0], "stop")], "a log-prob that is not finite"),
    ],
)
def test_an_engine_that_answers_otherwise_than_asked(checkpoints, prompts, answer, problem):
    """Groups that are cut short and shift all rewards behind them; an id that reads past the embedding.

    Breaks: leave out each condition in Generator._check_group.
    """
    odd = Odd(checkpoints["llama"], torch.float32)
    odd.answer = [([5, 259], [-1.0, -2.0], "stop")] * 2
    assert len(odd.sample(prompts, 2, 1.0, 1.0, 8, [1, 50])[1]) == 2
    odd.answer = answer
    with pytest.raises(RuntimeError, match=f"prompt p0: the engine .*{problem}"):
        odd.sample(prompts, 2, 1.0, 1.0, 8, [1, 50])


def test_turns_that_a_template_refuses(checkpoints):
    """A traceback of the template for a system message in the data. Break: no `except` in encode_each."""
    tokenizer = load_tokenizer(checkpoints["llama"])
    turns = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1?"}]
    (ids,) = encode_prompts(tokenizer, [Prompt("0", "math", turns, "1")])
    assert "Think." in tokenizer.decode(ids) and "1?" in tokenizer.decode(ids)
    check = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = check + tokenizer.chat_template
    with pytest.raises(ValueError, match=r"^--data: the chat template refuses .*\(no system role\); leave"):
        encode_prompts(tokenizer, [Prompt("0", "math", turns, "1")])


LLAMA_31 = (  # the shape of Llama 3.1's template: a dated block first, whether or not there is a system turn
    "{{ '<bos>' }}{{ '<head>system</head>\n\nToday Date: 26 Jul 2024\n\n<eot>' }}{% for m in messages %}"
    "{{ '<head>' + m.role + '</head>\n\n' + m.content | trim + '<eot>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<head>assistant</head>\n\n' }}{% endif %}"
)


def test_prompts_without_the_system_block(prompts):
    """A date in every prompt, which is another tomorrow; a header cut off with it. Breaks: no slice of ids; a
    `before` that ends a turn later."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<bos>", "<head>", "</head>", "<eot>"]})
    tokenizer.chat_template = LLAMA_31
    (with_block, *_) = encode_prompts(tokenizer, prompts)
    tokenizer.system_block = False
    (without, *_) = encode_prompts(tokenizer, prompts)
    turn = f"<head>user</head>\n\n{prompts[0].messages[0]['content']}<eot><head>assistant</head>\n\n"
    assert without == tokenizer.encode(turn, add_special_tokens=False)
    assert (
        tokenizer.decode(with_block) == "<bos><head>system</head>\n\nToday Date: 26 Jul 2024\n\n<eot>" + turn
    )
    tokenizer.chat_template = "{% for m in messages %}{{ loop.length }}<eot>{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="--system-block False: the chat template"):
        encode_prompts(tokenizer, prompts)


def test_the_prompts_that_the_docs_show():
    """Figures 4 and 5 in docs/paper.md, and a prompt that has moved on. Breaks: the paper's single quotation
    marks doubled in MATH_PROMPT; the template left out of chat."""
    tokenizer = byte_tokenizer()
    words = {"<bos>": "<|begin_of_text|>", "<head>": "<|start_header_id|>", "</head>": "<|end_header_id|>"}
    words["<eot>"] = "<|eot_id|>"
    tokenizer.add_special_tokens({"additional_special_tokens": [*words.values()]})
    tokenizer.chat_template, tokenizer.system_block = LLAMA_31, False
    for word, llamas in words.items():
        tokenizer.chat_template = tokenizer.chat_template.replace(word, llamas)
    text = (Path(data.__file__).parent / "docs" / "paper.md").read_text(encoding="utf-8")
    shown = re.sub("(?m)^    ", "", text.partition("## The prompts")[2].partition("\n## ")[0])
    for task, asked in (("math", data.MATH_PROMPT), ("chat", "{instruction}")):
        (ids,) = encode_prompts(tokenizer, [Prompt("0", task, [{"role": "user", "content": asked}], "1")])
        assert tokenizer.decode(ids).strip() in shown


# The shape of Llama 3.2's, which prints the day.
LLAMA_32 = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    + (
        "{{ '<bos>' }}<head>system</head>\n\nToday Date: {{ date_string }}\n\n<eot>{% for m in messages %}"
        "{{ '<head>' + m.role + '</head>\n\n' + m.content | trim + '<eot>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<head>assistant</head>\n\n' }}{% endif %}"
    )
)


def dated(folder):
    """A random checkpoint whose chat template prints the date, as Llama 3.2's."""
    path = Path(make_checkpoint(folder, "llama"))
    (path / "chat_template.jinja").write_text(LLAMA_32)
    return str(path)


def test_the_date_in_a_prompt_is_the_runs(tmp_path, prompts):
    """Other prompts tomorrow than today. Breaks: no set_date() in load_tokenizer; none in load_generator; no
    date in tokenizer_content."""
    path = dated(tmp_path)
    tokenizer, today = load_tokenizer(path, date="2024-07-26"), load_tokenizer(path)
    turn = f"<head>user</head>\n\n{prompts[0].messages[0]['content']}<eot><head>assistant</head>\n\n"
    text = f"<bos><head>system</head>\n\nToday Date: 26 Jul 2024\n\n<eot>{turn}"
    expected = tokenizer.encode(text, add_special_tokens=False)
    assert encode_prompts(tokenizer, prompts)[0] == expected != encode_prompts(today, prompts)[0]
    assert f"{datetime.now():%d %b %Y}" in today.decode(encode_prompts(today, prompts)[0])
    generator = load_generator("transformers", path, torch.float32, CPU, 256, date="2024-07-26")
    assert generator.sample(prompts[:1], 1, 1.0, 1.0, 2, [1])[0][0].prompt_ids == expected
    assert tokenizer_content(tokenizer) != tokenizer_content(today)
    assert tokenizer_content(tokenizer) == tokenizer_content(generator.tokenizer)


class Counting(Generator):
    """Answers at once, one token a response."""

    def __init__(self, path, separate):
        super().__init__(path, torch.float32)
        self.version, self.separate = 0, separate

    def _complete(self, prompt_ids, n, *sampling):
        return [[([5 + i], [-1.0], "stop") for i in range(n)] for _ in prompt_ids]


class Same:
    """Every step the same prompts."""

    def __init__(self, prompts):
        self.prompts = prompts

    def __next__(self):
        return self.prompts

    def load_state_dict(self, parts):
        pass


@pytest.mark.parametrize("separate", [False, True])
def test_what_is_sampled_ahead_is_graded_ahead(checkpoints, prompts, separate):
    """A trainer that waits for graders that were idle while it trained. Breaks, each alone: no _grade in
    _sample_now; none in load_state."""
    begun = []
    scorer = SimpleNamespace(begin=lambda prompts, responses: begun.append((len(prompts), [*responses])))
    config = parse_flags(train_dpo.Config, ["--sync-every", "3", "--samples-per-prompt", "2"])
    window = Window(Counting(checkpoints["llama"], separate), Same(prompts[:1]), scorer, config)
    window.take(0)
    ahead = [future.result() for future in window.sampled]
    texts = window.generator.tokenizer.batch_decode([[5], [6]])
    assert begun == [(2, texts)] * 3  # of steps 0 to 2, and of none past the sync
    rows = [
        {"step": step, "prompt_id": prompt.id, "rollouts": [asdict(rollout) for rollout in group]}
        for step, batch in enumerate(ahead, start=1)
        for prompt, group in batch
    ]
    begun.clear()
    window.load_state(1, {"ahead": 2, "batches": []}, rows)
    assert begun == [(2, texts)] * 2
