"""Examples to copy from; each is a module to read and a command to run.

gpt.py                     a small GPT: flash_attn_func, flash_attn_with_kvcache
train_gpt.py               trains it
finetune_packed.py         fine-tunes it on packed sequences: flash_attn_varlen_func
long_context.py            a long prompt in chunks through its cache
transformers_one_line.py   a transformers model
sdpa_one_line.py           a model on PyTorch's scaled_dot_product_attention
"""
