"""Models that compute logits of some tokens only: their head gets those, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from adamix.serving.routing import Routing


@contextmanager
def selection_followed(model: PreTrainedModel, routing: Routing) -> Iterator[None]:
    """Route the layers after the base model by the tokens that `logits_to_keep` leaves them.

    In CUDA graphs, too: the tokens' places stay in one tensor, which is rewritten.
    """
    kept: list[Tensor | None] = [None]

    def note(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        tokens = kwargs.get("logits_to_keep")
        kept[0] = tokens if isinstance(tokens, Tensor) else None
        routing.select(None)

    def select(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        routing.select(kept[0])

    hooks = (model.register_forward_pre_hook(note, with_kwargs=True),
             model.base_model.register_forward_hook(select))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
