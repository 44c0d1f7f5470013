"""Dictionaries on the hub by short names: what the names of repositories and files say of them, and nothing more.

A format says beside its loader which repositories it knows and how to read their names. Which files they hold comes
from a snapshot in the package, or from the hub itself after :func:`refresh`. No weights were read for any of it.
"""

from unweave.formats.catalogue.entry import Entry as Entry
from unweave.formats.catalogue.listings import Refreshed as Refreshed
from unweave.formats.catalogue.listings import refresh as refresh
from unweave.formats.catalogue.search import entries as entries
from unweave.formats.catalogue.search import find as find
from unweave.formats.catalogue.search import list_dictionaries as list_dictionaries
from unweave.formats.catalogue.search import near as near
from unweave.formats.catalogue.search import resolve as resolve
from unweave.formats.catalogue.search import unlisted as unlisted
