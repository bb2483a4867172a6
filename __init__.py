"""dsv3: DeepSeek-V3 and R1, whole and portable.

The names below are imported when they are first used, so that `import dsv3` and `dsv3 --help` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backends import use_backend
    from .core.config import ModelConfig
    from .core.encoding import encode_chat
    from .core.model import DeepseekV3
    from .core.sampling_params import Guide, SamplingParams
    from .core.tokenizer import Tokenizer
    from .errors import UserError
    from .serving.llm import LLM

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "DeepseekV3",
    "Guide",
    "ModelConfig",
    "SamplingParams",
    "Tokenizer",
    "UserError",
    "encode_chat",
    "use_backend",
]

_HOME = {
    "LLM": "serving.llm",
    "DeepseekV3": "core.model",
    "Guide": "core.sampling_params",
    "ModelConfig": "core.config",
    "SamplingParams": "core.sampling_params",
    "Tokenizer": "core.tokenizer",
    "UserError": "errors",
    "encode_chat": "core.encoding",
    "use_backend": "backends",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dsv3' has no attribute {name!r}")
    if name in ("DeepseekV3", "LLM"):
        # Core knows no backend. Without this, a model used before any backend is chosen would run specifications.
        import_module(".backends.cpu", __name__)
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
