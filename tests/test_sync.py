"""The copy into a real vLLM engine, its proof, and the ways in which it fails silently elsewhere."""

import pytest
import torch
from conftest import make_checkpoint

import generate
from generate import load_generator
from model import digest, load_policy, token_logps
from serve import Receipt
from sync import CANARY, TOLERANCE, SyncError, canary_gap, full_weights, rehearse, sync

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


def test_a_prefix_cache_that_is_not_reset_is_caught(pair, monkeypatch):
    """Keys and values of the old weights answer for the new ones.

    Break: ignore what reset_prefix_cache returns.
    """
    policy, generator = pair
    monkeypatch.setattr(generator.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(SyncError, match="prefix cache"):
        sync(policy, generator, 6)


@pytest.fixture(scope="module")
def half(checkpoints):
    """As pair, in bfloat16, whose rounding hides much from the canary; synced once."""
    generator = load_generator("vllm", checkpoints["llama"], torch.bfloat16, CPU, max_model_len=128)
    policy = load_policy(checkpoints["llama"], CPU)
    sync(policy, generator, 0)
    return policy, generator


DOWN, Q, K = (
    f"model.layers.1.{name}.weight" for name in ("mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj")
)
FAULTS = {  # what is sent instead of the policy's weights, and what is said of it
    "a bit": (lambda new, old: new | {DOWN: flipped(new[DOWN])}, f"1 arrived as other bytes: {DOWN}"),
    "stale": (lambda new, old: new | {Q: old[Q]}, f"1 arrived as other bytes: {Q}"),
    "dropped": (lambda new, old: without(new, DOWN), f"1 did not arrive: {DOWN}"),
    "dropped, of a fused one": (lambda new, old: without(new, K), f"1 did not arrive: {K}"),
    "swapped": (lambda new, old: new | {Q: new[K], K: new[Q]}, f"2 arrived as other bytes: {K}, {Q}"),
}


def flipped(weight):
    """The lowest bit of one number."""
    changed = weight.clone()
    changed.view(torch.int16)[3, 5] ^= 1
    return changed


def without(weights, name):
    return {n: weight for n, weight in weights.items() if n != name}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_later_copy_is_named(half, monkeypatch, fault):
    """A copy of all weights but one, which no rehearsal sees. Breaks, each alone: drop one of the first two
    faults in copy_and_prove; no multipliers in digest."""
    policy, generator = half
    wrong, said = FAULTS[fault]
    old = dict(full_weights(policy, torch.bfloat16))
    move(policy)
    monkeypatch.setattr("sync.full_weights", lambda p, d: wrong(dict(full_weights(p, d)), old).items())
    with pytest.raises(SyncError, match=f"^sync at step 2: of 21 weights {said}$"):
        sync(policy, generator, 2)


def test_weights_that_arrive_and_are_not_held_are_named(half, monkeypatch):
    """A copy that the engine takes and does not keep, of one weight of a fused three. Break: no comparison
    with the engine's own; or of a fused weight's first part alone."""
    policy, generator = half

    def spoil(model):
        with torch.no_grad():
            model.get_parameter("model.layers.0.self_attn.qkv_proj.weight")[-1, -1] += 1  # of v_proj
        return []

    monkeypatch.setattr("serve.repack_tied_head", spoil)
    with pytest.raises(SyncError, match="1 of the engine's own hold other bytes than arrived: .*qkv_proj"):
        sync(policy, generator, 3)


def test_a_digest_sees_every_bit_and_place():
    """A sum that is the same for other bytes, or another for the same. Breaks: no multipliers; even ones; no
    first_row; no clone of a view."""
    torch.manual_seed(0)
    for shape, dtype in (((5, 7), torch.bfloat16), ((6, 4), torch.float32), ((9,), torch.bfloat16)):
        weight = torch.randn(shape).to(dtype)
        whole = digest(weight).item()
        parts = digest(weight[:2].clone()) + digest(weight[2:].clone(), first_row=2)
        assert digest(weight.clone()).item() == digest(weight[:]).item() == parts.item() == whole
        found = {whole}
        for place in range(weight.numel()):
            for bit in range(8 * weight.element_size() - 1):
                other = weight.clone()
                other.view(-1).view({2: torch.int16, 4: torch.int32}[weight.element_size()])[place] ^= (
                    1 << bit
                )
                found.add(digest(other).item())
        assert len(found) == 1 + weight.numel() * (8 * weight.element_size() - 1)
        assert digest(weight.flip(0)).item() not in found
    large = torch.arange(3 * 2**22 + 1)  # of more words than there are multipliers
    assert digest(large) == digest(large[:5].clone()) + digest(large[5:].clone(), first_row=5)
    odd = torch.randn(9).to(torch.bfloat16)
    assert digest(odd[1:].view(2, 4)) == digest(odd[1:].view(2, 4).clone())


def deaf(weights):
    """Says that all arrived, and keeps none of it."""
    return [Receipt({name: digest(weight).item() for name, weight in weights}, [], [], [])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_engine_that_ignores_copies_is_caught_before_any_step(checkpoints, monkeypatch, dtype):
    """In bfloat16 one step moves the canary less than rounding does, so a dead sync would pass for hundreds.

    Break: drop the rehearsal; or FOLLOWS = 1.1.
    """
    policy = load_policy(checkpoints["llama"], CPU)
    before = [parameter.clone() for parameter in policy.parameters()]
    generator = generate.TransformersGenerator(checkpoints["llama"], dtype, CPU)
    monkeypatch.setattr(generator, "load_weights", deaf)
    with pytest.raises(SyncError, match="rehearsal of the sync at step 0: trainer and generator disagree"):
        sync(policy, generator, 0)
    monkeypatch.undo()
    policy = load_policy(checkpoints["llama"], CPU)
    sync(policy, generator, 0)
    for parameter, original in zip(policy.parameters(), before, strict=True):
        assert torch.equal(parameter, original)  # the rehearsal leaves no trace


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_the_canary_hardly_moves(tmp_path, monkeypatch, dtype):
    """A correct run that is refused, for its model knows nothing: reversed, it gives the canary nearly the
    same log-probs. Break: in sync(), a fixed tolerance for the first copies."""
    path = make_checkpoint(tmp_path, "llama", initializer_range=0.02)
    policy, generator = load_policy(path, CPU), generate.TransformersGenerator(path, dtype, CPU)
    sync(policy, generator, 0)
    assert generator.tolerance < TOLERANCE[torch.bfloat16] / 2
    monkeypatch.setattr(generator, "load_weights", deaf)
    generator.version = None
    with pytest.raises(SyncError, match="rehearsal"):
        sync(policy, generator, 0)


def test_the_rehearsal_is_repeated_where_weights_are_repacked(pair, half, monkeypatch):
    """A packed copy that is refreshed at the first copy alone. Break: no `due`."""
    for policy, generator in (pair, half):
        sync(policy, generator, 0)
    rehearsed = []
    monkeypatch.setattr("sync.rehearse", lambda *args: rehearsed.append(args[2]) or rehearse(*args))
    for policy, generator in (pair, half):
        assert generator.repacks  # float32 matrices; in bfloat16 the head alone
        generator.since_rehearsal = 0
        for step in range(5):
            sync(policy, generator, step, prove_every=2)
    assert rehearsed == [f"rehearsal of the sync at step {step}" for step in (2, 4)] * 2
    monkeypatch.setattr(generator, "repacks", False)
    generator.since_rehearsal = 2
    rehearsed.clear()
    monkeypatch.setattr(generator, "load_weights", deaf)  # it repacks nothing, and holds these weights
    sync(policy, generator, 9, prove_every=2)
    assert rehearsed == []


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
