"""Logit diff amplification: two language models decoded in lock-step and served over gRPC.

`LDAModelPair` is the library's door; it is imported on first use, so that `import lda_service` stays light.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lda_service.model_pair import LDAModelPair

__all__ = ["LDAModelPair", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "LDAModelPair":
        from lda_service.model_pair import LDAModelPair

        return LDAModelPair
    raise AttributeError(f"module 'lda_service' has no attribute {name!r}")
