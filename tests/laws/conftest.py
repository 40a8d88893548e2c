"""The laws share `engine_kit` with the tests of the engine's rooms, one folder up."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
