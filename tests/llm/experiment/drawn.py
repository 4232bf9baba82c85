"""Rows in the form of the real ones, of a made model: 6 layers, documents of three tasks, five methods."""

from __future__ import annotations

import numpy as np

LAYERS, BINS, TOKENS = 6, 16, 512
ALGORITHMS = {
    'cake': 'attention_based',
    'h2o': 'uniform',
    'hace': 'uniform',
    'snapkv': 'uniform',
    'streaming': 'uniform',
}
LOSS = {'cake': 0.02, 'h2o': 0.03, 'hace': 0.018, 'snapkv': 0.021, 'streaming': 0.05}
RATIOS = (0.5, 0.25, 0.125)
FULL_BYTES = TOKENS * LAYERS * 3 * 64 * 2 * 4


def rows(documents: int = 8, seed: int = 5) -> list[dict]:
    random = np.random.default_rng(seed)
    return [
        row
        for task in ('continuation', 'needle', 'needle_after')
        for index in range(documents)
        for row in of_document(task, f'{task} {index}', random)
    ]


def header() -> dict:
    return {
        'model': 'made',
        'seed': 5,
        'versions': {'torch': '2.13.0'},
        'methods': [row['method'] for row in of_document('continuation', 'x', np.random.default_rng(0))],
    }


def of_document(task, name, random):
    base = {'task': task, 'document': name, 'full_bytes': FULL_BYTES, 'tokens': TOKENS}
    perplexity = float(np.exp(random.normal(2.8, 0.1)))
    yield base | {
        'method': 'full',
        'algorithm': 'full',
        'ratio': 1.0,
        'allocation': None,
        'score': None if task == 'continuation' else float(random.random() < 0.95),
        'kl': 0.0,
        'perplexity': perplexity,
        'agreement': 1.0,
        'bytes': FULL_BYTES,
        'slots': [TOKENS] * LAYERS,
        'peak_tokens': TOKENS * LAYERS,
        'peak_bytes': FULL_BYTES,
        'dispersion': None,
        'shift': None,
        'kept': [[1.0] * BINS] * LAYERS,
    }
    for ratio in RATIOS:
        for algorithm, allocation in ALGORITHMS.items():
            kl = LOSS[algorithm] * (0.5 / ratio) ** 1.2 * float(random.lognormal(0, 0.3))
            total = round(ratio * TOKENS * LAYERS)
            weights = np.ones(LAYERS) if allocation == 'uniform' else random.uniform(0.5, 2, LAYERS)
            slots = np.minimum(TOKENS, weights / weights.sum() * total).round().astype(int).tolist()
            kept = []
            for n in slots:
                share = np.full(BINS, 0.2) + random.random(BINS) * 0.5
                if algorithm == 'streaming':
                    share = np.zeros(BINS)
                share[-1] = 1
                rest = n / TOKENS * BINS - 1
                if algorithm == 'streaming':
                    for b in range(BINS - 2, -1, -1):
                        share[b] = min(1, max(0, rest))
                        rest -= share[b]
                else:
                    share[:-1] *= max(rest, 0) / share[:-1].sum()
                    share = share.clip(0, 1)
                kept.append([round(float(x), 3) for x in share])
            good = {
                'continuation': None,
                'needle': random.random() < 0.3 + ratio,
                'needle_after': random.random() < 0.8 + ratio / 3,
            }[task]
            yield base | {
                'method': f'{algorithm} {allocation} {ratio:g}',
                'algorithm': algorithm,
                'ratio': ratio,
                'allocation': allocation,
                'score': None if good is None else float(good),
                'kl': kl,
                'perplexity': perplexity * float(np.exp(kl / 3)),
                'agreement': float(1 - kl),
                'bytes': round(FULL_BYTES * ratio * 1.02),
                'slots': slots,
                'peak_tokens': sum(slots) + TOKENS,
                'peak_bytes': round(FULL_BYTES * (ratio + 1 / LAYERS)),
                'dispersion': random.uniform(1, 6, LAYERS).tolist()
                if allocation == 'attention_based'
                else None,
                'shift': random.uniform(0, 0.1, LAYERS).tolist() if allocation == 'attention_based' else None,
                'kept': kept,
            }
