"""What large models cost, computed from their shapes and from rates that are measured here or given.

    python benchmarks/scale.py                            # measures this machine's rates first (SmolLM2, one thread)
    python benchmarks/scale.py --flops 4e14 --read 3e9    # with rates of yours: FLOP/s of a worker, bytes/s of its disk
    python benchmarks/scale.py --smoke

Formulas (T tokens, L layers, d width, f width of the MLP, k width of keys, V vocabulary, b bytes per weight)::

    layer   = 2 d d + 2 d k + 3 d f          weights of a block: queries and output, keys and values, gated MLP
    weights = L layer + 2 V d                embedding and unembedding
    FLOP    = 2 T L layer + 2 L T T d        of one causal forward without the unembedding, over half of all pairs
    compute = FLOP / rate                    one sequence, one forward
    read    = b (L layer) / bandwidth        one forward whose blocks come from disk
    streamed memory = b (2 V d + layer) + 4 T (4 d + 2 f)     embeddings, one block, float32 activations
"""

from __future__ import annotations

import argparse
import mmap
import os
import time
from dataclasses import dataclass

import smoke


@dataclass(frozen=True)
class Shape:
    """A decoder's shape, from its published configuration."""

    layers: int
    width: int
    mlp: int
    keys: int
    vocabulary: int
    tied: bool = False

    @property
    def layer(self) -> int:
        """Weights of a block."""
        return 2 * self.width**2 + 2 * self.width * self.keys + 3 * self.width * self.mlp

    @property
    def embeddings(self) -> int:
        """Weights of embedding and unembedding."""
        return (1 if self.tied else 2) * self.vocabulary * self.width

    @property
    def weights(self) -> int:
        """All weights but those of norms."""
        return self.layers * self.layer + self.embeddings

    def flop(self, tokens: int) -> float:
        """Of one forward without the unembedding."""
        return 2.0 * tokens * self.layers * self.layer + 2.0 * self.layers * tokens**2 * self.width

    def streamed(self, tokens: int, size: int) -> float:
        """Memory with blocks on disk, in bytes."""
        return size * (self.embeddings + self.layer) + 4.0 * tokens * (4 * self.width + 2 * self.mlp)


SHAPES = {
    "SmolLM2-135M": Shape(30, 576, 1536, 192, 49152, tied=True),
    "Llama-3.1-8B": Shape(32, 4096, 14336, 1024, 128256),
    "Llama-3.1-70B": Shape(80, 8192, 28672, 1024, 128256),
    "Llama-3.1-405B": Shape(126, 16384, 53248, 1024, 128256),
}


def measured_flops(name: str, tokens: int, rounds: int) -> float:
    """FLOP per CPU second of ``sink_scores`` on SmolLM2, one thread: the best of a few rounds."""
    import torch

    import sinklens as sl

    torch.set_num_threads(1)
    model = sl.load_model(name)
    batch = sl.load_tokens(model, "random", n_seqs=1, seq_len=tokens)
    times = []
    for _ in range(rounds):
        began = time.process_time()
        sl.sink_scores(model, batch, progress=False)
        times.append(time.process_time() - began)
    return SHAPES["SmolLM2-135M"].flop(tokens) / min(times)


def measured_read(name: str) -> float:
    """Bytes per second of reading SmolLM2's weights past the page cache."""
    path = next(smoke.folder_of(name).glob("*.safetensors"))
    handle = os.open(path, os.O_RDONLY | os.O_DIRECT)  # Linux
    try:
        with mmap.mmap(-1, 1 << 24) as buffer:  # direct reads want aligned memory
            began, total = time.perf_counter(), 0
            while count := os.readv(handle, [buffer]):
                total += count
            return total / (time.perf_counter() - began)
    finally:
        os.close(handle)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--bytes", type=int, default=2, help="per weight: 2 for bfloat16")
    parser.add_argument("--flops", type=float, help="FLOP/s of a worker; default: measured here")
    parser.add_argument("--read", type=float, help="bytes/s of its disk; default: measured here")
    parser.add_argument("--smoke", action="store_true", help=smoke.HELP)
    options = parser.parse_args()
    options.model, options.rounds = "smollm2-135m", 3
    with smoke.small(options, tokens=64, rounds=1):
        rate = options.flops or measured_flops(options.model, options.tokens, options.rounds)
        read = options.read or measured_read(options.model)
    print(
        f"rate {rate:.3g} FLOP/s, reading {read:.3g} bytes/s, {options.tokens} tokens, {options.bytes} bytes per weight"
    )
    print("model | weights 1e9 | all, GB | block, GB | streamed memory, GB | forward, TFLOP | compute, s | reading, s")
    for name, shape in SHAPES.items():
        flop = shape.flop(options.tokens)
        columns = [
            shape.weights / 1e9,
            options.bytes * shape.weights / 1e9,
            options.bytes * shape.layer / 1e9,
            shape.streamed(options.tokens, options.bytes) / 1e9,
            flop / 1e12,
            flop / rate,
            options.bytes * shape.layers * shape.layer / read,
        ]
        print(name, *(f"{value:.3g}" for value in columns), sep=" | ")


if __name__ == "__main__":
    main()
