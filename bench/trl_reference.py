"""Losses and gradients of one small batch by TRL's trainers: writes tests/trl_reference.json.

    bench/trl_reference.sh

installs TRL in a separate environment and runs this file there. Each case is a step of DPOTrainer.train()
or GRPOTrainer.train() on ids that we give it; a callback reads the loss, and the gradient just before the
optimizer uses it. tests/test_trl.py computes the same with our functions, without TRL.

The model's weights are a formula: nothing is downloaded, and the numbers outlive every checkpoint.
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
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # no warning that rollout_func may change

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)
from transformers.hf_argparser import HfArg
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `python bench/trl_reference.py` puts only bench/ there

from flags import OutFile, parse_flags  # noqa: E402

STOP = 0  # the stop token and padding, as in many real models: a mask made from ids would lose it
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
SETTINGS = {"temperature": 0.8, "max_new_tokens": 12}  # of GRPO: TRL's DPO has no temperature

Pair = tuple[int, int, int]  # (prompt, chosen, rejected)


@dataclass
class Config:
    out: OutFile = HfArg(default=str(ROOT / "tests" / "trl_reference.json"), help="The file to write.")


# --- What the tests import: the model, and what is kept of a gradient ---


def wave(size: int, number: int) -> Tensor:
    """(size,) float64 in [-1, 1] that look random, by a formula that no library version changes."""
    i = torch.arange(size, dtype=torch.float64)
    return torch.sin(number * i * i)


def by_name(model: PreTrainedModel) -> list[Tensor]:
    """The model's parameters in an order that no library chooses."""
    return [parameter for _, parameter in sorted(model.named_parameters())]


def set_weights(model: PreTrainedModel, role: str) -> PreTrainedModel:
    """Make a model the policy, the old policy or the reference, which lie near each other. In float64."""
    size = sum(parameter.numel() for parameter in by_name(model))
    vector_to_parameters(wave(size, 1) + 0.02 * wave(size, ROLES[role]), by_name(model))
    return model


def formula_model(role: str) -> PreTrainedModel:
    """A Llama of two layers, in float64: the two sides then agree to 2e-6, and 1e-5 is a safe tolerance."""
    return set_weights(LlamaForCausalLM(LlamaConfig(**SHAPE)), role)


def flat_gradient(model: PreTrainedModel) -> Tensor:
    """All gradients of a model, one after the other: (weights,)."""
    return parameters_to_vector([parameter.grad for parameter in by_name(model)])


def fingerprint(gradient: Tensor) -> list[float]:
    """[norm, products with 8 fixed directions] of a gradient (weights,).

    A gradient that is wrong by 1% of its norm is wrong by about as much in each product.
    """
    directions = torch.stack([wave(len(gradient), number) for number in DIRECTIONS])  # (8, weights)
    return [gradient.norm().item(), *(directions @ gradient).tolist()]


# --- The batch, and the cases: our flags beside TRL's arguments ---


def make_batch() -> dict[str, list]:
    """3 prompts of 4 responses, of different lengths, half of which end in the stop token.

    old_logps: each response token's log-prob under the policy that sampled it, by a full log_softmax.
    """
    draw, model = random.Random(0), formula_model("old")

    def ids(length):
        return draw.choices(range(1, SHAPE["vocab_size"]), k=length)

    prompts = [ids(length) for length in PROMPT_LENGTHS]
    responses = [[ids(length) for length in group] for group in RESPONSE_LENGTHS]
    for group in responses:
        group[0][-1] = group[2][-1] = STOP

    def old_logps(prompt, response):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]  # (length, V)
        logps = (logits / SETTINGS["temperature"]).log_softmax(-1)
        return logps.gather(-1, torch.tensor(response)[:, None]).squeeze(-1).tolist()

    logps = [[old_logps(prompt, r) for r in group] for prompt, group in zip(prompts, responses, strict=True)]
    return {"prompt_ids": prompts, "response_ids": responses, "rewards": REWARDS, "old_logps": logps}


def dpo_cases() -> dict[str, tuple[dict, dict, list[list[Pair]]]]:
    """{name: (our flags, TRL's arguments, batches of pairs (prompt, chosen, rejected))}

    The value of a case is the mean over its batches. TRL's loss of a batch is a mean over pairs, and of `sft`
    over the tokens of all chosen responses; ours are means over prompts, then over a prompt's pairs, and over
    a response's tokens. In a batch of one prompt, or of one pair for `sft`, they are the same.
    """
    one_each = [(0, 0, 1), (1, 3, 2)]
    every = [[(0, right, wrong) for right, wrong in product((0, 3), (1, 2))], [(1, r, 2) for r in (0, 1, 3)]]
    sigmoid, norm = {"loss_type": ["sigmoid"], "beta": 0.1}, {"loss_type": ["sigmoid_norm"], "beta": 2.0}
    with_nll = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0], "beta": 0.1}
    return {
        "dpo": ({"beta": 0.1}, sigmoid, [one_each]),
        "group_dpo": ({"beta": 0.1}, sigmoid, every),
        "length_normalize": ({"beta": 2.0, "length_normalize": True}, norm, [one_each]),
        "nll": ({"beta": 0.1, "nll_coef": 1.0}, with_nll, [[pair] for pair in one_each]),
    }


def grpo_cases() -> dict[str, tuple[dict, dict]]:
    """{name: (our flags, TRL's arguments)}"""
    # TRL's default multiplies the KL term by the importance ratio, gradient included (DeepSeek-V3.2).
    clip = {"epsilon": 0.2, "epsilon_high": 0.3, "use_bias_correction_kl": False}
    ours_clip = {"correction": "clip", "clip_low": 0.2, "clip_high": 0.3}
    plain = {"advantage_scale": "none", "kl_coef": 0.0}
    cases = {}
    for (normalize, loss_type), (scale, theirs), kl_coef in product(
        [("token", "dapo"), ("token", "bnpo"), ("sequence", "grpo"), ("constant", "dr_grpo")],
        [("none", "none"), ("std", "group")],
        [0.0, 0.04],
    ):
        cases[f"{loss_type}-{scale}-{kl_coef}"] = (
            {**ours_clip, "normalize": normalize, "advantage_scale": scale, "kl_coef": kl_coef},
            {**clip, "loss_type": loss_type, "scale_rewards": theirs, "beta": kl_coef},
        )
    cases["no_correction"] = (
        {**ours_clip, **plain, "correction": "none", "normalize": "constant"},
        {**clip, "loss_type": "dr_grpo", "scale_rewards": "none", "num_iterations": 1},
    )
    # CISPO's epsilon_high is the cap itself, not its distance from 1.
    cases["cispo"] = (
        {**plain, "correction": "tis", "tis_cap": 1.5, "normalize": "token"},
        {"loss_type": "cispo", "epsilon_high": 1.5, "scale_rewards": "none"},
    )
    cases["vllm_token_truncate"] = (
        {**plain, "correction": "tis", "tis_cap": 1.5, "normalize": "constant"},
        {
            "loss_type": "dr_grpo",
            "scale_rewards": "none",
            "num_iterations": 1,
            "vllm_importance_sampling_mode": "token_truncate",
            "vllm_importance_sampling_clip_max": 1.5,
        },
    )
    # The two terms of train_dpo.py that are not DPO's; it clips at 0.2 on both sides.
    cases["dpo_terms"] = (
        {"grpo_coef": 1.0, "entropy_coef": 0.05},
        {"loss_type": "luspo", "scale_rewards": "none", "epsilon": 0.2, "entropy_coef": 0.05},
    )
    return cases


# --- TRL: imported inside functions, because the tests read this file without TRL ---


class Watch(TrainerCallback):
    """Keeps the last step's loss and gradient. After a step it sets the policy's weights again."""

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.gradient = flat_gradient(model)

    def on_step_end(self, args, state, control, model, **_):
        set_weights(model, "policy")

    def on_log(self, args, state, control, logs, **_):
        if "loss" in logs:  # the summary at the end has none
            self.loss = logs["loss"]


def common_arguments(folder: str) -> dict[str, Any]:
    """Full precision, no gradient clipping, nothing written outside a temporary folder."""
    return {
        "output_dir": folder, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "max_grad_norm": 0.0,
    }  # fmt: skip


def make_tokenizer() -> PreTrainedTokenizerBase:
    """TRL needs one, and decodes with it. Token 5 is the text 5."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({str(i): i for i in range(SHAPE["vocab_size"])}, unk_token=str(STOP))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), eos_token=str(STOP), pad_token=str(STOP)
    )


def train(trainer: Trainer) -> tuple[float, Tensor]:
    """(loss, gradient) of the trainer's last step."""
    watch = Watch()
    trainer.add_callback(watch)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return watch.loss, watch.gradient


def run_dpo(batch: dict, pairs: list[Pair], arguments: dict, folder: str) -> tuple[float, Tensor]:
    """(loss, gradient) of one step of DPOTrainer on a batch of pairs (prompt, chosen, rejected)."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [
        {
            "prompt_ids": batch["prompt_ids"][prompt],
            "chosen_ids": batch["response_ids"][prompt][chosen],
            "rejected_ids": batch["response_ids"][prompt][rejected],
        }
        for prompt, chosen, rejected in pairs
    ]
    config = DPOConfig(
        per_device_train_batch_size=len(rows), max_steps=1, **arguments, **common_arguments(folder)
    )
    trainer = DPOTrainer(
        formula_model("policy"),
        formula_model("reference"),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "1", "chosen": "2", "rejected": "3"}]),
        processing_class=make_tokenizer(),
    )
    # Ids, not text: TRL ends every response of a text dataset with the stop token, also a truncated one.
    trainer.train_dataset = Dataset.from_list(rows)
    return train(trainer)


def run_grpo(batch: dict, arguments: dict, folder: str) -> tuple[float, Tensor, list[float]]:
    """(loss, gradient, advantages) of the last step of GRPOTrainer on the batch.

    With num_iterations=2, TRL takes two steps on the responses: the first with the weights that sampled them,
    under which it computes its own old log-probs, the second with the policy's.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    responses = sum(batch["response_ids"], [])  # P * G

    def rollout_func(prompts, trainer):
        group = len(responses) // len(batch["prompt_ids"])
        assert prompts == [str(i // group) for i in range(len(responses))], "TRL changed the prompts' order"
        return {
            "prompt_ids": [batch["prompt_ids"][int(prompt)] for prompt in prompts],
            "completion_ids": responses,
            "logprobs": sum(batch["old_logps"], []),
            "reward": sum(batch["rewards"], []),
        }

    def reward_func(reward, **_):
        return reward

    arguments = {"num_iterations": 2, **arguments}
    config = GRPOConfig(
        per_device_train_batch_size=len(responses),
        num_generations=len(batch["response_ids"][0]),
        max_steps=arguments["num_iterations"],
        shuffle_dataset=False,
        max_completion_length=SETTINGS["max_new_tokens"],
        temperature=SETTINGS["temperature"],
        **arguments,
        **common_arguments(folder),
    )
    formula_model("reference").save_pretrained(folder)
    policy = formula_model("old" if config.num_iterations == 2 else "policy")
    policy.config._name_or_path = folder  # where TRL loads its reference from
    trainer = GRPOTrainer(
        policy,
        reward_func,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(len(batch["prompt_ids"]))]),
        processing_class=make_tokenizer(),
        rollout_func=rollout_func,
    )
    if "vllm_importance_sampling_mode" in arguments:
        # Only now, because the constructor would start an engine. The 0 tells TRL to sync no weights.
        trainer.use_vllm, trainer._last_loaded_step = True, 0
    loss, gradient = train(trainer)
    return loss, gradient, list(trainer._logs["advantages"])


def rounded(values: list | float) -> list | float:
    """To 9 significant digits, through lists."""
    return [rounded(v) for v in values] if isinstance(values, list) else float(f"{values:.9g}")


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    disable_progress_bar()  # loading and saving the reference shows one each
    batch = make_batch()
    batch["old_logps"] = rounded(batch["old_logps"])
    record = {
        "made_by": "bench/trl_reference.sh",
        "versions": {name: version(name) for name in ("trl", "torch", "transformers")},
        "settings": SETTINGS,
        "batch": batch,
        "advantages": {},
        "dpo": {},
        "grpo": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, (ours, theirs, batches) in tqdm(dpo_cases().items(), desc="DPO"):
            losses, gradients = zip(*(run_dpo(batch, p, theirs, folder) for p in batches), strict=True)
            loss, gradient = sum(losses) / len(batches), torch.stack(gradients).mean(0)
            record["dpo"][name] = {
                "ours": ours, "trl": theirs, "pairs": sum(batches, []),
                "loss": rounded(loss), "gradient": rounded(fingerprint(gradient)),
            }  # fmt: skip
        for name, (ours, theirs) in tqdm(grpo_cases().items(), desc="GRPO"):
            loss, gradient, advantages = run_grpo(batch, theirs, folder)
            record["grpo"][name] = {
                "ours": ours, "trl": theirs,
                "loss": rounded(loss), "gradient": rounded(fingerprint(gradient)),
            }  # fmt: skip
            if "advantage_scale" in ours:
                record["advantages"][ours["advantage_scale"]] = rounded(advantages)
    text = json.dumps(record).replace("}, ", "},\n")  # lines, so that a diff shows which case has changed
    Path(config.out).write_text(text + "\n", encoding="utf-8")
    print(f"{config.out}: {len(record['dpo']) + len(record['grpo'])} cases by TRL {version('trl')}")


if __name__ == "__main__":
    main()
