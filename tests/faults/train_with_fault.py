"""train.py with the environment's fault waiting in it; see `fault.py`. Its arguments are train.py's."""

import runpy
from pathlib import Path

from tests.faults.fault import arm

arm()
runpy.run_path(str(Path(__file__).parents[2] / "train.py"), run_name="__main__")
