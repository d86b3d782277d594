"""model.py in fewer operations: train.py runs speed_up(). The adapters' part is fast_lora2.py.

The numbers are those of model.py but for rounding: it is the oracle of tests/test_fast_model.py.
"""
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from lora2 import LoRA2Linear
from methods.fast_lora2 import (FastLoRA2Linear, add_gradients, cast_frozen, product_dtype,
                                shared_updates)
from model import DisentangledSelfAttention, Encoder, SelfAttention, bucket, split_heads

__all__ = ["Eager", "Recorded", "add_gradients", "make_differentiate", "shared_updates", "speed_up"]


def speed_up(net, dtype="fp32", compile=False):
    """Let a model of model.py, adapters included, compute the same in fewer operations.

    Only the classes of its modules change: parameters, state_dict(), merging and saving do not.
    Call it last: when adapters are added, the rest is frozen and the model is where it will run.
    With "bf16", frozen weights must not change afterwards, and a model that is moved needs another
    call. Adapters that are added afterwards stay plain and slow; with "bf16" they are refused.

    net: a SequenceClassifier, changed in place.
    dtype: "fp32", or "bf16" for a model under autocast, whose frozen weights are cast here, once.
    compile: whether to compile each layer, for any number of rows and tokens.
    Returns net.
    """
    faster = {
        LoRA2Linear: FastLoRA2Linear,
        nn.Dropout: CheapDropout,
        SelfAttention: FastSelfAttention,
        DisentangledSelfAttention: FastDisentangledSelfAttention,
        Encoder: FastEncoder,
    }
    for module in net.modules():
        module.__class__ = faster.get(type(module), type(module))
    if dtype == "bf16":
        cast_frozen(net, torch.bfloat16)
    if compile:
        torch._dynamo.config.cache_size_limit = 64          # also called recompile_limit since 2.7
        for layer in net.backbone.encoder.layer:
            layer.compile(dynamic=True)
    return net


def make_differentiate(net, parameters, eager=False):
    """What differentiates in train.py: a Recorded on a GPU; an Eager elsewhere, or if asked for.

    parameters: those that are trained. If word embeddings are among them it is an Eager too: their
    backward pass sorts, which cannot be recorded.
    """
    words = net.backbone.embeddings.word_embeddings.weight
    can_record = words.device.type == "cuda" and not words.requires_grad
    return Recorded(parameters) if can_record and not eager else Eager(parameters)


class Eager:
    """differentiate(function, *inputs, weight=w) adds w times the gradients of function(*inputs), a
    scalar, to those of the parameters, and returns its value."""

    def __init__(self, parameters):
        self.parameters = parameters

    def __call__(self, function, *inputs, weight=1):
        value = function(*inputs)
        if inputs:                                          # the loss of a batch
            (weight * value).backward()                     # also to leaves beside these
        else:                                               # R: all small, added in one operation
            add_gradients(value, self.parameters, weight)
        return value.detach()


class Recorded:
    """An Eager for a GPU: each call is one launch, where a loss takes some 1,800.

    The host takes longer to launch a step's operations than a fast GPU to do them. So they are
    recorded as a CUDA graph for each function and shape of its inputs, and replayed: the same
    kernels on the same memory, dropout drawn anew. The first call of a kind is eager, as it also
    makes plans. Gradients get memory of their own, which all graphs know, and their numbers in one
    operation. While it records no autograd graph of these parameters may be alive, as that of a
    loss that was kept: its nodes belong to the stream they were made on, and this one is another.

    A function must be the same object each time; the numbers in its inputs, tensors on the GPU, and
    those of the model are all that may change. A value lasts until the next call of any function.
    """

    def __init__(self, parameters):
        self.parameters = parameters
        self.gradients = [torch.zeros_like(p) for p in parameters]
        self.pool = torch.cuda.graph_pool_handle()          # one graph at a time uses this memory
        self.graphs = {}                                    # key → see record()

    def __call__(self, function, *inputs, weight=1):
        self.own_gradients()
        key = function, weight, *(tensor.shape for tensor in inputs)
        if key not in self.graphs:
            self.graphs[key] = None
            return add_gradients(function(*inputs), self.parameters, weight)
        if self.graphs[key] is None:
            self.graphs[key] = self.record(function, inputs, weight)
        graph, seen, value = self.graphs[key]
        for there, given in zip(seen, inputs):
            there.copy_(given)
        graph.replay()
        return value

    def own_gradients(self):
        """Let the gradients of this step be in the memory that the graphs know."""
        there = [p.grad for p in self.parameters]
        if there[0] is self.gradients[0]:
            return
        if there[0] is None:                                # a new step, after zero_grad()
            torch._foreach_zero_(self.gradients)
        else:                               # a process without rows: the sum of the others' rows
            torch._foreach_copy_(self.gradients, there)
        for parameter, gradient in zip(self.parameters, self.gradients):
            parameter.grad = gradient

    def record(self, function, inputs, weight):
        """(graph, the memory it reads inputs from, the memory it writes the value to)."""
        seen = [tensor.clone() for tensor in inputs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            value = add_gradients(function(*seen), self.parameters, weight)
        return graph, seen, value


class CheapDropout(nn.Dropout):
    """nn.Dropout with cheaper random numbers on a CPU.

    There most of its time goes into a Bernoulli number for each element, 6 % of a training step.
    Here an element gets 16 random bits, a quarter of the work, and p is rounded to 1 / 65,536.
    """

    def forward(self, x):
        on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if not (self.training and on_cpu and 0 < self.p < 1):
            return F.dropout(x, self.p, self.training)
        n = x.numel()
        dropped = min(round(self.p * 2**16), 2**16 - 1)     # of the 65,536 numbers
        bits = torch.empty(math.ceil(n / 4), dtype=torch.int64)
        bits.random_(-2**63, None)                          # 4 × 16 bits in each
        numbers = bits.view(torch.int16)[:n].view(x.shape)  # −32,768 .. 32,767
        keep = (numbers >= dropped - 2**15).view(torch.int8)  # a byte each for the backward pass
        return (x * keep).mul_(2**16 / (2**16 - dropped))


class FastEncoder(Encoder):
    """Encoder that gives its layers what the fast attentions take.

    mask: (B, 1, 1, T), to be added: 0 at tokens, the least number of its dtype at padding.
    table: the rows of the table that T tokens need, (rows, d). order: see relative_rows().
    """

    def forward(self, x, attention_mask):
        relative = ()
        if self.kind == "deberta-v2":
            first, end, order = relative_rows(x.shape[1], self.buckets, self.max_position, x.device)
            relative = self.LayerNorm(self.rel_embeddings.weight[first:end]), order
        dtype = product_dtype(x)
        mask = torch.zeros(attention_mask.shape, dtype=dtype, device=x.device)
        mask = mask.masked_fill(~attention_mask.bool(), torch.finfo(dtype).min)[:, None, None]
        for layer in self.layer:
            x = layer(x, mask, *relative)
        return x


@functools.lru_cache(maxsize=1024)      # never full: a CUDA graph goes on reading the plan it saw
@torch.inference_mode(False)            # a plan that evaluation made first serves training too
def relative_rows(T, buckets, max_position, device):
    """Which rows of the table of relative positions T tokens need: (first, last + 1, order).

    order: (2T − 1,), the row within that slice of each distance −(T − 1) .. T − 1; None as long as
    each distance has a row of its own, up to T = 132 for 256 buckets and 512 positions.
    """
    distance = torch.arange(-(T - 1), T, device="cpu")
    rows = bucket(distance, buckets, max_position) + buckets
    first, last = rows[0].item(), rows[-1].item()
    if last - first == 2 * T - 2:
        return first, last + 1, None
    return first, last + 1, (rows - first).to(device)


class FastSelfAttention(SelfAttention):
    """SelfAttention by torch's fused kernel, which keeps no scores.

    Not in training on a CPU: there a bf16 step of 128 tokens is 1.2 times as fast without it.
    """

    def forward(self, x, mask):
        B, T, d = x.shape
        x = x.to(mask.dtype)                                # under autocast one copy, not three
        q = split_heads(self.query(x), self.heads)          # (B, H, T, e)
        k = split_heads(self.key(x), self.heads)            # (B, H, T, e)
        v = split_heads(self.value(x), self.heads)          # (B, H, T, e)
        if self.training and x.device.type == "cpu":
            scores = (q / math.sqrt(d // self.heads)) @ k.mT    # (B, H, T, T)
            weights = scores.add_(mask).softmax(-1, scores.dtype)
            y = self.dropout(weights) @ v                   # (B, H, T, e)
        else:
            p = self.dropout.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, mask, p)
        return y.transpose(1, 2).reshape(B, T, d)


class FastDisentangledSelfAttention(DisentangledSelfAttention):
    """DisentangledSelfAttention without a gather, which takes a (T, T) index for each head and row.

    Instead q · K_δ and k · Q_δ are made for all distances in their order, (.., T, W), W ≥ 2T − 1,
    and read along diagonals: a row further down the wanted column is one further to the side, which
    is a *view* with other strides. mask, table and order: as FastEncoder has them.
    """

    def forward(self, x, mask, table, order):
        B, T, d = x.shape
        H = self.heads
        x = x.to(mask.dtype)                                # under autocast one copy, not three
        q = heads_first(self.query_proj(x), H).contiguous()  # (H, B, T, e)
        k = heads_first(self.key_proj(x), H).contiguous()   # (H, B, T, e)
        v = heads_first(self.value_proj(x), H).contiguous()  # (H, B, T, e)
        table = self.pos_dropout(table).to(mask.dtype)
        if table.device.type == "cuda":                     # its thin products want rows by eights
            table = F.pad(table, (0, 0, 0, -len(table) % 8))
        K = heads_first(self.key_proj(table), H)            # (H, rows, e)
        Q = heads_first(self.query_proj(table), H)          # (H, rows, e)

        scale = 1 / math.sqrt(3 * d / H)                    # of all terms, where it costs least
        q = q.mul_(scale)
        Q = Q * scale
        if order is not None:                               # several distances share a bucket
            K = take_rows(K, order)                         # (H, 2T − 1, e): −(T − 1) .. T − 1
            Q = take_rows(Q, order)
        missing = 2 * T - K.shape[1]                        # W = 2T: products are faster so
        K = F.pad(K, (0, 0, 1, missing - 1))
        Q = F.pad(Q, (0, 0, 0, missing))
        c2p = torch.bmm(q.view(H, B * T, -1), K.flip(1).mT)  # (H, B·T, W): T − 1 .. −(T − 1)
        p2c = torch.bmm(k.view(H, B * T, -1), Q.mT)         # (H, B·T, W): −(T − 1) .. T − 1

        q = q.view(H * B, T, -1)
        k = k.view(H * B, T, -1)
        v = v.view(H * B, T, -1)
        mask = mask.expand(B, H, 1, T).transpose(0, 1).reshape(H * B, 1, T)
        scores = along_diagonals(c2p, T) + mask             # (H·B, T, T)
        scores.add_(along_diagonals(p2c, T).mT)
        scores.baddbmm_(q, k.mT)
        weights = self.dropout(scores.softmax(-1, scores.dtype))
        y = torch.bmm(weights, v)                           # (H·B, T, e)
        return y.view(H, B, T, -1).permute(1, 2, 0, 3).reshape(B, T, d)


def heads_first(x, H):
    """(..., d) → (H, ..., e): so that one product for each head serves all rows of the batch."""
    return x.unflatten(-1, (H, -1)).movedim(-2, 0)


def take_rows(table, order):
    """(H, rows, e) → (H, W, e), table[:, order].

    On a GPU as a product with ones and zeros: the backward pass of an index would add up rows that
    were taken several times in whatever order its threads come, in the dtype of the table.
    """
    if table.device.type == "cpu":
        return table.index_select(1, order)
    rows = torch.arange(table.shape[1], device=table.device)
    return (order[:, None] == rows).to(table.dtype) @ table


def along_diagonals(S, T):
    """A view of S (H, B·T, W), W ≥ 2T − 1: (H·B, T, T) of S[h, b·T + i, T − 1 − i + j].

    Row i begins one column further left than row i − 1: in memory, a step of W − 1, not of W.
    The backward pass is a strided copy, deterministic where a scatter is not.
    """
    H, rows, W = S.shape
    return S.as_strided((H * rows // T, T, T), (T * W, W - 1, 1), T - 1)
