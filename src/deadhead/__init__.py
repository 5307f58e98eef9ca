"""deadhead finds the dead heads of a Transformer language model and cuts them off.

    gates = deadhead.attach(model)          # a trainable gate on every attention head
    ...                                     # train with deadhead.SparsityCallback(gates)
    deadhead.cut(model, gates.plan())       # heads whose gates closed are gone

The public API is what `__init__.pyi` lists; everything else may change. A name is loaded when it is first used, and the
Auto classes of transformers learn of deadhead's models when transformers is imported.
"""

import importlib
from typing import Any

import lazy_loader
import wrapt

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def _register_models(_: Any) -> None:
    importlib.import_module("deadhead.models")


wrapt.register_post_import_hook(_register_models, "transformers")
