"""A trial's own process; `crosslevel tune` starts it."""

from __future__ import annotations

import sys

from crosslevel.tuning.trial import main

main(sys.argv[1:])
