"""The entry that everyone knows; the program is scmoe_ds/programs/pretrain_gpt.py."""

import sys

from scmoe_ds.programs.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
