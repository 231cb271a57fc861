"""Parts of any source: long tails, lists, repetitions, frames and tracks."""
