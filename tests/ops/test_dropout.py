"""The dropout mask: known answers, its definition, its statistics."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, op
from helpers import rng_state

from flash_attn_ext._philox import keep_mask, keep_threshold, philox
from flash_attn_ext.backends import _problem

WORD = 0xFFFFFFFF

# Random123, kat_vectors, philox4x32 7.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((WORD,) * 4, (WORD,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...], device: str
) -> None:
    words = philox(
        tuple(torch.tensor(c, device=device) for c in counter),
        tuple(torch.tensor(k, device=device) for k in key),
    )
    assert tuple(int(w) for w in words) == expected


@pytest.mark.parametrize(
    ("dropout_p", "threshold"),
    [
        (0.0, 256),
        (0.001, 256),
        (1 / 512, 256),  # 255.5 rounds up
        (0.1, 230),
        (0.5, 128),
        (0.9, 26),
        (0.999, 1),
        (0.9999, 1),
    ],
)
def test_keep_threshold(dropout_p: float, threshold: int) -> None:
    assert keep_threshold(dropout_p) == threshold


def _random_byte(seed: int, offset: int, batch_head: int, row: int, col: int) -> int:
    """The definition, element by element, in Python integers."""
    r, c = row % 16, col % 32
    lane = (r % 8) * 4 + (c % 8) // 2
    counter = [row // 16, col // 32 * 32 + lane, batch_head, offset & WORD]
    key = [seed & WORD, (seed >> 32) ^ (offset >> 32)]
    for _ in range(7):
        product0, product1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (product1 >> 32) ^ counter[1] ^ key[0],
            product1 & WORD,
            (product0 >> 32) ^ counter[3] ^ key[1],
            product0 & WORD,
        ]
        key = [(key[0] + 0x9E3779B9) & WORD, (key[1] + 0xBB67AE85) & WORD]
    byte = (c // 8) * 4 + (r // 8) * 2 + c % 2
    return counter[byte // 4] >> (8 * (byte % 4)) & 0xFF


@pytest.mark.parametrize("seed", [0, 1234, 2**40 + 3, -5])
@pytest.mark.parametrize("offset", [0, 2**35 + 1])
def test_mask_is_the_definition(seed: int, offset: int, device: str) -> None:
    rows, cols = range(13, 35), range(29, 70)
    batch, head = torch.tensor([[0], [3]], device=device), torch.tensor([1, 2], device=device)
    kept = keep_mask(rng_state(seed, offset, device), batch, head, rows, cols, 5, 0.4)
    assert kept.shape == (2, 2, 22, 41)
    for b, h, row, col in [(0, 0, 13, 29), (1, 1, 34, 69), (1, 0, 16, 32), (0, 1, 31, 63)]:
        batch_head = int(batch[b, 0]) * 5 + int(head[h])
        for i in range(min(4, rows.stop - row)):
            byte = _random_byte(seed % 2**64, offset, batch_head, row + i, col)
            assert bool(kept[b, h, row + i - rows.start, col - cols.start]) == (byte < 154)


def test_mask_does_not_depend_on_the_tile(device: str) -> None:
    rng = rng_state(device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    whole = keep_mask(rng, zero, zero, range(100), range(200), 1, 0.3)
    part = keep_mask(rng, zero, zero, range(37, 61), range(5, 166), 1, 0.3)
    assert torch.equal(part, whole[37:61, 5:166])
    assert keep_mask(rng, zero, zero, range(4, 4), range(9), 1, 0.3).shape == (0, 9)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_share_of_kept_elements(dropout_p: float, device: str) -> None:
    """Within 5 standard deviations, over all elements and for each place in a block of 16 x 32."""
    batch, head = torch.arange(4, device=device)[:, None], torch.arange(4, device=device)
    kept = keep_mask(
        rng_state(99, 0, device), batch, head, range(256), range(512), 4, dropout_p
    ).double()
    p = keep_threshold(dropout_p) / 256
    sigma = (p * (1 - p)) ** 0.5
    assert abs(kept.mean().item() - p) < 5 * sigma / kept.numel() ** 0.5
    places = kept.view(16, 16, 16, 16, 32).mean((0, 1, 3))
    samples = kept.numel() / places.numel()
    assert (places - p).abs().max().item() < 5 * sigma / samples**0.5


def test_masks_are_independent(device: str) -> None:
    """Other heads, sequences, seeds and offsets give masks without correlation."""
    index = torch.arange(2, device=device)

    def draw(seed: int, offset: int) -> torch.Tensor:
        rng = rng_state(seed, offset, device)
        return keep_mask(rng, index[:, None], index, range(128), range(256), 2, 0.5).flatten(2)

    masks = torch.cat([draw(s, o).flatten(0, 1) for s, o in [(1, 0), (2, 0), (1, 1), (1, 2**33)]])
    signs = masks.double() * 2 - 1
    correlation = signs @ signs.T / signs.shape[1]
    off_diagonal = correlation - torch.eye(len(signs), device=device)
    assert off_diagonal.abs().max().item() < 5 / signs.shape[1] ** 0.5


def test_result_does_not_depend_on_tile_sizes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(seqlen_q=90, seqlen_k=150, dropout_p=0.25, window=(-1, 0))
    q, k, v = (x.detach() for x in case.inputs(device))
    results = []
    for tile_m, tile_n in [(512, 4096), (16, 32), (13, 57)]:
        monkeypatch.setattr(_problem, "_MAX_TILE_M", tile_m)
        monkeypatch.setattr(_problem, "_MAX_TILE_N", tile_n)
        out, lse, _ = op("fwd")(q, k, v, *case.options(device), False, 0, 0)
        grads = op("bwd")(out, q, k, v, out, lse, None, *case.options(device), True, 0)
        results.append((out, *grads))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert (a - b).abs().max().item() < 1e-12


def test_expectation_is_unbiased(device: str) -> None:
    """The mean over seeds goes to the result without dropout, also where p is not n / 256."""
    case = Case(batch_size=1, seqlen_q=8, seqlen_k=64, dropout_p=0.1, dtype=torch.float32)
    q, k, _ = (x.detach() for x in case.inputs(device))
    v = torch.ones(1, 64, 2, 24, device=device)
    options = case.options(device)
    outs = [
        op("fwd")(q, k, v, options[0], rng_state(seed, 0, device), *options[2:], False, 0, 0)[0]
        for seed in range(300)
    ]
    samples = torch.stack(outs)[..., 0].double()
    error = (samples.mean(0) - 1).abs()
    assert (error < 5 * samples.std(0) / len(outs) ** 0.5).all()
    assert abs(samples.mean().item() - 1) < 2e-3


def test_no_dropout_at_threshold_256(device: str) -> None:
    q, k, v = (x.detach() for x in Case().inputs(device))
    scores = (0.25, -1, -1, 0.0)
    without = op("fwd")(q, k, v, None, None, *scores, 0.0, False, 0, 0)
    with_rng = op("fwd")(q, k, v, None, rng_state(device=device), *scores, 0.001, False, 0, 0)
    assert torch.equal(without[0], with_rng[0])
