"""A process that is killed at a random point of its work, again and again, and one that is not: what both leave.

The victim is a fork of the test's process. At a chosen call of any Python function it sends itself SIGKILL, so a kill
can fall into torch's, safetensors' or the standard library's code as well as into the package's. Files are written in a
few of a million calls, so other kills are aimed: a few calls, those of C functions among them, after a file was opened,
moved or removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from gguf import GGUFWriter
from public_calls import byte_tokenizer, tiny_llama

SECONDS = 300
NEAR = 12  # calls after a use of a file
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "tempfile.mkstemp")


@dataclass(frozen=True)
class Moment:
    """The moment of a kill: this many calls after the start, or after this many uses of files."""

    calls: int
    files: int | None = None

    def strike(self) -> None:
        """Kill this process then."""
        left = [self.calls]

        def trace(frame: FrameType, event: str, argument: Any) -> None:
            if event in ("call", "c_call"):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        if self.files is None:
            sys.settrace(trace)
        else:
            sys.addaudithook(_Files(self.files, lambda: sys.setprofile(trace)))


class _Files:
    """Counts the uses of files that change something, and does something at one of them; keeps what was moved where."""

    def __init__(self, at: int = -1, then: Callable[[], None] = lambda: None) -> None:
        self.count, self.at, self.then = 0, at, then
        self.moved: set[str] = set()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and set(str(arguments[1])) & set("wax+")):
            self.count += 1
            if event == "os.rename":
                self.moved.add(os.fsdecode(arguments[1]))
            if self.count - 1 == self.at:
                self.then()


def fork(work: Callable[[], Any], moment: Moment | None = None) -> int:
    """Do the work in a child that is killed at that moment; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            if moment is not None:
                moment.strike()
            work()
            status = 0
        finally:
            os._exit(status)
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"the work hung for {SECONDS} s")


@dataclass(frozen=True)
class Course:
    """What undisturbed work did: how many calls and uses of files, and the paths to which files were moved."""

    calls: int
    files: int
    moved: list[str]

    def moments(self, chance: random.Random) -> Iterator[Moment]:
        """Moments to be killed at, every second one beside a use of a file."""
        while True:
            yield Moment(chance.randrange(self.calls))
            yield Moment(chance.randrange(NEAR), chance.randrange(self.files))

    def moved_there(self, path: Path) -> bool:
        """Whether the file, or a folder that holds it, got its name when it was finished."""
        return any(str(one) in self.moved for one in (path, *path.parents))


def course_of(work: Callable[[], Any], note: Path) -> Course:
    """Do the work undisturbed and see what it does."""

    def seen() -> None:
        calls, files = [0], _Files()

        def trace(frame: FrameType, event: str, argument: Any) -> None:
            calls[0] += 1

        sys.addaudithook(files)
        sys.settrace(trace)
        work()
        sys.settrace(None)
        note.write_text(json.dumps([calls[0], files.count, sorted(files.moved)]))

    assert fork(seen) == 0
    return Course(*json.loads(note.read_text()))


def files_of(folder: Path, volatile: tuple[str, ...] = ()) -> dict[str, str]:
    """Every file's SHA-256, but of locks and of those that hold the time."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock") and path.name not in volatile
    }


def whole_gguf(path: Path) -> Path:
    """The tiny Llama as a GGUF file that transformers reads, with its tokenizer."""
    model, words = tiny_llama(), byte_tokenizer()
    config: Any = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = [*map(str, words.convert_ids_to_tokens([*range(config.vocab_size - 1)])), "ab"]  # a merge needs its token
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    names |= {f"model.layers.{n}.{ours}": f"blk.{n}.{theirs}" for n in range(2) for ours, theirs in parts.items()}
    for name, weight in model.state_dict().items():
        writer.add_tensor(f"{names[name.removesuffix('.weight')]}.weight", weight.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def local_wheel(folder: Path, name: str, members: dict[str, bytes]) -> Path:
    """A wheel that pip accepts."""
    info = f"{name}-1.0.dist-info"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path
