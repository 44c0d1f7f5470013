"""Where activations come from."""

from unweave.sources._base import Source as Source
from unweave.sources._base import SourceGroup as SourceGroup
from unweave.sources._loading import parse_device as parse_device
from unweave.sources._positions import Contexts as Contexts
from unweave.sources.arrays import ArraySource as ArraySource
from unweave.sources.assets import demo_documents as demo_documents
from unweave.sources.assets import demo_model as demo_model
from unweave.sources.assets import fetch_wheel as fetch_wheel
from unweave.sources.chats import ChatTemplate as ChatTemplate
from unweave.sources.composite import CompositeSite as CompositeSite
from unweave.sources.composite import find_sites as find_sites
from unweave.sources.composite import part_labels as part_labels
from unweave.sources.composite import part_names as part_names
from unweave.sources.composite import target_parts as target_parts
from unweave.sources.documents import Documents as Documents
from unweave.sources.documents import read_documents as read_documents
from unweave.sources.joined import JoinedSource as JoinedSource
from unweave.sources.language_model import LanguageModel as LanguageModel
from unweave.sources.mixing import DistinctDocuments as DistinctDocuments
from unweave.sources.mixing import MixedDocuments as MixedDocuments
from unweave.sources.modules import ModuleSource as ModuleSource
from unweave.sources.sites import Site as Site
from unweave.sources.sites import find_site as find_site
from unweave.sources.sites import list_sites as list_sites
from unweave.sources.text import TextSource as TextSource
from unweave.sources.text_sites import TextSites as TextSites
