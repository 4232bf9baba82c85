"""Package metadata of lzero_kv. The settings of its tools stand in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# Lower bounds only, and low ones: `pip install .` into an environment that trains LightZero leaves its torch
# and numpy as they are. LightZero itself is an extra, because a resolver that installs it exchanges torch; it
# brings easydict and gymnasium, which language models do not need.
REQUIREMENTS = [
    'matplotlib>=3.5',
    'numpy>=1.24',
    'pydantic>=2.5',
    'rich>=13.0',
    'tensorboard>=2.11',
    'torch>=2.0',
    'tyro>=0.8',
    'xxhash>=3.0',
]

setup(
    name='lzero_kv',
    version='0.1.0',
    description='A key-value cache for UniZero world models in LightZero: correct, bounded, visible.',
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    keywords=[
        'reinforcement learning',
        'UniZero',
        'LightZero',
        'MCTS',
        'transformer',
        'KV cache',
        'world model',
    ],
    packages=find_packages(include=['lzero_kv', 'lzero_kv.*']),
    package_data={'lzero_kv': ['py.typed']},
    python_requires='>=3.11',
    install_requires=REQUIREMENTS,
    extras_require={
        'lightzero': ['LightZero==0.2.0'],
        'llm': ['transformers>=4.57'],
        'lm-eval': ['accelerate>=1.0', 'lm-eval>=0.4.13', 'transformers>=4.57'],
        'test': ['hypothesis>=6.100', 'pytest>=8.0'],
        'dev': ['hypothesis>=6.100', 'import-linter>=2.0', 'pytest>=8.0', 'pytest-xdist>=3.6', 'ruff>=0.6'],
    },
    entry_points={'console_scripts': ['lzero-kv=lzero_kv.cli:main']},
    classifiers=[
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3.11',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
    ],
)
