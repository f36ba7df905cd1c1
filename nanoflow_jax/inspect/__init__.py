"""The inspector: compile a step for GPUs that are not there, read the scheduled program, say what overlaps and
what is wrong.

gpu_target (figures → compile-only mesh) → compiled (text, kept) → hlo (text → Module) → costs (each instruction) →
overlap (timeline) → findings → report. Start at `report.inspect_compiled`.
"""
