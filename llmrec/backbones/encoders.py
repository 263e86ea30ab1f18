"""All sequence encoders by their names in config.json."""


def register_encoders() -> None:
    """Makes AutoConfig and AutoModel know every sequence encoder of llmrec; may be called again."""
    from llmrec.backbones import bert4rec, causal_body, gru4rec, hstu, reasoning, sasrec

    for module in (bert4rec, causal_body, gru4rec, hstu, reasoning, sasrec):
        module.register()
