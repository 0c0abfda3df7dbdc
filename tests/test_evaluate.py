"""Accuracy and its errors, and a report made from a run."""

import errno
import itertools
import json
import os
import shutil
import statistics

import pytest
from safetensors.torch import load_file, save_file

import evaluate
from model import load_tokenizer
from run import checkpoint_path, read_lines


def test_summary_by_hand():
    """The error over problems instead of runs, or a population deviation. Break: statistics.pstdev.

    Three runs over two problems with accuracies 1, 0.5, 0.5: mean 2/3, deviation 0.288675, error 0.288675 /
    sqrt 3.
    """
    summary = evaluate.summarize([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    assert summary["accuracy"] == pytest.approx(2 / 3)
    assert summary["standard_deviation"] == pytest.approx(statistics.stdev([1, 0.5, 0.5]))
    assert summary["standard_error"] == pytest.approx(1 / 6)
    assert (summary["pass_at_n"], summary["problems"], summary["n"]) == (1.0, 2, 3)


def test_pass_at_k_is_the_mean_over_all_draws_of_k():
    """The biased 1 - (1 - share) ** k. Break: that in it. By hand: all ways to draw k."""
    right, n = [0, 1, 3, 5], 5
    for k in (1, 2, 3, 5):
        draws = [
            [any(i < count for i in drawn) for drawn in itertools.combinations(range(n), k)]
            for count in right
        ]
        expected = statistics.fmean(statistics.fmean(problem) for problem in draws)
        assert evaluate.pass_at_k(right, n, k) == pytest.approx(expected)
    summary = evaluate.summarize([[1.0, 0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0, 0.0]])
    assert summary["right"] == [1, 3] and summary["pass_at_k"].keys() == {"2", "4"}
    assert summary["pass_at_k"]["2"] == pytest.approx(evaluate.pass_at_k([1, 3], 5, 2))


def test_majority_by_hand():
    """The commonest text for the commonest answer, or a vote of those who write no formula.

    Breaks: the whole text as the key; no `if answer`; the last of equals (reversed); the whole box
    (`2 + 3 = 5` apart from `5`); the scores (all right ones in one pot, wrong ones apart). Answers are equal
    as meant: `12 345` and `12345`.
    """
    texts = [
        [r"So \boxed{7}", r"I think $\boxed{8}$", r"It is \boxed{7}."],  # 7 twice, right
        ["nothing", "nothing", r"\boxed{3}"],  # one vote
        [r"\boxed{4}", r"\boxed{5}", "none"],  # a draw: the first
        ["none", "none", "none"],
        [r"\boxed{1}", r"\boxed{12 345}", r"\boxed{12345}"],
        [r"\boxed{6}", r"\boxed{2 + 3 = 5}", r"\boxed{5}"],
        [r"\boxed{2 + 3 = 6}", r"\boxed{6}", r"\boxed{1 + 4}", r"\boxed{5}"],  # a wrong one, twice
        [r"$2$ and $3$, so $5$", r"\[2 + 3 = 5\]", r"\boxed{4}", "5"],  # formulas, as they are graded
    ]
    scores = [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0] * 3, [0.0, 1.0, 1.0]]
    scores += [[0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]]
    assert [evaluate.majority([row], [score]) for row, score in zip(texts, scores, strict=True)] == [
        1, 1, 0, 0, 1, 1, 0, 1,
    ]  # fmt: skip
    assert evaluate.majority(texts, scores) == pytest.approx(5 / 8)


def test_one_sample_has_no_error():
    """A standard error of 0 from one run looks like certainty. Break: return 0.0."""
    assert evaluate.summarize([[1.0], [0.0]])["standard_error"] is None


def test_evaluate_a_checkpoint(tmp_path, capsys, checkpoints):
    """The command as README gives it. Break: give load_generator TINY_MODEL instead of the path."""
    out = tmp_path / "eval.json"
    evaluate.main(
        ["--model", "tiny/llama", "--data", "tiny@validation", "--n", "2", "--limit", "60", "--out", str(out)]
        + ["--greedy", "True"]
    )
    result = json.loads(out.read_text())
    assert len(result["right"]) == 60 and sum(result["right"]) == pytest.approx(120 * result["accuracy"])
    assert 0 < result["greedy_accuracy"] < 0.95 and 0 < result["majority"] < 0.95
    assert (result["problems"], result["n"], result["model"]) == (60, 2, "tiny/llama")
    assert 0 < result["accuracy"] < 0.95 and result["grader_restarts"] == 0
    assert "accuracy" in capsys.readouterr().out

    data = tmp_path / "data.jsonl"
    data.write_text('{"problem": "What is 1 + 1?", "answer": "2"}\n')
    random = evaluate.accuracy(checkpoints["llama"], str(data), n=2, max_new_tokens=8)
    assert random["accuracy"] == 0.0 and random["truncated_frac"] > 0.5  # random weights answer nothing


def test_newest_export_of_a_run(tmp_path):
    """'9' sorts after '10' as text. Break: max over names."""
    for step in ("9", "10", "11.partial"):
        (tmp_path / "export" / step).mkdir(parents=True)
    assert checkpoint_path(tmp_path) == str(tmp_path / "export" / "10")


def other_weights(checkpoint, folder):
    """A checkpoint of the same architecture and tokenizer with other weights, in bfloat16."""
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: w.flip(-1).bfloat16() for name, w in weights.items()}, folder / "model.safetensors")
    return str(folder)


@pytest.fixture
def started(monkeypatch):
    """The paths of the checkpoints that an engine is started with."""
    paths, load_generator = [], evaluate.load_generator

    def counted(engine, path, *rest, **settings):
        paths.append(path)
        return load_generator(engine, path, *rest, **settings)

    monkeypatch.setattr(evaluate, "load_generator", counted)
    return paths


@pytest.mark.parametrize(
    "engine, family", [("transformers", "llama"), pytest.param("vllm", "qwen3", marks=pytest.mark.slow)]
)
def test_checkpoints_that_share_an_engine(engine, family, tmp_path, checkpoints, started, capsys):
    """The second checkpoint's numbers are the first one's, or are computed on the first one's cached keys.

    Breaks: no load_weights in replace_weights; no set_counts in score() (parse_failures add up). qwen3's head
    is tied, and vLLM packs a copy of it.
    """
    first, other = checkpoints[family], other_weights(checkpoints[family], tmp_path / "other")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"problem": "What is 1 + {i}?", "answer": "2"}}\n' for i in range(4)))
    flags = ["--data", str(data), "--n", "2", "--max-new-tokens", "8", "--engine", engine]

    def run(folder, *models):
        files = [
            "--out",
            str(tmp_path / folder / "{}.json"),
            "--answers",
            str(tmp_path / folder / "{}.jsonl"),
        ]
        evaluate.main(["--model", *models, *flags, *files])
        results = [json.loads((tmp_path / folder / file).read_text()) for file in files_of(models, "json")]
        seconds = [result.pop("seconds") for result in results]
        assert min(seconds) > 0
        return results, [read_lines(tmp_path / folder / file) for file in files_of(models, "jsonl")]

    def files_of(models, ending):
        return [f"{model.rpartition('/')[2]}.{ending}" for model in models]

    together = run("together", first, other)
    assert started == [first] and "starting another" not in capsys.readouterr().out
    alone = [run("alone", path) for path in (first, other)]
    assert started == [first, first, other]
    assert together == ([alone[0][0][0], alone[1][0][0]], [alone[0][1][0], alone[1][1][0]])
    assert together[1][0] != together[1][1]


def test_checkpoints_that_cannot_share_an_engine(tmp_path, checkpoints, started, capsys):
    """A model computed with another one's architecture. Break: `if kinds[number] is None` alone."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"problem": "What is 1 + 1?", "answer": "2"}\n')
    flags = ["--data", str(data), "--n", "1", "--max-new-tokens", "2", "--engine", "transformers"]
    evaluate.main(["--model", checkpoints["llama"], checkpoints["qwen3"], *flags])
    assert started == [checkpoints["llama"], checkpoints["qwen3"]]
    assert f"cannot hold {checkpoints['qwen3']}: starting another" in capsys.readouterr().out


def test_what_an_engine_keeps_of_its_first_checkpoint(tmp_path, checkpoints):
    """An engine goes on with the first one's stop tokens, template, or rope; or exports in another dtype need
    engines of their own. Breaks: leave out of engine_kind's list: generation, tokenizer_content, config; or
    let HARMLESS be empty. A checkpoint that lacks a weight would keep the first one's: no `own <=`."""

    def kind(folder):
        return evaluate.engine_kind(str(folder), load_tokenizer(str(folder)), 128)

    def changed(name, file, old, new):
        folder = shutil.copytree(checkpoints["llama"], tmp_path / name)
        text = (folder / file).read_text()
        assert text.count(old) == 1
        (folder / file).write_text(text.replace(old, new))
        return kind(folder)

    same = kind(checkpoints["llama"])
    assert same and same == changed("dtype", "config.json", '"dtype": "float32"', '"dtype": "bfloat16"')
    assert same != changed("stop", "generation_config.json", '"eos_token_id": 256', '"eos_token_id": 257')
    assert same != changed("template", "chat_template.jinja", "<user>", "<user>:")
    assert same != changed("rope", "config.json", '"rope_theta": 10000.0', '"rope_theta": 5000.0')
    folder = shutil.copytree(checkpoints["llama"], tmp_path / "cut")
    weights = load_file(folder / "model.safetensors")
    save_file({name: w for name, w in weights.items() if "norm" not in name}, folder / "model.safetensors")
    assert kind(folder) is None


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("writes, flag", [("write_json", "--out"), ("write_lines", "--answers")])
def test_a_measurement_that_cannot_be_written_is_printed(tmp_path, monkeypatch, capsys, writes, flag):
    """Hours of sampling lost to a disk that is full at the end. Breaks: print_result() after the writing; no
    except OSError."""
    found = {
        "model": "m",
        "data": "d",
        "accuracy": 0.25,
        "n": 1,
        "problems": 4,
        "length": 5,
        "truncated_frac": 0,
    }
    monkeypatch.setattr(evaluate, "prepare", lambda config: None)
    monkeypatch.setattr(evaluate, "measure", lambda *_: iter([(found, [{"id": 1}])]))
    monkeypatch.setattr(evaluate, writes, full_disk)
    with pytest.raises(SystemExit):
        evaluate.main(["--model", "m", flag, str(tmp_path / "file")])
    said = capsys.readouterr()
    assert "m on d: accuracy 25.0 %" in said.out
    assert f"{tmp_path}/file: No space left on device; measured: {json.dumps(found)}\n" in said.err


def test_a_run_whose_eval_folder_cannot_be(tmp_path, monkeypatch):
    """The same, where --out has its default, or a {}. Breaks: no look at eval in prepare(); no why_not() in
    files_of."""
    (tmp_path / "export" / "3").mkdir(parents=True)
    (tmp_path / "eval").touch()
    with pytest.raises(ValueError, match=f"^--model {tmp_path}: its folder eval: is a file; name a"):
        evaluate.prepare(evaluate.Config(model=[str(tmp_path)]))
    with pytest.raises(ValueError, match=f"^--out {tmp_path}/eval/a.json: cannot be written: "):
        evaluate.files_of(evaluate.Config(model=["a", "b"], out=f"{tmp_path}/eval/{{}}.json"), "out")


def test_each_model_has_a_file(tmp_path):
    """Results of one model that overwrite another's. Break: no count in files_of."""

    def files(out, *models):
        return evaluate.files_of(evaluate.Config(model=list(models), out=out), "out")

    assert [str(path) for path in files("e/{}.json", "a/10", "a/20/")] == ["e/10.json", "e/20.json"]
    for out, models in (("e.json", ("a", "b")), ("{}.json", ("a/10", "b/10"))):
        with pytest.raises(ValueError, match=r"several models would write .*\{\} where"):
            files(out, *models)


def test_answers_for_a_judge_do_not_replace_a_measurement(tmp_path, monkeypatch):
    """A reward that took an hour, overwritten by a summary without one. Break: no look
    at accuracy and reward in main()."""
    (tmp_path / "export" / "3").mkdir(parents=True)
    found = {"model": str(tmp_path / "export" / "3"), "data": "d", "n": 1, "problems": 4, "length": 5}
    found["truncated_frac"] = 0
    monkeypatch.setattr(evaluate, "prepare", lambda config: None)
    for more in ({"reward": 0.5}, {}):
        result = (found | more, [{"id": 1}])
        monkeypatch.setattr(evaluate, "measure", lambda *_, result=result: iter([result]))
        flags = ["--data", "chat=tiny@test", "--answers", str(tmp_path / "a.jsonl")]
        evaluate.main(["--model", str(tmp_path), *flags])
        kept = json.loads((tmp_path / "eval" / "3.chat.json").read_text())
        assert kept["reward"] == 0.5


def test_another_measurement_is_not_overwritten(tmp_path):
    """An hour's accuracy on MATH, replaced by one on another set under the same name. Breaks: no
    check_earlier(); no look at --answers beside --out."""
    shutil.copytree("tiny/llama", tmp_path / "run" / "export" / "3")
    kept = tmp_path / "run" / "eval" / "3.json"
    kept.parent.mkdir()
    kept.write_text(
        json.dumps({"data": "tiny@test", "problems": 2, "n": 50, "temperature": 0.6, "top_p": 0.9})
    )
    model, cases = (
        [str(tmp_path / "run")],
        (
            ({"n": 2}, "--n: 2 now, 50 in "),
            ({"data": "tiny"}, "--data: tiny now, tiny@test in "),
            ({"limit": 3}, "--limit: 3 now, 2 in "),
        ),
    )
    for changed, says in cases:
        with pytest.raises(ValueError, match=f"^{says}{kept}; name another file with --out"):
            evaluate.prepare(evaluate.Config(model=model, **{"limit": 2, **changed}))
    for free in ({}, {"n": 2, "out": str(tmp_path / "a.json")}):
        evaluate.prepare(evaluate.Config(model=model, limit=2, **free))[2].close()
    with pytest.raises(ValueError, match="^--answers .*a.json: is also --out; name two files"):
        evaluate.prepare(
            evaluate.Config(model=model, limit=2, **{k: str(tmp_path / "a.json") for k in ("out", "answers")})
        )


def test_the_system_block_is_that_of_the_run(tmp_path):
    """A model that answers other prompts than it was trained on. Breaks: True in rendering(); the
    run's, whatever --system-block says."""
    run = tmp_path / "run"
    shutil.copytree("tiny/llama", run / "export" / "3")
    (run / "metrics.jsonl").touch()
    (run / "config.json").write_text(json.dumps({"flags": {"system_block": False}}))
    for flag, models, expected in (
        (None, [str(run), "tiny/llama"], [False, True]),
        (True, [str(run)], [True]),
        (False, ["tiny/llama"], [False]),
    ):
        config = evaluate.Config(model=models, limit=2, system_block=flag)
        prepared, _, scorer = evaluate.prepare(config)
        scorer.close()
        assert [tokenizer.system_block for _, tokenizer, *_ in prepared] == expected
