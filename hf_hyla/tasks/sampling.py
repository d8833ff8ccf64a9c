"""Random numbers by address: the words of sample i are a pure function of (key, i).

The generator is Philox 4x64 (Salmon et al. 2011), whose state is a counter: sample i of a stream owns a range of
counters of its own, so that any sample can be drawn alone, in any order, by any number of processes. Only the raw
words of numpy's bit generator are used, whose stream numpy guarantees; numbers are made of them by integer arithmetic
alone, the same on every platform.
"""

import hashlib
import itertools

import numpy as np


WORDS_PER_COUNTER = 4


def stream_key(*names: object) -> np.ndarray:
    """Key of the stream with these names, as 2 words of 64 bits. Streams of different names are independent."""
    digest = hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def draw_words(key: np.ndarray, indices: np.ndarray, count: int) -> np.ndarray:
    """
    The first `count` random words of each sample.

    Args:
        key: from `stream_key`.
        indices: (samples,), not negative; runs of consecutive numbers are drawn in one call.
        count: words per sample. A stream is defined by its key and this number.

    Returns:
        `uint64` array (samples, count).
    """
    counters = -(-count // WORDS_PER_COUNTER)
    starts = np.flatnonzero(np.diff(indices, prepend=-2) != 1).tolist()
    if len(starts) == 1:  # as it is in training
        generator = np.random.Philox(key=key, counter=int(indices[0]) * counters)
        return generator.random_raw(len(indices) * counters * WORDS_PER_COUNTER).reshape(len(indices), -1)[:, :count]
    generator = np.random.Philox(key=key)
    state = generator.state
    words = np.empty((len(indices), counters * WORDS_PER_COUNTER), dtype=np.uint64)
    for start, stop in itertools.pairwise([*starts, len(indices)]):
        # Moving a generator costs a fifth of making one. The lowest word of its counter is enough for 2**57 samples.
        state["state"]["counter"][0] = int(indices[start]) * counters
        generator.state = state
        words[start:stop] = generator.random_raw((stop - start) * words.shape[1]).reshape(-1, words.shape[1])
    return words[:, :count]


def below(words: np.ndarray, bound: int) -> np.ndarray:
    """Integers 0 to `bound - 1` as `int64`, from the upper half of each word; their bias is below bound / 2**32."""
    return (((words >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def uniform(words: np.ndarray) -> np.ndarray:
    """Multiples of 2**-24 in [0, 1) as `float32`, from the upper 24 bits of each word; every one is exact."""
    # By way of integers that processors convert many at a time.
    numbers = (words >> np.uint64(40)).astype(np.int32).astype(np.float32)
    numbers *= np.float32(2**-24)
    return numbers
