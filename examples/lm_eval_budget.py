"""A generation task of your own in lm-eval, with the full cache and with a budget; no network.

    pip install '.[lm-eval]'
    HF_HUB_OFFLINE=1 python examples/lm_eval_budget.py questions.jsonl

A line of questions.jsonl is {"question": "...", "answer": "..."}; the answer is looked for in 12 new tokens.
"""

from __future__ import annotations

import sys

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from lzero_kv.llm import disable, enable
from lzero_kv.llm.experiment.models import SMOLLM2, load

TASK = dict(
    task='questions', dataset_path='json', test_split='train', output_type='generate_until',
    doc_to_text='{{question}}', doc_to_target='{{answer}}',
    generation_kwargs=dict(until=['\n'], max_gen_toks=12, do_sample=False),
    metric_list=[dict(metric='exact_match', regexes_to_ignore=[r'[.\s]'])],
)  # fmt: skip


def main(file: str, budget: dict) -> int:
    """Print the scores of both."""
    model, tokenizer = load(SMOLLM2)
    task = {**TASK, 'dataset_kwargs': {'data_files': file}}
    for name, prepare in {'full': disable, str(budget): lambda model: enable(model, budget)}.items():
        # the model is that of the loop: lm-eval takes it as it is
        judged = HFLM(pretrained=prepare(model), tokenizer=tokenizer, batch_size=3)
        found = simple_evaluate(judged, tasks=[task], bootstrap_iters=0)['results']['questions']
        print(f'{name}: {found["exact_match,none"]:.2f} of the answers')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1], dict(ratio=0.5, selection='cake')))
