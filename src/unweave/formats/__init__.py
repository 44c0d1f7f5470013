"""Other libraries' checkpoints: recognised by their content, read into unweave's dictionaries, written again."""

from unweave.formats import circuit_tracer as circuit_tracer
from unweave.formats import dictionary_learning as dictionary_learning
from unweave.formats import gemma_scope as gemma_scope
from unweave.formats import hypothesaes as hypothesaes
from unweave.formats import llama_scope as llama_scope
from unweave.formats import llamascopium as llamascopium
from unweave.formats import native as native
from unweave.formats import openai as openai
from unweave.formats import overcomplete as overcomplete
from unweave.formats import saelens as saelens
from unweave.formats import single_files as single_files
from unweave.formats import sparsify as sparsify
from unweave.formats._checkpoint import Checkpoint as Checkpoint
from unweave.formats._facts import Facts as Facts
from unweave.formats._fold import Parts as Parts
from unweave.formats._fold import fold as fold
from unweave.formats.registry import Format as Format
from unweave.formats.registry import get as get
from unweave.formats.registry import holds_weights as holds_weights
from unweave.formats.registry import inspect as inspect
from unweave.formats.registry import load as load
from unweave.formats.registry import names as names
from unweave.formats.registry import recognised as recognised
from unweave.formats.registry import register as register
from unweave.formats.registry import writable as writable
from unweave.formats.registry import write as write
