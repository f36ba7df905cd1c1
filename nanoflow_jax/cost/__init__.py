"""What ops cost on a GPU, and what a step and a workload ask of them."""
