"""Tasks: what a language model is taught beside the next item, and the mixture of their training rows.

A task says what its cases are and what the answer is; a template under `prompts/tasks/` says how it is asked.
"""
