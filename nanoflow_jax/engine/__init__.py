"""The engine: requests in, tokens out. Scheduling and pages are plain Python and NumPy; the device runs compiled
steps."""
