"""All verbs in one application."""

from __future__ import annotations

import typer

from unweave.cli import (
    archs,
    convert,
    demo,
    diff,
    doctor,
    evaluate,
    export,
    export_store,
    harvest,
    import_store,
    index,
    inspect,
    list,
    open,
    push,
    sweep,
    train,
    verify,
)

app = typer.Typer(
    name="unweave",
    help="Take the activations of a neural network apart into sparse features, and look at them.\n\n"
    "Start with `unweave demo`. It writes a run folder, which every other verb understands.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, verb in {
    "demo": demo.demo,
    "harvest": harvest.harvest,
    "train": train.train,
    "sweep": sweep.sweep,
    "eval": evaluate.evaluate,
    "index": index.index,
    "diff": diff.diff,
    "open": open.open_run,
    "export": export.export,
    "inspect": inspect.inspect,
    "list": list.list_verb,
    "convert": convert.convert,
    "import-store": import_store.import_store,
    "export-store": export_store.export_store,
    "verify": verify.verify,
    "push": push.push,
    "archs": archs.archs,
    "doctor": doctor.doctor,
}.items():
    app.command(name)(verb)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    if version:
        from unweave import __version__

        typer.echo(__version__)
        raise typer.Exit
