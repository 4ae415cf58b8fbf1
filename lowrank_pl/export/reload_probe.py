"""The probe of an exported folder: the part of the check in reload.py that runs in a fresh process.

The source of this file is run by ``python -c``. It needs only torch and transformers, so that a merged export has to
load without lowrank_pl. Generation, and inputs other than the two probes, are not covered.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import threading
import time
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

__all__ = ["PROBE_TEXT", "digest", "end_with_parent", "probe"]

PROBE_TEXT = "Energy is conserved; 12 + 30 = 42.\n\tÀ bientôt!"


@torch.no_grad()
def probe(model: nn.Module) -> Tensor:
    """Return the logits of fixed tokens, ``[33, vocabulary]``, on the CPU.

    The tokens are two sequences of 16, and one token alone, because matrix-vector products use other kernels.
    """
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    # As models/eval_mode.py does: embeddings that accelerate keeps on disk are on the meta device.
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    device = embedding.weight.device if device is None else device
    tokens = (torch.arange(32, device=device) * 7919 + 11) % embedding.num_embeddings
    parts = [model(input_ids=tokens.view(2, 16)).logits, model(input_ids=tokens[None, :1]).logits]
    return torch.cat([part.flatten(0, 1) for part in parts]).cpu()


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of the type, the shape and the bytes of ``tensor``.

    >>> digest(torch.zeros(2)) == digest(-torch.zeros(2))
    False
    """
    label = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    return hashlib.sha256(label + tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def end_with_parent(parent: int) -> None:
    """End this process once ``parent``, the process that started it, is gone: nobody would take its answer.

    A killed parent can't end it. Where processes keep the number of a dead parent (Windows), this one goes on.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _main(request: dict[str, Any]) -> None:
    """Load the folder with no more of lowrank_pl than its format, and print the results as one line of JSON."""
    end_with_parent(request["parent"])
    disable_progress_bar()
    torch.set_num_threads(request["threads"])
    torch.set_float32_matmul_precision(request["precision"])
    if request["code"] is not None:
        # A package of its own, because hf_format.py imports hf_layers.py and lowrank_pl is not to be imported.
        package = ModuleType("compressed")
        package.__path__ = [request["code"]]
        sys.modules["compressed"] = package
        importlib.import_module("compressed.hf_format")
    options = {"attn_implementation": request["attention"], "device_map": request["device_map"]}
    model, info = AutoModelForCausalLM.from_pretrained(
        request["directory"], trust_remote_code=request["trust"], output_loading_info=True, **options
    )
    # As hf_format.align does: addresses affect the last bit of a matrix-vector product.
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
    tokenizer = AutoTokenizer.from_pretrained(request["directory"], trust_remote_code=request["trust_tokenizer"])
    logits = probe(model)
    if request["logits"] is not None:
        torch.save(logits, request["logits"])
    answer = {
        "logits": digest(logits),
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "token_ids": tokenizer(PROBE_TEXT)["input_ids"],
        "chat_template": tokenizer.chat_template,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
