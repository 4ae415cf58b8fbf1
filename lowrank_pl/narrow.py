"""What ``lowrank narrow`` does: the same model with narrower MLPs, as a checkpoint like any other."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lowrank_pl.base_model import load_base, load_tokenizer
from lowrank_pl.commands import DType, pick_device
from lowrank_pl.decompose import SquareRoot
from lowrank_pl.decomposition import Decomposition, Roots
from lowrank_pl.export import save_compressed
from lowrank_pl.files import write_json
from lowrank_pl.narrowing import Origin, find_hidden, narrow_model
from lowrank_pl.plan_report import percent
from lowrank_pl.prepare import check_finite, model_parameters, statistics_of, targeted_parameters
from lowrank_pl.targets import Target, find_targets
from lowrank_pl.windows import token_windows

__all__ = ["narrow"]


def narrow(
    base: str,
    *,
    share: float = 0.85,
    output: Path = Path("narrow"),
    text: str = "python-docs",
    length: int = 512,
    windows: int = 256,
    dtype: DType = "float32",
    multiple_of: int = 8,
    damping: float = 0.01,
    device: str = "auto",
    trust_remote_code: bool = False,
    json: Path | None = None,
) -> Path:
    """Leave out the hidden features of every MLP that the others can stand for; the result is an ordinary checkpoint.

    Which ones go, and how the MLP's last map makes up for them, is worked out in closed form from one pass over some
    text, forward and backward. All MLPs get the same width, so that plain transformers and every other runtime loads
    the folder without code of its own. It is a base like any other: ranks can be learned or allocated on it.

    Args:
        base: Hub id, folder, .gguf file, package:NAME or random:FAMILY.
        share: Fraction of the hidden features to keep.
        output: Folder of the narrowed model, checked by a reload in a fresh process.
        text: Calibration text: file, glob, hub dataset or python-docs.
        length: Tokens of a calibration window.
        windows: How many windows.
        dtype: Type to load the base in; the result has it too.
        multiple_of: The width is a multiple of this.
        damping: Ridge of the change that makes up for what is left out; more trusts the text less.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        trust_remote_code: Run Python code that comes with the base.
        json: Write the figures there.

    Returns:
        The folder.
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share}: expected the fraction of hidden features to keep, above 0 and below 1")
    if multiple_of < 1:
        raise ValueError(f"multiple_of is {multiple_of}: expected a whole number of at least 1")
    model = load_base(base, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code).to(pick_device(device))
    tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
    targets = find_targets(model)
    hidden = find_hidden(model, targets)
    before, present = Origin.of(model), hidden[0].width
    origin = before or Origin(base, targeted_parameters(targets), model_parameters(model), present)
    width = max(1, int(share * present / multiple_of + 0.5)) * multiple_of
    if width >= present:
        raise ValueError(
            f"share {share} of {present} hidden features is {width} in multiples of {multiple_of}: nothing would be "
            "left out; lower one of both"
        )
    readers = [mlp.reader for mlp in hidden]
    check_finite(model, readers)
    tokens = token_windows(text, tokenizer, length=length, windows=windows)
    roots = Roots(Decomposition("two_sided"), statistics_of(model, tokens, tokenizer), readers, model.device)

    def weights(reader: Target) -> tuple[Tensor, SquareRoot]:
        moment, outputs = roots.moment_of_inputs(reader), roots.of_outputs(reader.name)
        assert moment is not None
        assert outputs is not None
        return moment, outputs

    nats = narrow_model(model, hidden, width, weights, damping=damping)
    origin.write(model)
    report = save_compressed(model, output, tokenizer=tokenizer, merge=True, card=_card(origin, width))
    targeted, parameters = targeted_parameters(find_targets(model)), model_parameters(model)
    figures = {
        "base": base,
        "width": {"before": present, "after": width},
        "predicted_nats": nats,
        "parameters": {
            "targeted": {"dense": origin.targeted, "kept": targeted},
            "model": {"dense": origin.parameters, "kept": parameters},
        },
        "bytes": report.bytes,
    }
    print(
        f"narrowed MLPs from {present} to {width} hidden features: {origin.left(targeted, parameters)} are left\n"
        f"predicted loss {nats:.4f} nats a token\n"
        f"plans on it count what is left: --keep 0.9 keeps {percent(0.9 * targeted / origin.targeted)} of the base's\n"
        f"model  {report.directory}"
    )
    if json is not None:
        write_json(json, figures)
    return report.directory


def _card(origin: Origin, width: int) -> str:
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- lowrank_pl\n---\n\n"
        f"# {origin.base.rstrip('/').rsplit('/', 1)[-1]} with narrower MLPs\n\n"
        f"`{origin.base}` narrowed with `lowrank narrow`: of {origin.width} hidden features {width} are left in every "
        "MLP, whose last map makes up for the others in closed form. Nothing was fine-tuned. It loads like its base.\n"
    )
