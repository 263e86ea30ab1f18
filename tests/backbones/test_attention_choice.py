"""Which attention is chosen, for machines that are only described."""

import pytest
import torch
from transformers import AutoConfig

from llmrec.backbones.attention import KERNEL, NAMES, Probes, choose_attention
from llmrec.exceptions import BackboneError

GPU, CPU = torch.device("cuda"), torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H100 = Probes(flash_attn=True, flash_attn_3=True, kernels=True, capability=(9, 0))
LLAMA, GPT2, BLOOM = (AutoConfig.for_model(name) for name in ("llama", "gpt2", "bloom"))


def changed(**values):
    return Probes(**(vars(H100) | values))


@pytest.mark.parametrize(
    ("config", "device", "dtype", "probes", "expected", "because"),
    [
        (LLAMA, GPU, BF16, H100, "flash_attention_2", "the fastest here"),
        (GPT2, GPU, FP16, changed(capability=(8, 0)), "flash_attention_2", "the fastest here"),
        (LLAMA, GPU, BF16, changed(flash_attn=False), KERNEL, "flash-attn is not installed"),
        (LLAMA, GPU, BF16, changed(flash_attn=False, kernels=False), "sdpa", "package kernels is not installed"),
        (LLAMA, GPU, BF16, changed(capability=(7, 5)), "sdpa", "capability 8.0, and this GPU has 7.5"),
        (LLAMA, GPU, FP32, H100, "sdpa", "half precision, and this is float32"),
        (LLAMA, CPU, BF16, changed(capability=None), "sdpa", "needs a GPU, and the device is 'cpu'"),
        (BLOOM, GPU, BF16, H100, "eager", "bloom"),
    ],
)
def test_auto_takes_the_fastest_and_says_why(config, device, dtype, probes, expected, because):
    choice = choose_attention("auto", config, device, dtype, probes)
    assert choice.implementation == expected
    assert choice.reason.startswith(expected)
    assert because in choice.reason
    assert "\n" not in choice.reason


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ("flash", "flash_attention_2"),
        ("flash_attention_3", "flash_attention_3"),
        ("kernels", KERNEL),
        ("flex", "flex_attention"),
        ("sdpa", "sdpa"),
        ("eager", "eager"),
    ],
)
def test_a_named_one_is_taken_where_it_runs(requested, expected):
    assert choose_attention(requested, LLAMA, GPU, BF16, H100).implementation == expected


@pytest.mark.parametrize(
    ("requested", "config", "device", "dtype", "probes", "message"),
    [
        ("flash_attention_2", LLAMA, CPU, BF16, Probes(flash_attn=True), "needs a GPU, and the device is 'cpu'"),
        ("flash_attention_2", LLAMA, GPU, FP32, H100, "half precision, and this is float32"),
        ("flash_attention_2", LLAMA, GPU, BF16, changed(flash_attn=False), "flash-attn is not installed"),
        ("flash_attention_3", LLAMA, GPU, BF16, changed(capability=(8, 9)), "capability 9.0, and this GPU has 8.9"),
        ("flash_attention_3", LLAMA, GPU, BF16, changed(flash_attn_3=False), "flash-attn 3 is not installed"),
        ("kernels", LLAMA, GPU, BF16, changed(kernels=False), "package kernels is not installed"),
        ("flash_attention_2", BLOOM, GPU, BF16, H100, "bloom does not support it"),
        ("sdpa", BLOOM, GPU, BF16, H100, "bloom has none"),
        ("flex", BLOOM, GPU, BF16, H100, "bloom has none"),
        ("sdpa", AutoConfig.for_model("t5"), CPU, FP32, Probes(), "no causal language model of the type 't5'"),
        ("fastest", LLAMA, CPU, FP32, Probes(), "Choose one of auto, flash_attention_2"),
    ],
)
def test_a_named_one_that_cannot_run_is_refused_with_the_reason(requested, config, device, dtype, probes, message):
    with pytest.raises(BackboneError, match=message) as raised:
        choose_attention(requested, config, device, dtype, probes)
    assert repr(requested) in str(raised.value)


def test_this_machine_is_probed_without_a_gpu():
    probes = Probes.of_this_machine(CPU)
    assert probes.capability is None
    assert not probes.kernels  # not even looked for, because it could not run
    assert choose_attention("auto", LLAMA, CPU, FP32).implementation == "sdpa"


def test_every_name_is_known_to_transformers():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = {*ALL_ATTENTION_FUNCTIONS.valid_keys(), "eager", "auto", KERNEL}
    assert set(NAMES) <= known
