"""Batches of requests and evaluations, unattended: files in, files out."""
