"""Trains the GPT of gpt.py on text files; without files, on the source of Python's library.

    python -m flash_attn_ext.examples.train_gpt my_text.txt --steps 1000 --save gpt.pt

The functions are usable alone: `read_python_library`, `train`, `evaluate`, `sample`. If you copy
this file, copy gpt.py as well and import it as ``from gpt import GPT, GPTConfig``.
"""

from __future__ import annotations

import argparse
import math
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from flash_attn_ext.examples.gpt import GPT, GPTConfig

HELD_OUT_EVERY = 20  # every 20th file is kept for evaluation


@dataclass(frozen=True)
class Corpus:
    """Text as bytes.

    Attributes:
        train: uint8 [num_bytes], on the CPU.
        held_out: uint8, text that training never sees.
    """

    train: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: number of optimiser steps.
        batch_size: sequences per step.
        seqlen: predicted bytes per sequence.
        learning_rate: the highest; it rises over the first tenth of the steps, then falls to 0.
        seed: decides the batches; with the model's seed, the whole run.
    """

    steps: int = 250
    batch_size: int = 8
    seqlen: int = 256
    learning_rate: float = 3e-3
    seed: int = 0


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        step: from 1.
        loss: nats per byte, of the batch before the update.
        tokens_per_second: of this step.
    """

    step: int
    loss: float
    tokens_per_second: float


def _corpus(documents: Sequence[bytes]) -> Corpus:
    held_out = documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    train = [text for i, text in enumerate(documents, start=1) if i % HELD_OUT_EVERY]
    return Corpus(_bytes_tensor(train), _bytes_tensor(held_out))


def _bytes_tensor(documents: Sequence[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(documents)), dtype=torch.uint8)


def read_python_library(max_bytes: int = 8_000_000) -> Corpus:
    """The source code of Python's standard library: real text that is on every machine.

    Files come in the order of their paths, without tests and installed packages, so that the same
    Python gives the same text.

    Args:
        max_bytes: reading stops after the file that passes this size, but not before there are
            enough files to hold one out.

    Raises:
        FileNotFoundError: this Python has no library sources (an embedded or zipped Python).
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    documents: list[bytes] = []
    num_bytes = 0
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if num_bytes >= max_bytes and len(documents) >= HELD_OUT_EVERY:
            break
        if skipped.isdisjoint(path.relative_to(root).parts):
            documents.append(path.read_bytes())
            num_bytes += len(documents[-1])
    if len(documents) < HELD_OUT_EVERY:
        raise FileNotFoundError(
            f"{root} has {len(documents)} Python files; at least {HELD_OUT_EVERY} are needed. "
            "This Python seems to come without library sources: name text files instead"
        )
    return _corpus(documents)


def read_files(paths: Sequence[Path], chunk_bytes: int = 10_000) -> Corpus:
    """Text files, cut into chunks of which every 20th is held out.

    Raises:
        ValueError: the files are too short to hold anything out.
    """
    text = b"".join(path.read_bytes() for path in paths)
    if len(text) < HELD_OUT_EVERY * chunk_bytes:
        raise ValueError(
            f"the files hold {len(text)} bytes; at least {HELD_OUT_EVERY * chunk_bytes} are needed"
        )
    return _corpus([text[i : i + chunk_bytes] for i in range(0, len(text), chunk_bytes)])


def _windows(text: Tensor, starts: Tensor, length: int, device: torch.device) -> Tensor:
    """int64 [len(starts), length]: the bytes that begin at each start."""
    if text.numel() < length:
        raise ValueError(f"the text has {text.numel()} bytes; a sequence needs {length}")
    return text[starts[:, None] + torch.arange(length)].to(device=device, dtype=torch.int64)


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on a GPU; on a CPU everything stays fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def train(model: GPT, text: Tensor, config: TrainConfig) -> Iterator[StepReport]:
    """Trains the model in place, one optimiser step per report.

    Args:
        model: on the device to train on.
        text: uint8 [num_bytes], on the CPU.
        config: see `TrainConfig`.

    Yields:
        A report after every step.

    Raises:
        ValueError: the text is shorter than one sequence.
    """
    device = model.cos.device
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    warmup = max(1, config.steps // 10)
    last_start = max(1, text.numel() - config.seqlen)
    for step in range(1, config.steps + 1):
        begin = time.perf_counter()
        decay = max(0.0, (config.steps - step) / max(1, config.steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(step / warmup, decay)
        starts = torch.randint(last_start, (config.batch_size,), generator=generator)
        tokens = _windows(text, starts, config.seqlen + 1, device)
        with autocast(device):
            loss = model.loss(tokens)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        nats = loss.item()  # waits for the GPU, so that the time below is the step's
        seconds = time.perf_counter() - begin
        yield StepReport(step, nats, config.batch_size * config.seqlen / seconds)


@torch.no_grad()
def evaluate(model: GPT, text: Tensor, config: TrainConfig, num_batches: int = 4) -> float:
    """Mean loss, nats per byte, over evenly spaced pieces of the text."""
    device = model.cos.device
    last_start = max(0, text.numel() - config.seqlen - 1)
    starts = torch.linspace(0, last_start, num_batches * config.batch_size).long()
    with autocast(device):
        losses = [
            model.loss(_windows(text, chunk, config.seqlen + 1, device)).item()
            for chunk in starts.chunk(num_batches)
        ]
    return math.fsum(losses) / len(losses)


def sample(
    model: GPT, prompt: str, num_bytes: int, seed: int = 0, temperature: float = 0.8
) -> tuple[str, float]:
    """Continues a text through the KV cache.

    Returns:
        The continuation (bytes that are no UTF-8 are replaced), and bytes per second.
    """
    device = model.cos.device
    tokens = torch.tensor([list(prompt.encode())], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else None
    begin = time.perf_counter()
    with autocast(device):
        steps = model.generate(
            tokens, num_bytes, temperature=temperature, dtype=dtype, generator=generator
        )
        generated = torch.cat(list(steps), dim=1)[0].tolist()
    seconds = time.perf_counter() - begin
    return bytes(generated).decode(errors="replace"), num_bytes / seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see ``--help``."""
    parser = argparse.ArgumentParser(prog="train_gpt", description="Trains a small byte-level GPT.")
    parser.add_argument("files", nargs="*", type=Path, help="text; default: Python's library")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for default in (GPTConfig(), TrainConfig()):
        for name, value in asdict(default).items():
            choices = ("flash", "plain") if name == "attention" else None
            parser.add_argument(
                "--" + name.replace("_", "-"),
                type=type(value),
                default=value,
                choices=choices,
                help=f"default {value}",
            )
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the weights to FILE")
    args = parser.parse_args(argv)

    corpus = read_files(args.files) if args.files else read_python_library()
    gpt_config = GPTConfig(**{name: getattr(args, name) for name in asdict(GPTConfig())})
    train_config = TrainConfig(**{name: getattr(args, name) for name in asdict(TrainConfig())})
    torch.manual_seed(args.seed)
    model = GPT(gpt_config).to(args.device)
    num_parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{num_parameters:,} parameters, {corpus.train.numel():,} bytes of text, {args.device}")
    for report in train(model, corpus.train, train_config):
        if report.step % 10 == 0 or report.step == 1:
            print(
                f"step {report.step:5d}  loss {report.loss:.3f} nats per byte  "
                f"{report.tokens_per_second:,.0f} tokens/s",
                flush=True,
            )
    print(f"held-out loss {evaluate(model, corpus.held_out, train_config):.3f} nats per byte")
    prompt = "def "
    text, speed = sample(model, prompt, min(400, gpt_config.max_seqlen - len(prompt)), args.seed)
    print(f"--- sample, {speed:.0f} bytes/s through the KV cache ---\n{prompt}{text}")
    if args.save is not None:
        torch.save({"config": asdict(gpt_config), "weights": model.state_dict()}, args.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
