"""Files, processes, the terminal and the machine: nothing here knows of models."""
