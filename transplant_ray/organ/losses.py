"""What a model loses on text that is cut into blocks: the perplexity of a trained organ, and the price elsewhere.

Shapes: B blocks of a pass, T tokens of a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from transplant_ray.errors import ResourceError
from transplant_ray.organ.pack import Blocks

LOGITS = 2**27
"""Numbers in the logits of one pass: half a gigabyte."""


@torch.inference_mode()
def block_losses(model: nn.Module, blocks: Blocks, indices: Sequence[int], rows: int, dtype: str = "float32") -> Iterator[float]:
    """Mean loss of each block, in nats a token; its first token is not predicted. At most `rows` blocks a pass.

    The mean of them is the mean over all tokens, for blocks are of one length. NaN where a logit was. The model is to be in
    evaluation mode; `dtype` is that of the arithmetic. ResourceError where memory runs out.
    """
    device = next(model.parameters()).device
    most = max(1, min(rows, LOGITS // (blocks.context * _vocabulary(model))))
    for start in range(0, len(indices), most):
        ids_BT = blocks.read(indices[start : start + most]).to(device)
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
            loss_BT = cross_entropy(logits_BTV[:, :-1].transpose(1, 2).float(), ids_BT[:, 1:], reduction="none")
        except torch.OutOfMemoryError as error:
            raise ResourceError(f"out of memory ({error}). Read fewer blocks at a time than {most}, or shorter ones.") from error
        yield from loss_BT.double().mean(1).tolist()


def _vocabulary(model: nn.Module) -> int:
    return int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]  # what transformers gives every model
