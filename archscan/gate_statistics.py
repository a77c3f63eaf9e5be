"""The statistics that criteria score by: what the gates of a network told, as arrays and without the network.

Shape suffixes: B calibration batches, N samples, U units, L layers. The decision that is not obvious: criteria see this
alone, so that a unit may be anything with a gate, a single weight of a classical problem too.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from archscan.errors import BadInput
from archscan.layer_statistics import LayerMoments

Need = Literal[
    "gradient",
    "sample_gradient",
    "fisher_gradient",
    "hessian_ones",
    "hessian_diagonal",
    "weight_norm",
    "bn_scale",
    "group",
    "summed",
    "read_norm",
    "layer_inputs",
    "layer_gradients",
    "sharpness",
]


@dataclass(frozen=True, eq=False)
class GateStatistics:
    """What criteria see of a network; None where it was not asked for.

    Attributes:
        unit_count: U.
        seed: Seed of everything random: label draws, Hutchinson probes, the `random` criterion.
        batch_sizes: Samples of each calibration batch; empty where no batch was needed.
        gradient_BU: Gradient of each batch's mean loss by the gates, float64.
        sample_gradient_NU: Gradient of each sample's own loss by its gates, in the model's precision.
        fisher_gradient_NU: The same for cross-entropy with labels drawn from the model's own predictions.
        hessian_ones_BU: H·1, the Hessian of each batch's mean loss by the gates summed along its rows, float64.
        hessian_diagonal_U: Diagonal of the Hessian of the mean loss, float64.
        weight_norm_U: L2 norm of the unit's slices of producers' and consumers' weights, float64.
        bn_scale_U: Mean abs(γ) of the unit's BatchNorm channels, NaN where it has none, float64.
        group_U: Number of the unit's channel group, -1 where it has none.
        summed_U: Whether sums write the unit's channels, as in a residual stream, boolean.
        read_norm_U: L2 norm of the unit's slices of consumers' weights alone, float64.
        sharpness_U: Largest absolute eigenvalue of the unit's group, see `sharpness`, float64.
        layer_inputs_L: Second moments of the inputs of every layer that reads units, in the order of the calls.
        layer_gradients_L: Second moments [G, O, O] of the gradients of their outputs, see `LayerWatch`, float64.
    """

    unit_count: int
    seed: int = 0
    batch_sizes: tuple[int, ...] = ()
    gradient_BU: np.ndarray | None = None
    sample_gradient_NU: np.ndarray | None = None
    fisher_gradient_NU: np.ndarray | None = None
    hessian_ones_BU: np.ndarray | None = None
    hessian_diagonal_U: np.ndarray | None = None
    weight_norm_U: np.ndarray | None = None
    bn_scale_U: np.ndarray | None = None
    group_U: np.ndarray | None = None
    summed_U: np.ndarray | None = None
    read_norm_U: np.ndarray | None = None
    sharpness_U: np.ndarray | None = None
    layer_inputs_L: tuple[LayerMoments, ...] | None = None
    layer_gradients_L: tuple[np.ndarray, ...] | None = None

    @property
    def samples(self) -> int:
        """Calibration samples seen."""
        return sum(self.batch_sizes)

    def require(self, need: Need) -> Any:
        """Get a statistic that a criterion needs, an array unless it is one of layers.

        Raises:
            BadInput: It was not collected.
        """
        (name,) = (entry.name for entry in fields(self) if entry.name.rpartition("_")[0] == need)
        values = getattr(self, name)
        if values is None:
            raise BadInput(f"the statistics hold no {need}; collect them with what the criterion needs")
        return values

    def require_layers(self, need: Literal["layer_inputs"]) -> tuple[LayerMoments, ...]:
        """Get the moments of the layers' inputs that a criterion needs.

        Raises:
            BadInput: They were not collected.
        """
        return self.require(need)
