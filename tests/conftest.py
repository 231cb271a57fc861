"""One hypothesis profile for all tests: the same examples every time, and no deadline on a busy machine.

This file's place also makes `reference` importable from every test folder.
"""

from hypothesis import settings

settings.register_profile("crosslevel", deadline=None, derandomize=True, max_examples=15, print_blob=True)
settings.load_profile("crosslevel")
