"""An export is the seed model with other weights: what else the checkpoint held stays as it was."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import life
import train_dpo
from model import load_policy, load_tokenizer, stop_ids
from run import read_config
from tests.bad_inputs import SMALL

TINY = Path(__file__).parents[1] / "tiny" / "llama"


def with_generation(folder, text):
    """The tiny model with this text in generation_config.json; None is no file."""
    shutil.copytree(TINY, folder)
    (folder / "generation_config.json").unlink()
    if text is not None:
        (folder / "generation_config.json").write_text(text)
    return str(folder)


@pytest.mark.parametrize(
    "text",
    [
        '{"eos_token_id": [3, 7], "temperature": 0.6, "top_p": 0.9}',  # Llama 3's, but for do_sample
        '{"eos_token_id": 3,\n "top_k": 20, "repetition_penalty": 1.05, "a field of later releases": null}\n',
        '{"eos_token_id": 3, "num_return_sequences": 3}',  # transformers does not even load it
        '{"eos_token_id": 3, "num_beams": 1, "early_stopping": true, "max_new_tokens": -1}',
        None,
    ],
)
def test_metadata_that_transformers_refuses_to_save(tmp_path, text):
    """The first export of a run raises, and so does every resume at the same place. Breaks: no
    generation_config= in load_policy; leave transformers' file; text or "{}"."""
    seed = with_generation(tmp_path / "seed", text)
    policy, tokenizer = load_policy(seed), load_tokenizer(seed)
    path = life.export(policy, tokenizer, tmp_path / "run", 1)
    kept = path / "generation_config.json"
    assert (kept.read_text() if kept.exists() else None) == text
    assert stop_ids(path, tokenizer) == stop_ids(seed, tokenizer) == ([3, 7] if text and "[" in text else [3])
    again, weights = life.export(load_policy(path), tokenizer, tmp_path / "again", 1), "model.safetensors"
    assert (again / weights).read_bytes() == (path / weights).read_bytes()


def handlers():
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


def test_a_run_with_such_metadata_is_resumed_to_its_end(tmp_path, capsys):
    """As above, through the whole command; and a run that has all its steps says nothing when it is resumed.
    Breaks: as above; no line in Life.__init__."""
    seed, before = with_generation(tmp_path / "seed", '{"eos_token_id": 3, "temperature": 0.6}'), handlers()
    small = f"{SMALL} --prompts-per-step 2 --samples-per-prompt 2 --save-every 1"
    command = f"{small} --model {seed} --run-dir {tmp_path / 'run'}".split()
    train_dpo.main([*command, "--steps", "1"])
    train_dpo.main([*command, "--steps", "2", "--resume"])
    assert "has its" not in capsys.readouterr().out
    train_dpo.main([*command, "--steps", "2", "--resume"])
    assert f"the run in {tmp_path / 'run'} has its 2 steps; --steps 4" in capsys.readouterr().out
    for step in "12":
        exported = tmp_path / "run" / "export" / step / "generation_config.json"
        assert json.loads(exported.read_text()) == {"eos_token_id": 3, "temperature": 0.6}
    assert len(read_config(tmp_path / "run")["starts"]) == 3
    assert handlers() == before


def test_an_error_before_the_loop_leaves_the_signals_alone(tmp_path, monkeypatch):
    """A notebook whose Ctrl-C is gone since a run that did not begin. Break: Stop() in Life.__init__."""
    before = handlers()
    monkeypatch.setattr(life.Life, "note_sync", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_dpo.main(f"{SMALL} --run-dir {tmp_path / 'run'}".split())
    monkeypatch.setattr("life.Window", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_dpo.main(f"{SMALL} --run-dir {tmp_path / 'other'}".split())
    assert handlers() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, value):
    """A broken or diverged checkpoint that is trained for a day. Break: no check_finite in load_policy."""
    folder = with_generation(tmp_path / "seed", None)
    weights = load_file(f"{folder}/model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"1 weights hold NaN .* model.layers.1.mlp.up_proj.weight$"
    ) as error:
        load_policy(folder)
    assert str(error.value).startswith(f"--model {folder}: ")


def test_weights_that_are_in_no_file(tmp_path):
    """Random numbers for weights that are missing, of which transformers only warns; a shape that is another
    config's. Breaks: no look at missing_keys; no one_line() in load_policy."""
    folder = with_generation(tmp_path / "seed", None)
    weights = load_file(f"{folder}/model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.1.mlp" not in name}
    save_file(kept, f"{folder}/model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=f"^--model {folder}: 3 weights are in no file, the first is model.la"
    ):
        load_policy(folder)
    weights["lm_head.weight"] = torch.zeros(9, 128)
    save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"^--model {folder}: RuntimeError: "):
        load_policy(folder)
