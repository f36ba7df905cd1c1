"""`nanoflow bench`: throughput of the whole engine, and the host's work per step."""
