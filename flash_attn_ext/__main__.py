"""``python -m flash_attn_ext``: the command line, see `flash_attn_ext.cli`."""

import os
import sys

from flash_attn_ext.cli import main

if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
