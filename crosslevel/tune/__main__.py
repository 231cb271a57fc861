"""A trial's own process; `crosslevel tune` starts it."""

import sys

from crosslevel.tune.trial import main

main(sys.argv[1:])
