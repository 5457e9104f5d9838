"""`python -m lora_kernels --help`."""

import sys

from lora_kernels.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
