"""Functions of csrc/core against second, slow implementations in Python."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction
from types import ModuleType

import pytest
import torch

from flash_attn_ext import _philox


def kept_matrix(core: ModuleType, seqlen_q: int, seqlen_k: int, left: int, right: int):
    mask = (seqlen_q, seqlen_k, left, right)
    return [[int(core.is_kept(mask, q, k)) for k in range(seqlen_k)] for q in range(seqlen_q)]


def test_masks_of_the_docstring(introspect: ModuleType) -> None:
    assert kept_matrix(introspect, 2, 5, -1, 0) == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert kept_matrix(introspect, 5, 2, -1, 0) == [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]
    assert kept_matrix(introspect, 2, 5, 1, 0) == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert kept_matrix(introspect, 5, 2, 1, 0) == [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]


def test_masks_match_torch(introspect: ModuleType) -> None:
    for sq, sk in itertools.product((1, 3, 6), (1, 2, 7)):
        assert torch.tensor(kept_matrix(introspect, sq, sk, -1, -1)).all()
        causal = torch.ones(sq, sk).tril(sk - sq)
        assert torch.equal(torch.tensor(kept_matrix(introspect, sq, sk, -1, 0)), causal.long())
        window = causal.triu(sk - sq - 2)
        assert torch.equal(torch.tensor(kept_matrix(introspect, sq, sk, 2, 0)), window.long())


def test_forward_and_backward_visit_the_same_blocks(introspect: ModuleType) -> None:
    rng = random.Random(0)
    for _ in range(300):
        sq, sk = rng.randrange(0, 40), rng.randrange(0, 40)
        mask = (sq, sk, rng.choice((-1, 0, 3, 11)), rng.choice((-1, 0, 2, 9)))
        tile_m, tile_n = rng.choice((1, 4, 16)), rng.choice((1, 3, 8))
        num_m_blocks, num_n_blocks = -(-sq // tile_m), -(-sk // tile_n)
        forward, backward = set(), set()
        for m in range(num_m_blocks):
            begin, end, _, _ = introspect.n_block_range(mask, m, tile_m, tile_n)
            forward |= {(m, n) for n in range(begin, end)}
        for n in range(num_n_blocks):
            begin, end, _, _ = introspect.m_block_range(mask, n, tile_m, tile_n)
            backward |= {(m, n) for m in range(begin, end)}
        assert forward == backward, (mask, tile_m, tile_n)


def expected_num_splits(tiles: int, num_sms: int, n_blocks: int, max_splits: int) -> int:
    """FlashAttention-2's rule with exact fractions."""
    if tiles == 0 or n_blocks <= 1 or Fraction(tiles, num_sms) >= Fraction(4, 5):
        return 1
    sizes = {s: -(-n_blocks // s) for s in range(1, min(max_splits, num_sms, n_blocks) + 1)}
    eligible = [s for s, size in sizes.items() if -(-n_blocks // size) == s]
    waves = {s: -(-tiles * s // num_sms) for s in eligible}
    efficiency = {s: Fraction(tiles * s, num_sms * waves[s]) for s in eligible}
    enough = Fraction(85, 100) * max(efficiency.values())
    return next(s for s in eligible if efficiency[s] >= enough)


@pytest.mark.parametrize("num_sms", [1, 5, 20, 82, 108, 132])
def test_num_splits(introspect: ModuleType, num_sms: int) -> None:
    for tiles in range(0, 160, 3 if num_sms > 20 else 1):
        for n_blocks in range(0, 200, 7):
            for max_splits in (1, 128):
                args = (tiles, num_sms, n_blocks, max_splits)
                assert introspect.choose_num_splits(*args) == expected_num_splits(*args), args


def test_num_splits_at_an_exact_tie(introspect: ModuleType) -> None:
    # 61 tiles on 108 SMs: floating point decides this one differently in C++ and Python.
    assert introspect.choose_num_splits(61, 108, 88, 128) == expected_num_splits(61, 108, 88, 128)


def test_split_range_is_a_partition(introspect: ModuleType) -> None:
    for size, num_splits in itertools.product(range(30), range(1, 12)):
        parts = [introspect.split_range(5, 5 + size, s, num_splits) for s in range(num_splits)]
        blocks = [block for begin, end in parts for block in range(begin, end)]
        assert blocks == list(range(5, 5 + size))


@pytest.mark.parametrize("longest_first", [False, True])
def test_tile_coord(introspect: ModuleType, longest_first: bool) -> None:
    m_blocks, heads, batches = 4, 3, 2
    order = range(m_blocks - 1, -1, -1) if longest_first else range(m_blocks)
    expected = [(m, h, b) for m in order for b in range(batches) for h in range(heads)]
    tiles = range(len(expected))
    got = [introspect.tile_coord(m_blocks, heads, batches, t, longest_first) for t in tiles]
    assert got == expected


def test_varlen_tiles(introspect: ModuleType) -> None:
    rng = random.Random(1)
    for _ in range(100):
        lengths = [rng.choice((0, 0, 1, 4, 5, 17, 64)) for _ in range(rng.randrange(1, 9))]
        cu_seqlens = list(itertools.accumulate(lengths, initial=0))
        tile_m, heads = rng.choice((1, 4, 16)), rng.choice((1, 3))
        tiles = introspect.varlen_num_tiles(cu_seqlens[-1], len(lengths), tile_m, heads)
        assert tiles <= (cu_seqlens[-1] // tile_m + len(lengths)) * heads
        got = [introspect.varlen_tile_coord(cu_seqlens, tile_m, heads, t) for t in range(tiles)]
        expected = [
            (m, head, batch)
            for batch, length in enumerate(lengths)
            for m in reversed(range(-(-length // tile_m)))
            for head in range(heads)
        ]
        assert [coord for coord in got if coord[0] >= 0] == expected


@pytest.mark.parametrize(("row_bytes", "bits"), [(128, 3), (64, 2), (32, 1)])
def test_swizzle_is_tmas(introspect: ModuleType, row_bytes: int, bits: int) -> None:
    for row in range(32):
        for byte in range(0, row_bytes, 4):
            address = row * row_bytes + byte
            chunk = address >> 7 & ((1 << bits) - 1)
            assert introspect.swizzle(row_bytes, row, byte) == address ^ chunk << 4


def test_swizzle_of_another_width(introspect: ModuleType) -> None:
    with pytest.raises(ValueError, match="expected 32, 64 or 128"):
        introspect.swizzle(256, 0, 0)


def test_accumulators_tile_the_output(introspect: ModuleType) -> None:
    coords = {introspect.accum_coord(lane, reg) for lane in range(32) for reg in range(32)}
    assert coords == set(itertools.product(range(16), range(64)))
    group = {introspect.wgmma_accum_coord(t, reg) for t in range(128) for reg in range(8)}
    assert group == set(itertools.product(range(64), range(16)))
    for thread, reg in itertools.product(range(128), range(8)):
        row, col = introspect.wgmma_accum_coord(thread, reg)
        assert introspect.wgmma_accum_slot(row, col) == (thread, reg)
        assert introspect.accum_slot(row % 16, col) == (thread % 32, reg)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_pairs(introspect: ModuleType, interleaved: bool) -> None:
    x = torch.arange(12)
    first, second = (x[::2], x[1::2]) if interleaved else (x[:6], x[6:])
    pairs = [introspect.rotary_pair(i, 12, interleaved) for i in range(6)]
    assert pairs == list(zip(first.tolist(), second.tolist(), strict=True))


def test_page_slot(introspect: ModuleType) -> None:
    pages = [7, 3, 11]
    for page_size in (1, 3, 16):
        for token in range(3 * page_size):
            expected = (pages[token // page_size], token % page_size)
            assert introspect.page_slot(pages, page_size, token) == expected
    with pytest.raises(ValueError, match="outside the pages"):
        introspect.page_slot(pages, 4, 12)


def philox4x32_7(counter: list[int], key: list[int]) -> tuple[int, ...]:
    """Random123's definition in unbounded integers."""
    counter, key = list(counter), list(key)
    for _ in range(7):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            b >> 32 ^ counter[1] ^ key[0],
            b & 0xFFFFFFFF,
            a >> 32 ^ counter[3] ^ key[1],
            a & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return tuple(counter)


def dropout_byte(seed: int, offset: int, batch_head: int, row: int, col: int) -> int:
    """The definition of _philox.py's docstring for one element."""
    key = [seed % 2**32, seed >> 32 ^ offset >> 32]
    lane = row % 8 * 4 + col % 8 // 2
    words = philox4x32_7([row // 16, col // 32 * 32 + lane, batch_head, offset % 2**32], key)
    index = col % 32 // 8 * 4 + row % 16 // 8 * 2 + col % 2
    return words[index // 4] >> 8 * (index % 4) & 0xFF


def test_philox(introspect: ModuleType) -> None:
    rng = random.Random(2)
    for _ in range(200):
        counter = [rng.getrandbits(32) for _ in range(4)]
        key = [rng.getrandbits(32) for _ in range(2)]
        assert introspect.philox(counter, key) == philox4x32_7(counter, key)


def test_dropout_byte(introspect: ModuleType) -> None:
    rng = random.Random(3)
    for _ in range(500):
        seed, offset = rng.getrandbits(64), rng.getrandbits(64)
        where = (rng.randrange(2**20), rng.randrange(100000), rng.randrange(100000))
        assert introspect.dropout_byte(seed, offset, *where) == dropout_byte(seed, offset, *where)


def test_keep_threshold(introspect: ModuleType) -> None:
    for p in (0.0, 1e-9, 0.001, 0.1, 0.17, 1 / 512, 3 / 512, 0.25, 0.5, 0.9, 0.998, 1 - 1e-12):
        exact = (1 - Fraction(p)) * 256 + Fraction(1, 2)
        assert introspect.keep_threshold(p) == min(256, max(1, exact.__floor__()))
        assert introspect.keep_threshold(p) == _philox.keep_threshold(p)


@pytest.mark.parametrize(("seed", "offset"), [(1, 2), (2**63 - 1, 2**62 + 12345), (0, 0)])
def test_torch_backend_draws_the_same_mask(introspect: ModuleType, seed: int, offset: int) -> None:
    rows, cols, batch, head, num_heads_q, p = range(9, 40), range(50, 120), 1, 2, 3, 0.3
    kept = _philox.keep_mask(
        torch.tensor([seed, offset]),
        torch.tensor(batch),
        torch.tensor(head),
        rows,
        cols,
        num_heads_q,
        p,
    )
    threshold = introspect.keep_threshold(p)
    batch_head = batch * num_heads_q + head
    expected = [
        [introspect.dropout_byte(seed, offset, batch_head, r, c) < threshold for c in cols]
        for r in rows
    ]
    assert torch.equal(kept, torch.tensor(expected))


LIMITS = {"sm80": 163, "sm89": 99, "sm90": 227}  # KB


@pytest.mark.parametrize("arch", LIMITS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("bordered", [False, True])
def test_tile_configs(introspect: ModuleType, arch: str, head_dim: int, bordered: bool) -> None:
    assert introspect.max_smem_bytes(arch) == LIMITS[arch] * 1024
    bwd = introspect.bwd_tile_config(arch, head_dim)
    kept = (1 if bwd["v_in_regs"] else 2) * bwd["tile_n"] * head_dim
    streamed = (bwd["num_q_stages"] + bwd["num_dout_stages"]) * bwd["tile_m"] * head_dim
    ds = bwd["num_ds_stages"] * bwd["tile_m"] * bwd["tile_n"]
    dq = 4 * bwd["tile_m"] * head_dim if bwd["dq_through_smem"] else 0
    if bwd["num_ctas"] == 2:  # half of the keys, 128 columns of the other half's K, dS of both
        kept = bwd["tile_n"] * head_dim + bwd["tile_n"] // 2 * 128
        streamed = bwd["tile_m"] * (bwd["num_q_stages"] * head_dim + bwd["num_dout_stages"] * 128)
    assert bwd["smem_bytes"] == 2 * (kept + streamed + ds) + dq <= LIMITS[arch] * 1024


@pytest.mark.parametrize("arch", LIMITS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_sm80_fwd_tiles(introspect: ModuleType, arch: str, head_dim: int) -> None:
    """Of SM80's kernels on a GPU with the shared memory of `arch`."""
    fwd = introspect.sm80_fwd_tile_config(arch, head_dim)
    q = fwd["num_q_stages"] * fwd["tile_m"]
    kv = 2 * fwd["num_stages"] * fwd["tile_n"]
    rows = max(q, kv) if fwd["q_in_regs"] else q + kv
    shared_p = 2 * fwd["tile_m"] * fwd["tile_n"] if fwd["warps_per_row"] == 2 else 0
    assert fwd["smem_bytes"] == 2 * head_dim * rows + shared_p <= LIMITS[arch] * 1024
    assert fwd["tile_m"] * (fwd["tile_n"] + head_dim) == fwd["accum_regs"] * fwd["num_warps"] * 32
    assert fwd["num_threads"] == fwd["num_warps"] * 32


@pytest.mark.parametrize("which", ["tall", "fine", "score_mod"])
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "built", "built_v"),
    [(64, 64, 64, 64), (65, 96, 96, 96), (128, 8, 128, 128), (64, 128, 128, 128),
     (192, 192, 192, 192), (192, 128, 192, 128), (136, 64, 192, 128), (192, 136, 192, 192),
     (256, 64, 256, 256), (1, 256, 256, 256)],
)  # fmt: skip
def test_sm90_fwd_tiles(
    introspect: ModuleType, head_dim: int, head_dim_v: int, built: int, built_v: int, which: str
) -> None:
    fwd = introspect.sm90_fwd_tile_config(head_dim, head_dim_v, which)
    columns, columns_v = (-(-size // 64) * 64 for size in (built, built_v))
    q, kv = fwd["num_q_stages"] * fwd["tile_m"], fwd["num_stages"] * fwd["tile_n"]
    bytes_used = 2 * (q * columns + kv * (columns + columns_v)) + 1024
    assert fwd["smem_bytes"] == bytes_used <= LIMITS["sm90"] * 1024
    assert fwd["tile_m"] == 16 * fwd["num_warps"]
    assert fwd["tile_m"] * (fwd["tile_n"] + built_v) == fwd["accum_regs"] * fwd["num_warps"] * 32
    assert fwd["num_threads"] == fwd["num_warps"] * 32 + 128
    if which == "score_mod":
        assert fwd["tile_n"] % 32 == 0  # keys that share random bytes


def test_every_head_dim_has_a_tile(introspect: ModuleType) -> None:
    built = [introspect.built_head_dim(d) for d in range(0, 258)]
    assert built[0] == built[257] == 0
    assert sorted(set(built[1:257])) == [64, 96, 128, 192, 256]
    assert all(size >= d for d, size in enumerate(built[1:257], 1))
    for d in (1, 80, 256):
        size = introspect.built_head_dim(d)
        for arch in LIMITS:
            same = introspect.sm80_fwd_tile_config(arch, size)
            assert introspect.sm80_fwd_tile_config(arch, d) == same
