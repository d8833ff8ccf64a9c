"""The official implementation's draw of held-out combinations, reproduced exactly.

The official code shuffles the combinations by `jax.random.permutation(jax.random.PRNGKey(seed), …)` and holds out the first
ones. The paper's seeds are 0, 1 and 2 (`sweeps/` of the official code). Its runs are older than JAX 0.5, so the generator is
Threefry 2x32 (Salmon et al. 2011) with `jax_threefry_partitionable=False`.
"""

import math

import numpy as np


# Constants of Threefry 2x32 with 20 rounds: rotations, which alternate between groups of four rounds, and the parity of the key
# schedule.
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


def reference_order(seed: int, count: int) -> np.ndarray:
    """
    The integers 0 to `count - 1` in the order in which JAX shuffles them for this seed.

    Raises:
        ValueError: for a seed that JAX does not take.
    """
    if not 0 <= seed < 2**31:
        raise ValueError(f"The reference's split takes seeds 0 to {2**31 - 1}, got {seed}: choose another seed.")
    key = np.array([0, seed], dtype=np.uint32)
    order = np.arange(count)
    # JAX sorts by random 32-bit numbers, some of which may be equal, and repeats the sort until that hardly matters.
    for _ in range(math.ceil(3 * math.log(max(1, count)) / math.log(2**32 - 1))):
        key, sort_key = _bits(key, 4).reshape(2, 2)
        order = order[np.argsort(_bits(sort_key, count), kind="stable")]
    return order


def _bits(key: np.ndarray, count: int) -> np.ndarray:
    """`count` random 32-bit numbers: the counters 0, 1, … encrypted in pairs, one from each half."""
    half = -(-count // 2)
    counters = np.zeros(2 * half, dtype=np.uint32)
    counters[:count] = np.arange(count)
    return np.concatenate(_threefry(key, counters[:half], counters[half:]))[:count]


def _threefry(key: np.ndarray, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of `uint32` encrypted by the key. Arithmetic is modulo 2**32."""
    schedule = [key[0], key[1], key[0] ^ key[1] ^ _PARITY]
    left, right = left + schedule[0], right + schedule[1]
    for turn in range(5):
        for rotation in _ROTATIONS[turn % 2]:
            left = left + right
            right = (right << np.uint32(rotation)) | (right >> np.uint32(32 - rotation))
            right = right ^ left
        left = left + schedule[(turn + 1) % 3]
        right = right + schedule[(turn + 2) % 3] + np.uint32(turn + 1)
    return left, right
