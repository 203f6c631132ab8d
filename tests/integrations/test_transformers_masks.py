"""The masks transformers describes, as fastattn's: the same key for key, and never L × L in memory."""

import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import masking_utils  # noqa: E402
from transformers.masking_utils import and_masks, or_masks, sdpa_mask  # noqa: E402

from fastattn.integrations.transformers import CompactMask, attention_mask  # noqa: E402
from fastattn.integrations.transformers.symbols import atoms_of  # noqa: E402

LENGTH = 13
NO_LEFT_PADDING = torch.zeros(2, dtype=torch.long)
CHUNKED = masking_utils.chunked_causal_mask_function
PATTERNS = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(4),
    "window of one": masking_utils.sliding_window_causal_mask_function(1),
    "window, both sides": masking_utils.sliding_window_bidirectional_mask_function(3),
    "chunked": CHUNKED(5, NO_LEFT_PADDING),
}


def padding(side, length=LENGTH):
    keep = torch.ones(2, length, dtype=torch.bool)
    if side == "left":
        keep[1, :3] = False
    elif side == "right":
        keep[1, -3:] = False
    elif side == "middle":
        keep[1, 4:7] = False
    return None if side is None else keep


def assert_same_mask(found, options):
    expected = sdpa_mask(**{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    assert isinstance(found, CompactMask)
    assert found.shape == tuple(expected.shape)
    assert torch.equal(found.to_tensor(), expected)


def largest(mask):
    """Elements of the largest tensor a mask holds."""
    return max((x.numel() for clause in mask.mask.clauses for c in clause for x in c.tensors()), default=0)


@pytest.mark.parametrize("side", [None, "left", "right", "middle"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_whole_sequences(pattern, side):
    options = {
        "batch_size": 2,
        "q_length": LENGTH,
        "kv_length": LENGTH,
        "mask_function": PATTERNS[pattern],
        "attention_mask": padding(side),
        "allow_is_bidirectional_skip": pattern in ("bidirectional", "window, both sides"),
    }
    found = attention_mask(**options)
    if side is None and pattern in ("causal", "bidirectional"):
        assert found is None
    else:
        assert_same_mask(found, options)
        assert largest(found) <= 2 * LENGTH


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(
    "q_length, kv_length, q_offset, kv_offset",
    [(1, 13, 12, 0), (4, 13, 9, 0), (4, 13, 5, 0), (13, 17, 0, 0), (3, 8, 10, 5), (1, 8, 12, 5)],
)
@pytest.mark.parametrize("pattern", ["causal", "window", "window of one", "chunked"])
def test_caches(pattern, q_length, kv_length, q_offset, kv_offset, as_tensor, side):
    """Dynamic and static ones, their first keys dropped or their last ones unwritten."""
    options = {
        "batch_size": 2,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": torch.tensor(q_offset) if as_tensor else q_offset,
        "kv_offset": kv_offset,
        "mask_function": PATTERNS[pattern],
        "attention_mask": padding(side, q_offset + q_length),
    }
    found = attention_mask(**options)
    if found is None:
        keep = options["attention_mask"]
        assert keep is None or keep[:, kv_offset:].all()
        assert pattern == "causal"
        assert q_length == 1
        assert q_offset + q_length == kv_offset + kv_length
    else:
        assert_same_mask(found, options)
        assert largest(found) <= 2 * kv_length


@pytest.mark.parametrize("pattern", ["causal", "window", "window of one"])
def test_where_queries_stand_may_be_a_tensor_the_compiler_does_not_read(pattern):
    """Static caches count their tokens in one."""
    options = {"batch_size": 2, "q_length": 3, "kv_length": 13, "mask_function": PATTERNS[pattern]}
    options["allow_is_causal_skip"] = True

    def make(start):
        found = attention_mask(**options, q_offset=start)
        return found.to_tensor(), found.q_start

    torch.compiler.reset()
    compiled = torch.compile(make, backend="eager", fullgraph=True)
    for start in (torch.tensor(4), torch.tensor(7)):
        tensor, q_start = compiled(start)
        assert torch.equal(tensor, sdpa_mask(**{**options, "allow_is_causal_skip": False}, q_offset=start))
        assert q_start.tolist() == [int(start)] * 2


def packed(pattern, position_ids, remapped=True):
    """As `create_causal_mask` does it; before transformers 5.21 positions were not remapped."""
    numbers = masking_utils.find_packed_sequence_indices(position_ids)
    if remapped:
        make = getattr(masking_utils, "packed_sequence_compatibility_function", None)
        if make is None:
            pytest.skip("this transformers does not remap positions")
        return make(PATTERNS[pattern], position_ids, numbers)
    return and_masks(PATTERNS[pattern], masking_utils.packed_sequence_mask_function(numbers))


POSITIONS = {
    "from 0": torch.tensor(
        [[0, 1, 2, 3, 4, 0, 1, 2, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3]]
    ),
    "from elsewhere": torch.tensor(
        [[3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5], [1, 2, 3, 7, 8, 9, 4, 5, 6, 7, 8, 9, 9]]
    ),
}


@pytest.mark.parametrize("remapped", [False, True])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("pattern", ["causal", "window", "chunked"])
def test_packed_sequences(pattern, positions, remapped):
    options = {
        "batch_size": 2,
        "q_length": LENGTH,
        "kv_length": LENGTH,
        "mask_function": packed(pattern, POSITIONS[positions], remapped),
        "allow_is_causal_skip": False,
    }
    found = attention_mask(**options)
    if pattern == "chunked" and not (remapped and positions == "from 0"):
        # Chunks that do not begin with their document.
        assert torch.equal(found, sdpa_mask(**options))
    else:
        assert_same_mask(found, options)
        assert found.packed
        assert largest(found) <= 2 * LENGTH


@pytest.mark.parametrize("pattern", ["causal", "window"])
def test_packed_sequences_under_the_compiler(pattern):
    position_ids = POSITIONS["from 0"]
    remapped = hasattr(masking_utils, "packed_sequence_compatibility_function")

    def make(position_ids):
        options = {"batch_size": 2, "q_length": LENGTH, "kv_length": LENGTH, "allow_is_causal_skip": False}
        return attention_mask(**options, mask_function=packed(pattern, position_ids, remapped)).to_tensor()

    torch.compiler.reset()
    compiled = torch.compile(make, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(position_ids), make(position_ids))
    assert torch.equal(compiled(POSITIONS["from elsewhere"]), make(POSITIONS["from elsewhere"]))


def test_packed_sequences_of_other_positions_are_not_taken_for_documents():
    """Where one document's positions jump, what counts is the number of the document."""
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 5]])
    numbers = torch.tensor([[0, 0, 0, 1, 1, 1]])
    make = getattr(masking_utils, "packed_sequence_compatibility_function", None)
    if make is None:
        pytest.skip("this transformers does not remap positions")
    options = {"batch_size": 1, "q_length": 6, "kv_length": 6, "allow_is_causal_skip": False}
    options["mask_function"] = make(PATTERNS["causal"], position_ids, numbers)
    found = attention_mask(**options)
    assert torch.equal(found, sdpa_mask(**options))

    def compiled(position_ids, numbers):
        function = make(PATTERNS["causal"], position_ids, numbers)
        return attention_mask(**{**options, "mask_function": function}).to_tensor()

    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="expected documents to begin"):
        torch.compile(compiled, backend="eager", fullgraph=True)(position_ids, numbers)


def of_a_model(batch, head, query, key):
    return (query % 3 == key % 3) | (key <= query)


@pytest.mark.parametrize(
    "function",
    [
        of_a_model,
        or_masks(PATTERNS["causal"], masking_utils.bidirectional_mask_function),
        and_masks(PATTERNS["causal"], of_a_model),
        lambda b, h, q, k: k < q,
        lambda b, h, q, k: (k <= q) & (k >= 2),
        lambda b, h, q, k: k * 2 <= q,
        lambda b, h, q, k: torch.maximum(q, k) < 7,
        lambda b, h, q, k: (k - NO_LEFT_PADDING[b]) // 5 == q // 5,
        lambda b, h, q, k: (k + 1) // 5 == (q + 1) // 5,
        lambda b, h, q, k: abs(q - k - 1) <= 2,
        lambda b, h, q, k: (q - k <= 2) & (q - k >= 0),
        lambda b, h, q, k: torch.arange(26).view(2, 13)[b, q] >= torch.arange(26).view(2, 13)[b, k],
    ],
)
@pytest.mark.parametrize("use_vmap", [False, True])
def test_masks_of_a_models_own_are_the_tensor_they_were(function, use_vmap):
    options = {"batch_size": 2, "q_length": LENGTH, "kv_length": LENGTH, "mask_function": function}
    options |= {"use_vmap": use_vmap, "allow_is_causal_skip": False}
    found = attention_mask(**options)
    assert torch.equal(found, sdpa_mask(**options))


def test_blocks_of_images_are_the_tensor_they_were():
    blockwise = getattr(masking_utils, "blockwise_overlay", None)
    if blockwise is None:
        pytest.skip("this transformers has no blockwise_overlay")
    ids = torch.tensor([[-1, -1, 0, 0, 0, -1, 1, 1, -1, -1, -1, -1, -1]]).expand(2, -1)
    function = or_masks(PATTERNS["causal"], blockwise(ids))
    options = {"batch_size": 2, "q_length": LENGTH, "kv_length": LENGTH, "mask_function": function}
    options["allow_is_causal_skip"] = False
    assert atoms_of(function) is None
    assert torch.equal(attention_mask(**options), sdpa_mask(**options))


@pytest.mark.parametrize("pattern", ["causal", "window", "bidirectional"])
def test_a_model_that_asks_for_a_tensor_gets_one(pattern):
    options = {"batch_size": 2, "q_length": LENGTH, "kv_length": LENGTH, "mask_function": PATTERNS[pattern]}
    options |= {"attention_mask": padding("left"), "allow_is_causal_skip": False}
    found = attention_mask(**options)
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, sdpa_mask(**options))


def test_a_window_longer_than_the_text_is_none():
    options = {"batch_size": 2, "q_length": LENGTH, "kv_length": LENGTH, "local_size": LENGTH}
    window = masking_utils.sliding_window_causal_mask_function
    assert attention_mask(**options, mask_function=window(LENGTH)) is None
    assert isinstance(attention_mask(**options, mask_function=window(LENGTH - 1)), CompactMask)


@pytest.mark.parametrize("pattern", ["causal", "window", "chunked"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_memory_grows_with_the_length(pattern, side):
    sizes = []
    for length in (256, 1024):
        options = {
            "batch_size": 2,
            "q_length": length,
            "kv_length": length,
            "mask_function": PATTERNS[pattern],
        }
        sizes.append(largest(attention_mask(**options, attention_mask=padding(side, length))))
    assert sizes[1] <= 4 * sizes[0]
    assert sizes[1] <= 2 * 1024


def test_it_stands_for_its_tensor_where_a_model_works_on_it():
    keep = padding("left")
    options = {"batch_size": 2, "q_length": LENGTH, "kv_length": LENGTH, "attention_mask": keep}
    compact, tensor = attention_mask(**options), sdpa_mask(**options)
    assert compact.ndim == 4
    assert torch.equal(compact[:, :, :, :5], tensor[..., :5])
    assert torch.equal(torch.cat([compact, tensor], dim=-1), torch.cat([tensor, tensor], dim=-1))
    assert torch.equal(torch.where(compact, 0.0, -math.inf), torch.where(tensor, 0.0, -math.inf))
    assert torch.equal(compact.masked_fill(tensor, False), torch.zeros_like(tensor))
    assert compact.dtype == torch.bool
    assert compact.contiguous() is compact
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = compact.no_such_thing


def test_operators_and_dtypes_act_on_its_tensor():
    keep = padding("left")
    options = {"batch_size": 2, "q_length": LENGTH, "kv_length": LENGTH, "attention_mask": keep}
    compact, tensor = attention_mask(**options), sdpa_mask(**options)
    other = torch.rand(LENGTH, LENGTH) > 0.5
    for act in (
        lambda x: ~x,
        lambda x: x == other,
        lambda x: x == compact,
        lambda x: x != other,
        lambda x: other != x,
        lambda x: x & other,
        lambda x: other & x,
        lambda x: True & x,
        lambda x: x | other,
        lambda x: x ^ other,
        lambda x: x * 2.0,
        lambda x: 2.0 * x,
        lambda x: x + 1,
        lambda x: 1 + x,
        lambda x: x.to(torch.float16),
        lambda x: x.to(dtype=torch.float64),
        lambda x: x.to("cpu", torch.int32),
        lambda x: x.to(torch.zeros(1)),
        len,
    ):
        found, expected = act(compact), act(tensor)
        assert type(found) is type(expected)
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
    assert isinstance(compact.to(torch.bool), CompactMask)
    assert isinstance(compact.to("cpu", non_blocking=True), CompactMask)
    assert compact in {compact: 1}
    for act in (lambda x: 1 - x, lambda x: x - 1):
        with pytest.raises(RuntimeError, match="bool tensor"):
            act(compact)


@pytest.mark.parametrize("numbers", [[0, 1, 0, 1], [0, 0, 1, 0], [1, 1, 0, 0]], ids=str)
def test_documents_that_come_back_are_the_tensor_they_were(numbers):
    ids = torch.tensor([numbers])
    function = masking_utils.packed_sequence_mask_function(ids)
    options = {"batch_size": 1, "q_length": 4, "kv_length": 4, "allow_is_causal_skip": False}
    for pattern in (function, and_masks(PATTERNS["causal"], function)):
        found = attention_mask(**options, mask_function=pattern)
        expected = sdpa_mask(**options, mask_function=pattern)
        assert torch.equal(found.to_tensor() if isinstance(found, CompactMask) else found, expected)


def test_it_is_taken_along_to_another_device():
    options = {
        "batch_size": 2,
        "q_length": 5,
        "kv_length": LENGTH,
        "q_offset": 4,
        "attention_mask": padding("left"),
    }
    compact = attention_mask(**options)
    moved = compact.to("meta")
    assert {x.device.type for clause in moved.mask.clauses for c in clause for x in c.tensors()} == {"meta"}
    assert moved.to_tensor().device.type == "meta"
    assert moved.shape == compact.shape
    assert (moved.q_start, moved.k_start) == (compact.q_start, compact.k_start) == (4, 0)
