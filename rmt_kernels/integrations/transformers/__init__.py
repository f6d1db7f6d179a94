"""Hugging Face transformers: segment attention as an attention implementation, and RMT around pretrained models."""

try:
    import transformers as _transformers
except ImportError as error:
    raise ImportError(
        "rmt_kernels.integrations.transformers needs transformers 4.57 or later: pip install "
        "'transformers>=4.57' safetensors"
    ) from error
if tuple(int(part) for part in _transformers.__version__.split(".")[:2]) < (4, 57):
    raise ImportError(
        f"rmt_kernels.integrations.transformers needs transformers 4.57 or later, got {_transformers.__version__}"
    )

from rmt_kernels.integrations.transformers.attention import register, swap_in
from rmt_kernels.integrations.transformers.config import RMTConfig, marks_of
from rmt_kernels.integrations.transformers.generation import RMTForCausalLM
from rmt_kernels.integrations.transformers.modeling import RMTForMaskedLM, RMTForSequenceClassification, RMTOutput
from rmt_kernels.integrations.transformers.state import RMTState

__all__ = [
    "RMTConfig",
    "RMTForCausalLM",
    "RMTForMaskedLM",
    "RMTForSequenceClassification",
    "RMTOutput",
    "RMTState",
    "marks_of",
    "register",
    "swap_in",
]
