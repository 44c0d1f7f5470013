"""Other types and other devices."""

from __future__ import annotations

import torch

from unweave.testing._case import Case
from unweave.testing._check import check, require, require_close, require_close_code, require_same_code


@check()
def moves_between_float_types(case: Case) -> None:
    """In float64 it does what it does in float32, and comes back with the same bits."""
    x = case.rows(dtype=torch.float32)
    single, double = case.trained(torch.float32), case.trained(torch.float64)
    with torch.no_grad():
        code, wide = single.encode(x), double.encode(x)
        for name, tensor in double.named_parameters():
            require(tensor.dtype == torch.float64, f"{name} stayed {tensor.dtype} after .double()")
        require(wide.dtype == torch.float64, f"codes in float64: found values of {wide.dtype}")
        require(double(x).dtype == torch.float64, f"outputs in float64: found {double(x).dtype}")
        require_close_code(wide, code.to(dtype=torch.float64), "codes in float64 against float32", 1e-3)
        require_close(double(x), single(x), "outputs in float64 against float32", 1e-3)
        require_same_code(double.float().encode(x), code, "codes after .double().float()")


@check(lambda kind: kind.bfloat16)
def works_in_bfloat16(case: Case) -> None:
    """It claims to work in bfloat16: outputs stay close to those in float32."""
    x = case.rows(256, torch.float32)
    half, single = case.trained(torch.bfloat16), case.trained(torch.float32)
    with torch.no_grad():
        code, output = half.encode(x), half(x)
        require(code.dtype == torch.bfloat16, f"codes in bfloat16: found values of {code.dtype}")
        require(output.dtype == torch.bfloat16, f"outputs in bfloat16: found {output.dtype}")
        wrong = float((output.float() - single(x)).norm(dim=1).median() / single(x).norm(dim=1).median())
    require(wrong < 0.1, f"outputs in bfloat16 are {wrong:.0%} off (median over rows), expected less than 10 %")


@check()
def moves_between_devices(case: Case) -> None:
    """.to(device) takes everything along; on a graphics card, where there is one, codes are the same."""
    x = case.rows(dtype=torch.float32)
    dictionary = case.trained(torch.float32).to("cpu")
    require(dictionary.device == torch.device("cpu"), f"device: expected cpu, found {dictionary.device}")
    with torch.no_grad():
        code, output = dictionary.encode(x), dictionary(x)
    if torch.cuda.is_available():
        there = case.trained(torch.float32).to("cuda")
        with torch.no_grad():
            require(there.encode(x).device.type == "cuda", "codes on cuda: they are not there")
            require_close_code(there.encode(x).to("cpu"), code, "codes on cuda", 1e-3)
            require_close(there(x).cpu(), output, "outputs on cuda", 1e-3)
            require_same_code(there.to("cpu").encode(x), code, "codes after cuda and back")
    moved = dictionary.to("meta")
    for name, tensor in [*moved.named_parameters(), *moved.named_buffers()]:
        require(tensor.is_meta, f"{name} was left behind on {tensor.device} by .to()")
    require(moved.device.type == "meta", f"device: expected meta after .to('meta'), found {moved.device}")
