"""Requests for a chat model: where their text stands, which are dropped, and both tasks in one batch."""

import json
from pathlib import Path

import pytest

import data
from data import MixedIterator, Prompt, is_english, load_held_out, load_prompts, load_sources, request_text

SHARED = Path(__file__).parents[2] / "shared" / "data"
shared_files = pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is absent")


def some_prompts(task, count):
    return [Prompt(f"{task}{i}", task, [{"role": "user", "content": str(i)}], None) for i in range(count)]


@pytest.mark.parametrize(
    "row",
    [
        "Hi there",
        {"instruction": "Hi there", "output": "Hello"},  # AlpacaEval
        {"Instruction": "Hi there", "Skill": "Math"},  # Evol-Instruct
        {"prompt": " Hi there\n"},
        {"question_id": "1", "turns": [{"content": "Hi there"}]},  # Arena-Hard
        {"messages": [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello"}]},
        {"conversation": [{"role": "user", "content": "Hi there"}], "language": "English"},  # WildChat
        {"instruction": "Hi", "instances": [{"input": "", "output": "x"}]},  # Self-Instruct, without an input
        {"instruction": "Hi", "instances": [{"input": "there", "output": "x"}]},
        {"instruction": "Hi", "input": "there"},  # Alpaca
        {"turns": ["Hi there", "And then?"]},  # MT-bench
        {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi there"}]},
        {"prompt": [{"role": "user", "content": "Hi there"}], "label": ""},  # TRL, verl
        {"context_messages": [{"role": "user", "content": "Hi there"}]},  # OpenRLHF
        {"conversations": [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "Hello"}]},
        {"input": "Hi there"},  # OpenRLHF
    ],
)
def test_text_of_a_request(row):
    """Answers of the data set taken for requests, or what an instruction is about left out. Break: [-1] for
    [0] in request_text, or no instances."""
    about = "instruction" in row and ("input" in row or "instances" in row)
    expected = {"Hi there", "Hi"} if not about else {"Hi", "Hi\n\nthere"}
    assert request_text(row, "here") in expected and ("there" in str(row)) == (
        "there" in request_text(row, "")
    )


@pytest.mark.parametrize("instances", [3, "there", ["there"], {"input": ["there"]}, [{"output": "there"}]])
def test_instances_of_another_kind(instances):
    """A traceback for a foreign column. Break: fields["instances"][0].get("input") in request_text."""
    assert request_text({"instruction": "Hi", "instances": instances}, "here") == "Hi"


@pytest.mark.parametrize(
    "row",
    [
        {"text": "Hi"},
        {"instruction": 3},
        {"conversation": "Hi"},
        {"messages": [{"role": "assistant", "content": "Hi"}]},
        7,
    ],
)
def test_row_without_a_request(row):
    """An empty prompt where a field has another name. Break: return "" at the end of request_text."""
    with pytest.raises(ValueError, match=r"^here: "):
        request_text(row, "here")


def test_requests_are_filtered_and_counted(tmp_path, capsys):
    """Prompts in other languages, whole books, and the same prompt twice. Break: any of the filters, or the
    label of a row not believed."""
    rows = [
        {"conversation": [{"role": "user", "content": text}], "language": language}
        for text, language in [
            ("How are you?", "English"),
            ("how  are you?", "English"),
            ("How are  you?", "English"),  # the first again
            ("Wie geht es dir?", "German"),
            ("ok", "German"),  # by its label
            ("El nino", "English"),  # by its label
            ("x" * (data.LONGEST_REQUEST + 1), "English"),
            (" \n", "English"),
        ]
    ]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = load_prompts(f"chat={file}")
    assert [prompt.messages for prompt in prompts] == [
        [{"role": "user", "content": text}] for text in ("How are you?", "how  are you?", "El nino")
    ]
    assert {(prompt.task, prompt.answer) for prompt in prompts} == {("chat", None)}
    said = capsys.readouterr().out
    assert "3 prompts from 8 rows" in said
    for reason in ("repeated 1", "not English 2", "too long 1", "empty 1"):
        assert reason in said


@pytest.mark.parametrize(
    "empty",
    [
        None,
        "",
        {"instruction": None},
        {"instruction": ""},
        {"prompt": " ", "input": None},
        {"conversation": []},
        {"messages": None},
        {"messages": [{"role": "user", "content": None}]},
    ],
)
def test_an_empty_request_is_dropped(tmp_path, capsys, empty):
    """A run ended by one empty request of a million. Breaks: no None in request_text; no `or ""` behind the
    content of a turn, or behind the prompt."""
    file = tmp_path / "a.json"
    file.write_text(json.dumps([empty, {"prompt": "Hi"}]))
    (prompt,) = load_prompts(f"chat={file}")
    assert prompt.messages == [{"role": "user", "content": "Hi"}]
    assert "1 prompts from 2 rows, dropped: empty 1" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["math", "chat"])
def test_half_a_character_is_dropped(tmp_path, capsys, task):
    r"""A traceback for a text that was cut inside an emoji. Break: no `except UnicodeEncodeError`."""
    file = tmp_path / "a.jsonl"
    rows = [{"prompt": "Hi \ud83d", "answer": "1"}, {"prompt": "Hi 😀", "answer": "1"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    (prompt,) = load_prompts(f"{task}={file}")
    assert "Hi 😀" in prompt.messages[0]["content"]
    assert "dropped: half a character 1" in capsys.readouterr().out


def test_a_benchmark_keeps_all_its_questions(tmp_path):
    """A leaderboard's question lost because it is in French or long. Break: filter every row."""
    file = tmp_path / "bench.json"
    file.write_text(json.dumps([{"instruction": "Qui est le roi?"}, {"instruction": "x" * 9000}]))
    assert len(load_prompts(f"chat={file}")) == 2


def test_language_guess():
    """Half of the world's logs in an English run, or short English requests thrown away. Break: compare
    with `>` in is_english."""
    english = [
        "hello there",
        "explain jacobian",
        "Write code in C",
        "2+2",
        "what are the rates per diem?",
    ]
    foreign = ["Привет, как дела?", "Comment puis-je changer mes polices", "Schreibe eine Geschichte", "你好"]
    assert [is_english(text) for text in english + foreign] == [True] * len(english) + [False] * len(foreign)


def test_tiny_requests_are_read():
    """The embedded requests read as problems. Break: TINY["math"] for TINY[task]."""
    prompts = load_prompts("chat=tiny@test")
    assert len(prompts) == 470 and prompts[0].task == "chat" and "its " in prompts[0].messages[0]["content"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("talk=tiny", "unknown task 'talk'"),
        ("chat=tiny@dev", "unknown split"),
        ("chat=nowhere", "no such data"),
    ],
)
def test_bad_spec(spec, message):
    """A typo that trains on something else. Break: take an unknown task for math."""
    with pytest.raises(ValueError, match=rf"^--data {spec}: {message}"):
        load_prompts(spec)


def test_sources_have_weights(monkeypatch):
    """A Hub set's configuration, or a digit at the end of its name, taken for a weight. Break: make the
    weight's colon optional."""
    monkeypatch.setattr(data, "load_prompts", lambda name, own_reward=False: some_prompts(name, 3))
    specs = ["math=a.jsonl@all:12", "openai/gsm8k:main", "AI/set-2", "openai/gsm8k:socratic:4"]
    sources = load_sources(specs)
    assert [weight for _, weight in sources] == [12, 1, 1, 4]
    names = [prompts[0].task for prompts, _ in sources]
    assert names == ["math=a.jsonl@all", "openai/gsm8k:main", "AI/set-2", "openai/gsm8k:socratic"]


def test_a_prompt_of_two_sources_is_used_once(tmp_path, capsys):
    """One prompt twice in a step, with one seed: the same responses twice. Break: no check of ids; or the
    whole run refused for one row that two sets share."""
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, texts in zip(files, ("ab", "bc"), strict=True):
        file.write_text("".join(json.dumps({"problem": text, "answer": "1"}) + "\n" for text in texts))
    (first, _), (second, _) = load_sources([str(file) for file in files])
    assert (
        len(first) == 2
        and len(second) == 1
        and "b.jsonl: 1 prompts are in an earlier" in capsys.readouterr().out
    )
    with pytest.raises(ValueError, match="all its prompts are in the sources before it"):
        load_sources([str(files[0]), f"{files[0]}:2"])


def test_every_step_has_its_share_of_each_task():
    """A batch that is all math by chance: the rewards of a step would not be of the mixture asked for.
    Break: swap the weights, or draw from one list."""
    sources = [(some_prompts("math", 10), 2), (some_prompts("chat", 7), 1)]
    batches = MixedIterator(sources, 6, seed=0)
    for _ in range(20):
        assert [prompt.task for prompt in next(batches)] == ["math"] * 4 + ["chat"] * 2
    with pytest.raises(ValueError, match=r"--prompts-per-step 8: cannot be shared 2:1; use a multiple of 3"):
        MixedIterator(sources, 8, seed=0)
    with pytest.raises(ValueError, match=r"--prompts-per-step 18: takes 12 prompts from a source of 10"):
        MixedIterator(sources, 18, seed=0)
    with pytest.raises(ValueError, match=r"--prompts-per-step 9: 3 of a source, which 2 ranks cannot share"):
        MixedIterator(sources, 9, seed=0, rank=0, world=2)
    hundreds = [(prompts, 100 * weight) for prompts, weight in sources]
    assert next(MixedIterator(hundreds, 6, seed=0)) == next(MixedIterator(sources, 6, seed=0))


def test_ranks_and_resume_see_the_same_mixture():
    """Ranks that see one task each, and a resumed run that starts its chat prompts again. Break: pass rank 0
    to every part, or load only the first part's state."""
    sources = [(some_prompts("math", 10), 2), (some_prompts("chat", 7), 1)]
    whole, halves = MixedIterator(sources, 12, 1), [MixedIterator(sources, 12, 1, rank, 2) for rank in (0, 1)]
    for _ in range(5):
        assert sorted(p.id for p in next(whole)) == sorted(p.id for half in halves for p in next(half))
    again = MixedIterator(sources, 12, 1)
    again.load_state_dict(whole.state_dict())
    assert next(again) == next(whole)
    with pytest.raises(ValueError, match="1 sources, the checkpoint has 2"):
        MixedIterator(sources[:1], 6, 1).load_state_dict(whole.state_dict())


def test_validation_prompts_are_held_out(tmp_path):
    """A checkpoint chosen on the prompts that it was trained on. Break: no check of the split; no check of
    the other sources."""
    file = tmp_path / "problems.jsonl"
    rows = [{"problem": f"{i} + 1", "answer": str(i + 1)} for i in range(30)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = load_sources([f"{file}@train:2"])
    held_out = load_held_out([f"{file}@train:2"], sources)
    assert list(held_out) == [f"{file}@validation"] and len(held_out[f"{file}@validation"]) == 3
    for spec in (f"{file}", f"{file}@validation", f"{file}@all:3"):
        with pytest.raises(ValueError, match=rf"--eval-every: --data {spec} .*train on {file}@train"):
            load_held_out([spec], sources)
    copy = tmp_path / "copy.jsonl"
    copy.write_text(file.read_text())
    with pytest.raises(ValueError, match="trained on from another source"):
        load_held_out([f"{file}@train"], load_sources([f"{copy}@all"]))


@shared_files
@pytest.mark.parametrize(
    ("file", "count"),
    [
        ("chat/wildchat_first_turns.json", 783),  # of 1,051: 224 not in English, 44 repeated
        ("chat/evol_instruct_testset_218.jsonl", 217),  # one is there twice
        ("chat/self_instruct_user_oriented_252.jsonl", 252),
        ("arena_hard/question.jsonl", 500),
        ("alpaca_eval/baseline_gpt4_1106_preview.json", 805),
    ],
)
def test_real_files(file, count):
    """A loader that fits only our own rows. Break: filter benchmarks, too, or read only `instruction`."""
    assert len(load_prompts(f"chat={SHARED / file}")) == count


@shared_files
def test_real_logs_are_english():
    """A guess that lets other languages through: its mistakes were counted by reading all that is kept.
    Break: leave FOREIGN out."""
    kept = {
        p.messages[0]["content"] for p in load_prompts(f"chat={SHARED / 'chat/wildchat_first_turns.json'}")
    }
    for text in ("hola, dame datos sobre el carnotaurio", "parlami di Napoleone"):
        assert text not in kept
    for text in ("Best Project Management Textbooks", "baby soldier"):
        assert text in kept


@shared_files
@pytest.mark.parametrize(
    ("file", "more", "count"),
    [
        (
            "alpaca_eval/baseline_gpt4_1106_preview.json",
            ["--difficulties", str(SHARED / "alpaca_eval/instruction_difficulty_estimated.csv")],
            805,
        ),
        ("arena_hard/answer_gpt-4-0314.jsonl", [], 500),
    ],
)
def test_a_benchmarks_answers_meet_ours(file, more, count, tmp_path):
    """A baseline that the judge cannot read, or whose questions have other ids than our answers to them.
    Break: an id of the answer; the user's turn for the assistant's."""
    from judge.answers import load_answers, main

    out = tmp_path / "baseline.jsonl"
    main(["--answers", str(SHARED / file), "--out", str(out), *more])
    answers = load_answers([out])["baseline"]
    assert len(answers) == count and all(
        row["length"] == len(row["response"]) > 0 for row in answers.values()
    )
    assert all(isinstance(row.get("difficulty"), float) == bool(more) for row in answers.values())
    questions = {"alpaca_eval": file, "arena_hard": "arena_hard/question.jsonl"}[file.partition("/")[0]]
    asked = load_prompts(f"chat={SHARED / questions}")
    assert {prompt.id: prompt.messages[0]["content"] for prompt in asked} == {
        id: row["prompt"] for id, row in answers.items()
    }
