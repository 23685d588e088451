"""The optimizer step: fusion, network, loss, backward, clipping, guard, update, averaged weights.

Everything that a step needs of its number (learning rate, drop rates, the average's weight) is written into tensors before it
begins, and everything that it tells (loss, whether it was skipped) stays in tensors: no step waits for the GPU, and a CUDA graph
of the whole replays as it is.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dropgen_fast.config import TrainConfig
from dropgen_fast.distributed import Ranks
from dropgen_fast.errors import InputError
from dropgen_fast.model import DropGen

GRAPH_WARM_UP = 3
"""Steps before the capture: libraries choose their algorithms and the allocator finds its sizes."""

PARTS = ("extractor", "fusion", "forward", "backward", "optimizer")
"""Of a step, in their order: forward is network and loss, optimizer all that comes after the gradients."""

Patches = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
"""Image (N, Ci, D, H, W) float32 in [0, 1], label (N, 1, D, H, W) uint8 and features (N, Cf, d, h, w) where they are at hand."""


class NetworkAndLoss(nn.Module):
    """What is compiled, and what DistributedDataParallel wraps: all that has a gradient."""

    def __init__(self, network: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.loss = loss

    def forward(self, fused: Tensor, label: Tensor) -> Tensor:
        """The loss () of the network's input (N, C, D, H, W) and the label (N, 1, D, H, W)."""
        loss: Tensor = self.loss(self.network(fused), label)
        return loss


class TrainingStep:
    """One optimizer step after the other.

    A step whose gradients are not finite changes neither weights nor statistics nor the optimizer's state; it is counted. The
    check is a number on the device that the fused AdamW reads itself.

    Args:
        model: on the device of `ranks`, with its weights.
        loss: (what the network gives, label) → ().
        config: of the run.
        ranks: the processes that train together; gradients are averaged over them.
    """

    def __init__(self, model: DropGen, loss: nn.Module, config: TrainConfig, ranks: Ranks) -> None:
        self.model, self._config, self._device = model, config, ranks.device
        on_gpu = ranks.device.type == "cuda"
        if config.cuda_graph and (not on_gpu or ranks.size > 1):
            raise InputError(f"cuda_graph needs one process on a GPU, got {ranks.size} on {ranks.device.type}: leave it out")
        if config.sync_batchnorm:
            if not on_gpu:
                raise InputError(f"sync_batchnorm needs GPUs, got {ranks.device.type}: leave it out")
            model.network = nn.SyncBatchNorm.convert_sync_batchnorm(model.network)
        self.ema = copy.deepcopy(model.network).requires_grad_(False).eval() if config.ema_decay else None
        self._parameters = [p for p in model.network.parameters() if p.requires_grad]
        self._statistics = [b for b in model.network.buffers() if b.numel()]
        rate = torch.tensor(config.learning_rate, device=ranks.device) if on_gpu else config.learning_rate
        self.optimizer = torch.optim.AdamW(self._parameters, rate, weight_decay=config.weight_decay, fused=True,
                                           capturable=on_gpu)
        self._core: Any = NetworkAndLoss(model.network, loss)
        if config.compile if config.compile is not None else on_gpu:
            self._core.compile(dynamic=False)
            if on_gpu and model.extractor is not None:  # on a CPU oneDNN joins what the compiler would
                model.extractor.compile(dynamic=False)
        if ranks.size > 1:
            self._core = DistributedDataParallel(self._core, device_ids=[ranks.device] if on_gpu else None,
                                                 gradient_as_bucket_view=True)
        zero = torch.zeros((), device=ranks.device)
        self._ema_weight = zero.clone()
        # The sum of the losses and the number of the steps, since `take`, that were not skipped; those that were, and in a row.
        self._counts = {"loss": zero.clone(), "steps": zero.clone(), "skipped": zero.clone(), "in_a_row": zero.clone()}
        self._graph: _Graph | None = _Graph(self._step, ranks.device) if config.cuda_graph else None
        self.observe: Callable[[str], None] = _nobody
        """Called at the end of each of `PARTS`, for each batch in turn; for measurements."""

    def __call__(self, batches: Sequence[Patches], number: int) -> Tensor:
        """Step `number`, counted from 0, on `accumulate` batches; its mean loss (), on the device."""
        self.model.fusion.set_step(number)
        self._set_rate(self.learning_rate(number))
        # An average that begins with the first weights forgets them as fast as it can.
        self._ema_weight.fill_(1 - min(self._config.ema_decay, (1 + number) / (10 + number)))
        return self._graph(batches) if self._graph is not None else self._step(batches)

    def learning_rate(self, number: int) -> float:
        """Of step `number`: a linear warm-up, then a cosine to zero over all steps."""
        config = self._config
        if number < config.warmup_steps:
            return config.learning_rate * (number + 1) / (config.warmup_steps + 1)
        done = (number - config.warmup_steps) / (config.steps - config.warmup_steps)
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model has the averaged weights, where there are any."""
        trained = self.model.network
        if self.ema is not None:
            self.model.network = self.ema
        try:
            yield
        finally:
            self.model.network = trained

    def take(self) -> dict[str, float]:
        """The counts, as numbers of this process; the loss and the steps begin anew. Waits for the device."""
        taken = {name: float(value) for name, value in self._counts.items()}
        self._counts["loss"].zero_()
        self._counts["steps"].zero_()
        return taken

    def state(self) -> dict[str, Any]:
        """What a resumed run needs of this process."""
        return {"network": self.model.network.state_dict(), "ema": self.ema.state_dict() if self.ema is not None else None,
                "optimizer": self.optimizer.state_dict(), "counts": {name: float(v) for name, v in self._counts.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`, on whatever device it was taken."""
        self.model.network.load_state_dict(state["network"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:  # a tensor on a GPU, a number elsewhere, wherever the state comes from
            group["capturable"] = self._device.type == "cuda"
            rate = float(group["lr"])
            group["lr"] = torch.tensor(rate, device=self._device) if self._device.type == "cuda" else rate
        for name, value in state["counts"].items():
            self._counts[name].fill_(value)

    def _step(self, batches: Sequence[Patches]) -> Tensor:
        before = [b.clone() for b in self._statistics]
        self.optimizer.zero_grad()
        losses = []
        for number, patches in enumerate(batches, start=1):
            alone = isinstance(self._core, DistributedDataParallel) and number < len(batches)  # gradients travel with the last
            with self._core.no_sync() if alone else contextlib.nullcontext():
                losses.append(self._backward(patches, len(batches)))
        loss = torch.stack(losses).sum()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = get_total_norm(gradients, foreach=True)
        if self._config.clip_norm:
            clip_grads_with_norm_(self._parameters, self._config.clip_norm, norm, foreach=True)
        skipped = (~norm.isfinite()).float()
        # The fused step looks at it, as it does for a gradient scaler.
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        for value, old in zip(self._statistics, before, strict=True):
            value.copy_(torch.where(skipped.bool(), old, value))
        self._average()
        self._count(loss, skipped)
        self.observe("optimizer")
        return loss

    def _backward(self, patches: Patches, batches: int) -> Tensor:
        """Add the gradient of one batch's share of the mean loss; that share."""
        image, label, *given = patches
        half = self.model.fusion.dtype == torch.bfloat16
        # Within a capture no cast weight may be kept for later.
        with torch.autocast(self._device.type, torch.bfloat16, enabled=half, cache_enabled=self._graph is None):
            features = given[0] if given else self.model.features(image)
            self.observe("extractor")
            fused = self.model.fused(image, features=features)
            self.observe("fusion")
            loss: Tensor = self._core(fused, label) / batches
            self.observe("forward")
        loss.backward()
        self.observe("backward")
        return loss.detach()

    def _average(self) -> None:
        if self.ema is None:
            return
        for mean, weight in zip(self.ema.parameters(), self.model.network.parameters(), strict=True):
            mean.lerp_(weight.detach(), self._ema_weight)
        for last, statistic in zip(self.ema.buffers(), self.model.network.buffers(), strict=True):
            last.copy_(statistic)

    def _count(self, loss: Tensor, skipped: Tensor) -> None:
        counts = self._counts
        counts["loss"].add_(torch.where(skipped.bool(), 0, loss))
        counts["steps"].add_(1 - skipped)
        counts["skipped"].add_(skipped)
        counts["in_a_row"].add_(1).mul_(skipped)

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def _nobody(part: str) -> None:
    """Nobody observes."""


class _Graph:
    """A step captured once, after a warm-up of real steps on a side stream, and replayed with each step's batches."""

    def __init__(self, step: Callable[[Sequence[Patches]], Tensor], device: torch.device) -> None:
        self._step = step
        self._warm_ups = 0
        self._stream = torch.cuda.Stream(device)
        self._inputs: list[Patches] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss = torch.empty(0)

    def __call__(self, batches: Sequence[Patches]) -> Tensor:
        if self._warm_ups < GRAPH_WARM_UP:
            self._warm_ups += 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                loss = self._step(batches)
            torch.cuda.current_stream().wait_stream(self._stream)
            return loss
        if self._graph is None:
            self._inputs = [tuple(tensor.clone() for tensor in patches) for patches in batches]  # type: ignore[misc]
            self._graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self._graph):
                    self._loss = self._step(self._inputs)
            except RuntimeError as error:
                raise InputError(f"the step cannot be captured as a CUDA graph ({' '.join(str(error).split())[:200]}): "
                                 "leave --cuda-graph out") from error
        for mine, given in zip(self._inputs, batches, strict=True):
            for kept, new in zip(mine, given, strict=True):
                kept.copy_(new, non_blocking=True)
        self._graph.replay()
        return self._loss
