"""The schedule: a plan is data (`plan`), over a small op graph (`ops`), traced into one compiled step (`step`)."""
