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
import cmath
import contextlib
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
import torch.distributed as dist
from tqdm import tqdm

import cadft
from train import UserError, key, read_jsonl, say, together, world_and_rank

ORDER = ["base", "sft", "casft", "dft", "cadft"]               # of the table's rows; other methods follow
SHARES = ("greedy", "average_at_k")                            # the two that are compared
POWERS = [2 ** i for i in range(14)]                           # the k of pass@k
METRICS = (*SHARES, "pass_at_k", "cut_off", "mean_tokens")
# flag, type, default of your own problems, of the classroom's, range, help
FLAGS = [
    ("samples", int, 16, 16, "[0, 10000]", "answers sampled for each problem, beside the greedy one"),
    ("temperature", float, 1.0, 1.0, "(0, inf)", "of the samples"),
    ("top-p", float, 1.0, 1.0, "(0, 1]", "nucleus of the samples; 1 at temperature 1 is the model itself"),
    ("max-tokens", int, 4096, 96, "[1, inf)", "length limit; what is longer is cut off, and wrong"),
    ("batch-size", int, 64, 800, "[1, inf)", "answers that a process samples at once; changes the draw"),
    ("seed", int, 0, 0, "[0, 1e9]", "of sampling; each run's own seed is mixed in"),
    ("limit", int, None, None, "[1, inf)", "only so many problems of each file (or demonstrations)"),
    ("classroom-digits", int, None, None, "[1, 6]", "of the sums, where not those that the run learned"),
]
TEXTS = [
    ("prompt-template", 'wraps each question, "{prompt} Reason step by step." (the run\'s own)'),
    ("against", "the row that the others are compared to (dft)"),
    ("out", "folder for eval-NAME.jsonl (beside the model)"),
    ("results", "file of the summary (results.json beside the runs)"),
    ("grade", "a JSONL file with response and reference: grade these, sample nothing"),
    ("plot", "FILE.png: draw compatibility, weights, gradient norm and accuracy"),
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


@dataclass(slots=True)
class Problem:
    question: str
    reference: str
    where: str                                      # file and line


# ==== 1. From runs to a table ==============================================================================

def main(argv=None):
    """Run evaluate.py with these arguments; returns the exit code (0, or 2 for a mistake in the input)."""
    try:
        a, device = parse(argv), train.start_processes()
        if not a.data:
            torch.set_num_threads(train.THREADS)               # the last digits depend on it
        if a.gradients:
            gradient_study(find_runs(a), a, device)
            return 0
        results = grade_file(a.grade) if a.grade else evaluate(find_runs(a), a, device)
        if world_and_rank()[1] == 0:
            report(results, a)
        return 0
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def parse(argv):
    parser = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders or hub names, before all flags")
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE", help="JSONL files of problems")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), help="bfloat16 on CUDA")
    parser.add_argument("--gradients", action="store_true", help="study gradients, sample nothing")
    for flag, text in TEXTS:
        parser.add_argument("--" + flag, help=text)
    for flag, type_, own, classroom, interval, text in FLAGS:
        usual = "" if own is None else f"{own}; " if own == classroom else f"{own}; classroom {classroom}; "
        parser.add_argument("--" + flag, type=type_, metavar=type_.__name__.upper(),
                            help=f"{text} ({usual}range {interval})")
    a = parser.parse_args(argv)
    for flag, _, own, classroom, interval, _ in FLAGS:
        name = flag.replace("-", "_")
        if getattr(a, name) is None:
            setattr(a, name, own if a.data else classroom)
        elif not train.within(getattr(a, name), interval):
            raise UserError(f"--{flag} must lie in {interval}, got {getattr(a, name)}")
    if "{prompt}" not in (a.prompt_template or "{prompt}"):
        raise UserError("--prompt-template has no {prompt} in it: the question would be lost")
    if len({Path(path).stem for path in a.data}) < len(a.data):
        raise UserError("--data: two files of one name; their results would overwrite each other")
    if a.plot:
        pyplot()                                               # if it is missing, say so before the work
    a.dtype = a.dtype or ("bfloat16" if torch.cuda.is_available() and not a.gradients else "float32")
    return a


def find_runs(a):
    """The candidates named, or all finished runs under out/, base models included."""
    paths = a.runs or sorted(str(config.parent) for config in Path("out").glob("*/config.json"))
    if not paths:
        raise UserError("out/ holds no finished run: python train.py makes one; or name a folder")
    runs = [candidate(path) for path in dict.fromkeys(map(os.path.normpath, paths))]
    label(runs)
    labels = list(dict.fromkeys(run.label for run in runs))
    if a.against not in (None, *labels):
        raise UserError(f"--against {a.against}: there is no such row, only {', '.join(labels)}")
    return runs


def candidate(path):
    """What a folder says about the run in it. Raises UserError when there is no model."""
    folder, args = Path(path), {}
    hub = len(folder.parts) == 1 or len(folder.parts) == 2 and not folder.parent.is_dir()      # owner/name
    if not folder.is_dir() and (folder.exists() or not hub):
        raise UserError(f"{path}: no such folder; name that of a run, or a hub name")
    if folder.is_dir() and not (folder / "config.json").exists():
        raise UserError(f"{path}: no model there (no config.json); train.py --resume finishes a run")
    if (folder / "args.json").exists():
        try:
            args = dict(json.loads((folder / "args.json").read_text()))
        except (ValueError, TypeError, OSError) as error:
            raise UserError(f"{path}/args.json: not readable ({train.first_line(error)})") from None
    base = re.fullmatch(r"base-seed([0-9]+)", folder.name)
    return Candidate(path, "base" if base else args.get("method", path),
                     int(base[1]) if base else args.get("seed"), args)


def label(runs):
    """Name each run's row: the method and, where runs of it differ in more than the seed, in what."""
    taken = {}
    for run in runs:
        kin = [other.args for other in runs if other.method == run.method]
        names = sorted(set().union(*kin) - train.FREE - {"seed"})
        run.differs = {name: run.args.get(name) for name in names
                       if any(args.get(name) != run.args.get(name) for args in kin)}
        run.label = " ".join([run.method, *(f"{name}={value}" for name, value in run.differs.items())])
        again = taken[run.label, run.seed] = taken.get((run.label, run.seed), 0) + 1
        run.label += f" #{again}" if again > 1 else ""         # the same run twice is no second seed


def evaluate(runs, a, device):
    """Sample and grade every run on every set of problems. Returns a list of results, on every rank."""
    files = {Path(path).stem: load_problems(path, a.limit) for path in a.data}
    sets = [files or classroom_problems(run, a) for run in runs]
    total, results = sum(len(some) * (1 + a.samples) for each in sets for some in each.values()), []
    with tqdm(total=total, unit="answer", disable=None if world_and_rank()[1] == 0 else True) as bar:
        for run, each in zip(runs, sets):
            bar.set_description(run.path)
            lm, tokenizer = together(load, run, a, device)
            done = [result(run, name, evaluate_set(run, lm, tokenizer, name, some, a, bar))
                    for name, some in each.items()]
            results += done + ([average_of_files(run, done)] if len(done) > 1 else [])
            del lm                                             # before the next one comes
    return results


def load(run, a, device):
    lm, _ = train.load_model(run.path, getattr(torch, a.dtype), device)
    return lm.eval(), train.load_tokenizer(run.path)


def result(run, data, counted):
    numbers, per_problem = counted
    return {"run": run.path, "label": run.label, "method": run.method, "seed": run.seed,
            "differs": run.differs, "data": data, "numbers": numbers, "per_problem": per_problem}


def average_of_files(run, results):
    """The plain mean over files, as in the paper's table, and its standard error."""
    each = [r["numbers"] for r in results]
    numbers = {name: fold([n[name] for n in each], mean) for name in METRICS}
    errors = fold([n["standard_error"] for n in each], lambda some: math.hypot(*some) / len(some))
    numbers |= {"problems": sum(n["problems"] for n in each), "samples": each[0]["samples"],
                "standard_error": errors}
    return result(run, f"average of {len(each)} files", (numbers, None))


def report(results, a):
    """Print the table, write results.json, draw."""
    against = a.against or "dft"
    rows = compare(results, against)
    say(*table(rows, against))
    if a.results or not a.grade:
        runs = [{name: value for name, value in r.items() if name != "per_problem"} for r in results]
        write_results(a, settings={name: getattr(a, name) for name in vars(a) if name != "gradients"},
                      runs=runs, rows=rows)
    if a.plot:
        draw(a.plot, rows, results)


def write_results(a, **parts):
    """Put these parts into results.json; what else is in it stays."""
    beside = Path(a.runs[0]).parent if a.runs and os.path.isdir(a.runs[0]) else Path(a.out or "out")
    path = Path(a.results or beside / "results.json")
    with writing(path, "--results"):
        path.parent.mkdir(parents=True, exist_ok=True)
        old = json.loads(path.read_text()) if path.exists() else {}
        train.write_whole(path, json.dumps(dict(old) | parts, indent=1) + "\n")


@contextlib.contextmanager
def writing(path, flag):
    """What goes wrong with a file in here becomes a UserError."""
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: can't be written ({train.first_line(error)}); see {flag}") from None


# ==== 2. Sampling ==========================================================================================

def evaluate_set(run, lm, tokenizer, name, problems, a, bar):
    """Sample and grade one set of problems into eval-NAME.jsonl. Returns count's numbers, on every rank."""
    template = a.prompt_template or run.args.get("prompt_template")
    turns = [train.wrap([{"role": "user", "content": problem.question}], template) for problem in problems]
    prompts = train.encode_prompts(tokenizer, turns, [problem.where for problem in problems])
    positions = getattr(lm.config.get_text_config(), "max_position_embeddings", None) or math.inf
    for prompt, problem in zip(prompts, problems):
        if not 0 < len(prompt) < positions:
            raise UserError(f"{problem.where}: {len(prompt)} tokens; the model takes 1 to {positions - 1}")
    beside = not a.out and os.path.isdir(run.path) and os.access(run.path, os.W_OK)
    folder = Path(run.path if beside else Path(a.out or "out", run.path.strip("/").replace("/", "--")))
    todo, path = list(batches(prompts, a)), folder / f"eval-{name}.jsonl"
    together(sample_share, run, lm, tokenizer, problems, prompts, positions, todo, path, a, bar)
    return together(merge, path, todo, rank0=True)


def batches(prompts, a):
    """Yield (greedy, [(problem, sample), ...]); longest prompts first: lack of memory shows at once."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    for greedy, samples in (True, 1), (False, a.samples):
        pairs = ((i, sample) for i in order for sample in range(samples))
        while some := list(islice(pairs, a.batch_size)):
            yield greedy, some


def sample_share(run, lm, tokenizer, problems, prompts, positions, todo, path, a, bar):
    """Every world-th batch is this rank's; it is graded and goes to the rank's part of the file at once."""
    (world, rank), stops = world_and_rank(), train.eos_ids(lm, tokenizer)
    with writing(path, "--out"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path, "--out"), open(f"{path}.part{rank}", "w", encoding="utf-8") as file:
        for number in range(rank, len(todo), world):
            greedy, pairs = todo[number]
            some = [prompts[i] for i, _ in pairs]
            limit = min(a.max_tokens, positions - max(map(len, some)))
            temperature, seed = 0.0 if greedy else a.temperature, key(a.seed, run.seed, number)
            try:
                answers = cadft.nucleus_rewrite(lm, some, stops, train.pad_id(tokenizer), limit, a.top_p,
                                                temperature, seed)
            except torch.OutOfMemoryError:
                raise UserError(f"{run.path}: out of memory; lower --batch-size {a.batch_size}") from None
            for (i, sample), ids in zip(pairs, answers):
                row = {"problem": i, "sample": "greedy" if greedy else sample}
                row |= graded(problems[i], ids, stops, tokenizer, classroom=not a.data)
                print(json.dumps(row, ensure_ascii=False), file=file)
            file.flush()
            bar.update(sum(len(pairs) for _, pairs in todo[number:number + world]))    # other ranks' too


def graded(problem, ids, stops, tokenizer, classroom):
    """One answer as a row of eval-NAME.jsonl."""
    finished = ids[-1] in stops
    row = {"question": problem.question, "reference": problem.reference, "finished": finished,
           "response": tokenizer.decode(ids[:-1] if finished else ids), "tokens": len(ids),
           "grader": "sum" if classroom else "answer"}
    return row | {"correct": grade(row)}


def grade(row):
    """Whether a row's response is finished and right: a sum by its whole text, others by their answer."""
    right = train.is_sum if row.get("grader") == "sum" else is_correct
    return row.get("finished") is not False and right(row["response"], row["reference"])


def merge(path, todo):
    """Put all ranks' parts together, batch after batch: the same file for any number of ranks. Counts it."""
    draft = path.with_name(path.name + ".tmp")
    with writing(path, "--out"), contextlib.ExitStack() as stack:
        out = stack.enter_context(open(draft, "wb"))
        parts = [stack.enter_context(open(f"{path}.part{rank}", "rb"))
                 for rank in range(world_and_rank()[0])]
        for number, (_, pairs) in enumerate(todo):
            out.writelines(islice(parts[number % len(parts)], len(pairs)))
    os.replace(draft, path)
    for part in parts:
        os.remove(part.name)
    return count(row for _, row in read_jsonl(path))


# ==== 3. Problems ==========================================================================================

def classroom_problems(run, a):
    """{name: problems}: held-out sums, with as many digits as in the run's demonstrations."""
    digits = a.classroom_digits or run.args.get("classroom_digits") or 3
    some = [Problem(prompt, str(total), prompt) for prompt, total in train.test_problems(digits)]
    return {"classroom" if digits == 3 else f"classroom-{digits}-digits": some[:a.limit]}


def load_problems(path, limit=None):
    """JSONL -> problems: `question` or `problem`, and a reference. Raises UserError with file and line."""
    some = []
    for where, row in islice(read_jsonl(path), limit):
        question = row.get("question") or row.get("problem")
        if not isinstance(question, str):
            raise UserError(f'{where}: field "question" (or "problem") is missing or not a string')
        some.append(Problem(question, reference_of(row, where), where))
    if not some:
        raise UserError(f"{path}: no problem in it")
    return some


def reference_of(row, where):
    """`reference`, `answer` or `final_answer` (text, number, list), else the last box of `solution`."""
    for name in "reference", "answer", "final_answer":
        values = row.get(name) if isinstance(row.get(name), list) else [row.get(name)]
        if values and all(isinstance(value, (str, int, float)) and str(value).strip() for value in values):
            return ", ".join(map(str, values))
    boxed = last_box(row["solution"]) if isinstance(row.get("solution"), str) else None
    if not boxed:
        raise UserError(f'{where}: no reference in "answer", "final_answer" or a \\boxed{{}} of "solution"')
    return boxed


def grade_file(path):
    """Grade rows with response and reference; those with one problem, question or prompt are its samples."""
    def rows():
        for number, (where, row) in enumerate(read_jsonl(path)):
            if not isinstance(row.get("response"), str):
                raise UserError(f'{where}: field "response" is missing or not a string')
            row["reference"] = reference_of(row, where)
            named = [row[name] for name in ("problem", "question", "prompt") if row.get(name) is not None]
            yield row | {"problem": key(named[0]) if named else number, "correct": grade(row)}

    run = Candidate(path, Path(path).stem, None, label=Path(path).stem)
    return [result(run, Path(path).name, count(rows()))]


# ==== 4. Numbers and comparison ============================================================================

def count(rows):
    """Rows of answers -> (numbers, {share: [accuracy of each problem]}). Shares lie in [0, 1] or are None.

    numbers: problems; samples, the fewest of a problem; greedy; average_at_k; pass_at_k {k: share} for k =
    1, 2, 4 ...; cut_off and mean_tokens of the samples (without samples, of the greedy answers);
    standard_error of greedy and average_at_k, over problems. Raises UserError without a row.
    """
    right, cut, tokens = ({True: {}, False: {}}, {True: [], False: []}, {True: [], False: []})
    for row in rows:
        greedy = row.get("sample") == "greedy"
        right[greedy].setdefault(row["problem"], []).append(bool(row["correct"]))
        cut[greedy].append(row.get("finished") is False)
        tokens[greedy].append(row.get("tokens"))
    if not right[True] and not right[False]:
        raise UserError("there is no answer to grade")
    cut, tokens = cut[False] or cut[True], tokens[False] or tokens[True]
    sampled, samples = right[False].values(), min(map(len, right[False].values()), default=0)
    each = {share: [mean(some) for _, some in sorted(right[share == "greedy"].items())] for share in SHARES}
    return {"problems": len(right[True] | right[False]), "samples": samples,
            **{share: mean(values) for share, values in each.items()},
            "pass_at_k": {str(k): mean([pass_at_k(len(some), sum(some), k) for some in sampled])
                          for k in POWERS if k <= samples},
            "cut_off": mean(cut), "mean_tokens": None if None in tokens else mean(tokens),
            "standard_error": {share: standard_error(values) for share, values in each.items()}}, each


def pass_at_k(n, c, k):
    """1 - C(n-c, k) / C(n, k): from n samples with c right, the unbiased estimate that one of k is right."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def mean(values):
    return statistics.fmean(values) if values else None


def standard_error(values):
    """s / sqrt(n) of the mean of n values, s their sample standard deviation; None for fewer than two."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def fold(items, f):
    """f of the values under each key that all these nested dicts have: fold([{"a": 1}, {"a": 3}], mean)."""
    if isinstance(items[0], dict):
        return {name: fold([item[name] for item in items], f) for name in items[0]
                if all(name in item for item in items)}
    return None if None in items else f(items)


def compare(results, against):
    """A row for each label and set of problems: mean and standard error over runs; difference."""
    groups, place = {}, {}
    for r in results:
        place.setdefault(r["data"], len(place))
        rank = ORDER.index(r["method"]) if r["method"] in ORDER else len(ORDER)
        groups.setdefault((place[r["data"]], rank, r["data"], r["label"]), []).append(r)
    rows, found = [], {group[2:]: some for group, some in groups.items()}
    for (_, _, data, name), some in sorted(groups.items(), key=lambda item: item[0][:2]):
        numbers, values = some[0]["numbers"], [{m: r["numbers"][m] for m in METRICS} for r in some]
        errors = fold(values, standard_error) if len(some) > 1 else numbers["standard_error"]
        row = {"data": data, "label": name, "problems": numbers["problems"], "samples": numbers["samples"],
               "seeds": [r["seed"] for r in some], "mean": fold(values, mean), "standard_error": errors}
        if name != against and (data, against) in found:
            row["difference"] = difference(some, found[data, against])
        rows.append(row)
    return rows


def difference(ours, theirs):
    """Mean difference over the common seeds, with its standard error: of a single seed, over problems."""
    theirs = {r["seed"]: r for r in theirs}
    pairs = [(r, theirs[r["seed"]]) for r in ours if r["seed"] in theirs]
    out = {"seeds": [r["seed"] for r, _ in pairs]}
    for share in SHARES:
        values = [tuple(r["numbers"][share] for r in pair) for pair in pairs]
        if len(pairs) == 1 and all(r["per_problem"] for r in pairs[0]):
            values = list(zip(*(r["per_problem"][share] for r in pairs[0])))
        values = [x - y for x, y in values if None not in (x, y)]
        out[share] = {"mean": mean(values), "standard_error": standard_error(values)}
    return out


def table(rows, against):
    """The rows as lines of text, a table for each set of problems."""
    lines = []
    for data in dict.fromkeys(row["data"] for row in rows):
        some = [row for row in rows if row["data"] == data]
        average = f"Average@{some[0]['samples']}"
        top = max(some[0]["mean"]["pass_at_k"], key=int, default="k")
        cells = [["method", "greedy", average, f"pass@{top}", "cut off", "tokens", "seeds",
                  f"greedy - {against}", f"{average} - {against}"]]
        for row in some:
            means, error, paired = row["mean"], row["standard_error"], row.get("difference", {})
            length = "-" if means["mean_tokens"] is None else f"{means['mean_tokens']:.1f}"
            cells.append([row["label"], *(percent(means[share], error[share]) for share in SHARES),
                          percent(means["pass_at_k"].get(top)), percent(means["cut_off"]), length,
                          str(len(row["seeds"])), *(percent(*paired.get(share, {}).values(), sign="+")
                                                    for share in SHARES)])
        lines += [f"{data}: {some[0]['problems']} problems", *aligned(cells)]
    return [*lines, "Percent ± standard error: over seeds; over problems where a row is a single run."]


def percent(value=None, error=None, sign=""):
    spread = "" if error is None else f" ± {100 * error:.1f}"
    return "-" if value is None else f"{100 * value:{sign}.1f}{spread}"


def aligned(cells):
    """Rows of cells as lines of text; columns that hold no value are left out."""
    columns = [column for column in zip(*cells) if set(column[1:]) != {"-"}]
    pads = [str.ljust, *[str.rjust] * (len(columns) - 1)]
    padded = [[pad(cell, max(map(len, column))) for cell in column] for pad, column in zip(pads, columns)]
    return ["  ".join(row) for row in zip(*padded)]


# ==== 5. Gradients =========================================================================================

LOSSES = {"sft": cadft.sft_loss, "dft": cadft.dft_loss}


def gradient_study(runs, a, device):
    """Assumption: incompatible samples have large gradients. Claim: weights lower the gradient's variance.

    Both are measured on held-back demonstrations; the tables (means over seeds) also go to results.json.
    """
    if world_and_rank()[0] > 1:
        raise UserError("--gradients runs in one process: start it without torchrun")
    studies = {}
    for run in tqdm(runs, desc="gradients", unit="model", disable=None):
        lm, tokenizer = load(run, a, device)
        found = study(lm, held_back(run, tokenizer, a, device), run.args.get("beta") or 1.0)
        studies.setdefault(run.label, []).append((run.seed, found))
    out = {}
    for name, some in studies.items():
        seeds, each = zip(*some)
        out[name] = {"seeds": seeds, "mean": fold(each, mean), "standard_error": fold(each, standard_error)}
        say(f"{name}: {each[0]['samples']} held-back demonstrations, {len(seeds)} seed(s)",
            *gradient_tables(out[name]["mean"], out[name]["standard_error"]), "")
    write_results(a, gradients=out)


def held_back(run, tokenizer, a, device):
    """Demonstrations as [(micro-batch of one, kind)]: of --data, or new ones like those of the run."""
    usual = {"prompt_field": None, "response_field": None, "prompt_template": None, "max_length": 2048,
             "seed": run.seed, "classroom_digits": 3, "incompatible": 0.4, "kinds": list(train.KINDS)}
    own = {name: value for name, value in run.args.items() if value not in (None, [])}
    given = {"data": a.data[0] if a.data else None, "classroom_size": a.limit or 256}
    given |= {"prompt_template": a.prompt_template} if a.prompt_template else {}
    fields = argparse.Namespace(**usual | own | given)
    rows = None if a.data else train.classroom_rows(fields, split="held back")
    examples, *_ = train.load_examples(fields, tokenizer, rows)
    return [(train.collate([e], tokenizer, device), e.kind) for e in examples[:a.limit or 256]]


def study(lm, examples, beta):
    """All numbers of the study for one model, as a nested dict."""
    if len(examples) <= 32:
        raise UserError(f"--gradients needs more than 32 demonstrations, a batch; there are {len(examples)}")
    c_raw, gram = sample_gradients(lm, [batch for batch, _ in examples])
    c_hat = cadft.batch_zscore(c_raw)                                          # [N] over all these samples
    norms = {loss: g.diagonal().sqrt() for loss, g in gram.items()}            # {loss: [N]}
    kinds = {}
    for i, (_, kind) in enumerate(examples):
        kinds.setdefault(kind or "all", []).append(i)
    means = lambda at: {"n": len(at)} | {
        name: x[at].mean().item() for name, x in ({"c_raw": c_raw, "c_hat": c_hat} | norms).items()}
    return {"samples": len(examples),
            "correlation": {loss: {"pearson": pearson(c_hat, x), "spearman": pearson(ranks(c_hat), ranks(x))}
                            for loss, x in norms.items()},
            "fifths": {str(i): means(at) for i, at in enumerate(c_hat.argsort().tensor_split(5), 1)},
            "kinds": {kind: means(at) for kind, at in sorted(kinds.items())},
            "batch": {method: batch_gradient(gram[method[-3:]], c_raw, beta if weighted else 0.0)
                      for method, (_, weighted) in train.METHODS.items()}}


def sample_gradients(lm, batches):
    """c_raw [N], nats per token, and {loss: [N, N]}, the inner products of the samples' gradients g_i."""
    weights = [p for p in lm.parameters() if p.requires_grad]
    size = sum(p.numel() for p in weights)
    if 4 * size * len(batches) > 4e9:
        raise UserError(f"--gradients would keep {len(batches)} gradients of {size:,} numbers, too many; "
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
    the latter from pairs of different batches, so without bias. relative_*: divided by it, since weights
    shorten the gradient as well. Section: Compatibility-Aware Objective (the variance argument).
    """
    draw, w = torch.Generator().manual_seed(0), torch.zeros(draws, len(c_raw), dtype=torch.float64)
    for row in w:                                              # [N] w_i / |B| for i in B, else 0
        batch = torch.randperm(len(c_raw), generator=draw)[:size]
        row[batch] = cadft.compatibility_weight(cadft.batch_zscore(c_raw[batch]), beta) / len(batch)
    inner = w @ gram @ w.T                                     # [draws, draws] <g_B, g_B'>
    second = inner.diagonal().mean().item()
    squared = (inner.sum().item() - draws * second) / (draws * (draws - 1))
    return {"second_moment": second, "mean_squared": squared, "variance": second - squared,
            "relative_second_moment": second / squared, "relative_variance": second / squared - 1}


def pearson(x, y):
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()


def ranks(x):
    """Ranks from 1, [N]; equal values share their mean. Pearson's coefficient of ranks is Spearman's."""
    _, which, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[which].to(x.dtype)


def gradient_tables(means, errors):
    """The study as lines of text."""
    def cells(part, row):
        m, e = means[part][row], errors[part][row] if part in ("correlation", "batch") else {}
        return [row, *(f"{m[name]:.3g}" + (f" ± {e[name]:.1g}" if e.get(name) else "") for name in m)]

    lines = []
    for part, title in [("correlation", "gradient norm and c_hat"), ("fifths", "fifth of samples by c_hat"),
                        ("kinds", "kind"), ("batch", "gradient of 32 samples")]:
        head = [title, *(name.replace("_", " ") for name in next(iter(means[part].values())))]
        lines += aligned([[name + " norm" if name in LOSSES else name for name in head],
                          *(cells(part, name) for name in means[part])])
    return lines


# ==== 6. Pictures ==========================================================================================

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]     # Okabe and Ito's


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")                                      # no window
    from matplotlib import pyplot as plt
    return plt


def draw(path, rows, results):
    """c_raw and w by kind, gradient norm, accuracy: means over the runs of each row."""
    plt, rows = pyplot(), [row for row in rows if row["data"] == rows[0]["data"]]
    plt.rcParams.update({"font.size": 17, "lines.linewidth": 3})
    figure, ((compatibility, weights), (norms, accuracy)) = plt.subplots(2, 2, figsize=(18, 12),
                                                                         layout="constrained")
    logs = {row["label"]: read_logs(results, row) for row in rows}
    logs = {name: some for name, some in logs.items() if some}
    kinds = {name: {kind for log in some for line in log for kind in line["kinds"]}
             for name, some in logs.items()}
    if any(kinds.values()):
        name = "cadft" if kinds.get("cadft") else [name for name in kinds if kinds[name]][-1]
        for axis, value, unit in (compatibility, "c_raw", "nats per token"), (weights, "w", "mean w"):
            curves(axis, {kind: running_mean(logs[name], lambda line: line["kinds"].get(kind, {}), value)
                          for kind in sorted(kinds[name])}, f"{name}: {value} by kind", unit)
    if logs:
        lines = {name: running_mean(some, lambda line: line, "grad_norm") for name, some in logs.items()}
        curves(norms, lines, "Gradient norm, before clipping", "norm")
    bars(accuracy, rows)
    with writing(path, "--plot"):
        figure.savefig(path, dpi=100)


def read_logs(results, row):
    paths = [Path(r["run"], "log.jsonl") for r in results
             if (r["data"], r["label"]) == (row["data"], row["label"])]
    return [[line for _, line in read_jsonl(path)] for path in paths if path.exists()]


def running_mean(logs, part, value):
    """[S] mean of part(line)[value] over runs and an epoch (at most a tenth of the run) around each step."""
    steps = min(map(len, logs))
    width = min(sum(line["epoch"] == 1 for line in logs[0]), steps // 10) | 1      # odd: centred
    box, sums = torch.ones(1, 1, width, dtype=torch.float64), []
    for number in (lambda p: p.get("n", 1) * p[value] if p else 0.0), (lambda p: p.get("n", 1) if p else 0):
        x = torch.tensor([[number(part(line)) for line in log[:steps]] for log in logs]).double().sum(0)
        sums.append(torch.nn.functional.conv1d(x[None, None], box, padding="same")[0, 0])
    return (sums[0] / sums[1]).tolist()                        # nan where there was none


def curves(axis, lines, title, unit):
    """Lines over the steps, each with its name at its end; names are pushed apart where they would touch."""
    for colour, (name, values) in zip(COLOURS * len(lines), lines.items()):
        axis.plot(range(1, len(values) + 1), values, color=colour, label=name)
    axis.set(title=title, xlabel="optimizer step", ylabel=unit, ylim=(0, None))
    top, at, ceiling = axis.get_ylim()[1], [-1.0], 1.0
    last = lambda line: [y for y in line.get_ydata() if y == y][-1] / top
    ends = sorted(axis.get_lines(), key=last)
    for line in ends:
        at.append(max(at[-1] + 0.065, last(line)))
    for line, height in zip(ends[::-1], at[::-1]):
        ceiling = min(ceiling, height) - 0.065
        axis.text(1.01, ceiling + 0.065, line.get_label(), color=line.get_color(), transform=axis.transAxes,
                  va="center")


def bars(axis, rows):
    """Greedy and Average@k of each row, in percent, with standard errors."""
    names = "greedy", f"Average@{rows[0]['samples']}"
    for side, colour, share, name in zip((-0.2, 0.2), COLOURS[5::-5], SHARES, names):
        for i, row in enumerate(rows):
            m, e = row["mean"][share], row["standard_error"][share]
            axis.bar(i + side, 100 * (m or 0), 0.38, color=colour, yerr=100 * (e or 0), capsize=6,
                     error_kw={"elinewidth": 2.5}, label=None if i else name)
    axis.set_xticks(range(len(rows)), [row["label"].replace(" ", "\n") for row in rows])
    axis.set(title="Accuracy, with standard errors", ylabel="correct (%)")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)


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
