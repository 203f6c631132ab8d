"""GPT-2 against transformers' own: logits, gradients, greedy tokens, files both ways."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.gpt2.checkpoint import load_model, save_model
from fastattn.gpt2.config import GPT2Config, config_of
from fastattn.gpt2.model import FUSED, GPT2, KVCache

transformers = pytest.importorskip("transformers")

KINDS = ("standard", "sdpa", "fastattn")
CONFIG = GPT2Config(
    vocab_size=101,
    n_positions=70,
    n_embd=48,
    n_layer=3,
    n_head=4,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)


def ids_of(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def peer() -> torch.nn.Module:
    """transformers' model, with weights large enough that a wrong mask or scale shows."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=101,
        n_positions=70,
        n_embd=48,
        n_layer=3,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def folder(peer: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peer")
    peer.save_pretrained(path)
    return path


def worst(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of b's largest value."""
    return float(((a - b).abs().max() / b.abs().max()).detach())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_transformers(kind, peer, folder):
    model = load_model(folder, kind)
    ids = ids_of(2, 63)
    peer.zero_grad()
    expected = peer(ids).logits
    F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()

    assert worst(model(ids), expected) < 2e-6
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    gradients = dict(model.named_parameters())
    for name, parameter in peer.named_parameters():
        assert worst(gradients[name].grad, parameter.grad) < 2e-5, name


def gradients_of(model: GPT2, ids: Tensor, targets: Tensor) -> list[Tensor]:
    """The loss, and behind it the gradient of every parameter."""
    model.zero_grad()
    loss = model.loss(ids, targets)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("fused", [*FUSED, "all"])
def test_fused_operations_give_the_loss_and_gradients_of_plain_ones(fused, folder):
    """At most twice the error of plain PyTorch, and a rounding band of the values' size."""
    ids, targets = ids_of(2, 63), ids_of(2, 63, 1)
    targets[0, :5] = -100
    exact = gradients_of(load_model(folder, "standard").double(), ids, targets)
    plain = gradients_of(load_model(folder, "fastattn", fused=()), ids, targets)
    model = load_model(folder, "fastattn", fused=FUSED if fused == "all" else [fused])
    assert model.fused == (FUSED if fused == "all" else (fused,))
    given = gradients_of(model, ids, targets)
    for expected, theirs, ours in zip(exact, plain, given, strict=True):
        band = 1e-6 * float(expected.abs().max())
        budget = 2 * float((theirs - expected).abs().max()) + band
        assert float((ours - expected).abs().max()) <= budget

    model.transformer.gradient_checkpointing = True
    for again, ours in zip(gradients_of(model, ids, targets), given, strict=True):
        torch.testing.assert_close(again, ours, rtol=0, atol=0)


def test_what_is_fused_changes_no_state_dict_and_no_cached_token(folder):
    plain, fused = load_model(folder, fused=()), load_model(folder, fused=FUSED)
    assert plain.state_dict().keys() == fused.state_dict().keys()
    assert all(torch.equal(fused.state_dict()[name], x) for name, x in plain.state_dict().items())
    ids = ids_of(2, 7)
    assert torch.equal(fused.generate(ids, 20, temperature=0), plain.generate(ids, 20, temperature=0))


def test_what_is_fused_is_all_or_nothing_by_the_attention():
    assert GPT2(CONFIG).fused == FUSED and GPT2(CONFIG, "sdpa").fused == ()
    assert GPT2(CONFIG, "sdpa", ["loss", "norm"]).fused == ("norm", "loss")


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers(kind, peer, folder):
    model = load_model(folder, kind)
    ids = ids_of(3, 7)
    with torch.no_grad():
        expected = peer.eval().generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=0
        )
    assert torch.equal(model.generate(ids, 40, temperature=0), expected)
    assert model.training, "generate leaves the mode as it was"


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_filled_in_pieces_gives_the_same_logits(kind, folder):
    model = load_model(folder, kind).eval()
    ids = ids_of(2, 33)
    cache = KVCache(33)
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in ids.split([9, 1, 17, 6], dim=1)]
        assert worst(torch.cat(pieces, dim=1), model(ids)) < 2e-6
        with pytest.raises(ValueError, match="cache's 33 tokens, got 34"):
            model(ids[:, :1], cache=cache)


def test_names_and_shapes_are_those_of_transformers(peer):
    ours = {name: tensor.shape for name, tensor in GPT2(CONFIG).state_dict().items()}
    assert ours == {name: tensor.shape for name, tensor in peer.state_dict().items()}


def test_transformers_loads_what_we_save(tmp_path):
    torch.manual_seed(2)
    model = GPT2(CONFIG)
    save_model(model, tmp_path, end_of_text=100)
    loaded, info = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert loaded.config.eos_token_id == 100 and loaded.config.attn_pdrop == 0.0
    ids = ids_of(1, 20)
    with torch.no_grad():
        assert worst(model(ids), loaded.eval()(ids).logits) < 2e-6


def test_saving_over_the_folder_a_model_came_from_keeps_it(tmp_path):
    save_model(GPT2(CONFIG), tmp_path)
    model = load_model(tmp_path)
    before = model.lm_head.weight.clone()
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path).lm_head.weight, before)
    assert torch.equal(model.lm_head.weight, before)


def test_loads_shards(peer, folder, tmp_path):
    peer.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    ids = ids_of(1, 10)
    assert torch.equal(load_model(tmp_path)(ids), load_model(folder)(ids))


def test_loads_names_without_prefix_and_with_mask_buffers(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 70, 70).tril()
    save_file(bare, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert torch.equal(load_model(tmp_path).lm_head.weight, load_model(folder).lm_head.weight)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "llama"}, ValueError, "model_type 'gpt2', got 'llama'"),
        ({"activation_function": "relu"}, NotImplementedError, "activation_function in .* got 'relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, NotImplementedError, "scale_attn_by_inverse_layer_idx"),
        ({"n_layer": 2}, ValueError, r"unexpected \['transformer.h.2"),
        ({"n_layer": 4}, ValueError, r"missing \['transformer.h.3"),
        ({"vocab_size": 100}, ValueError, r"wte.weight: expected shape \[100, 48\], got \[101, 48\]"),
    ],
)
def test_a_folder_that_does_not_fit_is_an_error(change, error, message, folder, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(error, match=message):
        load_model(tmp_path)


def test_a_missing_file_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("size", "millions"),
    [("gpt2", 124.4), ("355M", 354.8), ("gpt2-large", 774.0), ("1558M", 1557.6), ("1.5B", 1557.6)],
)
def test_published_sizes_have_the_published_parameters(size, millions):
    with torch.device("meta"):
        model = GPT2(config_of(size))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=500, n_positions=200, n_embd=128, n_layer=8, n_head=4)
    for name, parameter in GPT2(config).named_parameters():
        if name.endswith("c_proj.weight"):
            assert float(parameter.detach().std()) == pytest.approx(0.02 / 4, rel=0.03), name
        elif parameter.dim() == 2:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.03), name
        else:
            assert torch.all(parameter == (1 if "ln_" in name and name.endswith("weight") else 0)), name


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient_even_with_dropout(kind):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = GPT2(CONFIG.with_dropout(0.2), kind)
        model.transformer.gradient_checkpointing = checkpointing
        torch.manual_seed(4)
        model.loss(ids_of(2, 40), ids_of(2, 40, 1)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_loss_in_chunks_is_the_loss():
    torch.manual_seed(5)
    model = GPT2(CONFIG)
    ids, targets = ids_of(2, 41), ids_of(2, 41, 1)
    targets[0, :5] = -100
    results = []
    for chunk in (None, 7, 82, 1000):
        model.zero_grad()
        loss = model.loss(ids, targets, chunk=chunk)
        loss.backward()
        results.append((loss.detach(), model.transformer.wte.weight.grad.clone()))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])


def test_fastattn_saves_no_square_for_the_backward():
    length, saved = 61, []
    model = GPT2(CONFIG.with_dropout(0.1), "fastattn")
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        model.loss(ids_of(1, length), ids_of(1, length, 1))
    import fastattn

    q = torch.zeros(1, 4, length, 12)
    if fastattn.explain(q, q, q).backend == "reference":
        pytest.skip("the reference backend holds the square")
    assert not any(shape[-2:] == (length, length) for shape in saved)


def test_compiles_without_a_graph_break():
    torch.manual_seed(6)
    model = GPT2(CONFIG, "fastattn")
    compiled = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
    gradients = []
    for function in (model.loss, compiled):
        model.zero_grad()
        function(ids_of(2, 31), ids_of(2, 31, 1)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for eager, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-6)


def test_drawn_tokens_follow_seed_top_k_and_end_of_text(folder):
    model = load_model(folder)
    ids = ids_of(2, 5)
    first = model.generate(ids, 20, temperature=0.8, seed=1)
    assert torch.equal(first, model.generate(ids, 20, temperature=0.8, seed=1))
    assert not torch.equal(first, model.generate(ids, 20, temperature=0.8, seed=2))
    assert torch.equal(model.generate(ids, 20, top_k=1, seed=3), model.generate(ids, 20, temperature=0))
    end = int(first[0, 7])
    ended = model.generate(ids, 20, temperature=0.8, seed=1, end_of_text=end)
    after = (ended[0, 5:] == end).nonzero()[0].item() + 5
    assert torch.all(ended[0, after:] == end)
    assert torch.equal(model.generate(ids, 0), ids)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(ids_of(1, 71)), "at most n_positions 70 tokens, got 71"),
        (lambda m: m.generate(ids_of(1, 60), 11), "at most 70 in all, got 60 and 11"),
        (lambda m: m.generate(ids_of(1, 0), 5), "a token or more"),
        (lambda m: m.generate(ids_of(1, 5), 5, temperature=-1.0), "temperature >= 0"),
        (lambda m: m.generate(ids_of(1, 5), 5, top_k=0), "top_k >= 1"),
        (lambda m: GPT2(CONFIG, "flash"), "one of .* got 'flash'"),
        (
            lambda m: GPT2(CONFIG, "sdpa", ["norm", "flash"]),
            r"fused: expected some of .* got \['norm', 'flash'\]",
        ),
        (lambda m: GPT2(CONFIG, "sdpa", "norm"), "fused: expected some of .* got 'norm'"),
        (lambda m: config_of("gpt3"), "one of .* got 'gpt3'"),
        (lambda m: GPT2Config(n_embd=10, n_head=3), "divisor of n_embd 10, got 3"),
        (lambda m: GPT2Config(attn_pdrop=1.0), r"attn_pdrop: expected a probability in \[0, 1\), got 1.0"),
        (lambda m: GPT2Config(n_layer=0), "n_layer: expected at least 1, got 0"),
    ],
)
def test_what_can_not_be_done_says_so(call, message):
    with pytest.raises(ValueError, match=message):
        call(GPT2(CONFIG))


@pytest.mark.parametrize("kind", KINDS)
def test_rotary_positions_are_relative_cached_and_saved(kind, tmp_path):
    torch.manual_seed(0)
    model = GPT2(replace(CONFIG, positions="rotary"), kind).eval()
    ids = ids_of(2, 40)
    whole = model(ids)
    cache = KVCache(40)
    pieces = [model(part, cache=cache) for part in ids.split([7, 1, 32], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)

    # the order matters, where a token stands does not: turning all by as much changes no score
    attention, x = model.transformer.h[0].attn, 30 * torch.randn(1, 9, CONFIG.n_embd)
    cos, sin = model.transformer.cos, model.transformer.sin
    here, there = (attention(x, None, (cos[i : i + 9], sin[i : i + 9])) for i in (0, 30))
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)
    other_order = torch.cat((x[:, :8].flip(1), x[:, 8:]), 1)
    reordered = attention(other_order, None, (cos[:9], sin[:9]))
    assert (here - reordered)[:, -1].abs().max() > 0.1 * here[:, -1].abs().max()

    save_model(model, tmp_path)
    again = load_model(tmp_path, kind).eval()
    assert again.config == model.config and torch.equal(again(ids), whole)
    # transformers would compute something else with these weights, so that it must not know them
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] != "gpt2"


def test_positions_must_be_known():
    with pytest.raises(ValueError, match="'learned' or 'rotary', got 'alibi'"):
        GPT2Config(positions="alibi")
    with pytest.raises(ValueError, match="even head_dim"):
        GPT2Config(n_embd=9, n_head=3, positions="rotary")
