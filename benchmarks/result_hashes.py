"""SHA-256 of what the public functions give on tiny seeded models: do two checkouts compute the same, bit by bit?

For refactors that may change no number. Run it in each checkout, then compare::

    cd OLD && PYTHONPATH=OLD python benchmarks/result_hashes.py --out old.json
    cd NEW && PYTHONPATH=NEW python benchmarks/result_hashes.py --out new.json
    python benchmarks/result_hashes.py --compare old.json new.json        # names that differ or are missing; exit 1

    --only llama      one subject (see SUBJECTS) instead of all
    --smoke           one small model, scores and one ablation: seconds, for the test-suite
    --keep DIR        also keep one saved file per kind of result, to be opened by later versions

Both runs need the same machine, torch and transformers. Only public names are used, each taken from its room
(``sinklens.trace``) or, where there are no rooms, from ``sinklens``. A result is hashed with everything that it shows
without arguments (tables, figures, properties), and as it is saved and read again. A refusal is a result too:
"refused: ", its class, and the hash of its words, so that a reworded message is reported and can be judged. What was
built on a refusal is "skipped"; any other exception is "failed" and makes the exit status 1.

Left out, because it changes from run to run or names the code and no number: dates, versions, the hash of the
package's code, addresses of functions in ``repr``, CPU times, the random ids in HTML of plotly and circuitsvis,
temporary paths; of ``write_report`` all but tables and saved results. ``sinklens.sweep`` is not run: its keys
hash the code.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers as tf
from safetensors import safe_open
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import sinklens as sl

DROPPED = {"sinklens", "sha256", "written", "versions", "code", "cpu_seconds"}  # keys of what the docstring leaves out
VOLATILE = re.compile(
    r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|circuits-vis-[0-9a-f-]{13}"
    r"|\d{4}-\d\d-\d\d(?:T\d\d:\d\d:\d\d[+\d:]*)?|\b0x[0-9a-f]{6,}"
    r'|"(?:sinklens|transformer-lens|transformers|torch|numpy|python)": "[^"]*"'
)
NOT_SHOWN = {"save", "model", "to_dict"}  # what writes, or gives a whole model


def public(spec: str) -> Any:
    """A public name ("room.name") from its room, or from the package where it has no such room."""
    room, _, name = spec.rpartition(".")
    if room:
        try:
            module = import_module(f"sinklens.{room}")
        except ModuleNotFoundError as error:
            if error.name != f"sinklens.{room}":
                raise
        else:
            if hasattr(module, name):
                return getattr(module, name)
    return getattr(sl, name)


def use(spec: str, *args: Any, **options: Any) -> Any:
    """Call a public function; one that is gone is a fault of this call only."""
    return public(spec)(*args, **options)


def digest(value: Any) -> str:
    """The SHA-256 of a value's kind, shape and bits."""
    return hashlib.sha256(json.dumps(plain(value)).encode()).hexdigest()


def plain(value: Any) -> Any:
    """A value as JSON with every bit in it; what has no such form is an error, never an address in memory."""
    kinds = {kind.__name__ for kind in type(value).__mro__}
    if value is None or isinstance(value, (bool, int, float)):
        return value  # JSON has the shortest digits that give back the same float64
    if isinstance(value, str):
        return VOLATILE.sub("", value)
    if isinstance(value, torch.Tensor):
        bits = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() if value.numel() else b""
        return ["tensor", str(value.dtype), list(value.shape), hashlib.sha256(bytes(bits)).hexdigest()]
    if isinstance(value, (np.generic, np.ndarray)):
        return [str(value.dtype), plain(value.tolist())]
    if isinstance(value, (pd.DataFrame, pd.Series)):
        frame = value.to_frame() if isinstance(value, pd.Series) else value
        columns = [[str(name), str(frame.dtypes.iloc[n]), frame.iloc[:, n].tolist()] for n, name in enumerate(frame)]
        return ["frame", plain(frame.index.tolist()), plain(columns)]
    if isinstance(value, Path):
        return value.name
    if "Figure" in kinds:
        return value.to_json()
    if "DiGraph" in kinds:
        return plain([list(value.nodes(data=True)), list(value.edges(data=True))])
    if "Hooks" in kinds:  # what they do is hashed where they run
        return plain(["hooks", value.name, value.layers, value.residual, [name for name, _ in value]])
    if dataclasses.is_dataclass(value) and "Module" not in kinds:  # its kind without the module, which moves
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return [type(value).__name__, plain(fields)]
    if isinstance(value, Mapping):  # sorted, since safetensors gives tensors back in another order
        return ["map", sorted(([str(k), plain(v)] for k, v in value.items() if k not in DROPPED), key=lambda kv: kv[0])]
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return ["set", sorted(json.dumps(plain(item)) for item in value)]
    if callable(value):
        return "function"  # without its name, which may move
    raise TypeError(f"no canonical form of a {type(value).__name__}")


def file_digest(path: Path) -> str:
    """The hash of a written file: of tensors and metadata, of JSON, else of the text without what is volatile."""
    content = path.read_bytes()
    if content[8:9] == b"{":  # safetensors: the header's length, then the header
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("sinklens", "{}"))
            return digest([header, {name: file.get_tensor(name) for name in file.keys()}])  # noqa: SIM118
    if content[:1] == b"{":
        return digest(json.loads(content))
    return digest(content.decode("latin-1").replace(str(path.parent), ""))


def shown(result: Any) -> dict[str, Callable[[], Any]]:
    """What a result of the package shows without arguments: properties, tables, figures, its words."""
    if not type(result).__module__.startswith("sinklens"):
        return {}
    found: dict[str, Callable[[], Any]] = {"repr": partial(repr, result)}
    for name in (n for n in dir(type(result)) if not n.startswith("_") and n not in NOT_SHOWN):
        member = inspect.getattr_static(type(result), name)
        if isinstance(member, (property, functools.cached_property)):
            found[name] = partial(getattr, result, name)
        elif inspect.isfunction(member):
            given = list(inspect.signature(member).parameters.values())[1:]
            if all(p.default is not p.empty for p in given):
                found[name] = partial(member, result)
    return found


class Missing:
    """Stands for what was refused."""

    def __bool__(self) -> bool:
        return False


MISSING: Any = Missing()


class Book:
    """The hashes by name, and what went wrong on the way."""

    def __init__(self, folder: Path, keep: Path | None = None) -> None:
        self.entries: dict[str, str] = {}
        self.failures: list[str] = []
        self.folder, self.keep, self.subject = folder, keep, ""

    def put(self, name: str, value: str) -> None:
        """Keep an entry."""
        name = f"{self.subject}/{name}"
        while name in self.entries:  # the same preparation was refused in two places
            name += " again"
        self.entries[name] = value

    def fail(self, name: str, words: str) -> None:
        """Tell what must not happen, and go on: one fault must not cost the other entries."""
        self.failures.append(f"{self.subject}/{name}: {words}")

    def attempt(self, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run it; after a refusal or a fault, which are kept, the result is MISSING, as is all that builds on it."""
        if any(a is MISSING for a in (*args, *options.values())):
            self.put(name, "skipped")
            return MISSING
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return function(*args, **options)
        except public("errors.SinklensError") as error:
            words = str(error).replace(str(self.folder), "")
            print(f"    refused {self.subject}/{name}: {words[:160]}", file=sys.stderr)
            self.put(name, f"refused: {type(error).__name__}: {digest(words)}")
        except Exception as error:
            self.fail(name, f"{type(error).__name__}: {error}")
            self.put(name, f"failed: {type(error).__name__}")
        return MISSING

    def value(self, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Keep the hash of what a function gives."""
        found = self.attempt(name, function, *args, **options)
        if found is not MISSING:
            self.put(name, digest(found))
        return found

    def call(self, spec: str, *args: Any, tag: str = "", **options: Any) -> Any:
        """Call a public function; keep the hashes of its result and of all that this shows."""
        name = spec.rpartition(".")[2] + (f"[{tag}]" if tag else "")
        found = self.value(name, use, spec, *args, **options)
        self.result(name, found)
        return found

    def result(self, name: str, found: Any) -> None:
        """Keep the hashes of all that a result shows, of its files, and of what is read back from them."""
        for what, show in shown(found).items():
            self.value(f"{name}.{what}", show)
        if not shown(found) or not hasattr(found, "save"):
            return
        path = self.folder / f"{self.subject}-{len(self.entries)}"
        if self.attempt(f"{name}.save", found.save, path) is MISSING:
            return
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        self.put(f"{name}.save", digest([[file_digest(p), p.name if path.is_dir() else ""] for p in files]))
        if hasattr(found, "load"):
            if digest(self.value(f"{name}.load", found.load, path)) != digest(found):
                self.fail(name, "what is read is not what was saved")
            if self.keep and not (to := self.keep / f"{type(found).__name__}.safetensors").exists():
                shutil.copyfile(path, to)

    def pages(self, spec: str, *args: Any, files: tuple[str, ...] = ("*",), **options: Any) -> None:
        """Call a function that writes a page; keep the hash of each of its files, or of some."""
        name = spec.rpartition(".")[2]
        out = self.folder / f"{self.subject}-{name}"
        if self.attempt(name, use, spec, *args, out, **options) is not MISSING:
            for path in sorted(p for pattern in files for p in out.rglob(pattern) if p.is_file()):
                self.put(f"{name}/{path.relative_to(out)}", file_digest(path))

    def edit(self, s: Subject, spec: str, *args: Any, tag: str, under: Any = ("hooks", "flash"), **options: Any) -> Any:
        """Build hooks; keep the hashes of the logits under them, by hooks and inside ``flash``."""
        name = f"{spec}[{tag}]"
        hooks = self.value(name, use, spec, s.model, *args, **options)
        for backend in under:
            self.value(f"{name} logits, {backend}", logits, s, hooks, backend)
        return hooks


@dataclasses.dataclass
class Subject:
    """A model, sequences, others for means, few tokens for Jacobians, and the sinks of the sequences."""

    model: Any
    tokens: Any
    reference: Any
    short: Any
    sinks: Any
    few: dict[str, Any] = dataclasses.field(default_factory=dict)  # an encoder's loss costs a forward per token


def logits(s: Subject, hooks: Any, backend: str = "hooks", ids: Any = None) -> torch.Tensor:
    """The logits of the subject's tokens, or of other ids."""
    given = {"attention_mask": s.tokens.mask} if ids is None else {}
    with sl.flash(s.model) if backend == "flash" else nullcontext(), torch.no_grad():
        return s.model.run_with_hooks(s.tokens.ids if ids is None else ids, fwd_hooks=hooks, **given)


# --- the models -------------------------------------------------------------------------------------------------------

BOS, HEAD, LAYERS, FROM = 1, 8, 6, 3  # FROM: the first layer in which "X" is a sink
_SIZES: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
_DECODER: dict[str, Any] = {**_SIZES, "bos_token_id": BOS, "eos_token_id": 2}
_GROUPED: dict[str, Any] = {**_DECODER, "num_key_value_heads": 2, "head_dim": HEAD, "attention_bias": True}
_WINDOWS = {"sliding_window": 20, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}
_OPT: dict[str, Any] = {k: v for k, v in _DECODER.items() if k != "intermediate_size"}
BUILDERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GROUPED)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_GROUPED, **_WINDOWS, query_pre_attn_scalar=HEAD)),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**_OPT, ffn_dim=48, word_embed_proj_dim=32)),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**_SIZES)),
    "gpt-oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**_GROUPED, **_WINDOWS, num_local_experts=4, num_experts_per_tok=2)
    ),
}


def tokenizer() -> Any:
    """Every byte is a token, so every text has ids."""
    alphabet, special = sorted(pre_tokenizers.ByteLevel.alphabet()), ("<pad>", "<bos>", "<eos>", "<mask>")
    words = Tokenizer(models.BPE({c: i for i, c in enumerate([*special, *alphabet])}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([AddedToken(name, special=True) for name in special])
    names = {f"{name[1:-1]}_token": name for name in special}
    return tf.PreTrainedTokenizerFast(tokenizer_object=words, **names)


def build(name: str, x: int) -> Any:
    """Random weights and two sinks: BOS everywhere, token ``x`` from a later layer on.

    Each has a massive dimension, which keys read into one (slowly rotating) number that all queries want.
    """
    torch.manual_seed(0)
    model, draw = BUILDERS[name]().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim >= 2 or "bias" in key or "sinks" in key:
                weight.copy_(torch.randn(weight.shape, generator=draw) * 0.15)
        table = model.get_input_embeddings().weight
        table[BOS, 0], table[x, 1] = 40.0, 40.0
        for path, module in model.named_modules():
            layer, part = next((int(n) for n in path.split(".") if n.isdigit()), 0), path.split(".")[-1]
            if part in ("k_proj", "key"):
                module.weight[HEAD - 1 :: HEAD, :2] += torch.tensor([1.0, float(layer >= FROM)])
            if part in ("q_proj", "query"):
                module.bias[HEAD - 1 :: HEAD] += 3
    return model


def text_subject(name: str) -> Subject:
    """One of the architectures, with texts of unequal length that hold both sinks (and "X" late, where it is none)."""
    words = tokenizer()
    model = sl.load_model(build(name, words.convert_tokens_to_ids("X")), tokenizer=words)
    draw = torch.Generator().manual_seed(3)
    texts = []
    for length in (62, 56, 60, 58) * 2:
        letters = [chr(97 + int(n)) for n in torch.randint(0, 20, (length,), generator=draw)]
        letters[4] = letters[50] = "X"
        texts.append("".join(letters))
    tokens = sl.load_tokens(model, texts, prepend_bos=True)
    few = {"most_scored": 8} if name == "bert" else {}
    return Subject(model, tokens[:3], tokens[3:], tokens[0].first(8), sl.find_sinks(model, tokens[:3]), few)


def planted_subject() -> Subject:
    """A GPT-2 in which MLP 0 makes token 3 a sink, MLP 3 (and, a little, 2) token 4, and MLP 7 takes that away again.

    Every key reads the direction that they write, every query asks for it; attention writes little.
    """
    size = 16
    sizes: dict[str, Any] = {"n_embd": size, "n_layer": 10, "n_head": 2, "n_inner": 8, "n_positions": 128}
    config = tf.GPT2Config(vocab_size=12, bos_token_id=1, eos_token_id=2, activation_function="relu", **sizes)
    host, draw = tf.GPT2LMHeadModel(config).eval(), torch.Generator().manual_seed(0)
    blocks: Any = host.transformer.h
    with torch.no_grad():
        for name, weight in host.named_parameters():
            if "ln" not in name:
                weight.copy_(torch.randn(weight.shape, generator=draw) * (0.1 if ".attn." in name else 0))
        noise = torch.randn(size, size, generator=draw)
        noise[:, 0] = 1
        basis = torch.linalg.qr(noise)[0][:, 1:].T * math.sqrt(size)  # layer norm leaves these rows as they are
        host.transformer.wte.weight[3:] = basis[:9]
        direction = basis[10] / math.sqrt(size)
        for layer, neuron, token, amount in ((0, 2, 3, 40), (3, 5, 4, 40), (2, 5, 4, 6), (7, 1, 4, -40)):
            seen = math.sqrt(1 + 40**2 / size) if amount < 0 else 1  # layer norm shrinks what was written to by this
            blocks[layer].mlp.c_fc.weight[:, neuron] = basis[token - 3] / size * seen
            blocks[layer].mlp.c_proj.weight[neuron] = amount * direction
        for block in blocks[1:]:
            block.attn.c_attn.bias[:size:8] = 2 * math.sqrt(8)
            block.attn.c_attn.weight[:, size : 2 * size : 8] = direction[:, None]
    ids = torch.randint(5, 12, (18, 90), generator=draw)
    ids[:, 0], ids[:, 20], ids[::3, 35], ids[:, 80] = 3, 4, 4, 4  # at 80 too few queries follow for a sink
    model = sl.load_model(host, tokenizer=tokenizer())
    sinks = sl.find_sinks(model, ids)
    return Subject(model, sinks.tokens, sinks.tokens[9:], sinks.tokens[0].first(8), sinks)


# --- the calls --------------------------------------------------------------------------------------------------------

REFERENCE: dict[str, Any] = {"reference": "the subject's"}
EDITS: dict[str, dict[str, Any]] = {  # a mode, or a mode and its variant
    "renormalize": {}, "zero": {}, "value_only": {}, "scale": {"g": 0.5}, "mean_value": REFERENCE, "null": {},
    "fixed_key": REFERENCE, "fixed_logit": REFERENCE, "move": {"target": 2}, "uniform": {},
    "renormalize ordinary": {"to": "ordinary"}, "zero neutral": {"neutral": "zero"},
    "fixed_key neutral": {**REFERENCE, "value": "neutral"}, "fixed_logit mean": {**REFERENCE, "value": "mean"},
    "zero heads": {"heads": [(1, 0), (4, 2)]}, "renormalize layers": {"layers": [4, 5], "heads": [1]},
}  # fmt: skip
RESIDUAL = {"massive_zero": {}, "massive_mean": REFERENCE, "project": REFERENCE, "rescale": {"g": 0.5}}
SWAPS: dict[str, dict[str, Any]] = {"off-by-one": {}, "learned-logit": {"logit": 0.5}, "clipped": {}}
SITES = ("resid_pre", "resid_post", "k", "v", "mlp_out", "attn_out")
BACKENDS = ("hooks", "flash")


def given_to(s: Subject, options: dict[str, Any]) -> dict[str, Any]:
    """Options with the subject's own reference."""
    return {**options, "reference": s.reference} if "reference" in options else options


def find(book: Book, s: Subject) -> None:
    """Scores and sinks by every backend and method, what reads them, views."""
    book.result("tokens", s.tokens)
    book.call("models.capabilities", s.model)
    book.call("inputs.named_tokens", s.model, "<bos>", "X")
    scores = MISSING
    for backend in BACKENDS:
        scores = book.call("sink_scores", s.model, s.tokens, backend=backend, tag=backend)
        for method in ("attention", "direction", "wong"):
            tag = f"{method}, {backend}"
            book.call("find_sinks", s.model, s.tokens, method=method, backend=backend, tag=tag)
    book.call("find.compare_methods", s.model, s.tokens)
    book.call("find.compare_contexts", s.model, "random", contexts=["natural", "shuffled"], lengths=[50], n_seqs=2)
    book.call("trace.sink_levels", s.sinks)
    some = dataclasses.replace(
        s.sinks, sinks=tuple(one for one in s.sinks if one.position != 35)
    )  # its id is another's
    for null in ("any", "same_id"):
        book.call("heads.reading_heads", scores, some, permutations=19, null=null, tag=null)
    anatomy = book.call("sink_anatomy", s.model, s.sinks)
    text = s.tokens[0].first(40)
    for kind in ("probabilities", "logits"):
        book.call("attention_map", s.model, text, layer=1, head=1, kind=kind, tag=kind)
    book.call("heads.attention_grid", s.model, text)
    book.call("heads.attention_view", s.model, text, layer=1)
    book.pages("find.write_scan", scores)
    book.pages("find.write_sinks", s.sinks, anatomy)
    for tag in BACKENDS:
        statistics = partial(book.call, "heads.attention_statistics", s.model, s.tokens, s.sinks)
        statistics(entropy=True, backend=tag, tag=tag)
    book.call("heads.head_activity", s.model, s.tokens)


def edit(book: Book, s: Subject) -> None:
    """Logits under every intervention, by hooks and under flash; losses."""
    book.value("token_loss", sl.token_loss, s.model, s.tokens)
    for name, options in EDITS.items():
        mode, given = name.split()[0], given_to(s, options)
        hooks = book.edit(s, "ablate_sinks", s.sinks, mode, **given, tag=name)
        book.value(f"token_loss[{name}]", sl.token_loss, s.model, s.tokens, hooks=hooks, **s.few)
        for bound in BACKENDS if "to" not in given else ():
            book.edit(s, "ablate_sinks", [5], mode, **given, backend=bound, under=[bound], tag=f"{name} at 5, {bound}")
    for mode, g in (("renormalize", None), ("scale", 0.5), ("null", None)):  # under flash this fails on gpt-oss today
        book.edit(s, "ablate_sinks", "learned", mode, g=g, under=["hooks"], tag=f"{mode}, learned")
    for mode, options in RESIDUAL.items():
        book.edit(s, "ablate_residual", s.sinks, mode, **given_to(s, options), tag=mode)
    for kind, options in SWAPS.items():
        book.edit(s, "swap_attention", kind, **options, tag=kind)
    book.edit(s, "restrict_attention", sinks=2, recent=9, tag="first")
    book.edit(s, "restrict_attention", sinks=s.sinks, recent=9, layers=[1, 4], tag="map")
    for site in SITES:
        for source, options in (("mean", REFERENCE), ("zero", {}), (3, {})):
            book.edit(s, "patch_bos", s.tokens, source, site=site, **given_to(s, options), tag=f"{site} {source}")
    variants = book.call("experiment.bos_variants", s.model, s.tokens)
    book.value("bos_variants.to_dataframe", lambda v: v.to_dataframe(s.model), variants)


def experiment(book: Book, s: Subject) -> None:
    """Experiments with controls and side effects, sweeps, damage of the same cost."""
    gone = book.attempt("gone", sl.ablate_sinks, s.model, s.sinks)
    half = book.attempt("half", sl.ablate_sinks, s.model, s.sinks, "scale", g=0.5)
    found = MISSING
    for backend in BACKENDS:
        run = partial(book.call, "run_experiment", s.model, s.tokens, {"gone": gone, "half": half}, sinks=s.sinks)
        found = run(controls=("random", "recent", "matched"), backend=backend, tag=backend, **s.few)
    book.pages("experiment.write_experiment", found)
    run = partial(book.call, "run_experiment", s.model, s.tokens, {"gone": gone}, **s.few)
    run(controls=(), twin=True, split=True, tag="twin, split")
    for over in ("layer", "head", "layer-head", "dose"):
        book.call("sweep_ablation", s.model, s.tokens, s.sinks, over=over, tag=over)
    book.call("sweep_ablation", s.model, s.tokens, s.sinks, over="layer-head", estimate=True, tag="estimate")
    book.call("sweep_ablation", s.model, s.tokens, s.sinks, "mean_value", reference=s.reference, tag="mean_value")
    first = book.attempt("first", sl.ablate_sinks, s.model, [0], "zero")
    likely = s.tokens if s.few else book.value("likely", continued, s)  # damage makes what the model would say unlikely
    for kind in ("noise", "mlp"):
        found = book.call("experiment.matched_damage", s.model, likely, first, kind=kind, tolerance=0.05, tag=kind)
        book.value(f"matched_damage[{kind}] logits", lambda found: logits(s, found.hooks), found)


def continued(s: Subject, cache: Any = None) -> torch.Tensor:
    """What the model says next, greedily."""
    given: dict[str, Any] = {"past_key_values": cache, "prefill_chunk_size": 1} if cache else {}
    given |= {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    return s.model.original_model.generate(s.tokens.ids[:1, :12], **given)


def decompose(book: Book, s: Subject) -> None:
    """Every split of the scores of sinks, and the 2x2 of keys and values."""
    call = partial(book.call, "decompose_sinks", s.model, s.tokens, s.sinks, reference=s.reference)
    call(effects=("layer", "head"), exact_heads=2, most_scored=16, tag="layer, head")
    found = call()
    for side in ("query", "rest"):
        book.value(f"decompose_sinks.component_table[{side}]", lambda f, side: f.component_table(side), found, side)
    for what in ("components", "plane", "parts", "gap"):
        book.value(f"decompose_sinks.plot[{what}]", lambda f, what: f.plot(what, split="geometry"), found, what)
    for name, effect in (found.effects if found else {}).items():
        book.result(f"TwoByTwo[{name}]", effect)
    book.pages("decompose.write_decomposition", found)


def trace(book: Book, s: Subject) -> None:
    """Writers, their neurons and input subspace, planted sinks, the claims on secondary sinks."""
    found = book.call("trace_sinks", s.model, s.tokens, s.sinks, reference=s.reference, doses=(0.5,), loss=True)
    neurons = book.call("trace.writer_neurons", s.model, found, top=(1, 5), n_random=2)
    planted = book.call("trace.plant_sinks", s.model, found, n_random=2)
    book.call("trace.writer_subspace", s.model, found, sizes=(1, 2), n_random=2)
    for claim in ("sink_levels", "norm_and_mass", "writer_alignment", "primary_weakening"):
        book.call(f"trace.{claim}", found, tag="trace")
    scores = book.attempt("scores", sl.sink_scores, s.model, s.tokens)
    for show in ("circuit", "plot_circuit"):
        whole = {"neurons": neurons, "scores": scores}
        book.value(
            f"trace_sinks.{show}[whole]", lambda f, show, **whole: getattr(f, show)(**whole), found, show, **whole
        )
    more = {name: part for name, part in (("planted", planted), ("neurons", neurons)) if part is not MISSING}
    book.pages("trace.write_trace", found, scores=scores, **more)


def mixing(book: Book, s: Subject) -> None:
    """Jacobians by every route, bounds on them, swapped tokens, collapse."""
    gone = book.attempt("gone", sl.ablate_sinks, s.model, [0])
    for tag, given in {
        "forward": {"route": "forward"}, "reverse": {"route": "reverse"}, "exact": {"exact": True},
        "frozen": {"frozen_attention": True, "frozen_norms": True, "layer": 1}, "hooks": {"hooks": gone},
    }.items():  # fmt: skip
        book.call("measure_mixing", s.model, s.short, sinks=[0], probes=2, **given, tag=tag)
    compared = book.call("compare_mixing", s.model, s.short, {"gone": gone}, sinks=[0], probes=2, twin=True)
    conditions = book.call("mixing.mixing_conditions", s.model, s.sinks, doses=(0.5,))
    for label, hooks in (conditions.edits if conditions else {}).items():
        book.value(f"mixing_conditions logits[{label}]", logits, s, hooks)
    book.call("mixing.mixing_by_length", s.model, s.short, [4, 8], {"gone": gone}, sinks=[0], probes=2)
    book.call("mixing.jacobian_norms", s.model, s.short, [(1, 4, 2), (2, 7, 0)])
    bound = book.call("mixing.path_sums", s.model, s.short, sinks=[0], columns=[1, 3])
    swaps = book.call("mixing.perturbation_spread", s.model, s.tokens, {"gone": gone}, sinks=s.sinks, n_swaps=6)
    collapse = book.call("mixing.measure_collapse", s.model, s.tokens, {"gone": gone}, sinks=s.sinks)
    more = {} if bound is MISSING else {"bound": bound}
    book.pages("mixing.write_mixing", compared, losses={"base": 1, "gone": 2}, swaps=swaps, collapse=collapse, **more)


def streaming(book: Book, s: Subject) -> None:
    """A window with and without sinks: losses, what eviction costs, a rolling cache."""
    for sinks, recent in ((0, 8), (2, 8), (2, None)):
        loss = partial(book.call, "streaming.streaming_loss", s.model, s.tokens, sinks=sinks)
        loss(recent=recent, tag=f"{sinks}, {recent}")
    found = book.call("streaming.eviction_study", s.model, s.tokens, [8, 16], first=[1, 2], sinks=s.sinks)
    book.pages("streaming.write_streaming", found)
    cache = book.attempt("cache", use, "streaming.StreamingCache", s.model, sinks=2, recent=8)
    book.value("StreamingCache", continued, s, cache)

    def streamed() -> torch.Tensor:
        with use("streaming.streaming_attention", s.model, sinks=2, recent=8):
            return logits(s, [], ids=s.tokens.ids[:1, :40])

    book.value("streaming_attention", streamed)


def planted(book: Book) -> None:
    """A GPT-2 whose writers are known, in enough documents for every claim and interval."""
    s = planted_subject()
    for part in (find, trace):
        part(book, s)


def architecture(book: Book, name: str) -> None:
    """Everything on one architecture."""
    s = text_subject(name)
    for part in (find, edit, experiment, decompose, trace, mixing, streaming):
        part(book, s)
    texts = sl.Tokens.concatenate([s.tokens, s.reference])
    book.call("check_model", s.model, texts, functions=["sink_scores", "token_loss", "ablate_sinks"])
    if name == "llama":  # seconds each
        book.call("reproduce", "gu-norms", model=s.model, n_seqs=2)
        book.pages("write_report", s.model, s.tokens, quick=True, files=("*.csv", "*.safetensors"))


def images(book: Book) -> None:
    """A model without a bridge, on pictures."""
    torch.manual_seed(0)
    sizes = {k: v for k, v in _SIZES.items() if k.startswith(("hidden", "inter", "num"))}
    model = sl.load_model(tf.Dinov2Model(tf.Dinov2Config(**sizes, image_size=32, patch_size=4)).eval())
    draw = np.random.default_rng(0)
    seen = book.call("inputs.load_images", model, [draw.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in "ab"])
    scores = MISSING
    for backend in BACKENDS:
        scores = book.call("sink_scores", model, seen, backend=backend, tag=backend)
    book.call("find_sinks", model, seen)
    registers = book.call("find.register_tokens", model, seen, ratio=1.05)
    book.call("find.image_map", scores, 1, layers=[0, 1])
    book.pages("find.write_images", scores, registers)


STUDY: dict[str, Any] = {
    "name": "tiny", "seeds": [0], "model": {"d_model": 16, "n_heads": 2}, "task": {"name": "Backcopy", "seq_len": 24},
    "train": {"steps": 6, "batch_size": 4, "warmup": 1, "evaluate_every": 3, "evaluation_size": 8},
    "variants": {"softmax": {}, "sigmoid": {"model": {"attention": "sigmoid"}}},
}  # fmt: skip


def lab(book: Book) -> None:
    """A study of two small trainings."""
    folder = book.folder / "lab"
    runs = book.value("run_study", use, "lab.run_study", STUDY, folder)
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pt"):
        book.value(f"files/{path.relative_to(folder)}", file_digest, path)
    for run in runs or ():
        book.result(f"LabRun[{run.config.name}]", run)
        book.value(f"LabRun[{run.config.name}].model", lambda run: run.model()(torch.arange(2, 22)[None]), run)
    book.call("lab.compare", runs)
    if book.keep:
        shutil.copyfile(next(folder.rglob("*.safetensors")), book.keep / "LabModel.safetensors")


SUBJECTS: dict[str, Callable[[Book], None]] = {"planted": planted, "images": images, "lab": lab}
SUBJECTS |= {name: partial(architecture, name=name) for name in BUILDERS}


def smoke(book: Book) -> None:
    """Scores and one ablation."""
    s = text_subject("llama")
    book.call("sink_scores", s.model, s.tokens)
    book.edit(s, "ablate_sinks", s.sinks, tag="renormalize")


# --- the command ------------------------------------------------------------------------------------------------------


def hashes(chosen: Mapping[str, Callable[[Book], None]], keep: Path | None = None) -> Book:
    """Run these subjects on one thread, whose sums have one order."""
    torch.set_num_threads(1)
    tf.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        book = Book(Path(folder), keep)
        for name, run in chosen.items():
            began, known = time.process_time(), len(book.entries)
            book.subject = name
            run(book)
            print(f"{name}: {len(book.entries) - known} entries, {time.process_time() - began:.0f} s", file=sys.stderr)
    return book


def compare(first: Path, second: Path) -> list[str]:
    """The names whose hashes differ, or that one file lacks."""
    a, b = (json.loads(path.read_text(encoding="utf-8")) for path in (first, second))
    different = [name for name in sorted({**a, **b}) if a.get(name) != b.get(name)]
    return [
        f"{'differs' if n in a and n in b else f'missing in {second if n in a else first}'}: {n}" for n in different
    ]


def main() -> int:
    """Run or compare; 1 if anything differs or failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the hashes as JSON")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="compare two such files")
    parser.add_argument("--only", choices=SUBJECTS, help="one subject")
    parser.add_argument("--smoke", action="store_true", help="a small part, in seconds")
    parser.add_argument("--keep", type=Path, help="a folder for one saved file per kind of result")
    given = parser.parse_args()
    if given.compare:
        different = compare(*given.compare)
        print("\n".join(different) or "equal")
        return int(bool(different))
    if given.keep:
        given.keep.mkdir(parents=True, exist_ok=True)
    chosen = {"smoke": smoke} if given.smoke else {n: f for n, f in SUBJECTS.items() if given.only in (None, n)}
    book = hashes(chosen, given.keep)
    text = json.dumps(book.entries, indent=1, sort_keys=True) + "\n"
    if given.out:
        given.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    for line in book.failures:
        print(f"FAILED {line}", file=sys.stderr)
    return int(bool(book.failures))


if __name__ == "__main__":
    sys.exit(main())
