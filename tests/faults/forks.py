"""A fork of the test's own process, which has all imports ready."""

import os
from multiprocessing import util


def fork():
    """As `os.fork`. What `multiprocessing` shares among processes begins anew in the child.

    Else a child whose parent has ever sent a tensor to a worker lets its own workers ask that parent for theirs.
    """
    pid = os.fork()
    if pid == 0:
        util._run_after_forkers()
    return pid
