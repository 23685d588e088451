"""How time and memory of a training step grow: with the patch, the batch, the feature channels, the classes and the processes.

One axis is swept at a time around a base case (`cases.py`, `sweep.py`). A point is first tried in a process of its own
(`child.py`), which tells its memory, and whether it fits the memory and the time that are given; the points of an axis that do
are then timed against each other, interleaved (`Meter`), in one process. What does not fit is kept, with the reason. Features
come from `Lift`, which costs next to nothing, so that what grows with the channels is the fusion and the network's first layer,
not a foundation model. Processes that train together are started by torchrun (`together.py`).

`cluster.py` is a model on paper of many GPUs; `parts.py` holds two of its assumptions against this machine: when gradients are
ready within a step, and what a checkpoint takes. `growth.py` has the exponents, `report.py` rows, screen and picture.
``python benchmarks/scaling.py`` is the command.
"""
