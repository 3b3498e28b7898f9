"""A transformers model on these kernels: one import and one argument.

    python -m flash_attn_ext.examples.transformers_one_line               # tiny, random weights
    python -m flash_attn_ext.examples.transformers_one_line NAME_OR_PATH  # a model of yours

Compares the scores of a padded batch with those of transformers' eager attention, and generates.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch
import transformers

import flash_attn_ext  # noqa: F401  registers the name below

ATTENTION = "flash_attn_ext"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the largest score


def load(name: str | None, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The model called ``name``, or a small Llama with random weights."""
    if name is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation=ATTENTION
        )
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=ATTENTION
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see ``--help``. 1 if the scores are not those of eager attention."""
    parser = argparse.ArgumentParser(prog="transformers_one_line")
    parser.add_argument("model", nargs="?", help="default: a small Llama with random weights")
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    dtype = torch.bfloat16 if torch.device(args.device).type == "cuda" else torch.float32
    model = load(args.model, dtype).to(args.device).eval()
    tokens = torch.randint(1, 256, (2, args.seqlen)).to(args.device)
    kept = torch.ones_like(tokens)
    kept[1, : args.seqlen // 3] = 0  # the second sequence is shorter: padded on the left
    scores = {}
    for attention in (ATTENTION, "eager"):
        model.set_attn_implementation(attention)
        begin = time.perf_counter()
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=kept).logits
        scores[attention] = logits[kept.bool()].float().cpu()  # waits for the GPU
        print(f"{attention}: {1000 * (time.perf_counter() - begin):.0f} ms, first call")
    difference = (scores[ATTENTION] - scores["eager"]).abs().max() / scores["eager"].abs().max()
    print(f"largest difference of the scores: {difference:.1e} of the largest one")

    model.set_attn_implementation(ATTENTION)
    generated = model.generate(
        tokens, attention_mask=kept, max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    print(f"generated: {generated[:, args.seqlen :].tolist()}")
    return int(not difference <= TOLERANCE[dtype])


if __name__ == "__main__":
    sys.exit(main())
