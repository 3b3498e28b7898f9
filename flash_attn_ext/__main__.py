"""``python -m flash_attn_ext``: the command line, see `flash_attn_ext.cli`."""

import sys

from flash_attn_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
