"""Which attention a backbone computes with, and why."""

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from llmrec.exceptions import BackboneError

KERNEL = "kernels-community/flash-attn2"
NAMES = ("auto", "flash_attention_2", "flash_attention_3", KERNEL, "sdpa", "flex_attention", "eager")
# Shorter names that a flag may give.
_ALIASES = {"flash": "flash_attention_2", "flex": "flex_attention", "kernels": KERNEL}
_HALF = (torch.float16, torch.bfloat16)
_FLASH_CAPABILITY = {"flash_attention_2": (8, 0), "flash_attention_3": (9, 0), KERNEL: (8, 0)}


@dataclass(frozen=True)
class Choice:
    """What `choose_attention` chose.

    Attributes:
        implementation: for `attn_implementation` of transformers.
        reason: one line for the log.
    """

    implementation: str
    reason: str


@dataclass(frozen=True)
class Probes:
    """What a machine offers.

    Attributes:
        flash_attn: whether the package flash-attn is importable.
        flash_attn_3: whether flash-attn's third version is.
        kernels: whether the package `kernels` is installed and its flash kernel loads.
        capability: of the GPU, None without one.
    """

    flash_attn: bool = False
    flash_attn_3: bool = False
    kernels: bool = False
    capability: tuple[int, int] | None = None

    @classmethod
    def of_this_machine(cls, device: torch.device) -> "Probes":
        """Looks; the flash kernel is fetched from the Hub only where it could run and flash-attn is not there."""
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        flash_attn = importlib.util.find_spec("flash_attn") is not None
        wanted = capability is not None and capability >= _FLASH_CAPABILITY[KERNEL] and not flash_attn
        third = importlib.util.find_spec("flash_attn_interface") is not None
        return cls(flash_attn, third, wanted and _kernel_loads(), capability)


def choose_attention(
    requested: str, config: Any, device: torch.device, dtype: torch.dtype, probes: Probes | None = None
) -> Choice:
    """The attention for a causal LM of `config` on `device`, computed in `dtype`.

    "auto" takes flash-attn where it is installed and can run (a GPU of compute capability 8, half precision, an
    architecture that supports it), else the flash kernel of the package `kernels` under the same conditions, else
    torch's sdpa, else eager. A named one is taken if it can run here.

    Args:
        requested: of `NAMES`, or "flash", "flex", "kernels".
        config: the model's, of transformers.
        device: where it will run.
        dtype: what attention is computed in: the weights', or autocast's.
        probes: what the machine offers; default: looked up.

    Raises:
        BackboneError: if the name is unknown, or names what cannot run here, with the reason.
    """
    name = _ALIASES.get(requested, requested)
    if name not in NAMES:
        raise BackboneError(f"attn_implementation is {requested!r}. Choose one of {', '.join(NAMES)}.")
    probes = probes or Probes.of_this_machine(device)
    if name != "auto":
        if obstacle := _obstacle(name, config, device, dtype, probes):
            raise BackboneError(
                f"attn_implementation {requested!r} cannot be used: {obstacle}. Take 'auto', which finds what can."
            )
        return Choice(name, f"{name}, as asked")
    obstacles: dict[str, str] = {}  # by what it is, so that one that stops two ways is told once
    for candidate in ("flash_attention_2", KERNEL, "sdpa"):
        obstacle = _obstacle(candidate, config, device, dtype, probes)
        if obstacle is None:
            break
        obstacles.setdefault(obstacle, candidate)
    else:
        candidate = "eager"
    told = "; ".join(f"not {way}: {obstacle}" for obstacle, way in obstacles.items())
    return Choice(candidate, f"{candidate} ({told})" if told else f"{candidate}, the fastest here")


def _obstacle(name: str, config: Any, device: torch.device, dtype: torch.dtype, probes: Probes) -> str | None:
    """Why an attention cannot run, or None."""
    if name == "eager":
        return None
    if (supports := _supports(config)) is None:
        return f"transformers has no causal language model of the type {config.model_type!r}"
    if name == "sdpa":
        return None if supports["sdpa"] else f"{config.model_type} has none in transformers"
    if name == "flex_attention":
        return None if supports["flex"] else f"{config.model_type} has none in transformers"
    if not supports["flash"]:
        return f"{config.model_type} does not support it in transformers"
    if device.type != "cuda" or probes.capability is None:
        return f"it needs a GPU, and the device is {device.type!r}"
    if probes.capability < _FLASH_CAPABILITY[name]:
        needed, found = (".".join(map(str, pair)) for pair in (_FLASH_CAPABILITY[name], probes.capability))
        return f"it needs compute capability {needed}, and this GPU has {found}"
    if dtype not in _HALF:
        return f"it computes in half precision, and this is {str(dtype).removeprefix('torch.')} (--bf16 true)"
    installed = {"flash_attention_2": probes.flash_attn, "flash_attention_3": probes.flash_attn_3}
    if not installed.get(name, probes.kernels):
        package = {"flash_attention_2": "flash-attn", "flash_attention_3": "flash-attn 3"}.get(name, "kernels")
        return f"the package {package} is not installed, or does not load"
    return None


def _supports(config: Any) -> dict[str, bool] | None:
    """What the architecture's class in transformers says of itself; None if there is no such causal LM."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        return None
    return {
        "sdpa": bool(getattr(model, "_supports_sdpa", False)),
        "flash": bool(getattr(model, "_supports_flash_attn", False)),
        "flex": bool(getattr(model, "_supports_flex_attn", False)),
    }


def _kernel_loads() -> bool:
    """Whether the flash kernel can be had: the package is installed, and the Hub or its cache gives the kernel."""
    if importlib.util.find_spec("kernels") is None:
        return False
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

    try:
        lazy_import_flash_attention(KERNEL)
    except Exception:  # whatever a kernel's download or its import raises, sdpa is there
        return False
    return True
