"""Export of a model in memory to a folder that reloads as exactly this model, and the way back.

An export is finished only when a fresh process has loaded the folder with plain transformers and computed the same
logits, bit for bit. Until then it is in a temporary folder, so that a failed check, a full disk or Ctrl-C leave nothing
behind and do not affect an older export.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lowrank_pl import serving
from lowrank_pl.export.hub import HubRepo, announce_upload, upload
from lowrank_pl.export.reload import ExportError, check_contents, check_merged, check_reload, logits_of
from lowrank_pl.factors.components import AnySize, NestedComponents
from lowrank_pl.factors.cutting import cut
from lowrank_pl.models import digests, hf_experts, hf_format, hf_layers, hf_quantized
from lowrank_pl.models.digests import DIGESTS, NESTED, check_files, listed_files, unchecked, write_digests
from lowrank_pl.models.hf_experts import dropped_experts, experts_fused, split_experts, split_modules
from lowrank_pl.models.hf_format import METHOD, LowRankAutoConfig, LowRankConfig, align, tied_weights
from lowrank_pl.models.hf_layers import (
    LowRankEmbedding,
    LowRankLinear,
    PivotedLinear,
    SharedLowRankLinear,
    loaded_by_hook,
)
from lowrank_pl.models.hf_quantized import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedLowRankLinear,
    QuantizedPivotedLinear,
    TiedHead,
    stored_state,
)
from lowrank_pl.models.identity import ORIGIN_KEY, ROTATION_KEY, base_class
from lowrank_pl.models.targets import body_of, replaced
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.resize import cut_plan
from lowrank_pl.serving.optimize import optimize_for_inference
from lowrank_pl.utils.files import at_home, atomic_directory, atomic_write, check_output_folder
from lowrank_pl.utils.json_files import is_figures
from lowrank_pl.utils.machine_limits import explain_limit

__all__ = [
    "CODE_FILES",
    "OTHER_SHAPES",
    "ExportReport",
    "check_destination",
    "is_compressed",
    "load_compressed",
    "load_cut",
    "plan_of_export",
    "save_compressed",
    "smaller_plan",
]

logger = logging.getLogger(__name__)

OTHER_SHAPES = "weights of other shapes than the config says"
"""What is said of a folder that transformers does not load for this reason."""

CODE = Path(hf_format.__file__).name

CODE_FILES = tuple(Path(module.__file__ or "") for module in (hf_format, hf_layers, hf_quantized, hf_experts, digests))
"""The files of the package that exports hold copies of."""

Entry = int | dict[str, Any]
"""The config's entry of one module: its rank, or rank, storage and side, or these with bits and group. The storage of
an embedding of low rank is ``embedding``, and that of a layer that reads the right factor of another one ``shared``.
That of a dropped expert says so, and nothing else."""

_EMBEDDINGS = {LowRankEmbedding.__name__, QuantizedEmbedding.__name__}

_KINDS = {
    kind.__name__
    for kind in (
        LowRankLinear, SharedLowRankLinear, PivotedLinear, QuantizedLinear, QuantizedLowRankLinear,
        QuantizedPivotedLinear,
    )
}  # fmt: skip


class Plan(Protocol):
    """The part of a rank plan that an export needs."""

    def to_json(self) -> str:
        """Return the plan as JSON."""


@dataclass(frozen=True)
class ExportReport:
    """A finished export.

    Attributes:
        directory: The folder.
        bytes: Size of its weight files.
        merged: Whether the factors were merged into dense weights.
        modules: Number of modules of the model that are low-rank, rounded to a few bits, or dropped experts.
        verified: Whether a fresh process has reloaded the folder and computed the same logits.
        url: Address of the commit on the hub; None if nothing was uploaded.
        nested_bytes: Size of the components for smaller sizes, in its subfolder ``nested``; 0 if there are none.
    """

    directory: Path
    bytes: int
    merged: bool
    modules: int
    verified: bool
    url: str | None = None
    nested_bytes: int = 0


def save_compressed(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan | AnySize | None = None,
    card: str | None = None,
    merge: bool = False,
    verify: bool = True,
    push_to_hub: str | HubRepo | None = None,
) -> ExportReport:
    """Write ``model`` to a folder that reloads as exactly this model, and return a report.

    The folder holds safetensors weights, ``config.json``, the generation configuration, the tokenizer with its chat
    template, ``plan.json``, ``README.md`` if a ``card`` is given, and the code in ``hf_format.py``, ``hf_layers.py``,
    ``hf_quantized.py``, ``hf_experts.py`` and ``digests.py``. ``lowrank.sha256`` has the SHA-256 of all these files but
    the card. It loads with :func:`load_compressed`, with ``AutoModelForCausalLM.from_pretrained`` after ``import
    lowrank_pl``, or anywhere with ``trust_remote_code=True``. Otherwise transformers stops at a size mismatch.

    The check runs the same probes here and in a fresh process on the same device, with the same number of threads and
    the same attention, and compares the bytes of the logits. It needs the memory of a second copy of the exported
    model. For a merged model, the fresh process is compared with the merged weights in memory byte for byte, and these
    with the low-rank model, whose logits may differ by ``sqrt(eps)`` of the type (relative root mean square). The check
    also covers everything of ``lowrank doctor`` that needs no text: finite weights, ranks and counts of a ``RankPlan``,
    BOS and token ids. A broken model is not exported, and warnings are logged.

    ``model`` keeps its modules, values, config and mode; tensors in main memory may move (see ``hf_format.align``).

    Args:
        model: A causal language model, some of whose linear layers are ``LowRankLinear`` or ``PivotedLinear``, or some
            of whose layers are rounded to a few bits (``lowrank_pl.models.hf_quantized``).
        directory: The folder to write; an older export there is replaced once the new one has passed the check.
        tokenizer: Tokenizer of the model.
        plan: The plan that the ranks come from. An ``AnySize`` holds its factors too: components of the layers that are
            stored dense or pivoted are then written to the subfolder ``nested``, so that ``load_compressed`` serves
            every smaller size.
        card: Text of the model card.
        merge: Write dense weights with the plain config of the base, for runtimes that do not know factors. Rounded
            layers are written in the type of the model, with the values that they stand for.
        verify: Whether to check the folder, also in a fresh process.
        push_to_hub: Repository of the Hugging Face hub to upload the finished folder to: ``user/model``, or a
            ``HubRepo`` that also says whether it is private, and the branch.

    Raises:
        ValueError: ``model`` is none of transformers, one of its layers can't be stored, ``directory`` holds something
            else than an export, ``push_to_hub`` can't be a repository, or ``merge`` or a rounded model is given with an
            ``AnySize``.
        ExportError: The folder does not reload as the model in memory, the model is broken, or the disk is full.
        UploadError: The folder is finished, but its upload failed.

    >>> from tempfile import TemporaryDirectory
    >>> from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
    >>> model = tiny_model("llama")
    >>> model.model.layers[0].mlp.up_proj = LowRankLinear(32, 96, 8, bias=False)
    >>> with TemporaryDirectory() as home:
    ...     report = save_compressed(model, f"{home}/small", tokenizer=byte_tokenizer(), verify=False)
    ...     reloaded = load_compressed(report.directory)
    >>> report.modules, torch.equal(reloaded.model.layers[0].mlp.up_proj.right, model.model.layers[0].mlp.up_proj.right)
    (1, True)
    """
    directory = at_home(directory)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"a {type(model).__name__} was given: expected a model of transformers; merge an adapter of PEFT into it "
            "first (merge_and_unload), and give the model that torch.compile was called with"
        )
    repo = HubRepo(push_to_hub) if isinstance(push_to_hub, str) else push_to_hub
    check_destination(directory)
    if merge and isinstance(plan, AnySize):
        raise ValueError("smaller sizes are not cut from merged weights: leave out merge, or give the plan alone")
    if isinstance(plan, AnySize) and (plan.plan.is_rounded or any(map(_is_rounded, model.modules()))):
        raise ValueError(f"{_ROUNDED}, and no components of smaller sizes are written for it: give the plan alone")
    dropped = dropped_experts(model)
    if merge and dropped:
        raise ValueError(
            f"{len(dropped)} experts were dropped, e.g. {dropped[0]}, which the plain config of {type(model).__name__} "
            "can't describe: export without merge, or allocate without drop_experts"
        )
    if repo is not None:
        announce_upload(repo)
    originals = _originals(model)
    entries, shapes = _entries(model, originals), _shapes(model, originals)
    if merge and shapes:
        raise ValueError(
            f"{len(shapes)} linear layers have shapes that the plain config of {type(model).__name__} can't describe, "
            f"e.g. {next(iter(shapes))}: export the factors, or prune all MLPs to one width"
        )
    align(model)
    with _limits_explained(directory), atomic_directory(directory) as folder:
        dense = _dense_layers(model, originals, merge=merge)
        before = logits_of(model) if verify and dense else None
        with replaced(model, dense), experts_fused(model) if merge else nullcontext():
            _write(model, folder, tokenizer, None if merge else _config(model, entries, shapes))
            _write_texts(folder, plan, card)
            if verify:
                reference = logits_of(model)
                if before is not None:
                    check_merged(before, reference)
                checkable = plan.plan if isinstance(plan, AnySize) else plan if isinstance(plan, RankPlan) else None
                check_contents(model, {} if merge else entries, checkable, tokenizer)
                check_reload(model, folder, reference, tokenizer, merged=merge)
        nested = _write_components(folder, plan, model.dtype) if isinstance(plan, AnySize) else 0
        write_digests(folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    logger.info("exported %d compressed modules to %s, %d bytes of weights", len(entries), directory, size)
    url = None if repo is None else upload(directory, repo)
    return ExportReport(directory, size, merge, len(entries), verify, url, nested)


def load_compressed(
    directory: str | Path,
    *,
    keep: float | None = None,
    optimize: bool = False,
    verify: bool = True,
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """Return a model that :func:`save_compressed` wrote, in eval mode, in its own size or a smaller one.

    Args:
        directory: The folder.
        keep: Fraction of the targeted parameters to keep, as ``lowrank export --keep`` counts it, at most the folder's
            own. The component order in the folder's ``plan.json`` says what to cut, and the result has the bits of the
            same plan exported at this size. Each layer is cut in place once the model is loaded. Layers stored dense or
            pivoted are cut if the folder holds their components (``AnySize``). By default nothing is cut.
        optimize: Let what is fastest on this machine compute the layers
            (:func:`lowrank_pl.serving.optimize.optimize_for_inference`).
        verify: Whether to compare the files with their SHA-256 in ``lowrank.sha256``; folders of earlier versions have
            none. A changed file of weights is an error, any other changed file a warning in the log.
        **from_pretrained_kwargs: Arguments of ``AutoModelForCausalLM.from_pretrained``: ``dtype``, ``device_map``, ...

    Raises:
        ValueError: There is no such folder, it holds no compressed model, weights are missing or damaged, or code of
            its own is needed and ``trust_remote_code=True`` was not given. Or ``keep`` is impossible, or no smaller
            size follows from the folder (:func:`lowrank_pl.plans.resize.cut_plan`).
    """
    if keep is None:
        model = _load(at_home(directory), verify, from_pretrained_kwargs)
    else:
        model, _ = load_cut(directory, keep, verify=verify, **from_pretrained_kwargs)
    if optimize:
        optimize_for_inference(model)
    return model


def _load(directory: Path, verify: bool, from_pretrained_kwargs: Mapping[str, Any]) -> PreTrainedModel:
    if not directory.is_dir():
        raise ValueError(f"no folder {str(directory)!r}: expected one written by save_compressed")
    _check_is_compressed(directory)
    # Without a value, transformers asks on the terminal whether to run the folder's code.
    options = {"trust_remote_code": False, **from_pretrained_kwargs}
    try:
        with nullcontext() if verify else unchecked():
            model = AutoModelForCausalLM.from_pretrained(str(directory), **options)
    except (OSError, SafetensorError) as error:
        cause = str(error).strip().splitlines()[0]
        raise ValueError(f"can't read the weights in {str(directory)!r}: {cause}; copy or export it again") from error
    # What transformers raises for files that are no index or no configuration.
    except (KeyError, TypeError, AttributeError, StrictDataclassError, json.JSONDecodeError) as error:
        given = f", or correct the arguments {', '.join(from_pretrained_kwargs)}" if from_pretrained_kwargs else ""
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"can't read the JSON files in {str(directory)!r} ({cause}): copy or export it again{given}"
        ) from error
    except RuntimeError as error:
        # What transformers raises for weights of another shape; the table that it prints says which.
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(f"{str(directory)!r} holds {OTHER_SHAPES}: copy or export it again") from error
    assert isinstance(model, PreTrainedModel)
    return model


def load_cut(
    directory: str | Path, keep: float, *, verify: bool = True, **from_pretrained_kwargs: Any
) -> tuple[PreTrainedModel, RankPlan]:
    """Return the model in ``directory`` at a smaller size, and the plan of that size.

    Args:
        directory: The folder.
        keep: As for :func:`load_compressed`.
        verify: As for :func:`load_compressed`.
        **from_pretrained_kwargs: As for :func:`load_compressed`.

    Raises:
        ValueError: As :func:`load_compressed`.
    """
    directory = at_home(directory)
    plan = plan_of_export(directory)
    smaller = smaller_plan(directory, plan, keep)
    if verify:
        check_files(directory, nested=True)
    model = _load(directory, verify, from_pretrained_kwargs)
    smaller = cut(model, plan, smaller, NestedComponents.of_export(directory, plan))
    # So that save_pretrained writes a folder that reloads.
    names = _names(model)
    entries: dict[str, Entry] = {name: {"dropped": True} for name in dropped_experts(model)}
    entries |= {name: _entry(module, names) for name, module in model.named_modules() if _is_compressed_layer(module)}
    stored = _config(model, entries, getattr(model.config.quantization_config, "shapes", None))
    model.config.quantization_config = stored
    model.hf_quantizer.quantization_config = stored
    return model, smaller


def plan_of_export(directory: str | Path) -> RankPlan:
    """Return the plan that lies in the folder of an export.

    Raises:
        ValueError: The folder holds no compressed model or no plan.
    """
    directory = at_home(directory)
    _check_is_compressed(directory)
    if not (directory / "plan.json").is_file():
        raise ValueError(
            f"{str(directory)!r} holds no plan.json, which says what to cut first: copy the plan of this export there, "
            "or make the size from its plan with `lowrank export PLAN --keep`"
        )
    return RankPlan.load(directory / "plan.json")


def smaller_plan(directory: str | Path, plan: RankPlan, keep: float) -> RankPlan:
    """Return the plan of a smaller size that can be cut from the export in ``directory``.

    Args:
        directory: The folder.
        plan: Its plan (:func:`plan_of_export`).
        keep: As for :func:`load_compressed`.

    Raises:
        ValueError: ``keep`` is impossible, or the folder does not hold the components of this size.
    """
    directory = at_home(directory)
    _check_not_rounded(directory, plan)
    try:
        return cut_plan(plan, keep, NestedComponents.of_export(directory, plan).names)
    except ValueError as error:
        raise ValueError(f"{str(directory)!r}: {error}") from None


_ROUNDED = "the model's numbers are rounded to a few bits"


def _check_not_rounded(directory: Path, plan: RankPlan) -> None:
    """Refuse to cut a rounded model: its components have no numbers of their own any more."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    entries = (config.get("quantization_config") or {}).get("modules") or {}
    if plan.is_rounded or any(isinstance(entry, dict) and "bits" in entry for entry in entries.values()):
        raise ValueError(
            f"{str(directory)!r}: {_ROUNDED}, so that no smaller size can be cut from it: make this size from the plan "
            "with `lowrank export PLAN --keep` before rounding, and round the result"
        )


def is_compressed(directory: str | Path) -> bool:
    """Tell whether ``directory`` holds a model in the low-rank format."""
    try:
        file = at_home(directory) / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        return bool((config.get("quantization_config") or {}).get("quant_method") == METHOD)
    except (OSError, ValueError, AttributeError):
        return False


def _check_is_compressed(directory: Path) -> None:
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(directory)!r} holds no readable config.json: expected a compressed model") from error
    if not isinstance(config, dict):
        raise ValueError(f"{str(directory)!r} holds no readable config.json: expected a compressed model")
    stored = config.get("quantization_config") or {}
    if not isinstance(stored, dict):
        raise ValueError(
            f"{str(directory / 'config.json')!r} has the quantization_config {stored!r}: expected an entry for each of "
            "its keys; copy or export the folder again"
        )
    method = stored.get("quant_method")
    if method != METHOD:
        kind = "a plain model" if method is None else f"a model quantised by {method}"
        raise ValueError(
            f"{str(directory)!r} holds {kind}, not a model compressed by lowrank_pl: "
            "load it with transformers.AutoModelForCausalLM.from_pretrained"
        )


def check_destination(directory: Path, *, sources: Sequence[str | Path] = ()) -> None:
    """Refuse to replace a folder that is not an export: a typing error must not delete anyone's files.

    Args:
        directory: The folder to write.
        sources: The models that the result is made from: their names or folders.

    Raises:
        ValueError: ``directory`` is one of ``sources``, a file, a folder with other contents, a mount point, the
            current folder or one above it, or it can't be made.
    """
    check_output_folder(directory)
    if directory.exists() and any(at_home(source).resolve() == directory.resolve() for source in sources):
        raise ValueError(
            f"{str(directory)!r} is the model that this is made from, which would be replaced: name another folder"
        )
    if Path.cwd().is_relative_to(directory.resolve()):
        raise ValueError(
            f"{str(directory)!r} is the current folder, or holds it, and can't be replaced: name another one"
        )
    if os.path.ismount(directory.resolve()):
        raise ValueError(f"{str(directory)!r} is a mount point, which can't be replaced: name a folder in it")
    if not directory.exists() or not any(directory.iterdir()):
        return
    config = directory / "config.json"
    ours = any((directory / name).exists() for name in (CODE, "plan.json", DIGESTS))
    # A pruned or rotated base has none of these.
    written = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    ours = ours or any(f'"{key}"' in written for key in (ORIGIN_KEY, ROTATION_KEY))
    if not config.is_file() or not ours:
        raise ValueError(f"{str(directory)!r} holds other files than an export: name a new folder or empty this one")
    listed = listed_files(directory) or {}
    others = sorted(one.name for one in directory.iterdir() if one.name not in listed and not _is_of_export(one))
    if others:
        raise ValueError(
            f"{str(directory)!r} is an export with other files in it, which would be deleted: {', '.join(others)}; "
            "name a new folder, or move them elsewhere"
        )


_OWN_NAMES = re.compile(
    r"config\.json|generation_config\.json|plan\.json|README\.md|report\.html"
    rf"|{re.escape(DIGESTS)}|{'|'.join(re.escape(file.name) for file in CODE_FILES)}"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|vocab\.txt|.*\.model"
    r"|chat_template\.(jinja|json)|additional_chat_templates|\.cache|\.gitattributes|__pycache__"
    rf"|{NESTED}"
)
"""What an export may hold without a line in ``lowrank.sha256``, which earlier versions did not write."""


def _is_of_export(path: Path) -> bool:
    """Tell whether a file or a subfolder is part of an export by its name, or figures that ``--json`` wrote into it."""
    return bool(_OWN_NAMES.fullmatch(path.name)) or is_figures(path)


def _originals(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the modules that the config alone describes, by name, on the meta device."""
    config = copy.deepcopy(model.config)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        original = (base_class(model) or type(model))(config)
    if split_modules(model):
        split_experts(original)
    return dict(original.named_modules())


def _entries(model: PreTrainedModel, originals: dict[str, nn.Module]) -> dict[str, Entry]:
    """Return the config's entry of each compressed module, after a check that every module can be stored."""
    entries: dict[str, Entry] = {name: {"dropped": True} for name in dropped_experts(model)}
    tied, names = tied_weights(model), _names(model)
    for name, module in model.named_modules():
        original = originals.get(name)
        if name in entries:
            continue
        place = nn.Embedding if isinstance(module, nn.Embedding) else (nn.Linear, Conv1D)
        if _is_compressed_layer(module) and isinstance(original, place):
            entries[name] = _entry(module, names)
            _check_rank(name, module)
            _check_bias(name, module, original, type(model).__name__)
            if f"{name}.weight" in tied:
                raise ValueError(
                    f"{name} is compressed, but the config ties it to {tied[f'{name}.weight']}: compress that "
                    "embedding, and tie the head with lowrank_pl.models.hf_quantized.tie_head"
                )
        elif _is_tied_head(module) and isinstance(original, nn.Linear):
            source: Any = module.source
            if model.get_submodule(tied.get(f"{name}.weight", "").removesuffix(".weight")) is not source[0]:
                raise ValueError(f"{name} reads the rows of an embedding that the config does not tie it to")
        elif type(module).__module__.startswith(f"{serving.__name__}."):
            raise ValueError(
                f"{name} is a {type(module).__name__}, which only computes here: load the folder again without optimize"
            )
        elif name and type(module) is not type(original) and _layout(module, original) is None:
            expected = "none" if original is None else f"a {type(original).__name__}"
            raise ValueError(
                f"{name} is a {type(module).__name__}, but {type(model).__name__} has {expected} there: only low-rank, "
                "rounded and dense layers can be stored; compress the model, or merge adapters first"
            )
        elif isinstance(original, (nn.Linear, Conv1D)):
            _check_bias(name, module, original, type(model).__name__)
    return entries


def _check_rank(name: str, module: nn.Module) -> None:
    """Raise ``ValueError`` if a compressed layer would be taken for a dense one."""
    rank: int | None = getattr(module, "rank", None)
    inputs = module.embedding_dim if isinstance(module, nn.Embedding) else module.in_features
    if rank is not None and rank == inputs:
        # Its left factor would have the dense shape: loaders that do not know the format would not stop.
        raise ValueError(f"{name} has rank {rank}, the number of its inputs: leave it dense")


def _check_bias(name: str, module: nn.Module, original: nn.Module, model: str) -> None:
    """Raise ``ValueError`` if a linear layer has a bias that the config does not describe, or lacks one."""
    if (getattr(module, "bias", None) is None) != (getattr(original, "bias", None) is None):
        has = "no bias" if getattr(module, "bias", None) is None else "a bias"
        raise ValueError(f"{name} has {has}, unlike the {model} that its config describes")


def _shapes(model: PreTrainedModel, originals: dict[str, nn.Module]) -> dict[str, list[int]]:
    """Return ``[out, in]`` of the linear layers whose shape the config alone does not describe."""
    shapes = {}
    for name, module in model.named_modules():
        original = originals.get(name)
        if isinstance(original, (nn.Linear, Conv1D)) and isinstance(module, (nn.Linear, Conv1D)):
            found = _out_and_in(module)
            if found != _out_and_in(original):
                shapes[name] = found
    return shapes


def _out_and_in(module: nn.Module) -> list[int]:
    if isinstance(module, Conv1D):
        return list(module.weight.shape[::-1])
    assert isinstance(module, nn.Linear)
    return [module.out_features, module.in_features]


def _config(model: nn.Module, entries: dict[str, Entry], shapes: dict[str, list[int]] | None) -> LowRankConfig:
    return LowRankConfig(entries, shapes, experts=bool(split_modules(model)))


def _is_compressed_layer(module: nn.Module) -> bool:
    """Tell a low-rank or rounded layer of this package or of a folder's copy of its code."""
    if isinstance(module, nn.Embedding):
        return any(kind.__name__ in _EMBEDDINGS for kind in type(module).__mro__)
    return isinstance(module, nn.Linear) and type(module).__name__ in _KINDS


def _is_tied_head(module: nn.Module) -> bool:
    """Tell a head tied to a compressed embedding, of this package or of a folder's copy of its code."""
    return any(kind.__name__ == TiedHead.__name__ for kind in type(module).__mro__)


def _is_rounded(module: nn.Module) -> bool:
    """Tell a rounded layer of this package or of a folder's copy of its code."""
    return _is_compressed_layer(module) and hasattr(module, "grid")


def _names(model: nn.Module) -> dict[int, str]:
    """Return the names of the modules of ``model`` by their ids."""
    return {id(module): name for name, module in model.named_modules()}


def _entry(module: nn.Module, names: Mapping[int, str]) -> Entry:
    """Return the config's entry of a compressed layer.

    Args:
        module: The layer.
        names: Those of the model's modules.

    Raises:
        ValueError: The layer reads a factor of a layer that is not in the model.
    """
    if type(module).__name__ == SharedLowRankLinear.__name__:
        shared: Any = module
        owner = names.get(id(shared.owner))
        if owner is None:
            raise ValueError(
                f"{names[id(module)]} reads the right factor of a layer that the model no longer has: compress its "
                "experts together, or put that layer back"
            )
        return {"rank": shared.rank, "storage": "shared", "right": owner}
    rank: Any = getattr(module, "rank", None)
    side, grid = getattr(module, "side", None), getattr(module, "grid", None)
    of_embedding = isinstance(module, nn.Embedding) and rank is not None
    if side is None and grid is None and not of_embedding:
        return rank  # type: ignore[no-any-return]
    entry: dict[str, Any] = {} if rank is None else {"rank": rank}
    if of_embedding:
        entry["storage"] = "embedding"
    if side is not None:
        entry |= {"storage": "pivoted", "side": side}
    return entry if grid is None else entry | grid.to_json()


def _layout(module: nn.Module, original: nn.Module | None) -> type[nn.Module] | None:
    """Return Conv1D if ``module`` is an nn.Linear in the place of GPT-2's Conv1D, else None."""
    return Conv1D if type(module) is nn.Linear and isinstance(original, Conv1D) else None


def _dense_layers(model: PreTrainedModel, originals: dict[str, nn.Module], *, merge: bool) -> dict[str, nn.Module]:
    """Return the dense layers, in the base's layout, that take the place of others while the model is written."""
    layers: dict[str, nn.Module] = {}
    heads: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if merge and _is_tied_head(module):
            heads[name] = module
        elif (merge and _is_compressed_layer(module)) or _layout(module, originals.get(name)):
            layers[name] = _as_dense(module, originals[name])
    tied = tied_weights(model)
    for name, module in heads.items():
        head: Any = originals[name]
        # The very parameter of the embedding, so that it is written once.
        head.weight = layers[tied[f"{name}.weight"].removesuffix(".weight")].weight
        head.bias = module.bias
        layers[name] = head
    return layers


def _as_dense(module: nn.Module, original: nn.Module) -> nn.Module:
    """Return ``original`` with the merged weight of ``module``, in its own layout, and with the bias of ``module``."""
    old: Any = module
    dense: Any = original
    with loaded_by_hook(module):
        weight: Tensor = old.dense() if _is_compressed_layer(module) else old.weight.detach()
        if getattr(module, "bias", None) is not None:
            dense.bias = old.bias
    dense.weight = nn.Parameter((weight.T if isinstance(original, Conv1D) else weight).contiguous())
    if isinstance(original, Conv1D):
        dense.nf, dense.nx = weight.shape
    # Gemma's embeddings have their factor in a buffer, which is on the meta device here.
    for name, _ in original.named_buffers(recurse=False):
        dense._buffers[name] = module.get_buffer(name)
    return original.train(module.training)


def _write(
    model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase, stored: LowRankConfig | None
) -> None:
    """Write weights, configs, tokenizer and code; ``stored`` is None for a plain dense model."""
    # A shallow copy with the same tensors: save_pretrained changes the config and calls the quantizer that the model
    # was loaded with.
    shell = copy.copy(model)
    shell.config = config = copy.deepcopy(model.config)
    for attribute in ("hf_quantizer", "quantization_method"):
        shell.__dict__.pop(attribute, None)
    base = base_class(model)
    if base is not None:
        shell.__class__ = base
        config.__dict__.pop("auto_map", None)
    config.__dict__.pop("quantization_config", None)
    if stored is not None:
        config.quantization_config = stored
        if base is not None:
            classes = {"AutoModelForCausalLM": base.__name__, "AutoModel": type(body_of(model)).__name__}
            classes["AutoConfig"] = LowRankAutoConfig.__name__
            config.auto_map = {auto: f"{Path(CODE).stem}.{name}" for auto, name in classes.items()}
        for code in CODE_FILES:
            shutil.copyfile(code, folder / code.name)
    shell.save_pretrained(folder, state_dict=stored_state(model.state_dict()))
    tokenizer.save_pretrained(folder)


def _write_texts(folder: Path, plan: Plan | None, card: str | None) -> None:
    if plan is not None:
        atomic_write(folder / "plan.json", plan.to_json())
    if card is not None:
        atomic_write(folder / "README.md", card)


def _write_components(folder: Path, plan: AnySize, dtype: torch.dtype) -> int:
    """Write the components for smaller sizes to a subfolder, read them again, and return their bytes."""
    nested = NestedComponents.of_export(folder, plan.plan)
    nested.write(plan.factors, dtype)
    wrong = nested.check()
    if wrong:
        raise ExportError(f"the export was removed: {wrong[0]}")
    return nested.bytes


@contextmanager
def _limits_explained(directory: Path) -> Iterator[None]:
    """Raise one clear error if disk, memory or the allowed size of files ends; libraries have errors of their own."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        limit = explain_limit(error)
        if limit is None or isinstance(error, ExportError):
            raise
        raise ExportError(f"nothing was exported to {str(directory)!r}: {limit}") from error
