"""What the bench uses of transformers. It takes many seconds to import, so what can do without it imports nothing here.

Modules that only need a type import it from transformers for the type checker alone.
"""

from __future__ import annotations

from qzo.quiet import quiet_libraries

with quiet_libraries():
    import transformers
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        GgufConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        modeling_gguf_pytorch_utils,
    )
    from transformers.pytorch_utils import Conv1D
    from transformers.utils import import_utils, logging

__all__ = [
    "CONFIG_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoConfig",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "Conv1D",
    "GgufConfig",
    "PreTrainedConfig",
    "PreTrainedModel",
    "PreTrainedTokenizerBase",
    "import_utils",
    "logging",
    "modeling_gguf_pytorch_utils",
    "transformers",
]
