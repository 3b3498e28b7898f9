"""Modules of flash-attn."""
