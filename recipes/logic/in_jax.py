"""Trains fuzzy logic in JAX, for comparison. It follows the official code and shares no code with hf_hyla.

    python recipes/logic/in_jax.py --attention softmax --seed 0 --steps 4000 --output record.json

It needs jax, flax and optax, which nothing else here needs. Initialisation, optimiser, schedule, dropout and random numbers are
those of flax, optax and JAX as the official code calls them, and so are the held-out combinations. The settings are those of
demo.yaml. `trained` and `ood` are R² on fresh samples of the trained and of the held-out combinations. 4,000 steps take 6 to 12
minutes on one CPU core.
"""

import argparse
import itertools
import json
import math
import platform
import time
from pathlib import Path

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax


BATCH, POINTS, VARIABLES, HELD_OUT = 128, 32, 4, 46
LAYERS, WIDTH, HEADS, HEAD_WIDTH, HIDDEN = 2, 128, 8, 2, 256
LEARNING_RATE, WARMUP, DECAY, DROPOUT = 3e-3, 100, 0.1, 0.1
EVALUATION_BATCHES = 125


def splits(seed):
    """Combinations of two of the twelve known terms, as the official generator divides them."""
    known = jnp.array(list(itertools.combinations(range(12), 2)))
    known = jax.random.permutation(jax.random.PRNGKey(seed), known)
    return {"trained": known[HELD_OUT:], "ood": known[:HELD_OUT]}


def draw(rng, combinations):
    """Inputs with the last value hidden, that value, and the variance of all values."""
    rng_tasks, rng_points = jax.random.split(rng)
    x = jax.random.uniform(rng_points, (BATCH, POINTS, VARIABLES))
    terms = jnp.array(list(itertools.product([0, 1], repeat=VARIABLES)))
    plain = terms[jax.random.choice(rng_tasks, combinations, (BATCH,))]
    literals = jnp.where(plain[:, None], x[:, :, None], 1 - x[:, :, None])
    values = literals.min(-1).max(-1)[..., None]
    inputs = jnp.concatenate((x, values), -1).at[:, -1, -1].set(0.0)
    return inputs, values[:, -1], jnp.var(values, axis=1)


def buckets():
    """The bucket of the distance of every (query, key) pair."""
    distance = np.maximum(np.arange(POINTS)[:, None] - np.arange(POINTS)[None, :], 0)
    exact = POINTS // 2
    beyond = np.log(np.maximum(distance, 1) / exact) / math.log(POINTS / exact) * (POINTS - exact)
    return np.where(distance < exact, distance, np.minimum(exact + beyond.astype(int), POINTS - 1))


class Attention(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x, training):
        table = self.param("bias", nn.initializers.normal(POINTS**-0.5), (HEADS, POINTS))
        query, key, value = (nn.DenseGeneral((HEADS, HEAD_WIDTH), name=name)(x) for name in ("query", "key", "value"))
        codes = jnp.einsum("bqhd,bkhd->bhqk", query * HEAD_WIDTH**-0.5, key) + table[:, buckets()]
        if self.kind == "softmax":
            codes = jax.nn.softmax(codes)
        elif self.kind == "hyla":
            codes *= jax.lax.rsqrt(jnp.mean(codes**2, axis=1, keepdims=True) + 1e-6)
        if training:
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - DROPOUT, (POINTS, POINTS))
            codes *= keep / (1 - DROPOUT)
        if self.kind == "hyla":
            hidden = jax.nn.relu(jnp.einsum("bhqk,bkhd->bqkd", codes, value))
            mixed = jnp.einsum("bhqk,bqkd->bqhd", codes, hidden)
        else:
            mixed = jnp.einsum("bhqk,bkhd->bqhd", codes, value)
        return nn.DenseGeneral(WIDTH, axis=(-2, -1))(mixed)


class Model(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x, training=False):
        x = nn.Dense(WIDTH)(x)
        for _ in range(LAYERS):
            x += Attention(self.kind)(nn.LayerNorm()(x), training)
            x += nn.Dense(WIDTH)(nn.gelu(nn.Dense(HIDDEN)(nn.LayerNorm()(x))))
        return nn.Dense(1)(nn.LayerNorm()(x))[:, -1]


def train(kind, seed, steps):
    model, combinations, data = Model(kind), splits(seed), jax.random.PRNGKey(seed)
    rng, rng_init = jax.random.split(jax.random.PRNGKey(seed))
    parameters = model.init(rng_init, draw(data, combinations["trained"])[0])
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, LEARNING_RATE, WARMUP, steps - WARMUP, end_value=0.1 * LEARNING_RATE
    )
    optimiser = optax.adamw(
        schedule, weight_decay=DECAY, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim != 1, tree)
    )

    @jax.jit
    def step(number, parameters, state):
        inputs, target, _ = draw(jax.random.fold_in(data, number), combinations["trained"])
        rngs = {"dropout": jax.random.fold_in(rng, number)}

        def loss(parameters):
            return jnp.mean((model.apply(parameters, inputs, True, rngs=rngs) - target) ** 2)

        updates, state = optimiser.update(jax.grad(loss)(parameters), state, parameters)
        return optax.apply_updates(parameters, updates), state

    @jax.jit
    def scores(parameters, number):
        found = {}
        for name, split in combinations.items():
            # Samples that training does not draw.
            inputs, target, variance = draw(jax.random.fold_in(jax.random.PRNGKey(seed + 1000), number), split)
            found[name] = jnp.mean(1 - (model.apply(parameters, inputs) - target) ** 2 / variance)
        return found

    state, curve = optimiser.init(parameters), []
    for number in range(steps):
        parameters, state = step(number, parameters, state)
        if (number + 1) % 1000 == 0 or number + 1 == steps:
            found = [scores(parameters, batch) for batch in range(EVALUATION_BATCHES)]
            curve.append({"step": number + 1} | {name: float(np.mean([f[name] for f in found])) for name in found[0]})
            print(curve[-1], flush=True)
    return curve


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--attention", choices=["hyla", "linear", "softmax"], required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    jax.config.update("jax_threefry_partitionable", False)  # as it was before JAX 0.5
    started = time.perf_counter()
    curve = train(arguments.attention, arguments.seed, arguments.steps)
    record = {
        "attention": arguments.attention,
        "seed": arguments.seed,
        "steps": arguments.steps,
        "seconds": time.perf_counter() - started,
        "curve": curve,
        "environment": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (jax, flax, optax)},
        },
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
