"""Fine-tunes the GPT of gpt.py on instructions of very different lengths, packed without padding.

    python -m flash_attn_ext.examples.train_gpt --save gpt.pt
    python -m flash_attn_ext.examples.finetune_packed --weights gpt.pt

A batch is one row of tokens. ``cu_seqlens`` says where each sequence begins, ``apply_rotary_emb``
counts positions from there, and ``flash_attn_varlen_func`` lets no sequence see another. Only the
answers count in the loss. What to copy is `pack` and `packed_scores`.
"""

from __future__ import annotations

import argparse
import keyword
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn_ext import flash_attn_varlen_func
from flash_attn_ext.examples.gpt import GPT, Block, GPTConfig
from flash_attn_ext.examples.train_gpt import autocast
from flash_attn_ext.layers.rotary import apply_rotary_emb

IGNORED = -100  # target of a token that does not count in the loss
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the loss, packed against padded


@dataclass(frozen=True)
class Sample:
    """What the model is told, and what it shall say."""

    instruction: bytes
    answer: bytes


@dataclass(frozen=True)
class PackedBatch:
    """Sequences one after the other.

    Attributes:
        tokens: int64 [total].
        targets: int64 [total], the token to predict at each position, or IGNORED.
        cu_seqlens: int32 [batch_size + 1], where each sequence begins, and the end of the last one.
        max_seqlen: the longest sequence.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


def make_samples(num_samples: int, seed: int = 0, max_words: int = 16) -> list[Sample]:
    """Lines of words, which the model shall repeat in capitals."""
    choice = random.Random(seed)
    samples = []
    for _ in range(num_samples):
        words = " ".join(choice.choices(keyword.kwlist, k=choice.randint(1, max_words)))
        samples.append(Sample(f"upper: {words}\n".encode(), f"{words.upper()}\n".encode()))
    return samples


def targets_of(sample: Sample) -> list[int]:
    """The answer, at the positions that predict it."""
    return [IGNORED] * (len(sample.instruction) - 1) + list(sample.answer)


def pack(samples: Sequence[Sample], device: torch.device) -> PackedBatch:
    """One row of all samples; the last token of a sample predicts nothing and is left out."""
    sequences = [list(sample.instruction + sample.answer)[:-1] for sample in samples]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return PackedBatch(
        torch.tensor([token for sequence in sequences for token in sequence], device=device),
        torch.tensor([token for x in samples for token in targets_of(x)], device=device),
        F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32),
        int(lengths.max()),
    )


def packed_scores(model: GPT, batch: PackedBatch) -> Tensor:
    """What ``model(tokens)`` gives for each sequence alone.

    Returns:
        [total, 256], unnormalised.
    """
    ends = (batch.cu_seqlens, batch.max_seqlen)
    x = model.embedding(batch.tokens)
    for block in cast("Sequence[Block]", model.blocks):
        attention = block.attention
        qkv = attention.qkv(block.norm_attention(x)).unflatten(-1, (-1, attention.head_dim))
        q, k, v = qkv.split(attention.heads, dim=1)
        cos, sin = model.cos.to(q.dtype), model.sin.to(q.dtype)
        q = apply_rotary_emb(q, cos, sin, cu_seqlens=ends[0], max_seqlen=ends[1])
        k = apply_rotary_emb(k, cos, sin, cu_seqlens=ends[0], max_seqlen=ends[1])
        out = flash_attn_varlen_func(q, k, v, ends[0], ends[0], ends[1], ends[1], causal=True)
        x = x + attention.proj(out.flatten(1))
        x = x + block.mlp(x)
    scores: Tensor = model.head(model.norm(x))
    return scores


def packed_loss(model: GPT, batch: PackedBatch) -> Tensor:
    """Mean cross entropy of the answers, nats per byte."""
    return F.cross_entropy(packed_scores(model, batch).float(), batch.targets, ignore_index=IGNORED)


def padded_loss(model: GPT, samples: Sequence[Sample], device: torch.device) -> Tensor:
    """The same as packed_loss, with every sequence padded to the longest one."""
    longest = max(len(x.instruction + x.answer) for x in samples) - 1
    tokens = torch.zeros(len(samples), longest, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORED)
    for row, sample in enumerate(samples):
        sequence, wanted = list(sample.instruction + sample.answer)[:-1], targets_of(sample)
        tokens[row, : len(sequence)] = torch.tensor(sequence)
        targets[row, : len(wanted)] = torch.tensor(wanted)
    scores = model(tokens.to(device)).float().flatten(0, 1)
    return F.cross_entropy(scores, targets.to(device).flatten(), ignore_index=IGNORED)


def finetune(
    model: GPT, samples: Sequence[Sample], steps: int, batch_size: int, learning_rate: float
) -> Iterator[float]:
    """Trains the model in place; yields the loss of each step's batch before the update."""
    device = model.cos.device
    choice = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for _ in range(steps):
        batch = pack(choice.sample(list(samples), batch_size), device)
        with autocast(device):
            loss = packed_loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield loss.item()


def load_model(weights: Path | None, device: str) -> GPT:
    """The model that train_gpt saved; without a file, one that knows nothing."""
    torch.manual_seed(0)
    if weights is None:
        return GPT(GPTConfig(num_layers=2)).to(device)
    saved = torch.load(weights, map_location="cpu")
    model = GPT(GPTConfig(**saved["config"]))
    model.load_state_dict(saved["weights"])
    return model.to(device)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see ``--help``. 1 if packed and padded sequences give different losses."""
    parser = argparse.ArgumentParser(prog="finetune_packed", description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="of train_gpt --save; default: none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    args = parser.parse_args(argv)

    device = torch.device(args.device)
    model = load_model(args.weights, args.device)
    samples = make_samples(512)
    some = samples[: args.batch_size]
    batch = pack(some, device)
    with torch.no_grad(), autocast(device):
        packed, padded = packed_loss(model, batch), padded_loss(model, some, device)
    tokens, places = batch.tokens.numel(), len(some) * batch.max_seqlen
    print(f"{len(some)} sequences: {tokens} tokens packed, {places} places padded")
    print(f"loss before: packed {packed.item():.4f}, padded {padded.item():.4f} nats per byte")
    computes_in = torch.float32 if device.type == "cpu" else torch.bfloat16
    if abs(packed.item() - padded.item()) > TOLERANCE[computes_in] * padded.item():
        print("packed and padded sequences give different losses", file=sys.stderr)
        return 1
    begin = time.perf_counter()
    losses = list(finetune(model, samples, args.steps, args.batch_size, args.learning_rate))
    seconds = time.perf_counter() - begin
    print(f"loss after {args.steps} steps: {losses[-1]:.4f}, {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
