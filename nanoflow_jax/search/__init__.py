"""Choosing a plan: what one gives on a workload (`simulate`, `predict`), and the best of all (`search`)."""
