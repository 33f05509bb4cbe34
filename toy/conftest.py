"""Lets the tests of toy/ share what those of diffusion_dpo.py make."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_diffusion_dpo import tiny  # noqa: E402, F401
