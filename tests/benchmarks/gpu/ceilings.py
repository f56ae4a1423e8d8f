"""Ceilings of the device: matrix products and copies of random numbers."""

from __future__ import annotations

import torch

from tests.benchmarks.gpu.bench import Bench, Row, say, seconds_of

GIB = 2**30


def measure(bench: Bench) -> Row:
    """Measures TFLOP/s of matrix products by precision, and GB/s of copies."""
    side = 256 if bench.tiny else 8192
    products, generator = {}, bench.generator()
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"),
        ("tf32", torch.float32, "high"),
        ("float32", torch.float32, "highest"),
    ):
        left, right = (
            torch.randn(side, side, device=bench.device, generator=generator).to(dtype) for _ in range(2)
        )
        torch.set_float32_matmul_precision(precision)
        try:
            seconds = seconds_of(bench, lambda left=left, right=right: left @ right).seconds
        finally:
            torch.set_float32_matmul_precision("highest")
        products[name] = 2 * side**3 / seconds / 1e12
    copies = _copies(bench)
    text = ", ".join(f"{name} {rate:.4g}" for name, rate in products.items())
    say(f"  matrix product {side} x {side}, TFLOP/s: {text}")
    say("  copy, GB/s: " + ", ".join(f"{name} {rate:.4g}" for name, rate in copies.items()))
    return {"tflops": products, "gb_per_s": copies}


def _copies(bench: Bench) -> dict[str, float]:
    """Measures GB/s of copies: on the device counting reads and writes, from the host counting once."""
    size = 2**20 if bench.tiny else 2 * GIB
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    rates = {"device": 2 * size / seconds_of(bench, lambda: target.copy_(source)).seconds / 1e9}
    size //= 4
    target = target[:size]
    host = torch.randint(0, 256, (size,), dtype=torch.uint8)
    kinds = {"pageable": host}
    if bench.is_gpu:
        kinds["pinned"] = host.pin_memory()
    for name, tensor in kinds.items():
        seconds = seconds_of(
            bench, lambda tensor=tensor: target.copy_(tensor, non_blocking=True), most=20
        ).seconds
        rates[f"host_{name}"] = size / seconds / 1e9
    return rates
