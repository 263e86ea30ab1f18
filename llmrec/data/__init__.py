"""Interactions and items in, splits out; nothing here knows models or tokens."""

from llmrec.data.columns import ITEM, POSITION, TIMESTAMP, TITLE, USER, ColumnNames
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.protocols import by_sample, cold_users, global_temporal, leave_one_out
from llmrec.data.sample import make_sample
from llmrec.data.split import Split

__all__ = [
    "ITEM",
    "POSITION",
    "TIMESTAMP",
    "TITLE",
    "USER",
    "ColumnNames",
    "Interactions",
    "Items",
    "Split",
    "by_sample",
    "cold_users",
    "global_temporal",
    "leave_one_out",
    "make_sample",
]
