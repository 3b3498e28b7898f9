"""Operations that flash-attn has in Triton; here they are CUDA kernels and PyTorch operations."""
