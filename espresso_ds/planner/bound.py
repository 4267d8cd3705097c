from __future__ import annotations
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.profile import ModelTrace
from .cost import LINKS, Resource
from .floors import Floats, Floors
from .menu import Menu

GROUPS = 24
ROUNDS = 15
CLOSE = 1e-4

@dataclass(frozen=True)
class Bound:
    seconds: float
    limit: str

@dataclass(frozen=True)
class Block:
    mark: int
    numel: int
    choices: NDArray[np.int_]

@dataclass(frozen=True)
class Rows:
    """T >= base[i] + sum over blocks at or after start[i] of weights[i] . aspects"""
    base: Floats
    start: NDArray[np.int_]
    weights: Floats
    names: list


def lower_bound(trace, menu, incumbent_s=float("inf"), exact=()):
    off = trace.forward_s + trace.after_s
    U = incumbent_s - off
    tensors = trace.tensors
    n = len(tensors)
    num = np.array([t.numel for t in tensors]); rd = np.array([t.ready_s for t in tensors])
    fl = Floors(menu, int(num.sum()))
    isx = np.zeros(n, dtype=bool); isx[list(exact)] = True
    marks = _marks(num)
    every = menu.everything.astype(int)
    blocks = []
    for m, s in enumerate(marks):
        e = marks[m + 1] if m + 1 < len(marks) else n
        for flag in (False, True):
            total = int(num[s:e][isx[s:e] == flag].sum())
            if total:
                blocks.append(Block(m, total, menu.uncompressed.astype(int) if flag else every))
    best = (float("inf"), "")
    for g in range(len(marks) - 1, -1, -1):  # last unit starts in (marks[g-1], marks[g]]; contains marks[g]..n
        s = marks[g]
        N = int(num[s:].sum())
        if rd[-1] + N * 0 > min(best[0], U): break
        ch = menu.uncompressed.astype(int) if isx[s:].any() else every
        w = fl.rates[ch, -5:-1] * N
        ch = ch[rd[-1] + w.max(1) <= min(U, best[0])]
        if not len(ch): break
        own = fl.last(N, ch)
        keep = rd[-1] + own[:, -1] <= min(U, best[0])
        if not keep.any(): break
        rows = _rows(trace, fl, marks, g)
        v = _solve(fl, rows, [b for b in blocks if b.mark < g], g, own[keep], min(U, best[0]))
        if v[0] < best[0]: best = v
    B = min(max(best[0], trace.backward_s), U)
    return Bound(B + off, best[1])

def _marks(num):
    n = len(num); cum = np.cumsum(num); M = cum[-1]
    marks = {0, n - 1}
    for g in range(1, GROUPS): marks.add(int(np.searchsorted(cum, M * g / GROUPS)))
    for b in np.argsort(-num)[:4]: marks |= {int(b), int(b) + 1}
    return sorted(x for x in marks if x < n)

def _rows(trace, fl, marks, g):
    D = fl.rates.shape[1]
    base, start, weights, names = [], [], [], []
    def add(b, s, w, name):
        base.append(b); start.append(s); names.append(name)
        row = np.zeros(D)
        for col, x in w: row[col] = x
        weights.append(row)
    last = trace.tensors[-1].ready_s
    add(last, 0, [(D - 1, 1.0)], "way of the last unit")
    add(trace.backward_s, 0, [(fl.work(Resource.COMPUTE), 1.0)], "gpu")
    for k in range(1, fl.lanes + 1):
        add(last, 0, [(fl.work(Resource.COMPUTE, k), 1.0)], f"gpu {k}")
    for m, s in enumerate(marks):
        if m > g: break
        for r in (Resource.CPU, *LINKS):
            add(trace.tensors[s].ready_s, m, [(fl.work(r), 1.0)], f"{r.name} from {s}")
            if m < g:
                for k in range(1, fl.lanes + 1):
                    add(trace.tensors[s].ready_s, m, [(fl.work(r, k), 1.0)], f"{r.name} {k} from {s}")
    return Rows(np.array(base), np.array(start), np.array(weights), names)

def _solve(fl, rows, blocks, g, own, limit):
    from scipy.optimize import linprog
    D = fl.rates.shape[1]
    R = len(rows.base)
    nb = len(blocks)
    orderless = np.zeros(D); orderless[-5:-1] = 1
    # features
    W = []
    for b in blocks:
        w = rows.weights * (rows.start <= b.mark)[:, None]
        if b.mark >= g - 1: w = w * orderless
        W.append(w)
    W.append(rows.weights)  # last
    feats = [fl.rates[b.choices] * b.numel for b in blocks] + [own]
    # initial columns
    active = []
    for f in feats:
        c = {int(f[:, d].argmin()) for d in range(D - 5, D)} | {int(f[:, D - 5:D - 1].sum(1).argmin()), int(f[:,D-5:D-1].max(1).argmin())}
        active.append(sorted(c))
    best = -np.inf; lim = ""
    for it in range(ROUNDS):
        cols = []; owner = []
        for i, (f, w, a) in enumerate(zip(feats, W, active)):
            cols.append(w @ f[a].T); owner += [i] * len(a)
        A = np.hstack(cols); owner = np.array(owner)
        A_ub = np.c_[A, -np.ones(R)]
        A_eq = np.zeros((len(feats), A.shape[1] + 1)); A_eq[owner, np.arange(A.shape[1])] = 1
        c = np.zeros(A.shape[1] + 1); c[-1] = 1
        res = linprog(c, A_ub, -rows.base, A_eq, np.ones(len(feats)), method="highs")
        y = np.maximum(0, -res.ineqlin.marginals); y /= y.sum()
        value = y @ rows.base
        grew = False
        for i, (f, w) in enumerate(zip(feats, W)):
            price = f @ (y @ w)
            j = int(price.argmin()); value += price[j]
            if j not in active[i]: active[i].append(j); grew = True
        if value > best: best = value; lim = [(rows.names[k], round(float(y[k]), 3)) for k in np.argsort(-y)[:6] if y[k] > 1e-6]
        if not grew or res.fun - best <= CLOSE * best or best >= limit: break
    return best, (lim, it, round(res.fun*1e3, 2))
