"""``lowrank rotate``."""

from __future__ import annotations

from pathlib import Path

from lowrank_pl.cli.parameters import Flat
from lowrank_pl.models.settings import Base
from lowrank_pl.utils.files import check_output_files
from lowrank_pl.utils.json_files import write_figures

__all__ = ["rotate"]


def rotate(
    base: Flat[Base],
    *,
    seed: int = 0,
    stream: bool = True,
    output: Path = Path("rotated"),
    device: str = "auto",
    json: Path | None = None,
) -> Path:
    """Write a dense model with the same outputs and other weights: its residual stream is turned at random.

    The gains of all RMSNorms are folded into the linear layers behind them, and the residual stream is multiplied by a
    random orthogonal matrix. Use it to measure on a base that was quantised once, such as a ``.gguf`` file: rounding
    to its own grid gives the weights back exactly, and says nothing about bits. The rotated weights lie on no grid.

    A head that is tied to the embeddings is untied, which adds its parameters to the model, unless the gain of the
    final norm is the same for all channels. Models with LayerNorms (GPT-2, OPT) are refused, and so are models that
    normalise the outputs of attention and MLP (Gemma 2 and 3), and experts.

    Args:
        base: The model; the result has its type too.
        seed: Seed of the rotation.
        stream: Turn the residual stream. --stream false turns the values of each attention head instead and permutes
            the hidden features of MLPs, which keeps a tied head tied.
        output: Folder of the rotated model, checked by a reload in a fresh process.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        json: Write the figures there.

    Returns:
        The folder.
    """
    from lowrank_pl.export.card import plain_card
    from lowrank_pl.export.export import check_destination, save_compressed
    from lowrank_pl.export.reload import logits_of
    from lowrank_pl.models.base import model_files
    from lowrank_pl.models.identity import ROTATION_KEY, Origin
    from lowrank_pl.models.rotation import rotated, tolerance
    from lowrank_pl.models.targets import model_parameters
    from lowrank_pl.utils.environment import pick_device
    from lowrank_pl.utils.formatting import code, escaped

    check_destination(output, sources=[base.name])
    check_output_files(json, inputs=model_files(base.name))
    model = base.load().to(pick_device(device))
    turned = rotated(model, seed, stream=stream)
    before, after = logits_of(model).double(), logits_of(turned).double()
    origin = Origin.of(turned)
    setattr(turned.config, ROTATION_KEY, {"base": base.name, "seed": seed, "stream": stream})
    name = escaped(base.name.rstrip("/").rsplit("/", 1)[-1])
    what = "its residual stream" if stream else "the values of its attention heads"
    card = plain_card(
        f"{name}, rotated",
        f"{code(base.name)} with {what} turned by random orthogonal matrices (seed {seed}) and the gains "
        "of its norms folded into its linear layers, by `lowrank rotate`. It computes the same outputs with other "
        "weights, up to rounding.",
    )
    plain = origin is None or origin.one_width
    report = save_compressed(turned, output, tokenizer=base.tokenizer(), merge=plain, card=card)
    figures = {
        "base": base.name,
        "seed": seed,
        "largest_logit_difference": (after - before).abs().max().item(),
        "relative_logit_difference": ((after - before).norm() / before.norm()).item(),
        "tolerance": tolerance(model.dtype),
        "parameters": {"before": model_parameters(model), "after": model_parameters(turned)},
        "bytes": report.bytes,
    }
    print(
        f"logits differ by at most {figures['largest_logit_difference']:.2g} (relative root mean square "
        f"{figures['relative_logit_difference']:.2g}, {figures['tolerance']:.2g} allowed)\nmodel  {report.directory}"
    )
    if json is not None:
        write_figures(json, figures)
    return report.directory
