"""Files of embeddings, and the folder that a run gathers them in until all are there.

    .npz    NumPy's archive: an array for each protein, by its name
    .h5     HDF5: the same as datasets (extra ``hdf5``)

Proteins are embedded in groups; each finished group is a file of the folder ``OUT.partial``, which
also says what it is made from, so that a run that was stopped goes on. The result is written aside
and renamed, and the folder goes.
"""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from rotq.calibration.fasta import Record
from rotq.checkpoint.shards import save_tensors
from rotq.checkpoint.source import read_tensors
from rotq.disk.destination import exists, file_to_write
from rotq.disk.files import make_folder, remove, whole_file
from rotq.errors import RotqError

SUFFIXES = (".npz", ".h5")
MADE_BY = "rotq embed"
_KEY = "embed.json"
_MARK = "rotq"
"""Comment of an archive, attribute of an HDF5 file: told from those of others."""


def output_file(output: Path, inputs: Mapping[str, Path]) -> Path:
    """Where embeddings may be written.

    Raises:
        RotqError: neither ending, h5py is missing, or it is a file that rotq has not written.
    """
    if output.suffix not in SUFFIXES:
        raise RotqError(f"{output}: embeddings are written as {' or '.join(SUFFIXES)}")
    if output.suffix == ".h5" and importlib.util.find_spec("h5py") is None:
        raise RotqError(".h5 files need h5py; install the extra: pip install 'rotq[hdf5]'")
    return file_to_write(output, inputs, _foreign)


def check_names(records: Sequence[Record]) -> None:
    """Refuse names that are missing or stand twice, since a file is read by them.

    Raises:
        RotqError: names the record.
    """
    seen: set[str] = set()
    for number, record in enumerate(records, 1):
        if not record.name or record.name in seen:
            what = "has no name" if not record.name else f"has the name {record.name} again"
            raise RotqError(f"record {number} {what}; embeddings are found by name")
        seen.add(record.name)


class Gathering:
    """Finished groups of a run."""

    def __init__(self, output: Path, key: Mapping[str, Any]) -> None:
        """
        Args:
            output: From ``output_file``.
            key: What the embeddings depend on, plain values.

        Raises:
            RotqError: the folder is of another run, or not rotq's.
        """
        self.output = output
        self.folder = output.with_name(f"{output.name}.partial")
        wanted = {"made_by": MADE_BY, "key": json.loads(json.dumps(key))}
        if exists(self.folder) and _read_key(self.folder) != wanted:
            raise RotqError(
                f"{self.folder} is no unfinished run of this command; remove it, or choose another "
                "output"
            )
        self._wanted = wanted

    def finished(self, number: int) -> bool:
        """Whether a group is there."""
        return self._file(number).exists()

    def add(self, number: int, embeddings: Mapping[str, Tensor]) -> None:
        """Keep a group, by name of the protein."""
        if not self.folder.exists():
            make_folder(self.folder)
            with whole_file(self.folder / _KEY) as file:
                file.write(json.dumps(self._wanted).encode())
        save_tensors(self._file(number), embeddings)

    def publish(self, records: Sequence[Record], groups: int) -> None:
        """Write the output in the order of the records, and remove what was gathered."""
        parts = [read_tensors(self._file(number)) for number in range(groups)]
        by_name = {name: tensor for part in parts for name, tensor in part.items()}
        found = ((record.name, by_name[record.name].numpy()) for record in records)
        with whole_file(self.output) as file:
            (_write_npz if self.output.suffix == ".npz" else _write_h5)(file, found)
        remove(self.folder)

    def _file(self, number: int) -> Path:
        return self.folder / f"group-{number:06d}.safetensors"


def _write_npz(file: BinaryIO, found: Iterator[tuple[str, Any]]) -> None:
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        archive.comment = _MARK.encode()
        for name, array in found:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def _write_h5(file: BinaryIO, found: Iterator[tuple[str, Any]]) -> None:
    import h5py

    with h5py.File(file, "w") as archive:
        archive.attrs["made_by"] = MADE_BY
        for name, array in found:
            # a slash in a name would be a folder
            archive.create_dataset(name.replace("/", "_"), data=array).attrs["name"] = name


def _foreign(path: Path) -> str | None:
    """What makes an existing path no file of embeddings of rotq's."""
    if not path.is_file():
        return "is no plain file"
    if path.suffix == ".npz" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return None if archive.comment == _MARK.encode() else "exists and is not rotq's"
    if path.suffix == ".h5":
        import h5py

        if h5py.is_hdf5(path):
            with h5py.File(path) as archive:
                made = archive.attrs.get("made_by") == MADE_BY
            return None if made else "exists and is not rotq's"
    return "exists and is not rotq's"


def _read_key(folder: Path) -> Any:
    try:
        return json.loads((folder / _KEY).read_bytes())
    except (OSError, ValueError):
        return None
