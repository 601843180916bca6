"""Items for ./run -z, out of lm_eval's own task objects: what it would feed to a model, and what it calls right.

    pip install lm_eval==0.4.13
    python test/export_tasks.py TASK OUT.jsonl [-n SHOTS] [-l ITEMS] [-i DIRECTORY]

TASK: piqa, winogrande, hellaswag, arc_easy, arc_challenge, mmlu, boolq, openbookqa, truthfulqa_mc1,
truthfulqa_mc2, lambada_openai, or another that compares log-likelihoods. lm_eval fetches the data. A group (mmlu)
becomes one file; its acc is then that of all items. DIRECTORY has task files of one's own. Not part of make
test, which needs no Python.
"""
import argparse
import json

from lm_eval.tasks import TaskManager


def score(task, doc, lls):
    """The task's own acc of a model that gives the choices these log-likelihoods."""
    return task.process_results(doc, [(ll, False) for ll in lls])["acc"]


def item(task, doc, shots):
    """A line for ./run -z, and whether the task counts probability instead of hits, as TruthfulQA's MC2 does."""
    requests = task.construct_requests(doc, task.fewshot_context(doc, shots))
    pairs = [r.args for r in (requests if isinstance(requests, list) else [requests])]
    contexts, choices = [p[0] for p in pairs], [p[1] for p in pairs]
    assert all(c[0] == " " for c in choices), "./run puts one space between context and choice"
    same = len(set(contexts)) == 1  # WinoGrande has a context for each option, and one choice
    line = {"context": contexts[0] if same else contexts, "choices": [c[1:] for c in choices[:None if same else 1]]}
    if task.OUTPUT_TYPE == "loglikelihood":  # LAMBADA: is the last word the likeliest?
        return line, False
    n = len(pairs)
    line["gold"] = [round(score(task, doc, [-1e3 * (k != right) for k in range(n)])) for right in range(n)]
    return line, 0 < score(task, doc, [0] * n) < 1


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("task")
parser.add_argument("out")
parser.add_argument("-n", type=int, default=0, help="examples before each item (0)")
parser.add_argument("-l", type=int, default=None, help="items of each task (all)")
parser.add_argument("-i", default=None, help="a directory of task files")
args = parser.parse_args()
lines, by_mass = [], False
for task in TaskManager(include_path=args.i).load([args.task])["tasks"].values():
    task.set_config(key="num_fewshot", value=args.n)
    task.set_fewshot_seed(seed=1234)  # lm_eval's default
    for doc in list(task.eval_docs)[:args.l]:
        line, mass = item(task, doc, args.n)
        lines.append(line)
        by_mass |= mass
with open(args.out, "w", encoding="utf-8") as out:
    for line in lines:
        if "gold" in line and not by_mass:
            line["gold"] = line["gold"].index(1)
        out.write(json.dumps(line, ensure_ascii=False) + "\n")
print(f"{args.out}: {len(lines)} items")
