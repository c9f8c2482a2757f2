"""CADFT, Compatibility-Aware Dynamic Fine-Tuning (Zhou et al., ACL 2026, arXiv 2606.11206): the method alone.

    symbol                                      function                section of the paper
    p_t = pi(y_t | x, y_<t)                     token_nll               DFT, the token-level objective
    c_raw = 1/|y| sum_t -log p_t                compatibility           Dynamic Compatibility Evaluation
    c_hat = (c_raw - mu_B) / (sigma_B + eps)    batch_zscore            Dynamic Compatibility Evaluation
    w = exp(-beta max(0, c_hat))                compatibility_weight    Compatibility-Aware Objective
    L_SFT, L_DFT (and focal, for contrast)      sft_loss, dft_loss      DFT, the token-level objective
    L_CADFT = 1/|B| sum_i w_i L_DFT,i           cadft_loss              Compatibility-Aware Objective
    t >= T_warm, (t - T_warm) mod K = 0         rewriting_due           Delayed Compatibility-Guided Rewriting
    moving average of c_hat                     CompatibilityEMA        Delayed Compatibility-Guided Rewriting
    y_hat ~ pi(. | x), top-p 0.9, T 0.7         nucleus_sample          Delayed Compatibility-Guided Rewriting

Dimensions: B rows on this rank, G rows in the global batch |B|, T tokens, R response tokens of a micro-batch,
H hidden size, V vocabulary, N examples of the data set. "Paper silent" marks a choice that is ours.
"""
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # label of a token that is not part of the response (Hugging Face's convention)

# ---- p_t: the probability of each response token ----------------------------------------------------------

def token_nll(lm, input_ids, attention_mask, labels, chunk=512, **more):
    """-log p_t of every response token; differentiable.

    lm              a Hugging Face causal language model, or a vision-language model
    input_ids       [B, T] prompt, response, padding
    attention_mask  [B, T], or None when padding stands on the right only: causal attention never sees it
    labels          [B, T] the response's token ids, IGNORE elsewhere
    chunk           response tokens whose logits, chunk x V, exist at one time (in the backward pass too);
                    those of all tokens where has_plain_head is False
    more            what else the model's forward takes: pixel_values, image_grid_thw, mm_token_type_ids, ...

    Returns nll [B, T-1], in nats, 0 outside the response, at least float32; and mask [B, T-1], True on the
    response's tokens. Column t is about token t+1. Section: DFT, the token-level objective.
    """
    targets = labels[:, 1:]                                                     # [B, T-1]
    mask = targets != IGNORE                                                    # [B, T-1]
    inputs = dict(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **more)
    if has_plain_head(lm):
        features = lm.base_model(**inputs).last_hidden_state                    # [B, T, H]
        head = lm.get_output_embeddings()
    else:                                   # the model alters its logits: take its own, whole
        features = lm(**inputs).logits                                          # [B, T, V]
        head = torch.nn.Identity()
    features = features[:, :-1][mask]                                           # [R, H] or [R, V]
    parts = [checkpoint(_cross_entropy, head, f, y, use_reentrant=False, preserve_rng_state=False)
             for f, y in zip(features.split(chunk), targets[mask].split(chunk))]
    nll = torch.cat(parts)                                                      # [R]
    return nll.new_zeros(mask.shape).masked_scatter(mask, nll), mask


def _cross_entropy(head, features, targets):
    """-log softmax(z)[y] of one chunk, [chunk], in float32 or more: bfloat16 goes up, float64 stays."""
    z = head(features)                                                          # [chunk, V]
    return cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), targets, reduction="none")


@torch.no_grad()
def has_plain_head(lm):
    """Are the model's logits its output embedding times its last hidden state, and nothing else?

    Soft-capping (Gemma 2) and logit scales (Cohere, Granite) are read from the config, since small logits can
    hide them; else the logits of a short sequence are computed both ways, once. Returns a bool.
    """
    if hasattr(lm, "_has_plain_head"):
        return lm._has_plain_head
    config = lm.config.get_text_config()
    device = lm.get_input_embeddings().weight.device
    settings = "final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"
    altered = any(getattr(config, name, None) not in (None, 1.0) for name in settings)
    if altered or lm.base_model is lm:          # Llama 4 does not name its part without a head
        return False
    ids = torch.arange(8, device=device)[None] % config.vocab_size              # [1, 8]
    was_training = lm.training
    lm.eval()
    with torch.autocast(device.type, enabled=False):
        own = lm(input_ids=ids, use_cache=False).logits                         # [1, 8, V]
        ours = lm.get_output_embeddings()(lm.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    lm.train(was_training)
    tolerance = 8 * torch.finfo(own.dtype).eps * own.abs().max()
    lm._has_plain_head = own.shape == ours.shape and bool((own - ours).abs().max() <= tolerance)
    return lm._has_plain_head


# ---- Dynamic Compatibility Evaluation ---------------------------------------------------------------------

def compatibility(nll, mask):
    """c_raw = 1/|y| sum_t -log p_t. Lower is more compatible.

    nll, mask  [B, T-1] from token_nll. Returns c_raw [B], nats per token, detached. Raises ValueError naming
    rows without a response token. Section: Dynamic Compatibility Evaluation.
    """
    return _response_mean(nll.detach(), mask)


def batch_zscore(c_raw, eps=1e-6):
    """c_hat_i = (c_raw_i - mu_B) / (sigma_B + eps), with mu_B and sigma_B over the effective global batch.

    c_raw  [B] of this rank, all its micro-batches together. Where a torch.distributed process group exists,
           the scores of all ranks are gathered: the result does not depend on how the batch is sharded.
    Returns c_hat [B], no unit, detached; exactly 0 for equal scores and a batch of one, by float64. Raises
    ValueError when ranks hold different numbers of rows. Section: Dynamic Compatibility Evaluation.
    """
    own = c_raw.detach()                                                        # [B]
    counts = gather(torch.full((1,), len(own), device=own.device)).tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"every rank must hold the same number of rows of the global batch, got {counts}")
    scores = gather(own).cpu().double()                             # [G]; Apple's GPUs have no float64
    mu = scores.mean()
    sigma = scores.std(correction=0)                                            # paper silent: population
    return ((own.cpu().double() - mu) / (sigma + eps)).to(c_raw)


def compatibility_weight(c_hat, beta=1.0):
    """w = exp(-beta max(0, c_hat)): 1 for samples no worse than the batch mean, less the worse they are.

    c_hat  [B] from batch_zscore; beta >= 0: 0 gives w = 1 for all, the loss of DFT exactly
    Returns w [B] in [0, 1], detached. Raises ValueError for a beta out of range.
    Section: Compatibility-Aware Objective.
    """
    if not 0 <= beta < float("inf"):
        raise ValueError(f"beta must be a finite number >= 0, got {beta}")
    return torch.exp(-beta * c_hat.detach().clamp(min=0))


# ---- The objectives ---------------------------------------------------------------------------------------

def sft_loss(nll, mask):
    """L_SFT = 1/|y| sum_t -log p_t; nll, mask [B, T-1] -> [B], with gradient. Raises like compatibility."""
    return _response_mean(nll, mask)


def dft_loss(nll, mask):
    """L_DFT = 1/|y| sum_t -sg(p_t) log p_t, with sg the stop-gradient: its gradient is that of -p_t.

    nll, mask  [B, T-1] from token_nll. Returns [B], with gradient. Raises ValueError as compatibility does.
    Section: DFT, the token-level objective. Paper silent: mean, not sum, over the tokens of a sample.
    """
    p = torch.exp(-nll.detach())                                                # [B, T-1] sg(p_t)
    return _response_mean(p * nll, mask)


def focal_loss(nll, mask, gamma=2.0):
    """L_focal = 1/|y| sum_t -(1 - p_t)^gamma log p_t, with gradient through both factors (Lin et al., 2017).

    CADFT's opposite: focal loss raises what is hard, token by token; CADFT lowers it, sample by sample.
    nll, mask  [B, T-1] from token_nll; gamma >= 1, or 0, which is SFT. Returns [B], with gradient.
    """
    return _response_mean((-torch.expm1(-nll)).pow(gamma) * nll, mask)          # 1 - p = -expm1(-nll)


def _response_mean(x, mask):
    """Mean of x over the response tokens of each row, [B, T-1] -> [B]."""
    count = mask.sum(1)                                                         # [B] |y|
    if (count == 0).any():
        rows = (count == 0).nonzero().flatten().tolist()
        raise ValueError(f"no response token in row(s) {rows}: their compatibility is undefined; drop them")
    return x.masked_fill(~mask, 0).sum(1) / count


def cadft_loss(loss, w):
    """L_CADFT = 1/|B| sum_i w_i L_i, divided by |B| and never by the sum of w.

    loss  [B] this rank's dft_loss (or another), with gradient; equal B on all ranks, as batch_zscore checks
    w     [B] their weights from compatibility_weight
    Returns a scalar with gradient: the mean over this rank's rows. DistributedDataParallel averages over
    ranks of equal shares: the gradient of L_CADFT. w = 1 is DFT. Section: Compatibility-Aware Objective.
    """
    return (w.detach() * loss).mean()


def gather(x):
    """The rows of all ranks, equally many of each, [B, ...] -> [G, ...]; without a process group x."""
    if not dist.is_available() or not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


# ---- Delayed Compatibility-Guided Rewriting ---------------------------------------------------------------

def rewriting_due(t, T_warm=3000, K=1000):
    """Does a round of rewriting follow optimizer step t, counted from 1? K = 0: never. Returns a bool.

    Paper silent: what a step is, when "every K" starts. Section: Delayed Compatibility-Guided Rewriting.
    """
    return K > 0 and t >= T_warm and (t - T_warm) % K == 0


class CompatibilityEMA(torch.nn.Module):
    """m <- decay m + (1 - decay) c_hat for each of N examples, started at the first c_hat.

    Paper silent: coefficient and start value. Examples are seen a few times only, so 0.9 would leave four
    fifths of the weight on the first value after two more visits. decay = 0 keeps the last value. A module,
    so it has a state_dict(). Raises ValueError. Section: Delayed Compatibility-Guided Rewriting.
    """

    def __init__(self, n, decay=0.5):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("mean", torch.zeros(n, dtype=torch.float64))       # [N] 0 until seen
        self.register_buffer("seen", torch.zeros(n, dtype=torch.long))          # [N] visits, since forgotten

    def update(self, index, c_hat):
        """Take in c_hat [G] of the distinct examples index [G]: the global batch, so that all ranks agree."""
        index, c_hat = index.to(self.mean.device), c_hat.detach().to(self.mean.device).to(self.mean.dtype)
        if len(index.unique()) < len(index):
            raise ValueError("an example stands twice in one batch: its average would take in one value only")
        moved = self.decay * self.mean[index] + (1 - self.decay) * c_hat
        self.mean[index] = torch.where(self.seen[index] == 0, c_hat, moved)
        self.seen[index] += 1

    def pick(self, fraction=0.005):
        """The persistently incompatible: seen at least twice, average above 0; a list, the highest first.

        At most `fraction` of N, but one where any qualifies; 0: none. Paper silent: what is persistent.
        """
        order = torch.argsort(self.mean, descending=True, stable=True)          # [N] ties: lower index first
        order = order[(self.seen[order] >= 2) & (self.mean[order] > 0)]
        return order[:max(int(fraction > 0), int(fraction * len(self.mean) + 1e-9))].tolist()  # 0.29*100 < 29

    def forget(self, index):
        """Start example `index` anew. Paper silent: its average described a text that has been replaced."""
        self.mean[index], self.seen[index] = 0.0, 0


@torch.no_grad()
def nucleus_sample(lm, prompts, eos_ids, pad_id, max_new_tokens, top_p=0.9, temperature=0.7, seed=0, **more):
    """y_hat ~ pi(. | x), one for each prompt, by nucleus sampling and with nothing else in force.

    prompts         B lists of token ids
    eos_ids         the ids that end a response; pad_id fills the left of shorter prompts
    max_new_tokens  length limit, the end-of-sequence token included
    temperature     0 is greedy decoding; top_p = 1 with temperature = 1 samples from the model itself
    seed            of this call alone: the caller's random state is left as it was
    more            what else generate takes: pixel_values, suppress_tokens, ...; all [B, width] left-padded
    Returns B lists of token ids without the prompt. What ended ends with a token of eos_ids; the rest was cut
    off. Section: Delayed Compatibility-Guided Rewriting.
    """
    from transformers import GenerationConfig       # only sampling needs it
    device = lm.get_input_embeddings().weight.device
    rows = [torch.as_tensor(p, dtype=torch.long, device=device) for p in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")      # [B, width]
    seen = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    how = dict(do_sample=False)
    if temperature > 0:
        how = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=0)  # unless told, top_k is 50
    only = GenerationConfig(**how, use_cache=True, max_new_tokens=max_new_tokens, eos_token_id=list(eos_ids),
                            pad_token_id=pad_id)
    inputs = only.update(**more)                    # what is no setting of generate is an input of the model
    was_training = lm.training
    its_own = lm.generation_config
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            # generate would fill what `only` leaves open from the checkpoint's own settings (Qwen's, say)
            lm.generation_config = only
            out = lm.eval().generate(ids, generation_config=only, attention_mask=seen, synced_gpus=False,
                                     **inputs)                                  # [B, width + new]
        finally:
            lm.generation_config = its_own
            lm.train(was_training)
    new = []
    for row in out[:, ids.shape[1]:].tolist():
        ends = [i for i, token in enumerate(row) if token in eos_ids]
        new.append(row[:ends[0] + 1] if ends else row)
    return new
