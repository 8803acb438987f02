"""A local model folder as Hugging Face libraries write it: config.json and safetensors, read tensor by tensor."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.container import LENGTH_BYTES, Slot, header_length, parse_header
from ..checkpoint.strict import load_json
from ..errors import CheckpointDamaged, DataError, RecipeError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of each file, for its digest


class ModelFolder:
    """Tensors by name, read when they are asked for. Raises RecipeError where the path is no such folder."""

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise RecipeError(
                f"model.path is {path!r}, where there is no folder; give a local folder with {CONFIG} and {WEIGHTS}: "
                "names of a model hub are not looked up, unitrain never asks a network"
            )
        self._maps: dict[str, tuple[memoryview, dict[str, Slot]]] = {}

    def config(self) -> dict[str, Any]:
        """What config.json says."""
        return read_config("model.path", self.path / CONFIG)

    @cached_property
    def files(self) -> Mapping[str, str]:
        """Tensor name -> file of the folder. Raises RecipeError without safetensors."""
        index = self.path / INDEX
        if index.is_file():
            try:
                found = load_json(index.read_bytes())["weight_map"]
                weights = {str(name): Path(str(file)).name for name, file in found.items()}  # never outside the folder
            except (OSError, ValueError, KeyError, AttributeError) as error:
                raise DataError(f"{index} cannot be read: {error}; copy the folder again") from error
            return weights
        if (self.path / WEIGHTS).is_file():
            return dict.fromkeys(self._open(WEIGHTS)[1], WEIGHTS)
        pickles = sorted(file.name for pattern in _PICKLES for file in self.path.glob(pattern))
        if pickles:
            raise RecipeError(
                f"{self.path} holds its weights as pickle ({pickles[0]}), which can run any code when it is read; "
                "convert it once where you trust it, with transformers: "
                "Model.from_pretrained(folder).save_pretrained(new_folder)"
            )
        raise RecipeError(f"{self.path} has neither {WEIGHTS} nor {INDEX}; give a folder with a model's weights")

    def read(self, name: str) -> NDArray[np.float32]:
        """The whole tensor as a fresh fp32 array. Raises DataError for damaged files and quantised tensors."""
        return self.rows(name, 0, (*self.shape(name), 1)[0])

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows of a tensor as a fresh fp32 array; all of one without dimensions."""
        data, slot = self._slot(name)
        if slot.shape:
            row_bytes = slot.num_bytes // max(slot.shape[0], 1)
            slot = slot._replace(
                shape=(stop - start, *slot.shape[1:]),
                start=slot.start + start * row_bytes,
                num_bytes=(stop - start) * row_bytes,
            )
        array = slot.array(data[slot.start : slot.start + slot.num_bytes])
        if slot.dtype == "bfloat16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        if array.dtype.kind != "f":
            raise DataError(
                f"{self.path} holds {name} as {slot.dtype}; quantised weights cannot be trained, give the full ones"
            )
        return array.astype(np.float32)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._slot(name)[1].shape

    def digest(self) -> str:
        """Changes when the model does: its config, its files' sizes and headers, and samples of their bytes."""
        digest = hashlib.sha256((self.path / CONFIG).read_bytes())
        for file in sorted(set(self.files.values())):
            data, slots = self._open(file)
            end = min((slot.start for slot in slots.values()), default=len(data))
            digest.update(f"{file}:{len(data)}:".encode() + data[:end])
            for place in np.linspace(end, max(len(data) - _SAMPLE_BYTES, end), _SAMPLES, dtype=np.int64).tolist():
                digest.update(data[place : place + _SAMPLE_BYTES])
        return digest.hexdigest()[:32]

    def _slot(self, name: str) -> tuple[memoryview, Slot]:
        data, slots = self._open(self.files[name])
        if name not in slots:
            raise DataError(f"{self.path / self.files[name]} lacks {name}, which {INDEX} promises; copy it again")
        return data, slots[name]

    def _open(self, name: str) -> tuple[memoryview, dict[str, Slot]]:
        """The bytes of a file, mapped, and where its tensors lie."""
        if name not in self._maps:
            path = self.path / name
            try:
                with path.open("rb") as file:
                    data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                length = header_length(bytes(data[:LENGTH_BYTES]), len(data), str(path))
                slots = parse_header(bytes(data[LENGTH_BYTES : LENGTH_BYTES + length]), len(data), str(path))
            except (OSError, ValueError) as error:
                raise DataError(f"{path} cannot be read: {error}") from error
            except CheckpointDamaged as error:
                raise DataError(f"{error}; copy it again") from error
            self._maps[name] = data, slots
        return self._maps[name]


def read_config(where: str, file: Path) -> dict[str, Any]:
    """A config.json as plain values. Raises RecipeError."""
    try:
        return load_json(file.read_bytes())
    except FileNotFoundError as error:
        raise RecipeError(f"{where} leads to {str(file)!r}, where there is no file") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"{file} cannot be used as a model's configuration: {error}") from error
