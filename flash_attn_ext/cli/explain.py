"""Say what would compute a call on a GPU that need not be here, and why nothing faster would.

  python -m flash_attn_ext explain b=2 h=32 hk=8 sq=4096 sk=4096 d=128 causal --arch sm90
  python -m flash_attn_ext explain b=64 sq=1 sk=8192 h=32 hk=8 page=16 new=1 rotary=128 --arch h100
  python -m flash_attn_ext explain --support

sizes (default):
  b (1) batch size          h (8), hk (h) heads of q, of k and v
  sq (1024), sk (sq) lengths, with a KV cache sk is the room in it
  d (128), dv (d) head dimensions of q and k, of v
options: dtype=fp16|bf16|fp32|fp64 window=LEFT,RIGHT softcap=X dropout=P splits=N
KV cache: page=SIZE new=KEYS_TO_APPEND rotary=DIM
words: causal backward varlen cache alibi deterministic interleaved
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import torch

from flash_attn_ext.cli import _output
from flash_attn_ext.plans import UNKNOWN, explain, support_table

_SIZES = ("b", "h", "hk", "sq", "sk", "d", "dv", "page", "new", "rotary", "splits")
_FLOATS = ("softcap", "dropout")
_FLAGS = ("causal", "backward", "varlen", "cache", "alibi", "deterministic", "interleaved")
_DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


def parse_words(words: Sequence[str]) -> dict[str, Any]:
    """Reads "b=2 causal window=128,0" as {"b": 2, "causal": True, "window": (128, 0)}.

    Raises:
        ValueError: a word is not understood.
    """
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        try:
            if not equals and name in _FLAGS:
                values[name] = True
            elif equals and name in _SIZES:
                values[name] = int(text)
            elif equals and name in _FLOATS:
                values[name] = float(text)
            elif equals and name == "window":
                left, _, right = text.partition(",")
                values[name] = (int(left), int(right or left))
            elif equals and name == "dtype" and text in _DTYPES:
                values[name] = _DTYPES[text]
            else:
                raise ValueError
        except ValueError:
            known = ", ".join([f"{n}=" for n in (*_SIZES, *_FLOATS, "window", "dtype")])
            raise ValueError(
                f"{word!r} is not understood; expected one of {known} or {', '.join(_FLAGS)}. "
                "See `python -m flash_attn_ext explain --help`"
            ) from None
    return values


def call_options(values: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `flash_attn_ext.explain` for the words; tensors are shapes."""
    batch_size, seqlen_q = values.get("b", 1), values.get("sq", 1024)
    seqlen_k = values.get("sk", seqlen_q)
    num_heads_q = values.get("h", 8)
    num_heads_kv = values.get("hk", num_heads_q)
    head_dim = values.get("d", 128)
    head_dim_v = values.get("dv", head_dim)
    options: dict[str, Any] = {
        "causal": values.get("causal", False),
        "window_size": values.get("window", (-1, -1)),
        "softcap": values.get("softcap", 0.0),
        "num_splits": values.get("splits", 0),
        "dtype": values.get("dtype", torch.bfloat16),
    }
    if values.get("alibi"):
        options["alibi_slopes"] = (num_heads_q,)

    cached = [name for name in ("cache", "page", "new", "rotary") if values.get(name)]
    trained = [
        name for name in ("backward", "varlen", "dropout", "deterministic") if name in values
    ]
    if cached and trained:
        raise ValueError(
            f"{cached[0]} and {trained[0]} exclude each other: attention with a KV cache has none "
            "of backward, varlen, dropout, deterministic"
        )
    if cached:
        return {**options, **_cache_options(values, batch_size, seqlen_k, num_heads_kv)} | {
            "q": (batch_size, seqlen_q, num_heads_q, head_dim)
        }
    options |= {
        "backward": values.get("backward", False),
        "dropout_p": values.get("dropout", 0.0),
        "deterministic": values.get("deterministic", False),
    }
    if values.get("varlen"):
        return options | {
            "q": (batch_size * seqlen_q, num_heads_q, head_dim),
            "k": (batch_size * seqlen_k, num_heads_kv, head_dim),
            "v": (batch_size * seqlen_k, num_heads_kv, head_dim_v),
            "cu_seqlens_q": [seqlen_q * i for i in range(batch_size + 1)],
            "cu_seqlens_k": [seqlen_k * i for i in range(batch_size + 1)],
            "max_seqlen_q": seqlen_q,
            "max_seqlen_k": seqlen_k,
        }
    return options | {
        "q": (batch_size, seqlen_q, num_heads_q, head_dim),
        "k": (batch_size, seqlen_k, num_heads_kv, head_dim),
        "v": (batch_size, seqlen_k, num_heads_kv, head_dim_v),
    }


def _cache_options(
    values: dict[str, Any], batch_size: int, seqlen_k: int, num_heads_kv: int
) -> dict[str, Any]:
    """The arguments that only attention with a KV cache has."""
    head_dim = values.get("d", 128)
    head_dim_v = values.get("dv", head_dim)
    options: dict[str, Any] = {"rotary_interleaved": values.get("interleaved", False)}
    rows: tuple[int, int] = (batch_size, seqlen_k)
    page_size = values.get("page", 0)
    if page_size:
        num_pages = -(-seqlen_k // page_size)
        rows = (batch_size * num_pages, page_size)
        options["block_table"] = (batch_size, num_pages)
    options["k_cache"] = (*rows, num_heads_kv, head_dim)
    options["v_cache"] = (*rows, num_heads_kv, head_dim_v)
    if values.get("new"):
        options["k"] = (batch_size, values["new"], num_heads_kv, head_dim)
        options["v"] = (batch_size, values["new"], num_heads_kv, head_dim_v)
    if values.get("rotary"):
        table = (seqlen_k + values.get("new", 0), values["rotary"] // 2)
        options |= {"rotary_cos": table, "rotary_sin": table}
    return options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("words", nargs="*", metavar="WORD", help="sizes and options, see above")
    parser.add_argument(
        "--arch", help="sm80, sm90, a100, h100, rtx4090, ...; default: this machine"
    )
    parser.add_argument("--support", action="store_true", help="table: which op runs where")
    _output.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the explanation; 1 if no plan can be asked for, 2 if the words make no call."""
    try:
        if args.support:
            rows = support_table()
            if args.json:
                _output.print_json(rows)
            else:
                print(_output.dict_table(rows))
            return 0
        options = call_options(parse_words(args.words))
        if args.arch is None:
            # One element shown as a tensor of the right shape: it says where, and takes no memory.
            device = "cuda" if torch.cuda.is_available() else "cpu"
            element = torch.empty((), dtype=options["dtype"], device=device)
            options["q"] = element.expand(options["q"])
        explanation = explain(arch=args.arch, **options)
    except (TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if args.json:
        _output.print_json(dataclasses.asdict(explanation))
    else:
        print(explanation)
    unknown = any(step.backend == UNKNOWN for step in explanation.steps)
    return 1 if unknown else 0
