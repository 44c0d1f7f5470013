"""A folder for a hub, with a model card whose numbers were measured; and its push."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from unweave import formats
from unweave.errors import UnweaveError
from unweave.evaluation import Evaluation
from unweave.files import read_json, write_json, write_text
from unweave.formats import Verdict
from unweave.runs import Run, load
from unweave.workflows._model_card import Known, check_front_matter, model_card, without_paths
from unweave.workflows.conversion import facts_of_run


def prepare(
    thing: str | Path,
    out: str | Path,
    *,
    format: str = "unweave",
    front_matter: Mapping[str, Any] | None = None,
    verdict: Verdict | None = None,
    load_as: str = "owner/name",
    **options: Any,
) -> Path:
    """Write a folder that a hub can hold: the dictionary, what was measured of it, and ``README.md``.

    The card's numbers are those of ``evaluation.json`` beside the dictionary, or of ``verdict``; what neither holds is
    said to be not measured. Of local files only the names are kept, not the folders they lie in.

    Args:
        thing: a run folder, or whatever :func:`unweave.load` reads. out: a new folder, complete once it is there.
        format: one of :func:`unweave.formats.writable`. front_matter: what only its owner knows, such as ``license``.
        verdict: of :func:`unweave.formats.verify`, for what has no evaluation.
        load_as: by which name it will be loaded.
        options: what the files of ``thing`` do not say.

    Raises:
        UnweaveError: when it cannot be read, the format cannot express it, or the folder is there already.
    """
    out, front_matter = Path(out), dict(front_matter or {})
    formats.get(format)  # a misspelt format is told before anything is read
    check_front_matter(front_matter)
    if out.exists():
        raise UnweaveError(f"{out} is there already: choose a new folder")
    opened = load(thing, **options)
    if isinstance(opened, Run):
        dictionary, facts = opened.dictionary, facts_of_run(opened)
    else:
        dictionary, facts = opened, formats.inspect(thing, **options)
    training, provenance, measured = (_record(Path(thing), name) for name in ("training", "provenance", "evaluation"))
    evaluation = Evaluation.from_dict(measured) if measured else None
    facts = replace(facts, model=without_paths(facts.model), context=without_paths(facts.context))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnweaveError(f"cannot write {out}: {error.strerror or error}") from None
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
        made = formats.write(dictionary, format, Path(place) / "made", facts)
        if training:
            write_json(made / "training.json", training)
        if evaluation is not None:
            evaluation.save(made / "evaluation.json")
        written = formats.inspect(made)
        known = Known(
            replace(written, model=facts.model, site=facts.site, target_site=facts.target_site, hook=facts.hook),
            load_as,
            dictionary.config.to_dict(),
            training,
            provenance,
            {} if isinstance(opened, Run) or facts.format == "unweave" else facts.context,
            evaluation,
            verdict,
            front_matter,
        )
        write_text(made / "README.md", model_card(known))
        os.replace(made, out)
    return out


def push(
    thing: str | Path,
    repository: str,
    *,
    folder: str = "",
    private: bool = False,
    force: bool = False,
    **options: Any,
) -> str:
    """Make the folder of :func:`prepare` and put it on the Hugging Face hub, as one commit.

    Args:
        thing: as for ``prepare``; a folder that ``prepare`` made goes as it is, with what was changed in its card.
        repository: ``owner/name``, made if it is not there. folder: where in it; its root when empty.
        private: make it a private one. force: go on where the place holds files; those of other names stay.
        options: as for :func:`prepare`.

    Returns:
        The page's address.

    Raises:
        UnweaveError: what ``prepare`` raises; when the place holds files; for what the hub refuses.
    """
    formats.check_place(repository, folder)
    if _is_ready(thing):
        if given := sorted(name for name, value in options.items() if value not in (None, {}, "unweave")):
            raise UnweaveError(
                f"{thing} has its card already: edit its README.md instead of giving {', '.join(given)}, or push what "
                "it was made of"
            )
        return formats.upload(thing, repository, folder, private=private, force=force)
    with tempfile.TemporaryDirectory(prefix="unweave-") as place:
        load_as = "/".join(part for part in (repository, folder) if part)
        made = prepare(thing, Path(place) / "made", load_as=load_as, **options)
        return formats.upload(made, repository, folder, private=private, force=force)


def _is_ready(thing: str | Path) -> bool:
    readme = Path(thing) / "README.md"
    if not readme.is_file() or not formats.recognised(thing):
        return False
    return "\nlibrary_name: unweave\n" in readme.read_text(encoding="utf-8", errors="replace").partition("\n---\n")[0]


def _record(folder: Path, name: str) -> dict[str, Any]:
    """What unweave wrote down beside a dictionary, without the folders of local files; of others' nothing."""
    path = folder / f"{name}.json"
    values = read_json(path) if path.is_file() else {}
    ours = isinstance(values, dict) and str(values.get("format", "")).startswith(f"unweave.{name}")
    return without_paths(values) if ours else {}
