"""Updates of the metric that the points have not seen yet."""

import numpy as np

from sketching._lib.arrays import Array


class WaitingUpdates:
    """A queue of ``U += a b^T``; beyond ``most`` of them all points are mapped anew."""

    def __init__(self, shape: tuple[int, int]) -> None:
        k, d = shape
        # two products with every point for each update, against k for a fresh norm
        self.most = max(1, k // 2)
        self.left, self.right = np.empty((0, k)), np.empty((0, d))
        # U_t^T a_t, of the factor that each update met
        self.images = np.empty((0, d))
        self.overflowed = False

    def __len__(self) -> int:
        return len(self.left)

    def __bool__(self) -> bool:
        return self.overflowed or len(self.left) > 0

    def append(self, left: Array, right: Array, images: Array) -> None:
        """Queue updates; ``images`` are ``U_t^T a_t`` of the factor before each."""
        if self.overflowed or len(self) + len(left) > self.most:
            self.clear()
            self.overflowed = True
            return
        self.left = np.concatenate([self.left, left])
        self.right = np.concatenate([self.right, right])
        self.images = np.concatenate([self.images, images])

    def clear(self) -> None:
        """Empty the queue."""
        self.left, self.right = self.left[:0], self.right[:0]
        self.images = self.images[:0]
        self.overflowed = False
