"""Train a small GPT on Python's library, let it write, and compare time and memory of attention.

The model is flash_attn_ext.examples.gpt: `flash_attn_func` in training, `flash_attn_with_kvcache`
in generation. It runs on a GPU if there is one (bf16, a larger model), else on the CPU. Exit code 1
if the model does not learn.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from flash_attn_ext.cli import _compare, _output
from flash_attn_ext.cli._compare import Measurement
from flash_attn_ext.examples.gpt import GPT, GPTConfig
from flash_attn_ext.examples.train_gpt import (
    TrainConfig,
    evaluate,
    read_python_library,
    sample,
    train,
)

TARGET_LOSS = 2.5  # nats per byte that a full run must reach on held-out text
PROMPT = "def main(args):\n"
PICTURE = "flash_attn_ext_demo.png"


@dataclass(frozen=True)
class Preset:
    """Sizes of one kind of run."""

    gpt: GPTConfig
    train: TrainConfig
    sample_bytes: int
    seqlens: tuple[int, ...]
    corpus_bytes: int


PRESETS = {
    "cpu": Preset(
        gpt=GPTConfig(num_layers=4, num_heads_q=4, num_heads_kv=2, head_dim=32, max_seqlen=512),
        train=TrainConfig(steps=250, batch_size=8, seqlen=256),
        sample_bytes=400,
        seqlens=(256, 512, 1024, 2048, 4096),
        corpus_bytes=8_000_000,
    ),
    "cuda": Preset(
        gpt=GPTConfig(num_layers=8, num_heads_q=8, num_heads_kv=4, head_dim=64, max_seqlen=2048),
        train=TrainConfig(steps=300, batch_size=16, seqlen=1024, learning_rate=1e-3),
        sample_bytes=600,
        seqlens=(1024, 2048, 4096, 8192, 16384),
        corpus_bytes=30_000_000,
    ),
    "quick": Preset(
        gpt=GPTConfig(num_layers=2, num_heads_q=2, num_heads_kv=1, head_dim=32, max_seqlen=128),
        train=TrainConfig(steps=20, batch_size=4, seqlen=64, learning_rate=1e-2),
        sample_bytes=32,
        seqlens=(64, 128),
        corpus_bytes=1_000_000,
    ),
}


class Progress:
    """A progress bar on stderr: tqdm's if it is installed, else a line for every tenth."""

    def __init__(self, title: str, total: int) -> None:
        """Starts at 0 of `total`."""
        self._title = title
        self._total = total
        self._done = 0
        self._bar: Any = None
        if importlib.util.find_spec("tqdm") is not None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=title, file=sys.stderr)

    def __enter__(self) -> Progress:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()

    def step(self, text: str) -> None:
        """One unit is done; `text` says what came out."""
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif self._done * 10 // self._total > (self._done - 1) * 10 // self._total:
            print(f"{self._title} {self._done}/{self._total}  {text}", file=sys.stderr, flush=True)


def compare_attention(device: str, seqlens: Sequence[int]) -> list[Measurement]:
    """Measures every provider at every length, each provider in a process of its own."""
    measurements = []
    with Progress("attention", len(_compare.PROVIDERS) * len(seqlens)) as progress:
        for provider in _compare.PROVIDERS:
            for measurement in _compare.measure_in_child(provider, device, seqlens):
                measurements.append(measurement)
                progress.step(f"{provider}, {measurement.seqlen} tokens")
    return measurements


def save_picture(
    path: Path, losses: Sequence[float], measurements: Sequence[Measurement], title: str
) -> None:
    """Draws the loss, and time and peak memory over the length.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    loss_axes, time_axes, memory_axes = figure.subplots(1, 3)
    loss_axes.plot(range(1, len(losses) + 1), losses, linewidth=1)
    loss_axes.axhline(TARGET_LOSS, linestyle=":", color="gray")
    loss_axes.set(title="training", xlabel="step", ylabel="loss, nats per byte")
    for provider in _compare.PROVIDERS:
        rows = [m for m in measurements if m.provider == provider]
        for axes, name in ((time_axes, "milliseconds"), (memory_axes, "peak_mb")):
            points = [(m.seqlen, getattr(m, name)) for m in rows if getattr(m, name)]
            axes.loglog([x for x, _ in points], [y for _, y in points], marker="o", label=provider)
    time_axes.set(title="time, forward + backward", xlabel="tokens", ylabel="ms")
    memory_axes.set(title="peak memory, forward + backward", xlabel="tokens", ylabel="MB")
    for axes in (time_axes, memory_axes):
        ticks = sorted({m.seqlen for m in measurements})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _comparison_table(measurements: Sequence[Measurement]) -> str:
    """One row a length; time and memory of every provider."""
    header = ["tokens"]
    for provider in _compare.PROVIDERS:
        header += [f"{provider} ms", "MB"]
    found = {(m.provider, m.seqlen): m for m in measurements}
    rows: list[list[object]] = []
    for seqlen in sorted({m.seqlen for m in measurements}):
        row: list[object] = [seqlen]
        for provider in _compare.PROVIDERS:
            m = found.get((provider, seqlen))
            if m is None or m.milliseconds is None or m.peak_mb is None:
                row += [None if m is None else m.error, None]
            else:
                row += [round(m.milliseconds, 2), round(m.peak_mb, 1)]
        rows.append(row)
    return _output.table(header, rows)


@dataclass(frozen=True)
class Learning:
    """How the training went; losses in nats per byte.

    Attributes:
        num_parameters: of the model.
        num_bytes: of the text it was trained on.
        losses: of every step.
        train_loss: mean of the last tenth of the steps.
        held_out_loss_before: on text that is never trained on, before the first step.
        held_out_loss: on the same text after the last step.
        tokens_per_second: over all steps.
    """

    num_parameters: int
    num_bytes: int
    losses: list[float]
    train_loss: float
    held_out_loss_before: float
    held_out_loss: float
    tokens_per_second: float


def _learn(preset: Preset, config: TrainConfig, device: str) -> tuple[GPT, Learning]:
    """Trains a new model."""
    corpus = read_python_library(preset.corpus_bytes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = GPT(preset.gpt).to(device)
    before = evaluate(model, corpus.held_out, config)
    losses: list[float] = []
    seconds = 0.0
    tokens_per_step = config.batch_size * config.seqlen
    with Progress("training", config.steps) as progress:
        for report in train(model, corpus.train, config):
            losses.append(report.loss)
            seconds += tokens_per_step / report.tokens_per_second
            progress.step(f"loss {report.loss:.3f}, {report.tokens_per_second:,.0f} tokens/s")
    last = losses[-max(1, len(losses) // 10) :]
    return model, Learning(
        num_parameters=sum(weight.numel() for weight in model.parameters()),
        num_bytes=corpus.train.numel(),
        losses=losses,
        train_loss=math.fsum(last) / len(last),
        held_out_loss_before=before,
        held_out_loss=evaluate(model, corpus.held_out, config),
        tokens_per_second=config.steps * tokens_per_step / seconds,
    )


@contextmanager
def _fastest_threads() -> Iterator[None]:
    """Runs a block with all threads or with one, whichever is faster now.

    On a busy machine threads that wait for each other can be many times slower than one alone.
    """
    num_threads = torch.get_num_threads()
    milliseconds: dict[int, float] = {}
    for candidate in (num_threads, 1):
        torch.set_num_threads(candidate)
        trial = next(_compare.measure("flash_attn_ext", "cpu", [512]))
        milliseconds[candidate] = trial.milliseconds or math.inf
    torch.set_num_threads(min(milliseconds, key=lambda candidate: milliseconds[candidate]))
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _printable(text: str) -> str:
    """The text with control characters, which a terminal might obey, made visible."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _positive(text: str) -> int:
    """Type of an argument."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    _output.add_json_argument(parser)
    parser.add_argument("--steps", type=_positive, help="training steps (default: fits the device)")
    parser.add_argument("--seed", type=int, default=0, help="decides weights, batches and the text")
    parser.add_argument(
        "--out", type=Path, default=Path("."), metavar="DIR", help=f"folder for {PICTURE}"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for tests")


def run(args: argparse.Namespace) -> int:
    """Trains, writes, compares; 1 if the model does not learn."""
    device: str = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print(
            "--device cuda: torch sees no GPU. `python -m flash_attn_ext doctor` says why",
            file=sys.stderr,
        )
        return 1
    preset = PRESETS["quick" if args.quick else device]
    config = dataclasses.replace(preset.train, seed=args.seed)
    if args.steps is not None:
        config = dataclasses.replace(config, steps=args.steps)
    with nullcontext() if device == "cuda" else _fastest_threads():
        return _run(args, device, preset, config)


def _run(args: argparse.Namespace, device: str, preset: Preset, config: TrainConfig) -> int:
    """The parts of the demo one after the other."""
    begin = time.perf_counter()
    if device == "cuda":
        where = torch.cuda.get_device_name()
    else:
        threads = torch.get_num_threads()
        where = f"the CPU ({threads} thread{'s' if threads > 1 else ''})"

    def say(text: str) -> None:
        if not args.json:
            print(text, flush=True)

    say(f"A small GPT learns the source of Python's library, byte by byte, on {where}.")
    model, learning = _learn(preset, config, device)
    say(
        f"{learning.num_parameters:,} parameters, {learning.num_bytes:,} bytes of text, "
        f"{learning.tokens_per_second:,.0f} tokens/s.\n"
        f"Loss in nats per byte: {learning.losses[0]:.2f} at the first step, "
        f"{learning.train_loss:.2f} over the last tenth; on text it never saw "
        f"{learning.held_out_loss_before:.2f} before and {learning.held_out_loss:.2f} after."
    )
    text, sample_speed = sample(model, PROMPT, preset.sample_bytes, args.seed)
    say(f"\nIt writes, {sample_speed:.0f} bytes/s through the KV cache:\n")
    say(textwrap.indent(_printable(PROMPT + text), "    "))

    shape = _compare.SHAPES[device]
    say(
        f"\nCausal attention alone, forward and backward, {shape.num_heads} heads of "
        f"{shape.head_dim}, {str(shape.dtype).removeprefix('torch.')}, on {where}:"
    )
    measurements = compare_attention(device, preset.seqlens)
    say(f"\n{_comparison_table(measurements)}\nMB: {_compare.PEAK_MEANING[device]}.")

    picture: Path | None = None
    try:
        path: Path = args.out / PICTURE
        save_picture(path, learning.losses, measurements, f"flash_attn_ext on {where}")
        picture = path
        say(f"\nPicture: {picture}")
    except ImportError:
        say("\nNo picture: matplotlib is not installed. Fix: pip install matplotlib")

    learned = learning.held_out_loss < learning.held_out_loss_before
    if args.steps is None and not args.quick:
        learned = max(learning.train_loss, learning.held_out_loss) < TARGET_LOSS
    seconds = time.perf_counter() - begin
    say(f"{seconds:.0f} seconds in all.")
    if args.json:
        _output.print_json(
            {
                "device": where,
                "learned": learned,
                **dataclasses.asdict(learning),
                "sample": PROMPT + text,
                "sample_bytes_per_second": sample_speed,
                "comparison": measurements,
                "peak_mb": _compare.PEAK_MEANING[device],
                "picture": picture,
                "seconds": seconds,
            }
        )
    if not learned:
        print(
            f"The model did not learn: loss {learning.held_out_loss:.2f} after "
            f"{learning.held_out_loss_before:.2f}. "
            "`python -m flash_attn_ext selftest` shows whether an op is wrong.",
            file=sys.stderr,
        )
    return 0 if learned else 1
