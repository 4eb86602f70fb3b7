"""``python without_metaflow.py script.py``: runs a script in a world where metaflow cannot be imported."""

import runpy
import sys
from pathlib import Path

assert "metaflow" not in sys.modules, "it has been imported already"
sys.modules["metaflow"] = None  # which makes ``import metaflow`` an ImportError
sys.argv.pop(0)
sys.path[0] = str(Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
