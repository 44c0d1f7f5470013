"""The files that weights come in, one kind a file. Reading one executes nothing, whatever is in it."""

from unweave.formats.containers._info import TensorInfo as TensorInfo
from unweave.formats.containers._info import Tensors as Tensors
from unweave.formats.containers.archive import is_archive as is_archive
from unweave.formats.containers.archive import is_safe_name as is_safe_name
from unweave.formats.containers.archive import members as members
from unweave.formats.containers.archive import unpack as unpack
from unweave.formats.containers.headers import SMALL as SMALL
from unweave.formats.containers.headers import read_headers as read_headers
from unweave.formats.containers.opening import is_headed as is_headed
from unweave.formats.containers.opening import open_tensors as open_tensors
from unweave.formats.containers.settings import MAX_SETTINGS as MAX_SETTINGS
from unweave.formats.containers.settings import Settings as Settings
from unweave.formats.containers.settings import read_settings as read_settings
