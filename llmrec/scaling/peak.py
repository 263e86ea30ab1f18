"""The operations per second that this machine reaches at best: a large matrix product, measured, never looked up."""

import time
from typing import Literal

from llmrec.exceptions import DataError

DType = Literal["float32", "bfloat16", "float16"]

_SIZES = {"cpu": 1024, "cuda": 8192}
_FEWEST = 3  # products, however long one takes


def matmul_peak(device: str = "cpu", dtype: DType = "float32", seconds: float = 1.0, size: int | None = None) -> float:
    """Operations per second of the fastest of many products of two square matrices.

    Args:
        device: of torch: "cpu", "cuda", "cuda:1", "mps".
        dtype: of the matrices, as the training computes in.
        seconds: how long to go on.
        size: rows and columns; None: 1024 on a CPU, which fills its caches, and 8192 on a GPU.

    Raises:
        DataError: if the device or the type is none of torch's here.
    """
    import torch

    kind = device.partition(":")[0]
    if dtype not in ("float32", "bfloat16", "float16"):
        raise DataError(f"Nothing trains in {dtype!r}. Choose float32, bfloat16 or float16.")
    if size is not None and size < 1:
        raise DataError(f"A matrix of {size} rows has no product. Give a positive size.")
    rows = size or _SIZES.get(kind, 2048)
    try:
        left = torch.randn(rows, rows, device=device).to(getattr(torch, dtype))
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"There is no device {device!r} here: {str(error).splitlines()[0]}. Name another.") from error

    def wait() -> None:
        if kind == "cuda":
            torch.cuda.synchronize(left.device)
        elif kind == "mps":
            torch.mps.synchronize()

    fastest, count, begun = float("inf"), 0, time.perf_counter()
    with torch.no_grad():
        out = left @ left
        wait()
        while count < _FEWEST or time.perf_counter() - begun < seconds:
            start = time.perf_counter()
            torch.mm(left, left, out=out)
            wait()
            fastest, count = min(fastest, time.perf_counter() - start), count + 1
    return 2.0 * rows**3 / fastest
