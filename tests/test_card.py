"""An export as others use it: its model card, transformers, vLLM."""

import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
import torch
from conftest import make_checkpoint
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import life
import serve
import train_dpo
import train_grpo
from run import Run, write_json

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--data tiny --prompts-per-step 4 --samples-per-prompt 8 --max-new-tokens 16"
SMALL += " --engine transformers --steps 2 --eval-every 2"
ASKED = [{"role": "user", "content": "What is 3 + 4?"}]


def card_of(folder, script=train_dpo, **flags):
    """The card of a run's first export; the run takes one step, and trains nothing."""
    run = Run(script.Config(run_dir=str(folder / "mine"), **flags))
    run.log({"step": 0, "reward": 0.25, "loss": 0.6931471805, "margin": None, "train_s": 9.0})
    run.write_card(1)
    run.close()
    return ModelCard.load(folder / "mine" / "export" / "1" / "README.md")


@pytest.mark.parametrize("script, algorithm", [(train_dpo, "dpo"), (train_grpo, "grpo")])
def test_a_card_says_how_the_model_was_made(script, algorithm, tmp_path):
    """A folder of weights that nobody can trace, or front matter that the Hub refuses. Breaks: `flags` for
    `flags if ... != defaults`; no quote(); the clock's metrics; None as a license."""
    flags = {"data": ["math=tiny:2", "my problems.jsonl"], "lr": 1e-3, "sync_every": 10, "steps": 500}
    card = card_of(tmp_path, script, model="meta-llama/Llama-3.2-1B", **flags)
    assert card.data.to_dict() == {
        "base_model": "meta-llama/Llama-3.2-1B",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [algorithm, "semi-online"],
    }
    (command,) = [line.strip() for line in card.text.splitlines() if line.startswith("    python train")]
    expected = "--model meta-llama/Llama-3.2-1B --data math=tiny:2 'my problems.jsonl'"
    assert command.startswith(f"python {script.__name__}.py {expected} --sync-every 10 ")
    assert "--lr 0.001 " in f"{command} " and command.endswith("--steps 1")
    for part in ("# mine, step 1", "semi-online: ", "license: unknown", "- reward: 0.25\n- loss: 0.693147\n"):
        assert part in card.text
    for part in (f"torch {torch.__version__}", "arXiv:2506.21495", "`my problems.jsonl`", "float32"):
        assert part in card.text
    assert "train_s" not in card.text and "margin" not in card.text and "None" not in card.text


@pytest.mark.parametrize("every, says", [(1, "online"), (float("inf"), "offline")])
def test_a_card_names_the_dial(every, says, tmp_path):
    """An offline model that is called semi-online. Break: swap the two in the template."""
    text = card_of(tmp_path, sync_every=train_dpo.Every(every)).text
    assert f"`--sync-every {'inf' if says == 'offline' else 1}`, {says}: " in text


def test_a_card_keeps_the_license_and_not_the_base_card(tmp_path):
    """A license that is lost, or the base's card under our model. A base is a folder here, the second time
    an export of ours. Breaks: no license_of(); copy the base's README."""
    base = tmp_path / "base"
    base.mkdir()
    front = "license: other\nlicense_name: mine\nlicense_link: https://example.org/l\nmodel-index: nonsense\n"
    (base / "README.md").write_text(f"---\n{front}tags: [theirs]\n---\n# Their card\n")
    card = card_of(tmp_path / "first", model=str(base))
    export = str(tmp_path / "first" / "mine" / "export" / "1")
    again = card_of(tmp_path / "again", model=export)
    for one, model in ((card, str(base)), (again, export)):
        assert (one.data.license, one.data["license_name"]) == ("other", "mine")
        assert one.data["license_link"] == "https://example.org/l" and one.data.tags == ["dpo", "semi-online"]
        assert f"Base model: `{model}`; license: mine" in one.text and "Their card" not in one.content
        assert one.data.base_model is None  # the Hub would refuse the whole upload for such a path


def test_a_base_without_front_matter(tmp_path):
    """A run that ends for a README. Breaks: no YAMLError in license_of; no ValueError."""
    for number, text in enumerate(["# A card\n", "---\nlicense: [a\n---\n", "---\n- a list\n---\n", ""]):
        base = tmp_path / f"base{number}"
        base.mkdir()
        (base / "README.md").write_text(text)
        card = card_of(tmp_path / str(number), model=str(base))
        assert card.data.license is None and "license: unknown" in card.text


def test_a_card_tells_nothing_private(monkeypatch, tmp_path):
    """A home folder, a server's address or a token, published with the model. Breaks: `free` empty;
    sys.argv for the command; os.environ in the template."""
    (tmp_path / "secret_token").write_text("hunter2")
    monkeypatch.setenv("HF_TOKEN", "hf_hunter3")
    monkeypatch.setattr(sys, "argv", ["/home/me/train_dpo.py", "--generator-url", "http://inner:8000"])
    card = card_of(
        tmp_path,
        generator_url=["http://inner:8000"],
        generator_token_file=str(tmp_path / "secret_token"),
        report_to="none",
        data=["/given/problems.jsonl"],
    )
    for private in ("hunter", "inner", "secret_token", str(tmp_path), "/home/", str(ROOT), "--run-dir"):
        assert private not in card.content
    assert "/given/problems.jsonl" in card.text and card.data.base_model is None


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """The export of a real run, with validation."""
    directory = tmp_path_factory.mktemp("exported") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(life, "validate", measure)
        train_dpo.main(f"{SMALL} --run-dir {directory}".split())
    return directory / "export" / "2"


def measure(checkpoint, specs, config):
    """Stand in for a validation, in a process of its own."""
    found = {"model": str(checkpoint), "data": specs[0], "n": 4, "problems": 9, "accuracy": 0.375}
    write_json(checkpoint.parents[1] / "validation" / checkpoint.name / "math-0.json", found)


def test_a_run_writes_cards_with_its_validation(export):
    """Cards that a run does not write, or writes too early. Break: no second write_card() in publish."""
    card = ModelCard.load(export / "README.md")
    assert "On held-out prompts, `" in card.text and "\n- accuracy: 0.375\n" in card.text
    assert str(export) not in card.content and card.data.tags == ["dpo", "semi-online"]


def test_others_may_read_an_export(export):
    """Weights that colleagues, or a container's user, cannot open. Break: no copymode() in export()."""
    modes = {path.name: stat.filemode(path.stat().st_mode) for path in export.iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_transformers_loads_an_export(export, tmp_path):
    """Weights that are missing, a template that is lost, generation that does not stop. Break: no
    tokenizer.save_pretrained in export()."""
    model, told = AutoModelForCausalLM.from_pretrained(export, output_loading_info=True)
    assert not any(told.values()) and model.config.architectures == ["LlamaForCausalLM"]
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :]
    chat = pipeline("text-generation", model=str(export))
    (said,) = chat(ASKED, max_new_tokens=40, do_sample=False)
    assert said["generated_text"][-1]["content"] == tokenizer.decode(out, skip_special_tokens=True)
    half = AutoModelForCausalLM.from_pretrained(export, dtype="bfloat16")  # as the card says
    assert half.dtype == torch.bfloat16


@pytest.mark.slow
def test_vllm_serves_an_export(export):
    """A folder that `vllm serve` refuses, or answers from otherwise. Started as a module: the CPU build of
    vLLM has no `vllm` in its metadata, without which the command ends. Break: no tokenizer in export()."""
    port = serve.free_port()
    words = ["--model", export, "--served-model-name", "mine", "--port", port, "--max-model-len", 256]
    words += ["--dtype", "float32", "--host", "127.0.0.1", "--kv-cache-memory-bytes", 2**28]
    server = subprocess.Popen([sys.executable, "-m", serve.SERVER, *map(str, words)])
    try:
        while not serve.healthy(f"http://127.0.0.1:{port}"):
            assert server.poll() is None
            time.sleep(1)
        body = {"model": "mine", "messages": ASKED, "max_tokens": 40, "temperature": 0}
        said = requests.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60).json()
    finally:
        server.terminate()
        server.wait()
    (ours,) = pipeline("text-generation", model=str(export))(ASKED, max_new_tokens=40, do_sample=False)
    assert said["choices"][0]["message"]["content"] == ours["generated_text"][-1]["content"]


def test_a_tied_export(tmp_path):
    """An embedding that is lost because it is the head. Break: leave it out of export()'s `weights`."""
    path = make_checkpoint(tmp_path / "qwen3", "qwen3")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    (tmp_path / "export").mkdir()
    folder = life.export(model, tokenizer, tmp_path, 1)
    again, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()) and again.lm_head.weight is again.model.embed_tokens.weight
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
