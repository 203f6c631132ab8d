"""transformers' models on fastattn against their own eager attention: logits, gradients, greedy tokens."""

import copy

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    BertConfig,
    BertForMaskedLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from fastattn.integrations.transformers import attention_forward, register  # noqa: E402

register()
VOCAB, LENGTH = 97, 12
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}


def gpt2(**options):
    config = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": VOCAB, "n_positions": 64, **NO_DROPOUT}
    config["tie_word_embeddings"] = False  # tied, its greedy tokens repeat the last one
    return GPT2LMHeadModel(GPT2Config(**{**config, **options}))


NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
MODELS = {
    "gpt2": gpt2,
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=5)),
    "bert": lambda: BertForMaskedLM(
        BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ),
}
CAUSAL = ["gpt2", "llama", "mistral"]


def make(name, **options):
    """A model whose logits differ enough for greedy tokens to mean something."""
    model = MODELS[name](**options)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.15)
    return model.eval()


def tokens(batch=2, length=LENGTH):
    return torch.randint(1, VOCAB, (batch, length))


def padding(side, length=LENGTH):
    """Three tokens of the second sequence are padding."""
    keep = torch.ones(2, length, dtype=torch.long)
    if side == "left":
        keep[1, :3] = 0
    elif side == "right":
        keep[1, -3:] = 0
    elif side == "middle":
        keep[1, 4:7] = 0
    return keep


def run(model, attention, dtype, keep=None, **inputs):
    """Logits of the real tokens, and every parameter's gradient of a loss over them."""
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation(attention)
    model.train()
    logits = model(**inputs, attention_mask=keep).logits
    if keep is not None and keep.dim() == 2:
        logits = logits[keep.bool()]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, -2), torch.arange(logits[..., 0].numel()) % VOCAB
    )
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


def assert_matches_eager(model, keep=None, **inputs):
    found = run(model, "fastattn", torch.float32, keep, **inputs)
    eager = run(model, "eager", torch.float32, keep, **inputs)
    exact = run(model, "sdpa", torch.float64, keep, **inputs)
    assert found.keys() == eager.keys()
    for name, expected in exact.items():
        error, plain = (float((x[name].double() - expected).abs().max()) for x in (found, eager))
        size = max(float(expected.abs().max()), 1)
        assert error <= 2 * plain + 32 * torch.finfo(torch.float32).eps * size, f"{name}: {error} {plain}"


@pytest.mark.parametrize("side", [None, "none", "left", "right", "middle"])
@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward(name, side):
    keep = None if side is None else padding(side)
    assert_matches_eager(make(name), keep, input_ids=tokens())


@pytest.mark.parametrize("name", CAUSAL)
def test_packed_sequences(name):
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    model, ids = make(name), tokens(1)
    assert_matches_eager(model, input_ids=ids, position_ids=position_ids, use_cache=False)
    model.set_attn_implementation("fastattn")
    with torch.no_grad():
        alone = model(input_ids=ids[:, 5:8]).logits
        packed = model(input_ids=ids, position_ids=position_ids, use_cache=False).logits
    assert torch.allclose(packed[:, 5:8], alone, atol=1e-5)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_custom_four_dimensional_mask(name, kind):
    keep = (torch.rand(2, 1, LENGTH, LENGTH) < 0.7) | torch.eye(LENGTH, dtype=torch.bool)
    floating = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    model, ids = make(name), tokens()
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(input_ids=ids, attention_mask=floating).logits
        model.set_attn_implementation("fastattn")
        found = model(input_ids=ids, attention_mask=keep if kind == "bool" else floating).logits
    assert torch.allclose(found, expected, atol=1e-5)


def generate(model, attention, **options):
    model.set_attn_implementation(attention)
    return model.generate(**options, max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None)


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_generation(name, side, cache):
    model = make(name)
    options = {"input_ids": tokens(), "attention_mask": padding(side), "use_cache": cache != "none"}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    expected = generate(model, "eager", **options)
    assert torch.equal(generate(model, "fastattn", **options), expected)
    assert len(set(expected[0, LENGTH:].tolist())) > 2


def test_one_token_into_a_static_cache_that_the_prompt_fills():
    """`generate` makes the mask ahead of the model here, and hands it on as one."""
    model = make("llama")
    options = {
        "input_ids": tokens(),
        "attention_mask": padding("left"),
        "max_new_tokens": 1,
        "pad_token_id": 0,
    }
    options |= {"do_sample": False, "cache_implementation": "static", "disable_compile": True}
    found = []
    for attention in ("eager", "fastattn"):
        model.set_attn_implementation(attention)
        found.append(model.generate(**options))
    assert torch.equal(*found)


@pytest.mark.parametrize("beams", [3])
def test_beam_search(beams):
    model = make("gpt2")
    options = {"input_ids": tokens(), "attention_mask": padding("left"), "num_beams": beams}
    assert torch.equal(generate(model, "fastattn", **options), generate(model, "eager", **options))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", CAUSAL)
def test_prefill_in_chunks(name, side, kind):
    """Several queries continue a cache: the last query sees the last key, not the first the first."""
    model, ids, keep = make(name), tokens(), padding(side)
    position_ids = (keep.cumsum(-1) - 1).clamp(min=0)
    results = []
    for attention in ("eager", "fastattn"):
        model.set_attn_implementation(attention)
        cache = DynamicCache(config=model.config)
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=LENGTH + 4)
        logits = []
        with torch.no_grad():
            for start, stop in ((0, 5), (5, 9), (9, 10), (10, 12)):
                part = slice(start, stop)
                out = model(
                    input_ids=ids[:, part],
                    attention_mask=keep[:, :stop],
                    position_ids=position_ids[:, part],
                    past_key_values=cache,
                )
                logits.append(out.logits)
        results.append(torch.cat(logits, dim=1)[keep.bool()])
    assert torch.allclose(*results, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing(dropout, reentrant):
    """The recomputed forward drops the same elements."""
    model = make("gpt2", attn_pdrop=dropout).train()
    model.set_attn_implementation("fastattn")
    ids, keep = tokens(), padding("right")
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(3)
        out = model(input_ids=ids, attention_mask=keep, labels=ids)
        out.loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_dropout_in_training_alone():
    model = make("gpt2", attn_pdrop=0.5)
    model.set_attn_implementation("fastattn")
    ids = tokens()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)).eval()


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_position_bias_and_cross_attention(side):
    """T5: a learnt bias on the scores, an encoder, a decoder, and attention from one to the other."""
    model = t5()
    ids, keep, target = tokens(), padding(side), tokens(length=7)
    results = []
    for attention in ("eager", "fastattn"):
        model.set_attn_implementation(attention)
        model.zero_grad()
        out = model(input_ids=ids, attention_mask=keep, labels=target)
        out.loss.backward()
        results.append([out.logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for expected, found in zip(*results, strict=True):
        assert torch.allclose(found, expected, atol=1e-5 * max(1, float(expected.abs().max())))
    generated = [generate(model, a, input_ids=ids, attention_mask=keep) for a in ("eager", "fastattn")]
    assert torch.equal(*generated)


@pytest.mark.parametrize("keep", [None, "left"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_compiles_whole(name, keep):
    model = make(name)
    model.set_attn_implementation("fastattn")
    ids, keep = tokens(), None if keep is None else padding(keep)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(input_ids=ids, attention_mask=keep, use_cache=False).logits
        expected = model(input_ids=ids, attention_mask=keep, use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-5)


class Layer(nn.Module):
    is_causal = True


def qkv(q_length=5, k_length=5):
    return torch.randn(1, 4, q_length, 8), torch.randn(1, 2, k_length, 8), torch.randn(1, 2, k_length, 8)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cache": object()}, "cache"),
        ({"output_attentions": True}, "output_attentions"),
        ({"seq_idx": torch.tensor([0, 0, 1, 1, 1])}, "seq_idx"),
        ({"something_new": 1}, "something_new"),
    ],
)
def test_what_would_have_to_be_ignored_is_refused(options, message):
    with pytest.raises(NotImplementedError, match=message):
        attention_forward(Layer(), *qkv(), None, **options)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_documents_that_a_tensor_mask_need_not_hold_are_refused(dtype):
    mask, numbers = torch.ones(1, 1, 5, 5, dtype=dtype), torch.tensor([[0, 0, 1, 1, 1]])
    with pytest.raises(NotImplementedError, match="seq_idx"):
        attention_forward(Layer(), *qkv(), mask, seq_idx=numbers)
    bounds = torch.tensor([0, 2, 5])
    flash = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    found, _ = attention_forward(Layer(), *qkv(), mask, seq_idx=numbers, **flash)
    assert found.shape == (1, 5, 4, 8)


def test_what_does_not_concern_attention_is_not_refused():
    options = {"position_ids": torch.arange(5), "num_items_in_batch": torch.tensor(3), "use_cache": True}
    options |= {
        "softcap": None,
        "output_attentions": False,
        "sliding_window": 5,
        "output_hidden_states": True,
    }
    options |= {
        "cu_seq_lens_q": torch.tensor([0, 5]),
        "cu_seq_lens_k": torch.tensor([0, 5]),
        "max_length_q": 5,
    }
    out, weights = attention_forward(Layer(), *qkv(), None, **options)
    assert out.shape == (1, 5, 4, 8)
    assert out.is_contiguous()
    assert weights is None


def test_a_window_without_a_mask_needs_to_know_where_the_queries_stand():
    with pytest.raises(NotImplementedError, match="sliding_window=3 over 5 keys and 2 queries"):
        attention_forward(Layer(), *qkv(2, 5), None, sliding_window=3)


def test_half_of_the_bounds_of_documents_is_refused():
    with pytest.raises(ValueError, match="expected both or none"):
        attention_forward(Layer(), *qkv(), None, cu_seq_lens_q=torch.tensor([0, 2, 5]))


def test_masks_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"4 dimensions .* got \[1, 5\]"):
        attention_forward(Layer(), *qkv(), torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"torch.int64"):
        attention_forward(Layer(), *qkv(), torch.ones(1, 1, 5, 5, dtype=torch.long))


def test_another_name():
    register("ours")
    model = make("gpt2")
    ids, keep = tokens(), padding("left")
    model.set_attn_implementation("fastattn")
    expected = model(ids, attention_mask=keep).logits
    model.set_attn_implementation("ours")
    assert torch.equal(model(ids, attention_mask=keep).logits, expected)
