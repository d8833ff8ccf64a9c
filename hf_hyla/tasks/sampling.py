"""Random words whose value for sample i is a pure function of (key, i).

The generator is Philox 4x64 (Salmon et al. 2011), whose state is a counter. Each sample of a stream has a range of counters of
its own, so any sample can be drawn alone, in any order, by any number of processes. numpy guarantees the stream of raw words of
its bit generators, and only these words are used. Integer arithmetic turns them into numbers, with the same result on every
platform.
"""

import hashlib
import itertools

import numpy as np


WORDS_PER_COUNTER = 4


def stream_key(*names: object) -> np.ndarray:
    """Key (two 64-bit words) of the stream with these names. Streams with different names are independent."""
    digest = hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def draw_words(key: np.ndarray, indices: np.ndarray, count: int) -> np.ndarray:
    """
    The first `count` random words of each sample.

    Args:
        key: the stream's key, from `stream_key`.
        indices: (samples,), not negative. Consecutive indices are drawn in one call.
        count: words per sample. The same key with another count is another stream.

    Returns:
        `uint64` array (samples, count).
    """
    counters = -(-count // WORDS_PER_COUNTER)
    starts = np.flatnonzero(np.diff(indices, prepend=-2) != 1).tolist()
    if len(starts) == 1:  # the usual case in training
        generator = np.random.Philox(key=key, counter=int(indices[0]) * counters)
        return generator.random_raw(len(indices) * counters * WORDS_PER_COUNTER).reshape(len(indices), -1)[:, :count]
    generator = np.random.Philox(key=key)
    state = generator.state
    words = np.empty((len(indices), counters * WORDS_PER_COUNTER), dtype=np.uint64)
    for start, stop in itertools.pairwise([*starts, len(indices)]):
        # Moving a generator takes a fifth of the time of making one. The counter's lowest word suffices for 2**57 samples.
        state["state"]["counter"][0] = int(indices[start]) * counters
        generator.state = state
        words[start:stop] = generator.random_raw((stop - start) * words.shape[1]).reshape(-1, words.shape[1])
    return words[:, :count]


def below(words: np.ndarray, bound: int) -> np.ndarray:
    """Integers from 0 to `bound - 1` as `int64`, made from the upper half of each word. Their bias is below bound / 2**32."""
    return (((words >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def uniform(words: np.ndarray) -> np.ndarray:
    """Multiples of 2**-24 in [0, 1) as `float32`, made from the upper 24 bits of each word. Each is represented exactly."""
    # Through int32, which processors convert to float32 in vectors.
    fractions = (words >> np.uint64(40)).astype(np.int32).astype(np.float32)
    fractions *= np.float32(2**-24)
    return fractions
