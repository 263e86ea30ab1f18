"""How fast HSTU is: without padding, on candidates, behind a cache; and on a GPU beside Transformers of equal width.

    python benchmarks/hstu.py [--lengths N ...] [--tiles] [--quick] [--json FILE]

Needs torch, transformers and numpy, on a GPU triton too; the package need not be installed. First it checks what it is
about to time against definitions, and ends with 1 if one does not hold. Then, everywhere:

* layers:     two layers, forward and backward, over histories of very different lengths: "jagged", as HSTUModel reads
              them; "padded" to the longest, attention by dense masked products that autograd remembers; and "chunked",
              padded too, but with llmrec's attention
* candidates: scores of many candidates for one history: by M-FALCON in micro-batches behind one cache, and by reading
              history and candidate from the beginning, one by one
* cache:      one more item of a history: behind its cache, and by reading all of it again

On a GPU, in bfloat16, forward and backward, at lengths from 512 to 8192 and about as many items in all, D = 512 and
8 heads of 64: an HSTU layer by the Triton kernels, without and with the bias of places and times, and with stochastic
length (alpha 1.6, arXiv 2402.17152, equation 4), beside a Transformer layer by SDPA's flash kernel, and by
FlashAttention where it is installed; and attention alone. The goals are 2 times, and 5.3 with stochastic length.

--tiles also times the kernels by their tiles, which is where the constants in llmrec/kernels/hstu_launch.py come from.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from environment import add_flags, environment, report
from selection import milliseconds

from llmrec.backbones.hstu import HSTUConfig, HSTULayer, HSTUModel
from llmrec.backbones.jagged import offsets_of, without_padding
from llmrec.backbones.relative_bias import RelativeBias
from llmrec.kernels import hstu_launch
from llmrec.kernels.hstu_attention import hstu_attention, hstu_attention_reference
from llmrec.kernels.hstu_launch import Tile
from llmrec.sequence.stochastic_length import keeps_all, thinned_length

ALPHA = 1.6
GOAL, GOAL_THINNED = 2.0, 5.3
WIDTH, HEADS, HEAD = 512, 8, 64
TOKENS = 65_536  # of a batch on a GPU


def checks(device: str) -> dict[str, float]:
    """The greatest errors, over what is greatest in the definition, of output and gradients; by type and score."""
    found = {}
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 0, 200, 77, 129])
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device)
    total, longest = int(lengths.sum()), int(lengths.max())
    for dtype, score in itertools.product((torch.float32, torch.bfloat16), ("silu", "softmax")):
        q, k, v = (torch.randn(total, 2, 32, generator=generator).to(device, dtype).requires_grad_() for _ in range(3))
        tables = [torch.randn(size, generator=generator).to(device).requires_grad_() for size in (longest, 130)]
        times = (torch.rand(total, generator=generator) * 1e6).long().to(device)
        grad = torch.randn(total, 2, 32, generator=generator).to(device)
        parts = (q, k, v, *tables)
        given = (q, k, v, offsets, longest, *tables, times, times + 60, "length", score)
        results = []
        for attention in (hstu_attention, hstu_attention_reference):
            out = attention(*given)
            results.append([out, *torch.autograd.grad(out, parts, grad.to(out.dtype))])
        errors = [
            float(((one.double() - other.double()).abs().max() / other.abs().max()).detach())
            for one, other in zip(*results, strict=True)
        ]
        found[f"{str(dtype).removeprefix('torch.')}, {score}"] = max(errors)
    return found


def trained(run: Callable[[], Tensor], parameters: list[Tensor]) -> Callable[[], None]:
    """`run`, and the gradients of its sum's parameters, which are thrown away."""

    def both() -> None:
        out = run()
        torch.autograd.grad(out, parameters, torch.ones_like(out), allow_unused=True)

    return both


def dense(q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias, shape: tuple[int, int], times: Tensor) -> Tensor:
    """HSTU's attention of padded histories (B · S, H, …), written down: all scores at once."""
    q, k, v = (part.unflatten(0, shape).transpose(1, 2) for part in (q, k, v))
    added = bias(torch.arange(shape[1], device=q.device)[None], times)
    scores = q @ k.transpose(-1, -2) + (0.0 if added is None else added)
    return (F.silu(scores).tril() / bias_length(bias) @ v).transpose(1, 2).flatten(0, 1)


def bias_length(bias: RelativeBias) -> int:
    """The greatest length that a bias with places is made for."""
    assert bias.position is not None
    return bias.position.shape[1]


def layers(quick: bool, repeats: int) -> tuple[dict[str, Any], bool]:
    """Milliseconds of two layers, forward and backward, in each way."""
    batch, longest = (16, 100) if quick else (64, 200)
    torch.manual_seed(0)
    config = HSTUConfig(
        hidden_size=64, num_hidden_layers=2, qk_dim=64, v_dim=64, max_position_embeddings=longest, dropout=0.0
    )
    model = HSTUModel(config)
    lengths = torch.from_numpy(np.random.default_rng(0).lognormal(math.log(longest / 5), 1.0, batch)).long()
    lengths = lengths.clamp(1, longest)
    lengths[0] = longest
    mask = torch.arange(longest) < lengths[:, None]
    x = torch.randn(batch, longest, 64)
    times = (torch.rand(batch, longest) * 1e6).long().sort(1).values
    offsets = torch.arange(batch + 1) * longest
    tokens, token_times = without_padding(x, mask), without_padding(times, mask)
    places = torch.arange(longest).repeat(batch)

    def padded(attend: Callable[..., Tensor]) -> Tensor:
        hidden = model._embedded(x.flatten(0, 1), places)
        for layer in model.layers:
            hidden = layer(hidden, places, attend)
        return without_padding(hidden.unflatten(0, (batch, longest)), mask)

    def chunked(q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias) -> Tensor:
        assert bias.position is not None
        assert bias.time is not None
        return hstu_attention(
            q, k, v, offsets, longest, bias.position[0], bias.time[0], times.flatten(), implementation="chunked"
        )

    runs = {
        "jagged": lambda: model.forward_jagged(tokens, offsets_of(mask), token_times),
        "padded": lambda: padded(partial(dense, shape=(batch, longest), times=times)),
        "chunked": lambda: padded(chunked),
    }
    outputs = {name: run() for name, run in runs.items()}
    same = all(torch.allclose(outputs["padded"], output, atol=1e-4) for output in outputs.values())
    learnt = list(model.parameters())
    times_of = {name: milliseconds(trained(run, learnt), repeats, "cpu") for name, run in runs.items()}
    return {
        "batch": batch,
        "longest": longest,
        "filled": float(mask.float().mean()),
        "milliseconds": times_of,
    }, same


def serving(quick: bool, repeats: int) -> tuple[dict[str, Any], bool]:
    """Milliseconds of scoring candidates, and of one more item, with and without a cache."""
    length, count, micro = (50, 32, 16) if quick else (200, 256, 64)
    torch.manual_seed(0)
    config = HSTUConfig(hidden_size=64, num_hidden_layers=4, max_position_embeddings=length + 1)
    model = HSTUModel(config).eval()
    history, candidates = torch.randn(1, length, 64), torch.randn(1, count, 64)
    times = torch.arange(length)[None] * 3600
    now = torch.full((1, count), length * 3600)

    def falcon() -> Tensor:
        _, cache = model.prefill(history, timestamps=times)
        return behind(cache)

    def behind(cache: Any) -> Tensor:
        parts = [
            model.extend(cache, some, when, isolated=True)[0]
            for some, when in zip(candidates.split(micro, 1), now.split(micro, 1), strict=True)
        ]
        return torch.cat(parts, 1)

    def one_by_one() -> Tensor:
        states = [
            model(torch.cat([history, candidates[:, [at]]], 1), timestamps=torch.cat([times, now[:, [at]]], 1))[:, -1:]
            for at in range(count)
        ]
        return torch.cat(states, 1)

    def full() -> Tensor:
        whole = torch.cat([history, candidates[:, :1]], 1)
        states: Tensor = model(whole, timestamps=torch.cat([times, now[:, :1]], 1))
        return states[:, -1:]

    with torch.inference_mode():
        _, cache = model.prefill(history, timestamps=times)

        def appended() -> Tensor:
            return model.extend(cache, candidates[:, :1], now[:, :1])[0]

        same = torch.allclose(falcon(), one_by_one(), atol=1e-4) and torch.allclose(appended(), full(), atol=1e-4)
        ways = {
            "M-FALCON": falcon,
            "M-FALCON, history cached": partial(behind, cache),
            "one by one": one_by_one,
            "one more item, cached": appended,
            "one more item, all again": full,
        }
        times_of = {name: milliseconds(run, repeats, "cpu") for name, run in ways.items()}
    return {"history": length, "candidates": count, "micro_batch": micro, "milliseconds": times_of}, same


class TransformerLayer(nn.Module):
    """Pre-norm attention and a feed-forward network of 4 D with GELU, as of a GPT-2."""

    def __init__(self, flash: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.flash = flash
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, HEAD)).unbind(2)  # (B, S, H, D / H)
        if self.flash is None:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            read = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        else:
            read = self.flash(q, k, v, causal=True)
        x = x + self.out(read.flatten(2))
        added: Tensor = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return added


class HSTUWay:
    """An HSTU layer over histories of some lengths, on a GPU."""

    def __init__(self, lengths: list[int], longest: int, bias: str) -> None:
        self.longest = longest
        self.offsets = torch.tensor([0, *itertools.accumulate(lengths)], device="cuda")
        total = sum(lengths)
        self.times = torch.randint(0, 10**7, (total,), device="cuda").sort().values
        config = HSTUConfig(
            hidden_size=WIDTH,
            num_attention_heads=HEADS,
            qk_dim=HEAD,
            v_dim=HEAD,
            max_position_embeddings=longest,
            dropout=0.0,
            relative_bias=bias,
        )
        self.layer = HSTULayer(config).to("cuda", torch.bfloat16)
        self.x = torch.randn(total, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        self.places = torch.cat([torch.arange(length) for length in lengths]).to("cuda")
        self.qkv = torch.randn(total, 3, HEADS, HEAD, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias) -> Tensor:
        return hstu_attention(
            *(q, k, v, self.offsets, self.longest),
            None if bias.position is None else bias.position[0],
            None if bias.time is None else bias.time[0],
            self.times,
            implementation="triton",
        )

    def whole(self) -> float:
        """Milliseconds of the layer."""
        learnt = [self.x, *self.layer.parameters()]
        return milliseconds(trained(lambda: self.layer(self.x, self.places, self.attend), learnt), 1, "cuda")

    def attention(self) -> float:
        """Milliseconds of attention alone."""
        learnt = [self.qkv, *self.layer.bias.parameters()]
        return milliseconds(trained(lambda: self.attend(*self.qkv.unbind(1), self.layer.bias), learnt), 1, "cuda")


def beside_transformers(lengths: list[int]) -> dict[str, Any]:
    """Milliseconds of layers and of attention alone, by length."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    try:
        from flash_attn import flash_attn_func
    except ImportError:
        flash_attn_func = None
    found = {}
    for length in lengths:
        batch = max(1, TOKENS // length)
        rng = np.random.default_rng(0)
        stays = rng.random(batch) < keeps_all(length, length, ALPHA)
        thinned = [length if stay else thinned_length(length, ALPHA) for stay in stays]
        layer_ms, attention_ms = {}, {}
        for name, some, bias in (
            ("hstu", [length] * batch, "none"),
            ("hstu, position+time", [length] * batch, "position+time"),
            ("hstu, thinned", thinned, "none"),
            ("hstu, thinned, position+time", thinned, "position+time"),
        ):
            way = HSTUWay(some, length, bias)
            layer_ms[name], attention_ms[name] = way.whole(), way.attention()
            del way
        x = torch.randn(batch, length, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        q, k, v = (
            torch.randn(batch, HEADS, length, HEAD, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )
        for name, flash in (("sdpa", None), ("flash_attn", flash_attn_func)):
            if name == "flash_attn" and flash is None:
                continue
            layer = TransformerLayer(flash).to("cuda", torch.bfloat16)
            if flash is None:
                alone = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
            else:
                alone = partial(flash, *(part.transpose(1, 2) for part in (q, k, v)), causal=True)
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                learnt = [x, *layer.parameters()]
                layer_ms[name] = milliseconds(trained(partial(layer, x), learnt), 1, "cuda")
                attention_ms[name] = milliseconds(trained(alone, [q, k, v]), 1, "cuda")
        found[str(length)] = {
            "batch": batch,
            "items_thinned": sum(thinned),
            "layer_milliseconds": layer_ms,
            "attention_milliseconds": attention_ms,
        }
        print(f"{length:>6}: " + ", ".join(f"{name} {value:.2f}" for name, value in layer_ms.items()), flush=True)
        torch.cuda.empty_cache()
    return found


def tiles(length: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of attention, forward and backward, with one kernel's tile changed, with and without bias."""
    found: dict[str, dict[str, Any]] = {}
    shapes = [*itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3))]
    for bias, table in itertools.product(
        ("none", "position+time"), ("ATTEND", "QUERY_GRADIENTS", "KEY_GRADIENTS", "BIAS_GRADIENTS")
    ):
        tiles_of, key = getattr(hstu_launch, table), (0, bias != "none")
        if key not in tiles_of:
            continue
        way, usual, times = HSTUWay([length] * max(1, TOKENS // length), length, bias), tiles_of[key], {}
        for shape in dict.fromkeys([tuple(usual), *shapes]):
            tiles_of[key] = Tile(*shape)
            try:
                times[str(shape)] = way.attention()
            except Exception as error:  # too much shared memory, mostly
                times[str(shape)] = type(error).__name__
        tiles_of[key] = usual
        found[f"{table}, {bias}"] = times
        quickest = min((value, shape) for shape, value in times.items() if not isinstance(value, str))
        print(f"{table}, {bias}: {tuple(usual)} {times[str(tuple(usual))]:.2f}, {quickest[1]} {quickest[0]:.2f}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", help="On a GPU; default 512 to 8192, twofold.")
    parser.add_argument("--tiles", action="store_true", help="Time the kernels by their tiles too.")
    parser.add_argument("--repeats", type=int, help="Default 7; 3 with --quick.")
    add_flags(parser)
    options = parser.parse_args()
    repeats = options.repeats or (3 if options.quick else 7)
    before = environment()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    errors = checks(device)
    layer_times, layers_agree = layers(options.quick, repeats)
    serving_times, serving_agrees = serving(options.quick, repeats)
    bounds = {"float32": 1e-5, "bfloat16": 0.05}
    held = {
        "attention": all(error < bounds[name.partition(",")[0]] for name, error in errors.items()),
        "layers": layers_agree,
        "serving": serving_agrees,
    }
    one, two = layer_times["milliseconds"], serving_times["milliseconds"]
    ratios = {
        "padded over jagged": one["padded"] / one["jagged"],
        "chunked over jagged": one["chunked"] / one["jagged"],
        "one by one over M-FALCON": two["one by one"] / two["M-FALCON"],
        "one by one over M-FALCON, history cached": two["one by one"] / two["M-FALCON, history cached"],
        "all again over cached": two["one more item, all again"] / two["one more item, cached"],
    }
    result: dict[str, Any] = {
        "device": device,
        "threads": 1,
        "triton": hstu_launch.hstu_kernels.available(),
        "held": held,
        "errors": errors,
        "layers": layer_times,
        "serving": serving_times,
        "goals": {"alone": GOAL, "with stochastic length": GOAL_THINNED},
    }
    if device == "cuda" and held["attention"]:
        lengths = options.lengths or ([512, 2048] if options.quick else [512, 1024, 2048, 4096, 8192])
        result["by_length"] = beside_transformers(lengths)
        for length, row in result["by_length"].items():
            times = row["layer_milliseconds"]
            rival = min(times[name] for name in ("sdpa", "flash_attn") if name in times)
            for name in ("hstu", "hstu, position+time", "hstu, thinned", "hstu, thinned, position+time"):
                ratios[f"Transformer over {name}, {length}"] = rival / times[name]
        result["goals_reached"] = {  # at the greatest length, without bias, as the paper measured
            "alone": ratios[f"Transformer over hstu, {max(lengths)}"] >= GOAL,
            "with stochastic length": ratios[f"Transformer over hstu, thinned, {max(lengths)}"] >= GOAL_THINNED,
        }
        if options.tiles:
            result["tiles"] = tiles(max(lengths))
    for name, error in errors.items():
        print(f"greatest error, {name}: {error:.1e}")
    for name, value in ratios.items():
        print(f"{name}: {value:.2f}")
    for name, whether in held.items():
        print(f"{name}: {'held' if whether else 'FAILED'}")
    report("hstu", result, ratios, before, options)
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
