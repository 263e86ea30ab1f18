"""`llmrec recommend` for prompts that show what was done when."""

import json

import pytest
from factories import random_recommender

from llmrec.cli.recommend import recommend
from llmrec.exceptions import RequestError
from llmrec.prompt import Prompt
from llmrec.recommender import Recommender

TIMELINE = Prompt("{% for i in history %}{{ i.gap or '?' }} {{ i.semantic_id }}{% endfor %}")


def test_events_reach_the_prompt(monkeypatch, capsys):
    made = random_recommender(5, prompt=TIMELINE, hidden_size=32)
    monkeypatch.setattr(Recommender, "from_pretrained", lambda *_, **__: made)
    events = [{"timestamp": 0}, {"timestamp": 86_400}]
    recommend("art", ["item-1", "item-2"], k=3, as_json=True, events=json.dumps(events))
    found = [row["item_id"] for row in json.loads(capsys.readouterr().out)]
    assert found == [item.item_id for item in made.recommend(["item-1", "item-2"], 3, events=events)]


@pytest.mark.parametrize("text", ["", "{}", "[1]", "[{]", '{"timestamp": 1}'])
def test_events_that_are_no_list_of_objects_are_refused_before_the_artefact_is_read(text):
    with pytest.raises(RequestError, match="Write a JSON list of objects"):
        recommend("no/where", ["item-1"], events=text)
