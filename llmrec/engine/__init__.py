"""The vLLM plugin: the whole catalog-constrained beam search inside one engine step, and what starts a server.

Nothing of vLLM is patched. A pooling model wraps the ordinary causal LM; when a prompt's prefill is done, its pooler
runs the search through the model's own layers, reading the prompt's keys and values from vLLM's paged cache. `http`
gives vLLM's own HTTP server the routes of `llmrec.service`.
"""
