"""Sample answers, grade them, compare runs: did it get better, than what, by how much, and how sure is that?

    python evaluate.py                                 every finished run under out/, on the classroom's sums
    python evaluate.py RUN ... --against dft           these folders or hub names, compared to one row
    python evaluate.py RUN ... --data A.jsonl B.jsonl  your own problems; of several files also the average
    python evaluate.py --grade FILE.jsonl              grade answers that were sampled elsewhere
    python evaluate.py RUN ... --gradients             gradient norms, second moments: the paper's argument
    torchrun --nproc-per-node=8 evaluate.py ...        the same numbers, on eight processes

 1. Correct: the answer ended with an end-of-sequence token and is the reference's. Cut off is wrong.
 2. Average@k is the mean accuracy of k samples a problem; pass@k the share of problems with one right.
 3. Runs out/NAME-seed0, out/NAME-seed1, ... are one row, NAME. Its standard error is over seeds, that of a
    single run over problems (its k samples are not independent). Differences are paired in the same unit.
 4. Each batch of samples has its own seed, made of --seed, the run's seed and the batch's number. So the
    number of processes changes nothing. Another --batch-size draws other samples, as another --seed would.

Dimensions: P problems, S runs of a row, M = 5 numbers of a problem, N demonstrations.
"""
import importlib
import json
import logging
import math
import os
import re
import threading
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

import cadft
import train
from train import Mistake

ORDER = ["base", "sft", "focal", "casft", "dft", "cadft"]      # of the table's rows; others follow
NUMBERS = ["greedy", "average", "any", "cut off", "tokens"]    # M: what is known of a problem


# ==== Runs ==================================================================================================

def find_runs(paths):
    """The runs named, or all finished ones under out/, as dicts of path, home, row, seed and args.

    out/cadft-seed0 is seed 0 of row cadft. Rows of one name in two folders are kept apart by the folder's.
    """
    paths = paths or [path for path in sorted(Path("out").glob("[!.]*")) if train.finished(path)]
    if not paths:
        raise Mistake("out/ holds no finished run: python train.py makes one; or name a folder")
    runs = []
    for path in dict.fromkeys(Path(os.path.normpath(path)) for path in paths):
        if path.exists() and not train.finished(path):
            raise Mistake(f"{path}: no finished model there (no config.json, or a checkpoint: see --resume)")
        if not path.exists() and (len(path.parts) > 2 or path.parts[0] == "out"):
            raise Mistake(f"{path}: no such folder; name that of a run, or a hub name")
        name = path.resolve().name if path.exists() else path.as_posix()
        row, seed = re.fullmatch("(.+?)(?:-seed([0-9]+))?", name).groups()
        runs.append({"path": path.as_posix(), "home": path.parent.as_posix(), "row": row,
                     "seed": seed and int(seed), "args": train.read_json(path / "args.json")})
    homes = {(run["row"], run["home"]) for run in runs}
    for run in runs:
        if any(row == run["row"] and home != run["home"] for row, home in homes):
            run["row"] = f"{run['home']}/{run['row']}"
    return runs


def differing_runs(runs):
    """A line for each row whose runs differ in more than the seed, in their data above all."""
    lines = []
    for row in dict.fromkeys(run["row"] for run in runs):
        args = [run["args"] for run in runs if run["row"] == row]
        names = set().union(*args) - {*train.MAY_DIFFER, "seed"}
        differ = [name for name in sorted(names) if any(one.get(name) != args[0].get(name) for one in args)]
        if differ:
            lines.append(f"row {row}: runs differ in {', '.join(differ)}; "
                         "they are not seeds of one experiment")
    return lines


# ==== Sampling ==============================================================================================

def evaluate_run(run, files, a):
    """Results of a run on {name: problems}; rank 0 writes the answers to eval-NAME.jsonl."""
    lm, tokenizer = train.load_model(run["path"], torch.bfloat16 if train.CUDA and a.data else torch.float32)
    folder, results = Path(run["path"]), []
    if a.out or not folder.exists():
        folder = Path(a.out or "out", run["path"].strip("/").replace("/", "--"))
    for name, problems in files.items():
        rows = sample_answers(lm.eval(), tokenizer, run, problems, a)
        train.write_rows(folder / f"eval-{name}.jsonl", rows, "w")
        results.append(result(run, name, rows))
    return results


def sample_answers(lm, tokenizer, run, problems, a):
    """Rows of eval-NAME.jsonl, on every rank: a greedy answer and a.samples samples a problem, graded."""
    template = a.prompt_template or run["args"].get("prompt_template") or "{prompt}"
    prompts = [encode_question(lm, tokenizer, problem, template) for problem in problems]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))        # lack of memory shows at once
    greedy = [(i, "greedy") for i in order]
    sampled = [(i, sample) for i in order for sample in range(a.samples)]
    batches = [pairs[at:at + a.batch_size] for pairs in (greedy, sampled)
               for at in range(0, len(pairs), a.batch_size)]                   # of (problem, sample)
    stops, rows = lm.generation_config.eos_token_id, []                        # rows: (batch number, row)
    mine = range(train.RANK, len(batches), train.WORLD)
    for number in tqdm(mine, run["row"], unit="batch", disable=train.RANK > 0 or None):
        asked = [prompts[i] for i, _ in batches[number]]
        temperature = 0.0 if batches[number][0][1] == "greedy" else a.temperature
        limit = min(a.max_tokens, train.positions(lm) - max(map(len, asked)))
        seed = train.seed_for(a.seed, run["seed"], number)
        new = cadft.nucleus_sample(lm, asked, stops, stops[0], limit, a.top_p, temperature, seed)
        for (i, sample), prompt, ids in zip(batches[number], asked, new):
            row = {"problem": i, "sample": sample, **problems[i]["row"], "tokens": len(ids)}
            row["finished"] = ids[-1] in stops
            row["response"] = train.response_text(tokenizer, prompt, ids[:-1] if row["finished"] else ids)
            row["correct"] = grade(row)
            rows.append((number, row))
    gathered = [pair for part in train.gather_objects(rows) for pair in part]
    return [row for _, row in sorted(gathered, key=lambda pair: pair[0])]


def encode_question(lm, tokenizer, problem, template):
    """The token ids of a problem's prompt, made as in training."""
    try:
        _, ids = train.written(tokenizer, train.wrap(problem["turns"], template), problem["tools"])
    except Mistake as mistake:
        raise Mistake(f"{problem['where']}: {mistake}") from mistake
    room = train.positions(lm) - 1
    if not 0 < len(ids) <= room:
        raise Mistake(f"{problem['where']}: {len(ids)} tokens, but the model takes 1 to {room}: leave it out")
    return list(ids)


# ==== Problems ==============================================================================================

def classroom_rows(digits):
    """Yield (line, row) of 100 held-out sums, as train.read_jsonl does of a file."""
    for line, (x, y) in enumerate(train.problems(digits, 100), 1):
        yield line, {"question": f"{x}+{y}:", "reference": str(x + y), "grader": "sum"}


def load_problems(name, rows):
    """Dicts of where, turns and tools to ask with, and row, the problem's part of eval-NAME.jsonl."""
    problems = []
    for line, row in rows:
        where = f"{name}, line {line}"
        turns, question = row.get("messages"), row.get("question", row.get("problem"))
        if isinstance(question, str) and question.strip():
            turns = [{"role": "user", "content": question}]
        try:
            last = max(i for i, turn in enumerate(turns) if turn["role"] == "user" and turn["content"])
        except (TypeError, KeyError, ValueError):
            raise Mistake(f'{where}: needs text in "question" or "problem", or a user turn in "messages"')
        told = {"question": turns[last]["content"], "reference": reference_of(row, where)}
        told |= {"grader": row["grader"]} if "grader" in row else {}
        problems.append({"where": where, "turns": turns[:last + 1], "tools": row.get("tools"), "row": told})
    if not problems:
        raise Mistake(f"{name}: no problem in it")
    return problems


def reference_of(row, where):
    """`reference`, `answer` or `final_answer` (text, number or list), else the last box of `solution`."""
    fields = [field for field in ("reference", "answer", "final_answer") if field in row]
    value = row[fields[0]] if fields else last_box(str(row.get("solution")))
    values = value if isinstance(value, list) else [value]
    texts = [str(one).split("####")[-1].strip() for one in values]             # GSM8K's end in #### 18
    known = all(isinstance(one, (str, int, float)) for one in values)
    if not known or not texts or {text.lower() for text in texts} & {"", "nan", "null"}:
        raise Mistake(f'{where}: no reference in "reference", "answer", "final_answer" or the last box of '
                      f'"solution": {value!r} is no answer')
    return ", ".join(texts)


def grade_file(path):
    """The result of answers sampled elsewhere; rows with one problem, question or prompt are its samples."""
    rows = []
    for line, row in train.read_jsonl(path):
        if "passed" not in row:
            row["reference"] = reference_of(row, f"{path}, line {line}")
            if not isinstance(row.get("response"), str):
                raise Mistake(f'{path}, line {line}: "response" is missing or not a string')
        named = [row[field] for field in ("problem", "question", "prompt", "task_id") if field in row]
        row["problem"] = json.dumps(named[0] if named else [line])
        row["correct"] = grade(row)
        rows.append(row)
    if not rows:
        raise Mistake(f"{path}: there is no answer in it")
    return result({"path": path, "row": Path(path).stem, "seed": None}, Path(path).name, rows)


# ==== Grading ===============================================================================================

def grade(row):
    """Whether a row's response is right: as another program judged (`passed`), else finished and equal."""
    if "passed" in row:
        return str(row["passed"]).lower() in ("true", "1")
    equal = train.is_sum if row.get("grader") == "sum" else is_correct
    return row.get("finished") is not False and equal(row["response"], row["reference"])


def is_correct(response, reference):
    """Whether the answer that a response ends with equals the reference, as math-verify understands them.

    Equal spelling is equal; empty is never right. sympy computes what an answer says, for five seconds at
    most: that limit is a signal, which only the main thread of a Unix process gets. Elsewhere there is none.
    """
    library = needed("math_verify", "math-verify")
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    alarm = os.name == "posix" and threading.current_thread() is threading.main_thread()
    seconds = 5 if alarm else None
    answer, reference = extract_answer(response)[-500:], str(reference)[:500]
    whole = answer == str(response).split("</think>")[-1].strip()[-500:]
    spelt, wanted = (re.sub(r"[\s$]", "", text) for text in (answer, reference))
    if spelt == wanted or not spelt or not wanted:
        return bool(spelt and wanted)
    # 4.5e33 would be 4.5 times Euler's e times 33
    answer, reference = (re.sub(r"(?<=[0-9])[eE]([+-]?[0-9]+)", r" \\cdot 10^{\1}", text)
                         for text in (answer, reference))
    sentence = whole and re.search(r"(?<!\\)\b[a-zA-Z']{2,} ", answer)
    gold = library.parse(f"${reference}$", parsing_timeout=seconds)
    found = library.parse(answer if sentence else f"${answer}$", parsing_timeout=seconds)
    if not library.verify(gold, found, float_rounding=4, timeout_seconds=seconds):
        return False
    try:                                                       # that rounding lets 3.2e-20 pass for 1.6e-20
        return math.isclose(float(found[0]), float(gold[0]), rel_tol=1e-4)
    except (TypeError, ValueError, OverflowError, IndexError):
        return True                                            # no plain numbers


def extract_answer(response):
    """Behind </think>: the last box, else the first #### line, else behind the last "answer is", else all."""
    text = str(response).split("</think>")[-1].strip()
    box = last_box(text)
    if box is not None:
        return box
    if "####" in text:                                         # the first: small models run on
        return text.split("####")[1].strip().split("\n")[0]
    said = re.split(r"(?i)\banswers?[\s*_}]*(?:is|are|:|=)[\s:*_$}]*", text)[1:]
    sentence = re.split(r"\.(?=\s|$)|\n", said[-1])[0].strip("*_ ") if said else ""
    return sentence or text


def last_box(text):
    r"""The content of the last \boxed{} or \fbox{}, or of \boxed 2; None without one."""
    boxes = list(re.finditer(r"\\(?:boxed|fbox)(?:\s*\{|\s+([^\s{}$]+))", text))
    if not boxes:
        return None
    if boxes[-1][1]:
        return boxes[-1][1].rstrip(".,")
    content, depth = text[boxes[-1].end():], 1
    for mark in re.finditer(r"\\.|[{}]", content, re.DOTALL):  # \{ and \} don't count
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return content[:mark.start()].strip()
    return content.strip()                                     # it was not closed


def needed(module, package):
    """Import an optional module; without it, say in one line how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise Mistake(f"{package} is needed for this: pip install {package}") from None


# ==== Numbers ===============================================================================================
# An estimate is [2, M]: means and standard errors of the numbers; nan is what is not known.

def result(run, data, rows):
    """What a run's graded answers say: run, data, k, and `each` [P, M], the numbers of each problem."""
    problems, each, counts = {}, [], set()
    for row in rows:
        problems.setdefault(row["problem"], []).append(row)
    for _, answers in sorted(problems.items()):
        greedy = [row["correct"] for row in answers if row.get("sample") == "greedy"]
        samples = [row for row in answers if row.get("sample") != "greedy"]
        right = [row["correct"] for row in samples]
        cut = [row.get("finished") is False for row in samples or answers]
        tokens = [row.get("tokens", math.nan) for row in samples or answers]
        each.append([*(torch.tensor(x).double().mean() for x in (greedy, right)),
                     max(right, default=math.nan), *(torch.tensor(x).double().mean() for x in (cut, tokens))])
        counts.add(len(right))
    k = "-".join(str(count) for count in sorted({min(counts), max(counts)}))   # "16"; of ragged files "3-4"
    return {"run": run, "data": data, "k": k, "each": torch.tensor(each, dtype=torch.float64)}


def estimate(each):
    """[S, P, M] -> [2, M]: means and standard errors, over runs; of a single run over its problems."""
    values = each[0] if len(each) == 1 else each.mean(1)                       # [P, M] or [S, M]
    n, mean = len(values), values.mean(0)
    return torch.stack([mean, ((values - mean).square().sum(0) / (n * (n - 1))).sqrt()])       # n = 1: nan


def compare(results, against):
    """A row of the table for each set of problems and name: estimates of its values, and of its difference
    to row `against` over pairs of the same seed (a hub model has no seed: it meets them all)."""
    rows = []
    named = {}                                                 # (data, name) -> results
    for one in results:
        named.setdefault((one["data"], one["run"]["row"]), []).append(one)
    sets = [data for data, _ in named]
    for data, name in sorted(named, key=lambda key: (sets.index(key[0]), [*ORDER, key[1]].index(key[1]))):
        ours, theirs = named[data, name], named.get((data, against), [])
        pairs = [one["each"] - other["each"] for one in ours for other in theirs if name != against
                 and (one["run"]["seed"] == other["run"]["seed"]
                      or None in (one["run"]["seed"], other["run"]["seed"]))]
        rows.append({"data": data, "row": name, "k": ours[0]["k"], "problems": len(ours[0]["each"]),
                     "runs": [one["run"] for one in ours],
                     "values": estimate(torch.stack([one["each"] for one in ours])),
                     "difference": estimate(torch.stack(pairs)) if pairs else torch.full((2, 5), math.nan)})
    return rows


def average_of_files(rows):
    """Rows with the plain mean over files, as in the paper's table; the files' errors are independent."""
    averages = []
    for name in dict.fromkeys(row["row"] for row in rows):
        files = [row for row in rows if row["row"] == name]
        total = {"data": f"average of {len(files)} files", "problems": sum(row["problems"] for row in files)}
        for part in "values", "difference":
            means, errors = torch.stack([row[part] for row in files], dim=1)   # [files, M] each
            total[part] = torch.stack([means.mean(0), errors.norm(dim=0) / len(files)])
        averages.append(files[0] | total)
    return averages


def table(rows, against):
    """The rows as lines of text, with a head for each set of problems."""
    lines, data, width = [], None, max(len(row["row"]) for row in rows)
    for row in rows:
        if row["data"] != data:
            data = row["data"]
            heads = ["greedy", f"Average@{row['k']}", f"pass@{row['k']}", "cut off", "tokens", "seeds",
                     f" greedy - {against}", f" Average - {against}"]
            lines.append(f"{data}: {row['problems']} problems")
            lines.append(" " * width + "".join(head.rjust(16) for head in heads))
        cells = [percent(row["values"], i) for i in range(4)]
        cells += [f"{row['values'][0, 4]:.1f}".replace("nan", "-"), f"{len(row['runs'])}"]
        cells += [percent(row["difference"], i, "+") for i in (0, 1)]
        lines.append(row["row"].ljust(width) + "".join(cell.rjust(16) for cell in cells))
    return [*lines, "Percent ± standard error: over seeds; over problems where a row is a single run."]


def percent(numbers, i, sign=""):
    """Number i of an estimate as text; "-" for nan."""
    mean, error = (100 * numbers[:, i]).tolist()
    return "-" if math.isnan(mean) else f"{mean:{sign}.1f}" + ("" if math.isnan(error) else f" ± {error:.1f}")


# ==== Gradients =============================================================================================

def gradient_study(runs, a):
    """{row: {what: one number a run}}. The assumption: incompatible samples have large gradients. The claim:
    weights lower E||g||^2. On demonstrations of --data, or on newly drawn sums like the run's own."""
    found = {}
    for run in tqdm(runs, "gradients", unit="run", disable=None):
        own = train.parse(["--model", run["path"], "--data", a.data[0]] if a.data else [])
        vars(own).update((name, value) for name, value in run["args"].items() if value is not None)
        own.data, own.classroom_size = "".join(a.data), a.limit or 256
        rows = train.read_jsonl(own.data) if a.data else train.classroom_rows(own, split="held back")
        lm, tokenizer = train.load_model(run["path"], torch.float32)
        examples, _ = train.load_examples(own, tokenizer, islice(rows, a.limit or 256))
        c_raw, squared = gradient_norms(lm.eval(), [train.collate([example]) for example in examples])
        c_hat = cadft.batch_zscore(c_raw, own.eps)                             # [N]
        w = cadft.compatibility_weight(c_hat, own.beta)                        # [N]
        numbers = {"demonstrations": len(examples)}
        for loss, method in ("sft", "casft"), ("dft", "cadft"):
            both = torch.stack([c_hat, squared[loss].sqrt()])                  # [2, N] c_hat, ||g||
            for way, x in ("Pearson", both), ("Spearman", both.argsort().argsort().double()):
                numbers[f"c_hat and ||g|| of {loss}, {way}"] = torch.corrcoef(x)[0, 1].item()
            second = (w.square() * squared[loss]).mean() / squared[loss].mean()
            numbers[f"E||w g||^2 / E||g||^2, {method}"] = second.item()
        for name, value in numbers.items():
            found.setdefault(run["row"], {}).setdefault(name, []).append(value)
    return found


def gradient_norms(lm, batches):
    """Of N batches of one, in float64: c_raw [N], nats per token; ||g||^2 [N] of the SFT and the DFT loss."""
    c_raw, squared = [], {"sft": [], "dft": []}
    for batch in batches:
        nll, mask = cadft.token_nll(lm, batch["input_ids"], None, batch["labels"])
        c_raw.append(cadft.compatibility(nll, mask).item())
        for name, loss in ("sft", cadft.sft_loss), ("dft", cadft.dft_loss):
            g = torch.autograd.grad(loss(nll, mask).sum(), list(lm.parameters()), retain_graph=name == "sft")
            squared[name].append(sum(part.square().sum().item() for part in g))
    return torch.tensor(c_raw).double(), {name: torch.tensor(x).double() for name, x in squared.items()}


# ==== The picture ===========================================================================================

def draw(path, rows):
    """Two panels: w by kind in the last row with kinds, a mean over ten steps each; accuracy and errors."""
    figure, style = needed("matplotlib.figure", "matplotlib"), needed("matplotlib.style", "matplotlib")
    style.use(["tableau-colorblind10", {"font.size": 18, "lines.linewidth": 3, "legend.frameon": False}])
    picture = figure.Figure(figsize=(20, 8), layout="constrained")
    weights, bars = picture.subplots(1, 2)
    rows = [row for row in rows if row["data"] == rows[0]["data"]]
    last, curves = "", {}                                      # kind -> {middle of ten steps: values of w}
    for row in rows:
        logs = [Path(run["path"], "log.jsonl") for run in row["runs"]]
        lines = [line for log in logs if log.exists() for _, line in train.read_jsonl(log)]
        if any(line["kinds"] for line in lines):
            last, curves = row["row"], {}
        for line in lines:
            for kind, numbers in line["kinds"].items():
                middle = (line["step"] - 1) // 10 * 10 + 5.5
                curves.setdefault(kind, {}).setdefault(middle, []).append(numbers["w"])
    for kind, curve in sorted(curves.items()):
        means = {step: sum(values) / len(values) for step, values in sorted(curve.items())}
        weights.plot(list(means), list(means.values()), label=kind)
    for i, share in enumerate(("greedy", "average")):
        heights, errors = 100 * torch.stack([row["values"][:, i] for row in rows], dim=1)
        places = [place + 0.4 * i - 0.2 for place in range(len(rows))]
        bars.bar(places, heights.tolist(), 0.4, yerr=errors.tolist(), capsize=6, label=share)
    bars.set_xticks(range(len(rows)), [row["row"] for row in rows])
    weights.set(title=f"{last}: weight w by kind of demonstration", xlabel="step", ylim=(0, None))
    bars.set(title="% right, with standard errors", ylim=(0, None))
    weights.legend(*weights.get_legend_handles_labels())
    bars.legend()
    picture.savefig(path, dpi=100)


# ==== The command line ======================================================================================

def parse(argv):
    """The flags; the classroom's values where there is no --data. Raises Mistake."""
    number, raw = train.number, train.argparse.RawDescriptionHelpFormatter
    parser = train.Parser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folders or hub names (all finished runs under out/)")
    add("--data", nargs="+", default=[], metavar="FILE", help="JSONL files of problems")
    add("--samples", type=number(int, 0), default=16, help="answers a problem, beside the greedy one (16)")
    add("--temperature", type=number(float, 0.001), default=1.0, help="of the samples (1.0)")
    add("--top-p", type=number(float, 0.001, 1), default=1.0, help="nucleus of the samples (1.0: all)")
    add("--max-tokens", type=number(int, 1), help="longer ones are cut off, and wrong (4096; classroom 96)")
    add("--batch-size", type=number(int, 1), help="answers sampled at once (64; classroom 800)")
    add("--seed", type=int, default=0, help="of sampling; each run's own seed is mixed in (0)")
    add("--limit", type=number(int, 1), help="only the first so many problems (of --gradients: 256)")
    add("--prompt-template", help='wraps each question: "{prompt} Reason step by step." (the run\'s own)')
    add("--against", metavar="ROW", help="the row that others are compared to (dft)")
    add("--out", help="folder for eval-NAME.jsonl (beside the model)")
    add("--grade", metavar="FILE", help="grade the responses in this JSONL file, sample nothing")
    add("--gradients", action="store_true", help="study gradients, sample nothing")
    add("--plot", metavar="FILE.png", help="draw weights by kind, and accuracy")
    a = parser.parse_args(argv)
    a.max_tokens = a.max_tokens or (4096 if a.data else 96)
    a.batch_size = a.batch_size or (64 if a.data else 800)
    if "{prompt}" not in (a.prompt_template or "{prompt}"):
        raise Mistake("--prompt-template has no {prompt} in it: the question would be lost")
    if len({Path(path).stem for path in a.data}) < len(a.data):
        raise Mistake("--data: two files of one name; their eval-NAME.jsonl would overwrite each other")
    if a.plot and Path(a.plot).suffix not in (".png", ".pdf", ".svg"):
        raise Mistake(f"--plot {a.plot}: name a .png, .pdf or .svg file")
    if a.grade and (a.runs or a.data or a.gradients):
        raise Mistake(f"--grade reads answers from {a.grade} alone: leave out RUN, --data and --gradients")
    return a


def measure(a):
    """Sample and grade: the rows of the table."""
    if a.grade:
        return compare([grade_file(a.grade)], a.against)
    if a.data:
        needed("math_verify", "math-verify")                   # before anything is sampled
    files = {Path(path).stem: load_problems(path, islice(train.read_jsonl(path), a.limit)) for path in a.data}
    runs, results = find_runs(a.runs), []
    if a.against not in (None, *(run["row"] for run in runs)):
        raise Mistake(f"--against {a.against}: no such row, only {', '.join(run['row'] for run in runs)}")
    for line in differing_runs(runs):
        train.say(line)
    for run in runs:
        name = f"classroom-{run['args'].get('classroom_digits') or 3}-digits"
        sums = classroom_rows(run["args"].get("classroom_digits") or 3)
        results += evaluate_run(run, files or {name: load_problems(name, islice(sums, a.limit))}, a)
    rows = compare(results, a.against or "dft")
    return rows + average_of_files(rows) if len(files) > 1 else rows


@train.program
def main(argv):
    """evaluate.py: print the table, or what --gradients finds."""
    a = parse(argv)
    train.join()
    if not a.data:
        torch.set_num_threads(train.THREADS)                   # the last digits depend on it
    if a.gradients:
        if train.WORLD > 1 or len(a.data) > 1:
            raise Mistake("--gradients: in one process, without torchrun, and with one --data file at most")
        for row, numbers in gradient_study(find_runs(a.runs), a).items():
            train.say(row)
            for name, values in numbers.items():
                mean, error = estimate(torch.tensor(values).double()[:, None, None])[:, 0].tolist()
                train.say(f"  {name:36} {mean:7.3g} ± {error:.2g}")
        return
    if a.plot:
        needed("matplotlib.figure", "matplotlib")
        Path(a.plot).parent.mkdir(parents=True, exist_ok=True)
    rows = measure(a)
    train.say(*table(rows, a.against or "dft"))
    if a.plot and train.RANK == 0:
        draw(a.plot, rows)


if __name__ == "__main__":
    os._exit(main())            # as train.py does
