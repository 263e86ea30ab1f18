"""The HTTP service: requests to searches, answers to items, within limits; knows engines by their interface alone.

`llmrec.engine` gives it vLLM's engine, `llmrec.service.transformers_engine` one of transformers; both search alike.
"""
