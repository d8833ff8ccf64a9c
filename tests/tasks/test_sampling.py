import numpy as np
import pytest

from hf_hyla.tasks.sampling import below, draw_words, stream_key, uniform


def test_words_are_the_same_alone_in_any_order_and_in_any_batch():
    key = stream_key("a", 1, "train")
    whole = draw_words(key, np.arange(50), 7)
    order = np.random.default_rng(0).permutation(50)
    assert np.array_equal(draw_words(key, order, 7), whole[order])
    for index in (0, 1, 49):
        assert np.array_equal(draw_words(key, np.array([index]), 7)[0], whole[index])
    assert draw_words(key, np.array([], dtype=np.int64), 7).shape == (0, 7)


def test_words_are_those_that_numpys_philox_draws_from_the_samples_counter():
    key = stream_key("a", 1, "train")
    for index in (0, 1, 7, 19_999_999, 2**40):
        words = np.random.Philox(key=key, counter=3 * index).random_raw(12)
        assert np.array_equal(draw_words(key, np.array([5, index]), 10)[1], words[:10])


def test_words_are_pinned():
    # A change here changes every sample of every task: committed results would no longer be reproducible.
    words = draw_words(stream_key("logic", 0, "train"), np.array([0, 19_999_999]), 2)
    assert [[hex(word) for word in row] for row in words.tolist()] == PINNED


PINNED = [["0x8f444257d88369b", "0xfa7b5dd2c52a6e5b"], ["0x5127f38a8794e95f", "0xb2d69e094600da5e"]]


@pytest.mark.parametrize("names", [("a", 0, "test"), ("a", 1, "train"), ("b", 0, "train")])
def test_streams_with_different_names_share_no_words(names):
    words = draw_words(stream_key("a", 0, "train"), np.arange(2000), 5)
    others = draw_words(stream_key(*names), np.arange(2000), 5)
    assert not np.intersect1d(words, others).size


def test_words_of_neighbouring_samples_do_not_overlap():
    for count in (1, 4, 5):
        assert len(np.unique(draw_words(stream_key("a"), np.arange(3000), count))) == 3000 * count


def test_integers_are_uniform_and_in_range():
    words = draw_words(stream_key("integers"), np.arange(20_000), 5).ravel()
    for bound in (1, 2, 3, 7, 24, 248):
        values = below(words, bound)
        counts = np.bincount(values, minlength=bound)
        expected = len(words) / bound
        assert values.min() >= 0 and values.max() < bound
        assert ((counts - expected) ** 2 / expected).sum() < bound + 6 * (2 * bound) ** 0.5 + 6


def test_fractions_are_uniform_exact_and_below_one():
    words = draw_words(stream_key("fractions"), np.arange(20_000), 5).ravel()
    values = uniform(words)
    assert values.dtype == np.float32 and values.min() >= 0 and values.max() < 1
    assert (values.astype(np.float64) * 2**24 % 1 == 0).all()
    assert abs(values.mean() - 0.5) < 0.005 and abs(values.var() - 1 / 12) < 0.002
    assert uniform(np.array([2**64 - 1], dtype=np.uint64)) < 1
