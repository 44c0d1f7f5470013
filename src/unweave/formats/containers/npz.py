"""npz: a zip of numpy arrays. Arrays of Python objects, which are pickles, are refused."""

from __future__ import annotations

import warnings
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from unweave.errors import UnweaveError
from unweave.formats.containers._info import TensorInfo, Tensors
from unweave.formats.containers.archive import members

_DTYPES = {"<f8": "F64", "<f4": "F32", "<f2": "F16", "|b1": "BOOL", "|i1": "I8", "|u1": "U8"}
_DTYPES |= {"<i8": "I64", "<i4": "I32", "<i2": "I16", "<u8": "U64", "<u4": "U32", "<u2": "U16"}
_ERRORS = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, TypeError, KeyError, SyntaxError)
_ERRORS = (*_ERRORS, NotImplementedError, RuntimeError, OverflowError, MemoryError, IndexError, AttributeError)


class NpzFile(Tensors):
    def _raw(self, name: str) -> Tensor:
        info = self.info[name]
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
                _, fortran, dtype, _ = _header(file)
                data = bytearray(file.read(info.n_bytes + 1))  # one more, so that the checksum is looked at
        except _ERRORS as error:
            raise UnweaveError(f"{self.path}: cannot read {name!r} ({error}); fetch the file again") from None
        if len(data) != info.n_bytes:
            raise UnweaveError(
                f"{self.path}: {name!r} has {len(data):,} bytes, expected {info.n_bytes:,}; fetch it again"
            )
        array = np.frombuffer(data, dtype).reshape(info.shape, order="F" if fortran else "C")
        return torch.from_numpy(np.ascontiguousarray(array))


def open_npz(path: Path) -> NpzFile:
    """Shapes and dtypes of the arrays, from the few bytes before each of them.

    Raises:
        UnweaveError: for arrays of objects, sizes that do not fit, and whatever is wrong with the archive.
    """
    info = {}
    for member in members(path):
        name = member.filename.removesuffix(".npy")
        if name == member.filename:
            raise UnweaveError(f"{path}: expected arrays (.npy) only, found {member.filename[:80]!r}")
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                shape, _, dtype, start = _header(file)
        except _ERRORS as error:
            raise UnweaveError(
                f"{path}: {name!r} is not a numpy array ({str(error)[:200]}); fetch the file again"
            ) from None
        if dtype.hasobject:
            raise UnweaveError(
                f"{path}: {name!r} holds Python objects, which only a pickle can read, and a pickle can run any "
                "program; expected numbers. Ask whoever made it for plain arrays"
            )
        if dtype.str not in _DTYPES:
            raise UnweaveError(f"{path}: {name!r} has dtype {dtype.str[:40]}, expected one of {', '.join(_DTYPES)}")
        info[name] = TensorInfo(_DTYPES[dtype.str], shape)
        if start + info[name].n_bytes != member.file_size:
            raise UnweaveError(
                f"{path}: {name!r} of shape {str(shape)[:60]} needs {info[name].n_bytes:,} bytes, it has "
                f"{member.file_size - start:,}; the file is damaged, fetch it again"
            )
    return NpzFile(path, info)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    version = npy.read_magic(file)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the npy format")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns of odd headers, which are refused below
        shape, fortran, dtype = read(file)
    if len(shape) > 16 or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 48 for n in shape):
        raise ValueError(f"shape {str(shape)[:60]}")
    return shape, bool(fortran), dtype, file.tell()
