"""Load models, tokenizers and single tensors, on a device, in a dtype, checked for what would spoil numbers in silence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_accelerate_available, logging

from transplant_ray.errors import CheckpointError, DeviceError, NumericsError
from transplant_ray.models.catalogue import skeleton
from transplant_ray.models.checkpoint import CONFIG_ERRORS, Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LoadTensor = Callable[[str], torch.Tensor]
OF_THE_DEVICE = (torch.OutOfMemoryError, torch.AcceleratorError)
"""What torch raises where a GPU has no room, or fails."""


def placement(num_gpus: float) -> str:
    """Where a model with this many GPUs goes, as a `device_map`: cpu, the one GPU that this process sees, or spread over several.

    A process that was promised a GPU which torch does not see (a CPU build of torch) runs on CPU.
    """
    if num_gpus == 0 or not torch.cuda.is_available():
        return "cpu"
    return "cuda:0" if num_gpus <= 1 else "balanced"


def load_model(checkpoint: Checkpoint, dtype: str, device_map: str = "cpu") -> PreTrainedModel:
    """The model, in eval mode, without gradients.

    CheckpointError where tensors are missing, NumericsError where not finite, DeviceError where the device cannot take it.
    """
    folder = checkpoint.fetch()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            device_map=device_map if is_accelerate_available() else None,
            trust_remote_code=checkpoint.remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except OF_THE_DEVICE as error:
        raise _cannot_take(checkpoint, error) from error
    except (*CONFIG_ERRORS, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint.model}: cannot be loaded: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{checkpoint.model}: {len(missing)} tensors are missing, e.g. {missing[0]}. Download it again.")
    check_finite(checkpoint.model, dict(model.named_parameters()))
    if not is_accelerate_available():  # a bare machine has one device to put a model on
        model = model.to(device_map)
    return cast("PreTrainedModel", model.eval().requires_grad_(False))


def assemble(
    checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, device: str = "cpu"
) -> PreTrainedModel:
    """The model of a checkpoint's config with `tensors`, by their names on disk, as its weights; nothing is read.

    Where they have `dtype` and are on `device` already, and the family stores its weights as it uses them, they are the model's own
    and not copied. CheckpointError where some are missing, DeviceError where the device cannot take it.
    """
    logging.disable_progress_bar()
    try:
        model, report = type(skeleton(checkpoint)).from_pretrained(  # type: ignore[attr-defined]  # a PreTrainedModel's
            None,
            config=checkpoint.config,
            state_dict=dict(tensors),
            dtype=dtype,
            device_map=device if is_accelerate_available() else None,
            output_loading_info=True,
        )
    except OF_THE_DEVICE as error:
        raise _cannot_take(checkpoint, error) from error
    except CONFIG_ERRORS as error:
        raise CheckpointError(f"{checkpoint.model}: cannot be loaded: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{checkpoint.model}: {len(missing)} tensors are missing, e.g. {missing[0]}. Download it again.")
    return cast("PreTrainedModel", model if is_accelerate_available() else model.to(device))


def _cannot_take(checkpoint: Checkpoint, error: Exception) -> DeviceError:
    return DeviceError(f"{checkpoint.model}: the device cannot take it: {error}. Is it shared, or too small for this `dtype`?")


def check_devices(*devices: torch.device | str) -> None:
    """DeviceError where one no longer computes: after some errors all calls of a process fail, whatever they ask.

    Memory that has run out is no such error.
    """
    for device in devices:
        try:
            torch.ones(2, device=device).sum().item()
        except torch.OutOfMemoryError:
            continue
        except RuntimeError as error:
            raise DeviceError(f"{device} no longer computes: {error}") from error


def devices_of(model: torch.nn.Module) -> set[torch.device]:
    devices = {parameter.device for parameter in model.parameters()}
    return {device for device in devices if device.type != "meta"}  # weights that are on the disk for want of room


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the left; a missing pad token becomes the end token (masked, it is never read)."""
    tokenizer = read_tokenizer(checkpoint)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise CheckpointError(f"{checkpoint.model}: its tokenizer has no pad, end or unknown token to pad with.")
    return tokenizer


def read_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer as it is. CheckpointError where there is none that can be loaded."""
    place = checkpoint.folder or checkpoint.model  # of a hub checkpoint, the tokenizer comes alone
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=checkpoint.revision, trust_remote_code=checkpoint.remote_code)
    except Exception as error:  # what the tokenizers library raises is nothing narrower
        raise CheckpointError(f"{checkpoint.model}: its tokenizer cannot be loaded: {error}") from error
    return cast("PreTrainedTokenizerBase", tokenizer)


def load_tensors(
    checkpoint: Checkpoint, names: Iterable[str], dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> dict[str, torch.Tensor]:
    """Tensors by their names on disk, in `dtype` (as stored where None); reads nothing else."""
    folder = checkpoint.fetch()
    by_file: Mapping[str, list[str]] = defaultdict(list)
    for name in names:
        by_file[checkpoint.tensors[name].file].append(name)
    tensors: dict[str, torch.Tensor] = {}
    for file, wanted in by_file.items():
        try:
            with safe_open(folder / file, framework="pt") as shard:
                for name in wanted:
                    tensors[name] = shard.get_tensor(name).to(device=device, dtype=dtype)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{checkpoint.model}: {file} has gone or changed since it was compared ({error}).") from error
    check_finite(checkpoint.model, tensors)
    return tensors


def check_finite(model: str, tensors: Mapping[str, Any]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            count, dtype = int((~torch.isfinite(tensor)).sum()), str(tensor.dtype).removeprefix("torch.")
            raise NumericsError(
                f"{model}: {name} holds {count} NaN or infinite values as {dtype}. The checkpoint is broken (download it again), "
                "or its numbers do not fit this dtype (choose another `resources.dtype`)."
            )
