"""GGUF files, read by transformers: what they are checked for before and after, as it skips what it does not know.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import logging
import re
import struct
from collections import Counter
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from lora_runtime.errors import BaseModelUnsupported, first_line
from lora_runtime.model.skeleton import is_decoder

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_EXTRA = "pip install 'multilora[gguf]'"
_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_GPT2_SPLITS = {None, "default", "gpt-2", "gpt2"}  # llama.cpp's names of the pattern that is the default of BPE

logger = logging.getLogger(__name__)


class _Tensor(Protocol):
    """An entry of a file's table of tensors."""

    name: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the data
    nbytes: int


class _Header(Protocol):
    """What stands before a file's data."""

    architecture: str
    tensors: tuple[_Tensor, ...]
    data_start: int  # bytes from the start of the file


def load_gguf(place: str, gguf_file: str, name: str) -> tuple[Any, dict[str, Any], PreTrainedTokenizerBase]:
    """A decoder in fp32, transformers' report of its loading, and its tokenizer; raises BaseModelUnsupported.

    Files of a tokenizer beside a local GGUF file are preferred to the tokenizer inside it.
    """
    _require_packages(name)
    found = cached_file(place, gguf_file)
    path = Path(str(found)).absolute()  # a bare name is looked for in the working directory first, by transformers
    header, metadata = _read_header(path, name)
    config = _read_config(path, header, metadata, name)
    from transformers.utils.quantization_config import GgufConfig

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        gguf_file=str(path),
        config=config,
        quantization_config=GgufConfig(dequantize=True),  # which leaves none in the model's own config
        dtype=torch.float32,
        output_loading_info=True,
    )
    model, info = loaded
    _check_all_read(header, model, name)
    return model, info, _load_tokenizer(path, config, metadata, name)


def _require_packages(name: str) -> None:
    lacking = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if find_spec("transformers.integrations.gguf") is None:
        lacking.append("transformers 5.24")
    if lacking:
        message = f"base {name}: reading a GGUF file needs {' and '.join(lacking)}, not installed here: {_EXTRA}"
        raise BaseModelUnsupported(message, base=name)


def _read_header(path: Path, name: str) -> tuple[_Header, dict[str, Any]]:
    """The header and metadata of a file that is whole."""
    if (shard := _SHARD.search(path.name)) is not None and int(shard[1]) > 1:
        raise BaseModelUnsupported(
            f"base {name}: is one of {int(shard[1])} parts; merge them with llama-gguf-split --merge", base=name
        )
    with path.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise BaseModelUnsupported(
            f"base {name}: is no GGUF file: it starts with {magic!r} instead of {_MAGIC!r}; fetch it again, or give "
            "the folder of a safetensors checkpoint",
            base=name,
        )
    from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata

    try:
        header: Any = GgufHeader.from_file(str(path))
        metadata, _ = read_gguf_metadata(str(path))
    except (ValueError, KeyError, IndexError, struct.error) as error:
        raise BaseModelUnsupported(
            f"base {name}: its GGUF header cannot be read ({error}); fetch the file again, or convert the base anew",
            base=name,
        ) from error
    end = header.data_start + max((tensor.offset + tensor.nbytes for tensor in header.tensors), default=0)
    if (size := path.stat().st_size) < end:
        raise BaseModelUnsupported(
            f"base {name}: is cut short: it has {size:,} bytes, its header speaks of {end:,}; fetch it again", base=name
        )
    return header, metadata


def _read_config(path: Path, header: _Header, metadata: dict[str, Any], name: str) -> Any:
    """transformers' config of the file; refuses what it would leave out of it."""
    architecture = header.architecture
    remedy = "serve the base's safetensors checkpoint instead"
    try:
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=str(path))
    except (OSError, ValueError, KeyError, IndexError, TypeError, NotImplementedError) as error:
        raise BaseModelUnsupported(
            f"base {name}: transformers cannot read architecture {architecture!r} from this GGUF file "
            f"({first_line(error)}); {remedy}",
            base=name,
        ) from error
    if config.is_encoder_decoder or not is_decoder(config):
        raise BaseModelUnsupported(
            f"base {name}: architecture {architecture!r} of this GGUF file is no decoder; {remedy}", base=name
        )
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    factor = metadata.get(f"{architecture}.rope.scaling.factor", metadata.get(f"{architecture}.rope.scale_linear"))
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind == "default" and factor != 1 and (scaling != "none" or factor is not None):
        raise BaseModelUnsupported(
            f"base {name}: its rotary angles are scaled ({scaling}, factor {factor}), which transformers does not read "
            f"from GGUF; {remedy}",
            base=name,
        )
    return config


def _check_all_read(header: _Header, model: nn.Module, name: str) -> None:
    """Refuse a model that leaves out some of the file's tensors, as transformers does with those it has no name for.

    Both hold the same numbers of weights when nothing is left out: shapes may be transposed, experts merged, but
    parameters that the file lacks are reported as missing.
    """
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    tensors = [tensor for tensor in header.tensors if not (tied and tensor.name == "output.weight")]
    found, taken = sum(prod(tensor.shape) for tensor in tensors), sum(p.numel() for p in model.parameters())
    if found == taken:
        return
    shapes = Counter(tuple(sorted(parameter.shape)) for parameter in model.parameters())
    extra: list[str] = []
    for tensor in sorted(tensors, key=lambda tensor: "rope" in tensor.name or tensor.name.endswith(".bias")):
        shapes[key := tuple(sorted(tensor.shape))] -= 1
        if shapes[key] < 0:
            extra.append(tensor.name)
    such = f", such as {extra[0]}," if extra else ""
    raise BaseModelUnsupported(
        f"base {name}: its GGUF file holds {found:,} weights, the model that transformers makes of it {taken:,}; what "
        f"is left out{such} would change its answers; serve the base's safetensors checkpoint instead",
        base=name,
    )


def _load_tokenizer(path: Path, config: Any, metadata: dict[str, Any], name: str) -> PreTrainedTokenizerBase:
    beside = [file for file in _TOKENIZER_FILES if (path.parent / file).is_file()]
    if len(beside) == 1:
        (lacking,) = set(_TOKENIZER_FILES) - set(beside)
        raise BaseModelUnsupported(
            f"base {name}: {beside[0]} lies beside the GGUF file without {lacking}; "
            "put both there, or neither to have the file's own tokenizer",
            base=name,
        )
    if beside:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), config=config)
    else:
        _warn_of_split(metadata, name)
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=str(path))
    if len(tokenizer) > config.vocab_size:
        raise BaseModelUnsupported(
            f"base {name}: its tokenizer has {len(tokenizer):,} tokens, its embedding {config.vocab_size:,} rows; put "
            f"the base's own {' and '.join(_TOKENIZER_FILES)} beside the GGUF file",
            base=name,
        )
    return tokenizer


def _warn_of_split(metadata: dict[str, Any], name: str) -> None:
    """Byte-level vocabularies differ in how text is split before merging; transformers knows some of the patterns."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    split = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") != "gpt2" or split in _GPT2_SPLITS or split in GGUF_PRE_TOKENIZER_SPLITS:
        return
    logger.warning(
        "base %s: transformers does not know how its tokenizer (tokenizer.ggml.pre %r) splits text, and splits as "
        "GPT-2's does; put the base's %s beside the GGUF file to be exact",
        name,
        split,
        " and ".join(_TOKENIZER_FILES),
    )
