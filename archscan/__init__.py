"""Find what bottlenecks a CNN, slim it to a budget, and prove that the slim network computes what the plan says."""

from archscan.torchvision_ops import declare_missing_ops

declare_missing_ops()
