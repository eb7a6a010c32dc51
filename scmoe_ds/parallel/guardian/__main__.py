"""The program, started by its directory. Imports this package as `guardian`: `scmoe_ds` would import torch."""

import sys
from importlib import import_module
from pathlib import Path

sys.path.append(str(Path(sys.path.pop(0)).parent))
import_module("guardian.guardian").main()
