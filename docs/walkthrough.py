# %% [markdown]
# # One training step, with real numbers
#
# This file follows one step of `train_dpo.py` on the embedded tiny model: prompts, answers, rewards, a pair,
# the DPO loss, the optimizer step, and the sync that carries the new weights to the generator. At the end
# GRPO learns from the same answers. You need to know PyTorch, but no reinforcement learning.
#
# Run `.venv/bin/python docs/walkthrough.py` in the repository's root (about a minute on a CPU), or open the
# file as a notebook: VS Code runs its `# %%` cells, and `jupytext --to notebook` converts it. The text quotes
# no measured number: the cells print them, and assert what the text says about them.

# %%
# ruff: noqa: E402
import sys
from pathlib import Path

ROOT = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "train_dpo.py").exists())
sys.path.insert(0, str(ROOT))  # a script in docs/, or a notebook, finds the modules

import math
import random

from flags import TINY_MODEL

import torch

from batch import to_batch
from data import load_prompts
from generate import decode, fit_context, load_generator, request_seed
from model import clip_gradients, copy_weights, digest, load_policy, load_tokenizer, token_logps
from rewards import math_reward
from serve import Receipt
from sync import SyncError, canary_gap, sync
from train_dpo import dpo_loss, pick_pairs
from train_grpo import group_advantages, grpo_loss

ENGINE = "transformers"  # runs everywhere; "vllm", the scripts' default, samples faster and starts slower
ROUNDING = 1e-3  # nats: two correct float32 forwards differ by far less

# %% [markdown]
# ## Three copies of one model
#
# The *policy* is trained. The *reference* is a frozen copy that the DPO loss compares the policy with. The
# *generator* is a third copy, inside an inference engine, and writes the answers. All three start from the
# same checkpoint. Only explicit copies keep them equal.

# %%
prompts = load_prompts("tiny@validation")[:16]  # P = 16
tokenizer = load_tokenizer(TINY_MODEL)
max_new_tokens, max_model_len = fit_context(TINY_MODEL, tokenizer, prompts, 64)
policy, reference, cpu = load_policy(TINY_MODEL), load_policy(TINY_MODEL), torch.device("cpu")
generator = load_generator(ENGINE, TINY_MODEL, torch.float32, cpu, max_model_len)
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, weight_decay=0.0)
print(f"{sum(weight.numel() for weight in policy.parameters()):,} weights in each copy")

# %% [markdown]
# ## Sync
#
# `sync()` copies the policy's weights into the generator, proves that they arrived, and stamps the generator
# with the step. It returns the *canary gap*: the mean difference, in nats per token, between the log-probs
# that policy and generator give to a fixed sentence. vLLM rounds differently from the trainer, so its gap is
# not exactly 0.

# %%
step = 0
gap = sync(policy, generator, step)
copy_weights(policy, reference)  # on mathematics the reference is synced at the same steps
print(f"canary gap {gap:.1e} nats per token; the generator holds version {generator.version}")
assert gap < ROUNDING and generator.version == 0

# %% [markdown]
# ## Sample
#
# The generator writes G answers to each of P prompts. An answer is a `Rollout`: token ids, the log-prob with
# which each was drawn, and the *version*, the step of the weights that drew it. Every prompt has a fixed
# seed, so the same weights write the same answers again.


# %%
def sample(G=8):
    seeds = [request_seed(0, 0, prompt.id) for prompt in prompts]
    return generator.sample(prompts, G, 1.0, 1.0, max_new_tokens, seeds)  # temperature 1, top-p 1


groups = sample()  # [[rollout] * G] * P
print(f"{sum(map(len, groups))} answers of version {groups[0][0].version}")

# %% [markdown]
# ## Score
#
# The reward is 1 if Math-Verify finds the right number in the answer's `\boxed{}`, else 0. (The scripts call
# the same function in worker processes with a time limit.)

# %%
texts = [decode(tokenizer, group) for group in groups]
rewards = torch.tensor([[math_reward(text, prompts[p].answer) for text in texts[p]] for p in range(16)])
print(f"mean reward {rewards.mean():.3f}")  # the metric `reward`

# %% [markdown]
# ## Pair
#
# DPO learns from a right and a wrong answer to the same prompt. A prompt whose answers are all right, or all
# wrong, shows no preference and gives no pair. From here on we follow the first pair alone.

# %%
pairs = pick_pairs(rewards, "random", random.Random(0))  # [(prompt, chosen, rejected), ...]
print(f"{len(pairs)} of {len(prompts)} prompts give a pair")  # the metric `pair_frac`
p, chosen, rejected = pairs[0]
print(f"\n{prompts[p].messages[-1]['content']}\n")
for i, text in enumerate(texts[p]):
    print(f"reward {rewards[p, i]:.0f}  {({chosen: 'chosen', rejected: 'rejected'}).get(i, ''):8}  {text!r}")
assert rewards[p, chosen] == 1 and rewards[p, rejected] == 0

# %% [markdown]
# ## Log-probs
#
# The policy reads both answers and gives each token a log-prob. In the table, the generator's column agrees
# with the policy's up to rounding (the metric `logp_gap`), because both hold the same weights. So does the
# reference's. Most tokens are nearly certain; the answer is decided at a few of them.

# %%
pair = [groups[p][chosen], groups[p][rejected]]
input_ids, mask, sampler_logps = to_batch(pair, cpu)  # (2, T) each; the mask is 1 on response tokens
with torch.no_grad():
    logps = token_logps(policy, input_ids, mask)  # (2, T), 0 outside the responses
    ref_logps = token_logps(reference, input_ids, mask)
start = len(pair[0].prompt_ids)
print(" generator    policy reference  token of the chosen answer")
for t in range(start, len(pair[0].ids)):
    columns = "".join(f"{each[0, t]:10.4f}" for each in (sampler_logps, logps, ref_logps))
    print(f"{columns}  {tokenizer.decode([pair[0].ids[t]])!r}")
logp_gap = (logps - sampler_logps).abs().sum() / mask.sum()
print(f"logp_gap {logp_gap:.1e}")
assert logp_gap < ROUNDING and torch.equal(logps, ref_logps)
assert logps[mask.bool()].median() > math.log(0.9)  # nearly certain

# %% [markdown]
# ## The DPO loss
#
# `dpo_loss` takes the log-prob of each whole answer, the sum over its tokens, under policy and reference. The
# *margin* is how much the policy has gained over the reference on the chosen answer, less the same on the
# rejected one. The loss is `-log sigmoid(beta * margin)`. Policy and reference are equal now, so the margin
# is 0 and the loss is log 2. Its gradient is not 0: it raises the chosen answer and lowers the rejected one.


# %%
def pair_loss():
    """The loss and the margin of this pair under the policy as it is now."""
    ours = token_logps(policy, input_ids, mask).sum(-1)  # (2,)
    refs = token_logps(reference, input_ids, mask).sum(-1).detach()  # (2,)
    loss = dpo_loss(ours[:1], ours[1:], refs[:1], refs[1:], beta=0.1).mean()
    return loss, ((ours - refs)[0] - (ours - refs)[1]).item()


loss, margin = pair_loss()
print(f"margin {margin:.4f}, loss {loss.item():.4f}, log 2 = {math.log(2):.4f}")
assert margin == 0 and math.isclose(loss.item(), math.log(2), rel_tol=1e-6)

# %% [markdown]
# ## Learn
#
# We take three optimizer steps on this pair. (A real step averages over the pairs of all its prompts, and the
# next one has new prompts.) The margin grows and the loss falls below log 2, because the reference does not
# move.


# %%
def learn():
    """One optimizer step; returns the next step's number."""
    loss, margin = pair_loss()
    loss.backward()
    grad_norm = clip_gradients(policy, 1.0)  # the norm before clipping
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}, margin {margin:.4f}, gradient norm {grad_norm:.3f}")
    assert grad_norm > 0
    return step + 1


def chosen_logp():
    """The log-prob of the whole chosen answer under the policy and under the generator."""
    with torch.no_grad():
        ours = token_logps(policy, input_ids[:1], mask[:1]).sum().item()
    return ours, sum(generator.score(pair[0].ids)[0][start - 1 :])


at_sync = chosen_logp()
while step < 3:
    step = learn()
assert pair_loss()[0] < math.log(2)

# %% [markdown]
# ## Staleness
#
# The policy has moved; the generator has not. It writes the same answers as before, with the same log-probs.
# The age of its weights is the metric `staleness`: the step less the version. Only a sync changes the
# generator. Look at the table: the generator's column moves in its last row alone, where it meets the
# policy's.

# %%
stale = sample()
print(f"staleness {step - stale[0][0].version}")
assert stale == groups  # every token, log-prob and version
before, gap = chosen_logp(), canary_gap(policy, generator)
print(f"canary gap before the sync {gap:.1e}, after it {sync(policy, generator, step):.1e}")
after = chosen_logp()
print("    policy generator  log-prob of the chosen answer")
for when, columns in (("at step 0", at_sync), ("before the sync", before), ("after the sync", after)):
    print("".join(f"{logp:10.4f}" for logp in columns) + f"  {when}")
assert before[1] == at_sync[1] and abs(before[1] - before[0]) > ROUNDING
assert abs(after[1] - after[0]) < ROUNDING and sample()[0][0].version == step

# %% [markdown]
# ## The dial
#
# The loop syncs in one line: `if step % sync_every == 0: sync(policy, generator, step)`. That number is the
# only difference between online (1), semi-online (s) and offline training (inf). Offline is the same code
# because `0 % inf` is 0 and `k % inf` is k: the first step syncs, and no later one does.

# %%
for sync_every in (1, 3, math.inf):
    last_sync, staleness = 0, []
    for k in range(8):
        last_sync = k if k % sync_every == 0 else last_sync
        staleness.append(k - last_sync)
    print(f"--sync-every {sync_every}: staleness {staleness}")
    assert max(staleness) == min(sync_every - 1, 7)

# %% [markdown]
# ## The proof
#
# A failed copy raises no error by itself. The generator would keep its old weights, and online training would
# be offline training. So `sync()` ends with proofs. Here are two broken copies. The first engine confirms
# every byte and keeps none of it: the canary fails. The second loses one tensor: the list of names that
# arrived is not whole.

# %%
load_weights = generator.load_weights


def keeps_nothing(weights):
    return [Receipt({name: digest(weight).item() for name, weight in weights}, [], [], [])]


def loses_one(weights):
    return load_weights(list(weights)[:-1])


step = learn()
for broken in (keeps_nothing, loses_one):
    generator.load_weights, caught = broken, None
    try:
        sync(policy, generator, step)
    except SyncError as error:
        caught = error
    print(f"{broken.__name__}: {caught}")
    assert caught
generator.load_weights = load_weights
print(f"repaired: canary gap {sync(policy, generator, step):.1e}")

# %% [markdown]
# ## GRPO on the same answers
#
# GRPO needs no pairs. An answer's *advantage* is its reward less the mean of its group, and each of its
# tokens is pushed by that: up or down. The policy has moved since these answers were written. A token's
# *ratio*, its probability now over that when it was drawn, corrects for the move, and `grpo_loss` clips it:
# no gradient takes a ratio further out of the bounds. Fresh answers have a ratio of 1, and the gradient of
# `-advantage * logp`.

# %%
advantages = group_advantages(rewards[p : p + 1]).flatten()  # (G,)
input_ids, mask, old_logps = to_batch(groups[p], cpu)  # (G, T) each
logps = token_logps(policy, input_ids, mask)
losses = grpo_loss(logps, old_logps, advantages, mask, clip_low=0.2, clip_high=0.2)  # (G, T)
(push,) = torch.autograd.grad(losses.sum(), logps, retain_graph=True)  # (G, T), 0 where clipped
for i in range(len(advantages)):
    ratios, clipped = (logps - old_logps)[i][mask[i].bool()].exp(), (push[i][mask[i].bool()] == 0).sum()
    print(
        f"reward {rewards[p, i]:.0f}, advantage {advantages[i]:6.3f}, "
        f"ratios {ratios.min():.2f} to {ratios.max():.2f}, {clipped} of {len(ratios)} tokens clipped"
    )
losses = grpo_loss(logps, logps.detach(), advantages, mask, clip_low=0.2, clip_high=0.2)  # as if fresh
(push,) = torch.autograd.grad(losses.sum(), logps)
assert torch.allclose(push, -advantages[:, None] * mask) and advantages.sum().abs() < 1e-5
generator.close()

# %% [markdown]
# ## Next
#
# `train_dpo.py` is these cells in a loop, under the same headings: Sync, Sample, Score, Pair, Learn, Record.
# Read it next, then `diff train_dpo.py train_grpo.py`. `docs/exercises.md` has five changes to try.
