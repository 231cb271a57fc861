"""The memories of methods between steps: a bank of instances, a queue of keys, a moving average of a network."""

from crosslevel.methods.memory.average import FORMER_EMA, MomentumCopy, rising
from crosslevel.methods.memory.bank import InstanceBank, ShardedBank
from crosslevel.methods.memory.queue import KeyQueue

__all__ = ["FORMER_EMA", "InstanceBank", "KeyQueue", "MomentumCopy", "ShardedBank", "rising"]
