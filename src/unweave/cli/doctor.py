"""``unweave doctor``"""

from __future__ import annotations

from typing import Annotated

import typer

from unweave.cli._say import say, show


def doctor(
    shapes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[D_IN,N_FEATURES,ROWS]...", help="Shapes to time; without any, one of the demo's size."
        ),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Forget what was measured here before.")] = False,
) -> None:
    """Say what this machine has, which kernels can run on it, and which plan is fastest for a shape.

    For example: unweave doctor 576,4608,2048 768,24576,4096

    Pin a plan with UNWEAVE_KERNELS (for everything) or training.engine (for one run).
    """
    import torch
    from rich.table import Table

    from unweave.kernels import calibration
    from unweave.kernels.backend import why_not
    from unweave.kernels.workspace import plan_of

    sizes = [_shape(text) for text in shapes or ["576,4608,2048"]]
    if again:
        calibration.forget()
    machine, fingerprint = Table("machine", ""), calibration.fingerprint()
    names = {"capability": "vector instructions", "bfloat16": "fast bfloat16", "int8": "fast int8"}
    for name, value in fingerprint.items():
        machine.add_row(names.get(name, name), {True: "yes", False: "no", None: "none"}.get(value, str(value)))
    for name in ("reference", "cpu", "gpu"):
        machine.add_row(f"{name} kernels", why_not(name) or "ready")
    machine.add_row("timings kept in", str(calibration.file()))
    show(machine)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table("shape", "for", "plan", "ms", "")
    for column in table.columns[:3]:
        column.no_wrap = True
    for d, n_features, n_rows in sizes:
        W = torch.empty(n_features, d, device=device)
        for purpose in ("train", "encode"):
            chosen = calibration.plan_for(W, n_rows, purpose)
            seconds = calibration.measured(W, n_rows, purpose)
            shape = f"{d} -> {n_features} x {n_rows}"
            if not seconds:
                table.add_row(shape, purpose, str(chosen), "", "not timed")
            for name, time in sorted(seconds.items(), key=lambda item: item[1]):
                plan = plan_of(name)
                table.add_row(shape, purpose, str(plan), f"{time * 1e3:.1f}", "chosen" if plan == chosen else "")
    show(table)
    if device.type == "cpu" and not (fingerprint["bfloat16"] or fingerprint["int8"]):
        say(
            "This processor multiplies bfloat16 and int8 slowly (no AMX, AVX512-BF16 or AVX512-VNNI), so plans without "
            "a screen win here."
        )


def _shape(text: str) -> tuple[int, int, int]:
    try:
        d, n_features, n_rows = (int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise typer.BadParameter(f"expected D_IN,N_FEATURES,ROWS such as 576,4608,2048, found {text!r}") from None
    if min(d, n_features, n_rows) < 1:
        raise typer.BadParameter(f"expected numbers above 0, found {text!r}")
    return d, n_features, n_rows
