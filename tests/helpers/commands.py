"""The console command of this environment, as a user calls it."""

import sys
from pathlib import Path

MERGE_CALLBACK = str(Path(sys.executable).with_name("merge-callback"))
