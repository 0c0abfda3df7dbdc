"""data.py: what is read, what is dropped, what is held out, and the order of the steps."""

import csv
import gzip
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import data
import rewards
from data import Prompt, PromptIterator, cached, load_prompts

SHARED = Path(__file__).parents[2] / "shared" / "data" / "math"
shared_files = pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data/math is absent")


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbered(count):
    return [{"problem": f"What is {number} + 1?", "answer": str(number + 1)} for number in range(count)]


def some_prompts(count):
    return [Prompt(f"id{number}", "math", [], "1") for number in range(count)]


def take(batches, count):
    return [next(batches) for _ in range(count)]


def ids(prompts):
    return [prompt.id for prompt in prompts]


# Reading


def test_prompt_text(tmp_path):
    r"""Prevents a template that eats the braces of \boxed{[answer]} or of the problem's LaTeX.

    Break: MATH_PROMPT.format(problem=problem).
    """
    file = write_rows(tmp_path / "a.jsonl", [{"problem": r" Find $\frac{1}{2}{problem}$. ", "answer": "x"}])
    (prompt,) = load_prompts(file)
    assert prompt.task == "math" and prompt.answer == "x" and len(prompt.id) == 16
    assert prompt.messages == [
        {
            "role": "user",
            "content": "Given the following problem, reason and give a final answer to the problem.\n"
            "Problem: Find $\\frac{1}{2}{problem}$.\n"
            "Your response should end with 'The final answer is $\\boxed{[answer]}$. I hope it is correct.' "
            "where [answer] is the response to the problem.",
        }
    ]


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        ({"answer": "6 + 6 = <<6+6=12>>12 eggs.\n#### 12"}, "12"),
        ({"answer": "so $1,234,000 in all\n#### 1,234,000"}, "1234000"),
        ({"answer": "#### -7 "}, "-7"),
        ({"answer": r" \frac{7}{2} "}, r"\frac{7}{2}"),
        ({"answer": "1,234"}, "1,234"),  # MATH: may be a pair, so its comma stays
        ({"answer": 27.0}, "27"),
        ({"answer": 0.5}, "0.5"),
        ({"answer": 0}, "0"),
        ({"answer": "3", "solution": r"\boxed{4}"}, "3"),
        ({"answer": None, "solution": r"\boxed{4}"}, "4"),
        ({"solution": r"first \boxed{1}, then \boxed{\frac{1}{\sqrt{2}}}."}, r"\frac{1}{\sqrt{2}}"),
        ({"answer": None}, None),
        ({"answer": ""}, None),
        ({"answer": True}, None),
        ({"answer": float("nan")}, None),
        ({"solution": "no box"}, None),
        ({"solution": r"\boxed{}"}, None),
    ],
)
def test_gold_answer(row, gold):
    r"""Prevents golds that no response can match ("27.0", "1,234" after ####) and truth values as numbers.

    Break: without .replace(",", ""), without int(answer), without the bool check.
    """
    assert data.gold_answer(row)[1] == gold


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"$\boxed{\{1, \{2\}\}}$", r"\{1, \{2\}\}"),
        (r"$\boxed{\left\{ x \right.}$ and more}", r"\left\{ x \right."),  # one \{ and no \}
        (r"\boxed {12}", "12"),
        (r"so $\boxed 2$.", "2"),
        (r"\boxed{1} or \fbox{3}", "3"),
        (r"\boxed{1 + {2}", None),
        (r"\boxedsomething{1}", None),
        ("nothing", None),
    ],
)
def test_boxed_answer(text, answer):
    r"""Prevents a gold cut at the first brace, or run past the last because \{ counted as a group.

    Break: re.finditer(r"[{}]", ...) in boxed_answer.
    """
    assert data.boxed_answer(text) == answer


def test_lines_end_at_newlines_only(tmp_path):
    r"""Prevents a row broken at U+2028 inside a string, or refused for a byte-order mark or Windows lines.

    Break: text.splitlines(), encoding="utf-8".
    """
    rows = [{"question": "a\u2028b", "answer": 1}, {"question": "c", "answer": 2}]
    text = "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_bytes(text.encode("utf-8-sig"))
    assert [prompt.answer for prompt in load_prompts(str(tmp_path / "a.jsonl"))] == ["1", "2"]


def test_formats_agree(tmp_path, monkeypatch):
    """Prevents a format that reads other rows, or in another order, than the rest.

    Break: reversed(value) for .json, rows from parts["test"].
    """
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = numbered(30)
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
    folder = tmp_path / "folder"
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "test.jsonl", numbered(3))
    expected = load_prompts(str(tmp_path / "a.jsonl"))
    assert len(expected) == 30
    for spec in ("a.json", "a.csv", "a.parquet", "folder@all"):
        assert load_prompts(str(tmp_path / spec)) == expected, spec


def test_cells_of_a_csv_file(tmp_path, capsys):
    """Prevents the golds that pandas makes of a column of numbers: 1.2345678901234568e+22, or none of "NA".

    Breaks: read .csv by `datasets`; no `or None`; no newline="" in read_table (old files end lines by \\r).
    """
    cells = 'id,Question,problem,answer\r\n1,"What, ""really""\r\nis it?",,0.50\r\n\r\n2,,Two?,NA\r\n'
    cells += "3,,Three?,\r\n4,,Four?,12345678901234567890123\r\n5,,Five?\r\n"
    (tmp_path / "a.csv").write_bytes(cells.encode("utf-8-sig"))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(cells.encode(), mtime=0))
    prompts = load_prompts(str(tmp_path / "a.csv"))
    assert [prompt.answer for prompt in prompts] == ["0.50", "NA", "12345678901234567890123"]
    assert 'Problem: What, "really"\r\nis it?\n' in prompts[0].messages[0]["content"]
    said = capsys.readouterr().out
    assert "3 prompts from 5 rows, dropped: no answer 2; the first without an answer is" in said
    assert "a.csv, line 6" in said
    assert load_prompts(str(tmp_path / "a.csv.gz")) == prompts
    (tmp_path / "mac.csv").write_bytes(b"problem,answer\rOne?,1\rTwo?,2\r")
    assert [prompt.answer for prompt in load_prompts(str(tmp_path / "mac.csv"))] == ["1", "2"]
    rows = [prompt.row for prompt in load_prompts(str(tmp_path / "a.csv"), own_reward=True)]
    assert rows[1] == {"data_source": str(tmp_path / "a.csv"), "id": "2", "Question": None} | {
        "problem": "Two?",
        "answer": "NA",
    }


def test_a_path_may_hold_brackets(tmp_path, monkeypatch):
    """Prevents "no such data" for a file that is there: data_files is a pattern. Break: no glob.escape."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "run[1]*"
    folder.mkdir()
    datasets.Dataset.from_list(numbered(2)).to_parquet(folder / "a.parquet")
    assert [prompt.answer for prompt in load_prompts(f"{folder}/a.parquet")] == ["1", "2"]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:083b\nsize 3754529\n"
BAD_FILES = [
    ("gone.jsonl", None, r"gone\.jsonl: no such file"),
    ("gone.parquet", None, r"gone\.parquet: no such file"),
    ("a.jsonl", "", "is empty"),
    ("a.jsonl", " \n\n", "is empty"),
    ("a.json", "", "is empty"),
    ("a.json", "[]", "is empty"),
    ("a.jsonl", '{"problem": "a", "answer": "1"}\n\n{oops\n', r"a\.jsonl, line 3: not JSON"),
    ("a.json", '[\n{"problem": "a",\n]', r"a\.json, line 3: not JSON"),
    ("a.json", '{"problem": "a", "answer": "1"}\n{"problem": "b"}', r"line 2: not JSON .*name it \.jsonl"),
    ("a.json", '{"data": []}', "holds one dict, not a list"),
    ("a.jsonl", '{"problem": "a", "answer": "1"}\n{"text": "b", "gold": 1}', "line 2: .*: text, gold"),
    ("a.jsonl", '{"problem": "a", "gold": 1}', "line 1: no 'answer' and no 'solution'.*: problem, gold"),
    ("a.json", '[{"problem": "a", "gold": 1}]', "item 1: no 'answer' and no 'solution'"),
    ("a.jsonl", '{"problem": " ", "answer": 1}', "line 1: no text in 'problem'"),
    ("a.jsonl", '{"problem": 3, "answer": 1}', "line 1: no text in 'problem'"),
    ("a.jsonl", "[1]", "line 1: list, not an object"),
    ("a.jsonl", '{"problem": "a", "answer": null}\n{"problem": "b", "answer": ""}', "no answer 2; .*line 1"),
    ("a.jsonl", b'{"problem": "\xff", "answer": 1}', r"a\.jsonl: not UTF-8 text \(byte 13\)"),
    ("a.parquet", "not parquet", r"a\.parquet: cannot be loaded \(Parquet"),
    ("a.jsonl@test", '{"problem": "a", "answer": "1"}', "too few to split, use @all"),
    ("a.jsonl@dev", '{"problem": "a", "answer": "1"}', "unknown split 'dev': use train, "),
    ("a.jsonl", POINTER, r"a\.jsonl: a Git LFS pointer, not the data: run `git lfs pull`"),
    ("a.parquet", POINTER, r"a\.parquet: a Git LFS pointer"),
    (
        "a.jsonl.gz",
        gzip.compress(b"{}" * 99, mtime=0)[:-9],
        r"a\.jsonl\.gz: a damaged \.gz file .*download it again",
    ),
    ("a.jsonl.gz", b"\x1f\x8b" + b"x" * 99, r"a\.jsonl\.gz: a damaged \.gz file"),
    ("a.jsonl.gz", "{oops", r"a\.jsonl\.gz, line 1: not JSON"),
    ("a.jsonl", '{"prompt": "a", "label": ["1", "2"]}', "line 1: several answers in 'label'; keep one"),
    ("a.jsonl", '{"prompt": [], "label": 1}', "line 1: no text in 'problem'.*: prompt, label"),
    ("a.jsonl", '{"prompt": null, "label": 1}', "line 1: no text in 'problem'"),
    ("a.jsonl", '{"prompt": ["a"], "label": 1}', "line 1: 'prompt' must be turns of a role and a text"),
    ("a.jsonl", '{"prompt": [{"role": "user", "content": null}], "label": 1}', "'prompt' must be turns of"),
    ("a.jsonl", '{"prompt": [{"role": "system", "content": "a"}], "label": 1}', "the last the user's"),
    (
        "a.jsonl",
        '{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "label": 1}',
        "the last the user's",
    ),
    ("a.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}', "'messages' must be turns"),
    ("a.jsonl", '{"messages": "a", "label": 1}', "no text in 'problem'"),
    ("a.jsonl", '{"prompt": "a"}', "line 1: no 'answer' and no 'solution'"),
    ("a.jsonl", '{"instruction": "a", "input": "b", "label": 1}', "requests are chat="),
    ("a.jsonl", '{"prompt": "a", "reward_model": {"ground_truth": {"a": 1}}}', "no answer 1; .*line 1"),
    ("a.txt", "a", r"a\.txt: no such data: use tiny, a file in \.jsonl, \.json, \.csv, \.parquet"),
    ("gone.csv", None, r"gone\.csv: no such file"),
    ("a.csv", "", "is empty"),
    ("a.csv", "problem,answer\n", "is empty"),
    ("a.csv", "problem,answer\na,1\nb,2,3\n", r"a\.csv, line 3: not CSV \(more cells than names"),
    ("a.csv", 'problem,answer\n"a,1\nb,2\n', r"a\.csv, line 3: not CSV \(unexpected end"),
    ("a.csv", "problem;answer\na;1\n", r"a\.csv, line 2: no text in .*; its fields: problem;answer"),
]


@pytest.mark.parametrize(("spec", "content", "message"), BAD_FILES)
def test_bad_file(tmp_path, monkeypatch, spec, content, message):
    """Prevents a traceback, or a message without the place, for a file that cannot be used.

    Break: `number` for `number + error.lineno - 1`, no `if not prompts`, no `None in row`, no strict=True.
    """
    if content is not None:
        content = content.encode() if isinstance(content, str) else content
        (tmp_path / spec.partition("@")[0]).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(str(tmp_path / spec))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec", ["", "gsm8k", "./owner/name", "data/typo.txt", "data/typo.tsv", "a/b/c"])
def test_not_a_hub_name(tmp_path, monkeypatch, spec):
    """Prevents half a minute of network retries, then talk of the Hub, for a mistyped path.

    Break: HUB_DATA = re.compile(r".*").
    """
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no such data"):
        load_prompts(spec)


def test_hub_out_of_reach(tmp_path, monkeypatch):
    """Prevents a traceback where there is no network. Break: no `except` in read_dataset."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"nobody/nothing-1\.5: cannot be loaded .*network") as error:
        load_prompts("nobody/nothing-1.5")
    assert "\n" not in str(error.value)


# Other people's formats

DAPO = "Solve the following math problem step by step. What is 1 + 1?"


def turn(role, content):
    return {"role": role, "content": content}


def user(content):
    return [turn("user", content)]


def wrapped(text):
    return user(data.MATH_PROMPT.replace("{problem}", text))


FORMATS = [  # row, its messages, its gold
    # TRL: its own DeepMath-103K has the bare answer in `solution`, NuminaMath-TIR the working.
    ({"prompt": user("What is 1?"), "solution": r"\frac{1}{2}"}, user("What is 1?"), r"\frac{1}{2}"),
    (
        {"prompt": [turn("system", "Think."), *user("What is 2?")], "solution": r"So it is \boxed{2}."},
        [turn("system", "Think."), *user("What is 2?")],
        "2",
    ),
    ({"prompt": "What is 3?", "solution": "It is hard to say."}, None, None),  # no answer, only working
    ({"prompt": "What is 3?", "ground_truth": "3"}, wrapped("What is 3?"), "3"),
    ({"prompt": "What is 4? Box it: \\boxed{}", "answer": 4}, user("What is 4? Box it: \\boxed{}"), "4"),
    (
        {"messages": [*user("What is 5?"), turn("assistant", r"\boxed{4}, no, \boxed{5}")]},
        user("What is 5?"),
        "5",
    ),
    (
        {"messages": [*user("1?"), turn("assistant", r"\boxed{1}"), *user("2?")], "answer": "2"},
        [*user("1?"), turn("assistant", r"\boxed{1}"), *user("2?")],
        "2",
    ),
    (  # ShareGPT
        {"conversations": [{"from": "human", "value": "6?"}, {"from": "gpt", "value": r"\boxed{6}"}]},
        user("6?"),
        "6",
    ),
    # verl and DAPO
    (
        {
            "data_source": "math_dapo",
            "prompt": user(DAPO),
            "reward_model": {"ground_truth": "2", "style": "rule"},
        },
        user(DAPO),
        "2",
    ),
    (
        {"prompt": user("7?"), "reward_model": {"ground_truth": ["7"]}, "extra_info": {"index": 0}},
        user("7?"),
        "7",
    ),
    # OpenRLHF
    ({"input": "8?", "label": "8"}, wrapped("8?"), "8"),
    ({"prompt": user("9?"), "label": "9"}, user("9?"), "9"),
    ({"context_messages": user("10?"), "target": 10.0}, user("10?"), "10"),
    # Rows with several of these fields: the first of the module's docstring wins.
    ({"problem": "11?", "prompt": "no", "messages": user("no"), "answer": "11"}, wrapped("11?"), "11"),
    ({"problem": "12?", "prompt": user("Box 12?"), "answer": "12"}, user("Box 12?"), "12"),
    ({"prompt": user("13?"), "answer": "no", "reward_model": {"ground_truth": "13"}}, user("13?"), "13"),
    ({"prompt": "14?", "label": "no", "ground_truth": "no", "solution": r"\boxed{14}"}, wrapped("14?"), "14"),
    ({"prompt": "18?", "target": "no", "label": "no", "ground_truth": "18"}, wrapped("18?"), "18"),
    ({"prompt": "19?", "target": "no", "label": "19", "solution": "no"}, wrapped("19?"), "19"),
    ({"Problem": "15?", "ANSWER": "15"}, wrapped("15?"), "15"),
    ({"problem": None, "prompt": [], "question": "16?", "answer": None, "label": [16]}, wrapped("16?"), "16"),
    ({"problem": "17?", "answer": float("nan"), "label": 17}, wrapped("17?"), "17"),
]


@pytest.mark.parametrize(("row", "messages", "gold"), FORMATS)
def test_formats_of_other_programs(tmp_path, row, messages, gold):
    """Prevents an instruction of the author wrapped in the paper's, a lost system message, the answer of the
    conversation in its own prompt, and the wrong one of two golds.

    Breaks: each name out of WHOLE, TALKS, TEXTS or GOLDS, or two of them swapped; no SAYS_HOW; no PROSE; no
    ROLES; no lower() or no NaN in filled.
    """
    file = write_rows(tmp_path / "a.jsonl", [row, {"problem": "Another?", "answer": "1"}])
    prompts = load_prompts(file)
    assert [(p.messages, p.answer) for p in prompts] == [
        *([(messages, gold)] if gold else []),
        (wrapped("Another?"), "1"),
    ]


def test_a_mixture_says_what_was_read(tmp_path, capsys):
    """Prevents a file that is silently read as something else. Break: no line in make_prompts; a count of all
    rows, the repeated ones too."""
    rows = [
        {"prompt": user(DAPO), "reward_model": {"ground_truth": "2"}},
        {"prompt": user(DAPO), "reward_model": {"ground_truth": "2"}},
        {"prompt": user(r"What is 3? \boxed{}"), "reward_model": {"ground_truth": "3"}},
        {"input": "What is 4?", "label": "4"},
        {"problem": "What is 5?", "answer": "5"},
    ]
    file = write_rows(tmp_path / "a.jsonl", rows)
    assert [prompt.answer for prompt in load_prompts(file)] == ["2", "3", "4", "5"]
    dropped, read = capsys.readouterr().out.splitlines()
    assert "4 prompts from 5 rows, dropped: repeated 1" in dropped
    wrap = "wrapped in the paper's prompt"
    assert read == (
        f"data: {file}: problems: 2 in 'prompt' as it stands, gold in 'reward_model'; "
        f"1 in 'input' {wrap}, gold in 'label'; 1 in 'problem' {wrap}, gold in 'answer'; "
        "1 ask for no \\boxed{}: an answer outside LaTeX earns 0"
    )


def test_ids_of_other_formats(tmp_path):
    """Prevents a test problem in training because its file has another format, and two conversations taken
    for one because they end alike.

    Breaks: no `problem` for the text of messages; messages[-1] for all turns; the system's turn in the text.
    """
    rows = [
        {"question": "What is 1 + 1?", "prompt": user("Box it. What is 1 + 1?"), "label": "2"},
        {"prompt": [turn("system", "Think."), *user("What is  1 + 1?\n")], "label": "2"},
        {"prompt": "What is 1 + 1?", "label": "2"},
        {"messages": [*user("What is 1 + 1?"), turn("assistant", r"\boxed{2}")]},
    ]
    for row in rows:
        (prompt,) = load_prompts(write_rows(tmp_path / "a.jsonl", [row]))
        assert prompt.id == "72f8917549de2d6d"
    few = [[*user(f"{n}?"), turn("assistant", f"{n}"), *user("And twice that?")] for n in (1, 2)]
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": talk, "label": "x"} for talk in few])
    assert len(load_prompts(file)) == 2


def test_own_reward_needs_no_gold(tmp_path, capsys):
    """Prevents an own reward without the row's fields, a refusal of golds that only it understands, and the
    paper's instruction to box an answer around a prompt of another task.

    Breaks: no `own_reward or` in read_problem; no `not own_reward` in gold_answer or at "no 'answer'".
    """
    rows = [
        {"prompt": "Write a haiku.", "tests": [1]},
        {"prompt": user("Sort a list."), "reward_model": {"ground_truth": ["a", "b"]}},
        {"messages": [*user("Hi?"), turn("assistant", "Hi.")]},
        {"problem": "What is 1?", "answer": "1"},
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    prompts = load_prompts(path, own_reward=True)
    assert [prompt.row for prompt in prompts] == [{"data_source": path, **row} for row in rows]
    assert [prompt.answer for prompt in prompts] == [None, None, None, "1"]
    assert [prompt.messages for prompt in prompts] == [
        *(user("Write a haiku."), user("Sort a list."), user("Hi?"), wrapped("What is 1?"))
    ]
    assert "earns 0" not in capsys.readouterr().out


def test_parquet_as_verl_writes_it(tmp_path, monkeypatch):
    """Prevents nested columns read as something else than JSON's, and shards left out.

    Break: rows.select(range(2)) in read_dataset.
    """
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": user(f"What is {n}? Think step by step."),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(n)},
            "extra_info": {"split": "train", "index": n, "answer": "no", "question": "no"},
        }
        for n in range(4)
    ]
    expected = load_prompts(write_rows(tmp_path / "a.jsonl", rows))
    assert [prompt.answer for prompt in expected] == ["0", "1", "2", "3"]
    (tmp_path / "shards").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    pandas.DataFrame(rows).to_parquet(tmp_path / "b.parquet")  # numpy arrays and an index inside
    for shard in (0, 1):
        part = datasets.Dataset.from_list(rows[2 * shard : 2 * shard + 2])
        part.to_parquet(tmp_path / f"shards/train-0000{shard}-of-00002.parquet")
    for name in ("a.parquet", "b.parquet", "shards@all"):
        assert load_prompts(str(tmp_path / name)) == expected, name


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "plain.jsonl.gz"])
def test_gzip(tmp_path, name):
    """Prevents a .gz that is refused, or one that a browser has unpacked. Break: unpack by the name."""
    rows = numbered(3)
    text = json.dumps(rows) if ".json." in name else "\r\n".join(json.dumps(row) for row in rows)
    content = text.encode("utf-8-sig")
    (tmp_path / name).write_bytes(content if name.startswith("plain") else gzip.compress(content, mtime=0))
    assert [prompt.answer for prompt in load_prompts(str(tmp_path / name))] == ["1", "2", "3"]
    with pytest.raises(ValueError, match="leaves nothing held out"):
        data.load_held_out([str(tmp_path / name)], [])


@pytest.mark.parametrize("part", ["test", "validation"])
def test_a_set_of_one_part_is_whole(tmp_path, monkeypatch, capsys, part):
    """Prevents a benchmark of which a tenth or eight tenths are measured, and training on part of it.

    Break: no look at the part's name in load_prompts.
    """
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "bench"
    write_rows(folder / f"{part}.jsonl", numbered(30))
    for spec in (f"{folder}", f"{folder}@{part}", f"{folder}@all"):
        assert len(load_prompts(spec)) == 30
    assert f"its only part is named '{part}', taken whole" in capsys.readouterr().out
    for other in {"train", "validation", "test"} - {part}:
        with pytest.raises(ValueError, match=rf"@{other}: its only part is named '{part}': use @{part}$"):
            load_prompts(f"{folder}@{other}")
    write_rows(folder / "train.jsonl", numbered(20))
    assert [len(load_prompts(f"{folder}@{split}")) for split in ("train", "test", "all")] == [16, 2, 20]


def test_a_folder_of_pointers(tmp_path, monkeypatch):
    """Prevents talk of a broken file where Git LFS was not installed. Break: no loop in read_dataset."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set/data"
    folder.mkdir(parents=True)
    (folder / "train-00000-of-00001.parquet").write_text(POINTER)
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet: a Git LFS pointer.*git lfs pull"):
        load_prompts(str(tmp_path / "set"))


# Filters

NUMINA_ROWS = [
    ("olympiads", "Find $x$ with $x + 1 = 3$.", r"So \boxed{2}.", None),
    ("orca_math", "How many?", r"\boxed{1}", "orca_math"),
    ("synthetic_amc", "How much?", r"\boxed{1}", "synthetic_amc"),
    ("synthetic_math", "How long?", r"\boxed{1}", "synthetic_math"),
    ("aops_forum", "Prove that $1 < 2$.", r"\boxed{1 < 2}", "proof"),
    ("cn_k12", "Find $a$ and show that $a > 0$.", r"\boxed{1}", "proof"),
    ("olympiads", "a) Find $n$. b) Show that it is prime.", r"\boxed{7}", "proof"),
    ("olympiads", "Show the following inequality: $1 < 2$.", r"\boxed{2}", "proof"),
    ("olympiads", "Let $C$ be given. Prove that it exists.", r"\boxed{C}", "proof"),
    ("cn_k12", "Which? A: $1$ B: $2$ C: $3$ D: $4$", r"\boxed{B}", "multiple choice"),
    ("amc_aime", r"$\text{(A)},1,\text{(B)},2,\text{(C)},3,\text{(D)},4$", r"\fbox{2}", "multiple choice"),
    ("aops_forum", "Describe all.", "Every one. $\\blacksquare$", "no answer"),
    ("aops_forum", "Describe them.", r"\boxed{}", "no answer"),
    ("cn_k12", "The figure shows that $a = 1$; as shown, find $P(A) + P(B)$.", r"\boxed{1}", None),
    ("gsm8k", "Show your work: 2 tickets to a show cost 4. What does one?", r"\boxed{2}", None),
    ("math", "I improved my proof. How many lines are left?", r"\boxed{2}", None),
]


def test_numina_through_the_hub_loader(tmp_path, monkeypatch, capsys):
    """Prevents proofs, choices and synthetic problems in training, and a filter whose count is not printed.

    `datasets` prefers a folder of that name to the Hub's set: the whole way of a real load but the network.
    Break: drop any filter; read parts["test"].
    """
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "AI-MO" / "NuminaMath-CoT" / "data"
    folder.mkdir(parents=True)
    rows = [{"source": row[0], "problem": row[1], "solution": row[2], "messages": []} for row in NUMINA_ROWS]
    datasets.Dataset.from_list(rows).to_parquet(folder / "train-00000-of-00001.parquet")
    datasets.Dataset.from_list(rows[:1]).to_parquet(folder / "test-00000-of-00001.parquet")

    prompts = load_prompts("AI-MO/NuminaMath-CoT@all")
    kept = [row for row in NUMINA_ROWS if row[3] is None]
    assert [prompt.answer for prompt in prompts] == ["2", "1", "2", "2"]
    assert all(row[1] in prompt.messages[0]["content"] for row, prompt in zip(kept, prompts, strict=True))
    (line,) = capsys.readouterr().out.splitlines()
    assert "4 prompts from 16 rows" in line
    for reason, count in Counter(row[3] for row in NUMINA_ROWS if row[3]).items():
        assert f"{reason} {count}" in line
    assert load_prompts("AI-MO/NuminaMath-CoT") == prompts  # 4 are too few to hold any out


def test_numina_labels(tmp_path, capsys):
    """Prevents guessing from the text what NuminaMath-1.5 says, and "notfound" as a gold.

    Break: `label is None and` removed; no "notfound".
    """
    rows = [
        ("Find all and prove that there are no others.", "14", "math-word-problem"),
        ("Describe it.", "proof", "proof"),
        ("Which?", "12", "MCQ"),
        ("What is it?", "notfound", "math-word-problem"),
    ]
    rows = [dict(problem=p, answer=a, question_type=t, source="olympiads_ref") for p, a, t in rows]
    assert [p.answer for p in load_prompts(write_rows(tmp_path / "a.jsonl", rows))] == ["14"]
    printed = capsys.readouterr().out
    synthetic = "orca_math 0, synthetic_amc 0, synthetic_math 0"
    assert f"dropped: {synthetic}, proof 1, multiple choice 1, no answer 1" in printed


def test_other_sources_are_not_filtered(tmp_path, capsys):
    """Prevents NuminaMath's filters on a user's own problems. Break: `if "source" in row`."""
    rows = [{"problem": "Prove that 1 + 1 = 2; which?", "answer": "A", "source": ["mine"]}]
    assert len(load_prompts(write_rows(tmp_path / "a.jsonl", rows))) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("problem", "gold", "choice"),
    [
        ("Which is it?", "B", True),
        ("Which are they?", "A, B, D", True),
        ("Which is it?", r"\text{A}", True),
        ("Which is it?", r"\textbf{(C)}\ 12", True),
        ("(A) 1 (B) 2 (C) 3 (D) 4", "3", True),
        ("（A） 1 （B） 2 （C） 3 （D） 4", "3", True),
        ("It is ( )\nA. $1$\nB. $2$\nC. $3$\nD. $4$", "3", True),
        (r"It is $(\mathrm{A})\ 1\quad(\mathrm{B})\ 2\quad(\mathrm{C})\ 3\quad(\mathrm{D})\ 4$", "3", True),
        ("Find $P(A) + P(B) + P(C) + P(D)$.", "1", False),
        ("The points $A$, $B$, $C$ and $D$ are on a line through A. Where?", "1", False),
        ("Find AB:CD in the square ABCD.", "1", False),
        ("(a) Find x. (b) Find y. (c) Find z. (d) Add.", "1", False),
        ("(A) Find x. (B) Find y. (C) Add.", "1", False),
        ("Find $f$.", "Ax", False),
        ("Find $f$.", "BA", False),
        ("Find $f$.", "", False),
    ],
)
def test_multiple_choice(problem, gold, choice):
    r"""Prevents options that pass as open questions, and geometry that passes as options.

    Break: no (?<![A-Za-z]); "ABC" for "ABCD"; no markup.sub.
    """
    assert data.is_multiple_choice(problem, gold) is choice


# Splits


def test_splits_hold_out_a_tenth_by_content(tmp_path):
    """Prevents test problems in training after the file was shuffled, or written with other spaces.

    Break: ids = [prompt.id for prompt in prompts], unsorted; a key from the row number.
    """
    rows = numbered(105)
    write_rows(tmp_path / "a.jsonl", rows)
    random.Random(0).shuffle(rows)
    write_rows(tmp_path / "b.jsonl", [{**row, "problem": row["problem"].replace(" ", "\n ")} for row in rows])

    def answers(spec):
        return sorted((prompt.answer, prompt.id) for prompt in load_prompts(str(tmp_path / spec)))

    parts = {part: answers(f"a.jsonl@{part}") for part in data.SPLITS}
    assert {part: len(found) for part, found in parts.items()} == {"train": 85, "validation": 10, "test": 10}
    assert sorted(sum(parts.values(), [])) == answers("a.jsonl")
    assert parts == {part: answers(f"b.jsonl@{part}") for part in data.SPLITS}


def test_id_is_frozen(tmp_path):
    """Prevents a change of the hash, which would put test problems of old runs into the training of new ones.

    Break: problem.encode() without the normalised spaces, another hash.
    """
    file = write_rows(tmp_path / "a.jsonl", [{"problem": "What is  1 + 1?\n", "answer": 2}])
    (prompt,) = load_prompts(file)
    assert prompt.id == "72f8917549de2d6d"  # printf "What is 1 + 1?" | sha256sum


@pytest.mark.parametrize(("count", "size"), [(19_799, 1979), (19_800, 1980), (30_000, 1980)])
def test_paper_sizes(count, size):
    """Prevents other held-out sizes than the paper's 1,980 and 1,980. Break: HELD_OUT = 2000."""
    prompts = some_prompts(count)
    assert [len(data.take_split(prompts, part, "x")) for part in ("test", "validation")] == [size, size]
    assert len(data.take_split(prompts, "train", "x")) == count - 2 * size


def test_repeated_problems_are_dropped(tmp_path, capsys):
    """Prevents two groups of one id in a step, and a problem in both training and test.

    Break: no `key in prompts`.
    """
    rows = [{"problem": "a b", "answer": 1}, {"problem": "c", "answer": 2}, {"problem": " a\nb", "answer": 3}]
    file = write_rows(tmp_path / "a.jsonl", [*rows, {"problem": "d", "answer": None}])
    assert [prompt.answer for prompt in load_prompts(file)] == ["1", "2"]
    line = capsys.readouterr().out
    assert "2 prompts from 4 rows, dropped: repeated 1, no answer 1; the first" in line and "line 4" in line


def test_tiny_reads_its_split(tmp_path, monkeypatch):
    """Prevents training on the test file. Break: `train` for every part; train not the default."""
    monkeypatch.setattr(data, "TINY", {"math": tmp_path})
    rows = numbered(6)
    for part, some in zip(data.SPLITS, (rows[:3], rows[3:5], rows[5:]), strict=True):
        write_rows(tmp_path / f"{part}.jsonl", some)
    for part, answers in {"train": "123", "validation": "45", "test": "6", "all": "123456"}.items():
        assert [prompt.answer for prompt in load_prompts(f"tiny@{part}")] == list(answers)
    assert load_prompts("tiny") == load_prompts("tiny@train")


def test_tiny_is_disjoint(capsys):
    """Prevents a tiny test set that training has seen. Break: copy a line of test.jsonl to train.jsonl."""
    parts = {part: set(ids(load_prompts(f"tiny@{part}"))) for part in data.SPLITS}
    assert all(len(found) >= 100 for found in parts.values())
    assert len(set.union(*parts.values())) == sum(map(len, parts.values()))
    assert capsys.readouterr().out == ""  # no row is dropped


# Steps


def test_steps_do_not_depend_on_the_ranks():
    """Prevents another experiment on another number of GPUs. Break: batch[rank::world], a seed per rank."""
    prompts = some_prompts(20)
    steps = take(PromptIterator(prompts, 12, seed=3), 10)
    for world in (2, 3, 4):
        ranks = [take(PromptIterator(prompts, 12, 3, rank, world), 10) for rank in range(world)]
        for step, slices in zip(steps, zip(*ranks, strict=True), strict=True):
            assert sum(slices, []) == step


@pytest.mark.parametrize(("count", "per_step"), [(10, 4), (7, 5), (5, 5), (9, 1), (8, 7)])
def test_epochs_are_whole(count, per_step):
    """Prevents dropped prompts, short steps, one order for all epochs, and one prompt twice in a step.

    Break: drop the remainder (self.queue = order); no order.sort; seed without the epoch.
    """
    steps = take(PromptIterator(some_prompts(count), per_step, seed=0), 6 * count)
    assert all(len(set(ids(step))) == per_step for step in steps)
    drawn = ids(sum(steps, []))
    epochs = [drawn[start : start + count] for start in range(0, len(drawn), count)]
    assert all(len(set(epoch)) == count for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_seed_orders():
    """Prevents a seed that does nothing, and an order that differs between two processes (hash() is salted).

    Break: random.Random(self.epoch); random.Random(hash(...)).
    """
    order = {seed: ids(next(PromptIterator(some_prompts(6), 6, seed))) for seed in (0, 1)}
    assert order[0] == ["id0", "id5", "id1", "id4", "id3", "id2"]
    assert order[1] != order[0]


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 9])
def test_resume_continues_exactly(stop):
    """Prevents a resume that restarts the data, or skips what was carried over an epoch's end.

    Break: restore without the loop; `step - 1`.
    """
    prompts = some_prompts(10)
    straight = PromptIterator(prompts, 4, seed=5)
    before = take(straight, stop)
    state = json.loads(json.dumps(straight.state_dict()))
    after = take(straight, 10)
    resumed = [PromptIterator(prompts, 4, 5, rank, world=2) for rank in (0, 1)]  # saved by one rank
    for rank in resumed:
        next(rank)
        rank.load_state_dict(state)
    assert len(before) == state["step"] == stop
    assert [next(resumed[0]) + next(resumed[1]) for _ in range(10)] == after


def test_resume_refuses_other_prompts():
    """Prevents a resumed run that trains on other problems, answers or columns than the straight one would.

    Breaks: no check of the seed, of per_step or of content; the ids alone in content, or less than all of its
    four; data_source in it, which is the path as --data writes it.
    """
    prompt = Prompt("id0", "math", [turn("system", "Think."), *user("1?")], "1", {"data_source": "a", "x": 1})

    def resume(other=prompt, per_step=2, seed=5):
        PromptIterator([other, *some_prompts(9)], per_step, seed).load_state_dict(state)

    state = PromptIterator([prompt, *some_prompts(9)], 2, seed=5).state_dict()
    resume(replace(prompt, row={"data_source": "./a", "x": 1}))
    with pytest.raises(ValueError, match="^--seed 6: the checkpoint has 5: resume with the same$"):
        resume(seed=6)
    with pytest.raises(ValueError, match="--prompts-per-step: a step takes 4 of these .*checkpoint has 2: "):
        resume(per_step=4)
    changes = {"id": "id10", "messages": user("1?"), "answer": "2", "row": {"data_source": "a", "x": 2}}
    for name, value in changes.items():
        with pytest.raises(ValueError, match="^--data: the prompts are not those that .*with the same$"):
            resume(replace(prompt, **{name: value}))


# The real files


@shared_files
@pytest.mark.parametrize(
    ("file", "count"),
    [
        ("gsm8k_train.jsonl", 7473),
        ("gsm8k_test.jsonl", 1319),
        ("math500.jsonl", 500),
        ("math_train.json", 7469),  # of 7,474: four have no answer, one is there twice
        ("amc23.jsonl", 40),
        ("numina_cot_samples.jsonl", 46),
    ],
)
def test_real_files(file, count):
    """Prevents a loader that fits only our own rows. Break: require `problem`, or a string for an answer."""
    prompts = load_prompts(str(SHARED / file))
    assert len(prompts) == len(set(ids(prompts))) == count
    assert all(prompt.answer.strip() for prompt in prompts)
    if file.startswith(("gsm8k", "amc23")):
        assert all(prompt.answer.removeprefix("-").isdigit() for prompt in prompts)


@shared_files
def test_real_files_share_no_problem():
    """Prevents training on MATH-500: no id of the training files may be one of the test files'.

    Break: an id from the row number.
    """
    found = {file.stem: set(ids(load_prompts(str(file)))) for file in SHARED.glob("[agm]*.json*")}
    training = found["gsm8k_train"] | found["math_train"]
    assert not training & (found["gsm8k_test"] | found["math500"] | found["amc23"])


@shared_files
def test_real_numina_rows():
    """Prevents a filter that drifts: which of the 110 rows each one drops was read and judged one by one.

    Break: any change to ASKS_FOR_PROOF or is_multiple_choice that moves a row.
    """
    dropped = {}
    for number, line in enumerate((SHARED / "numina_cot_samples.jsonl").read_text().splitlines(), 1):
        row = json.loads(line)
        _, gold = data.gold_answer(row)
        reason = data.numina_filter(row, row["problem"], gold) or ("no answer" if gold is None else "kept")
        dropped.setdefault(reason, []).append(number)
    kept = dropped.pop("kept")
    proofs = dropped.pop("proof")
    assert dropped == {
        "synthetic_math": [103, 104, 105, 109],
        "multiple choice": [77, 101, 108],
        "no answer": [1, 10, 12, 44, 76, 110],
    }
    assert len(proofs) == 51 and {27, 46, 53, 57, 81, 91, 102} <= set(proofs)  # 57's gold is the letter C
    assert len(kept) == 46 and {16, 35, 64, 86, 100} <= set(kept)


@shared_files
def test_real_file_of_another_schema():
    """Prevents a silent half-read of fields that we do not know. Break: no check of the gold's fields."""
    with pytest.raises(ValueError, match=r"line 1: no 'answer' and no 'solution'.*: id, .*reference_answer"):
        load_prompts(str(SHARED / "numina15_olympiads_1k.jsonl"))


def test_what_is_kept_on_disk(tmp_path, monkeypatch, capsys):
    """A file that was cut, emptied or never written decides which problems are trained on, or ends the run.

    Breaks: no ValueError, or no TypeError, among those caught; the key without rest(); without items; no
    look at CACHED_FROM; at SEMI_ONLINE_CACHE; no `except OSError` around the write.
    """
    monkeypatch.setenv("SEMI_ONLINE_CACHE", "on")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(data, "CACHED_FROM", 2)
    calls = []

    def value(items=("a", "b"), rest="1"):
        """The value, and whether it was computed."""
        before = len(calls)
        result = cached("test", list(items), lambda: [rest], lambda: calls.append(1) or [3, 5])
        assert result == [3, 5]
        return len(calls) > before

    assert [value(), value(), value(["a", "c"]), value(rest="2"), value(["a"]), value(["a"])] == [
        *(True, False, True, True, True, True)  # one item alone is not kept
    ]
    files = sorted((tmp_path / "semi-online").iterdir())
    assert len(files) == 3 and all(file.suffix == ".json" for file in files) and not capsys.readouterr().out
    whole = {file: file.read_text() for file in files}
    for broken in (lambda text: text[:-5], lambda _: "", lambda _: "null", lambda _: "{}"):
        for file in files:
            file.write_text(broken(whole[file]))
        assert [value(), value()] == [True, False]
        assert capsys.readouterr().out.count("is broken") == 1
    monkeypatch.setenv("SEMI_ONLINE_CACHE", "off")
    assert value()
    monkeypatch.setenv("SEMI_ONLINE_CACHE", "on")
    monkeypatch.setenv("XDG_CACHE_HOME", str(files[0]))  # no folder
    assert value() and value() and "cannot be written" in capsys.readouterr().out


def test_golds_are_checked_once(tmp_path, monkeypatch):
    """Golds of other data, or of another grader, taken from the cache. Breaks: no cached() in gradable; no
    version or no text of grade.py in grader_content."""
    monkeypatch.setenv("SEMI_ONLINE_CACHE", "on")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(data, "CACHED_FROM", 0)

    class Verifier:
        timeout_s, strict, calls = 10.0, False, 0

        def unparsable(self, golds):
            self.calls += 1
            return [i for i, gold in enumerate(golds) if gold == "bad"]

    verifier = Verifier()

    def kept(*golds):
        prompts = [Prompt(str(i), "math", [], gold) for i, gold in enumerate(golds)]
        return [prompt.answer for prompt in rewards.gradable(prompts, verifier)], verifier.calls

    assert kept("1", "bad") == kept("1", "bad") == (["1"], 1)
    assert kept("bad", "1") == (["1"], 2)
    monkeypatch.setattr(rewards, "version", lambda package: "another")
    assert kept("1", "bad") == kept("1", "bad") == (["1"], 3)
    source = tmp_path / "grade.py"
    source.write_text("# another grader")
    monkeypatch.setattr(rewards.grade, "__file__", str(source))
    assert kept("1", "bad") == (["1"], 4)
    verifier.strict = True
    assert kept("1", "bad") == (["1"], 5)
