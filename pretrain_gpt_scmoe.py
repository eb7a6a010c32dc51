"""The entry that everyone knows; the program is scmoe_ds/programs/pretrain_gpt.py."""

import sys

from scmoe_ds.programs.pretrain_gpt import main

if __name__ == "__main__":
    sys.exit(main())
