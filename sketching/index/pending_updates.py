"""Updates of the metric that the points have not seen yet."""

from dataclasses import dataclass

import numpy as np

from sketching._lib.arrays import Array


@dataclass(frozen=True, slots=True)
class PendingUpdates:
    """A queue of ``U += a b^T``; beyond ``most`` of them all points are mapped anew."""

    left: Array
    right: Array
    # U_t^T a_t, of the factor before each update
    images: Array
    overflowed: bool = False

    @staticmethod
    def none(shape: tuple[int, int]) -> "PendingUpdates":
        """An empty queue for a factor of that shape."""
        k, d = shape
        return PendingUpdates(np.empty((0, k)), np.empty((0, d)), np.empty((0, d)))

    @property
    def most(self) -> int:
        """The length of the queue."""
        # two products with every point for each update, against k for a fresh norm
        return max(1, int(self.left.shape[1]) // 2)

    def __len__(self) -> int:
        return len(self.left)

    def __bool__(self) -> bool:
        return self.overflowed or len(self.left) > 0

    def extended(self, left: Array, right: Array, images: Array) -> "PendingUpdates":
        """With more; ``images`` are ``U_t^T a_t`` of the factor before each update."""
        if self.overflowed or len(self) + len(left) > self.most:
            shape = left.shape[1], right.shape[1]
            empty = PendingUpdates.none(shape)
            return PendingUpdates(empty.left, empty.right, empty.images, True)
        if not len(self):
            return PendingUpdates(left, right, images)
        return PendingUpdates(
            np.concatenate([self.left, left]),
            np.concatenate([self.right, right]),
            np.concatenate([self.images, images]),
        )
