"""Examples to copy from: a small GPT (gpt.py) and the script that trains it (train_gpt.py)."""
