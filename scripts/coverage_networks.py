"""Which networks the coverage sweep opens, in which order, and which it leaves out, each with its reason."""

import fnmatch
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path

TRANSFORMER = "a transformer: {} of its MACs are convolutions, {}"
EXCLUDED: Mapping[str, str] = {
    "beit": TRANSFORMER.format("0.7 %", "all in the patch embedding"),
    "cait": TRANSFORMER.format("2 %", "all in the patch embedding"),
    "coat": TRANSFORMER.format("5 %", "in patch embeddings and position encodings"),
    "convit": TRANSFORMER.format("2 %", "all in the patch embedding"),
    "crossvit": TRANSFORMER.format("3 %", "all in the patch embeddings"),
    "davit": TRANSFORMER.format("5 %", "in patch embeddings and position encodings"),
    "deepseek_vit": TRANSFORMER.format("0.1 %", "all in the patch embedding"),
    "deit": TRANSFORMER.format("2 %", "all in the patch embedding"),
    "eva": TRANSFORMER.format("2 %", "all in the patch embedding"),
    "gemma4_vit": TRANSFORMER.format("none", "patches are embedded by a linear layer"),
    "hiera": TRANSFORMER.format("0.9 %", "all in the patch embedding"),
    "hieradet_sam2": TRANSFORMER.format("0.7 %", "all in the patch embedding"),
    "mlp_mixer": "an MLP: 1 % of its MACs are convolutions, all in the patch embedding",
    "mvitv2": TRANSFORMER.format("1.5 %", "in the patch embedding and the pooling of queries and keys"),
    "naflexvit": TRANSFORMER.format("none", "patches are embedded by a linear layer"),
    "pit": TRANSFORMER.format("a few percent", "in the patch embedding and the pooling of tokens"),
    "qwen3_vit": TRANSFORMER.format("0.5 %", "all in the patch embedding"),
    "sequencer": "a recurrent network: 2 % of its MACs are convolutions, all in the patch embeddings",
    "swin_transformer": TRANSFORMER.format("0.3 %", "all in the patch embedding"),
    "swin_transformer_v2": TRANSFORMER.format("0.3 %", "all in the patch embedding"),
    "swin_transformer_v2_cr": TRANSFORMER.format("0.3 %", "all in the patch embedding"),
    "tnt": TRANSFORMER.format("0.2 %", "all in the patch embedding"),
    "twins": TRANSFORMER.format("6 %", "in patch embeddings, position encodings and the reduction of keys"),
    "vision_transformer": TRANSFORMER.format("2 %", "all in the patch embedding"),
    "vision_transformer_relpos": TRANSFORMER.format("1 %", "all in the patch embedding"),
    "vision_transformer_sam": TRANSFORMER.format("0.7 %", "in the patch embedding and the neck"),
    "xcit": TRANSFORMER.format("7 %", "in the patch embedding and the local interaction of patches"),
}
"""timm modules that do not compute with convolutions; the shares are those of the smallest network of each, at its own
input size. Every module in which convolutions do a tenth of the MACs or more is swept, and ``csatv2``, whose first
stages are ConvNeXt blocks."""

_SLICE = """
    mobileone_s1 halonet_h1 convmixer_768_32 convnext_zepto_rms cpubone_nano csatv2 cs3darknet_focus_s cspnext_tiny
    densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 mobilenetv2_035
    efficientvim_m1 efficientvit_b0 efficientvit_m0 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny
    ghostnet_050 hardcorenas_b hgnetv2_b0 hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2
    inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0 mambaout_femto maxvit_pico_rw_256
    poolformerv2_s12 mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs nasnetalarge nest_tiny nextvit_small
    nf_regnet_b0 pvt_v2_b0 rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d
    resnet10t resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 shvit_s1 skresnet18 starnet_s050 swiftformer_xs
    tiny_vit_5m_224 tresnet_m vgg11 visformer_tiny vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224
    ese_vovnet19b_slim_dw legacy_xception xception41p
"""
_TORCHVISION_SLICE = """
    squeezenet1_1 shufflenet_v2_x0_5 googlenet mnasnet0_5 r2plus1d_18 mc3_18 lraspp_mobilenet_v3_large
    deeplabv3_mobilenet_v3_large ssdlite320_mobilenet_v3_large fasterrcnn_mobilenet_v3_large_320_fpn
    retinanet_resnet50_fpn
"""
SLICE: tuple[str, ...] = (
    *(f"timm:{name}" for name in _SLICE.split()),
    *(f"torchvision:{name}" for name in _TORCHVISION_SLICE.split()),
)
"""The smallest network of each timm module that is swept, and some of each task of torchvision; without PNASNet and
S3D, which take longest and differ least from others."""

_TORCHVISION_OUT = {
    "vit_*": "a transformer",
    "swin*": "a transformer",
    "mvit*": "a transformer",
    "raft*": "optical flow: a recurrent matching of two images, not a network with an output to keep",
    "maskrcnn*": "the backbone and the proposal head are those of fasterrcnn_resnet50_fpn",
    "keypointrcnn*": "the backbone and the proposal head are those of fasterrcnn_resnet50_fpn",
    "quantized_*": "integer weights cannot be cut as parameters",
}
"""Patterns of torchvision networks that are left out, each with its reason."""


def module_of(network: str) -> str:
    """Name the timm module or the torchvision task that a network comes from."""
    source, _, name = network.partition(":")
    if source == "timm":
        import timm

        return timm.models._registry._model_to_module[name]
    import torchvision

    parts = torchvision.models.get_model_builder(name).__module__.split(".")
    return f"torchvision.{parts[2]}" if len(parts) > 3 else "torchvision"


def list_networks(source: str, match: str) -> tuple[list[str], dict[str, str]]:
    """List the networks to sweep, and those left out with their reasons.

    Args:
        source: ``timm``, ``torchvision`` or ``all``.
        match: A shell pattern on names without their source.
    """
    found: list[str] = []
    left_out: dict[str, str] = {}
    if source in ("timm", "all"):
        import timm

        for name in sorted(timm.list_models()):
            reason = EXCLUDED.get(timm.models._registry._model_to_module[name], "")
            if reason:
                left_out[f"timm:{name}"] = reason
            else:
                found.append(f"timm:{name}")
    if source in ("torchvision", "all"):
        import torchvision

        for name in sorted(torchvision.models.list_models()):
            reason = next((why for pattern, why in _TORCHVISION_OUT.items() if fnmatch.fnmatchcase(name, pattern)), "")
            if reason:
                left_out[f"torchvision:{name}"] = reason
            else:
                found.append(f"torchvision:{name}")
    return [network for network in found if fnmatch.fnmatchcase(network.partition(":")[2], match)], left_out


def count_parameters(networks: Iterable[str], table: Path) -> dict[str, int]:
    """Count the parameters of networks, without memory for them; what has been counted before is read from a file.

    Args:
        networks: Such as ``timm:resnet18``.
        table: JSON of earlier counts, to which new ones are added.
    """
    known: dict[str, int] = json.loads(table.read_text(encoding="utf-8")) if table.is_file() else {}
    missing = [network for network in networks if network not in known]
    if missing:
        known |= {network: _parameters(network) for network in missing}
        text = json.dumps(dict(sorted(known.items())), indent=0)
        table.write_text(f"{text}\n", encoding="utf-8")
    return known


def _parameters(network: str) -> int:
    import torch
    from coverage_subjects import build
    from torchvision.models import get_model_weights

    source, _, name = network.partition(":")
    if source == "torchvision":
        weights = next(iter(get_model_weights(name)), None)
        if weights is not None:
            return int(weights.meta["num_params"])
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(network)[0].parameters())


def in_order(networks: Sequence[str], parameters: Mapping[str, int]) -> list[str]:
    """Order networks so that a sweep that is interrupted has seen most: modules take turns, small networks first."""
    by_module: dict[str, list[str]] = defaultdict(list)
    for network in sorted(networks, key=lambda network: (parameters[network], network)):
        by_module[module_of(network)].append(network)
    return [network for network in chain.from_iterable(zip_longest(*by_module.values())) if network is not None]
