"""The gguf package, held to what a file has: its own reader takes any declared size."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import numpy as np

from nblens.errors import UserError, first_line

__all__ = ["gguf_library", "gguf_reader"]


def gguf_library() -> ModuleType:
    """Import the package that reads and writes GGUF files.

    Raises
    ------
    UserError
        It is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            f'GGUF files need the gguf package: pip install "nblens[gguf]" ({first_line(error)})'
        ) from error
    return gguf


def gguf_reader(path: str | os.PathLike[str], most_values: int | None = None) -> Any:
    """Open a file with a reader that refuses to read on past its end.

    Parameters
    ----------
    path : str or os.PathLike
        The file; its tensors are mapped, not read.
    most_values : int, optional
        Values that a header of this kind may hold. None: as many as the file has.

    Raises
    ------
    ValueError
        The header holds more, or declares what the file does not have. The package raises others over damage.
    """
    gguf = gguf_library()

    class Reader(gguf.GGUFReader):  # type: ignore[misc, name-defined]  # its package is imported when it is needed
        n_values = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **kwargs: Any) -> np.ndarray:
            self.n_values += 1
            if most_values is not None and self.n_values > most_values:
                raise ValueError(f"its header holds more than {most_values} values, as a whole model's does")
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError(f"it ends after {len(self.data)} bytes, before what it declares")
            values: np.ndarray = super()._get(offset, dtype, count, *args, **kwargs)
            return values

    return Reader(path)
