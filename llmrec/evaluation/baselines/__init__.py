"""Baselines that every recommender stands beside: popularity, item-CF, EASE, Markov chains, kNN over text.

A generative model that was shown only against weak baselines proves nothing; untuned, this item-CF beats the TIGER
paper's figures on its own data. All have fit, recommend and scores; `tuning.tune` chooses their values.
"""

from llmrec.evaluation.baselines.ease import EASE
from llmrec.evaluation.baselines.item_cf import ItemCF
from llmrec.evaluation.baselines.markov import Markov
from llmrec.evaluation.baselines.popularity import Popularity
from llmrec.evaluation.baselines.text_knn import TextKNN

__all__ = ["EASE", "ItemCF", "Markov", "Popularity", "TextKNN"]
