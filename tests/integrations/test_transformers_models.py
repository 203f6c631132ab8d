"""Models with windows, soft caps, sinks, chunks and packed documents against their own eager attention."""

import contextlib
import copy
import itertools

import pytest
import torch
from torch import nn

import fastattn

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    masking_utils,
)

from fastattn.integrations.transformers import (  # noqa: E402
    CompactMask,
    attention_forward,
    attention_mask,
    explain,
    explain_model,
    register,
)

register()
VOCAB, LENGTH = 97, 13
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HYBRID = {**SIZES, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**HYBRID, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**HYBRID, query_pre_attn_scalar=8)),
    # Its batched experts read memory they have not written, which poisoned memory shows.
    "gpt-oss": lambda: GptOssForCausalLM._from_config(
        GptOssConfig(**HYBRID, num_local_experts=2, num_experts_per_tok=1), experts_implementation="eager"
    ),
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            **SIZES,
            intermediate_size_mlp=48,
            num_local_experts=2,
            attention_chunk_size=5,
            layer_types=["chunked_attention", "full_attention"],
        )
    ),
}


def make(name):
    """A model whose attention is not flat: weights, and sinks, of a size that tells."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 2 or "sinks" in parameter_name:
            nn.init.normal_(parameter, std=0.15 if parameter.dim() == 2 else 1.0)
    return model.eval()


def tokens(batch=2, length=LENGTH):
    return torch.randint(3, VOCAB, (batch, length))


def padding(side, length=LENGTH):
    keep = torch.ones(2, length, dtype=torch.long)
    if side == "left":
        keep[1, :3] = 0
    elif side == "right":
        keep[1, -3:] = 0
    return keep


def run(model, attention, dtype, keep=None, **inputs):
    """Logits of the real tokens, and every parameter's gradient of a loss over them."""
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation(attention)
    logits = model(**inputs, attention_mask=keep, use_cache=False).logits
    logits = logits if keep is None else logits[keep.bool()]
    loss = nn.functional.cross_entropy(logits.flatten(0, -2), torch.arange(logits[..., 0].numel()) % VOCAB)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


@contextlib.contextmanager
def float32_masks():
    """In float64 eager adds float64's least number to a score: -inf, and NaN in a row of nothing else."""

    def mask(**options):
        return masking_utils.eager_mask(**{**options, "dtype": torch.float32})

    masking_utils.AttentionMaskInterface.register("eager", mask)
    try:
        yield
    finally:
        masking_utils.AttentionMaskInterface.register("eager", masking_utils.eager_mask)


def assert_matches_eager(model, keep=None, **inputs):
    found = run(model, "fastattn", torch.float32, keep, **inputs)
    eager = run(model, "eager", torch.float32, keep, **inputs)
    with float32_masks():
        exact = run(model, "eager", torch.float64, keep, **inputs)
    assert found.keys() == eager.keys()
    for name, expected in exact.items():
        error, plain = (float((x[name].double() - expected).abs().max()) for x in (found, eager))
        size = max(float(expected.abs().max()), 1)
        assert error <= 2 * plain + 32 * torch.finfo(torch.float32).eps * size, f"{name}: {error} {plain}"


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward(name, side):
    keep = None if side is None else padding(side)
    assert_matches_eager(make(name), keep, input_ids=tokens())


@pytest.mark.parametrize("name", MODELS)
def test_packed_by_position_ids(name):
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 0, 1, 2, 3]])
    model, ids = make(name), tokens(1)
    assert_matches_eager(model, input_ids=ids, position_ids=position_ids)
    model.set_attn_implementation("fastattn")
    with torch.no_grad():
        alone = model(input_ids=ids[:, :7], use_cache=False).logits
        packed = model(input_ids=ids, position_ids=position_ids, use_cache=False).logits
    # Before 5.21 transformers counts chunks from the first token of all, not from each document's.
    if name != "llama4":
        assert torch.allclose(packed[:, :7], alone, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt-oss"])
@pytest.mark.parametrize("with_positions", [False, True])
def test_packed_by_cu_seq_lens(name, with_positions):
    """As `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` has it."""
    bounds = [0, 7, 9, 13]
    cu = torch.tensor(bounds, dtype=torch.int32)
    flash = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 7, "max_length_k": 7}
    if with_positions:
        flash["position_ids"] = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 0, 1, 2, 3]])
    model, ids = make(name), tokens(1)
    model.set_attn_implementation("fastattn")
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False, **flash).logits
        parts = [ids[:, a:b] for a, b in itertools.pairwise(bounds)]
        alone = [model(input_ids=part, use_cache=False).logits for part in parts]
    assert torch.allclose(found, torch.cat(alone, dim=1), atol=1e-4)


class Layer(nn.Module):
    is_causal = True


def qkv(q_length=LENGTH, k_length=LENGTH):
    return torch.randn(1, 4, q_length, 8), torch.randn(1, 2, k_length, 8), torch.randn(1, 2, k_length, 8)


def test_cu_seq_lens_alone_keep_documents_apart():
    q, k, v = qkv()
    bounds = torch.tensor([0, 7, 9, 13], dtype=torch.int32)
    flash = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    found, _ = attention_forward(Layer(), q, k, v, None, **flash)
    parts = [(0, 7), (7, 9), (9, 13)]
    alone = [attention_forward(Layer(), *(x[:, :, a:b] for x in (q, k, v)), None)[0] for a, b in parts]
    assert torch.allclose(found, torch.cat(alone, dim=1), atol=1e-6)
    window, _ = attention_forward(Layer(), q, k, v, None, sliding_window=3, **flash)
    mask = fastattn.documents(bounds) & fastattn.sliding_window(2, 0)
    assert torch.allclose(window, fastattn.attention(q, k, v, mask=mask).transpose(1, 2), atol=1e-6)


def test_one_document_shorter_than_the_sequence_is_not_dropped():
    q, k, v = qkv()
    bounds = torch.tensor([0, 7], dtype=torch.int32)
    found, _ = attention_forward(Layer(), q, k, v, None, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
    alone, _ = attention_forward(Layer(), *(x[:, :, :7] for x in (q, k, v)), None)
    assert torch.allclose(found[:, :7], alone, atol=1e-6)
    assert (found[:, 7:] == 0).all()
    bidirectional, _ = attention_forward(
        Layer(), q, k, v, None, is_causal=False, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds
    )
    alone, _ = attention_forward(Layer(), *(x[:, :, :7] for x in (q, k, v)), None, is_causal=False)
    assert torch.allclose(bidirectional[:, :7], alone, atol=1e-6)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation(name, side, cache):
    model = make(name)
    options = {
        "input_ids": tokens(),
        "attention_mask": padding(side),
        "max_new_tokens": 7,
        "do_sample": False,
    }
    options |= {"eos_token_id": None, "pad_token_id": 0}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    results = []
    for attention in ("eager", "fastattn"):
        model.set_attn_implementation(attention)
        results.append(model.generate(**options))
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt-oss"])
def test_prefill_in_chunks(name, side, kind):
    """Of a hybrid cache, whose sliding layers drop their first keys."""
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
            for start, stop in ((0, 4), (4, 7), (7, 8), (8, 11), (11, 12), (12, 13)):
                out = model(
                    input_ids=ids[:, start:stop],
                    attention_mask=keep[:, :stop],
                    position_ids=position_ids[:, start:stop],
                    past_key_values=cache,
                )
                logits.append(out.logits)
        results.append(torch.cat(logits, dim=1)[keep.bool()])
    assert torch.allclose(*results, atol=1e-5)


def masks_of(model, **inputs):
    """What each layer's attention was given as its mask."""
    seen = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        return attention_forward(module, query, key, value, attention_mask, **kwargs)

    transformers.AttentionInterface.register("spied", spy)
    transformers.AttentionMaskInterface.register("spied", attention_mask)
    model.set_attn_implementation("spied")
    with torch.no_grad():
        model(**inputs)
    return seen


def largest(mask):
    return max((x.numel() for clause in mask.mask.clauses for c in clause for x in c.tensors()), default=0)


@pytest.mark.parametrize("case", ["padded", "packed", "whole", "static cache"])
@pytest.mark.parametrize("name", MODELS)
def test_no_layer_is_given_a_square(name, case):
    model = make(name)
    inputs = {"input_ids": tokens()}
    if case == "padded":
        inputs["attention_mask"] = padding("left")
    elif case == "packed":
        inputs |= {
            "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 0, 1, 2, 3]] * 2),
            "use_cache": False,
        }
        if name == "llama4" and not hasattr(masking_utils, "remap_positions_for_packed_sequence"):
            pytest.skip("this transformers counts chunks from elsewhere than the document")
    elif case == "static cache":
        inputs["past_key_values"] = StaticCache(config=model.config, max_cache_len=LENGTH + 4)
    masks = masks_of(model, **inputs)
    assert len(masks) == 2
    for mask in masks:
        assert mask is None or isinstance(mask, CompactMask)
        assert mask is None or largest(mask) <= 2 * (LENGTH + 4)
    if case != "whole":
        assert isinstance(masks[0], CompactMask)


@pytest.mark.parametrize(
    "name, case",
    [("mistral", "causal"), ("mistral", "padded"), ("mistral", "positions"), ("gemma2", "positions")],
)
def test_compiles_whole(name, case):
    model = make(name)
    model.set_attn_implementation("fastattn")
    inputs = {"input_ids": tokens(), "use_cache": False}
    if case == "padded":
        inputs["attention_mask"] = padding("left")
    elif case == "positions":
        inputs["position_ids"] = torch.arange(LENGTH)[None]
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5)


def test_t5_from_a_position_bias_of_its_own():
    """The bias of T5 is one tensor [1, H, L, L] of the model's; what pads it is a mask of B × L beside it."""
    config = T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCAB, dropout_rate=0.0
    )
    config.decoder_start_token_id = 0
    model = T5ForConditionalGeneration(config).eval()
    masks = masks_of(model, input_ids=tokens(), attention_mask=padding("right"), labels=tokens(length=7))
    assert len(masks) == 6
    assert all(
        mask is None or (isinstance(mask, CompactMask) and largest(mask) <= 2 * LENGTH) for mask in masks
    )


def test_explains_a_call():
    module = Layer()
    q, k, v = qkv()
    options = {"softcap": 30.0, "s_aux": torch.zeros(4), "sliding_window": 3}
    found = explain(module, q.double(), k.double(), v.double(), None, **options)
    assert found.backend == "reference"
    assert "float64" in found.reasons["cpu"][0]
    with pytest.raises(NotImplementedError, match="output_attentions"):
        explain(module, q, k, v, None, output_attentions=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_explains_a_model(compiled):
    model = make("gemma2").double()
    model.set_attn_implementation("fastattn")
    call = torch.compile(model, backend="eager") if compiled else model
    found = explain_model(call, tokens(), attention_mask=padding("left"))
    assert [name.removeprefix("_orig_mod.") for name in found] == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    ]
    assert {one.backend for one in found.values()} == {"reference"}
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"got 'eager': call register\(\)"):
        explain_model(model, tokens())
