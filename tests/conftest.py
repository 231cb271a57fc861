"""What all tests share: one hypothesis profile, with the same examples every time and no deadline on a busy
machine, and one thread, because on tensors this small threads wait for each other longer than they work.

This file's place also makes `reference` importable from every test folder.
"""

import torch
from hypothesis import settings

settings.register_profile("crosslevel", deadline=None, derandomize=True, max_examples=15, print_blob=True)
settings.load_profile("crosslevel")
torch.set_num_threads(1)
