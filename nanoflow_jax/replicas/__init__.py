"""Replicas of a model behind one `LLM`, each in a process of Ray."""
