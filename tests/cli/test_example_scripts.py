"""The examples beside the GPT: each is run as its documentation says, on every device here."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import NEEDS_LIBRARY, NEEDS_TORCH_2_11, NEEDS_TRANSFORMERS, max_error, require
from torch import Tensor

from flash_attn_ext.examples import finetune_packed, long_context, sdpa_one_line, train_gpt
from flash_attn_ext.examples.gpt import GPT, GPTConfig, KVCache
from flash_attn_ext.integrations import _sdpa_ops, sdpa


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    sdpa.restore()


def random_gpt() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(num_layers=2, num_heads_q=2, num_heads_kv=1, max_seqlen=400)).double()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return model


def test_packed_sequences_do_not_see_each_other() -> None:
    model = random_gpt()
    samples = finetune_packed.make_samples(5)
    batch = finetune_packed.pack(samples, torch.device("cpu"))
    with torch.no_grad():
        packed = finetune_packed.packed_scores(model, batch)
        for i, sample in enumerate(samples):
            begin, end = batch.cu_seqlens[i : i + 2].tolist()
            text = torch.tensor([list(sample.instruction + sample.answer)[:-1]])
            assert torch.equal(text[0], batch.tokens[begin:end])
            assert max_error(packed[begin:end], model(text)[0]) < 1e-10


def test_only_the_answer_counts() -> None:
    sample = finetune_packed.Sample(b"upper: if\n", b"IF\n")
    batch = finetune_packed.pack([sample, sample], torch.device("cpu"))
    kept = batch.targets[batch.targets != finetune_packed.IGNORED]
    assert bytes(kept.tolist()) == b"IF\nIF\n"
    # A target is the token behind its place.
    assert bytes(batch.tokens[len(sample.instruction) :][:2].tolist()) == b"IF"
    assert batch.targets[len(sample.instruction) - 1] == ord("I")
    assert batch.cu_seqlens.tolist() == [0, 12, 24]


def test_finetuning(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune_packed.main(["--device", device]) == 0
    found = re.search(
        r"padded ([\d.]+) nats.*after 20 steps: ([\d.]+)", capsys.readouterr().out, re.S
    )
    assert found is not None
    before, after = (float(x) for x in found.groups())
    assert 5 < before < 6
    assert after < before - 2


def test_finetuning_starts_from_saved_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, weights = tmp_path / "text.txt", str(tmp_path / "gpt.pt")
    text.write_bytes(b"upper: for in\nFOR IN\n" * 12_000)
    words = "--steps 3 --batch-size 2 --seqlen 16 --num-layers 1 --max-seqlen 300 --device cpu"
    assert train_gpt.main([str(text), *words.split(), "--save", weights]) == 0
    assert finetune_packed.load_model(Path(weights), "cpu").config.num_layers == 1
    arguments = ["--weights", weights, "--steps", "1", "--batch-size", "2", "--device", "cpu"]
    assert finetune_packed.main(arguments) == 0
    assert "loss after 1 steps" in capsys.readouterr().out


def test_finetuning_says_if_packing_changes_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = finetune_packed.padded_loss
    monkeypatch.setattr(finetune_packed, "padded_loss", lambda *args: exact(*args) * 1.01)
    assert finetune_packed.main(["--device", "cpu", "--batch-size", "2"]) == 1


@pytest.mark.parametrize("chunk", [1, 7, 30, 64])
def test_chunks_give_what_the_whole_prompt_gives(chunk: int) -> None:
    model = random_gpt()
    tokens = torch.randint(256, (2, 30))
    cache = model.new_cache(2, torch.float64)
    scores = long_context.prefill(model, tokens, cache, chunk)
    with torch.no_grad():
        assert max_error(scores, model(tokens)[:, -1]) < 1e-10
        tokens[:, 0] += 1  # the last token does see the first one
        assert max_error(scores, model(tokens % 256)[:, -1]) > 1e-3
    assert cache.seqlens.tolist() == [30, 30]


def test_long_context(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert long_context.main(["--device", device]) == 0
    out = capsys.readouterr().out
    assert "2048 bytes in chunks of 256" in out
    assert "2048 bytes in chunks of 2048" in out


def test_long_context_says_if_chunks_change_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(model: GPT, tokens: Tensor, cache: KVCache, chunk: int) -> Tensor:
        return prefill(model, tokens[:, -chunk:], cache, chunk)

    prefill = long_context.prefill
    monkeypatch.setattr(long_context, "prefill", forgetful)
    arguments = ["--device", "cpu", "--seqlen", "40", "--chunk", "10", "--new-tokens", "2"]
    assert long_context.main(arguments) == 1


def test_sdpa_in_one_line(
    device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    require(NEEDS_TORCH_2_11)
    if device == "cuda":
        require(NEEDS_LIBRARY)
    calls = []
    for name in ("_fwd_out", "_bwd"):
        op = getattr(_sdpa_ops, name)
        monkeypatch.setattr(_sdpa_ops, name, lambda *a, n=name, op=op: (calls.append(n), op(*a))[1])
    assert sdpa_one_line.main(["--device", device]) == 0
    assert calls == ["_fwd_out", "_bwd"]
    assert not sdpa.is_active()
    assert "largest differences" in capsys.readouterr().out


def test_sdpa_in_one_line_says_if_results_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    require(NEEDS_TORCH_2_11)
    exact = sdpa_one_line.output_and_gradient
    monkeypatch.setattr(
        sdpa_one_line,
        "output_and_gradient",
        lambda *args: tuple(x * (1.01 if sdpa.is_active() else 1) for x in exact(*args)),
    )
    assert sdpa_one_line.main(["--device", "cpu", "--seqlen", "16"]) == 1


def test_transformers_in_one_line(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    require(NEEDS_TRANSFORMERS)
    example = importlib.import_module("flash_attn_ext.examples.transformers_one_line")
    assert example.main(["--device", device]) == 0
    out = capsys.readouterr().out
    assert "flash_attn_ext: " in out
    assert "generated: [[" in out


def test_transformers_in_one_line_with_a_model_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    require(NEEDS_TRANSFORMERS)
    example = importlib.import_module("flash_attn_ext.examples.transformers_one_line")
    example.load(None, torch.float32).save_pretrained(tmp_path)
    assert example.main([str(tmp_path), "--device", "cpu", "--seqlen", "12"]) == 0
    # No computation in another order meets this.
    monkeypatch.setitem(example.TOLERANCE, torch.float32, 0.0)
    assert example.main([str(tmp_path), "--device", "cpu", "--seqlen", "12"]) == 1
    assert capsys.readouterr().out.count("generated: [[") == 2
