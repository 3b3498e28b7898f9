"""Adapters that put these kernels under other libraries; none is imported or active by itself."""
