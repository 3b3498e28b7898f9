"""A long prompt through the KV cache in chunks, then generation, with the GPT of gpt.py.

    python -m flash_attn_ext.examples.long_context --seqlen 100000 --chunk 4096

A model that takes a prompt at once holds the activations of all of its tokens. In chunks it holds
those of one chunk, beside the cache: `flash_attn_with_kvcache` appends the chunk's keys and values,
and its causal mask is aligned to the end of the cache, so that each query sees the whole prompt up
to itself. What to copy is `prefill`; the call itself stands in gpt.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from flash_attn_ext.examples.gpt import GPT, VOCAB_SIZE, GPTConfig, KVCache

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest score


@torch.no_grad()
def prefill(model: GPT, tokens: Tensor, cache: KVCache, chunk: int) -> Tensor:
    """Brings a prompt into the cache.

    Args:
        model: the model.
        tokens: int64 [batch_size, seqlen], which follow what is in the cache.
        cache: of model.new_cache(); grows by seqlen.
        chunk: tokens at a time.

    Returns:
        [batch_size, 256], scores of the byte after the last token.
    """
    for piece in torch.split(tokens, chunk, dim=1):
        scores: Tensor = model(piece, cache)[:, -1]
    return scores


@torch.no_grad()
def continue_greedily(
    model: GPT, scores: Tensor, cache: KVCache, num_tokens: int
) -> tuple[Tensor, float]:
    """The most likely bytes, one at a time: int64 [batch_size, num_tokens], and seconds for one."""
    generated = [scores.argmax(-1, keepdim=True)]
    begin = time.perf_counter()
    for _ in range(num_tokens - 1):
        generated.append(model(generated[-1], cache)[:, -1].argmax(-1, keepdim=True))
    tokens = torch.cat(generated, dim=1).cpu()  # waits for the GPU
    return tokens, (time.perf_counter() - begin) / max(1, num_tokens - 1)


def random_model(max_seqlen: int, device: str, dtype: torch.dtype) -> GPT:
    """Random weights, and not those that training starts with, which make attention vanish."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(num_layers=2, max_seqlen=max_seqlen))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.08)
    return model.to(device, dtype)


def _peak_bytes(device: str) -> int | None:
    """Most memory in use since the last call, on a GPU."""
    if torch.device(device).type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see ``--help``. 1 if chunks and the whole prompt give different scores."""
    parser = argparse.ArgumentParser(prog="long_context", description=__doc__.splitlines()[0])
    parser.add_argument("--seqlen", type=int, default=2048, help="bytes of the prompt")
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    dtype = torch.bfloat16 if torch.device(args.device).type == "cuda" else torch.float32
    model = random_model(args.seqlen + args.new_tokens, args.device, dtype)
    prompt = torch.randint(VOCAB_SIZE, (1, args.seqlen)).to(args.device)
    results = {}
    for chunk in (args.chunk, args.seqlen):
        cache = model.new_cache(1, dtype)
        _peak_bytes(args.device)
        begin = time.perf_counter()
        scores = prefill(model, prompt, cache, chunk)
        results[chunk] = scores.float().cpu()  # waits for the GPU
        seconds, peak = time.perf_counter() - begin, _peak_bytes(args.device)
        memory = "" if peak is None else f", at most {peak / 2**20:.0f} MiB"
        print(f"{args.seqlen} bytes in chunks of {chunk}: {seconds:.2f} s{memory}")
        tokens, step = continue_greedily(model, scores, cache, args.new_tokens)
        print(f"  then {args.new_tokens} bytes, {1000 * step:.1f} ms each: {tokens[0].tolist()}")
    chunked, whole = results[args.chunk], results[args.seqlen]
    difference = (chunked - whole).abs().max() / whole.abs().max()
    print(f"largest difference of the scores: {difference:.1e} of the largest one")
    return int(not difference <= TOLERANCE[dtype])


if __name__ == "__main__":
    sys.exit(main())
