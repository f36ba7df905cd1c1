"""Batch files and evaluations: many prompts in, durable results and scores out, unattended.

records    one line of a batch file: parsed strictly, or a Problem that names the field
forms      the form that an output must have
lines      reading lines of any length in bounded memory; which are done; ids seen before
response   a request's output in the OpenAI batch format
journal    append-only results that survive a kill at any moment, behind a manifest
manifest   what a run is: model, settings, input; a changed one is not continued
windows    order of the requests: sorted in windows, longest first
batch      `run_batch`: a file through an LLM;  answer: records through an LLM
tasks      what is asked and how an answer is judged;  metrics, prompts, run_task
lm_eval    the model "nanoflow" of lm-evaluation-harness
report     tables, JSON, pictures, and the comparison of two runs
"""
