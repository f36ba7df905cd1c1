"""Ops played in time: a plan's jobs, or a compiled program's instructions. One clock for both, sums and pictures."""
