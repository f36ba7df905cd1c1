"""Choosing a plan: how long ops take (latency), and what follows from it."""
