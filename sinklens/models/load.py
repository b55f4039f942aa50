"""``load_model``: a name, folder, GGUF file, hub id or model object becomes a raw, proven TransformerBridge.

Models that TransformerLens does not wrap, or that read images, become a :class:`sinklens.models.PlainModel`.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from huggingface_hub import model_info, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from safetensors import SafetensorError
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.model_bridge.sources.native import NativeModel
from transformer_lens.model_bridge.sources.transformers.helpers import get_hf_model_class_for_architecture
from transformer_lens.utilities.devices import get_device
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin

from sinklens.bridge.capabilities import Capabilities as Capabilities, capabilities, check_finite_weights
from sinklens.bridge.offload import check_device, input_device, offloaded
from sinklens.bridge.torch_globals import own_generator
from sinklens.bridge.unbridged import PlainModel
from sinklens.core.errors import BadInputError, SinklensError, UnsupportedModelError
from sinklens.core.validation import public, shortened
from sinklens.models.catalogue import CATALOGUE
from sinklens.models.fetch import convert_gguf, fetch, quiet_transformers
from sinklens.models.unbridged_proof import prove_plain

# Encoders saved without a head have no adapter; the same weights under a masked-LM head have one. The head is
# then random and never used.
_HEADED = {"BertModel": "BertForMaskedLM", "RobertaModel": "RobertaForMaskedLM"}

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_native_tokenizers: WeakKeyDictionary[TransformerBridge, PreTrainedTokenizerBase] = WeakKeyDictionary()
_headless: WeakKeyDictionary[TransformerBridge, bool] = WeakKeyDictionary()


@public
def load_model(
    name: str | os.PathLike[str] | PreTrainedModel | NativeModel | TransformerBridge | PlainModel,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | Mapping[str, str | int] | None = None,
    max_memory: dict[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> TransformerBridge | Any:
    """A TransformerBridge in raw mode, in eval mode, without gradients on its weights, and proven.

    Where TransformerLens has no adapter (ModernBERT, DistilBERT, CLIP's towers, DINOv2), or the model reads images
    (ViT), the result is a :class:`sinklens.models.PlainModel`, proven too, on which :func:`sinklens.sink_scores`,
    :func:`sinklens.find_sinks`, :func:`sinklens.find.register_tokens` and :func:`sinklens.flash` work; everything else
    raises UnsupportedModelError on it.

    Args:
        name: an embedded model (``sinklens models`` lists them), a local folder with safetensors, a ``.gguf``
            file (dequantised once into the cache), a Hugging Face hub id, a transformers model (it is wrapped in
            place: its attention becomes eager), TransformerLens' native model (wrapped in place; lab models too), or
            an existing bridge or plain model (taken as it is).
        device: where the weights go; default the host's choice (CUDA if there is one). Not for model objects.
        dtype: a floating torch dtype or its name, such as "bfloat16"; default float32, also for checkpoints stored in
            half precision. Not for model objects.
        device_map: for models larger than one device's memory: "auto", or modules to devices, "cpu" and "disk"
            included. Weights that are offloaded come into memory when their module runs.
        max_memory: with ``device_map``, at most so much per device, such as ``{0: "20GB", "cpu": "60GB"}``; the rest
            goes to disk.
        offload_folder: where weights go that stay on disk and whose file does not hold them as they are run (another
            dtype); safetensors that do are read in place.
        tokenizer: for a transformers model object; without it, inputs must be token ids.

    The proof (:func:`sinklens.models.capabilities`) runs at once, so that a model that sinklens cannot measure is
    refused here. Weights are read from safetensors or GGUF only; no remote code runs.

    Raises:
        BadInputError: no such model, no network, damaged or half files, NaN weights.
        UnsupportedModelError: attention that the proof refuses, with a bridge or, where none exists, without.
        SinklensError: an embedded model could not be fetched.
    """
    if isinstance(name, (TransformerBridge, PlainModel, PreTrainedModel, NativeModel)):
        if any(option is not None for option in (device, dtype, device_map, max_memory, offload_folder)):
            raise BadInputError(
                "device, dtype, device_map, max_memory and offload_folder are for models loaded by name; move the "
                "object yourself"
            )
        model = name
        if isinstance(name, NativeModel):
            model = _native(name)
        elif isinstance(name, PreTrainedModel):
            model = _wrap_object(name, tokenizer)
    elif tokenizer is not None:
        raise BadInputError("tokenizer= goes with a transformers model object; a named model brings its own")
    else:
        chosen, dispatch = _dtype(dtype), _dispatch(device, device_map, max_memory, offload_folder)
        check_device(device)
        folder = _locate(os.fspath(name))
        model = _load_named(os.fspath(name), folder, device=device, dtype=chosen, dispatch=dispatch)
    module = model.original_model if isinstance(model, PlainModel) else model
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module.eval()
    if isinstance(model, TransformerBridge):
        capabilities(model)
    return model


def native_tokenizer(model: TransformerBridge | PlainModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer as the model was trained with it.

    The host rebuilds the tokenizer so that it prepends BOS; whether the model ever saw one is then lost. For a
    bridge that sinklens did not load, the original is read again from where the bridge's tokenizer came from.
    """
    if isinstance(model, PlainModel):
        return model.tokenizer
    if model not in _native_tokenizers:
        rebuilt: Any = model.tokenizer
        if rebuilt is None:
            return None
        try:
            _native_tokenizers[model] = AutoTokenizer.from_pretrained(rebuilt.name_or_path, local_files_only=True)
        except (OSError, ValueError, HfHubHTTPError):
            _native_tokenizers[model] = rebuilt
    return _native_tokenizers[model]


def has_trained_head(model: TransformerBridge) -> bool:
    """Whether the weights hold a language-model head, so that logits and losses mean something."""
    return model not in _headless


@public
def untrained_twin(model: TransformerBridge, seed: int = 0) -> TransformerBridge:
    """A model of the same class and shape with the random weights that its class initialises, for token ids only.

    The floor of every index: what it shows is not learned. Cost: a second model in memory.

    Raises:
        UnsupportedModelError: a model without a bridge.
    """
    capabilities(model)
    original: Any = model.original_model
    config = copy.deepcopy(original.config)
    with own_generator(seed):
        fresh = type(original)(config)
    return load_model(fresh.to(device=model.cfg.device, dtype=model.cfg.dtype))


def _locate(name: str) -> str:
    """The folder or hub id that transformers should read."""
    if name in CATALOGUE:
        return str(fetch(name))
    try:
        path = Path(name).expanduser()
        is_folder = path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # what can be no name of a file, or a home of nobody
        raise BadInputError(f"no model can be called {shortened(name)} ({type(error).__name__})") from error
    if is_folder:
        if not (path / "config.json").is_file():
            raise BadInputError(
                f"the folder {name!r} holds no config.json; give a model folder as save_pretrained writes"
            )
        return str(path)
    if path.suffix == ".gguf" or path.is_file():
        if not path.is_file():
            raise BadInputError(f"no file at {name!r}")
        if path.suffix != ".gguf":
            raise BadInputError(f"{name!r} is a file but no .gguf; give the model's folder, or a GGUF file")
        return str(convert_gguf(path))
    _check_hub(name)
    return name


def _check_hub(name: str) -> None:
    """One quick question to the hub, so that a wrong name or no network fails at once, not after minutes of retries."""
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            model_info(name, timeout=10)
    except GatedRepoError:
        return  # the user may hold a licence; loading tells
    except Exception as error:  # the hub client's HTTP library, and so its errors, differ between versions
        raise _load_error(name, name, error) from error


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """A floating dtype from its name; float32 by default."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(found, torch.dtype) or found not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise BadInputError(f"dtype must be one of {names} (a torch dtype or its name), got {dtype!r}")
    return found


def _dispatch(device: Any, device_map: Any, max_memory: Any, offload_folder: Any) -> dict[str, Any]:
    """What transformers is told about devices."""
    if device_map is None:
        if max_memory is not None or offload_folder is not None:
            raise BadInputError("max_memory= and offload_folder= go with device_map=, such as device_map='auto'")
        return {}
    if device is not None:
        raise BadInputError("device= puts the whole model on one device; give it or device_map=, not both")
    device_map = device_map if isinstance(device_map, str) else dict(device_map)
    if isinstance(device_map, dict) and set(device_map.values()) == {"disk"}:
        raise BadInputError(
            "device_map puts everything on disk; leave the embedding on the device that computes: 'cpu', 0"
        )
    found = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
    return {name: value for name, value in found.items() if value is not None}


def _load_named(
    name: str, source: str, *, device: Any, dtype: Any, dispatch: dict[str, Any]
) -> TransformerBridge | PlainModel:
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        declared = _declared_architecture(config, name)
        architecture = _HEADED.get(declared, declared)
        model_class = _model_class(architecture, name)
        config.architectures = [architecture]
        with quiet_transformers(), own_generator(0):  # a head that is missing is drawn
            hf, report = model_class.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                **dispatch,
                attn_implementation="eager",
                use_safetensors=True,
                output_loading_info=True,
            )
        images = model_class.main_input_name == "pixel_values"
        tokenizer = None if images else AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except SafetensorError as error:
        raise BadInputError(
            f"the safetensors of {name!r} are damaged or truncated ({error}); fetch them again"
        ) from error
    except SinklensError:
        raise
    except Exception as error:  # damaged files make the libraries below raise whatever they met
        raise _load_error(name, source, error) from error
    _check_loaded(name, report, head_may_miss=declared != architecture)
    if not dispatch:
        hf = hf.to(device or get_device())
    model = _wrap(hf, tokenizer, name, _preprocessing(source) if images else {})
    if declared != architecture and report["missing_keys"] and isinstance(model, TransformerBridge):
        _headless[model] = True
    return model


def _preprocessing(source: str) -> dict[str, Any]:
    """The preprocessor's configuration as written, or {} where there is none."""
    try:
        return ImageProcessingMixin.get_image_processor_dict(source)[0]
    except (OSError, ValueError, HfHubHTTPError):
        return {}


def _load_error(name: str, source: str, error: Exception) -> BadInputError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(source).is_dir():
        return BadInputError(
            f"cannot load {name!r}: {reason} (sinklens reads safetensors or GGUF only; convert pickled weights "
            f"with save_pretrained(..., safe_serialization=True))"
        )
    return BadInputError(
        f"cannot load {name!r}: it is no embedded model, no folder and no .gguf file here, and the Hugging Face hub "
        f"did not deliver it ({reason}). Without a hub these work: {', '.join(CATALOGUE)}, a local folder, a .gguf file"
    )


def _declared_architecture(config: Any, name: str) -> str:
    declared = getattr(config, "architectures", None)
    if not declared:
        raise BadInputError(f"the configuration of {name!r} names no architecture; set config.architectures")
    return str(declared[0])


def _model_class(architecture: str, name: str) -> Any:
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        try:
            model_class = get_hf_model_class_for_architecture(architecture)
        except (KeyError, ValueError) as error:
            raise UnsupportedModelError(
                f"{name}: transformers has no class {architecture}, and sinklens runs no remote code"
            ) from error
    return model_class


def _check_loaded(name: str, report: dict[str, Any], head_may_miss: bool) -> None:
    """Refuse weights with holes; an encoder saved without its language-model head is whole without it."""
    holes = {key for key in report["missing_keys"] if not (head_may_miss and key.startswith(("cls.", "lm_head.")))}
    if holes:
        raise BadInputError(
            f"the weights of {name!r} lack {len(holes)} tensors, such as {min(holes)}; those would be random. "
            f"Fetch them again"
        )
    if report["mismatched_keys"]:
        raise BadInputError(f"the weights of {name!r} do not fit its configuration: {report['mismatched_keys']}")


def _wrap_object(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> TransformerBridge | PlainModel:
    name = hf.config.name_or_path or type(hf).__name__
    if _holds_components(hf):  # a second bridge would take the first one's apart
        raise BadInputError(f"{name} lies in a bridge already, which changed it in place; pass that bridge")
    if not hf.config.architectures:
        hf.config.architectures = [type(hf).__name__]
    return _wrap(hf, tokenizer, name, {})


def _holds_components(hf: PreTrainedModel) -> bool:
    """Whether the host put components of a bridge into the model."""
    return any(isinstance(module, GeneralizedComponent) for module in hf.modules())


def _native(module: NativeModel) -> TransformerBridge:
    """The host's bridge around its native model; a module may prepare the host's adapter itself."""
    return build_bridge_from_module(
        module,
        "TransformerLensNative",
        tl_config=module.cfg,
        model_name=getattr(module, "name", "native"),
        post_adapter_hook=getattr(module, "prepare_adapter", None),
    )


def _wrap(
    hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str, preprocessing: dict[str, Any]
) -> TransformerBridge | PlainModel:
    """A bridge where there is one, else the model itself, proven."""
    first: UnsupportedModelError | None = None
    if hf.main_input_name == "pixel_values":
        reason = f"{type(hf).__name__} reads images, which TransformerLens hooks of sinklens do not follow"
    else:
        before = hf.config._attn_implementation or "eager"
        try:
            hf.set_attn_implementation("eager")
            return _boot(hf, tokenizer, name)
        except UnsupportedModelError as error:
            first, reason = error, f"TransformerLens has no adapter for {type(hf).__name__}"
        hf.set_attn_implementation(before)
        if _holds_components(hf):
            raise first  # the host gave up half-way and left its components inside
    if offloaded(hf):
        raise UnsupportedModelError(f"{reason}; without a bridge a model must be in memory: load it without device_map")
    check_finite_weights(hf)
    try:
        return prove_plain(hf, tokenizer, preprocessing, name, reason)
    except UnsupportedModelError as error:
        if first is None:
            raise
        raise UnsupportedModelError(f"{first}; and it cannot be measured without a bridge: {error}") from error


def _boot(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str) -> TransformerBridge:
    architecture = type(hf).__name__
    try:
        if tokenizer is None:  # boot_transformers would ask the hub for one
            return build_bridge_from_module(
                hf, architecture, hf_config=hf.config, model_name=name, device=input_device(hf)
            )
        with tempfile.TemporaryDirectory() as folder:
            native = tokenizer
            if not tokenizer.name_or_path or not Path(tokenizer.name_or_path).is_dir():
                tokenizer.save_pretrained(folder)  # the host reads it again from where it came from
                tokenizer = AutoTokenizer.from_pretrained(folder)
            bridge = TransformerBridge.boot_transformers(
                name, hf_model=hf, tokenizer=tokenizer, device=input_device(hf), dtype=hf.dtype
            )
    except (ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{name}: TransformerLens cannot wrap {architecture} ({str(error).splitlines()[0]})"
        ) from error
    bridge.cfg.device = str(input_device(hf))  # the host names the embedding's own device, "meta" where it is on disk
    _native_tokenizers[bridge] = native
    return bridge
