"""Operations around attention that users of flash-attn import, in PyTorch operations."""
