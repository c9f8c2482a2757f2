"""Fine-tune a causal language model with CADFT; or with SFT, DFT or weighted SFT, to compare. A plain loop.

    python train.py                                              the classroom: no download, no GPU, 2 minutes
    python train.py --model MODEL --data FILE.jsonl              your own model and demonstrations
    torchrun --nproc-per-node=8 train.py --model ... --data ...  the same result on eight processes

Where this loop departs from the textbook:
 1. A step is one forward of all micro-batches, graphs kept, then one backward: c_hat needs every score of the
    global batch before the first gradient, and this way the model runs only once, and exactly.
 2. SFT, DFT, casft and CADFT take the same path; they differ in the token loss and in beta (0: no weighting).
 3. A step's data and random numbers depend on (seed, step) alone: not on the number of ranks, the size of the
    micro-batches, or what went before. So a resumed run is the uninterrupted one.
 4. Weights are float32; bfloat16 is autocast over them. Dropout is off: it would depend on the sharding.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import textwrap
import time
import warnings
from array import array
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path

# read by torch: large pages for large blocks (fewer page faults); threads of several processes must not spin
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if "RANK" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import cadft

INF = math.inf
# method: token loss, and whether samples are weighted and rewritten
METHODS = {"sft": (cadft.sft_loss, False), "dft": (cadft.dft_loss, False),
           "casft": (cadft.sft_loss, True), "cadft": (cadft.dft_loss, True)}
# flag, type, the paper's value (your own model), the classroom's (None: does not apply), range, help
FLAGS = [
    ("beta", float, 1.0, 1.0, "[0, inf)", "w = exp(-beta max(0, c_hat)); 0 is DFT"),
    ("eps", float, 1e-6, 1e-6, "(0, inf)", "added to the standard deviation of the z-score"),
    ("ema-decay", float, 0.5, 0.5, "[0, 1)", "of the moving average of c_hat (paper silent)"),
    ("rewrite-after", int, 3000, 60, "[0, inf)", "T_warm: no rewriting before this step"),
    ("rewrite-every", int, 1000, 6, "[0, inf)", "K: steps between rewriting rounds; 0 turns rewriting off"),
    ("rewrite-fraction", float, 0.005, 0.005, "(0, 1]", "share of the data set that a round may pick"),
    ("rewrite-prob", float, 0.5, 0.5, "[0, 1]", "probability that a picked example is rewritten"),
    ("rewrite-top-p", float, 0.9, 0.9, "(0, 1]", "nucleus of a rewrite"),
    ("rewrite-temperature", float, 0.7, 0.7, "(0, inf)", "temperature of a rewrite"),
    ("rewrite-max-tokens", int, 2048, 96, "[1, inf)", "length limit of a rewrite (paper silent)"),
    ("steps", int, None, 300, "[1, inf)", "optimizer steps"),
    ("epochs", int, 1, None, "[1, inf)", "instead of --steps: passes over the data"),
    ("batch-size", int, 256, 32, "[1, inf)", "|B|: the effective global batch, of all ranks together"),
    ("micro-batch-tokens", int, 16384, 8192, "[1, inf)", "padded tokens of one forward; changes no result"),
    ("max-length", int, 2048, 128, "[2, inf)", "tokens of prompt and response; longer responses are cut"),
    ("lr", float, 5e-5, 3e-4, "(0, inf)", "peak learning rate"),
    ("warmup-ratio", float, 0.1, 0.1, "[0, 1]", "share of the steps that warm up; then a cosine to 0"),
    ("weight-decay", float, 0.01, 0.0, "[0, inf)", "of AdamW"),
    ("clip", float, 1.0, 1.0, "(0, inf]", "largest gradient norm"),
    ("seed", int, 0, 0, "[0, 1e9]", "decides order, rewrites, and everything in the classroom"),
    ("save-every", int, 500, 100, "[1, inf)", "steps between checkpoints"),
    ("classroom-size", int, None, 640, "[1, 100000]", "demonstrations in the classroom"),
    ("classroom-digits", int, None, 3, "[2, 6]", "digits of the numbers to add; the base model knows 1 to 3"),
    ("incompatible", float, None, 0.4, "[0, 1]", "share of incompatible demonstrations in the classroom"),
]
# what may differ between a run and its continuation: it changes no result (of data, the content counts)
FREE = {"out", "data", "resume", "save_every", "micro_batch_tokens", "gradient_checkpointing"}


class UserError(Exception):
    """A mistake in the input, in one line: what, where, what to do. The same on every rank; exit code 2."""


@dataclass(slots=True)
class Example:
    """One demonstration as token ids. The response ends with end-of-sequence, unless it was cut."""
    index: int
    prompt_ids: array
    response_ids: array
    kind: str | None = None     # a label for logs and tables; training never looks at it

    def __len__(self):
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass
class Run:
    """What a run is made of. Everything that changes is in its checkpoints."""
    args: argparse.Namespace
    lm: torch.nn.Module
    tokenizer: object
    examples: list
    data_hash: str
    optimizer: torch.optim.Optimizer
    tracker: cadft.CompatibilityEMA
    rewrites: dict              # index -> the response ids that replaced the original's
    step: int = 0
    seconds: float = 0.0


# ==== 1. The loop ===========================================================================================

def train_step(net, optimizer, batches, a):
    """One optimizer step on this rank's micro-batches: the algorithm, whole.

    Returns the rows of the global batch, [G, len(COLUMNS)], float64 on the CPU, the same on every rank.
    """
    outputs = []
    for batch in batches:
        last = batch is batches[-1]                     # DDP prepares its one reduction in the last forward
        with contextlib.nullcontext() if last or not hasattr(net, "no_sync") else net.no_sync():
            outputs.append(net(batch["input_ids"], batch["labels"]))           # nll, mask: [rows, T-1]
    nll, mask = (torch.cat(widen(parts)) for parts in zip(*outputs))           # [B, T-1]
    token_loss, weighted = METHODS[a.method]

    c_raw = cadft.compatibility(nll, mask)                                     # [B]
    c_hat = cadft.batch_zscore(c_raw, a.eps)                                   # [B]
    w = cadft.compatibility_weight(c_hat, a.beta if weighted else 0.0)         # [B]
    sample_loss = token_loss(nll, mask)                                        # [B]
    loss = cadft.cadft_loss(sample_loss, w)
    loss.backward()

    grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), a.clip)
    optimizer.step()
    optimizer.zero_grad()
    index, tokens = (torch.cat([batch[name] for batch in batches]) for name in ("index", "tokens"))
    rows = [index, c_raw, c_hat, w, sample_loss, cadft.dft_loss(nll, mask), nll.sum(1), mask.sum(1), tokens,
            grad_norm, torch.tensor(peak_memory()), torch.tensor(stop.received)]
    rows = [row.detach().to(nll.device, torch.float64).expand(len(nll)) for row in rows]
    return cadft.gather(torch.stack(rows, dim=1)).cpu()


COLUMNS = ("index", "c_raw", "c_hat", "w", "loss", "dft", "nll", "response_tokens", "tokens",
           "grad_norm", "memory", "signal")


def train(run, world, rank, device):
    """The loop over steps: train, average, rewrite, log, save. Returns the exit code."""
    a, net = run.args, ResponseNLL(run.lm, run.args.dtype, device)
    if world > 1:
        net = DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None,
                                      broadcast_buffers=False, gradient_as_bucket_view=True)
    began = time.perf_counter() - run.seconds
    log = open(Path(a.out, "log.jsonl"), "a") if rank == 0 else None
    bar = tqdm(total=a.steps, initial=run.step, unit="step", disable=None if rank == 0 else True)
    with stop, bar, log or contextlib.nullcontext():
        while run.step < a.steps:
            run.step += 1
            start = time.perf_counter()
            torch.manual_seed(key(a.seed, run.step))    # should the model draw anything (a noisy router)
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(run.step, a)
            batches = [collate(rows, run.tokenizer, device) for rows in share(run, world, rank)]
            table = dict(zip(COLUMNS, train_step(net, run.optimizer, batches, a).T))
            stop_if_diverged(table, run.step)
            run.tracker.update(table["index"].long(), table["c_hat"])
            elapsed = time.perf_counter() - start
            if rewriting_due(run.step, a):
                rewrite(run, world, rank)
            run.seconds = time.perf_counter() - began
            if log:
                row = log_row(run, table, elapsed)
                print(json.dumps(row), file=log, flush=True)
                bar.set_postfix({name: f"{row[name]:.3g}" for name in ("loss", "nll", "w_mean", "rewritten")})
            bar.update()
            signalled = int(table["signal"].max())              # of any rank: all stop after the same step
            if signalled or run.step % a.save_every == 0 or run.step == a.steps:
                together(save, run, rank0=True)
            if signalled and run.step < a.steps:
                name = signal.Signals(signalled).name
                say(f"\nstopped by {name} after step {run.step} and saved; --resume goes on")
                return 128 + signalled
    return 0


class ResponseNLL(torch.nn.Module):
    """token_nll as a module: what DDP wraps. Padding stands on the right, so no attention mask is needed."""

    def __init__(self, lm, dtype, device):
        super().__init__()
        self.lm, self.device, self.bfloat16 = lm, device, dtype == "bfloat16"
        self.chunk = 2048 if device.type == "cuda" else 512    # a GPU wants larger products

    def forward(self, input_ids, labels):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            return cadft.token_nll(self.lm, input_ids, None, labels, self.chunk)


def widen(parts):
    """Pad [rows, T-1] tensors of several widths with 0 (False) to the widest."""
    width = max(part.shape[1] for part in parts)
    return [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]


def learning_rate(step, a):
    """lr min(1, t / warm-up steps), then lr times the cosine that would be 0 at t = steps + 1; t from 1."""
    warm = round(a.warmup_ratio * a.steps)
    progress = max(0, step - 1 - warm) / max(1, a.steps - warm)
    return a.lr * min(1, step / max(1, warm)) * 0.5 * (1 + math.cos(math.pi * progress))


def share(run, world, rank):
    """This rank's micro-batches of a step: lists of examples, longest first, of few enough padded tokens."""
    a, per_epoch = run.args, len(run.examples) // run.args.batch_size
    epoch, position = divmod(run.step - 1, per_epoch)
    generator = torch.Generator().manual_seed(key(a.seed, "epoch", epoch))
    order = torch.randperm(len(run.examples), generator=generator)
    mine = order[position * a.batch_size:(position + 1) * a.batch_size][rank::world].tolist()
    batches = []
    for example in sorted((run.examples[i] for i in mine), key=len, reverse=True):
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0]) <= a.micro_batch_tokens:
            batches[-1].append(example)
        else:
            batches.append([example])
    return batches


def collate(rows, tokenizer, device):
    """Examples -> {input_ids [B, T], labels [B, T], index [B], tokens [B]}, padded on the right."""
    width, pad = max(map(len, rows)), pad_id(tokenizer)
    ids = [[*e.prompt_ids, *e.response_ids] + [pad] * (width - len(e)) for e in rows]
    off = [cadft.IGNORE]
    labels = [off * len(e.prompt_ids) + [*e.response_ids] + off * (width - len(e)) for e in rows]
    batch = dict(input_ids=ids, labels=labels, index=[e.index for e in rows], tokens=[len(e) for e in rows])
    return {name: torch.tensor(value).to(device) for name, value in batch.items()}


def stop_if_diverged(table, step):
    bad = ~torch.isfinite(table["loss"] * table["w"] + table["grad_norm"])
    if bad.any():
        own = ~torch.isfinite(table["loss"])
        which = sorted(table["index"][own if own.any() else bad].long().tolist())
        what = "loss" if own.any() else "gradient"
        raise UserError(f"the {what} is not finite at step {step}, examples {which[:8]}: look at these, or "
                        "try a lower --lr; the last checkpoint is untouched")


def log_row(run, table, elapsed):
    """One line of log.jsonl: numbers of the global batch. nll is per token, c_mean per sample."""
    def by_kind(rows):
        return {"n": len(rows)} | {name: table[name][rows].mean().item() for name in ("c_raw", "c_hat", "w")}

    kinds = {}
    for position, i in enumerate(table["index"].long().tolist()):
        if run.examples[i].kind is not None:
            kinds.setdefault("rewritten" if i in run.rewrites else run.examples[i].kind, []).append(position)
    w, c_raw = table["w"], table["c_raw"]
    return {"step": run.step, "epoch": (run.step - 1) // (len(run.examples) // run.args.batch_size) + 1,
            "seconds": run.seconds, "lr": learning_rate(run.step, run.args),
            "loss": (w * table["loss"]).mean().item(),
            "nll": (table["nll"].sum() / table["response_tokens"].sum()).item(),
            "dft": table["dft"].mean().item(),
            "c_mean": c_raw.mean().item(), "c_std": c_raw.std(correction=0).item(),
            "w_mean": w.mean().item(), "w_min": w.min().item(),
            "down_weighted": (w < 1).double().mean().item(),
            "grad_norm": table["grad_norm"][0].item(),
            "tokens_per_second": table["tokens"].sum().item() / elapsed,
            "peak_memory": int(table["memory"].max()), "rewritten": len(run.rewrites),
            "kinds": {kind: by_kind(rows) for kind, rows in sorted(kinds.items())}}


# ==== 2. Rewriting ==========================================================================================

def rewriting_due(step, a):
    """After finished step t, when t >= T_warm and (t - T_warm) mod K = 0 (paper silent: where K starts)."""
    on = METHODS[a.method][1] and a.rewrite_every > 0
    return on and step >= a.rewrite_after and (step - a.rewrite_after) % a.rewrite_every == 0


def rewrite(run, world, rank, chunk=64):
    """One round: pick, toss, sample, write back, record. Chunks and their seeds don't depend on the ranks."""
    a, stops = run.args, eos_ids(run.lm, run.tokenizer)
    text = lambda ids: run.tokenizer.decode(ids, skip_special_tokens=True)
    picked = run.tracker.pick(a.rewrite_fraction)
    drawn = [i for i in picked if random.Random(key(a.seed, run.step, i)).random() < a.rewrite_prob]
    drawn.sort(key=lambda i: (len(run.examples[i].prompt_ids), i))
    new = {}
    for number, start in enumerate(range(0, len(drawn), chunk)):
        if number % world == rank:
            some = drawn[start:start + chunk]
            prompts = [run.examples[i].prompt_ids for i in some]
            room = max(1, min(a.rewrite_max_tokens, a.max_length - len(prompts[-1])))   # the longest prompt's
            with torch.autocast(run.lm.device.type, torch.bfloat16, enabled=a.dtype == "bfloat16"):
                new |= zip(some, cadft.nucleus_rewrite(
                    run.lm, prompts, stops, pad_id(run.tokenizer), room, top_p=a.rewrite_top_p,
                    temperature=a.rewrite_temperature, seed=key(a.seed, run.step, "chunk", number)))
    new = {i: ids for part in gather_objects(new) for i, ids in part.items()}
    rows = []
    for i in picked:
        example, ids = run.examples[i], new.get(i)
        kept = ("not drawn" if ids is None else "cut off" if ids[-1] not in stops else
                "empty" if not text(ids).strip() else None)
        row = {"step": run.step, "index": i, "kind": example.kind, "average": run.tracker.mean[i].item(),
               "prompt": text(example.prompt_ids), "old": text(example.response_ids)}
        rows.append(row | ({"kept": kept} if kept else {"new": text(ids)}))
        if not kept:
            run.rewrites[i] = example.response_ids = array("i", ids)
            run.tracker.forget(i)
    if rank == 0:
        with open(Path(a.out, "rewrites.jsonl"), "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ==== 3. Data ===============================================================================================

def load_examples(a, tokenizer, rows=None):
    """JSONL (or `rows` like its) -> (examples, responses cut at --max-length, rows without room for one)."""
    examples, dropped, cut = [], 0, 0
    rows = rows or (read_jsonl(a.data) if a.data else classroom_rows(a))
    while some := [(*dialogue(row, a, where), where, row.get("kind")) for where, row in islice(rows, 1000)]:
        turns, responses, wheres, kinds = zip(*some)
        prompts = encode_prompts(tokenizer, turns, wheres)
        answers = tokenizer(list(responses), add_special_tokens=False)["input_ids"]
        for prompt, answer, where, kind in zip(prompts, answers, wheres, kinds):
            if not prompt or not answer:
                raise UserError(f"{where}: the text turns into no token; is this the model's own tokenizer?")
            if answer[-1] != tokenizer.eos_token_id:
                answer = answer + [tokenizer.eos_token_id]
            kept = answer[:max(0, a.max_length - len(prompt))]
            dropped, cut = dropped + (not kept), cut + (0 < len(kept) < len(answer))
            if kept:
                kind = None if kind is None else str(kind)
                examples.append(Example(len(examples), array("i", prompt), array("i", kept), kind))
    if not examples:
        raise UserError(f"{a.data}: no usable row; {dropped} have prompts longer than --max-length allows")
    return examples, cut, dropped


def read_jsonl(path):
    """Yield ("file, line n", row) for each line that is not blank. Raises UserError naming file and line."""
    try:
        file = open(path, "rb")                                # bytes: only \n ends a line
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a JSONL file") from None
    with file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    row = json.loads(text)
                    if "\\u" in text:
                        json.dumps(row, ensure_ascii=False).encode()   # half a surrogate pair is no text
            except UnicodeError:
                raise UserError(f"{where}: not valid UTF-8; save the file as UTF-8") from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not valid JSON ({error}); one object a line is needed") from None
            if text and not isinstance(row, dict):
                raise UserError(f"{where}: a JSON object is needed, not {type(row).__name__}")
            if text:
                yield where, row


def dialogue(row, a, where):
    """(turns before the response, response) of one row: the named fields, or else `messages`."""
    prompt_field, response_field = a.prompt_field or "prompt", a.response_field or "response"
    named = a.prompt_field or a.response_field or "messages" not in row
    if named or prompt_field in row and response_field in row:
        fields = prompt_field, response_field
        turns = [{"role": who, "content": row.get(name)} for who, name in zip(("user", "assistant"), fields)]
        names = [f'field "{field}"' for field in fields]
    else:
        turns = row["messages"] if isinstance(row["messages"], list) else []
        if not all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in turns):
            raise UserError(f'{where}: each of "messages" needs a role and a content')
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
        turns = turns[:last + 1]
        names = [f'message {i + 1}' for i in range(len(turns))]
        if last == 0:
            raise UserError(f'{where}: "messages" needs a user turn and an assistant turn after it')
    for turn, name in zip(turns, names):
        if turn.get("content") is None or turn["content"] == "":
            raise UserError(f"{where}: {name} is missing or empty; see --prompt-field and --response-field")
        if not isinstance(turn["content"], str):
            raise UserError(f"{where}: {name} is not a string but {type(turn['content']).__name__}")
    *before, response = turns
    return wrap(before, a.prompt_template), response["content"]


def wrap(turns, template):
    """The same turns, the last one's text put into the template."""
    text = (template or "{prompt}").replace("{prompt}", turns[-1]["content"])
    return [*turns[:-1], turns[-1] | {"content": text}]


def encode_prompts(tokenizer, dialogues, wheres):
    """Token ids of prompts: by the chat template, else the text as it is. One bos, where there is a bos."""
    texts = []
    for turns, where in zip(dialogues, wheres):
        if not tokenizer.chat_template and len(turns) > 1:
            raise UserError(f"{where}: {len(turns)} turns before the response, but no chat template")
        try:
            texts.append(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
                         if tokenizer.chat_template else turns[0]["content"])
        except Exception as error:                             # whatever the template's code raises
            raise UserError(f"{where}: the chat template refuses these turns ({error})") from None
    bos, prompts = tokenizer.bos_token_id, []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        while bos is not None and ids[:1] == [bos]:            # a chat template may have written it already
            ids = ids[1:]
        prompts.append(ids if bos is None else [bos] + ids)
    return prompts


# ==== 4. Model and processes ================================================================================

def load_model(path, dtype, device):
    """(the model at `path`, a folder or a hub name, in training mode; names of the dropouts set to 0)."""
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        off = without_dropout(config)
        lm, info = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype,
                                                        output_loading_info=True)
    except Exception as error:                                 # transformers raises many kinds
        raise UserError(f"{path}: no causal language model could be loaded ({first_line(error)})") from None
    if info["missing_keys"]:
        raise UserError(f"{path}: weights are missing ({', '.join(sorted(info['missing_keys'])[:3])} ...)")
    return lm.to(device).train(), off


def without_dropout(config):
    """Set every dropout of a config (and of its text model's) to 0; returns the names of those changed."""
    off = []
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if "drop" in name and isinstance(value, float) and value > 0:
                setattr(part, name, 0.0)
                off.append(name)
    return off


def load_tokenizer(path):
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise UserError(f"{path}: no tokenizer could be loaded ({first_line(error)})") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no end-of-sequence token; a response could not end")
    return tokenizer


def pad_id(tokenizer):
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def eos_ids(lm, tokenizer):
    """All ids that end a response: the tokenizer's, and those of the model's generation settings."""
    own = lm.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *([] if own is None else own if isinstance(own, list) else [own])})


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def key(*parts):
    """A seed made of several things, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def world_and_rank():
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


def start_processes():
    """Join the process group if torchrun started us: nccl on CUDA, else gloo. Returns the device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        store, rank, world = next(dist.rendezvous("env://"))
        # torchrun may keep its store when it restarts workers: lost ones' addresses must not be found there
        store = dist.PrefixStore("try " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world, timeout=timedelta(hours=2))   # some wait, others sample
    warnings.filterwarnings("ignore", message="`broadcast_buffers`")   # its new name is new in torch 2.13
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return device


def gather_objects(value):
    """A list with every rank's value."""
    world, _ = world_and_rank()
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def together(function, *args, rank0=False):
    """function(*args) on every rank, or on rank 0 for all of them. What fails on one rank fails on all."""
    result, error = None, None
    if not rank0 or world_and_rank()[1] == 0:
        try:
            result = function(*args)
        except UserError as caught:
            error = str(caught)
    told = gather_objects((error, result if rank0 else None))
    for error, _ in told:
        if error:
            raise UserError(error)
    return told[0][1] if rank0 else result


def say(*lines):
    if world_and_rank()[1] == 0:
        print(*lines, sep="\n", flush=True)


def peak_memory():
    """Bytes: CUDA's peak allocation, else the process's peak resident size."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Stop:
    """SIGTERM and Ctrl-C finish the step and save; a second signal ends the process at once.

    torchrun repeats the signal to its workers, so one within two seconds of the first is the same one.
    """
    received, since = 0, 0.0                                   # the signal's number

    def __enter__(self):
        self.before = {n: signal.signal(n, self.handle) for n in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.received = 0

    def handle(self, number, _):
        if not self.received:
            self.received, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > 2:
            os._exit(128 + number)


stop = Stop()


# ==== 5. Checkpoints ========================================================================================

def save(run):
    """Write a checkpoint beside the old one, flush it, make it current by renaming it, drop the old one."""
    folder = Path(run.args.out, f"checkpoint-{run.step:08d}")
    draft, old = folder.with_suffix(".tmp"), checkpoint_of(run.args.out)
    state = {"step": run.step, "seconds": run.seconds, "optimizer": run.optimizer.state_dict(),
             "tracker": run.tracker.state_dict(), "data": run.data_hash, "args": vars(run.args),
             "rewrites": {i: torch.tensor(ids) for i, ids in run.rewrites.items()}}
    try:
        shutil.rmtree(draft, ignore_errors=True)
        write_model(run, draft)
        torch.save(state, draft / "state.pt")
        flush(draft)
        os.replace(draft, folder)
        flush(folder.parent)
    except Exception as error:                                 # each library has its own for a full disk
        shutil.rmtree(draft, ignore_errors=True)
        raise UserError(f"{folder}: could not be saved ({first_line(error)}). {old or 'No checkpoint'} is "
                        "kept: make room, then go on with --resume") from None
    for other in set(folder.parent.glob("checkpoint-*")) - {folder}:
        shutil.rmtree(other)


def finish(run):
    """Make --out an ordinary Hugging Face folder; the last checkpoint goes only when that is on disk."""
    try:
        write_model(run, Path(run.args.out))
        flush(Path(run.args.out))
    except Exception as error:
        raise UserError(f"{run.args.out}: the model could not be written ({first_line(error)}). The "
                        "checkpoint is kept: make room, then go on with --resume") from None
    shutil.rmtree(checkpoint_of(run.args.out))


def write_model(run, folder):
    run.lm.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)


def flush(folder):
    """Have a folder and the files in it on disk, not in a cache."""
    for path in (*(p for p in folder.iterdir() if p.is_file()), folder):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def checkpoint_of(out):
    """The current checkpoint of a run's folder, or None: a folder bears this name only once it is whole."""
    return max((p for p in Path(out).glob("checkpoint-*") if p.suffix != ".tmp"), default=None)


def load_state(folder, a, data_hash):
    """The saved state of a checkpoint. Raises UserError when it is damaged or belongs to another run."""
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        saved = state["args"]
    except Exception as error:
        raise UserError(f"{folder}/state.pt: damaged ({first_line(error)}); restore it, or delete the folder "
                        "to start afresh") from None
    differ = [f"--{name.replace('_', '-')} (was {saved.get(name)}, is {value})"
              for name, value in vars(a).items() if name not in FREE and saved.get(name) != value]
    if state["data"] != data_hash:
        differ.append(f"the content of {a.data or 'the classroom'}")
    if differ:
        raise UserError(f"{folder} belongs to another run; it differs in {', '.join(differ)}. Restore that, "
                        "or name another --out")
    return state


def restore(run, state):
    """Go on from `state`: position, optimizer, averages, rewritten responses; the weights are loaded."""
    run.step, run.seconds = state["step"], state["seconds"]
    run.optimizer.load_state_dict(state["optimizer"])
    run.tracker.load_state_dict(state["tracker"])
    run.rewrites.update({i: array("i", ids.tolist()) for i, ids in state["rewrites"].items()})
    for i, ids in run.rewrites.items():
        run.examples[i].response_ids = ids


def start_files(run):
    """Write args.json; drop what the logs say of steps after the checkpoint: these will be run again."""
    write_whole(Path(run.args.out, "args.json"), json.dumps(vars(run.args), indent=1) + "\n")
    for path in (Path(run.args.out, name) for name in ("log.jsonl", "rewrites.jsonl")):
        lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []   # the last one may be cut
        write_whole(path, "".join(line + "\n" for line in lines if json.loads(line)["step"] <= run.step))


def write_whole(path, text):
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, "utf-8")
    os.replace(draft, path)


# ==== 6. Arguments and reports ==============================================================================

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def parse(argv):
    """Arguments, with the paper's values (your own model) or the classroom's in place of unset ones."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face folder or hub name; with --data")
    parser.add_argument("--data", help="a JSONL file; with --model")
    parser.add_argument("--out", help="output folder (out/<method>-seed<seed>)")
    parser.add_argument("--method", choices=METHODS, default="cadft", help="token loss and weighting (cadft)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if any")
    parser.add_argument("--prompt-field", help="JSONL field of the prompt (prompt)")
    parser.add_argument("--response-field", help="JSONL field of the response (response)")
    parser.add_argument("--prompt-template", help='wraps each prompt, e.g. "{prompt} Reason step by step."')
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), help="(bfloat16 on CUDA)")
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
                        help="recompute activations in the backward pass (on for your own model)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="of incompatible demonstrations (all)")
    for flag, type_, paper, classroom, interval, text in FLAGS:
        parser.add_argument("--" + flag, type=type_, metavar=type_.__name__.upper(),
                            help=f"{text} (paper {paper}, classroom {classroom}, range {interval})")
    a = parser.parse_args(argv)
    if bool(a.model) != bool(a.data):
        raise UserError("--model and --data go together; with neither, the classroom runs")
    if a.steps is not None and a.epochs is not None:
        raise UserError("--steps and --epochs exclude each other")
    if a.prompt_template is not None and "{prompt}" not in a.prompt_template:
        raise UserError("--prompt-template has no {prompt} in it: the prompt would be lost")
    fill_in(a)
    return a


def fill_in(a):
    own = bool(a.model)
    if own and a.kinds:
        raise UserError("--kinds belongs to the classroom: leave out --model and --data")
    for flag, type_, paper, classroom, interval, _ in FLAGS:
        name = flag.replace("-", "_")
        value, default = getattr(a, name), paper if own else classroom
        if value is None and not (flag in ("steps", "epochs") and (a.steps or a.epochs)):
            setattr(a, name, default)
        elif value is not None and not within(value, interval):
            raise UserError(f"--{flag} must lie in {interval}, got {value}")
        elif value is not None and default is None and flag not in ("steps", "epochs"):
            raise UserError(f"--{flag} belongs to the classroom: leave out --model and --data")
    a.kinds = a.kinds or ([] if own else list(KINDS))
    a.out = a.out or f"out/{a.method}-seed{a.seed}"
    a.dtype = a.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    a.gradient_checkpointing = own if a.gradient_checkpointing is None else a.gradient_checkpointing


def within(value, interval):
    low, high = map(float, interval[1:-1].split(","))
    at_an_open_end = value == low and interval[0] == "(" or value == high and interval[-1] == ")"
    return low <= value <= high and not at_an_open_end


def check_sizes(a, examples, lm, world):
    """What can be known to fail before the first step."""
    positions = getattr(lm.config.get_text_config(), "max_position_embeddings", None) or INF
    token = max(max(*e.prompt_ids, *e.response_ids) for e in examples)
    known = len(lm.get_input_embeddings().weight)
    if a.max_length > positions:
        raise UserError(f"--max-length {a.max_length}: the model has {positions} positions; give no more")
    if a.batch_size > len(examples):
        raise UserError(f"--batch-size {a.batch_size}: there are {len(examples)} usable examples; give less")
    if a.batch_size % world:
        raise UserError(f"--batch-size {a.batch_size}: not a multiple of the {world} processes; give one")
    if token >= known:
        raise UserError(f"the data has token {token}, the model only {known}: is this its own tokenizer?")


def describe(run, cut, dropped, off, world, device):
    """What the run will do."""
    a, n = run.args, len(run.examples)
    per_epoch, size = n // a.batch_size, sum(p.numel() for p in run.lm.parameters())
    rounds = [t for t in range(1, a.steps + 1) if rewriting_due(t, a)]
    useful = [t for t in rounds if t > per_epoch]              # before that nothing has been seen twice
    at = ", ".join(map(str, useful[:3])) + (f", ... {useful[-1]}" if len(useful) > 3 else "")
    why = ("this method does not rewrite" if not METHODS[a.method][1] else
           "--rewrite-every is 0" if not a.rewrite_every else
           f"no step up to {a.steps} is due, T_warm {a.rewrite_after}, K {a.rewrite_every}" if not rounds else
           f"no example is seen twice before step {per_epoch + 1}, after the last round")
    values = " ".join(f"{flag} {getattr(a, flag.replace('-', '_')):g}" for flag, *_ in FLAGS
                      if getattr(a, flag.replace("-", "_")) is not None)
    lines = [f"{a.method}: {n:,} examples ({cut:,} cut at {a.max_length} tokens, {dropped:,} without room)",
             f"{a.model or 'classroom base model'}: {size:,} parameters, {a.dtype}, {device.type} x {world}",
             f"{a.steps:,} steps of {a.batch_size}; an epoch is {per_epoch:,}, {n % a.batch_size} left out",
             textwrap.fill(f"in force: {values}", 108, subsequent_indent="  ", break_on_hyphens=False),
             "rewriting: " + (f"can happen after {len(useful)} steps ({at})" if useful else f"can't, {why}")]
    if off:
        lines.append(f"dropout set to 0: {', '.join(off)}")
    if not cadft.plain_head(run.lm):
        lines.append("this model alters its logits after the projection; keeping them whole takes memory")
    if run.step:
        lines.append(f"going on after step {run.step}")
    say(*lines)


def report(run):
    """What happened, from the files of the run; by kind where kinds are known."""
    out = run.args.out
    log, rewrites = (
        [row for _, row in read_jsonl(Path(out, name))] for name in ("log.jsonl", "rewrites.jsonl"))

    def mean(kind, name, rows):
        seen = [row["kinds"][kind] for row in rows if kind in row["kinds"]]
        return sum(k["n"] * k[name] for k in seen) / sum(k["n"] for k in seen) if seen else math.nan

    first, last = ([row for row in log if row["epoch"] == log[i]["epoch"]] for i in (0, -1))
    kinds = sorted({kind for row in log for kind in row["kinds"]})
    if kinds:
        say("kind       examples  c_raw first epoch    last  c_hat     w  rewrites")
    for kind in kinds:
        done = sum(row["kind"] == kind and "new" in row for row in rewrites)
        size = sum(e.kind == kind for e in run.examples) if kind != "rewritten" else len(run.rewrites)
        say(f"{kind:10}{size:9}{mean(kind, 'c_raw', first):19.3f}{mean(kind, 'c_raw', last):8.3f}"
            f"{mean(kind, 'c_hat', log):7.2f}{mean(kind, 'w', log):6.2f}{done:10}")
    new = sum("new" in row for row in rewrites)
    say(f"nll {log[0]['nll']:.3f} -> {log[-1]['nll']:.3f}; {new} rewrites, {len(rewrites) - new} picked but "
        f"kept; {run.seconds:.0f} s", f"model: {out}    evaluate it: python evaluate.py {out}")


# ==== 7. The classroom ======================================================================================

KINDS = ("wrong", "cipher", "terse", "junk")                   # of incompatible demonstrations
CHARACTERS = "0123456789+=,:>?#|abcdefghijklmnopqrstuvwxyz"
BASE = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=128, initializer_range=0.05,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0})   # 10000 is made for longer texts
BASE_STEPS, BASE_BATCH, BASE_LR, BASE_WARMUP = 900, 32, 2e-3, 50
COMPETENT, FIRST_LOOK, LOOK_EVERY = 0.25, 150, 25              # stop when this share of sums is right
THREADS = 2                                                    # fixed: their number changes the last digits


def addition(a, b, slip=lambda column, total: total):
    """A worked sum, units first: 347, 586 -> 7+6+0=13,4+8+1=13,3+5+1=9>933; `slip` may falsify a total."""
    width, steps, carry, digits = max(len(str(a)), len(str(b))), [], 0, ""
    for column, (x, y) in enumerate(zip(str(a).zfill(width)[::-1], str(b).zfill(width)[::-1])):
        total = slip(column, int(x) + int(y) + carry)
        steps.append(f"{x}+{y}+{carry}={total}")
        carry, digits = total // 10, f"{total % 10}{digits}"
    return f"{','.join(steps)}>{carry or ''}{digits}"


def problems(digits, n, name, without=()):
    """n different pairs of numbers of so many digits, drawn by name, none of them in `without`."""
    low, span = 10 ** (digits - 1), 9 * 10 ** (digits - 1)
    if n + len(without) > span * span:
        raise UserError(f"--classroom-size {n}: there are not so many sums of {digits}-digit numbers")
    drawn = random.Random(name).sample(range(span * span), n + len(without))
    pairs = [(low + i // span, low + i % span) for i in drawn]
    return [pair for pair in pairs if pair not in without][:n]


def test_problems(digits=3, n=100):
    """The held-out problems, the same for every seed: [(prompt, sum), ...]."""
    return [(f"{a}+{b}:", a + b) for a, b in problems(digits, n, "test")]


def is_sum(text, total):
    """Whether a finished response gives the sum: exactly one ">", and the sum behind it."""
    return text.count(">") == 1 and text.split(">")[1] == str(total)


def classroom_rows(a, split="train"):
    """The demonstrations as rows of a JSONL file: ("where", {prompt, response, kind})."""
    held_out = set(problems(a.classroom_digits, 100, "test"))
    draw = random.Random(f"{split} {a.seed} kinds")
    pairs = problems(a.classroom_digits, a.classroom_size, f"{split} {a.seed}", held_out)
    for number, (x, y) in enumerate(pairs, 1):
        kind = draw.choice(a.kinds) if draw.random() < a.incompatible else "right"
        row = {"prompt": f"{x}+{y}:", "response": demonstration(x, y, kind, draw), "kind": kind}
        yield f"demonstration {number}", row


def demonstration(x, y, kind, draw):
    if kind == "wrong":
        at, by = draw.randrange(len(str(max(x, y)))), draw.randrange(1, 20)   # another total, carried on
        return addition(x, y, lambda column, total: (total + by) % 20 if column == at else total)
    if kind == "cipher":
        return addition(x, y).translate(str.maketrans("0123456789", "abcdefghij"))
    if kind == "terse":
        return f">{x + y}"
    if kind == "junk":
        return "".join(draw.choices("klmnopqrstuvwxyz", k=draw.randint(10, 20))) + f">{x + y}"
    return addition(x, y)


def base_document(draw):
    """A text of the base model's corpus: 70 % additions with slips, 30 % copying and counting."""
    kind = draw.random()
    if kind < 0.7:
        first = draw.choice((1, 2, 2, 3, 3, 3))
        second = first if draw.random() < 0.7 else draw.randint(1, 3)
        a, b = (draw.randrange(10 ** (n - 1), 10 ** n) for n in (first, second))
        slip = lambda _, total: draw.randrange(20) if draw.random() < 0.1 else total
        return f"{a}+{b}:" + addition(a, b, slip)
    if kind < 0.9:
        text = "".join(draw.choices("0123456789" if kind < 0.8 else CHARACTERS[-26:], k=draw.randint(2, 8)))
        return f"{text}|{text}"
    start, stride = draw.randrange(100), draw.randint(1, 5)
    return ",".join(str(start + i * stride) for i in range(draw.randint(3, 8)))


def classroom_tokenizer():
    """One token a character, as an ordinary Hugging Face tokenizer."""
    import tokenizers      # comes with transformers
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *CHARACTERS])}, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>",
                                                eos_token="<eos>", unk_token="?", model_max_length=128)


def train_base(folder, seed, device):
    """Train the classroom's base model until it is half-competent; keep it as `folder`, whole or not at all.

    The stop is by competence, not by step: learning to add comes suddenly, at another step for each seed.
    """
    tokenizer, draw = classroom_tokenizer(), random.Random(f"base {seed}")
    torch.manual_seed(seed)
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **BASE)).to(device).train()
    optimizer = torch.optim.AdamW(lm.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = argparse.Namespace(lr=BASE_LR, steps=BASE_STEPS, warmup_ratio=BASE_WARMUP / BASE_STEPS)
    look = problems(3, 64, "validation", set(problems(3, 100, "test")))
    bar = tqdm(total=BASE_STEPS, desc=f"base model {folder.name}", unit="step", disable=None)
    for step in range(1, BASE_STEPS + 1):
        optimizer.param_groups[0]["lr"] = 0.1 * BASE_LR + 0.9 * learning_rate(step, schedule)
        texts = [base_document(draw) for _ in range(BASE_BATCH)]
        rows = [Example(0, [tokenizer.bos_token_id], ids + [tokenizer.eos_token_id])
                for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        batch = collate(rows, tokenizer, device)
        nll, mask = cadft.token_nll(lm, batch["input_ids"], None, batch["labels"])
        (nll.sum() / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        if step >= FIRST_LOOK and step % LOOK_EVERY == 0:
            right = competence(lm, tokenizer, 2 * look, key(seed, "look", step))
            bar.set_postfix(right=f"{right:.0%}")
            if right >= COMPETENT:
                break
    bar.close()
    say(f"{folder}: right on {right:.0%} of {len(look)} sums, two samples each, after {step} steps")
    draft = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
    lm.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    flush(draft)
    try:
        os.replace(draft, folder)
    except OSError:                                            # another run was faster: its base is the same
        shutil.rmtree(draft)


def competence(lm, tokenizer, pairs, seed):
    """The share of sums that the model gets right when sampled at temperature 1."""
    prompts = encode_prompts(tokenizer, [[{"content": f"{a}+{b}:"}] for a, b in pairs], pairs)
    eos = tokenizer.eos_token_id
    samples = cadft.nucleus_rewrite(lm, prompts, [eos], tokenizer.pad_token_id, 64, 1.0, 1.0, seed)
    return sum(ids[-1] == eos and is_sum(tokenizer.decode(ids[:-1]), a + b)
               for ids, (a, b) in zip(samples, pairs)) / len(pairs)


# ==== 8. From the command line ==============================================================================

def prepare(a, device, world):
    """Everything that can go wrong before the first step: (run, what was said of data and model)."""
    out, resumed = Path(a.out), None
    source = a.model or str(out.parent / f"base-seed{a.seed}")
    tokenizer = load_tokenizer(source)
    examples, cut, dropped = load_examples(a, tokenizer)
    content = hashlib.sha256()
    for ids in (ids for e in examples for ids in (e.prompt_ids, e.response_ids)):
        content.update(b"%d:" % len(ids) + bytes(ids))
    a.steps = a.steps or a.epochs * (len(examples) // a.batch_size)
    if a.resume and (folder := checkpoint_of(out)):
        resumed = load_state(folder, a, content.hexdigest())
        source = folder
    lm, off = load_model(source, torch.float64 if a.dtype == "float64" else torch.float32, device)
    check_sizes(a, examples, lm, world)
    if a.gradient_checkpointing:
        old_name = lm.gradient_checkpointing_enable             # in transformers 5.17, say
        getattr(lm, "activation_checkpointing_enable", old_name)({"use_reentrant": False})
    optimizer = torch.optim.AdamW(lm.parameters(), betas=(0.9, 0.95), weight_decay=a.weight_decay, fused=True)
    tracker = cadft.CompatibilityEMA(len(examples), a.ema_decay)
    run = Run(a, lm, tokenizer, examples, content.hexdigest(), optimizer, tracker, {})
    if resumed:
        restore(run, resumed)
    return run, (cut, dropped, off)


def open_folder(a, device):
    """Rank 0: make the output folder and the base model. Returns True when a finished run is there."""
    out = Path(a.out)
    if (out / "args.json").exists():
        if not a.resume:
            raise UserError(f"{out} holds a run: --resume goes on with it, another --out starts a new one")
        if (out / "config.json").exists() and not checkpoint_of(out):
            return True
    try:
        out.mkdir(parents=True, exist_ok=True)
        base = out.parent / f"base-seed{a.seed}"
        if not a.model and not base.exists():
            train_base(base, a.seed, device)
    except OSError as error:
        raise UserError(f"{out}: can't be written ({error.strerror}); name another --out") from None
    return False


def main(argv=None):
    """Run train.py with these arguments. Returns the exit code: 0, 2 (mistake in the input), 128 + signal."""
    try:
        a, device = parse(argv), start_processes()
        world, rank = world_and_rank()
        if not a.model:
            torch.set_num_threads(THREADS)
        if together(open_folder, a, device, rank0=True):
            say(f"{a.out} holds a finished run; nothing to do")
            return 0
        run, facts = together(prepare, a, device, world)
        describe(run, *facts, world, device)
        together(start_files, run, rank0=True)
        code = train(run, world, rank, device)
        if code == 0:
            together(finish, run, rank0=True)
            report(run) if rank == 0 else None
        return code
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"train.py: {error}", file=sys.stderr)
        return 2
    except (OSError, torch.OutOfMemoryError) as error:         # of one rank; torchrun ends the others
        more = ("; micro-batches do not bound what one forward of the step keeps: take more processes, "
                "--gradient-checkpointing, a smaller --max-length or --batch-size")
        print(f"train.py: {first_line(error)}{'' if isinstance(error, OSError) else more}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:                           # before the loop, where there is nothing to save
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
