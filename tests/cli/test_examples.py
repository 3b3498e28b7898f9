"""The example model and its training script."""

from __future__ import annotations

import runpy
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from helpers import NEEDS_CUDA, max_error, require

from flash_attn_ext.examples import gpt, train_gpt
from flash_attn_ext.examples.gpt import GPT, GPTConfig
from flash_attn_ext.examples.train_gpt import TrainConfig

TINY = GPTConfig(num_layers=2, num_heads_q=2, num_heads_kv=1, head_dim=32, max_seqlen=48)


def tiny_gpt(attention: str = "flash") -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**vars(TINY), "attention": attention})).double()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)  # the zero initialisation would hide mistakes
    return model


def test_flash_and_plain_attention_give_the_same_loss_and_gradients() -> None:
    tokens = torch.randint(256, (2, 40))
    gradients = []
    losses = []
    for attention in ("flash", "plain"):
        model = tiny_gpt(attention)
        loss = model.loss(tokens)
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert max_error(*losses) < 1e-6  # the loss itself is computed in fp32
    for flash, plain in zip(*gradients, strict=True):
        assert max_error(flash, plain) < 1e-6


def test_the_cache_gives_what_the_whole_sequence_gives() -> None:
    model = tiny_gpt()
    tokens = torch.randint(256, (3, 20))
    cache = model.new_cache(3, torch.float64)
    with torch.no_grad():
        expected = model(tokens)
        pieces = [model(piece, cache) for piece in (tokens[:, :9], tokens[:, 9:10], tokens[:, 10:])]
    assert max_error(torch.cat(pieces, dim=1), expected) < 1e-10
    assert cache.seqlens.tolist() == [20, 20, 20]


def test_generation_takes_the_most_likely_byte_at_temperature_0() -> None:
    model = tiny_gpt()
    tokens = prompt = torch.randint(256, (2, 5))
    generated = torch.cat(list(model.generate(prompt, 6, temperature=0)), dim=1)
    for _ in range(6):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, tokens[:, 5:])


def test_generation_is_reproducible() -> None:
    model = tiny_gpt()
    prompt = torch.randint(256, (1, 5))
    texts = [
        torch.cat(list(model.generate(prompt, 8, generator=torch.Generator().manual_seed(seed))))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


@pytest.mark.gpu
def test_generation_with_a_cuda_graph_writes_the_same() -> None:
    require(NEEDS_CUDA)
    model = tiny_gpt().to("cuda", torch.float16)
    prompt = torch.randint(256, (2, 5), device="cuda")
    with_graph, without = (
        torch.cat(list(model.generate(prompt, 30, temperature=0, cuda_graph=graph)), dim=1)
        for graph in (True, False)
    )
    assert torch.equal(with_graph, without)


def test_generation_beyond_the_longest_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="need 49 positions; the model has max_seqlen=48"):
        list(tiny_gpt().generate(torch.zeros(1, 9, dtype=torch.int64), 40))


def test_an_unknown_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="'fast'; expected 'flash' or 'plain'"):
        GPT(GPTConfig(attention="fast"))


def test_a_new_model_knows_nothing() -> None:
    torch.manual_seed(0)
    loss = GPT(TINY).loss(torch.randint(256, (4, 33)))
    assert loss.item() == pytest.approx(5.545, abs=0.05)  # log(256)


def test_plain_attention_is_causal() -> None:
    q, k, v = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 8)
    out = gpt.plain_attention(q, k, v)
    k[:, 3:] += 1
    v[:, 3:] += 1
    assert max_error(gpt.plain_attention(q, k, v)[:, :3], out[:, :3]) == 0
    assert max_error(out[:, 0], v[:, 0].repeat_interleave(2, dim=1)) < 1e-6


def test_the_library_is_read_in_one_order_and_split() -> None:
    first, second = (train_gpt.read_python_library(600_000) for _ in range(2))
    assert torch.equal(first.train, second.train)
    assert torch.equal(first.held_out, second.held_out)
    assert first.train.numel() + first.held_out.numel() >= 600_000
    assert 0 < first.held_out.numel() < first.train.numel()
    assert b"\n" in bytes(first.train[:5000].tolist())


def test_a_python_without_sources_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"has 0 Python files.*name text files instead"):
        train_gpt.read_python_library()


def test_files_are_read_and_too_short_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(250)) * 4)
    corpus = train_gpt.read_files([path], chunk_bytes=50)
    assert corpus.held_out.numel() == 50
    assert corpus.train.numel() == 950
    with pytest.raises(ValueError, match="the files hold 1000 bytes; at least 200000"):
        train_gpt.read_files([path])


def test_a_text_shorter_than_a_sequence_is_refused() -> None:
    text = torch.zeros(20, dtype=torch.uint8)
    with pytest.raises(ValueError, match="the text has 20 bytes; a sequence needs 33"):
        next(train_gpt.train(GPT(TINY), text, TrainConfig(seqlen=32)))


def test_training_is_reproducible_and_learns() -> None:
    text = torch.tensor(list(b"abcdefgh" * 200), dtype=torch.uint8)
    config = TrainConfig(steps=12, batch_size=2, seqlen=32, learning_rate=1e-2)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = GPT(TINY)
        runs.append([report.loss for report in train_gpt.train(model, text, config)])
    assert runs[0] == runs[1]
    assert runs[0][-1] < runs[0][0] - 1
    assert train_gpt.evaluate(model, text, config) < runs[0][0] - 1


def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"to be or not to be\n" * 12_000)
    weights = tmp_path / "gpt.pt"
    words = "--steps 3 --batch-size 2 --seqlen 16 --num-layers 1 --max-seqlen 24 --device cpu"
    assert train_gpt.main([str(text), *words.split(), "--save", str(weights)]) == 0
    out = capsys.readouterr().out
    assert "228,000" not in out  # a part is held out
    assert "step     1  loss 5.5" in out
    assert "held-out loss" in out
    assert "sample" in out
    saved = torch.load(weights)
    GPT(GPTConfig(**saved["config"])).load_state_dict(saved["weights"])


def test_the_script_by_its_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(train_gpt.__file__), run_name="__main__")
    assert stopped.value.code == 0
    assert "--attention" in capsys.readouterr().out
