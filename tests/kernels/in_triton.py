"""The Triton kernels against their torch definitions; `test_triton.py` runs this in a process of its own.

Without a GPU the kernels run in Triton's interpreter, which has to be switched on before Triton is imported. They are
also compiled, to machine code of three generations of GPUs, which needs none.
"""

import pytest
import torch
import triton
from random_levels import random_case, same
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmrec.kernels import attention_kernels, beam_attention, select_kernels
from llmrec.kernels.select import Selection, select_padded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = not isinstance(select_kernels._partial, triton.JITFunction)
compiled_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter stands in the kernels' place")
run_only = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="nothing runs these kernels here")


def on_device(case):
    for name, value in vars(case).items():
        if isinstance(value, torch.Tensor):
            setattr(case, name, value.to(DEVICE))
    case.level = type(case.level)(case.level.start.to(DEVICE), case.level.token.to(DEVICE), case.level.fan_out)
    return case


def by_kernels(case, normal):
    found = select_kernels.select(
        *(case.level.start, case.level.token, case.level.fan_out),
        *(case.logits, case.score, case.node, case.width, normal, case.dead),
    )
    return Selection(*found)


@run_only
@pytest.mark.parametrize("tile", [(16, 32), (64, 128)])
@pytest.mark.parametrize("seed", range(4))
def test_selection_to_the_bit(seed, tile, monkeypatch):
    monkeypatch.setattr(select_kernels, "TILE", tile[0])
    monkeypatch.setattr(select_kernels, "MERGE", tile[1])
    dtype = (torch.float32, torch.bfloat16)[seed % 2]
    case = on_device(random_case(seed, dtype, most_beams=16))
    if seed % 3 == 0:
        case.logits = case.logits.transpose(0, 1).contiguous().transpose(0, 1)
    assert same(by_kernels(case, case.normal), select_padded(*case.arguments()))


@run_only
def test_selection_in_the_sizes_that_are_used():
    """More beams than the others, tiles as they come, several rounds of merging."""
    case = on_device(random_case(8, most_beams=90, most_fan_out=40))
    case.width = 70
    assert same(by_kernels(case, case.normal), select_padded(*case.arguments()))


@run_only
def test_signed_zeros_are_equal_scores():
    start, token = (torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in ([0, 2, 4], [0, 1, 0, 1]))
    logits = torch.tensor([[[-0.0, 0.0], [0.0, -0.0]]], device=DEVICE)
    score, node = torch.full((1, 2), -0.0, device=DEVICE), torch.tensor([[0, 1]], device=DEVICE)
    found = Selection(*select_kernels.select(start, token, 2, logits, score, node, 2, torch.zeros_like(score)))
    assert found.node.tolist() == [[0, 1]]
    assert found.parent.tolist() == [[0, 0]]


@run_only
@pytest.mark.parametrize("seed", range(4))
def test_normalisers(seed, monkeypatch):
    monkeypatch.setattr(select_kernels, "STREAM", (4096, 16)[seed % 2])
    case = on_device(random_case(seed, hostile=False))
    vocabulary = torch.arange(0, case.logits.shape[-1], 2, device=DEVICE)
    case.logits[0, 0, 1::2] = -torch.inf
    case.logits[-1, -1] = -torch.inf
    for logits in (case.logits, case.logits.bfloat16()):
        whole = logits.float()
        assert torch.allclose(select_kernels.normalizer(logits), whole.logsumexp(-1), atol=1e-5)
        some = select_kernels.normalizer(logits, vocabulary)
        assert torch.allclose(some, whole[..., vocabulary].logsumexp(-1), atol=1e-5)
    case.logits[0, 0, 0] = torch.nan
    assert torch.isnan(select_kernels.normalizer(case.logits)[0, 0])


@run_only
def test_normalisers_of_many_rows(monkeypatch):
    """So many that a program has to go on over several blocks, whose greatest values come late, early or never."""
    monkeypatch.setattr(select_kernels, "STREAM", 16)
    logits = torch.randn(1, 300, 90, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 20
    logits[0, 1] = logits[0, 1].sort().values
    logits[0, 2] = logits[0, 2].sort(descending=True).values
    logits[0, 3, :40] = -torch.inf
    assert torch.allclose(select_kernels.normalizer(logits), logits.logsumexp(-1), atol=1e-4)


@run_only
@pytest.mark.parametrize("seed", range(4))
def test_normalisers_of_legal_children(seed):
    case = on_device(random_case(seed, hostile=seed == 3))
    case.logits = (torch.randn(case.logits.shape) * 2).to(DEVICE)
    level = case.level
    normal = select_kernels.legal_normalizer(level.start, level.token, case.logits, case.node, case.dead)
    found = by_kernels(case, normal)
    expected = select_padded(*case.arguments()[:5], None, case.dead)
    assert torch.allclose(found.score, expected.score, atol=1e-5)
    assert torch.allclose(found.gain, expected.gain, atol=1e-5)
    assert torch.equal(found.node, expected.node)


@run_only
@pytest.mark.parametrize("seed", range(10))
def test_attention(seed):
    generator = torch.Generator().manual_seed(seed)
    requests, beams, kv_heads, steps = 2, 3, 2, 1 + seed % 3
    group, width = (1, 3, 2)[seed % 3], (8, 12)[seed % 2]
    softcap, window = (0.0, 2.0)[seed % 2], (None, 1, 2, None)[seed % 4]

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    query, own = normal(requests, beams, kv_heads * group, width), normal(2, steps, requests, 5, kv_heads, width)
    ancestors = torch.randint(0, 5, (steps, requests, beams), generator=generator).to(DEVICE)
    prompt = (
        normal(requests, beams * group, kv_heads, width).transpose(1, 2),
        normal(requests, kv_heads, beams * group),
    )
    if seed == 4:  # one request whose prompt is out of sight, in FlashAttention's way of saying so
        prompt[1][0], prompt[0][0] = torch.inf, torch.nan
    if seed == 5:
        prompt = None
    if seed == 6:
        ancestors, own = None, own[:, :, :, :beams]
    arguments = (query, *own, ancestors, prompt, 0.3, softcap, window)
    found = attention_kernels.attend(*arguments)
    doubles = [
        part.double() if isinstance(part, torch.Tensor) and part.is_floating_point() else part for part in arguments
    ]
    doubles[4] = None if prompt is None else tuple(part.double() for part in prompt)
    assert torch.allclose(found.double(), beam_attention.attend(*doubles), atol=2e-6)


POINTERS = {
    **dict.fromkeys(("node", "dead", "keys", "vocabulary", "node_out", "parent_out", "token_out"), "*i64"),
    **dict.fromkeys(("start", "token"), "*i32"),
    **dict.fromkeys(("normal", "score", "score_out", "gain_out", "prefix_lse"), "*fp32"),
    **dict.fromkeys(("logits", "query", "values", "prefix"), "*bf16"),
    "ancestors": "*i64",
}
NO_KEY = {"NO_KEY": select_kernels._NO_KEY}
KERNELS = [
    (select_kernels._partial, {"BEAMS": 1, "SLOTS": 1024, "CHUNKS": 2, "KEEP": 128, "PROBES": 5, **NO_KEY}, "*i64"),
    (select_kernels._partial, {"BEAMS": 4, "SLOTS": 4, "CHUNKS": 1, "KEEP": 16, "PROBES": 0, **NO_KEY}, "*i64"),
    (select_kernels._merge, {"BLOCK": 256, "KEEP": 128, **NO_KEY}, "*i64"),
    (select_kernels._finish, {"BLOCK": 256, "KEEP": 128, **NO_KEY}, None),
    (select_kernels._finish, {"BLOCK": 64, "KEEP": 64, **NO_KEY}, None),
    (select_kernels._normalizer, {"BLOCK": 4096, "GATHER": True}, "*fp32"),
    (select_kernels._legal_normalizer, {"BLOCK": 256, "PROBES": 4}, "*fp32"),
    (
        attention_kernels._attend,
        {
            **{"STEPS": 3, "OLDEST": 1, "GROUP": 3, "WIDTH": 96, "GROUP_BLOCK": 4, "WIDTH_BLOCK": 128},
            **{"CAPPED": True, "INDEXED": True, "PREFIX": True},
        },
        "*bf16",
    ),
]


@compiled_only
@pytest.mark.parametrize(
    ("place", "capability"),
    [*((place, 90) for place in range(len(KERNELS))), *((place, other) for place in (1, 4, 7) for other in (80, 100))],
)
def test_kernels_compile(place, capability):
    kernel, constants, out = KERNELS[place]
    signature = {}
    for parameter in kernel.params:
        name = parameter.name
        kind = out if name == "out" else POINTERS.get(name, "fp32" if name in ("scale", "softcap") else "i32")
        if kernel is attention_kernels._attend and name == "keys":
            kind = "*bf16"
        signature[name] = "constexpr" if name in constants else kind
    source = ASTSource(kernel, signature, {(list(signature).index(name),): value for name, value in constants.items()})
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
