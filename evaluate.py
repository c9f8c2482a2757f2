"""Sample answers, grade them, compare runs: did it get better, than what, by how much, and how sure is that?

    python evaluate.py                             every finished run under out/, on the classroom's sums
    python evaluate.py RUN ... --data FILE ...     folders or hub names, on your own problems
    python evaluate.py --grade FILE                grade answers that were sampled elsewhere
    python evaluate.py RUN ... --gradients         gradient norms, second moments: the paper's argument

Correct is an answer that ended and equals the reference; one that is cut off is wrong. Average@k is the mean
accuracy of k samples a problem, pass@k the share of problems with one right. out/NAME-seed0, out/NAME-seed1,
... are one row, NAME. Its standard error is over seeds, that of a single run over problems (its k samples are
not independent); differences are paired in the same unit. Dimensions: P problems, M = 5 numbers of a problem.
"""
import argparse
import importlib
import logging
import math
import os
import re
from itertools import islice, product
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

import cadft
import train
from train import Mistake, require, within

ORDER = ["base", "sft", "focal", "casft", "dft", "cadft"]      # of the table's rows; others follow
USED = {"question", "problem", "messages", "tools", "reference", "answer", "final_answer", "solution",
        "grader"}                                              # fields of a problem
NUMBERS = ["greedy", "average", "any", "cut off", "tokens"]    # M: what is known of a problem


# ==== Runs, problems, samples ===============================================================================

def find_runs(paths, template=None):
    """The runs named, or all finished ones under out/: dicts of path, row, seed, args and prompt_template.
    Says where runs of one row are no seeds of one experiment, by data or folder above all."""
    paths = paths or [path for path in sorted(Path("out").glob("[!.]*")) if train.finished(path)]
    require(paths, "out/ holds no finished run: python train.py makes one; or name a folder")
    runs, rows = [], {}
    for path in {Path(path).resolve(): Path(path) for path in paths}.values():     # a link is no other run
        on_hub = not path.exists() and len(path.parts) <= 2 and path.parts[0] != "out"
        require(on_hub or train.finished(path), f"{path}: no finished model there; see train.py --resume")
        name = path.as_posix() if on_hub else path.resolve().name
        row, seed = re.fullmatch("(.+?)(?:-seed([0-9]+))?", name).groups()
        args = train.read_json(path / "args.json")
        rows.setdefault(row, []).append(args | {"folder": path.parent})
        runs.append({"path": path.as_posix(), "row": row, "seed": seed and int(seed), "args": args,
                     "prompt_template": template or args.get("prompt_template") or "{prompt}"})
    for row, (first, *others) in rows.items():
        names = set().union(first, *others) - {*train.MAY_DIFFER, "seed"}
        differ = [name for name in sorted(names) if any(first.get(name) != one.get(name) for one in others)]
        if differ:
            train.say(f"row {row}: not seeds of one experiment, they differ in {', '.join(differ)}")
    if len({run["prompt_template"] for run in runs}) > 1:
        train.say("these runs are asked in different words: give all of them one --prompt-template")
    return runs


def classroom(run, limit):
    """{name: problems} of the 100 held-out sums of a run's classroom."""
    digits = run["args"].get("classroom_digits") or 3
    sums = train.problems(digits, 100)[:limit]
    rows = [{"question": f"{x}+{y}:", "reference": x + y, "grader": "sum"} for x, y in sums]
    return {f"classroom-{digits}-digits": load_problems("classroom", enumerate(rows, 1))}


def load_problems(name, rows):
    """Dicts of where, turns and tools to ask with, and row, the problem's part of eval-NAME.jsonl."""
    problems, unused = [], set()
    for line, row in rows:
        unused |= row.keys() - USED
        where = f"{name}, line {line}"
        turns = row.get("messages") or [{"role": "user", "content": row.get("question", row.get("problem"))}]
        try:
            asked = [i for i, turn in enumerate(turns) if turn["role"] == "user" and turn["content"].strip()]
            turns = turns[:asked[-1] + 1]
        except (TypeError, KeyError, IndexError, AttributeError):
            raise Mistake(f'{where}: needs text in "question" or "problem", or a user turn in "messages"')
        told = {"question": turns[-1]["content"], "reference": reference_of(row, where),
                "grader": row.get("grader", "math")}
        problems.append({"where": where, "turns": turns, "tools": row.get("tools"), "row": told})
    require(problems, f"{name}: there is no problem in it")
    if unused:
        train.say(f"{name}, never used: {', '.join(sorted(unused))}")
    return problems


def reference_of(row, where):
    """`reference`, `answer` or `final_answer` (text, number or list), else the last box of `solution`."""
    fields = [field for field in ("reference", "answer", "final_answer") if field in row]
    value = row[fields[0]] if fields else last_box(str(row.get("solution")))
    values = value if isinstance(value, list) else [value]
    texts = [str(one).split("####")[-1].strip() for one in values]             # GSM8K's end in #### 18
    known = texts and all(isinstance(one, (str, int, float)) for one in values)
    require(known and not {text.lower() for text in texts} & {"", "nan", "null"}, f'{where}: {value!r} is no '
            'reference; it stands in "reference", "answer", "final_answer" or the last box of "solution"')
    return ", ".join(texts)


def sample_answers(lm, tokenizer, run, problems, a):
    """Rows of eval-NAME.jsonl, on every rank: a greedy answer and a.samples samples a problem, graded."""
    positions, prompts = train.positions(lm), []
    for problem in problems:
        turns = train.wrap(problem["turns"], run["prompt_template"])
        try:
            _, ids = train.written(tokenizer, turns, problem["tools"])
        except Mistake as mistake:
            raise Mistake(f"{problem['where']}: {mistake}") from mistake
        require(0 < len(ids) < positions, f"{problem['where']}: {len(ids)} tokens; 1 to {positions - 1} fit")
        prompts.append(ids)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))        # lack of memory shows at once
    batches = []                                                               # of (problem, sample)
    for samples in ["greedy"], range(a.samples):
        pairs = list(product(order, samples))
        batches += [pairs[at:at + a.batch_size] for at in range(0, len(pairs), a.batch_size)]
    stops, rows = lm.generation_config.eos_token_id, []
    mine = range(train.RANK, len(batches), train.WORLD)
    for number in tqdm(mine, run["row"], unit="batch", disable=train.RANK > 0 or None):
        asked = [prompts[i] for i, _ in batches[number]]
        temperature = 0.0 if batches[number][0][1] == "greedy" else a.temperature
        limit = min(a.max_tokens, positions - max(map(len, asked)))
        seed = train.seed_for(a.seed, run["seed"], number)
        new = cadft.nucleus_sample(lm, asked, stops, stops[0], limit, a.top_p, temperature, seed)
        for (i, sample), prompt, ids in zip(batches[number], asked, new):
            row = {"problem": i, "sample": sample, **problems[i]["row"], "tokens": len(ids)}
            row["finished"] = ids[-1] in stops
            row["response"] = train.response_text(tokenizer, prompt, ids[:-1] if row["finished"] else ids)
            row["correct"] = grade(row)
            rows.append(row)
    rows = [row for part in train.gather_objects(rows) for row in part]
    return sorted(rows, key=lambda row: (row["problem"], row["sample"] == "greedy", row["sample"]))


# ==== Grading ===============================================================================================

def grade(row):
    """Whether a row's response is right: as another program judged (`passed`), else finished and equal."""
    if "passed" in row:
        return str(row["passed"]).lower() in ("true", "1", "1.0")
    is_right = train.is_sum if row.get("grader") == "sum" else is_correct
    return row.get("finished") is not False and is_right(row["response"], row["reference"])


def is_correct(response, reference):
    """Whether the answer that a response ends with equals the reference; of "18 dollars a day" 18 counts."""
    text = re.sub(r"\\[()]", "$", str(response).split("</think>")[-1].strip())
    flat = re.sub(r"(?<!\\)\\[][]", "$", text)               # in sentences the library wants \[ as it is
    answer = extract_answer(flat)
    if answer == flat and re.search(r"(?<!\\)\b[a-zA-Z']{2,} ", text):       # a sentence; find answers in it
        return equal(text[-500:], reference)
    number = re.match(r"(?:[a-zA-Z']{2,} +)*\\?\$?([-+]?[\d.,/]*\d)\\?[%$]?( +\(?[a-zA-Z']{2,}|$)", answer)
    return equal(f"${answer[-500:]}$", reference) or number is not None and equal(number[1], reference)


def equal(answer, reference):
    """Whether answers are equal, as math-verify understands them: `answer` is text with $LaTeX$ in it. sympy
    computes what they say, for five seconds at most; without limit outside of Unix. Main thread only."""
    library = needed("math_verify", "math-verify")
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    seconds = 5 if os.name == "posix" else None                # by a signal: in the main thread only
    # 4.5e33 would be 4.5 times Euler's e times 33
    answer, reference = (re.sub(r"(?<=[0-9])[eE]([+-]?[0-9]+)", r" \\cdot 10^{\1}", text)
                         for text in (answer, str(reference)[:500]))
    spelt, wanted = (re.sub(r"[\s$]", "", text) for text in (answer, reference))
    if spelt == wanted or not spelt or not wanted:
        return bool(spelt and wanted)
    gold = library.parse(f"${reference}$", parsing_timeout=seconds)
    found = library.parse(answer, parsing_timeout=seconds)
    if not library.verify(gold, found, float_rounding=4, timeout_seconds=seconds):
        return False
    try:                                                       # that rounding lets 3.2e-20 pass for 1.6e-20
        return math.isclose(float(found[0]), float(gold[0]), rel_tol=1e-4)
    except (TypeError, ValueError, OverflowError, IndexError):
        return True                                            # no plain numbers


def extract_answer(text):
    """The last box, else the first #### line, else what stands behind the last "answer is", else all."""
    box = last_box(text)
    if box is not None:
        return box
    line = re.search(r"####[\s*]*((?![a-zA-Z]{2,}|\d+[.):] )[^\s*].*)", text)     # not a heading
    if line:
        return line[1].strip("* ")                             # the first: small models run on
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


def grade_file(path):
    """The result of answers sampled elsewhere; rows of one problem (or question, ...) are its samples."""
    rows = []
    for line, row in train.read_jsonl(path):
        where = f"{path}, line {line}"
        require(row.get("passed", "") is not None, f'{where}: "passed" is null')
        if "passed" not in row:
            row["reference"] = reference_of(row, where)
            require(isinstance(row.get("response"), str), f'{where}: "response" is missing or not a string')
            row.setdefault("finished", row.get("finish_reason") != "length")   # as vLLM and OpenAI have it
        names = [row[field] for field in ("problem", "question", "prompt", "task_id") if field in row]
        row["problem"] = str(names[:1] or line)
        row["correct"] = grade(row)
        rows.append(row)
    require(rows, f"{path}: there is no answer in it")
    return result({"path": path, "row": Path(path).stem, "seed": None}, Path(path).name, rows)


# ==== Table, picture, gradients =============================================================================

def result(run, data, rows):
    """A run with what its graded answers say: data, k samples a problem, and `each` [P, M], the numbers."""
    problems, each = {}, []
    for row in rows:
        problems.setdefault(row["problem"], []).append(row)
    for _, answers in sorted(problems.items()):
        greedy = [row["correct"] for row in answers if row.get("sample") == "greedy"]
        samples = [row for row in answers if row.get("sample") != "greedy"]
        right = [row["correct"] for row in samples]
        cut_off = [row.get("finished") is False for row in samples or answers]
        tokens = [row.get("tokens", math.nan) for row in samples or answers]
        each.append([fmean(greedy or [math.nan]), fmean(right or [math.nan]), max(right, default=math.nan),
                     fmean(cut_off), fmean(tokens)])
    k = sum(row.get("sample") != "greedy" for row in rows) / len(problems)
    return run | {"data": data, "k": k, "each": torch.tensor(each, dtype=torch.float64)}


def estimate(each):
    """Of results [P, M], means and standard errors [2, M]: over runs; of a single one over its problems."""
    if not each:
        return torch.full((2, len(NUMBERS)), math.nan)
    values = each[0] if len(each) == 1 else torch.stack([one.mean(0) for one in each])
    error = (values.var(0, correction=0) / (len(values) - 1)).sqrt()           # of the mean; of one: nan
    return torch.stack([values.mean(0), error])


def compare(results, against):
    """The table's rows: for each set of problems and name, estimates, also of the difference to `against`."""
    groups = {}                                                # (data, row) -> results
    for one in results:
        groups.setdefault((one["data"], one["row"]), []).append(one)
    names = [*ORDER, *(name for _, name in groups)]
    rows = []
    for data, name in sorted(groups, key=lambda group: (group[0], names.index(group[1]))):
        ours, theirs = groups[data, name], groups.get((data, against), [])
        pairs = []
        for one, other in product(ours, theirs if name != against else []):
            if one["seed"] == other["seed"] or None in (one["seed"], other["seed"]):   # a hub model has none
                pairs.append(one["each"] - other["each"])
        rows.append({"data": data, "row": name, "runs": ours, "difference": estimate(pairs),
                     "values": estimate([one["each"] for one in ours])})
    return rows


def table(rows, against):
    """The rows as lines of text."""
    k = format(rows[0]["runs"][0]["k"], "g")
    lines = [["problems", "row", "seeds", "greedy", f"Average@{k}", f"pass@{k}", "cut off", "tokens",
              f"greedy - {against}", f"Average - {against}"]]
    for row in rows:
        runs, values, difference = row["runs"], row["values"], row["difference"]
        lines.append([f"{len(runs[0]['each'])} {row['data']}", row["row"], str(len(runs)),
                      *(percent(*pair) for pair in values[:, :4].T.tolist()),
                      f"{values[0, 4]:.1f}".replace("nan", "-"),
                      *(percent(*pair, "+") for pair in difference[:, :2].T.tolist())])
    columns = [column for column in zip(*lines) if {*column[1:]} != {"-"}]     # others are unknown
    widths = [max(map(len, column)) for column in columns]
    lines = ["  ".join(map(str.rjust, line, widths)) for line in zip(*columns)]
    return [*lines, "Percent ± standard error: over seeds; over problems where a row is a single run."]


def percent(mean, error, sign=""):
    """A mean and its standard error as text; a dash where they are unknown."""
    text = f"{100 * mean:{sign}.1f} ± {100 * error:.1f}"
    return "-" if math.isnan(mean) else text.replace(" ± nan", "")


def draw(path, rows):
    """Two panels: w by kind in the last run with a log, each point a mean of ten steps; Average@k."""
    picture = needed("matplotlib.figure", "matplotlib").Figure(figsize=(9, 4), layout="constrained")
    left, right = picture.subplots(1, 2)
    rows = [row for row in rows if row["data"] == rows[0]["data"]]
    heights, errors = 100 * torch.stack([row["values"][:, 1] for row in rows], dim=1)
    right.bar([row["row"] for row in rows], heights.tolist(), yerr=errors.tolist())
    right.set(title=f"Average@k on {rows[0]['data']}, percent")
    logs = [log for row in rows for run in row["runs"] for log in Path(run["path"]).glob("log.jsonl")]
    lines = [line for log in logs[-1:] for _, line in train.read_jsonl(log)]
    for kind in sorted(set().union(*(line["kinds"] for line in lines))):
        curve = [(line["step"], line["kinds"][kind]["w"]) for line in lines if kind in line["kinds"]]
        means = [part.mean(0).tolist() for part in torch.tensor(curve).double().split(10)]
        left.plot(*zip(*means), label=kind, linewidth=3)
    left.set(title="w by kind of demonstration, last run", xlabel="step", ylim=(0, 1.05))
    if left.lines:
        left.legend()
    picture.savefig(path, dpi=160)


def gradient_study(run, path, limit):
    """{what: number}. The assumption: incompatible samples have large gradients. The claim: weights lower
    E||g||^2. On the N demonstrations in a file, or without one on newly drawn sums like the run's own."""
    own = train.parse(["--model", run["path"], "--data", path] if path else [])
    vars(own).update((name, value) for name, value in run["args"].items() if value is not None)
    vars(own).update(data=path, classroom_size=limit, prompt_template=run["prompt_template"])
    rows = train.read_jsonl(path) if path else train.classroom_rows(own, split="held back")
    lm, tokenizer = train.load_model(run["path"], torch.float32)
    train.check_training(lm.eval())
    examples, _ = train.load_examples(own, tokenizer, islice(rows, limit))
    c_raw, norms = [], {"sft": [], "dft": []}                                  # norms: ||g||
    for example in tqdm(examples, "gradients", disable=None):
        batch = train.collate([example])
        nll, mask = cadft.token_nll(lm, batch["input_ids"], None, batch["labels"])
        c_raw.append(cadft.compatibility(nll, mask))
        for name in norms:
            loss = train.LOSSES[name](nll, mask).sum()
            gradient = torch.autograd.grad(loss, list(lm.parameters()), retain_graph=True)
            norms[name].append(torch.nn.utils.get_total_norm(gradient).item())
    c_hat = cadft.batch_zscore(torch.cat(c_raw).double(), own.eps).cpu()       # [N]
    w = cadft.compatibility_weight(c_hat, own.beta if own.method in train.WEIGHTED else 1.0)   # [N]
    found = {"demonstrations": len(examples)}
    for name in norms:
        norm = torch.tensor(norms[name], dtype=torch.float64)                  # [N]
        both = torch.stack([c_hat, norm])                                      # [2, N]
        ranks = both.argsort().argsort().double()
        found[f"c_hat and ||g|| of {name}, Pearson"] = torch.corrcoef(both)[0, 1].item()
        found[f"c_hat and ||g|| of {name}, Spearman"] = torch.corrcoef(ranks)[0, 1].item()
        found[f"E||w g||^2 / E||g||^2 of {name}"] = ((w * norm).square().mean() / norm.square().mean()).item()
    return found


# ==== The command line ======================================================================================

def parse(argv):
    """The flags; the classroom's values where there is no --data. Raises Mistake."""
    parser = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders or hub names (finished ones in out/)")
    add = parser.add
    add("--data", "JSONL files of problems", [], nargs="+", metavar="FILE")
    add("--samples", "answers a problem, beside the greedy one", 16, type=train.whole)
    add("--temperature", "of the samples", 1.0, type=within(float, 0.001))
    add("--top-p", "nucleus of the samples; 1: all", 1.0, type=within(float, 0.001, 1))
    add("--max-tokens", "longer ones are cut off, and wrong (4096; classroom 96)", type=train.count)
    add("--batch-size", "answers sampled at once (64; classroom 800)", type=train.count)
    add("--seed", "of sampling; each run's own seed is mixed in", 0, type=int)
    add("--limit", "only the first so many problems (of --gradients: 256)", type=train.count)
    add("--prompt-template", 'wraps each question: "{prompt} Reason step by step." (the run\'s own)')
    add("--against", "the row that others are compared to", "dft", metavar="ROW")
    add("--out", "folder for eval-NAME.jsonl (beside the model)")
    add("--grade", "grade the responses in this JSONL file, sample nothing", metavar="FILE")
    add("--gradients", "study gradients, sample nothing", False, action="store_true")
    add("--plot", "draw weights by kind, and accuracy", metavar="FILE.png")
    a = parser.parse_args(argv)
    a.max_tokens = a.max_tokens or (4096 if a.data else 96)
    a.batch_size = a.batch_size or (64 if a.data else 800)
    require("{prompt}" in (a.prompt_template or "{prompt}"), "--prompt-template: it has no {prompt}")
    require(len({Path(path).stem for path in a.data}) == len(a.data), "--data: two files of one name")
    require(not a.plot or a.plot.endswith((".png", ".pdf", ".svg")), "--plot: a .png, .pdf or .svg file")
    return a


def measure(a):
    """Sample, grade and write eval-NAME.jsonl: the rows of the table."""
    if a.grade:
        return compare([grade_file(a.grade)], a.against)
    if a.data:
        needed("math_verify", "math-verify")                   # before anything is sampled
    files = {Path(path).stem: load_problems(path, islice(train.read_jsonl(path), a.limit)) for path in a.data}
    runs = find_runs(a.runs, a.prompt_template)
    require(a.against in ("dft", *(run["row"] for run in runs)), f"--against {a.against}: no such row")
    results, dtype = [], torch.bfloat16 if train.CUDA and a.data else torch.float32
    for run in runs:
        lm, tokenizer = train.load_model(run["path"], dtype)
        folder = Path(run["path"])
        if a.out or not folder.exists():
            folder = Path(a.out or "out", run["path"].strip("/").replace("/", "--"))
        for name, problems in (files or classroom(run, a.limit)).items():
            rows = sample_answers(lm.eval(), tokenizer, run, problems, a)
            train.write_rows(folder / f"eval-{name}.jsonl", rows, "w")
            results.append(result(run, name, rows))
    return compare(results, a.against)


@train.program
def main(argv):
    """evaluate.py: print the table, or what --gradients finds."""
    a = parse(argv)
    train.join()
    if not a.data:
        torch.set_num_threads(train.THREADS)                   # the last digits depend on it
    if a.gradients:
        for run, path in product(find_runs(a.runs, a.prompt_template), a.data or [""]):
            numbers = gradient_study(run, path, a.limit or 256)
            train.say(f"{run['path']} {path}", *(f"  {name:36} {numbers[name]:7.3g}" for name in numbers))
        return
    if a.plot:
        needed("matplotlib.figure", "matplotlib")
    rows = measure(a)
    train.say(*table(rows, a.against))
    if a.plot and train.RANK == 0:
        draw(a.plot, rows)


if __name__ == "__main__":
    train.quiet()
    os._exit(main())            # as train.py does
