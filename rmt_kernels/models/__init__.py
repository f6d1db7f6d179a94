"""The published systems, as short models on the kernels: :data:`MODELS` by name, :func:`build` makes one."""

from rmt_kernels.models.blocks import ModelConfig, SegmentModel
from rmt_kernels.models.membart import MemBART
from rmt_kernels.models.memformer import Memformer
from rmt_kernels.models.memory_transformer import MemBottleneck, MemCtrl, MemCtrlShared, MemTransformer
from rmt_kernels.models.rmt import RMT, NoMemory, RMTEncoder
from rmt_kernels.models.transformer_xl import RMTTransformerXL, TransformerXL

__all__ = [
    "MODELS",
    "RMT",
    "MemBART",
    "MemBottleneck",
    "MemCtrl",
    "MemCtrlShared",
    "MemTransformer",
    "Memformer",
    "ModelConfig",
    "NoMemory",
    "RMTEncoder",
    "RMTTransformerXL",
    "SegmentModel",
    "TransformerXL",
    "build",
]

MODELS: dict[str, type[SegmentModel]] = {
    model.name: model
    for model in (
        NoMemory, RMT, RMTEncoder, TransformerXL, RMTTransformerXL, MemTransformer, MemCtrl, MemCtrlShared,
        MemBottleneck, Memformer, MemBART,
    )
}  # fmt: skip


def build(name: str, config: ModelConfig) -> SegmentModel:
    """A new model of the system that ``name`` stands for.

    Raises:
        TypeError, ValueError: an unknown name, or a configuration that the system can't have.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {list(MODELS)}, got {name!r}")
    return MODELS[name](config)
