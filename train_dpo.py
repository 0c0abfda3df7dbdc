"""Train a language model by DPO on its own responses, from offline to online by one flag.

    torchrun train_dpo.py --sync-every 10

Each step samples G responses to each of P prompts, scores them, pairs a right response with a wrong one (in
chat the best with the worst), and takes one optimizer step on the DPO loss. Every `--sync-every` steps the
trained weights are copied into the generator: 1 is online, 10 or 100 semi-online, inf offline. As in the
paper, the reference model is synced at the same steps on mathematics and stays the seed model in chat, unless
`--sync-ref-every` says otherwise.

The defaults train the embedded tiny model on a laptop. The paper's (arXiv 2506.21495, Table 4) are, for
mathematics: --lr 1e-6 --adam-eps 1e-4 --grad-clip 0.1 --prompts-per-step 64 --max-new-tokens 2048, on
Llama-3.1-8B-Instruct.
"""

import math
import random
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from checkpoint import Checkpoints
from data import MixedIterator, load_held_out, load_sources
from evaluate import publish
from generate import check_engine, fit_tasks, load_generator, sample_ahead
from model import (
    TINY_MODEL,
    check_attention,
    checkpoint_activations,
    clip_gradients,
    copy_weights,
    load_policy,
    load_tokenizer,
    shard,
    token_logps,
)
from ranks import init_ranks, largest, mean, same_number, total
from rewards import Scorer
from run import (
    Coefficient,
    Count,
    Every,
    Limits,
    Positive,
    Run,
    Share,
    Stop,
    Stopwatch,
    by_task,
    check_run_dir,
    check_same_run,
    one_line_errors,
    parse_flags,
)
from sync import sync
from train_grpo import group_advantages, grpo_loss, kl_estimate


@dataclass
class Config:
    model: str = HfArg(default=TINY_MODEL, help="A Hugging Face checkpoint: a folder, or a name on the Hub.")
    data: list[str] = HfArg(
        default_factory=lambda: ["tiny"],
        help="Prompts: tiny, a .jsonl, .json or .parquet file, or a Hub name. Several in one run, with their "
        "shares of a step: math=tiny:2 chat=tiny:1.",
    )
    reward_model: str | None = HfArg(
        default=None, help="A checkpoint that scores chat; answers to math are verified, whatever it is."
    )
    run_dir: str = HfArg(default="runs/dpo", help="Where the run is written: new, empty, or --resume.")
    resume: bool = HfArg(default=False, help="Go on with the run in --run-dir from its newest checkpoint.")
    seed: int = HfArg(default=0, help="Seed of the prompts' order, of the samples and of the pairs.")
    steps: Count = HfArg(default=100, help="Optimizer steps.")
    sync_every: Every = HfArg(
        default=Every(1),
        help="The dial: steps between two copies of the policy's weights into the generator; or inf.",
    )
    sync_ref_every: Every | None = HfArg(
        default=None,
        help="Steps between two copies into the reference; inf keeps the seed model. Default, as in the "
        "paper: as --sync-every; where there is chat, inf.",
    )
    prompts_per_step: Count = HfArg(default=32, help="P: prompts in a step, over all ranks.")
    samples_per_prompt: Count = HfArg(default=8, help="G: responses to each prompt.")
    max_new_tokens: Limits = HfArg(
        default=Limits("64"), help="A response is cut after so many tokens; by task: math=2048,chat=1024."
    )
    temperature: Positive = HfArg(default=1.0, help="Of sampling, and of every log-prob in training.")
    pairing: Literal["random", "bestworst", "all"] = HfArg(
        default="random",
        help="For math: a right and a wrong response, drawn; or the highest and the lowest reward; or all "
        "right with all wrong ones (GroupDPO). In chat it is bestworst.",
    )
    beta: Positive = HfArg(
        default=0.1,
        help="DPO's beta: how much a nat of log-prob, relative to the reference, weighs.",
    )
    length_normalize: bool = HfArg(
        default=False,
        help="In the DPO loss, the mean of a response's log-probs, not their sum; wants a larger --beta.",
    )
    nll_coef: Coefficient = HfArg(
        default=0.0, help="Times the chosen responses' negative log-likelihood per token; the paper tries 1."
    )
    entropy_coef: Coefficient = HfArg(
        default=0.0, help="Times the mean next-token entropy, a bonus; the paper tries 1e-4 to 5e-4."
    )
    grpo_coef: Coefficient = HfArg(
        default=0.0, help="Times GRPO's loss of all responses to the paired prompts; the paper: 0.01, 0.001."
    )
    dtype: Literal["float32", "bfloat16"] | None = HfArg(
        default=None,
        help="Of the forwards, here and in the generator; master weights are float32 always. "
        "Default: bfloat16 on a GPU, float32 on a CPU.",
    )
    lr: Positive = HfArg(default=5e-5, help="Learning rate, constant.")
    adam_eps: Positive = HfArg(
        default=1e-8,
        help="Adam's epsilon; a large one (1e-4) is the paper's remedy for instability.",
    )
    grad_clip: Positive = HfArg(default=1.0, help="Largest norm of the gradient.")
    micro_batch_tokens: Count | None = HfArg(
        default=None,
        help="Tokens in one forward and backward, padding included. Default: 16384 on a GPU, 2048 on a CPU.",
    )
    activation_checkpointing: bool = HfArg(
        default=False, help="Compute activations again in backward: less memory, a quarter more arithmetic."
    )
    attention: Literal["sdpa", "flash_attention_2"] = HfArg(
        default="sdpa",
        help="flash_attention_2, on GPUs in bfloat16 where flash-attn is installed, computes no padding.",
    )
    engine: Literal["vllm", "transformers"] = HfArg(
        default="vllm", help="transformers is slow, and for where vLLM does not install."
    )
    engine_memory: Share = HfArg(default=0.4, help="Share of the trainer's GPU that the engine may take.")
    engine_sleep: bool = HfArg(
        default=False, help="Leave that memory to the trainer while nothing is sampled; waking takes time."
    )
    generator_devices: list[str] = HfArg(
        default_factory=list,
        help="Generate on these GPUs of this machine instead, one vLLM server each: 6 7; or cpu.",
    )
    generator_url: list[str] = HfArg(
        default_factory=list, help="Generate on vLLM servers that run already: python serve.py starts one."
    )
    ahead: Count = HfArg(default=10, help="Sample up to so many steps ahead, never past the next sync.")
    save_every: Every = HfArg(
        default=Every("inf"),
        help="Every so many steps, write a checkpoint to resume from, and an export to use; an export at the "
        "end, too.",
    )
    keep: Count = HfArg(
        default=2, help="Checkpoints to keep, the newest. Each is three to five times the float32 weights."
    )
    eval_every: Every = HfArg(
        default=Every("inf"),
        help="Every so many steps, and at the end, export a checkpoint and measure it on held-out prompts; "
        "best/ names the best one.",
    )


# --- The algorithm: pure functions ---


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """DPO's loss of each pair (paper section 3; Rafailov et al. 2023, equation 7). All arguments and the
    result: (B,).

    Arguments are sums of log-probs (nats) over a response's tokens, under the policy and under the reference.
    A policy that equals its reference has a margin of 0 and a loss of log 2 = 0.693.
    """
    chosen_gain = chosen_logps - ref_chosen_logps
    rejected_gain = rejected_logps - ref_rejected_logps
    return -F.logsigmoid(beta * (chosen_gain - rejected_gain))


def pick_pairs(rewards, how="random", rng=None):
    """The pairs to learn from: rewards (P, G) -> [(prompt, chosen, rejected), ...], indices into rewards.

    random: one right response (reward 1) and one wrong (reward 0), drawn at random (the paper, verifiable
    tasks).
    bestworst: the highest reward against the lowest (the paper, reward models).
    all: every right response with every wrong one (GroupDPO).
    A prompt whose responses all have the same reward has nothing to prefer and gives no pair.

    >>> pick_pairs([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0]], how="all")
    [(0, 1, 0), (0, 1, 2)]
    """
    rng, pairs = rng or random.Random(), []
    for prompt, group in enumerate(torch.as_tensor(rewards).tolist()):
        best, worst = max(group), min(group)
        if best == worst:
            continue
        if how == "bestworst":
            pairs.append((prompt, group.index(best), group.index(worst)))
            continue
        if not {*group} <= {0.0, 1.0}:
            raise ValueError(f"--pairing {how} needs rewards of 0 and 1; use bestworst for a scalar reward")
        right = [i for i, reward in enumerate(group) if reward == 1.0]
        wrong = [i for i, reward in enumerate(group) if reward == 0.0]
        every = list(product(right, wrong))
        pairs += [(prompt, *pair) for pair in (every if how == "all" else [rng.choice(every)])]
    return pairs


def locate_pairs(pairs, rows):
    """Where pairs stand in a micro-batch: rows of the chosen, rows of the rejected, and weights, all (N,).

    pairs: the step's [(prompt, chosen, rejected), ...]; rows: the responses in the micro-batch, in the same
    indices. A pair weighs 1 / (pairs of its prompt), so that every prompt counts the same. A response has one
    row however many pairs it is in: GroupDPO runs the model once for each response, not twice for each pair.
    """
    row_of, pairs_of = {index: row for row, index in enumerate(rows)}, Counter(p for p, _, _ in pairs)
    here = [(row_of[c], row_of[r], 1 / pairs_of[p]) for p, c, r in pairs if c in row_of]
    chosen, rejected, weights = ([pair[i] for pair in here] for i in range(3))
    return torch.tensor(chosen).long(), torch.tensor(rejected).long(), torch.tensor(weights)


# --- The batch ---


def to_batch(rollouts, device):
    """Rollouts as right-padded tensors: input_ids (B, T), response_mask (B, T), old_logps (B, T).

    The mask is made from lengths, so a response's own stop token is trained even where padding has the same
    id. No rollouts make a row of padding alone, whose mask is 0.
    """
    rows = max(1, len(rollouts))
    longest = max((len(r.prompt_ids) + len(r.response_ids) for r in rollouts), default=2)
    input_ids = torch.zeros(rows, longest, dtype=torch.long)
    response_mask = torch.zeros(rows, longest)
    old_logps = torch.zeros(rows, longest)
    for row, r in enumerate(rollouts):
        start, end = len(r.prompt_ids), len(r.prompt_ids) + len(r.response_ids)
        input_ids[row, :end] = torch.tensor(r.prompt_ids + r.response_ids)
        response_mask[row, start:end] = 1
        old_logps[row, start:end] = torch.tensor(r.logps)
    return input_ids.to(device), response_mask.to(device), old_logps.to(device)


def micro_batches(groups, rollouts, max_tokens):
    """Split groups of indices into rollouts into batches of at most max_tokens tokens, padding included.

    Yields lists of indices. A group stays whole, and alone if it is over the limit. Groups of like length
    stand together, so that little is padded.
    """

    def longest(group):
        return max(len(rollouts[i].prompt_ids) + len(rollouts[i].response_ids) for i in group)

    batch = []
    for group in sorted(groups, key=longest):
        if batch and (len(batch) + len(group)) * longest(group) > max_tokens:
            yield batch
            batch = []
        batch = batch + group
    if batch:
        yield batch


def main(args=None):
    # --- Set up ---
    config = parse_flags(Config, args)
    with one_line_errors():
        if config.samples_per_prompt < 2:
            raise ValueError("--samples-per-prompt 1: a pair takes at least 2")
        rank, world, device = init_ranks()
        if rank == 0:
            check_run_dir(config)
        config.dtype = config.dtype or ("bfloat16" if device.type == "cuda" else "float32")
        config.micro_batch_tokens = config.micro_batch_tokens or (16384 if device.type == "cuda" else 2048)
        elsewhere = config.generator_devices, config.generator_url
        check_engine(config.engine, config.engine_sleep, *elsewhere)
        check_attention(config.attention, config.dtype)
        tokenizer = load_tokenizer(config.model)
        sources = load_sources(config.data)  # [(prompts of one task, weight)]
        tasks = sorted({prompts[0].task for prompts, _ in sources})
        held_out = load_held_out(config.data, sources) if config.eval_every < math.inf else {}
        every = [prompts for prompts, _ in sources] + list(held_out.values())
        max_model_len = fit_tasks(config.model, tokenizer, every, config.max_new_tokens)
        if config.sync_ref_every is None:
            config.sync_ref_every = config.sync_every if tasks == ["math"] else Every("inf")
        if rank == 0:
            check_same_run(config)
        scorer = Scorer(tasks, config.reward_model, device)
        sources = [(scorer.usable(prompts), weight) for prompts, weight in sources]
        batches = MixedIterator(sources, config.prompts_per_step, config.seed, rank, world)
    dtype = getattr(torch, config.dtype)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    on_device = config.engine_memory, config.engine_sleep
    with one_line_errors():
        generator = load_generator(
            config.engine, config.model, dtype, device, max_model_len, *on_device, *elsewhere
        )
    policy = load_policy(config.model, attention=config.attention)
    if config.activation_checkpointing:
        checkpoint_activations(policy)
    policy = shard(policy, device, dtype)
    # Read again, not copied: several ranks hold the policy in parts by now, so never two whole models.
    reference = load_policy(config.model, attention=config.attention).requires_grad_(False)
    reference = shard(reference, device, dtype)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, eps=config.adam_eps, weight_decay=0.0)
    # What a resumed run goes on with, besides weights. sampled: the coming steps' batches, never past the
    # next sync. counts: over the steps so far.
    start, sampled, counts = 0, deque(), {"tokens": 0, "seconds": 0.0, "skipped": 0, "skipped_in_a_row": 0}
    checkpoints = Checkpoints(config, policy, optimizer, reference, generator, scorer)
    with one_line_errors():
        if config.resume:
            start, sampled, counts = checkpoints.load(batches) or (start, sampled, counts)
        run = Run(config, rank, start)
    stop = Stop()  # at SIGTERM or Ctrl-C, after the step
    if start:  # for which a run that was cut may have had no time
        publish(run, policy, tokenizer, start, held_out, config)

    progress = tqdm(range(start, config.steps), desc="train_dpo", initial=start, total=config.steps)
    for step in progress:
        watch, generated_before = Stopwatch(), generator.busy.seconds()

        # --- Sync: the dial ---
        sync_gap = None
        with watch("sync_s"):
            if step % config.sync_every == 0:  # offline syncs once: 0 % inf is 0, and 1 % inf is 1
                sync_gap = largest([sync(policy, generator, step)])
                checkpoints.note_sync()
            if step % config.sync_ref_every == 0:
                copy_weights(policy, reference)

        # --- Sample: until the next sync the generator is frozen, so its steps can be sampled ahead ---
        with watch("trainer_idle_s"):
            if not sampled or generator.elsewhere:
                until_sync = config.sync_every - step % config.sync_every
                end = step + int(min(config.ahead, until_sync, config.steps - step))
                sampled.extend(sample_ahead(generator, batches, range(step + len(sampled), end), config))
            batch = sampled.popleft().result()  # [(prompt, [rollout] * G)] * P
        rollouts = [rollout for _, group in batch for rollout in group]  # P * G
        (staleness,) = {step - rollout.version for rollout in rollouts}
        assert staleness < config.sync_every, f"step {step}: responses of weights {staleness} steps old"

        # --- Score ---
        with watch("score_s"):
            asked = [prompt for prompt, group in batch for _ in group]  # P * G
            responses = tokenizer.batch_decode([r.response_ids for r in rollouts], skip_special_tokens=True)
            scores = scorer.score(asked, responses)  # P * G
            rewards = torch.tensor(scores).view(len(batch), config.samples_per_prompt)  # (P, G)

        # --- Pair: prompt p's responses are rollouts p * G to p * G + G - 1 ---
        lengths = [len(r.response_ids) for r in rollouts]  # P * G
        G = config.samples_per_prompt
        pairs = []
        for p, (prompt, _) in enumerate(batch):
            rng = random.Random(f"pairs/{config.seed}/{step}/{prompt.id}")  # whatever rank the prompt is on
            how = "bestworst" if prompt.task == "chat" else config.pairing
            picked = pick_pairs(rewards[p : p + 1], how, rng)
            pairs += [(p, p * G + chosen, p * G + rejected) for _, chosen, rejected in picked]
        needed = defaultdict(set)  # prompt: its responses that the loss needs
        for p, chosen, rejected in pairs:
            needed[p] |= set(range(p * G, p * G + G)) if config.grpo_coef else {chosen, rejected}
        groups = [sorted(group) for group in needed.values()]
        advantages = group_advantages(rewards).flatten().to(device)  # (P * G,)

        # --- Learn: one optimizer step on the mean loss over the prompts that have a pair ---
        seen = defaultdict(list)  # what the forwards showed, one number a pair or a token
        loss_shares = torch.zeros(len(rollouts))  # (P * G,), each pair's, at its chosen response
        with watch("train_s"):
            all_groups, all_rows = total([len(groups)]), total(len(group) for group in groups)
            all_tokens = total(lengths[i] for group in groups for i in group)
            # Where rows is [], a forward is made for the other ranks' sake: what is taken by rows is then
            # empty, and adds 0 to sums (a mean would be NaN).
            for rows in same_number(micro_batches(groups, rollouts, config.micro_batch_tokens)):
                input_ids, mask, old_logps = to_batch([rollouts[i] for i in rows], device)  # (B, T) each
                chosen, rejected, weights = (x.to(device) for x in locate_pairs(pairs, rows))  # (N,) each
                n_tokens = mask.sum(-1).clamp(min=1)  # (B,)
                with autocast:
                    logps, entropy = token_logps(
                        policy, input_ids, mask, config.temperature, True, config.entropy_coef > 0
                    )
                    with torch.no_grad():
                        ref_logps = token_logps(reference, input_ids, mask, config.temperature)
                kl = kl_estimate(logps.detach(), ref_logps)  # (B, T), as the three before it; 0 on the prompt
                scale = 1 / n_tokens if config.length_normalize else torch.ones_like(n_tokens)  # (B,)
                ours, refs = logps.sum(-1) * scale, ref_logps.sum(-1) * scale  # (B,), (B,)

                # (N,), (N,) and (B, T)
                dpo = dpo_loss(ours[chosen], ours[rejected], refs[chosen], refs[rejected], config.beta)
                nll = -(logps.sum(-1) / n_tokens)[chosen]
                grpo = grpo_loss(logps, old_logps, advantages[rows], mask, clip_low=0.2, clip_high=0.2)
                pair_losses = weights * (dpo + config.nll_coef * nll)  # (N,)
                loss = (
                    pair_losses.sum() / all_groups
                    - config.entropy_coef * entropy.sum() / all_tokens
                    + config.grpo_coef * grpo.sum() / all_rows
                )
                loss.backward()

                log_ratio = (logps.detach() - old_logps)[mask.bool()]  # one a response token
                seen["kl_ref"] += kl[mask.bool()].tolist()
                seen["logp_gap"] += log_ratio.abs().tolist()
                seen["policy_entropy"] += entropy.detach()[mask.bool()].tolist()
                seen["loss"].append(loss.item())
                rows_of_pairs = torch.tensor(rows, dtype=torch.long)[chosen.cpu()]
                loss_shares.index_add_(0, rows_of_pairs, pair_losses.detach().cpu())
                seen["chosen_logp"] += logps.sum(-1)[chosen].tolist()
                seen["rejected_logp"] += logps.sum(-1)[rejected].tolist()
                seen["margin"] += (ours - refs)[chosen].sub((ours - refs)[rejected]).tolist()
            if all_groups:
                grad_norm = clip_gradients(policy, config.grad_clip)
                finite = math.isfinite(grad_norm)  # on all ranks, or on none
                if finite:
                    optimizer.step()
                optimizer.zero_grad()
                counts["skipped"] += not finite
                counts["skipped_in_a_row"] = 0 if finite else counts["skipped_in_a_row"] + 1

        # --- Record: README defines every key; None where a step has nothing to measure ---
        tokens = int(total(lengths))
        counts["tokens"], counts["seconds"] = counts["tokens"] + tokens, counts["seconds"] + watch.total()
        generated_s = generator.busy.seconds() - generated_before
        has_pair = [min(group) < max(group) for group in rewards.tolist() for _ in group]  # P * G
        verified = [i for i, prompt in enumerate(asked) if prompt.task == "math"]
        metrics = {
            "step": step,
            "loss": total(seen["loss"]) if all_groups else None,
            "reward": mean(scores),
            "staleness": staleness,
            "logp_gap": mean(seen["logp_gap"]) if staleness == 0 else None,
            "logp_gap_max": largest(seen["logp_gap"]) if staleness == 0 else None,
            "sync_gap": sync_gap,
            "pair_frac": mean(has_pair),
            "length": mean(lengths),
            "right_length": mean(lengths[i] for i in verified if scores[i] == 1),
            "wrong_length": mean(lengths[i] for i in verified if scores[i] == 0),
            "truncated_frac": mean(r.finish_reason == "length" for r in rollouts),
            "entropy": -mean(logp for r in rollouts for logp in r.logps),
            "policy_entropy": mean(seen["policy_entropy"]),
            "kl_ref": mean(seen["kl_ref"]),
            "margin": mean(seen["margin"]),
            "chosen_logp": mean(seen["chosen_logp"]),
            "rejected_logp": mean(seen["rejected_logp"]),
            "chosen_length": mean(lengths[chosen] for _, chosen, _ in pairs),
            "rejected_length": mean(lengths[rejected] for _, _, rejected in pairs),
            "grad_norm": grad_norm if all_groups else None,
            "skipped_steps": counts["skipped"],
            **scorer.counts(),  # parse_failures, grader_restarts, reward_truncated
            "graded_per_s": scorer.graded_per_s(),
            "tokens": tokens,
            "tokens_per_s": counts["tokens"] / counts["seconds"],
            **by_task(tasks, asked, scores, has_pair, lengths, loss_shares.tolist()),
            **watch.seconds,  # sync_s, trainer_idle_s, score_s, train_s
            "generate_s": generated_s,
            "generator_idle_s": watch.total() - generated_s,
            "step_s": watch.total(),
        }
        run.log(metrics)
        run.save_rollouts(step, asked, rollouts, responses, scores)
        progress.set_postfix(reward=f"{metrics['reward']:.2f}", staleness=staleness, loss=metrics["loss"])

        if counts["skipped_in_a_row"] >= 3:
            raise FloatingPointError(
                f"step {step}: the third gradient in a row that is not finite; {checkpoints.remedy()}"
            )
        due = (step + 1) % config.save_every == 0
        if due:
            checkpoints.save(step + 1, batches, sampled, counts)
        if not stop.asked():  # else the resumed run does it
            publish(run, policy, tokenizer, step + 1, held_out, config)
        if stop.asked():
            if not due:
                checkpoints.save(step + 1, batches, sampled, counts)
            print(f"train_dpo: stopped after step {step}; the same command with --resume goes on")
            break

    stop.close()
    run.close()
    scorer.close()
    generator.close()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
