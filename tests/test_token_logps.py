"""Per-token log-probs against the plainest way to compute them."""

from flags import TINY_MODEL

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Lfm2Config, Lfm2ForCausalLM

import model as model_file
from model import checkpoint_activations, choose_attention, load_policy, sharing_pays, token_logps


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def policy(request, checkpoints):
    return AutoModelForCausalLM.from_pretrained(checkpoints[request.param], dtype=torch.float32)


def plain(policy, ids, temperature=1.0):
    """Log-probs and entropies, (B, T) each, by a full log_softmax over all logits and a loop over tokens."""
    logp = (policy(ids).logits / temperature).log_softmax(-1)
    logps, entropies = torch.zeros(ids.shape), torch.zeros(ids.shape)
    for b in range(ids.shape[0]):
        for t in range(1, ids.shape[1]):
            logps[b, t] = logp[b, t - 1, ids[b, t]]
            entropies[b, t] = -(logp[b, t - 1].exp() * logp[b, t - 1]).sum()
    return logps, entropies


def batch():
    torch.manual_seed(1)
    return torch.randint(0, 256, (3, 17))


def gradient(policy, *outputs):
    """Of the outputs under fixed random weights, by all parameters: one vector."""
    policy.zero_grad()
    weights = torch.randn(len(outputs), *outputs[0].shape, generator=torch.Generator().manual_seed(0))
    (torch.stack(outputs) * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def assert_close(ours, theirs):
    assert (ours - theirs).norm() < 1e-4 * theirs.norm() and theirs.norm() > 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_equal_the_plain_way(policy, temperature):
    """The shift by one, done twice or not at all; temperature on the sampler's side only.

    Breaks: predictors from hidden[:, 1:]; drop `/ temperature`; the sign of the entropy's sum.
    """
    ids = batch()
    ours = token_logps(policy, ids, temperature=temperature, with_entropy=True)
    for x, y in zip(ours, plain(policy, ids, temperature), strict=True):
        assert torch.allclose(x, y, atol=1e-4)
    assert torch.equal(token_logps(policy, ids, temperature=temperature), ours[0])


def test_gradients_equal_the_plain_way(policy):
    """A detach on the way back, or an entropy bonus that is computed and pulls on nothing.

    Breaks, in _head_logps: detach hidden, or all_logps where it is gathered, or all_logps.exp();
    `logits - logits.logsumexp(-1, True).detach()` for the log_softmax; @torch.no_grad() above it.
    """
    ids = batch()
    for which in (0, 1):
        ours, theirs = token_logps(policy, ids, None, 0.7, True)[which], plain(policy, ids, 0.7)[which]
        assert_close(gradient(policy, ours), gradient(policy, theirs))


def test_entropies_for_a_metric_alone(policy):
    """A metric that moves the weights, or one that is another number. Break: no set_grad_enabled."""
    ids = batch()
    logps, entropies = token_logps(policy, ids, None, 0.7, True, entropy_grad=False)
    assert logps.requires_grad and not entropies.requires_grad
    both = token_logps(policy, ids, None, 0.7, True)
    assert torch.equal(entropies, both[1]) and both[1].requires_grad
    assert_close(gradient(policy, logps), gradient(policy, both[0]))
    with torch.no_grad():
        assert not token_logps(policy, ids, None, 0.7, True)[1].requires_grad


def test_head_against_finite_differences(monkeypatch):
    """The same in float64, and with a bias, which neither family has.

    Breaks, in _head_logps: detach all_logps.exp(); `logits - logits.logsumexp(-1, True).detach()` for the
    log_softmax; drop the bias.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the head's cast
    torch.manual_seed(0)
    shapes = (4, 3), (6, 3), (6,)  # hidden (N, D), weight (V, D), bias (V,)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def head(hidden, weight, bias):
        return model_file._head_logps(hidden, torch.arange(4), weight, bias, 0.7, True)

    hidden, weight, bias = inputs
    logp = ((hidden @ weight.T + bias) / 0.7).log_softmax(-1)
    logps, entropies = head(*inputs)
    assert torch.allclose(logps, logp.diagonal()) and torch.allclose(entropies, -(logp.exp() * logp).sum(-1))
    assert torch.autograd.gradcheck(head, inputs)


def test_mask_zeroes_the_rest_and_changes_nothing_else(policy):
    """A prompt token that is trained, a masked row that shifts its neighbours, or a mask that is written to.

    Breaks: `wanted` of ones; drop the clone.
    """
    ids, mask = batch(), torch.zeros(3, 17, dtype=torch.bool)
    mask[0, 5:9], mask[1, :], mask[2, 16] = True, True, True
    before = ids.clone(), mask.clone()
    assert torch.allclose(token_logps(policy, ids, mask), plain(policy, ids)[0] * mask, atol=1e-5)
    assert torch.equal(ids, before[0]) and torch.equal(mask, before[1])  # the inputs are as they were


def test_column_zero_is_zero_even_where_the_mask_is_one(policy):
    """Nothing predicts the first token. Break: drop `wanted[:, 0] = False`."""
    assert token_logps(policy, batch(), torch.ones(3, 17))[:, 0].abs().max() == 0


def test_padding_on_the_right_changes_nothing(policy):
    """Padding that is attended to. Break: `is_causal=False` in the call of the decoder."""
    ids = batch()
    padded = torch.cat([ids, torch.full((3, 6), 259)], dim=1)
    mask = torch.cat([torch.ones(3, 17), torch.zeros(3, 6)], dim=1)
    ours, theirs = token_logps(policy, padded, mask)[:, :17], token_logps(policy, ids)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert_close(gradient(policy, ours), gradient(policy, theirs))


def row_by_row(query, key, value, starts, key_starts, longest, key_longest, *, scale, window_size, **grouped):
    """What torch's kernel for GPUs computes, one row at a time: (N, heads, D) each -> (N, heads, D)."""
    assert torch.equal(starts, key_starts) and starts.dtype == torch.int32 and window_size == (-1, 0)
    assert starts[0] == 0 and starts[-1] == len(query) and longest == key_longest >= starts.diff().max()
    rows = []
    for start, end in zip(starts.tolist(), starts[1:].tolist(), strict=False):
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))  # (heads, T, D)
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=True
        )
        rows.append(attended.transpose(0, 1))
    return torch.cat(rows)


def test_packing_changes_nothing(policy, monkeypatch):
    """Rows that see each other, or keep the positions of one long row; a padded position's log-prob.

    Breaks: no position_ids; cu_seq_lens_q of one row; response_mask.argmax(1) for the flipped one's.
    """
    ids, mask = batch(), torch.zeros(3, 17)
    mask[0, 5:9], mask[1, 1:17] = 1, 1  # the third row has no response, as the filler of a rank
    padded = token_logps(policy, ids, mask, 0.7, with_entropy=True)
    expected = gradient(policy, *padded)
    lengths = []
    decoder = policy.get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    monkeypatch.setattr(model_file, "varlen_attn", row_by_row)
    policy.set_attn_implementation("varlen")
    packed = token_logps(policy, ids, mask, 0.7, with_entropy=True)
    found = gradient(policy, *packed)
    policy.set_attn_implementation("sdpa")
    hook.remove()
    assert lengths == [(1, 9 + 17 + 17)]
    for ours, theirs in zip(packed, padded, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    assert_close(found, expected)


def test_a_packed_window():
    """A sliding window that is one token too long, or looks ahead. Break: no `- 1`."""
    asked = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_file, "varlen_attn", lambda q, *_, **settings: asked.update(settings) or q)
        states = torch.zeros(1, 2, 5, 4)
        where = {"cu_seq_lens_q": torch.tensor([0, 5]), "max_length_q": 5}
        hidden, _ = model_file.packed_attention(None, *[states] * 3, None, **where, sliding_window=3)
    assert asked["window_size"] == (2, 0) and hidden.shape == (1, 5, 2, 4)


@pytest.mark.parametrize("rows", [[0, 0, 0, 1, 1], [0, 1, 0, 2, 2]])
def test_a_shared_prompt_changes_nothing(policy, rows):
    """Responses that see each other, or stand at positions of one long row. Breaks: no `part ==`; no
    position_ids; `places` for `column` of what is kept."""
    torch.manual_seed(3)
    prompts = [torch.randint(0, 256, (n,)) for n in (12, 9, 12)]
    ids, mask = torch.zeros(5, 20, dtype=torch.long), torch.zeros(5, 20)
    for row, which in enumerate(rows):
        start = len(prompts[which])
        end = start + 2 + row
        ids[row, :start], ids[row, start:end] = prompts[which], torch.randint(0, 256, (end - start,))
        mask[row, start:end] = 1
    computed = []
    hook = policy.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    together = token_logps(policy, ids, mask, 0.7, with_entropy=True)
    hook.remove()
    shared = {(0, 0, 0, 1, 1): (2, 12 + 2 + 3 + 4), (0, 1, 0, 2, 2): (4, 12 + 5 + 6)}[tuple(rows)]
    assert computed == [shared]
    by_row = [token_logps(policy, ids[b : b + 1], mask[b : b + 1], 0.7, with_entropy=True) for b in range(5)]
    apart = [torch.cat(column) for column in zip(*by_row, strict=True)]
    for ours, theirs in zip(together, apart, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    assert_close(gradient(policy, *together), gradient(policy, *apart))


def test_blocks_of_a_sharded_model(policy):
    """Prompts that several ranks never share, since what sharing saves is counted as nothing. fully_shard
    gives a block a class of its own. Break: compare type(m).__name__ alone."""
    shared, kinds = (8, 120), [type(block) for block in model_file.blocks_of(policy)]
    for block in model_file.blocks_of(policy):
        block.__class__ = type("Sharded", (type(block),), {})
    found = model_file.blocks_of(policy), model_file.sharing_pays(policy, shared, 160, 160)
    for block, kind in zip(found[0], kinds, strict=True):
        block.__class__ = kind
    assert len(found[0]) == policy.config.num_hidden_layers and found[1]


def test_packing_shares_no_prompts(policy, monkeypatch):
    """Groups kept whole, over the limit of a micro-batch, for a kernel that shares nothing. Break: no packs()
    in sharing_pays."""
    assert model_file.sharing_pays(policy, (8, 120), 160, 160)
    monkeypatch.setattr(model_file, "packs", lambda model: True)
    assert not model_file.sharing_pays(policy, (8, 120), 160, 160)


def test_sharing_only_where_it_pays(policy):
    """A mask as large as a response squared, to save a short prompt. Break: always True."""
    assert sharing_pays(policy, (8, 100), 8 * 20 + 80, 240)
    assert not sharing_pays(policy, (8, 2048), 20 + 8 * 2028, 20 + 8 * 2028)


def test_attention_that_is_not_here(monkeypatch):
    """A traceback of torch's after minutes of loading, or a GPU that pads. Breaks: no `if attention ==`; no
    `or` of a default; no look at varlen_attn."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for device, dtype, missing in ((cpu, "bfloat16", "a GPU"), (gpu, "float32", "--dtype bfloat16")):
        with pytest.raises(ValueError, match=f"--attention varlen: needs {missing}"):
            choose_attention("varlen", device, dtype)
        assert choose_attention(None, device, dtype) == "sdpa"
    assert choose_attention(None, gpu, "bfloat16") == choose_attention("varlen", gpu, "bfloat16") == "varlen"
    assert choose_attention("sdpa", gpu, "bfloat16") == "sdpa"
    monkeypatch.setattr(model_file, "varlen_attn", None)
    assert choose_attention(None, gpu, "bfloat16") == "sdpa"


@pytest.mark.parametrize("kind", ["full_attention", "conv"])
def test_layers_that_cannot_be_packed(tmp_path, kind, capsys):
    """A traceback after loading, on a GPU alone: attention without the row's starts. Break: no attends_only()
    in load_policy."""
    sizes = {"vocab_size": 90, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": [kind, "full_attention"]}
    Lfm2ForCausalLM(Lfm2Config(**sizes)).save_pretrained(tmp_path)
    model = load_policy(str(tmp_path), attention="varlen")
    assert model_file.packs(model) == (kind == "full_attention")
    assert ("layers: sdpa, with" in capsys.readouterr().out) == (kind == "conv")


def test_sinks_turn_to_eager(tmp_path, capsys):
    """gpt-oss that ends in its first forward on a GPU, by a flag that nobody gave. Breaks: no `sinks` in
    load_policy; "sdpa" for it, which transformers refuses."""
    sizes = {
        "vocab_size": 90,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "head_dim": 8,
    }
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    GptOssForCausalLM(GptOssConfig(**sizes)).save_pretrained(tmp_path)
    model = load_policy(str(tmp_path), attention="varlen")
    assert model.config._attn_implementation == "eager" and not model_file.packs(model)
    assert "the varlen kernel cannot compute its layers: eager" in capsys.readouterr().out


def test_attention_that_the_packed_kernel_lacks():
    """Sinks left out of a softmax without a word. Break: no assertion in packed_attention."""
    rows = torch.zeros(1, 2, 4, 8)
    with pytest.raises(AssertionError, match="attention needs s_aux: --attention sdpa"):
        starts = torch.tensor([0, 4])
        model_file.packed_attention(
            None, rows, rows, rows, None, cu_seq_lens_q=starts, max_length_q=4, s_aux=torch.zeros(2)
        )


def test_chunks_change_neither_value_nor_gradient(policy, monkeypatch):
    """A chunk lost, doubled or out of order. Break: column[::-1] in the torch.cat."""
    ids = batch()
    whole = token_logps(policy, ids, with_entropy=True)
    monkeypatch.setitem(model_file.LOGITS_AT_ONCE, "cpu", 260 * 5)  # 5 tokens at a time
    cut = token_logps(policy, ids, with_entropy=True)
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(whole, cut, strict=True))
    assert_close(gradient(policy, *cut), gradient(policy, *whole))


def test_logits_are_made_for_response_tokens_only(policy, monkeypatch):
    """The prompt's logits cost as much memory as the response's and are thrown away. Break: mask of ones."""
    rows = []
    head = model_file._head_logps
    monkeypatch.setattr(
        model_file, "_head_logps", lambda hidden, *rest: rows.append(len(hidden)) or head(hidden, *rest)
    )
    mask = torch.zeros(3, 17)
    mask[:, 12:15] = 1
    token_logps(policy, batch(), mask)
    assert sum(rows) == 9


def test_frozen_numbers():
    """An upgrade of a library that changes results without an error. Break: change any digit below."""
    policy = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
    ids = torch.arange(10, 26).reshape(2, 8) * 7
    logps, entropies = token_logps(policy, ids, with_entropy=True)
    assert logps.sum().item() == pytest.approx(-255.2958, rel=1e-4)
    assert entropies.sum().item() == pytest.approx(16.77146, rel=1e-4)


def test_activation_checkpointing_changes_nothing(checkpoints):
    """Gradients of another forward than the one that was made. Break: in model.checkpoint_activations, call
    block.forward on a detached input."""
    plain, again = (AutoModelForCausalLM.from_pretrained(checkpoints["qwen3"]).eval() for _ in range(2))
    checkpoint_activations(again)
    calls = []
    again.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ids = torch.arange(24).view(2, 12)
    losses = [token_logps(model, ids).sum() for model in (plain, again)]
    assert losses[0].item() == losses[1].item() and len(calls) == 1
    for loss in losses:
        loss.backward()
    assert len(calls) == 2  # once in forward, once in backward
    for ours, theirs in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad)
