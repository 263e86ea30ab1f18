"""The typed client of a llmrec server, for threads (`Client`) and for asyncio (`AsyncClient`); needs no torch."""

from llmrec.client.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]
