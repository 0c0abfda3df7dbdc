"""The copy into a real vLLM engine, its proof, and the ways in which it fails silently elsewhere."""

import pytest
import torch

import generate
from generate import load_generator
from model import load_policy, token_logps
from sync import CANARY, SyncError, canary_gap, full_weights, sync

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def pair(request, checkpoints):
    """A policy and a vLLM engine that started from the same checkpoint."""
    path = checkpoints[request.param]
    generator = load_generator("vllm", path, torch.float32, CPU, max_model_len=128)
    return load_policy(path, CPU), generator


def move(policy):
    """Change every weight, as an optimizer step would."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))


def test_sync_brings_the_weights_and_the_version(pair):
    """A copy that changes nothing, or stamps nothing. Break: return from sync before load_weights."""
    policy, generator = pair
    sync(policy, generator, 0)
    move(policy)
    assert canary_gap(policy, generator) > 1e-2  # the canary sees that the engine is behind
    assert sync(policy, generator, 7) < 1e-5
    assert generator.version == 7


def test_sampled_logps_are_the_policys(pair, prompts):
    """Another distribution behind the stored log-probs (temperature, top-p, stale head).

    Break: temperature=0.9 in one.
    """
    policy, generator = pair
    sync(policy, generator, 0)
    for group in generator.sample(prompts, n=3, temperature=0.8, top_p=1.0, max_tokens=12, seeds=[1, 100]):
        for r in group:
            ids = torch.tensor([r.prompt_ids + r.response_ids])
            ours = token_logps(policy, ids, temperature=0.8)[0, len(r.prompt_ids) :]
            assert torch.allclose(ours, torch.tensor(r.logps), atol=2e-5)


def test_a_tied_head_left_behind_is_caught(pair, monkeypatch):
    """vLLM's CPU engine keeps a packed copy of a tied output head: online training with an old head.

    Break: make canary_gap return 0.
    """
    policy, generator = pair
    monkeypatch.setattr("serve.repack_tied_head", lambda model: [])
    move(policy)
    if policy.config.tie_word_embeddings:
        with pytest.raises(SyncError, match="disagree on the canary by"):
            sync(policy, generator, 3)
    else:
        sync(policy, generator, 3)
    monkeypatch.undo()
    move(policy)
    assert sync(policy, generator, 4) < 1e-5


@pytest.mark.parametrize("dropped", ["mlp.down_proj", "self_attn.k_proj"])
def test_a_dropped_tensor_is_named(pair, monkeypatch, dropped):
    """A weight that is not sent keeps its old value; of a fused one the engine misses nothing by name.

    Break: drop the comparison of what was sent and what there is (k_proj), or of loaded and expected too.
    """
    policy, generator = pair
    name = f"model.layers.1.{dropped}.weight"
    monkeypatch.setattr(
        "sync.full_weights", lambda p, d: ((n, w) for n, w in full_weights(p, d) if n != name)
    )
    with pytest.raises(SyncError, match=name):
        sync(policy, generator, 5)


def test_a_prefix_cache_that_is_not_reset_is_caught(pair, monkeypatch):
    """Keys and values of the old weights answer for the new ones.

    Break: ignore what reset_prefix_cache returns.
    """
    policy, generator = pair
    monkeypatch.setattr(generator.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(SyncError, match="prefix cache"):
        sync(policy, generator, 6)


@pytest.mark.parametrize("stale", ["model.embed_tokens", "model.layers.0.self_attn.q_proj"])
def test_a_stale_tensor_is_caught_by_the_canary(pair, monkeypatch, stale):
    """One tensor sent with its old value. Break: make canary_gap return 0."""
    policy, generator = pair
    sync(policy, generator, 0)
    old = {name: weight.clone() for name, weight in full_weights(policy, torch.float32)}
    move(policy)

    def partly_old(policy, dtype):
        return ((n, old[n] if n == f"{stale}.weight" else w) for n, w in full_weights(policy, dtype))

    monkeypatch.setattr("sync.full_weights", partly_old)
    with pytest.raises(SyncError, match="disagree on the canary"):
        sync(policy, generator, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_engine_that_ignores_copies_is_caught_before_any_step(checkpoints, monkeypatch, dtype):
    """In bfloat16 one step moves the canary less than rounding does, so a dead sync would pass for hundreds.

    Break: drop the rehearsal.
    """
    policy = load_policy(checkpoints["llama"], CPU)
    before = [parameter.clone() for parameter in policy.parameters()]
    generator = generate.TransformersGenerator(checkpoints["llama"], dtype, CPU)
    names = {name for name, _ in policy.named_parameters()}
    monkeypatch.setattr(generator, "load_weights", lambda weights: (dict(weights).keys(), names))
    with pytest.raises(SyncError, match="rehearsal"):
        sync(policy, generator, 0)
    monkeypatch.undo()
    policy = load_policy(checkpoints["llama"], CPU)
    sync(policy, generator, 0)
    for parameter, original in zip(policy.parameters(), before, strict=True):
        assert torch.equal(parameter, original)  # the rehearsal leaves no trace


def test_a_nan_gap_is_a_failure(pair, monkeypatch):
    """NaN compares false with everything, so `gap > tolerance` would let it pass.

    Break: write it that way.
    """
    policy, generator = pair
    monkeypatch.setattr("sync.canary_gap", lambda *_: float("nan"))
    with pytest.raises(SyncError):
        sync(policy, generator, 9)


def test_names_are_each_weight_once(pair):
    """A tied head sent twice. Break: iterate over state_dict()."""
    policy, _ = pair
    names = [name for name, _ in full_weights(policy, torch.float32)]
    assert len(names) == len(set(names)) == len(list(policy.parameters()))
    assert ("lm_head.weight" in names) != policy.config.tie_word_embeddings


def test_canary_fits_a_small_context(pair):
    """A canary longer than the engine's max_model_len stops every run of a short task. Break: 5 * CANARY."""
    assert len(pair[1].tokenizer.encode(CANARY)) < generate.LEAST_MODEL_LEN
