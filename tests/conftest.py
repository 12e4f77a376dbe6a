"""Tests see the profiles that ship, never those of whoever runs them."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Before collection: some tests are parametrised by the profiles that exist.
_HOME = tempfile.mkdtemp(prefix="clustersim-tests-")
os.environ["CLUSTERSIM_HOME"] = _HOME
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
