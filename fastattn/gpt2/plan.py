"""What a run will take, before it starts: sizes, FLOPs, memory."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import fastattn
from fastattn.gpt2.config import GPT2Config
from fastattn.gpt2.data import Batches, Corpus
from fastattn.gpt2.model import GPT2
from fastattn.gpt2.options import Options

_TOKENS_PER_PARAMETER = 20  # Hoffmann et al., "Training Compute-Optimal Large Language Models", 2022
_PROCESS = 400 << 20  # torch, loaded
_LOGITS = 64 << 20  # that the fused loss holds at a time
# Bytes for each score that the reference attention holds for a while, measured on the CPU.
_REFERENCE, _REFERENCE_DROPOUT = 16, 24


@dataclass(frozen=True)
class Plan:
    """Counts of a run, of `steps` steps.

    Attributes:
        parameters: trained numbers, tied ones once.
        tokens: seen in all.
        flops: of the model, forward and backward, recomputation not counted.
        memory: expected peak, in bytes.
    """

    parameters: int
    tokens: int
    flops: float
    memory: int


def make_plan(model: GPT2, options: Options, dtype: torch.dtype) -> Plan:
    """The counts of a run with `options` that are `resolved`."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = options.steps * options.accumulate * options.batch * options.context
    flops = tokens * flops_per_token(model, options.context)
    return Plan(parameters, tokens, flops, expected_memory(model.config, options, dtype, parameters))


def flops_per_token(model: GPT2, context: int) -> float:
    """Floating-point operations of forward and backward a token, causal attention counted as half.

    Six for each weight of a matrix product (two forward, four backward), and for each layer's two products
    of attention 6 · context · n_embd.
    """
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    if model.transformer.wpe is not None:
        weights -= model.transformer.wpe.weight.numel()
    return 6.0 * weights + 6.0 * model.config.n_layer * context * model.config.n_embd


def expected_memory(config: GPT2Config, options: Options, dtype: torch.dtype, parameters: int) -> int:
    """Bytes at the peak of a step: weights, gradients, Adam's moments, saved activations, logits."""
    item, tokens = dtype.itemsize, options.batch * options.context
    inner = config.n_inner or 4 * config.n_embd
    fused = options.model_fused
    # two residual inputs in float32; norms' outputs, q k v, attention's output; the MLP's, of which the fused
    # keeps what goes into the activation alone; dropout's masks, which the fused draws again
    hidden = inner if "mlp" in fused else 2 * inner
    masks = 0 if "norm" in fused else 2 * config.n_embd
    layer = tokens * (8 * config.n_embd + item * (6 * config.n_embd + hidden) + masks)
    transient = 0
    square = tokens * options.context * config.n_head
    if options.attention == "standard" or (
        options.attention == "sdpa" and options.device == "cpu" and config.attn_pdrop > 0
    ):
        # Kept: probabilities before and after dropout, and its mask; softmax is float32 under autocast too.
        # At the peak, one layer has its scores and their gradients besides.
        layer += square * (4 + item + 1)
        transient = square * 12
    elif options.attention == "fastattn" and _explain(config, options, dtype).backend == "reference":
        # No kernel to run: float32 whatever the dtype, see `ops.attention.reference`. Kept: the
        # exponentials, the probabilities that multiply v, dropout's mask.
        layer += square * (8 + (1 if config.attn_pdrop > 0 else 0))
        transient = square * (_REFERENCE_DROPOUT if config.attn_pdrop > 0 else _REFERENCE)
    if options.gradient_checkpointing:
        activations = layer + config.n_layer * tokens * 4 * config.n_embd
    else:
        activations = layer * config.n_layer
    if "loss" in fused:  # the head's gradient is made in forward, beside the activations
        logits = config.vocab_size * config.n_embd * 4 + min(_LOGITS, tokens * config.vocab_size * 4)
    else:
        rows = min(tokens, options.loss_chunk or tokens)
        logits = rows * config.vocab_size * (12 + (item if item < 4 else 0))
    return _PROCESS + 16 * parameters + activations + transient + logits


def plan_lines(
    model: GPT2,
    options: Options,
    plan: Plan,
    corpus: Corpus,
    batches: Batches,
    dtype: tuple[torch.dtype, str],
) -> list[str]:
    """The plan for a person to read."""
    config, device = model.config, options.device or "cpu"
    examples, have = options.accumulate * options.batch, available_memory(device)
    lines = [
        f"model    {options.size or options.init}: {plan.parameters:,} parameters, {config.n_layer} layers "
        f"of {config.n_embd}, {config.n_head} heads, dropout {_dropouts(config)}",
        f"data     {corpus.name}, {corpus.tokenizer.name} tokens: {corpus.train_tokens:,} in "
        f"{len(corpus.train_documents)} documents, {corpus.validation_tokens:,} held out in "
        f"{len(corpus.validation_documents)}",
        *(f"         {note}" for note in corpus.notes),
    ]
    if batches.unused:
        lines.append(
            f"         {batches.unused} of them are shorter than the context, unused; --joined uses them"
        )
    lines += [
        f"run      {options.steps:,} steps of {examples} × {options.context:,}: {plan.tokens:,} tokens, "
        f"{plan.tokens / batches.tokens:.2f} times the text; {plan.tokens / plan.parameters:.2g} tokens per "
        f"parameter (about {_TOKENS_PER_PARAMETER} is compute-optimal)",
        f"rates    lr {options.lr:g} after {options.warmup} steps of warm-up, then a cosine to "
        f"{options.min_lr:g} of it; weight decay {options.weight_decay:g}, clip {options.clip:g}",
        f"device   {device_name(device)}; {dtype[1]}",
        f"kernel   {_kernel(model, options, dtype[0])}",
        f"compute  {plan.flops:.2e} FLOPs",
        f"memory   about {_gib(plan.memory)} expected, "
        + ("unknown what is available" if have is None else f"{_gib(have)} available"),
    ]
    if have is not None and plan.memory > have:
        lines.append("warning  this may not fit: take a smaller --batch, or --gradient-checkpointing")
    return lines


def choose_dtype(options: Options) -> tuple[torch.dtype, str]:
    """What matrix products run in, and a sentence that says why."""
    device = torch.device(options.device or "cpu")
    if device.type == "cuda":
        fast, where = torch.cuda.is_bf16_supported(including_emulation=False), "the GPU has bfloat16 units"
    else:
        amx, avx = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
        fast, where = amx or avx, f"the CPU has {'AMX' if amx else 'AVX512-BF16'}"
    if options.dtype == "bfloat16":
        return torch.bfloat16, "bfloat16 autocast" + (
            "" if fast else ", which this device has no units for: slow"
        )
    if options.dtype == "auto" and fast:
        return torch.bfloat16, f"bfloat16 autocast, as {where} (--dtype float32 for none)"
    return torch.float32, "float32" + ("" if options.dtype == "float32" else ", as it has no bfloat16 units")


def device_name(device: str) -> str:
    """The device with what a reader of numbers wants to know of it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def peak_memory(device: str) -> int | None:
    """Bytes at the highest so far: of tensors on a GPU, of the whole process on a CPU (None on Windows)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # noqa: PLC0415, Unix has it
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory(device: str) -> int | None:
    """Bytes the device has free now; on a CPU, physical memory free or in droppable caches (None on
    Windows)."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        values = dict(line.split(":", 1) for line in lines)
        return int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        if not hasattr(os, "sysconf"):
            return None
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _dropouts(config: GPT2Config) -> str:
    parts = {"residual": config.resid_pdrop, "embedding": config.embd_pdrop, "attention": config.attn_pdrop}
    if len(set(parts.values())) == 1:
        return f"{config.attn_pdrop} everywhere"
    return ", ".join(f"{name} {value}" for name, value in parts.items())


def _kernel(model: GPT2, options: Options, dtype: torch.dtype) -> str:
    fused = f"; fused: {', '.join(options.fused_names) or 'none'}"
    if options.attention != "fastattn":
        return f"{options.attention} attention{fused}"
    found = _explain(model.config, options, dtype)
    text = f"fastattn attention, backend {found.backend}" + (f" ({found.isa})" if found.isa else "")
    if found.backend == "reference":  # the slow one: say what keeps the others away
        text += "".join(f"; not {name}: {', '.join(why)}" for name, why in found.reasons.items())
    return text + fused


def _explain(config: GPT2Config, options: Options, dtype: torch.dtype) -> fastattn.Explanation:
    """What `fastattn.attention` would run, by one head's size."""
    q = torch.empty(1, 1, 1, config.head_dim, dtype=dtype, device=options.device)
    return fastattn.explain(q, q, q, mask=fastattn.causal(), dropout=config.attn_pdrop)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
