"""Companions of attention that its users import from flash-attn: rotary embeddings."""
