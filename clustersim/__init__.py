"""Plan a training cluster, simulate it, run the plan, and see how wrong the prediction was."""

__version__ = "0.1.0"
