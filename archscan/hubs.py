"""Pretrained weights: a recipe → a model with the weights that timm's or torchvision's hub has for it.

The decision that is not obvious: before a hub's client is called, `hub_is_reachable` asks once, with its own deadline.
The clients retry with growing pauses (huggingface_hub waits some 45 s for a host name that does not resolve), and a
resolver that gets no answer heeds no timeout, so the question is asked in a thread that nobody waits for longer than
the deadline. What lies in a client's cache is still found: an unreachable hub only puts the client offline.
"""

import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import timm
import torch
import torchvision
from safetensors import SafetensorError
from torch import Tensor, nn

from archscan.errors import BadInput
from archscan.recipes import Recipe, build, seeded, torchvision_weights
from archscan.weights import load_into

PROBE_SECONDS = 3.0


class NoPretrainedWeights(Exception):
    """Pretrained weights cannot be had; the message is a clause that says why."""


def hub_is_reachable(url: str, seconds: float = PROBE_SECONDS) -> bool:
    """Say whether the host of `url` answers over HTTP within `seconds`, by way of the environment's proxies."""
    answered: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds):
                answered.append(True)
        except urllib.error.HTTPError as error:
            answered.append(error.code < 500 and error.code != 407)
            error.close()
        except (OSError, ValueError):
            answered.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answered and answered[0])


@contextmanager
def offline_where_unreachable() -> Iterator[bool]:
    """Keep huggingface_hub to its local cache while its hub does not answer; yield whether it answers."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or hub_is_reachable(constants.ENDPOINT):
        yield not constants.HF_HUB_OFFLINE
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield False
    finally:
        constants.HF_HUB_OFFLINE = False


def torch_hub_has(url: str) -> bool:
    """Say whether the file of `url` lies in torch.hub's local cache."""
    return (Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name).is_file()


def pretrained_model(recipe: Recipe, *, seed: int = 0) -> tuple[nn.Module, str]:
    """Build a recipe with pretrained weights; a classifier of another size than theirs stays random.

    Args:
        recipe: A network of timm, torchvision or the reference table, with ``num_classes`` among its arguments.
        seed: Of what stays random.

    Returns:
        The model, and the tag or address that its weights come from.

    Raises:
        NoPretrainedWeights: There are none, or the hub cannot be reached.
        BadInput: They are damaged, or do not fit.
    """
    return _PRETRAINED[recipe.source](recipe, seed)


def _timm_pretrained(recipe: Recipe, seed: int) -> tuple[nn.Module, str]:
    config = timm.get_pretrained_cfg(recipe.name)
    if config is None or not config.has_weights:
        raise NoPretrainedWeights("timm has none for this network")
    on_hub, url = bool(config.hf_hub_id), str(config.url or "")
    if not on_hub and url and not (torch_hub_has(url) or hub_is_reachable(url)):
        raise NoPretrainedWeights(_unreachable(url))
    with offline_where_unreachable() if on_hub else nullcontext(True) as online, seeded(seed):
        try:
            model = timm.create_model(recipe.name, pretrained=True, **recipe.kwargs)
        except (OSError, SafetensorError) as error:
            why = f"{config.hf_hub_id or url}: {error}" if online else _unreachable("huggingface.co")
            raise NoPretrainedWeights(why) from error
    return model, str(config.hf_hub_id or url)


def _torchvision_pretrained(recipe: Recipe, seed: int) -> tuple[nn.Module, str]:
    weights = torchvision_weights(recipe.name)
    if weights is None:
        raise NoPretrainedWeights("torchvision has none for this network")
    if not (torch_hub_has(weights.url) or hub_is_reachable(weights.url)):
        raise NoPretrainedWeights(_unreachable(weights.url))
    try:
        with seeded(seed):
            state = torchvision.models.get_model(recipe.name, weights="DEFAULT").state_dict()
    except OSError as error:
        raise NoPretrainedWeights(f"{weights.url}: {error}") from error
    except RuntimeError as error:
        raise BadInput(f"the file from {weights.url} is damaged ({error}); remove it from torch.hub's cache") from error
    model = build(recipe, seed=seed)
    if recipe.kwargs["num_classes"] != len(weights.meta["categories"]):
        _keep_own_classifier(state, model.state_dict())
    load_into(model, state, weights.url)
    return model, str(weights)


def _keep_own_classifier(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Put a model's own tensors where only the number of outputs differs."""
    for key in own.keys() & state.keys():
        if own[key].shape[:1] != state[key].shape[:1] and own[key].shape[1:] == state[key].shape[1:]:
            state[key] = own[key]


def _reference_pretrained(recipe: Recipe, seed: int) -> tuple[nn.Module, str]:
    raise NoPretrainedWeights("reference networks come without weights")


_PRETRAINED: Mapping[str, Callable[[Recipe, int], tuple[nn.Module, str]]] = {
    "timm": _timm_pretrained,
    "torchvision": _torchvision_pretrained,
    "reference": _reference_pretrained,
}


def _unreachable(url: str) -> str:
    host = re.sub(r"^\w+://", "", url).partition("/")[0]
    return f"{host} cannot be reached, and the weights are not in the local cache"
