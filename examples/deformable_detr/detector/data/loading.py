"""From items to padded batches, in an order that depends on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from detector import distributed
from detector.data.coco import CocoDetection

Target = dict[str, Tensor]


@dataclass
class Batch:
    """Images of several sizes in one tensor, and what is in them."""

    images: Tensor  # (B, 3, H, W) float32, zero right of and below each image
    padding_mask: Tensor  # (B, H, W) bool, True = padding
    targets: list[Target]

    def to(self, device: torch.device | str) -> Batch:
        """On ``device``; a copy from pinned memory does not wait for the device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """In page-locked memory; called by the data loader."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        targets = [{key: function(value) for key, value in t.items()} for t in self.targets]
        return Batch(function(self.images), function(self.padding_mask), targets)


def collate(items: Sequence[tuple[Tensor, Target]]) -> Batch:
    """Pad images (3, H, W) right and below to the largest height and width."""
    images, targets = zip(*items, strict=True)
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    batch = Batch(
        images=torch.zeros(len(images), 3, height, width),
        padding_mask=torch.ones(len(images), height, width, dtype=torch.bool),
        targets=list(targets),
    )
    for i, image in enumerate(images):
        batch.images[i, :, : image.shape[1], : image.shape[2]] = image
        batch.padding_mask[i, : image.shape[1], : image.shape[2]] = False
    return batch


class BatchSampler(Sampler[list[int]]):
    """The batches of one process in one epoch.

    The images of an epoch are shuffled by (seed, epoch) and cut into total batches of
    ``batch_size * world_size``, each of which is shared among the processes: n processes train on
    the same total batches as one with n times the batch size. As in the original, what is left
    over is not trained on in this epoch.

    Without shuffling, for evaluation, nothing is left out; where the processes cannot share the
    last batch evenly, images from the start of the set are repeated, so that all processes have
    the same number of batches.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._num_images, self._shuffle, self._seed = num_images, shuffle, seed
        self._total, self._rank, self._world_size = batch_size * world_size, rank, world_size
        self._epoch = self._first = 0
        if len(self) == 0:
            raise ValueError(
                f"batch_size times processes must be at most the number of training images, "
                f"got {self._total} and {num_images}"
            )

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever it is started."""
        if self._shuffle:
            return self._num_images // self._total
        return -(-self._num_images // self._total)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """What to iterate over next; ``first_batch`` skips those before it."""
        self._epoch, self._first = epoch, first_batch

    def __iter__(self) -> Iterator[list[int]]:
        if self._shuffle:
            # Mixed by NumPy, so that (1, 0) and (0, 1) differ.
            random = np.random.default_rng((self._seed, self._epoch))
            order = random.permutation(self._num_images).tolist()
        else:
            missing = -self._num_images % self._world_size
            order = [i % self._num_images for i in range(self._num_images + missing)]
        for batch in range(self._first, len(self)):
            total_batch = order[batch * self._total : (batch + 1) * self._total]
            yield total_batch[self._rank :: self._world_size]


class Loader(DataLoader[Batch]):
    """Also reports what its worker processes found odd about images: each knows but its share."""

    def __iter__(self) -> Iterator[Batch]:
        """The batches; worker processes start now, not with the first of them."""
        return self._telling(super().__iter__())

    def _telling(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.dataset.tell()
            yield batch


def make_loader(
    dataset: CocoDetection,
    batch_size: int,
    *,
    num_workers: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Loader:
    """A loader of a training set (shuffled) or validation set (in its order).

    Args:
        dataset: what to load from.
        batch_size: images per batch of this process.
        num_workers: processes that load; 0: this one.
        seed: of the order; see also the seed of the data set.
        rank: of this process.
        world_size: number of processes that share the set.
        pin_memory: faster copies to a CUDA device.
    """
    sampler = BatchSampler(
        len(dataset),
        batch_size,
        shuffle=dataset.training,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    return Loader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=distributed.leave_signals_to_parent,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # iterating leaves the model's random numbers alone
    )


def start_epoch(loader: DataLoader[Batch], epoch: int, first_batch: int = 0) -> None:
    """Make the next iteration that of ``epoch``, from ``first_batch`` on."""
    loader.batch_sampler.set_epoch(epoch, first_batch)
    loader.dataset.set_epoch(epoch)
