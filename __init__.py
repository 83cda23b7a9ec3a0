"""viPolyQwen: one 1024-d vector for text, images, audio and mixes of them."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_vipolyqwen import ViPolyQwenConfig
    from .modeling_vipolyqwen import ViPolyQwenModel
    from .processing_vipolyqwen import ViPolyQwenProcessor

__version__ = "0.2.0.dev0"  # the only place: pyproject.toml, the cards and `--version` read it
__all__ = ["ViPolyQwenConfig", "ViPolyQwenModel", "ViPolyQwenProcessor", "__version__"]

_HOMES = {
    "ViPolyQwenConfig": "configuration_vipolyqwen",
    "ViPolyQwenModel": "modeling_vipolyqwen",
    "ViPolyQwenProcessor": "processing_vipolyqwen",
}


def __getattr__(name: str) -> Any:
    """Imports a class when it is first asked for (PEP 562), so that `import vipolyqwen` does not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    """Names the classes too, for completion."""
    return sorted({*globals(), *__all__})
