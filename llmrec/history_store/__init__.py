"""Users' histories, kept on the server: in memory, in a file or in Redis, behind one interface."""

from llmrec.history_store.store import HistoryStore, open_store

__all__ = ["HistoryStore", "open_store"]
