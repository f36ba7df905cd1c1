"""The table of ops: one layer's, in the paper's names, with all that others ask of an op.

A new op is added here, as a method of the layer program (`step.layer`) under its name, and where its machines say
what it computes (`step.trace`) and costs (`timeline.jobs`); plans, search, simulator and inspector read the rest here.

KQV includes the norm before it, rotary embedding and the KV append; UG includes the norm before it, SiLU and the
product. In a layer of experts ROUTE includes the norm, the router's scores and the order of rows by expert; DISPATCH
brings the rows into that order, UG and D are grouped GEMMs, and COMBINE adds up what the experts of a row gave.

How attention output becomes the next residual is a strategy of each nano-batch (rows n, p devices, hidden H, head width
w = heads * d):

    gather   GEMV.AG [n, w/p] -> [n, w],  O split over N [n, H/p],  O.AG -> [n, H]           D.AR
    reduce   O split over K: partial sums [n, H],  O.AR                                      D.AR
    scatter  O split over K,  O.RS -> [n/p, H],  norm on the shards,  O.AG -> [n, H]         D.RS, D.AG (norm between)
"""

from __future__ import annotations

from dataclasses import dataclass

COMPUTE, MEMORY, NETWORK = "compute", "memory", "network"
GEMM, ATTENTION, COLLECTIVE, ROUTING = "gemm", "attention", "collective", "routing"
ALL, DECODE, PREFILL, NANO_BATCH = "all", "decode", "prefill", "nano-batch"
HIDDEN, WIDTH = "hidden", "width"


@dataclass(frozen=True)
class Op:
    """bound   the resource that limits it
    kind    what its kernel is
    rows    which rows of the step it is done on; other than those of a nano-batch, a plan may cut them finer
    reads   what it reads the result of, besides the op before it in its nano-batch's strategy; `causal`: of all rows of
            its own kind up to its last
    lane    it may run on a stream of its own: bound by memory, with a kernel that can leave SMs to a GEMM
    columns of what a collective gives: HIDDEN, as the residual, or WIDTH, all heads together
    experts it is there only in models that have layers of experts; in their other layers it does nothing
    """

    name: str
    bound: str
    kind: str
    rows: str = NANO_BATCH
    reads: str | None = None
    causal: bool = False
    lane: bool = False
    columns: str = HIDDEN
    experts: bool = False

    @property
    def splittable(self) -> bool:
        return self.rows != NANO_BATCH

    @property
    def collective(self) -> str:
        """As XLA names it."""
        return {"AG": "all-gather", "AR": "all-reduce", "RS": "reduce-scatter"}[self.name.rpartition(".")[2]]


# In dependency order, which is also the issue order of a plan that names none: op by op, each over all its pieces.
OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("KQV", COMPUTE, GEMM, ALL),
        Op("GEMV", MEMORY, ATTENTION, DECODE, reads="KQV", lane=True),
        Op("PF", COMPUTE, ATTENTION, PREFILL, reads="KQV", causal=True),
        Op("GEMV.AG", NETWORK, COLLECTIVE, columns=WIDTH),
        Op("O", COMPUTE, GEMM),
        Op("O.RS", NETWORK, COLLECTIVE),
        Op("O.AG", NETWORK, COLLECTIVE),
        Op("O.AR", NETWORK, COLLECTIVE),
        Op("ROUTE", MEMORY, ROUTING, experts=True),
        Op("DISPATCH", MEMORY, ROUTING, experts=True),
        Op("UG", COMPUTE, GEMM),
        Op("D", COMPUTE, GEMM),
        Op("COMBINE", MEMORY, ROUTING, experts=True),
        Op("D.AR", NETWORK, COLLECTIVE),
        Op("D.RS", NETWORK, COLLECTIVE),
        Op("D.AG", NETWORK, COLLECTIVE),
    )
}

# Ops over the rows of a nano-batch, after attention, in dependency order.
STRATEGIES: dict[str, tuple[str, ...]] = {
    "gather": ("GEMV.AG", "O", "O.AG", "ROUTE", "DISPATCH", "UG", "D", "COMBINE", "D.AR"),
    "reduce": ("O", "O.AR", "ROUTE", "DISPATCH", "UG", "D", "COMBINE", "D.AR"),
    "scatter": ("O", "O.RS", "O.AG", "ROUTE", "DISPATCH", "UG", "D", "COMBINE", "D.RS", "D.AG"),
}

# What the layer program does without a plan's word: keys and values of a KQV piece go to the pages.
APPEND, APPENDED = "KV.APPEND", "KQV"

# Before the first layer and after the last.
OUTER = frozenset(["EMBED", "EMBED.AR", "HEAD", "HEAD.AG", "SAMPLE", "SCORE"])


def of_kind(kind: str) -> tuple[str, ...]:
    """Names of the ops of a kind."""
    return tuple(name for name, op in OPS.items() if op.kind == kind)
