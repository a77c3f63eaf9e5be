"""Let timm build slimmed networks: a saved folder → ``timm.create_model("archscan", folder=…)``.

Importing this module registers the entrypoint. For programs that import timm themselves, such as timm's training
script, ``python -m archscan.timm_entrypoint train.py --model archscan --model-kwargs folder=DIR …`` runs them with it.

The decision that is not obvious: the weights of the folder are always loaded, with or without ``pretrained=True``,
because nobody who names a folder of trained weights wants random ones.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

from timm.models import register_model
from torch import nn

from archscan.errors import BadInput
from archscan.saved import open_saved

__all__ = ["archscan", "main"]


def archscan(
    pretrained: bool = False,
    *,
    folder: str | Path | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    **others: Any,
) -> nn.Module:
    """Load a saved network, in train mode as timm's networks are; timm's `resolve_data_config` finds its images.

    Args:
        pretrained: Makes no difference: the folder has the weights.
        folder: What archscan saved.
        num_classes: The network's own, or None.
        in_chans: Likewise.
        pretrained_cfg: Not taken; timm passes None.
        pretrained_cfg_overlay: Likewise.
        cache_dir: Makes no difference: nothing is fetched.
        **others: What timm passes to any network; it must be off (None, 0, False).

    Raises:
        BadInput: No folder is named, it cannot be opened, or the network would have to be another one.
    """
    if folder is None:
        raise BadInput('timm\'s network "archscan" needs the folder of a saved result; pass folder=DIR')
    given = {"pretrained_cfg": pretrained_cfg, "pretrained_cfg_overlay": pretrained_cfg_overlay, **others}
    unknown = [name for name, value in given.items() if value]
    if unknown:
        raise BadInput(f"a saved network is built as it was saved and takes no {unknown[0]}; leave it out")
    subject = open_saved(Path(folder))
    images = subject.preprocessing
    for name, wanted, own in (
        ("num_classes", num_classes, subject.num_classes),
        ("in_chans", in_chans, images.channels),
    ):
        if wanted is not None and wanted != own:
            raise BadInput(f"{folder} has {name} {own}, not {wanted}; leave it out")
    model = subject.model.train()
    config = {
        "architecture": "archscan",
        "input_size": (images.channels, *images.input_size),
        "num_classes": subject.num_classes,
        "mean": images.mean,
        "std": images.std,
        "interpolation": images.interpolation,
        "crop_pct": images.crop_pct,
        "crop_mode": images.crop_mode,
    }
    vars(model).update(pretrained_cfg=config, default_cfg=config, num_classes=subject.num_classes)
    return model


def main() -> None:
    """Run a script as ``python script …`` would, with the entrypoint registered.

    Raises:
        BadInput: No script is named, or it is not there.
    """
    arguments = sys.argv[1:]
    if not arguments or not Path(arguments[0]).is_file():
        raise BadInput(f"there is no script {arguments[0] if arguments else ''}; name one: train.py")
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    from archscan.timm_entrypoint import main as run_registered

    try:
        run_registered()
    except BadInput as error:
        sys.exit(f"archscan: {error}")
else:
    register_model(archscan)
