"""Run by .ci/run in a fresh environment that holds torch and the built wheel alone."""

import warnings

import torch

with warnings.catch_warnings():
    warnings.simplefilter("error")
    import flash_attn_ext
    from flash_attn_ext import _load

status = _load.status()
assert status.binder_loaded, status.problems
assert not status.problems, status.problems
assert set(status.arch_libraries) >= {"sm80", "sm90"}, status.arch_libraries
assert "site-packages" in str(status.package_dir), status.package_dir

q, k, v = (torch.randn(2, 5, 4, 32, dtype=torch.float64, requires_grad=True) for _ in range(3))
out = flash_attn_ext.flash_attn_func(q, k, v, causal=True)
scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 32**-0.5
mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
expected = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(mask, -torch.inf).softmax(-1), v)
torch.testing.assert_close(out, expected)
for ours, theirs in zip(
    torch.autograd.grad(out.sum(), (q, k, v)),
    torch.autograd.grad(expected.sum(), (q, k, v)),
    strict=True,
):
    torch.testing.assert_close(ours, theirs)
print(f"flash_attn_ext {flash_attn_ext.__version__} under torch {torch.__version__}: ok")
