"""What ours and others can do: the README's table, for a page, and our tests' features behind a row."""

from __future__ import annotations

from typing import Final, NamedTuple

SYSTEMS: Final = ("fastattn", "flash-attn 2", "FA3", "FA4", "xformers", "SDPA", "FlexAttention")
SOURCES: Final = (
    "Ours: each cell has a test, which the README's table leads to. Peers: read from the sources of "
    "flash-attn 2.8.4 (FA3: its hopper, FA4: its cute) and xformers 0.0.35; torch 2.13.0 was run, on a CPU. "
    "–: not there. L×L: only with that matrix in memory. Atomics: there, in an order that differs from run "
    "to run."
)


class Feature(NamedTuple):
    """A row.

    Attributes:
        name: of the feature.
        cells: what each of `SYSTEMS` has of it, ours first.
        tested: keys of `fastattn.testing.FEATURES` that every backend of ours is tested with for it.
    """

    name: str
    cells: tuple[str, ...]
    tested: tuple[str, ...] = ()


TABLE: Final = (
    Feature("Trains on a CPU", ("yes", "–", "–", "–", "–", "yes", "forward only")),
    Feature(
        "Trains on a GPU",
        ("sm_80 and newer, AMD: see Limits", "yes", "sm_80 to 90", "sm_90 to 120", "yes", "yes", "yes"),
    ),
    Feature("Head dim", ("1 to 512", "≤ 256", "≤ 256", "≤ 128, some above", "any", "any", "any, padded")),
    Feature("d_v ≠ d", ("yes", "–", "some, sm_90", "yes", "yes", "CPU: L×L", "yes")),
    Feature("Grouped and multi-query heads", ("yes", "yes", "yes", "yes", "forward only", "yes", "yes")),
    Feature(
        "Causal for L_q ≠ L_k",
        ("both corners", "bottom right", "bottom right", "bottom right", "both", "top left", "your code"),
        ("causal", "causal-top-left", "both-corners", "starts", "starts-of-each"),
    ),
    Feature(
        "Sliding window",
        ("yes", "yes", "yes", "yes", "yes", "dense mask", "`mask_mod`"),
        ("window", "window-both-sides", "window-right", "far-windows"),
    ),
    Feature(
        "Chunked (Llama 4)",
        ("yes", "–", "forward only", "`mask_mod`", "–", "dense mask", "`mask_mod`"),
        ("chunked",),
    ),
    Feature(
        "Packed documents",
        ("yes", "yes", "yes", "yes", "yes", "GPU only", "`mask_mod`"),
        ("documents", "documents-causal", "position-ids", "key-padding"),
    ),
    Feature(
        "Block-sparse, causal too",
        ("yes", "–", "–", "yes", "–", "–", "yes"),
        ("block-sparse", "block-sparse-causal", "two-block-sizes"),
    ),
    Feature(
        "Dense bool mask",
        ("yes", "–", "–", "`mask_mod`", "yes", "yes", "`mask_mod`"),
        ("dense-mask", "dense-mask-of-keys", "dense-mask-2d"),
    ),
    Feature(
        "Masks joined by `&` and `|`, empty tiles skipped",
        ("yes", "–", "–", "`mask_mod`", "–", "–", "`mask_mod`"),
        (
            "prefix",
            "prefix-of-each",
            "first-keys-and-window",
            "blocks-or-blocks",
            "window-and-prefix",
            "blocks-or-window",
            "either-of-three",
        ),
    ),
    Feature(
        "Softcap",
        ("yes", "not with dropout", "yes", "not packed backward", "–", "–", "`score_mod`"),
        ("softcap", "scale"),
    ),
    Feature(
        "ALiBi",
        ("slopes learn", "fixed slopes", "–", "`score_mod`", "dense bias", "dense mask", "`score_mod`"),
        ("alibi", "alibi-of-each", "half-bias-and-slopes"),
    ),
    Feature(
        "Learnable sinks",
        ("yes", "–", "–", "sm_90 to 110", "–", "–", "from the lse"),
        ("sinks", "half-sinks"),
    ),
    Feature(
        "Dense bias with gradient",
        ("any broadcast", "–", "–", "–", "no broadcast", "CPU: L×L", "atomics"),
        (
            "bias-BHQK",
            "bias-1HQK",
            "bias-B1QK",
            "bias-11QK",
            "bias-BH1K",
            "bias-B11K",
            "bias-1HQ1",
            "bias-1111",
            "bias-of-infinities-and-alibi",
            "sum-of-biases",
        ),
    ),
    Feature(
        "Relative position bias (T5), no L×L",
        ("table learns", "–", "–", "no gradient", "–", "–", "atomics"),
        ("relative-position", "relative-position-decoder"),
    ),
    Feature("Dropout", ("with all of this", "yes", "–", "–", "yes", "CPU: L×L", "–"), ("dropout",)),
    Feature("Gradient through lse", ("yes", "silently 0", "silently 0", "yes", "–", "no lse", "yes")),
    Feature("Merging of partial results", ("with gradient", "–", "forward", "forward", "forward", "–", "–")),
    Feature(
        "KV cache: append, rotary, pages",
        (
            "any page, int8, fp8",
            "pages of 256 n",
            "any page",
            "pages, sm_100",
            "pages",
            "–",
            "pages, by example",
        ),
    ),
    Feature(
        "float8 q, k, v (forward)",
        ("`attention_float8`, scales of a tensor or a head", "–", "sm_90", "sm_100", "–", "with FA3", "yes"),
    ),
    Feature("Deterministic backward", ("always", "flag", "flag", "flag", "–", "flag", "not for a bias")),
    Feature("Batch-invariant", ("always, to the bit", "one split", "one split", "no split", "–", "–", "–")),
    Feature("Statistics of the probabilities, no L×L", ("yes", "–", "–", "–", "–", "–", "maximum")),
    Feature("vmap", ("yes", "–", "–", "–", "–", "slow fallback", "–")),
    Feature(
        "`torch.compile(fullgraph=True)`",
        ("yes", "not the cache", "yes", "–", "forward op", "yes", "needs it"),
    ),
    Feature("Says which kernel runs, and why not another", ("`explain`", "–", "–", "–", "–", "–", "–")),
)
