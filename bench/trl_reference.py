"""Losses and gradients of one small batch by TRL's own trainers: writes tests/trl_reference.json.

    bench/trl_reference.sh

installs TRL beside the project and runs this file there. Each case is one optimizer step of
DPOTrainer.train() or GRPOTrainer.train(); a callback reads the loss, and the gradient just before the
optimizer would use it. tests/test_trl.py computes the same from our functions, without TRL.

The model's weights are formulas, so the numbers hold for ever: nothing is downloaded, sampled or saved.
"""

import json
import os
import random
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func, which hands TRL our batch, is new

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.hf_argparser import HfArg

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `python bench/trl_reference.py` puts only bench/ there

from run import parse_flags  # noqa: E402

STOP = 0  # the stop token, and padding: a mask made from ids would lose it
SHAPE = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": STOP, "pad_token_id": STOP, "tie_word_embeddings": False,
}  # fmt: skip
ROLES = {"policy": 2, "old": 3, "reference": 4}  # the wave that sets each apart; `old` sampled the responses
DIRECTIONS = range(11, 19)  # the waves that a gradient is projected on

PROMPT_LENGTHS = [3, 5, 4]
RESPONSE_LENGTHS = [[2, 7, 5, 9], [4, 3, 8, 6], [5, 2, 6, 4]]
REWARDS = [[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]

TEMPERATURE = 0.8  # of GRPO; TRL's DPO knows none
MAX_NEW_TOKENS = 12
CLIP = {"epsilon": 0.2, "epsilon_high": 0.3}
CAP = 1.5


@dataclass
class Config:
    out: str = HfArg(default=str(ROOT / "tests" / "trl_reference.json"), help="The file to write.")


# --- What the tests share: the model, and what is kept of a gradient ---


def wave(size, number):
    """(size,) float64 in [-1, 1] that look random, by a formula: no version of a library can change them."""
    i = torch.arange(size, dtype=torch.float64)
    return torch.sin(number * i * i)


def formula_model(role):
    """A Llama of 5,000 float64 weights. Roles differ enough for importance ratios of 0.5 and of 2."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).double()
    size = sum(weights.numel() for weights in model.parameters())
    vector_to_parameters(wave(size, 1) + 0.05 * wave(size, ROLES[role]), model.parameters())
    return model


def flat_gradient(model):
    """(weights,)"""
    return parameters_to_vector([weights.grad for weights in model.parameters()])


def fingerprint(gradient):
    """[the gradient's norm, its products with fixed directions]: a gradient off by a share e of its norm is off
    by about as much in each of them."""
    directions = torch.stack([wave(len(gradient), number) for number in DIRECTIONS])  # (8, weights)
    return [gradient.norm().item(), *(directions @ gradient.double()).tolist()]


# --- The batch, and the cases: our flags beside TRL's arguments ---


def make_batch():
    """3 prompts of 4 responses, of different lengths. Half of them end in the stop token; group 3 has a tie."""
    draw = random.Random(0)

    def ids(length):
        return draw.choices(range(1, SHAPE["vocab_size"]), k=length)

    responses = [[ids(length) for length in group] for group in RESPONSE_LENGTHS]
    for group in responses:
        group[0][-1] = group[2][-1] = STOP
    return {"prompt_ids": [ids(n) for n in PROMPT_LENGTHS], "response_ids": responses, "rewards": REWARDS}


def dpo_cases():
    """{name: (our flags, TRL's arguments, batches of pairs as (prompt, chosen, rejected))}

    A case with several batches is the mean over them: TRL weighs the pairs of a batch alike, and the tokens of
    all its chosen responses (`sft`), where we take the mean over a prompt's pairs and over a response's tokens.
    """
    pairs = [(0, 0, 1), (1, 3, 2)]
    of_prompt = [[(0, c, r) for c, r in product((0, 3), (1, 2))], [(1, c, 2) for c in (0, 1, 3)]]
    sigmoid = {"loss_type": ["sigmoid"], "beta": 0.1}
    return {
        "dpo": ({"beta": 0.1}, sigmoid, [pairs]),
        "dpo, length-normalized": (
            {"beta": 2.0, "length_normalize": True},
            {"loss_type": ["sigmoid_norm"], "beta": 2.0},
            [pairs],
        ),
        "dpo, nll": (
            {"beta": 0.1, "nll_coef": 1.0},
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0], "beta": 0.1},
            [[pair] for pair in pairs],
        ),
        "group dpo": ({"beta": 0.1, "pairing": "all"}, sigmoid, of_prompt),
    }


def grpo_cases():
    """{name: (our flags, TRL's arguments)}"""
    cases = {}
    loss_types = [("token", "dapo"), ("token", "bnpo"), ("sequence", "grpo"), ("constant", "dr_grpo")]
    for (ours, theirs), (scale, scale_rewards), kl in product(
        loss_types, [("none", "none"), ("std", "group")], [0.0, 0.04]
    ):
        cases[f"grpo, {theirs}, {scale}, kl {kl}"] = (
            {"correction": "clip", "normalize": ours, "advantage_scale": scale, "kl_coef": kl},
            {"loss_type": theirs, "scale_rewards": scale_rewards, "beta": kl, **CLIP},
        )
    plain = {"advantage_scale": "none", "kl_coef": 0.0}
    cases["grpo, no correction"] = (
        {"correction": "none", "normalize": "constant", **plain},
        {"loss_type": "dr_grpo", "scale_rewards": "none", **CLIP},
    )
    return cases


# --- TRL ---


def tokenizer():
    """Ids as text, since TRL decodes what it samples: 5 is t5."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(SHAPE["vocab_size"])}
    words = Tokenizer(models.WordLevel(words, unk_token="t1"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"t{STOP}", pad_token=f"t{STOP}")


def run_dpo(batch, pairs, arguments, folder):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt_ids": batch["prompt_ids"][p], "chosen_ids": batch["response_ids"][p][c], "rejected_ids": batch["response_ids"][p][r]} for p, c, r in pairs]
    policy = formula_model("policy")
    trainer = DPOTrainer(
        policy, formula_model("reference"),
        args=DPOConfig(output_dir=folder, per_device_train_batch_size=len(rows), max_steps=1, **arguments, **COMMON),
        train_dataset=Dataset.from_list([{"prompt": "t5", "chosen": "t1", "rejected": "t2"}]), processing_class=tokenizer(),
    )
    trainer.train_dataset = Dataset.from_list(rows)
    return run(trainer)


COMMON = dict(bf16=False, use_cpu=True, gradient_checkpointing=False, max_grad_norm=0.0, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True)

def run(trainer):
    from transformers import TrainerCallback
    seen = {}
    class C(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **_):
            seen["gradient"] = flat_gradient(model).clone()
        def on_step_end(self, args, state, control, model, **_):
            vector_to_parameters(parameters_to_vector(formula_model("policy").parameters()), model.parameters())
        def on_log(self, args, state, control, logs, **_):
            if "loss" in logs: seen["loss"] = logs["loss"]
            print(logs)
    trainer.add_callback(C())
    trainer.train()
    return seen

def run_grpo(batch, arguments, folder, off=True, old=None, vllm=False):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    G = 4
    def rollout(prompts, trainer):
        P = [int(p[1:]) for p in prompts]
        return {"prompt_ids": [batch["prompt_ids"][p] for p in P], "completion_ids": sum(batch["response_ids"], []), "logprobs": old, "reward": sum(batch["rewards"], [])}
    def reward(reward, **_):
        return reward
    policy = formula_model("old" if off else "policy")
    policy.config._name_or_path = folder
    formula_model("reference").save_pretrained(folder)
    trainer = GRPOTrainer(
        policy, reward,
        args=GRPOConfig(output_dir=folder, per_device_train_batch_size=12, num_generations=4, num_iterations=2 if off else 1, max_steps=2 if off else 1, shuffle_dataset=False,
            max_completion_length=MAX_NEW_TOKENS, temperature=TEMPERATURE, **arguments, **COMMON),
        train_dataset=Dataset.from_list([{"prompt": f"t{i}"} for i in range(3)]), processing_class=tokenizer(), rollout_func=rollout,
    )
    if vllm:
        trainer.use_vllm = True; trainer._last_loaded_step = 0
    return run(trainer), trainer

if __name__ == "__main__":
    b = make_batch()
    with tempfile.TemporaryDirectory() as folder:
        for name, (_, a, batches) in dpo_cases().items():
            s = run_dpo(b, batches[0], a, folder)
            print(name, s["loss"], fingerprint(s["gradient"]))
        for name, (_, a) in list(grpo_cases().items())[1:2]:
            s, t = run_grpo(b, a, folder)
            print(name, s["loss"], fingerprint(s["gradient"]))
            print({k: v for k, v in t._metrics["train"].items()})
            print(t._logs["advantages"], t._buffered_inputs)
