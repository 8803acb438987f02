"""TensorFlow: every rank holds the whole model; gradients are summed by MultiWorkerMirroredStrategy's collectives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import unitrain.strategies._tensorflow_environment  # noqa: F401  # isort: skip  # before TensorFlow is imported

import tensorflow as tf
from numpy.typing import NDArray

from unitrain.errors import Refused
from unitrain.strategies import _tensorflow_refusals
from unitrain.strategies._tensorflow_engine import TensorFlowEngine
from unitrain.strategies._tensorflow_models import build_model
from unitrain.strategies._tensorflow_ranks import Ranks
from unitrain.strategy import Role, Strategy
from unitrain.world import World


class TensorFlow(Strategy):
    """Options: `communication` (auto, ring, nccl) and `jit_compile`."""

    name: ClassVar[str] = "tensorflow"
    framework: ClassVar[str] = "tensorflow"
    even: ClassVar[bool] = True
    problems = staticmethod(_tensorflow_refusals.tensorflow)
    ranks: Ranks | None = None

    def open(self, world: World) -> None:
        """See Strategy."""
        self.world = world
        tf.get_logger().setLevel("ERROR")
        _use_threads(world)
        gpus = tf.config.list_physical_devices("GPU")
        self.on_gpu = bool(gpus)
        if gpus:
            _use_gpu(gpus, world)
        communication = self.recipe.strategy.options.get("communication", "auto")
        if communication == "nccl" and not gpus:
            raise Refused("strategy.options.communication is 'nccl', and TensorFlow sees no GPU; use auto or ring")
        if communication == "auto":
            communication = "nccl" if gpus else "ring"
        self.ranks = Ranks(world, communication)

    def bind(self, role: Role, seed: int) -> TensorFlowEngine:
        """See Strategy."""
        precision = self.recipe.train.precision
        jit = bool(self.recipe.strategy.options.get("jit_compile", False))
        return TensorFlowEngine(build_model(role, seed, precision), role, self._joined, self.recipe, jit=jit)

    def place(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """See Strategy."""
        with tf.device("/GPU:0" if self.on_gpu else "/CPU:0"):
            return {name: tf.convert_to_tensor(array) for name, array in arrays.items()}

    def share(self, text: str) -> str:
        """See Strategy."""
        shared: str = self._joined.meeting.share(text)
        return shared

    def barrier(self) -> None:
        """See Strategy."""
        self._joined.meeting.barrier()

    def memory_bytes(self) -> int:
        """See Strategy."""
        if not self.on_gpu:
            return super().memory_bytes()
        return int(tf.config.experimental.get_memory_info("GPU:0")["peak"])

    def close(self) -> None:
        """See Strategy."""
        if self.ranks is not None:
            self.ranks.close()

    @property
    def _joined(self) -> Ranks:
        assert self.ranks is not None, "opened before"
        return self.ranks


def _use_threads(world: World) -> None:
    """As many CPU threads as this rank was given, where TensorFlow has not begun to work with its own number."""
    threading = tf.config.threading
    if world.threads and threading.get_intra_op_parallelism_threads() != world.threads:
        try:
            threading.set_intra_op_parallelism_threads(world.threads)
            threading.set_inter_op_parallelism_threads(max(2, world.threads))
        except RuntimeError:
            print(
                f"note: TensorFlow has worked before the run began, so OMP_NUM_THREADS={world.threads} comes too late",
                flush=True,
            )


def _use_gpu(gpus: list[Any], world: World) -> None:
    """This rank's GPU, and of its memory only what is needed."""
    if world.local_rank >= len(gpus):
        raise Refused(
            f"rank {world.local_rank} of this node has no GPU: {len(gpus)} are visible; use --nproc {len(gpus)}, or "
            "hide them all (CUDA_VISIBLE_DEVICES=) to train on CPU"
        )
    own = gpus[world.local_rank]
    if tf.config.get_visible_devices("GPU") != [own]:
        tf.config.set_visible_devices(own, "GPU")
        tf.config.experimental.set_memory_growth(own, True)
