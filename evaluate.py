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
import ast
import cmath
import io
import json
import math
import operator
import os
import random
import re
import statistics
import sys
from fractions import Fraction
from itertools import islice
from pathlib import Path

import train                # before torch, which reads a setting of train's when it loads
import torch
from tqdm import tqdm

import cadft
from train import RANK, WORLD, explained, key, read_jsonl, refuse, say, writing

ORDER = ["base", "sft", "focal", "casft", "dft", "cadft"]      # of the table's rows; others follow
POWERS = [2 ** i for i in range(14)]                           # the k of pass@k
SHARES = "greedy", "average_at_k"                              # the two that are compared
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
    ("classroom-digits", None, 0, [0, 2, 3, 4, 5, 6], "of the sums; 0: as many as the run learned"),
    ("classroom-carries", None, 0, (0, 6), "only those of the sums with so many carries or more"),
    ("prompt-template", "", "", None, 'wraps each question, "{prompt} Reason." (the run\'s own)'),
    ("against", "dft", "dft", None, "the row that the others are compared to"),
    ("out", "", "", None, "folder for eval-NAME.jsonl (beside the model)"),
    ("results", "", "", None, "file of the summary (results.json beside the runs)"),
    ("dtype", "", "", ["float32", "bfloat16", "float64"], "(bfloat16 with --data on CUDA, else float32)"),
    ("grade", "", "", None, "a JSONL file with response and reference: grade these, sample nothing"),
    ("gradients", False, False, None, "study gradients, sample nothing"),
    ("plot", "", "", None, "FILE.png: draw compatibility, weights, gradient norm and accuracy"),
]


# ==== 1. From runs to a table ===============================================================================
# A run is a dict: run (path), method, seed, args (of its args.json) and label (of its row). A result has
# besides: data (the set's name), problems, each (a number a problem for each metric), mean, standard_error.

@train.guarded
def main(argv):
    """evaluate.py: sample and grade what is named, print the table, write results.json."""
    a, given = train.read_flags(argv, FLAGS, __doc__, "data", runs=True)
    refuse("{prompt}" not in (a.prompt_template or "{prompt}"),
           "--prompt-template has no {prompt} in it: the question would be lost")
    refuse(len({Path(path).stem for path in a.data}) < len(a.data),
           "--data: two files of one name; their results would overwrite each other")
    refuse(a.grade and (a.runs or a.gradients),
           f"--grade reads answers from {a.grade} alone: leave out runs and --gradients")
    if a.plot:
        draw(a.plot, [])                                       # will the folder and the format do?
    if not a.data:
        torch.set_num_threads(train.THREADS)                   # the last digits depend on it
    a.dtype = a.dtype or ("bfloat16" if train.CUDA and a.data and not a.gradients else "float32")
    train.join()
    runs = [] if a.grade else find_runs(a)
    labels = dict.fromkeys(run["label"] for run in runs)
    refuse(runs and "against" in given and a.against not in labels,
           f"--against {a.against}: there is no such row, only {', '.join(labels)}")
    if a.gradients:
        return gradient_study(runs, a)
    files = {Path(path).stem: load_problems(path, a.limit) for path in a.data}
    asked = [(run, files or classroom_problems(run, a)) for run in runs]       # read before a model is loaded
    bar = tqdm(asked, "evaluate", unit="run", disable=RANK > 0 or not runs or None)
    results = grade_file(a.grade) if a.grade else [r for run, sets in bar for r in evaluate(run, sets, a)]
    rows = compare(results, a.against)
    say(*table(rows, a.against))
    plain = lambda r: {name: r[name] for name in r if name not in ("each", "args", "files")}
    write_results(a, settings=vars(a), runs=[*map(plain, results)], rows=[*map(plain, rows)])
    if RANK == 0 and a.plot:
        draw(a.plot, rows)


def find_runs(a):
    """The runs named, or all finished ones under out/ with the base models, each with its row's label."""
    there = (folder for folder in sorted(Path("out").glob("[!.]*")) if train.finished(folder))
    paths = dict.fromkeys(Path(os.path.normpath(path)).as_posix() for path in a.runs or there)
    runs, taken = [read_run(path) for path in paths], []
    for run in runs:
        kin = [other["args"] for other in runs if other["method"] == run["method"]]
        names = sorted(set().union(*kin) - (train.FREE - {"data"}) - {"seed", "data_sha256"})
        differ = [name for name in names if any(args.get(name) != run["args"].get(name) for args in kin)]
        label = " ".join([run["method"], *(f"{name}={run['args'].get(name)}" for name in differ)])
        taken.append((label, run["seed"]))
        again = taken.count(taken[-1])                         # the same run twice is no second seed
        run["label"] = label + f" #{again}" * (again > 1)
    return runs or sys.exit("out/ holds no finished run: python train.py makes one; or name a folder")


def read_run(path):
    """What a folder, or else a hub name, says about the run in it."""
    folder, args = Path(path), train.read_json(Path(path, "args.json"))
    args["data"] = Path(args.get("data") or "").name           # of one's own data, the file tells rows apart
    hub = len(folder.parts) == 1 or len(folder.parts) == 2 and not folder.parent.is_dir()      # owner/name
    refuse(not folder.is_dir() and (folder.exists() or not hub),
           f"{path}: no such folder; name that of a run, or a hub name")
    refuse(folder.is_dir() and not train.finished(folder),
           f"{path}: no finished model there (no config.json, or a checkpoint); see train.py --resume")
    base = re.fullmatch(r"base-seed([0-9]+)", folder.name)
    return {"run": str(path), "method": "base" if base else str(args.get("method", path)), "args": args,
            "seed": int(base[1]) if base else args.get("seed")}


def evaluate(run, sets, a):
    """Sample and grade a run on each set of problems. Writes eval-NAME.jsonl; every rank returns results."""
    lm, tokenizer = train.load_model(run["run"], getattr(torch, a.dtype))
    beside = not a.out and os.path.isdir(run["run"]) and os.access(run["run"], os.W_OK)
    folder = Path(run["run"] if beside else f"{a.out or 'out'}/{run['run'].strip('/').replace('/', '--')}")
    with writing(folder, "see --out"):
        folder.mkdir(parents=True, exist_ok=True)
    results, usual = [], {flag: value for flag, value, *_ in FLAGS}
    trial = [f"-{flag}{vars(a)[flag]}" for flag in ("limit", "samples") if vars(a)[flag] != usual[flag]]
    for name, problems in sets.items():
        rows = answers(run, lm.eval(), tokenizer, name, problems, a)
        if RANK == 0:                                          # --limit and --samples have files of their own
            train.write_rows(folder / f"eval-{name}{''.join(trial)}.jsonl", rows, "w")
        results.append(result(run, name, count(rows)))
    return results + ([average_of_files(results)] if len(results) > 1 else [])


# ==== 2. Sampling ===========================================================================================

def answers(run, lm, tokenizer, name, problems, a):
    """Sample and grade one set of problems. Returns the rows of eval-NAME.jsonl, on every rank."""
    (wheres, problems), rows = zip(*problems), []
    template = a.prompt_template or run["args"].get("prompt_template") or "{prompt}"
    turns = [[{"role": "user", "content": template.replace("{prompt}", p["question"])}] for p in problems]
    prompts, stops = train.encode_prompts(tokenizer, turns, wheres), train.eos_ids(lm, tokenizer)
    room = train.positions(lm)
    for where, prompt in zip(wheres, prompts):
        refuse(not 0 < len(prompt) < room, f"{where}: {len(prompt)} tokens; the model takes 1 to {room - 1}")
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))        # lack of memory shows at once
    asked = [(i, "greedy") for i in order], [(i, sample) for i in order for sample in range(a.samples)]
    batches = [pairs[i:i + a.batch_size] for pairs in asked for i in range(0, len(pairs), a.batch_size)]
    mine = list(enumerate(batches))[RANK::WORLD]
    for number, pairs in tqdm(mine, name, unit="batch", leave=False, disable=RANK > 0 or None):
        some, heat = [prompts[i] for i, _ in pairs], 0.0 if pairs[0][1] == "greedy" else a.temperature
        limit, seed = min(a.max_tokens, room - max(map(len, some))), key(a.seed, run["seed"], number)
        new = cadft.nucleus_rewrite(lm, some, stops, stops[0], limit, a.top_p, heat, seed)
        for (i, sample), ids in zip(pairs, new):
            row = {"problem": i, "sample": sample, **problems[i], "tokens": len(ids)}
            row["finished"] = ids[-1] in stops
            row["response"] = tokenizer.decode(ids[:-1] if row["finished"] else ids)
            rows.append((number, row | {"correct": grade(row)}))
    return [row for _, row in sorted(sum(train.gather_objects(rows), []), key=lambda pair: pair[0])]


def grade(row):
    """Whether a row's response is right: as another program judged (`passed`), else finished and equal."""
    if "passed" in row:
        return row["passed"] is True
    right = train.is_sum if row.get("grader") == "sum" else is_correct
    return row.get("finished") is not False and right(row["response"], row["reference"])


# ==== 3. Problems ===========================================================================================

def classroom_problems(run, a):
    """{name: [(where, problem)]}: held-out sums, with as many digits as in the run's demonstrations."""
    digits, hard = a.classroom_digits or run["args"].get("classroom_digits") or 3, a.classroom_carries
    some = [(f"{x}+{y}", {"question": f"{x}+{y}:", "reference": str(x + y), "grader": "sum"})
            for x, y in train.problems(digits, 100) if train.carries(x, y) >= hard]
    name = "classroom" + f"-{digits}-digits" * (digits != 3) + f"-{hard}-carries" * (hard > 0)
    return {name: some[:a.limit or None] or sys.exit(f"--classroom-carries {hard}: no sum has so many")}


def load_problems(path, limit=0):
    """JSONL -> [(where, problem)]: `question` or `problem`, and a reference."""
    some = []
    for where, row in islice(read_jsonl(path), limit or None):
        question = row.get("question") or row.get("problem")
        refuse(not isinstance(question, str),
               f'{where}: field "question" (or "problem") is missing or not a string')
        some.append((where, {"question": question, "reference": reference_of(row, where)}))
    return some or sys.exit(f"{path}: no problem in it")


def reference_of(row, where):
    """`reference`, `answer` or `final_answer` (text, number, list), else the last box of `solution`."""
    for name in "reference", "answer", "final_answer":
        values = row.get(name) if isinstance(row.get(name), list) else [row.get(name)]
        texts = [str(value).split("####")[-1].strip() for value in values       # GSM8K's end in #### 7
                 if isinstance(value, (str, int, float))]
        if texts and all(texts) and len(texts) == len(values):
            return ", ".join(texts)
    boxed = last_box(row["solution"]) if isinstance(row.get("solution"), str) else None
    return boxed or sys.exit(f'{where}: no reference in "answer", "final_answer" or "solution" (\\boxed)')


def grade_file(path):
    """Grade rows with response and reference; those with one problem, question or prompt are its samples."""
    rows = []
    for number, (where, row) in enumerate(read_jsonl(path)):
        tokens = row.get("tokens", 0)
        counted = type(tokens) in (int, float) and tokens < 1e12
        refuse(not isinstance(row.get("response"), str) or not counted,
               f'{where}: "response" must be a string (and "tokens", if there, a number)')
        row["reference"] = reference_of(row, where)
        named = [row[name] for name in ("problem", "question", "prompt") if row.get(name) is not None]
        rows.append(row | {"problem": key(named[0]) if named else number, "correct": grade(row)})
    run = {"run": path, "method": Path(path).stem, "seed": None, "label": Path(path).stem}
    return [result(run, Path(path).name, count(rows or sys.exit(f"{path}: there is no answer to grade")))]


# ==== 4. Numbers ============================================================================================

def count(rows):
    """Rows of answers -> {metric: [one number a problem]}, nan where there is none; shares lie in [0, 1].
    cut_off and mean_tokens are of the samples, or without any of the greedy answers."""
    problems, numbers = {}, []
    for row in rows:
        problems.setdefault(row["problem"], ([], []))[row.get("sample") == "greedy"].append(row)
    fewest = min(len(samples) for samples, _ in problems.values())
    mean = lambda some: statistics.fmean(some) if some else math.nan
    for _, (samples, greedy) in sorted(problems.items()):
        right, shown = [row["correct"] for row in samples], samples or greedy
        numbers.append({"greedy": mean([row["correct"] for row in greedy]), "average_at_k": mean(right),
                        "cut_off": mean([row.get("finished") is False for row in shown]),
                        "mean_tokens": mean([row.get("tokens", math.nan) for row in shown]),
                        "samples": fewest,
                        **{f"pass@{k}": pass_at_k(len(right), sum(right), k) for k in POWERS if k <= fewest}})
    return {name: [one[name] for one in numbers] for name in numbers[0]}


def pass_at_k(n, c, k):
    """1 - C(n-c, k) / C(n, k): from n samples with c right, the unbiased estimate that one of k is right."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def mean_and_error(values):
    """(mean, its standard error s / sqrt(n)) of n numbers; nan where one is missing or there are too few."""
    if not values or any(map(math.isnan, values)):
        return math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def result(run, data, each):
    """Means of `each` and their standard errors: over problems, or in a row of the table over seeds."""
    means, errors = zip(*map(mean_and_error, each.values()))
    return run | {"data": data, "problems": len(each["greedy"]), "each": each,
                  "mean": dict(zip(each, means)), "standard_error": dict(zip(each, errors))}


def average_of_files(results):
    """The plain mean over files, as in the paper's table, and its standard error."""
    n = len(results)
    means = {name: [statistics.fmean(r["mean"][name] for r in results)] for name in results[0]["mean"]}
    errors = {name: math.hypot(*(r["standard_error"][name] for r in results)) / n for name in means}
    return result(results[0], f"average of {n} files", means) | {
        "problems": sum(r["problems"] for r in results), "standard_error": errors, "files": results}


def compare(results, against):
    """A row for each set of problems and label: mean and standard error over seeds; paired difference."""
    rows, sets = [], list(dict.fromkeys(r["data"] for r in results))
    place = lambda r: (sets.index(r["data"]), [*ORDER, r["method"]].index(r["method"]))
    for data, label in dict.fromkeys((r["data"], r["label"]) for r in sorted(results, key=place)):
        some, theirs = ([r for r in results if r["data"] == data and r["label"] == name]
                        for name in (label, against))
        row = {"label": label, "seeds": [r["seed"] for r in some], "runs": [r["run"] for r in some]}
        means = {name: [r["mean"][name] for r in some] for name in some[0]["mean"]}
        rows.append(result(row, data, means) | {"problems": some[0]["problems"]})
        if len(some) == 1:
            rows[-1]["standard_error"] = some[0]["standard_error"]
        if theirs and label != against:
            rows[-1]["difference"] = difference(some, theirs)
    return rows


def difference(ours, theirs):
    """{share: (mean, standard error)} of the difference over common seeds; of a single one, over problems."""
    pairs = [(r, other) for r in ours for other in theirs      # a hub model has no seed
             if r["seed"] == other["seed"] or None in (r["seed"], other["seed"])]
    out = {"seeds": [other["seed"] if r["seed"] is None else r["seed"] for r, other in pairs]}
    for share in SHARES:
        out[share] = mean_and_error([r["mean"][share] - other["mean"][share] for r, other in pairs])
        if len(pairs) == 1:                                    # of an average: over each file's problems
            files = [*zip(*(r.get("files", [r]) for r in pairs[0]))]
            errors = [mean_and_error([*map(operator.sub, r["each"][share], other["each"][share])])[1]
                      for r, other in files]
            out[share] = out[share][0], math.hypot(*errors) / len(files)
    return out


def table(rows, against):
    """The rows as lines of text, a table for each set of problems; columns without a value are left out."""
    lines = []
    for data in dict.fromkeys(row["data"] for row in rows):
        some = [row for row in rows if row["data"] == data]
        k = int(some[0]["mean"]["samples"])
        top = f"pass@{max((power for power in POWERS if power <= k), default=0)}"
        names, cells = {"greedy": "greedy", "average_at_k": f"Average@{k}"}, []
        for row in some:
            m, e, paired = row["mean"], row["standard_error"], row.get("difference", {})
            cells.append({"method": row["label"], **{names[s]: percent(m[s], e[s]) for s in names},
                          top: percent(m.get(top, math.nan)), "cut off": percent(m["cut_off"]),
                          "tokens": percent(m["mean_tokens"] / 100),           # no share: undoes the hundred
                          "seeds": str(len(row["seeds"])),
                          **{f"{names[s]} - {against}": percent(*paired.get(s, [math.nan]), sign="+")
                             for s in names}})
        columns = [[name, *(cell[name] for cell in cells)] for name in cells[0]]
        columns = [column for column in columns if set(column[1:]) != {"-"}]
        line = "  ".join(f"{{:>{max(map(len, column))}}}" for column in columns).replace(">", "<", 1)
        lines += [f"{data}: {some[0]['problems']} problems", *(line.format(*row) for row in zip(*columns))]
    return [*lines, "Percent ± standard error: over seeds; over problems where a row is a single run."]


def percent(value, error=math.nan, sign=""):
    """Text of a share and its standard error, "-" for nan."""
    spread = "" if math.isnan(error) else f" ± {100 * error:.1f}"
    return "-" if math.isnan(value) else f"{100 * value:{sign}.1f}{spread}"


def write_results(a, **parts):
    """Put these parts into results.json, nan as null; what else is in it stays. --grade alone writes none."""
    beside = Path(a.runs[0]).parent if a.runs and os.path.isdir(a.runs[0]) else Path(a.out or "out")
    path = Path(a.results or beside / "results.json")
    parts = json.loads(json.dumps(parts), parse_constant=lambda _: None)
    if RANK == 0 and (a.results or not a.grade):
        with writing(path, "see --results"):
            path.parent.mkdir(parents=True, exist_ok=True)
            train.write_json(path, train.read_json(path) | parts)


# ==== 5. Gradients ==========================================================================================

def gradient_study(runs, a):
    """Assumption: incompatible samples have large gradients. Claim: weights lower the gradient's variance.
    Both are measured on the demonstrations of --data, or on newly drawn sums like the run's."""
    refuse(WORLD > 1 or len(a.data) > 1, "--gradients: one process, without torchrun, and one --data file")
    found = {}
    for run in tqdm(runs, desc="gradients", unit="model", disable=None):
        lm, tokenizer = train.load_model(run["run"], getattr(torch, a.dtype))
        own = train.parse([])                                  # the classroom's values, then the run's
        vars(own).update({name: value for name, value in run["args"].items() if value is not None})
        vars(own).update(data=a.data[0] if a.data else "", classroom_size=a.limit or 256, seed=run["seed"])
        rows = None if a.data else train.classroom_rows(own, split="held back")
        examples = train.load_examples(own, tokenizer, rows)[:a.limit or 256]
        refuse(len(examples) <= 32 or 8e-9 * lm.num_parameters() * len(examples) > 8,
               f"--gradients keeps {len(examples)} gradients of {lm.num_parameters():,} numbers, for two "
               f"losses: take more than 32, a batch, and at most 8 GB; see --limit")
        numbers = study(*sample_gradients(lm.eval(), [train.collate([e]) for e in examples]), own.beta)
        found.setdefault(run["label"], []).append(numbers)
    for label, some in found.items():
        found[label] = {name: mean_and_error([numbers[name] for numbers in some]) for name in some[0]}
        say(label, *(f"  {name:45} {m:8.3g}" + ("" if math.isnan(e) else f" ± {e:.1g}")
                     for name, (m, e) in found[label].items()))
    write_results(a, gradients=found)


def sample_gradients(lm, batches):
    """c_raw [N], nats per token, and {loss: [N, N]}, the inner products of the samples' gradients g_i."""
    c_raw, weights = [], list(lm.parameters())
    g = {name: torch.empty(len(batches), lm.num_parameters(), dtype=lm.dtype) for name in ("sft", "dft")}
    for i, batch in enumerate(batches):
        nll, mask = cadft.token_nll(lm, batch["input_ids"], None, batch["labels"])
        c_raw.append(cadft.compatibility(nll, mask))
        for name, rows in g.items():
            loss = train.METHODS[name][0](nll, mask).sum()
            parts = torch.autograd.grad(loss, weights, retain_graph=True)
            rows[i] = torch.cat([part.flatten() for part in parts])
    return torch.cat(c_raw).cpu().double(), {name: (rows @ rows.T).double() for name, rows in g.items()}


def study(c_raw, gram, beta):
    """{what: number}: correlation of c_hat with gradient norms; variance of each method's batch gradient."""
    c_hat, numbers = cadft.batch_zscore(c_raw), {}
    for name, g in gram.items():
        both = torch.stack([c_hat, g.diagonal().sqrt()])                       # [2, N] c_hat, ||g_i||
        for way, x in ("Pearson", both), ("Spearman", both.argsort().argsort().double()):
            numbers[f"c_hat and {name} gradient norm, {way}"] = torch.corrcoef(x)[0, 1].item()
    for method in "sft", "casft", "dft", "cadft":
        second, squared = batch_gradient(gram[method[-3:]], c_raw, beta if train.METHODS[method][1] else 0.0)
        numbers[f"{method}, variance of a batch's gradient"] = second - squared
        numbers[f"{method}, the same over its squared mean"] = second / squared - 1
    return numbers


def batch_gradient(gram, c_raw, beta, size=32, draws=1000):
    """E||g_B||^2 and ||E g_B||^2 of g_B = 1/|B| sum_i w_i g_i over random mini-batches B, weighted within B.

    gram [N, N], inner products of the g_i; c_raw [N]. No sample is twice in a batch; every method gets the
    same batches. The first minus the second is the variance E||g_B - E g_B||^2; the second comes from pairs
    of different batches, so without bias. Section: Compatibility-Aware Objective (the variance argument).
    """
    draw, w = torch.Generator().manual_seed(0), torch.zeros(draws, len(c_raw), dtype=torch.float64)
    for row in w:                                              # [N] w_i / |B| for i in B, else 0
        batch = torch.randperm(len(c_raw), generator=draw)[:size]
        row[batch] = cadft.compatibility_weight(cadft.batch_zscore(c_raw[batch]), beta) / len(batch)
    inner = w @ gram @ w.T                                     # [draws, draws] <g_B, g_B'>
    second = inner.diagonal().mean().item()
    return second, (inner.sum().item() - draws * second) / (draws * (draws - 1))


# ==== 6. The picture ========================================================================================

def draw(path, rows):
    """Four panels, means over a row's runs: c_raw and w of the last with a log, gradient norms, accuracy."""
    with explained("--plot needs matplotlib: pip install matplotlib"):
        from matplotlib import figure, style                   # without pyplot, which looks for a window
    style.use(["tableau-colorblind10", {"font.size": 17, "lines.linewidth": 3, "legend.frameon": False}])
    picture = figure.Figure(figsize=(20, 12), layout="constrained")
    left, right, norms, bars = picture.subplots(2, 2).flat
    rows = [row for row in rows if row["data"] == rows[0]["data"]]
    logs = [(row["label"], Path(run, "log.jsonl")) for row in rows for run in row["runs"]]
    logs = [(label, log) for label, log in logs if log.exists() and label != "base"]
    last, curves = logs[-1][0] if logs else "", {}             # (panel, name) -> {ten steps: their values}
    add = lambda at, value, *name: curves.setdefault(name, {}).setdefault(at, []).append(value)
    for label, line in ((label, line) for label, log in logs for _, line in read_jsonl(log)):
        at = (line["step"] - 1) // 10 * 10 + 5.5
        add(at, line["grad_norm"], norms, label)
        for kind, means in line["kinds"].items() if label == last else ():
            add(at, means["c_raw"], left, kind)
            add(at, means["w"], right, kind)
    for (panel, name), values in curves.items():
        steps = sorted(values)                                 # a run may lack a kind for ten steps
        panel.plot(steps, [statistics.fmean(values[at]) for at in steps], label=name)
    for side, share in zip((-0.2, 0.2), SHARES):
        heights, errors = ([100 * row[part][share] for row in rows] for part in ("mean", "standard_error"))
        bars.bar([i + side for i in range(len(rows))], heights, 0.4, yerr=errors, capsize=6,
                 label=share.replace("_at_", "@"))
    bars.set_xticks(range(len(rows)), [row["label"].replace(" ", "\n") for row in rows])
    for panel, below, title in ((left, "step", f"{last}: c_raw by kind, nats per token"),
                                (right, "step", f"{last}: w by kind"),
                                (norms, "step", "gradient norm before clipping"),
                                (bars, "", "accuracy in % with standard errors")):
        panel.set(title=title, xlabel=below, ylim=(0, None))
        panel.legend(*panel.get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1, 0.5))
    with writing(path, "see --plot"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(path if rows else io.BytesIO(), format=Path(path).suffix[1:], dpi=100)


# ==== 7. Grading ===========================================================================================
# Cleaned LaTeX is nearly Python: 2x, \frac{1}{y} becomes {('2')*('x'),'\\frac'(('1')) (('y'))}, a set whose
# numbers and names are quoted. Python's parser makes a tree of it, in which _read finds sets, intervals and
# the like, and _value computes formulas; letters are random numbers, so that equal formulas have equal
# values. Nothing is ever executed, and what is not understood is compared by its spelling.

MAX_CHARS, MAX_BITS, TOLERANCE = 500, 4096, Fraction(1, 10_000)  # the last: relative, of rounded numbers
ROUNDED = re.compile(r"\.[0-9]*[1-9]|[0-9][eE][+-]?[0-9]")  # 27.0 is a whole number, 2e9 is not
FUNCTIONS = {"\\" + name: getattr(cmath, name.replace("arc", "a")) for name in
             "sin cos tan arcsin arccos arctan exp log".split()} | {r"\ln": cmath.log, r"\lg": cmath.log10}
NAMES = "|".join(name[1:] for name in FUNCTIONS)  # their arguments may lack brackets
FUNCTIONS |= {r"\frac": lambda x: lambda y: x / y, r"\root": lambda n=2: lambda x: _power(x, Fraction(1) / n),
              r"\binom": lambda n: lambda k: _factorial(n) / _factorial(k) / _factorial(n - k),
              r"\floor": lambda x: random.Random(f"floor {x}").random(),  # any number, as for a letter
              r"\ceil": lambda x: random.Random(f"ceil {x}").random()}
VALUES = FUNCTIONS | {"e": math.e, "i": 1j, r"\pi": math.pi}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.UAdd: operator.pos, ast.USub: operator.neg, ast.Pow: lambda x, y: _power(x, y)}
# token -> Python source; any other token is quoted
PYTHON = {sign: sign for sign in [*"([)]+-*/,<>", "<=", ">="]} | {name: repr(name) for name in FUNCTIONS} | {
    "{": "(", "}": ")", "}{": ") (", r"\{": "{", r"\}": "}", "^": "**", "!": ".factorial", "=": "==",
    r"\le": "<=", r"\ge": ">=", r"\in": " in ", r"\cup": " or ", r"\pm": "+~", r"\mp": "-~"}

END = r"(?![a-zA-Z])"  # where the name of a LaTeX command ends
WORD = r"\\(?:text(?:bf|rm|it|normal)?|[mh]box|math(?:rm|bf|it|sf)) ?\{([^{}]*)\}"
POWER = r"(?: ?\^ ?(?:\{[^{}]*\}|-?[0-9]))?"
GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\}"
INSIDE = r"((?:[^()\[\]]|\([^()]*\))*)"
ARGUMENT = (rf"\([^()]*\)|\{{[^{{}}]*\}}|(?![ {{^])(?:[\w'^ ]|\.[0-9]|{GROUP}"
            rf"|\\(?!(?:{NAMES}|c[ua]p|in|[lg]e|pm|mp){END})[a-zA-Z]+)+")
UNICODE = str.maketrans({"−": "-", "π": r"\pi ", "×": "*", "·": "*", "°": "", "∞": r"\infty ",
                         "∪": r"\cup ", "√": r"\sqrt ", "≤": r"\le ", "≥": r"\ge ", "±": r"\pm "})
REWRITES = [(re.compile(pattern), new) for pattern, new in [
    # Layout, degrees, dollars, percent and the signs between thousands, as in 10{,}000, go
    (r"\s+", " "), (rf"\\(?:left|right|[bB]igg?[lr]?|displaystyle){END}\.?", ""),
    (r"(?<=[0-9])(?:\{,\}|, ?\\! ?|\\[,!; ] ?|~)(?=[0-9]{3}(?![0-9]))", ""),
    (r"\\\$|\\?%|\^ ?\{? ?\\circ ?\}?|\\degree", ""),
    # Matrices become [[(1,2),(3,4)]], half-open intervals ([0,1],) and [(0,1)]
    (r"\\begin ?\{[a-zA-Z]*(?:matrix|array)\}(?:\{[lcr| ]*\})?", "[[("), ("&", ","),
    (r"(?:\\\\ ?)?\\end ?\{[a-zA-Z]*(?:matrix|array)\}", ")]]"), (r"\\\\", "),("),
    (rf"\\[,;:! ()\[\]]|~|\\q?quad{END}|\$", " "),
    (rf"\[{INSIDE}\)", r"([\1],)"), (rf"\({INSIDE}\]", r"[(\1)]"),
    # One spelling for each thing
    (r"\^ ?\{? ?\\prime ?\}?", "'"), (r"\\[dtc](?=frac|binom)", r"\\"), (rf"\\(?:cdot|times){END}", "*"),
    (rf"\\([lg])eq?(?:slant)?{END}", r"\\\1e "), (r"\\l(floor|ceil)", r"\\\1("), (r"\\r(?:floor|ceil)", ")"),
    (r"\} \{", "}{"), (r",? ?(?:\\(?:text|mbox) ?\{ ?(?:and|or) ?\}|\b(?:and|or)\b)", ","),
    # Words behind a value are its unit, unless the value goes on after them; other words stay
    (r"(?<=[0-9]) ?\\text ?\{ ?([ap])\.?m\.? ?\}", r" \1.m."), (r"\\(?:text|mathrm) ?\{([eid])\}", r"\1 "),
    (rf"(?<=[0-9A-Za-z)}}\]])(?:[ /*]*{WORD}{POWER})+(?! ?(?:[\^\w(]|\\[a-z]))", ""), (WORD, r" \1 "),
    (rf"(?<=[0-9}}]) ?(?:[a-z]{{4,}}(?: [a-z]{{4,}})*|[ckm]m|kg){POWER}(?= *(?:$|[,.]))", ""),
    # Backslashes, braces and brackets that were left out; mixed numbers; \sin^2 x becomes \sin(x)^2
    (r"\\(sin|cos|tan) ?\^ ?\{ ?-1 ?\}", r"\\arc\1 "),
    (rf"(?<![\\A-Za-z])(?:np\.)?(sqrt|pi|{NAMES}){END}", r"\\\1"),
    (r"\\sqrt ?([0-9]+|[a-z])", r"\\sqrt{\1}"), (r"\\sqrt ?(?:\[([^\[\]]*)\])? ?", r"\\root{\1}"),
    (r"\\frac ?([0-9a-zA-Z]|\\[a-z]+)", r"\\frac{\1}"), (rf"(\\frac ?{GROUP}) ?([0-9a-zA-Z])", r"\1{\2}"),
    (r"(?<![0-9.^_])([0-9]+) ?(\\frac ?(?:\{ ?[0-9]+ ?\} ?){2}|(?<= )[0-9]+/[0-9]+)", r"(\1+\2)"),
    (r"\[([^\[\],]*)\]", r"(\1)"), (r"\\log ?_ ?(\{[0-9]+\}|[0-9])", r"\\log(\1)^{-1}\\log "),
    (rf"(\\(?:{NAMES}){END}|/) ?(\^ ?(?:\{{-?[0-9]+\}}|[0-9]))? ?({ARGUMENT})", r"\1(\3)\2")]]
# 31_7, a number in another base, and f(0), a value of a function, are not computed: they count as letters. So
# do words of four letters, or three and nothing else. 2 3, 1.2.3 and 1e9999 are tokens, but no numbers.
SUBSCRIPT = r"(?: ?_ ?(?:\{[^{}]*\}|[0-9]+|[A-Za-z]))"
TOKEN = re.compile(rf"}}{{|[0-9]+{SUBSCRIPT}|[0-9.]+(?: +[0-9.]+)*(?:[eE][+-]?[0-9]+)?|[A-Za-z]\([0-9]+\)"
                   rf"|(?:\\[A-Za-z]+|[A-Za-z]{{4,}}|^[A-Za-z]{{3}}$|[A-Za-z]){SUBSCRIPT}?'*|[<>]=|\\?\S")
LETTER = re.compile(r"(?i)[a-z]|[0-9]+ ?_|\\(?:(?:var)?(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa"
                    rf"|lambda|mu|nu|xi|pi|rho|sigma|tau|phi|chi|psi|omega)|infty|hbar|ell|angle){END}")
NO_NAME = re.compile(r"[-+/|]|\*\*|'[0-9.]|'\(")  # x, AB, f(x) and (x, y) are names


def extract_answer(response):
    r"""The last \boxed{...}, else what follows the last "answer is", else the last number, else ""."""
    text = str(response)
    if (boxed := last_box(text)) is not None:
        return boxed
    _, *after = re.split(r"(?i)answer is[\s:*$]*(?:\\[\[(]\s*)?", text)
    sentence = re.split(r"\.(?=\s|$)|\n", after[-1], maxsplit=1)[0].strip() if after else ""
    number = r"(?:(?<![\w)}])-)?(?:[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?"
    return sentence or (re.findall(number, text) or [""])[-1]


def last_box(text):
    r"""The content of the last \boxed{}, up to the end where it is not closed; None without a box."""
    (*before, content), depth = re.split(r"\\(?:boxed|fbox)\s*\{", text), 1
    if not before:
        return None
    # \{ and \} do not count; an answer beyond MAX_CHARS is never right, so need not be read
    for mark in re.finditer(r"\\.|[{}]", content[:MAX_CHARS], re.S):
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return content[:mark.start()].strip()
    return content.strip()


def is_correct(response, reference):
    """Whether the answer that a response ends with equals the reference."""
    return same_answer(extract_answer(response), reference)


def same_answer(prediction, reference):
    """Whether two answers are equal; never raises, and empty or overlong ones are never equal."""
    prediction, reference = _clean(str(prediction)), _clean(str(reference))
    if not prediction or not reference or TOKEN.findall(prediction) == TOKEN.findall(reference):
        return bool(prediction and reference)
    try:
        return _same(_parse(prediction), _parse(reference))
    except Exception:
        return False  # one is not understood


def _clean(text):
    text = text.translate(UNICODE) if len(text) <= MAX_CHARS else ""
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    if re.fullmatch(r"(?!\\?\{)[^,(\[]*(?<![0-9.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])[^,(\[]*", text):
        text = text.replace(",", "")
    text = text.strip(" *:,").rstrip(" *:,.;")
    words = r"\(?[A-D]\)?|(?i:no|[a-z'. -]*[a-z]{3}[a-z'. -]*)"  # or a choice; R-r, mg are not
    return text.casefold() if re.fullmatch(words, text) else text


def _parse(text):
    """A cleaned answer as (kind, parts), see _read. Raises ValueError and others if it is not understood."""
    tokens = [PYTHON.get(token, f"({token!r})") for token in TOKEN.findall(text)]
    source = re.sub(r"(?<=[)\]}])(?=[(\[{]|'\\)", "*", "".join(tokens))  # the signs between factors
    if "~" in source:  # +~ is \pm, and -~ is \mp: such an element counts twice
        elements = map(ast.unparse, ast.parse("{" + source.strip("{}") + "}", mode="eval").body.elts)
        source = ",".join(x for e in elements for x in sorted({e.replace("~", ""), e.replace("~", "-")}))
    return _read(ast.parse("{" + source + "}", mode="eval").body)


def _read(node):
    """(kind, parts): of a set, say, or ("value", (number, whether rounded, whether it has letters))."""
    match node:
        case ast.Set([element]):
            return _read(element)
        case ast.Set(parts) | ast.BoolOp(values=parts) | ast.Tuple([_, *_] as parts) | ast.List(parts):
            kind = type(node).__name__
        case ast.Compare(left, [ast.Eq() | ast.In()], [right]) if not NO_NAME.search(ast.unparse(left)):
            kind, parts = "named", [left, right]
        case ast.Compare(left, signs, others):
            kind, parts = " ".join(type(sign).__name__ for sign in signs), [left, *others]
            if "Gt" in kind and "Lt" not in kind:  # 5 > x >= 3 is 3 <= x < 5
                kind, parts = " ".join(kind.split()[::-1]).replace("Gt", "Lt"), parts[::-1]
        case _:
            names = [child.value for child in ast.walk(node) if isinstance(child, ast.Constant)]
            has_letters = any(name not in VALUES and LETTER.match(name) for name in names)
            return "value", (_value(node), any(map(ROUNDED.search, names)), has_letters)
    return kind, [_read(part) for part in parts]


def _value(node):
    """The value of a formula, a Fraction or complex. Raises ValueError and others if it has none."""
    match node:
        case ast.Constant(text) if re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", text):
            return Fraction(text)
        case ast.Constant(text) if text in VALUES:
            return VALUES[text]
        case ast.Constant(text) if LETTER.match(text):
            return Fraction(random.Random(re.sub("[ {}]", "", text)).randrange(500_000, 2_000_000), 999_983)
        case ast.UnaryOp(sign, number):
            return OPERATORS[type(sign)](_value(number))
        case ast.BinOp(left, sign, right):
            value = OPERATORS[type(sign)](_value(left), _value(right))
            if isinstance(value, Fraction) and max(abs(value.numerator), value.denominator) >> MAX_BITS:
                raise OverflowError("the arithmetic would become slow")
            return value
        case ast.Attribute(number, "factorial"):
            return _factorial(_value(number))
        case ast.Call(function, arguments):
            return _value(function)(*map(_value, arguments))
    raise ValueError("not a formula")


def _factorial(n):
    return Fraction(math.factorial(int(n))) if n in range(500) else math.gamma(n + 1)  # of a letter


def _power(base, exponent):
    """A Fraction where that is exact and not too large, else complex."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if (max(map(int.bit_length, base.as_integer_ratio())) - 1) * abs(exponent) <= MAX_BITS:
            return base ** int(exponent)
    power = complex(base) ** complex(exponent)  # raises OverflowError where it is too large
    if base and not power:
        raise OverflowError("too small")
    return power


def _same(prediction, reference):
    """The comparison of two trees, part by part."""
    (kind, parts), (wanted_kind, wanted) = prediction, reference
    if kind != wanted_kind and "named" in (kind, wanted_kind):  # x = 5 is the answer 5, but not y = 5
        return _same(parts[1], reference) if kind == "named" else _same(prediction, wanted[1])
    if kind == wanted_kind == "value":
        (a, a_rounded, a_letters), (b, b_rounded, b_letters) = parts, wanted
        exact = isinstance(a, Fraction) and isinstance(b, Fraction)  # else floats, such as roots
        whole = isinstance(b, Fraction) and b.denominator == 1 and not b_rounded
        rounded = (a_rounded or b_rounded) and not (whole or a_letters or b_letters)
        tolerance = TOLERANCE if rounded else 0 if exact else 1e-9
        return abs(a - b) <= tolerance * abs(b) < math.inf
    if kind != wanted_kind or len(parts) != len(wanted):
        return False
    if kind in ("Set", "BoolOp", "Eq"):  # in any order, each as often as in the reference
        return all(sum(_same(part, other) for part in parts) == wanted.count(other) for other in wanted)
    return all(map(_same, parts, wanted))


if __name__ == "__main__":
    os._exit(main())            # as train.py does
