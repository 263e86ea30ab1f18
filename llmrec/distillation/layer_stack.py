"""LayerStack: the layers of a model, wherever it keeps them; a model of some of them, for a while or for good.

It knows of language models (Llama, GPT-2, Qwen and whoever keeps a list of layers) and of sequence models (SASRec,
HSTU, BERT4Rec, Llama's and GPT-2's layers over items), and of nothing that is trained or measured with them.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from llmrec.exceptions import BackboneError

Model = TypeVar("Model", bound=nn.Module)

# What transformers' models and llmrec's encoders call their list of layers.
_NAMES = ("layers", "h", "blocks")


class LayerStack:
    """The list of a model's layers, and all that counts or numbers them."""

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: a causal language model, a `SequenceModel` or an encoder; not in a wrapper's form.

        Raises:
            BackboneError: if it keeps no list of layers (GRU4Rec's are one module).
        """
        self.model = model
        self._owner, self._name = _found(model)
        self._configs = _configs_of(model, len(self.layers))
        if any(getattr(config, "scale_attn_by_inverse_layer_idx", False) for config in self._configs):
            raise BackboneError(
                f"{type(model).__name__} scales its attention by the place of each layer, so that a layer in another "
                "place is another one. Choose a model without scale_attn_by_inverse_layer_idx."
            )

    @property
    def layers(self) -> nn.ModuleList:
        """The layers, first to last."""
        found: nn.ModuleList = getattr(self._owner, self._name)
        return found

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def owner(self) -> nn.Module:
        """The module that runs the layers one after another."""
        return self._owner

    @contextmanager
    def only(self, kept: Sequence[int]) -> Iterator[None]:
        """While it lasts, the model has these layers alone: the very model that would be built without the others.

        What a skipped layer would have added is left out of the residual stream; final norm and head stay.

        Args:
            kept: places of layers, ascending; at least one.

        Raises:
            BackboneError: if a place is none of the model's, or there is none.
        """
        before = self.layers
        numbers = [(one, int(vars(one)["layer_idx"])) for one in before.modules() if "layer_idx" in vars(one)]
        configs = [(config, _values(config)) for config in self._configs]
        self._keep(kept)
        try:
            yield
        finally:
            setattr(self._owner, self._name, before)
            for module, number in numbers:
                vars(module)["layer_idx"] = number
            for config, values in configs:
                _restore(config, values)

    def _keep(self, kept: Sequence[int]) -> None:
        layers = self.layers
        chosen = list(kept)
        if not chosen or chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= len(layers):
            raise BackboneError(
                f"Layers {chosen} cannot be kept of {len(layers)}. Name at least one of 0 to {len(layers) - 1}, "
                "ascending and each once."
            )
        setattr(self._owner, self._name, nn.ModuleList(layers[place] for place in chosen))
        for number, layer in enumerate(self.layers):
            for module in layer.modules():
                if "layer_idx" in vars(module):
                    vars(module)["layer_idx"] = number  # its place in a cache
        for config in self._configs:
            _cut(config, chosen, len(layers))


def with_layers(model: Model, kept: Sequence[int]) -> Model:
    """A copy of a model that has some of its layers alone, with their weights and all others'.

    Raises:
        BackboneError: as `LayerStack.only`.
    """
    stack = LayerStack(model)
    with stack.only(kept):  # so that what is not kept is not copied
        made = copy.deepcopy(model)
    return made


def _found(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the list of layers, and the list's name there; the outermost is meant."""
    root = getattr(model, "encoder", model) if hasattr(model, "representation") else model
    waiting: list[nn.Module] = [root]
    while waiting:
        module = waiting.pop(0)
        for name in _NAMES:
            held = getattr(module, name, None)
            if isinstance(held, nn.ModuleList) and len(held):
                return module, name
        waiting += list(module.children())
    raise BackboneError(
        f"{type(root).__name__} keeps no list of layers, so none can be left out. Choose a Llama, a GPT-2, a SASRec, "
        "an HSTU or another model that is made of layers."
    )


def _configs_of(model: nn.Module, count: int) -> list[Any]:
    """The configurations and dictionaries that say how many layers there are, each once."""
    found: list[Any] = []

    def add(config: Any) -> None:
        if config is None or any(config is one for one in found):
            return
        if isinstance(config, dict):
            if not _count_names(config):
                config["num_hidden_layers"] = count  # a default, which a difference from the defaults leaves out
            found.append(config)
        elif getattr(config, "num_hidden_layers", None) == count:
            found.append(config)

    for module in model.modules():
        config = getattr(module, "config", None)
        if config is None or not hasattr(config, "to_dict"):
            continue
        add(config)
        text = getattr(config, "get_text_config", None)
        add(text() if callable(text) else None)
        for name in ("encoder", "body_config"):  # of a SequenceConfig and a CausalBodyConfig
            inner = getattr(config, name, None)
            add(inner if isinstance(inner, dict) else None)
            if isinstance(inner, dict):
                add(inner.get("body_config"))
    return found


def _count_names(config: Any) -> list[str]:
    given = config if isinstance(config, dict) else vars(config)
    return [name for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if name in given]


def _per_layer(config: Any, count: int) -> list[str]:
    """Names of lists with an entry per layer, such as the kinds of attention."""
    given = config if isinstance(config, dict) else vars(config)
    return [
        name for name, value in given.items() if "layer" in name and isinstance(value, list) and len(value) == count
    ]


def _values(config: Any) -> dict[str, Any]:
    """All that `_cut` may change."""
    given = config if isinstance(config, dict) else vars(config)
    return {
        name: value
        for name, value in given.items()
        if name in _count_names(config) or ("layer" in name and isinstance(value, list))
    }


def _restore(config: Any, values: dict[str, Any]) -> None:
    given = config if isinstance(config, dict) else vars(config)
    given.update(values)


def _cut(config: Any, kept: list[int], count: int) -> None:
    given = config if isinstance(config, dict) else vars(config)
    for name in _per_layer(config, count):
        given[name] = [given[name][place] for place in kept]
    for name in _count_names(config):
        given[name] = len(kept)
