"""A run as one HTML file: nothing that a model wrote acts in it, and it shows what the run learned from."""

import inspect
import json
import re
from html.parser import HTMLParser

import pytest
import torch

import train_dpo
from data import Prompt
from tables import page

HOSTILE = '</script><script>alert(1)</script><!-- <script> <img src=x onerror="alert(2)"> \u2028 & \ud83d'
G = 4


def write_run(directory, rewards, texts=None, **flags):
    """A run directory of one step a list in `rewards`, which holds those of the step's kept responses."""
    (directory / "rollouts").mkdir(parents=True)
    flags = {"steps": 9, "sync_every": 2, "seed": 3, "samples_per_prompt": G, **flags}
    (directory / "config.json").write_text(json.dumps({"command": "train", "flags": flags}))
    lines = [json.dumps({"step": step, "reward": 0.5, "step_s": 1.0}) for step in range(len(rewards))]
    (directory / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    for step, kept in enumerate(rewards):
        rows = [
            {
                "task": "math",
                "prompt_id": f"p{i // G}",
                "version": step - step % 2,
                "finish_reason": "stop",
                "reward": reward,
                "prompt": f"prompt {i // G}",
                "response": texts[i] if texts else f"response {i}",
            }
            for i, reward in enumerate(kept)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / "rollouts" / f"{step}.jsonl").write_text(text)
    return directory


class Elements(HTMLParser):
    """The elements of a page, [(tag, attributes)], and the text in its scripts, by id."""

    def __init__(self, text):
        super().__init__()
        self.found, self.scripts, self.open = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.open = dict(attrs).get("id")

    def handle_endtag(self, tag):
        self.open = None

    def handle_data(self, data):
        self.scripts[self.open] = self.scripts.get(self.open, "") + data


def made(directory, *flags):
    """The page of a run, and the JSON in it."""
    page.main([str(directory), *flags])
    text = (directory / "page.html").read_text(encoding="utf-8")
    return text, json.loads(Elements(text).scripts["run"])


def test_what_a_model_wrote_is_text(tmp_path):
    """A response that ends the script and runs one of its own. Break: drop .replace in page.html()."""
    plain, _ = made(write_run(tmp_path / "plain", [[1.0, 0.0, 0.0, 0.0]], pairing="random"))
    run = write_run(tmp_path / "hostile", [[1.0, 0.0, 0.0, 0.0]], [HOSTILE] * G, pairing="random")
    text, content = made(run)
    assert Elements(text).found == Elements(plain).found
    assert content["samples"][0]["groups"][0]["responses"][0]["response"] == HOSTILE
    data = text.partition('id="run">')[2].partition("</script>")[0]
    assert "<" not in data  # <!-- <script> would make the parser skip the script's end


def test_the_script_sets_text_alone_and_loads_nothing():
    """Escaped JSON that the page itself turns into HTML, or a page that asks a server. Break:
    element.innerHTML = text in the template; a script from an address."""
    text = page.TEMPLATE.read_text(encoding="utf-8")
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|DOMParser|srcdoc", text
    )
    assert set(re.findall(r"https?://[\w./]+", text)) == {"http://www.w3.org/2000/svg"}  # a name
    assert not any({"src", "href"} & attributes.keys() for _, attributes in Elements(text).found)
    assert "default-src 'none'" in text and text.count("RUN_AS_JSON") == 1


def test_pairs_are_those_that_the_loss_drew(tmp_path):
    """A page that calls another response chosen. Break: f"pairs/{step}" for the seed."""
    rewards = [[1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0] for _ in range(8)]
    _, content = made(write_run(tmp_path / "run", rewards, pairing="random"))
    assert 'f"pairs/{config.seed}/{step}"' in inspect.getsource(train_dpo.main)  # else change page.py, too
    prompts = [Prompt(f"p{p}", "math", [], None) for p in range(2)]
    for step, sample in enumerate(content["samples"]):
        pairs = train_dpo.pair_up(
            prompts, torch.tensor(rewards[step]).view(2, G), "random", f"pairs/3/{step}"
        )
        shown = [[p, p * G + c, p * G + r] for p, one in enumerate(sample["groups"]) for c, r in one["pairs"]]
        assert shown == [list(pair) for pair in pairs]


def test_a_group_of_which_a_part_was_kept(tmp_path):
    """A pair, or an advantage, computed from half of a group's rewards. Break: leave out the check of
    len(responses). A dropped response, null on disk, is in no pair."""
    kept = [None, 1.0, 0.0, None, 1.0, 0.0]
    _, content = made(write_run(tmp_path / "dpo", [kept], pairing="random"))
    assert [group["pairs"] for group in content["samples"][0]["groups"]] == [[[1, 2]], None]
    _, content = made(write_run(tmp_path / "grpo", [kept], advantage_scale="none"))
    assert [group["advantages"] for group in content["samples"][0]["groups"]] == [[0.0, 0.5, -0.5, 0.0], None]


def test_a_run_that_goes_on(tmp_path):
    """An error from a file that is being written. Break: read_lines for whole_lines."""
    run = write_run(tmp_path / "run", [[1.0] * G] * 3)
    for name in ("metrics.jsonl", "rollouts/1.jsonl"):
        (run / name).write_text((run / name).read_text()[:-5])
    _, content = made(run)
    assert content["steps"] == [0, 1] and [sample["step"] for sample in content["samples"]] == [0, 1]
    assert len(content["samples"][1]["groups"][0]["responses"]) == G - 1


def test_a_long_run_stays_small(tmp_path):
    """A page of hundreds of megabytes, or one without the run's end. Break: steps[:count] in spread."""
    _, content = made(write_run(tmp_path / "run", [[1.0] * G] * 9), "--samples", "3")
    assert [sample["step"] for sample in content["samples"]] == [0, 4, 8]
    assert page.spread([1, 2, 3], 1) == [3] and page.spread([1, 2], 5) == [1, 2]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["{}/nowhere"], "nowhere: not a run directory"),
        (["{}/empty"], "empty: a run without a single step"),
        (["{}/run", "--out", "{}/run"], "is a folder; name a file in it"),
    ],
)
def test_bad_input_is_answered_in_one_line(tmp_path, capfd, words, line):
    """A traceback for a misspelt name. Break: leave out one_line_errors."""
    write_run(tmp_path / "run", [[1.0] * G])
    write_run(tmp_path / "empty", [])
    with pytest.raises(SystemExit) as exit:
        page.main([word.format(tmp_path) for word in words])
    error = capfd.readouterr().err
    assert exit.value.code == 2 and line in error and error.count("\n") == 1
