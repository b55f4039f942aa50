"""One call of every public function on tiny models: what the tests of clean-up, of bad input and of pages share.

``CALLS[name]`` gives the arguments of a call that works; :func:`call` makes it and uses what came back (hooks are run,
contexts entered). A new public function without an entry fails ``tests/robustness/test_cleanup.py``.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import plain_models
import torch
import transformers as tf
from made_traces import trace_of, weakened
from public_names import FUNCTIONS, named
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import sinklens as sl
from sinklens import lab, sweep
from sinklens.check.cause_checks import MANY, made
from sinklens.check.subject import SINKS, Subject
from sinklens.experiment.matched_damage import damage
from sinklens.inputs.load import as_tokens
from sinklens.reproductions.originals import subject_of

WICKED = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "%{x}",
    "{{ 7*7 }}",
    "<!--",
    "&lt;b&gt;",
    "<wicked>bold</wicked>",
    "\"'`onmouseover=alert(1) ",
)
SPECIAL = ("<pad>", "<bos>", "<eos>")
LENGTH = 56
Arguments = dict[str, Any]


def byte_tokenizer() -> tf.PreTrainedTokenizerFast:
    """Every byte is a token, so every text has ids; and the wicked ones are tokens of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([*SPECIAL, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(name, special=False) for name in WICKED])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def tiny_llama(seed: int = 0) -> tf.LlamaForCausalLM:
    """Two layers, four heads in two groups, random weights large enough for peaked attention."""
    size = len(byte_tokenizer())
    model = tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=size, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=4, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.4)
    return model


def wicked_ids(rows: int = 4, seed: int = 0) -> torch.Tensor:
    """Rows of 56 ids of letters, wicked tokens at the sinks and in between."""
    words = byte_tokenizer()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(words.encode("abcdefghijklmnop "))[torch.randint(0, 17, (rows, LENGTH), generator=generator)]
    bad = torch.tensor(words.convert_tokens_to_ids(list(WICKED)))
    for row in range(rows):
        for i, position in enumerate((*SINKS, 3, 11, 20, 21, 30, 40)):
            ids[row, position] = bad[(i + row) % len(bad)]
    return ids


class World:
    """A tiny language model, a tiny image model, and everything that functions want of one another."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder = folder
        self.seed = seed
        self.numbers = iter(range(10**9))

    def new(self, suffix: str = "") -> Path:
        """A path that nobody used."""
        return self.folder / f"{next(self.numbers)}{suffix}"

    @cached_property
    def model(self) -> Any:
        return sl.load_model(tiny_llama(self.seed), tokenizer=byte_tokenizer())

    @cached_property
    def model_folder(self) -> Path:
        """The same model as files."""
        path = self.new("-model")
        tiny_llama(self.seed).save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
        return path

    @cached_property
    def every_token(self) -> Any:
        return as_tokens(self.model, wicked_ids())

    @cached_property
    def tokens(self) -> Any:
        return self.every_token[:2]

    @cached_property
    def reference(self) -> Any:
        return self.every_token[2:]

    @cached_property
    def short(self) -> Any:
        return self.tokens[0].first(6)

    @cached_property
    def subject(self) -> Any:
        return Subject(self.model, self.tokens, self.reference)

    @cached_property
    def scores(self) -> Any:
        return self.subject.scores

    @cached_property
    def sinks(self) -> Any:
        return self.subject.sinks

    @cached_property
    def trace(self) -> Any:
        return sl.trace_sinks(
            self.model, self.tokens, self.sinks, reference=self.reference, causal=False, progress=False
        )

    @cached_property
    def made(self) -> Any:
        """A trace with a writer."""
        return made(self.subject, self.tokens, [(b, p) for b in range(2) for p in SINKS])

    @cached_property
    def many(self) -> Any:
        """A trace with as many sinks as the input subspace needs, beside many tokens of the same id."""
        ids = self.tokens.ids.clone()
        ids[:, 2:50] = int(ids[0, 2])
        tokens = as_tokens(self.model, ids)
        return made(self.subject, tokens, [(b, p) for b in range(2) for p in MANY], 1)

    @cached_property
    def likely(self) -> Any:
        """The model's own continuation, which damage makes less likely."""
        row = self.tokens.ids[:1, :4]
        with torch.no_grad():
            for _ in range(20):
                row = torch.cat([row, self.model(row)[:, -1].argmax(-1, keepdim=True)], 1)
        return row

    @cached_property
    def harm(self) -> Any:
        return damage(self.model, "mlp", 0.4, range(2))

    @cached_property
    def hooks(self) -> Any:
        return sl.ablate_sinks(self.model, [0])

    @cached_property
    def vision(self) -> Any:
        return sl.load_model(plain_models.build("dinov2"))

    @cached_property
    def images(self) -> Any:
        return sl.load_images(self.vision, [plain_models.picture(seed=i) for i in range(2)])

    @cached_property
    def seen(self) -> Any:
        return sl.sink_scores(self.vision, self.images, progress=False)

    @cached_property
    def study(self) -> Any:
        return lab.read_study(STUDY)

    @cached_property
    def runs(self) -> Path:
        """A folder with a study's two finished runs."""
        folder = self.new("-runs")
        lab.run_study(STUDY, folder, analysis=False, progress=False)
        return folder

    @cached_property
    def jobs(self) -> Any:
        text = {"texts": ["a text of bytes for a sweep", "and another one for it"]}
        return sweep.make_jobs(str(self.model_folder), text, ["none", EDIT], ["token_loss"])

    @cached_property
    def job_list(self) -> Path:
        """Jobs as YAML."""
        path = self.new(".yaml")
        path.write_text(
            f"models: [{self.model_folder}]\ntexts: [{{source: random, n_seqs: 2, seq_len: 8}}]\ntasks: [token_loss]\n"
        )
        return path

    @cached_property
    def store(self) -> Path:
        """A folder with a finished sweep."""
        folder = self.new("-sweep")
        sweep.run_sweep(self.jobs, folder, executor=Here(), workers=1, progress=False)
        return folder

    def result(self, name: str) -> Any:
        """What the call of this name gives, kept."""
        if name not in self.kept:
            self.kept[name] = call(name, self)
        return self.kept[name]

    @cached_property
    def kept(self) -> dict[str, Any]:
        return {}


class Here(ThreadPoolExecutor):
    """An executor in this process."""

    def __init__(self) -> None:
        super().__init__(1)


EDIT = {"build": "ablate_sinks", "sinks": [0], "mode": "zero"}
STUDY: dict[str, Any] = {
    "name": "tiny",
    "seeds": [0],
    "model": {"d_model": 16, "n_heads": 2},
    "task": {"name": "Backcopy", "seq_len": 24},
    "train": {"steps": 3, "batch_size": 4, "warmup": 1, "evaluate_every": 2, "evaluation_size": 4},
    "variants": {"softmax": {}, "sigmoid": {"model": {"attention": "sigmoid"}}},
}

_quiet: Arguments = {"progress": False}
CALLS: dict[str, Callable[[World], Arguments]] = {
    "ablate_residual": lambda w: {"model": w.model, "sinks": [0], "mode": "project", "reference": w.reference},
    "ablate_sinks": lambda w: {"model": w.model, "sinks": w.sinks, "mode": "mean_value"},
    "heads.attention_grid": lambda w: {"model": w.model, "text": w.tokens},
    "attention_map": lambda w: {"model": w.model, "text": w.tokens, "layer": 1, "head": 2},
    "heads.attention_statistics": lambda w: {"model": w.model, "tokens": w.tokens, "sinks": [0], "entropy": True}
    | _quiet,
    "heads.attention_view": lambda w: {"model": w.model, "text": w.tokens, "layer": 1},
    "experiment.bos_variants": lambda w: {"model": w.model, "tokens": w.tokens},
    "models.capabilities": lambda w: {"model": w.model},
    "check_model": lambda w: {"model": w.model, "tokens": w.every_token, "functions": ["sink_scores", "token_loss"]}
    | _quiet,
    "find.compare_contexts": lambda w: {
        "model": w.model, "source": "random", "contexts": ["natural", "shuffled"], "lengths": [50], "n_seqs": 2
    } | _quiet,
    "find.compare_methods": lambda w: {"model": w.model, "tokens": w.tokens} | _quiet,
    "compare_mixing": lambda w: {
        "model": w.model, "tokens": w.short, "conditions": {"gone": w.hooks}, "sinks": [0], "probes": 2
    } | _quiet,
    "decompose_sinks": lambda w: {"model": w.model, "tokens": w.tokens, "sinks": w.sinks, "reference": w.reference}
    | _quiet,
    "find_sinks": lambda w: {"model": w.model, "tokens": w.tokens, "method": "direction"} | _quiet,
    "flash": lambda w: {"model": w.model},
    "heads.head_activity": lambda w: {"model": w.model, "tokens": w.tokens} | _quiet,
    "find.image_map": lambda w: {"scores": w.seen, "image": 1, "layers": [0, 1]},
    "mixing.jacobian_norms": lambda w: {"model": w.model, "tokens": w.short, "pairs": [(1, 4, 2)]} | _quiet,
    "load_images": lambda w: {"model": w.vision, "sources": [plain_models.picture(), plain_models.picture(seed=1)]},
    "load_model": lambda w: {"name": w.model_folder},
    "load_tokens": lambda w: {"model": w.model, "source": ["one text of bytes", "another"]},
    "experiment.matched_damage": lambda w: {"model": w.model, "tokens": w.likely, "hooks": w.harm, "layers": [0, 1]}
    | _quiet,
    "mixing.measure_collapse": lambda w: {
        "model": w.model, "tokens": w.tokens, "conditions": {"gone": w.hooks}, "sinks": [0]
    } | _quiet,
    "measure_mixing": lambda w: {
        "model": w.model, "tokens": w.short, "sinks": [0], "hooks": w.hooks, "probes": 2
    } | _quiet,
    "mixing.mixing_by_length": lambda w: {
        "model": w.model, "tokens": w.short, "lengths": [4, 6], "sinks": [0], "probes": 2
    } | _quiet,
    "mixing.mixing_conditions": lambda w: {"model": w.model, "sinks": w.sinks, "control": False},
    "inputs.named_tokens": lambda w: {"model": w.model, "names": ("<bos>", "a")},
    "trace.norm_and_mass": lambda w: {"trace": w.made},
    "patch_bos": lambda w: {"model": w.model, "tokens": w.tokens, "source": "mean", "reference": w.reference},
    "mixing.path_sums": lambda w: {"model": w.model, "tokens": w.short, "sinks": [0], "columns": [1]} | _quiet,
    "mixing.perturbation_spread": lambda w: {
        "model": w.model, "tokens": w.tokens, "conditions": {"gone": w.hooks}, "sinks": [0], "n_swaps": 3
    } | _quiet,
    "trace.plant_sinks": lambda w: {"model": w.model, "trace": w.made, "positions": (5,), "n_random": 1} | _quiet,
    "trace.primary_weakening": lambda w: {"trace": trace_of([], primaries=tuple(weakened(0.2, 0.1, 0.5)))},
    "heads.reading_heads": lambda w: {"scores": w.scores, "sinks": w.sinks, "permutations": 19},
    "find.register_tokens": lambda w: {"model": w.vision, "images": w.images} | _quiet,
    "reproduce": lambda w: {"entries": "gu-norms", "model": w.model, "n_seqs": 2} | _quiet,
    "restrict_attention": lambda w: {"model": w.model, "sinks": 2, "recent": 10},
    "run_experiment": lambda w: {
        "model": w.model, "tokens": w.tokens, "interventions": {"gone": w.hooks}, "controls": ("random",),
        "sinks": w.sinks,
    } | _quiet,
    "inputs.sample_images": lambda w: {},
    "sink_anatomy": lambda w: {"model": w.model, "sinks": w.sinks} | _quiet,
    "trace.sink_levels": lambda w: {"sinks": w.sinks},
    "sink_scores": lambda w: {"model": w.model, "tokens": w.tokens} | _quiet,
    "swap_attention": lambda w: {"model": w.model, "kind": "clipped"},
    "sweep_ablation": lambda w: {"model": w.model, "tokens": w.tokens, "sinks": [0]} | _quiet,
    "token_loss": lambda w: {"model": w.model, "tokens": w.tokens, "hooks": w.hooks},
    "trace_sinks": lambda w: {
        "model": w.model, "tokens": w.tokens, "sinks": w.sinks, "reference": w.reference, "most_proven": 1
    } | _quiet,
    "decompose.write_decomposition": lambda w: {"found": w.result("decompose_sinks"), "out": w.new()},
    "experiment.write_experiment": lambda w: {"experiment": w.result("run_experiment"), "out": w.new()},
    "find.write_images": lambda w: {"scores": w.seen, "registers": w.result("find.register_tokens"), "out": w.new()},
    "mixing.write_mixing": lambda w: {
        "found": w.result("compare_mixing"), "out": w.new(), "losses": {"base": 1.0, "gone": 2.0},
        "swaps": w.result("mixing.perturbation_spread"), "collapse": w.result("mixing.measure_collapse"),
        "bound": w.result("mixing.path_sums"),
    },
    "write_report": lambda w: {"model": w.model, "tokens": w.tokens, "path": w.new(), "quick": True} | _quiet,
    "find.write_scan": lambda w: {"scores": w.scores, "out": w.new()},
    "find.write_sinks": lambda w: {"sinks": w.sinks, "anatomy": w.result("sink_anatomy"), "out": w.new()},
    "trace.write_trace": lambda w: {
        "trace": w.result("trace_sinks"), "out": w.new(), "planted": w.result("trace.plant_sinks"),
        "neurons": w.result("trace.writer_neurons"), "scores": w.scores,
    },
    "trace.writer_alignment": lambda w: {"trace": w.made},
    "trace.writer_neurons": lambda w: {"model": w.model, "trace": w.made, "top": (1,), "n_random": 1} | _quiet,
    "trace.writer_subspace": lambda w: {"model": w.model, "trace": w.many, "sizes": (1,), "n_random": 1} | _quiet,
    "streaming.eviction_study": lambda w: {
        "model": w.model, "tokens": w.tokens, "recent": [8], "first": [1], "sinks": w.sinks
    } | _quiet,
    "streaming.streaming_attention": lambda w: {"model": w.model, "sinks": 2, "recent": 8},
    "streaming.streaming_loss": lambda w: {"model": w.model, "tokens": w.tokens, "sinks": 2, "recent": 8} | _quiet,
    "streaming.write_streaming": lambda w: {"found": w.result("streaming.eviction_study"), "out": w.new()},
    "load": lambda w: {"path": w.tokens.save(w.new(".safetensors"))},
    "reproductions.verdict": lambda w: {
        "claim": next(iter(sl.reproductions.CATALOGUE.values())).claims[0], "quantity": None,
        "subject": subject_of(w.model, "tiny"),
        "reason": "not measured"
    },
    "models.untrained_twin": lambda w: {"model": w.model},
    "lab.compare": lambda w: {"runs": w.runs},
    "lab.load_lab_model": lambda w: {"path": next(w.runs.rglob("*.safetensors"))},
    "lab.load_runs": lambda w: {"folder": w.runs},
    "lab.read_study": lambda w: {"source": STUDY},
    "lab.run_study": lambda w: {"study": STUDY, "out": w.new(), "analysis": False} | _quiet,
    "lab.save_lab_model": lambda w: {
        "model": lab.LabModel(w.study.variants[0].fitted()), "config": w.study.variants[0], "seed": 0, "path": w.new()
    },
    "lab.studies": lambda w: {},
    "lab.train": lambda w: {"config": w.study.variants[0], "folder": w.new()} | _quiet,
    "lab.write_tokens": lambda w: {"documents": ["one text", "another text"], "path": w.new(".npy")},
    "sweep.collect": lambda w: {"folder": w.store},
    "sweep.load_jobs": lambda w: {"path": w.job_list},
    "sweep.make_jobs": lambda w: {"models": "smollm2-135m", "texts": {"source": "random"}, "interventions": [EDIT]},
    "sweep.run_sweep": lambda w: {"jobs": w.jobs, "folder": w.new(), "executor": Here(), "workers": 1} | _quiet,
    "sweep.sweep_status": lambda w: {"folder": w.store},
}  # fmt: skip


def function_of(name: str) -> Callable[..., Any]:
    """The public function of a name in the table."""
    return named(name)


def call(name: str, world: World, arguments: Arguments | None = None) -> Any:
    """Make the call of the table (or with other arguments), and use what it gives where it acts only in use."""
    given = CALLS[name](world) if arguments is None else arguments
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sl.SinklensWarning)
        function = function_of(name)
        star = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.VAR_POSITIONAL]
        if star:
            first = [given[k] for k in given if k != star[0]]
            return function(*first, *given[star[0]])
        found = function(**given)
        return used(found, given.get("model", world.model), world)


def used(found: Any, model: Any, world: World) -> Any:
    """Run hooks on the tokens of the world, enter contexts with a forward inside."""
    if isinstance(found, sl.ablate.Hooks):
        with torch.no_grad():
            model.run_with_hooks(world.tokens.ids, attention_mask=world.tokens.mask, fwd_hooks=found, return_type=None)
    elif isinstance(found, contextlib._GeneratorContextManager):
        with found, torch.no_grad():
            if model is world.model:
                model(world.tokens.ids)
        return None
    return found


PUBLIC = sorted(FUNCTIONS)
WRITERS = [name for name in PUBLIC if name.rpartition(".")[2].startswith("write_") and name != "lab.write_tokens"]
