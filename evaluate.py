"""Sample answers, grade them, compare runs: did it get better, than what, by how much, and how sure is that?

    python evaluate.py                                 every finished run under out/, on the classroom's sums
    python evaluate.py RUN ... --against dft           these folders or hub names, compared to one method
    python evaluate.py RUN ... --data A.jsonl B.jsonl  your own problems; of several files also the average
    python evaluate.py --grade FILE.jsonl              grade answers that were sampled elsewhere
    python evaluate.py RUN ... --gradients             gradient norms and variances: the paper's assumption
    torchrun --nproc-per-node=8 evaluate.py ...        the same numbers, on eight processes

What the numbers mean:
 1. Correct: the answer ended with end-of-sequence and is the reference's. What was cut off is wrong.
 2. Average@k is the mean accuracy of k samples a problem. These are not independent, so the standard error
    of a single run counts problems, not samples.
 3. Runs that differ in nothing but the seed are one row; its standard error is over seeds. Rows are compared
    seed by seed, since a seed changes base model, data and their order together.
 4. Each batch of samples has its own seed, made of --seed, the run's seed and the batch's number. So the
    number of processes changes nothing. Another --batch-size draws other samples, as another --seed would.
"""
import argparse
import ast
import cmath
import json
import math
import operator
import os
import random
import re
import statistics
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path

import train                # before torch, since it sets how torch's threads wait for each other
import torch
from tqdm import tqdm

import cadft
from train import gather_objects, key, read_jsonl, say, writing

ORDER = ["base", "sft", "focal", "casft", "dft", "cadft"]      # of the table's rows; others follow
POWERS = [2 ** i for i in range(14)]                           # the k of pass@k
# flag, value with --data, value in the classroom, allowed, help
FLAGS = [
    ("data", [], [], None, "JSONL files of problems"),
    ("samples", 16, 16, (0, 10_000), "answers sampled for each problem, beside the greedy one"),
    ("temperature", 1.0, 1.0, (0.001, 1000.0), "of the samples"),
    ("top-p", 1.0, 1.0, (0.001, 1.0), "nucleus of the samples; 1 at temperature 1 is the model itself"),
    ("max-tokens", 4096, 96, (1, train.MANY), "length limit; what is longer is cut off, and wrong"),
    ("batch-size", 64, 800, (1, train.MANY), "answers that a process samples at once; changes the draw"),
    ("seed", 0, 0, (0, 10 ** 9), "of sampling; each run's own seed is mixed in"),
    ("limit", 0, 0, (0, train.MANY), "only so many problems of each file (or demonstrations); 0: all"),
    ("classroom-digits", 0, 0, [0, 2, 3, 4, 5, 6], "of the sums; 0: as many as the run learned"),
    ("classroom-carries", 0, 0, (0, 6), "only those of the sums with so many carries or more"),
    ("prompt-template", "", "", None, 'wraps each question: "{prompt} Reason step by step." (the run\'s own)'),
    ("against", "dft", "dft", None, "the row that the others are compared to"),
    ("out", "", "", None, "folder for eval-NAME.jsonl (beside the model)"),
    ("results", "", "", None, "file of the summary (results.json beside the runs)"),
    ("dtype", "", "", ["float32", "bfloat16", "float64"], "(bfloat16 on CUDA, else float32)"),
    ("grade", "", "", None, "a JSONL file with response and reference: grade these, sample nothing"),
    ("gradients", False, False, None, "study gradients, sample nothing"),
    ("plot", "", "", None, "FILE.png: draw compatibility, weights, gradient norm and accuracy"),
]


@dataclass
class Candidate:
    """A model to evaluate: a run's folder, a base model, or what a hub name stands for."""
    path: str
    method: str
    seed: int | None
    args: dict = field(default_factory=dict)        # the run's args.json
    differs: dict = field(default_factory=dict)     # those of them that differ among runs of this method
    label: str = ""                                 # of its row: the method and what differs


# ==== 1. From runs to a table ===============================================================================

@train.guarded
def main(argv):
    """evaluate.py: sample and grade what is named, print the table, write results.json."""
    a = parse(argv)
    a.world, a.rank = train.join()
    if a.gradients:
        return gradient_study(find_runs(a), a)
    results = grade_file(a.grade) if a.grade else evaluate(find_runs(a), a)
    if a.rank == 0:
        rows = compare(results, a.against)
        say(*table(rows, a.against))
        if a.results or not a.grade:
            runs = [{name: r[name] for name in r if name != "each"} for r in results]
            write_results(a, runs=runs, rows=rows)
        if a.plot:
            draw(a.plot, rows, results)


def parse(argv):
    """The arguments; what can't be right is said before the work."""
    a, given = train.read_flags(argv, FLAGS, __doc__, "data", runs=True)
    if "{prompt}" not in (a.prompt_template or "{prompt}"):
        sys.exit("--prompt-template has no {prompt} in it: the question would be lost")
    if len({Path(path).stem for path in a.data}) < len(a.data):
        sys.exit("--data: two files of one name; their results would overwrite each other")
    if a.grade and a.runs:
        sys.exit(f"--grade reads answers from {a.grade} alone: leave out {' '.join(a.runs)}")
    if a.plot:
        pyplot()
    if not a.data:
        torch.set_num_threads(train.THREADS)                   # the last digits depend on it
    a.against_given = "against" in given
    a.dtype = a.dtype or ("bfloat16" if train.CUDA and not a.gradients else "float32")
    return a


def find_runs(a):
    """The candidates named, or all finished runs under out/, base models included; each with its row's label:
    the method and, where runs of it differ in more than the seed, in what."""
    found = (str(path.parent) for path in Path("out").glob("*/config.json") if path.parent.name[0] != ".")
    paths = a.runs or sorted(path for path in found if train.finished(path))
    if not paths:
        sys.exit("out/ holds no finished run: python train.py makes one; or name a folder")
    runs, taken = [candidate(path) for path in dict.fromkeys(map(os.path.normpath, paths))], []
    for run in runs:
        kin = [other.args for other in runs if other.method == run.method]
        names = sorted(set().union(*kin) - train.FREE - {"seed", "data_sha256"})
        run.differs = {name: run.args.get(name) for name in names
                       if any(args.get(name) != run.args.get(name) for args in kin)}
        run.label = " ".join([run.method, *(f"{name}={value}" for name, value in run.differs.items())])
        taken.append((run.label, run.seed))
        again = taken.count(taken[-1])
        run.label += f" #{again}" if again > 1 else ""         # the same run twice is no second seed
    labels = list(dict.fromkeys(run.label for run in runs))
    if a.against_given and a.against not in labels:
        sys.exit(f"--against {a.against}: there is no such row, only {', '.join(labels)}")
    return runs


def candidate(path):
    """What a folder says about the run in it."""
    folder, args = Path(path), train.read_args(path)
    hub = len(folder.parts) == 1 or len(folder.parts) == 2 and not folder.parent.is_dir()      # owner/name
    if not folder.is_dir() and (folder.exists() or not hub):
        sys.exit(f"{path}: no such folder; name that of a run, or a hub name")
    if folder.is_dir() and not train.finished(folder):
        sys.exit(f"{path}: no finished model there (no config.json, or a checkpoint): train.py --resume finishes a run")
    base = re.fullmatch(r"base-seed([0-9]+)", folder.name)
    return Candidate(path, "base" if base else str(args.get("method", path)), int(base[1]) if base else args.get("seed"),
                     args)


def evaluate(runs, a):
    """Sample and grade every run on every set of problems. Returns a list of results, on every rank."""
    files = {Path(path).stem: load_problems(path, a.limit) for path in a.data}
    sets = [files or classroom_problems(run, a) for run in runs]
    total, results = sum(len(some) * (1 + a.samples) for each in sets for some in each.values()), []
    with tqdm(total=total, unit="answer", disable=a.rank > 0 or None) as bar:
        for run, each in zip(runs, sets):
            bar.set_description(run.path)
            lm, tokenizer, _ = train.load_model(run.path, getattr(torch, a.dtype))
            done = [result(run, name, count(answers(run, lm.eval(), tokenizer, name, some, a, bar)))
                    for name, some in each.items()]
            results += done + ([average_of_files(run, done)] if len(done) > 1 else [])
            del lm                                             # before the next one comes
    return results


# ==== 2. Sampling ===========================================================================================

def answers(run, lm, tokenizer, name, problems, a, bar):
    """Sample and grade one set of problems. Writes eval-NAME.jsonl and returns its rows, on every rank."""
    template = a.prompt_template or run.args.get("prompt_template") or "{prompt}"
    turns = [[train.wrap({"role": "user", "content": p["question"]}, template)] for p in problems]
    prompts = train.encode_prompts(tokenizer, turns, [p["where"] for p in problems])
    positions = getattr(lm.config.get_text_config(), "max_position_embeddings", None) or train.MANY
    for prompt, problem in zip(prompts, problems):
        if not 0 < len(prompt) < positions:
            sys.exit(f"{problem['where']}: {len(prompt)} tokens; the model takes 1 to {positions - 1}")
    rows, stops = {}, train.eos_ids(lm, tokenizer)
    for number, (greedy, pairs) in enumerate(batches(prompts, a)):
        if number % a.world == a.rank:                         # every world-th batch is this rank's
            some = [prompts[i] for i, _ in pairs]
            limit = min(a.max_tokens, positions - max(map(len, some)))
            texts = cadft.nucleus_rewrite(lm, some, stops, stops[0], limit, a.top_p, 0.0 if greedy else a.temperature,
                                          key(a.seed, run.seed, number))
            rows[number] = [row_of(problems[i], ids, stops, tokenizer) | {"problem": i, "sample": sample}
                            for (i, sample), ids in zip(pairs, texts)]
        bar.update(len(pairs))
    parts = {number: some for part in gather_objects(rows) for number, some in part.items()}
    rows = [row for number in sorted(parts) for row in parts[number]]
    if a.rank == 0:
        beside = not a.out and os.path.isdir(run.path) and os.access(run.path, os.W_OK)
        write_rows(Path(run.path if beside else Path(a.out or "out", run.path.strip("/").replace("/", "--"))), name, rows)
    return rows


def batches(prompts, a):
    """Yield (greedy, [(problem, sample), ...]); longest prompts first: lack of memory shows at once."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    for greedy, samples in (True, ["greedy"]), (False, range(a.samples)):
        pairs = ((i, sample) for i in order for sample in samples)
        while some := list(islice(pairs, a.batch_size)):
            yield greedy, some


def row_of(problem, ids, stops, tokenizer):
    """One answer as a row of eval-NAME.jsonl."""
    finished = ids[-1] in stops
    row = {name: problem[name] for name in ("question", "reference", "grader")}
    row |= {"response": tokenizer.decode(ids[:-1] if finished else ids), "tokens": len(ids), "finished": finished}
    return row | {"correct": grade(row)}


def grade(row):
    """Whether a row's response is finished and right: by another program's verdict (`passed`), a sum by its
    whole text, others by the answer they end with."""
    if "passed" in row:
        return row["passed"] is True
    right = train.is_sum if row.get("grader") == "sum" else is_correct
    return row.get("finished") is not False and right(row["response"], row["reference"])


def write_rows(folder, name, rows):
    """eval-NAME.jsonl; a larger one that is there is kept as eval-NAME.old.jsonl."""
    path = folder / f"eval-{name}.jsonl"
    with writing(path, "see --out"):
        folder.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".tmp"), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if path.exists() and sum(1 for _ in open(path, "rb")) > len(rows):
            os.replace(path, path.with_suffix(".old.jsonl"))
            say(f"{path}: held more than these {len(rows)} answers; kept as {path.with_suffix('.old.jsonl').name}")
        os.replace(path.with_suffix(".tmp"), path)


# ==== 3. Problems ===========================================================================================

def classroom_problems(run, a):
    """{name: problems}: held-out sums, with as many digits as in the run's demonstrations."""
    digits = a.classroom_digits or run.args.get("classroom_digits") or 3
    some = [{"question": f"{x}+{y}:", "reference": str(x + y), "grader": "sum", "where": f"{x}+{y}"}
            for x, y in train.problems(digits, 100) if train.carries(x, y) >= a.classroom_carries]
    name = "classroom" + f"-{digits}-digits" * (digits != 3) + f"-{a.classroom_carries}-carries" * (a.classroom_carries > 0)
    return {name: some[:a.limit or None]}


def load_problems(path, limit=0):
    """JSONL -> problems: `question` or `problem`, and a reference."""
    some = []
    for where, row in islice(read_jsonl(path), limit or None):
        question = row.get("question") or row.get("problem")
        if not isinstance(question, str):
            sys.exit(f'{where}: field "question" (or "problem") is missing or not a string')
        some.append({"question": question, "reference": reference_of(row, where), "grader": "answer", "where": where})
    return some or sys.exit(f"{path}: no problem in it")


def reference_of(row, where):
    """`reference`, `answer` or `final_answer` (text, number, list), else the last box of `solution`."""
    for name in "reference", "answer", "final_answer":
        values = row.get(name) if isinstance(row.get(name), list) else [row.get(name)]
        if values and all(isinstance(value, (str, int, float)) and str(value).strip() for value in values):
            return ", ".join(map(str, values))
    boxed = last_box(row["solution"]) if isinstance(row.get("solution"), str) else None
    return boxed or sys.exit(f'{where}: no reference in "answer", "final_answer" or a \\boxed{{}} of "solution"')


def grade_file(path):
    """Grade rows with response and reference; those with one problem, question or prompt are its samples."""
    rows = []
    for number, (where, row) in enumerate(read_jsonl(path)):
        if not isinstance(row.get("response"), str) or not isinstance(row.get("tokens", 0), (int, float)):
            sys.exit(f'{where}: "response" must be a string (and "tokens", if there, a number)')
        row["reference"] = reference_of(row, where)
        named = [row[name] for name in ("problem", "question", "prompt") if row.get(name) is not None]
        rows.append(row | {"problem": key(named[0]) if named else number, "correct": grade(row)})
    run = Candidate(path, Path(path).stem, None, label=Path(path).stem)
    return [result(run, Path(path).name, count(rows))] if rows else sys.exit(f"{path}: there is no answer to grade")


# ==== 4. Numbers ============================================================================================

def count(rows):
    """Rows of answers -> {metric: [one number a problem]}, nan where there is none.

    Shares lie in [0, 1]: greedy, average_at_k, pass@k for k = 1, 2, 4 ..., cut_off; mean_tokens. The last two
    are of the samples, or without any of the greedy answers.
    """
    problems, each = {}, {}
    for row in rows:
        problems.setdefault(row["problem"], ([], []))[row.get("sample") == "greedy"].append(row)
    fewest = min(len(samples) for samples, _ in problems.values())
    mean = lambda some: statistics.fmean(some) if some else math.nan
    for _, (samples, greedy) in sorted(problems.items()):
        right, told = [row["correct"] for row in samples], samples or greedy
        numbers = {"greedy": mean([row["correct"] for row in greedy]), "average_at_k": mean(right),
                   "cut_off": mean([row.get("finished") is False for row in told]),
                   "mean_tokens": mean([row.get("tokens", math.nan) for row in told]), "samples": fewest}
        numbers |= {f"pass@{k}": pass_at_k(len(right), sum(right), k) for k in POWERS if k <= fewest}
        for name, number in numbers.items():
            each.setdefault(name, []).append(number)
    return each


def pass_at_k(n, c, k):
    """1 - C(n-c, k) / C(n, k): from n samples with c right, the unbiased estimate that one of k is right."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def mean_and_error(values):
    """(mean, its standard error s / sqrt(n)) of n numbers; nan where one is missing or there are too few."""
    if not values or any(map(math.isnan, values)):
        return math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def columns(some):
    """{metric: (mean, standard error)} of dicts or lists: some is [{metric: number}, ...] or {metric: [number]}."""
    if isinstance(some, list):
        some = {name: [one[name] for one in some] for name in some[0] if all(name in one for one in some)}
    return {name: mean_and_error(values) for name, values in some.items()}


def result(run, data, each):
    """What one run did on one set of problems: means, standard errors over problems, and each problem's."""
    found = columns(each)
    return {"run": run.path, "label": run.label, "method": run.method, "seed": run.seed, "differs": run.differs,
            "data": data, "problems": len(each["greedy"]), "mean": {name: m for name, (m, _) in found.items()},
            "standard_error": {name: e for name, (_, e) in found.items()}, "each": each}


def average_of_files(run, results):
    """The plain mean over files, as in the paper's table, and its standard error."""
    names = set.intersection(*(set(r["mean"]) for r in results))
    n, part = len(results), {name: [(r["mean"][name], r["standard_error"][name]) for r in results] for name in names}
    return results[0] | {
        "data": f"average of {n} files", "problems": sum(r["problems"] for r in results), "each": {},
        "mean": {name: statistics.fmean(m for m, _ in pairs) for name, pairs in part.items()},
        "standard_error": {name: math.hypot(*(e for _, e in pairs)) / n for name, pairs in part.items()}}


def compare(results, against):
    """A row for each set of problems and label: mean and standard error over seeds; paired difference."""
    groups, rows = {}, []
    rank = lambda r: ORDER.index(r["method"]) if r["method"] in ORDER else len(ORDER)
    for r in sorted(results, key=rank):
        groups.setdefault((r["data"], r["label"]), []).append(r)
    order = list(dict.fromkeys(r["data"] for r in results))
    for (data, label), some in sorted(groups.items(), key=lambda item: order.index(item[0][0])):
        found = columns([r["mean"] for r in some])
        row = {"data": data, "label": label, "problems": some[0]["problems"], "seeds": [r["seed"] for r in some],
               "mean": {name: m for name, (m, _) in found.items()},
               "standard_error": {name: e for name, (_, e) in found.items()} if len(some) > 1 else
               some[0]["standard_error"]}
        rows.append(row)
        if label != against and (data, against) in groups:
            row["difference"] = difference(some, groups[data, against])
    return rows


def difference(ours, theirs):
    """{share: (mean, standard error)} of the difference over the common seeds; of a single one, over problems."""
    theirs = {r["seed"]: r for r in theirs}
    pairs = [(r, theirs[r["seed"]]) for r in ours if r["seed"] in theirs]
    out = {"seeds": [r["seed"] for r, _ in pairs]}
    for share in "greedy", "average_at_k":
        values = [tuple(r["mean"][share] for r in pair) for pair in pairs]
        if len(pairs) == 1 and all(r["each"] for r in pairs[0]):
            values = list(zip(*(r["each"][share] for r in pairs[0])))
        out[share] = mean_and_error([x - y for x, y in values])
    return out


def table(rows, against):
    """The rows as lines of text, a table for each set of problems."""
    lines = []
    for data in dict.fromkeys(row["data"] for row in rows):
        some = [row for row in rows if row["data"] == data]
        k = int(min(row["mean"]["samples"] for row in some))
        top = f"pass@{max((power for power in POWERS if power <= k), default=0)}"
        cells = [["method", "greedy", f"Average@{k}", top, "cut off", "tokens", "seeds",
                  f"greedy - {against}", f"Average@{k} - {against}"]]
        for row in some:
            both = lambda name: (row["mean"].get(name, math.nan), row["standard_error"].get(name, math.nan))
            paired, tokens = row.get("difference", {}), row["mean"]["mean_tokens"]
            cells.append([row["label"], percent(*both("greedy")), percent(*both("average_at_k")),
                          percent(both(top)[0]), percent(both("cut_off")[0]), percent(tokens / 100),
                          str(len(row["seeds"])), *(percent(*paired.get(share, [math.nan]), sign="+")
                                                    for share in ("greedy", "average_at_k"))])
        lines += [f"{data}: {some[0]['problems']} problems", *aligned(cells)]
    return [*lines, "Percent ± standard error: over seeds; over problems where a row is a single run."]


def percent(value, error=math.nan, sign=""):
    """Text of a share and its standard error, "-" for nan."""
    return "-" if math.isnan(value) else f"{100 * value:{sign}.1f}" + f" ± {100 * error:.1f}" * (error == error)


def aligned(cells):
    """Rows of cells as lines of text; columns that hold no value are left out."""
    columns_ = [column for column in zip(*cells) if set(column[1:]) != {"-"}]
    pads = [str.ljust, *[str.rjust] * (len(columns_) - 1)]
    padded = [[pad(cell, max(map(len, column))) for cell in column] for pad, column in zip(pads, columns_)]
    return ["  ".join(row) for row in zip(*padded)]


def write_results(a, **parts):
    """Put these parts into results.json, nan as null; what else is in it stays."""
    beside = Path(a.runs[0]).parent if a.runs and os.path.isdir(a.runs[0]) else Path(a.out or "out")
    path = Path(a.results or beside / "results.json")
    with writing(path, "see --results"):
        path.parent.mkdir(parents=True, exist_ok=True)
        old = json.loads(path.read_text("utf-8")) if path.exists() else {}
        text = re.sub(r"\bNaN\b", "null", json.dumps(old | {"settings": vars(a)} | parts, indent=1))
        path.with_suffix(".tmp").write_text(text + "\n", "utf-8")
        os.replace(path.with_suffix(".tmp"), path)


# ==== 5. Gradients ==========================================================================================

def gradient_study(runs, a):
    """Assumption: incompatible samples have large gradients. Claim: weights lower the gradient's variance.

    Both are measured on held-back demonstrations; the tables (means over seeds) also go to results.json.
    """
    if a.world > 1:
        sys.exit("--gradients runs in one process: start it without torchrun")
    studies, out = {}, {}
    for run in tqdm(runs, desc="gradients", unit="model", disable=None):
        lm, tokenizer, _ = train.load_model(run.path, getattr(torch, a.dtype))
        examples = held_back(run, tokenizer, a)
        studies.setdefault(run.label, []).append((run.seed, study(lm.eval(), examples, run.args.get("beta") or 1.0)))
    for name, some in studies.items():
        seeds, found = zip(*some)
        parts = {part: columns([one[part] for one in found]) for part in found[0]}
        out[name] = {"seeds": seeds, **parts}
        head = ["", *next(iter(parts.values()))]
        say(f"{name}: {len(examples)} held-back demonstrations, {len(seeds)} seed(s); gradients of one, and of 32")
        for head in "pearson", "second_moment":
            some = {part: cells for part, cells in parts.items() if head in cells}
            say(*aligned([["", *next(iter(some.values()))]] +
                         [[part, *(f"{m:.3g}" + f" ± {e:.1g}" * (e == e) for m, e in cells.values())]
                          for part, cells in some.items()]))
    write_results(a, gradients=out)


def held_back(run, tokenizer, a):
    """Demonstrations of --data, or new ones like those of the run."""
    usual = {row[0].replace("-", "_"): row[2] for row in train.FLAGS}
    own = {name: value for name, value in run.args.items() if value is not None}
    own |= {"data": a.data[0] if a.data else "", "classroom_size": a.limit or 256, "seed": run.seed}
    own = argparse.Namespace(**usual | own)
    rows = None if a.data else train.classroom_rows(own, split="held back")
    examples = train.load_examples(own, tokenizer, rows)[0][:a.limit or 256]
    if len(examples) <= 32:
        sys.exit(f"--gradients needs more than 32 demonstrations, a batch; there are {len(examples)}")
    return examples


def study(lm, examples, beta):
    """{SFT's and DFT's gradients, and each method's batches: {what: number}} for one model."""
    c_raw, gram = sample_gradients(lm, [train.collate([e]) for e in examples])
    c_hat = cadft.batch_zscore(c_raw)                                          # [N] over all these samples
    out = {}
    for name, g in gram.items():
        norm = g.diagonal().sqrt()                                             # [N]
        out[f"{name} norm and c_hat"] = {"pearson": pearson(c_hat, norm), "spearman": pearson(ranks(c_hat), ranks(norm))}
    for method, (loss, weighted) in train.METHODS.items():
        if loss in LOSSES.values():
            name = next(name for name in LOSSES if LOSSES[name] is loss)
            out[f"{method} batch"] = batch_gradient(gram[name], c_raw, beta if weighted else 0.0)
    return out


LOSSES = {"sft": cadft.sft_loss, "dft": cadft.dft_loss}


def sample_gradients(lm, batches):
    """c_raw [N], nats per token, and {loss: [N, N]}, the inner products of the samples' gradients g_i."""
    weights = [p for p in lm.parameters() if p.requires_grad]
    size = sum(p.numel() for p in weights)
    if 4 * size * len(batches) > 4e9:
        sys.exit(f"--gradients would keep {len(batches)} gradients of {size:,} numbers, too many; "
                 f"with this model --limit can be {int(1e9 / size)}")
    c_raw, g = [], {name: torch.empty(len(batches), size) for name in LOSSES}
    for i, batch in enumerate(batches):
        nll, mask = cadft.token_nll(lm, batch["input_ids"], None, batch["labels"])
        c_raw.append(cadft.compatibility(nll, mask))
        for name, loss in LOSSES.items():
            parts = torch.autograd.grad(loss(nll, mask).sum(), weights, retain_graph=True)
            g[name][i] = torch.cat([part.flatten() for part in parts])
    return torch.cat(c_raw).cpu().double(), {name: (rows @ rows.T).double() for name, rows in g.items()}


def batch_gradient(gram, c_raw, beta, size=32, draws=1000):
    """Moments of g_B = 1/|B| sum_i w_i g_i over random mini-batches B, weighted within B as in training.

    gram [N, N], inner products of the g_i; c_raw [N]. No sample is twice in a batch; every method gets the
    same batches. variance = E||g_B - E g_B||^2 = second_moment - mean_squared = E||g_B||^2 - ||E g_B||^2,
    the latter from pairs of different batches, so without bias. relative_variance: divided by it, since
    weights shorten the gradient as well. Section: Compatibility-Aware Objective (the variance argument).
    """
    draw, w = torch.Generator().manual_seed(0), torch.zeros(draws, len(c_raw), dtype=torch.float64)
    for row in w:                                              # [N] w_i / |B| for i in B, else 0
        batch = torch.randperm(len(c_raw), generator=draw)[:size]
        row[batch] = cadft.compatibility_weight(cadft.batch_zscore(c_raw[batch]), beta) / len(batch)
    inner = w @ gram @ w.T                                     # [draws, draws] <g_B, g_B'>
    second = inner.diagonal().mean().item()
    squared = (inner.sum().item() - draws * second) / (draws * (draws - 1))
    return {"second_moment": second, "mean_squared": squared, "variance": second - squared,
            "relative_variance": second / squared - 1}


def pearson(x, y):
    """The correlation of x and y [N]."""
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()


def ranks(x):
    """Ranks from 1, [N]; equal values share their mean. Pearson's coefficient of ranks is Spearman's."""
    _, which, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[which].to(x.dtype)


# ==== 6. The picture ========================================================================================

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]     # Okabe and Ito's


def pyplot():
    """matplotlib's, without a window."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("--plot needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    return plt


def draw(path, rows, results):
    """Four panels, means over the runs of each row: c_raw and w by kind of the last method that has kinds,
    gradient norm of each method, accuracy."""
    plt, rows = pyplot(), [row for row in rows if row["data"] == rows[0]["data"]]
    plt.rcParams.update({"font.size": 17, "lines.linewidth": 3})
    figure, ((left, right), (norms, accuracy)) = plt.subplots(2, 2, figsize=(18, 12), layout="constrained")
    logs = {}
    for r in results:
        log = Path(r["run"], "log.jsonl")
        if r["data"] == rows[0]["data"] and r["method"] != "base" and log.exists() and log.stat().st_size:
            logs.setdefault(r["label"], []).append([row for _, row in read_jsonl(log)])
    kinds = {name: sorted({kind for log in some for line in log for kind in line["kinds"]}) for name, some in logs.items()}
    name = next((name for name in reversed(list(logs)) if kinds[name]), None)
    for axis, value, unit in (left, "c_raw", "nats per token"), (right, "w", "mean w"):
        curves(axis, {kind: smooth(logs[name], lambda line: line["kinds"].get(kind, {}), value)
                      for kind in (kinds[name] if name else [])}, f"{name}: {value} by kind", unit)
    curves(norms, {name: smooth(some, dict, "grad_norm") for name, some in logs.items()}, "Gradient norm", "norm")
    for side, share, colour in (-0.2, "greedy", COLOURS[5]), (0.2, "average_at_k", COLOURS[0]):
        at, means = [i + side for i in range(len(rows))], [100 * row["mean"][share] for row in rows]
        errors = [100 * row["standard_error"][share] for row in rows]
        accuracy.bar(at, means, 0.38, color=colour, yerr=errors, capsize=6, label=share.replace("_", " "))
    accuracy.set_xticks(range(len(rows)), [row["label"].replace(" ", "\n") for row in rows])
    accuracy.set(title="Accuracy, with standard errors", ylabel="correct (%)")
    accuracy.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)
    with writing(path, "see --plot"):
        figure.savefig(path, dpi=100)


def smooth(logs, part, value):
    """[S] mean of part(line)[value] over runs and the fifteen steps around each step; nan where there was none."""
    steps, out = min(map(len, logs)), []
    for t in range(steps):
        near = [part(line) for log in logs for line in log[max(0, t - 7):t + 8]]
        n = sum(one.get("n", 1) for one in near if value in one)
        out.append(sum(one.get("n", 1) * one[value] for one in near if value in one) / n if n else math.nan)
    return out


def curves(axis, lines, title, unit):
    """Lines over the steps, each with its name at its end; names are pushed apart where they would touch."""
    for colour, (name, values) in zip(COLOURS * len(lines), lines.items()):
        axis.plot(range(1, len(values) + 1), values, color=colour, label=name)
    axis.set(title=title, xlabel="optimizer step", ylabel=unit, ylim=(0, None))
    top, at = axis.get_ylim()[1], -1.0
    for line in sorted(axis.get_lines(), key=lambda line: line.get_ydata()[-1]):
        at = max(at + 0.065, line.get_ydata()[-1] / top)
        axis.text(1.01, at, line.get_label(), color=line.get_color(), transform=axis.transAxes, va="center")


# ==== 7. Grading ===========================================================================================

MAX_CHARS, MAX_DEPTH, MAX_PARTS, MAX_BITS = 2000, 30, 50, 1020
TOLERANCE = Fraction(1, 10_000)  # relative, where a number may be a rounded decimal
ROUNDED = re.compile(r"\.[0-9]*[1-9]|[0-9][eE][+-]?[0-9]")  # 27.0 is a whole number, 2e9 is not
FUNCTIONS = {name: getattr(cmath, name.replace("arc", "a")) for name in
             "sin cos tan arcsin arccos arctan exp log".split()} | {"ln": cmath.log, "lg": cmath.log10}
CONSTANTS = {"e": math.e, "i": 1j, "\\pi": math.pi}
BRACKETS = {"(": ")", "[": "]", "{": "}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
OPERATORS = {  # how tightly they bind, and what they do; "" joins the factors of 2x
    "+": (1, operator.add), "-": (1, operator.sub), "*": (2, operator.mul), "/": (2, operator.truediv),
    "": (3, operator.mul), "^": (4, lambda base, exponent: _power(base, exponent))}

END = r"(?![a-zA-Z])"  # where the name of a LaTeX command ends
WORD = r"\\(?:text(?:bf|rm|it|normal)?|[mh]box|math(?:rm|bf|it|sf)) ?\{([^{}]*)\}"
POWER = r"(?: ?\^ ?(?:\{[^{}]*\}|-?[0-9]))?"
UNIT = (r"(?:square |cubic )?(?:degrees?|dollars?|cents?|percent|units?|[ckm]m|kg|(?:kilo)?meters?"
        r"|inch(?:es)?|feet|miles?|seconds?|minutes?|hours?|days?|years?)")
UNICODE = str.maketrans({"−": "-", "π": r"\pi ", "×": "*", "·": "*", "°": "", "∞": r"\infty ",
                         "∪": r"\cup ", "√": r"\sqrt ", "≤": r"\le ", "≥": r"\ge ", "±": r"\pm "})
REWRITES = [(re.compile(pattern), new) for pattern, new in [
    (r"\s+", " "), (r"\\\\", "\n"),  # from here on a line break is the end of a matrix row
    (rf"\\(?:left|right|[bB]igg?[lr]?|displaystyle){END}\.?", ""),
    (r"(?<=[0-9])(?:\{,\}|, ?\\! ?|\\[,!; ] ?|~)(?=[0-9]{3}(?![0-9]))", ""),  # thousands, as in 10{,}000
    (r"\\\$|\\?%", ""), (rf"\\[,;:! ()\[\]]|~|\\q?quad{END}|\$", " "), (r"\\([{}])", r"\1"),
    (r"\^ ?(?:\\circ|\{ ?\\circ ?\})|\\degree", ""), (r"\^ ?(?:\\prime|\{ ?\\prime ?\})", "'"),
    (rf"\\(?:cdot|times){END}", "*"), (rf"\\([lg])eq?(?:slant)?{END}", r"\\\1e "),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(?:text|mbox) ?\{ ?(?:and|or) ?\}| (?:and|or) ", ","), (r",[ ,]*,", ","),
    (r"(?<=[0-9]) ?\\text ?\{ ?([ap])\.?m\.? ?\}", r" \1.m."),  # no units
    # Words behind a value are its unit, unless the value goes on after them; other words stay.
    (r"\\(?:text|mathrm) ?\{([eid])\}", r"\1 "),
    (rf"(?<=[0-9A-Za-z)}}\]])(?:[ /*]*{WORD}{POWER})+(?! ?(?:[\^\w(]|\\[a-z]))", ""),
    (WORD, r" \1 "), (rf"(?<=[0-9}}i]) ?{UNIT}{POWER}(?= *(?:$|[,.]))", ""),
    (rf"(?<![\\A-Za-z])(?:np\.)?(sqrt|pi|{'|'.join(FUNCTIONS)}){END}", r"\\\1"),
    (r"\\log ?_ ?\{?10(?![0-9])\}?", r"\\lg "), (r"\\sqrt ?([0-9]+)", r"\\sqrt{\1}"),
    (r"\\frac ?([0-9])", r"\\frac{\1}"), (r"(\\frac ?\{[^{}]*\}) ?([0-9])", r"\1{\2}"),
    (r"(?<![0-9.^_])([0-9]+) ?\\frac ?\{ ?([0-9]+) ?\} ?\{ ?([0-9]+) ?\}", r"(\1+\2/\3)"),  # mixed numbers
    (r"(?<![0-9.^_])([0-9]+) ([0-9]+)/([0-9]+)", r"(\1+\2/\3)")]]
THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])")
SUBSCRIPT = r"(?: ?_ ?(?:\{[^{}]*\}|[0-9]+|[A-Za-z]))"
NAME = re.compile(rf"((?:(?:\\angle ?)?[A-Z]{{1,3}}|[a-z]|\\[A-Za-z]+){SUBSCRIPT}?'*(?: ?\([a-zA-Z]\))?|"
                  rf"\([a-z](?:, ?[a-z])*\)) ?(?:=|\\in{END})")
MATRIX = re.compile(r"\\begin ?\{(?:[a-zA-Z]*matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end ?\{[a-zA-Z]*\}", re.S)
NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
# 31_7, a number in another base, and f(0), a value of a function, are not computed: they count as letters.
TOKEN = re.compile(rf"[0-9]+{SUBSCRIPT}|{NUMBER}|(?:[A-Za-z]|\\[A-Za-z]+){SUBSCRIPT}?'*(?:\([0-9]+\))?|\S")
LETTER = re.compile(
    r"[A-Za-z]|[0-9]+ ?_|\\(?:(?:var)?(?:epsilon|phi)|alpha|beta|[Gg]amma|[Dd]elta|zeta|eta|[Tt]heta|kappa"
    rf"|[Ll]ambda|mu|nu|[Xx]i|Pi|rho|[Ss]igma|tau|Phi|chi|[Pp]si|[Oo]mega|infty|hbar|ell){END}")
# No formulas: words (east is not the product seat), 2 3, 1.2.3, and exponents like 1e9999 that take too long
NO_FORMULA = re.compile(
    r"(?<![\\A-Za-z])[A-Za-z]{4}|^[A-Za-z ]{3,}$|[0-9.]\s+[0-9.]|\.[0-9]*\.|[eE][+-]?[0-9]{4}")
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
ANSWER_IS = re.compile(r"answer is[\s:*$]*(?:\\[\[(]\s*)?", re.IGNORECASE)
LAST_NUMBER = re.compile(
    r"(?:(?<![\w)}])-)?(?:[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?")


def extract_answer(response):
    r"""The last \boxed{...}, else what follows the last "answer is", else the last number, else ""."""
    text = str(response)
    if (boxed := last_box(text)) is not None:
        return boxed
    phrases = list(ANSWER_IS.finditer(text))
    sentence = re.split(r"\.(?=\s|$)|\n", text[phrases[-1].end():], maxsplit=1)[0].strip() if phrases else ""
    return sentence or (LAST_NUMBER.findall(text) or [""])[-1]


def last_box(text):
    r"""The content of the last \boxed{}, up to the end where it is not closed; None without a box."""
    start, depth = max((box.end() for box in BOX.finditer(text)), default=None), 1
    if start is None:
        return None
    # \{ and \} do not count; an answer beyond MAX_CHARS is never right, so need not be read
    for mark in re.compile(r"\\.|[{}]", re.S).finditer(text, start, start + MAX_CHARS):
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return text[start:mark.start()].strip()
    return text[start:].strip()


def is_correct(response, reference):
    """Whether the answer that a response ends with equals the reference."""
    return same_answer(extract_answer(response), reference)


def same_answer(prediction, reference):
    """Whether two answers are equal; never raises, and empty, overlong or too deep ones are never equal."""
    if max(len(str(prediction)), len(str(reference))) > MAX_CHARS:
        return False
    prediction, reference = _clean(str(prediction)), _clean(str(reference))
    if max(_depths(prediction) + _depths(reference)) > MAX_DEPTH:
        return False
    choice = re.fullmatch(r"\(?([A-E])\)?", reference)
    if choice:
        return bool(re.fullmatch(rf"\(?{choice[1]}\)?", prediction, re.IGNORECASE))
    return _same(prediction, reference)


def _clean(text):
    text = text.translate(UNICODE)
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    if not re.search(r"[(\[]|^ *\{", text):  # inside brackets a comma separates parts
        text = THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    return text.strip(" \n*:,").rstrip(" \n*:,.;")


def _compact(text):
    """The text without needless spaces and braces; words also without capitals."""
    text = re.sub(r"\{([^{}\\])\}", r"\1", re.sub(r"(?<![0-9]) | (?![0-9])", "", text))
    return text.casefold() if re.fullmatch(r"[A-Za-z'.-]{2,}", text) else text


def _depths(text):
    """How many brackets are open before each character and at the end; any kind closes any other: (1,2]."""
    return list(accumulate((c in "([{") - (c in ")]}") for c in " " + text))


def _split(text, separator):
    """The pieces between those separators that stand outside all brackets."""
    depths = _depths(text)
    cuts = [mark.span() for mark in re.finditer(separator, text) if depths[mark.start()] == 0]
    ends, starts = [start for start, _ in cuts] + [len(text)], [0] + [end for _, end in cuts]
    return [text[start:end].strip() for start, end in zip(starts, ends)]


@lru_cache(4096)
def _structure(text):
    """(kind, parts) of a set or list, a union, a relation, a matrix, a tuple or interval, or one value."""
    enclosed = text[:1] in ("(", "[", "{") and text[-1] in ")]}" and 0 not in _depths(text)[1:-1]
    if enclosed and text[0] == "{":
        return _structure(text[1:-1].strip())
    pieces = _split(text, ",")
    if len(pieces) > 1 or "\\pm" in text:
        return "set", [piece.replace("\\pm", plus).replace("\\mp", minus) for piece in pieces
                       for plus, minus in ("+-", "-+")[:2 if "\\pm" in piece else 1]]
    for separator in (r"\\cup", "=", "<", ">", r"\\le ", r"\\ge "):
        if len(pieces := _split(text, separator)) > 1:
            return separator, pieces
    matrix = MATRIX.fullmatch(text)
    if matrix and "\\begin" not in matrix[1]:
        rows = [row.split("&") for row in matrix[1].split("\n") if row.strip()]
        return f"matrix {[len(row) for row in rows]}", [cell.strip() for row in rows for cell in row]
    if enclosed and len(pieces := _split(text[1:-1], ",")) > 1:
        return text[0] + text[-1], pieces
    return "value", [text]


def _same(prediction, reference):
    """The comparison of two cleaned texts, part by part."""
    if not prediction or not reference or _compact(prediction) == _compact(reference):
        return bool(prediction and reference)
    texts = [prediction, reference]
    names = [NAME.match(text) if len(_split(text, ",")) == 1 else None for text in texts]
    names = [name and _compact(name[1]) for name in names]
    if any(names) and (not all(names) or names[0] == names[1]):  # x = 5 is the answer 5, but not y = 5
        texts = [NAME.sub("", text, count=1).strip() if name else text for name, text in zip(names, texts)]
    (kind, parts), (reference_kind, wanted) = map(_structure, texts)
    if kind != reference_kind or len(parts) != len(wanted) or len(parts) > MAX_PARTS:
        return False
    if kind == "value":
        return _same_value(parts[0], wanted[0])
    if kind not in ("set", r"\\cup"):
        return all(map(_same, parts, wanted))
    unused = list(parts)
    for part in wanted:  # in any order, each one once
        found = next((candidate for candidate in unused if _same(candidate, part)), None)
        if found is None:
            return False
        unused.remove(found)
    return True


def _same_value(prediction, reference):
    """Equal formulas: exactly so where both are exact, by TOLERANCE where a number may have been rounded."""
    (a, a_letters), (b, b_letters) = _value(prediction), _value(reference)
    if a is None or b is None:
        return _compact(prediction) == _compact(reference) != ""
    whole = isinstance(b, Fraction) and b.denominator == 1 and not ROUNDED.search(reference)
    rounded = ROUNDED.search(f"{prediction} {reference}") and not (whole or a_letters or b_letters)
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return abs(a - b) <= (TOLERANCE if rounded else 0) * abs(b)
    # Roots, pi and the like are floats, whose own rounding has to be allowed for.
    return abs(complex(a) - complex(b)) <= (1e-4 if rounded else 1e-9) * abs(complex(b))


@lru_cache(4096)
def _value(text):
    """(value, whether letters occur in it); the value is a Fraction, a complex, None if not understood."""
    tokens = TOKEN.findall(text)[::-1]
    letters = any(token not in CONSTANTS and LETTER.match(token) for token in tokens)
    try:
        value = None if NO_FORMULA.search(text) else _parse(tokens)
        return (value if not tokens and abs(complex(value)) < 1e305 else None), letters
    except (ValueError, TypeError, ArithmeticError, IndexError, RecursionError):
        return None, letters


def _parse(tokens, level=0):
    """The value at the end of the reversed tokens, up to an operator that binds less than `level`."""
    value = _operand(tokens)
    while tokens and tokens[-1] not in BRACKETS.values():
        sign = tokens[-1] if tokens[-1] in OPERATORS else ""
        binds, combine = OPERATORS[sign]
        if binds < level or level == 3 and tokens[-1][1:] in FUNCTIONS:  # sin x cos x is (sin x) cos x
            break
        if sign:
            tokens.pop()
        value = combine(value, _parse(tokens, binds + (sign != "^")))
        if isinstance(value, Fraction) and max(map(int.bit_length, value.as_integer_ratio())) > MAX_BITS:
            raise OverflowError("the arithmetic would become slow")
    return value


def _operand(tokens):
    token = tokens.pop()
    name = token[1:] if token[0] == "\\" else ""
    if token in "+-":
        return _parse(tokens, 3) * (1 if token == "+" else -1)
    if re.fullmatch(NUMBER, token):
        return Fraction(token)
    if token in BRACKETS:
        value = _parse(tokens)
        if tokens.pop() != BRACKETS[token]:
            raise ValueError("brackets")
        return _letter(f"{token} {value}") if name else value  # floor and ceiling are not computed
    if name == "frac":
        return _operand(tokens) / _operand(tokens)
    if name == "sqrt":
        index = _operand(tokens) if tokens[-1] == "[" else 2
        return _power(_operand(tokens), Fraction(1) / index)
    if name in FUNCTIONS:
        exponent = _operand(tokens) if tokens[-1] == "^" and tokens.pop() else 1
        argument = _operand(tokens) if tokens[-1] in BRACKETS else _parse(tokens, 3)
        return _power(FUNCTIONS[name](argument), exponent)
    if token in CONSTANTS:
        return CONSTANTS[token]
    if LETTER.match(token):
        return _letter(re.sub("[ {}]", "", token))
    raise ValueError(token)


@lru_cache(4096)
def _letter(name):
    return Fraction(random.Random(name).randrange(500_000, 2_000_000), 999_983)


def _power(base, exponent):
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if (max(map(int.bit_length, base.as_integer_ratio())) - 1) * abs(exponent) <= MAX_BITS:
            return base ** int(exponent)
    return complex(base) ** complex(exponent)  # raises OverflowError where the result is too large


if __name__ == "__main__":
    sys.exit(main())
