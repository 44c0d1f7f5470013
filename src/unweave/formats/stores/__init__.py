"""Other libraries' stores of activations and of codes: recognised by their content, read as sources."""

from unweave.formats.stores._base import ForeignRows as ForeignRows
from unweave.formats.stores._base import ForeignStore as ForeignStore
from unweave.formats.stores.delphi import Latents as Latents
from unweave.formats.stores.delphi import write_latents as write_latents
from unweave.formats.stores.llamascopium import LlamascopiumChunks as LlamascopiumChunks
from unweave.formats.stores.registry import names as names
from unweave.formats.stores.registry import open_store as open_store
from unweave.formats.stores.registry import recognised as recognised
from unweave.formats.stores.saelens import SAELensCache as SAELensCache
from unweave.formats.stores.saev import SaevShards as SaevShards
